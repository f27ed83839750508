"""Model directories of transformers, written: a causal language model with trained linears."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen_fast.formats.model_card import causal_lm_card
from gen_fast.io.checksums import files_below, record
from gen_fast.io.durable import file_sha256
from gen_fast.model.model_files import read_json
from gen_fast.model.shards import save_shards
from gen_fast.model.tensor_files import TensorFiles, find_tensors

# What config.json says of the source's own files or code.
_NOT_KEPT = ("auto_map", "torch_dtype", "transformers_version", "_name_or_path")
# What transformers may read a tokenizer from; beside the weights lies how they generate.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_GENERATION = ("generation_config.json",)
_HEAD = "lm_head.weight"


def config_of(source: Path, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of `source` for a copy of its weights in `dtype`.

    kind: of transformers' class, such as "Model". Raises WeightsError.
    """
    config = {k: v for k, v in read_json(source / "config.json").items() if k not in _NOT_KEPT}
    config["architectures"] = [f"{config['model_type'].capitalize()}{kind}"]
    config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def write_causal_lm(
    directory: Path,
    source: Path,
    tokenizer: Path,
    linears: Mapping[str, Tensor],
    *,
    base: str,
    tags: tuple[str, ...] = (),
) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained` and `load_backbone` read.

    source: the directory of the model that was trained, from which everything else is taken as it
    is stored. tokenizer: that of its tokenizer. linears: [out, in], float32, by names such as
    "layers.3.mlp.up_proj". base, tags: of the model card. checksums.json lists all files but the
    card. The directory must be new to the caller, who waits until it is on the disk.
    Raises WeightsError for a source that is damaged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = find_tensors(source)
    config = config_of(source, "ForCausalLM", torch.float32)
    trained = {f"{name}.weight": weight for name, weight in linears.items()}

    def read(name: str) -> Tensor:
        name = name.removeprefix("model.")
        return trained[name].cpu() if name in trained else files.stored(name)

    save_shards(directory, _sizes(files, trained), read)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for folder, names in ((tokenizer, _TOKENIZER), (source, _GENERATION)):
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, directory / name)
    record(directory, {name: file_sha256(directory / name) for name in files_below(directory)})
    (directory / "README.md").write_text(causal_lm_card(base, tags), encoding="utf-8")


def _sizes(files: TensorFiles, trained: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of every tensor by the name that transformers gives it."""
    names = files.backbone_names()
    sizes = {f"model.{n}": (trained[n] if n in trained else files.stored(n)).nbytes for n in names}
    if _HEAD in files.where:
        sizes[_HEAD] = files.stored(_HEAD).nbytes
    return sizes
