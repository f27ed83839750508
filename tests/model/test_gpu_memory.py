"""Weights that do not fit a GPU are refused before they are read; the GPU here is a number."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gen_fast
from gen_fast.errors import DeviceMemoryError
from gen_fast.model.choices import GROUP_BITS, QUANTIZED
from gen_fast.model.config import parse_config
from gen_fast.model.memory import weight_bytes
from gen_fast.model.model_files import read_json
from gen_fast.model.tensor_files import TensorFiles
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.testing import WHOLE_BLOCKS, save_tiny_model


def tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_of(getattr(value, name))


@pytest.mark.parametrize("quantize", [None, *QUANTIZED])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bytes_are_those_of_the_loaded_weights(family, quantize, tmp_path, fp8_by_the_reference):
    save_tiny_model(tmp_path, family, **WHOLE_BLOCKS)
    backbone = load_backbone(tmp_path, dtype=torch.bfloat16, quantize=quantize)
    tensors = tensors_of((backbone.embedding, backbone.layers, backbone.final_norm))
    config = parse_config(read_json(tmp_path / "config.json"))
    assert sum(weight_bytes(config, torch.bfloat16, quantize).values()) == sum(
        x.nbytes for x in tensors
    )


@pytest.fixture
def gpu_memory(monkeypatch):
    """gpu_memory(free): a GPU of 16 GB, of which so many bytes are free; nothing can be read."""

    def set_free(free: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 300, 16 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 700)

    return set_free


class ReadError(Exception):
    pass


@pytest.mark.parametrize("quantize", [None, *GROUP_BITS])
def test_a_model_larger_than_the_free_memory_is_refused_before_it_is_read(
    quantize, tmp_path, gpu_memory, monkeypatch
):
    save_tiny_model(tmp_path, "llama", **WHOLE_BLOCKS)

    def refuse(*_):
        raise ReadError

    monkeypatch.setattr(TensorFiles, "stored", refuse)
    config = parse_config(read_json(tmp_path / "config.json"))
    needed = sum(weight_bytes(config, torch.float16, quantize).values())
    options = {"device": "cuda", "dtype": torch.float16, "quantize": quantize}
    gpu_memory(needed)
    with pytest.raises(ReadError):  # it fits, and so is read
        load_backbone(tmp_path, **options)
    gpu_memory(needed - 1)
    with pytest.raises(DeviceMemoryError, match=r"takes 0\.00 GB .* of the 16\.00 GB of cuda 0\.0"):
        load_backbone(tmp_path, **options)


def test_the_error_has_the_numbers(tmp_path, gpu_memory, monkeypatch):
    save_tiny_model(tmp_path, "llama", **WHOLE_BLOCKS)
    sizes = {"bfloat16": 1_250_000_000, "int4": 5_000_000_000}
    monkeypatch.setattr("gen_fast.model.weights.weight_bytes", lambda *_: sizes)
    gpu_memory(4_000_000_000)
    with pytest.raises(
        DeviceMemoryError,
        match=r"takes 6\.25 GB \(1\.25 GB bfloat16, 5\.00 GB int4\), and of the 16\.00 GB of cuda:1"
        r" 4\.00 GB are free",
    ):
        gen_fast.load(tmp_path, device="cuda:1", dtype="bfloat16", method="mean")


def test_int8_is_measured_in_float32(tmp_path, gpu_memory):
    save_tiny_model(tmp_path, "llama", **WHOLE_BLOCKS)
    gpu_memory(1000)
    with pytest.raises(DeviceMemoryError, match="is measured in float32 before it becomes int8"):
        load_backbone(tmp_path, device="cuda", quantize="int8")


def test_a_head_of_its_own_must_fit_too(tmp_path, gpu_memory, monkeypatch):
    save_tiny_model(tmp_path, "llama")
    backbone = load_backbone(tmp_path)
    monkeypatch.setattr(type(backbone), "device", torch.device("cuda"))
    gpu_memory(1000)
    with pytest.raises(DeviceMemoryError, match="the head of"):
        load_head(tmp_path, backbone)
