"""`write_quantized`: a copy of a model with quantised linears, and how near it is."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_fast.embed.loading import load
from gen_fast.embed.sample_texts import SAMPLE_TEXTS
from gen_fast.errors import ConfigError, UnsupportedModelError
from gen_fast.formats import gem, llm2vec_gen, peft, sentence_transformers
from gen_fast.io.checksums import CHECKSUMS, record_all
from gen_fast.io.durable import check_is_new, new_directory
from gen_fast.io.vectors import centred_cosine
from gen_fast.model.calibration_texts import CALIBRATION_TEXTS
from gen_fast.model.choices import FP8, GROUP_BITS, INT8
from gen_fast.model.config import QUANT_METHOD, BackboneConfig, parse_config
from gen_fast.model.device import resolve_device
from gen_fast.model.int8 import check_calibration, int8_tensors
from gen_fast.model.lora import linear_sizes
from gen_fast.model.model_files import read_json
from gen_fast.model.quantized import (
    RECIPE,
    Recipe,
    check_device,
    check_quantize,
    fp8_stored_shape,
    scale_name,
)
from gen_fast.model.shards import save_shards
from gen_fast.model.sources import lasting_name, resolve
from gen_fast.model.tensor_files import TensorFiles, find_tensors
from gen_fast.model.weights import load_backbone
from gen_fast.ops.qlinear import group_blocks_shape

logger = logging.getLogger(__name__)

# Files that a copy takes over: settings, tokenizers and licences, no weights and no code.
_KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_KEPT = (CHECKSUMS, RECIPE, "model.safetensors.index.json", "config.json")
# For other packages: none has such a method. transformers says so, and fails at the sizes.
_QUANTIZATION_CONFIG = {
    **{
        kind: {"quant_method": QUANT_METHOD, "bits": bits, "group_size": 32, "symmetric": False}
        for kind, bits in GROUP_BITS.items()
    },
    INT8: {"quant_method": QUANT_METHOD, "bits": 8, "activation_bits": 8, "symmetric": True},
    FP8: {"quant_method": QUANT_METHOD, "bits": 8, "activation_bits": 8, "format": "e4m3"},
}
# Of texts that quality is measured on: the mean that is subtracted is theirs.
_FEWEST_TEXTS = 20


def write_quantized(
    model: str | Path,
    out: str | Path,
    *,
    quantize: str = "int4",
    revision: str | None = None,
    texts: Sequence[str] = SAMPLE_TEXTS,
    calibration: Sequence[str] = CALIBRATION_TEXTS,
    device: str | torch.device | None = None,
) -> Recipe:
    """Write a copy of a backbone whose linears are quantised, to be loaded like the original.

    model: a known name, Hub id, .gguf file or directory of a backbone, also one in
    sentence-transformers' layout or of a whole GEM model, all of which is copied then. out: a new
    or empty directory. quantize: "int4", "int8-weight-only", "int8" or "fp8", which is compared
    where it runs, on a GPU of sm_89 or newer. texts: at least 20, on which both are compared.
    calibration: at least 20 others, on which int8 measures what its linears read.

    The copy has the original's fingerprint, so that adapters of the one fit the other. Its recipe's
    quality is the centred cosine of embeddings in float32, by the method that `load` takes.

    Raises ConfigError for an `out` that is not empty, a model that is quantised already, too few
    texts or a device without fp8, UnsupportedModelError for an adapter or sizes that do not fit,
    and what `load` raises.
    """
    check_quantize(quantize)
    check_device(quantize, resolve_device(device), torch.float32)
    check_is_new(Path(out))
    if len(texts) < _FEWEST_TEXTS:
        raise ConfigError(
            f"quality is measured on at least {_FEWEST_TEXTS} texts, not on {len(texts)}"
        )
    check_calibration(calibration)
    directory = resolve(model, revision)
    source = _backbone_in(directory)
    files = find_tensors(source)
    if files.recipe is not None:
        raise ConfigError(f"{directory} is quantised already, to {files.recipe.quantize}")
    with new_directory(Path(out).resolve()) as folder:
        copy = folder / source.relative_to(directory)
        for path in _kept(directory, source):
            target = folder / path.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        recipe = _write_backbone(files, source, copy, quantize, lasting_name(model), calibration)
        quality = _quality(directory, folder, texts, device)
        logger.info("%s in %s: %s", model, quantize, quality)
        recipe = Recipe(**{**vars(recipe), "quality": quality})
        recipe.write(copy)
        record_all(copy)
    return recipe


def _backbone_in(directory: Path) -> Path:
    """Where the weights of a model lie that is no adapter. Raises UnsupportedModelError."""
    if sentence_transformers.is_sentence_model(directory):
        return sentence_transformers.transformer_directory(directory)
    is_ours = (directory / "adapter.safetensors").exists()
    if is_ours or peft.is_adapter(directory) or llm2vec_gen.is_checkpoint(directory):
        raise UnsupportedModelError(
            f"{directory} is an adapter: quantise its backbone, or load it with quantize="
        )
    return directory


def _kept(directory: Path, source: Path) -> list[Path]:
    """The files of a model that its copy has as they are."""
    return [path for path in directory.rglob("*") if path.is_file() and _is_kept(path, source)]


def _is_kept(path: Path, source: Path) -> bool:
    if path.suffix == ".safetensors":
        # A layer behind the backbone has weights of its own, a GEM model its special tokens.
        return path.parent != source or path.name == gem.TENSORS
    if path.suffix not in _KEPT and not path.name.startswith("LICENSE"):
        return False
    return path.parent != source or path.name not in _NOT_KEPT


def _write_backbone(
    files: TensorFiles,
    source: Path,
    target: Path,
    quantize: str,
    name: str,
    calibration: Sequence[str],
) -> Recipe:
    """Write config.json, weights and recipe, the last without a quality."""
    raw = read_json(source / "config.json")
    config = parse_config(raw)
    sizes, read = _quantized(files, source, config, quantize, calibration)
    stored = {tensor: files.stored(tensor).nbytes for tensor in files.names()}  # mapped, not read
    digests = {tensor: values for tensor, (values, _) in files.digests().items()}
    save_shards(
        target,
        {**stored, **sizes},
        lambda tensor: read(tensor) if tensor in sizes else files.stored(tensor).contiguous(),
    )
    config_json: dict[str, Any] = {**raw, "quantization_config": _QUANTIZATION_CONFIG[quantize]}
    (target / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
    recipe = Recipe(quantize, name, digests, files.samples(config))
    recipe.write(target)
    return recipe


def _quantized(
    files: TensorFiles,
    source: Path,
    config: BackboneConfig,
    quantize: str,
    calibration: Sequence[str],
) -> tuple[dict[str, int], Callable[[str], Tensor]]:
    """Bytes of the tensors that a copy has of its own, by name, and what reads them."""
    if quantize == INT8:
        tensors = int8_tensors(load_backbone(source, quantize=INT8, calibration=calibration))
        return {name: tensor.nbytes for name, tensor in tensors.items()}, tensors.__getitem__
    shapes = {f"{linear}.weight": shape for linear, shape in linear_sizes(config).items()}
    if quantize in GROUP_BITS:
        blocks = {
            name: group_blocks_shape(shape, GROUP_BITS[quantize]) for name, shape in shapes.items()
        }
        sizes = {name: int(np.prod(shape)) for name, shape in blocks.items()}
        return sizes, lambda name: files.groups(name, shapes[name], quantize)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    scales = {scale_name(name): name for name in shapes}
    sizes |= {scale: 4 * shapes[name][0] for scale, name in scales.items()}

    def read(name: str) -> Tensor:
        weight = scales.get(name, name)
        q, scale = files.fp8(weight, shapes[weight])
        return scale if name in scales else q.view(fp8_stored_shape(shapes[weight]))

    return sizes, read


def _quality(
    original: Path, copy: Path, texts: Sequence[str], device: str | torch.device | None
) -> dict[str, Any]:
    """How near the embeddings of a copy are to those of its original."""
    truth, vectors = (
        np.asarray(load(path, device=device, dtype="float32").encode(list(texts)))
        for path in (original, copy)
    )
    cosines = centred_cosine(vectors, truth)
    return {
        "texts": len(texts),
        "centred_cosine_mean": round(float(cosines.mean()), 5),
        "centred_cosine_min": round(float(cosines.min()), 5),
    }
