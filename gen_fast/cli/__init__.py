"""The command `gen-fast`: one module a group of commands, and the options they share."""

from gen_fast.cli.app import app, main

__all__ = ["app", "main"]
