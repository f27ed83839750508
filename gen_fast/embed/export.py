"""An Encoder's way out to sentence-transformers, on disk and on the Hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gen_fast.embed.methods import LLM2VecGen, Method
from gen_fast.errors import ConfigError
from gen_fast.formats.model_card import sentence_transformers_card, with_results
from gen_fast.formats.sentence_export import write_sentence_model
from gen_fast.model.backbone import Backbone
from gen_fast.model.device import resolve_dtype
from gen_fast.model.tokenizing import Tokenizer

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


class Exportable:
    """The part of an Encoder that writes it in sentence-transformers' layout."""

    backbone: Backbone
    source: Path | None
    name: str
    max_length: int
    prompts: dict[str, str]
    default_prompt_name: str | None
    _tokenizer: Tokenizer
    _method: Method

    def save_as_sentence_transformer(
        self,
        directory: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        evaluation: Sequence["EvalResult"] = (),
    ) -> None:
        """Write a directory that sentence-transformers runs without code of gen_fast.

        It has backbone, tokenizer, pooling, prompts and model card, and gives the embeddings of
        this encoder to rounding: for llm2vec-gen and last-token behind any prompt, for mean and
        weighted-mean without one. dtype: of the weights; "auto" keeps that of the backbone's files.
        evaluation: results of huggingface_hub's kind, for the card.

        Raises UnsupportedModelError for a method that sentence-transformers cannot compute (echo,
        hyde) or need not (its own layout), ConfigError if the directory is not empty.
        """
        if self.source is None:
            raise ConfigError("an encoder without `source`, the backbone's directory, has no files")
        card = sentence_transformers_card(self._card_name(), self._method.name, self.prompts)
        write_sentence_model(
            Path(directory),
            self._method.sentence_modules(self._tokenizer, self.prompts),
            source=self.source,
            tokenizer=self._tokenizer.core,
            settings={
                "prompts": self.prompts,
                "default_prompt_name": self.default_prompt_name,
                "similarity_fn_name": self._method.similarity_fn_name,
            },
            max_length=self.max_length,
            dtype=None if dtype == "auto" else resolve_dtype(dtype, self.backbone.device),
            card=with_results(card, Path(directory).resolve().name, evaluation),
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: str | torch.dtype = "auto",
        evaluation: Sequence["EvalResult"] = (),
        **options: Any,
    ) -> str:
        """`save_as_sentence_transformer` to a repository of the Hub; return the commit's address.

        options: of huggingface_hub's ModelHubMixin.push_to_hub: private, token, branch, … .
        """
        from gen_fast.model.hub import HubFiles

        def write(folder: Path) -> None:
            self.save_as_sentence_transformer(folder, dtype=dtype, evaluation=evaluation)

        return str(HubFiles(write).push_to_hub(repo_id, **options))

    def _card_name(self) -> str:
        """The backbone as the adapter names it, or as it was loaded."""
        return self._method.adapter.backbone if isinstance(self._method, LLM2VecGen) else self.name
