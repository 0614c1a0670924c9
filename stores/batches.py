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

from .chunks import Chunks, decode_into
from .dtypes import format_of
from .errors import SchemaError, StoreNotFound, nearest
from .fingerprint import fingerprint
from .html import html_table
from .places import Place, place
from .schema import Array, holds_store
from .store import Store
from .threads import N_CORE, WAITING
from .tree import run_stores

READERS = GATHERERS = max(2, N_CORE)
"""Threads that read chunks into the next buffer, and that gather a batch from this one: more than there are processors
wait for each other. Of an object store `WAITING` read at least, for they wait for answers.
"""
BLOCK, PART_BYTES = 64, 2**21
"""Rows that are gathered and decoded at once, which stay in a processor's cache; what a thread gathers."""
Rows = NDArray[Any]
Ints = NDArray[np.int64]
_Filled = tuple[list[Future[None]], list[Rows], Ints, bool]
"""What fills it, the buffer of each hook point, its rows in their order, and whether it is the last of an epoch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Stored activations of one hook point, `[batch, d]` arrays, or of several, tuples of arrays of the same tokens.

    `run` is the folder of a run, or of one of its steps; `hooks` a name as "blocks.15.hook_resid_post", or several.
    Heads are flattened: a row of `attn.hook_z` is head · d_head wide. Arrays are numpy float32 (bfloat16 decoded
    exactly), or with `dtype="stored"` values as they lie on disk, bfloat16 as the uint16 of its bits.

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

    run: str | os.PathLike[str]
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
    dtype: Literal["float32", "stored"] = "float32"
    _columns: tuple[_Column, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        least = {"batch": 1, "seed": 0, "epochs": 1, "skip_positions": 0, "start": 0, "buffer_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise SchemaError(f"batches: {name} = {value} must be at least {smallest}")
        if self.dtype not in ("float32", "stored"):
            raise SchemaError(f'batches: dtype = {self.dtype!r} must be "float32" or "stored"')
        object.__setattr__(self, "_columns", tuple(_find(place(self.run), self.names)))
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
        return len(self._columns[0].tokens[2])

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
        order = f"shuffled with seed {self.seed}" if self.shuffle else "in order"
        return (
            f"Batches({points}: {self.n_token:,} tokens, of every sequence those from position {self.skip_positions} "
            f"on, {order}, in batches of {self.batch:,}, epochs={self.epochs}, start={self.start})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "run": self.run,
            "tokens in an epoch": f"{self.n_token:,}",
            "batches in an epoch": f"{self.n_batch:,} of {self.batch:,} tokens",
            "epochs": "for ever" if self.epochs is None else self.epochs,
            "order": f"shuffled with seed {self.seed}" if self.shuffle else "as stored",
            "first position": self.skip_positions,
            "dtype": self.dtype,
        }
        return html_table("Batches", facts, ("hook point", "width"), zip(self.names, self.widths, strict=True))

    def about(self) -> dict[str, Any]:
        """What determines values and order, as JSON values: the settings, and the fingerprints of the stores."""
        settings = ("batch", "seed", "shuffle", "skip_positions", "drop_last", "buffer_tokens", "dtype")
        return {
            "hooks": list(self.names),
            "stores": [column.store.fingerprint for column in self._columns],
            "model": self._columns[0].store.header.provenance.get("model", {}).get("source"),
            "documents": fingerprint(np.flatnonzero(self._chosen).tolist()),
            **{name: getattr(self, name) for name in settings},
        }

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
        n_token, sequences, documents = self._columns[0].tokens
        edges = np.unique(np.concatenate([sequences, documents, [n_token]]))
        first, beyond = edges[:-1], edges[1:]
        sequence = sequences[np.searchsorted(sequences, first, "right") - 1]
        start = np.maximum(first, sequence + self.skip_positions)
        kept = (start < beyond) & self._chosen[np.searchsorted(documents, first, "right") - 1]
        return start[kept], beyond[kept]

    @cached_property
    def _piece(self) -> int:
        """Tokens of a piece: as few as make whole chunks of every hook point."""
        return math.lcm(*(column.rows for column in self._columns))

    @cached_property
    def _counts(self) -> Ints:
        """Tokens kept of each piece."""
        start, stop = self._kept
        n_token = self._columns[0].tokens[0]
        edges = np.append(np.arange(0, n_token, self._piece), n_token)
        before = np.concatenate([[0], np.cumsum(stop - start)])
        at = np.searchsorted(start, edges, "right") - 1
        inside = np.clip(edges - start[at], 0, (stop - start)[at]) if len(start) else 0
        return np.diff(np.where(at < 0, 0, before[at] + inside))

    def _kept_rows(self, pieces: Ints) -> Ints:
        """Rows of a buffer that holds `pieces` end to end: those that are kept, in order."""
        start, stop = self._kept
        tokens = (pieces[:, None] * self._piece + np.arange(self._piece)).ravel()
        at = np.searchsorted(start, tokens, "right") - 1
        return np.flatnonzero((at >= 0) & (tokens < stop[at]))

    def _buffers(self) -> Iterator[tuple[Ints, Ints, bool]]:
        """From `start` on: the pieces of each buffer, its rows in their order, and whether it is an epoch's last."""
        pieces = np.flatnonzero(self._counts)
        n_buffer = -(-len(pieces) // max(1, self.buffer_tokens // self._piece))
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
        seed = np.random.SeedSequence(self.seed, spawn_key=(epoch, part))
        return np.argsort(np.random.PCG64(seed).random_raw(n))

    def __iter__(self) -> Iterator[Any]:
        found = self._batches()
        return (arrays[0] for arrays in found) if isinstance(self.hooks, str) else found

    def _batches(self) -> Iterator[tuple[Rows, ...]]:
        made, n = self._empty(), 0
        with ThreadPoolExecutor(GATHERERS, "gather") as pool:
            for reads, buffers, rows, last in self._filled():
                for read in reads:
                    read.result()
                at = 0
                while at < len(rows):
                    some = rows[at : at + self.batch - n]
                    for column, target, buffer in zip(self._columns, made, buffers, strict=True):
                        column.gather(buffer, some, target[n : n + len(some)], pool)
                    at, n = at + len(some), n + len(some)
                    if n == self.batch:
                        yield made
                        made, n = self._empty(), 0
                if last and n:
                    if not self.drop_last:
                        yield tuple(array[:n] for array in made)
                    made, n = self._empty(), 0

    def _empty(self) -> tuple[Rows, ...]:
        as_kept = self.dtype == "stored"
        return tuple(np.empty((self.batch, c.width), c.kept if as_kept else np.float32) for c in self._columns)

    def _filled(self) -> Iterator[_Filled]:
        """Buffers, each to be waited for while the next one is being read; it is overwritten two later."""
        size = self._piece * min(max(1, self.buffer_tokens // self._piece), len(self._counts))
        memory = [[np.empty((size, c.width), c.kept) for c in self._columns] for _ in range(2)]
        here = all(isinstance(column.store.path, Path) for column in self._columns)
        pool = ThreadPoolExecutor(READERS if here else max(WAITING, READERS), "batches")
        ahead: list[_Filled] = []
        try:
            for n, (pieces, rows, last) in enumerate(self._buffers()):
                ahead.append((self._read(pool, pieces, memory[n % 2]), memory[n % 2], rows, last))
                if n:
                    yield ahead.pop(0)
            yield from ahead
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, pool: ThreadPoolExecutor, pieces: Ints, buffers: list[Rows]) -> list[Future[None]]:
        reads = []
        for slot, piece in enumerate(pieces.tolist()):
            for column, buffer in zip(self._columns, buffers, strict=True):
                first = piece * self._piece
                for token in range(first, min(first + self._piece, column.tokens[0]), column.rows):
                    row = slot * self._piece + token - first
                    reads.append(pool.submit(column.read, token // column.rows, buffer[row : row + column.rows]))
        return reads


@dataclass(frozen=True, eq=False)
class _Column:
    """One hook point's rows: an array of a store, at one layer (a number along its axis `layer`)."""

    store: Store
    path: str
    layer: int | None

    @cached_property
    def array(self) -> Array:
        return self.store.schema.arrays[self.path]

    @cached_property
    def kept(self) -> np.dtype[Any]:
        return np.dtype(format_of(self.array.dtype).kept)

    @property
    def axis(self) -> int:
        return self.array.dims.index("token")

    @property
    def width(self) -> int:
        return math.prod(self.array.shape[self.axis + 1 :])

    @cached_property
    def rows(self) -> int:
        """Tokens of a chunk."""
        return self.array.chunks[self.axis]

    @cached_property
    def tokens(self) -> tuple[int, Ints, Ints]:
        """How many there are, and where sequences and documents start."""
        labels = self.store.labels
        return self.store.schema.n_token, labels["sequences/start"][1], labels["documents/start"][1]

    @cached_property
    def chunks(self) -> Chunks:
        return Chunks(self.store, self.path)

    def read(self, chunk: int, into: Rows) -> None:
        """Puts a chunk, by its number along `token`, into [rows, width]. CorruptStore if it is not what was written."""
        shard, within = divmod(chunk, self.array.shards[self.axis] // self.rows)
        lead = () if self.layer is None else (self.layer,)
        self.chunks.read((*lead, shard, *(0,) * (len(self.array.dims) - self.axis - 1)), within, into)

    def gather(self, buffer: Rows, rows: Ints, into: Rows, pool: ThreadPoolExecutor) -> None:
        """Puts some rows of a buffer into [row, width], as bits or decoded, whichever `into` is for."""
        size = max(BLOCK, PART_BYTES // max(1, into[:1].nbytes))
        starts = range(0, len(rows), size)
        if len(starts) == 1:
            self._gather(buffer, rows, into)
        else:
            list(pool.map(lambda at: self._gather(buffer, rows[at : at + size], into[at : at + size]), starts))

    def _gather(self, buffer: Rows, rows: Ints, into: Rows) -> None:
        # numpy takes rows without a copy in between where it need not refuse those that are not there
        if buffer.dtype == into.dtype:
            buffer.take(rows, axis=0, out=into, mode="clip")
            return
        block = np.empty((BLOCK, self.width), buffer.dtype)
        for at in range(0, len(rows), BLOCK):
            some = rows[at : at + BLOCK]
            found = buffer.take(some, axis=0, out=block[: len(some)], mode="clip")
            decode_into(found, self.array.dtype, into[at : at + len(some)])


def _find(run: Place, names: Sequence[str]) -> Iterator[_Column]:
    """The arrays of hook points, all with the same tokens."""
    stores = [Store.open(run)] if holds_store(run) else list(run_stores(run))
    stores = [store for store in stores if store.schema.kind == "activations"]
    if not stores:
        raise StoreNotFound(f"{run} holds no store of activations. Give the folder of a run that has captured some")
    if not names:
        raise SchemaError(f'{run}: name at least one hook point, for example "blocks.0.hook_resid_post"')
    # Of captures that keep one point, which only a folder of several recipes can have, the first one's.
    places = {name: column for store in reversed(stores) for name, column in _points(store)}
    first: _Column | None = None
    for name in names:
        if name not in places:
            held = ", ".join(pattern for store in stores for pattern in _patterns(store))
            raise SchemaError(f"{run} holds no {name!r}.{nearest(name, places)} It holds {held}")
        _check(name, places[name], first)
        first = first or places[name]
        yield places[name]


def _layers(store: Store) -> Iterator[tuple[str, str, list[int] | None]]:
    """Path and kind of every array, and the layers that it has."""
    for path in store.schema.arrays:
        kind = path.rpartition("/")[0]
        layers = store.labels.get(f"{kind}/layer")
        yield path, kind, None if layers is None else layers[1].tolist()


def _points(store: Store) -> Iterator[tuple[str, _Column]]:
    for path, kind, layers in _layers(store):
        if layers is None:
            yield kind, _Column(store, path, None)
        else:
            yield from ((f"blocks.{layer}.{kind}", _Column(store, path, n)) for n, layer in enumerate(layers))


def _patterns(store: Store) -> Iterator[str]:
    for _, kind, layers in _layers(store):
        yield kind if layers is None else f"blocks.{{{','.join(map(str, layers))}}}.{kind}"


def _check(name: str, column: _Column, first: _Column | None) -> None:
    if "token" not in column.array.dims:
        raise SchemaError(
            f"{column.store.path.parent}: {name} lies along {', '.join(column.array.dims)}, without a token axis: "
            "attention patterns and recurrent states have no rows to make batches of"
        )
    column.store.require_complete()
    if first and not all(np.array_equal(column.tokens[n], first.tokens[n]) for n in range(3)):
        raise SchemaError(
            f"{name} of {column.store.path.parent} has other tokens than {first.path} of {first.store.path.parent}: "
            "rows of one batch must be of the same tokens"
        )
