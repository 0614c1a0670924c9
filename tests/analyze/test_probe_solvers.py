"""Solvers find what scikit-learn finds on the whole array, however rows are cut and however badly they are scaled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from forebay.stages.analyze.probe_scores import decision, gather, lazy_decision
from forebay.stages.analyze.probe_solvers import Coding, Solver, closed_form, logistic, standard_deviation

N, WIDTH = 613, 5


@pytest.fixture(autouse=True)
def in_this_thread() -> Iterator[None]:
    """Hundreds of tiny chunks gain nothing from threads."""
    with dask.config.set(scheduler="synchronous"):
        yield


def solver(kind: str, **changes: Any) -> Solver:
    return Solver(**({"kind": kind, "C": 1.0, "alpha": (1.0,), "standardize": True, "max_iter": 2000} | changes))


def data(n_class: int, *, n_set: int = 1, apart: float = 1.0, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows [entry, example, width] of two entries and labels [set, example], the second class rarer than the first."""
    rng = np.random.default_rng(seed)
    share = 1.0 / np.arange(1, n_class + 1)
    labels = rng.choice(n_class, size=(n_set, N), p=share / share.sum())
    away = apart * rng.normal(size=(2, n_class, WIDTH))
    return away[:, labels[0]] + rng.normal(size=(2, N, WIDTH)), labels


def lazily(rows: NDArray[Any], size: int) -> da.Array:
    return da.from_array(rows, chunks=(1, size, 2)).rechunk({2: -1})


def refit(x: NDArray[Any], y: NDArray[Any], C: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """scikit-learn's weights on rows as they are, of standardised ones."""
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(scaler.transform(x), y)
    weight = oracle.coef_ / scaler.scale_
    return np.column_stack([oracle.intercept_ - weight @ scaler.mean_, weight]), oracle.intercept_


@pytest.mark.parametrize("size", [50, N])
@pytest.mark.parametrize(("n_class", "C"), [(2, 1.0), (2, 1e-4), (2, 1e3), (3, 1.0), (6, 0.01)])
def test_logistic_regression_is_scikit_learns_at_every_strength(n_class: int, C: float, size: int) -> None:
    rows, labels = data(n_class)
    found = logistic(lazily(rows, size), labels, Coding(1, n_class), solver("logistic", C=C))
    assert found.converged.all()
    for entry in range(2):
        expected, _ = refit(rows[entry], labels[0], C)
        expected = expected - expected.mean(0) if n_class > 2 else expected
        np.testing.assert_allclose(found.solution[entry, 0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("n_class", [2, 3])
def test_sets_of_labels_are_fitted_together_as_each_alone(n_class: int) -> None:
    rows, labels = data(n_class, n_set=3)
    whole = lazily(rows, N)
    together = logistic(whole, labels, Coding(3, n_class), solver("logistic"))
    assert together.solution.shape == (2, 3, n_class if n_class > 2 else 1, 1 + WIDTH)
    for one in range(3):
        alone = logistic(whole, labels[one : one + 1], Coding(1, n_class), solver("logistic"))
        np.testing.assert_allclose(together.solution[:, one], alone.solution[:, 0], rtol=1e-3, atol=1e-5)


def test_separable_classes_have_the_finite_weights_of_the_penalty() -> None:
    rows, labels = data(2, apart=30.0)
    found = logistic(lazily(rows, N), labels, Coding(1, 2), solver("logistic"))
    assert found.converged.all()
    for entry in range(2):
        expected, _ = refit(rows[entry], labels[0], 1.0)
        np.testing.assert_allclose(found.solution[entry, 0], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert (
            ((rows[entry] @ found.solution[entry, 0, 0, 1:] + found.solution[entry, 0, 0, 0]) > 0) == labels[0]
        ).all()


def test_rows_of_massive_means_and_wild_scales_are_no_harder() -> None:
    """As a residual stream has them: a mean of thousands of standard deviations, and scales six decades apart."""
    rows, labels = data(2)
    wild = rows * np.geomspace(1e-3, 1e3, WIDTH) + np.array([0.0, 3000, -1e5, 7, 1e6])
    plain = logistic(lazily(rows, N), labels, Coding(1, 2), solver("logistic"))
    found = logistic(lazily(wild, N), labels, Coding(1, 2), solver("logistic"))
    assert found.n_evaluation <= plain.n_evaluation + 2
    for kind in ("lda", "ridge"):
        expected, scaled = (
            decision(
                some, closed_form(lazily(some, 90), labels, Coding(1, 2 * (kind == "lda")), solver(kind)).compute()
            )
            for some in (rows, wild)
        )
        np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decision(wild, found.solution), decision(rows, plain.solution), rtol=1e-5, atol=1e-5)


def test_correlated_rows_take_tens_of_evaluations_and_not_hundreds() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(1, 2000, 60)) @ np.diag(np.geomspace(1, 1e-3, 60)) @ rng.normal(size=(60, 60))
    labels = (rows[0] @ rng.normal(size=60) + rng.normal(size=2000) > 0).astype(int)[None]
    found = logistic(da.from_array(rows), labels, Coding(1, 2), solver("logistic"))
    assert found.converged.all()
    assert found.n_evaluation < 60
    expected, _ = refit(rows[0], labels[0], 1.0)
    np.testing.assert_allclose(
        decision(rows, found.solution)[0, :, 0, 0], rows[0] @ expected[0, 1:] + expected[0, 0], atol=2e-3
    )


def test_an_evaluation_more_is_a_pass_more_and_too_few_steps_are_said() -> None:
    rows, labels = data(2)
    read = []

    def load(block: NDArray[Any]) -> NDArray[Any]:
        read.append(block.shape)
        return block

    counted = lazily(rows, 100).map_blocks(load, dtype=float, meta=np.empty((0, 0, 0)))
    found = logistic(counted, labels, Coding(1, 2), solver("logistic"))
    assert len(read) == 2 * 7 * (1 + found.n_evaluation)
    hasty = logistic(lazily(rows, 100), labels, Coding(1, 2), solver("logistic", max_iter=1, C=1e5))
    assert not hasty.converged.any()


@pytest.mark.parametrize("kind", ["logistic", "lda", "mass_mean"])
def test_an_entry_without_a_class_or_without_rows_is_nan_and_leaves_the_others_alone(kind: str) -> None:
    rows, labels = data(3)

    def solved(some: NDArray[Any]) -> Any:
        if kind == "logistic":
            return logistic(lazily(some, 100), labels, Coding(1, 3), solver(kind)).solution
        return closed_form(lazily(some, 100), labels, Coding(1, 3), solver(kind)).compute()

    expected = solved(rows)
    for spoilt in (np.where(labels[0, :, None] == 2, np.nan, rows[1]), np.full_like(rows[1], np.nan)):
        found = solved(np.stack([rows[0], spoilt]))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-6)
        assert np.isnan(found[1]).all()


def test_a_constant_column_has_no_weight_in_ridge_and_logistic_regression() -> None:
    rows, labels = data(2)
    rows[:, :, 3] = 123.456
    ridge = closed_form(lazily(rows, 50), labels * 1.5, Coding(1, 0), solver("ridge", alpha=(2.0,))).compute()
    found = logistic(lazily(rows, N), labels, Coding(1, 2), solver("logistic")).solution
    for entry in range(2):
        oracle = make_pipeline(StandardScaler(), Ridge(alpha=2.0)).fit(rows[entry], labels[0] * 1.5)
        np.testing.assert_allclose(ridge[entry, 0, 0, 1:], oracle[1].coef_ / oracle[0].scale_, atol=1e-10)
        expected, _ = refit(rows[entry], labels[0], 1.0)
        np.testing.assert_allclose(found[entry, 0, 0], expected[0], rtol=1e-4, atol=1e-5)
    assert standard_deviation(np.array([0.0, 4.0]), np.array([5.0, 5.0]), 10).tolist() == [np.inf, 2.0]


def test_lda_with_more_dimensions_than_examples_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(2)
    rows, labels = rng.normal(size=(1, 12, 30)), np.arange(12)[None] % 2
    found = closed_form(da.from_array(rows), labels, Coding(1, 2), solver("lda")).compute()
    within = rows[0] - np.stack([rows[0][labels[0] == c].mean(0) for c in (0, 1)])[labels[0]]
    scale = within.std(0)
    precision = np.linalg.pinv((within / scale).T @ (within / scale) / 12, hermitian=True) / scale / scale[:, None]
    away = rows[0][labels[0] == 1].mean(0) - rows[0][labels[0] == 0].mean(0)
    np.testing.assert_allclose(found[0, 0, 0, 1:], precision @ away, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1, 50, N])
