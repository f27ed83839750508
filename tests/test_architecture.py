"""Which room may import from which: arrows point one way, and there are no circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import from those before it; within a room there may be no circle.
ORDER = (
    "version",
    "errors",
    "io",
    "ops",
    "model",
    "formats",
    "embed",
    "jobs",
    "search",
    "evaluate",
    "training",
    "cli",
)
# torchrun starts it as it would a command.
COMMANDS = ("gen_fast.training.train",)
# For tests and benchmarks, which make models and adapters.
ANYWHERE = ("testing",)


def modules() -> dict[str, Path]:
    """Every module as it is installed."""
    paths = {}
    for folder, package in (
        (ROOT / "gen_fast", "gen_fast"),
        (ROOT / "kernels", "gen_fast.ops"),
        (ROOT / "training", "gen_fast.training"),
    ):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            paths[".".join(parts).removesuffix(".__init__")] = path
    return paths


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """Modules of gen_fast that a module imports, wherever in it, also for types only."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:  # a class or a function: its module
                name = name.rpartition(".")[0]
            if name and name != module:
                yield name


def room(module: str) -> str:
    """The part of the house that a module lies in; the package itself has none."""
    if module in COMMANDS:
        return "cli"
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_one_way(module: str) -> None:
    if room(module) in ("", *ANYWHERE):
        return
    wrong = [
        name
        for name in imports(module)
        if room(name) not in ORDER or ORDER.index(room(name)) > ORDER.index(room(module))
    ]
    assert not wrong


def test_no_circles() -> None:
    """Also none inside a room. The package itself names all, and imports them when asked."""
    graph = {name: set(imports(name)) - {"gen_fast"} for name in MODULES if name != "gen_fast"}
    # Importing a.b runs a's own module too, which may import a.b: that is no circle.
    for name in graph:
        graph[name] -= {name.rpartition(".")[0]} if name.count(".") == 2 else set()
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_a_room_says_what_is_in_it() -> None:
    for name in ORDER:
        if f"gen_fast.{name}" in MODULES and MODULES[f"gen_fast.{name}"].name == "__init__.py":
            assert ast.get_docstring(ast.parse(MODULES[f"gen_fast.{name}"].read_text()))


def test_the_top_level_holds_what_users_import() -> None:
    assert sorted(path.name for path in (ROOT / "gen_fast").glob("*.py")) == [
        "__init__.py",
        "errors.py",
        "testing.py",
        "version.py",
    ]
