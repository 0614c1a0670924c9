"""A store holds what was written, bit for bit, for any reader; no unit touches another's objects, whoever writes."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from forebay.stores.dtypes import format_of
from forebay.stores.errors import (
    CorruptStore,
    DiskFull,
    FingerprintMismatch,
    SchemaError,
    StoreNotFound,
)
from forebay.stores.grid import Unit
from forebay.stores.ledger import Record
from forebay.stores.schema import DATA, Array, Schema, along_sequence, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

OURS, THEIRS = "0123456789ab" * 5 + "0123", "ba9876543210" * 5 + "3210"
MADE_BY = {"determines": {"step": "capture", "parameters": {"context": 4, "hooks": ["a", "b"]}}, "versions": {}}
IDS = ["novel-1", "", "zwölf 🐟", "novel-1"]

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """Sequences laid end to end, and how many of them lie in one shard."""

    lengths: tuple[int, ...]
    per_unit: int

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *self.lengths[:-1]])


UNIT = 8
EVEN = Layout((4, 4, 4, 4, 4, 4, 2), per_unit=2)
VARYING = Layout((3, 9, 1, 8, 5), per_unit=1)
GAPS = Layout((3, 15, 8), per_unit=1)  # in the second and in the last unit no sequence starts
LAYOUTS = pytest.mark.parametrize("layout", [EVEN, VARYING, GAPS], ids=["even", "varying", "gaps"])


def schema_of(layout: Layout = EVEN, compression: str = "none", unit_tokens: int = UNIT) -> Schema:
    """A value a token, a vector a token and layer (several chunks in a shard), a square a sequence and layer."""
    n_token, widest = sum(layout.lengths), max(layout.lengths)
    sizes = {"token": n_token, "sequence": len(layout.lengths), "layer": 2, "d_model": 3, "head": 2}
    sizes |= {"query": widest, "key": widest}
    stream = along_token(("layer", "token", "d_model"), sizes, "bfloat16", unit_tokens)
    pattern = along_sequence(("layer", "sequence", "head", "query", "key"), sizes, "float32", layout.per_unit)
    return Schema(
        kind="activations",
        n_token=n_token,
        unit_tokens=unit_tokens,
        arrays={
            "token_id": along_token(("token",), sizes, "uint32", unit_tokens),
            "hook_resid_post/value": replace(stream, chunks=(1, unit_tokens // 2, 3)),
            "attn.hook_pattern/value": pattern,
        },
        labels={
            "sequences/start": (("sequence",), layout.starts),
            "sequences/document": (("sequence",), np.zeros(len(layout.lengths), dtype=np.int64)),
            "documents/start": (("document",), np.array([0, 0, 5, n_token])),
            "documents/id": (("document",), np.array(IDS, dtype=object)),
            "hook_resid_post/layer": (("layer",), np.array([0, 11])),
        },
        compression=compression,
    )


def random_values(schema: Schema, seed: int = 0) -> Values:
    """Any bits at all, in the form in which they are kept: NaNs of every payload are among them."""
    rng = np.random.default_rng(seed)
    return {
        path: np.frombuffer(rng.bytes(array.nbytes), dtype=format_of(array.dtype).kept).reshape(array.shape)
        for path, array in schema.arrays.items()
    }


def create(folder: Path, schema: Schema, fingerprint: str = OURS) -> Store:
    return Store.create(folder, schema, fingerprint, MADE_BY)


def pieces(schema: Schema, values: Values, unit: Unit, size: int) -> Iterator[xr.DataTree]:
    """A unit in pieces of `size` rows: what lies along `token` first, then what lies along `sequence`."""
    rows = schema.rows(unit)
    for long in ("token", "sequence"):
        own = {path: array for path, array in schema.arrays.items() if long in array.dims}
        for start in range(rows[long].start, rows[long].stop, size):
            stop = min(start + size, rows[long].stop)
            nodes: dict[str, dict[str, Any]] = {}
            for path, array in own.items():
                group, _, name = path.rpartition("/")
                part = values[path].take(np.arange(start, stop), axis=array.dims.index(long))
                nodes.setdefault(f"/{group}", {})[name] = (array.dims, part)
            coords = {long: pd.RangeIndex(start, stop)}
            yield xr.DataTree.from_dict({name: xr.Dataset(found, coords=coords) for name, found in nodes.items()})


def write(store: Store, unit: Unit, values: Values, size: int = 3) -> Record:
    writer = UnitWriter(store, unit)
    for piece in pieces(store.schema_with_labels, values, unit, size):
        writer.put(piece)
    return writer.finish({"compute": 0.5})


def written(folder: Path, schema: Schema, values: Values) -> Store:
    store = create(folder, schema)
    for unit in schema.grid:
        write(store, unit, values)
    return store


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "once"
    written(folder, schema_of(), random_values(schema_of()))
    return folder


@pytest.fixture
def complete(made_once: Path, tmp_path: Path) -> Store:
    """A complete store of the even layout, to be damaged at will."""
    shutil.copytree(made_once, tmp_path / "activations")
    return Store.open(tmp_path / "activations")


def objects(store: Store) -> dict[str, Path]:
    """Every object of every array of the schema, by its key below data.zarr."""
    found = (path for array in store.schema.arrays for path in (store.path / array / "c").rglob("*") if path.is_file())
    return {path.relative_to(store.path).as_posix(): path for path in found}


def contents(store: Store) -> dict[str, bytes]:
    """All of data.zarr."""
    return {str(p.relative_to(store.path)): p.read_bytes() for p in sorted(store.path.rglob("*")) if p.is_file()}


def assert_holds(store: Store, values: Values) -> None:
    for path, expected in values.items():
        found = store.array(path)[...]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()


def child(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Another process that runs `code`, with `arguments` in sys.argv."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "text": True, **options})


# ── what is written is what is read ──────────────────────────────────────────────────────────────────────────────────


@LAYOUTS
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_bit_comes_back(tmp_path: Path, layout: Layout, compression: str) -> None:
    schema = schema_of(layout, compression)
    values = random_values(schema)
    store = written(tmp_path / "step", schema, values)
    assert_holds(store, values)
    assert_holds(Store.open(tmp_path / "step"), values)
    assert (store.todo(), store.complete, store.verify()) == ([], True, {})


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_bfloat16_comes_back(tmp_path: Path, compression: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16).reshape(1, -1, 1)
    schema = Schema(
        kind="activations",
        n_token=2**16,
        unit_tokens=2**15,
        arrays={
            "x/value": along_token(
                ("layer", "token", "d_model"), {"layer": 1, "token": 2**16, "d_model": 1}, "bfloat16", 2**15
            )
        },
        labels={"sequences/start": (("sequence",), np.array([0]))},
        compression=compression,
    )
    store = create(tmp_path, schema)
    for unit in schema.grid:
        write(store, unit, {"x/value": patterns}, size=len(unit))
    assert_holds(store, {"x/value": patterns})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint32", "bool"])
def test_a_unit_of_nothing_but_the_fill_value_is_a_unit(tmp_path: Path, dtype: str) -> None:
    """Zarr leaves out shards that hold nothing but fill values; such a unit could not be told from a lost one."""
    schema = schema_of()
    array = replace(schema.arrays["token_id"], dtype=dtype)
    schema = replace(schema, arrays={"token_id": array})
    values = {"token_id": np.full(26, format_of(dtype).missing, format_of(dtype).kept)}
    store = written(tmp_path, schema, values)
    assert_holds(store, values)
    assert set(objects(store)) == {f"token_id/c/{unit}" for unit in range(4)}
    assert store.verify() == {}


def test_labels_come_back(tmp_path: Path) -> None:
    schema = schema_of(VARYING)
    found = Store.open(create(tmp_path, schema).path.parent).labels
    assert list(found) == sorted(schema.labels)
    for path, (dims, values) in schema.labels.items():
        assert found[path][0] == dims
        assert found[path][1].tolist() == values.tolist()
        assert found[path][1].dtype == values.dtype


def test_a_store_travels_between_processes_without_its_labels(complete: Store) -> None:
    packed = pickle.dumps(complete)
    found = pickle.loads(packed)  # noqa: S301 - our own bytes
    assert found.labels["documents/id"][1].tolist() == complete.labels["documents/id"][1].tolist() == IDS
    assert_holds(found, random_values(schema_of()))
    assert pickle.dumps(complete) == packed


# ── without forebay ──────────────────────────────────────────────────────────────────────────────────────────────────

READ_PLAINLY = """
import sys
import numpy as np, xarray as xr, zarr

