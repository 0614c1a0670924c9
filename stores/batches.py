"""Minibatches of stored activations, shuffled or in order: whole chunks at random into a buffer, rows of it at random.

A read of single random rows costs what a read of their chunks does. So chunks of about 1 MiB are read whole, in random
order, and mixed in memory, which is a hundred times faster and mixes as well where the buffer holds many chunks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .dtypes import Format, format_of
from .errors import CorruptStore, IncompleteStore, SchemaError, StoreNotFound, nearest
from .schema import DATA, Array
from .store import Store
from .tree import REPAIR, run_stores

READERS = 4
BLOCK = 256
"""Rows that are gathered and decoded at once, which stay in a processor's cache."""

Dtype = Literal["float32", "float64", "stored"]
Rows = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Stored activations of one hook point, `[batch, d]` arrays, or of several, tuples of arrays of the same tokens.

    `run` is the folder of a run, or of one of its steps; `hooks` a name as "blocks.15.hook_resid_post", or several.
    Heads are flattened: a row of `attn.hook_z` is head · d_head wide. Arrays are numpy float32 (bfloat16 decoded
    exactly) or what `dtype` says; "stored" gives values as they lie on disk, bfloat16 as the uint16 of its bits.

    Left out are the first `skip_positions` tokens of every sequence, which hold massive activations that would swamp
    everything, and tokens outside `documents`, a list of document numbers or a slice as Python indexes (stop left out).
    Every other token comes exactly once in each of `epochs` (None: for ever), in batches of `batch` rows; the last one
    of an epoch is shorter, or left out with `drop_last`. `start` is the number of the first batch, counted from 0
    through all epochs: what lies before it is not read, but for the buffer in which it begins.

    With `shuffle`, all chunks of the store are put in random order; `buffer_tokens` tokens (at least one chunk) at a
    time are read and permuted. The order depends on `seed`, the epoch and the store's geometry only: it is the same in
    every process. Two buffers, in the stored dtype, are held at a time: one is read by threads while the other is used.
    Iterators are independent of each other.

    Every chunk's checksum is verified. Raises SchemaError for a hook point that is not there, that has no token axis
    (attention patterns, recurrent states), or that lies in another store with other tokens than the rest;
    IncompleteStore; CorruptStore while reading.
    """

    run: Path
    hooks: str | tuple[str, ...]
    batch: int = 4096
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = 1
    skip_positions: int = 1
    documents: slice | Sequence[int] | None = None
    drop_last: bool = False
    start: int = 0
    buffer_tokens: int = 65_536
    dtype: Dtype = "float32"
    _columns: tuple[_Column, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        least = {"batch": 1, "seed": 0, "epochs": 1, "skip_positions": 0, "start": 0, "buffer_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise SchemaError(f"batches: {name} = {value} must be at least {smallest}")
        if self.dtype not in ("float32", "float64", "stored"):
            raise SchemaError(f'batches: dtype = {self.dtype!r} must be "float32", "float64" or "stored"')
        object.__setattr__(self, "_columns", tuple(_find(Path(self.run), self.names)))
        if not self.n_batch:
            raise SchemaError(
                f"{self.run}: {self.n_token:,} tokens are left, which make no batch of {self.batch:,}. Choose more "
                "documents, a smaller batch, or fewer skip_positions"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hooks,) if isinstance(self.hooks, str) else tuple(self.hooks)

    @property
    def widths(self) -> tuple[int, ...]:
        """Values in a row of each hook point."""
        return tuple(column.width for column in self._columns)

    @property
    def n_document(self) -> int:
        """Documents in the run, chosen or not."""
        return len(self._columns[0].documents)

    @cached_property
    def n_token(self) -> int:
        """Tokens in an epoch."""
        return int(self._counts.sum())

    @property
    def n_batch(self) -> int:
        """Batches in an epoch."""
        return self.n_token // self.batch if self.drop_last else -(-self.n_token // self.batch)

    def __len__(self) -> int:
        """Batches from `start` to the end of the last epoch. TypeError where there is no end."""
        if self.epochs is None:
            raise TypeError("batches without an end have no length: epochs is None. An epoch has .n_batch of them")
        return max(0, self.epochs * self.n_batch - self.start)

    def __repr__(self) -> str:
        points = " and ".join(f"{name} [{width}]" for name, width in zip(self.names, self.widths, strict=True))
        order = f"shuffled in buffers of {self.buffer_tokens:,} with seed {self.seed}" if self.shuffle else "in order"
        skipped = f"the first {self.skip_positions} of every sequence left out" if self.skip_positions else "all of them"
        epochs = "epochs without end" if self.epochs is None else f"{self.epochs} epoch{'s' * (self.epochs != 1)}"
        chosen = "" if self.documents is None else ", of some documents"
        return (
            f"Batches({points}: {self.n_token:,} tokens ({skipped}{chosen}) in batches of {self.batch:,}, "
            f"{order}; {epochs})"
        )

    def about(self) -> dict[str, Any]:
        """What determines the values and their order, as JSON values: fingerprints of the stores and the settings."""
        chosen = np.flatnonzero(self._chosen).tolist() if self.documents is not None else None
        return {
            "hooks": list(self.names),
            "stores": [column.store.fingerprint for column in self._columns],
            "documents": chosen,
            **{k: getattr(self, k) for k in ("batch", "seed", "shuffle", "skip_positions", "drop_last", "dtype")},
            "buffer_tokens": self.buffer_tokens if self.shuffle else None,
        }

    # ── which tokens ─────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _chosen(self) -> NDArray[np.bool_]:
        """Which documents are."""
        chosen = np.zeros(self.n_document, dtype=bool)
        try:
            chosen[slice(None) if self.documents is None else self.documents] = True
        except IndexError as error:
            raise SchemaError(f"{self.run} has documents 0 to {self.n_document - 1}: {error}") from error
        return chosen

    @cached_property
    def _kept(self) -> tuple[Ints, Ints]:
        """Intervals [start, stop) of tokens that are kept, ascending. Every one lies in one sequence and document."""
        column = self._columns[0]
        edges = np.unique(np.concatenate([column.sequences, column.documents, [column.array_tokens]]))
        first, beyond = edges[:-1], edges[1:]
        sequence = column.sequences[np.searchsorted(column.sequences, first, "right") - 1]
        start = np.maximum(first, sequence + self.skip_positions)
        kept = (start < beyond) & self._chosen[np.searchsorted(column.documents, first, "right") - 1]
        return start[kept], beyond[kept]

    @cached_property
    def _rows(self) -> int:
        """Tokens of a piece: as few as make whole chunks of every hook point."""
        return math.lcm(*(column.rows for column in self._columns))

    @cached_property
    def _counts(self) -> Ints:
        """Tokens kept of each piece."""
        start, stop = self._kept
        edges = np.append(np.arange(0, self._columns[0].array_tokens, self._rows), self._columns[0].array_tokens)
        before = np.concatenate([[0], np.cumsum(stop - start)])
        at = np.searchsorted(start, edges, "right") - 1
        inside = np.clip(edges - start[at], 0, (stop - start)[at]) if len(start) else 0
        return np.diff(np.where(at < 0, 0, before[at] + inside))

    def _kept_rows(self, pieces: Ints) -> Ints:
        """Rows of a buffer that holds `pieces` end to end: those that are kept, in order."""
        start, stop = self._kept
        tokens = (pieces[:, None] * self._rows + np.arange(self._rows)).ravel()
        at = np.searchsorted(start, tokens, "right") - 1
        return np.flatnonzero((at >= 0) & (tokens < stop[at]))

    # ── in which order ───────────────────────────────────────────────────────────────────────────────────────────────

    def _buffers(self) -> Iterator[tuple[Ints, Ints, bool]]:
        """From `start` on: the pieces of each buffer, its rows in their order, and whether it is an epoch's last."""
        pieces = np.flatnonzero(self._counts)
        n_buffer = -(-len(pieces) // max(1, self.buffer_tokens // self._rows))
        cuts = np.arange(n_buffer + 1) * len(pieces) // n_buffer
        epoch, batch = divmod(self.start, self.n_batch)
        while self.epochs is None or epoch < self.epochs:
            order = pieces[self._permutation(len(pieces), epoch, 0)] if self.shuffle else pieces
            before = np.concatenate([[0], np.cumsum(self._counts[order])])[cuts]
            first = int(np.searchsorted(before, batch * self.batch, "right")) - 1
            for n in range(first, n_buffer):
                own = order[cuts[n] : cuts[n + 1]]
                rows = self._kept_rows(own)
                rows = rows[self._permutation(len(rows), epoch, 1 + n)] if self.shuffle else rows
                yield own, rows[batch * self.batch - before[n] :] if n == first else rows, n == n_buffer - 1
            epoch, batch = epoch + 1, 0

    def _permutation(self, n: int, epoch: int, part: int) -> Ints:
        """Of raw random bits, which no version of numpy changes, unlike its own permutations."""
        bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch, part))).random_raw(n)
        return np.argsort(bits, kind="stable")

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def __iter__(self) -> Iterator[Any]:
        found = self._batches()
        return (arrays[0] for arrays in found) if isinstance(self.hooks, str) else found

    def _batches(self) -> Iterator[tuple[Rows, ...]]:
        made, n = self._empty(), 0
        for buffers, rows, last in self._filled():
            at = 0
            while at < len(rows):
                some = rows[at : at + self.batch - n]
                for column, target, buffer in zip(self._columns, made, buffers, strict=True):
                    column.gather(buffer, some, target[n : n + len(some)])
                at, n = at + len(some), n + len(some)
                if n == self.batch:
                    yield made
                    made, n = self._empty(), 0
            if last and n:
                if not self.drop_last:
                    yield tuple(array[:n] for array in made)
                made, n = self._empty(), 0

    def _empty(self) -> tuple[Rows, ...]:
        return tuple(
            np.empty((self.batch, c.width), c.format.kept if self.dtype == "stored" else self.dtype)
            for c in self._columns
        )

    def _filled(self) -> Iterator[tuple[list[Rows], Ints, bool]]:
        """Buffers of every hook point with their rows, read one ahead; each is overwritten two later."""
        size = self._rows * max(1, self.buffer_tokens // self._rows)
        memory = [[np.empty((size, c.width), c.format.kept) for c in self._columns] for _ in range(2)]
        plan = enumerate(self._buffers())
        with ThreadPoolExecutor(READERS, "batches") as pool:
            behind: tuple[list[Future[None]], list[Rows], Ints, bool] | None = None
            for n, (pieces, rows, last) in plan:
                ahead = self._read(pool, pieces, memory[n % 2]), memory[n % 2], rows, last
                if behind:
                    yield _waited(*behind)
                behind = ahead
            if behind:
                yield _waited(*behind)

    def _read(self, pool: ThreadPoolExecutor, pieces: Ints, buffers: list[Rows]) -> list[Future[None]]:
        reads = []
        for slot, piece in enumerate(pieces.tolist()):
            for column, buffer in zip(self._columns, buffers, strict=True):
                part = buffer[slot * self._rows : (slot + 1) * self._rows]
                reads += [
                    pool.submit(column.read, piece * (self._rows // column.rows) + i, part[i * column.rows :])
                    for i in range(self._rows // column.rows)
                ]
        return reads
