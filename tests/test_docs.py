"""The documentation works: its code runs, its commands, files and links exist.

Python blocks and `gen-fast` commands are run, a page in one namespace and one directory; a `text`
block is what the block before it prints. A block with `<!-- not run: why -->` above it is not run:
its commands, like those in the prose, are checked to exist with their options.
"""

import contextlib
import io
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli import app
from gen_fast.training.config import TrainConfig
from gen_fast.training.gem_config import GEMConfig
from gen_fast.training.llm2vec_config import LLM2VecConfig
from gen_fast.training.methods import read_run

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "bench/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
LINKED = sorted({*PAGES, *(str(p.relative_to(ROOT)) for p in ROOT.glob("*/*/README.md"))})
# How many blocks of a page are not run.
NOT_RUN = {"README.md": 2, "CONTRIBUTING.md": 1, "bench/README.md": 6}
NOT_RUN |= {"docs/evaluation.md": 2, "docs/methods.md": 3, "docs/performance.md": 1}
NOT_RUN |= {"docs/training.md": 4, "docs/formats.md": 1, "docs/quantisation.md": 1}
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"`((?:gen-fast|python|make|pytest|torchrun|pip|bash) [^`]+)`")
FILE = re.compile(r"`((?:gen_fast|tests|bench|kernels|csrc|training|docs|examples)/[\w./]+)`")
NUMBER = re.compile(r"-?\d+(?:\.\d*)?")
TEXTS = {
    "bears": "Polar bears live throughout the Arctic and hunt seals from the sea ice.",
    "cleanup": "Disk Cleanup is a Windows tool that frees space by deleting temporary files.",
    "gold": "Gold is a chemical element with the symbol Au.",
    "budapest": "Budapest is the capital of Hungary.",
}


@dataclass(frozen=True)
class Block:
    is_run: bool
    language: str
    code: str

    def commands(self) -> list[list[str]]:
        lines = self.code.replace("\\\n", " ").splitlines() if self.language == "sh" else []
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return [Block(not why, language, code) for why, language, code in BLOCK.findall(read(page))]


@pytest.fixture(scope="module")
def loaded_once(smollm2: Path) -> Iterator[None]:
    """Every command and example has the same Encoder: loading it takes seconds."""
    encoder = gen_fast.load("smollm2-135m", device="cpu")

    def load(model: str = "smollm2-135m", **options: Any) -> gen_fast.Encoder:
        assert (model, options.get("method") or encoder.method) == (encoder.name, encoder.method)
        return encoder

    with pytest.MonkeyPatch.context() as patch:
        for module in ("embed.loading", "jobs.settings"):
            patch.setattr(f"gen_fast.{module}.load", load)
        yield


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("page", PAGES)
def test_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # with the files that the pages name
    rows = [json.dumps({"id": name, "text": text}) for name, text in TEXTS.items()]
    Path("corpus").mkdir()
    for name in ("corpus.jsonl", "corpus/texts.jsonl", "sample.jsonl"):
        Path(name).write_text("\n".join(rows))
    qa = {"id": "1", "question": "Where is Budapest?", "answer": TEXTS["budapest"]}
    Path("qa.jsonl").write_text(json.dumps(qa))

    namespace: dict[str, Any] = {}
    printed = None
    for block in blocks(page):
        if block.language == "text" and printed is not None:
            assert_same(printed, block.code)
        printed = run(block, namespace) if block.is_run else None
    assert sum(not block.is_run for block in blocks(page)) == NOT_RUN.get(page, 0)


def run(block: Block, namespace: dict[str, Any]) -> str | None:
    """What a block prints; None if it is no code."""
    if block.language == "python":
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(block.code, namespace)
        return stdout.getvalue()
    if block.language == "sh":
        printed = ""
        for words in block.commands():
            assert words[0] == "gen-fast", f"{words} cannot be run here: mark it as not run"
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, (words, result.stderr, result.exception)
            printed += result.stdout
        return printed
    if block.language == "yaml":
        Path("settings.yaml").write_text(block.code)
        read_run("settings.yaml", {})
    else:
        assert block.language in {"text", "bibtex"}, block
    return None


