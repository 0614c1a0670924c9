"""How well probes predict: accuracy, balanced accuracy, AUC and R², with intervals, and selectivity over controls.

The tokens of a document depend on each other, so that intervals come from a bootstrap of whole documents (Field and
Welsh 2007, "Bootstrapping clustered data"); accuracy has Wilson's interval (1927) besides, as of independent examples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from .moments import ROWS_AT_ONCE

Floats = NDArray[np.float64]

SPLITS = ("train", "validation")
N_BINS = 256
"""Ranks are kept in so many bins of equal count where documents are drawn again, never for an AUC itself."""
DRAWN_AT_ONCE = 2**21
"""Documents drawn at a time: 16 MiB of numbers, of which about three are in memory together."""
MAX_TRIALS = 100

_ACCURACY = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_wilson_low", "accuracy_wilson_high")
_BALANCED = ("balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high")
_AUC = ("auc", "auc_low", "auc_high")
_R2 = ("r2", "r2_low", "r2_high")
_LONG_NAMES = {"auc": "area under the ROC curve", "r2": "R²", "n": "number of", "example": "examples"}
_SELECTIVITY = ("selectivity", "selectivity_low", "selectivity_high")


def rows_of(value: xr.DataArray, chosen: NDArray[np.bool_]) -> Any:
    """Rows [entry…, example, width] of the tokens chosen, in chunks; in memory each entry is one."""
    width = value.dims[-1]
    kept = [dim for dim in value.dims if dim not in ("token", width)]
    ordered = value.transpose(*kept, "token", width)
    if ordered.chunks is not None:
        return gather(ordered.data, chosen)
    held = ordered.values[..., chosen, :]
    return da.from_array(held, chunks=(*(1,) * len(kept), -1, -1), name=False)


def gather(rows: da.Array, chosen: NDArray[np.bool_]) -> Any:
    """Rows [entry…, token, width] of the tokens chosen [token], chunk by chunk; a chunk of none is not read."""
    axis = rows.ndim - 2
    rows = rows.rechunk({axis + 1: -1})
    stops = np.cumsum(rows.chunks[axis])
    n_chosen = [int(part.sum()) for part in np.split(chosen, stops[:-1])]
    kept = [i for i, n in enumerate(n_chosen) if n]
    index = tuple(range(rows.ndim))
    return da.blockwise(
        partial(_taken, axis=axis),
        index,
        rows.blocks[(*(slice(None),) * axis, kept)],
        index,
        da.from_array(chosen, chunks=(rows.chunks[axis],), name=False).blocks[kept],
        (axis,),
        adjust_chunks={axis: tuple(n_chosen[i] for i in kept)},
        dtype=rows.dtype,
        meta=np.empty((0,) * rows.ndim, rows.dtype),
    )


def _taken(rows: NDArray[Any], chosen: NDArray[np.bool_], axis: int) -> NDArray[Any]:
    return rows if chosen.all() else np.compress(chosen, rows, axis)


def decision(rows: NDArray[Any], solution: Floats) -> Floats:
    """Scores [entry…, example, set, column] of rows [entry…, example, width] by a solution, in float64."""
    flat = solution.reshape(*solution.shape[:-3], -1, solution.shape[-1])
    found = np.empty((*rows.shape[:-1], flat.shape[-2]))
    for place in np.ndindex(*rows.shape[:-2]):
        weight, bias = flat[place][:, 1:].T, flat[place][:, 0]
        for first in range(0, rows.shape[-2], ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            with np.errstate(invalid="ignore"):  # of rows with infinities, whose scores are then not finite
                found[place][some] = rows[place][some].astype(np.float64) @ weight + bias
    return found.reshape(*rows.shape[:-1], *solution.shape[-3:-1])


def lazy_decision(rows: da.Array, solution: da.Array) -> Any:
    """`decision`, of what is not read yet."""
    lead = rows.ndim - 2
    entry, (example, width, n_set, column, packed) = tuple(range(lead)), range(lead, lead + 5)
    return da.blockwise(
        decision,
        (*entry, example, n_set, column),
        rows,
        (*entry, example, width),
        solution.rechunk({axis: rows.chunks[axis] if axis < lead else -1 for axis in range(solution.ndim)}),
        (*entry, n_set, column, packed),
        dtype=np.float64,
        meta=np.empty((0,) * (lead + 3)),
        concatenate=True,
    )


def statistics_of(n_class: int) -> tuple[str, ...]:
    """The names of what is measured of a probe on `n_class` classes, or of a regression where that is 0."""
    if not n_class:
        return ("n_example", *_R2, *_SELECTIVITY)
    return ("n_example", *_ACCURACY, *_BALANCED, *(_AUC if n_class == 2 else ()), *_SELECTIVITY)


def variables(table: Any, kept: Sequence[Hashable], several: Sequence[str], n_class: int) -> dict[str, Any]:
    """Statistics [*kept, set, *several, split, statistic] by name: those of the labels, and those of the controls."""
    every = (slice(None),) * len(kept)
    of_labels, of_controls = table[(*every, 0)], table[(*every, slice(1, None))]
    found = {}
    for i, name in enumerate(statistics_of(n_class)):
        said = " ".join(_LONG_NAMES.get(word, word) for word in name.split("_"))
        attrs = {"units": _units(name, n_class), "long_name": said}
        controls = ((*kept, "control", *several, "split"), of_controls[..., i], attrs)
        if name.startswith("selectivity"):
            found[name] = controls
            continue
        values = of_labels[..., i].astype(np.int64) if name == "n_example" else of_labels[..., i]
        found[name] = ((*kept, *several, "split"), values, attrs)
        if name in _PARTS:
            found[f"control_{name}"] = (
                *controls[:2],
                {**attrs, "long_name": f"{attrs['long_name']} on control labels"},
            )
    return found


def _units(name: str, n_class: int) -> str:
    if name == "n_example":
        return "examples"
    return "fraction" if n_class and not name.startswith("auc") else "1"


def held_out(documents: NDArray[np.int64], validation: float | Iterable[int], seed: int) -> NDArray[np.bool_]:
    n = len(documents)
    if isinstance(validation, Iterable):
        wanted = np.array(list(validation), dtype=np.int64)
        if unknown := np.setdiff1d(wanted, documents).tolist():
            raise SchemaError(f"documents {unknown} are to be held out, and have no token with a label")
        found = np.isin(documents, wanted)
    elif not 0 < validation < 1:
        raise SchemaError(f"validation = {validation}: a share of the documents between 0 and 1, or which documents")
    else:
        order = np.random.default_rng([seed, 0]).permutation(n)
        found = order < min(max(round(validation * n), 1), n - 1)
    if n < 2 or found.all() or not found.any():
        raise SchemaError(
            f"{n} documents have labelled tokens, of which {int(found.sum())} are held out: a probe is trained on some "
            "documents and judged on others, one of each at least"
        )
    return found


def permuted(labels: NDArray[Any], validation: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[Any]:
    """Labels of each split in another order."""
    found = labels.copy()
    for split in (~validation, validation):
        found[split] = rng.permutation(labels[split])
    return found


def by_type(
    labels: NDArray[Any], train: NDArray[np.bool_], token_id: NDArray[Any], rng: np.random.Generator
) -> NDArray[Any]:
    """A label for every token type, drawn from those of the training split until each class has a type there."""
    types, of_type = np.unique(token_id, return_inverse=True)
    wanted = len(np.unique(labels)) if labels.dtype.kind == "i" else 2
    for _ in range(MAX_TRIALS):
        found = rng.choice(labels[train], size=len(types))[of_type]
        if len(np.unique(found[train])) >= wanted:
            return np.asarray(found)
    raise SchemaError(
        f'{len(types)} token types are too few for a control task of {wanted} classes: controls=("shuffle",)'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What predictions are measured against, and how.

    `labels` [set, example], of which row 0 is the true one and the others are controls: classes from 0 on, or numbers
    where `n_class` is 0; `document` [example], numbered from 0; `validation` [example], which split is whose.
    """

    labels: NDArray[Any]
    document: NDArray[np.int64]
    validation: NDArray[np.bool_]
    n_class: int
    n_bootstrap: int
    confidence: float
    seed: int

    def table(self, scores: Floats) -> Floats:
        """Statistics [entry…, set, column, split, statistic] of scores [entry…, example, set, column × class].

        `column` tells apart settings that were fitted together; there is one number of an example where there are two
        classes (above 0 is the second) or none, and otherwise one a class (the largest is predicted). An example whose
        scores are NaN or infinite does not count. Of controls there is the accuracy, or R², and the selectivity; the
        rest is NaN.
        """
        scores = scores.reshape(*scores.shape[:-1], -1, self.n_class if self.n_class > 2 else 1)
        lead, (n_set, n_column) = scores.shape[:-4], scores.shape[-3:-1]
        found = np.full((*lead, n_set, n_column, len(SPLITS), len(statistics_of(self.n_class))), np.nan)
        for place in np.ndindex(*lead):
            for split, held_out in enumerate((False, True)):
                kept = (self.validation == held_out) & np.isfinite(scores[place]).all((1, 2, 3))
                for column in range(n_column):
                    some = scores[place][kept][:, :, column]
                    found[(*place, slice(None), column, split)] = self._of_split(some, kept)
        return found

    def _of_split(self, scores: Floats, kept: NDArray[np.bool_]) -> Floats:
        """Statistics [set, statistic] of scores [example, set, class] of one split."""
        documents, document = np.unique(self.document[kept], return_inverse=True)
        draws = Draws(len(documents), self.n_bootstrap, self.confidence, self.seed)
        of_set = _classified if self.n_class else _regressed
        labels = self.labels[:, kept]
        names = statistics_of(self.n_class)
        main = "accuracy" if self.n_class else "r2"
        rows: list[list[float]] = []
        sums: list[Floats] = []
        for i, label in enumerate(labels):
            row, total = of_set(scores[:, i], label, document, draws, self.n_class, i == 0)
            if i:
                estimate = float(_PARTS[main](sums[0].sum(0)) - _PARTS[main](total.sum(0)))
                low, high = draws.interval(np.hstack([sums[0], total]), _difference(_PARTS[main]))
                row |= {"selectivity": estimate, "selectivity_low": low, "selectivity_high": high}
            row["n_example"] = float(len(label))
            rows.append([row.get(name, np.nan) for name in names])
            sums.append(total)
        return np.array(rows)


