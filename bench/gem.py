"""What a GEM model keeps and what its special tokens hold, on texts that it was not trained on.

    python bench/gem.py kept MODEL [--base MODEL] [--chat ANSWERS.jsonl] [--text TEXTS] [--tokens N]
        [--generations N] [--json FILE]
    python bench/gem.py read MODEL --text TEXTS [--count N] [--lengths 8 16 32 64 128] [--json FILE]

base: what MODEL was trained from; an adapter says it itself.
kept: mean KL(base‖model) a token and the perplexity of both, without special tokens, over the first
N tokens of chat answers (rows of query and answer; the answers alone are scored) and of plain texts
(pieces of 512 tokens); and greedy answers of both to the first queries, unedited.
read: texts cut to so many tokens are embedded and read back greedily from the special tokens' keys
and values. Recall is the share of a text's tokens that the reading has, as often as the text has
them; in order, the share until the first that differs. By chance: the recall of the next text's
reading. Where the tokenizer puts no token before a text, the reading is given the text's first
token, which is not counted.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from measure import arguments, reported, save

import gen_fast
from gen_fast.embed.loading import locate_generator
from gen_fast.evaluate.language import (
    LanguageModel,
    ScoredText,
    answer_texts,
    drift,
    running_texts,
)
from gen_fast.io.text_files import read_texts
from gen_fast.model.device import resolve_dtype
from gen_fast.model.generation import AnswerGenerator
from gen_fast.model.sampling import GREEDY
from gen_fast.model.tokenizing import TextTokenizer, load_tokenizer, special_tokens_around
from gen_fast.model.weights import load_backbone, load_head

PIECE = 512  # tokens of plain text that are read at once


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("kept", "read"))
    parser.add_argument("model", help="what gen-fast train --method gem left")
    parser.add_argument("--base", help="what a model of weights was trained from")
    parser.add_argument("--chat", help="jsonl rows of query and answer")
    parser.add_argument("--text", help="txt, jsonl, csv or parquet")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--generations", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--count", type=int, default=100, help="texts that are read back, in all")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    if not (args.text or (args.what == "kept" and args.chat)):
        parser.error("give --text FILE, or for kept --chat FILE")
    if args.what == "kept" and not (args.base or locate_generator(args.model).adapters):
        parser.error("a model of weights does not say its base: give --base MODEL")
    rows = measure_kept(args) if args.what == "kept" else measure_read(args)
    save(args.json, reported(rows))


def measure_kept(args: argparse.Namespace) -> list[dict]:
    """Rows of drift, then rows of answers."""
    files = locate_generator(args.model)
    below = replace(files, adapters=files.adapters[:-1])
    base = locate_generator(args.base) if args.base else below
    tokenizer = load_tokenizer(files.tokenizer)
    device = torch.device(args.device)
    sides = []
    for side in (base, files):
        backbone = load_backbone(
            side.source,
            dtype=resolve_dtype(args.dtype, device),
            device=device,
            packed=True,
            adapters=side.adapters,
        )
        sides.append(LanguageModel(backbone, load_head(side.source, backbone)))
    writers = [
        AnswerGenerator(
            side.backbone,
            files.source,
            tokenizer,
            max_new_tokens=args.max_new_tokens,
            sampling=GREEDY,
        )
        for side in sides
    ]
    rows = []
    chat = read_chat(args.chat)
    if chat:
        pairs = (
            (writers[0].chat_ids(query), tokenizer.ids(answer, add_special_tokens=False))
            for query, answer in chat
        )
        rows.append(compare("chat answers", args.chat, sides, answer_texts(pairs, args.tokens)))
    if args.text:
        ids, _ = TextTokenizer(tokenizer, "", 1 << 20)(read_texts(args.text).texts)
        texts = running_texts(ids, PIECE, args.tokens)
        rows.append(compare("plain text", args.text, sides, texts))
    queries = [query for query, _ in chat[: args.generations]]
    for query, *answers in zip(queries, *(w.answers(queries) for w in writers), strict=True):
        before, after = (answer.text for answer in answers)
        rows.append({"query": query, "base": before, "gem": after})
        print(f"\nquery: {query}\nbase:  {before}\ngem:   {after}", flush=True)
    return rows


def read_chat(path: str | None) -> list[tuple[str, str]]:
    """Queries and answers of a jsonl file."""
    if path is None:
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [(row["query"], row["answer"]) for row in rows if row["answer"].strip()]


def compare(
    name: str, source: str, sides: Sequence[LanguageModel], texts: list[ScoredText]
) -> dict:
    """One row of drift."""
    moved = drift(*sides, texts)
    before, after = moved.perplexities
    row = {"text": name, "source": source, "texts": len(texts), **asdict(moved)}
    row |= {"base_perplexity": before, "gem_perplexity": after}
    row["dtype"] = str(sides[0].backbone.dtype)
    print(
        f"{name:<13} {moved.tokens} tokens: KL {moved.kl:.4f} nats, perplexity {before:.3f} -> "
        f"{after:.3f}, the same likeliest token {moved.agreement:.1%}",
        flush=True,
    )
    return row


def measure_read(args: argparse.Namespace) -> list[dict]:
    """A row a length, with the best and the worst readings."""
    encoder = gen_fast.load(args.model, device=args.device, dtype=args.dtype)
    reader, tokenizer = gen_fast.Reader(encoder), encoder._tokenizer
    begins = bool(len(special_tokens_around(tokenizer.core)[0]))
    each = max(2, args.count // len(args.lengths))

    def ids_of(text: str) -> list[int]:
        return list(tokenizer.core.encode(text, add_special_tokens=False).ids)

    source = [ids_of(text.strip()) for text in read_texts(args.text).texts]
    rows = []
    for length in args.lengths:
        texts = [tokenizer.decode(ids[:length]) for ids in source if len(ids) >= length][:each]
        if not texts:
            continue
        starts = None if begins else [tokenizer.decode(ids_of(text)[:1]) for text in texts]
        answers = reader.read_texts(texts, max_new_tokens=length, starts=starts)
        skipped = 0 if begins else 1
        truths = [ids_of(text)[skipped:] for text in texts]
        found = [ids_of(answer.text)[skipped:] for answer in answers]
        recalls = [recall(*pair) for pair in zip(truths, found, strict=True)]
        ordered = [in_order(*pair) for pair in zip(truths, found, strict=True)]
        chance = [recall(*pair) for pair in zip(truths, found[1:] + found[:1], strict=True)]
        order = np.argsort(recalls, kind="stable")[::-1]
        examples = [
            {"recall": recalls[i], "text": texts[i], "read": answers[i].text}
            for i in dict.fromkeys([*order[:3], *order[-3:]])
        ]
        row = {"length": length, "texts": len(texts), "recall": float(np.mean(recalls))}
        row |= {"in_order": float(np.mean(ordered)), "chance": float(np.mean(chance))}
        rows.append({**row, "examples": examples})
        print(
            f"{length:4} tokens, {len(texts)} texts: recall {row['recall']:.3f}, in order "
            f"{row['in_order']:.3f}, by chance {row['chance']:.3f}",
            flush=True,
        )
        for example in examples:
            print(f"  {example['recall']:.2f} | {example['text']!r}\n       | {example['read']!r}")
    return rows


def recall(truth: Sequence[int], found: Sequence[int]) -> float:
    """Share of the tokens of a text that its reading has."""
    return (Counter(truth) & Counter(found)).total() / max(1, len(truth))


def in_order(truth: Sequence[int], found: Sequence[int]) -> float:
    """Share of the tokens of a text up to the first that its reading has otherwise."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(truth, found, strict=False))
    return len(list(same)) / max(1, len(truth))


if __name__ == "__main__":
    main()
