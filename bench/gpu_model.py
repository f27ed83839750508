"""A model of gen_fast on GPUs, not a measurement: time and bound of every op, from data sheets.

    python bench/gpu_model.py [--json FILE]

An op takes the longest of: its bytes at the data sheet's bandwidth, its FLOPs at the data sheet's
peak, each times the share of it that an H100 reached (SHARES), and its launches. A pass is the sum
of its ops. Bytes are those that bench/kernels counts: tensors, read and written once. What
compiling recorded of a kernel (results/compile-triton-3.7.0.json, of an earlier commit; attention
and the products are left out) gives the warps that a multiprocessor holds. Where the loads in
flight of so many do not cover the latency of memory, the kernel's bandwidth is lower by as much.

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

RESULTS = Path(__file__).parent / "results"
MEASURED = {"H100": ("gpu-h100-2026-11-26.json", "gpu-h100-2026-11-27.json")}
COMPILED = "compile-triton-3.7.0.json"

TOKENS, SPECIAL, COMPRESSION = 65536, 20, 10  # of a full batch; of a text
TEXT, QUERY, ANSWER = 256, 128, 192  # tokens of an encoded text; of a training example's two

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
    # NVIDIA L4 Tensor Core GPU data sheet (with sparsity: halved). sm_89 runs the tiles of sm_80.
    Gpu("L4", 121.0, 242.5, 30.3, 300, 58, 48, 102_400, 80),
    # NVIDIA Ada GPU architecture white paper, GeForce RTX 4090, FP16 and FP8 with FP32 accumulate.
    Gpu("4090", 165.2, 330.3, 82.6, 1008, 128, 48, 102_400, 80),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3, from its published config."""

    name: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocabulary: int = 151936

    @property
    def qkv(self) -> int:
        """Columns of the fused projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = (
    Shape("qwen3-0.6b", 1024, 3072, 28, 16, 8),
    Shape("qwen3-4b", 2560, 9728, 36, 32, 8),
    Shape("qwen3-8b", 4096, 12288, 36, 32, 8),
)


@dataclass(frozen=True)
class Op:
    """What an op moves, computes and launches; activations are bf16, 2 bytes."""

    name: str
    bytes: float
    flops: float
    share: str = "vector"  # of SHARES: what it reaches of the unit's peak
    unit: str = "fp32"
    launches: int = 1
    kernel: str = ""  # "op/kernel" among the compiled ones


# ---- Ops, for `rows` tokens. Forward and backward are those of bench/kernels/bench_<op>.py.


def append(shape: Shape, rows: int) -> Op:
    return Op("append", 2 * rows * shape.hidden * 2, 0, kernel="append/forward")


def append_backward(shape: Shape, rows: int, special: int) -> Op:
    """`special` of the rows are special tokens': the others' gradient is not read."""
    values = special * shape.hidden
    return Op("append backward", values * 2, values, kernel="append/backward")


def norm(shape: Shape, rows: int, *, backward: bool = False) -> Op:
    values = rows * shape.hidden
    if backward:
        return Op("norm backward", 4 * values * 2, 10 * values, kernel="norm/backward")
    return Op("norm", 4 * values * 2, 5 * values, kernel="norm/forward")


def norm_quantized(shape: Shape, rows: int) -> Op:
    values = rows * shape.hidden
    moved = 3 * values * 2 + values + 4 * rows
    return Op("norm, quantised", moved, 8 * values, kernel="norm/quantized")


def rope(shape: Shape, rows: int, *, backward: bool = False) -> Op:
    """With the norm of q and k; cos and sin are fp32."""
    values = rows * (shape.heads + shape.kv_heads) * shape.head_dim
    angles = rows * shape.head_dim // 2 * 4
    name, kernel = ("rope backward", "backward") if backward else ("rope", "forward")
    return Op(name, 2 * (values * 2 + angles), 8 * values, kernel=f"rope/{kernel}")


def swiglu(shape: Shape, rows: int, *, backward: bool = False) -> Op:
    values = rows * shape.feed_forward
    if backward:
        return Op("swiglu backward", 5 * values * 2, 20 * values, kernel="swiglu/backward")
    return Op("swiglu", 3 * values * 2, 15 * values, kernel="swiglu/forward")


def swiglu_quantized(shape: Shape, rows: int) -> Op:
    values = rows * shape.feed_forward
    moved = 2 * values * 2 + values + 4 * rows
    return Op("swiglu, quantised", moved, 18 * values, kernel="swiglu/quantized")


def quantize_rows(width: int, rows: int) -> Op:
    values = rows * width
    moved = values * 2 + values + 4 * rows
    return Op("rows to 8 bits", moved, 3 * values, kernel="qlinear/quantize")


def pool(shape: Shape, texts: int) -> Op:
    values = texts * COMPRESSION * shape.hidden
    moved = values * 2 + texts * shape.hidden * 4
    return Op("pool", moved, 5 * values, kernel="pool/forward")


def product(name: str, rows: int, inner: int, columns: int, unit: str = "bf16") -> Op:
    """[rows, inner] by a weight [columns, inner], in bf16 or fp8; the result is bf16."""
    size = 2 if unit == "bf16" else 1
    moved = (rows + columns) * inner * size + rows * columns * 2
    share = "product" if unit == "bf16" else "fp8 product"
    return Op(name, moved, 2.0 * rows * inner * columns, share, unit)


def attention(shape: Shape, queries: int, keys: int, pairs: float, *, backward: bool = False) -> Op:
    """queries, keys: rows. pairs: of a query and a key that it sees."""
    moved = (2 * queries * shape.heads + 2 * keys * shape.kv_heads) * shape.head_dim * 2
    work = shape.heads * shape.head_dim * pairs
    if backward:  # five products against two; a kernel for dq and one for dk and dv
        return Op(
            "attention backward", 2 * moved, 10 * work, "attention backward", "bf16", launches=2
        )
    return Op("attention", moved, 4 * work, "attention", "bf16")


def distill(shape: Shape, rows: int) -> list[Op]:
    """Logits, the row loss that rewrites them in place, and the gradient of the hidden states."""
    logits = rows * shape.vocabulary
    return [
        product("distill: logits", rows, shape.hidden, shape.vocabulary),
        Op("distill: row loss", 2 * logits * 2, 8 * logits, kernel="distill/row_loss"),
        product("distill: gradient", rows, shape.vocabulary, shape.hidden),
    ]


# ---- Passes.


def layer(
    shape: Shape, rows: int, pairs: float, *, unit: str = "bf16", keys: int = 0, needed: int = 0
) -> list[Op]:
    """A layer's forward. keys: rows before these that are attended to, without rows of their own.

    needed: rows that leave the layer, if not all: the last one's.
    """
    out, hidden, wide = needed or rows, shape.hidden, shape.feed_forward
    heads = shape.heads * shape.head_dim
    seen = pairs * out / rows
    fp8 = unit == "fp8"
    return [
        norm_quantized(shape, rows) if fp8 else norm(shape, rows),
        product("product qkv", rows, hidden, shape.qkv, unit),
        rope(shape, rows),
        attention(shape, out, rows + keys, seen),
        *([quantize_rows(heads, out)] if fp8 else []),
        product("product out", out, heads, hidden, unit),
        norm_quantized(shape, out) if fp8 else norm(shape, out),
        product("product gate, up", out, hidden, 2 * wide, unit),
        swiglu_quantized(shape, out) if fp8 else swiglu(shape, out),
        product("product down", out, wide, hidden, unit),
    ]


def layer_backward(shape: Shape, rows: int, pairs: float, *, keys: int = 0) -> list[Op]:
    """Gradients of a layer's input alone: its weights are frozen."""
    hidden, wide, heads = shape.hidden, shape.feed_forward, shape.heads * shape.head_dim
    return [
        product("product down backward", rows, hidden, wide),
        swiglu(shape, rows, backward=True),
        product("product gate, up backward", rows, 2 * wide, hidden),
        norm(shape, rows, backward=True),
        product("product out backward", rows, hidden, heads),
        attention(shape, rows, rows + keys, pairs, backward=True),
        rope(shape, rows, backward=True),
        product("product qkv backward", rows, shape.qkv, hidden),
        norm(shape, rows, backward=True),
    ]


