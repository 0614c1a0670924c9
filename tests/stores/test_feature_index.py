"""A feature-major index holds what the tokens' rows hold, sorted by feature and value, whatever way it was built."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.stores import index_builder, postings
from forebay.stores.dtypes import format_of
from forebay.stores.errors import (
    CorruptStore,
    DiskFull,
    FingerprintMismatch,
    IncompleteStore,
    SchemaError,
)
from forebay.stores.feature_index import FeatureIndex, index_folder
from forebay.stores.feature_rows import FeatureRows
from forebay.stores.index_builder import Advance, Build, Geometry, build_index, token_spans
from forebay.stores.postings import BINS, keys_of, values_of
from forebay.stores.store import Store

from .feature_stores import Sparse, every_file, postings_of, random_sparse, write_features

LENGTHS = (9, 1, 30, 5, 17, 2)
SMALL = Geometry(run=23, chunk=4, shard=16)
"""Many runs, many objects, several chunks in each."""
SPARSE = random_sparse(3, 37, LENGTHS, most=7, levels=3)


@pytest.fixture(autouse=True, scope="module")
def no_disk() -> Iterator[None]:
    """What is durable matters where processes are killed, and takes most of the time of a small build."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield


def built(store: Store, geometry: Geometry = SMALL, skip_positions: int = 1) -> FeatureIndex:
    Build(FeatureRows.open(store, "sae"), skip_positions, geometry).run()
    return FeatureIndex.open(store, "sae")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_features(tmp_path / "features-sae", {"sae": SPARSE}, 12)


