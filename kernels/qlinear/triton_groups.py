"""Products with weights in groups in Triton: from the blocks, or by a matrix made of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.gpu import Tile
from gen_fast.ops.layout import adjacent

from . import groups
from .triton_int8 import product_tile, store_product, tile

_OUTPUTS, _INPUTS = tl.constexpr(groups.OUTPUTS), tl.constexpr(groups.INPUTS)
_GRID = tl.constexpr(4 * groups.OUTPUTS)  # bytes of a block's scales and minima
_INTERPRETED = tl.constexpr(gpu.interpreted())
# Up to so many rows the weight is read once, at 0.625 or 1.125 bytes each; for more a matrix is
# made, which writes and reads each weight again, and cuBLAS multiplies. A guess, not measured.
ROWS_FROM_BLOCKS = 64


@triton.jit
def _tile_of_weight(
    blocks, halves, panel, group, groups,
    BITS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_O, BLOCK_K] float32 of panels [BLOCK_O / 16] and groups [BLOCK_K / 32].

    What lies beyond the last group is 0. halves: the blocks as float16.
    """
    P: tl.constexpr = BLOCK_O // _OUTPUTS
    G: tl.constexpr = BLOCK_K // _INPUTS
    STEPS: tl.constexpr = _OUTPUTS * _INPUTS * BITS // 8  # bytes of a block's steps
    BLOCK: tl.constexpr = _GRID + STEPS
    inside = (group < groups)[None, :, None]
    block = panel[:, None, None] * groups + group[None, :, None]  # [P, G, 1]
    lane, step = tl.arange(0, _OUTPUTS), tl.arange(0, STEPS)
    grid = halves + block * (BLOCK // 2) + lane[None, None, :]
    scale = tl.load(grid, mask=inside, other=0.0)  # [P, G, 16]
    minimum = tl.load(grid + _OUTPUTS, mask=inside, other=0.0)
    packed = tl.load(
        blocks + block * BLOCK + _GRID + step[None, None, :], mask=inside, other=0
    )  # [P, G, STEPS]
    if BITS == 4:
        q = tl.join(packed & 15, packed >> 4)  # outputs j and j + 8
        q = tl.reshape(q, (P, G, _INPUTS, _OUTPUTS // 2, 2)).to(tl.float32)
        weight = q * _by_output(scale, P, G) + _by_output(minimum, P, G)
        weight = tl.permute(weight, (0, 4, 3, 1, 2))
    else:
        q = tl.reshape(packed, (P, G, _INPUTS, _OUTPUTS)).to(tl.float32)
        weight = q * scale[:, :, None, :].to(tl.float32) + minimum[:, :, None, :].to(tl.float32)
        weight = tl.permute(weight, (0, 3, 1, 2))
    return tl.reshape(weight, (BLOCK_O, BLOCK_K))


@triton.jit
def _by_output(values, P: tl.constexpr, G: tl.constexpr):
    """[P, G, 16] as [P, G, 1, 8, 2], in the order of steps of 4 bits, float32."""
    pairs = tl.permute(tl.reshape(values, (P, G, 2, _OUTPUTS // 2)), (0, 1, 3, 2))
    return tl.reshape(pairs, (P, G, 1, _OUTPUTS // 2, 2)).to(tl.float32)


@triton.jit(do_not_specialize=gpu.PER_BATCH)
def _group_linear(
    x, blocks, halves, bias, y, n_rows, size, outputs, stride, BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, output, read_row, read_panel = product_tile(
        tl.program_id(1), tl.program_id(0), n_rows, outputs, _OUTPUTS, BLOCK_T, BLOCK_O
    )
    column, group = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // _INPUTS)
    rows = x + read_row[:, None] * stride + column[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(0, size, BLOCK_K):
        x_tile = tl.load(rows + start, mask=(column < size - start)[None, :], other=0.0)
        weight = _tile_of_weight(
            blocks, halves, read_panel, group + start // _INPUTS, size // _INPUTS,
            BITS, BLOCK_O, BLOCK_K,
        )  # fmt: skip
        weight = weight.to(x_tile.dtype)
        if _INTERPRETED:  # it takes the bits of bfloat16 for numbers
            x_tile, weight = x_tile.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(x_tile, tl.trans(weight), acc, input_precision="ieee")
    store_product(y, acc, bias, row, output, n_rows, outputs)


@triton.jit
def _group_weight(
    blocks, halves, weight, size, outputs,
    BITS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    panel = tl.program_id(0) * (BLOCK_O // _OUTPUTS) + tl.arange(0, BLOCK_O // _OUTPUTS)
    start = tl.program_id(1) * BLOCK_K
    group = start // _INPUTS + tl.arange(0, BLOCK_K // _INPUTS)
    read_panel = tl.minimum(panel, outputs // _OUTPUTS - 1).to(tl.int64)
    tile = _tile_of_weight(
        blocks, halves, read_panel, group, size // _INPUTS, BITS, BLOCK_O, BLOCK_K
    )
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = start + tl.arange(0, BLOCK_K)
    tl.store(
        weight + output.to(tl.int64)[:, None] * size + column[None, :],
        tile.to(weight.dtype.element_ty),
        mask=(output < outputs)[:, None] & (column < size)[None, :],
    )


# Best first, of both architectures. In 4 bits on an H100 and a weight of 24,576 outputs and 4,096
# inputs _TILES took 93 µs for 64 rows, _TILES_NARROW 144 µs for 1 row and 119 for 16; with 6,144
# outputs and 1,024 inputs they took 21, 18 and 15 (bench/results/gpu-h100-2026-11-27.json). So for
# every number of rows _TILES, but where its programs are fewer than an H100's 132 multiprocessors.
# 8 bits take the same: not measured.
_TILES = (tile(64, 64, 64, 4, 3), tile(64, 32, 128, 4, 3))
_TILES_NARROW = (tile(16, 32, 128, 4, 4), tile(16, 64, 64, 4, 4))
_NARROW_ROWS, _NARROW_OUTPUTS = 16, 132 * 64
_WEIGHT_TILES = (
    Tile({"BLOCK_O": 16, "BLOCK_K": 128}, 4, 1),
    Tile({"BLOCK_O": 32, "BLOCK_K": 128}, 4, 1),
)


def tiles(rows: int, outputs: int) -> tuple[Tile, ...]:
    """Those of a product, best first."""
    narrow = rows <= _NARROW_ROWS and outputs < _NARROW_OUTPUTS
    return _TILES_NARROW if narrow else _TILES


def group_linear(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """See `groups_op.group_linear`."""
    # Float32 has no tensor cores without rounding to tf32: cuBLAS multiplies it best.
    if x.dtype == torch.float32 or len(x) > ROWS_FROM_BLOCKS:
        return torch.nn.functional.linear(x, group_weight(blocks, x.dtype), bias)
    x, blocks = adjacent(x), blocks.contiguous()
    (rows, size), outputs = x.shape, len(blocks) * groups.OUTPUTS
    y = x.new_empty(rows, outputs)
    if y.numel():
        gpu.launch_tiled(
            _group_linear,
            gpu.blocks_over(BLOCK_O=outputs, BLOCK_T=rows),
            tiles(rows, outputs),
            ("size", "outputs"),
            x,
            blocks,
            blocks.view(torch.float16),
            None if bias is None else bias.contiguous(),
            y,
            rows,
            size,
            outputs,
            x.stride(0),
            BITS=groups.bits_of(blocks),
        )
    return y


def group_linear_backward(grad: Tensor, blocks: Tensor) -> Tensor:
    """See `groups_op.group_linear_backward`."""
    return grad @ group_weight(blocks, grad.dtype)


def group_weight(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of `blocks` as a matrix, for the moment."""
    blocks = blocks.contiguous()
    outputs, size = len(blocks) * groups.OUTPUTS, blocks.shape[1] * groups.INPUTS
    weight = torch.empty(outputs, size, dtype=dtype, device=blocks.device)
    if weight.numel():
        gpu.launch_tiled(
            _group_weight,
            gpu.blocks_over(BLOCK_O=outputs, BLOCK_K=size),
            _WEIGHT_TILES,
            ("size", "outputs"),
            blocks,
            blocks.view(torch.float16),
            weight,
            size,
            outputs,
            BITS=groups.bits_of(blocks),
        )
    return weight
