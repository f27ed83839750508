"""The compiled C++ ops (gen_fast._C), if this installation has them.

torch is imported first, so that both use the one OpenMP runtime that torch brings.
"""

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def module() -> Any:
    """gen_fast._C. Raises ModuleNotFoundError where `missing` says why."""
    return importlib.import_module("gen_fast._C")


def missing() -> str | None:
    """Why the C++ ops cannot run here, or None."""
    if importlib.util.find_spec("gen_fast._C") is None:
        return "is not built; reinstall with GEN_FAST_BUILD=cpu"
    return None


# What every C++ op takes: arguments of Op.register.
ON_CPU: dict[str, Any] = {
    "devices": ("cpu",),
    "dtypes": (torch.float32, torch.bfloat16),
    "differentiable": False,
    "missing": missing,
}


def address(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
