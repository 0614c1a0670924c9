"""A store holds what was written, bit for bit, for any reader; no unit touches another's objects, whoever writes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.stores.dtypes import format_of
from forebay.stores.errors import SchemaError
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

from .made_stores import (
    IDS,
    LAYOUTS,
    OURS,
    UNIT,
    VARYING,
    Layout,
    assert_holds,
    contents,
    create,
    objects,
    pieces,
    random_values,
    schema_of,
    write,
    written,
)

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