folder, expected = sys.argv[1], np.load(sys.argv[2])

root = zarr.open_group(folder, mode="r")
for path in expected.files:
    assert root[path][...].tobytes() == expected[path].tobytes(), path
assert root["hook_resid_post/value"].attrs["dtype"] == "bfloat16"
assert root["hook_resid_post/value"].metadata.dimension_names == ("layer", "token", "d_model")

tokens = xr.open_zarr(folder)
assert tokens.token_id.dtype == np.uint32 and tokens.token_id.dims == ("token",)
assert tokens.token_id.values.tobytes() == expected["token_id"].tobytes()
assert tokens.attrs["forebay"]["schema"]["kind"] == "activations"

kept = xr.open_zarr(folder, group="hook_resid_post").value
assert (kept.dtype, kept.attrs["dtype"], kept.dims) == (np.uint16, "bfloat16", ("layer", "token", "d_model"))
assert kept.sel(layer=11).values.tobytes() == expected["hook_resid_post/value"][1].tobytes()

tree = xr.open_datatree(folder, engine="zarr")
assert tree["documents/id"].values.tolist() == ["novel-1", "", "zwölf 🐟", "novel-1"]
assert tree["sequences/start"].values.tolist() == [0, 4, 8, 12, 16, 20, 24]
assert tree["attn.hook_pattern/value"].values.tobytes() == expected["attn.hook_pattern/value"].tobytes()

