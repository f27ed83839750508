"""Maps kernels/<op> to gen_fast.ops.<op> and builds the optional C++ extension.

GEN_FAST_BUILD=auto  build the extension if a C++ compiler works, else install without it (default)
GEN_FAST_BUILD=cpu   build it, and fail if it cannot be built
GEN_FAST_BUILD=none  pure Python
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
BUILD = os.environ.get("GEN_FAST_BUILD", "auto")
if BUILD not in {"auto", "cpu", "none"}:
    sys.exit(f"GEN_FAST_BUILD must be auto, cpu or none, not {BUILD!r}")

OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))


def cpp_extension() -> Extension:
    import pybind11

    sources = [
        "csrc/module.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
    ]
    return Extension(
        "gen_fast._C",
        sources=sources,
        include_dirs=["csrc", pybind11.get_include()],
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/common/*.h")],
        language="c++",
        extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-fopenmp", "-Wall"],
        extra_link_args=["-fopenmp"],
        # With "auto" setuptools reports a failed compile as a warning and installs the rest.
        optional=BUILD == "auto",
    )


setup(
    packages=[
        *find_packages(include=["gen_fast", "gen_fast.*"]),
        *(f"gen_fast.ops.{op}" for op in OPS),
    ],
    package_dir={f"gen_fast.ops.{op}": f"kernels/{op}" for op in OPS},
    package_data={"gen_fast": ["py.typed"]},
    ext_modules=[] if BUILD == "none" else [cpp_extension()],
)
