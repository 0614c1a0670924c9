"""Norms, quantiles, what is not finite, and means by label are numpy's and scipy's of the whole array."""

from __future__ import annotations

from typing import Any

import dask
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from forebay.stages.analyze.statistics import histogram_quantile, magnitude_histogram, mean_by, norm_statistics
from forebay.stores.errors import SchemaError

from .laziness import forbidden


def make_node(value: NDArray[Any], dims: tuple[str, ...] = ("layer", "token", "d_model")) -> xr.Dataset:
    n = value.shape[dims.index("token")]
    coords: dict[str, Any] = {"position": ("token", np.arange(n) % 6), "token_id": ("token", np.arange(n) * 7 % 11)}
    if "layer" in dims:
        coords["layer"] = 3 + 4 * np.arange(value.shape[dims.index("layer")])
    return xr.Dataset({"value": (dims, value)}, coords=coords)


@pytest.fixture(scope="module")
def value() -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    found: NDArray[np.float64] = rng.standard_t(3, (2, 157, 13)) * rng.lognormal(2, 1, (2, 157, 1)) + 5
    return found


def cut(values: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """float32 with the lower bits of the mantissa at 0."""
    mask = np.uint32(2**32 - 2 ** (23 - bits))
    return (np.abs(values.astype(np.float32)).view(np.uint32) & mask).view(np.float32)


def check(one: xr.Dataset, rows: NDArray[Any]) -> None:
    """The oracle: numpy and scipy on rows [token, width] that are all finite."""
    norm = np.linalg.norm(rows, axis=-1)
    expected = {
        "mean_norm": norm.mean(),
        "std_norm": norm.std(ddof=1),
        "min_norm": norm.min(),
        "max_norm": norm.max(),
        "kurtosis": scipy.stats.kurtosis(rows, axis=-1, fisher=False).mean(),
    }
    for name, number in expected.items():
        np.testing.assert_allclose(one[name], number, rtol=1e-9, err_msg=name)
    if "quantile_norm" in one:
        wanted = np.quantile(cut(norm, 10), one["quantile"].values, method="inverted_cdf")
        np.testing.assert_array_equal(one["quantile_norm"], wanted)
        np.testing.assert_allclose(
            one["quantile_norm"], np.quantile(norm, one["quantile"].values, method="inverted_cdf"), rtol=1e-3
        )


# ── norms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", [None, {"token": 7}, {"token": 60, "layer": 1, "d_model": 5}])
def test_norms_and_kurtosis_are_numpys_and_scipys(value: NDArray[np.float64], chunks: dict[str, int] | None) -> None:
    node = make_node(value) if chunks is None else make_node(value).chunk(chunks)
    found = norm_statistics(node).compute()
    assert found["quantile_norm"].dims == ("layer", "quantile")
    assert found["layer"].values.tolist() == [3, 7]
    for layer in range(2):
        rows = value[layer, np.arange(157) % 6 > 0]
        assert int(found["n_token"][layer]) == len(rows)
        check(found.isel(layer=layer), rows)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    nan=st.floats(0, 0.4),
    infinite=st.floats(0, 0.4),
)
def test_what_is_not_finite_is_counted_and_left_out_of_the_norms(
    seed: int, chunks: list[int], nan: float, infinite: float
) -> None:
    rng = np.random.default_rng(seed)
    n = sum(chunks)
    rows = rng.normal(1e4, 3, (n, 4))
    has_infinity, has_nan = rng.random(n) < infinite, rng.random(n) < nan
    rows[has_infinity, 1] = rng.choice([np.inf, -np.inf], has_infinity.sum())
    rows[has_nan, 2] = np.nan
    node = make_node(rows, ("token", "d_model")).chunk({"token": tuple(chunks)})
    with dask.config.set(scheduler="synchronous"):
        found = norm_statistics(node, skip_positions=0).compute()
    assert int(found["n_token"]) == n
    np.testing.assert_allclose(found["nan_fraction"], has_nan.mean())
    np.testing.assert_allclose(found["infinite_fraction"], (has_infinity & ~has_nan).mean())
    finite = rows[~has_nan & ~has_infinity]
    if len(finite) > 1:
        norm = np.linalg.norm(finite, axis=-1)
        np.testing.assert_allclose(found["mean_norm"], norm.mean(), rtol=1e-12)
        np.testing.assert_allclose(found["std_norm"], norm.std(ddof=1), rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal([found["min_norm"], found["max_norm"]], [norm.min(), norm.max()])
    else:
        assert np.isnan(found["std_norm"])
        assert np.isnan(found["mean_norm"]) == np.isnan(found["max_norm"]) == (len(finite) == 0)


@pytest.mark.parametrize("chunks", [None, {"token": 20}])
def test_by_position_every_position_has_its_own_numbers(
    value: NDArray[np.float64], chunks: dict[str, int] | None
) -> None:
    node = make_node(value) if chunks is None else make_node(value).chunk(chunks)
    found = norm_statistics(node, by="position", groups=8, skip_positions=0).compute()
    assert found["mean_norm"].dims == ("layer", "position")
    assert "quantile_norm" not in found
    for position in range(6):
        rows = value[1, np.arange(157) % 6 == position]
        assert int(found["n_token"].sel(layer=7, position=position)) == len(rows)
        check(found.sel(layer=7, position=position), rows)
    assert found["n_token"].sel(position=[6, 7]).sum() == 0
    assert np.isnan(found["mean_norm"].sel(position=[6, 7])).all()
    assert np.isnan(found["max_norm"].sel(position=[6, 7])).all()


def test_norms_of_float16_do_not_overflow() -> None:
    value = np.full((1, 12, 5), 60_000, dtype=np.float16)
    np.testing.assert_allclose(norm_statistics(make_node(value))["mean_norm"], [60_000 * 5**0.5], rtol=1e-3)


def test_kurtosis_tells_one_large_channel_from_many() -> None:
    rng = np.random.default_rng(1)
    even = rng.normal(size=(1, 500, 400))
    spiked = even.copy()
    spiked[..., 17] = 1e4
    normal, spike = (norm_statistics(make_node(x))["kurtosis"].item() for x in (even, spiked))
    assert normal == pytest.approx(3, abs=0.05)
    assert spike == pytest.approx(400, rel=0.02)


def test_tokens_whose_values_are_all_equal_have_the_least_kurtosis() -> None:
    found = norm_statistics(make_node(np.full((1, 12, 5), 2.0)))
    np.testing.assert_allclose(found["kurtosis"], 1)
    np.testing.assert_allclose(found["std_norm"], 0)


# ── quantiles ────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    q=st.floats(0, 1),
    bits=st.integers(3, 10),
)
def test_a_quantile_of_magnitudes_is_numpys_of_those_cut_off(values: list[float], q: float, bits: int) -> None:
    held = np.array(values, dtype=np.float32)
    counts = xr.DataArray(magnitude_histogram(held, bits), dims="bin")
    found = histogram_quantile(counts, [q], bits, "bin")
    kept = cut(held, bits)
    # numpy's own place, with the rounding of q × n that is left to it.
    ranks = np.sort(kept)[np.clip(np.ceil(q * len(kept) + np.array([-1e-9, 1e-9])).astype(int) - 1, 0, len(kept) - 1)]
    assert float(found[0]) in ranks.tolist()


