"""The command of `gen-fast` that writes a quantised copy of a model."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import gen_fast.cli.options as options


def quantize(
    model: Annotated[str, typer.Argument(help="Known name, directory, .gguf file or Hub id.")],
    out: Annotated[Path, typer.Option(help="A new or empty directory.")],
    to: Annotated[options.Quantized, typer.Option(help="What the linears are kept in.")],
    texts: Annotated[
        str | None,
        typer.Option(help="Texts to compare on, 20 or more.  [default: forty of our own]"),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help="Texts that int8 is calibrated on, 20 or more.  [default: forty others]"),
    ] = None,
    text_column: options.TextColumnOption = None,
    file_format: options.FormatOption = None,
    device: options.DeviceOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Write a copy of a backbone with fewer bits a weight, and say how near it is."""
    from gen_fast.embed.quantizing import write_quantized
    from gen_fast.embed.sample_texts import SAMPLE_TEXTS
    from gen_fast.errors import ConfigError
    from gen_fast.io.text_files import read_texts
    from gen_fast.model.calibration_texts import CALIBRATION_TEXTS
    from gen_fast.model.choices import INT8

    logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
    if calibrate is not None and to != INT8:
        raise ConfigError(f"--calibrate means nothing with --to {to}, which needs no texts")

    def read(file: str | None, default: Sequence[str]) -> Sequence[str]:
        if file is None:
            return default
        return read_texts(file, file_format=file_format, text_column=text_column).texts

    recipe = write_quantized(
        model,
        out,
        quantize=str(to),
        texts=read(texts, SAMPLE_TEXTS),
        calibration=read(calibrate, CALIBRATION_TEXTS),
        device=options.checked_device(device),
    )
    if not quiet:
        quality = recipe.quality
        mean, least = quality["centred_cosine_mean"], quality["centred_cosine_min"]
        typer.echo(
            f"{out}: {to}, over {quality['texts']} texts centred cosine to the original "
            f"{mean:.4f} in the mean, {least:.4f} at least",
            err=True,
        )
