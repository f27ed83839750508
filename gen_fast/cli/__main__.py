"""`python -m gen_fast.cli`: how torchrun starts a command."""

from gen_fast.cli.app import main

main()
