"""Tokens a second of decoding with refilled rows against fixed batches, over the same answers.

    python bench/generation.py [--rounds N] [--questions N] [--batch-size N] [--max-new-tokens N]
                               [--lengths ...] [--device ...] [--dtype ...] [--json FILE]

Questions of a trivia game in the model's chat template, answered greedily. `mixed`: an answer ends
where the model ends it. `equal`: no token ends an answer, so all reach the limit and there is
nothing to refill until all are done. Fixed batches are cut from the questions sorted by length, and
each is done before the next begins. Both take turns.
"""

import argparse
import statistics

import numpy as np
import torch
from measure import arguments, interleaved, median_ratio, reported, save

from gen_fast.embed.loading import load_generator
from gen_fast.evaluate.corpora import trivia
from gen_fast.model.decoding import Decoder
from gen_fast.model.generation import end_token_ids
from gen_fast.model.sources import resolve
from gen_fast.model.weights import load_head

MODEL = "smollm2-135m"
LENGTHS = ("mixed", "equal")


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    writer = load_generator(args.model, device=args.device, dtype=args.dtype)
    backbone = writer._decoder.backbone
    source = resolve(args.model)
    entries = trivia()
    chosen = np.random.default_rng(0).choice(len(entries), args.questions, replace=False)
    questions = sorted((writer.chat_ids(entries[i].question) for i in chosen), key=len)
    head = load_head(source, backbone)
    ends = end_token_ids(source, writer._tokenizer.eos_token_id)
    rows = []
    for lengths in args.lengths:
        decoder = Decoder(backbone, head, ends if lengths == "mixed" else [])
        rows += compare(args, lengths, decoder, questions)
    save(args.json, reported(rows))


@torch.inference_mode()
def compare(
    args: argparse.Namespace, lengths: str, decoder: Decoder, questions: list[np.ndarray]
) -> list[dict]:
    """Rows of one kind of answers: seconds of both in every round."""
    size, limit = args.batch_size, args.max_new_tokens

    def refilled() -> list:
        return decoder.decode(questions, limit, batch_size=size)

    def fixed() -> list:
        starts = range(0, len(questions), size)
        return [x for i in starts for x in decoder.decode(questions[i : i + size], limit)]

    answers, others = refilled(), fixed()
    same = [a.tolist() == b.tolist() for (a, _), (b, _) in zip(answers, others, strict=True)]
    counts = [len(ids) for ids, _ in answers]
    seconds = interleaved({"refilled": refilled, "fixed": fixed}, args.rounds)
    rows = []
    for name, times in seconds.items():
        row = {
            "answers": lengths,
            "provider": name,
            "device": args.device,
            "dtype": args.dtype,
            "batch_size": size,
            "max_new_tokens": limit,
            "mean_length": statistics.mean(counts),
            "seconds": times,
            "tokens_per_second": sum(counts) / statistics.median(times),
            "against_fixed": median_ratio(seconds["fixed"], times),
            "same_texts": statistics.mean(same),
        }
        rows.append(row)
        print(
            f"{lengths} {name:<9} {row['tokens_per_second']:8.1f} tokens/s "
            f"{row['against_fixed']:.2f}x, {row['mean_length']:.1f} tokens an answer, "
            f"{row['same_texts']:.1%} the same texts",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
