"""Write text for LLM2Vec's unsupervised steps: `python examples/llm2vec/texts.py DIRECTORY`.

text.txt: the entries of the Free On-line Dictionary of Computing, one a line, for MNTP.
sentences.txt: their sentences, each once, for SimCSE. No local task is made of them.
"""

import re
import sys
from pathlib import Path

from gen_fast.evaluate.corpora import computing_texts

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
SHORTEST = 20  # characters


def main(folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = computing_texts()
    sentences = [part for text in texts for part in SENTENCE.split(text) if len(part) >= SHORTEST]
    for name, lines in (("text.txt", texts), ("sentences.txt", list(dict.fromkeys(sentences)))):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / name}: {len(lines):,} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
