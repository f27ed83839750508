"""Every kernel becomes machine code for Ampere and Hopper, on a machine without either."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[1]
# More than this a thread, and the compiler has started to keep the working set in memory.
ALLOWED_SPILLS = 0


@pytest.fixture(scope="module")
def triton_report(tmp_path_factory):
    """bench/kernels/compile.py in a process of its own: here Triton is its interpreter."""
    target = tmp_path_factory.mktemp("compile") / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, str(ROOT / "bench/kernels/compile.py"), "--json", str(target)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(target.read_text())["rows"]


def test_every_triton_kernel_compiles_for_both_architectures(triton_report):
    sources = list((ROOT / "kernels").glob("*/triton_*.py"))
    launched = {
        (path.parent.name, kernel.strip("_"))
        for path in sources
        for kernel in re.findall(r"gpu\.launch(?:_tiled)?\(\s*\*?\(?\s*(\w+)", path.read_text())
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


def nvidia_tool(name):
    """A tool of the CUDA toolkit, which Triton's wheel also carries."""
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return shutil.which(name) or str(bundled)


def compile_cuda(source, architecture, folder):
    """The resources of each kernel of a CUDA file, and its disassembly."""
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    command = ["nvcc", "-cubin", f"-arch={architecture}", "-std=c++20", "-O3", "-I", ROOT / "csrc"]
    done = subprocess.run(
        [*command, "-Xptxas", "-v", source, "-o", cubin],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code = subprocess.run(
        [nvidia_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    return done.stderr, code


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_every_cuda_kernel_compiles_without_spills_and_moves_16_bytes(tmp_path):
    jobs = [
        (source, architecture)
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
        for architecture in ("sm_80", "sm_90a")
    ]
    assert jobs
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compile_cuda(*job, tmp_path), jobs))
    for (source, architecture), (resources, code) in zip(jobs, results, strict=True):
        where = f"{source.name} {architecture}"
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", resources)
        assert spills, where
        assert not any(map(int, spills)), f"{where}: {resources}"
        functions = re.split(r"\n\.text\.", code)[1:]
        wide = [f for f in functions if "LDG.E.128" in f and "STG.E.128" in f]
        assert wide, f"{where}: no kernel loads and stores 16 bytes at a time"
        # Of each kernel, the instances for aligned rows; width 1 serves the rest.
        assert len(wide) >= len(functions) // 3, f"{where}: {len(wide)} of {len(functions)}"
