"""Maps kernels/<op> to gen_fast.ops.<op> and builds the optional compiled extensions.

GEN_FAST_BUILD=auto      build the C++ ops if a compiler works, and the CUDA ops if there is nvcc;
                         else install without them (default)
GEN_FAST_BUILD=auto-cpu  the same, without the CUDA ops
GEN_FAST_BUILD=cpu       build the C++ ops, and fail if they cannot be built
GEN_FAST_BUILD=cuda      build both, and fail if one cannot be built; a GPU is not needed
GEN_FAST_BUILD=none      pure Python

`make emulated` builds with GEN_FAST_BUILD=emulated: C++ ops whose AVX-512 and AMX versions run on
AVX2, for tests alone. It cannot be installed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
BUILD = os.environ.get("GEN_FAST_BUILD", "auto")
if BUILD not in {"auto", "auto-cpu", "cpu", "cuda", "none", "emulated"}:
    sys.exit(f"GEN_FAST_BUILD must be auto, auto-cpu, cpu, cuda or none, not {BUILD!r}")
if BUILD == "emulated" and "--build-lib" not in sys.argv:  # nor in place
    sys.exit("GEN_FAST_BUILD=emulated is for `make emulated`, not to be installed")

OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
# -g0: Python's own flags may ask for debug information, which takes a fifth of the time.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall"]
# -O1: compiling takes most of the time. Wide vectors stay in a file, so their ABI does not matter.
EMULATED = ["-DGEN_FAST_EMULATED", "-Itests/native", "-O1", "-Wno-psabi"]
# Machine code for Ampere and Hopper; newer GPUs translate the PTX when they load it.
ARCHITECTURES = [
    "-gencode",
    "arch=compute_80,code=[sm_80,compute_80]",
    "-gencode",
    "arch=compute_90a,code=sm_90a",
]


def nvcc() -> str | None:
    """$CUDA_HOME's, else the PATH's, else that of the folder the toolkit is installed in."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def files(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


@dataclass(frozen=True)
class Compilation:
    """A source, the command that compiles it, and what that writes: object and list of headers."""

    source: str
    object: str
    headers: str
    command: tuple[str, ...]


class BuildExtensions(build_ext):
    """Compiles with ninja: as many sources at once as there are cores, and what has changed."""

    def build_extension(self, ext: Extension) -> None:
        # Not in setuptools' own folder, which an editable install makes anew each time.
        kind = "-emulated" if BUILD == "emulated" else ""
        name = f"{sysconfig.get_platform()}-{sys.version_info[1]}{kind}"
        folder = Path("build", "objects", name)
        # Not by -I: where pybind11 lies changes from install to install, and ninja would take that
        # for another command. Its version is in extra_compile_args.
        paths = [*self.include_dirs, *ext.include_dirs, os.environ.get("CPLUS_INCLUDE_PATH")]
        os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join(filter(None, paths))
        compilations = [self._compilation(ext, source, folder) for source in ext.sources]
        compile_all(compilations, folder / f"{ext.name}.ninja")
        ext.sources = []
        ext.extra_objects = ext.depends = [one.object for one in compilations]
        if any(one.source.endswith(".cu") for one in compilations):
            ext.library_dirs.append(cuda_library_folder())
        super().build_extension(ext)

    def _cxx(self) -> list[str]:
        # Before setuptools 72 one compiler was for C and C++; Microsoft's is called otherwise.
        for name in ("compiler_so_cxx", "compiler_so"):
            if hasattr(self.compiler, name):
                return getattr(self.compiler, name)
        raise CompileError("the ops need a compiler with the options of GCC")

    def _compilation(self, ext: Extension, source: str, folder: Path) -> Compilation:
        target = str(folder / f"{source}.o")
        headers = f"{target}.d"
        if source.endswith(".cu"):
            command = [str(nvcc()), "-std=c++20", "-O3", *ARCHITECTURES]
            command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc", "-MD", "-MF", headers]
        else:
            command = [*self._cxx(), *ext.extra_compile_args, "-Icsrc"]
            command += ["-MMD", "-MF", headers]  # our headers: pybind11 lies elsewhere next time
        return Compilation(source, target, headers, (*command, "-c", source, "-o", target))


def compile_all(compilations: list[Compilation], file: Path) -> None:
    """Run ninja, or without one every command. Raises CompileError."""
    for one in compilations:
        Path(one.object).parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja")
    if ninja is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = any(list(pool.map(lambda one: call(one.command), compilations)))
    else:
        rules = [
            f"builddir = {file.with_suffix('')}",
            "rule compile",
            " command = $cmd",
            " depfile = $headers",
            " deps = gcc",
        ]
        for one in compilations:
            command = shlex.join(one.command).replace("$", "$$")
            rules += [f"build {one.object}: compile {one.source}", f" cmd = {command}"]
            rules.append(f" headers = {one.headers}")
        file.write_text("\n".join(rules) + "\n")
        failed = call([ninja, "-f", str(file)])
    if failed:
        raise CompileError(f"command {compilations[0].command[0]!r} failed, see above")


def call(command: Sequence[str]) -> bool:
    """Run a command; whether it failed."""
    try:
        return subprocess.call(command) != 0
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from error


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

    flags = [*FLAGS, f"-DGEN_FAST_PYBIND11={pybind11.__version__}"]
    shared = {
        "include_dirs": [pybind11.get_include()],
        "language": "c++",
        # With "auto" setuptools reports a failed compile as a warning and installs the rest.
        "optional": BUILD.startswith("auto"),
    }
    cpu = Extension(
        "gen_fast._C",
        # The largest first: with few cores nothing waits for them at the end.
        sources=["csrc/module.cpp", *sorted(files("csrc/cpu/*.cpp"), key=size, reverse=True)],
        extra_compile_args=["-std=c++17", "-fopenmp", *flags],
        extra_link_args=["-fopenmp"],
        **shared,
    )
    if BUILD == "emulated":
        cpu.extra_compile_args += EMULATED
        intrinsics = Extension(
            "gen_fast._intrinsics",
            sources=["tests/native/intrinsics.cpp"],
            extra_compile_args=cpu.extra_compile_args,
            **shared,
        )
        return [cpu, intrinsics]
    if BUILD in ("cpu", "auto-cpu") or (BUILD == "auto" and nvcc() is None):
        return [cpu]
    if nvcc() is None:
        sys.exit("GEN_FAST_BUILD=cuda needs nvcc: on the PATH, in $CUDA_HOME or in /usr/local/cuda")
    cuda = Extension(
        "gen_fast._cuda",
        sources=["csrc/cuda_module.cpp", *files("csrc/cuda/*.cu")],
        extra_compile_args=["-std=c++17", *flags],
        # Linked statically, so that the module imports on a machine without CUDA.
        libraries=["cudart_static", "rt", "pthread", "dl"],
        **shared,
    )
    return [cpu, cuda]


def size(source: str) -> int:
    return (ROOT / source).stat().st_size


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
    package_data={"gen_fast": ["py.typed", "adapters/*/*", "evaluate/*.yaml"]},
    ext_modules=[] if BUILD == "none" else extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
