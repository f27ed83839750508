"""Compile every Triton kernel to machine code, without a GPU, and report what it needs.

    python bench/kernels/compile.py [--arch 80 86 90] [--json FILE] [--op NAME ...] [--quick]
    python bench/kernels/compile.py --table BEFORE.json AFTER.json

Each op is called as the backbone calls it, on tensors without memory, and its launches are
recorded instead of made. A row is a kernel with its registers, spilled bytes, shared memory and
the programs that a multiprocessor holds of it. --table prints what two such reports say of
attention, compiling nothing.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from recording import Launch, recorded
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory of a thread block in bytes, by architecture of the tiles (gpu.tile_architecture).
LIMITS = {80: 166_912, 86: 101_376, 90: 232_448}
# Warps of a multiprocessor.
WARPS = {80: 64, 86: 48, 90: 64}

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


# Texts of attention's 4,096 rows: for the long tiles, for the short ones, and so many that a long
# prefix goes first (attention/triton_prefix.py).
LONG, SHORT, VERY_SHORT = 8, 64, 1024
TEXTS = {LONG: "", SHORT: ", short", VERY_SHORT: " first, short"}


@dataclass(frozen=True)
class Case:
    """An op called once: every kernel that it launches is compiled."""

    op: str
    name: str
    call: Callable[[], object]
    since: int = 80  # the oldest architecture that has what it needs
    only: int | None = None  # the one architecture to compile it for

    def compiles_for(self, architecture: int, quick: bool) -> bool:
        """Whether it can, and is not what another architecture's machine code shows.

        Only attention has tiles of sm_86's own.
        """
        own = architecture != 86 or (self.op == "attention" and not quick)
        return own and architecture >= self.since and self.only in (None, architecture)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(quick: bool) -> Iterator[Case]:
    """Qwen3-0.6B's and 8B's sizes, and for attention every head size, mask and dtype.

    quick: one model's sizes, and for attention each mask and dtype with one head size, on one of
    two architectures in turns.
    """
    yield from row_cases(1024, 3072, 24)
    if quick:
        attention = (
            attention_cases(80, torch.bfloat16, "causal", prefix=False),
            attention_cases(256, torch.bfloat16, "causal", prefix=False, texts=SHORT),
            attention_cases(128, torch.bfloat16, "gem", prefix=True, texts=SHORT),
            attention_cases(128, torch.bfloat16, "causal", prefix=True, texts=VERY_SHORT),
            attention_cases(128, torch.bfloat16, "bidirectional", False, dropout=0.3),
            attention_cases(64, torch.float32, "causal", prefix=True),
        )
        for number, of_one in enumerate(attention):
            yield from (replace(case, only=(80, 90)[number % 2]) for case in of_one)
        return
    yield from row_cases(4096, 12288, 40)
    for texts in (LONG, SHORT):
        for size in (64, 80, 96, 128, 256):
            yield from attention_cases(size, torch.bfloat16, "causal", size in (64, 128), texts)
        for mask in ("bidirectional", "gem"):
            yield from attention_cases(128, torch.bfloat16, mask, True, texts)
        for size in (64, 128, 256):
            yield from attention_cases(
                size, torch.bfloat16, "bidirectional", False, texts, dropout=0.3
            )
        yield from attention_cases(128, torch.bfloat16, "causal", True, texts, window=4096)
    for size in (64, 128, 256):
        yield from attention_cases(size, torch.bfloat16, "causal", True, texts=VERY_SHORT)
    # One text, one head and a prefix of one token: what Triton would make constants.
    yield from attention_cases(128, torch.bfloat16, "causal", prefix=True, ones=True)
    for size in (64, 128, 256):
        yield from attention_cases(size, torch.float32, "causal", prefix=True)


def row_cases(hidden: int, wide: int, heads: int) -> Iterator[Case]:
    """Every op but attention at one model's sizes."""
    from gen_fast.ops.append import triton_kernel as append
    from gen_fast.ops.distill import triton_kernel as distill
    from gen_fast.ops.dropout import triton_kernel as dropout
    from gen_fast.ops.lora_down import triton_kernel as lora
    from gen_fast.ops.norm import triton_kernel as norm
    from gen_fast.ops.pool import triton_kernel as pool
    from gen_fast.ops.qlinear import (
        group_blocks_shape,
        int8_blocks_shape,
        triton_groups,
        triton_int8,
    )
    from gen_fast.ops.qlinear import triton_kernel as qlinear
    from gen_fast.ops.rope import triton_kernel as rope
    from gen_fast.ops.swiglu import triton_kernel as swiglu

    x, w, gate_up = empty(4096, hidden), empty(hidden), empty(4096, 2 * wide)
    qk, head_norm = empty(4096, heads, 128), empty(heads, 128)
    cos = empty(4096, 64, dtype=torch.float32)
    offsets, ids = empty(65, dtype=torch.int32), empty(4096, dtype=torch.int64)
    table, logits = empty(151936, hidden), empty(4096, 151936)
    losses, keys = empty(4096, dtype=torch.float32), empty(4096, dtype=torch.int32)
    grad, eps = empty(4096, wide), 1e-6
    factors, inner, streams = empty(48, hidden), empty(4096, 48), (0, 1, 2)
    dropped = lora.Dropped(keys, ids, 0.05, 1, streams)
    calls = {
        ("append", "forward"): lambda: append.append(table, x, ids),
        ("append", "backward"): lambda: append.append_backward(x, ids, 151936, 20),
        ("norm", "forward"): lambda: norm.add_rms_norm(x, x, w, eps),
        ("norm", "backward"): lambda: norm.add_rms_norm_backward(x, x, x, w, eps),
        ("rope", "forward"): lambda: rope.rope(qk, cos, cos, None, eps),
        ("rope", "forward with norm"): lambda: rope.rope(qk, cos, cos, head_norm, eps),
        ("rope", "backward"): lambda: rope.rope_backward(qk, qk, cos, cos, head_norm, eps),
        ("swiglu", "forward"): lambda: swiglu.swiglu(gate_up),
        ("swiglu", "backward"): lambda: swiglu.swiglu_backward(grad, gate_up),
        ("pool", "forward"): lambda: pool.pool(x, offsets, w, eps, None),
        ("dropout", "forward"): lambda: dropout.dropout(x, keys, ids, 0.05, 1, 0),
        ("lora_down", "forward"): lambda: lora.lora_down(x, factors, dropped),
        ("lora_down", "backward"): lambda: lora.lora_down_backward(inner, x, factors, dropped),
        ("distill", "row loss"): lambda: distill.row_loss(logits, ids, losses),
    }
    for (op, name), call in calls.items():
        yield Case(op, f"{name}, hidden {hidden}", call)
    for kind, since in (("int8", 80), ("int8-rotated", 80), ("fp8", 90)):
        quantized = {
            "norm": lambda kind=kind: norm.add_rms_norm_quantized(x, x, w, eps, kind),
            "swiglu": lambda kind=kind: swiglu.swiglu_quantized(gate_up, kind),
            "qlinear": lambda kind=kind: qlinear.quantize_rows(x, kind),
        }
        for op, call in quantized.items():
            yield Case(op, f"{kind}, hidden {hidden}", call, since)
    scales, blocks = empty(2 * wide, dtype=torch.float32), int8_blocks_shape((2 * wide, hidden))
    weight, bias = empty(*blocks, dtype=torch.int8), empty(2 * wide)
    for rows in (16, 64, 4096):
        q, scale = empty(rows, hidden, dtype=torch.int8), empty(rows, dtype=torch.float32)
        epilogue = triton_int8.Epilogue(scale, scales, bias, torch.bfloat16)
        yield Case(
            "qlinear",
            f"int8 product, {rows} rows, hidden {hidden}",
            lambda q=q, epilogue=epilogue: triton_int8.int8_linear(q, weight, epilogue),
        )
    yield Case(
        "qlinear",
        f"int8 matrix, hidden {hidden}",
        lambda: triton_int8.int8_weight(weight, scales, torch.bfloat16),
    )
    for bits, kind in ((4, "int4"), (8, "int8-weight-only")):
        packed = empty(*group_blocks_shape((2 * wide, hidden), bits), dtype=torch.uint8)
        for rows in (16, 64, 4096):
            yield Case(
                "qlinear",
                f"{kind} product, {rows} rows, hidden {hidden}",
                lambda rows=rows, packed=packed: triton_groups.group_linear(
                    empty(rows, hidden), packed, empty(2 * wide)
                ),
            )


