"""How long a new process takes to its first vector, and a long text to its first tokens.

    python bench/startup.py [--rounds N] [--json FILE]

start: `gen_fast.load(...)` and one text, in a new process with a warm cache, against a process that
imports torch and copies the model's tensors out of its files, taking turns. truncation: 1 MB of
text against the part of it that its first 512 tokens spell, in one process, taking turns. identity:
what says which model this is, with its files off the page cache and never seen, against the same
when they are known, and against a sha256 of the files' bytes.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from measure import arguments, reported, save

from gen_fast.embed.loading import load
from gen_fast.io.durable import file_sha256
from gen_fast.model.device import resolve_dtype
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import TextTokenizer, load_tokenizer
from gen_fast.model.weights import read_fingerprint

MODEL = "smollm2-135m"
FIRST_VECTOR = f"import gen_fast; gen_fast.load({MODEL!r}).encode('one text')"
# What no program that computes with this model in torch can do without.
LEAST = """
import sys, torch
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as file:
    dtype = getattr(torch, sys.argv[2])
    kept = [file.get_tensor(name).to(dtype, copy=True) for name in file.keys()]
"""
SAMPLES = {
    "English": "The cat sat on the mat, and then it went away again. ",
    "Chinese": "\u4ed6\u4eec\u5728\u5317\u4eac\uff0c\u6211\u4eec\u5728\u4e1c\u4eac\u3002",
    "code": "for (int i = 0; i < count; ++i) { total += values[i]; }\n",
}
TOKENS = 512


def seconds(*command: str) -> float:
    """Wall-clock seconds of a new process."""
    return timed(lambda: subprocess.run([sys.executable, "-c", *command], check=True))


def start(rounds: int) -> dict:
    """The first vector against import and reading."""
    directory = resolve(MODEL)
    dtype = str(resolve_dtype("auto", load(MODEL).device)).removeprefix("torch.")
    least = (LEAST, str(directory / "model.safetensors"), dtype)
    seconds(FIRST_VECTOR), seconds(*least)  # what the first run compiles and brings into memory
    pairs = [(seconds(FIRST_VECTOR), seconds(*least)) for _ in range(rounds)]
    return {
        "case": "start",
        "seconds": statistics.median(first for first, _ in pairs),
        "least_seconds": statistics.median(least for _, least in pairs),
        "ratio": statistics.median(first / least for first, least in pairs),
    }


def truncation(name: str, sample: str, rounds: int) -> dict:
    """A megabyte against the characters that its first tokens spell."""
    tokenizer = load_tokenizer(resolve(MODEL))
    text = sample * (1_000_000 // len(sample.encode()))
    encoding = tokenizer.core.encode(text[:20_000], add_special_tokens=False)
    head = text[: encoding.offsets[TOKENS - 1][1]]
    texts = TextTokenizer(tokenizer, "", TOKENS)
    texts([text])  # what is found out once a tokenizer
    pairs = []
    for _ in range(10 * rounds):
        times = []
        for given in (text, head):
            begin = time.perf_counter()
            (ids,), _ = texts([given])
            times.append(time.perf_counter() - begin)
            assert ids.tolist() == encoding.ids[:TOKENS]
        pairs.append(times)
    return {
        "case": f"truncation, {name}",
        "seconds": statistics.median(whole for whole, _ in pairs),
        "least_seconds": statistics.median(least for _, least in pairs),
        "ratio": statistics.median(whole / least for whole, least in pairs),
    }


def identity(rounds: int) -> list[dict]:
    """The fingerprint of a model that was never seen, and of one that was."""
    directory = resolve(MODEL)
    files = sorted(directory.glob("*.safetensors"))
    unseen, known, hashed = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, GEN_FAST_CACHE=cache):
            off_the_page_cache(files)
            unseen.append(timed(lambda: read_fingerprint(directory)))
            known.append(timed(lambda: read_fingerprint(directory)))
        off_the_page_cache(files)
        hashed.append(timed(lambda: [file_sha256(file) for file in files]))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return [
        {
            "case": f"identity, {megabytes:.0f} MB {name}",
            "seconds": statistics.median(times),
            "least_seconds": statistics.median(hashed),
            "ratio": statistics.median(a / b for a, b in zip(times, hashed, strict=True)),
        }
        for name, times in (("never seen", unseen), ("known", known))
    ]


def timed(run: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def off_the_page_cache(files: Sequence[Path]) -> None:
    """Have files read from the disk the next time."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=5)
    args = parser.parse_args()
    rows = [truncation(name, sample, args.rounds) for name, sample in SAMPLES.items()]
    rows += [start(args.rounds), *identity(args.rounds)]
    for row in rows:
        print(
            f"{row['case']}: {row['seconds']:.4f} s, at least {row['least_seconds']:.4f} s, "
            f"{row['ratio']:.2f}x"
        )
    save(args.json, reported(rows))


if __name__ == "__main__":
    main()
