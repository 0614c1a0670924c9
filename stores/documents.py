"""The documents of a corpus, counted once: where each one lies in its file and how many tokens it makes.

Sizes must be known before the first byte of a store is written, so a corpus is read twice: once to count, once to
write. What was counted is recorded block by block, like any unit of work, so that a killed count goes on where it
stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .corpus import Block, Corpus, Document
from .ledger import Ledger, Record, read_json, write_atomic
from .places import Place
from .schema import Schema

if TYPE_CHECKING:
    import xarray as xr

GROWN = "grown.json"
"""Name of the file beside the counts that says which corpora begin with the blocks of which others."""

Count = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class Documents:
    """The documents of `corpus`, with their counts kept in `folder`.

    `fingerprint` names the corpus and the way of counting.
    """

    corpus: Corpus
    folder: Place
    fingerprint: str

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    def count(self, tokens: Count, progress: Callable[[int, int], None] = lambda documents, characters: None) -> None:
        """Counts the tokens of every block that has not been counted yet.

        `progress` gets documents and characters of each block.

        CorpusError names file and line of text that cannot be read, or says that there are no documents at all.
        """
        index = documents = 0
        for path in self.corpus.paths():
            block: Block | None = None
            while block is None or not block.last:
                record = self._recorded(index)
                if record is None:
                    found = next(self.corpus.blocks(path, after=block), None)
                    if found is None:
                        break
                    record = self._count_block(index, *found, tokens)
                block = Block(**record["block"])
                documents += len(record["n_token"])
                progress(len(record["n_token"]), sum(record["n_char"]))
                index += 1
        self.corpus.require_documents(documents)

    def _recorded(self, index: int) -> Record | None:
        if not self.ledger.path(index).is_file():
            return None
        record = self.ledger.record(index)
        return record if self._accepts(record, index) else None

    def _count_block(self, index: int, block: Block, documents: list[Document], tokens: Count) -> Record:
        record = {
            "fingerprint": self.fingerprint,
            "block": dataclasses.asdict(block),
            "id": [document.id for document in documents],
            "n_char": [len(document.text) for document in documents],
            "n_token": [int(n) for n in tokens([document.text for document in documents])] if documents else [],
        }
        self.ledger.complete(index, record)
        return record

    @cached_property
    def _records(self) -> list[Record]:
        records = ((index, self.ledger.record(index)) for index in sorted(self.ledger.done()))
        return [record for index, record in records if self._accepts(record, index)]

    def continues(self, before: Documents) -> None:
        """Says that this corpus begins with the files of `before`, unchanged: what was counted of them counts for both.
        Counts are kept in the same folder.
        """
        path = self.folder / GROWN
        said = read_json(path) if path.exists() else {}
        ancestors = [*before._ancestors, {"fingerprint": before.fingerprint, "n_block": len(before._records)}]
        if said.get(self.fingerprint) != ancestors:
            write_atomic(path, json.dumps({**said, self.fingerprint: ancestors}, indent=1).encode())

    @cached_property
    def _ancestors(self) -> list[dict[str, Any]]:
        """The shorter corpora of which this one is a continuation: `fingerprint` and `n_block`, oldest first."""
        path = self.folder / GROWN
        return list(read_json(path).get(self.fingerprint, ())) if path.exists() else []

    def _accepts(self, record: Record, index: int) -> bool:
        """Whether a count is of this corpus, or of one that it continues."""
        whose = record["fingerprint"]
        return whose == self.fingerprint or any(
            before["fingerprint"] == whose and index < before["n_block"] for before in self._ancestors
        )

    @cached_property
    def _first(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Index of the first document of each block, and the number of documents at the end."""
        return np.cumsum([0, *(len(record["id"]) for record in self._records)])

    @cached_property
    def schema(self) -> Schema:
        """The counted documents as something a stage can read: labels only, no arrays. Call `count` first."""
        ids = [name for record in self._records for name in record["id"]]
        n_token = [n for record in self._records for n in record["n_token"]]
        n_char = [n for record in self._records for n in record["n_char"]]
        labels = {
            "documents/id": (("document",), np.array(ids, dtype=object)),
            "documents/n_token": (("document",), np.array(n_token, dtype=np.int64)),
            "documents/n_char": (("document",), np.array(n_char, dtype=np.int64)),
        }
        return Schema(kind="documents", n_token=int(sum(n_token)), unit_tokens=1, arrays={}, labels=labels)

    def read(self, span: slice) -> xr.Dataset:
        """Documents [start, stop) in memory: `text[document]` and `id[document]`, their numbers as the coordinate."""
        import pandas as pd
        import xarray as xr

        documents = list(self._texts(span))
        return xr.Dataset(
            {
                "text": (("document",), np.array([d.text for d in documents] + [None], dtype=object)[:-1]),
                "id": (("document",), np.array([d.id for d in documents] + [None], dtype=object)[:-1]),
            },
            coords={"document": pd.RangeIndex(span.start, span.stop)},
        )

    def _texts(self, span: slice) -> Iterator[Document]:
        blocks = range(int(np.searchsorted(self._first, span.start, "right")) - 1, len(self._records))
        for index in blocks:
            first, beyond = int(self._first[index]), int(self._first[index + 1])
            if first >= span.stop:
                return
            if first < beyond:
                found = self.corpus.read(Block(**self._records[index]["block"]))
                yield from found[max(0, span.start - first) : span.stop - first]
