"""What a run costs, by arithmetic: bytes and objects exactly, time and bandwidth from rates, passes until storing pays.

Closed forms over plain numbers and schemas: nothing is opened, and 10¹² tokens take no longer than ten. Bytes, seconds
and tokens a second throughout; hours, MB/s and prices are made where they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...stores.dtypes import format_of
from ...stores.schema import Array, Schema

Basis = Literal["exact", "measured", "computed", "assumed", "unknown"]
"""Where a figure comes from: the geometry; a measurement; arithmetic on measured figures; something taken for granted;
nowhere.
"""

CHECKSUM, ENTRY = 4, 16
"""Bytes of a crc32c, behind every chunk and behind an object's index; and of a chunk's entry in that index."""
KEYS_A_LISTING = 1000
"""Names that object stores give in one answer to a LIST."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its unit, and where it comes from. `value` is None where that is unknown, or without end."""

    value: float | None
    unit: str
    basis: Basis

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "unit": self.unit, "basis": self.basis}


def figure(value: float | None, unit: str, basis: Basis) -> Figure:
    """A figure that is unknown where its value is None."""
    return Figure(value, unit, "unknown" if value is None else basis)


@dataclass(frozen=True, slots=True)
class Objects:
    """How many objects an array has on disk, and their bytes in all, without compression."""

    count: int
    nbytes: int