def assert_index_of(index: FeatureIndex, sparse: Sparse, skip_positions: int) -> None:
    """Postings exactly, statistics to the last bits of float64, against pandas and numpy."""
    table = postings_of(sparse, skip_positions)
    by_feature = table.groupby("feature")["value"]
    features = np.arange(sparse.n_feature)
    n_active = by_feature.size().reindex(features, fill_value=0).to_numpy()
    read = {name: index.variable(name).to_numpy() for name in index.store.schema.arrays}
    np.testing.assert_array_equal(read["token"], table["token"])
    np.testing.assert_array_equal(read["value"], table["value"])
    np.testing.assert_array_equal(read["ptr"], np.concatenate([[0], np.cumsum(n_active)]))
    np.testing.assert_array_equal(read["n_active"], n_active)
    np.testing.assert_array_equal(read["max"], by_feature.max().reindex(features))
    np.testing.assert_array_equal(read["min"], by_feature.min().reindex(features))
    wide = table.assign(value=table["value"].astype(np.float64)).groupby("feature")["value"]
    squares = wide.apply(lambda values: float((values**2).sum())) if len(table) else wide.sum()
    np.testing.assert_allclose(read["sum"], wide.sum().reindex(features, fill_value=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(read["square_sum"], squares.reindex(features, fill_value=0), rtol=1e-12)
    for feature in features:
        values = table["value"][table["feature"] == feature].to_numpy(np.float64)
        assert_histogram(read["histogram"][feature], values)
    starts = np.cumsum([0, *sparse.lengths])
    assert index.n_token == sum(max(0, b - a - skip_positions) for a, b in itertools.pairwise(starts))


def assert_histogram(counts: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
    """Every value in its bin; one that lies on an edge between two, as far as can be computed, in either."""
    low, high = min(0, *values, 0), max(0, *values, 0)
    place = (values - low) / (high - low or 1) * BINS
    surely, maybe = (np.clip(np.floor(place + beside), 0, BINS - 1)[:, None] for beside in (1e-9, -1e-9))
    below = np.cumsum(counts.astype(int))
    assert below[-1] == len(values)
    assert ((surely <= np.arange(BINS)).sum(axis=0) <= below).all()
    assert (below <= (maybe <= np.arange(BINS)).sum(axis=0)).all()


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_index_is_what_sorting_everything_gives(data: st.DataObject) -> None:
    draw = data.draw
    lengths = tuple(draw(st.lists(st.integers(1, 25), min_size=1, max_size=7)))
    rank = draw(st.sampled_from([None, 6]))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    sparse = random_sparse(
        draw(st.integers(0, 2**32)),
        draw(st.sampled_from([1, 2, 5, 37, 128])),
        lengths,
        most=draw(st.integers(0, 6)),
        dtype=dtype,
        levels=draw(st.sampled_from([None, 1, 3])),
        signed=draw(st.booleans()),
    )
    geometry = Geometry(run=draw(st.sampled_from([1, 9, 20, 60])), chunk=4, shard=4 * draw(st.integers(1, 6)))
    skip_positions = draw(st.integers(0, 3))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        if draw(st.booleans(), label="features, keys and tokens do not fit 64 bits"):
            patched.setattr(postings, "tokens_that_fit", lambda n_feature: 0)
        patched.setattr(postings, "BLOCK", draw(st.sampled_from([1, 8, 2**18])))
        patched.setattr(postings, "PART", 0)
        unit_tokens = draw(st.sampled_from([3, 11, 40]))
        store = write_features(Path(folder, "features-sae"), {"sae": sparse}, unit_tokens, rank=rank, dtype=dtype)
        index = built(store, geometry, skip_positions)
        assert_index_of(index, sparse, skip_positions)
        assert index.store.verify() == {}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_keys_are_in_the_opposite_order_of_values_and_give_them_back(values: list[float]) -> None:
    array = np.array(values, np.float32)
    keys = keys_of(array)
    np.testing.assert_array_equal(array[np.argsort(keys, kind="stable")], np.sort(array)[::-1])
    np.testing.assert_array_equal(values_of(keys), array)
    assert keys_of(np.float32([-0.0])) == keys_of(np.float32([0.0]))


@pytest.mark.parametrize("n_feature", [1, 2, 2**20 - 1, 2**20, 2**20 + 1])
@pytest.mark.parametrize("more", [0, 1])
def test_a_run_is_sorted_whether_or_not_it_fits_64_bits(n_feature: int, more: int) -> None:
    n_token = min(postings.tokens_that_fit(n_feature), 2**12) + more
    chance = np.random.default_rng(n_token)
    token = np.sort(chance.choice(np.arange(n_token, dtype=np.uint32), 5000))
    token[-1] = n_token - 1
    feature = chance.choice([0, n_feature // 2, n_feature - 1], 5000).astype(np.int32)
    value = chance.choice(np.float32([-3e38, -1, 0, 0.5, 3e38]), 5000)
    left_out = chance.random(n_token) < 0.1
    run = postings.sorted_run(7, n_feature, feature, token, keys_of(value), left_out)
    kept = ~left_out[token]
    order = np.lexsort([token[kept], -value[kept].astype(float), feature[kept]])
    np.testing.assert_array_equal(run.token, token[kept][order])
    np.testing.assert_array_equal(values_of(run.key), value[kept][order])
    np.testing.assert_array_equal(np.diff(run.ptr), np.bincount(feature[kept], minlength=n_feature))


def test_zeros_of_both_signs_are_one_value(tmp_path: Path) -> None:
    """A value may be rounded to zero; which of the two zeros it is tells nothing about its order."""
    zeros = Sparse(
        n_feature=3,
        lengths=(5,),
        token=np.arange(5),
        feature=np.full(5, 2),
        value=np.array([1, -0.0, 0.0, -0.0, -1], np.float32),
    )
    store = write_features(tmp_path / "features-sae", {"sae": zeros}, 2)
    tokens, values = built(store, skip_positions=0).postings(2)
    assert tokens.tolist() == [0, 1, 2, 3, 4]
    assert values.tolist() == [1, 0, 0, 0, -1]


def test_the_bytes_do_not_depend_on_how_the_tokens_are_cut(tmp_path: Path) -> None:
    """Neither on the memory given, nor on the units of the store. Values are such that sums in another order differ."""
    sparse = random_sparse(5, 23, (60, 3, 40), most=9, signed=True)
    found = []
    for n, (unit_tokens, run) in enumerate([(9, 5), (50, 1000), (103, 77)]):
        store = write_features(tmp_path / str(n) / "features-sae", {"sae": sparse}, unit_tokens)
        built(store, Geometry(run=run, chunk=8, shard=32))
        found.append({k: v for k, v in every_file(index_folder(store, "sae")).items() if "/c/" in k})
    assert len(found[0]) > 10
    assert found[0] == found[1] == found[2]


def test_runs_hold_no_more_than_they_are_to(tmp_path: Path) -> None:
    for rank in (None, 7):
        store = write_features(tmp_path / f"{rank}" / "features-sae", {"sae": SPARSE}, 12, rank=rank)
        rows = FeatureRows.open(store, "sae")
        counts = np.bincount(SPARSE.token, minlength=SPARSE.n_token)
        for most, most_tokens in [(1, 99), (20, 99), (50, 3), (10**6, 99), (10**6, 7)]:
            spans = token_spans(rows, most, most_tokens)
            assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
            assert spans[-1].stop == SPARSE.n_token
            assert all(counts[a:b].sum() <= room for a, b, room in spans)
            assert all(room <= most or b - a == 1 for a, b, room in spans)
            assert max(b - a for a, b, _ in spans) <= most_tokens
        assert len(token_spans(rows, 10**6, 99)) == 1


def test_an_index_is_built_for_every_group_and_heard_of(tmp_path: Path) -> None:
    groups = {f"clt/layer_{layer}": random_sparse(layer, 11 + layer, LENGTHS, most=4) for layer in (0, 3)}
    store = write_features(tmp_path / "features-clt", groups, 12)
    heard: list[Advance] = []
    indexes = build_index(tmp_path / "features-clt", progress=heard.append)
    for index, sparse in zip(indexes, groups.values(), strict=True):
        assert_index_of(index, sparse, skip_positions=1)
    ends = [one for one in heard if one.done == one.total]
    assert [(one.group, one.phase) for one in ends] == [(g, phase) for g in groups for phase in ("sort", "merge")]
    assert ends[0].total == sum(LENGTHS)
    assert ends[1].total == len(indexes[0].variable("token"))
    build_index(tmp_path / "features-clt", "clt/layer_3")
    assert not (index_folder(store, "clt/layer_3") / "work").exists()


def test_plain_xarray_opens_an_index(store: Store) -> None:
    built(store)
    found = xr.open_zarr(index_folder(store, "sae") / "data.zarr")
    feature = int(SPARSE.feature[-1])
    span = slice(int(found["ptr"][feature]), int(found["ptr"][feature + 1]))
    expected = postings_of(SPARSE, 1).query("feature == @feature")
    np.testing.assert_array_equal(found["token"][span], expected["token"])
    np.testing.assert_array_equal(found["value"][span], expected["value"])
    assert found["histogram"].dims == ("feature", "bin")


def test_bfloat16_values_are_kept_bit_for_bit(tmp_path: Path) -> None:
    sparse = random_sparse(8, 5, (40,), most=3, dtype="bfloat16", signed=True)
    store = write_features(tmp_path / "features-sae", {"sae": sparse}, 16, dtype="bfloat16")
    index = built(store)
    kept = xr.open_zarr(index.store.path)["value"]
    assert kept.attrs["dtype"] == "bfloat16"
    np.testing.assert_array_equal(kept, format_of("bfloat16").encode(postings_of(sparse, 1)["value"].to_numpy()))


@pytest.mark.parametrize("rank", [None, 4])
def test_features_that_never_fire_make_an_empty_index(tmp_path: Path, rank: int | None) -> None:
    silent = random_sparse(0, 5, LENGTHS, most=0)
    index = built(write_features(tmp_path / "features-sae", {"sae": silent}, 12, rank=rank))
    assert_index_of(index, silent, skip_positions=1)
    assert [len(part) for part in index.postings(4)] == [0, 0]


def test_all_positions_may_be_left_out(store: Store) -> None:
    index = built(store, skip_positions=max(LENGTHS))
    assert index.n_token == 0
    assert index.variable("token").shape == (0,)


# ── again ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_finished_index_is_left_as_it_is(store: Store) -> None:
    index = built(store)
    before = {path: path.stat().st_mtime_ns for path in index.store.path.rglob("*")}
    built(store)
    assert {path: path.stat().st_mtime_ns for path in index.store.path.rglob("*")} == before


def test_other_positions_left_out_make_another_index(store: Store) -> None:
    built(store, skip_positions=1)
    assert_index_of(built(store, skip_positions=2), SPARSE, skip_positions=2)


def test_an_index_of_other_features_is_refused_and_built_anew(store: Store) -> None:
    built(store)
    shutil.rmtree(store.path)
    shutil.rmtree(store.ledger.done_folder)
    other = random_sparse(4, 37, LENGTHS, most=7)
    again = write_features(store.path.parent, {"sae": other}, 12, fingerprint="d" * 64)
    with pytest.raises(
        FingerprintMismatch, match=r"'sae'.*source 'ffff.*instead of 'dddd.*forebay index .* sae. again"
    ):
        FeatureIndex.open(again, "sae")
    assert_index_of(built(again), other, skip_positions=1)


def test_an_index_of_an_older_layout_is_refused_and_built_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    built(store)
    monkeypatch.setattr("forebay.stores.feature_index.VERSION", 2)
    with pytest.raises(FingerprintMismatch, match="version 1 instead of 2"):
        FeatureIndex.open(store, "sae")
    assert_index_of(built(store), SPARSE, skip_positions=1)


def test_units_that_were_repaired_make_the_index_be_built_anew(store: Store) -> None:
    """With the same fingerprint: what computes them may round otherwise."""
    built(store)
    other = random_sparse(4, 37, LENGTHS, most=7)
    for unit in (1, 2, 3, 4, 5, 0):
        store.ledger.drop(unit)
    write_features(store.path.parent, {"sae": other}, 12)
    assert_index_of(built(store), other, skip_positions=1)


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(content[:-7])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[len(content) // 3] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "cut off", "empty", "another bit"])
@pytest.mark.parametrize("name", ["ptr", "token", "value", "max"])
def test_a_damaged_index_is_refused_and_built_anew(store: Store, name: str, how: str) -> None:
    whole = every_file(built(store).store.path.parent)
    path = index_folder(store, "sae") / "data.zarr" / name / "c" / "0"
    damaged(path, how)
    index = FeatureIndex.open(store, "sae")
    with pytest.raises(CorruptStore, match=rf"{name}.*again with `forebay index`"):
        _ = [index.postings(feature) for feature in range(37)] + [index.variable("max").to_numpy()]
    assert_index_of(built(store), SPARSE, skip_positions=1)
    assert every_file(index.store.path.parent) == whole


def test_an_index_that_was_damaged_before_its_building_was_cleared_away_is_built_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records of what was merged are still there, and no longer true."""
    with monkeypatch.context() as killed:
        killed.setattr(Build, "_clear", lambda build: None)
        path = built(store).store.path
    assert (path.parent / "work" / "plan.json").exists()
    damaged(path / "token" / "c" / "1", "another bit")
    assert_index_of(built(store), SPARSE, skip_positions=1)


def test_an_index_whose_description_is_damaged_is_built_anew(store: Store) -> None:
    path = built(store).store.path / "zarr.json"
    path.write_text("{")
    with pytest.raises(FingerprintMismatch, match=r"not readable as JSON.*forebay index"):
        FeatureIndex.open(store, "sae")
    assert_index_of(built(store), SPARSE, skip_positions=1)


# ── interrupted ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Stop(Exception):
    """Raised by a listener to stop a build."""


@pytest.mark.parametrize("steps", [1, 5, 17, 21])
def test_a_build_that_was_stopped_goes_on(store: Store, tmp_path: Path, steps: int) -> None:
    """Runs that were sorted and objects that were merged are not made again."""
    rows, heard = FeatureRows.open(store, "sae"), list[Advance]()

    def listen(advance: Advance) -> None:
        heard.append(advance)
        if len(heard) == steps:
            raise Stop

    with pytest.raises(Stop):
        Build(rows, 1, SMALL, listen).run()
    with pytest.raises(IncompleteStore, match=r"no index of 'sae'\. Build it with `forebay index"):
        FeatureIndex.open(store, "sae")
    again: list[Advance] = []
    Build(rows, 1, SMALL, again.append).run()
    for phase in {one.phase for one in heard}:
        last = max(one.done for one in heard if one.phase == phase)
        assert all(one.done > last for one in again if one.phase == phase)
    whole = write_features(tmp_path / "whole" / "features-sae", {"sae": SPARSE}, 12)
    built(whole)
    objects = [{k: v for k, v in every_file(index_folder(s, "sae")).items() if "/c/" in k} for s in (store, whole)]
    assert objects[0] == objects[1]


def test_a_build_that_was_stopped_is_not_gone_on_with_other_settings(store: Store) -> None:
    def stop(advance: Advance) -> None:
        if advance.phase == "merge":
            raise Stop

    rows = FeatureRows.open(store, "sae")
    for geometry, skip in [(SMALL, 1), (Geometry(run=40, chunk=4, shard=16), 1), (SMALL, 2), (SMALL, 0)]:
        with pytest.raises(Stop):
            Build(rows, skip, geometry, stop).run()
    assert_index_of(built(store, SMALL, 1), SPARSE, skip_positions=1)


def test_a_full_disk_is_told_of_and_the_build_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = iter(range(1000))
    save = postings.RunFile.save

    def full(file: postings.RunFile, index: int, run: postings.Run) -> None:
        if next(saves) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, index, run)

    with monkeypatch.context() as patched:
        patched.setattr(postings.RunFile, "save", full)
        with pytest.raises(DiskFull, match=r"'sae'.*No space left.*build again"):
            built(store)
    assert_index_of(built(store), SPARSE, skip_positions=1)


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_index_that_was_not_built_says_how_to(store: Store) -> None:
    run = store.path.parent.parent
    with pytest.raises(IncompleteStore) as refused:
        FeatureIndex.open(store, "sae")
    assert f"`forebay index {run} sae`" in str(refused.value)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_place(tmp_path: Path, wrong: float) -> None:
    value = SPARSE.value.copy()
    value[50] = wrong
    sparse = Sparse(n_feature=37, lengths=LENGTHS, token=SPARSE.token, feature=SPARSE.feature, value=value)
    store = write_features(tmp_path / "features-sae", {"sae": sparse}, 12)
    place = rf"token {SPARSE.token[50]} has the value {wrong} for feature {SPARSE.feature[50]} of 'sae'"
    with pytest.raises(SchemaError, match=place):
        built(store)


def test_what_cannot_be_indexed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "features-sae"
    write_features(folder, {"sae": SPARSE}, 12, units=[0, 2])
    with pytest.raises(IncompleteStore, match="2 of 6 units"):
        build_index(folder)
    write_features(folder, {"sae": SPARSE}, 12, units=[1, 3, 4, 5])
    with pytest.raises(SchemaError, match=r"no features 'sea'\. Did you mean 'sae'"):
        build_index(folder, "sea")
    with pytest.raises(SchemaError, match=r"memory = 1,000 bytes.*at least 268,435,456"):
        build_index(folder, memory=1000)
    with pytest.raises(SchemaError, match="skip_positions = -1"):
        build_index(folder, skip_positions=-1)
    assert not (folder / "index").exists()


@pytest.mark.parametrize("feature", [-1, 37])
def test_a_feature_that_does_not_exist_is_refused(store: Store, feature: int) -> None:
    with pytest.raises(SchemaError, match=f"feature {feature} does not exist: there are 37, numbered from 0"):
        built(store).postings(feature)


def test_rows_that_name_features_that_are_not_there_are_refused(tmp_path: Path) -> None:
    store = write_features(tmp_path / "features-sae", {"sae": SPARSE}, 12)
    path = store.path / "zarr.json"
    header = json.loads(path.read_text())
    header["attributes"]["forebay"]["provenance"]["dictionaries"]["sae"]["n_feature"] = 9
    path.write_text(json.dumps(header))
    with pytest.raises(CorruptStore, match=r"names features .* of a dictionary of 9"):
        built(Store.open(tmp_path / "features-sae"))


def test_as_many_positions_are_left_out_as_the_step_says(tmp_path: Path) -> None:
    store = write_features(tmp_path / "features-sae", {"sae": SPARSE}, 12)
    (index,) = build_index(tmp_path / "features-sae")
    assert index.skip_positions == store.header.provenance["skip_positions"] == 1
    (index,) = build_index(tmp_path / "features-sae", skip_positions=0)
    assert_index_of(index, SPARSE, skip_positions=0)
    assert index_builder.WORKERS > 1
