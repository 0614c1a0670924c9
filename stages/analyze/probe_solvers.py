"""The weights of linear probes over rows [entry…, example, width]: closed forms from one pass, and logistic regression.

Mass-mean probes: Marks and Tegmark 2023, "The Geometry of Truth", section 5; ridge and linear discriminant analysis:
Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", sections 3.4.1 and 4.3. A solution is
[entry…, set, column, 1 + width], float64: bias and weights on rows as they are, whatever was standardised to find them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.base import compute
from dask.delayed import delayed
from numpy.typing import NDArray

from .moments import ROWS_AT_ONCE, Packed, merged_moments, packed_moments, reduce_tokens

Floats = NDArray[np.float64]

TOLERANCE = 1e-6
"""The largest element that the gradient of the mean loss may have at the end, per unit of curvature."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How many sets of labels there are, and classes in each; 0 classes where labels are numbers."""

    n_set: int
    n_class: int

    @property
    def n_score(self) -> int:
        """Numbers that a probe gives of an example: one of two classes or of a regression, otherwise one a class."""
        return self.n_class if self.n_class > 2 else 1

    @property
    def n_coded(self) -> int:
        """Columns that `coded` gives."""
        return self.n_set * max(self.n_class, 1)

    def coded(self, labels: NDArray[Any]) -> Floats:
        """Labels [set, example] as columns [example, set × class], 1 where an example is of the class; as numbers
        [example, set] in a regression.
        """
        if not self.n_class:
            return labels.T.astype(np.float64)
        belongs = np.moveaxis(labels[..., None] == np.arange(self.n_class), 1, 0)
        return np.asarray(belongs.reshape(labels.shape[1], -1), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """How weights are found: `kind`, the inverse strength of logistic regression `C` and the strengths `alpha` of
    ridge, both as scikit-learn has them, and whether rows are standardised first.
    """

    kind: str
    C: float
    alpha: tuple[float, ...]
    standardize: bool
    max_iter: int

    @property
    def n_column(self) -> int:
        return len(self.alpha) if self.kind == "ridge" else 1


def closed_form(rows: da.Array, labels: NDArray[Any], coding: Coding, solver: Solver) -> Any:
    """The solution of ridge, mass-mean or LDA, lazily: one pass over the rows, exact to rounding in float64.

    Memory: a chunk a thread, and of every entry and chunk being merged (1 + width + sets × classes)² numbers, but of
    mass-mean sets × classes × (1 + width).
    """
    width, lead = rows.shape[-1], rows.ndim - 2
    solve: Callable[[Packed], Floats]
    if solver.kind == "mass_mean":
        shape = (coding.n_coded, 1 + width)
        packed = _reduced(partial(_class_means, coding), _merged_means, rows, labels, shape)
        solve = partial(_mass_mean, coding)
    else:
        packed = _joint_moments(rows, labels, coding)
        solve = partial({"ridge": _ridge, "lda": _lda}[solver.kind], width=width, coding=coding, solver=solver)
    solved = (coding.n_set, solver.n_column * coding.n_score, 1 + width)
    return packed.map_blocks(
        partial(_each, solve=solve, lead=lead, shape=solved),
        drop_axis=list(range(lead, packed.ndim)),
        new_axis=list(range(lead, lead + 3)),
        chunks=(*packed.chunks[:lead], *((size,) for size in solved)),
        dtype=np.float64,
        meta=np.empty((0,) * (lead + 3)),
    )


def _each(packed: Packed, solve: Callable[[Packed], Floats], lead: int, shape: tuple[int, ...]) -> Floats:
    """Solutions of every entry; NaN where an entry has no rows, or none of a class, or values that are not finite."""
    found = np.full((*packed.shape[:lead], *shape), np.nan)
    for place in np.ndindex(*packed.shape[:lead]):
        if np.isfinite(packed[place]).all():
            with np.errstate(divide="ignore", invalid="ignore"):
                found[place] = solve(packed[place])
    return found


def _joint_moments(rows: da.Array, labels: NDArray[Any], coding: Coding) -> Any:
    """Moments, packed, of rows with their coded labels beside them."""
    size = 1 + rows.shape[-1] + coding.n_coded
    return _reduced(partial(_moments, coding), merged_moments, rows, labels, (size, size))


def _reduced(
    state: Callable[..., Packed],
    merge: Callable[[Packed, Packed], Packed],
    rows: da.Array,
    labels: NDArray[Any],
    shape: tuple[int, int],
) -> Any:
    lead = [f"entry_{axis}" for axis in range(rows.ndim - 2)]
    of_token = [xr.DataArray(of_set, dims="token") for of_set in labels]
    return reduce_tokens(state, merge, xr.DataArray(rows, dims=(*lead, "token", "width")), of_token, shape=shape)


def _moments(coding: Coding, rows: NDArray[Any], *labels: NDArray[Any]) -> Packed:
    of_set = np.stack(labels)
    found = []
    for first in range(0, rows.shape[-2], ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        part, coded = rows[..., some, :].astype(np.float64), coding.coded(of_set[:, some])
        coded = np.broadcast_to(coded, (*part.shape[:-1], coding.n_coded))
        found.append(packed_moments(np.concatenate([part, coded], -1)))
    return reduce(merged_moments, found)


def _class_means(coding: Coding, rows: NDArray[Any], *labels: NDArray[Any]) -> Floats:
    """How many rows a class has, and their mean: [entry…, set × class, 1 + width]."""
    of_set = np.stack(labels)
    found = np.zeros((*rows.shape[:-2], coding.n_coded, 1 + rows.shape[-1]))
    for place in np.ndindex(*rows.shape[:-2]):
        for first in range(0, rows.shape[-2], ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            part = rows[place][some].astype(np.float64)
            kept = np.isfinite(part).all(-1)
            coded = coding.coded(of_set[:, some])[kept]
            count = coded.sum(0)[:, None]
            mean = np.divide(coded.T @ part[kept], count, out=np.zeros((len(count), part.shape[1])), where=count > 0)
            found[place] = _merged_means(found[place], np.hstack([count, mean]))
    return found


def _merged_means(a: Floats, b: Floats) -> Floats:
    n = a[..., :1] + b[..., :1]
    share = np.divide(b[..., :1], n, out=np.zeros_like(n), where=n > 0)
    return np.concatenate([n, a[..., 1:] + (b[..., 1:] - a[..., 1:]) * share], -1)


def _discriminants(means: Floats, centre: Floats, precision: Floats | None, prior: Floats) -> Floats:
    """Linear discriminants [score, 1 + width] of classes with means [class, width] and one inverse covariance, or
    that of rows without correlation, all of variance 1.
    """
    off = means - centre
    weight = off if precision is None else off @ precision
    bias = np.log(prior) - (weight * (off / 2 + centre)).sum(-1)
    found = np.column_stack([bias, weight])
    return found[1:] - found[:1] if len(found) == 2 else found


def _mass_mean(coding: Coding, means: Floats) -> Floats:
    found = []
    for of_set in means.reshape(coding.n_set, coding.n_class, -1):
        share = of_set[:, 0] / of_set[:, 0].sum()
        if not share.all():
            return np.full((coding.n_set, coding.n_score, means.shape[-1]), np.nan)
        equal = np.full(len(of_set), 1 / len(of_set))
        found.append(_discriminants(of_set[:, 1:], share @ of_set[:, 1:], None, equal))
    return np.stack(found)


def _lda(packed: Packed, width: int, coding: Coding, solver: Solver) -> Floats:
    n, mean, scatter = packed[0, 0], packed[0, 1:], packed[1:, 1:]
    found = []
    for one in range(coding.n_set):
        coded = slice(width + one * coding.n_class, width + (one + 1) * coding.n_class)
        prior = mean[coded]
        if not prior.all():
            return np.full((coding.n_set, coding.n_score, 1 + width), np.nan)
        off = scatter[:width, coded].T / (n * prior)[:, None]
        within = scatter[:width, :width] / n - (off.T * prior) @ off
        scale = standard_deviation(within.diagonal(), mean[:width], n)
        values, vectors = np.linalg.eigh(within / scale / scale[:, None])
        whiten = vectors / scale[:, None] * np.sqrt(_inverse(values))
        found.append(_discriminants(off + mean[:width], mean[:width], whiten @ whiten.T, prior))
    return np.stack(found)


def _ridge(packed: Packed, width: int, coding: Coding, solver: Solver) -> Floats:
    """Weights [set, alpha, 1 + width] that minimise Σ(y − ŷ)² + α‖w‖², from one eigendecomposition for all."""
    n, mean, scatter = packed[0, 0], packed[0, 1:], packed[1:, 1:]
    scale = standard_deviation(scatter.diagonal()[:width] / n, mean[:width], n)
    scale = scale if solver.standardize else np.ones(width)
    values, vectors = np.linalg.eigh(scatter[:width, :width] / scale / scale[:, None])
    along = vectors.T @ (scatter[:width, width:] / scale[:, None])
    shrunk = _inverse(values + np.array(solver.alpha)[:, None])
    weight = np.einsum("wv,av,vs->saw", vectors, shrunk, along, optimize=True) / scale
    bias = mean[width:, None] - weight @ mean[:width]
    return np.concatenate([bias[..., None], weight], -1)


def standard_deviation(variance: Floats, mean: Floats, n: float | Floats) -> Floats:
    """The square root of a variance, but infinity, so that it has no weight, where a column is constant to rounding, as
    scikit-learn's StandardScaler defines that.
    """
    epsilon = np.finfo(np.float64).eps
    constant = variance <= n * epsilon * variance + (n * mean * epsilon) ** 2
    return np.where(constant, np.inf, np.sqrt(np.where(constant, 1.0, variance)))


def _inverse(values: Floats) -> Floats:
    """Of eigenvalues […, width], 0 for those that are 0 to rounding."""
    least = values.shape[-1] * np.finfo(np.float64).eps * np.abs(values).max(-1, keepdims=True)
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > least)


@dataclass(frozen=True, slots=True)
class Logistic:
    """What logistic regression found: the `solution`, which entries are `converged` [entry…], and how many times the
    loss and its gradient were computed.
    """

    solution: Floats
    converged: NDArray[np.bool_]
    n_evaluation: int


def logistic(rows: da.Array, labels: NDArray[Any], coding: Coding, solver: Solver) -> Logistic:
    """Logistic regression of every entry, computed at once: like scikit-learn's, it minimises C Σ loss + ‖w‖²/2 over
    standardised rows, softmax where there are more than two classes, intercepts free.

    By L-BFGS on gradients summed over chunks, in coordinates in which the curvature at the start (after Böhning 1992,
    "Multinomial logistic regression algorithm") is the identity, so that it takes tens of steps and not hundreds.
    Reads the rows 1 + `n_evaluation` times. Memory: width² numbers of every entry, and a chunk a thread.
    """
    from scipy.optimize import minimize

    size = 1 + rows.shape[-1] + coding.n_coded
    moments = _joint_moments(rows, labels, coding).compute().reshape(-1, size, size)
    loss = _Loss(list(_parts(rows, labels)), moments, coding, solver)
    options = {"maxiter": solver.max_iter, "gtol": TOLERANCE, "ftol": 0.0, "maxcor": 20}
    found = minimize(loss, loss.start().ravel(), jac=True, method="L-BFGS-B", options=options)
    steep = np.abs(found.jac.reshape(loss.shape)).max((1, 2, 3))
    lead = rows.shape[:-2]
    return Logistic(
        loss.solution(found.x).reshape(*lead, *loss.shape[1:]),
        (loss.possible & (steep <= 10 * TOLERANCE)).reshape(lead),
        loss.n_evaluation,
    )


def _parts(rows: da.Array, labels: NDArray[Any]) -> Iterator[tuple[Any, NDArray[Any]]]:
    """Chunks [entry, example, width], still delayed, each with its labels."""
    last = rows.rechunk(dict.fromkeys(range(rows.ndim - 2), -1)).reshape(-1, *rows.shape[-2:]).rechunk({0: -1})
    stops = np.cumsum(last.chunks[1])
    return zip(last.to_delayed().ravel(), np.split(labels, stops[:-1], axis=1), strict=True)


class _Loss:
    """The mean loss of all entries together, each by itself, in coordinates that make it round about the start.

    Of weights w on standardised rows, with R = V Λ Vᵀ their correlations and p the share of a class, the coordinates
    are (p (1 − p) Λ + 1/nC)^½ Vᵀ w.
    """

    def __init__(self, parts: list[tuple[Any, NDArray[Any]]], moments: Packed, coding: Coding, solver: Solver) -> None:
        self._parts, self._coding, self.n_evaluation = parts, coding, 0
        n_coded = coding.n_coded
        share = moments[:, 0, -n_coded:].reshape(len(moments), coding.n_set, -1)
        self.possible: NDArray[np.bool_] = np.isfinite(moments).all((1, 2)) & np.all(share > 0, axis=(1, 2))
        moments = np.where(self.possible[:, None, None], moments, 1.0)
        self._n, self._mean = moments[:, 0, 0], moments[:, 0, 1:-n_coded]
        covariance = moments[:, 1:-n_coded, 1:-n_coded] / self._n[:, None, None]
        variance = covariance.diagonal(axis1=1, axis2=2)
        self._scale = np.ones_like(self._mean)
        if solver.standardize:
            self._scale = standard_deviation(variance, self._mean, self._n[:, None])
        values, self._vectors = np.linalg.eigh(covariance / self._scale[:, None] / self._scale[..., None])
        share = np.where(self.possible[:, None, None], share, 0.5)
        self._share = share[..., 1:] if coding.n_score == 1 else share
        curvature = (self._share * (1 - self._share))[..., None]
        self._penalty = 1 / (solver.C * self._n)
        bent = curvature * np.maximum(values, 0)[:, None, None] + self._penalty[:, None, None, None]
        self._stretch = np.sqrt(np.concatenate([curvature, bent], -1))
        self.shape = self._stretch.shape

    def start(self) -> Floats:
        """Weights of 0, and the bias that gives every class its share."""
        found = np.zeros(self.shape)
        other = 1 - self._share if self._coding.n_score == 1 else 1.0
        found[..., 0] = np.log(self._share / other) * self._stretch[..., 0]
        return found

    def solution(self, at: Floats) -> Floats:
        """Bias and weights on rows as they are."""
        found = self._raw(self._standardized(at))
        if self._coding.n_score > 1:
            found -= found.mean(2, keepdims=True)  # a softmax does not say where 0 is
        return np.where(self.possible[:, None, None, None], found, np.nan)

    def __call__(self, at: Floats) -> tuple[float, Floats]:
        self.n_evaluation += 1
        weights = self._standardized(at)
        raw = delayed(self._raw(weights))
        found = compute(*[delayed(_loss)(part, labels, raw, self.possible) for part, labels in self._parts])
        gradient: Floats = reduce(np.add, (of_part for _, of_part in found)) / self._n[:, None, None, None]
        gradient[..., 1:] -= gradient[..., :1] * self._mean[:, None, None]
        gradient[..., 1:] /= self._scale[:, None, None]
        gradient[..., 1:] += self._penalty[:, None, None, None] * weights[..., 1:]
        squares = (weights[..., 1:] ** 2).sum((1, 2, 3))
        total = (sum(of_part for of_part, _ in found) / self._n + self._penalty * squares / 2)[self.possible].sum()
        gradient[..., 1:] = gradient[..., 1:] @ self._vectors[:, None]
        gradient[~self.possible] = 0.0
        return float(total), (gradient / self._stretch).ravel()

    def _standardized(self, at: Floats) -> Floats:
        found: Floats = at.reshape(self.shape) / self._stretch
        found[..., 1:] = found[..., 1:] @ self._vectors.swapaxes(1, 2)[:, None]
        return found

    def _raw(self, weights: Floats) -> Floats:
        found = weights.copy()
        found[..., 1:] /= self._scale[:, None, None]
        found[..., 0] -= (found[..., 1:] * self._mean[:, None, None]).sum(-1)
        return found


def _loss(rows: NDArray[Any], labels: NDArray[Any], raw: Floats, possible: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Cross-entropy [entry] of rows [entry, example, width], and its gradient [entry, set, score, 1 + width]."""
    total, gradient = np.zeros(len(rows)), np.zeros_like(raw)
    n_set, n_score, packed = raw.shape[1:]
    for entry in np.flatnonzero(possible):
        weight = raw[entry].reshape(-1, packed)
        for first in range(0, rows.shape[1], ROWS_AT_ONCE):
            part = rows[entry, first : first + ROWS_AT_ONCE].astype(np.float64, copy=False)
            with np.errstate(invalid="ignore"):  # infinities, which are left out
                scores = part @ weight[:, 1:].T + weight[:, 0]
            kept = np.isfinite(scores).all(-1)
            label = labels[:, first : first + ROWS_AT_ONCE].T
            if not kept.all():
                part, scores, label = part[kept], scores[kept], label[kept]
            loss, error = _cross_entropy(scores.reshape(-1, n_set, n_score), label)
            error = error.reshape(-1, n_set * n_score)
            total[entry] += loss
            gradient[entry] += np.column_stack([error.sum(0), error.T @ part]).reshape(raw.shape[1:])
    return total, gradient


def _cross_entropy(scores: Floats, label: NDArray[np.int64]) -> tuple[float, Floats]:
    """The sum over examples and sets, and its derivative by scores [example, set, score]; label [example, set]."""
    from scipy.special import expit, log_softmax

    if scores.shape[-1] == 1:
        z = scores[..., 0]
        return float((np.logaddexp(0, z) - label * z).sum()), (expit(z) - label)[..., None]
    log_p = log_softmax(scores, axis=-1)
    of_label = np.take_along_axis(log_p, label[..., None], -1)
    error = np.exp(log_p)
    np.put_along_axis(error, label[..., None], np.take_along_axis(error, label[..., None], -1) - 1, -1)
    return -float(of_label.sum()), error
