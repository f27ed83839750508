"""Peak resident memory of commands over inputs that ask for much.

    python bench/input_memory.py [--json FILE]

Each input is read by a `gen-fast` of its own, over a tiny model in float32 with one thread, and is
compared with a small input. All of them are rejected, refused or cut at the maximum length.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import arguments, reported, save

from gen_fast.testing import save_tiny_model

# A process of its own: the peak that a new process begins with is that of the one it came from.
WATCH = """
import os, sys
null = os.open(os.devnull, os.O_RDWR)
streams = [(os.POSIX_SPAWN_DUP2, null, number) for number in (1, 2)]
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=streams)
_, status, usage = os.wait4(process, 0)
print(usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status))
"""
GEN_FAST = str(Path(sys.executable).parent / "gen-fast")


def write_inputs(folder: Path) -> list[Path]:
    """The small input first."""
    small = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20))
    inputs: dict[str, Callable[[], str]] = {
        "small.jsonl": lambda: small,
        "line-of-150-MB.jsonl": lambda: json.dumps({"text": "a" * 150_000_000}) + "\n" + small,
        "line-of-150-MB.csv": lambda: f"id,text\na,{'a' * 150_000_000}\nb,text\n",
        "text-of-5-MB.jsonl": lambda: json.dumps({"text": "x" * 5_000_000}) + "\n",
        "chinese-text-of-5-MB.jsonl": lambda: (
            json.dumps({"text": "\u4ed6" * 1_700_000}, ensure_ascii=False) + "\n"
        ),
        "quote-that-is-never-closed.csv": lambda: (
            'id,text\na,"open\n' + "r,some text of a row\n" * 8_000_000
        ),
    }
    paths = []
    for name, content in inputs.items():
        path = folder / name
        path.write_text(content(), encoding="utf-8")
        paths.append(path)
    return [*paths, Path("/dev/zero")]


def peak(*command: str) -> tuple[float, int]:
    """Peak resident memory in MB, and exit code, of a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    watch = [sys.executable, "-c", WATCH, *command]
    done = subprocess.run(watch, env=environment, capture_output=True, text=True, check=True)
    megabytes, code = done.stdout.split()
    return float(megabytes), int(code)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model", "llama-tied")
        options = ["--model", str(folder / "model"), "--dtype", "float32", "--quiet"]
        for path in write_inputs(folder):
            job = str(folder / f"{path.name}-job")
            limit = ["--max-text-bytes", "10000000"]
            encode, encoded = peak(GEN_FAST, "encode", str(path), "--out", "-", *options)
            embed, embedded = peak(GEN_FAST, "embed", str(path), "--out", job, *options, *limit)
            rows.append(
                {
                    "input": str(path) if path.is_absolute() and folder not in path.parents
                    else path.name,
                    "encode_mb": encode,
                    "encode_exit_code": encoded,
                    "embed_mb": embed,
                    "embed_exit_code": embedded,
                }
            )  # fmt: skip
            print(
                f"{rows[-1]['input']}: encode {encode:.0f} MB (exit {encoded}), "
                f"embed {embed:.0f} MB (exit {embedded})"
            )
    save(args.json, reported(rows))


if __name__ == "__main__":
    main()
