"""Encoding speed at the sizes of larger models, with random weights: what a GPU is checked with.

    python bench/encode_shapes.py [--shape qwen3-0.6b qwen3-8b] [--rounds N] [--json FILE]
                                  [--profile SECONDS] [--quantize int8 fp8 int4]

The peer is transformers' own model (SDPA) in length-sorted, left-padded batches of 32, which is
what the reference package runs; both embed the same token ids with the same weights in bf16, so
neither tokenises. Ratios are medians over interleaved rounds; FILE is rewritten after every
workload. The FLOPs of an MFU are, for both, what gen_fast executes: the products with weights,
without attention's own, of every token in all layers but the last, and there of its queries, keys
and values; the rest of the last layer of the compression tokens alone. The peer runs that for all
tokens and for padding too, which is not counted: no embedding needs it. Beside it stands what
cuBLAS reaches for each of a layer's four products at the rows of a full batch. --profile writes
where gen_fast's time goes, over so many seconds of each shape, to text files beside FILE.
--quantize runs gen_fast over quantised weights too, in the same rounds; "gen_fast" is bf16.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from measure import arguments, interleaved, median_ratio, product_tflops, profile, reported

from gen_fast.io.vectors import centred_cosine
from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch, split_by_budget
from gen_fast.model.choices import GROUP_BITS, QUANTIZED
from gen_fast.model.config import BackboneConfig
from gen_fast.model.device import matmul_peak
from gen_fast.model.linear import Fp8Weight, GroupWeight, Int8Weight
from gen_fast.model.lora import MATRICES
from gen_fast.model.token_budget import TokenBudget
from gen_fast.model.weights import backbone_from_tensors
from gen_fast.ops.pool import pool
from gen_fast.testing import with_layers

SPECIAL, COMPRESSION, BATCH = 20, 10, 32
# Profiles a function under a name, if profiles are asked for.
Profiled = Callable[[str, Callable[[], object]], None]

# Qwen3's published configs; "tiny" checks this script where there is no GPU.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
SHAPES = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936),
        "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936),
        "tiny": (64, 96, 2, 4, 2, 16, 500),
    }.items()
}


def make_models(shape: str, device: str) -> tuple[Backbone, torch.nn.Module]:
    """Random bf16 weights in transformers' model, and the same in ours."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(**SHAPES[shape], attn_implementation="sdpa", dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3Model(config).to(torch.bfloat16).eval()
    backbone = backbone_from_tensors(
        {**config.to_dict(), "model_type": "qwen3"},
        model.state_dict(),
        dtype=torch.bfloat16,
        device=device,
    )
    return backbone, model


def quantized(backbone: Backbone, kind: str) -> Backbone:
    """The same with the linears' weights in fewer bits; nothing is calibrated."""
    makers = {weight.kind: weight.of for weight in (Int8Weight, Fp8Weight)}
    makers |= {group: partial(GroupWeight.of, kind=group) for group in GROUP_BITS}
    layers = [
        replace(layer, **{name: makers[kind](getattr(layer, name)) for name in MATRICES})
        for layer in backbone.layers
    ]
    return with_layers(backbone, layers)


def workloads(shape: str, vocabulary: int) -> dict[str, list[np.ndarray]]:
    """Token ids of each workload's texts."""
    rng = np.random.default_rng(0)
    count = {"qwen3-0.6b": 2048, "qwen3-8b": 256, "tiny": 40}[shape]
    ragged = np.clip(rng.lognormal(np.log(128), 0.8, size=count), 16, 512).astype(int)
    short = rng.integers(20, 45, size=count)
    lengths = {"256 tokens": np.full(count, 256), "ragged 16-512": ragged, "short 20-44": short}
    return {
        name: [rng.integers(0, vocabulary, n) for n in chosen] for name, chosen in lengths.items()
    }


def ours(backbone: Backbone, special: torch.Tensor) -> Callable:
    """Packed batches to the token budget, longest texts first."""
    vocabulary = backbone.config.vocab_size
    appended = np.arange(vocabulary, vocabulary + SPECIAL)
    budget = TokenBudget(backbone)

    @torch.inference_mode()
    def run(texts: list[np.ndarray]) -> torch.Tensor:
        order = np.argsort([-len(t) for t in texts], kind="stable")
        sequences = [np.concatenate((texts[i], appended)) for i in order]
        parts = []
        for cut in split_by_budget([len(s) for s in sequences], budget.tokens):
            chosen = sequences[cut]
            needed = [COMPRESSION] * len(chosen)
            batch = PackedBatch.pack(chosen, needed=needed, device=backbone.device)
            hidden = backbone.forward(batch, special=special)
            config = backbone.config
            parts.append(
                pool(hidden, batch.needed.cu_seqlens, backbone.final_norm, config.norm_eps)
            )
        return torch.cat(parts)[np.argsort(order)].cpu()

    return run


