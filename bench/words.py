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
from gen_fast.evaluate import words
from gen_fast.evaluate.corpora import wordnet


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__)
    parser.add_argument("adapter", nargs="*")
    parser.add_argument("--count", type=int, default=3000, help="words")
    args = parser.parse_args()
    synsets = wordnet()
    sample = random.Random(0).sample(words.tagged_words(synsets), args.count)
    items = words.triples(synsets, 200)
    plain = gen_fast.load("smollm2-135m", method="mean", dtype="float32")
    static = words.static_states(plain, sample)
    rows = [{"states": "embedding table", "probe": words.probe(static, sample)}]
    _print(rows[-1])
    models = [("causal", plain, "causal"), ("without its mask", plain, "bidirectional")]
    models += [
        (name, gen_fast.load(name, dtype="float32"), "bidirectional") for name in args.adapter
    ]
    for name, encoder, mask in models:
        row = {"states": name, "future": words.future_accuracy(encoder, items, mask=mask)}
        for kind, shifted in (("probe", False), ("probe_before", True)):
            states = words.word_states(encoder, sample, mask=mask, shifted=shifted)
            row[kind] = words.probe(states, sample)
        rows.append(row)
        _print(row)
    save(args.json, reported(rows))


def _print(row: dict) -> None:
    figures = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "states")
    print(f"{row['states']:<20} {figures}", flush=True)


if __name__ == "__main__":
    main()