def test_closed_forms_are_the_same_however_the_rows_are_cut(size: int) -> None:
    rows, labels = data(3, n_set=2)
    size = 40 if size == 1 else size
    lda = closed_form(lazily(rows, size), labels, Coding(2, 3), solver("lda")).compute()
    ridge = closed_form(lazily(rows, size), labels, Coding(2, 0), solver("ridge", alpha=(0.0, 5.0))).compute()
    for entry in range(2):
        for one in range(2):
            oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(rows[entry], labels[one])
            found = lda[entry, one]
            np.testing.assert_allclose(found[:, 1:] - found[0, 1:], oracle.coef_ - oracle.coef_[0], atol=1e-8)
            np.testing.assert_allclose(found[:, 0] - found[0, 0], oracle.intercept_ - oracle.intercept_[0], atol=1e-8)
            x = np.column_stack([np.ones(N), rows[entry]])
            least = np.linalg.lstsq(x, labels[one], rcond=None)[0]
            np.testing.assert_allclose(ridge[entry, one, 0], least, atol=1e-9)
            shrunk = make_pipeline(StandardScaler(), Ridge(alpha=5.0)).fit(rows[entry], labels[one])
            np.testing.assert_allclose(
                rows[entry] @ ridge[entry, one, 1, 1:] + ridge[entry, one, 1, 0], shrunk.predict(rows[entry]), atol=1e-9
            )


def test_gather_keeps_the_rows_chosen_and_reads_no_chunk_without_one() -> None:
    rows, _ = data(2)
    read = []

    def load(block: NDArray[Any], block_info: Any = None) -> NDArray[Any]:
        read.append(block_info[0]["array-location"][1])
        return block

    chosen = np.zeros(N, bool)
    chosen[[3, 4, 120, 240, 241, 612]] = True
    counted = lazily(rows, 60).map_blocks(load, dtype=float, meta=np.empty((0, 0, 0)))
    found = gather(counted, chosen)
    assert found.chunks[1] == (2, 1, 2, 1)
    np.testing.assert_array_equal(found.compute(), rows[:, chosen])
    assert sorted({start for start, _ in read}) == [0, 120, 240, 600]


def test_decisions_are_the_same_lazily_and_in_half_precision_rows_are_widened_first() -> None:
    rows, _ = data(2)
    solution = np.random.default_rng(1).normal(size=(2, 3, 2, 1 + WIDTH))
    half = rows.astype(np.float16)
    expected = np.einsum("etw,escw->etsc", half.astype(np.float64), solution[..., 1:]) + solution[:, None, ..., 0]
    np.testing.assert_allclose(decision(half, solution), expected, rtol=1e-12, atol=1e-12)
    found = lazy_decision(lazily(half, 70), da.from_array(solution))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.compute(), expected, rtol=1e-12, atol=1e-12)