assert sys.warnoptions == ["error"]
assert not any(name.partition(".")[0] == "forebay" for name in sys.modules)
"""


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_zarr_and_xarray_read_it_where_forebay_is_not_installed(tmp_path: Path, compression: str) -> None:
    """In a process of its own, in which every warning is an error."""
    schema = schema_of(compression=compression)
    values = random_values(schema)
    store = written(tmp_path / "step", schema, values)
    np.savez(tmp_path / "expected.npz", **values)
    command = [sys.executable, "-W", "error", "-c", READ_PLAINLY, store.path, tmp_path / "expected.npz"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr, found.returncode) == ("", "", 0)


@LAYOUTS
def test_objects_are_named_by_unit_and_layer(tmp_path: Path, layout: Layout) -> None:
    schema = schema_of(layout)
    store = written(tmp_path, schema, random_values(schema))
    n_shard = -(-len(layout.lengths) // layout.per_unit)
    assert set(objects(store)) == {
        *(f"token_id/c/{unit}" for unit in range(4)),
        *(f"hook_resid_post/value/c/{layer}/{unit}/0" for layer in range(2) for unit in range(4)),
        *(f"attn.hook_pattern/value/c/{layer}/{shard}/0/0/0" for layer in range(2) for shard in range(n_shard)),
    }


# ── units apart ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A store whose units were written one after the other."""
    schema = schema_of(VARYING)
    return contents(written(tmp_path_factory.mktemp("in-order"), schema, random_values(schema)))


@settings(max_examples=8, deadline=None)
@given(st.permutations([(0, 3), (1, 5), (2, 2), (3, UNIT)]))
def test_any_order_of_units_in_any_pieces_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, in_order: dict[str, bytes], order: list[tuple[int, int]]
) -> None:
    schema = schema_of(VARYING)
    store = create(tmp_path_factory.mktemp("any-order"), schema)
    for index, size in order:
        assert store.schema.grid[index] in store.todo()
        write(store, store.schema.grid[index], random_values(schema), size)
    assert contents(store) == in_order


