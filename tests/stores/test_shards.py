"""Objects are, byte for byte, those that zarr-python writes; each reads what the other wrote; none is half there."""

from __future__ import annotations

import errno
import math
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from forebay.stores.chunks import read_outer
from forebay.stores.dtypes import FORMATS, format_of
from forebay.stores.errors import CorruptStore, SchemaError
from forebay.stores.object_paths import ObjectPath
from forebay.stores.schema import Array, Schema, along_sequence, along_token, along_unit
from forebay.stores.shards import cut, morton_order, put_object
from forebay.stores.store import Store

Objects = dict[tuple[int, ...], bytes]


def by_zarr(array: Array, compression: str) -> tuple[Any, dict[str, Any]]:
    """An empty array as the format's description has it, and what is put for it: key → bytes."""
    kept, put = format_of(array.dtype), dict[str, Any]()
    zstd = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=kept.itemsize, blocksize=512 * 1024)
    made = zarr.create_array(
        MemoryStore(put),
        shape=array.shape,
        dtype=kept.kept,
        chunks=array.chunks,
        shards=array.shards,
        fill_value=kept.missing,
        compressors=[zstd, Crc32cCodec()] if compression == "zstd" else [Crc32cCodec()],
        config={"write_empty_chunks": True},
    )
    return made, put


def written_by_zarr(array: Array, compression: str, values: NDArray[Any]) -> Objects:
    made, put = by_zarr(array, compression)
    made[tuple(map(slice, values.shape))] = values
    return {tuple(map(int, key[2:].split("/"))): data.to_bytes() for key, data in put.items() if key[:2] == "c/"}


def random_bits(shape: tuple[int, ...], dtype: str, seed: int = 0) -> NDArray[Any]:
    """Any bits at all, some of them fill values."""
    kept = format_of(dtype)
    size = math.prod(shape) * kept.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, size, dtype=np.uint8)
    found = data.view(kept.kept).reshape(shape).copy()
    found[..., ::5] = kept.missing
    return found


def written(folder: Path, array: Array, compression: str, values: NDArray[Any]) -> Objects:
    """Each object put by itself; what is said of it is true of its bytes."""
    found = {}
    rows = {dim: slice(0, size) for dim, size in zip(array.dims, values.shape, strict=True)}
    for index, part in cut(array, rows, values):
        path = folder.joinpath(*map(str, index))
        said = put_object(path, part, array, compression)
        found[index] = path.read_bytes()
        assert said == {"bytes": len(found[index]), "blake3": blake3(found[index]).hexdigest()}
    return found


