"""Encoding with quantised weights: speed, memory and quality against plain ones and other engines.

    python bench/quantized.py [--quick] [--rounds 5] [--json FILE] [--dtype fp32 bf16]
                              [--quantize int4 int8-weight-only int8] [--workload ...]
                              [--peer openvino llama.cpp-q8_0 ...]
                              [--isa avx2-vnni]

Method `mean` on SmolLM2, whose file is Q4_1; all run the prompt with every text. Providers take
turns within a round; ratios are medians over the rounds. "one text" encodes queries one by one.
The peers are engines of peers.py, and not among our extras: see there.
--isa makes the processor pass for an older one to our ops. Others are told by the environment:
ONEDNN_MAX_CPU_ISA=AVX2 (or AVX512_CORE_VNNI) ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
import math
import statistics
from collections.abc import Callable

import numpy as np
import peers
import workloads
from measure import DTYPES, arguments, interleaved, median_ratio, reported, save

from gen_fast.embed.loading import load
from gen_fast.io.vectors import centred_cosine
from gen_fast.model.choices import QUANTIZED
from gen_fast.model.device import matmul_peak
from gen_fast.model.lora import MATRICES, linear_sizes
from gen_fast.model.sources import resolve
from gen_fast.ops import native
from gen_fast.testing import instructions_up_to

MODEL = "smollm2-135m"
WORKLOADS = ("documents", "queries", "one text")
ISAS = {isa.name.lower().replace("_", "-"): isa for isa in native.Isa}
TRUTH_TEXTS = 32
MAX_LENGTH = 1024  # more than any text here has
# Texts that are encoded one after another.
ALONE = 40

Run = Callable[[list[str]], np.ndarray]


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__, rounds=5, dtype=True, quick="fewer texts")
    parser.add_argument("--quantize", nargs="*", choices=QUANTIZED, default=["int4", "int8"])
    parser.add_argument("--peer", nargs="*", choices=peers.ENGINES, default=[])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--isa", choices=ISAS, default=max(ISAS, key=ISAS.get))
    args = parser.parse_args()
    with instructions_up_to(ISAS[args.isa]):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """The workloads, as the arguments say."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
    rows = []
    for dtype in args.dtype:
        encoders = {
            kind or dtype: load(
                MODEL, method="mean", dtype=dtype, quantize=kind, max_length=MAX_LENGTH
            )
            for kind in (None, *args.quantize)
        }
        memory = _memory(encoders)
        print(f"{dtype}: " + ", ".join(f"{k} {v}" for k, v in memory.items()))
        runs = {kind: _encode(encoder) for kind, encoder in encoders.items()}
        whole = workloads.Workload("", "", [], MAX_LENGTH)  # texts come with their prompt
        for peer in args.peer:
            runs[peer] = peers.ENGINES[peer](MODEL, DTYPES[dtype], whole)
        for name in args.workload:
            work = workloads.make("queries" if name == "one text" else name, tokenizer, args.quick)
            texts = [work.prompt + text for text in work.texts]
            these = runs
            if name == "one text":
                texts = texts[:ALONE]
                these = {provider: _one_by_one(run) for provider, run in runs.items()}
            rows += _compare(name, dtype, these, texts, args.rounds, memory)
    save(args.json, reported(rows, instructions=native.instructions()))


def _compare(
    workload: str, dtype: str, runs: dict[str, Run], texts: list[str], rounds: int, memory: dict
) -> list[dict]:
    few = texts[:TRUTH_TEXTS]
    truth = runs[dtype](few)
    cosines = {name: centred_cosine(run(few), truth) for name, run in runs.items()}  # and warm-up
    seconds = interleaved({name: lambda run=run: run(texts) for name, run in runs.items()}, rounds)
    rows = []
    for name, times in seconds.items():
        rows.append(
            {
                "workload": workload,
                "dtype": dtype,
                "provider": name,
                "texts": len(texts),
                "seconds": times,
                "texts_per_second": len(texts) / statistics.median(times),
                f"speed_against_{dtype}": median_ratio(seconds[dtype], times),
                "our_speedups": {
                    kind: median_ratio(times, seconds[kind])
                    for kind in (dtype, *QUANTIZED)
                    if kind in seconds
                },
                "centred_cosine_mean": float(cosines[name].mean()),
                "centred_cosine_min": float(cosines[name].min()),
                "memory": memory,
                "matmul_peak_gflops": matmul_peak(DTYPES[dtype]) / 1e9,
            }
        )
        row = rows[-1]
        print(
            f"{workload:<10} {dtype} {name:<16} {row['texts_per_second']:8.1f} texts/s, "
            f"{row[f'speed_against_{dtype}']:.3f}x {dtype}, centred cosine "
            f"{row['centred_cosine_mean']:.5f} (least {row['centred_cosine_min']:.5f})",
            flush=True,
        )
    return rows


def _memory(encoders) -> dict[str, float]:
    """Megabytes of weights by kind: all, and the linears'; and these as shares of bfloat16's."""
    memory = {}
    for kind, encoder in encoders.items():
        layers = encoder.backbone.layers
        linears = sum(getattr(layer, matrix).nbytes for layer in layers for matrix in MATRICES)
        parameters = sum(
            math.prod(shape) for shape in linear_sizes(encoder.backbone.config).values()
        )
        memory[f"all_{kind}_mb"] = encoder.backbone.nbytes / 1e6
        memory[f"linears_{kind}_mb"] = linears / 1e6
        memory[f"linears_{kind}_to_bf16"] = linears / (2 * parameters)
    return memory


def _encode(encoder) -> Run:
    return lambda texts: encoder.encode(texts, show_progress_bar=False)


def _one_by_one(run: Run) -> Run:
    return lambda texts: np.concatenate([run([text]) for text in texts])


if __name__ == "__main__":
    main()
