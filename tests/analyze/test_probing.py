"""A probe is what scikit-learn fits on the whole array, trained on some documents and judged on others."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import forebay
from forebay.stages.analyze import probing
from forebay.stages.analyze.probing import KINDS, apply_probe
from forebay.stages.analyze.tokens import as_run
from forebay.stores.errors import SchemaError
from forebay.stores.labels import token_coords

probe = partial(probing.probe, n_bootstrap=7)
N_LAYER, WIDTH, N_TYPE = 3, 7, 29
CHUNKS = [{"token": 300, "layer": 1}, {"token": (300, 1, 500, 36), "layer": 2, "d_model": 2}]


@pytest.fixture(autouse=True)
def in_this_thread() -> Iterator[None]:
    """Dozens of tiny chunks gain nothing from threads."""
    with dask.config.set(scheduler="synchronous"):
        yield


def store(
    n_class: int = 2, *, n_document: int = 31, noise: float = 3.0, shift: float = 0.0, seed: int = 3
) -> xr.Dataset:
    """Vectors of 837 tokens in sequences of 9, three to a document, that say `label` better from layer to layer, each
    dimension on a scale of its own; `label` leans to the lower classes.
    """
    rng = np.random.default_rng(seed)
    n_token = 27 * n_document
    coords = token_coords(n_token, np.arange(0, n_token, 9), np.arange(0, n_token, 27))
    share = np.arange(n_class, 0, -1.0) ** 1.5
    label = rng.choice(n_class, size=n_token, p=share / share.sum())
    away = rng.normal(size=(N_LAYER, n_class, WIDTH)) * np.linspace(0.2, 1.2, N_LAYER)[:, None, None]
    value = away[:, label] + noise * rng.normal(size=(N_LAYER, n_token, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) / 2
    value = value * np.geomspace(0.1, 40, WIDTH) + shift * rng.normal(size=(N_LAYER, 1, WIDTH))
    return xr.Dataset(
        {"value": (("layer", "token", "d_model"), value.astype(np.float32)), "label": ("token", label)},
        coords={"layer": [2, 5, 11], **coords, "token_id": ("token", rng.integers(0, N_TYPE, n_token))},
    )


def splits(node: xr.Dataset, result: xr.Dataset) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tokens are trained on, and which are held out, told from documents alone."""
    held_out = result["document"].values[result["held_out"].values]
    counts = node["position"].values >= 1
    return counts & ~np.isin(node["document"], held_out), counts & np.isin(node["document"], held_out)


