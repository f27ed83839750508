"""The CUDA kernels, compiled for the CPU with host_cuda.h: against float64, under sanitizers."""

import ctypes
import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

from gen_fast.ops.norm.reference import add_rms_norm, add_rms_norm_quantized
from gen_fast.ops.pool.reference import pool
from gen_fast.testing import assert_no_worse, check_quantized

ROOT = Path(__file__).parents[2]
COMPILER = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
FLAGS = [
    *("-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing"),
    *("-DGEN_FAST_HOST_CUDA", "-Icsrc", "-Itests/native"),
]
SANITIZERS = {"races": "thread", "addresses": "address,alignment"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EPS = 1e-5
GUARD = 48  # bytes on each side of a buffer, at least


pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="needs a C++ compiler")


def compiled(output: Path, *arguments: str) -> str:
    """The kernels with the source in `arguments`, as one: most of each is the standard library."""
    kernels = sorted(str(path) for path in ROOT.glob("csrc/cuda/*.cu"))
    included = [part for path in kernels for part in ("-include", path)]
    command = [*COMPILER, *FLAGS, *included, *arguments, "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(output)


@pytest.fixture(scope="session")
def host(made_once) -> Any:
    """csrc/cuda_module.cpp with the kernels, as a module of Python's."""

    def make(folder: Path) -> str:
        headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        return compiled(library, "-shared", "-fPIC", *headers, "csrc/cuda_module.cpp")

    path = made_once("host_cuda", make)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert fill_shared_memory_with_nan(path) > 0
    return module


def fill_shared_memory_with_nan(path: str) -> int:
    """Before every block, which finds no other block's there. Returns how many arrays there are."""
    library = ctypes.CDLL(path)
    symbols = subprocess.run(["nm", "-S", path], capture_output=True, text=True, check=True).stdout
    arrays = 0
    for line in symbols.splitlines():
        if " _ZZN8gen_fast4cuda" in line:  # a static variable of one of our functions
            _, size, _, name = line.split()
            array = (ctypes.c_char * int(size, 16)).in_dll(library, name)
            library.host_cuda_shared_memory(ctypes.byref(array), ctypes.c_size_t(len(array)))
            arrays += 1
    return arrays


class Memory:
    """Buffers between guards, aligned as little as the kernels allow: to 16 bytes, not to 32.

    Beyond an input is NaN. An output is NaN, or -1, until it is written.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []  # bytes, and what they have to be

    def _place(self, shape: tuple[int, ...], dtype: torch.dtype, guard: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        whole = torch.full((size + 2 * GUARD + 32,), guard, dtype=torch.uint8)
        begin = GUARD + (16 - whole.data_ptr() - GUARD) % 32
        inside = slice(begin, begin + size)
        whole[inside] = 0xFF
        self._kept += [(x, x.clone()) for x in (whole[:begin], whole[begin + size :])]
        return whole[inside].view(dtype).view(shape)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._place(shape, dtype, 0xA5)

    def input(self, values: Tensor) -> Tensor:
        data = self._place(tuple(values.shape), values.dtype, 0xFF).copy_(values)
        as_bytes = data.view(-1).view(torch.uint8)
        self._kept.append((as_bytes, as_bytes.clone()))
        return data

    def inout(self, values: Tensor) -> Tensor:
        return self._place(tuple(values.shape), values.dtype, 0xA5).copy_(values)

    def check(self) -> None:
        for now, before in self._kept:
            assert torch.equal(now, before)


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Whose guards and inputs are as they were at the end of the test."""
    memory = Memory()
    yield memory
    memory.check()


def run_norm(host, memory, x, residual, weight, store="plain", inplace=False):
    rows, size = x.shape
    total = memory.inout(residual) if inplace else memory.empty(rows, size, dtype=x.dtype)
    stored = {"plain": x.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[store]
    out = memory.empty(rows, size, dtype=stored)
    scales = memory.empty(rows, dtype=torch.float32)
    host.add_rms_norm(
        x.dtype,
        host.Store.__members__[store],
        memory.input(x),
        total if inplace else memory.input(residual),
        memory.input(weight),
        total,
        out,
        None if store == "plain" else scales,
        rows,
        size,
        EPS,
        0,
    )
    return out, scales, total


def norm_inputs(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, residual = torch.randn(2, rows, size).to(dtype)
    return x, residual, torch.randn(size).to(dtype)


def sizes(dtype: torch.dtype) -> list[int]:
    """Of rows that take 1, 2 and 4 accesses a thread, and more: of one element, and of 16 bytes."""
    width = 16 // dtype.itemsize
    return [1, 77, 257, 601, 2049, *(width * count for count in (1, 77, 257, 601, 2049))]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_norm_matches_float64(dtype, inplace, host, memory):
    for size in sizes(dtype):
        inputs = norm_inputs(2, size, dtype)
        out, scales, total = run_norm(host, memory, *inputs, inplace=inplace)
        exact = add_rms_norm(*(x.double() for x in inputs), EPS)
        plain = add_rms_norm(*inputs, EPS)
        assert_no_worse(out, plain[0], exact[0])
        assert_no_worse(total, plain[1], exact[1])
        assert scales.isnan().all()


@pytest.mark.parametrize("store", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_quantised_rows_are_those_of_the_reference(dtype, store, host, memory):
    for size in sizes(dtype):
        inputs = norm_inputs(2, size, dtype)
        out, scales, total = run_norm(host, memory, *inputs, store)
        expected, *rest = add_rms_norm_quantized(*inputs, EPS, store)
        codes = (x.view(torch.int8) for x in (out, expected))  # neighbours in fp8 differ by 1
        check_quantized(*zip(codes, ((scales, total), rest), strict=True))
        normed, _ = add_rms_norm(*(x.double() for x in inputs), EPS)
        step = scales.double()[:, None] * (16.1 if store == "fp8" else 0.51)
        error = (out.double() * scales.double()[:, None] - normed).abs()
        assert (error <= step + 0.02 * normed.abs()).all()  # the norm is of the rounded sum


@pytest.mark.parametrize("store", ["plain", "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [77, 2049])
def test_nan_stays_in_its_row(size, dtype, store, host, memory):
    x, residual, weight = norm_inputs(3, size, dtype)
    x[1, size // 2] = torch.nan
    out, scales, total = run_norm(host, memory, x, residual, weight, store)
    assert total.isnan().sum(1).tolist() == [0, 1, 0]
    if store != "plain":
        assert scales.isnan().tolist() == [False, True, False]
    else:
        assert out.isnan().sum(1).tolist() == [0, size, 0]
    # A weight's: then the norm of all rows but one element is a number.
    x[1], weight[7] = 1.0, torch.nan
    out, scales, _ = run_norm(host, memory, x, residual, weight, store)
    if store != "plain":
        assert scales.isnan().all()
    else:
        assert (out.isnan().nonzero()[:, 1] == 7).all()


@pytest.mark.parametrize("store", ["plain", "int8", "fp8"])
def test_rows_of_zeros(store, host, memory):
    out, scales, total = run_norm(host, memory, *torch.zeros(2, 2, 65), torch.ones(65), store)
    assert not out.float().any()
    assert not total.any()
    assert store == "plain" or not scales.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_as_torch_rounds_them(dtype, host, memory):
    """Of every value of the type and another: what the kernels read and write, bit by bit."""
    codes = torch.arange(2**16).to(torch.int32)
    x, residual = ((codes * step & 0xFFFF).short().view(dtype) for step in (1, 40_503))
    x, residual = x.view(32, -1), residual.view(32, -1)
    _, _, total = run_norm(host, memory, x, residual, torch.ones(2048).to(dtype))
    expected = x + residual
    assert torch.equal(total.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(total[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_pool_matches_float64(weighted, dtype, host, memory):
    for size in sizes(dtype):
        starts = [0, 1, 4, 4, 6]
        torch.manual_seed(0)
        hidden, norm_weight = torch.randn(6, size).to(dtype), torch.randn(size).to(dtype)
        weights = torch.rand(6) if weighted else None
        out = run_pool(host, memory, hidden, starts, norm_weight, weights)
        cu_seqlens = torch.tensor(starts)
        wide = None if weights is None else weights.double()
        exact = pool(hidden.double(), cu_seqlens, norm_weight.double(), EPS, wide)
        plain = pool(hidden, cu_seqlens, norm_weight, EPS, weights)
        kept = torch.tensor([0, 1, 3])
        assert_no_worse(out[kept], plain[kept], exact[kept])
        assert out[2].isnan().all()  # the mean of no rows


@pytest.mark.parametrize("size", [77, 600, 2049])
def test_nan_stays_in_its_text(size, host, memory):
    hidden = torch.ones(4, size)
    hidden[1, size - 1] = torch.nan
    out = run_pool(host, memory, hidden, [0, 1, 3, 4], torch.ones(size), None)
    assert out.isnan().sum(1).tolist() == [0, size, 0]


def run_pool(host, memory, hidden, starts, norm_weight, weights):
    size = hidden.shape[1]
    out = memory.empty(len(starts) - 1, size, dtype=torch.float32)
    host.pool(
        hidden.dtype,
        memory.input(hidden),
        memory.input(torch.tensor(starts).int()),
        memory.input(norm_weight),
        None if weights is None else memory.input(weights),
        out,
        len(starts) - 1,
        size,
        EPS,
        0,
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("with_special", [False, True])
def test_append_copies_rows(with_special, dtype, host, memory):
    for size in (1, 5, 64, 130, 576):
        for ids in ([6], [6, 0, 7, 9, 8, 1, 9, 2], [6, 0, 7, 9, 8, -1, 10, 1, 1 << 40]):
            rows = torch.randn(10, size).to(dtype)
            table, special = rows[:7], rows[7:] if with_special else None
            out = memory.empty(len(ids), size, dtype=dtype)
            host.append(
                memory.input(table),
                None if special is None else memory.input(special),
                memory.input(torch.tensor(ids)),
                out,
                len(ids),
                7,
                0 if special is None else 3,
                size * dtype.itemsize,
                0,
            )
            known = range(10 if with_special else 7)
            expected = [rows[i] if i in known else torch.zeros(size).to(dtype) for i in ids]
            assert torch.equal(out, torch.stack(expected))


def test_no_rows_are_an_error_of_the_launch(host, memory):
    """As on a GPU, where a launch needs a block. The ops do not launch then."""
    with pytest.raises(RuntimeError, match="invalid configuration"):
        run_norm(host, memory, *torch.empty(2, 0, 48), torch.ones(48))
    with pytest.raises(RuntimeError, match="invalid configuration"):
        run_pool(host, memory, torch.empty(0, 48), [0], torch.ones(48), None)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        host.append(*[memory.empty(2, dtype=torch.int64)] * 4, 0, 7, 3, 16, 0)


# A host thread for each of a block's, watched by ThreadSanitizer, takes half of this file's time.
RACES = pytest.param("races", marks=pytest.mark.slow)


@pytest.fixture(scope="session", params=[RACES, "addresses"])
def sanitized(request, made_once) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs host_cuda_main.cpp under a sanitizer."""
    flags = [f"-fsanitize={SANITIZERS[request.param]}", "-fno-sanitize-recover=all", "-g1", "-O0"]
    program = made_once(
        f"host_cuda_{request.param}",
        lambda folder: compiled(folder / "main", *flags, "tests/native/host_cuda_main.cpp"),
    )

    def run(*fault: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *fault], capture_output=True, text=True, check=False)

    return run


def test_sanitizers_find_nothing(sanitized):
    for fault in ((), ("none",)):
        done = sanitized(*fault)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("sanitized", "fault", "message"),
    [
        pytest.param("races", "race", "ThreadSanitizer: data race", marks=pytest.mark.slow),
        pytest.param(
            "races", "race within a warp", "ThreadSanitizer: data race", marks=pytest.mark.slow
        ),
        ("addresses", "overrun", "heap-buffer-overflow"),
        ("addresses", "overrun of shared memory", "global-buffer-overflow"),
        ("addresses", "misaligned", "misaligned address"),
        ("addresses", "divergent barrier", "host_cuda: threads wait at different places"),
        ("addresses", "barrier of one warp", "host_cuda: threads wait at different places"),
        ("addresses", "divergent shuffle", "host_cuda: threads wait at different places"),
        ("addresses", "part of a warp", "host_cuda: a block must have whole warps"),
        ("addresses", "no blocks", "host_cuda: invalid configuration"),
    ],
    indirect=["sanitized"],
)
def test_a_fault_is_found(sanitized, fault, message):
    done = sanitized(fault)
    assert done.returncode not in (0, 2)
    assert message in done.stderr
