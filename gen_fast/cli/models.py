"""Models as the options of a command name them."""

import logging
from typing import TYPE_CHECKING

import gen_fast.cli.options as options
from gen_fast.embed.choices import DEFAULT_MODEL

if TYPE_CHECKING:
    from gen_fast.embed.encoder import Encoder


def load_encoder(
    model: str | None,
    method: str | None,
    loading: options.Loading,
    *,
    max_length: int | None = None,
    deterministic: bool = False,
    quiet: bool = False,
) -> "Encoder":
    """The encoder that a command works with; it warns unless it is to be quiet."""
    from gen_fast.embed.loading import load

    logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
    return load(
        model or DEFAULT_MODEL,
        method=method and str(method),
        backbone=loading.backbone,
        device=options.checked_device(loading.device),
        dtype=str(loading.dtype),
        quantize=loading.quantize and str(loading.quantize),
        max_length=max_length,
        deterministic=deterministic,
    )