@dataclass(frozen=True, slots=True)
class Draws:
    """Documents drawn again with replacement, the same ones for whatever is measured on the same documents."""

    n_document: int
    n_bootstrap: int
    confidence: float
    seed: int

    def counts(self) -> Iterator[Floats]:
        """How often each document is drawn: [draw, document], some draws at a time."""
        rng = np.random.default_rng([self.seed, self.n_document])
        step = max(1, DRAWN_AT_ONCE // self.n_document)
        for first in range(0, self.n_bootstrap, step):
            size = (min(step, self.n_bootstrap - first), self.n_document)
            drawn = rng.integers(self.n_document, size=size) + self.n_document * np.arange(size[0])[:, None]
            yield np.bincount(drawn.ravel(), minlength=size[0] * size[1]).reshape(size).astype(np.float64)

    def interval(self, sums: Any, statistic: Callable[[Floats], Floats]) -> tuple[float, float]:
        """Percentiles of a statistic of sums [document, …] over what is drawn; NaN where there is one document."""
        if self.n_document < 2 or not self.n_bootstrap:
            return np.nan, np.nan
        drawn = np.concatenate([statistic(np.asarray(count @ sums)) for count in self.counts()])
        drawn = drawn[~np.isnan(drawn)]
        if not len(drawn):
            return np.nan, np.nan
        low, high = np.quantile(drawn, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return float(low), float(high)


def wilson(n_right: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion; NaN of nothing."""
    if not n:
        return np.nan, np.nan
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = n_right / n
    centre, spread = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float((centre - spread) / (1 + z * z / n)), float((centre + spread) / (1 + z * z / n))


def _classified(
    scores: Floats, label: NDArray[np.int64], document: NDArray[np.int64], draws: Draws, n_class: int, full: bool
) -> tuple[dict[str, float], Floats]:
    predicted = (scores[:, 0] > 0).astype(np.int64) if n_class == 2 else scores.argmax(-1)
    size = draws.n_document * n_class
    place = document * n_class + label
    right = np.bincount(place, predicted == label, size).reshape(-1, n_class)
    every = np.bincount(place, minlength=size).reshape(-1, n_class)
    sums: Floats = np.hstack([right, every]).astype(np.float64)
    row = {"accuracy": float(_accuracy(sums.sum(0)))}
    if not full:
        return row, sums
    row |= zip(_ACCURACY[1:3], draws.interval(sums, _accuracy), strict=True)
    row |= zip(_ACCURACY[3:], wilson(right.sum(), len(label), draws.confidence), strict=True)
    row["balanced_accuracy"] = float(_balanced(sums.sum(0)))
    row |= zip(_BALANCED[1:], draws.interval(sums, _balanced), strict=True)
    if n_class == 2:
        row |= zip(_AUC, _auc_and_interval(scores[:, 0], label, document, draws), strict=True)
    return row, sums


def _accuracy(sums: Floats) -> Floats:
    """Of sums […, right of each class, all of each class]."""
    right, every = np.split(sums, 2, axis=-1)
    return _ratio(right.sum(-1), every.sum(-1))


def _balanced(sums: Floats) -> Floats:
    """The mean over the classes that are there of what share of each is right."""
    right, every = np.split(sums, 2, axis=-1)
    return _ratio(np.where(every > 0, _ratio(right, every), 0.0).sum(-1), (every > 0).sum(-1))


def _auc_and_interval(
    scores: Floats, label: NDArray[np.int64], document: NDArray[np.int64], draws: Draws
) -> tuple[float, float, float]:
    """The AUC, exact (Mann and Whitney's statistic, ties counted half), and its interval from binned ranks, less what
    binning does to the AUC itself.
    """
    from scipy.sparse import coo_array
    from scipy.stats import rankdata

    n_positive = int(label.sum())
    if not 0 < n_positive < len(label):
        return np.nan, np.nan, np.nan
    rank = rankdata(scores)
    above = rank[label == 1].sum() - n_positive * (n_positive + 1) / 2
    auc = float(above / (n_positive * (len(label) - n_positive)))
    bins = np.minimum(((rank - 0.5) * N_BINS / len(rank)).astype(np.int64), N_BINS - 1)
    places = (document, label * N_BINS + bins)
    sums = coo_array((np.ones(len(label)), places), shape=(draws.n_document, 2 * N_BINS)).tocsr()
    low, high = draws.interval(sums, _binned_auc)
    off = auc - float(_binned_auc(np.asarray(sums.sum(0))))
    return auc, min(max(low + off, 0.0), 1.0), min(max(high + off, 0.0), 1.0)


def _binned_auc(sums: Floats) -> Floats:
    """Of sums […, negatives in each bin, positives in each bin]."""
    negative, positive = np.split(sums, 2, axis=-1)
    below = negative.cumsum(-1) - negative / 2
    return _ratio((positive * below).sum(-1), positive.sum(-1) * negative.sum(-1))


def _regressed(
    scores: Floats, label: Floats, document: NDArray[np.int64], draws: Draws, n_class: int, full: bool
) -> tuple[dict[str, float], Floats]:
    if not len(label):
        return {}, np.zeros((0, 4))
    off = label - label.mean()  # so that squares of sums and sums of squares do not cancel
    error = label - scores[:, 0]
    parts = (np.ones_like(off), off, off * off, error * error)
    sums = np.stack([np.bincount(document, part, draws.n_document) for part in parts], axis=-1).astype(np.float64)
    row = {"r2": float(_r2(sums.sum(0)))}
    if full:
        row |= zip(_R2[1:], draws.interval(sums, _r2), strict=True)
    return row, sums


def _r2(sums: Floats) -> Floats:
    """Of sums […, (n, Σy, Σy², Σ(y − ŷ)²)]."""
    n, total, squares, error = np.moveaxis(sums, -1, 0)
    return 1 - _ratio(error, squares - _ratio(total * total, n))


def _difference(statistic: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    def of_both(sums: Floats) -> Floats:
        first, second = np.split(sums, 2, axis=-1)
        return statistic(first) - statistic(second)

    return of_both


def _ratio(above: Any, below: Any) -> Floats:
    below = np.asarray(below, dtype=np.float64)
    found: Floats = np.full(np.broadcast(above, below).shape, np.nan)
    np.divide(above, below, out=found, where=below > 0)
    return found


_PARTS = {"accuracy": _accuracy, "r2": _r2}