def theirs(model: torch.nn.Module, special: torch.Tensor) -> Callable:
    """Length-sorted batches of 32, padded on the left."""
    table, device = model.get_input_embeddings(), special.device

    @torch.inference_mode()
    def run(texts: list[np.ndarray]) -> torch.Tensor:
        order = np.argsort([-len(t) for t in texts], kind="stable")
        parts = []
        for start in range(0, len(order), BATCH):
            chosen = [texts[i] for i in order[start : start + BATCH]]
            longest = max(map(len, chosen))
            ids = torch.from_numpy(np.stack([np.pad(t, (longest - len(t), 0)) for t in chosen]))
            lengths = torch.tensor([len(t) for t in chosen])
            mask = torch.arange(longest) >= (longest - lengths).unsqueeze(1)
            mask = torch.cat((mask, torch.ones(len(chosen), SPECIAL, dtype=torch.bool)), 1)
            mask = mask.long().to(device)
            rows = special.expand(len(chosen), -1, -1)
            states = model(
                inputs_embeds=torch.cat((table(ids.to(device)), rows), 1),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
            parts.append(states[:, -COMPRESSION:].float().mean(1))
        return torch.cat(parts)[np.argsort(order)].cpu()

    return run


def executed_flops(config: BackboneConfig, texts: int, tokens: int) -> float:
    """Of the products with weights, for `tokens` that include the texts' special tokens."""
    qkv = config.hidden_size * (config.q_size + 2 * config.kv_size)
    layer = config.non_embedding_parameters // config.num_layers
    every = (config.num_layers - 1) * layer + qkv
    return 2.0 * (every * tokens + (layer - qkv) * texts * COMPRESSION)


def layer_products(config: BackboneConfig, rows: int, device: str) -> dict[str, float]:
    """TFLOP/s of a layer's four products with `rows` tokens."""
    shapes = {
        "qkv": (config.q_size + 2 * config.kv_size, config.hidden_size),
        "out": (config.hidden_size, config.q_size),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }
    return product_tflops(shapes, rows, device)


def measure_shape(
    shape: str, rounds: int, device: str, profiled: Profiled, *, quantize: Sequence[str] = ()
) -> Iterator[dict]:
    """The rows of all sides, workload by workload."""
    backbone, model = make_models(shape, device)
    special = backbone.embedding[:SPECIAL].clone()
    runs = {"gen_fast": ours(backbone, special), "transformers": theirs(model, special)}
    for kind in quantize:
        runs[kind] = ours(quantized(backbone, kind), special)
    peaks: list[float] = []
    made = workloads(shape, backbone.config.vocab_size)
    products = layer_products(backbone.config, 256 if shape == "tiny" else 16384, device)
    for run in runs.values():  # compiled, and the most memory allocated
        run(max(made.values(), key=lambda texts: sum(map(len, texts))))
    for name, texts in made.items():
        few = texts[:BATCH]
        vectors = {provider: run(few).numpy() for provider, run in runs.items()}
        # Of gen_fast's own in bfloat16 to each of the others.
        cosines = {
            provider: float(centred_cosine(vectors["gen_fast"], other).mean())
            for provider, other in vectors.items()
        }
        cosines["gen_fast"] = cosines["transformers"]
        seconds = interleaved(
            {provider: partial(run, texts) for provider, run in runs.items()},
            rounds,
            lambda: peaks.append(matmul_peak(torch.bfloat16, device)),
        )
        peak = statistics.median(peaks)
        tokens = sum(map(len, texts)) + SPECIAL * len(texts)
        flops = executed_flops(backbone.config, len(texts), tokens)
        for provider, times in seconds.items():
            median = statistics.median(times)
            row = {
                "shape": shape,
                "workload": name,
                "provider": provider,
                "seconds": times,
                "tokens_per_second": tokens / median,
                "flops": flops,
                "mfu": flops / median / peak,
                "matmul_peak_tflops": peak / 1e12,
                "product_tflops": products,
                "gen_fast_speedup": median_ratio(times, seconds["gen_fast"]),
                "centred_cosine_between": cosines[provider],
                "texts": len(texts),
                "tokens": tokens,
            }
            print(
                f"{shape:<11} {name:<14} {provider:<13} {row['tokens_per_second']:10.0f} tok/s"
                f" MFU {row['mfu']:.2f} gen_fast is {row['gen_fast_speedup']:.2f}x"
                f" (cosine between them {row['centred_cosine_between']:.4f})",
                flush=True,
            )
            yield row
        # Last: to read a profile takes far longer than the rounds.
        profiled(f"encode {shape} {name}", lambda texts=texts: runs["gen_fast"](texts))


def run_shapes(measure: Callable[..., Iterator[dict]], about: str, *, quantizes: bool) -> None:
    """Read the command line, measure each shape and write the rows as they come.

    measure(shape, rounds, device, profiled): gives them; quantizes: takes quantize= too.
    """
    parser = arguments(about, rounds=3)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen3-0.6b", "qwen3-8b"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", type=float, default=0.0, help="seconds; needs --json")
    if quantizes:
        parser.add_argument("--quantize", nargs="+", choices=QUANTIZED, default=[])
    args = parser.parse_args()
    options = {"quantize": args.quantize} if quantizes else {}

    def profiled(name: str, run: Callable[[], object]) -> None:
        if args.profile and args.json:
            table = args.json.with_name(f"profile_{name.replace(' ', '_')}.txt")
            profile(run, args.profile, args.device, table)

    report = reported([])
    for shape in args.shape:
        for row in measure(shape, args.rounds, args.device, profiled, **options):
            report["rows"].append(row)
            if args.json:
                part = args.json.with_suffix(".part")
                part.write_text(json.dumps(report, indent=1) + "\n")
                part.replace(args.json)
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_shapes(measure_shape, __doc__, quantizes=True)