def objects_of(array: Array, nonzeros: float = 0.0) -> Objects:
    """The objects of a whole array as they lie on disk without compression: chunks with their checksums, and an index
    behind them. Exact, but for a ragged array, each of whose rows is taken to hold `nonzeros` values.
    """
    cuts = list(zip(array.shape, array.chunks, array.shards, strict=True))
    count = math.prod(-(-size // shard) for size, _, shard in cuts)
    slots = math.prod(shard // chunk for _, chunk, shard in cuts)
    # What lies beyond an array's edge, or was never filled, is no chunk of any object.
    chunks = math.prod(-(-size // chunk) for size, chunk, _ in cuts)
    if array.ragged:
        chunks = count * max(1, math.ceil(nonzeros / array.chunks[1]))
    chunk_bytes = math.prod(array.chunks) * format_of(array.dtype).itemsize
    return Objects(count, chunks * (chunk_bytes + CHECKSUM) + count * (slots * ENTRY + CHECKSUM))


def value_bytes(array: Array, n_token: int, nonzeros_a_token: float = 0.0) -> float:
    """Bytes of an array's values alone, before checksums and compression."""
    return nonzeros_a_token * n_token * format_of(array.dtype).itemsize if array.ragged else float(array.nbytes)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store takes on disk: objects, and bytes by kind of compression, None where no profile tells them. Of it
    `a_layer` is one layer's part by array, where there are layers. Records, labels and metadata are left out.
    """

    objects: int
    values: float
    nbytes: Mapping[str, Figure]
    a_layer: Mapping[str, Mapping[str, Figure]]


def stored(
    schema: Schema, ratios: Mapping[str, float] | None = None, nonzeros_a_token: Mapping[str, float] | None = None
) -> Stored:
    """The bytes and objects of a whole store. `ratios` are bytes on disk over bytes of values, by compression, and
    `nonzeros_a_token` values a token of ragged arrays by path, both from a profile.
    """
    ratios, nonzeros = ratios or {}, nonzeros_a_token or {}
    regular = {path: array for path, array in schema.arrays.items() if not array.ragged}
    unit = min(schema.unit_tokens, schema.n_token)
    unknown = any(array.ragged and path not in nonzeros for path, array in schema.arrays.items())
    found = {path: objects_of(a, nonzeros.get(path, 0.0) * unit) for path, a in schema.arrays.items()}
    values = sum(value_bytes(a, schema.n_token, nonzeros.get(path, 0.0)) for path, a in schema.arrays.items())
    plain = None if unknown else sum(each.nbytes for each in found.values())
    bytes_by = {"none": figure(plain, "B", "computed" if len(regular) < len(found) else "exact")}
    for name, ratio in ratios.items():
        if name != "none":
            bytes_by[name] = figure(None if unknown else values * ratio, "B", "computed")
    a_layer = {
        path: {
            "none": figure(found[path].nbytes / array.shape[0], "B", "exact"),
            **{
                name: figure(array.nbytes / array.shape[0] * ratio, "B", "computed")
                for name, ratio in ratios.items()
                if name != "none"
            },
        }
        for path, array in regular.items()
        if array.dims[0] == "layer" and array.shape[0]
    }
    return Stored(sum(each.count for each in found.values()), values, bytes_by, a_layer)


def makespan(n_unit: int, workers: int, unit_seconds: float) -> float:
    """Seconds until `workers` of one speed have done `n_unit` equal units: none is divided among them."""
    return -(-n_unit // workers) * unit_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class AtWorkers:
    """What a step takes on a number of workers: seconds of computing (`load_seconds` included) and of writing, of which
    the longer is what it takes; the bandwidth, in B/s, that keeps all of them busy; and which of the two is the limit.
    """

    workers: int
    compute_seconds: float
    write_seconds: float | None
    needed: float | None
    limit: Literal["compute", "storage"]

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.write_seconds or 0.0)


def at_workers(
    *,
    n_token: int,
    unit_tokens: int,
    workers: int,
    tokens_per_second: float,
    bytes_per_token: float | None,
    bandwidth: float | None,
    load_seconds: float = 0.0,
) -> AtWorkers:
    """Time of a step on equal workers that share `bandwidth` (B/s; None: unknown, taken for enough). Units are whole,
    so workers beyond the number of units find nothing to do, and need no bandwidth.
    """
    n_unit = -(-n_token // unit_tokens)
    busy = min(workers, n_unit)
    compute = load_seconds + makespan(n_unit, workers, min(unit_tokens, n_token) / tokens_per_second)
    needed = None if bytes_per_token is None else bytes_per_token * tokens_per_second * busy
    write = None if bandwidth is None or bytes_per_token is None else n_token * bytes_per_token / bandwidth
    storage = bandwidth is not None and needed is not None and needed > bandwidth
    return AtWorkers(
        workers=workers,
        compute_seconds=compute,
        write_seconds=write,
        needed=needed,
        limit="storage" if storage else "compute",
    )


def crossover(once: float, a_pass: float, instead: float) -> int | None:
    """The fewest passes, at least one, from which on paying `once` and then `a_pass` each time comes to less than
    `instead` each time. None if it never does.
    """
    if a_pass >= instead:
        return None
    return max(1, math.floor(once / (instead - a_pass)) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to serve passes over the data: device seconds spent `once` and in `a_pass`, and bytes that are kept."""

    name: str
    once: float
    a_pass: float
    nbytes: float

    def seconds(self, passes: int) -> float:
        """Device seconds of so many passes: a device that waits for a read is held all the same."""
        return self.once + passes * self.a_pass

    def price(self, passes: int, prices: Prices) -> float:
        """Euros of so many passes: hours of the device, and what is kept for as long as it is kept."""
        kept = self.nbytes / 1e12 * prices.storage * prices.months
        return self.seconds(passes) / 3600 * prices.gpu + kept

    def pays_from(self, other: Strategy, prices: Prices | None = None) -> int | None:
        """The fewest passes for which this comes to less than `other`, in device seconds or, with prices, in euros."""
        if prices is None:
            return crossover(self.once - other.once, self.a_pass, other.a_pass)
        a_pass, instead = (one.a_pass / 3600 * prices.gpu for one in (self, other))
        return crossover(self.price(0, prices) - other.price(0, prices), a_pass, instead)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Euros a TB (10¹² B) and month for what is kept, and an hour for a worker's device; months that it is kept."""

    storage: float = 0.0
    gpu: float = 0.0
    months: float = 1.0


def cheapest(strategies: Sequence[Strategy], passes: int, prices: Prices | None = None) -> Strategy:
    """The strategy that comes to least for so many passes; of equal ones the one that keeps fewer bytes."""

    def cost(one: Strategy) -> tuple[float, float]:
        return one.seconds(passes) if prices is None else one.price(passes, prices), one.nbytes

    return min(strategies, key=cost)


def ledger_bytes(n_unit: int, record_bytes: float, block: int = 4096) -> float:
    """Bytes that the records of a step take on a file system whose files take whole blocks."""
    return n_unit * -(-record_bytes // block) * block


def lists(n_unit: int) -> int:
    """Requests that say which units are done, on an object store."""
    return max(1, -(-n_unit // KEYS_A_LISTING))