def causal(length: float) -> float:
    """Pairs of a text."""
    return length * (length + 1) / 2


def forward(shape: Shape, texts: int, length: float, unit: str = "bf16") -> list[Op]:
    """Embedding `texts` of `length` tokens, special ones among them (a mean, if ragged)."""
    rows, pairs = round(texts * length), texts * causal(length)
    whole = layer(shape, rows, pairs, unit=unit)
    last = layer(shape, rows, pairs, unit=unit, needed=texts * COMPRESSION)
    return [append(shape, rows), *whole * (shape.layers - 1), *last, pool(shape, texts)]


def training_step(shape: Shape, texts: int) -> list[Op]:
    """LLM2Vec-Gen's: queries forward; special tokens and answers forward and back; distillation.

    An answer stands behind COMPRESSION soft tokens. The optimizer, the two small projections and
    the rows that the last layers leave out are not counted.
    """
    special, answer = texts * SPECIAL, texts * (COMPRESSION + ANSWER)
    behind = texts * (SPECIAL * QUERY + causal(SPECIAL))
    within = texts * causal(COMPRESSION + ANSWER)
    queries = texts * QUERY
    one = [
        *layer(shape, queries + special, texts * causal(QUERY + SPECIAL)),
        *layer(shape, answer, within),
        *layer_backward(shape, special, behind, keys=queries),
        *layer_backward(shape, answer, within),
    ]
    return [
        append(shape, queries + special),
        append(shape, answer),
        *one * shape.layers,
        pool(shape, texts),
        *distill(shape, texts * ANSWER),
        append_backward(shape, answer, texts * COMPRESSION),
        append_backward(shape, queries + special, special),
    ]


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
        flying = self.resident(gpu) * 32 * LOAD_BYTES * gpu.multiprocessors
        return min(1.0, flying / (gpu.gb_per_second * 1e9 * LATENCY_S))


