"""Maps kernels/<op> to gen_fast.ops.<op> and builds the optional compiled extensions.

GEN_FAST_BUILD=auto  build the C++ ops if a compiler works, and the CUDA ops if there is nvcc; else
                     install without them (default)
GEN_FAST_BUILD=cpu   build the C++ ops, and fail if they cannot be built
GEN_FAST_BUILD=cuda  build both, and fail if one cannot be built; a GPU is not needed
GEN_FAST_BUILD=none  pure Python
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
BUILD = os.environ.get("GEN_FAST_BUILD", "auto")
if BUILD not in {"auto", "cpu", "cuda", "none"}:
    sys.exit(f"GEN_FAST_BUILD must be auto, cpu, cuda or none, not {BUILD!r}")

OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
FLAGS = ["-O3", "-fvisibility=hidden", "-Wall"]
# Machine code for Ampere and Hopper; newer GPUs translate the PTX when they load it.
ARCHITECTURES = [
    *("-gencode", "arch=compute_80,code=[sm_80,compute_80]"),
    *("-gencode", "arch=compute_90a,code=sm_90a"),
]


def nvcc() -> str | None:
    """$CUDA_HOME's, else the PATH's, else that of the folder the toolkit is installed in."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def files(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


class BuildExtensions(build_ext):
    """Compiles .cu sources with nvcc, the rest the usual way, and as many at once as cores."""

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile

        def compile_at_once(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_all([source], **options), sources)
                return [path for paths in made for path in paths]

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        kernels = [source for source in ext.sources if source.endswith(".cu")]
        if kernels:
            ext.sources = [source for source in ext.sources if source not in kernels]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                ext.extra_objects = list(pool.map(self._compile_kernel, kernels))
            ext.library_dirs.append(cuda_library_folder())
        super().build_extension(ext)

    def _compile_kernel(self, source: str) -> str:
        target = Path(self.build_temp) / Path(source).with_suffix(".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc(), "-c", source, "-o", str(target), "-std=c++20", "-O3", "-Icsrc"]
        command += [*ARCHITECTURES, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        if subprocess.run(command, check=False).returncode:
            raise CompileError(f"nvcc could not compile {source}")
        return str(target)


def cuda_library_folder() -> str:
    """Where the CUDA runtime lies, asked of nvcc itself: it may be called through a wrapper."""
    done = subprocess.run(
        [nvcc(), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"TOP=(\S+)", done.stderr)
    folders = [Path(top[1]) / name for name in ("lib64", "lib")] if top else []
    found = [str(folder) for folder in folders if (folder / "libcudart_static.a").exists()]
    if not found:
        raise CompileError("libcudart_static.a is not beside nvcc")
    return found[0]


def extensions() -> list[Extension]:
    import pybind11

    shared = {
        "include_dirs": ["csrc", pybind11.get_include()],
        "language": "c++",
        # With "auto" setuptools reports a failed compile as a warning and installs the rest.
        "optional": BUILD == "auto",
    }
    cpu = Extension(
        "gen_fast._C",
        sources=["csrc/module.cpp", *files("csrc/cpu/*.cpp")],
        depends=files("csrc/common/*.h", "csrc/cpu/*.h"),
        extra_compile_args=["-std=c++17", "-fopenmp", *FLAGS],
        extra_link_args=["-fopenmp"],
        **shared,
    )
    if BUILD == "cpu" or (BUILD == "auto" and nvcc() is None):
        return [cpu]
    if nvcc() is None:
        sys.exit("GEN_FAST_BUILD=cuda needs nvcc: on the PATH, in $CUDA_HOME or in /usr/local/cuda")
    cuda = Extension(
        "gen_fast._cuda",
        sources=["csrc/cuda_module.cpp", *files("csrc/cuda/*.cu")],
        depends=files("csrc/cuda/*.h", "csrc/cuda/*.cuh"),
        extra_compile_args=["-std=c++17", *FLAGS],
        # Linked statically, so that the module imports on a machine without CUDA.
        libraries=["cudart_static", "rt", "pthread", "dl"],
        **shared,
    )
    return [cpu, cuda]


setup(
    packages=[
        *find_packages(include=["gen_fast", "gen_fast.*"]),
        *(f"gen_fast.ops.{op}" for op in OPS),
        "gen_fast.training",
    ],
    package_dir={
        **{f"gen_fast.ops.{op}": f"kernels/{op}" for op in OPS},
        "gen_fast.training": "training",
    },
    package_data={"gen_fast": ["py.typed", "adapters/*/*"]},
    ext_modules=[] if BUILD == "none" else extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
