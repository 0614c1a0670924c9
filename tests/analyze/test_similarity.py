"""Cosines and linear CKA of a store are those of numpy on the whole arrays, and CKA has the paper's invariances."""

from __future__ import annotations

from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from sklearn.metrics.pairwise import cosine_similarity

from forebay.stages.analyze.similarity import direction_cosine, layer_cosine, linear_cka
from forebay.stores.errors import SchemaError

from .laziness import forbidden

N, WIDTH = 143, 11
KEPT = np.arange(N) % 9 > 0


def make_node(value: NDArray[Any], dims: tuple[str, ...] = ("layer", "token", "d_model")) -> xr.Dataset:
    n = value.shape[dims.index("token")]
    coords: dict[str, Any] = {"position": ("token", np.arange(n) % 9), "token_id": ("token", np.arange(n))}
    if "layer" in dims:
        coords["layer"] = 3 + 4 * np.arange(value.shape[dims.index("layer")])
    return xr.Dataset({"value": (dims, value)}, coords=coords)


@pytest.fixture(scope="module")
def value() -> NDArray[np.float64]:
    """Four layers that drift away from the first one, with means of their own."""
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(4, N, WIDTH)) * np.array([3, 1, 1, 2])[:, None, None]
    found: NDArray[np.float64] = steps.cumsum(0) + rng.normal(0, 5, (4, 1, WIDTH))
    return found


