"""Components of a store are scikit-learn's of the whole array, by the covariance exactly and by sketches nearly so."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from forebay.stages.analyze.pca import pca, pca_of, project, reconstruct
from forebay.stores.errors import SchemaError

from .laziness import forbidden

WIDTH, N = 17, 203


@pytest.fixture(scope="module")
def value() -> NDArray[np.float64]:
    """Three layers of tokens whose variances fall by 0.6 a direction, far from 0."""
    rng = np.random.default_rng(0)
    scale = 9 * 0.6 ** np.arange(WIDTH)
    turns = np.linalg.qr(rng.normal(size=(3, WIDTH, WIDTH)))[0]
    return rng.normal(size=(3, N, WIDTH)) * scale @ turns + rng.normal(0, 300, (3, 1, WIDTH))


def make_node(value: NDArray[Any], dims: tuple[str, ...] = ("layer", "token", "d_model")) -> xr.Dataset:
    n = value.shape[dims.index("token")]
    coords = {"position": ("token", np.arange(n) % 10), "token_id": ("token", np.arange(n) + 5)}
    layers = {"layer": [2, 5, 11][: value.shape[dims.index("layer")]]} if "layer" in dims else {}
    return xr.Dataset({"value": (dims, value)}, coords={**coords, **layers})


KEPT = np.arange(N) % 10 > 0


def check(found: xr.Dataset, rows: NDArray[Any], rtol: float = 1e-6, n_omit: int = 0, **where: int) -> None:
    one = found.isel(where)
    k = one.sizes["component"]
    oracle = PCA(n_omit + k, svd_solver="full").fit(rows.astype(np.float64))
    assert int(one["n_token"]) == len(rows)
    assert one["component"].values.tolist() == list(range(n_omit, n_omit + k))
    np.testing.assert_allclose(one["mean"], oracle.mean_, rtol=1e-9)
    np.testing.assert_allclose(one["components"], oracle.components_[n_omit:], atol=rtol)
    for name in ("explained_variance", "explained_variance_ratio", "singular_values"):
        np.testing.assert_allclose(one[name], getattr(oracle, f"{name}_")[n_omit:], rtol=rtol, err_msg=name)


# ── the components ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", [None, {"token": 7}, {"token": 50, "layer": 2}, {"layer": 1, "d_model": 4}])
def test_components_and_variances_are_scikit_learns_of_the_whole_array(
    value: NDArray[np.float64], chunks: dict[str, int] | None
) -> None:
    node = make_node(value) if chunks is None else make_node(value).chunk(chunks)
    found = pca(node, 6).compute()
    assert found["components"].dims == ("layer", "component", "d_model")
    assert found["layer"].values.tolist() == [2, 5, 11]
    for layer in range(3):
        check(found, value[layer, KEPT], layer=layer)


@pytest.mark.parametrize("method", ["covariance", "randomized"])
def test_all_components_there_are_can_be_had(value: NDArray[np.float64], method: Any) -> None:
    found = pca(make_node(value).chunk({"token": 40}), WIDTH, method=method).compute()
    for layer in range(3):
        check(found, value[layer, KEPT], layer=layer)
    np.testing.assert_allclose(found["explained_variance_ratio"].sum("component"), 1.0)


def test_the_largest_entry_of_a_component_is_positive(value: NDArray[np.float64]) -> None:
    found = pca(make_node(value), 9)["components"].values
    largest = np.take_along_axis(found, np.abs(found).argmax(-1)[..., None], -1)
    assert (largest > 0).all()


def test_float32_activations_are_summed_in_float64(value: NDArray[np.float64]) -> None:
    held = value.astype(np.float32)
    found = pca(make_node(held).chunk({"token": 30}), 4).compute()
    assert found["components"].dtype == found["explained_variance"].dtype == np.float64
    check(found, held[1, KEPT], layer=1)


def test_masks_and_positions_and_nan_narrow_the_tokens(value: NDArray[np.float64]) -> None:
    held = value.copy()
    held[1, 33, 4] = np.nan
    where = np.arange(N) % 4 > 0
    for method in ("covariance", "randomized"):
        found = pca(
            make_node(held).chunk({"token": 30}),
            3,
            where=xr.DataArray(where, dims="token"),
            skip_positions=2,
            method=method,
            n_iter=12,
        ).compute()
        kept = where & (np.arange(N) % 10 > 1)
        check(found, held[0, kept], layer=0)
        check(found, held[1, kept & (np.arange(N) != 33)], layer=1)


def test_the_first_components_can_be_left_out(value: NDArray[np.float64]) -> None:
    whole, rest = pca(make_node(value), 7), pca(make_node(value), 5, n_omit=2)
    check(rest, value[2, KEPT], n_omit=2, layer=2)
    xr.testing.assert_allclose(whole.sel(component=slice(2, None)), rest)


def test_heads_are_kept_apart() -> None:
    value = np.random.default_rng(1).normal(size=(2, 61, 3, 5)) * [5, 4, 3, 2, 1.0]
    node = make_node(value, ("layer", "token", "head", "d_head"))
    for method in ("covariance", "randomized"):
        found = pca(node.chunk({"token": 13, "head": 2}), 2, skip_positions=0, method=method).compute()
        assert found["components"].dims == ("layer", "head", "component", "d_head")
        check(found, value[1, :, 2], layer=1, head=2)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("method", ["covariance", "randomized"])
def test_too_few_tokens_give_nan_and_too_low_a_rank_components_that_explain_nothing(method: Any, chunked: bool) -> None:
    value = np.random.default_rng(2).normal(size=(2, 9, 6))
    value[0, 1:] = np.nan
    value[1, 3:] = np.nan
    node = make_node(value).chunk({"token": 2}) if chunked else make_node(value)
    found = pca(node, 4, skip_positions=0, method=method).compute()
    assert found["n_token"].values.tolist() == [1, 3]
    assert np.isnan(found["components"][0]).all()
    assert np.isnan(found["explained_variance"][0]).all()
    components = found["components"][1].values
    np.testing.assert_allclose(components @ components.T, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(found["explained_variance_ratio"][1, 2:], 0, atol=1e-12)
    np.testing.assert_allclose(found["explained_variance_ratio"][1].sum(), 1)


@pytest.mark.parametrize("method", ["covariance", "randomized"])
def test_no_tokens_have_no_mean_and_a_token_with_infinity_does_not_count(method: Any) -> None:
    value = np.random.default_rng(3).normal(size=(2, 9, 6))
    value[0] = np.nan
    value[1, 4, 2] = np.inf
    found = pca(make_node(value), 2, method=method, skip_positions=0)
    for name in ("mean", "components", "explained_variance"):
        assert np.isnan(found[name][0]).all()
    assert found["n_token"].values.tolist() == [0, 8]
    finite = np.delete(value[1:], 4, axis=1)
    expected = pca(make_node(finite), 2, method=method, skip_positions=0)
    for name in ("mean", "explained_variance", "components"):
        np.testing.assert_allclose(found[name][1], expected[name][0], atol=1e-9)


# ── randomised ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", [None, {"token": 19, "layer": 1}])
def test_a_sketch_finds_the_components_where_variances_fall(
    value: NDArray[np.float64], chunks: dict[str, int] | None
) -> None:
    node = make_node(value) if chunks is None else make_node(value).chunk(chunks)
    found = pca(node, 3, method="randomized").compute()
    for layer in range(3):
        check(found, value[layer, KEPT], layer=layer)


def test_a_sketch_of_a_flat_spectrum_explains_less_and_more_with_every_pass() -> None:
    rows = np.random.default_rng(4).normal(size=(400, 120))
    exact = PCA(5, svd_solver="full").fit(rows).explained_variance_
    node = make_node(rows, ("token", "d_model")).chunk({"token": 90})
    found = [
        pca(node, 5, skip_positions=0, method="randomized", n_iter=n)["explained_variance"].values for n in (0, 1, 4)
    ]
    assert all((one <= exact * (1 + 1e-12)).all() for one in found)
    assert found[0].sum() < found[1].sum() < found[2].sum()
    np.testing.assert_allclose(found[2], exact, rtol=0.1)


def test_a_sketch_is_its_seeds(value: NDArray[np.float64]) -> None:
    rows = np.random.default_rng(5).normal(size=(90, 40))
    node = make_node(rows, ("token", "d_model")).chunk({"token": 20})
    one, again, other = (pca(node, 2, method="randomized", n_iter=0, seed=seed).compute() for seed in (1, 1, 2))
    xr.testing.assert_identical(one, again)
    assert np.abs(one["components"] - other["components"]).max() > 0.01


def test_a_sketch_reads_every_chunk_once_a_pass_and_no_pass_begins_before_the_last_one_ends(
    value: NDArray[np.float64],
) -> None:
    """Or dask would keep the whole store in memory from the first pass to the last."""
    read: list[int] = []

    def block(block_info: Any = None) -> NDArray[Any]:
        place = tuple(slice(*span) for span in block_info[None]["array-location"])
        read.append(place[0].start * N + place[1].start)
        return value[place]

    chunks = ((1, 1, 1), (30,) * 6 + (23,), (WIDTH,))
    lazy = da.map_blocks(block, chunks=chunks, dtype=float, meta=np.empty((0, 0, 0)))
    node = make_node(value).assign(value=(("layer", "token", "d_model"), lazy))
    with dask.config.set(scheduler="threads", num_workers=4):
        check(pca(node, 3, method="randomized", n_iter=2).compute(), value[1, KEPT], rtol=1e-3, layer=1)
    every = sorted(layer * N + start for layer in range(3) for start in range(0, N, 30))
    passes = [read[i : i + len(every)] for i in range(0, len(read), len(every))]
    assert len(passes) == 4
    assert all(sorted(one) == every for one in passes)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_any_split_into_blocks_gives_the_same_sketch(seed: int, chunks: list[int]) -> None:
    rows = np.random.default_rng(seed).normal(1000, 3, (sum(chunks), 5)) * [8, 4, 2, 1, 0.5]
    node = make_node(rows, ("token", "d_model"))
    sketch: dict[str, Any] = {"skip_positions": 0, "method": "randomized", "n_iter": 1}
    with dask.config.set(scheduler="synchronous"):
        found = pca(node.chunk({"token": tuple(chunks)}), 2, **sketch).compute()
    whole = pca(node, 2, **sketch)
    np.testing.assert_allclose(found["explained_variance"], whole["explained_variance"], rtol=1e-6, atol=1e-6)


# ── projections ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", [None, {"token": 31, "layer": 2, "d_model": 5}])
def test_scores_and_reconstructions_are_scikit_learns(
    value: NDArray[np.float64], chunks: dict[str, int] | None
) -> None:
    node = make_node(value) if chunks is None else make_node(value).chunk(chunks)
    found = pca(node, 4)
    scores = project(node, found)
    again = reconstruct(scores, found)
    assert scores.dims == ("layer", "token", "component")
    assert again.dims == ("layer", "token", "d_model")
    np.testing.assert_array_equal(scores["token_id"], node["token_id"])
    for layer in range(3):
        oracle = PCA(4, svd_solver="full").fit(value[layer, KEPT])
        expected = oracle.transform(value[layer])
        np.testing.assert_allclose(scores[layer], expected, atol=1e-8)
        np.testing.assert_allclose(again[layer], oracle.inverse_transform(expected), rtol=1e-9)


def test_scores_without_the_first_components_are_those_of_the_rest(value: NDArray[np.float64]) -> None:
    node = make_node(value)
    found = pca(node, 5)
    scores = project(node, found, n_omit=2)
    assert scores["component"].values.tolist() == [2, 3, 4]
    np.testing.assert_allclose(scores, project(node, found)[..., 2:])
    np.testing.assert_allclose(scores, project(node, pca(node, 3, n_omit=2)), atol=1e-9)
    expected = found["mean"].values[:, None] + scores.values @ found["components"].values[:, 2:]
    np.testing.assert_allclose(reconstruct(scores, found), expected)
    np.testing.assert_allclose(reconstruct(project(node, found), found, n_omit=2), expected)


def test_every_layer_goes_by_its_own_components(value: NDArray[np.float64]) -> None:
    node = make_node(value)
    found = pca(node, 3)
    whole = project(node, found)
    np.testing.assert_array_equal(project(node.sel(layer=[11, 2]), found), whole.sel(layer=[11, 2]))
    one = project(node.sel(layer=5), found)
    assert one.dims == ("token", "component")
    np.testing.assert_allclose(one, whole.sel(layer=5), rtol=1e-9)
    np.testing.assert_allclose(reconstruct(one, found), reconstruct(whole, found).sel(layer=5), rtol=1e-9)
    with pytest.raises(SchemaError, match=r"has the layers \[2, 5, 11\], not \[4\]"):
        project(node.assign_coords(layer=[2, 4, 11]), found)


def test_scores_of_float32_are_float32(value: NDArray[np.float64]) -> None:
    node = make_node(value.astype(np.float32))
    scores = project(node.chunk({"token": 40}), pca(node, 3))
    assert scores.dtype == scores.compute().dtype == np.float32
    assert reconstruct(scores, pca(node, 3)).compute().dtype == np.float32


def test_vectors_without_tokens_have_components_too() -> None:
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(2, 30, 8)) * np.arange(8, 0, -1) + 40
    rows[1, 4] = np.nan
    vectors = xr.DataArray(
        rows, dims=("layer", "count", "d_model"), coords={"layer": [3, 4], "count": np.arange(1, 31)}
    )
    for given_ in (vectors, vectors.chunk({"count": 7}), vectors.transpose("count", "d_model", "layer")):
        found = pca_of(given_.transpose("layer", ..., "d_model"), "count", 3).compute()
        check(found, rows[0], layer=0)
        check(found, np.delete(rows[1], 4, 0), layer=1)
        scores = project(given_, found)
        assert scores.dims == (*(dim for dim in given_.dims if dim != "d_model"), "component")
        expected = (rows[0] - rows[0].mean(0)) @ found["components"].values[0].T
        np.testing.assert_allclose(scores.sel(layer=3).transpose("count", "component"), expected, atol=1e-9)


# ── how it computes, and what is refused ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["covariance", "randomized"])
def test_nothing_is_computed_before_it_is_asked_for(value: NDArray[np.float64], method: Any) -> None:
    node = make_node(value).chunk({"token": 30, "layer": 1})
    with dask.config.set(scheduler=forbidden):
        found = pca(node, 2, method=method)
        again = reconstruct(project(node, found), found)
        assert all(found[name].chunks is not None for name in found.data_vars)
        with pytest.raises(AssertionError, match="something was computed"):
            again.compute()
    assert np.isfinite(again.compute()).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_components": WIDTH + 1}, f"components 0 to {WIDTH} were asked for, of a width of {WIDTH}"),
        ({"n_components": 2, "n_omit": WIDTH - 1}, "were asked for"),
        ({"n_components": 0}, "were asked for"),
        ({"n_components": 1, "n_omit": -1}, "were asked for"),
        ({"n_components": 1, "method": "randomised"}, "randomized"),
        ({"n_components": 1, "n_iter": -1, "method": "randomized"}, "n_iter"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    value: NDArray[np.float64], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(SchemaError, match=said):
        pca(make_node(value), **settings)


def test_other_widths_and_dimensions_are_refused(value: NDArray[np.float64]) -> None:
    node = make_node(value)
    found = pca(node, 2)
    with pytest.raises(SchemaError, match=f"{WIDTH} wide"):
        project(node.isel(d_model=slice(5)), found)
    with pytest.raises(SchemaError, match=r"components \[1\] of the scores"):
        reconstruct(project(node, found), found.isel(component=[0]))
    with pytest.raises(SchemaError, match="'count'"):
        pca_of(node["value"], "count", 2)
    with pytest.raises(SchemaError, match="`value`"):
        project(found, found)
