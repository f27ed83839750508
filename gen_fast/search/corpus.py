"""An index with its model and its corpus: texts in, ids, scores and texts out."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from gen_fast.embed.encoder import Encoder
from gen_fast.errors import InputError, JobError
from gen_fast.io.vectors import unit
from gen_fast.jobs.corpus import CorpusReader
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan
from gen_fast.search.exact import Match
from gen_fast.search.index import IndexInfo, VectorSearch, contents_hash, read_index

_CACHED_PARTS = 64


class CorpusIndex:
    """An index with the model and the corpus it was made of. Made by `open_index`."""

    def __init__(self, path: Path, folder: Path, info: IndexInfo, device: str | None) -> None:
        self.info = info
        self._store = PartStore(folder, Plan.load(folder), footers=info.footers)
        manifest = self._store.manifest()
        contents = contents_hash(manifest["parts"][: info.parts])
        if (info.settings, info.contents) != (self._store.plan.settings_hash, contents):
            raise JobError(f"{path} is not an index of the job in {folder}")
        index = read_index(path, info)
        expected = manifest["rows"]
        if index.ntotal != expected:
            raise JobError(
                f"{path} holds {index.ntotal} of the {expected} embeddings of {folder}: "
                f"`gen-fast index {folder} --out {path}` adds the others"
            )
        self._search = VectorSearch(index, self._store, info)
        self._device = device
        self._encoder: Encoder | None = None
        self._reader = CorpusReader(self._store.plan)
        self._ids = lru_cache(_CACHED_PARTS)(self._ids_of)

    @property
    def encoder(self) -> Encoder:
        """The model that embeds queries, loaded when it is first needed."""
        if self._encoder is None:
            self._encoder = self._store.plan.settings.load_encoder(self._device)
        return self._encoder

    def nearest(self, queries: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows of the job [q, min(k, n)] nearest to vectors [q, d], best first."""
        return self._search.nearest(unit(queries), k)

    def search(
        self,
        texts: str | Sequence[str],
        k: int = 10,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        with_text: bool = True,
    ) -> list[list[Match]]:
        """The k nearest rows to each text, best first, by cosine.

        prompt, prompt_name: of the queries; by default the model's prompt "query".
        with_text: read the texts of the hits back from the corpus; its files must still be there.
        """
        if prompt is None and prompt_name is None and "query" in self.encoder.prompts:
            prompt_name = "query"
        queries = self.encoder.encode(
            [texts] if isinstance(texts, str) else list(texts),
            prompt=prompt,
            prompt_name=prompt_name,
            truncate_dim=self.info.dimension,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        assert isinstance(queries, np.ndarray)
        scores, rows = self._search.nearest(queries, k)
        text_of_row = self._texts(rows) if with_text else {}
        return [
            [
                Match(float(score), self._id(int(row)), text_of_row.get(int(row)))
                for score, row in zip(*hits, strict=True)
                if row >= 0
            ]
            for hits in zip(scores, rows, strict=True)
        ]

    def _id(self, row: int) -> str:
        return self._ids(self._search.part_of(row))[row]

    def _ids_of(self, number: int) -> dict[int, str]:
        ids, rows = self._store.ids(self._store.plan.parts[number])
        return dict(zip(map(int, rows), ids, strict=True))

    def _texts(self, rows: np.ndarray) -> dict[int, str]:
        """The texts of rows, each part of the corpus read once."""
        text_of_row: dict[int, str] = {}
        hits = {int(row) for row in rows.ravel() if row >= 0}
        for number in sorted({self._search.part_of(row) for row in hits}):
            part = self._store.plan.parts[number]
            try:
                read = self._reader.read(part)
            except InputError as error:
                raise JobError(f"the text of a hit cannot be read back: {error}") from error
            texts = zip(read.rows, read.texts, strict=True)
            text_of_row |= {row: text for row, text in texts if row in hits}
        return text_of_row


def open_index(
    path: str | Path, *, folder: str | Path | None = None, device: str | None = None
) -> CorpusIndex:
    """Open an index that `gen-fast index` made.

    folder: the job's, if it has been moved. device: for queries; None takes CUDA if there is one.
    Raises JobError.
    """
    path = Path(path)
    if not path.exists():
        raise JobError(f"{path}: no such index")
    info = IndexInfo.load(path)
    return CorpusIndex(path, Path(folder or info.folder), info, device)
