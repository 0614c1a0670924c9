"""Posting lists out of core: runs of nonzeros, each sorted, and their merge into pieces of one sorted whole.

The order is total: features ascend, in a feature values descend, and equal values stand in the order of their tokens.
So the whole is the same however it is cut into runs and pieces.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .ledger import sync_folder

BINS = 50
"""Bins of a feature's histogram: equally wide, from its lowest value (at most 0) to its highest (at least 0)."""
BLOCK, PART, MOST = 2**18, 2**9, 2**22
"""Nonzeros that are sorted at a time: so few that their keys stay in a core's cache, but on average not fewer than
`PART` of each run that is merged, and not more than `MOST`.
"""

Keys = NDArray[np.uint32]
"""Values as integers in the opposite order: the higher the value, the lower its key."""

_LOW, _LAST = np.uint64(2**32 - 1), np.uint64(2**64 - 1)
_SIGNLESS = np.int32(2**31 - 1)

STATISTICS = np.dtype([("sum", "f8"), ("square_sum", "f8"), ("max", "f4"), ("min", "f4"), ("histogram", "u4", (BINS,))])
"""What a piece knows of one feature: sums and histogram of its own postings, and the extremes of all (NaN if none)."""


def keys_of(values: NDArray[np.float32]) -> Keys:
    """The key of each finite value. Negative zero is zero."""
    bits = (values + np.float32(0)).view(np.int32)
    return (bits ^ (~(bits >> 31) & _SIGNLESS)).view(np.uint32)


def values_of(keys: Keys) -> NDArray[np.float32]:
    """The values that `keys_of` made keys of."""
    bits = keys.view(np.int32)
    return (bits ^ (~(bits >> 31) & _SIGNLESS)).view(np.float32)


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Run:
    """Nonzeros of consecutive tokens, sorted. Those of feature f are `key` and `token` [ptr[f], ptr[f+1]); tokens are
    counted from `first_token`.
    """

    first_token: int
    ptr: NDArray[np.int64]
    key: Keys
    token: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class RunFile:
    """Sorted runs side by side in one file, each in a place of its own. Run i holds tokens from `first[i]` on, and at
    most `most[i]` nonzeros.
    """

    path: Path
    n_feature: int
    first: tuple[int, ...]
    most: tuple[int, ...]

    def _places(self) -> list[int]:
        """Where each run begins, and where the last one ends, in bytes."""
        return [0, *itertools.accumulate(8 * (self.n_feature + 1 + most) for most in self.most)]

    def create(self) -> None:
        """Makes the file, with nothing in it; file systems give no room to what is not written."""
        with open(self.path, "wb") as file:
            file.truncate(self._places()[-1])
        sync_folder(self.path.parent)

    def save(self, index: int, run: Run) -> None:
        """Writes a run durably."""
        with open(self.path, "r+b") as file:
            file.seek(self._places()[index])
            for part in (run.ptr, run.key, run.token):
                file.write(part.view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())

    def load(self) -> list[Run]:
        """All runs, mapped into memory; every one must have been saved."""
        whole = np.asarray(np.memmap(self.path, np.uint8, "r"))
        runs = []
        for first, place in zip(self.first, self._places(), strict=False):
            ptr = whole[place : place + 8 * (self.n_feature + 1)].view(np.int64)
            n = 4 * int(ptr[-1])
            key, token = (whole[at : at + n].view(np.uint32) for at in (place + ptr.nbytes, place + ptr.nbytes + n))
            runs.append(Run(first, ptr, key, token))
        return runs


def sorted_run(
    first_token: int,
    n_feature: int,
    feature: NDArray[np.int32],
    token: NDArray[np.uint32],
    key: Keys,
    left_out: NDArray[np.bool_],
) -> Run:
    """The run of nonzeros that come in the order of their tokens, counted from `first_token`; those of tokens that are
    `left_out[token]` are not in it. Four times as fast where feature, key and token fit 64 bits: see `tokens_that_fit`.
    """
    token_bits = (len(left_out) - 1).bit_length()
    fits = len(left_out) <= tokens_that_fit(n_feature)
    packed = feature.astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= key if fits else np.arange(len(key), dtype=np.uint64)
    if fits:
        packed <<= np.uint64(token_bits)
        packed |= token
    if left_out.any():
        packed[left_out.take(token)] = _LAST
    packed.sort()
    features = np.arange(n_feature, dtype=np.uint64) << np.uint64(32 + token_bits * fits)
    ptr = np.searchsorted(packed, np.append(features, _LAST))
    packed = packed[: ptr[-1]]
    if fits:
        tokens = packed & np.uint64(2**token_bits - 1)
        packed >>= np.uint64(token_bits)
        return Run(first_token, ptr, packed.astype(np.uint32), tokens.astype(np.uint32))
    return _sorted_by_value(first_token, ptr, packed & _LOW, token, key)


