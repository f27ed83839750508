"""Token states in context: what a linear probe tells of a word, and whether a prefix knows its end.

The two probes of LLM2Vec (arXiv 2404.05961, §3 and §5.1) on text from WordNet: example sentences,
in each of which a word of the synset stands, tagged with its part of speech; and triples of
sentences that begin alike.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_fast.embed.encoder import Encoder
from gen_fast.evaluate.corpora import Synset
from gen_fast.model.batch import PackedBatch, split_by_budget
from gen_fast.ops.norm import rms_norm

# What comes before the word that decides the meaning, in triples.
PREFIXES = (
    "What she showed us at the end was the",
    "After a long search they finally came upon a",
    "Nobody in the room had ever thought of the",
    "The first thing that the old man described was a",
)


@dataclass(frozen=True)
class TaggedWord:
    """A word in a sentence: characters start … end - 1 of `text`, and its tag."""

    text: str
    start: int
    end: int
    tag: str

    @property
    def word_type(self) -> str:
        """The word itself."""
        return self.text[self.start : self.end].lower()

    @property
    def held_out(self) -> bool:
        """Whether a probe is tested on it: half of all word types, by a hash."""
        return hashlib.sha256(self.word_type.encode()).digest()[0] % 2 == 0


def tagged_words(synsets: Sequence[Synset]) -> list[TaggedWord]:
    """Words of synsets in their example sentences, tagged "n", "v", "a" or "r", each once."""
    words = {}
    for synset in synsets:
        tag = synset.id[0].replace("s", "a")  # adjectives have satellites
        for text in synset.examples:
            for word in synset.words:
                found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
                if found:
                    tagged = TaggedWord(text, found.start(), found.end(), tag)
                    words[text, found.start()] = tagged
    return list(words.values())


def word_states(
    encoder: Encoder, words: Sequence[TaggedWord], *, mask: str, shifted: bool
) -> np.ndarray:
    """Final states [n, h] of words, float32: the mean over the tokens of each.

    mask: of attention. shifted: each token's state is that of the token before it, where a model
    that predicts tokens tells of them. A first token has one before it: where the tokenizer puts
    nothing before a text, its BOS token is put there. Raises ValueError if it has none.
    """
    rows = np.empty((len(words), encoder.backbone.config.hidden_size), dtype=np.float32)
    texts = [_tokens(encoder, word) for word in words]
    for part, states in _states(encoder, [text.ids for text in texts], mask):
        for i, own in zip(range(part.start, part.stop), states, strict=True):
            places = texts[i].places - int(shifted)
            rows[i] = own[torch.from_numpy(places)].float().mean(0).cpu().numpy()
    return rows


def static_states(encoder: Encoder, words: Sequence[TaggedWord]) -> np.ndarray:
    """The control without context: means [n, h] of the embedding rows of a word's tokens."""
    table = encoder.backbone.embedding
    rows = []
    for word in words:
        tokens = _tokens(encoder, word)
        ids = torch.from_numpy(tokens.ids[tokens.places])
        rows.append(table[ids.to(table.device)].float().mean(0).cpu().numpy())
    return np.stack(rows)


def probe(states: np.ndarray, words: Sequence[TaggedWord]) -> float:
    """Accuracy of a linear probe on the held-out word types, trained on the others.

    Logistic regression on standardised states [n, h].
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    held = np.array([word.held_out for word in words])
    tags = np.array([word.tag for word in words])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    model.fit(states[~held], tags[~held])
    return float(model.score(states[held], tags[held]))


@dataclass(frozen=True)
class Triple:
    """Sentences that begin with `prefix`; the ends of two mean the same, that of the third not."""

    prefix: str
    sentence: str
    same: str
    other: str


def triples(synsets: Sequence[Synset], count: int, seed: int = 0) -> list[Triple]:
    """Triples of nouns with a synonym, and a noun of another topic."""
    draws = random.Random(seed)
    nouns = [s for s in synsets if s.id[0] == "n" and all(w.isalpha() for w in s.words[:2])]
    pairs = [s for s in nouns if len(s.words) > 1 and s.words[0][:4] != s.words[1][:4]]
    made = []
    for synset in draws.sample(pairs, min(count, len(pairs))):
        other = draws.choice(nouns)
        while other.topic == synset.topic:
            other = draws.choice(nouns)
        prefix = draws.choice(PREFIXES)
        ends = (*synset.words[:2], other.words[0])
        made.append(Triple(prefix, *(f"{prefix} {word}." for word in ends)))
    return made


def future_accuracy(encoder: Encoder, items: Sequence[Triple], *, mask: str) -> float:
    """How often the prefix's states of `sentence` are nearer to those of `same` than of `other`.

    Cosine of means over the prefix's tokens alone; equal ones count a half, as all do under a
    causal mask.
    """
    scores = []
    for item in items:
        n = len(_ids(encoder, item.prefix))
        texts = [_ids(encoder, text) for text in (item.sentence, item.same, item.other)]
        (_, states), *_ = _states(encoder, texts, mask)
        means = torch.stack([own[:n].float().mean(0) for own in states])
        same, other = torch.nn.functional.cosine_similarity(means[:1], means[1:])
        # Rounding must not decide between equal ones.
        scores.append(0.5 if abs(same - other) < 1e-6 else float(same > other))
    return float(np.mean(scores))


@dataclass(frozen=True)
class _Tokens:
    """ids [n] of a text with something before it; places: of a word's tokens, none the first."""

    ids: np.ndarray
    places: np.ndarray


def _tokens(encoder: Encoder, word: TaggedWord) -> _Tokens:
    tokenizer = encoder.tokenizer
    encoded = tokenizer(word.text, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    places = [
        i for i, (start, end) in enumerate(spans) if start < min(end, word.end) and end > word.start
    ]
    if spans[0][1]:  # no special token before the text
        if tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no BOS token")
        ids = [tokenizer.bos_token_id, *ids]
        places = [place + 1 for place in places]
    return _Tokens(np.array(ids), np.array(places))


def _ids(encoder: Encoder, text: str) -> np.ndarray:
    return np.array(encoder.tokenizer(text)["input_ids"])


@torch.inference_mode()
def _states(
    encoder: Encoder, texts: Sequence[np.ndarray], mask: str
) -> Iterator[tuple[slice, Sequence[Tensor]]]:
    """Final-norm states [n_i, h] of texts given as ids, some at a time."""
    backbone = encoder.backbone
    for part in split_by_budget([len(ids) for ids in texts], encoder.budget.tokens):
        batch = PackedBatch.pack(texts[part], device=backbone.device)
        stream = backbone.forward(batch, mask=mask)
        states = rms_norm(stream, backbone.final_norm, backbone.config.norm_eps)
        yield part, states.split(batch.lengths.tolist())
