"""Minibatches hold every token once, in an order that only the seed decides, whatever the shape of the store."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

import forebay
import forebay.stages.accessors  # registers run.batches
from forebay.stages.models.errors import HookError
from forebay.stores.batches import Batches
from forebay.stores.dtypes import bfloat16_to_float32
from forebay.stores.errors import CorruptStore, IncompleteStore, SchemaError, StoreNotFound
from forebay.stores.schema import Array, Schema
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

LENGTHS = [1, 17, 9, 30, 2, 41, 13, 7, 26, 5]
N_TOKEN = sum(LENGTHS)
STARTS = np.cumsum([0, *LENGTHS[:-1]])
DOCUMENTS = np.array([0, 8, 8, 40, 41, 90, 140])
"""First tokens; the second is empty, and several lie within one sequence or across some."""
POSITION = np.concatenate([np.arange(n) for n in LENGTHS])
DOCUMENT = np.searchsorted(DOCUMENTS, np.arange(N_TOKEN), "right") - 1
RESID = "blocks.{}.hook_resid_post"


def values(seed: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Of bfloat16 any bits at all: negatives, NaN, infinities, subnormals."""
    random = np.random.default_rng(seed)
    if dtype == "bfloat16":
        return random.integers(0, 2**16, shape, dtype=np.uint16)
    return random.standard_normal(shape).astype(dtype)


def schema(unit: int, arrays: dict[str, Array], starts: NDArray[Any] = STARTS, **more: Any) -> Schema:
    labels: dict[str, Any] = {
        "sequences/start": (("sequence",), starts),
        "sequences/document": (("sequence",), DOCUMENT[starts]),
        "documents/start": (("document",), DOCUMENTS),
        "documents/id": (("document",), np.array([f"d{n}" for n in range(len(DOCUMENTS))], dtype=object)),
    }
    for path, array in arrays.items():
        if "layer" in array.dims:
            labels[f"{path.rpartition('/')[0]}/layer"] = (("layer",), np.array([0, 11][: array.shape[0]]))
    return Schema(kind="activations", n_token=N_TOKEN, unit_tokens=unit, arrays=arrays, labels=labels, **more)


def write(folder: Path, made: Schema, kept: dict[str, NDArray[Any]], units: int | None = None) -> Store:
    store = Store.create(folder, made, f"{hash(folder.name) % 7:064x}", {"determines": {}})
    for unit in list(made.grid)[:units]:
        writer = UnitWriter(store, unit)
        for path, array in made.arrays.items():
            long = "token" if "token" in array.dims else "sequence"
            own = np.arange(N_TOKEN if long == "token" else len(STARTS))[made.rows(unit)[long]]
            if len(own):
                value = kept[path].take(own, axis=array.dims.index(long))
                piece = xr.Dataset({"value": (array.dims, value)}, coords={long: own})
                writer.put(xr.DataTree.from_dict({f"/{path.rpartition('/')[0]}": piece}))
        writer.finish({})
    return store


