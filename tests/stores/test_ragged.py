"""What varies in number from token to token is kept end to end, a row a unit, and nothing is kept of what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from numpy.typing import NDArray

from forebay.stores.errors import SchemaError
from forebay.stores.schema import RAGGED_CHUNK, Schema, along_token, along_unit
from forebay.stores.store import Store
from forebay.stores.tree import open_store
from forebay.stores.writer import UnitWriter

N_TOKEN, UNIT = 23, 10
MADE_BY = {"determines": {}, "versions": {}}


def store_of(folder: Path, most: int = 4) -> Store:
    starts = np.arange(0, N_TOKEN, 5)
    labels = {
        "sequences/start": (("sequence",), starts),
        "sequences/document": (("sequence",), np.zeros(len(starts), dtype=np.int64)),
        "documents/start": (("document",), np.zeros(1, dtype=np.int64)),
        "documents/id": (("document",), np.array(["a"], dtype=object)),
    }
    arrays = {
        "g/count": along_token(("token",), {"token": N_TOKEN}, "int32", UNIT),
        "g/feature": along_unit(N_TOKEN, "int32", UNIT, most),
    }
    schema = Schema(kind="features", n_token=N_TOKEN, unit_tokens=UNIT, arrays=arrays, labels=labels)
    return Store.create(folder, schema, "0" * 64, MADE_BY)


def piece(first: int, count: list[int], feature: list[int] | NDArray[Any]) -> xr.DataTree:
    variables = {
        "count": (("token",), np.array(count, dtype=np.int32)),
        "feature": (("nonzero",), np.array(feature, dtype=np.int32)),
    }
    coords = {"token": pd.RangeIndex(first, first + len(count))}
    return xr.DataTree.from_dict({"g": xr.Dataset(variables, coords=coords)})


def test_pieces_lie_end_to_end_in_the_row_of_their_unit(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    writer = UnitWriter(store, store.schema.grid[1])
    writer.put(piece(10, [2, 0, 1], [7, 8, 0]))
    writer.put(piece(13, [0, 0, 3, 0, 0, 0, 1], [1, 2, 3, 9]))
    writer.finish({})
    row = zarr.open_group(str(store.path), mode="r", use_consolidated=False)["g/feature"][1]
    assert row[:7].tolist() == [7, 8, 0, 1, 2, 3, 9]
    assert not row[7:].any()
    assert store.verify() == {}


def test_rows_take_the_room_of_what_is_in_them(tmp_path: Path) -> None:
    store = store_of(tmp_path, most=100 * RAGGED_CHUNK)
    writer = UnitWriter(store, store.schema.grid[0])
    writer.put(piece(0, [0] * 9 + [5], [1, 2, 3, 4, 5]))
    record = writer.finish({})
    kept = record["objects"]["g/feature/c/0/0"]["bytes"]
    assert store.schema.arrays["g/feature"].shape[1] * 4 > 2**27
    assert kept < 4 * RAGGED_CHUNK + 16 * 1000 + 64
    assert record["bytes"] < 2**20


def test_a_unit_without_any_value_has_its_objects_all_the_same(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for unit in store.schema.grid:
        writer = UnitWriter(store, unit)
        writer.put(piece(unit.start, [0] * len(unit), []))
        assert set(writer.finish({})["objects"]) == {f"g/count/c/{unit.index}", f"g/feature/c/{unit.index}/0"}
    assert store.verify() == {}
    assert set(open_store(tmp_path)["g"].data_vars) == {"count"}


def test_values_that_do_not_belong_to_any_token_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    writer = UnitWriter(store, store.schema.grid[2])
    writer.put(piece(20, [1, 1, 1], [4, 5, 6, 7]))
    with pytest.raises(SchemaError, match="g/feature: unit 2 has 4 values; its counts add up to 3"):
        writer.finish({})
    assert store.todo() == list(store.schema.grid)


def test_values_that_belong_to_the_tokens_of_another_piece_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    writer = UnitWriter(store, store.schema.grid[2])
    writer.put(piece(20, [1], [4, 5]))
    writer.put(piece(21, [1, 1], [6]))
    with pytest.raises(SchemaError, match="g/feature: unit 2 has 3 values; its counts add up to 3, piece by piece"):
        writer.finish({})


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_of_scattered_tokens_in_any_order_make_the_same_row(tmp_path: Path, size: int) -> None:
    store, rng = store_of(tmp_path, most=30), np.random.default_rng(size)
    unit = store.schema.grid[1]
    of_token = [rng.integers(0, 99, n).astype(np.int32) for n in rng.integers(0, 5, len(unit))]
    tokens, writer = rng.permutation(len(unit)), UnitWriter(store, unit)
    for at in range(0, len(unit), size):
        some = np.sort(tokens[at : at + size])
        whole = piece(0, [len(of_token[t]) for t in some], np.concatenate([of_token[t] for t in some]))
        writer.put(
            whole.map_over_datasets(lambda ds, some=some: ds.assign_coords(token=unit.start + some) if ds else ds)
        )
    writer.finish({})
    row = zarr.open_group(str(store.path), mode="r", use_consolidated=False)["g/feature"][1]
    expected = np.concatenate(of_token)
    assert row[: len(expected)].tolist() == expected.tolist()
    assert not row[len(expected) :].any()


def test_more_values_than_a_row_has_room_for_are_refused_by_number(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    room = store.schema.arrays["g/feature"].shape[1]
    writer = UnitWriter(store, store.schema.grid[0])
    writer.put(piece(0, [room + 1] + [0] * 9, np.arange(room + 1)))
    with pytest.raises(SchemaError, match=r"has 65,537 nonzeros, 6,554 a token; there is room for 65,536"):
        writer.finish({})