@LAYOUTS
def test_no_unit_touches_the_objects_of_another(tmp_path: Path, layout: Layout) -> None:
    schema = schema_of(layout)
    store = written(tmp_path, schema, random_values(schema))
    owner = {key: unit.index for unit in schema.grid for key in store.ledger.record(unit.index)["objects"]}
    assert set(owner) == set(objects(store))
    for unit in schema.grid:
        before = {key: (path.stat().st_ino, path.stat().st_mtime_ns) for key, path in objects(store).items()}
        write(store, unit, random_values(schema, seed=1))
        after = {key: (path.stat().st_ino, path.stat().st_mtime_ns) for key, path in objects(store).items()}
        changed = {key for key in owner if after[key] != before[key]}
        assert changed == {key for key, index in owner.items() if index == unit.index}
    assert_holds(store, random_values(schema, seed=1))


def test_a_torn_shard_is_written_anew(complete: Store) -> None:
    """The last shard of an array is not full, and Zarr would read it first to keep what else it holds."""
    whole = contents(complete)
    for key, path in objects(complete).items():
        os.truncate(path, len(key) * 7 % path.stat().st_size)
    for unit in complete.schema.grid:
        write(complete, unit, random_values(complete.schema))
    assert contents(complete) == whole


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_says_what_the_unit_is(tmp_path: Path) -> None:
    schema = schema_of()
    store = create(tmp_path, schema)
    given_back = write(store, schema.grid[3], random_values(schema))
    record = json.loads((tmp_path / "done" / "000003.json").read_text())
    assert record == given_back
    assert (record["unit"], record["fingerprint"]) == (3, OURS)
    assert record["rows"] == {"token": [24, 26], "sequence": [6, 7]}
    assert record["objects"] == {
        key: {"bytes": path.stat().st_size, "blake3": blake3(path.read_bytes()).hexdigest()}
        for key, path in objects(store).items()
    }
    assert record["bytes"] == sum(path.stat().st_size for path in objects(store).values())
    assert record["seconds"]["compute"] == 0.5
    assert record["seconds"]["write"] > 0
    assert record["versions"]["zarr"] == sys.modules["zarr"].__version__
    assert record["pid"] == os.getpid()


def test_statistics_of_pieces_are_merged_by_their_last_word(tmp_path: Path) -> None:
    schema = schema_of()
    store = create(tmp_path, schema)
    writer = UnitWriter(store, schema.grid[0])
    said = [{"abs_max": [1.0, 9.0], "square_sum": [1.5, 2.0]}, {"abs_max": [3.0, 2.0], "square_sum": [0.25, 4.0]}]
    for piece, statistics in zip(pieces(schema, random_values(schema), schema.grid[0], 4), said * 2, strict=False):
        if "hook_resid_post" in piece.children:
            piece["hook_resid_post"].attrs["statistics"] = {k: np.array(v) for k, v in statistics.items()}
        writer.put(piece)
    record = writer.finish({})
    assert record["statistics"] == {"hook_resid_post": {"abs_max": [3.0, 9.0], "square_sum": [1.75, 6.0]}}


def test_nothing_is_on_disk_before_a_unit_is_finished(tmp_path: Path) -> None:
    schema = schema_of()
    store = create(tmp_path, schema)
    writer = UnitWriter(store, schema.grid[0])
    for piece in pieces(schema, random_values(schema), schema.grid[0], 3):
        writer.put(piece)
    assert objects(store) == {}
    assert store.ledger.done() == set()


# ── pieces that do not fit ───────────────────────────────────────────────────────────────────────────────────────────

