"""The command of `gen-fast` that writes a model for another package."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gen_fast.cli.options as options
from gen_fast.cli.errors import fail
from gen_fast.cli.evaluation import runner
from gen_fast.cli.models import load_encoder

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from gen_fast.embed.encoder import Encoder


def export(
    model: Annotated[str, typer.Argument(help="Known name, directory, .gguf file or Hub id.")],
    out: Annotated[Path, typer.Option(help="A new or empty directory.")],
    method: options.MethodOption = None,
    backbone: options.BackboneOption = None,
    dtype: Annotated[
        options.Dtype, typer.Option(help="Of the weights; auto: as in the backbone's files.")
    ] = "auto",
    max_length: options.MaxLengthOption = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of gen-fast eval: its scores go into the card.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="In --results.  [default: MODEL-METHOD]")] = None,
    quiet: options.QuietOption = False,
) -> None:
    """Write a directory that sentence-transformers runs without code of gen_fast."""
    from gen_fast.io.durable import check_is_new

    check_is_new(out)
    # Nothing is computed, and weights are copied from file to file.
    loading = options.Loading(backbone=backbone, device="cpu", dtype="bfloat16")
    encoder = load_encoder(model, method, loading, max_length=max_length, quiet=quiet)
    evaluation = [] if results is None else _scores(results, name, encoder)
    encoder.save_as_sentence_transformer(out, dtype=str(dtype), evaluation=evaluation)
    if not quiet:
        typer.echo(f"{out}: {encoder.method}, {encoder.dimension} dimensions", err=True)


def _scores(results: Path, name: str | None, encoder: "Encoder") -> "list[EvalResult]":
    found = runner().read_scores(results)
    name = name or runner().default_name(encoder)
    if name not in found:
        fail(f"{results} has no scores of {name!r}, only of {', '.join(sorted(found)) or 'none'}")
    from gen_fast.evaluate.cards import card_results

    return card_results(found[name])
