"""The arithmetic of costs: against cases worked out by hand, and against what stores really take on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay.pipeline.report.costs import (
    Prices,
    Strategy,
    at_workers,
    cheapest,
    crossover,
    ledger_bytes,
    lists,
    makespan,
    objects_of,
    stored,
)
from forebay.stores.fingerprint import fingerprint
from forebay.stores.schema import Array, Schema, along_token
from forebay.stores.store import Store

N_TOKEN, UNIT = 2500, 1024


def array(**changes: Any) -> Array:
    return Array(
        **{
            "dims": ("layer", "token", "d_model"),
            "shape": (2, N_TOKEN, 7),
            "dtype": "bfloat16",
            "chunks": (1, 256, 7),
            "shards": (1, UNIT, 7),
            **changes,
        }
    )


BY_SEQUENCE = array(
    dims=("layer", "sequence", "head"), shape=(3, 25, 5), dtype="float32", chunks=(1, 1, 5), shards=(1, 10, 5)
)
RAGGED = array(dims=("unit", "nonzero"), shape=(3, 2**18), dtype="int32", chunks=(1, 2**16), shards=(1, 2**18))


def test_bytes_of_an_array_by_hand() -> None:
    """Two layers, each two full shards of four chunks and one of two: 2500 tokens end in the tenth chunk of 256."""
    chunk, index = 256 * 7 * 2 + 4, 4 * 16 + 4
    assert objects_of(array()).count == 6
    assert objects_of(array()).nbytes == 2 * (10 * chunk + 3 * index)
    assert objects_of(BY_SEQUENCE).count == 9
    assert objects_of(BY_SEQUENCE).nbytes == 3 * (25 * (5 * 4 + 4) + 3 * (10 * 16 + 4))
    # 70,000 values take two chunks of 65,536; the other two of the row are entries of the index only.
    assert objects_of(RAGGED, 70_000).nbytes == 3 * (2 * (2**16 * 4 + 4) + 4 * 16 + 4)
    assert objects_of(RAGGED, 0).nbytes == 3 * (2**16 * 4 + 4 + 4 * 16 + 4)


def test_bytes_of_arrays_are_those_on_disk(tmp_path: Path) -> None:
    arrays = {
        "a/value": array(),
        "s/value": BY_SEQUENCE,
        "r/value": RAGGED,
        "r/count": array(dims=("token",), shape=(N_TOKEN,), dtype="int32", chunks=(512,), shards=(UNIT,)),
    }
    labels = {
        "sequences/start": (("sequence",), np.arange(0, N_TOKEN, 100)),
        "sequences/document": (("sequence",), np.zeros(25, np.int64)),
        "documents/start": (("document",), np.zeros(1, np.int64)),
        "documents/id": (("document",), np.array(["one"], dtype=object)),
    }
    schema = Schema(kind="activations", n_token=N_TOKEN, unit_tokens=UNIT, arrays=arrays, labels=labels)
    determines = {"step": "test"}
    store = Store.create(tmp_path, schema, fingerprint(determines), {"determines": determines})
    for unit in schema.grid:
        tokens = slice(unit.start, unit.stop)
        store.write_rows("a/value", {"token": tokens}, np.ones((2, len(unit), 7), np.uint16))
        store.write_rows("r/count", {"token": tokens}, np.ones(len(unit), np.int32))
        row = slice(unit.index, unit.index + 1)
        store.write_rows("r/value", {"unit": row}, np.ones(70_000, np.int32))
    for first in (0, 10, 20):
        rows = slice(first, min(25, first + 10))
        store.write_rows("s/value", {"sequence": rows}, np.ones((3, rows.stop - rows.start, 5), np.float32))
    for path, one in arrays.items():
        files = [file.stat().st_size for file in (store.path / path / "c").rglob("*") if file.is_file()]
        found = objects_of(one, 70_000)
        assert (found.count, found.nbytes) == (len(files), sum(files)), path


def test_a_store_says_what_is_exact_and_what_is_not_known() -> None:
    dense = Schema(kind="activations", n_token=N_TOKEN, unit_tokens=UNIT, arrays={"a/value": array()})
    found = stored(dense)
    assert found.nbytes["none"].basis == "exact"
    assert set(found.nbytes) == {"none"}
    assert found.a_layer["a/value"]["none"].value == objects_of(array()).nbytes / 2
    packed = stored(dense, {"none": 1.01, "zstd": 0.7})
    assert packed.nbytes["none"] == found.nbytes["none"]
    assert packed.nbytes["zstd"].value == pytest.approx(0.7 * 2 * N_TOKEN * 7 * 2)
    assert packed.a_layer["a/value"]["zstd"].value == pytest.approx(0.7 * N_TOKEN * 7 * 2)
    assert packed.nbytes["zstd"].basis == "computed"
    ragged = Schema(kind="features", n_token=N_TOKEN, unit_tokens=UNIT, arrays={"r/value": RAGGED})
    assert stored(ragged).nbytes["none"].value is None
    assert stored(ragged).nbytes["none"].basis == "unknown"
    known = stored(ragged, {}, {"r/value": 10.0})
    assert known.nbytes["none"].value == objects_of(RAGGED, 10 * UNIT).nbytes
    assert known.nbytes["none"].basis == "computed"


def test_sizes_of_a_trillion_tokens_are_closed_forms() -> None:
    """One layer of a width of 4,096 in bfloat16: 8,192 B a token, a crc32c and 16 B of index a chunk of 128 tokens."""
    sizes = {"layer": 1, "token": 10**12, "d_model": 4096}
    one = along_token(("layer", "token", "d_model"), sizes, "bfloat16", 8192)
    n_unit = math.ceil(10**12 / 8192)
    assert objects_of(one).count == n_unit == 122_070_313
    # The last unit is short by 2⁻¹ of its tokens or more: its chunks beyond the edge are not written.
    assert objects_of(one).nbytes == 10**12 // 128 * (128 * 8192 + 4) + n_unit * (64 * 16 + 4)


def test_units_are_whole() -> None:
    assert makespan(10, 1, 3.0) == 30.0
    assert makespan(10, 4, 3.0) == 9.0
    assert makespan(10, 64, 3.0) == 3.0


def test_time_on_workers_is_the_longer_of_computing_and_writing() -> None:
    """10,000 tokens in units of 1,000 at 100 tokens/s are ten units of 10 s; at 8 B each 80,000 B."""
    common = {"n_token": 10_000, "unit_tokens": 1_000, "tokens_per_second": 100.0, "bytes_per_token": 8.0}
    one = at_workers(workers=1, bandwidth=1_000.0, load_seconds=5.0, **common)
    assert (one.compute_seconds, one.write_seconds, one.seconds) == (105.0, 80.0, 105.0)
    assert (one.needed, one.limit) == (800.0, "compute")
    three = at_workers(workers=3, bandwidth=1_000.0, **common)
    assert (three.compute_seconds, three.write_seconds, three.seconds) == (40.0, 80.0, 80.0)
    assert (three.needed, three.limit) == (2_400.0, "storage")
    # Of 64 workers 54 find no unit, and write nothing.
    many = at_workers(workers=64, bandwidth=None, **common)
    assert (many.seconds, many.needed, many.write_seconds, many.limit) == (10.0, 8_000.0, None, "compute")


@pytest.mark.parametrize(
    ("once", "a_pass", "instead", "passes"),
    [
        (100.0, 10.0, 110.0, 2),  # one pass: 110 against 110; two: 120 against 220
        (100.0, 10.0, 111.0, 1),
        (100.0, 60.0, 100.0, 3),  # 280 against 300
        (100.0, 99.0, 100.0, 101),
        (100.0, 100.0, 100.0, None),
        (0.0, 1.0, 2.0, 1),
    ],
)
def test_the_crossover_is_the_first_pass_that_pays(
    once: float, a_pass: float, instead: float, passes: int | None
) -> None:
    assert crossover(once, a_pass, instead) == passes
    if passes is not None:
        assert once + passes * a_pass < passes * instead
        assert passes == 1 or once + (passes - 1) * a_pass >= (passes - 1) * instead


DENSE = Strategy(name="dense", once=36_000.0, a_pass=3_600.0, nbytes=4e12)
SPARSE = Strategy(name="features", once=39_600.0, a_pass=360.0, nbytes=1e11)
NOTHING = Strategy(name="recompute", once=0.0, a_pass=36_000.0, nbytes=0.0)


def test_the_cheapest_by_device_time_and_by_price() -> None:
    every = (DENSE, SPARSE, NOTHING)
    assert cheapest(every, 1) == NOTHING
    assert cheapest(every, 2) == SPARSE  # 11.2 h against 12 h and 20 h
    assert DENSE.pays_from(NOTHING) == 2
    prices = Prices(gpu=2.0, storage=20.0, months=3.0)
    # Ten passes: (10 + 10) h · 2 € + 4 TB · 20 € · 3; (11 + 1) h · 2 € + 0.1 TB · 60 €; 100 h · 2 €.
    assert DENSE.price(10, prices) == pytest.approx(40 + 240)
    assert SPARSE.price(10, prices) == pytest.approx(24 + 6)
    assert NOTHING.price(10, prices) == pytest.approx(200)
    assert cheapest(every, 10, prices) == SPARSE
    # Dense: 260 € once and 2 € a pass against 20 € a pass: from the fifteenth on.
    assert DENSE.pays_from(NOTHING, prices) == 15
    assert DENSE.price(15, prices) < NOTHING.price(15, prices)
    assert DENSE.price(14, prices) > NOTHING.price(14, prices)


def test_records_take_whole_blocks_and_listings_a_thousand_names() -> None:
    assert ledger_bytes(10**6, 1_271) == 4_096 * 10**6
    assert ledger_bytes(10, 4_097) == 81_920
    assert [lists(n) for n in (0, 1, 1_000, 1_001, 10**6)] == [1, 1, 1, 2, 1_000]