WHICH = {
    "array that is not in the schema": (
        lambda piece: piece.rename(token_id="token_ids"),
        r"'token_ids' is not in the schema of activations\. Did you mean 'token_id'\? It has: token_id, hook_resid",
    ),
    "wrong dimensions": (
        lambda piece: piece.rename(token_id="hook_resid_post/value"),
        r"hook_resid_post/value has dimensions \('token',\); .* says \('layer', 'token', 'd_model'\)",
    ),
    "wrong dtype": (
        lambda piece: piece.astype(np.int64),
        r"token_id came as int64; uint32 is kept as uint32",
    ),
    "rows of the next unit": (
        lambda piece: piece.assign_coords(token=np.arange(6, 9)),
        r"token_id: a piece of shape \(3,\) at token 6…8 does not fit unit 0, which owns token 0…7 of an array of .*26",
    ),
    "rows before the unit": (
        lambda piece: piece.assign_coords(token=np.arange(-1, 2)),
        r"at token -1…1 does not fit unit 0",
    ),
    "rows out of order": (
        lambda piece: piece.assign_coords(token=[0, 2, 1]),
        r"token_id: a piece holds ascending rows.*its coordinate on token is \[0 2 1\]",
    ),
    "rows in another order with the right ends": (
        lambda piece: xr.concat([piece, piece], "token").assign_coords(token=[0, 2, 1, 4, 3, 5]),
        r"ascending rows.*\[0 2 1 4 3 5\]",
    ),
    "a row twice": (lambda piece: piece.assign_coords(token=[0, 1, 1]), r"ascending rows.*\[0 1 1\]"),
    "rows with gaps beyond the unit": (
        lambda piece: piece.assign_coords(token=[0, 1, 8]),
        r"token_id: a piece of shape \(3,\) at token 0…8 does not fit unit 0, which owns token 0…7",
    ),
    "rows without whole numbers": (lambda piece: piece.assign_coords(token=[0.0, 1.0, 2.0]), "ascending rows"),
    "no rows": (lambda piece: piece.isel(token=slice(0)), r"at least one; its coordinate on token is \[\]"),
    "rows without numbers": (
        lambda piece: piece.drop_vars("token"),
        "token_id: the piece does not say which rows it holds: give it a coordinate on token",
    ),
}


@pytest.mark.parametrize("which", WHICH)
def test_a_piece_that_does_not_fit_is_refused(tmp_path: Path, which: str) -> None:
    change, message = WHICH[which]
    piece = xr.Dataset({"token_id": (("token",), np.zeros(3, np.uint32))}, coords={"token": np.arange(3)})
    changed: xr.Dataset = change(piece)
    nodes: dict[str, xr.Dataset] = {"/": changed}
    if "hook_resid_post/value" in changed:
        nodes = {"/hook_resid_post": changed.rename({"hook_resid_post/value": "value"})}
    with pytest.raises(SchemaError, match=message):
        UnitWriter(create(tmp_path, schema_of()), schema_of().grid[0]).put(xr.DataTree.from_dict(nodes))


def test_a_piece_with_too_few_layers_is_refused(tmp_path: Path) -> None:
    value = xr.DataArray(np.zeros((1, 3, 3), np.uint16), dims=("layer", "token", "d_model"), coords={"token": range(3)})
    writer = UnitWriter(create(tmp_path, schema_of()), schema_of().grid[0])
    with pytest.raises(SchemaError, match=r"hook_resid_post/value: a piece of shape \(1, 3, 3\) .* shape \(2, 26, 3\)"):
        writer.put(xr.DataTree.from_dict({"/hook_resid_post": value.to_dataset(name="value")}))


def test_rows_that_come_twice_are_refused(tmp_path: Path) -> None:
    schema = schema_of()
    writer = UnitWriter(create(tmp_path, schema), schema.grid[0])
    first, *others = pieces(schema, random_values(schema), schema.grid[0], 3)
    for piece in (first, *others):
        writer.put(piece)
    with pytest.raises(SchemaError, match=r"token_id: token 0 came twice in unit 0"):
        writer.put(first)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (0, "token_id: unit 1 lacks 3 rows, the first is token 8"),
        (1, "token_id: unit 1 lacks 3 rows, the first is token 11"),
        (3, "attn.hook_pattern/value: unit 1 lacks 2 rows, the first is sequence 2"),
    ],
)
def test_rows_that_never_came_are_named_and_nothing_is_recorded(tmp_path: Path, left_out: int, message: str) -> None:
    schema = schema_of()
    store = create(tmp_path, schema)
    writer = UnitWriter(store, schema.grid[1])
    for i, piece in enumerate(pieces(schema, random_values(schema), schema.grid[1], 3)):
        if i != left_out:
            writer.put(piece)
    with pytest.raises(SchemaError, match=message):
        writer.finish({})
    assert (store.ledger.done(), objects(store)) == (set(), {})


# ── making and joining ───────────────────────────────────────────────────────────────────────────────────────────────


