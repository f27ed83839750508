"""Weights of 8 bits with a scale for each output, in plain torch.

w ≈ q · scale, q from -127 to 127. Layout: blocks [out / 16, in / 4, 64] of int8. One block holds 16
outputs by 4 inputs, output by output: what instructions that add four products of bytes read.
"""

from torch import Tensor

from .op import quantize_rows

OUTPUTS, INPUTS = 16, 4  # of a block
# So many products of a byte with a sign and one without fit a sum of 32 bits.
_MOST_INPUTS = 2**31 // (255 * 127)


def fits_int8(shape: tuple[int, ...]) -> bool:
    """Whether a weight [out, in] consists of whole blocks, and its sums stay below 2^31."""
    whole = len(shape) == 2 and shape[0] % OUTPUTS == 0 and shape[1] % INPUTS == 0
    return whole and shape[1] <= _MOST_INPUTS


def int8_blocks_shape(shape: tuple[int, int]) -> tuple[int, int, int]:
    """That of the blocks of a weight [out, in]."""
    return shape[0] // OUTPUTS, shape[1] // INPUTS, OUTPUTS * INPUTS


def quantize_weight_int8(weight: Tensor, row_format: str = "int8") -> tuple[Tensor, Tensor]:
    """Blocks [out / 16, in / 4, 64] and scales [out] float32 of a weight [out, in].

    Each output is quantised as `quantize_rows` does it. row_format: "int8" or "int8-rotated", that
    of the rows which the weight will meet.
    """
    q, scale = quantize_rows(weight, row_format)
    tiles = q.unflatten(1, (-1, INPUTS)).unflatten(0, (-1, OUTPUTS))
    return tiles.transpose(1, 2).flatten(2).contiguous(), scale


def unpack_int8(blocks: Tensor) -> Tensor:
    """q [out, in] of `blocks`."""
    tiles: Tensor = blocks.unflatten(2, (OUTPUTS, INPUTS)).transpose(1, 2)
    return tiles.reshape(blocks.shape[0] * OUTPUTS, blocks.shape[1] * INPUTS)
