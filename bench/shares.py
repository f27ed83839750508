"""What each op's fast version gives to encoding: everything fast, against all but one.

    python bench/shares.py [--workload documents] [--dtype bf16 fp32] [--rounds N] [--json FILE]

The variants take turns within a round; a figure is the median over the rounds of the time without
the one over the time with all. SmolLM2-135M with mean pooling, on the CPU.
"""

import statistics
from collections.abc import Callable
from functools import partial

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


def without(name: str, run: Callable[[], object]) -> None:
    """Run with one op forced to its slow version."""
    module, impl = OPS[name]
    op = getattr(module, name)
    setattr(module, name, partial(op, impl=impl))
    try:
        run()
    finally:
        setattr(module, name, op)


def without_tiles(run: Callable[[], object]) -> None:
    """Run with attention on AVX-512; the other C++ ops do without AMX anyway."""
    with instructions_up_to(native.Isa.AVX512):
        run()


def measure_dtype(dtype: str, workload: str, rounds: int) -> list[dict]:
    from transformers import AutoTokenizer

    source = resolve("smollm2-135m")
    work = workloads.make(workload, AutoTokenizer.from_pretrained(source), quick=True)
    options = {"dtype": DTYPES[dtype], "max_length": work.max_length, "device": "cpu"}
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
