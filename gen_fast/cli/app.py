"""The command line, `gen-fast`. Data goes to stdout, progress and errors go to stderr.

torch takes seconds to import, so each command imports what it needs when it runs.
"""

import importlib
from typing import Annotated

import typer

from gen_fast.cli import encode, evaluation, export, info, jobs, quantize, training
from gen_fast.cli.allocator import keep_freed_memory
from gen_fast.cli.errors import EPILOG, Commands
from gen_fast.cli.output import open_missing_streams
from gen_fast.version import __version__

app = typer.Typer(
    cls=Commands,
    help="Fast LLM text embeddings.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gen-fast {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Fast LLM text embeddings."""


app.command()(encode.encode)
app.command()(encode.search)
app.command()(info.info)


@app.command()
def demo() -> None:
    """Search a small corpus with the model that needs no download from the Hub."""
    importlib.import_module("gen_fast.cli.demo").run()


app.command()(jobs.embed)
app.command()(jobs.verify)
app.command()(jobs.index)
app.command("eval")(evaluation.evaluate)
app.command()(export.export)
app.command()(quantize.quantize)
app.command()(training.generate)
app.command()(training.teach)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    training.train
)


def main() -> None:
    """Run the command line: the entry point `gen-fast`."""
    open_missing_streams()
    keep_freed_memory()
    app(prog_name="gen-fast")
