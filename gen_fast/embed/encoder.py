"""Texts to embeddings: tokenise in the background, sort by length, pack, run, pool, reorder."""

import logging
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gen_fast.embed.adapter import Adapter
from gen_fast.embed.batches import Batch, averaged, run_batches
from gen_fast.embed.encode_options import check_types
from gen_fast.embed.export import Exportable
from gen_fast.embed.layouts import Layout, Sequences
from gen_fast.embed.methods import LLM2VecGen, Method
from gen_fast.embed.windows import FIRST_WINDOW_TEXTS, ahead, window_bounds, windows
from gen_fast.errors import ConfigError, NonFiniteError, PromptError
from gen_fast.io.precision import sign_bits
from gen_fast.io.texts import check_texts
from gen_fast.io.vectors import unit
from gen_fast.model.backbone import Backbone, PrefixKV
from gen_fast.model.batch import DeviceBatch, PackedBatch, on_device
from gen_fast.model.buckets import MOST_ROWS, Bucket, padded
from gen_fast.model.graphs import Graphs
from gen_fast.model.prefix import PrefixCache
from gen_fast.model.stream_choice import TEXT_TOKENS, StreamChooser
from gen_fast.model.token_budget import TokenBudget
from gen_fast.model.tokenizing import Tokenizer

logger = logging.getLogger(__name__)

# Embeddings as a caller asked for them: an array, a tensor, or a list of tensors.
Embedded = np.ndarray | Tensor | list[Tensor]

# Tokens of a text where neither the call nor the method says otherwise.
DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class EncodedBlock:
    """embeddings [n, d] float32; truncated: how many of the n texts lost their tail."""

    embeddings: np.ndarray
    truncated: int