def test_a_quantile_of_nothing_is_nan() -> None:
    counts = xr.DataArray(np.zeros((2, 2**15)), dims=("layer", "bin"))
    assert np.isnan(histogram_quantile(counts, [0.1, 0.9], 7, "bin")).all()


def test_quantiles_outside_0_and_1_are_refused(value: NDArray[np.float64]) -> None:
    with pytest.raises(SchemaError, match=r"quantiles = \[1.5\]"):
        norm_statistics(make_node(value), quantiles=[0.5, 1.5])


# ── means by label ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", [None, {"token": 11}, {"token": 50, "layer": 1, "d_model": 4}])
def test_a_mean_by_label_is_numpys_of_the_tokens_of_the_group(
    value: NDArray[np.float64], chunks: dict[str, int] | None
) -> None:
    held = value.copy()
    held[0, 30:40, 2] = np.nan
    node = make_node(held) if chunks is None else make_node(held).chunk(chunks)
    found = mean_by(node, "token_id", [9, 2, 400, 0]).compute()
    assert found["mean"].dims == ("layer", "token_id", "d_model")
    for layer in range(2):
        for token_id in (9, 2, 0):
            kept = (np.arange(157) * 7 % 11 == token_id) & (np.arange(157) % 6 > 0) & ~np.isnan(held[layer]).any(-1)
            one = found.isel(layer=layer).sel(token_id=token_id)
            assert int(one["n_token"]) == kept.sum() > 0
            np.testing.assert_allclose(one["mean"], held[layer, kept].mean(0), rtol=1e-12)
            np.testing.assert_allclose(one["variance"], held[layer, kept].var(0, ddof=1).sum(), rtol=1e-12)
    assert found["n_token"].sel(token_id=400).values.tolist() == [0, 0]
    assert np.isnan(found["mean"].sel(token_id=400)).all()
    assert np.isnan(found["variance"].sel(token_id=400)).all()