def raises(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("nothing is computed before it is asked for")


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def layers(node: xr.Dataset) -> list[NDArray[np.float64]]:
    return list(node["value"].values.astype(np.float64))


def by_hand(node: xr.Dataset, result: xr.Dataset) -> NDArray[np.float64]:
    """Scores [layer, token, …] of all tokens."""
    weights = zip(layers(node), result["weight"].values, result["bias"].values, strict=True)
    return np.stack([x @ weight.T + bias for x, weight, bias in weights])


@pytest.mark.parametrize("chunks", [None, *CHUNKS])
def test_a_mass_mean_probe_is_the_difference_of_means_with_its_threshold_midway(chunks: dict[str, Any] | None) -> None:
    node = store()
    given = node if chunks is None else node.chunk(chunks)
    result = probe(given, node["label"], kind="mass_mean", controls=()).compute()
    train, _ = splits(node, result)
    for layer, x in enumerate(layers(node)):
        first, second = (x[train & (node["label"].values == c)].mean(0) for c in (0, 1))
        close(result["weight"][layer], second - first, 1e-7)
        close(result["bias"][layer], -(second - first) @ (first + second) / 2, 1e-7)


def test_of_several_classes_a_mass_mean_probe_predicts_the_nearest_mean() -> None:
    node = store(4)
    result = probe(node, node["label"], kind="mass_mean", controls=())
    train, held_out = splits(node, result)
    assert result["weight"].dims == ("layer", "class", "d_model")
    for layer, x in enumerate(layers(node)):
        means = np.stack([x[train & (node["label"].values == c)].mean(0) for c in range(4)])
        nearest = ((x[held_out][:, None] - means) ** 2).sum(-1).argmin(1)
        scores = apply_probe(node, result).isel(layer=layer).values[:, held_out]
        assert (scores.argmax(0) == nearest).all()
        assert result["accuracy"].values[layer, 1] == np.mean(nearest == node["label"].values[held_out])


@pytest.mark.parametrize("chunks", [None, *CHUNKS])
@pytest.mark.parametrize("n_class", [2, 3])
def test_lda_is_scikit_learns(n_class: int, chunks: dict[str, Any] | None) -> None:
    node = store(n_class, shift=30)
    given = node if chunks is None else node.chunk(chunks)
    result = probe(given, node["label"], kind="lda", controls=()).compute()
    train, held_out = splits(node, result)
    for layer, x in enumerate(layers(node)):
        oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(x[train], node["label"].values[train])
        weight, bias = result["weight"].values[layer], result["bias"].values[layer]
        if n_class == 2:
            close(weight, oracle.coef_[0], 1e-6)
            close(bias, oracle.intercept_[0], 1e-5)
        else:
            close(weight - weight[0], oracle.coef_ - oracle.coef_[0], 1e-6)
            close(bias - bias[0], oracle.intercept_ - oracle.intercept_[0], 1e-5)
        assert result["accuracy"].values[layer, 1] == oracle.score(x[held_out], node["label"].values[held_out])


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("chunks", [None, *CHUNKS])
def test_ridge_is_scikit_learns_at_every_alpha_at_once(chunks: dict[str, Any] | None, standardize: bool) -> None:
    node = store(shift=30)
    target = node["label"] * 3.5 + np.random.default_rng(1).normal(size=837)
    given = node if chunks is None else node.chunk(chunks)
    alphas = (0.5, 40.0, 3000.0)
    result = probe(given, target, kind="ridge", alpha=alphas, standardize=standardize, controls=()).compute()
    train, held_out = splits(node, result)
    assert result["weight"].dims == ("layer", "alpha", "d_model")
    for layer, x in enumerate(layers(node)):
        for alpha in alphas:
            ridge = Ridge(alpha=alpha)
            oracle = (make_pipeline(StandardScaler(), ridge) if standardize else ridge).fit(x[train], target[train])
            found = result.isel(layer=layer).sel(alpha=alpha)
            scale = np.sqrt(oracle[0].var_) if standardize else 1.0
            close(found["weight"], ridge.coef_ / scale, 1e-8)
            close(x @ found["weight"].values + float(found["bias"]), oracle.predict(x), 1e-7)
            close(found["r2"].sel(split="validation"), r2_score(target[held_out], oracle.predict(x[held_out])), 1e-8)
            close(found["r2"].sel(split="train"), r2_score(target[train], oracle.predict(x[train])), 1e-8)


def test_one_alpha_makes_no_dimension() -> None:
    node = store()
    result = probe(node, node["label"], kind="ridge", alpha=2.5)
    assert result["weight"].dims == ("layer", "d_model")
    assert float(result["alpha"]) == 2.5


@pytest.mark.parametrize("max_bytes", [2**30, 0])
@pytest.mark.parametrize(("n_class", "standardize"), [(2, True), (3, True), (2, False)])
def test_logistic_is_scikit_learns_in_memory_and_streamed(n_class: int, standardize: bool, max_bytes: int) -> None:
    node = store(n_class, shift=10)
    result = probe(
        node.chunk({"token": 400}), node["label"], C=0.3, standardize=standardize, controls=(), max_bytes=max_bytes
    )
    train, held_out = splits(node, result)
    assert result["converged"].all()
    for layer, x in enumerate(layers(node)):
        logistic = LogisticRegression(C=0.3, tol=1e-9, max_iter=20_000, solver="newton-cholesky")
        scaler = StandardScaler(with_std=standardize).fit(x[train])
        logistic.fit(scaler.transform(x[train]), node["label"].values[train])
        scores = logistic.decision_function(scaler.transform(x))
        weight, bias = result["weight"].values[layer], result["bias"].values[layer]
        found = x @ weight.T + bias
        if n_class > 2:
            scores = scores - scores.mean(1, keepdims=True)
        close(found, scores, 1e-4)
        expected = logistic.score(scaler.transform(x[held_out]), node["label"].values[held_out])
        assert result["accuracy"].values[layer, 1] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [kind for kind, classifies in KINDS.items() if classifies])
