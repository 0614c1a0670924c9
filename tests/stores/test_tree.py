"""A store or a run opens as one lazy, labelled tree: nothing is read before a value is asked for, and then little."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from numpy.typing import NDArray

from forebay.stores import chunks as chunks_of
from forebay.stores import tree
from forebay.stores.errors import CorruptStore, IncompleteStore, StoreNotFound
from forebay.stores.schema import DATA, Schema, along_sequence, along_token
from forebay.stores.store import Store
from forebay.stores.tree import Chunks, open_run, open_store, read_rows
from forebay.stores.writer import UnitWriter

UNIT, LENGTHS, LAYERS = 8, [3, 9, 1, 8, 5], [0, 11]
N_TOKEN = sum(LENGTHS)
DOCUMENTS = {"novel": 5, "": 0, "zwölf 🐟": 16, "last": 5}
RECIPE = {"recipe": {"tokenize": {"context": 9}}, "fingerprints": {"tokens": "ff"}}
PROVENANCE = {"determines": {"step": "capture", "files": [["model.safetensors", "ab" * 32]]}, "model": {"source": "m"}}

SEQUENCE = [s for s, n in enumerate(LENGTHS) for _ in range(n)]
POSITION = [p for n in LENGTHS for p in range(n)]
DOCUMENT = [d for d, n in enumerate(DOCUMENTS.values()) for _ in range(n)]
TABLE = pd.DataFrame({"sequence": SEQUENCE, "position": POSITION, "document": DOCUMENT})
"""The labels of every token, written out."""

LABELS: dict[str, Any] = {
    "sequences/start": (("sequence",), np.cumsum([0, *LENGTHS[:-1]])),
    "sequences/document": (("sequence",), np.array([0, 0, 2, 2, 3])),
    "documents/start": (("document",), np.array([0, 5, 5, 21])),
    "documents/id": (("document",), np.array(list(DOCUMENTS), dtype=object)),
}
SIZES = {"token": N_TOKEN, "sequence": 5, "layer": 2, "d_model": 3, "head": 2, "query": 9, "key": 9}
TOKENS = Schema(
    kind="tokens",
    n_token=N_TOKEN,
    unit_tokens=UNIT,
    arrays={name: along_token(("token",), SIZES, "uint32", UNIT) for name in ("token_id", "char_start", "char_end")},
    labels=LABELS,
)
ACTIVATIONS = Schema(
    kind="activations",
    n_token=N_TOKEN,
    unit_tokens=UNIT,
    arrays={
        "hook_resid_post/value": along_token(("layer", "token", "d_model"), SIZES, "bfloat16", UNIT),
        "ln_final.hook_scale/value": along_token(("token",), SIZES, "float32", UNIT),
        "attn.hook_pattern/value": along_sequence(("layer", "sequence", "head", "query", "key"), SIZES, "float32", 1),
    },
    labels={
        **LABELS,
        "hook_resid_post/layer": (("layer",), np.array(LAYERS)),
        "attn.hook_pattern/layer": (("layer",), np.array(LAYERS)),
    },
)


def numbers(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Whole numbers that tell every cell of an array from every other, and that bfloat16 holds exactly."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


VALUES: dict[str, NDArray[Any]] = {
    "token_id": np.arange(N_TOKEN, dtype=np.uint32) + 1000,
    "char_start": np.arange(N_TOKEN, dtype=np.uint32) * 5,
    "char_end": np.arange(N_TOKEN, dtype=np.uint32) * 5 + 4,
    "hook_resid_post/value": numbers((2, N_TOKEN, 3)),
    "ln_final.hook_scale/value": numbers((N_TOKEN,)),
    "attn.hook_pattern/value": numbers((2, 5, 2, 9, 9)),
}
"""What every array means, by its path."""
RESID = VALUES["hook_resid_post/value"]


def write(folder: Path, schema: Schema, units: list[int]) -> None:
    store = Store.create(folder, schema, "f" * 64, PROVENANCE)
    for unit in (schema.grid[index] for index in units):
        writer = UnitWriter(store, unit)
        for path, array in schema.arrays.items():
            long = "token" if "token" in array.dims else "sequence"
            own = np.arange(schema.n_token if long == "token" else 5)[schema.rows(unit)[long]]
            if not len(own):
                continue
            value = VALUES[path].take(own, axis=array.dims.index(long))
            kept = (value.view(np.uint32) >> 16).astype(np.uint16) if array.dtype == "bfloat16" else value
            group, _, name = path.rpartition("/")
            piece = xr.Dataset({name: (array.dims, kept)}, coords={long: own})
            writer.put(xr.DataTree.from_dict({f"/{group}": piece}))
        writer.finish({})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    folder = tmp_path_factory.mktemp("run")
    write(folder / "tokens", TOKENS, [0, 1, 2, 3])
    write(folder / "activations", ACTIVATIONS, [0, 1, 2, 3])
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A complete run, to be damaged at will."""
    shutil.copytree(run, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def partial_run(tmp_path: Path) -> Path:
    """A run that was stopped: all tokens, and the first and third of four units of activations."""
    write(tmp_path / "tokens", TOKENS, [0, 1, 2, 3])
    write(tmp_path / "activations", ACTIVATIONS, [0, 2])
    return tmp_path


DONE = np.isin(np.arange(N_TOKEN) // UNIT, [0, 2])

CHUNKS = pytest.mark.parametrize("chunks", ["auto", None])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Objects of arrays that are opened, as 'array/c/0/1/0', in order."""
    seen: list[str] = []

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        seen.append(str(path).partition(f"{DATA}/")[2])
        return open(path, *arguments, **options)

    monkeypatch.setattr(chunks_of, "open", counted, raising=False)
    return seen


@pytest.fixture
def no_computing() -> Iterator[None]:
    """Whatever dask is asked to compute is refused."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        yield


# ── laziness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@CHUNKS
def test_opening_and_selecting_compute_nothing(run: Path, reads: list[str], no_computing: None, chunks: Chunks) -> None:
    opened = open_run(run, chunks=chunks)
    open_store(run / "activations", chunks=chunks)
    stream = opened["activations/hook_resid_post/value"]
    stream.sel(layer=11, document=2, position=slice(0, 2)).isel(d_model=0)
    opened["activations/hook_resid_post"].to_dataset().sel(sequence=[0, 3])
    opened["activations/attn.hook_pattern/value"].sel(layer=0, sequence=3)
    repr(opened), opened._repr_html_()
    assert reads == []
    with pytest.raises(AssertionError, match="something was computed"):
        open_run(run)["tokens/token_id"].values  # noqa: B018 - reading is what would compute
    assert reads == []


@CHUNKS
def test_a_selection_reads_its_own_shards_only(run: Path, reads: list[str], chunks: Chunks) -> None:
    stream = open_run(run, chunks=chunks)["activations/hook_resid_post/value"]
    value = stream.sel(layer=11, sequence=1).values  # tokens 3 to 11
    assert set(reads) == {"hook_resid_post/value/c/1/0/0", "hook_resid_post/value/c/1/1/0"}
    np.testing.assert_array_equal(value, RESID[1, 3:12])


def test_chunks_are_whole_shards(run: Path) -> None:
    opened = open_run(run)
    stream, pattern = (opened[f"activations/{name}/value"] for name in ("hook_resid_post", "attn.hook_pattern"))
    assert stream.chunks == ((1, 1), (8, 8, 8, 2), (3,))
    assert pattern.chunks == ((1, 1), (1, 1, 1, 1, 1), (2,), (9,), (9,))
    assert opened["tokens/token_id"].chunks == ((8, 8, 8, 2),)


def test_too_many_chunks_become_several_shards_each(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MOST_CHUNKS", 4)
    stream = open_run(run)["activations/hook_resid_post/value"]
    assert stream.chunks == ((1, 1), (16, 10), (3,))
    np.testing.assert_array_equal(stream.values, RESID)


def test_a_billion_tokens_open_at_once(tmp_path: Path) -> None:
    """Memory follows what is asked for, not how much there is, for labels and the mask of what is done too."""
    n_token = 10**9
    sizes = {"token": n_token, "layer": 2, "d_model": 64}
    schema = Schema(
        kind="activations",
        n_token=n_token,
        unit_tokens=2**16,
        arrays={"hook_resid_post/value": along_token(("layer", "token", "d_model"), sizes, "bfloat16", 2**16)},
        labels={
            **LABELS,
            "sequences/start": (("sequence",), np.arange(0, n_token, 10**6)),
            "sequences/document": (("sequence",), np.zeros(1000, dtype=np.int64)),
            "documents/start": (("document",), np.array([0, 1, 1, 2])),
        },
    )
    store = Store.create(tmp_path, schema, "f" * 64, PROVENANCE)
    store.ledger.complete(15_000, {"fingerprint": "f" * 64})
    tracemalloc.start()
    try:
        stream = open_store(tmp_path, partial=True)["hook_resid_post"].to_dataset()
        first = 15_000 * 2**16
        assert int(stream.sel(sequence=999, position=7).token.size) == 1
        assert stream.done.isel(token=[0, first - 1, first, -1]).values.tolist() == [False, False, True, False]
        assert bool(stream.done.isel(token=first + 2**16 - 1))
        assert stream.done.sel(sequence=983, position=slice(39_998, 40_001)).values.tolist() == [0, 0, 1, 1]
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("node", ["tokens", "activations/hook_resid_post", "activations/ln_final.hook_scale"])
def test_every_token_has_its_labels(run: Path, node: str) -> None:
    dataset = open_run(run)[node].to_dataset()
    for label in TABLE:
        assert dataset[label].dims == ("token",)
        assert dataset[label].values.tolist() == TABLE[label].tolist()
    np.testing.assert_array_equal(dataset["token_id"].values, VALUES["token_id"])


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        ({"document": 2}, TABLE.document == 2),
        ({"sequence": 3}, TABLE.sequence == 3),
        ({"position": 0}, TABLE.position == 0),
        ({"position": slice(2, 4)}, TABLE.position.between(2, 4)),
        ({"document": 2, "position": slice(0, 1)}, (TABLE.document == 2) & (TABLE.position <= 1)),
        ({"sequence": [0, 3], "position": slice(1, None)}, TABLE.sequence.isin([0, 3]) & (TABLE.position >= 1)),
    ],
)
@CHUNKS
def test_selections_by_label_are_those_of_the_written_out_table(
    run: Path, labels: dict[str, Any], rows: pd.Series, chunks: Chunks
) -> None:
    stream = open_run(run, chunks=chunks)["activations/hook_resid_post/value"]
    found = stream.sel(layer=11, **labels)
    np.testing.assert_array_equal(found.values, RESID[1, rows])
    np.testing.assert_array_equal(found.token_id.values, VALUES["token_id"][rows])
    for label in TABLE:
        np.testing.assert_array_equal(found[label].values, TABLE[label][rows])
    with pytest.raises(KeyError):
        stream.sel(layer=1)


def test_what_lies_along_sequence_is_labelled_by_sequence(run: Path) -> None:
    pattern = open_run(run)["activations/attn.hook_pattern/value"]
    assert pattern.dims == ("layer", "sequence", "head", "query", "key")
    assert pattern.sequence.values.tolist() == [0, 1, 2, 3, 4]
    assert pattern.document.values.tolist() == [0, 0, 2, 2, 3]
    np.testing.assert_array_equal(
        pattern.sel(layer=11, sequence=[3, 1]).values, VALUES["attn.hook_pattern/value"][1, [3, 1]]
    )


def test_sequences_and_documents_are_tables(run: Path) -> None:
    for opened in (open_run(run), open_store(run / "tokens"), open_store(run / "activations")):
        sequences, documents = opened["sequences"], opened["documents"]
        assert sequences.sequence.values.tolist() == [0, 1, 2, 3, 4]
        assert sequences.start.values.tolist() == [0, 3, 12, 13, 21]
        assert sequences.n_token.values.tolist() == LENGTHS
        assert sequences.document.values.tolist() == [0, 0, 2, 2, 3]
        assert documents.document.values.tolist() == [0, 1, 2, 3]
        assert documents.id.values.tolist() == list(DOCUMENTS)
        assert documents.start.values.tolist() == [0, 5, 5, 21]
        assert documents.n_token.values.tolist() == list(DOCUMENTS.values())
        assert documents.id.where(documents.n_token > 0).isnull().values.tolist() == [False, True, False, False]


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@CHUNKS
def test_values_are_those_that_were_written(run: Path, chunks: Chunks) -> None:
    opened = open_run(run, chunks=chunks)
    for path, expected in VALUES.items():
        found = opened[f"tokens/{path}" if path in TOKENS.arrays else f"activations/{path}"]
        assert found.dtype == expected.dtype
        assert found.dims == (TOKENS.arrays | ACTIVATIONS.arrays)[path].dims
        np.testing.assert_array_equal(found.values, expected)
    assert opened["activations/hook_resid_post/value"].attrs["dtype"] == "bfloat16"


KEYS: list[Any] = [
    {"layer": 1, "token": 5, "d_model": 2},
    {"layer": -1, "token": -1},
    {"token": slice(3, 20, 4)},
    {"token": slice(None, None, -1)},
    {"token": [7, 0, 7, -3], "d_model": [2, 0]},
    {"layer": [1], "token": np.arange(N_TOKEN) % 3 == 0, "d_model": slice(1, None)},
    {"token": []},
    {"token": xr.DataArray([[0, 9], [20, 3]], dims=("a", "b")), "layer": xr.DataArray([0, 1], dims="a")},
]


@pytest.mark.parametrize("key", KEYS)
@CHUNKS
def test_any_indexing_is_that_of_the_array_in_memory(run: Path, key: dict[str, Any], chunks: Chunks) -> None:
    stream = open_run(run, chunks=chunks)["activations/hook_resid_post/value"].drop_vars(["layer"])
    expected = xr.DataArray(RESID, dims=stream.dims).isel(key)
    found = stream.isel(key)
    assert found.dims == expected.dims
    np.testing.assert_array_equal(found.values, expected.values)


def test_an_index_that_is_not_there_is_refused(run: Path) -> None:
    stream = open_run(run, chunks=None)["activations/hook_resid_post/value"]
    with pytest.raises(IndexError):
        stream.isel(token=N_TOKEN).values  # noqa: B018


def test_reductions_are_those_of_numpy(run: Path) -> None:
    stream = open_run(run)["activations/hook_resid_post/value"]
    np.testing.assert_allclose(stream.mean("token").values, RESID.astype(np.float64).mean(1), rtol=1e-6)
    by_document = stream.sum("d_model").groupby("document").mean()
    for document in set(DOCUMENT):
        rows = np.array(DOCUMENT) == document
        np.testing.assert_allclose(
            by_document.sel(document=document).values, RESID[:, rows].sum(-1).mean(-1), rtol=1e-6
        )


@CHUNKS
def test_opened_arrays_travel_between_processes(run: Path, chunks: Chunks) -> None:
    stream = open_run(run, chunks=chunks)["activations/hook_resid_post/value"]
    stream.isel(token=0).load()  # a handle is open now
    part = pickle.loads(pickle.dumps(stream.sel(layer=11, document=2)))  # noqa: S301 - our own bytes
    np.testing.assert_array_equal(part.values, RESID[1, 5:21])
    assert part.position.values.tolist() == POSITION[5:21]


def test_arrays_of_two_openings_are_one_to_dask(run: Path) -> None:
    """What was computed once in a cluster is not computed again because a notebook opened the store twice."""
    first, second = (open_run(run)["tokens"] for _ in range(2))
    assert first.char_start.data.name == second.char_start.data.name
    assert first.char_start.data.name != first.char_end.data.name


@pytest.mark.parametrize("span", [slice(0, N_TOKEN), slice(5, 17), slice(8, 16), slice(25, 26)])
def test_rows_in_memory_are_numbered(run: Path, span: slice) -> None:
    """What the next step of a run is computed from."""
    rows = read_rows(Store.open(run / "tokens"), span)
    assert sorted(rows.data_vars) == sorted(TOKENS.arrays)
    assert rows.indexes["token"].tolist() == list(range(span.start, span.stop))
    for path in TOKENS.arrays:
        assert isinstance(rows[path].data, np.ndarray)
        np.testing.assert_array_equal(rows[path].values, VALUES[path][span])


# ── incomplete runs ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_incomplete_store_is_refused_with_what_is_there(partial_run: Path) -> None:
    for opening in (lambda: open_run(partial_run), lambda: open_store(partial_run / "activations")):
        with pytest.raises(IncompleteStore) as refused:
            opening()
        message = str(refused.value)
        assert message.startswith(f"{partial_run}/activations is incomplete: 2 of 4 units are recorded.")
        assert "partial=True, which adds the coordinate `done` on `token`" in message


@CHUNKS
def test_a_partial_opening_says_which_tokens_are_done(partial_run: Path, chunks: Chunks) -> None:
    stream = open_run(partial_run, partial=True, chunks=chunks)["activations/hook_resid_post"].to_dataset()
    assert stream.done.dims == ("token",)
    assert stream.done.values.tolist() == DONE.tolist()
    value = stream.value.values
    np.testing.assert_array_equal(value[:, DONE], RESID[:, DONE])
    assert np.isnan(value[:, ~DONE]).all()
    tokens = open_run(partial_run, partial=True, chunks=chunks)["tokens"]
    assert tokens.done.values.all()


def test_the_mask_follows_every_selection(partial_run: Path) -> None:
    stream = open_store(partial_run / "activations", partial=True)["hook_resid_post"].to_dataset()
    for key in (5, -1, slice(6, 18, 3), slice(None, None, -1), [25, 8, -4, 7], [], DONE):
        assert stream.isel(token=key).done.values.tolist() == DONE[key].tolist()
    for labels, rows in [
        ({"document": 2}, TABLE.document == 2),
        ({"position": slice(0, 2)}, TABLE.position <= 2),
        ({"sequence": [1, 3], "position": 5}, TABLE.sequence.isin([1, 3]) & (TABLE.position == 5)),
    ]:
        assert stream.sel(labels).done.values.tolist() == DONE[rows].tolist()
    kept = stream.isel(token=stream.done.values)
    np.testing.assert_array_equal(kept.value.values, RESID[:, DONE])
    assert kept.position.values.tolist() == np.array(POSITION)[DONE].tolist()


def test_what_was_not_done_when_it_was_opened_is_done_when_it_is_opened_again(partial_run: Path) -> None:
    before = open_run(partial_run, partial=True)["activations/hook_resid_post/done"]
    write(partial_run / "activations", ACTIVATIONS, [1, 3])
    assert before.values.tolist() == DONE.tolist()
    after = open_run(partial_run)
    assert "done" not in after["activations/hook_resid_post"].coords
    np.testing.assert_array_equal(after["activations/hook_resid_post/value"].values, RESID)


# ── what the tree says of itself ─────────────────────────────────────────────────────────────────────────────────────


def test_provenance_travels_with_every_node(run: Path) -> None:
    opened = open_run(run)
    assert opened.attrs == RECIPE
    assert opened.name == run.name
    expected = {"fingerprint": "f" * 64, **PROVENANCE}
    for node in ("tokens", "activations", "activations/hook_resid_post", "activations/attn.hook_pattern"):
        assert opened[node].attrs == expected
    assert open_store(run / "tokens").attrs == open_store(run / "tokens")["tokens"].attrs == expected


def test_a_store_alone_opens_as_it_does_in_its_run(run: Path) -> None:
    """Token ids belong to the store of tokens, and are at hand in a run only."""
    opened = open_run(run)
    for store, nodes in {
        "tokens": {"tokens": "tokens"},
        "activations": {name: f"activations/{name}" for name in ("hook_resid_post", "attn.hook_pattern")},
    }.items():
        alone = open_store(run / store)
        assert alone.name == store
        assert set(alone.children) >= {"sequences", "documents", *nodes}
        for here, there in nodes.items():
            xr.testing.assert_identical(
                alone[here].to_dataset().drop_vars("token_id", errors="ignore"),
                opened[there].to_dataset().drop_vars("token_id", errors="ignore"),
            )


def test_a_run_without_a_recipe_or_without_tokens_still_opens(tmp_path: Path) -> None:
    write(tmp_path / "activations", ACTIVATIONS, [0, 1, 2, 3])
    opened = open_run(tmp_path)
    assert opened.attrs == {}
    stream = opened["activations/hook_resid_post"]
    assert "token_id" not in stream.coords
    np.testing.assert_array_equal(stream["value"].values, RESID)


# ── what is no run, or no longer whole ───────────────────────────────────────────────────────────────────────────────


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", run / "tokens"):
        with pytest.raises(StoreNotFound, match=rf"{folder} is no run: it holds no folder with a {DATA}"):
            open_run(folder)
    with pytest.raises(StoreNotFound, match=rf"{run}/{DATA} holds no store"):
        open_store(run)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
@CHUNKS
def test_a_truncated_shard_is_named_with_what_to_do(own_run: Path, keep: float, chunks: Chunks) -> None:
    shard = own_run / "activations" / DATA / "hook_resid_post" / "value" / "c" / "1" / "2" / "0"
    os.truncate(shard, int(keep * shard.stat().st_size))
    stream = open_run(own_run, chunks=chunks)["activations/hook_resid_post/value"]
    with pytest.raises(CorruptStore) as refused:
        stream.sel(layer=11).compute()
    message = str(refused.value)
    assert f"{own_run}/activations/{DATA}/hook_resid_post/value/c/1/2/0 cannot be read: " in message
    assert "`forebay verify` names the damaged objects, `forebay repair` drops their units" in message
    np.testing.assert_array_equal(stream.sel(layer=0).values, RESID[0])
    np.testing.assert_array_equal(stream.sel(layer=11).isel(token=slice(0, 16)).values, RESID[1, :16])


@pytest.mark.parametrize(
    ("damage", "message"), [(os.unlink, "is missing, though"), (lambda path: os.truncate(path, 0), "is empty")]
)
@CHUNKS
def test_a_lost_shard_does_not_read_as_fill_values(own_run: Path, damage: Any, message: str, chunks: Chunks) -> None:
    lost = [
        own_run / "activations" / DATA / "attn.hook_pattern/value/c/0/3/0/0/0",
        own_run / "tokens" / DATA / "token_id/c/2",
    ]
    for path in lost:
        damage(path)
    opened = open_run(own_run, chunks=chunks)
    pattern, token_id = opened["activations/attn.hook_pattern/value"], opened["tokens/token_id"]
    for part, path in [
        (pattern, lost[0]),
        (pattern.sel(layer=0, sequence=3), lost[0]),
        (pattern.isel(sequence=[4, 3], head=0), lost[0]),
        (token_id.isel(token=slice(0, 17)), lost[1]),
        (token_id.sel(document=2), lost[1]),
    ]:
        with pytest.raises(CorruptStore, match=rf"{path} {message}.*`forebay repair` drops"):
            part.compute()
    with pytest.raises(CorruptStore, match=rf"{lost[1]} {message}"):
        read_rows(Store.open(own_run / "tokens"), slice(10, 20))
    assert pattern.isel(sequence=[0, 1, 2, 4]).notnull().all()
    np.testing.assert_array_equal(token_id.isel(token=slice(0, 16)).values, VALUES["token_id"][:16])


def test_a_flipped_bit_is_no_value(own_run: Path) -> None:
    shard = own_run / "activations" / DATA / "hook_resid_post" / "value" / "c" / "0" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    stream = open_run(own_run)["activations/hook_resid_post/value"]
    with pytest.raises(CorruptStore, match=r"c/0/1/0 cannot be read: chunk 0: its checksum is wrong"):
        stream.isel(token=9).compute()


def test_a_store_of_a_newer_format_is_refused(own_run: Path) -> None:
    header = own_run / "activations" / DATA / "zarr.json"
    header.write_text(header.read_text().replace('"format": 1', '"format": 2'))
    for opening in (lambda: open_run(own_run), lambda: open_store(own_run / "activations")):
        with pytest.raises(ValueError, match="has format 2; this forebay reads format 1"):
            opening()