def attention_cases(
    size: int,
    dtype: torch.dtype,
    mask: str,
    prefix: bool,
    texts: int = LONG,
    window: int | None = None,
    ones: bool = False,
    dropout: float = 0.0,
) -> Iterator[Case]:
    from gen_fast.ops.attention import AttentionOptions, triton_backward, triton_kernel

    n_prefix, length = (1000 if texts == VERY_SHORT else 100), TEXTS[texts]
    texts, heads, kv_heads, n_prefix = (1, 1, 1, 1) if ones else (texts, 16, 8, n_prefix)
    q, k = empty(4096, heads, size, dtype=dtype), empty(4096, kv_heads, size, dtype=dtype)
    lse = empty(4096, heads, dtype=torch.float32)
    offsets = empty(texts + 1, dtype=torch.int32)
    blocks = empty(texts, 2, dtype=torch.int32) if mask == "gem" else None
    shared = (empty(n_prefix, kv_heads, size, dtype=dtype),) * 2 if prefix else (None, None)
    options = AttentionOptions(offsets, offsets, *shared, window, mask, blocks, dropout)
    suffix = f"{' with prefix' * prefix}{' and window' * bool(window)}{' of one' * ones}"
    suffix += " with dropout" * (dropout > 0) + length * (not ones)
    name = f"{mask}{suffix}, {size}, {TYPES[dtype]}"
    yield Case("attention", f"forward, {name}", lambda: triton_kernel.attention(q, k, k, options))
    yield Case(
        "attention",
        f"backward, {name}",
        lambda: triton_backward.attention_backward(q, q, k, k, q, lse, options),
    )