def test_joining_a_store_leaves_it_as_it_is(complete: Store) -> None:
    folder, before = complete.path.parent, contents(complete)
    joined = create(folder, schema_of())
    assert contents(joined) == before
    assert joined.complete
    assert sorted(path.name for path in folder.iterdir()) == [DATA, "done"]


def test_a_store_of_another_recipe_is_refused_with_both_fingerprints_and_the_difference(tmp_path: Path) -> None:
    schema = schema_of()
    store = create(tmp_path / "activations", schema)
    determines: dict[str, Any] = MADE_BY["determines"]
    other = {"determines": {**determines, "parameters": {"context": 8, "hooks": ["a", "b"]}}, "versions": {"x": "1"}}
    with pytest.raises(FingerprintMismatch) as refused:
        Store.create(store.path.parent, schema, THEIRS, other)
    assert str(refused.value).splitlines() == [
        f"{tmp_path}/activations was made by another recipe: its fingerprint is {OURS[:12]}, this recipe gives "
        f"{THEIRS[:12]}.",
        "  parameters.context: 8 here, 4 in the store",
        f"Run into another folder, or delete {tmp_path}/activations to compute it anew",
    ]


def test_records_whose_data_are_gone_are_not_believed(complete: Store) -> None:
    """Fill values would pass for the values of units that are recorded as done."""
    shutil.rmtree(complete.path)
    with pytest.raises(CorruptStore, match=rf"has records of 4 units, but .*{DATA} with their data is gone"):
        create(complete.path.parent, schema_of())
    assert not complete.path.exists()


JOIN_AND_WRITE = """
import os, sys
from pathlib import Path
import numpy as np, pandas as pd, xarray as xr
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

n = 8
schema = Schema(kind="tokens", n_token=4 * n, unit_tokens=4,
    arrays={"token_id": along_token(("token",), {"token": 4 * n}, "uint32", 4)},
    labels={"sequences/start": (("sequence",), np.arange(0, 4 * n, 4))})

def join_and_write(unit):
    store = Store.create(Path(sys.argv[1]), schema, "f" * 64, {"determines": {}})
    writer, own = UnitWriter(store, store.schema.grid[unit]), np.arange(4 * unit, 4 * unit + 4, dtype=np.uint32)
    writer.put(xr.DataTree(xr.Dataset({"token_id": (("token",), own + 100)}, coords={"token": pd.Index(own)})))
    writer.finish({})
"""

EIGHT_AT_ONCE = """
import traceback

gate, opener = os.pipe()
for child in range(n):
    if os.fork() == 0:
        os.close(opener)
        os.read(gate, 1)        # comes back when the last opener is closed
        try:
            for unit in eval(sys.argv[2]):
                join_and_write(unit)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
os.close(opener)
sys.exit(sum(os.wait()[1] != 0 for _ in range(n)))
"""


def test_eight_processes_make_one_store_at_once(tmp_path: Path) -> None:
    with child(JOIN_AND_WRITE + EIGHT_AT_ONCE, tmp_path / "step", "[child]") as process:
        process.communicate()
    assert process.returncode == 0
    store = Store.open(tmp_path / "step")
    assert store.array("token_id")[...].tolist() == list(range(100, 132))
    assert (store.complete, store.verify()) == (True, {})
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [DATA, "done"]


def test_processes_that_compute_the_same_units_do_no_harm(tmp_path: Path) -> None:
    """Two runs of one recipe that do not know of each other: work is done twice, and that is all."""
    with child(JOIN_AND_WRITE + EIGHT_AT_ONCE, tmp_path / "step", "[0, 1, child // 4, 0]") as process:
        process.communicate()
    assert process.returncode == 0
    store = Store.open(tmp_path / "step")
    assert store.array("token_id")[:8].tolist() == list(range(100, 108))
    assert (store.ledger.done(), store.verify()) == ({0, 1}, {})


def test_what_is_written_again_is_whole_all_the_time(tmp_path: Path) -> None:
    schema = schema_of()
    values = random_values(schema)
    store = written(tmp_path, schema, values)
    stop = threading.Event()

    def write_again() -> None:
        while not stop.is_set():
            write(store, schema.grid[3], values)

    with ThreadPoolExecutor(1) as executor:
        writing = executor.submit(write_again)
        try:
            for _ in range(20):
                assert_holds(Store.open(tmp_path), values)
        finally:
            stop.set()
        writing.result()