def tokens_that_fit(n_feature: int) -> int:
    """How many tokens a run may have for a feature, a key and a token to fit 64 bits together."""
    return int(2 ** (32 - (n_feature - 1).bit_length()))


def _sorted_by_value(
    first_token: int, ptr: NDArray[np.int64], places: NDArray[np.uint64], token: NDArray[np.uint32], key: Keys
) -> Run:
    """The run of nonzeros that are found at `places`, in the order of features and tokens."""
    pairs = token.astype(np.uint64)
    pairs <<= np.uint64(32)
    pairs |= key
    pairs = pairs.take(places.view(np.int64))
    run = Run(first_token, ptr, np.empty(len(pairs), np.uint32), np.empty(len(pairs), np.uint32))
    for first, beyond in _blocks(ptr, BLOCK):
        span = slice(int(ptr[first]), int(ptr[beyond]))
        pair = pairs[span]
        run.key[span], order = _ordered([np.diff(ptr[first : beyond + 1])], pair & _LOW)
        pair >>= np.uint64(32)
        run.token[span] = pair.take(order)
    return run


def _blocks(ptr: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of features [first, beyond), all of them in order, each with at most `most` nonzeros or of one feature; of
    not so many features that they leave no room in a key.
    """
    first, n_feature = 0, len(ptr) - 1
    features = 2 ** (32 - most.bit_length())
    while first < n_feature:
        beyond = int(np.searchsorted(ptr, ptr[first] + most, side="right")) - 1
        beyond = min(max(beyond, first + 1), first + features, n_feature)
        yield first, beyond
        first = beyond


def _ordered(counts: Sequence[NDArray[np.int64]], keys: NDArray[np.uint64]) -> tuple[Keys, NDArray[np.int64]]:
    """The keys, of which `counts[part][feature]` of each part belong to a feature, sorted by feature, then key, then
    where they stood; and where each of them stood. `keys` is overwritten.
    """
    index_bits = max(1, len(keys) - 1).bit_length()
    keys <<= np.uint64(index_bits)
    keys |= np.arange(len(keys), dtype=np.uint64)
    if len(counts[0]) > 1:
        features = np.arange(len(counts[0]), dtype=np.uint64) << np.uint64(32 + index_bits)
        filled = 0
        for count in counts:
            own = np.repeat(features, count)
            keys[filled : filled + len(own)] |= own
            filled += len(own)
    keys.sort()
    places = (keys & np.uint64(2**index_bits - 1)).view(np.int64)
    keys >>= np.uint64(index_bits)
    return keys.astype(np.uint32), places


# ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Cut(NamedTuple):
    """Where the sorted whole is cut: in `feature`, with `before[run]` nonzeros of each run before the cut."""

    feature: int
    before: list[int]


def cut(runs: Sequence[Run], ptr: NDArray[np.int64], rank: int) -> Cut:
    """The cut that leaves `rank` nonzeros before it. `ptr` is that of the whole: the sum of the runs'."""
    if rank >= ptr[-1]:
        return Cut(len(ptr) - 1, [int(run.ptr[-1]) for run in runs])
    feature = int(np.searchsorted(ptr, rank, side="right")) - 1
    wanted = rank - int(ptr[feature])
    start = [int(run.ptr[feature]) for run in runs]
    keys = [run.key[first : int(run.ptr[feature + 1])] for run, first in zip(runs, start, strict=True)]
    if wanted == 0:
        return Cut(feature, start)
    low, high = 0, 2**32 - 1
    while low < high:
        middle = (low + high) // 2
        if sum(int(np.searchsorted(key, np.uint32(middle), side="right")) for key in keys) >= wanted:
            high = middle
        else:
            low = middle + 1
    below = [int(np.searchsorted(key, np.uint32(low))) for key in keys]
    equal = [int(np.searchsorted(key, np.uint32(low), side="right")) - n for key, n in zip(keys, below, strict=True)]
    left = wanted - sum(below)
    before = []
    for first, lower, ties in zip(start, below, equal, strict=True):
        before.append(first + lower + min(ties, left))
        left -= min(ties, left)
    return Cut(feature, before)


class Merged(NamedTuple):
    """A block of the sorted whole, and what it knows of its features, from `first_feature` on, also those without a
    posting."""

    token: NDArray[np.int64]
    value: NDArray[np.float32]
    first_feature: int
    statistics: NDArray[np.void]


def merged(runs: Sequence[Run], ptr: NDArray[np.int64], start: int, stop: int) -> Iterator[Merged]:
    """Postings [start, stop) of the sorted whole, in blocks that follow each other."""
    low, high = cut(runs, ptr, start), cut(runs, ptr, stop)
    first_feature = low.feature
    beyond = high.feature + int(stop > ptr[high.feature])
    own = np.clip(ptr[first_feature : beyond + 1], start, stop)
    for first, last in _blocks(own, min(max(BLOCK, PART * len(runs)), MOST)):
        features = slice(first_feature + first, first_feature + last + 1)
        edges = [np.clip(run.ptr[features], a, b) for run, a, b in zip(runs, low.before, high.before, strict=True)]
        key, token = _gathered(runs, edges)
        values = values_of(key)
        extremes = _extremes(runs, ptr, own, values, slice(first, last), first_feature)
        statistics = _statistics(values, np.diff(own[first : last + 1]), extremes)
        yield Merged(token, values, features.start, statistics)


def _gathered(runs: Sequence[Run], edges: Sequence[NDArray[np.int64]]) -> tuple[Keys, NDArray[np.int64]]:
    """Keys and tokens of a block, sorted. `edges[run]` are the features' places in the run."""
    n = sum(int(edge[-1] - edge[0]) for edge in edges)
    keys, tokens = np.empty(n, np.uint64), np.empty(n, np.int64)
    filled = 0
    for run, edge in zip(runs, edges, strict=True):
        source = slice(int(edge[0]), int(edge[-1]))
        target = slice(filled, filled + source.stop - source.start)
        keys[target] = run.key[source]
        np.add(run.token[source], run.first_token, out=tokens[target], dtype=np.int64)
        filled = target.stop
    key, places = _ordered([np.diff(edge) for edge in edges], keys)
    return key, tokens.take(places)


def _extremes(
    runs: Sequence[Run],
    ptr: NDArray[np.int64],
    own: NDArray[np.int64],
    values: NDArray[np.float32],
    block: slice,
    first_feature: int,
) -> NDArray[np.float32]:
    """Highest and lowest value of each feature of a block [2, feature], NaN where it has none. Of a feature that goes
    on beyond this piece the runs tell.
    """
    edges = own[block.start : block.stop + 1]
    found = np.full((2, len(edges) - 1), np.nan, np.float32)
    some = np.flatnonzero(np.diff(edges))
    found[0, some] = values[edges[some] - edges[0]]
    found[1, some] = values[edges[some + 1] - 1 - edges[0]]
    for i in {0, len(edges) - 2}:
        feature = first_feature + block.start + i
        if ptr[feature + 1] - ptr[feature] > edges[i + 1] - edges[i]:
            spans = [(run, int(run.ptr[feature]), int(run.ptr[feature + 1])) for run in runs]
            keys = [run.key[[a, b - 1]] for run, a, b in spans if a < b]
            found[:, i] = values_of(np.array([min(k[0] for k in keys), max(k[1] for k in keys)], np.uint32))
    return found


def _statistics(
    values: NDArray[np.float32], count: NDArray[np.int64], extremes: NDArray[np.float32]
) -> NDArray[np.void]:
    """A row of `STATISTICS` a feature, of a block whose features have `count[feature]` values each, end to end."""
    rows = np.zeros(len(count), STATISTICS)
    rows["max"], rows["min"] = extremes
    some = np.flatnonzero(count)
    if not len(some):
        return rows
    wide = values.astype(np.float64)
    starts = (np.cumsum(count) - count)[some]
    rows["sum"][some] = np.add.reduceat(wide, starts)
    rows["square_sum"][some] = np.add.reduceat(wide * wide, starts)
    low = np.minimum(extremes[1, some], 0).astype(np.float64)
    width = (np.maximum(extremes[0, some], 0) - low) / BINS
    scale = np.divide(1, width, out=np.zeros_like(width), where=width > 0)
    wide -= np.repeat(low, count[some])
    wide *= np.repeat(scale, count[some])
    bins = np.minimum(wide.astype(np.int64), BINS - 1)
    bins += np.repeat(some * BINS, count[some])
    rows["histogram"] = np.bincount(bins, minlength=len(count) * BINS).reshape(-1, BINS)
    return rows
