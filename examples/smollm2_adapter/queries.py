"""Writes what the shipped SmolLM2 adapter is trained on: `python queries.py FOLDER`.

queries.jsonl: questions about words and meanings of WordNet 3.0, whose licence allows any use, to
be answered by the model. repeats.jsonl: rows that ask to repeat an entry, already answered by it. A
tenth of the synsets is for evaluation only (`Synset.held_out`).
"""

import json
import random
import sys
from pathlib import Path

from gen_fast.evaluate.corpora import Synset, wordnet

SEED = 0
WORD_QUESTIONS, NAME_QUESTIONS, SUMMARIES, REPEATS = 8000, 4000, 2000, 5000
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


def query(number: int, synset: Synset, rng: random.Random) -> str:
    """The `number`-th question, about `synset`."""
    if number < WORD_QUESTIONS:
        return rng.choice(ABOUT_A_WORD).format(word=rng.choice(synset.words))
    if number < WORD_QUESTIONS + NAME_QUESTIONS:
        return rng.choice(ABOUT_A_MEANING).format(definition=synset.definition)
    passage = f"{', '.join(synset.words)}: {'; '.join((synset.definition, *synset.examples))}"
    return rng.choice(SUMMARISE).format(passage=passage)


def entry(number: int, synset: Synset) -> str:
    """The words of a synset, its definition, or both."""
    words = ", ".join(synset.words)
    return (words, synset.definition, f"{words}: {synset.definition}")[number % 3]


def main() -> None:
    """Draw synsets; write a question about each, and repetitions of others."""
    folder, rng = Path(sys.argv[1]), random.Random(SEED)
    synsets = [synset for synset in wordnet() if not synset.held_out]
    rng.shuffle(synsets)
    asked = WORD_QUESTIONS + NAME_QUESTIONS + SUMMARIES
    queries = [
        {"id": synset.id, "text": query(i, synset, rng)} for i, synset in enumerate(synsets[:asked])
    ]
    repeats = []
    for i, synset in enumerate(synsets[asked : asked + REPEATS]):
        text = entry(i, synset)
        repeats.append(
            {
                "id": f"repeat-{synset.id}",
                "query": f"Repeat this text word by word. {text}",
                "answer": text,
            }
        )
    for name, rows in (("queries", queries), ("repeats", repeats)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