class Encoder(Exportable):
    """Embeds texts with one backbone and one method. Made by `gen_fast.load`.

    prompts: the instructions selectable by `prompt_name`. default_prompt_name: the one that is
    used where none is asked for; None for no prompt. max_length: tokens of prompt, text and
    special tokens together; longer texts lose their tail (counted and logged once a call).
    streams: see `gen_fast.load`.
    source: the backbone's directory, which also has the language-model head.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        method: Method,
        *,
        max_length: int | None = None,
        deterministic: bool = False,
        streams: int | None = None,
        name: str = "",
        source: Path | None = None,
    ) -> None:
        self.backbone = backbone
        self._tokenizer = tokenizer
        self._method = method
        self.name = name
        self.source = source
        self.deterministic = deterministic
        check_types(max_length=max_length, streams=streams)
        limit = backbone.config.max_positions
        default = min(method.max_length or DEFAULT_MAX_LENGTH, limit)
        self.max_length = default if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise ConfigError(
                f"max_length {max_length} is outside 1…{limit}, "
                "the positions that the model was made for"
            )
        self.prompts: dict[str, str] = dict(method.prompts)
        self.default_prompt_name = method.default_prompt_name
        self.prefixes = PrefixCache(backbone)
        self.budget = TokenBudget(backbone)
        self._graphs = Graphs(backbone.device) if backbone.use_graphs else None
        if method.writes and streams is None:
            streams = 1
        batch_tokens = TEXT_TOKENS if deterministic else self.budget.tokens
        self._streams = StreamChooser(backbone, streams, batch_tokens)

    @property
    def method(self) -> str:
        """Name of the method."""
        return self._method.name

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its embeddings, as JSON."""
        quantize = self.backbone.quantize
        return {
            **self._method.whole_identity(self.backbone.fingerprint, self._tokenizer),
            "prompts": dict(self.prompts),
            "max_length": self.max_length,
            "dtype": str(self.backbone.dtype),
            **({"quantize": quantize} if quantize else {}),
        }

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: "cosine", "dot", "euclidean" or "manhattan"."""
        return self._method.similarity_fn_name

    @property
    def adapter(self) -> Adapter | None:
        """The LLM2Vec-Gen adapter, where the method has one."""
        return self._method.adapter if isinstance(self._method, LLM2VecGen) else None

    @property
    def dimension(self) -> int:
        """Size of an embedding, where a call asks for no other."""
        return self._method.dimension or self.backbone.config.hidden_size

    @property
    def full_dimension(self) -> int:
        """The most dimensions that an embedding can have: a layout may keep fewer by default."""
        return self._method.full_dimension or self.dimension

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return self.backbone.device

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer as one of transformers, which is imported for it."""
        return self._tokenizer.transformers

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize_embeddings: bool = False,
        precision: Literal["float32", "binary", "ubinary"] = "float32",
        truncate_dim: int | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        output_value: str = "sentence_embedding",
        device: str | torch.device | None = None,
    ) -> Embedded:
        """Embed a text, giving [d], or several texts, giving [n, d], in the order given.

        Names and meaning are those of sentence-transformers.
        prompt: instruction put before every text. prompt_name: one of `self.prompts`, unless there
        is a prompt. Without either it is the one named by `self.default_prompt_name`, if any.
        normalize_embeddings: divide by the L2 norm (after truncate_dim).
        precision: "float32", or the signs as bits, 8 dimensions a byte: "ubinary" uint8, "binary"
        int8 (shifted by 128).
        truncate_dim: keep the first dimensions only, at most `full_dimension`; None keeps
        `dimension`.
        batch_size: texts run at once, at most. Texts are not padded, and `budget` already says how
        many tokens are run at once: fewer texts only take less memory.
        show_progress_bar: on stderr; None shows it when stderr is a terminal.
        convert_to_numpy, convert_to_tensor: an array; a CPU tensor; a list of tensors if neither.
        output_value, device: must be the default, and where the model is.

        Raises TextTypeError or TextError naming the row of a text that cannot be embedded,
        NonFiniteError naming the rows of embeddings with NaN or infinity, PromptError for an
        unknown prompt_name or a prompt longer than max_length, ConfigError naming an option of the
        wrong type, or with a value that has no meaning.
        """
        check_types(
            precision=precision,
            show_progress_bar=show_progress_bar,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            output_value=output_value,
        )
        single = isinstance(texts, str)
        rows = [texts] if isinstance(texts, str) else _as_list(texts)
        check_texts(rows)
        self._refuse_options(precision, output_value, device)
        if show_progress_bar is None:
            show_progress_bar = sys.stderr.isatty() and not single
        with tqdm(total=len(rows), unit="text", disable=not show_progress_bar) as bar:
            (block,) = self.encode_blocks(
                [rows],
                prompt=prompt,
                prompt_name=prompt_name,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                batch_size=batch_size,
                on_progress=bar.update,
            )
        if block.truncated:
            logger.warning(
                "%d of %d texts were longer than max_length=%d tokens and lost their tail",
                block.truncated,
                len(rows),
                self.max_length,
            )
        result = block.embeddings
        if precision != "float32":
            result = sign_bits(result)
        if precision == "binary":
            result = (result.astype(np.int16) - 128).astype(np.int8)
        if convert_to_numpy and not convert_to_tensor:
            return result[0] if single else result
        tensor = torch.from_numpy(result)
        rows_or_tensor = tensor if convert_to_tensor else list(tensor)
        return rows_or_tensor[0] if single else rows_or_tensor

    def encode_blocks(
        self,
        blocks: Iterable[Sequence[str]],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[int], object] = lambda texts: None,
    ) -> Generator["EncodedBlock", None, None]:
        """Embed blocks of texts, each to the bits that `encode` gives it alone.

        The next texts are drawn from `blocks` and tokenised in a thread while others are run.
        on_progress is called with the number of texts of every batch that is done.
        Rows in errors, which are those of `encode`, are counted within a block.
        """
        check_types(
            prompt=prompt,
            prompt_name=prompt_name,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            batch_size=batch_size,
        )
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        dimension = self.dimension if truncate_dim is None else truncate_dim
        if not 1 <= dimension <= self.full_dimension:
            raise ConfigError(f"truncate_dim {truncate_dim} is outside 1…{self.full_dimension}")
        layout = self._layout(prompt, prompt_name)
        output = np.empty((0, dimension), dtype=np.float32)
        truncated = 0
        windowed = windows(blocks, layout, self._first_window)
        # An answer is written by the model, which is not run in two threads.
        for window in windowed if self._method.writes else ahead(windowed):
            if window.start == 0:
                output = np.empty((window.block_size, dimension), dtype=np.float32)
            with (
                torch.inference_mode(),
                closing(
                    self._embed_texts(window.sequences, layout.prompt_ids, batch_size)
                ) as parts,
            ):
                for members, embeddings in parts:
                    part = embeddings[:, :dimension]
                    if normalize_embeddings:
                        part = torch.nn.functional.normalize(part, dim=-1)
                    indices = members + window.start
                    output[indices] = part.cpu().numpy()
                    _check_finite(output, indices)
                    on_progress(len(indices))
            if window.is_last:
                yield EncodedBlock(output, window.truncated - truncated)
                truncated = window.truncated

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Embedded:
        """`encode` with the prompt named "query", unless `options` name another."""
        return self.encode(texts, **self._with_prompt(("query",), options))

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Embedded:
        """`encode` with the prompt named "document", unless `options` name another.

        Without one of that name it is "passage", or else "corpus".
        """
        return self.encode(texts, **self._with_prompt(("document", "passage", "corpus"), options))

    def count_tokens(
        self, texts: Sequence[str], *, prompt: str | None = None, prompt_name: str | None = None
    ) -> tuple[int, int]:
        """Tokens of a call to `encode`: (all, computed), special tokens included.

        All counts the prompt with every text; computed counts what is run, the shared prefix once.
        """
        check_texts(texts)
        layout = self._layout(prompt, prompt_name)
        total = computed = longest_prefix = 0
        for bound in window_bounds(texts, self._first_window):
            window = layout(texts[bound], bound.start)
            total += sum(len(ids) for ids in window.ids)
            computed += sum(len(ids) for ids in window.ids) - int(window.shared.sum())
            longest_prefix = max(longest_prefix, int(window.shared.max()))
        return total, computed + longest_prefix

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Similarity of the rows of `a` [n, d] and `b` [m, d]: [n, m] float32.

        The cosine, which is 0 for a zero vector, unless a sentence-transformers layout names
        another: the dot product, or the negative Euclidean or Manhattan distance.
        """
        name = self.similarity_fn_name
        if name in ("euclidean", "manhattan"):
            distance = torch.cdist(
                torch.from_numpy(a), torch.from_numpy(b), p=2.0 if name == "euclidean" else 1.0
            )
            return -distance.numpy()
        if name == "cosine":
            a, b = unit(a), unit(b)
        product: np.ndarray = a @ b.T
        return product

    # ------------------------------------------------------------------ one call, step by step

    @property
    def _first_window(self) -> int | None:
        """Texts of a block's first window, at most: few on a GPU, so that it computes at once."""
        return FIRST_WINDOW_TEXTS if self.device.type == "cuda" else None

    def _with_prompt(self, names: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        """`options` of `encode`, with the first of the prompts `names` unless they name one."""
        name = next((name for name in names if name in self.prompts), None)
        named = options.get("prompt_name") is not None
        return options if named or name is None else {**options, "prompt_name": name}

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        if prompt is not None:
            return prompt
        if prompt_name is None:
            prompt_name = self.default_prompt_name
        if prompt_name is None:
            return ""
        if prompt_name not in self.prompts:
            raise PromptError(
                f"no prompt named {prompt_name!r}; there are {', '.join(self.prompts) or 'none'}"
            )
        return self.prompts[prompt_name]

    def _refuse_options(
        self,
        precision: str,
        output_value: str,
        device: str | torch.device | None,
    ) -> None:
        """Raise ConfigError for options of sentence-transformers that have no meaning here."""
        if precision not in ("float32", "binary", "ubinary"):
            raise ConfigError(
                f"precision {precision!r} is not float32, binary or ubinary; int8 with a scale a "
                "row is what embed_corpus writes"
            )
        if output_value != "sentence_embedding":
            raise ConfigError(
                f"output_value {output_value!r}: only sentence embeddings are kept, not tokens'"
            )
        if device is not None and not self._is_at(device):
            raise ConfigError(
                f"device {device!r}: the model stays on {self.device}, where "
                "gen_fast.load(device=…) put it; embed_corpus(devices=…) uses several"
            )

    def _is_at(self, device: str | torch.device) -> bool:
        try:
            other = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"device {device!r} is none that torch knows") from error
        return other.type == self.device.type and other.index in (None, self.device.index)

    def _layout(self, prompt: str | None, prompt_name: str | None = None) -> Layout:
        return self._method.layout(
            self._tokenizer, self._prompt(prompt, prompt_name), self.max_length, prompt_name
        )

    def _embed_texts(
        self, window: Sequences, prompt_ids: np.ndarray, batch_size: int | None
    ) -> Generator[tuple[np.ndarray, Tensor], None, None]:
        """Yield (texts of the window [n], embeddings [n, d] float32) until all are run."""
        batches = self._batches(window, prompt_ids, batch_size)
        run = partial(self._run, window)
        parts = run_batches(
            batches, run, self.budget, self._streams, in_flight=self.device.type == "cuda"
        )
        return parts if window.counts is None else averaged(parts, window.counts)

    def _batches(
        self, window: Sequences, prompt_ids: np.ndarray, batch_size: int | None
    ) -> list[Batch]:
        """Sequences that share as much of the prompt's prefix together, longest first.

        Within the token budget, which does not depend on what else goes on.
        """
        lengths = np.array([len(row) for row in window.ids], dtype=np.int64)
        longest_first = np.argsort(-lengths, kind="stable")
        budget = 1 if self.deterministic else self.budget.tokens
        batches: list[Batch] = []
        for shared in np.unique(window.shared):
            members = longest_first[window.shared[longest_first] == shared]
            prefix = self.prefixes.get(tuple(prompt_ids.tolist())) if shared else None
            if prefix is not None:
                prefix = prefix.cut(int(shared))
            skip = 0 if prefix is None else len(prefix)
            batches += Batch(members, lengths[members] - skip, prefix).cut(budget, batch_size)
        return batches

    @torch.inference_mode()
    def _run(self, window: Sequences, texts: Batch) -> Tensor:
        """Embeddings [n, d] float32 of a batch, in whichever thread."""
        skip = 0 if texts.prefix is None else len(texts.prefix)
        needed = window.needed[texts.members]
        sequences = [window.ids[i][skip:] for i in texts.members]
        if self._graphs is not None:
            bucket = Bucket.of(texts.lengths, needed)
            if bucket.rows <= MOST_ROWS:
                return self._run_in_bucket(self._graphs, bucket, sequences, needed, texts.prefix)
        batch = PackedBatch.pack(
            sequences,
            needed=needed,
            prefix_length=skip,
            blocks=self._method.blocks(needed, texts.lengths),
            device=self.device,
        )
        hidden = self.backbone.forward(
            batch, special=self._method.special, prefix=texts.prefix, mask=self._method.mask
        )
        weights = self._method.row_weights(needed, texts.lengths + skip)
        on_rows = None if weights is None else on_device(weights, self.device)
        return self._method.pool(hidden, batch.needed.cu_seqlens, on_rows, self.backbone)

    def _run_in_bucket(
        self,
        graphs: Graphs,
        bucket: Bucket,
        sequences: list[np.ndarray],
        needed: np.ndarray,
        prefix: PrefixKV | None,
    ) -> Tensor:
        """`_run` for a batch that is padded to a bucket, whose graph is kept."""
        count, skip = len(sequences), 0 if prefix is None else len(prefix)
        sequences, needed = bucket.with_padding_texts(sequences, needed)
        lengths = np.array([len(ids) for ids in sequences], dtype=np.int64)
        arrays = bucket.arrays(sequences, needed, skip)
        blocks = self._method.blocks(needed, lengths)
        if blocks is not None:
            arrays["blocks"] = blocks.astype(np.int32)
        weights = self._method.row_weights(needed, lengths + skip)
        if weights is not None:
            arrays["row_weights"] = padded(weights, bucket.needed or bucket.rows)
        method, backbone = self._method, self.backbone

        def embeddings(tensors: Mapping[str, Tensor]) -> Tensor:
            batch = DeviceBatch.of(tensors, bucket.rows)
            hidden = backbone.run(batch, special=method.special, prefix=prefix, mask=method.mask)
            return method.pool(hidden, batch.cu_needed, tensors.get("row_weights"), backbone)

        # The same prefix may have been computed anew: a graph keeps the one that it reads.
        key = (bucket, None if prefix is None else prefix.ids)
        return graphs.run(key, arrays, embeddings)[:count]


def _as_list(texts: Iterable[str]) -> list[str]:
    """A list of any iterable but bytes; something else is refused as if it were a lone text."""
    if isinstance(texts, bytes | bytearray) or not isinstance(texts, Iterable):
        check_texts([texts])
    return list(texts)


def _check_finite(output: np.ndarray, indices: np.ndarray) -> None:
    bad = indices[~np.isfinite(output[indices]).all(axis=1)]
    if len(bad):
        rows = tuple(int(i) for i in np.sort(bad))
        raise NonFiniteError(
            f"the embedding of row {rows[0]} holds NaN or infinity"
            + (f", and so do {len(rows) - 1} more" if rows[1:] else "")
            + "; float16 overflows on some models: use bfloat16 or float32",
            rows,
        )
