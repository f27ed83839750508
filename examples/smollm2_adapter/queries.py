"""Writes the queries that the shipped SmolLM2 adapter was trained on: `python queries.py OUT.jsonl`.

Questions about words and meanings of WordNet 3.0, whose licence allows any use. A tenth of the
synsets, chosen by a hash of their ids, is held out for evaluation (bench/retrieval.py).
"""

import hashlib
import json
import random
import sys
from pathlib import Path

from gen_fast.corpora import Synset, wordnet

SEED = 0
WORD_QUESTIONS, NAME_QUESTIONS, SUMMARIES = 8000, 4000, 2000
ABOUT_A_WORD = (
    "What does {word} mean?",
    "What is {word}?",
    "Define {word}.",
    "Explain the meaning of {word} in a sentence.",
    "Generate a passage that best answers this question: What does {word} mean?",
    "Generate a passage that best answers this question: What is {word}?",
)
ABOUT_A_MEANING = (
    "What do you call {definition}?",
    "Which word means: {definition}?",
    "Name this: {definition}.",
    "Generate a passage that best answers this question: What is {definition} called?",
)
SUMMARISE = ("Summarize the following passage: {passage}",)


def held_out(synset: Synset) -> bool:
    """Whether a synset is for evaluation only."""
    return hashlib.sha256(synset.id.encode()).digest()[0] % 10 == 0


def main() -> None:
    """Draw synsets, write a question about each."""
    rng = random.Random(SEED)
    synsets = [synset for synset in wordnet() if not held_out(synset)]
    rng.shuffle(synsets)
    rows = []
    for i, synset in enumerate(synsets[: WORD_QUESTIONS + NAME_QUESTIONS + SUMMARIES]):
        if i < WORD_QUESTIONS:
            text = rng.choice(ABOUT_A_WORD).format(word=rng.choice(synset.words))
        elif i < WORD_QUESTIONS + NAME_QUESTIONS:
            text = rng.choice(ABOUT_A_MEANING).format(definition=synset.definition)
        else:
            passage = f"{', '.join(synset.words)}: {'; '.join((synset.definition, *synset.examples))}"
            text = rng.choice(SUMMARISE).format(passage=passage)
        rows.append({"id": synset.id, "text": text})
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
