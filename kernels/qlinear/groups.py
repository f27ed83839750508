"""Weights in groups of 32 inputs with a scale and a minimum, in plain torch.

w ≈ q · scale + minimum, q from 0 to 15 or to 255, scale and minimum float16: 5 or 9 bits a weight.
Layout: blocks [out / 16, in / 32, 320 or 576] of uint8. One block holds 16 outputs by 32 inputs, in
the order in which their product reads it: 16 scales, 16 minima, then for each input its steps. Of 4
bits these are 8 bytes, of which byte j has output j in its low half and output j + 8 in its high
one; of 8 bits 16 bytes, output by output.

Source: the types Q4_0, Q4_1 and Q8_0 of GGUF, llama.cpp's ggml-quants.c; the order within a block
is ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OUTPUTS, INPUTS = 16, 32  # of a block
# By how many steps GGUF puts what is furthest from zero away from it, in Q4_0 and in Q8_0.
_FURTHEST = {4: 8, 8: 127}
_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
# At once: what quantising a weight takes beside it stays small.
_WEIGHTS_AT_ONCE = 2**21


def block_bytes(bits: int) -> int:
    """Of one block: the grids of its groups, and the steps of its weights."""
    return 2 * 2 * OUTPUTS + OUTPUTS * INPUTS * bits // 8


BITS_OF_BLOCKS = {block_bytes(bits): bits for bits in (4, 8)}


def bits_of(blocks: Tensor) -> int | None:
    """Bits of a step, by the size of a block; None for what is no block."""
    return BITS_OF_BLOCKS.get(blocks.shape[-1])


def fits_groups(shape: tuple[int, ...]) -> bool:
    """Whether a weight [out, in] consists of whole blocks."""
    return len(shape) == 2 and shape[0] % OUTPUTS == 0 and shape[1] % INPUTS == 0


def group_blocks_shape(shape: tuple[int, int], bits: int) -> tuple[int, int, int]:
    """That of the blocks of a weight [out, in]."""
    return shape[0] // OUTPUTS, shape[1] // INPUTS, block_bytes(bits)


def quantize_groups(weight: Tensor, bits: int) -> Tensor:
    """Blocks [out / 16, in / 32, 320 or 576] of a weight [out, in], each group on a near grid.

    bits: 4 or 8. Of two grids the nearer one is taken: from the group's least to its largest value,
    or the symmetric one of GGUF's Q4_0 and Q8_0, whose step is found wherever there is one. So what
    was Q4_0 (8 bits: Q8_0) before keeps its very values, if float16 holds 8 (128) times its scale,
    and what was Q4_1 if its groups have both ends of their grid.
    """
    rows = max(1, _WEIGHTS_AT_ONCE // max(1, weight.shape[1]) // OUTPUTS) * OUTPUTS
    return torch.cat([_quantize(part, bits) for part in weight.split(rows)])


def dequantize_groups(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of `blocks`: float32 arithmetic, rounded to `dtype`."""
    halves = blocks[..., : 4 * OUTPUTS].contiguous().view(torch.float16).float()
    scale, minimum = halves.unsqueeze(-2).chunk(2, -1)  # [out / 16, in / 32, 1, 16]
    q = blocks[..., 4 * OUTPUTS :].unflatten(-1, (INPUTS, -1))
    if bits_of(blocks) == 4:
        q = torch.cat((q & 15, q >> 4), -1)
    weight: Tensor = q.float().mul_(scale).add_(minimum)  # [out / 16, in / 32, 32, 16]
    outer, groups = blocks.shape[:2]
    return weight.permute(0, 3, 1, 2).reshape(outer * OUTPUTS, groups * INPUTS).to(dtype)


class _Grids(NamedTuple):
    """What groups [n, 32] become, and by how much that differs from them."""

    q: Tensor  # [n, 32]
    scale: Tensor  # [n, 1] float16
    minimum: Tensor  # [n, 1] float16
    error: Tensor  # [n, 1], the sum of squares


