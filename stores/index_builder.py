"""Building a feature-major index: out of core, with bounded memory, resumable at any moment, the same bytes every time.

Runs of tokens are sorted first, each into a file of its own; then the objects of the index are filled one by one, each
merged from its part of every run. Finished runs and objects have records, so that a build that was killed goes on.
Everything unfinished lies in `index/<group>/work`, or, of an index in an object store, in a temporary folder of this
machine; the index is there when its own record is put, last of all.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .digests import checksum_of
from .dtypes import format_of
from .errors import FULL, CorruptStore, DiskFull, SchemaError
from .feature_index import SHARD_FEATURES, FeatureIndex, built, determines, index_folder, index_schema
from .feature_rows import VALUES, FeatureRows, groups_of
from .fingerprint import canonical_json, fingerprint, versions, whereabouts
from .ledger import Ledger, Record, read_json, sync_folder, write_atomic
from .object_paths import ObjectPath
from .places import Place, delete_tree
from .postings import MOST, STATISTICS, Run, RunFile, keys_of, merged, sorted_run, tokens_that_fit
from .schema import DATA
from .store import Store
from .untrusted import require_no_links

WORKERS = 2
"""Threads: numpy sorts, and Zarr compresses, without Python's lock."""
LEAST_MEMORY = 2**28
LEAST_TOKENS = 2**13
"""Runs of fewer tokens would be too many: they are then made longer, though they sort more slowly."""
_NONZERO_BYTES = 56
"""Working memory for one nonzero of a run while it is read and sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How an index is cut: `run` nonzeros are sorted at a time; its objects hold `shard` postings in `chunk`s. Only the
    latter two can be told from the finished index.
    """

    run: int
    chunk: int = 2**16
    shard: int = 2**22


class Advance(NamedTuple):
    """How far the building of a group's index is: `phase` is "sort", which counts tokens, then "merge", which counts
    postings."""

    group: str
    phase: str
    done: int
    total: int


def _unheard(advance: Advance) -> None:
    return None