def compiled() -> list[Compiled]:
    """The kernels of rows, at the two sizes of hidden states that were compiled."""
    kernels = {}
    for row in json.loads((RESULTS / COMPILED).read_text())["rows"]:
        case, _, size = row["case"].partition(", hidden ")
        if not size:
            continue  # attention's tiles: it is calibrated as a whole
        found = Compiled(
            f"{row['op']}/{row['kernel']}", row["sm"], int(size), row.get("num_warps", 4),
            row["registers"], row["spilled_bytes"], row["shared_bytes"],
        )  # fmt: skip
        # The last of a name: rope with its norm behind the one without.
        if case != "fp8":
            kernels[found.kernel, found.sm, found.hidden] = found
    return list(kernels.values())


KERNELS = {(k.kernel, k.sm, k.hidden): k for k in compiled()}


def seconds(op: Op, gpu: Gpu, hidden: int) -> tuple[float, str]:
    """Time of an op, and what bounds it: "memory", "compute" or "launch"."""
    size = 1024 if hidden < 2560 else 4096  # the nearer one that was compiled
    kernel = KERNELS.get((op.kernel, gpu.compiled_for, size))
    covered = kernel.covered(gpu) if kernel else 1.0
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


def case(op: str, shape: Shape, rows: int, *, backward: bool) -> list[Op] | None:
    """The ops of a case of bench/kernels; None for one that the model leaves out."""
    both = (False, True) if backward else (False,)
    match op:
        case "append":
            special = rows * SPECIAL // 64
            return [append(shape, rows), append_backward(shape, rows, special)][: 1 + backward]
        case "norm":
            return [norm(shape, rows, backward=b) for b in both]
        case "norm_quantized":
            return [norm_quantized(shape, rows)]
        case "rope":
            return [rope(shape, rows, backward=b) for b in both]
        case "swiglu":
            return [swiglu(shape, rows, backward=b) for b in both]
        case "swiglu_quantized":
            return [swiglu_quantized(shape, rows)]
        case "pool":
            return [pool(shape, rows // COMPRESSION)]
        case "attention":
            lengths = [256 + i % 21 for i in range(240)]
            pairs = sum(map(causal, lengths))
            total = sum(lengths)
            return [attention(shape, total, total, pairs, backward=b) for b in both]
        case "distill":
            return distill(shape, 4096)
    return None


def measurements(name: str) -> Iterator[tuple[str, str, str, float, float]]:
    """Of a GPU: (kind, shape, case, seconds by the model, seconds measured), gen_fast's rows."""
    gpu = next(gpu for gpu in GPUS if gpu.name == name)
    shapes = {shape.name: shape for shape in SHAPES}
    found: dict[tuple[str, str, str], tuple[float, float]] = {}  # a later row replaces its earlier
    for file in MEASURED[name]:
        report = json.loads((RESULTS / file).read_text())
        for row in report["kernels"]:
            shape = shapes[row["size"]]
            ops = None
            if row["provider"] == "triton" and "behind" not in row["case"]:
                ops = case(
                    row["op"], shape, KERNEL_ROWS[shape.name], backward="backward" in row["mode"]
                )
            elif (row["op"], row["provider"]) in PRODUCTS:
                unit = PRODUCTS[row["op"], row["provider"]]
                rows = row["case"].split()[0]
                count = KERNEL_ROWS[shape.name] if rows == "batch" else int(rows)
                ops = [product("", count, shape.hidden, 2 * shape.feed_forward, unit)]
                row["op"], row["mode"] = f"{unit} product gate, up", row["case"]
            if ops:
                label = f"{row['op']}, {row['mode']}"
                found["op", shape.name, label] = total(ops, gpu, shape.hidden)[0], row["p50"]
        for row in report["encode"]:
            unit = {"gen_fast": "bf16", "fp8": "fp8"}.get(row["provider"])
            if unit:
                shape = shapes[row["shape"]]
                # Whole batches, of the mean length.
                length = row["tokens"] / row["texts"]
                texts = round(TOKENS / length)
                time = total(forward(shape, texts, length, unit), gpu, shape.hidden)[0]
                label = f"{unit}, {row['workload']}"
                measured = row["tokens"] / row["tokens_per_second"]
                found["encode", shape.name, label] = time * row["texts"] / texts, measured
    for (kind, name_of_shape, label), times in sorted(found.items()):
        yield kind, name_of_shape, label, *times


def report() -> dict[str, list[dict]]:
    """Every table of the model, as rows."""
    texts, examples = TOKENS // (TEXT + SPECIAL), TOKENS // (QUERY + SPECIAL + COMPRESSION + ANSWER)
    tables: dict[str, list[dict]] = {
        "data sheets (assumed: launch_us)": [asdict(gpu) for gpu in GPUS],
        "kernels as compiled; resident warps, and the bandwidth that their loads allow": [
            {
                **asdict(kernel),
                **{
                    gpu.name: f"{kernel.resident(gpu)} ({kernel.covered(gpu):.0%})"
                    for gpu in GPUS
                    if gpu.compiled_for == kernel.sm
                },
            }
            for kernel in KERNELS.values()
        ],
    }
    for shape in SHAPES:
        pairs = texts * causal(TEXT + SPECIAL)
        rows = texts * (TEXT + SPECIAL)
        ops = [append(shape, rows), *layer(shape, rows, pairs), *layer_backward(shape, rows, pairs)]
        ops += [pool(shape, texts), *layer(shape, rows, pairs, unit="fp8"), *distill(shape, 4096)]
        unique = {(op.name, op.unit): op for op in ops}.values()
        tables[f"ops, {shape.name}, {rows:,} tokens (distill: 4,096 rows); µs and bound"] = [
            {
                "op": f"{op.name} ({op.unit})" if "product" in op.name else op.name,
                "MB": op.bytes / 1e6,
                "GFLOP": op.flops / 1e9,
                **{gpu.name: _cell(*seconds(op, gpu, shape.hidden), 1e6) for gpu in _able(op)},
            }
            for op in unique
        ]
    passes = []
    for shape in SHAPES:
        length = TEXT + SPECIAL
        whole = {
            "layer, bf16": layer(shape, texts * length, texts * causal(length)),
            "forward, bf16": forward(shape, texts, length),
            "forward, fp8": forward(shape, texts, length, "fp8"),
            "training step, bf16": training_step(shape, examples),
        }
        passes += [
            {
                "shape": shape.name,
                "pass": name,
                "launches": sum(op.launches for op in ops),
                **{
                    gpu.name: _cell(*total(ops, gpu, shape.hidden), 1e3)
                    for gpu in GPUS
                    if gpu.fp8_tflops or all(op.unit != "fp8" for op in ops)
                },
            }
            for name, ops in whole.items()
        ]
    tables[f"passes of {TOKENS:,} tokens; ms and the bound of the largest part"] = passes
    queries = []
    for shape in SHAPES:
        ops = forward(shape, 1, 30 + SPECIAL)
        launches = sum(op.launches for op in ops)
        python = launches * PYTHON_LAUNCH_US * 1e-6
        for name, least in (("CUDA graph", 0.0), ("launched from Python", python)):
            row: dict = {"shape": shape.name, "query": name, "launches": launches}
            for gpu in GPUS:
                time, bound = total(ops, gpu, shape.hidden)
                # The host launches ahead of the GPU: the slower of the two counts.
                row[gpu.name] = _cell(max(time, least), "launch" if least > time else bound, 1e3)
            queries.append(row)
    tables[f"one query of 30 tokens and {SPECIAL} special ones, bf16; ms and bound"] = queries
    for name in MEASURED:
        tables[f"prediction against measurement, {name}; ms"] = [
            {
                "kind": kind,
                "shape": shape,
                "case": label,
                "model": predicted * 1e3,
                "measured": measured * 1e3,
                "model / measured": predicted / measured,
            }
            for kind, shape, label, predicted, measured in measurements(name)
        ]
    return {f"Model, not a measurement: {title}": rows for title, rows in tables.items()}


def _able(op: Op) -> list[Gpu]:
    return [gpu for gpu in GPUS if op.unit != "fp8" or gpu.fp8_tflops]


def _cell(time: float, bound: str, scale: float) -> str:
    return f"{time * scale:,.3g} {bound}" if time * scale < 1000 else f"{time * scale:,.0f} {bound}"


def show(tables: dict[str, list[dict]]) -> None:
    """Print them in Markdown; what a row lacks is a dash."""
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        print(f"### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            cells = [row.get(column) for column in columns]
            texts = [f"{c:.3g}" if isinstance(c, float) and c < 1000 else c for c in cells]
            texts = [f"{c:,.0f}" if isinstance(c, float) else c for c in texts]
            print(f"| {' | '.join('-' if c is None else str(c) for c in texts)} |")
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    made = report()
    show(made)
    if args.json:
        args.json.write_text(json.dumps(made, indent=1) + "\n")