KILLED = """
import os, sys, time
import forebay.stores.ledger, forebay.stores.store

def stop(*arguments):
    print("there", flush=True)
    time.sleep(60)

if sys.argv[2] == "making":
    os.rename = stop
else:
    forebay.stores.ledger.Ledger.complete = stop
join_and_write(2)
"""


@pytest.mark.parametrize("moment", ["making", "writing"])
def test_a_killed_process_leaves_nothing_that_counts(tmp_path: Path, moment: str) -> None:
    with child(JOIN_AND_WRITE + KILLED, tmp_path / "step", moment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        os.kill(process.pid, signal.SIGKILL)
    if moment == "making":
        with pytest.raises(StoreNotFound):
            Store.open(tmp_path / "step")
    else:
        assert len(Store.open(tmp_path / "step").todo()) == 8
    with child(JOIN_AND_WRITE + "join_and_write(2)", tmp_path / "step") as process:
        process.communicate()
    assert process.returncode == 0
    store = Store.open(tmp_path / "step")
    assert store.ledger.done() == {2}
    assert store.array("token_id")[8:12].tolist() == [108, 109, 110, 111]
    leftover = store.path / "token_id" / "c" / "7.0f0f.partial"
    leftover.write_bytes(b"what Zarr leaves of a write that was killed")
    store.sweep(before=leftover.stat().st_mtime)
    assert leftover.exists(), "what was touched since may be on its way"
    store.sweep()
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [DATA, "done"]
    assert set(objects(store)) == {"token_id/c/2"}


# ── opening what is none ─────────────────────────────────────────────────────────────────────────────────────────────


def test_no_store_is_there(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=rf"{DATA} holds no store: zarr\.json is missing"):
        Store.open(tmp_path / "nowhere")


def alter(header: Path, change: Callable[[dict[str, Any]], None]) -> None:
    said = json.loads(header.read_text())
    change(said["attributes"])
    header.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda said: said["forebay"]["schema"].update(format=2),
            SchemaError,
            rf"{DATA} has format 2; this forebay reads format 1\. Update forebay",
        ),
        (lambda said: said.pop("forebay"), CorruptStore, r"zarr\.json is Zarr, but not a store of forebay"),
        (lambda said: said["forebay"].pop("fingerprint"), CorruptStore, r"zarr\.json: .* damaged \(KeyError\('finger"),
        (lambda said: said["forebay"]["schema"].pop("arrays"), CorruptStore, r"zarr\.json: .* damaged"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], error: type[Exception], message: str
) -> None:
    store = create(tmp_path, schema_of())
    alter(store.path / "zarr.json", change)
    for open_ in (Store.open, lambda folder: create(folder, schema_of())):
        with pytest.raises(error, match=message):
            open_(tmp_path)


def test_a_torn_header_is_refused(tmp_path: Path) -> None:
    store = create(tmp_path, schema_of())
    os.truncate(store.path / "zarr.json", 100)
    with pytest.raises(CorruptStore, match=rf"{DATA}/zarr\.json is not readable as JSON"):
        Store.open(tmp_path)


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────

STREAM_OF_UNIT_2 = "hook_resid_post/value/c/1/2/0"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"{path}: missing"),
        (lambda path: os.truncate(path, 40), r"{path}: 40 bytes, 1?\d\d were recorded \(truncated or overwritten\)"),
        (lambda path: os.truncate(path, 0), r"{path}: 0 bytes, "),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), r"{path}: \d+ bytes, \d+ were recorded"),
        (lambda path: flip(path, 0), r"{path}: its bytes have changed since they were recorded \(blake3 "),
        (lambda path: flip(path, -1), r"{path}: its bytes have changed"),
    ],
)
def test_verify_names_the_damaged_object_and_its_unit(
    complete: Store, damage: Callable[[Path], object], message: str
) -> None:
    path = complete.path / STREAM_OF_UNIT_2
    damage(path)
    checked: list[int] = []
    [(unit, [line])] = complete.verify(lambda unit: checked.append(unit.index)).items()
    assert unit == 2
    assert re.match(message.replace("{path}", re.escape(str(path))), line)
    assert checked == [0, 1, 2, 3]
    write(complete, complete.schema.grid[2], random_values(complete.schema))
    assert complete.verify() == {}


