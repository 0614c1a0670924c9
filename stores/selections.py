"""Arithmetic on offsets: which labels tokens have, and which tokens have given labels.

Rows are the tokens of a store that stand on a dimension, in order: a `range` as long as nothing but slices has been
applied, so that selecting costs as much as the answer is long, and an array of token numbers otherwise.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .errors import SchemaError

Ints = npt.NDArray[np.int64]
Rows = range | Ints
Intervals = tuple[Ints, Ints]
"""Half-open intervals (starts, stops), ascending and disjoint."""

LEVELS = ("document", "sequence", "position")
"""The labels of a token, from the outermost to the innermost."""


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class LabelTables:
    """The first token of every sequence and document, each with `n_token` as a last element. Read-only and shared."""

    n_token: int
    sequence_edges: Ints
    document_edges: Ints

    @classmethod
    def checked(cls, n_token: int, sequence_start: npt.ArrayLike, document_start: npt.ArrayLike) -> Self:
        sequence_edges = _edges("sequence_start", sequence_start, n_token)
        document_edges = _edges("document_start", document_start, n_token)
        empty = np.flatnonzero(np.diff(sequence_edges) == 0)
        if len(empty):
            raise SchemaError(
                f"sequence_start[{empty[0]}] = {sequence_edges[empty[0]]}: the sequence has no tokens; "
                "expected strictly ascending offsets below n_token"
            )
        return cls(n_token, sequence_edges, document_edges)

    def __deepcopy__(self, memo: dict[int, Any]) -> LabelTables:
        return self

    def edges(self, level: str) -> Ints:
        return {"document": self.document_edges, "sequence": self.sequence_edges}[level]

    def equals(self, other: LabelTables) -> bool:
        return self is other or all(np.array_equal(self.edges(k), other.edges(k)) for k in ("document", "sequence"))

    def n_label(self, level: str) -> int:
        """How many labels there are: they run from 0 to this, exclusive."""
        if level == "position":
            return int(np.diff(self.sequence_edges).max(initial=0))
        return len(self.edges(level)) - 1

    def labels(self, level: str, tokens: int | Rows) -> Any:
        """The labels of tokens, int64, in the shape of `tokens`."""
        if level != "position":
            return _owners(self.edges(level), tokens)
        base = self.sequence_edges[_owners(self.sequence_edges, tokens)]
        return (np.arange(tokens.start, tokens.stop, tokens.step) if isinstance(tokens, range) else tokens) - base


def _edges(name: str, starts: npt.ArrayLike, n_token: int) -> Ints:
    given = np.asarray(starts)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise SchemaError(f"{name} has dtype {given.dtype} and shape {given.shape}; expected integers on one dimension")
    edges = np.append(given.astype(np.int64), np.int64(n_token))
    if edges[0] != 0:
        raise SchemaError(f"{name} begins at {edges[0]} with n_token = {n_token}; expected the first offset to be 0")
    falling = np.flatnonzero(np.diff(edges) < 0)
    if len(falling):
        i = int(falling[0])
        after = f"{name}[{i + 1}]" if i + 1 < len(given) else "n_token"
        raise SchemaError(f"{name}[{i}] = {edges[i]} is above {after} = {edges[i + 1]}; expected ascending offsets")
    edges.flags.writeable = False
    return edges


def _owners(edges: Ints, tokens: int | Rows) -> Any:
    """Which interval of `edges` holds each token; of equal edges the last, since the others are empty."""
    if isinstance(tokens, range) and tokens.step == 1 and len(tokens):
        first, last = np.searchsorted(edges, (tokens.start, tokens.stop - 1), side="right") - 1
        cuts = np.clip(edges[first : last + 2], tokens.start, tokens.stop)
        return np.repeat(np.arange(first, last + 1), np.diff(cuts))
    if isinstance(tokens, range):
        tokens = np.arange(tokens.start, tokens.stop, tokens.step)
    return np.searchsorted(edges, tokens, side="right") - 1


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def tokens_at(rows: Rows, key: int | slice | npt.NDArray[Any]) -> Any:
    """The tokens at positions `key`, as numpy indexing gives them; rows again where `key` is a slice or 1-d array."""
    if isinstance(rows, range) and isinstance(key, np.ndarray):
        if key.dtype == bool:
            if key.shape != (len(rows),):
                raise IndexError(f"a mask of shape {key.shape} on a dimension of {len(rows)} tokens")
            key = np.flatnonzero(key)
        elif not key.size:
            key = key.astype(np.int64)
        if key.size and not (-len(rows) <= key.min() and key.max() < len(rows)):
            raise IndexError(f"positions {key.min()} to {key.max()} on a dimension of {len(rows)} tokens")
        return _compact(rows.start + rows.step * np.where(key < 0, key + len(rows), key))
    found = rows[key]
    return _compact(found) if isinstance(found, np.ndarray) else found


def _compact(tokens: Ints) -> Rows:
    """Consecutive tokens as a range, which keeps later selections independent of their number."""
    if tokens.ndim == 1 and len(tokens) and tokens[-1] - tokens[0] == len(tokens) - 1 and (np.diff(tokens) == 1).all():
        return range(int(tokens[0]), int(tokens[-1]) + 1)
    return tokens


def _positions_in(rows: range, tokens: Intervals) -> Intervals:
    """For each interval of tokens the positions in `rows` that it covers; empty ones stay, the order is the rows'."""
    start, stop = tokens
    if rows.step > 0:
        k0, k1 = -((rows.start - start) // rows.step), -((rows.start - stop) // rows.step)
    else:
        k0, k1 = ((rows.start - stop) // -rows.step + 1)[::-1], ((rows.start - start) // -rows.step + 1)[::-1]
    return np.clip(k0, 0, len(rows)), np.clip(k1, 0, len(rows))


def expanded(start: Ints, count: Ints) -> Ints:
    """start[0], start[0]+1, … (count[0] of them), start[1], …"""
    shift: Ints = np.repeat(start - (np.cumsum(count) - count), count)
    return np.arange(len(shift), dtype=np.int64) + shift


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Span:
    """Labels from `start` up to `stop`, exclusive; None is open."""

    start: int | None
    stop: int | None

    def runs(self, n_label: int) -> Intervals:
        start = 0 if self.start is None else min(max(self.start, 0), n_label)
        stop = n_label if self.stop is None else min(max(self.stop, start), n_label)
        return np.array([start], dtype=np.int64), np.array([stop], dtype=np.int64)

    def holds(self, labels: Ints) -> npt.NDArray[np.bool_]:
        inside = np.full(labels.shape, True)
        if self.start is not None:
            inside &= labels >= self.start
        if self.stop is not None:
            inside &= labels < self.stop
        return inside


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """Single labels; `scalar` if there is one, given without a list."""

    values: Ints
    scalar: bool

    def runs(self, n_label: int) -> Intervals:
        values = np.unique(self.values)
        values = values[(values >= 0) & (values < n_label)]
        return _joined((values, values + 1))

    def holds(self, labels: Ints) -> npt.NDArray[np.bool_]:
        return np.isin(labels, self.values)


Wanted = Mapping[str, Span | Listed]


def _joined(intervals: Intervals) -> Intervals:
    """The same set without empty intervals, touching ones made one."""
    start, stop = intervals
    start, stop = start[start < stop], stop[start < stop]
    apart = start[1:] != stop[:-1]
    if not len(start):
        return start, stop
    return start[np.append(True, apart)], stop[np.append(apart, True)]


def _intersection(a: Intervals, b: Intervals) -> Intervals:
    first = np.searchsorted(b[1], a[0], side="right")
    count = np.maximum(np.searchsorted(b[0], a[1], side="left") - first, 0)
    i, j = np.repeat(np.arange(len(count)), count), expanded(first, count)
    return np.maximum(a[0][i], b[0][j]), np.minimum(a[1][i], b[1][j])


def _pieces(tables: LabelTables, tokens: Intervals) -> tuple[Ints, Ints, Ints]:
    """Intervals cut where sequences begin: start, stop, and the first token of the sequence."""
    edges = tables.sequence_edges
    first = _owners(edges, tokens[0])
    count = _owners(edges, tokens[1] - 1) - first + 1
    i, q = np.repeat(np.arange(len(count)), count), expanded(first, count)
    return np.maximum(tokens[0][i], edges[q]), np.minimum(tokens[1][i], edges[q + 1]), edges[q]


# ── which tokens ─────────────────────────────────────────────────────────────────────────────────────────────────────


def select(tables: LabelTables, rows: Rows, wanted: Wanted, names: Mapping[str, Hashable]) -> slice | Ints:
    """Positions in `rows` of the tokens that have all labels wanted: a slice where they are contiguous.

    Ascending, unless a list does not ascend. Raises KeyError as `TokenIndex` says; `names` are for its message.
    """
    find = _by_offsets if isinstance(rows, range) else _by_labels
    start, stop = find(tables, rows, wanted)
    found = slice(int(start[0]), int(stop[0])) if len(start) == 1 else expanded(start, stop - start)
    if isinstance(found, np.ndarray) and not len(found):
        found = slice(0, 0)
    _require_present(tables, rows, wanted, names, found)
    lists = [k for k in LEVELS if isinstance(w := wanted.get(k), Listed) and (np.diff(w.values) <= 0).any()]
    return _arranged(tables, rows, wanted, found) if lists else found


def _by_offsets(tables: LabelTables, rows: Any, wanted: Wanted) -> Intervals:
    """Positions as intervals, out of the tables alone."""
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    tokens = (np.array([min(rows[0], rows[-1])]), np.array([max(rows[0], rows[-1]) + 1]))
    for level in ("document", "sequence"):
        if level in wanted:
            edges = tables.edges(level)
            first, last = wanted[level].runs(tables.n_label(level))
            tokens = _intersection(tokens, _joined((edges[first], edges[last])))
    if "position" in wanted:
        start, stop, base = _pieces(tables, tokens)
        first, last = wanted["position"].runs(tables.n_token)
        start = np.maximum(start[:, None], base[:, None] + first)
        stop = np.minimum(stop[:, None], base[:, None] + last)
        tokens = start.ravel()[(start < stop).ravel()], stop.ravel()[(start < stop).ravel()]
    return _joined(_positions_in(rows, tokens))


def _by_labels(tables: LabelTables, rows: Any, wanted: Wanted) -> Intervals:
    """Positions as intervals, by a look at the labels of every row."""
    mask = np.full(len(rows), True)
    for level, labels in wanted.items():
        mask &= labels.holds(tables.labels(level, rows))
    positions = np.flatnonzero(mask)
    return _joined((positions, positions + 1))


def _arranged(tables: LabelTables, rows: Rows, wanted: Wanted, found: slice | Ints) -> Ints:
    """Positions in the order of the lists, repeated as these repeat; several lists nest, the outermost label first.

    A position is one in its sequence, so that a list of positions is in order within each sequence.
    """
    positions = np.arange(found.start, found.stop) if isinstance(found, slice) else found
    ranks: list[Ints] = []
    for level in LEVELS:
        want = wanted.get(level)
        if not isinstance(want, Listed):
            if level == "sequence" and isinstance(wanted.get("position"), Listed):
                ranks.append(tables.labels(level, tokens_at(rows, positions)))
            continue
        labels = tables.labels(level, tokens_at(rows, positions))
        order = np.argsort(want.values, kind="stable")
        ascending = want.values[order]
        first = np.searchsorted(ascending, labels, side="left")
        count = np.searchsorted(ascending, labels, side="right") - first
        positions, ranks = np.repeat(positions, count), [np.repeat(rank, count) for rank in ranks]
        ranks.append(order[expanded(first, count)])
    return positions[np.lexsort(ranks[::-1])]


# ── what is missing ──────────────────────────────────────────────────────────────────────────────────────────────────


def _require_present(
    tables: LabelTables, rows: Rows, wanted: Wanted, names: Mapping[str, Hashable], found: slice | Ints
) -> None:
    empty = isinstance(found, slice) and found.start == found.stop
    listed = {level: want for level, want in wanted.items() if isinstance(want, Listed)}
    for level, want in listed.items():
        suspects = want.values[:0] if want.scalar and not empty else want.values
        if level == "position" and len(suspects) and not empty:
            suspects = suspects[~np.isin(suspects, tables.labels(level, tokens_at(rows, found)))]
        missing = suspects[~_present(tables, rows, level, suspects)]
        if len(missing):
            raise KeyError(_missing(tables, rows, level, int(missing[0]), names))
    if empty and len(listed) == len(wanted) and all(want.scalar for want in listed.values()):
        asked = ", ".join(f"{names[level]}={want.values[0]}" for level, want in listed.items())
        raise KeyError(f"each of {asked} is there, but no token has all of them")


def _missing(tables: LabelTables, rows: Rows, level: str, label: int, names: Mapping[str, Hashable]) -> str:
    n_label = tables.n_label(level)
    legal = f"legal are 0 to {n_label - 1}" if n_label else "there are none"
    if not 0 <= label < n_label:
        return f"no token has {names[level]}={label}; {legal}"
    if level == "document" and tables.document_edges[label] == tables.document_edges[label + 1]:
        return f"{names[level]}={label} is an empty document: no token has it; {legal}"
    return (
        f"{names[level]}={label} is not among the {len(rows)} tokens selected of {tables.n_token}; {legal} in the whole"
    )


def _present(tables: LabelTables, rows: Rows, level: str, labels: Ints) -> npt.NDArray[np.bool_]:
    """Whether any row has each label."""
    if not isinstance(rows, range):
        return np.isin(labels, tables.labels(level, rows))
    if not len(labels) or not len(rows):
        return np.zeros(len(labels), dtype=bool)
    ascending = rows if rows.step > 0 else rows[::-1]
    if level == "position":
        return _present_positions(tables, ascending, labels)
    legal = (labels >= 0) & (labels < tables.n_label(level))
    edges, known = tables.edges(level), np.where(legal, labels, 0)
    start, stop = _positions_in(ascending, (edges[known], edges[known + 1]))
    return legal & (start < stop)


def _present_positions(tables: LabelTables, rows: range, labels: Ints) -> npt.NDArray[np.bool_]:
    """Counts, for each position, the sequences that have begun and the ones that have ended before it.

    With a step, a sequence has only positions of one remainder, so sequences are told apart by it.
    """
    start, stop, base = _pieces(tables, (np.array([rows.start]), np.array([rows[-1] + 1])))
    start = rows.start - (rows.start - start) // rows.step * rows.step
    first, last = (start - base)[start < stop], (stop - base)[start < stop]
    longest = int(last.max())
    legal = (labels >= 0) & (labels < longest)
    begun = np.sort(first % rows.step * (longest + 1) + first)
    ended = np.sort(first % rows.step * (longest + 1) + last)
    key = labels % rows.step * (longest + 1) + labels
    count = np.searchsorted(begun, key, side="right") - np.searchsorted(ended, key, side="right")
    return legal & (count > 0)