def cka(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Kornblith et al.'s other form: kernels of tokens, centred by the matrix H."""
    n = len(x)
    h = np.eye(n) - 1 / n
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def unbiased_hsic(k: NDArray[Any], m: NDArray[Any]) -> float:
    """Song et al.'s estimator, written out as sums over tuples of different tokens."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    return float(
        (
            np.trace(k @ m)
            + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (ones @ k @ m @ ones)
        )
        / (n * (n - 3))
    )


CHUNKS = [None, {"token": 7, "layer": -1}, {"token": 50, "layer": 3, "d_model": 4}]


# ── cosines ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", CHUNKS)
def test_the_cosine_between_layers_is_the_mean_of_every_tokens(
    value: NDArray[np.float64], chunks: dict[str, int] | None
) -> None:
    node = make_node(value) if chunks is None else make_node(value).chunk(chunks)
    found = layer_cosine(node).compute()
    assert found.dims == ("layer", "layer_2")
    assert found["layer"].values.tolist() == found["layer_2"].values.tolist() == [3, 7, 11, 15]
    for a in range(4):
        for b in range(4):
            each = np.diag(cosine_similarity(value[a, KEPT], value[b, KEPT]))
            np.testing.assert_allclose(found[a, b], each.mean(), rtol=1e-12)


def test_tokens_without_a_direction_at_some_layer_count_at_none(value: NDArray[np.float64]) -> None:
    held = value.copy()
    held[1, 20], held[2, 31, 4], held[0, 40, 0] = 0, np.nan, np.inf
    found = layer_cosine(make_node(held).chunk({"token": 30}), skip_positions=0).compute()
    rest = np.delete(value, [20, 31, 40], 1)
    np.testing.assert_allclose(found[0, 3], np.diag(cosine_similarity(rest[0], rest[3])).mean(), rtol=1e-12)
    np.testing.assert_allclose(np.diag(found), 1)


def test_no_tokens_have_no_cosine(value: NDArray[np.float64]) -> None:
    none = xr.DataArray(np.zeros(N, dtype=bool), dims="token")
    assert np.isnan(layer_cosine(make_node(value).chunk({"token": 30}), where=none)).all()


def test_heads_have_cosines_of_their_own() -> None:
    value = np.random.default_rng(1).normal(size=(2, 40, 3, 5))
    node = make_node(value, ("layer", "token", "head", "d_head")).chunk({"token": 11})
    found = layer_cosine(node, skip_positions=0).compute()
    assert found.dims == ("head", "layer", "layer_2")
    for head in range(3):
        each = np.diag(cosine_similarity(value[0, :, head], value[1, :, head]))
        np.testing.assert_allclose(found[head, 0, 1], each.mean(), rtol=1e-12)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_every_token_has_its_cosine_with_a_direction(value: NDArray[np.float64], chunks: dict[str, int] | None) -> None:
    held = value.copy()
    held[2, 5] = 0
    node = make_node(held) if chunks is None else make_node(held).chunk(chunks)
    direction = np.random.default_rng(2).normal(size=WIDTH) * 40
    found = direction_cosine(node, direction)
    assert found.dims == ("layer", "token")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found["token_id"], node["token_id"])
    for layer in range(4):
        expected = cosine_similarity(held[layer], direction[None])[:, 0]
        expected[5] = np.nan if layer == 2 else expected[5]
        np.testing.assert_allclose(found[layer], expected, atol=1e-6)


def test_every_layer_may_have_a_direction_of_its_own(value: NDArray[np.float64]) -> None:
    rng = np.random.default_rng(3)
    own = xr.DataArray(rng.normal(size=(4, WIDTH)), dims=("layer", "d_model"), coords={"layer": [3, 7, 11, 15]})
    found = direction_cosine(make_node(value), own)
    np.testing.assert_allclose(found[2], cosine_similarity(value[2], own.values[2:3])[:, 0], atol=1e-6)
    several = xr.DataArray(rng.normal(size=(6, WIDTH)), dims=("feature", "d_model"))
    found = direction_cosine(make_node(value), several)
    np.testing.assert_allclose(found.sel(layer=7), cosine_similarity(value[1], several.values), atol=1e-6)


# ── CKA ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", CHUNKS)
def test_cka_is_that_of_centred_kernels_over_all_tokens(
    value: NDArray[np.float64], chunks: dict[str, int] | None
) -> None:
    node = make_node(value) if chunks is None else make_node(value).chunk(chunks)
    found = linear_cka(node).compute()
    assert found.dims == ("layer", "layer_2")
    for a in range(4):
        for b in range(4):
            np.testing.assert_allclose(found[a, b], cka(value[a, KEPT], value[b, KEPT]), rtol=1e-9)


@pytest.mark.parametrize("method", ["exact", "minibatch"])
def test_cka_of_two_stores_compares_their_layers(value: NDArray[np.float64], method: Any) -> None:
    rng = np.random.default_rng(4)
    other = value[:2] @ rng.normal(size=(WIDTH, 17)) + rng.normal(size=(2, N, 17))
    second = make_node(other).assign_coords(layer=[1, 2])
    found = linear_cka(make_node(value).chunk({"token": 60}), second, method=method, batch=16).compute()
    assert found.sizes == {"layer": 4, "layer_2": 2}
    assert found["layer_2"].values.tolist() == [1, 2]
    if method == "exact":
        np.testing.assert_allclose(found[3, 1], cka(value[3, KEPT], other[1, KEPT]), rtol=1e-9)
    else:
        np.testing.assert_allclose(found[3, 1], minibatch(value[3], other[1], 60, 16), rtol=1e-9)


def minibatch(x: NDArray[Any], y: NDArray[Any], chunk: int, batch: int) -> float:
    sums = np.zeros(3)
    for start in range(0, N, chunk):
        kept = np.flatnonzero(KEPT[start : start + chunk]) + start
        for first in range(0, len(kept) - batch + 1, batch):
            k, m = (z[kept[first : first + batch]] @ z[kept[first : first + batch]].T for z in (x, y))
            sums += unbiased_hsic(k, m), unbiased_hsic(k, k), unbiased_hsic(m, m)
    return float(sums[0] / np.sqrt(sums[1] * sums[2]))


@pytest.mark.parametrize("chunk", [N, 50])
def test_minibatch_cka_is_the_mean_of_unbiased_estimates_of_the_batches(value: NDArray[np.float64], chunk: int) -> None:
    found = linear_cka(make_node(value).chunk({"token": chunk}), method="minibatch", batch=15).compute()
    for a, b in ((0, 1), (3, 2), (1, 1)):
        np.testing.assert_allclose(found[a, b], minibatch(value[a], value[b], chunk, 15), rtol=1e-9)


def test_minibatch_cka_estimates_what_all_tokens_would_give() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6000, 4))
    y = x @ rng.normal(size=(4, 4)) + 2 * rng.normal(size=(6000, 4))
    found = linear_cka(make_node(np.stack([x, y])), method="minibatch", batch=64, skip_positions=0)
    c = np.cov(np.concatenate([x, y], 1).T)
    whole = np.square(c[:4, 4:]).sum() / np.sqrt(np.square(c[:4, :4]).sum() * np.square(c[4:, 4:]).sum())
    assert float(found[0, 1]) == pytest.approx(whole, abs=0.02)
    assert 0.1 < float(found[0, 1]) < 0.9


@pytest.mark.parametrize("method", ["exact", "minibatch"])
def test_cka_does_not_see_rotations_scales_and_shifts_but_does_see_other_maps(
    value: NDArray[np.float64], method: Any
) -> None:
    rng = np.random.default_rng(6)
    turned = value[0] @ np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] * 0.3 + 70
    stretched = value[0] * 4.0 ** np.arange(WIDTH)
    node = make_node(np.stack([value[0], turned, stretched]))
    found = linear_cka(node, method=method, batch=32)
    np.testing.assert_allclose(found[0, 1], 1, atol=1e-9)
    assert float(found[0, 2]) < 0.9


def test_tokens_with_nan_in_either_store_do_not_count(value: NDArray[np.float64]) -> None:
    one, other = value[:1].copy(), value[1:2].copy()
    one[0, 20, 3], other[0, 34, 1] = np.nan, np.nan
    found = linear_cka(make_node(one).chunk({"token": 9}), make_node(other).chunk({"token": 40}), skip_positions=0)
    rest = np.delete(value, [20, 34], 1)
    np.testing.assert_allclose(found[0, 0], cka(rest[0], rest[1]), rtol=1e-9)


# ── how it computes, and what is refused ─────────────────────────────────────────────────────────────────────────────


def test_nothing_is_computed_before_it_is_asked_for(value: NDArray[np.float64]) -> None:
    node = make_node(value).chunk({"token": 30, "layer": 1})
    with dask.config.set(scheduler=forbidden):
        results = [
            layer_cosine(node),
            direction_cosine(node, np.ones(WIDTH)),
            linear_cka(node),
            linear_cka(node, node, method="minibatch", batch=10),
        ]
        for found in results:
            assert found.chunks is not None
            with pytest.raises(AssertionError, match="something was computed"):
                found.compute()
    assert all(np.isfinite(found.compute()).all() for found in results)


def test_what_makes_no_sense_is_refused(value: NDArray[np.float64]) -> None:
    node = make_node(value)
    with pytest.raises(SchemaError, match="layer"):
        layer_cosine(node.isel(layer=0, drop=True))
    with pytest.raises(SchemaError, match=f"d_model={WIDTH}"):
        direction_cosine(node, np.ones(WIDTH + 1))
    with pytest.raises(SchemaError, match="same tokens; what was given has 143 and 140"):
        linear_cka(node, node.isel(token=slice(140)))
    with pytest.raises(SchemaError, match="minibatch"):
        linear_cka(node, method="minibatches")  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="batch = 3"):
        linear_cka(node, batch=3)
    with pytest.raises(SchemaError, match="one head"):
        linear_cka(make_node(np.ones((2, 9, 3, 5)), ("layer", "token", "head", "d_head")))
