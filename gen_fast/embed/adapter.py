"""LLM2Vec-Gen adapters: the special tokens and the two projections, without the backbone.

A directory with `adapter.safetensors` and `config.json`, written by `Adapter.save`. Checkpoints of
the reference package (llm2vec-gen 0.1) are read by `gen_fast.formats.llm2vec_gen`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_fast.errors import AdapterError, BackboneMismatchError, WeightsError
from gen_fast.formats.model_card import with_results
from gen_fast.io.checksums import problem, record
from gen_fast.io.durable import as_readable_as_others, file_sha256
from gen_fast.model.fingerprint import Fingerprint, described, differences
from gen_fast.model.model_files import read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

FORMAT = "gen_fast.adapter/1"
_FILES = ("config.json", "adapter.safetensors")
DEFAULT_PROMPTS = {
    "query": "Generate a passage that best answers this question: ",
    "document": "Summarize the following passage: ",
}


@dataclass(frozen=True)
class Adapter:
    """What training adds to a frozen backbone. All tensors float32 on the CPU.

    special [k, h]: embeddings of the thought tokens, then of the compression tokens.
    reconstruction, alignment: (weight, bias) of R [h, h] and A [d, h]; None where the checkpoint
    was trained without that projection.
    backbone: Hub id or path of the backbone; fingerprint: see gen_fast.model.fingerprint, empty
    if the checkpoint carries none.
    """

    special: Tensor
    n_compression: int
    backbone: str
    reconstruction: tuple[Tensor, Tensor] | None
    alignment: tuple[Tensor, Tensor] | None
    backbone_revision: str | None = None
    fingerprint: Fingerprint = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_PROMPTS))
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.special.ndim != 2 or not 1 <= self.n_compression <= len(self.special):
            raise AdapterError(
                f"{self.n_compression} compression tokens do not fit special tokens of shape "
                f"{tuple(self.special.shape)}"
            )
        h = self.special.shape[1]
        for name, pair, rows in (
            ("reconstruction", self.reconstruction, h),
            ("alignment", self.alignment, None),
        ):
            if pair is None:
                continue
            weight, bias = pair
            if weight.shape[1:] != (h,) or rows not in (None, len(weight)):
                raise AdapterError(f"{name} weight has shape {tuple(weight.shape)}, hidden is {h}")
            if bias.shape != (len(weight),):
                raise AdapterError(f"{name} bias has shape {tuple(bias.shape)}")
        for name, tensor in self.tensors().items():
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{name} holds NaN or infinity")

    @property
    def n_special(self) -> int:
        """Number of special tokens, thought and compression together."""
        return len(self.special)

    @property
    def dimension(self) -> int:
        """Size of an embedding."""
        return len(self.special[0] if self.alignment is None else self.alignment[0])

    def projection(self) -> tuple[Tensor, Tensor] | None:
        """A∘R as one map (weight [d, h], bias [d]): e = W_A W_R mean(H) + W_A b_R + b_A."""
        if self.reconstruction is None or self.alignment is None:
            return self.alignment or self.reconstruction
        (w_r, b_r), (w_a, b_a) = (
            tuple(t.double() for t in pair) for pair in (self.reconstruction, self.alignment)
        )
        return (w_a @ w_r).float(), (w_a @ b_r + b_a).float()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the names of the file."""
        named = {"special_tokens": self.special}
        for name in ("reconstruction", "alignment"):
            pair = getattr(self, name)
            if pair is not None:
                named[f"{name}.weight"], named[f"{name}.bias"] = pair
        return named

    def check_backbone(self, actual: Fingerprint) -> None:
        """Raise BackboneMismatchError, saying what differs, unless the fingerprints agree."""
        h = actual["hidden_size"]
        if self.special.shape[1] != h:
            raise BackboneMismatchError(
                f"the adapter was trained for hidden size {self.special.shape[1]}, "
                f"this backbone has {h}"
            )
        found = differences(self.fingerprint, actual)
        if found:
            raise BackboneMismatchError(
                f"the adapter was trained for backbone {self.backbone!r}, and this one differs in "
                f"{described(found, self.fingerprint, actual)}"
            )

    def with_fingerprint(self, fingerprint: Fingerprint) -> "Adapter":
        """A copy that records the backbone it was checked against."""
        return replace(self, fingerprint=dict(fingerprint))

    def weights_hash(self) -> str:
        """Tells one set of special tokens and projections from another."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{self.n_compression}".encode())
            digest.update(tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, directory: str | Path, *, evaluation: Sequence["EvalResult"] = ()) -> None:
        """Write adapter.safetensors, config.json and README.md (a model card).

        evaluation: results of huggingface_hub's kind, for the card.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "adapter.safetensors"
        tensors = {name: t.contiguous() for name, t in self.tensors().items()}
        with as_readable_as_others(path):
            save_file(tensors, path, metadata={"format": FORMAT})
        config = {
            "format": FORMAT,
            "method": "llm2vec-gen",
            "backbone": {
                "id": self.backbone,
                "revision": self.backbone_revision,
                "fingerprint": dict(self.fingerprint),
            },
            "sha256": file_sha256(path),
            "n_thought": self.n_special - self.n_compression,
            "n_compression": self.n_compression,
            "dimension": self.dimension,
            "max_length": self.max_length,
            "prompts": dict(self.prompts),
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        record(directory, {name: file_sha256(directory / name) for name in _FILES})
        card = with_results(_model_card(self), Path(self.backbone).name, evaluation)
        (directory / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self, repo_id: str, *, evaluation: Sequence["EvalResult"] = (), **options: Any
    ) -> str:
        """`save` to a repository of the Hub; return the address of the commit.

        options: of huggingface_hub's ModelHubMixin.push_to_hub: private, token, branch, … .
        """
        from gen_fast.model.hub import HubFiles

        files = HubFiles(lambda folder: self.save(folder, evaluation=evaluation))
        return str(files.push_to_hub(repo_id, **options))

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "Adapter":
        """`load` from a directory, or from a repository of the Hub.

        options: of huggingface_hub's ModelHubMixin.from_pretrained: revision, token, cache_dir, … .
        Raises ModelNotFoundError, and AdapterError as `load` does.
        """
        from gen_fast.model.hub import fetch

        try:
            path = fetch(name, **options)
        except (ValueError, AttributeError) as error:
            # The mixin reads config.json first, and takes it for an object.
            raise AdapterError(f"{name} is not an adapter: {error}") from error
        return cls.load(path)

    @classmethod
    def load(cls, directory: str | Path) -> "Adapter":
        """Read a directory written by `save`. Raises AdapterError."""
        directory = Path(directory)
        try:
            config = read_json(directory / "config.json")
        except WeightsError as error:
            raise AdapterError(f"not an adapter: {error}") from error
        if config.get("format") != FORMAT:
            raise AdapterError(
                f"{directory}/config.json has format {config.get('format')!r}, expected {FORMAT!r}"
            )
        path = directory / "adapter.safetensors"
        if wrong := problem(directory, *_FILES):
            raise AdapterError(wrong)
        try:
            tensors = load_file(path)
        except FileNotFoundError as error:
            raise AdapterError(f"{path} is missing") from error
        except SafetensorError as error:
            raise AdapterError(f"{path} is not a safetensors file, or damaged: {error}") from error
        if "sha256" not in config:
            raise AdapterError(f"{directory}/config.json lacks 'sha256'")
        if file_sha256(path) != config["sha256"]:
            raise AdapterError(f"{path} is damaged: its sha256 is not the one in config.json")
        return cls._build(config, tensors, path)

    @classmethod
    def _build(cls, config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> "Adapter":
        def pair(name: str) -> tuple[Tensor, Tensor] | None:
            parts = [tensors.get(f"{name}.{part}") for part in ("weight", "bias")]
            if parts[0] is None and parts[1] is None:
                return None
            if parts[0] is None or parts[1] is None:
                raise AdapterError(f"{path} has only one of {name}.weight and {name}.bias")
            return parts[0].float(), parts[1].float()

        try:
            backbone = config["backbone"]
            adapter = cls(
                special=tensors["special_tokens"].float(),
                n_compression=config["n_compression"],
                backbone=backbone["id"],
                backbone_revision=backbone["revision"],
                fingerprint=backbone["fingerprint"],
                reconstruction=pair("reconstruction"),
                alignment=pair("alignment"),
                prompts=config["prompts"],
                max_length=config["max_length"],
            )
            expected = config["dimension"], config["n_thought"] + config["n_compression"]
        except KeyError as error:
            raise AdapterError(f"{path.parent} lacks {error.args[0]!r}") from error
        except (TypeError, AttributeError) as error:
            raise AdapterError(
                f"{path.parent}/config.json holds a value of the wrong type: {error}"
            ) from error
        if (adapter.dimension, adapter.n_special) != expected:
            raise AdapterError(
                f"{path} has {adapter.n_special} special tokens and dimension "
                f"{adapter.dimension}, its config says {expected[1]} and {expected[0]}"
            )
        return adapter


def _model_card(adapter: Adapter) -> str:
    thought = adapter.n_special - adapter.n_compression
    prompts = "\n".join(f"- {name}: `{prompt}`" for name, prompt in adapter.prompts.items())
    return f"""---
base_model: {adapter.backbone}
library_name: gen-fast
tags: [generative-embeddings, llm2vec-gen]
---
# LLM2Vec-Gen adapter for {adapter.backbone}

{thought} thought and {adapter.n_compression} compression tokens; embeddings of \
{adapter.dimension} dimensions.

```python
import gen_fast

encoder = gen_fast.load("this-directory")
vectors = encoder.encode(["what is disk cleanup?"], prompt_name="query")
```

Prompts:
{prompts}
"""