def test_the_spread_about_a_far_mean_does_not_cancel() -> None:
    rows = np.random.default_rng(3).normal(size=(200, 4)) + 1e8
    found = mean_by(make_node(rows, ("token", "d_model")).chunk({"token": 23}), "position", 6, skip_positions=0)
    expected = [rows[position::6].var(0, ddof=1).sum() for position in range(6)]
    np.testing.assert_allclose(found["variance"], expected, rtol=1e-6)


def test_a_label_may_be_a_variable_of_booleans_and_a_mask_narrows_it(value: NDArray[np.float64]) -> None:
    node = make_node(value).chunk({"token": 33})
    odd = xr.DataArray(np.arange(157) % 2 == 1, dims="token")
    where = xr.DataArray(np.arange(157) < 100, dims="token")
    found = mean_by(node, odd.rename("odd"), 2, where=where, skip_positions=0).compute()
    np.testing.assert_allclose(found["mean"].sel(layer=7, odd=1), value[1, 1:100:2].mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["mean"].sel(layer=7, odd=0), value[1, 0:100:2].mean(0), rtol=1e-12)
    assert mean_by(node, odd, 2)["mean"].dims == ("layer", "group", "d_model")


def test_heads_are_kept_apart() -> None:
    value = np.random.default_rng(2).normal(size=(40, 3, 5))
    found = mean_by(make_node(value, ("token", "head", "d_head")), "position", 6, skip_positions=0)
    assert found["mean"].dims == ("head", "position", "d_head")
    np.testing.assert_allclose(found["mean"].isel(head=2).sel(position=4), value[4::6, 2].mean(0))


@pytest.mark.parametrize("by", ["position", "mean"])
def test_nothing_is_computed_before_it_is_asked_for(value: NDArray[np.float64], by: str) -> None:
    node = make_node(value).chunk({"token": 30, "layer": 1})
    with dask.config.set(scheduler=forbidden):
        found = mean_by(node, "position", 6) if by == "mean" else norm_statistics(node, by=by, groups=6)
        whole = norm_statistics(node)
        assert all(one.chunks is not None for one in (*found.data_vars.values(), *whole.data_vars.values()))
        with pytest.raises(AssertionError, match="something was computed"):
            found.compute()
    assert found.compute()["n_token"].sum() > 0


def test_labels_and_groups_that_make_no_sense_are_refused(value: NDArray[np.float64]) -> None:
    node = make_node(value)
    for by, groups, said in (
        ("document", 3, r"\['document'\]"),
        ("position", [], "at least one value"),
        ("position", [1, 1], "none twice"),
        (xr.DataArray(np.ones(157), dims="token"), 2, "integers or booleans"),
        (xr.DataArray(np.ones(156, dtype=int), dims="token"), 2, "157 tokens"),
    ):
        with pytest.raises(SchemaError, match=said):
            mean_by(node, by, groups)
    with pytest.raises(SchemaError, match="`groups` is missing"):
        norm_statistics(node, by="position")
