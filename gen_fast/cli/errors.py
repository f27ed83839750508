"""Exit codes of `gen-fast`: every error of gen_fast becomes one line on stderr and a code."""

import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from gen_fast.cli.output import discard_stdout, named_stdout
from gen_fast.errors import (
    AdapterError,
    ConfigError,
    DeviceMemoryError,
    GenFastError,
    ImplementationError,
    InputError,
    ModelNotFoundError,
    NonFiniteError,
    PrefixCacheError,
    PromptError,
    TextError,
    UnsupportedModelError,
    WeightsError,
)
from gen_fast.io.texts import is_utf8

FAILURE, USAGE, BAD_INPUT, BAD_MODEL, NON_FINITE = 1, 2, 3, 4, 5
_EXIT_CODES: tuple[tuple[type[GenFastError], int], ...] = (
    (InputError, BAD_INPUT),
    (TextError, BAD_INPUT),
    (NonFiniteError, NON_FINITE),
    (PromptError, USAGE),
    (ConfigError, USAGE),
    (ImplementationError, USAGE),
    (ModelNotFoundError, BAD_MODEL),
    (UnsupportedModelError, BAD_MODEL),
    (WeightsError, BAD_MODEL),
    (DeviceMemoryError, BAD_MODEL),
    (AdapterError, BAD_MODEL),
    (PrefixCacheError, BAD_MODEL),
)
EPILOG = """\b
Exit codes:
  0  done, also when the reader of stdout stopped early
  1  failed otherwise, such as a file that cannot be written
  2  wrong usage: an option, a prompt or a forced implementation
  3  bad input data: a file, line, row or text
  4  a problem with a model, an adapter or weights
  5  an embedding with NaN or infinity
"""


class Commands(TyperGroup):
    """Turns what a command raises into one line on stderr and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse arguments that could not be decoded: texts, plans and metadata are UTF-8."""
        for argument in args:
            if not is_utf8(argument):
                fail(f"the argument {argument!a} is not UTF-8")
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            result = super().invoke(ctx)
            with named_stdout():
                sys.stdout.flush()
        except GenFastError as error:
            fail(error, code_of(error))
        except BrokenPipeError:
            discard_stdout()
            raise typer.Exit(0) from None
        except OSError as error:
            try:
                sys.stdout.flush()
            except OSError:
                discard_stdout()
            fail(error, FAILURE)
        return result


def fail(message: object, code: int = USAGE) -> NoReturn:
    """Print one line on stderr and exit, within Typer or without."""
    line = " ".join(str(message).split())
    # The name of a file may hold what has no UTF-8 form.
    line = line.encode("utf-8", "backslashreplace").decode("utf-8")
    typer.echo(f"gen-fast: error: {line}", err=True)
    sys.exit(code)


def code_of(error: GenFastError) -> int:
    """The exit code of an error."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), FAILURE)
