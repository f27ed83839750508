"""Products of rows and weights of 8 bits in Triton, from the blocks as they lie; the weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.gpu import Tile
from gen_fast.ops.layout import adjacent

from . import int8
from .reference import Epilogue, rotated_together
from .triton_kernel import rotated, row_columns

_OUTPUTS, _INPUTS = tl.constexpr(int8.OUTPUTS), tl.constexpr(int8.INPUTS)
# Tiles of rows that go through all outputs before the next ones do: these rows stay in the L2 cache
# meanwhile, and a weight is read once for all of them.
_ROW_TILES = tl.constexpr(8)


@triton.jit
def product_tile(
    row_tile, output_tile, n_rows, outputs, OUTPUTS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_T] and outputs [BLOCK_O] of a tile, and which rows and panels of it are read.

    A panel is of OUTPUTS outputs. What lies beyond the last row or output is computed from the last
    one, and not stored.
    """
    row = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    output = output_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    panel = output_tile * (BLOCK_O // OUTPUTS) + tl.arange(0, BLOCK_O // OUTPUTS)
    read_row = tl.minimum(row, n_rows - 1).to(tl.int64)
    read_panel = tl.minimum(panel, outputs // OUTPUTS - 1).to(tl.int64)
    return row, output, read_row, read_panel


@triton.jit
def store_product(y, sums, bias, row, output, n_rows, outputs):
    """Write sums [BLOCK_T, BLOCK_O] float32 plus the bias, if there is one, to y [T, out]."""
    inside = output < outputs
    if bias is not None:
        sums += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + row.to(tl.int64)[:, None] * outputs + output[None, :],
        sums.to(y.dtype.element_ty),
        mask=(row < n_rows)[:, None] & inside[None, :],
    )


@triton.jit(do_not_specialize=gpu.PER_BATCH)
def _int8_linear(
    q, scale, blocks, weight_scale, bias, y, n_rows, size, outputs, stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tiles, output_tiles = tl.cdiv(n_rows, BLOCK_T), tl.cdiv(outputs, BLOCK_O)
    program = tl.program_id(0)
    row_tile, output_tile = tl.swizzle2d(
        program // output_tiles, program % output_tiles, row_tiles, output_tiles, _ROW_TILES
    )
    row, output, read_row, read_panel = product_tile(
        row_tile, output_tile, n_rows, outputs, _OUTPUTS, BLOCK_T, BLOCK_O
    )
    # A panel of 16 outputs is one run of bytes: it is read as such, and put in order in registers.
    column, byte = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K * _OUTPUTS)
    rows = q + read_row[:, None] * stride + column[None, :]
    panels = blocks + read_panel[:, None] * (size * _OUTPUTS) + byte[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.int32)
    for start in range(0, size, BLOCK_K):
        q_tile = tl.load(rows + start, mask=(column < size - start)[None, :], other=0)
        left = (size - start) * _OUTPUTS
        tile = tl.load(panels + start * _OUTPUTS, mask=(byte < left)[None, :], other=0)
        tile = tl.reshape(tile, (BLOCK_O // _OUTPUTS, BLOCK_K // _INPUTS, _OUTPUTS, _INPUTS))
        tile = tl.reshape(tl.permute(tile, (0, 2, 1, 3)), (BLOCK_O, BLOCK_K))
        acc = tl.dot(q_tile, tl.trans(tile), acc, out_dtype=tl.int32)
    result = acc.to(tl.float32) * tl.load(scale + read_row)[:, None]
    result *= tl.load(weight_scale + output, mask=output < outputs, other=0.0)[None, :]
    store_product(y, result, bias, row, output, n_rows, outputs)


@triton.jit
def _int8_weight(
    blocks, weight_scale, weight, size, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    output = tl.program_id(0).to(tl.int64)
    columns, inside = row_columns(size, PARTS, BLOCK)
    panel = blocks + output // _OUTPUTS * (size * _OUTPUTS) + output % _OUTPUTS * _INPUTS
    at = columns // _INPUTS * (_OUTPUTS * _INPUTS) + columns % _INPUTS
    row = tl.load(panel + at, mask=inside, other=0).to(tl.float32) * tl.load(weight_scale + output)
    if PARTS > 1:
        row = rotated(row, PARTS, BLOCK)
    tl.store(weight + output * size + columns, row.to(weight.dtype.element_ty), mask=inside)


def tile(rows: int, outputs: int, inputs: int, warps: int, stages: int) -> Tile:
    """Rows, outputs and inputs that a program takes at a time, and how it works on them."""
    return Tile({"BLOCK_T": rows, "BLOCK_O": outputs, "BLOCK_K": inputs}, warps, stages)


# By architecture and by the most rows that they are for; best first. Sums are exact, so that no
# result depends on the tile. A guess, not measured.
_TILES_86 = {
    16: (tile(16, 32, 256, 4, 4), tile(16, 64, 128, 4, 4)),
    64: (tile(64, 64, 128, 4, 4), tile(64, 64, 64, 4, 4)),
    None: (tile(128, 128, 64, 8, 4), tile(128, 64, 64, 4, 4)),
}
_TILES = {
    80: _TILES_86,
    86: _TILES_86,
    90: {
        16: (tile(16, 32, 256, 4, 5), tile(16, 64, 256, 4, 4)),
        64: (tile(64, 64, 128, 4, 4), tile(64, 128, 128, 4, 4)),
        None: (tile(128, 128, 128, 8, 4), tile(128, 256, 64, 8, 4)),
    },
}


def _tiles(rows: int, device: torch.device) -> tuple[Tile, ...]:
    tiles = _TILES[gpu.tile_architecture(device)]
    return next(best for most, best in tiles.items() if most is None or rows <= most)


def int8_linear(q: Tensor, blocks: Tensor, epilogue: Epilogue) -> Tensor:
    """See `int8_op.int8_linear`."""
    q, blocks = adjacent(q), blocks.contiguous()
    (rows, size), outputs, bias = q.shape, len(epilogue.weight_scale), epilogue.bias
    y = q.new_empty(rows, outputs, dtype=epilogue.dtype)
    if y.numel():
        gpu.launch_tiled(
            _int8_linear,
            lambda constants: (
                triton.cdiv(rows, constants["BLOCK_T"])
                * triton.cdiv(outputs, constants["BLOCK_O"]),
            ),
            _tiles(rows, q.device),
            ("size", "outputs"),
            q,
            epilogue.scale.contiguous(),
            blocks,
            epilogue.weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            rows,
            size,
            outputs,
            q.stride(0),
        )
    return y


def int8_weight(blocks: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `int8_op.int8_weight`."""
    shape = len(weight_scale), blocks.shape[1] * int8.INPUTS
    weight = weight_scale.new_empty(shape, dtype=dtype)
    inputs = blocks.contiguous(), weight_scale.contiguous(), weight, shape[1]
    gpu.launch_rows(_int8_weight, shape, *inputs, PARTS=rotated_together(shape[1]))
    return weight