@pytest.mark.parametrize("n_class", [2, 4])
def test_metrics_are_scikit_learns_of_the_scores(kind: str, n_class: int) -> None:
    node = store(n_class)
    result = probe(node.chunk(CHUNKS[1]), node["label"], kind=kind).compute()
    scores = by_hand(node, result)
    for split, some in zip(("train", "validation"), splits(node, result), strict=True):
        label = node["label"].values[some]
        for layer, of_layer in enumerate(scores[:, some]):
            found = result.isel(layer=layer).sel(split=split)
            predicted = of_layer > 0 if n_class == 2 else of_layer.argmax(-1)
            assert int(found["n_example"]) == some.sum()
            assert float(found["accuracy"]) == pytest.approx(np.mean(predicted == label))
            assert float(found["balanced_accuracy"]) == pytest.approx(balanced_accuracy_score(label, predicted))
            if n_class == 2:
                assert float(found["auc"]) == pytest.approx(roc_auc_score(label, of_layer), abs=1e-12)
            else:
                assert "auc" not in result
            assert list(found["class_count"]) == np.bincount(label).tolist()


def test_no_document_is_in_both_splits_and_the_seed_says_which() -> None:
    node = store()
    first, again, other = (
        probe(node, node["label"], kind="mass_mean", validation=0.3, seed=seed) for seed in (0, 0, 1)
    )
    xr.testing.assert_identical(first, again)
    assert first["held_out"].sum() == round(0.3 * 31) == other["held_out"].sum()
    assert (first["held_out"] != other["held_out"]).any()
    assert first.attrs["seed"] == 0
    train, held_out = splits(node, first)
    assert not set(node["document"].values[train]) & set(node["document"].values[held_out])
    assert first["n_example"].values.tolist() == [[train.sum(), held_out.sum()]] * N_LAYER


def test_the_documents_held_out_may_be_named() -> None:
    node = store()
    result = probe(node, node["label"], kind="lda", validation=[4, 30, 8])
    assert result["document"].values[result["held_out"].values].tolist() == [4, 8, 30]


def test_what_is_learned_of_documents_is_worth_nothing_on_others() -> None:
    """Every document has a direction and a label of its own, so that a split by tokens would be all right."""
    rng = np.random.default_rng(0)
    node = store(n_document=60)
    document = node["document"].values
    own = rng.normal(size=(N_LAYER, 60, 100))
    value = own[:, document] + 0.01 * rng.normal(size=(N_LAYER, len(document), 100))
    node = node.drop_vars("value").assign(value=(("layer", "token", "d_model"), value))
    label = xr.DataArray(rng.permutation(np.arange(60) % 2), dims="document")
    result = probe(node, label, validation=0.4, seed=1)
    assert (result["accuracy"].sel(split="train") == 1).all()
    assert abs(float(result["accuracy"].sel(split="validation").mean()) - 0.5) < 0.2


@pytest.mark.parametrize("kind", list(KINDS))
def test_tokens_without_a_label_do_not_count(kind: str) -> None:
    node = store()
    without = np.random.default_rng(5).random(837) < 0.4
    kept = probe(node.isel(token=~without), node["label"][~without], kind=kind, controls=("shuffle",))
    for labels in (node["label"].where(~without, -1), node["label"].where(~without)):
        found = probe(node.chunk(CHUNKS[0]), labels, kind=kind, controls=("shuffle",)).compute()
        xr.testing.assert_allclose(found, kept, rtol=1e-5)
    booleans = probe(node, (node["label"] == 1), kind=kind)
    if kind != "ridge":
        assert booleans["class"].values.tolist() == [False, True]


def test_a_number_of_minus_one_is_a_label_of_ridge_where_labels_are_floats() -> None:
    node = store()
    floats = (2.0 * node["label"] - 1).astype(float)
    assert probe(node, floats, kind="ridge")["n_example"].values[0].sum() == 837 - 93
    integers = 3 - 2 * (node["label"] + (node["token_id"] == 4))
    assert probe(node, integers, kind="ridge")["n_example"].values[0].sum() == int(
        ((integers != -1) & (node["position"] > 0)).sum()
    )


