"""The largest activations of a store, with where they are, are those that sorting the whole array finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import forebay
from forebay.stages.analyze.massive_activations import massive_activations
from forebay.stages.analyze.tokens import as_run
from forebay.stores.errors import SchemaError

from .laziness import forbidden, watched

PLACE = ("channel", "token", "sequence", "position", "token_id")


def make_node(value: NDArray[Any], dims: tuple[str, ...] = ("layer", "token", "d_model")) -> xr.Dataset:
    n = value.shape[dims.index("token")]
    coords: dict[str, Any] = {
        "position": ("token", np.arange(n) % 8),
        "sequence": ("token", np.arange(n) // 8),
        "token_id": ("token", np.arange(n) * 7 % 31),
    }
    if "layer" in dims:
        coords["layer"] = 3 + 4 * np.arange(value.shape[dims.index("layer")])
    return xr.Dataset({"value": (dims, value)}, coords=coords)


def expected(rows: NDArray[Any], k: int, kept: NDArray[np.bool_], distinct: bool = False) -> list[tuple[float, ...]]:
    """The oracle: every entry sorted by magnitude, token and channel."""
    entries = [
        (float(rows[token, channel]), channel, token, token // 8, token % 8, token * 7 % 31)
        for token in np.flatnonzero(kept).tolist()
        for channel in range(rows.shape[1])
        if not np.isnan(rows[token, channel])
    ]
    entries.sort(key=lambda entry: (-abs(entry[0]), entry[2], entry[1]))
    if distinct:
        seen: set[int] = set()
        entries = [e for e in entries if not (e[1] in seen or seen.add(e[1]))]  # type: ignore[func-returns-value]
    return entries[:k]


def test_over_a_median_of_zero_a_value_is_infinitely_many_times_as_large() -> None:
    value = np.zeros((1, 9, 5), np.float32)
    value[0, 3, 2], value[0, 4, 1] = -1200, 3
    found = massive_activations(make_node(value), 3)
    assert found["median_magnitude"].values.tolist() == [0]
    np.testing.assert_array_equal(found["ratio"][0], [np.inf, np.inf, np.nan])
    assert found["massive"].values.tolist() == [[True, False, False]]
    nothing = massive_activations(make_node(np.full((1, 9, 5), np.nan)), 1)
    assert np.isnan(nothing["ratio"]).all()


def rows_of(found: xr.Dataset) -> list[tuple[float, ...]]:
    listed = [tuple(found[name].values.tolist()) for name in ("value", *PLACE)]
    return [entry for entry in zip(*listed, strict=True) if entry[1] >= 0]


# ── which, and where ─────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    k=st.integers(1, 9),
    distinct=st.booleans(),
    ties=st.booleans(),
    skip=st.integers(0, 3),
)
def test_any_split_into_blocks_gives_what_sorting_the_whole_gives(
    seed: int, chunks: list[int], k: int, distinct: bool, ties: bool, skip: int
) -> None:
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(2, sum(chunks), 3)).astype(np.float32)
    value = np.round(value) if ties else value
    value[rng.random(value.shape) < 0.1] = np.nan
    node = make_node(value).chunk({"layer": 1, "token": tuple(chunks), "d_model": 2})
    with dask.config.set(scheduler="synchronous"):
        found = massive_activations(node, k, distinct_channels=distinct, skip_positions=skip).compute()
    for layer in range(2):
        kept = np.arange(sum(chunks)) % 8 >= skip
        assert rows_of(found.isel(layer=layer)) == expected(value[layer], k, kept, distinct)


@pytest.mark.parametrize("chunked", [False, True])
def test_planted_activations_are_found_with_their_labels(chunked: bool) -> None:
    value = np.random.default_rng(1).normal(size=(2, 83, 7))
    value[1, 48, 5], value[1, 24, 2], value[0, 9, 0] = -4000, 3000, 50
    node = make_node(value).chunk({"token": 10}) if chunked else make_node(value)
    found = massive_activations(node, 3).compute()
    first = found.sel(layer=7).isel(rank=0)
    assert [first[name].item() for name in ("value", *PLACE)] == [-4000, 5, 48, 6, 0, 48 * 7 % 31]
    assert found["massive"].values.tolist() == [[False] * 3, [True, True, False]]
    assert int(found.sel(layer=3, rank=0)["token"]) == 9
    median = np.median(np.abs(value[1]))
    np.testing.assert_allclose(found.sel(layer=7)["median_magnitude"], median, rtol=0.02)
    np.testing.assert_allclose(first["ratio"], 4000 / found.sel(layer=7)["median_magnitude"], rtol=1e-6)


def test_the_median_is_exact_for_bfloat16_and_at_most_a_128th_too_small_otherwise() -> None:
    rng = np.random.default_rng(2)
    value = rng.lognormal(0, 3, (1, 801, 5)).astype(np.float32)
    cut = (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    exact = massive_activations(make_node(cut).chunk({"token": 90}))["median_magnitude"].compute()
    np.testing.assert_array_equal(exact, [np.median(cut)])
    found = massive_activations(make_node(value).chunk({"token": 90}))["median_magnitude"].compute()
    assert 1 - 1 / 128 <= (found / np.median(value)).item() <= 1


def test_what_is_massive_follows_from_both_thresholds() -> None:
    value = np.full((1, 16, 3), 0.01)
    value[0, 0] = [99.0, 101.0, 5000.0]
    assert massive_activations(make_node(value), 3)["massive"].values.tolist() == [[True, True, False]]
    value *= 100
    assert massive_activations(make_node(value), 4)["massive"].values.tolist() == [[True, True, True, False]]
    found = massive_activations(make_node(value), 4, least_magnitude=10_000)
    assert found["massive"].values.tolist() == [[True, True, False, False]]
    found = massive_activations(make_node(value), 4, least_ratio=20_000)
    assert found["massive"].values.tolist() == [[True, False, False, False]]
    assert massive_activations(make_node(np.full((1, 9, 3), 5e4)), 2)["massive"].values.tolist() == [[False, False]]


def test_the_first_position_is_not_skipped() -> None:
    value = np.ones((1, 16, 3))
    value[0, [0, 3], 1] = 9, 8
    assert massive_activations(make_node(value), 2)["position"].values.tolist() == [[0, 3]]
    assert massive_activations(make_node(value), 1, skip_positions=1)["position"].values.tolist() == [[3]]


def test_each_channel_can_stand_there_once() -> None:
    value = np.random.default_rng(3).normal(size=(1, 40, 4))
    value[0, ::8, 2] = 500 + np.arange(5)
    assert massive_activations(make_node(value), 3)["channel"].values.tolist() == [[2, 2, 2]]
    found = massive_activations(make_node(value).chunk({"token": 9}), 3, distinct_channels=True)
    assert found["channel"].values[0, 0] == 2
    assert found["value"].values[0, 0] == 504
    assert len(set(found["channel"].values[0].tolist())) == 3


def test_more_ranks_than_values_are_nan_and_minus_1() -> None:
    value = np.full((1, 2, 3), np.nan)
    value[0, 1, 2] = -7
    for distinct in (False, True):
        found = massive_activations(make_node(value), 4, distinct_channels=distinct)
        np.testing.assert_array_equal(found["value"][0], [-7, np.nan, np.nan, np.nan])
        for name in PLACE:
            assert (found[name][0, 1:] == -1).all()
        assert not found["massive"][0, 1:].any()


def test_heads_are_kept_apart() -> None:
    value = np.random.default_rng(4).normal(size=(30, 3, 5))
    value[17, 2, 4] = 90
    found = massive_activations(make_node(value, ("token", "head", "d_head")).chunk({"token": 7}), 2).compute()
    assert found["value"].dims == ("head", "rank")
    assert found["token"].values[2, 0] == 17
    assert rows_of(found.isel(head=1)) == [
        (pytest.approx(entry[0]), *entry[1:]) for entry in expected(value[:, 1], 2, np.ones(30, dtype=bool))
    ]


# ── in a model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_massive_weight_is_found_in_a_models_captures(
    altered_model: Callable[[Callable[[dict[str, Any]], None]], Path],
) -> None:
    """An embedding of 10,000 at one channel of one token stays in the residual stream of every layer."""

    def plant(weights: dict[str, Any]) -> None:
        weights["model.embed_tokens.weight"][41, 13] = 1e4

    model = forebay.load_model(altered_model(plant), device="cpu")
    ids = [[7, 9, 41, 8], [3, 2]]
    node = as_run(model.forward(ids, forebay.HookSpec().capture("blocks.*.hook_resid_post")))
    found = massive_activations(node["activations/hook_resid_post"], 2)
    for layer in range(3):
        one = found.isel(rank=0).sel(layer=layer)
        where = {name: int(one[name]) for name in PLACE}
        assert where == {"channel": 13, "token": 2, "sequence": 0, "position": 2, "token_id": 41}
        assert bool(one["massive"])
    assert not found["massive"].isel(rank=1).any()


# ── how it computes, and what is refused ─────────────────────────────────────────────────────────────────────────────


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    node = make_node(np.random.default_rng(5).normal(size=(2, 40, 4))).chunk({"token": 7, "layer": 1})
    with dask.config.set(scheduler=forbidden):
        found = massive_activations(node, 2)
        assert all(found[name].chunks is not None for name in found.data_vars)
        with pytest.raises(AssertionError, match="something was computed"):
            found.compute()
    assert np.isfinite(found["value"].compute()).all()


def test_values_and_median_come_from_one_reading_of_every_chunk() -> None:
    value = np.random.default_rng(6).normal(size=(2, 60, 3))
    lazy, read = watched(value, ((1, 1), (9,) * 6 + (6,), (3,)))
    node = make_node(value).assign(value=(("layer", "token", "d_model"), lazy))
    found = massive_activations(node, 2).compute()
    np.testing.assert_array_equal(found["value"], massive_activations(make_node(value), 2)["value"])
    assert sorted(read) == [(layer, start, 0) for layer in range(2) for start in range(0, 60, 9)]


def test_what_makes_no_sense_is_refused() -> None:
    node = make_node(np.ones((1, 16, 3)))
    with pytest.raises(SchemaError, match="k = 0"):
        massive_activations(node, 0)
    with pytest.raises(SchemaError, match="token_id"):
        massive_activations(node.drop_vars("token_id"))