SIZES = {"token": 53, "layer": 3, "sequence": 7, "d_model": 5, "head": 2, "query": 6, "key": 6, "state_position": 5}
LAYOUTS: dict[str, Array] = {
    "a number a token": replace(along_token(("token",), SIZES, "uint8", 20), chunks=(4,)),
    "a vector a layer and token": replace(
        along_token(("layer", "token", "d_model"), SIZES, "uint8", 20), chunks=(1, 5, 5)
    ),
    "one chunk a shard": along_token(("token", "head", "d_model"), SIZES, "uint8", 16),
    "a pattern a sequence": along_sequence(("layer", "sequence", "head", "query", "key"), SIZES, "uint8", 3),
    "states of sequences": along_sequence(
        ("layer", "sequence", "state_position", "head", "d_model"), SIZES, "uint8", 5
    ),
    "a ragged row": replace(along_unit(53, "uint8", 53, 4), shape=(1, 96), chunks=(1, 16), shards=(1, 96)),
    "postings": Array(dims=("nonzero",), shape=(101,), dtype="uint8", chunks=(16,), shards=(48,)),
}


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_in_every_layout_gives_the_bytes_of_zarr(tmp_path: Path, layout: str, compression: str) -> None:
    for dtype in FORMATS:
        array = replace(LAYOUTS[layout], dtype=dtype)
        held = (1, 70) if array.ragged else array.shape
        values = random_bits(held, dtype)
        due = written_by_zarr(array, compression, values)
        assert written(tmp_path / dtype, array, compression, values) == due
        assert len(due) == math.prod(-(-n // shard) for n, shard in zip(held, array.shards, strict=True))


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Of one to three dimensions, with edges in the middle of chunks and of shards."""
    chunks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shards = [chunk * draw(st.integers(1, 5)) for chunk in chunks]
    shape = [draw(st.integers(1, 2 * shard + 1)) for shard in shards]
    return Array(
        dims=("x", "y", "z")[: len(chunks)],
        shape=tuple(shape),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float64", "int8", "uint32", "bool"])),
        chunks=tuple(chunks),
        shards=tuple(shards),
    )


@settings(max_examples=40, deadline=None)
@given(arrays(), st.sampled_from(["none", "zstd"]))
def test_any_grid_of_chunks_gives_the_bytes_of_zarr_which_reads_them_back(
    tmp_path_factory: pytest.TempPathFactory, array: Array, compression: str
) -> None:
    values = random_bits(array.shape, array.dtype)
    found = written(tmp_path_factory.mktemp("any"), array, compression, values)
    assert found == written_by_zarr(array, compression, values)
    made, put = by_zarr(array, compression)
    buffer = type(next(iter(put.values())))
    put.update({f"c/{'/'.join(map(str, index))}": buffer.from_bytes(data) for index, data in found.items()})
    assert made[...].tobytes() == values.tobytes()


def test_chunks_of_many_tasks_come_in_order(tmp_path: Path) -> None:
    """Of 3 MiB, in chunks of which several make a task, from values that lie neither end to end nor in C order."""
    array = Array(dims=("token", "d_model"), shape=(3000, 512), dtype="float16", chunks=(200, 512), shards=(3000, 512))
    values = np.asfortranarray(random_bits((3000, 512), "float16"))
    for compression in ("none", "zstd"):
        due = written_by_zarr(array, compression, values)
        assert written(tmp_path / compression, array, compression, values) == due


@pytest.mark.parametrize("grid", [(1,), (7,), (4, 4), (5, 3), (2, 1, 9), (3, 3, 3), (1, 1, 1)])
def test_chunks_come_in_morton_s_order(grid: tuple[int, ...]) -> None:
    """Bit by bit of every place, by Python's own integers."""

    def code(place: tuple[int, ...]) -> int:
        bits = [(bit, dim) for bit in range(8) for dim, size in enumerate(grid) if bit < (size - 1).bit_length()]
        return sum((place[dim] >> bit & 1) << at for at, (bit, dim) in enumerate(bits))

    assert [tuple(place) for place in morton_order(grid).tolist()] == sorted(np.ndindex(*grid), key=code)


def test_rows_that_begin_amid_an_object_are_refused() -> None:
    array = LAYOUTS["a number a token"]
    with pytest.raises(SchemaError, match=r"begin amid an object: each is of \(20,\)"):
        list(cut(array, {"token": slice(10, 30)}, np.zeros(20, np.uint8)))


# ── one object ───────────────────────────────────────────────────────────────────────────────────────────────────────

LARGE = Array(dims=("token",), shape=(2**19,), dtype="float32", chunks=(2**15,), shards=(2**19,))


def test_an_object_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.replace

    def synced(file: int) -> None:
        calls.append(("fsync", os.fstat(file).st_size))
        fsync(file)

    def renamed(source: Path, target: Path) -> None:
        calls.append(("replace", source.stat().st_size))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    said = put_object(tmp_path / "c" / "0", random_bits(LARGE.shape, "float32"), LARGE, "none")
    assert calls == [("fsync", said["bytes"]), ("replace", said["bytes"])]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0").write_bytes(b"what was there")

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        put_object(tmp_path / "0", random_bits(LARGE.shape, "float32"), LARGE, "none")
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert (tmp_path / "0").read_bytes() == b"what was there"


def test_a_torn_object_is_replaced_and_never_looked_at(tmp_path: Path) -> None:
    values = random_bits(LARGE.shape, "float32")
    (tmp_path / "0").write_bytes(b"torn")
    (tmp_path / "0").chmod(0)
    put_object(tmp_path / "0", values, LARGE, "none")
    assert (tmp_path / "0").read_bytes() == written_by_zarr(LARGE, "none", values)[0,]


def test_threads_end_with_the_object(tmp_path: Path) -> None:
    before = threading.active_count()
    put_object(tmp_path / "0", random_bits(LARGE.shape, "float32"), LARGE, "zstd")
    assert threading.active_count() == before


def test_an_object_store_gets_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    values = random_bits(LARGE.shape, "float32")
    for compression in ("none", "zstd"):
        there = ObjectPath(f"memory://{tmp_path.name}/{compression}")
        said = put_object(there, values, LARGE, compression)
        assert said == put_object(tmp_path / compression, values, LARGE, compression)
        assert there.read_bytes() == (tmp_path / compression).read_bytes()


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def store_of(place: Path | ObjectPath, array: Array, compression: str = "none") -> Store:
    """An empty store of one array along `token`, in units of its shards."""
    axis = array.dims.index("token")
    labels = {
        "sequences/start": (("sequence",), np.array([0])),
        "sequences/document": (("sequence",), np.array([0])),
        "documents/start": (("document",), np.array([0])),
        "documents/id": (("document",), np.array(["a"], dtype=object)),
    }
    schema = Schema(
        kind="activations",
        n_token=array.shape[axis],
        unit_tokens=array.shards[axis],
        arrays={"x/value": array},
        labels=labels,
        compression=compression,
    )
    return Store.create(place, schema, "0" * 64, {"determines": {}})


def filled(store: Store, values: NDArray[Any]) -> Store:
    axis = store.schema.arrays["x/value"].dims.index("token")
    for unit in store.schema.grid:
        rows = slice(unit.start, unit.stop)
        store.write_rows("x/value", {"token": rows}, values[(slice(None),) * axis + (rows,)])
    return store


@st.composite
def rows_of(draw: st.DrawFn, size: int) -> int | slice | NDArray[np.int64]:
    """What xarray asks a dimension for."""
    kind = draw(st.sampled_from(["all", "one", "slice", "steps", "some"]))
    edges = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    choices: dict[str, Any] = {
        "all": st.just(slice(None)),
        "one": st.integers(-size, size - 1),
        "slice": st.just(slice(*edges)),
        "steps": st.builds(slice, st.just(edges[0]), st.just(edges[1]), st.integers(1, 9)),
        "some": st.lists(st.integers(-size, size - 1), max_size=12).map(lambda found: np.array(found, np.int64)),
    }
    return draw(choices[kind])  # type: ignore[no-any-return]


READ = Array(
    dims=("layer", "token", "d_model"), shape=(2, 61, 6), dtype="bfloat16", chunks=(1, 5, 3), shards=(1, 20, 6)
)


@pytest.fixture(scope="module", params=["bfloat16 none", "float32 none", "bfloat16 zstd"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Any]:
    """A store, and its array as zarr-python opens it."""
    dtype, compression = request.param.split()
    array = replace(READ, dtype=dtype)
    store = filled(store_of(tmp_path_factory.mktemp("read"), array, compression), random_bits(array.shape, dtype))
    root: Any = zarr.open_group(str(store.path), mode="r", use_consolidated=False)
    return store, root["x/value"]


@settings(max_examples=40, deadline=None)
@given(st.tuples(rows_of(2), rows_of(61), rows_of(6)))
def test_rows_of_every_dimension_are_those_that_zarr_reads(both: tuple[Store, Any], key: tuple[Any, ...]) -> None:
    store, oracle = both
    found = read_outer(store, "x/value", key)
    plain = tuple(
        one if isinstance(one, slice | int) else one % size for one, size in zip(key, READ.shape, strict=True)
    )
    due = format_of(store.schema.arrays["x/value"].dtype).decode(np.asarray(oracle.oindex[plain]))
    assert (found.shape, found.dtype) == (due.shape, due.dtype)
    assert found.tobytes() == due.tobytes()


@pytest.mark.parametrize("key", [(2, 0, 0), (0, -62, 0), (0, np.array([3, 61]), 0), (0, 0, np.array([-7]))])
def test_rows_that_are_not_there_are_refused(both: tuple[Store, Any], key: tuple[Any, ...]) -> None:
    with pytest.raises(IndexError, match="of a dimension of"):
        read_outer(both[0], "x/value", key)


def test_chunks_in_any_order_are_found_by_the_table(tmp_path: Path) -> None:
    """As other writers of Zarr lay them, who put chunks as they are done, with gaps between them."""
    array = replace(READ, dtype="float32", chunks=(1, 4, 6))
    values = random_bits(array.shape, "float32")
    store = filled(store_of(tmp_path, array), values)
    path = store.path / "x/value/c/1/1/0"
    data = path.read_bytes()
    n_chunk, size = 5, 4 * 6 * 4 + 4
    chunks = [data[at * size : (at + 1) * size] for at in range(n_chunk)]
    placed, table = b"", np.zeros((n_chunk, 2), "<u8")
    for n in (3, 0, 4, 1, 2):
        placed += b"gap"
        table[n] = len(placed), size
        placed += chunks[n]
    path.write_bytes(placed + table.tobytes() + google_crc32c.value(table.tobytes()).to_bytes(4, "little"))
    assert read_outer(store, "x/value", (slice(None),) * 3).tobytes() == values.tobytes()
    root: Any = zarr.open_group(str(store.path), mode="r", use_consolidated=False)
    assert root["x/value"][...].tobytes() == values.tobytes()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_flipped_bit_and_every_cut_is_refused_by_name(tmp_path: Path, compression: str) -> None:
    array = replace(READ, shape=(1, 40, 6), chunks=(1, 10, 6))
    values = random_bits(array.shape, "bfloat16")
    store = filled(store_of(tmp_path, array, compression), values)
    path, everything = store.path / "x/value/c/0/1/0", (slice(None),) * 3
    whole = path.read_bytes()
    flipped = (whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(0, len(whole), 3))
    for damage in (*flipped, *(whole[:at] for at in range(1, len(whole), 17)), b"", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(CorruptStore, match=rf"{path} .*`forebay repair` drops"):
            read_outer(store, "x/value", everything)
        np.testing.assert_array_equal(
            read_outer(store, "x/value", (0, slice(0, 20), 0)), format_of("bfloat16").decode(values[0, :20, 0])
        )
        path.write_bytes(whole)


def test_what_is_missing_of_a_store_that_is_not_complete_reads_as_fill_values(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16", "int32", "bool"):
        array = replace(READ, dtype=dtype)
        store = store_of(tmp_path / dtype, array)
        values = random_bits(array.shape, dtype)
        store.write_rows("x/value", {"token": slice(20, 40)}, values[:, 20:40])
        expected = np.full(array.shape, format_of(dtype).missing, format_of(dtype).kept)
        expected[:, 20:40] = values[:, 20:40]
        found = read_outer(store, "x/value", (slice(None),) * 3, complete=False)
        np.testing.assert_array_equal(found, format_of(dtype).decode(expected))
        with pytest.raises(CorruptStore, match="is missing, though its unit is recorded"):
            read_outer(store, "x/value", (0, 0, 0))


def test_object_stores_are_read_like_folders(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    values = random_bits(READ.shape, "bfloat16")
    for compression in ("none", "zstd"):
        here = filled(store_of(tmp_path / compression, READ, compression), values)
        there = filled(store_of(ObjectPath(f"memory://{tmp_path.name}/{compression}"), READ, compression), values)
        for key in ((slice(None),) * 3, (1, slice(7, 33), slice(None)), (slice(None), np.array([60, 2, 2]), 4)):
            assert read_outer(there, "x/value", key).tobytes() == read_outer(here, "x/value", key).tobytes()
        assert isinstance(there.path, ObjectPath)
        (there.path / "x/value/c/1/0/0").put(b"")
        with pytest.raises(CorruptStore, match=r"c/1/0/0 is empty"):
            read_outer(there, "x/value", (1, 7, 0))