def test_a_label_of_a_sequence_or_document_is_that_of_the_tokens_at_a_position() -> None:
    node = store()
    of_sequence = xr.DataArray(np.arange(93)[::-1] % 2, dims="sequence", coords={"sequence": np.arange(93)[::-1]})
    spread = node["sequence"].values % 2
    for position, at in ((-1, 8), (-3, 6), (4, 4)):
        token = xr.DataArray(np.where(node["position"] == at, spread, -1), dims="token")
        found = probe(node.chunk(CHUNKS[0]), of_sequence, kind="mass_mean", position=position, controls=()).compute()
        assert int(found["n_example"][0].sum()) == 93
        xr.testing.assert_allclose(found, probe(node, token, kind="mass_mean", controls=()), rtol=1e-9)
    every = probe(node, of_sequence, kind="mass_mean", controls=())
    assert int(every["n_example"][0].sum()) == 837 - 93
    of_document = xr.DataArray([0.0, 1, np.nan] * 10 + [1], dims="document")
    some = probe(node, of_document, kind="mass_mean", position=-1, controls=())
    assert len(some["document"]) == 21
    assert int(some["n_example"][0].sum()) == 63


def test_positions_are_counted_from_the_end_of_sequences_of_any_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, size=50)
    starts = np.cumsum([0, *lengths])[:-1]
    value = rng.normal(size=(lengths.sum(), 3))
    node = xr.Dataset({"value": (("token", "d_model"), value)}, coords=token_coords(len(value), starts, starts))
    label = xr.DataArray(np.arange(50) % 2, dims="sequence")
    found = probe(node, label, kind="mass_mean", position=-1, skip_positions=0, controls=(), validation=range(0, 50, 7))
    last, train = value[starts + lengths - 1], np.arange(50) % 7 > 0
    means = [last[train & (label.values == c)].mean(0) for c in (0, 1)]
    close(found["weight"], means[1] - means[0])
    assert found["weight"].dims == ("d_model",)


def test_the_first_position_is_left_out_unless_it_is_asked_for() -> None:
    node = store()
    assert int(probe(node, node["label"], kind="lda")["n_example"][0].sum()) == 837 - 93
    assert int(probe(node, node["label"], kind="lda", skip_positions=0)["n_example"][0].sum()) == 837
    assert int(probe(node, node["label"], kind="lda", skip_positions=5)["n_example"][0].sum()) == 93 * 4


@pytest.mark.parametrize("kind", list(KINDS))
def test_tokens_that_are_not_there_do_not_count(kind: str) -> None:
    node = store()
    holes = node.copy(deep=True)
    holes["value"][:, 250:400] = np.nan
    rest = np.ones(837, bool)
    rest[250:400] = False
    label = node["label"].where(xr.DataArray(rest, dims="token"), -1)
    expected = probe(node, label, kind=kind, controls=("shuffle",), validation=[1, 20, 25])
    done = holes.assign_coords(done=("token", rest)).chunk(CHUNKS[0])
    found = probe(done, node["label"], kind=kind, controls=("shuffle",), validation=[1, 20, 25]).compute()
    xr.testing.assert_allclose(found, expected, rtol=1e-5)
    unsaid = probe(holes, node["label"], kind=kind, controls=(), validation=[1, 20, 25, 12])
    xr.testing.assert_allclose(unsaid["weight"], expected["weight"], rtol=1e-5)
    assert unsaid["n_example"].values[0].tolist() == expected["n_example"].values[0].tolist()


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_head_has_a_probe_of_its_own(kind: str) -> None:
    node = store()
    heads = np.random.default_rng(2).normal(size=(N_LAYER, 837, 4, 5)) + node["label"].values[
        :, None, None
    ] * np.arange(4).reshape(-1, 1)
    z = node.drop_vars("value").assign(value=(("layer", "token", "head", "d_head"), heads))
    result = probe(z.chunk(layer=2, token=400, head=3), node["label"], kind=kind).compute()
    assert result["weight"].dims == ("layer", "head", "d_head")
    assert result["n_example"].dims == ("layer", "head", "split")
    for head in range(4):
        alone = probe(z.isel(head=head), node["label"], kind=kind)
        xr.testing.assert_allclose(
            result.isel(head=head, drop=True).drop_vars("n_evaluation", errors="ignore"),
            alone.drop_vars("n_evaluation", errors="ignore"),
            rtol=1e-4,
        )
    scores = apply_probe(z, result)
    assert scores.dims == ("layer", "head", "token")
    by_hand = np.einsum("lthd,lhd->lht", heads, result["weight"]) + result["bias"].values[..., None]
    close(scores, by_hand, 1e-6)
    close(apply_probe(z.chunk({"token": 100}), result.isel(head=2)), by_hand[:, 2], 1e-6)