def assert_same(printed: str, shown: str) -> None:
    """Equal but for white space; numbers within 0.03: processors and dtypes differ."""
    shapes = [re.sub(r"\s", "", NUMBER.sub("#", text)) for text in (printed, shown)]
    assert shapes[0] == shapes[1]
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.03)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_files_exist(page: str) -> None:
    prose = BLOCK.sub("", read(page))
    for command in COMMAND.findall(prose):
        check_command(shlex.split(command))
    for words in (words for block in blocks(page) for words in block.commands()):
        check_command(words)
    missing = {path for path in FILE.findall(prose) if not (ROOT / path).exists()}
    assert missing <= {"kernels/__init__.py"}  # which must not be


def check_command(words: list[str]) -> None:
    options = {word.partition("=")[0] for word in words if re.match(r"-+[a-z]", word)}
    paths = [word for word in words if re.fullmatch(r"(?:tests|bench|training|\.ci)/\S+", word)]
    name, first = Path(words[0]).name, words[1]
    if "gen_fast.cli" in words:  # under torchrun
        check_command(["gen-fast", *words[words.index("gen_fast.cli") + 1 :]])
    elif name == "gen-fast":
        assert options <= cli_options(None if first.startswith("-") else first), words
    elif name == "make":
        assert re.search(rf"^{first}:", read("Makefile"), re.MULTILINE), words
        assert all(f"$({word.partition('=')[0]})" in read("Makefile") for word in words[2:]), words
    elif name == "python":
        script = read(first)
        # Those of bench/measure.py, by the names of its keywords.
        call = re.search(r"= (?:measure\.)?arguments\(([^)]*)\)", script)
        shared = {"--json", *(f"--{x}" for x in re.findall(r"(\w+)=", call[1]))} if call else set()
        assert all(f'"{option}"' in script for option in options - shared), words
    elif name == "pip":
        known = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
        asked = {extra for word in words for extra in re.findall(r"[\w-]+", word.partition("[")[2])}
        assert asked <= set(known), words
    else:
        assert name in {"pytest", "torchrun", "bash"}, words
    assert all((ROOT / path).exists() or "--out" in words for path in paths), words


def cli_options(command: str | None) -> set[str]:
    """Options of a command of gen-fast, for None of gen-fast itself. KeyError if unknown."""
    group: Any = get_command(app)
    parameters = (group if command is None else group.commands[command]).params
    kinds = (TrainConfig, LLM2VecConfig, GEMConfig) if command == "train" else ()
    own = {field.name for kind in kinds for field in fields(kind)}
    settings = {f"--{name.replace('_', '-')}" for name in own}
    return {"--help", *settings, *(name for one in parameters for name in one.opts)}


@pytest.mark.parametrize("page", LINKED)
def test_links(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", read(page))):
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_module_is_in_the_tree() -> None:
    """The tree of CONTRIBUTING.md, by its indents, against the files; choices.py stand for all."""
    tree = read("CONTRIBUTING.md").split("```text\n")[1].split("```")[0]
    named, folders = set(), []
    for line in tree.splitlines():
        entry = re.match(r"( *)([\w/]+/|\w+\.py)(?= |$)", line)
        if entry:
            depth = len(entry[1]) // 2
            folders[depth:] = [entry[2]]
            named.add("".join(folders))
    files = [
        *ROOT.glob("gen_fast/*.py"),
        *ROOT.glob("gen_fast/*/*.py"),
        *ROOT.glob("training/*.py"),
    ]
    modules = {str(path.relative_to(ROOT)) for path in files}
    unnamed = re.compile(r".*/(__init__|__main__|choices)\.py")
    assert {name for name in named if name.endswith(".py")} - modules == set()
    assert {name for name in modules if not unnamed.fullmatch(name)} - named == set()
