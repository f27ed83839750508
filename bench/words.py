"""What token states tell of words: a linear probe of parts of speech, and of what is to come.

    python bench/words.py [ADAPTER …] [--count N] [--json FILE]

SmolLM2-135M, words of WordNet's example sentences, half of the word types held out; triples of
sentences that begin alike. Rows: the embedding table alone, the causal model, the model without its
causal mask and untrained, and each ADAPTER (LLM2Vec's). Probes of trained ones take the state
before a token, as MNTP trains it; for the others both are shown.
"""

import random

from measure import arguments, reported, save

import gen_fast
from gen_fast.evaluate.corpora import wordnet
from gen_fast.evaluate.words import (
    future_accuracy,
    probe,
    static_states,
    tagged_words,
    triples,
    word_states,
)


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__)
    parser.add_argument("adapter", nargs="*")
    parser.add_argument("--count", type=int, default=3000, help="words")
    args = parser.parse_args()
    synsets = wordnet()
    words = random.Random(0).sample(tagged_words(synsets), args.count)
    items = triples(synsets, 200)
    plain = gen_fast.load("smollm2-135m", method="mean", dtype="float32")
    rows = [{"states": "embedding table", "probe": probe(static_states(plain, words), words)}]
    _print(rows[-1])
    models = [("causal", plain, "causal"), ("without its mask", plain, "bidirectional")]
    models += [
        (name, gen_fast.load(name, dtype="float32"), "bidirectional") for name in args.adapter
    ]
    for name, encoder, mask in models:
        row = {"states": name, "future": future_accuracy(encoder, items, mask=mask)}
        for kind, shifted in (("probe", False), ("probe_before", True)):
            row[kind] = probe(word_states(encoder, words, mask=mask, shifted=shifted), words)
        rows.append(row)
        _print(row)
    save(args.json, reported(rows))


def _print(row: dict) -> None:
    figures = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "states")
    print(f"{row['states']:<20} {figures}", flush=True)


if __name__ == "__main__":
    main()