def build_index(
    folder: str | os.PathLike[str],
    group: str | None = None,
    *,
    skip_positions: int | None = None,
    memory: int = 2**30,
    progress: Callable[[Advance], None] = _unheard,
) -> list[FeatureIndex]:
    """Builds the index of one group of the features in a step's folder, or of every group, and opens it.

    Leaves out the first `skip_positions` tokens of every sequence; by default as many as the step does. An index that
    is there is verified, and built anew if it is damaged, of other features, or with other `skip_positions`. A build
    that was killed goes on where it stopped. One process at a time.

    Takes about `memory` bytes, at least 2**28, and 40 for each feature; on disk, until it is done, 8 for each nonzero
    beside the index itself. SchemaError for a group that is not there and for values that are not finite,
    IncompleteStore, DiskFull. `progress` hears of every run sorted and every object merged.
    """
    if memory < LEAST_MEMORY:
        raise SchemaError(f"memory = {memory:,} bytes are not enough to build an index; give at least {LEAST_MEMORY:,}")
    source = Store.open(folder)
    skip = int(source.header.provenance.get("skip_positions", 1)) if skip_positions is None else skip_positions
    if skip < 0:
        raise SchemaError(f"skip_positions = {skip} must be at least 0")
    geometry = Geometry(run=min(memory // (WORKERS * _NONZERO_BYTES), MOST))
    every = [FeatureRows.open(source, name) for name in (groups_of(source) if group is None else [group])]
    for rows in every:
        Build(rows, skip, geometry, progress).run()
    return [FeatureIndex.open(source, rows.group) for rows in every]


@dataclass(frozen=True)
class Build:
    """One index being built. Everything follows from its fields and from what is recorded."""

    rows: FeatureRows
    skip_positions: int
    geometry: Geometry
    progress: Callable[[Advance], None] = _unheard

    @property
    def folder(self) -> Place:
        return index_folder(self.rows.store, self.rows.group)

    @property
    def work(self) -> Path:
        return self.folder / "work" if isinstance(self.folder, Path) else scratch(str(self.folder))

    @property
    def sorting(self) -> Ledger:
        """Records of the runs."""
        return Ledger(self.work / "runs")

    @property
    def merging(self) -> Ledger:
        """Records of the index's objects."""
        return Ledger(self.work / "objects")

    @cached_property
    def determines(self) -> dict[str, Any]:
        return determines(self.rows.store, self.rows.group, self.skip_positions)

    @cached_property
    def objects(self) -> str:
        """One hash of the checksums of all objects that are read: a unit that was repaired may hold other bytes."""
        store, prefix = self.rows.store, f"{self.rows.group}/"
        records = [store.ledger.record(unit.index)["objects"] for unit in store.schema.grid]
        return fingerprint(
            [{key: checksum_of(said)[1] for key, said in r.items() if key.startswith(prefix)} for r in records]
        )

    @cached_property
    def spans(self) -> list[Span]:
        """The tokens of each run, few enough to sort fast unless there were too many runs then."""
        fitting = tokens_that_fit(self.rows.n_feature)
        most_tokens = fitting if fitting >= LEAST_TOKENS else 2**32
        return token_spans(self.rows, self.geometry.run, most_tokens)

    @cached_property
    def runs(self) -> RunFile:
        first, _, most = zip(*self.spans, strict=True)
        return RunFile(self.work / "runs" / "sorted", self.rows.n_feature, first, most)

    def run(self) -> None:
        """Builds the index, unless it is there and whole. Errors as `build_index` says."""
        step = self.rows.store.path.parent
        places = (self.folder / DATA, self.folder / "done", self.work / "runs" / "done", self.work / "objects" / "done")
        require_no_links(step.parent, step, *places)
        try:
            if not self._finished():
                self._prepare()
                self._sort()
                self._merge()
            self._clear()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFull(
                f"no space for the index of {self.rows.group!r} in {self.folder} ({error.strerror}). What is recorded "
                "is safe: free some space and build again"
            ) from error

    def _finished(self) -> bool:
        try:
            store = built(self.rows.store, self.rows.group)
        except (CorruptStore, SchemaError):
            return False
        if store is None or store.fingerprint != fingerprint(self.determines):
            return False
        return store.header.provenance["objects"] == self.objects and not store.verify()

    def _prepare(self) -> None:
        """Makes way for this build, unless what lies there is of this build and not finished."""
        if self.rows.dtype not in VALUES:
            raise SchemaError(f"{self.rows.group}/value has dtype {self.rows.dtype}; an index has one of {VALUES}")
        plan = {"determines": self.determines, "objects": self.objects, "geometry": asdict(self.geometry)}
        path = self.work / "plan.json"
        if path.exists() and read_json(path) == plan and not Ledger(self.folder).done():
            return
        Ledger(self.folder).drop(0)
        self._clear()
        delete_tree(self.folder if isinstance(self.folder, ObjectPath) else self.folder / DATA)
        for ledger in (self.sorting, self.merging):
            ledger.done_folder.mkdir(parents=True)
        self.runs.create()
        sync_folder(self.folder)
        write_atomic(path, canonical_json(plan).encode())

    def _clear(self) -> None:
        """Removes what was unfinished. The plan goes first: without it nothing else is believed."""
        (self.work / "plan.json").unlink(missing_ok=True)
        delete_tree(self.work)

    # ── sorting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _sort(self) -> None:
        done = self.sorting.done()
        todo = [index for index in range(len(self.spans)) if index not in done]
        sizes = [span.stop - span.start for span in self.spans]
        self._each("sort", self._sort_run, todo, sizes)

    def _sort_run(self, index: int) -> None:
        start, stop, _ = self.spans[index]
        rows = self.rows.read(start, stop)
        values = rows.value.astype(np.float32, copy=False)
        token = np.repeat(np.arange(stop - start, dtype=np.uint32), rows.count)
        if not np.isfinite(values).all():
            wrong = int(np.argmin(np.isfinite(values)))
            raise SchemaError(
                f"token {start + token[wrong]} has the value {values[wrong]} for feature {rows.feature[wrong]} of "
                f"{self.rows.group!r}; an index orders finite values. Look at the activations of that token"
            )
        skipped = self.rows.tables.labels("position", range(start, stop)) < self.skip_positions
        run = sorted_run(start, self.rows.n_feature, rows.feature, token, keys_of(values), skipped)
        self.runs.save(index, run)
        self.sorting.complete(index, {"tokens": [start, stop], "nonzeros": len(run.key)})

    # ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _merge(self) -> None:
        """Fills the index from the sorted runs, and records it."""
        runs = self.runs.load()
        ptr = np.zeros(self.rows.n_feature + 1, np.int64)
        for run in runs:
            ptr += run.ptr
        schema = index_schema(self.rows, int(ptr[-1]), self.geometry.chunk, self.geometry.shard)
        skipped = np.minimum(np.diff(self.rows.tables.sequence_edges), self.skip_positions).sum()
        provenance = {
            "determines": self.determines,
            "objects": self.objects,
            "tokens": self.rows.store.schema.n_token - int(skipped),
        }
        store = Store.create(self.folder, schema, fingerprint(self.determines), provenance)
        store.sweep()
        done = self.merging.done()
        starts = range(0, int(ptr[-1]), self.geometry.shard)
        todo = [index for index in range(len(starts)) if index not in done]
        sizes = [min(self.geometry.shard, int(ptr[-1]) - start) for start in starts]
        self._each("merge", partial(self._merge_object, store, runs, ptr), todo, sizes)
        objects = self._write_statistics(store, ptr, len(starts))
        for index in range(len(starts)):
            objects |= self.merging.record(index)["objects"]
        store.ledger.complete(0, _record(store, objects))

    def _statistics_path(self, index: int) -> Path:
        return self.work / "objects" / f"{index:06d}.statistics"

    def _merge_object(self, store: Store, runs: list[Run], ptr: NDArray[np.int64], index: int) -> None:
        start = index * self.geometry.shard
        stop = min(start + self.geometry.shard, int(ptr[-1]))
        formats = {name: format_of(store.schema.arrays[name].dtype) for name in ("token", "value")}
        kept = {name: np.empty(stop - start, format.kept) for name, format in formats.items()}
        features: list[int] = []
        filled = 0
        with open(self._statistics_path(index), "wb") as file:
            for block in merged(runs, ptr, start, stop):
                span = slice(filled, filled + len(block.token))
                kept["token"][span] = block.token
                kept["value"][span] = formats["value"].encode(block.value)
                file.write(block.statistics.view(np.uint8).data)
                features += [block.first_feature, block.first_feature + len(block.statistics)]
                filled = span.stop
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.work / "objects")
        objects = _put(store, {name: ({"nonzero": slice(start, stop)}, values) for name, values in kept.items()})
        self.merging.complete(index, {"objects": objects, "features": [features[0], features[-1]]})

    def _write_statistics(self, store: Store, ptr: NDArray[np.int64], n_object: int) -> dict[str, Any]:
        """Adds up what the objects' makers know of every feature, and writes it; gives the objects' checksums."""
        spans = [self.merging.record(index)["features"] for index in range(n_object)]
        objects: dict[str, Any] = {}
        for start in range(0, len(ptr), SHARD_FEATURES):
            edges = slice(start, min(start + SHARD_FEATURES, len(ptr)))
            objects |= _put(store, {"ptr": ({"edge": edges}, ptr[edges])})
        for start in range(0, self.rows.n_feature, SHARD_FEATURES):
            own = slice(start, min(start + SHARD_FEATURES, self.rows.n_feature))
            found = np.zeros(own.stop - own.start, STATISTICS)
            found["max"] = found["min"] = np.nan
            for index, (first, beyond) in enumerate(spans):
                if first < own.stop and own.start < beyond:
                    part = np.memmap(self._statistics_path(index), STATISTICS, "r")
                    both = slice(max(first, own.start), min(beyond, own.stop))
                    _add(found[both.start - start : both.stop - start], part[both.start - first : both.stop - first])
            columns = {name: found[name].astype(store.schema.arrays[name].dtype) for name in STATISTICS.names or ()}
            columns["n_active"] = np.diff(ptr[own.start : own.stop + 1])
            objects |= _put(store, {name: ({"feature": own}, values) for name, values in columns.items()})
        return objects

    def _each(self, phase: str, work: Callable[[int], None], todo: list[int], sizes: list[int]) -> None:
        """Calls `work` for each index of `todo` in threads, and tells of each that is done."""
        done, total = sum(sizes) - sum(sizes[index] for index in todo), sum(sizes)
        with ThreadPoolExecutor(WORKERS) as pool:
            futures = {pool.submit(work, index): index for index in todo}
            try:
                for future in as_completed(futures):
                    future.result()
                    done += sizes[futures[future]]
                    self.progress(Advance(self.rows.group, phase, done, total))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def scratch(name: str) -> Path:
    """A folder of this user's among this machine's temporary ones, the same for the same name. SchemaError if another
    user has made what stands there.
    """
    mine = Path(tempfile.gettempdir()) / f"forebay-{os.getuid() if hasattr(os, 'getuid') else 'index'}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.is_symlink() or (hasattr(os, "getuid") and mine.stat().st_uid != os.getuid()):
        raise SchemaError(f"{mine} is not this user's own folder: set TMPDIR to another place for the index's work")
    return mine / hashlib.sha256(name.encode()).hexdigest()[:32]


class Span(NamedTuple):
    """Tokens [start, stop), which have at most `most` nonzeros."""

    start: int
    stop: int
    most: int


def token_spans(rows: FeatureRows, most: int, most_tokens: int) -> list[Span]:
    """Consecutive ranges of all tokens, at most `most_tokens` with at most `most` nonzeros, or one token each."""
    n_token = rows.store.schema.n_token
    if rows.counted:
        rank = rows.store.schema.arrays[f"{rows.group}/feature"].shape[1]
        step = min(max(1, most // rank), most_tokens)
        edges = range(0, n_token, step)
        return [Span(start, min(start + step, n_token), rank * min(step, n_token - start)) for start in edges]
    spans, start, have = list[Span](), 0, 0
    for unit in rows.store.schema.grid:
        total, used = np.cumsum(rows.counts(unit.start, unit.stop)), 0
        while True:
            edge = unit.start + int(np.searchsorted(total, used + most - have, side="right"))
            edge = min(max(edge, start + 1), start + most_tokens)
            if edge >= unit.stop:
                break
            reached = int(total[edge - unit.start - 1]) if edge > unit.start else 0
            spans.append(Span(start, edge, have + reached - used))
            start, have, used = edge, 0, reached
        have += int(total[-1]) - used
    return [*spans, Span(start, n_token, have)]


def _add(to: NDArray[np.void], more: NDArray[np.void]) -> None:
    for name in ("sum", "square_sum", "histogram"):
        to[name] += more[name]
    to["max"] = np.fmax(to["max"], more["max"])
    to["min"] = np.fmin(to["min"], more["min"])


def _put(store: Store, parts: Mapping[str, tuple[dict[str, slice], NDArray[Any]]]) -> dict[str, Any]:
    """Writes whole objects of arrays durably and gives their sizes and checksums."""
    objects: dict[str, Any] = {}
    for name, (rows, values) in parts.items():
        objects |= store.write_rows(name, rows, values)
    if isinstance(store.path, Path):
        for folder in {folder for key in objects for folder in PurePosixPath(key).parents}:
            sync_folder(store.path / folder)
    return objects


def _record(store: Store, objects: dict[str, Any]) -> Record:
    return {
        "unit": 0,
        "fingerprint": store.fingerprint,
        "rows": {"token": [0, store.schema.n_token]},
        "objects": objects,
        "bytes": sum(entry["bytes"] for entry in objects.values()),
        "finished": time.time(),
        "versions": versions(),
        **whereabouts(),
    }
