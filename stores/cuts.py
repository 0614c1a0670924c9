"""Ranges of tokens of stores, cut between sequences, and the labels of several laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SchemaError
from .schema import LABELS
from .store import Store


@dataclass(frozen=True)
class Cut:
    """Tokens [start, stop) of a store, which are whole sequences, and the documents [first, beyond) that are told of
    with them: those that have tokens there, and empty ones between them.
    """

    store: Store
    start: int
    stop: int
    first: int
    beyond: int

    def __len__(self) -> int:
        return self.stop - self.start

    @classmethod
    def whole(cls, store: Store) -> Cut:
        """All of a store, with all of its documents."""
        return cls(store, 0, store.schema.n_token, 0, len(store.labels["documents/start"][1]))

    @classmethod
    def of_tokens(cls, store: Store, tokens: slice) -> Cut:
        """The sequences that hold any of some tokens. SchemaError if there are none such."""
        n_token = store.schema.n_token
        start, stop, _ = tokens.indices(n_token)
        if start >= stop or tokens.step not in (None, 1):
            raise SchemaError(
                f"{store.path.parent} has no tokens {_said(tokens)}: it has {n_token:,}, numbered from 0; give a range"
            )
        starts, documents = (store.labels[f"{name}/start"][1] for name in ("sequences", "documents"))
        begin = int(starts[np.searchsorted(starts, start, "right") - 1])
        after = int(np.searchsorted(starts, stop, "left"))
        end = int(starts[after]) if after < len(starts) else n_token
        first = int(np.searchsorted(documents, begin, "right")) - 1
        return cls(store, begin, end, first, int(np.searchsorted(documents, end, "left")))

    @classmethod
    def of_documents(cls, store: Store, documents: slice) -> Cut:
        """The sequences that hold any token of some documents. SchemaError if there are none such."""
        starts = store.labels["documents/start"][1]
        first, beyond, _ = documents.indices(len(starts))
        if first >= beyond or documents.step not in (None, 1):
            raise SchemaError(
                f"{store.path.parent} has no documents {_said(documents)}: it has {len(starts):,}, numbered from 0; "
                "give a range"
            )
        edges = np.append(starts, store.schema.n_token)
        if edges[first] == edges[beyond]:
            raise SchemaError(f"{store.path.parent}: documents {_said(documents)} have no tokens")
        cut = cls.of_tokens(store, slice(int(edges[first]), int(edges[beyond])))
        return cls(store, cut.start, cut.stop, min(cut.first, first), max(cut.beyond, beyond))

    @property
    def sequences(self) -> tuple[int, int]:
        """The first sequence, and the one after the last."""
        first, beyond = np.searchsorted(self.store.labels["sequences/start"][1], [self.start, self.stop])
        return int(first), int(beyond)

    def to_json(self) -> dict[str, Any]:
        """Which rows these are."""
        return {
            "token": [self.start, self.stop],
            "sequence": list(self.sequences),
            "document": [self.first, self.beyond],
        }


def _said(chosen: slice) -> str:
    parts = ["" if one is None else str(one) for one in (chosen.start, chosen.stop)]
    return ":".join(parts if chosen.step is None else [*parts, str(chosen.step)])


def labels_of(cuts: Sequence[Cut]) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    """Where the sequences and documents of cuts laid end to end start, numbered through, and what documents are called.
    A document that is cut off begins where its first token does that is there.
    """
    parts: dict[str, list[NDArray[Any]]] = {path: [] for path in LABELS}
    token = document = 0
    for cut in cuts:
        labels = cut.store.labels
        rows, told = slice(*cut.sequences), slice(cut.first, cut.beyond)
        parts["sequences/start"].append(labels["sequences/start"][1][rows] - cut.start + token)
        parts["sequences/document"].append(labels["sequences/document"][1][rows] - cut.first + document)
        starts = labels["documents/start"][1][told]
        parts["documents/start"].append(np.clip(starts, cut.start, cut.stop) - cut.start + token)
        parts["documents/id"].append(labels["documents/id"][1][told])
        token, document = token + len(cut), document + cut.beyond - cut.first
    return {path: (cuts[0].store.labels[path][0], np.concatenate(found)) for path, found in parts.items()}
