"""How long a new process takes to its first vector, and a long text to its first tokens.

    python bench/startup.py [--rounds N] [--json FILE]

start: `gen_fast.load(...)` and one text, in a new process with a warm cache, against a process that
imports torch and copies the model's tensors out of its files, taking turns. truncation: 1 MB of
text against the part of it that its first 512 tokens spell, in one process, taking turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import machine

from gen_fast.embed.loading import load
from gen_fast.model.device import resolve_dtype
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import TextTokenizer, load_tokenizer

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
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", *command], check=True)
    return time.perf_counter() - start


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [truncation(name, sample, args.rounds) for name, sample in SAMPLES.items()]
    rows.append(start(args.rounds))
    for row in rows:
        print(
            f"{row['case']}: {row['seconds']:.4f} s, at least {row['least_seconds']:.4f} s, "
            f"{row['ratio']:.2f}x"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
