"""The command of `gen-fast` that writes a model for another package."""

from pathlib import Path
from typing import Annotated

import typer

import gen_fast.cli.options as options
from gen_fast.cli.models import load_encoder


def export(
    model: Annotated[str, typer.Argument(help="Known name, directory, .gguf file or Hub id.")],
    out: Annotated[Path, typer.Option(help="A new or empty directory.")],
    method: options.MethodOption = None,
    backbone: options.BackboneOption = None,
    dtype: Annotated[
        options.Dtype, typer.Option(help="Of the weights; auto: as in the backbone's files.")
    ] = "auto",
    max_length: options.MaxLengthOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Write a directory that sentence-transformers runs without code of gen_fast."""
    from gen_fast.formats.sentence_export import check_is_new

    check_is_new(out)
    encoder = load_encoder(
        model,
        method=method,
        backbone=backbone,
        device="cpu",
        dtype="bfloat16",  # nothing is computed, and weights are copied from file to file
        max_length=max_length,
        quiet=quiet,
    )
    encoder.save_as_sentence_transformer(out, dtype=str(dtype))
    if not quiet:
        typer.echo(f"{out}: {encoder.method}, {encoder.dimension} dimensions", err=True)