def counted_reads(node: xr.Dataset, chunk: int) -> tuple[xr.Dataset, list[tuple[int, int]]]:
    """The node with a lazy `value` that keeps a record of the chunks that are read, layer and token."""
    held = node["value"].values
    read: list[tuple[int, int]] = []

    def load(block_info: Any = None) -> NDArray[Any]:
        (layer, _), (start, stop), _ = block_info[None]["array-location"]
        read.append((layer, start))
        return np.asarray(held[layer : layer + 1, start:stop])

    chunks = ((1,) * N_LAYER, (chunk,) * (837 // chunk) + ((837 % chunk,) if 837 % chunk else ()), (WIDTH,))
    lazy = da.map_blocks(load, chunks=chunks, dtype=held.dtype, meta=np.empty((0, 0, 0), held.dtype))
    return node.assign(value=(("layer", "token", "d_model"), lazy)), read


@pytest.mark.parametrize("kind", ["mass_mean", "lda", "ridge"])
def test_lazy_kinds_read_nothing_when_called_and_the_store_twice_when_computed(kind: str) -> None:
    node, read = counted_reads(store(), 100)
    with dask.config.set(scheduler=raises):
        result = probe(node, node["label"], kind=kind)
        scores = apply_probe(node, result)
    assert all(result[name].chunks is not None for name in ("weight", "bias", "n_example", "selectivity"))
    assert not read
    with dask.config.set(scheduler="synchronous"):
        result.compute()
        assert sorted(read) == sorted([(layer, 100 * i) for layer in range(N_LAYER) for i in range(9)] * 2)
        first = read[:27]
        assert len(set(first)) == 27  # scores wait for the fit: nothing is read again before everything is read once
        read.clear()
        result["weight"].compute()
        assert len(read) == 27
        close(scores, apply_probe(store(), probe(store(), node["label"], kind=kind)), 1e-5)


def test_chunks_are_let_go_between_the_two_passes() -> None:
    node = store()
    held = node["value"].values
    alive: set[int] = set()
    most = []

    class Chunk(np.ndarray[Any, Any]):
        """An array that can be referred to weakly."""

    def load(block_info: Any = None) -> NDArray[Any]:
        (layer, _), (start, stop), _ = block_info[None]["array-location"]
        found = held[layer : layer + 1, start:stop].copy().view(Chunk)
        number = len(most)
        alive.add(number)
        weakref.finalize(found, alive.discard, number)
        most.append(len(alive))
        return found

    chunks = ((1,) * N_LAYER, (27,) * 31, (WIDTH,))
    lazy = da.map_blocks(load, chunks=chunks, dtype=held.dtype, meta=np.empty((0, 0, 0), held.dtype))
    node = node.assign(value=(("layer", "token", "d_model"), lazy))
    with dask.config.set(scheduler="synchronous"):
        result = probe(node, node["label"], kind="ridge").compute()
    assert len(most) == 93 + 3 * int((~result["held_out"]).sum())
    assert max(most) <= 12


def test_logistic_reads_the_store_once_in_memory_and_otherwise_as_often_as_it_says() -> None:
    node, read = counted_reads(store(), 100)
    label = node["label"].where(~((node["document"] >= 8) & (node["document"] < 12)), -1)
    held = probe(node, label)
    assert sorted(read) == sorted((layer, 100 * i) for layer in range(N_LAYER) for i in range(9))
    read.clear()
    streamed = probe(node, label, max_bytes=0, validation=held["document"].values[held["held_out"].values])
    train = {int(t) // 100 for t in np.flatnonzero(splits(node, held)[0])}
    assert len(train) == 9
    for layer in range(N_LAYER):
        n_read = sum(1 for at, _ in read if at == layer)
        assert n_read == 9 * (2 + int(streamed["n_evaluation"][layer]))
    xr.testing.assert_allclose(
        streamed.drop_vars("n_evaluation"), held.drop_vars("n_evaluation").assign_attrs(streamed.attrs), rtol=1e-4
    )


def test_chunks_without_examples_are_not_read() -> None:
    node, read = counted_reads(store(), 100)
    label = node["label"].where(node["document"] > 22, -1)
    probe(node, label, kind="lda").compute()
    assert {start for _, start in read} == {600, 700, 800}


def test_a_layer_beyond_which_nothing_converges_is_said() -> None:
    node = store(noise=0.01)
    with pytest.warns(RuntimeWarning, match="did not converge in 2 steps"):
        result = probe(node, node["label"], C=1e6, max_iter=2, controls=())
    assert not result["converged"].any()


def test_selectivity_is_what_the_labels_have_above_the_control_labels() -> None:
    node = store(noise=1.0)
    result = probe(node, node["label"], kind="lda", n_bootstrap=200)
    assert result["control"].values.tolist() == ["token_type", "shuffle"]
    xr.testing.assert_allclose(
        result["selectivity"], (result["accuracy"] - result["control_accuracy"]).transpose(*result["selectivity"].dims)
    )
    ridge = probe(node, node["label"], kind="ridge", alpha=(1.0, 9.0))
    xr.testing.assert_allclose(
        ridge["selectivity"].transpose(*(ridge["r2"] - ridge["control_r2"]).dims), ridge["r2"] - ridge["control_r2"]
    )
    last = result["selectivity"].isel(layer=-1).sel(split="validation", control="shuffle")
    low, high = (
        float(result[f"selectivity_{end}"].isel(layer=-1).sel(split="validation", control="shuffle"))
        for end in ("low", "high")
    )
    assert 0 < low < float(last) < high


@pytest.mark.parametrize("kind", ["logistic", "lda", "ridge"])
def test_a_probe_that_knows_token_types_learns_their_control_labels_and_not_shuffled_ones(kind: str) -> None:
    node = store()
    one_hot = np.eye(N_TYPE)[node["token_id"].values]
    one_hot = one_hot + 0.01 * np.random.default_rng(0).normal(size=one_hot.shape)
    node = node.drop_vars("value").assign(value=(("token", "d_model"), one_hot))
    result = probe(node, xr.DataArray(node["token_id"].values % 2, dims="token"), kind=kind, alpha=0.01)
    main = "r2" if kind == "ridge" else "accuracy"
    found = result[f"control_{main}"].sel(split="validation")
    assert float(result[main].sel(split="validation")) > 0.97
    assert float(found.sel(control="token_type")) > 0.97
    assert float(found.sel(control="shuffle")) < 0.65


def test_a_probe_is_kept_with_its_settings_and_applied_to_other_tokens(tmp_path: Path) -> None:
    node = store(3)
    result = probe(node, node["label"], kind="lda", controls=("shuffle",))
    result.to_zarr(tmp_path / "probe.zarr", consolidated=False)
    kept = xr.open_zarr(tmp_path / "probe.zarr", consolidated=False)
    assert kept.attrs == result.attrs
    other = store(3, seed=8)
    expected = by_hand(other, result)
    lazy = apply_probe(other.chunk(CHUNKS[0]), kept)
    assert lazy.chunks is not None
    assert lazy.dims == ("layer", "class", "token")
    assert lazy.dtype == np.float32
    close(lazy, expected.transpose(0, 2, 1), 1e-5)
    close(lazy.sel(document=7), expected.transpose(0, 2, 1)[..., 7 * 27 : 8 * 27], 1e-5)
    one = apply_probe(other, result.sel(layer=5))
    assert one.dims == ("class", "token")
    close(one, expected[1].T, 1e-5)
    two = apply_probe(other, result.sel(layer=[11, 2]))
    close(two, expected[[2, 0]].transpose(0, 2, 1), 1e-5)


def test_probes_are_refused_activations_that_do_not_fit() -> None:
    node = store()
    result = probe(node, node["label"], kind="mass_mean")
    with pytest.raises(SchemaError, match=re.escape("layer [2, 5]")):
        apply_probe(node.sel(layer=[11]), result)
    with pytest.raises(SchemaError, match="d_model 7, the activations 6"):
        apply_probe(node.isel(d_model=slice(6)), result)
    with pytest.raises(SchemaError, match="give what `probe` found"):
        apply_probe(node, node)


def refusals() -> dict[str, tuple[Callable[[xr.Dataset], Any], str]]:
    one = xr.DataArray(np.ones(837, int), dims="token")
    rare = xr.DataArray(np.where(np.arange(837) == 30, 2, np.arange(837) % 2), dims="token")
    return {
        "kind": (lambda n: probe(n, n["label"], kind="logistics"), "Did you mean 'logistic'"),
        "control": (lambda n: probe(n, n["label"], controls=("shuffled",)), "one of token_type, shuffle"),
        "C": (lambda n: probe(n, n["label"], C=0), "above 0"),
        "alpha": (lambda n: probe(n, n["label"], kind="ridge", alpha=-1), "at least 0"),
        "confidence": (lambda n: probe(n, n["label"], confidence=95), "between 0 and 1"),
        "validation": (lambda n: probe(n, n["label"], validation=1.0), "between 0 and 1"),
        "skip": (lambda n: probe(n, n["label"], skip_positions=-1), "at least 0"),
        "one class": (lambda n: probe(n, one), "one class"),
        "a split without a class": (lambda n: probe(n, rare), "no example of class 2"),
        "numbers": (lambda n: probe(n, n["label"] + 0.5), 'kind="ridge"'),
        "too many": (lambda n: probe(n, xr.DataArray(np.arange(837), dims="token")), "at most 256"),
        "other tokens": (lambda n: probe(n, n["label"][1:]), "836 labels for 837 tokens"),
        "moved tokens": (lambda n: probe(n.isel(token=slice(1, 100)), n["label"][:99]), "select the same tokens"),
        "labels of layers": (lambda n: probe(n, n["layer"]), "along token, sequence or document"),
        "words": (lambda n: probe(n, n["label"].astype(str)), "booleans, integers or floats"),
        "one document": (lambda n: probe(n.sel(document=3), n["label"].sel(document=3)), "1 documents"),
        "none held out": (lambda n: probe(n, n["label"], validation=[]), "0 are held out"),
        "unknown held out": (lambda n: probe(n, n["label"], validation=[1, 999]), "documents [999] are to be held out"),
        "infinite": (lambda n: probe(n, n["label"] / (n["label"] < 1), kind="ridge"), "labels are infinite"),
        "types": (lambda n: probe(n.assign_coords(token_id=n["token_id"] * 0), n["label"]), "1 token types"),
        "no documents": (lambda n: probe(n.drop_vars(["document", "sequence", "position"]), n["label"]), "document"),
        "no vectors": (lambda n: probe(n.drop_vars("value"), n["label"]), "value"),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_what_cannot_be_fitted_is_refused_before_anything_is_read(name: str) -> None:
    ask, said = refusals()[name]
    node, read = counted_reads(store(), 100)
    node = node.assign(label=node["label"].reset_coords(drop=True)) if name == "other tokens" else node
    with dask.config.set(scheduler=raises), pytest.raises(SchemaError, match=re.escape(said)):
        ask(node)
    assert not read


def test_a_finished_run_is_probed_like_its_values_in_memory(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(capture={"hooks": ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z"], "unit_tokens": 192})
    assert forebay.run(recipe, tmp_path / "run").code == 0
    run = forebay.open_run(tmp_path / "run")
    is_even = run["tokens"]["token_id"] % 2 == 0
    for name, kind in (("hook_resid_post", "logistic"), ("attn.hook_z", "lda")):
        node = run[f"activations/{name}"]
        assert node["value"].chunks is not None
        lazy = probe(node, is_even, kind=kind, validation=0.4).compute()
        loaded = probe(node.to_dataset().load(), is_even.load(), kind=kind, validation=0.4)
        xr.testing.assert_allclose(lazy, loaded, rtol=1e-5)
        xr.testing.assert_allclose(apply_probe(node, lazy), apply_probe(node.to_dataset().load(), loaded), rtol=1e-4)


def test_captures_of_one_forward_are_probed_by_their_sequences(tiny_model: Path) -> None:
    model = forebay.load_model(tiny_model)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 300, size=size).tolist() for size in rng.integers(3, 12, size=24)]
    run = as_run(model.forward(sequences, forebay.HookSpec().capture("blocks.*.hook_resid_post")))
    label = xr.DataArray(np.array([ids[-1] >= 150 for ids in sequences]), dims="sequence")
    result = probe(run["activations/hook_resid_post"], label, kind="mass_mean", position=-1, controls=("shuffle",))
    assert result["n_example"].values[0].sum() == 24
    captured = run["activations/hook_resid_post"]["value"].values
    last = captured[:, np.cumsum([len(ids) for ids in sequences]) - 1]
    train = ~result["held_out"].values
    close(result["weight"], last[:, train & label.values].mean(1) - last[:, train & ~label.values].mean(1), 1e-5)
