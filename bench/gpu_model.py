"""A model of gen_fast on GPUs, not a measurement: time and bound of every op, from data sheets.

    python bench/gpu_model.py [--json FILE]

An op takes the longest of: its bytes at the data sheet's bandwidth, its FLOPs at the data sheet's
peak, each times the share of it that an H100 reached (SHARES), and its launches. A pass is the sum
of its ops, which gpu_ops.py counts. What compiling recorded of a kernel's registers and shared
memory (results/compile-triton-3.7.0.json, of an earlier commit; attention and the products are left
out) gives the warps that a multiprocessor holds. Where the loads in flight of so many do not cover
the latency of memory, the kernel's bandwidth is lower by as much.

Where a GPU has been measured, the model is printed beside the measurement. SHARES are of the H100's
rows of 8B: rows of 0.6B, of other ops and of encoding test the model, and 8B's norm, attention and
products of full batches do not. Other GPUs are assumed to reach the H100's shares. Not in the
model: caches, clocks that fall under load (an L4 has 72 W), the host's work besides launching, and
whether all of it fits in memory.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_ops import (
    ANSWER,
    COMPRESSION,
    DISTILLED,
    QUERY,
    SHAPES,
    SPECIAL,
    TOKENS,
    Op,
    Shape,
    append,
    case,
    causal,
    distill,
    forward,
    layer,
    layer_backward,
    pool,
    product,
    training_step,
)

RESULTS = Path(__file__).parent / "results"
MEASURED = {"H100": ("gpu-h100-2026-11-26.json", "gpu-h100-2026-11-27.json")}
COMPILED = "compile-triton-3.7.0.json"

TEXT, SHORT = 256, 30  # tokens of an encoded text and of a single query

# What an H100 reached of its data sheet (results/gpu-h100-*.json, sizes of Qwen3-8B, bf16).
SHARES = {
    "memory": 0.876,  # norm, forward: 2.94 of 3.35 TB/s
    "product": 0.74,  # a layer's four products, by their FLOPs: 722 to 793 of 989 TFLOP/s
    "fp8 product": 0.59,  # gate and up of a full batch: 1,174 of 1,979 TFLOP/s
    "attention": 0.123,  # forward, 256 to 276 tokens: 122 of 989 TFLOP/s
    "attention backward": 0.081,  # forward + backward less forward: 81 of 989 TFLOP/s
    "vector": 1.0,  # arithmetic outside the tensor cores; it bounds no op here
}
# Of bench/kernels' cases, and whose products of gate and up stand in their rows.
KERNEL_ROWS = {"qwen3-0.6b": 65536, "qwen3-8b": 16384}
PRODUCTS = {("int4_linear", "linear"): "bf16", ("fp8_linear", "scaled_mm"): "fp8"}
# Assumptions, not measured.
GRAPH_LAUNCH_US = 2.0  # a kernel of a CUDA graph, from the end of one to the end of the next
PYTHON_LAUNCH_US = 10.0  # a kernel launched from Python
LATENCY_S = 600e-9  # of a load from memory under load
LOAD_BYTES = 16  # in flight for each thread


@dataclass(frozen=True)
class Gpu:
    """A data sheet: dense TFLOP/s with fp32 sums, and what a multiprocessor holds."""

    name: str
    bf16_tflops: float
    fp8_tflops: float | None
    fp32_tflops: float
    gb_per_second: float
    multiprocessors: int
    warps: int  # of a multiprocessor, at most
    shared_bytes: int  # of a multiprocessor
    compiled_for: int  # the architecture whose compiled kernels stand for it
    launch_us: float = GRAPH_LAUNCH_US

    def tflops(self, unit: str) -> float:
        """Of "bf16" or "fp8" tensor cores, or "fp32" arithmetic."""
        peak = {"bf16": self.bf16_tflops, "fp8": self.fp8_tflops, "fp32": self.fp32_tflops}[unit]
        if peak is None:
            raise ValueError(f"{self.name} has no {unit} tensor cores")
        return peak


GPUS = (
    # NVIDIA H200 Tensor Core GPU data sheet, SXM (its TFLOP/s are with sparsity: halved).
    Gpu("H200", 989.4, 1978.9, 66.9, 4800, 132, 64, 233_472, 90),
    # NVIDIA H100 Tensor Core GPU data sheet and architecture white paper, SXM5 80 GB.
    Gpu("H100", 989.4, 1978.9, 66.9, 3350, 132, 64, 233_472, 90),
    # NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB.
    Gpu("A100", 312.0, None, 19.5, 2039, 108, 64, 167_936, 80),
    # NVIDIA L4 Tensor Core GPU data sheet (with sparsity: halved). Its kernels of rows are sm_80's.
    Gpu("L4", 121.0, 242.5, 30.3, 300, 58, 48, 102_400, 80),
    # NVIDIA Ada GPU architecture white paper, GeForce RTX 4090, FP16 and FP8 with FP32 accumulate.
    Gpu("4090", 165.2, 330.3, 82.6, 1008, 128, 48, 102_400, 80),
)


# ---- Time.


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled: what it needs, and the warps of a multiprocessor that this leaves."""

    kernel: str
    sm: int
    hidden: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    def resident(self, gpu: Gpu) -> int:
        """Warps at a time: 65,536 registers in eights a thread, shared memory, 32 blocks."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared = self.shared_bytes + 1024  # CUDA takes 1 KiB a block
        blocks = min(65536 // registers, gpu.shared_bytes // shared, gpu.warps // self.warps, 32)
        return blocks * self.warps

    def covered(self, gpu: Gpu) -> float:
        """The share of bandwidth that the loads in flight allow (Little's law), at most 1."""
        in_flight = self.resident(gpu) * 32 * LOAD_BYTES * gpu.multiprocessors
        return min(1.0, in_flight / (gpu.gb_per_second * 1e9 * LATENCY_S))


def compiled() -> dict[tuple[str, int, int], Compiled]:
    """The kernels of rows by name, architecture and hidden size: two sizes were compiled."""
    kernels = {}
    for row in json.loads((RESULTS / COMPILED).read_text())["rows"]:
        name, _, size = row["case"].partition(", hidden ")
        if not size or name == "fp8":
            continue  # attention's tiles; and int8 stands for both kinds of 8 bits
        kernel = Compiled(
            kernel=f"{row['op']}/{row['kernel']}",
            sm=row["sm"],
            hidden=int(size),
            warps=row.get("num_warps", 4),  # Triton's default
            registers=row["registers"],
            spilled_bytes=row["spilled_bytes"],
            shared_bytes=row["shared_bytes"],
        )
        # Of rope the row with its norm, which stands behind the one without.
        kernels[kernel.kernel, kernel.sm, kernel.hidden] = kernel
    return kernels


KERNELS = compiled()


def seconds(op: Op, gpu: Gpu, hidden: int) -> tuple[float, str]:
    """Time of an op, and what bounds it: "memory", "compute" or "launch"."""
    size = 1024 if hidden < 2560 else 4096  # the nearer one that was compiled
    covered = KERNELS[op.kernel, gpu.compiled_for, size].covered(gpu) if op.kernel else 1.0
    bounds = {
        "memory": op.bytes / (gpu.gb_per_second * 1e9 * SHARES["memory"] * covered),
        "compute": op.flops / (gpu.tflops(op.unit) * 1e12 * SHARES[op.share]),
        "launch": op.launches * gpu.launch_us * 1e-6,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return bounds[bound], bound


def total(ops: Sequence[Op], gpu: Gpu, hidden: int) -> tuple[float, str]:
    """Time of ops one after the other, and the bound of the largest part of it."""
    parts: dict[str, float] = {}
    for op in ops:
        time, bound = seconds(op, gpu, hidden)
        parts[bound] = parts.get(bound, 0.0) + time
    return sum(parts.values()), max(parts, key=lambda name: parts[name])


# ---- Against measurements.


def measurements(name: str) -> Iterator[tuple[str, str, str, float, float]]:
    """Of a GPU: (kind, shape, case, seconds by the model, seconds measured), gen_fast's rows."""
    gpu = next(gpu for gpu in GPUS if gpu.name == name)
    times: dict[tuple[str, str, str], tuple[float, float]] = {}  # of a case's latest row
    for file in MEASURED[name]:
        results = json.loads((RESULTS / file).read_text())
        for row in results["kernels"]:
            shape = _shape(row["size"])
            ops, label = _measured_case(row, shape)
            if ops:
                times["op", shape.name, label] = total(ops, gpu, shape.hidden)[0], row["p50"]
        for row in results["encode"]:
            unit = {"gen_fast": "bf16", "fp8": "fp8"}.get(row["provider"])
            if unit is None:
                continue
            shape, length = _shape(row["shape"]), row["tokens"] / row["texts"]
            texts = round(TOKENS / length)  # whole batches, of the mean length
            batch = total(forward(shape, texts, length, unit), gpu, shape.hidden)[0]
            times["encode", shape.name, f"{unit}, {row['workload']}"] = (
                batch * row["texts"] / texts,
                row["tokens"] / row["tokens_per_second"],
            )
    for (kind, size, label), (predicted, measured) in sorted(times.items()):
        yield kind, size, label, predicted, measured


def _shape(name: str) -> Shape:
    return next(shape for shape in SHAPES if shape.name == name)


def _measured_case(row: dict, shape: Shape) -> tuple[list[Op] | None, str]:
    """The ops of a row of bench/kernels, None for one that is not modelled, and its name."""
    unit = PRODUCTS.get((row["op"], row["provider"]))
    if unit:
        count = row["case"].split()[0]
        rows = KERNEL_ROWS[shape.name] if count == "batch" else int(count)
        ops = [product("", rows, shape.hidden, 2 * shape.feed_forward, unit)]
        return ops, f"{unit} product gate, up, {row['case']}"
    if row["provider"] != "triton" or "behind" in row["case"]:
        return None, ""
    backward = "backward" in row["mode"]
    ops = case(row["op"], shape, KERNEL_ROWS[shape.name], backward=backward)
    return ops, f"{row['op']}, {row['mode']}"


# ---- Tables. A GPU's cell is a time and its bound.

Cell = tuple[float, str]


def cells(ops: Sequence[Op], hidden: int, scale: float) -> dict[str, Cell]:
    """Time of `ops` and its bound, for each GPU that has their units."""
    return {
        gpu.name: (time * scale, bound)
        for gpu in GPUS
        if gpu.fp8_tflops or all(op.unit != "fp8" for op in ops)
        for time, bound in [total(ops, gpu, hidden)]
    }


def kernel_rows() -> list[dict]:
    """Resident warps of a multiprocessor, and the share of bandwidth that their loads allow."""
    return [
        asdict(kernel)
        | {
            gpu.name: (kernel.resident(gpu), f"({kernel.covered(gpu):.0%})")
            for gpu in GPUS
            if gpu.compiled_for == kernel.sm
        }
        for kernel in KERNELS.values()
    ]


def op_rows(shape: Shape, texts: int) -> list[dict]:
    """Every op of a layer, forward and backward, and those around the layers; microseconds."""
    rows, pairs = texts * (TEXT + SPECIAL), texts * causal(TEXT + SPECIAL)
    ops = [
        append(shape, rows),
        *layer(shape, rows, pairs),
        pool(shape, texts),
        *layer(shape, rows, pairs, unit="fp8"),
        *layer_backward(shape, rows, pairs),
        *distill(shape, DISTILLED),
    ]
    return [
        {
            "op": op.name,
            "unit": op.unit,
            "MB": op.bytes / 1e6,
            "GFLOP": op.flops / 1e9,
            **cells([op], shape.hidden, 1e6),
        }
        for op in {(op.name, op.unit): op for op in ops}.values()  # a layer has two norms
    ]


def pass_rows(shape: Shape, texts: int, examples: int) -> list[dict]:
    """Milliseconds of a full batch."""
    length = TEXT + SPECIAL
    passes = {
        "layer, bf16": layer(shape, texts * length, texts * causal(length)),
        "forward, bf16": forward(shape, texts, length),
        "forward, fp8": forward(shape, texts, length, "fp8"),
        "training step, bf16": training_step(shape, examples),
    }
    return [
        {
            "shape": shape.name,
            "pass": name,
            "launches": sum(op.launches for op in ops),
            **cells(ops, shape.hidden, 1e3),
        }
        for name, ops in passes.items()
    ]


def query_rows(shape: Shape) -> list[dict]:
    """Milliseconds of one query. Python launches ahead of the GPU: the slower of them counts."""
    ops = forward(shape, 1, SHORT + SPECIAL)
    launches = sum(op.launches for op in ops)
    graph = cells(ops, shape.hidden, 1e3)
    python = (launches * PYTHON_LAUNCH_US * 1e-3, "launch")
    row = {"shape": shape.name, "launches": launches}
    return [
        row | {"query": "CUDA graph"} | graph,
        row | {"query": "from Python"} | {name: max(cell, python) for name, cell in graph.items()},
    ]


def report() -> dict[str, list[dict]]:
    """Every table of the model, as rows."""
    texts = TOKENS // (TEXT + SPECIAL)
    examples = TOKENS // (QUERY + SPECIAL + COMPRESSION + ANSWER)
    tables: dict[str, list[dict]] = {
        "data sheets (launch_us: assumed)": [asdict(gpu) for gpu in GPUS],
        "kernels as compiled; resident warps, and the bandwidth that their loads allow": (
            kernel_rows()
        ),
    }
    for shape in SHAPES:
        title = f"ops, {shape.name}, {texts} texts of {TEXT + SPECIAL} tokens; µs and bound"
        tables[f"{title} (distill: {DISTILLED:,} rows)"] = op_rows(shape, texts)
    tables[
        f"passes of at most {TOKENS:,} tokens, {texts} texts or {examples} training examples; ms"
        " and the bound of the largest part"
    ] = [row for shape in SHAPES for row in pass_rows(shape, texts, examples)]
    tables[
        f"one query of {SHORT} tokens and {SPECIAL} special ones, bf16; ms and the bound of the"
        " largest part"
    ] = [row for shape in SHAPES for row in query_rows(shape)]
    for name in MEASURED:
        tables[f"prediction against measurement, {name}; ms"] = [
            {
                "kind": kind,
                "shape": size,
                "case": label,
                "model": predicted * 1e3,
                "measured": measured * 1e3,
                "model / measured": predicted / measured,
            }
            for kind, size, label, predicted, measured in measurements(name)
        ]
    return {f"Model, not a measurement: {title}": rows for title, rows in tables.items()}


def show(tables: dict[str, list[dict]]) -> None:
    """Print them in Markdown; what a row lacks is a dash."""
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        print(f"### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(_text(row.get(column)) for column in columns)} |")
        print()


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case tuple():
            return " ".join(map(_text, value))
        case float() if value < 1000:
            return f"{value:.3g}"
        case int() | float():
            return f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tables = report()
    show(tables)
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1) + "\n")
