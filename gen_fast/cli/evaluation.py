"""The command of `gen-fast` that says how good embeddings are: eval."""

import json
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

import gen_fast.cli.options as options
from gen_fast.cli.errors import fail
from gen_fast.cli.models import load_encoder
from gen_fast.cli.output import print_line
from gen_fast.embed.choices import DEFAULT_MODEL
from gen_fast.evaluate.choices import INSTRUCTIONS, SUITES

if TYPE_CHECKING:
    from gen_fast.evaluate.embedder import Model
    from gen_fast.evaluate.runner import TaskScore


def runner() -> ModuleType:
    """The module that runs tasks and reads their results; exits without mteb."""
    try:
        import gen_fast.evaluate.runner as module
    except ImportError as error:
        fail(f"scores need mteb: pip install 'gen-fast[eval]' ({error})")
    return module


@options.grouped
def evaluate(
    tasks: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SUITES)}, or a task of mteb's.  [default: local]"),
    ] = None,
    model: options.ModelOption = None,
    method: options.MethodOption = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="Have sentence-transformers run the model; or minilm.")
    ] = False,
    loading: options.Loading = options.LOADING,
    max_length: options.MaxLengthOption = None,
    instructions: Annotated[
        str, typer.Option(help=f"{', '.join(INSTRUCTIONS)}, or a YAML file of them.")
    ] = "auto",
    trained_on: Annotated[
        list[str] | None,
        typer.Option(help="Corpus or task that the model was trained on: marked as in-domain."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results, a file a task.")] = Path("results"),
    name: Annotated[str | None, typer.Option(help="In --out.  [default: MODEL-METHOD]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run tasks again that have results.")
    ] = False,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Score a model on tasks of mteb's, or on small ones that need no data of the Hub.

    Only what has no results in --out is run. Needs `pip install 'gen-fast[eval]'`.
    """
    run = runner().evaluate
    embedder: Model
    if stock:
        from gen_fast.embed.stock import load_stock

        if not method is loading.backbone is loading.quantize is None:
            fail("--stock runs a model as it is: --method, --backbone, --quantize have no meaning")
        logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
        embedder = load_stock(
            model or DEFAULT_MODEL,
            device=str(options.checked_device(loading.device)),
            dtype="float32" if loading.dtype == "auto" else str(loading.dtype),
        )
        name = name or Path(model or DEFAULT_MODEL).name
    else:
        embedder = load_encoder(model, method, loading, quiet=quiet)
    evaluation = run(
        embedder,
        tasks or ("local",),
        out=out,
        name=name,
        instructions=instructions,
        max_length=max_length,
        trained_on=trained_on or (),
        overwrite=overwrite,
        show_progress_bar=not quiet,
    )
    for score in evaluation.scores:
        print_line(json.dumps(_row(score)) if as_json else _line(score))
    if evaluation.failures:
        names = ", ".join(evaluation.failures)
        fail(f"{len(evaluation.failures)} tasks could not be run: {names}")


def _row(score: "TaskScore") -> dict[str, object]:
    return {
        "task": score.task,
        "type": score.kind,
        "score": score.score,
        "standard_error": score.standard_error,
        "in_domain": score.in_domain,
    }


def _line(score: "TaskScore") -> str:
    error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
    mark = "  in-domain" if score.in_domain else ""
    return f"{score.task:<28} {score.kind:<20} {score.score:.3f}{error}{mark}"
