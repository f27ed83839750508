"""Weights in groups of 32 inputs with a scale and a minimum, in plain torch.

w ≈ q · scale + minimum, q from 0 to 15, scale and minimum float16: 5 bits a weight. Layout: blocks
[out / 16, in / 32, 320] of uint8. One block holds 16 outputs by 32 inputs, in the order in which
their product reads it: 16 scales, 16 minima, then 8 bytes for each input, of which byte j has
output j in its low half and output j + 8 in its high one.

Source: the type Q4_1 of GGUF, llama.cpp's ggml-quants.c; the order within a block is ours.
"""

import torch
from torch import Tensor

OUTPUTS, INPUTS = 16, 32  # of a block
# At once: what quantising a weight takes beside it stays small.
_OUTPUTS_AT_ONCE = 512


def block_bytes(bits: int) -> int:
    """Of one block: the grids of its groups, and the steps of its weights."""
    return 2 * 2 * OUTPUTS + OUTPUTS * INPUTS * bits // 8


BITS_OF_BLOCKS = {block_bytes(bits): bits for bits in (4,)}


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
    """Blocks [out / 16, in / 32, 320] of a weight [out, in], each group as near as its grid allows.

    Of two grids the nearer one is taken: from the group's least to its largest value, and the
    symmetric one of GGUF's Q4_0. So what was Q4_1 or Q4_0 before keeps its very values.
    """
    parts = [_quantize(part, bits) for part in weight.split(_OUTPUTS_AT_ONCE)]
    empty = weight.new_empty(0, 0, block_bytes(bits), dtype=torch.uint8)
    return torch.cat(parts) if parts else empty


def dequantize_groups(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of `blocks`: float32 arithmetic, rounded to `dtype`."""
    halves = blocks[..., : 4 * OUTPUTS].contiguous().view(torch.float16).float()
    scale, minimum = halves.unsqueeze(-2).chunk(2, -1)  # [out / 16, in / 32, 1, 16]
    packed = blocks[..., 4 * OUTPUTS :].unflatten(-1, (INPUTS, -1))
    q = torch.cat((packed & 15, packed >> 4), -1)
    weight = q.float().mul_(scale).add_(minimum)  # [out / 16, in / 32, 32, 16]
    outer, groups = blocks.shape[:2]
    return weight.permute(0, 3, 1, 2).reshape(outer * OUTPUTS, groups * INPUTS).to(dtype)


def _quantize(weight: Tensor, bits: int) -> Tensor:
    groups = weight.float().unflatten(1, (-1, INPUTS))  # [out, in / 32, 32]
    least, most = groups.aminmax(dim=-1, keepdim=True)
    largest = 2**bits - 1
    q, scale, minimum, error = _on_grid(groups, (most - least) / largest, least, largest)
    # Q4_0: what is furthest from zero is eight steps away from it, and the grid's first value.
    furthest = torch.where(most > -least, most, least)
    other_q, other_scale, other_minimum, other_error = _on_grid(
        groups, furthest / -8, furthest, largest
    )
    nearer = other_error < error
    q = torch.where(nearer, other_q, q)
    scale = torch.where(nearer, other_scale, scale)
    minimum = torch.where(nearer, other_minimum, minimum)

    def by_block(values: Tensor) -> Tensor:
        """[out, in / 32, n] as [out / 16, in / 32, n, 16]."""
        blocks: Tensor = values.unflatten(0, (-1, OUTPUTS))
        return blocks.permute(0, 2, 3, 1)

    grid = torch.cat((by_block(scale), by_block(minimum)), -2).contiguous().view(torch.uint8)
    low, high = by_block(q.to(torch.uint8)).chunk(2, -1)  # [out / 16, in / 32, 32, 8] each
    return torch.cat((grid.flatten(2), (low | high << 4).flatten(2)), -1)


def _on_grid(
    groups: Tensor, scale: Tensor, minimum: Tensor, largest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest steps [out, in / 32, 32], the grid in float16, and the squared errors."""
    scale, minimum = scale.half(), minimum.half()
    step, start = scale.float(), minimum.float()
    q = ((groups - start) / step.where(step != 0, 1.0)).round_().clamp_(0, largest)
    error = (q * step + start - groups).square_().sum(-1, keepdim=True)
    return q, scale, minimum, error
