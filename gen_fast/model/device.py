"""What a device computes with, and how fast its matrix products are."""

import os
import platform
import time
from collections.abc import Sequence

import torch

from gen_fast.errors import ConfigError
from gen_fast.io.cpuinfo import cpuinfo
from gen_fast.model.choices import DTYPES, SHORT_DTYPES
from gen_fast.model.linear import linear, pack


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of a name; None takes CUDA if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Turn a dtype's name into a torch.dtype; "auto" asks the device."""
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    elif dtype == "auto":
        name = "bfloat16" if has_native_bfloat16(device) else "float32"
    else:
        name = dtype
    name = SHORT_DTYPES.get(name, name)
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def make_current(device: str | torch.device) -> None:
    """Make a GPU that is named by its number this process' current one; nothing for others.

    What names no device, pinned memory for one, else opens a context on the first GPU too: some
    hundred megabytes of each process beside the one whose GPU that is.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def device_of_rank(rank: int, devices: Sequence[str]) -> str:
    """The device of the process that torchrun has started as `rank` of this machine.

    A GPU each; a CPU is shared. Raises ConfigError for more processes than GPUs: two on one GPU
    would take the memory from each other.
    """
    if torch.device(devices[0]).type != "cuda":
        return devices[rank % len(devices)]
    if rank >= len(devices):
        raise ConfigError(
            f"torchrun has started process {rank + 1} of this machine, which has {len(devices)} "
            f"GPUs for it: start one a GPU, --nproc-per-node {len(devices)}"
        )
    return devices[rank]


def has_native_bfloat16(device: torch.device) -> bool:
    """True if the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # AVX512-BF16 or AMX on x86, BF16 instructions on Arm; oneDNN decides, as for the matmuls.
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (
        torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu.get_capabilities().get("bf16", False)
    )


def cpus() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model, or where that is not told its architecture."""
    return cpuinfo("model name") or platform.machine()


def matmul_peak(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP/s of a square matrix product, the best of five: the peak that an MFU is a share of.

    The best of fewer where these take more than a second.
    The weight is packed where the backbone's are, so that no product is faster than the peak.
    """
    size = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    b = pack(b)
    best, first = float("inf"), time.perf_counter()
    for _ in range(5):
        if time.perf_counter() - first > 1:
            break
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        start = time.perf_counter()
        linear(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
