"""How near embeddings of quantised weights are to those of plain ones, and which layers decide.

    python bench/quantized_quality.py [--texts 1000] [--dtype fp32 bf16] [--quantize int4 int8]
                                      [--layers 0] [--json FILE] [--speed FILE ... --plot FILE]

SmolLM2 with the shipped adapter and with method `mean`, against plain weights in float32, over
descriptions of Debian packages, definitions of WordNet and questions of a trivia set, a third each.
--layers N also quantises one layer at a time to int8 and leaves the others as they are, in float32,
over N of the texts. --plot draws the result beside the speeds that quantized.py has written in
--speed.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import plots
from measure import arguments, reported, save

from gen_fast.embed.loading import load
from gen_fast.evaluate.corpora import debian_packages, trivia, wordnet
from gen_fast.io.vectors import centred_cosine
from gen_fast.model.backbone import Backbone
from gen_fast.model.choices import QUANTIZED
from gen_fast.model.prefix import PrefixCache

MODEL = "smollm2-135m"
METHODS = {"adapter": None, "mean": "mean"}


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__, dtype=True)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--quantize", nargs="*", choices=QUANTIZED, default=["int4", "int8"])
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--speed", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    texts = real_texts(args.texts)
    rows = []
    for name, method in METHODS.items():
        options = {"method": method, "device": "cpu"}
        plain = load(MODEL, **options, dtype="fp32")
        truth = plain.encode(texts, show_progress_bar=False)
        for dtype, kind in itertools.product(args.dtype, (None, *args.quantize)):
            if (dtype, kind) == ("fp32", None):
                continue
            encoder = load(MODEL, **options, dtype=dtype, quantize=kind)
            vectors = encoder.encode(texts, show_progress_bar=False)
            rows.append(row(name, dtype, kind, "all", vectors, truth))
        if args.layers:
            few = real_texts(args.layers)
            truth = plain.encode(few, show_progress_bar=False)
            int8 = load(MODEL, **options, dtype="fp32", quantize="int8").backbone
            for number, backbone in enumerate(one_layer_each(plain.backbone, int8)):
                plain.backbone, plain.prefixes = backbone, PrefixCache(backbone)
                vectors = plain.encode(few, show_progress_bar=False)
                rows.append(row(name, "fp32", "int8", f"layer {number}", vectors, truth))
    report = reported(rows)
    if args.plot:
        speeds = [json.loads(file.read_text()) for file in args.speed]
        plots.quantized(report, speeds, args.plot)
    save(args.json, report)


def real_texts(count: int) -> list[str]:
    """The same ones every time."""
    rng = np.random.default_rng(0)
    sources = (
        [package.description for package in debian_packages()],
        [synset.definition for synset in wordnet()],
        [entry.question for entry in trivia()],
    )
    chosen = []
    for number, source in enumerate(sources):
        share = (count + number) // len(sources)
        chosen += [source[i] for i in rng.choice(len(source), share, replace=False)]
    return chosen


def one_layer_each(plain: Backbone, int8: Backbone) -> Iterator[Backbone]:
    """The plain backbone with its first layer in int8, then with its second one alone, …"""
    for i in range(len(plain.layers)):
        layers = (*plain.layers[:i], int8.layers[i], *plain.layers[i + 1 :])
        yield Backbone(plain.config, plain.embedding, layers, plain.final_norm, plain.fingerprint)


def row(
    method: str, dtype: str, kind: str | None, part: str, vectors: np.ndarray, truth: np.ndarray
) -> dict:
    """What is measured, also printed."""
    cosines = centred_cosine(vectors, truth)
    mean, least = float(cosines.mean()), float(cosines.min())
    fifth = float(np.quantile(cosines, 0.05))
    print(
        f"{method:<8} {dtype} {kind or 'plain':<16} {part:<10} {mean:.5f}, "
        f"5% below {fifth:.5f}, least {least:.5f}",
        flush=True,
    )
    return {
        "method": method,
        "dtype": dtype,
        "quantize": kind,
        "part": part,
        "texts": len(truth),
        "centred_cosine_mean": mean,
        "centred_cosine_5_percent": fifth,
        "centred_cosine_min": least,
    }


if __name__ == "__main__":
    main()
