"""Split a model's own answers: `python answers.py ANSWERS.jsonl FOLDER`.

own.txt: answers to train on, one a line. chat.jsonl: rows of query and answer that are held out, to
measure on them what training has changed of how the model answers.
"""

import json
import random
import sys
from pathlib import Path

HELD_OUT = 300
SHORTEST = 21  # characters


def main(answers: Path, folder: Path) -> None:
    """Write both files."""
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    own = [" ".join(row["answer"].split()) for row in rows[HELD_OUT:]]
    own = [text for text in own if len(text) >= SHORTEST]
    (folder / "own.txt").write_text("\n".join(own) + "\n", encoding="utf-8")
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as file:
        for row in rows[:HELD_OUT]:
            kept = {name: row[name] for name in ("id", "query", "answer")}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    print(f"{len(own):,} answers to train on, {min(HELD_OUT, len(rows))} held out")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