RESID_ARRAY = Array(
    dims=("layer", "token", "d_model"), shape=(2, N_TOKEN, 5), dtype="bfloat16", chunks=(1, 4, 5), shards=(1, 24, 5)
)
ARRAYS = {
    "hook_resid_post/value": RESID_ARRAY,
    "attn.hook_z/value": Array(
        dims=("layer", "token", "head", "d_head"),
        shape=(2, N_TOKEN, 2, 3),
        dtype="float32",
        chunks=(1, 6, 2, 3),
        shards=(1, 24, 2, 3),
    ),
    "ln_final.hook_scale/value": Array(dims=("token",), shape=(N_TOKEN,), dtype="float32", chunks=(8,), shards=(24,)),
    "attn.hook_pattern/value": Array(
        dims=("layer", "sequence", "head"), shape=(2, 10, 2), dtype="float32", chunks=(1, 1, 2), shards=(1, 1, 2)
    ),
}
"""Chunks of 4, 6 and 8 tokens in units of 24, so that pieces of different hook points do not coincide."""
KEPT = {path: values(n, array.shape, array.dtype) for n, (path, array) in enumerate(ARRAYS.items())}
# The scale tells every token from every other.
KEPT["ln_final.hook_scale/value"] = np.arange(N_TOKEN, dtype=np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write(folder / "activations", schema(24, ARRAYS), KEPT)
    return folder


def tokens(run: Path, **settings: Any) -> list[list[int]]:
    """The tokens of every batch, by their numbers."""
    batches = Batches(run=run, hooks="ln_final.hook_scale", **settings)
    return [batch[:, 0].astype(int).tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [token for batch in batches for token in batch]


# ── which tokens ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("buffer_tokens", [1, 17, 50, 10_000])
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_every_token_comes_once_an_epoch_and_none_is_lost(
    run: Path, batch: int, buffer_tokens: int, shuffle: bool
) -> None:
    found = tokens(run, batch=batch, buffer_tokens=buffer_tokens, shuffle=shuffle, skip_positions=0, epochs=2)
    an_epoch = -(-N_TOKEN // batch)
    assert len(found) == 2 * an_epoch
    assert {len(b) for b in found[: an_epoch - 1]} <= {batch}
    for epoch in (found[:an_epoch], found[an_epoch:]):
        assert sorted(flat(epoch)) == list(range(N_TOKEN))


@pytest.mark.parametrize("skip", [1, 3, 20])
def test_the_first_positions_of_every_sequence_never_come(run: Path, skip: int) -> None:
    found = flat(tokens(run, batch=10, skip_positions=skip))
    assert sorted(found) == np.flatnonzero(skip <= POSITION).tolist()


def test_one_position_is_left_out_unless_more_are_asked_for_and_the_batches_say_so(run: Path) -> None:
    batches = Batches(run=run, hooks="ln_final.hook_scale")
    assert batches.n_token == np.count_nonzero(POSITION >= 1)
    assert "of every sequence those from position 1 on" in repr(batches)


@pytest.mark.parametrize("documents", [slice(2, 4), slice(None, -2), slice(None, None, 2), [6, 0, 3], [3]])
def test_tokens_of_chosen_documents_come_and_no_others(run: Path, documents: slice | list[int]) -> None:
    found = flat(tokens(run, batch=10, documents=documents, buffer_tokens=30))
    chosen = np.arange(len(DOCUMENTS))[documents]
    assert sorted(found) == np.flatnonzero((POSITION >= 1) & np.isin(DOCUMENT, chosen)).tolist()


def test_a_split_by_document_shares_no_token(run: Path) -> None:
    part, rest = (flat(tokens(run, batch=9, documents=one)) for one in (slice(0, 4), slice(4, None)))
    assert not set(part) & set(rest)
    assert sorted(part + rest) == np.flatnonzero(POSITION >= 1).tolist()


def test_the_last_batch_of_an_epoch_is_short_or_left_out(run: Path) -> None:
    n = np.count_nonzero(POSITION >= 1)
    assert [len(b) for b in tokens(run, batch=50, epochs=2)] == [50, 50, n - 100] * 2
    assert [len(b) for b in tokens(run, batch=50, epochs=2, drop_last=True)] == [50, 50] * 2


# ── in which order ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_shuffling_tokens_come_in_order(run: Path) -> None:
    found = flat(tokens(run, batch=11, buffer_tokens=40, shuffle=False, epochs=2))
    assert found == np.flatnonzero(POSITION >= 1).tolist() * 2


def test_another_seed_and_another_epoch_have_another_order(run: Path) -> None:
    orders = [flat(tokens(run, batch=1000, seed=seed, epochs=1)) for seed in (0, 1, 2)]
    first, second = tokens(run, batch=1000, epochs=2)
    for one in (*orders[1:], second):
        assert one != orders[0] == first
        assert sorted(one) == sorted(orders[0])


def test_a_batch_draws_from_all_over_the_buffer(run: Path) -> None:
    """A third of a buffer that holds the whole store should come from nearly all of its tenths, every time."""
    for batch in tokens(run, batch=50, epochs=20, drop_last=True, buffer_tokens=1000):
        assert len({token * 10 // N_TOKEN for token in batch}) >= 8
        assert batch != sorted(batch)


def test_chunks_come_in_random_order_where_the_buffer_holds_one(run: Path) -> None:
    found = flat(tokens(run, batch=1000, buffer_tokens=1, skip_positions=0))
    pieces = [token // 8 for token in found]
    order = [piece for n, piece in enumerate(pieces) if not n or pieces[n - 1] != piece]
    assert sorted(order) == list(range(-(-N_TOKEN // 8)))
    assert order != sorted(order)


ORDER = """
from forebay.stores.batches import Batches
import sys
batches = Batches(run=sys.argv[1], hooks="ln_final.hook_scale", batch=13, seed=5, epochs=3, buffer_tokens=60)
print([int(token) for batch in batches for token in batch[:, 0]])
"""


def test_the_order_is_the_same_in_every_process(run: Path) -> None:
    here = flat(tokens(run, batch=13, seed=5, epochs=3, buffer_tokens=60))
    for salt in ("0", "1"):
        command = [sys.executable, "-c", ORDER, str(run)]
        said = subprocess.check_output(command, text=True, env={"PYTHONHASHSEED": salt})
        assert said.strip() == str(here)


def test_the_order_is_the_one_it_has_always_been(run: Path) -> None:
    """Bits of PCG64 are what they are in every version of numpy; its permutations need not be."""
    assert tokens(run, batch=12, seed=5, buffer_tokens=60)[0] == [30, 86, 83, 55, 58, 24, 87, 60, 93, 92, 31, 82]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_start_gives_the_batches_that_were_left(run: Path, drop_last: bool, shuffle: bool) -> None:
    settings: dict[str, Any] = {"batch": 20, "epochs": 3, "buffer_tokens": 60, "drop_last": drop_last}
    whole = tokens(run, shuffle=shuffle, **settings)
    for start in range(len(whole) + 2):
        batches = Batches(run=run, hooks="ln_final.hook_scale", shuffle=shuffle, start=start, **settings)
        assert [batch[:, 0].astype(int).tolist() for batch in batches] == whole[start:]
        assert len(batches) == len(whole[start:])


def test_batches_without_an_end_go_on_and_have_no_length(run: Path) -> None:
    batches = Batches(run=run, hooks="ln_final.hook_scale", batch=100, epochs=None)
    found = [batch for batch, _ in zip(batches, range(9), strict=False)]
    assert sum(map(len, found[: batches.n_batch])) == batches.n_token
    assert len(found) == 9
    with pytest.raises(TypeError, match=r"epochs is None\. An epoch has \.n_batch of them"):
        len(batches)


def test_iterators_are_independent(run: Path) -> None:
    batches = Batches(run=run, hooks=RESID.format(0), batch=7, buffer_tokens=30)
    alone = list(batches)
    one, other = iter(batches), iter(batches)
    found = [next(one), next(one), next(other), next(one), next(other)]
    for index, batch in zip((0, 1, 0, 2, 1), found, strict=True):
        np.testing.assert_array_equal(batch.view(np.uint32), alone[index].view(np.uint32))


def test_arrays_that_were_given_out_are_left_alone(run: Path) -> None:
    batches = Batches(run=run, hooks="ln_final.hook_scale", batch=7, buffer_tokens=1)
    kept, copies = [], []
    for batch in batches:
        kept.append(batch)
        copies.append(batch.copy())
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))


# ── which values ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("layer", "index"), [(0, 0), (11, 1)])
def test_bfloat16_comes_decoded_to_the_bit(run: Path, layer: int, index: int) -> None:
    pairs = Batches(run=run, hooks=(RESID.format(layer), "ln_final.hook_scale"), batch=19, buffer_tokens=50)
    for rows, token in pairs:
        assert rows.dtype == np.float32
        bits = KEPT["hook_resid_post/value"][index][token[:, 0].astype(int)]
        np.testing.assert_array_equal(rows.view(np.uint32), bfloat16_to_float32(bits).view(np.uint32))


def test_stored_values_come_as_they_lie_on_disk(run: Path) -> None:
    hooks = (RESID.format(11), "ln_final.hook_scale")
    for rows, token in Batches(run=run, hooks=hooks, batch=19, dtype="stored"):
        assert rows.dtype == np.uint16
        np.testing.assert_array_equal(rows, KEPT["hook_resid_post/value"][1][token[:, 0].astype(int)])


def test_heads_are_flattened(run: Path) -> None:
    batches = Batches(run=run, hooks=("blocks.11.attn.hook_z", "ln_final.hook_scale"), batch=23)
    assert batches.widths == (6, 1)
    for rows, token in batches:
        np.testing.assert_array_equal(rows, KEPT["attn.hook_z/value"][1].reshape(-1, 6)[token[:, 0].astype(int)])


def test_one_hook_gives_arrays_and_a_list_of_one_gives_tuples(run: Path) -> None:
    one = next(iter(Batches(run=run, hooks=RESID.format(0), batch=4)))
    [listed] = next(iter(Batches(run=run, hooks=(RESID.format(0),), batch=4)))
    assert one.shape == listed.shape == (4, 5)


def test_hooks_of_two_stores_come_for_the_same_tokens(run: Path, tmp_path: Path) -> None:
    """The other store has units and chunks of its own."""
    write(tmp_path / "activations", schema(24, ARRAYS), KEPT)
    array = dataclasses.replace(RESID_ARRAY, chunks=(1, 10, 5), shards=(1, 20, 5), shape=(1, N_TOKEN, 5))
    kept = values(9, array.shape, "bfloat16")
    write(tmp_path / "later", schema(20, {"hook_mlp_out/value": array}), {"hook_mlp_out/value": kept})
    batches = Batches(run=tmp_path, hooks=("blocks.0.hook_mlp_out", "ln_final.hook_scale"), batch=30, dtype="stored")
    found = list(batches)
    assert sorted(int(t) for _, token in found for t in token[:, 0]) == np.flatnonzero(POSITION >= 1).tolist()
    for rows, token in found:
        np.testing.assert_array_equal(rows, kept[0][token[:, 0].astype(int)])


def test_compressed_stores_give_the_same(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "activations", schema(24, ARRAYS, compression="zstd"), KEPT)
    settings: dict[str, Any] = {"hooks": RESID.format(11), "batch": 16, "dtype": "stored"}
    for one, other in zip(Batches(run=tmp_path, **settings), Batches(run=run, **settings), strict=True):
        np.testing.assert_array_equal(one, other)


# ── resources ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_more_than_two_buffers_are_held(tmp_path: Path) -> None:
    n_row, width = N_TOKEN, 4096
    array = Array(
        dims=("token", "d_model"), shape=(n_row, width), dtype="float32", chunks=(4, width), shards=(24, width)
    )
    kept = {"hook_embed/value": values(0, array.shape, "float32")}
    write(tmp_path / "activations", schema(24, {"hook_embed/value": array}), kept)
    batches = Batches(run=tmp_path, hooks="hook_embed", batch=4, buffer_tokens=24, epochs=2)
    tracemalloc.start()
    try:
        total = sum(len(batch) for batch in batches)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    row = 4 * width
    assert total == 2 * batches.n_token
    # two buffers, the batch in hand and the one being filled, and the rows that are gathered meanwhile
    assert peak < 2 * 24 * row + 4 * 4 * row


def test_an_iteration_that_is_abandoned_leaves_no_thread_behind(run: Path) -> None:
    found = iter(Batches(run=run, hooks=RESID.format(0), batch=3, epochs=None))
    next(found)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    del found
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (RESID.format(1), r"no 'blocks\.1\.hook_resid_post'\. Did you mean 'blocks\.11?\.hook_resid_post'"),
        ("blocks.0.hook_resid_pre", r"It holds blocks\.\{0,11\}\.hook_resid_post, blocks\.\{0,11\}\.attn\.hook_z, "),
        ("blocks.0.attn.hook_pattern", "lies along layer, sequence, head, without a token axis"),
        ((), "name at least one hook point"),
    ],
)
def test_a_hook_that_cannot_be_served_is_refused(run: Path, hooks: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Batches(run=run, hooks=hooks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch = 0 must be at least 1"),
        ({"seed": -1}, "seed = -1 must be at least 0"),
        ({"epochs": 0}, "epochs = 0 must be at least 1"),
        ({"start": -2}, "start = -2 must be at least 0"),
        ({"dtype": "bfloat16"}, 'dtype = \'bfloat16\' must be "float32" or "stored"'),
        ({"documents": [7]}, "has documents 0 to 6"),
        ({"documents": [1]}, "0 tokens are left, which make no batch of 4,096"),
        ({"batch": 1000, "drop_last": True}, "141 tokens are left, which make no batch of 1,000"),
        ({"skip_positions": 50}, "fewer skip_positions"),
    ],
)
def test_settings_that_make_no_batches_are_refused(run: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Batches(run=run, hooks=RESID.format(0), **settings)


def test_an_incomplete_store_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "activations", schema(24, ARRAYS), KEPT, units=3)
    with pytest.raises(IncompleteStore, match=r"activations is incomplete: 3 of 7 units are recorded\. Run its recipe"):
        Batches(run=tmp_path, hooks=RESID.format(0))


def test_hooks_of_stores_with_other_tokens_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "activations", schema(24, ARRAYS), KEPT)
    array, starts = dataclasses.replace(RESID_ARRAY, shape=(1, N_TOKEN, 5)), np.array([0, *STARTS[2:]])
    made = schema(24, {"hook_mlp_out/value": array}, starts)
    write(tmp_path / "later", made, {"hook_mlp_out/value": values(9, array.shape, "bfloat16")})
    with pytest.raises(SchemaError, match=r"blocks\.0\.hook_mlp_out of .*later has other tokens than hook_resid_post"):
        Batches(run=tmp_path, hooks=(RESID.format(0), "blocks.0.hook_mlp_out"))


def test_a_folder_without_activations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="holds no store of activations"):
        Batches(run=tmp_path, hooks=RESID.format(0))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_damaged_shard_is_named_and_never_read_as_values(tmp_path: Path, compression: str, damage: str) -> None:
    store = write(tmp_path / "activations", schema(24, ARRAYS, compression=compression), KEPT)
    shard = store.path / "hook_resid_post/value/c/1/2/0"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 3] ^= 4
    shard.unlink() if damage == "remove" else shard.write_bytes(raw if damage == "flip" else raw[:-30])
    with pytest.raises(CorruptStore, match=r"c/1/2/0 (cannot be read: |is missing).*forebay verify"):
        list(Batches(run=tmp_path, hooks=RESID.format(11), batch=5))
    assert len(list(Batches(run=tmp_path, hooks=RESID.format(0), batch=5)))


def test_what_lies_before_the_start_is_not_read(tmp_path: Path) -> None:
    store = write(tmp_path / "activations", schema(24, ARRAYS), KEPT)
    (store.path / "hook_resid_post/value/c/0/0/0").unlink()
    settings: dict[str, Any] = {"hooks": RESID.format(0), "shuffle": False, "buffer_tokens": 12, "batch": 10}
    with pytest.raises(CorruptStore):
        next(iter(Batches(run=tmp_path, **settings)))
    assert sum(map(len, Batches(run=tmp_path, start=3, **settings))) == np.count_nonzero(POSITION >= 1) - 30


# ── from a run ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_gives_its_batches(run: Path) -> None:
    batches = forebay.open_run(run).batches(RESID.format(11), batch=16, seed=3)
    own = Batches(run=run, hooks=RESID.format(11), batch=16, seed=3)
    assert batches.about() == own.about()
    for one, other in zip(batches, own, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))
    [both] = forebay.open_run(run).batches(["blocks.0.hook_out", "ln_final.hook_scale"])  # an alias of TransformerLens
    assert [rows.shape for rows in both] == [(batches.n_token, 5), (batches.n_token, 1)]


def test_a_name_that_is_no_hook_point_is_refused_with_the_nearest(run: Path) -> None:
    with pytest.raises(HookError, match=r"Did you mean 'blocks\.0\.hook_resid_post'"):
        forebay.open_run(run).batches("blocks.0.hook_resid_pst")


def test_a_tree_that_is_no_run_is_refused() -> None:
    with pytest.raises(SchemaError, match="ask for batches of what `open_run` gives"):
        xr.DataTree(name="x").batches(RESID.format(0))
