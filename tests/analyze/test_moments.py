"""Mean and covariance of any split into blocks are numpy's of the whole array in float64."""

from __future__ import annotations

from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from forebay.stages.analyze import moments as module
from forebay.stages.analyze.directions import mean_difference, separation
from forebay.stages.analyze.moments import merged_moments, moments, packed_moments, total_moments
from forebay.stages.analyze.pca import pca
from forebay.stages.analyze.similarity import linear_cka
from forebay.stages.analyze.statistics import mean_by
from forebay.stores.errors import SchemaError

from .laziness import forbidden, watched


def make_node(value: NDArray[Any], dims: tuple[str, ...] = ("layer", "token", "d_model")) -> xr.Dataset:
    """Sequences of 5 tokens, layers 3, 7, 11, …"""
    n = value.shape[dims.index("token")]
    coords: dict[str, Any] = {"position": ("token", np.arange(n) % 5), "sequence": ("token", np.arange(n) // 5)}
    if "layer" in dims:
        coords["layer"] = 3 + 4 * np.arange(value.shape[dims.index("layer")])
    return xr.Dataset({"value": (dims, value)}, coords=coords)


def check(found: xr.Dataset, rows: NDArray[Any], ddof: int = 1, **where: int) -> None:
    """The oracle, for one entry: numpy's mean and cov of these rows [token, width]."""
    one = found.isel(where)
    rows = rows.astype(np.float64)
    assert int(one["n_token"]) == len(rows)
    np.testing.assert_allclose(one["mean"], rows.mean(0), rtol=1e-12)
    expected = np.cov(rows.T, ddof=ddof)
    np.testing.assert_allclose(one["covariance"], expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


# ── which tokens count ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("bad", "chunks"), [(np.nan, None), (np.inf, None), (-np.inf, {"token": 12, "layer": -1}), (np.nan, {"token": 12})]
)
def test_a_token_that_is_not_finite_is_left_out_alike_by_every_analysis(bad: float, chunks: Any) -> None:
    """In every analysis the result is that of the other tokens alone, without a warning."""
    value = np.random.default_rng(8).normal(size=(2, 31, 3))
    value[:, 12, 1] = bad
    positive = np.arange(31) % 3 == 0
    kept = np.arange(31) != 12

    def found(value: NDArray[Any], positive: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
        node = make_node(value).assign_coords(position=("token", np.ones(value.shape[1], dtype=int)))
        node = node if chunks is None else node.chunk(chunks)
        side = xr.DataArray(positive, dims="token")
        group = xr.DataArray(positive.astype(int), dims="token")
        both = moments(node), mean_by(node, group, 2), pca(node, 2), pca(node, 2, method="randomized")
        every = {f"{i} {name}": one[name].values for i, one in enumerate(both) for name in ("mean", "n_token")}
        along = mean_difference(node, side)["direction"].compute()
        apart = separation(node, along, side)
        return every | {
            "covariance": both[0]["covariance"].values,
            "components": both[2]["components"].values,
            "cka": linear_cka(node).values,
            "minibatch cka": linear_cka(node, method="minibatch", batch=4).values if chunks is None else np.zeros(1),
            "direction": along.values,
            "cohens_d": apart["cohens_d"].values,
            "n_positive": apart["n_positive"].values,
        }

    expected = found(value[:, kept], positive[kept])
    for name, one in found(value, positive).items():
        assert np.isfinite(expected[name]).all(), name
        np.testing.assert_allclose(one, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    lead=st.sampled_from([1, 2, 3]),
    skip=st.integers(0, 3),
    nan=st.floats(0, 0.5),
)
def test_any_split_into_blocks_gives_numpys_numbers(
    seed: int, chunks: list[int], lead: int, skip: int, nan: float
) -> None:
    rng = np.random.default_rng(seed)
    value = rng.normal(rng.normal(0, 100, 4), rng.uniform(0.1, 9, 4), (3, sum(chunks), 4))
    value[rng.random(value.shape[:2]) < nan] = np.nan
    where = rng.random(sum(chunks)) < 0.8
    node = make_node(value).chunk({"layer": lead, "token": tuple(chunks), "d_model": 3})
    found = moments(node, where=xr.DataArray(where, dims="token"), skip_positions=skip)
    with dask.config.set(scheduler="synchronous"):
        found = found.compute()
    for layer in range(3):
        kept = where & (np.arange(sum(chunks)) % 5 >= skip) & ~np.isnan(value[layer]).any(-1)
        if kept.sum() > 1:
            check(found, value[layer][kept], layer=layer)
        else:
            assert np.isnan(found["covariance"][layer]).all()
            assert int(found["n_token"][layer]) == kept.sum()
            assert np.isnan(found["mean"][layer]).all() == (kept.sum() == 0)


@pytest.mark.parametrize("far", [1e3, 1e7, -1e9])
def test_nothing_cancels_however_far_the_mean_lies_from_0(far: float) -> None:
    rng = np.random.default_rng(1)
    value = rng.normal(size=(1, 201, 3)) * [1.0, 0.01, 30.0]
    found = moments(make_node(value + far).chunk({"token": 7}), skip_positions=0).compute()
    expected = np.cov(value[0].T)
    # What adding `far` itself rounds away, and no more.
    np.testing.assert_allclose(found["covariance"][0], expected, rtol=0, atol=60 * np.spacing(abs(far)))


def test_float32_is_summed_in_float64() -> None:
    value = (np.random.default_rng(2).normal(size=(2, 9001, 3)) + 4000).astype(np.float32)
    found = moments(make_node(value), skip_positions=0)
    assert found["mean"].dtype == found["covariance"].dtype == np.float64
    assert found["n_token"].dtype == np.int64
    for layer in range(2):
        check(found, value[layer], layer=layer)


def test_a_block_taken_some_rows_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.random.default_rng(3).normal(50, 2, (2, 53, 4))
    whole = moments(make_node(value))
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    xr.testing.assert_allclose(moments(make_node(value)), whole, rtol=1e-12)


def test_heads_are_kept_apart_wherever_their_dimension_stands() -> None:
    value = np.random.default_rng(4).normal(size=(2, 37, 3, 5))
    node = make_node(value, ("layer", "token", "head", "d_head")).assign_coords(head=[4, 5, 8])
    found = moments(node.chunk({"token": 10, "head": 2}), skip_positions=0).compute()
    assert found["covariance"].dims == ("layer", "head", "d_head", "d_head_2")
    assert found["head"].values.tolist() == [4, 5, 8]
    for layer in range(2):
        for head in range(3):
            check(found, value[layer, :, head], layer=layer, head=head)


def test_a_node_without_layers_gives_one_mean() -> None:
    value = np.random.default_rng(5).normal(size=(41, 3))
    found = moments(make_node(value, ("token", "d_model")).chunk({"token": 6}), skip_positions=0).compute()
    assert found["mean"].dims == ("d_model",)
    check(found, value)


def test_the_labels_of_layers_and_width_stay_and_those_of_tokens_go() -> None:
    value = np.random.default_rng(6).normal(size=(2, 11, 3))
    found = moments(make_node(value).assign_coords(d_model=[10, 20, 40]))
    assert found["layer"].values.tolist() == [3, 7]
    assert found["d_model"].values.tolist() == found["d_model_2"].values.tolist() == [10, 20, 40]
    assert set(found.coords) == {"layer", "d_model", "d_model_2"}
    assert int(moments(make_node(value).sel(layer=7))["layer"]) == 7


# ── what counts ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ddof", [0, 1, 3])
def test_the_scatter_is_divided_by_n_minus_ddof(ddof: int) -> None:
    value = np.random.default_rng(7).normal(size=(1, 23, 3))
    check(moments(make_node(value), skip_positions=0, ddof=ddof), value[0], ddof, layer=0)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_too_few_tokens_for_the_divisor_give_nan_and_not_infinity(n: int, chunked: bool) -> None:
    value = np.random.default_rng(8).normal(size=(2, 12, 3))
    where = xr.DataArray(np.arange(12) < n, dims="token")
    node = make_node(value).chunk({"token": 5}) if chunked else make_node(value)
    found = moments(node, where=where, skip_positions=0, ddof=2).compute()
    assert found["n_token"].values.tolist() == [n, n]
    assert np.isnan(found["covariance"]).all() == (n < 3)
    assert np.isnan(found["mean"]).all() == (n == 0)


@pytest.mark.parametrize("chunked", [False, True])
def test_no_tokens_at_all_is_no_error(chunked: bool) -> None:
    node = make_node(np.ones((2, 12, 3)))
    found = moments((node.chunk({"token": 5}) if chunked else node).isel(token=slice(0))).compute()
    assert found["n_token"].values.tolist() == [0, 0]
    assert np.isnan(found["mean"]).all()


def test_a_token_with_nan_counts_at_no_width_and_at_the_other_layers() -> None:
    value = np.random.default_rng(9).normal(size=(2, 31, 3))
    value[0, [3, 17], 1] = np.nan
    found = moments(make_node(value).chunk({"token": 4}), skip_positions=0).compute()
    check(found, np.delete(value[0], [3, 17], 0), layer=0)
    check(found, value[1], layer=1)


# ── how it computes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    value = np.random.default_rng(10).normal(size=(3, 40, 4))
    node = make_node(value).chunk({"token": 7, "layer": 1})
    with dask.config.set(scheduler=forbidden):
        found = moments(node, where=node["sequence"] > 1)
        assert all(found[name].chunks is not None for name in found.data_vars)
        with pytest.raises(AssertionError, match="something was computed"):
            found.compute()
    check(found.compute(), value[1, 10:][np.arange(10, 40) % 5 > 0], layer=1)


def test_every_chunk_is_read_once() -> None:
    value = np.random.default_rng(11).normal(size=(2, 60, 3))
    lazy, read = watched(value, ((1, 1), (9,) * 6 + (6,), (3,)))
    node = make_node(value).assign(value=(("layer", "token", "d_model"), lazy))
    check(moments(node, skip_positions=0).compute(), value[1], layer=1)
    assert sorted(read) == [(layer, start, 0) for layer in range(2) for start in range(0, 60, 9)]


@settings(deadline=None)
@given(seed=st.integers(0, 2**20), cuts=st.lists(st.integers(0, 25), max_size=5))
def test_packed_moments_of_parts_are_those_of_the_whole_in_any_order(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(7, 3, (25, 3))
    parts = [packed_moments(part) for part in np.split(rows, sorted(cuts))]
    whole = packed_moments(rows)
    for order in (parts, parts[::-1]):
        np.testing.assert_allclose(total_moments(order), whole, rtol=1e-10)
    np.testing.assert_allclose(whole[1:, 1:] / 24, np.cov(rows.T), rtol=1e-10)
    np.testing.assert_array_equal(merged_moments(whole, packed_moments(rows[:0])), whole)


def test_what_is_no_node_of_vectors_is_refused() -> None:
    with pytest.raises(SchemaError, match="a mean reads the variable `value`"):
        moments(xr.Dataset({"token_id": ("token", [1, 2])}))
    with pytest.raises(SchemaError, match="boolean"):
        moments(make_node(np.ones((1, 10, 2))), where=xr.DataArray(np.ones(10), dims="token"))
