"""Corpus jobs: what they cost beside Encoder.encode, and one from WordNet to search.

    python bench/jobs.py overhead [--count N] [--rounds N] [--json FILE]
    python bench/jobs.py wordnet --out DIR [--count N] [--json FILE]

overhead: a job over a jsonl file (planned, read, written, published) against one call of encode
with the same texts in memory and the same loaded model, interleaved. wordnet: definitions are
embedded by the shipped adapter, indexed as each kind, and searched with words. Interrupted, it
goes on.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import arguments, interleaved, machine, median_ratio, save

import gen_fast
from gen_fast.evaluate.corpora import wordnet
from gen_fast.io.durable import replacing
from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan, prepare
from gen_fast.jobs.settings import Settings
from gen_fast.jobs.verify import verify
from gen_fast.jobs.worker import LOG, Worker
from gen_fast.search.build import build_index
from gen_fast.search.choices import KINDS
from gen_fast.search.corpus import open_index

MODEL = "smollm2-135m"


def main() -> None:
    """Measure and print; write JSON if asked."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("what", choices=("overhead", "wordnet"))
    parser.add_argument("--count", type=int, help="texts  [default: 1,000 or 60,000]")
    parser.add_argument("--out", type=Path, help="directory of the job")
    args = parser.parse_args()
    if args.what == "wordnet" and args.out is None:
        parser.error("wordnet needs --out")
    figures = _overhead(args) if args.what == "overhead" else _wordnet(args)
    for name, value in figures.items():
        print(f"{name}: {value}")
    save(args.json, {"machine": machine(), "command": " ".join(sys.argv), **figures})


def _write_definitions(path: Path, count: int) -> list[str]:
    """Every n-th synset, so that all parts of speech are there: id, words, definition."""
    synsets = wordnet()
    chosen = [synsets[i * len(synsets) // count] for i in range(count)]
    with replacing(path) as temporary, temporary.open("w") as file:
        for synset in chosen:
            row = {"id": synset.id, "words": ", ".join(synset.words), "text": synset.definition}
            file.write(json.dumps(row) + "\n")
    return [synset.definition for synset in chosen]


def _overhead(args: argparse.Namespace) -> dict[str, Any]:
    encoder = gen_fast.load(MODEL, device="cpu")
    settings = Settings(
        model=MODEL,
        prompt_name="document",
        id_column="id",
        text_column="text",
        rows_per_part=256,  # several parts, so that the stages overlap as in a long job
    ).resolved("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.jsonl"
        texts = _write_definitions(corpus, args.count or 1000)

        def job() -> None:
            folder = Path(scratch) / "job"
            folder.mkdir()
            plan = prepare(folder, [corpus], settings)
            Worker(folder, plan, encoder).run()
            PartStore(folder, plan).publish()
            shutil.rmtree(folder)

        def encode() -> None:
            # In blocks of a part, as a job does: what is compared is the job, not the sorting.
            for start in range(0, len(texts), settings.rows_per_part):
                block = texts[start : start + settings.rows_per_part]
                encoder.encode(block, prompt=settings.prompt, show_progress_bar=False)

        def encode_at_once() -> None:
            encoder.encode(texts, prompt=settings.prompt, show_progress_bar=False)

        seconds = interleaved(
            {"job": job, "encode": encode, "encode at once": encode_at_once}, args.rounds
        )
    return {
        "texts": len(texts),
        "rows_per_part": settings.rows_per_part,
        "seconds": seconds,
        "texts_per_second": round(len(texts) / statistics.median(seconds["job"]), 1),
        "overhead": round(median_ratio(seconds["job"], seconds["encode"]) - 1, 4),
        "overhead_at_once": round(median_ratio(seconds["job"], seconds["encode at once"]) - 1, 4),
    }


def _wordnet(args: argparse.Namespace) -> dict[str, Any]:
    args.out.mkdir(parents=True, exist_ok=True)
    corpus, folder = args.out / "wordnet.jsonl", args.out / "job"
    count = args.count or 60_000
    if not corpus.exists():
        _write_definitions(corpus, count)
    summary = embed_corpus(
        corpus, folder, model=MODEL, id_column="id", text_column="text", prompt_name="document"
    )
    assert summary is not None
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    seconds = sum(line["seconds"] for line in log)
    figures: dict[str, Any] = {
        "texts": summary.rows,
        "rejected": summary.rejected,
        "embed_seconds": round(seconds, 1),
        "texts_per_second": round(summary.rows / seconds, 1),
        "problems": verify(folder),
        "part_megabytes": round(sum(p.stat().st_size for p in folder.glob("part-*")) / 1e6, 1),
        "indexes": [],
    }
    plan = Plan.load(folder)
    print(f"{summary.rows} texts, {plan.settings.dtype}", flush=True)
    for kind in KINDS:
        path = args.out / f"{kind}.faiss"
        start = time.perf_counter()
        info = build_index(folder, path, kind=kind)
        built = time.perf_counter() - start
        opened = open_index(path, device="cpu")
        vectors = PartStore(folder, plan).embeddings(plan.parts[0])[:100]
        start = time.perf_counter()
        opened.nearest(vectors, 10)
        row = {
            "kind": kind,
            "recall@10": info.recall,
            "probes": info.probes,
            "build_seconds_with_recall": round(built, 1),
            "milliseconds_a_query": round((time.perf_counter() - start) * 10, 2),
            "megabytes": round(sum(p.stat().st_size for p in _files(path)) / 1e6, 1),
        }
        figures["indexes"].append(row)
        print(row, flush=True)
    query = "a large meat-eating animal of the arctic with white fur"
    hits = open_index(args.out / "flat.faiss", device="cpu").search(query, k=3)[0]
    figures["example"] = {"query": query, "hits": [(h.id, round(h.score, 3), h.text) for h in hits]}
    return figures


def _files(path: Path) -> list[Path]:
    """What an index needs to be searched."""
    return [path, *path.parent.glob(f"{path.name}.*.lists")]


if __name__ == "__main__":
    main()
