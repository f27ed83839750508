"""Where the time of encoding goes, and what each op's fast version gives.

    python bench/shares.py [--workload documents] [--dtype bf16 fp32] [--rounds N] [--json FILE]

First each op's share of the time; then everything fast, against all but one. The variants take
turns within a round; a figure is the median over the rounds, of the share, or of the time without
the one over the time with all. SmolLM2-135M with mean pooling, on the CPU, one batch after another.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest import mock

import workloads
from measure import DTYPES, arguments, interleaved, median_ratio, reported, save

from gen_fast.embed import methods
from gen_fast.embed.loading import load
from gen_fast.model import backbone
from gen_fast.model.device import matmul_peak
from gen_fast.model.sources import resolve
from gen_fast.model.weights import load_backbone
from gen_fast.ops import native
from gen_fast.testing import instructions_up_to

# The name under which a module calls an op -> that module, and what would run without the op.
OPS = {
    "append": (backbone, "reference"),
    "add_rms_norm": (backbone, "reference"),
    "rope": (backbone, "reference"),
    "attention": (backbone, "sdpa"),
    "swiglu": (backbone, "reference"),
    "pool": (methods, "reference"),
}
# What a layer consists of, by the names under which the backbone calls it.
PARTS = ("linear", "attention", "add_rms_norm", "rope", "swiglu")


def without(name: str, run: Callable[[], object]) -> None:
    """Run with one op forced to its slow version."""
    module, impl = OPS[name]
    with mock.patch.object(module, name, partial(getattr(module, name), impl=impl)):
        run()


def without_tiles(run: Callable[[], object]) -> None:
    """Run with attention on AVX-512; the other C++ ops do without AMX anyway."""
    with instructions_up_to(native.Isa.AVX512):
        run()


def shares(run: Callable[[], object]) -> dict[str, float]:
    """Of a run's time, what passes in each of PARTS."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(name: str, op: Callable) -> Callable:
        def call(*args, **named):
            start = time.perf_counter()
            result = op(*args, **named)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    with ExitStack() as patches:
        for name in PARTS:
            op = timed(name, getattr(backbone, name))
            patches.enter_context(mock.patch.object(backbone, name, op))
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
    return {name: part / whole for name, part in seconds.items()}


def measure_dtype(dtype: str, workload: str, rounds: int) -> list[dict]:
    from transformers import AutoTokenizer

    source = resolve("smollm2-135m")
    work = workloads.make(workload, AutoTokenizer.from_pretrained(source), quick=True)
    options = {"dtype": DTYPES[dtype], "max_length": work.max_length, "device": "cpu", "streams": 1}
    packed = load(source, **options)
    plain = load(source, **options)
    plain.backbone = load_backbone(source, dtype=packed.backbone.dtype)

    def run(chosen):
        return chosen.encode(work.texts, prompt=work.prompt, show_progress_bar=False)

    variants = {"all": partial(run, packed), "packed weights": partial(run, plain)}
    variants |= {name: partial(without, name, partial(run, packed)) for name in OPS}
    if native.missing() is None and native.isa() == native.Isa.AMX:
        variants["AMX in attention"] = partial(without_tiles, partial(run, packed))
    for variant in variants.values():
        variant()
    parts = [shares(variants["all"]) for _ in range(rounds)]
    share = {name: statistics.median(one[name] for one in parts) for name in PARTS}
    print(dtype, "share of the time:", ", ".join(f"{n} {x:.1%}" for n, x in share.items()))
    peaks: list[float] = []
    seconds = interleaved(
        variants, rounds, lambda: peaks.append(matmul_peak(packed.backbone.dtype))
    )
    _, tokens = packed.count_tokens(work.texts, prompt=work.prompt)
    flops = 2 * packed.backbone.config.non_embedding_parameters * tokens
    rows = []
    for name, times in seconds.items():
        rows.append(
            {
                "dtype": dtype,
                "workload": workload,
                "without": name if name != "all" else "",
                "seconds": times,
                "slower": median_ratio(times, seconds["all"]),
                "mfu": flops / statistics.median(times) / statistics.median(peaks),
                "shares": share if name == "all" else None,
            }
        )
        print(
            f"{dtype} {'everything fast' if name == 'all' else 'without ' + name:<24}"
            f" {rows[-1]['slower']:.3f}x the time, MFU {rows[-1]['mfu']:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__, rounds=3, dtype=True)
    parser.add_argument("--workload", choices=["queries", "documents"], default="documents")
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        rows += measure_dtype(dtype, args.workload, args.rounds)
    save(args.json, reported(rows))


if __name__ == "__main__":
    main()
