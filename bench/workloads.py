"""The texts that encoding is measured on."""

from dataclasses import dataclass

import numpy as np

from gen_fast.evaluate.corpora import trivia

QUERY_PROMPT = (
    "Answer the following trivia question with one short and factually correct sentence: "
)
DOCUMENT_PROMPT = "Summarize the following passage: "
FEWSHOT_TOKENS = 1000


@dataclass(frozen=True)
class Workload:
    """Texts behind one prompt. max_length counts prompt, text and special tokens."""

    name: str
    prompt: str
    texts: list[str]
    max_length: int


def make(name: str, tokenizer, quick: bool) -> Workload:
    """queries, documents or fewshot; `quick` takes fewer texts of the same kind."""
    rng = np.random.default_rng(0)
    entries = trivia()
    questions = [e.question for e in entries]
    if name == "queries":
        chosen = rng.choice(len(questions), 240 if quick else 2000, replace=False)
        return Workload(name, QUERY_PROMPT, [questions[i] for i in chosen], 512)
    statements = [f"{e.question} {e.answers[0]}." for e in entries]
    if name == "documents":
        count = 64 if quick else 500
        lengths = np.clip(rng.lognormal(mean=np.log(128), sigma=0.8, size=count), 16, 512)
        return Workload(
            name,
            DOCUMENT_PROMPT,
            [_passage(statements, int(n), tokenizer, rng) for n in lengths],
            512 + 32,
        )
    if name == "fewshot":
        examples = _passage(
            [f"Question: {e.question}\nAnswer: {e.answers[0]}.\n" for e in entries],
            FEWSHOT_TOKENS,
            tokenizer,
            rng,
        )
        chosen = rng.choice(len(questions), 24 if quick else 300, replace=False)
        prompt = f"{examples}\nQuestion: "
        return Workload(name, prompt, [questions[i] for i in chosen], 2048)
    raise ValueError(f"no workload {name!r}")


def _passage(sentences: list[str], tokens: int, tokenizer, rng: np.random.Generator) -> str:
    """Random sentences cut to a length in tokens."""
    text = ""
    while len(ids := tokenizer(text).input_ids) < tokens:
        text += " " * bool(text) + " ".join(sentences[i] for i in rng.choice(len(sentences), 8))
    return tokenizer.decode(ids[:tokens])