def compile_case(quick: bool, case: int, architecture: int) -> list[dict]:
    """Rows of the kernels that one case launches; `case` is its number, which pickles."""
    chosen = list(cases(quick))[case]
    with recorded(architecture, every_tile=not quick) as launches:
        chosen.call()
    return [
        {
            "op": chosen.op,
            "case": chosen.name,
            "kernel": launch.kernel.__name__.strip("_"),
            **compile_launch(launch, architecture),
        }
        for launch in launches
    ]


def compile_launch(launch: Launch, architecture: int) -> dict:
    """Machine code of one launch, specialised as Triton would at run time; its resources."""
    constants = dict(launch.constants)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return with_programs(
        {
            "sm": architecture,
            **options,
            **constants_of(constants),
            **resources(compiled.asm["cubin"]),
            "shared_bytes": compiled.metadata.shared,
        }
    )


def with_programs(row: dict) -> dict:
    """`row` with the programs that a multiprocessor holds at a time.

    By registers, of which a warp takes 256 at a time, shared memory, of which CUDA takes 1 KiB a
    program, and warps (CUDA C++ Programming Guide, table of technical specifications).
    """
    warps, sm = row.get("num_warps", 4), row["sm"]
    registers = -(-row["registers"] // 8) * 8 * 32 * warps
    shared = row["shared_bytes"] + 1024
    programs = min(65536 // registers, (LIMITS[sm] + 1024) // shared, WARPS[sm] // warps)
    return {**row, "programs": programs}


def constants_of(constants: dict) -> dict:
    return {k: v for k, v in constants.items() if k.startswith("BLOCK")}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread, as NVIDIA's own tool (in the wheel) reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return {"registers": int(found[1]), "spilled_bytes": int(found[2]) + int(found[3])}


def print_table(before: list[dict], after: list[dict]) -> None:
    """Attention in bf16 under a causal mask, of each case the tile in use, as Markdown."""
    cells: dict[tuple[int, str, int], dict[str, str]] = {}
    for report, rows in (("before", before), ("", after)):
        for row in map(with_programs, rows):
            _, mask, *texts, size, dtype = row["case"].split(", ")
            plain = mask in ("causal", "causal with prefix") and dtype == "bf16"
            if not plain or "BLOCK_K" not in row or int(size) not in (64, 128, 256):
                continue
            kernel = row["kernel"].removeprefix("attention_")
            columns = cells.setdefault((row["sm"], kernel, int(size)), {})
            columns.setdefault(
                report or "".join(texts) or "long",
                f"{row['BLOCK_Q']} x {row['BLOCK_K']}, {row['num_warps']} warps:"
                f" {row['registers']}, {row['spilled_bytes']},"
                f" {row['shared_bytes'] / 1024:.0f} KiB, {row['programs']}",
            )
    kinds = ("before", "long", "short")
    print("| sm | kernel, head size | before | after, long texts | after, short texts |")
    print("|---|---|---|---|---|")
    for (sm, kernel, size), columns in sorted(cells.items()):
        described = " | ".join(columns.get(kind, "") for kind in kinds)
        print(f"| {sm} | {kernel}, {size} | {described} |")


def main() -> None:
    """Compile, print a row a kernel, fail if one needs more than its architecture has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--op", nargs="+", help="only these ops")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes, and one tile of each kernel"
    )
    parser.add_argument("--table", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    args = parser.parse_args()
    if args.table:
        print_table(*(json.loads(path.read_text())["rows"] for path in args.table))
        return
    jobs = [
        (i, architecture)
        for architecture in args.arch
        for i, case in enumerate(cases(args.quick))
        if case.compiles_for(architecture, args.quick) and (not args.op or case.op in args.op)
    ]
    rows = []
    with ProcessPoolExecutor() as pool:
        for found in pool.map(partial(compile_case, args.quick), *zip(*jobs, strict=True)):
            for row in found:
                print(
                    f"{row['op']:<10} {row['case']:<50} {row['kernel']:<10} sm_{row['sm']}"
                    f" {row['registers']:4d} registers {row['spilled_bytes']:5d} B spilled"
                    f" {row['shared_bytes']:7d} B shared {row['programs']:2d} a multiprocessor",
                    flush=True,
                )
            rows += found
    if args.json:
        report = {"triton": triton.__version__, "command": " ".join(sys.argv), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if any(row["shared_bytes"] > LIMITS[row["sm"]] for row in rows):
        sys.exit("a kernel needs more shared memory than there is")


if __name__ == "__main__":
    main()
