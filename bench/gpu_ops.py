"""What gen_fast's ops and passes move, compute and launch on a GPU: the counts of gpu_model.py.

Bytes are those that bench/kernels counts: tensors, read and written once; activations are bf16.
"""

from dataclasses import dataclass

TOKENS, SPECIAL, COMPRESSION = 65536, 20, 10  # of a full batch; of a text
QUERY, ANSWER = 128, 192  # tokens of a training example's
DISTILLED = 4096  # rows of distill's case


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
    return _pointwise("norm", values, moved=4, flops=10 if backward else 5, backward=backward)


def _pointwise(name: str, values: int, *, moved: int, flops: int, backward: bool) -> Op:
    """An op that reads and writes `moved` bf16 for each of `values`, and computes `flops`."""
    kernel = f"{name}/{'backward' if backward else 'forward'}"
    name = f"{name} backward" if backward else name
    return Op(name, moved * values * 2, flops * values, kernel=kernel)


def norm_quantized(shape: Shape, rows: int) -> Op:
    return _quantized("norm", rows, rows * shape.hidden, read=3, flops=8)


def _quantized(name: str, rows: int, values: int, *, read: int, flops: int) -> Op:
    """An op that stores `values` in 8 bits, with a scale a row, of `read` bf16 each."""
    moved = read * values * 2 + values + 4 * rows
    return Op(f"{name}, quantised", moved, flops * values, kernel=f"{name}/quantized")


def rope(shape: Shape, rows: int, *, backward: bool = False) -> Op:
    """With the norm of q and k, whose gradient reads x once more; cos and sin are fp32."""
    values = rows * (shape.heads + shape.kv_heads) * shape.head_dim
    angles = rows * shape.head_dim // 2 * 4
    moved = 2 * (values * 2 + angles)
    if backward:
        return Op("rope backward", moved + values * 2, 8 * values, kernel="rope/backward")
    return Op("rope", moved, 8 * values, kernel="rope/forward")


def swiglu(shape: Shape, rows: int, *, backward: bool = False) -> Op:
    values = rows * shape.feed_forward
    moved, flops = (5, 20) if backward else (3, 15)
    return _pointwise("swiglu", values, moved=moved, flops=flops, backward=backward)


def swiglu_quantized(shape: Shape, rows: int) -> Op:
    return _quantized("swiglu", rows, rows * shape.feed_forward, read=2, flops=18)


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
    fp8 = unit == "fp8"
    return [
        norm_quantized(shape, rows) if fp8 else norm(shape, rows),
        product("product qkv", rows, hidden, shape.qkv, unit),
        rope(shape, rows),
        attention(shape, out, rows + keys, pairs * out / rows),
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


# ---- Cases of bench/kernels.


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
            tokens = sum(lengths)
            return [attention(shape, tokens, tokens, pairs, backward=b) for b in both]
        case "distill":
            return distill(shape, DISTILLED)
    return None
