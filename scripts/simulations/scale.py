"""The arithmetic of scale as tables: what 10⁹ to 10¹² tokens of real models take, by the formulas of the code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from forebay.pipeline.report.costs import crossover, ledger_bytes, lists, makespan, stored
from forebay.pipeline.report.tables import size
from forebay.stores.dtypes import format_of
from forebay.stores.schema import Array, Schema, along_token, unit_tokens_for

CONTEXT, BATCH = 1024, 8
"""Tokens in a sequence; units are as many sequences."""
MOST_OBJECTS = 10**7
RECORD_BYTES, RECORD_OBJECT_BYTES = 900, 130
"""Of a record: what every one has, and what it has for every object (its key, bytes and checksum)."""
MOST_BUFFERS = 32e9
"""Bytes: a unit's buffers are held twice in memory."""
TOKENS = (10**9, 10**10, 10**11, 10**12)


@dataclass(frozen=True)
class Shape:
    """A model as far as storing its residual stream goes, and its weights in billions."""

    name: str
    layers: int
    d_model: int
    billions: float

    @property
    def flops_a_token(self) -> float:
        """Two a weight: the matrix products of a forward, attention itself left out."""
        return 2e9 * self.billions


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 0.135),
    Shape("Gemma-2-2B", 26, 2304, 2.6),
    Shape("Llama-3.1-8B", 32, 4096, 8.0),
)
RANK = 32
"""Features a token of the TopK dictionary, of 16,384: an int32 and a bfloat16 each, whatever their number."""


def dense(shape: Shape, layers: int, n_token: int, unit_tokens: int | None = None) -> Schema:
    """The store of so many layers of the residual stream in bfloat16."""
    sizes = {"layer": layers, "token": n_token, "d_model": shape.d_model}
    width = shape.d_model * 2
    unit = unit_tokens or unit_tokens_for(width, CONTEXT, token_bytes=layers * width, least=BATCH * CONTEXT)
    arrays = {"hook_resid_post/value": along_token(("layer", "token", "d_model"), sizes, "bfloat16", unit)}
    return Schema(kind="activations", n_token=n_token, unit_tokens=unit, arrays=arrays)


def features(n_token: int, unit_tokens: int | None = None) -> Schema:
    """The store of TopK features in bfloat16, encoded behind the forward."""
    sizes = {"token": n_token, "rank": RANK}
    unit = unit_tokens or unit_tokens_for(64 * 4, CONTEXT)
    arrays = {
        f"sae/{name}": along_token(("token", "rank"), sizes, dtype, unit)
        for name, dtype in (("feature", "int32"), ("value", "bfloat16"))
    }
    return Schema(kind="features", n_token=n_token, unit_tokens=unit, arrays=arrays)


def choices(shape: Shape, n_token: int) -> Mapping[str, Schema]:
    """What may be kept of a model: one layer, all, or features of one."""
    return {
        "one layer": dense(shape, 1, n_token),
        f"all {shape.layers} layers": dense(shape, shape.layers, n_token),
        f"TopK-{RANK} features of a layer": features(n_token),
    }


def with_units(schema: Schema, unit_tokens: int) -> Schema:
    """The same store in other units."""

    def recut(array: Array) -> Array:
        sizes = dict(zip(array.dims, array.shape, strict=True))
        return along_token(array.dims, sizes, array.dtype, unit_tokens)

    return replace(schema, unit_tokens=unit_tokens, arrays={path: recut(a) for path, a in schema.arrays.items()})


def fitted(schema: Schema) -> Schema:
    """The store in the smallest units, by doubling, whose objects are at most `MOST_OBJECTS`, or in the largest ones
    of which two stay within `MOST_BUFFERS`.
    """
    while stored(schema).objects > MOST_OBJECTS and 4 * a_unit(schema) <= MOST_BUFFERS:
        schema = with_units(schema, 2 * schema.unit_tokens)
    return schema


def a_unit(schema: Schema) -> int:
    """Bytes of a full unit's values, which are held twice in memory."""
    return sum(
        array.nbytes * min(schema.unit_tokens, schema.n_token) // schema.n_token for array in schema.arrays.values()
    )


def largest_shard(schema: Schema) -> int:
    """Bytes of the largest object's values."""
    sizes = []
    for array in schema.arrays.values():
        values = 1
        for size_of in array.shards:
            values *= size_of
        sizes.append(values * format_of(array.dtype).itemsize)
    return max(sizes)


