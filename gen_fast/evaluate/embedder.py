"""Embedding models as mteb wants to see them."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from gen_fast.embed.encoder import Encoder
from gen_fast.errors import ConfigError
from gen_fast.evaluate.instructions import Instructions

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

SIMILARITIES = ("cosine", "dot")
# What can be evaluated.
Model: TypeAlias = "Encoder | SentenceTransformer"


class Embedder(AbsEncoder):
    """A model behind mteb's encoder protocol.

    instructions: put before texts by task; None leaves the model its own prompts, those named
    "query" and "document" where there are such. similarity: of SIMILARITIES; None is the model's
    own. name: under which results are kept; those of another model or other settings are not taken
    for its own. trained_on: names of tasks whose corpus the model was trained on.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        instructions: Instructions | None = None,
        similarity: str | None = None,
        trained_on: Sequence[str] = (),
    ) -> None:
        self.model = model
        self._instructions = instructions
        similarity = str(similarity or model.similarity_fn_name)
        if similarity not in SIMILARITIES:
            raise ConfigError(f"similarity must be {' or '.join(SIMILARITIES)}, not {similarity!r}")
        known = {
            "model": _identity(model),
            "instructions": None if instructions is None else vars(instructions),
            "similarity": similarity,
        }
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"gen-fast/{name.strip('/').replace('/', '--')}",
            revision=digest[:16],
            release_date=None,
            languages=None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=None,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction(similarity),
            use_instructions=instructions is not None,
            training_datasets=set(trained_on) or None,
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Embed what a task gives: [n, d] float32. Other options of mteb's have no meaning here."""
        texts = [text.strip() for batch in inputs for text in batch["text"]]
        vectors = self.model.encode(
            texts,
            show_progress_bar=show_progress_bar,
            **self._prompt(task_metadata, prompt_type),
        )
        return np.asarray(vectors, dtype=np.float32)

    def _prompt(self, task: TaskMetadata, prompt_type: PromptType | None) -> dict[str, str]:
        """Arguments of `encode` that say what stands before the texts, and what they are.

        A text that is neither query nor document counts as a document for methods that answer
        queries: there is nothing to answer.
        """
        chosen: dict[str, str] = {}
        writes = isinstance(self.model, Encoder) and self.model.method == "hyde"
        name = "document" if prompt_type is None and writes else prompt_type and prompt_type.value
        if name is not None and name in self.model.prompts:
            chosen["prompt_name"] = name
        if self._instructions is not None:
            is_document = prompt_type == PromptType.document
            chosen["prompt"] = self._instructions.prompt(
                task.name, task.type, is_document=is_document
            )
            if not isinstance(self.model, Encoder):  # sentence-transformers takes one of the two
                chosen.pop("prompt_name", None)
        return chosen


def _identity(model: Model) -> dict[str, Any]:
    """What decides a model's embeddings, as JSON."""
    if isinstance(model, Encoder):
        return model.identity
    digest = hashlib.sha256(str(model).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "sha256": digest.hexdigest(),
        "prompts": model.prompts,
        "max_length": model.max_seq_length,  # which its text does not name
    }


@contextmanager
def limited_to(model: Model, max_length: int | None) -> Iterator[None]:
    """While it lasts, the model cuts texts at `max_length` tokens, or at what it can take."""
    attribute = "max_length" if isinstance(model, Encoder) else "max_seq_length"
    own = getattr(model, attribute)
    wanted = max_length or own
    if isinstance(model, Encoder) and wanted > model.backbone.config.max_positions:
        wanted = model.backbone.config.max_positions
        logger.warning("texts are cut at %d tokens, all that the model can take", wanted)
    setattr(model, attribute, wanted)
    try:
        yield
    finally:
        setattr(model, attribute, own)
