"""`gen-fast demo`: a few thousand real texts embedded by a real LLM, and searched."""

import sys
import time

import numpy as np
import torch

from gen_fast.embed.choices import DEFAULT_MODEL
from gen_fast.embed.encoder import Encoder
from gen_fast.embed.loading import load
from gen_fast.embed.reading import Reader
from gen_fast.evaluate.corpora import trivia
from gen_fast.model.device import matmul_peak
from gen_fast.search.exact import nearest

TOPICS = ("elements", "greekmyth", "worldcapitals")
QUERIES = (
    "In which country is Budapest?",
    "chemical symbol for gold",
    "the king of the gods",
    "Who flew too close to the sun?",
    "largest city of Australia",
)


def run() -> None:
    """Embed the trivia corpus, answer a few questions from it, and say how fast that was."""
    write = sys.stdout.write
    entries = [entry for entry in trivia() if entry.topic in TOPICS]
    texts = [f"{entry.question} {entry.answers[0]}" for entry in entries]
    write(f"Loading {DEFAULT_MODEL} (the first time it is converted, about ten seconds) …\n")
    sys.stdout.flush()
    encoder = load(DEFAULT_MODEL)
    write(
        f"Embedding {len(texts):,} trivia questions with its adapter on {encoder.device} in "
        f"{str(encoder.backbone.dtype).removeprefix('torch.')} …\n"
    )
    sys.stdout.flush()
    start = time.perf_counter()
    corpus = np.asarray(encoder.encode_document(texts))
    seconds = time.perf_counter() - start
    queries = np.asarray(encoder.encode_query(QUERIES))
    reader = Reader(encoder)
    readings = reader.read(reader.soft_prompts(QUERIES, encoder.prompts["query"]), 24)

    results = zip(QUERIES, readings, *nearest(corpus, queries, 3), strict=True)
    for query, reading, scores, rows in results:
        write(f"\n{query}\n  its embedding reads: {' '.join(reading.text.split())} …\n")
        for score, row in zip(scores, rows, strict=True):
            write(f"  {score:.3f}  {texts[row]}\n")
    write("\n" + speed(encoder, texts, seconds) + "\n")


def speed(encoder: Encoder, texts: list[str], seconds: float) -> str:
    """Texts and tokens a second, and the share of the device's matmul peak."""
    total, computed = encoder.count_tokens(texts, prompt_name="document")
    flops = 2 * encoder.backbone.config.non_embedding_parameters * computed / seconds
    peak = matmul_peak(encoder.backbone.dtype, encoder.device)
    return (
        f"{len(texts):,} texts in {seconds:.1f} s: {len(texts) / seconds:.0f} texts/s, "
        f"{total / seconds:,.0f} tokens/s, {flops / peak:.0%} of the matmul peak of "
        f"{peak / 1e9:,.0f} GFLOP/s ({torch.get_num_threads()} threads)"
    )
