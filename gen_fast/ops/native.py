"""The compiled ops, C++ (gen_fast._C) and CUDA (gen_fast._cuda), if this installation has them.

torch is imported first, so that both use the one OpenMP runtime that torch brings.
"""

import importlib
import importlib.util
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gen_fast.ops import Case, unsupported


class Isa(IntEnum):
    """What the C++ ops are compiled for, best last: Isa of csrc/common/parallel.h."""

    BASELINE = 0
    AVX2 = 1
    AVX2_VNNI = 2
    AVX512_VNNI = 3
    AVX512 = 4
    AMX = 5


_NAMES = {
    Isa.BASELINE: "baseline",
    Isa.AVX2: "AVX2",
    Isa.AVX2_VNNI: "AVX2 with VNNI",
    Isa.AVX512_VNNI: "AVX-512 with VNNI",
    Isa.AVX512: "AVX-512 with VNNI and bfloat16",
    Isa.AMX: "AVX-512 with VNNI, bfloat16 and AMX",
}


@cache
def module() -> Any:
    """gen_fast._C. Raises ModuleNotFoundError where `missing` says why."""
    return importlib.import_module("gen_fast._C")


@cache
def cuda_module() -> Any:
    """gen_fast._cuda. Raises ModuleNotFoundError where `cuda_missing` says why."""
    return importlib.import_module("gen_fast._cuda")


def missing() -> str | None:
    """Why the C++ ops cannot run here, or None."""
    if importlib.util.find_spec("gen_fast._C") is None:
        return "is not built; reinstall with GEN_FAST_BUILD=cpu"
    return None


def cuda_missing() -> str | None:
    """Why the CUDA ops cannot run here, or None."""
    if importlib.util.find_spec("gen_fast._cuda") is None:
        return "is not built; reinstall with GEN_FAST_BUILD=cuda where there is nvcc"
    return None


def isa() -> Isa:
    """The instruction set that the C++ ops, which must be built, run here."""
    return Isa(module().isa())


def instructions() -> str:
    """The instruction set that the C++ ops run here, or why they do not."""
    problem = missing()
    if problem is not None:
        return f"none: the C++ extension {problem}"
    name = _NAMES[isa()]
    if module().tiles_refused():
        return f"{name} (AMX is there, but the system refuses its tiles to this process)"
    return name


def cpp(case: Case) -> str | None:
    """Why a C++ op cannot compute `case`, or None."""
    return unsupported(case, "cpu", (torch.float32, torch.bfloat16)) or missing()


def cuda(case: Case) -> str | None:
    """Why a CUDA op cannot compute `case`, or None."""
    return (
        unsupported(case, "cuda", (torch.float32, torch.bfloat16, torch.float16)) or cuda_missing()
    )


def empty_like(tensor: Tensor) -> Tensor:
    """A contiguous tensor of the same shape and dtype; twice as fast as `new_empty`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def stream(tensor: Tensor) -> int:
    """The current CUDA stream of the tensor's device."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` contiguous and starting at a multiple of 16 bytes, as the CUDA ops read it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
