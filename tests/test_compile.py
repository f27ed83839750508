"""Every kernel becomes machine code for Ampere and Hopper, on a machine without either."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[1]
# More than this a thread, and the compiler has started to keep the working set in memory.
ALLOWED_SPILLS = 0


@pytest.fixture(
    scope="module", params=["--quick", pytest.param(None, id="all", marks=pytest.mark.slow)]
)
def triton_report(made_once, request):
    """bench/kernels/compile.py in a process of its own: here Triton is its interpreter.

    Every size and tile, which takes minutes, is compiled in the slow run.
    """

    def report(folder):
        target = folder / "report.json"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        script = [sys.executable, str(ROOT / "bench/kernels/compile.py"), "--json", str(target)]
        script += [request.param] if request.param else []
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(target.read_text())["rows"]

    return made_once(f"triton{request.param or ''}", report)


def test_every_triton_kernel_compiles_for_both_architectures(triton_report):
    sources = list((ROOT / "kernels").glob("*/triton_*.py"))
    launched = {
        (path.parent.name, kernel.strip("_"))
        for path in sources
        for kernel in re.findall(r"gpu\.launch(?:_tiled|_rows)?\(\s*(\w+)", path.read_text())
    }
    assert launched
    for architecture in (80, 90):
        compiled = {(r["op"], r["kernel"]) for r in triton_report if r["sm"] == architecture}
        assert compiled == launched


def test_no_triton_kernel_spills_in_half_precision(triton_report):
    """Float32 attention may: it has no tensor cores to feed, and exists for exactness."""
    spilling = [
        f"{r['op']} {r['case']} {r['kernel']} sm_{r['sm']}: {r['spilled_bytes']} bytes"
        for r in triton_report
        if r["spilled_bytes"] > ALLOWED_SPILLS and "fp32" not in r["case"]
    ]
    assert not spilling, "\n".join(spilling)


def test_two_programs_of_a_short_tile_fit_a_multiprocessor(triton_report):
    # A prefix that goes first meets all rows as one text, which is long.
    short = [
        r
        for r in triton_report
        if "short" in r["case"] and "prefix first" not in r["case"] and "BLOCK_K" in r
    ]
    assert short
    assert not [r for r in short if r["programs"] < 2]


def nvidia_tool(name):
    """A tool of the CUDA toolkit, which Triton's wheel also carries."""
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return shutil.which(name) or str(bundled)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a CUDA file; threads: the most of a block that it may be launched with."""

    where: str
    registers: int
    spilled_bytes: int
    threads: int
    code: str


def compile_cuda(source, architecture, folder):
    """Each kernel of a CUDA file, as compiler and disassembler describe it."""
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    command = ["nvcc", "-cubin", f"-arch={architecture}", "-std=c++20", "-O3", "-I", ROOT / "csrc"]
    done = subprocess.run(
        [*command, "-Xptxas", "-v", source, "-o", cubin],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, elf = (
        subprocess.run([*tool, cubin], capture_output=True, text=True, check=True).stdout
        for tool in ([nvidia_tool("nvdisasm"), "-c"], [nvidia_tool("cuobjdump"), "-elf"])
    )
    functions = dict(f.split(":", 1) for f in re.split(r"\n\.text\.", code)[1:])
    threads = dict(
        re.findall(r"^\.nv\.info\.(\S+)\n(?:(?!^\.).*\n)*?.*MAX_THREADS\n.*\n.*?(0x\w+)", elf, re.M)
    )
    resources = re.findall(
        r"entry function '(\S+)'[\s\S]*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r"[\s\S]*?Used (\d+) registers",
        done.stderr,
    )
    return [
        Kernel(
            where=f"{source.name} {architecture} {name}",
            registers=int(registers),
            spilled_bytes=int(stores) + int(loads),
            threads=int(threads.get(name, "0"), 16),
            code=functions[name],
        )
        for name, stores, loads, registers in resources
    ]


@pytest.fixture(scope="module", params=["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)])
def cuda_kernels(made_once, request):
    """The kernels of each CUDA file. For one architecture; the build compiles them for both."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    assert sources

    def kernels(folder):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            files = list(pool.map(lambda path: compile_cuda(path, request.param, folder), sources))
        assert all(files)
        return [[asdict(kernel) for kernel in file] for file in files]

    made = made_once(f"cuda-{request.param}", kernels)
    return [[Kernel(**kernel) for kernel in file] for file in made]


def test_every_cuda_kernel_compiles_without_spills_and_moves_16_bytes(cuda_kernels):
    for kernels in cuda_kernels:
        assert not [kernel.where for kernel in kernels if kernel.spilled_bytes]
        wide = [k for k in kernels if "LDG.E.128" in k.code and "STG.E.128" in k.code]
        # Of each kernel, the instances for aligned rows; width 1 serves the rest.
        assert len(wide) >= max(1, len(kernels) // 3), f"{kernels[0].where}: {len(wide)}"


def test_every_cuda_kernel_has_registers_for_the_largest_block_it_is_launched_with(cuda_kernels):
    """A multiprocessor has 65,536; a warp takes them 256 at a time, so 8 a thread."""
    for kernel in chain.from_iterable(cuda_kernels):
        assert 32 <= kernel.threads <= 1024, f"{kernel.where} has no launch bounds"
        assert -(-kernel.registers // 8) * 8 * kernel.threads <= 65536, kernel.where


def test_no_cuda_row_kernel_drops_nan_from_a_maximum(cuda_kernels):
    """FMNMX returns the other operand."""
    norms = [k for k in chain.from_iterable(cuda_kernels) if k.where.startswith("norm")]
    assert norms
    assert not [kernel.where for kernel in norms if re.search(r"FMNMX3?(?!\S*NAN)", kernel.code)]