def _quantize(weight: Tensor, bits: int) -> Tensor:
    out, inputs = weight.shape
    groups = weight.float().reshape(-1, INPUTS)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    furthest = torch.where(most > -least, most, least)
    grids = _on_grids(groups, (most - least) / (2**bits - 1), least, bits)
    other = _on_symmetric_grids(groups, furthest / -_FURTHEST[bits], bits)
    nearer = other.error < grids.error
    grids = _Grids(*(torch.where(nearer, b, a) for a, b in zip(grids, other, strict=True)))
    _find_steps(grids, groups, furthest, bits)

    def by_block(values: Tensor) -> Tensor:
        """[out · in / 32, n] as [out / 16, in / 32, n, 16]."""
        blocks: Tensor = values.view(out // OUTPUTS, OUTPUTS, inputs // INPUTS, values.shape[1])
        return blocks.permute(0, 2, 3, 1)

    grid = torch.cat((by_block(grids.scale), by_block(grids.minimum)), -2)
    steps = by_block(grids.q.to(torch.uint8))  # [out / 16, in / 32, 32, 16]
    if bits == 4:
        low, high = steps.chunk(2, -1)
        steps = low | high << 4
    return torch.cat((grid.contiguous().view(torch.uint8).flatten(2), steps.flatten(2)), -1)


def _find_steps(grids: _Grids, groups: Tensor, furthest: Tensor, bits: int) -> None:
    """Put groups that are all whole steps away from zero on their grid, if it is another one.

    furthest: of each group the value [n, 1] that is furthest from zero. It is a whole number of
    steps away, of which all are tried.
    """
    half = 2 ** (bits - 1)
    # A step has 11 bits in float16, and a number of them less than `bits`: a float32 has 24.
    unused = 2 ** (24 - 11 - (bits - 1)) - 1
    left = (grids.error > 0) & (furthest.view(torch.int32) & unused == 0)
    left = left.flatten().nonzero()[:, 0]
    far = furthest[left, 0]
    whole = _significand(far)
    for count in range(half, 0, -1):
        if count == half // 2 - 1:
            # From here on the half of a step has been tried, unless float16 does not hold it.
            tiny = far.abs() < half * _SMALLEST_NORMAL
            left, far, whole = left[tiny], far[tiny], whole[tiny]
        if not len(left):
            return
        # The odd part of `count` divides that of what is furthest: most counts leave few groups.
        quotient = whole / (count // (count & -count))
        at = (quotient == quotient.floor()).nonzero()[:, 0]
        step = (far[at] / -count).half().float()
        # To look at one value before all is faster.
        on_grid = (step * -count == far[at]) & (groups[left[at], 0].fmod(step) == 0)
        at, step = left[at[on_grid]], step[on_grid].unsqueeze(1)
        found = _on_symmetric_grids(groups[at], step, bits)
        exact = (found.error == 0)[:, 0]
        for values, better in zip(grids, found, strict=True):
            values[at[exact]] = better[exact]


def _significand(x: Tensor) -> Tensor:
    """The 24 bits of |x|, which is float32 and a normal number, as whole numbers in float32."""
    return (x.view(torch.int32) & 0x7FFFFF | 0x800000).float()


def _on_symmetric_grids(groups: Tensor, step: Tensor, bits: int) -> _Grids:
    """On grids of which zero is a value, with one value more on the side of -step."""
    return _on_grids(groups, step, step * -(2 ** (bits - 1)), bits)


def _on_grids(groups: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> _Grids:
    """The nearest values on grids of a scale and a minimum [n, 1], which are rounded to float16."""
    scale, minimum = scale.half(), minimum.half()
    step, start = scale.float(), minimum.float()
    q = ((groups - start) / step.where(step != 0, 1.0)).round_().clamp_(0, 2**bits - 1)
    error = (q * step + start - groups).square_().sum(-1, keepdim=True)
    return _Grids(q, scale, minimum, error)
