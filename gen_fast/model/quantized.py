"""Copies of a model whose linears are quantised: written once, loaded without the original.

A copy is a directory like its original. The linears' tensors are blocks of gen_fast.ops.qlinear, or
e4m3; in int8 and fp8 each has its scales beside it, and in int8 the layers' norms have taken over
factors (int8.py). Everything else is as it was. quantization.json has digests of the original's
tensors, so that the copy has the original's fingerprint: an adapter of the one fits the other.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import (
    ConfigError,
    ImplementationError,
    UnsupportedModelError,
    WeightsError,
)
from gen_fast.io.json_files import check_seal, read_json_object, seal
from gen_fast.model.choices import FP8, GROUP_BITS, INT8, QUANTIZED
from gen_fast.ops import qlinear
from gen_fast.ops.qlinear import fits_fp8, fits_groups, quantize_groups, quantize_weight_fp8

FORMAT = "gen_fast.quantized/1"
RECIPE = "quantization.json"
# Ends the name of a linear's scales, as ".weight" does that of its blocks.
SCALE = ".weight_scale"
logger = logging.getLogger(__name__)
_LARGEST = torch.finfo(torch.float16).max  # scales and minima are float16


@dataclass(frozen=True)
class Recipe:
    """What a quantised copy says of itself.

    quantize: one of QUANTIZED. source: the original's name. digests: of the values of its tensors,
    samples: two hashes of it, both as fingerprint.py has them. quality: how near the copy's
    embeddings are to the original's, as measured; empty if nobody has.
    """

    quantize: str
    source: str
    digests: Mapping[str, str]
    samples: Mapping[str, str]
    quality: Mapping[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """As quantization.json."""
        values = {"format": FORMAT, **asdict(self)}
        text = json.dumps({**values, "seal": seal(values)}, indent=1)
        (directory / RECIPE).write_text(text + "\n")


def check_quantize(quantize: str | None) -> None:
    """Raise ConfigError for what weights cannot be quantised to."""
    if quantize is not None and quantize not in QUANTIZED:
        raise ConfigError(f"quantize {quantize!r} is not one of {', '.join(QUANTIZED)}")


def check_device(quantize: str | None, device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise ConfigError for weights that a device does not multiply by: fp8 needs tensor cores.

    Warns where quantised weights were measured to be slower than plain ones (bench/README.md).
    """
    if quantize == INT8 and torch.device(device).type == "cuda":
        logger.warning("int8 was slower than bfloat16 on the GPU measured: it saves memory alone")
    if quantize != FP8:
        return
    try:
        qlinear.FP8.choose(torch.device(device).type, torch.float8_e4m3fn, str(dtype))
    except ImplementationError as error:
        raise ConfigError(
            f"fp8 needs a GPU of sm_89 or newer (Ada, Hopper), and {device} is none that computes "
            f"it: take another kind, or set GEN_FAST_IMPL=cpu,reference to measure what fp8 loses "
            f"({error})"
        ) from error


def read_recipe(directory: Path) -> Recipe | None:
    """The recipe of a quantised copy; None for a model that is none.

    Raises WeightsError for a damaged one, or one of a format that this version does not read.
    """
    path = directory / RECIPE
    if not path.exists():
        return None
    try:
        values = read_json_object(path)
        check_seal(values)
        if values["format"] != FORMAT or values["quantize"] not in QUANTIZED:
            found = f"{values['quantize']!r} of {values['format']!r}"
            raise WeightsError(f"{path}: {found} is not read by this version")
        return Recipe(**{field.name: values[field.name] for field in fields(Recipe)})
    except (KeyError, ValueError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def scale_name(name: str) -> str:
    """Of the scales beside a linear's weight."""
    return f"{name.removesuffix('.weight')}{SCALE}"


def fp8_stored_shape(shape: tuple[int, int]) -> tuple[int, int, int]:
    """As which a copy has a weight [out, in]: no other package takes it for a plain one."""
    return shape[0] // 16, 16, shape[1]


def group_blocks(name: str, weight: Tensor, quantize: str) -> Tensor:
    """Blocks of a linear's weight [out, in] in groups; `name` is said in errors.

    Raises UnsupportedModelError for a size that has no whole blocks, WeightsError for values that
    float16 does not hold.
    """
    if not fits_groups(tuple(weight.shape)):
        raise UnsupportedModelError(
            f"{name} is {list(weight.shape)}: {quantize} takes multiples of 16 rows and 32 columns"
        )
    if not weight.abs().max() <= _LARGEST:
        raise WeightsError(f"{name} holds NaN, infinity or values beyond {_LARGEST:.0f}")
    return quantize_groups(weight, GROUP_BITS[quantize])


def fp8_weight(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A linear's weight [out, in] in e4m3 and its scales [out]; `name` is said in errors.

    Raises UnsupportedModelError for a size that torch does not multiply, WeightsError for values
    that are not finite.
    """
    if not fits_fp8(tuple(weight.shape)):
        raise UnsupportedModelError(
            f"{name} is {list(weight.shape)}: fp8 takes multiples of 16 rows and 16 columns"
        )
    q, scale = quantize_weight_fp8(weight)
    if not scale.isfinite().all():
        raise WeightsError(f"{name} holds NaN or infinity")
    return q, scale