def test_verify_sees_every_bit_of_every_object(tmp_path: Path) -> None:
    schema = schema_of(VARYING)
    store = written(tmp_path, schema, random_values(schema))
    owner = {key: unit.index for unit in schema.grid for key in store.ledger.record(unit.index)["objects"]}
    for key, path in objects(store).items():
        at = len(key) * 31 % path.stat().st_size
        flip(path, at)
        [(unit, [line])] = store.verify().items()
        assert (unit, line.startswith(f"{path}: ")) == (owner[key], True)
        flip(path, at)
    assert store.verify() == {}


def test_verify_reports_units_that_are_recorded_only(tmp_path: Path) -> None:
    schema = schema_of()
    store = create(tmp_path, schema)
    write(store, schema.grid[1], random_values(schema))
    (store.path / "token_id" / "c" / "3").write_bytes(b"garbage of a killed writer")
    assert store.verify() == {}


def record_of_unit_2(store: Store, change: Callable[[Record], object]) -> None:
    record = store.ledger.record(2)
    change(record)
    store.ledger.complete(2, record)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda store: record_of_unit_2(store, lambda record: record.update(fingerprint=THEIRS)),
            rf"done/000002\.json: its fingerprint {THEIRS} is not the store's {OURS}",
        ),
        (
            lambda store: record_of_unit_2(store, lambda record: record["objects"].pop(STREAM_OF_UNIT_2)),
            rf"{STREAM_OF_UNIT_2}: not in the record of unit 2",
        ),
        (lambda store: os.truncate(store.ledger.path(2), 20), r"done/000002\.json is not readable as JSON"),
    ],
)
def test_verify_finds_a_record_that_is_not_the_units(
    complete: Store, damage: Callable[[Store], object], message: str
) -> None:
    damage(complete)
    [(unit, [line])] = complete.verify().items()
    assert unit == 2
    assert re.search(message, line)


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def large_schema() -> tuple[Schema, Values]:
    """Units of 1 MiB."""
    sizes: Mapping[str, int] = {"token": 6 * 256, "d_model": 1024}
    array: Array = along_token(("token", "d_model"), sizes, "float32", 256)
    labels = {"sequences/start": (("sequence",), np.array([0]))}
    schema = Schema(kind="activations", n_token=6 * 256, unit_tokens=256, arrays={"value": array}, labels=labels)
    return schema, random_values(schema)


def test_a_full_disk_names_the_bytes_and_harms_no_earlier_unit(small_disk: Path) -> None:
    schema, values = large_schema()
    store = create(small_disk / "step", schema)
    (small_disk / "other").write_bytes(bytes(3 << 19))
    write(store, schema.grid[0], values)
    write(store, schema.grid[1], values)
    with pytest.raises(DiskFull) as full:
        write(store, schema.grid[2], values)
    assert f"no space for unit 2 of {store.path}: it takes 1,048,576 bytes, " in str(full.value)
    assert "2 units are recorded and safe. Free some space and run again" in str(full.value)
    assert (store.ledger.done(), store.verify()) == ({0, 1}, {})
    (small_disk / "other").unlink()
    write(store, schema.grid[2], values)
    assert store.array("value")[: 3 * 256].tobytes() == values["value"][: 3 * 256].tobytes()
    assert (store.ledger.done(), store.verify()) == ({0, 1, 2}, {})


def test_a_full_disk_makes_no_half_of_a_store(small_disk: Path) -> None:
    schema, _ = large_schema()
    free = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize))
    with pytest.raises(DiskFull, match=rf"no space to make .*{DATA}"):
        create(small_disk / "step", schema)
    assert list(small_disk.rglob(".*")) == []
    (small_disk / "other").unlink()
    assert len(create(small_disk / "step", schema).todo()) == 6