def records(schema: Schema) -> float:
    """Bytes of a step's records on a file system of 4 KiB blocks."""
    n_unit = len(schema.grid)
    return ledger_bytes(n_unit, RECORD_BYTES + RECORD_OBJECT_BYTES * stored(schema).objects / n_unit)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    titles = list(header)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bytes_table() -> str:
    """Bytes on disk, checksums and indexes included, by number of tokens."""

    def rows() -> Iterable[list[str]]:
        for shape in SHAPES:
            for kept in choices(shape, TOKENS[0]):
                found = [stored(choices(shape, n)[kept]).nbytes["none"].value or 0.0 for n in TOKENS]
                yield [f"{shape.name}, {kept}", f"{found[-1] / TOKENS[-1]:,.0f} B", *map(size, found)]

    return table(["kept, uncompressed", "a token", *(f"{_power(n)} tokens" for n in TOKENS)], rows())


def units_table() -> str:
    """What 10¹² tokens become in default units, and in those that keep objects few."""

    def rows() -> Iterable[list[str]]:
        for shape in SHAPES:
            for kept, schema in choices(shape, TOKENS[-1]).items():
                for how, one in (("default", schema), ("chosen", fitted(schema))):
                    if how == "chosen" and one.unit_tokens == schema.unit_tokens:
                        continue
                    n_unit = len(one.grid)
                    yield [
                        f"{shape.name}, {kept}, {how}",
                        f"{one.unit_tokens:,}",
                        f"{n_unit:,}",
                        f"{stored(one).objects:,}",
                        size(largest_shard(one)),
                        size(2 * a_unit(one)),
                        size(records(one)),
                        f"{lists(n_unit):,}",
                        f"{-(-stored(one).objects // MOST_OBJECTS):,}",
                    ]

    columns = ["10¹² tokens", "unit_tokens", "units", "objects", "largest shard", "two units' buffers"]
    return table([*columns, "records on disk", "LISTs for the state", "runs of 10⁷ objects"], rows())


RATES = (1_000, 10_000, 100_000)
WORKERS = (1, 8, 64, 512)


def hours_table() -> str:
    """Days for 10¹² tokens, seconds of a unit, and what a preemption loses, by tokens a second and worker."""
    unit_tokens = 2**17
    n_unit = len(features(TOKENS[-1], unit_tokens).grid)

    def rows() -> Iterable[list[str]]:
        for rate in RATES:
            seconds = unit_tokens / rate
            yield [
                f"{rate:,} tokens/s",
                f"{seconds:,.1f} s",
                f"{seconds / 2:,.1f} s",
                *(f"{makespan(n_unit, n, seconds) / 86_400:,.1f} days" for n in WORKERS),
            ]

    return table(
        [
            f"10¹² tokens, units of {unit_tokens:,}",
            "a unit takes",
            "lost a preemption, on average",
            *(f"{n} worker{'s' if n > 1 else ''}" for n in WORKERS),
        ],
        rows(),
    )


def bandwidth_table() -> str:
    """Bandwidth that keeps workers busy: bytes a token × tokens a second × workers."""

    def rows() -> Iterable[list[str]]:
        for shape in SHAPES:
            for kept, schema in choices(shape, TOKENS[0]).items():
                a_token = (stored(schema).nbytes["none"].value or 0.0) / TOKENS[0]
                yield [f"{shape.name}, {kept}", *(f"{size(a_token * rate * 8)}/s" for rate in RATES)]

    return table(["8 workers writing", *(f"at {rate:,} tokens/s each" for rate in RATES)], rows())


READ = 1e9
"""B/s that a pass reads, in the table of passes."""
EFFECTIVE = 4e14
"""Floating-point operations a second of a device, in the table of passes: 40 % of an accelerator's 10¹⁵."""


def passes_table() -> str:
    """Passes from which on storing takes less device time than computing again."""

    def rows() -> Iterable[list[str]]:
        for shape in SHAPES:
            for kept, schema in choices(shape, TOKENS[0]).items():
                compute = TOKENS[0] * shape.flops_a_token / EFFECTIVE
                nbytes = stored(schema).nbytes["none"].value or 0.0
                once = max(compute, nbytes / READ)
                pays = crossover(once, nbytes / READ, compute)
                yield [
                    f"{shape.name}, {kept}",
                    f"{compute:,.0f} s",
                    f"{nbytes / READ:,.0f} s",
                    "never" if pays is None else f"{pays}",
                ]

    return table(["a pass over 10⁹ tokens", "computed", "read", "storing pays from so many passes"], rows())


def _power(n: int) -> str:
    return f"10{str(len(str(n)) - 1).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def scale_tables() -> dict[str, str]:
    """The tables of docs/scale.md, by name."""
    return {
        "bytes": bytes_table(),
        "units": units_table(),
        "hours": hours_table(),
        "bandwidth": bandwidth_table(),
        "passes": passes_table(),
    }
