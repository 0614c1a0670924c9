"""Linear probes: what can be read off activations along one direction, layer by layer and head by head.

A probe is trained on some documents and judged on others, beside the same probe on control labels (Hewitt and Liang
2019, "Designing and Interpreting Probes with Control Tasks"): what it also learns of random labels, it has memorised.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import dask
import dask.array as da
import numpy as np
import xarray as xr
from dask.array.core import slices_from_chunks
from dask.base import compute
from dask.graph_manipulation import bind
from numpy.typing import NDArray

from ...stores.errors import SchemaError, nearest
from .probe_examples import CONTROLS, Examples, examples_of
from .probe_scores import SPLITS, Measures, decision, gather, lazy_decision, rows_of, statistics_of, variables
from .probe_solvers import Solver, closed_form, logistic
from .tokens import vectors

KINDS = {"logistic": True, "mass_mean": True, "lda": True, "ridge": False}
"""The kinds of probe, and whether they tell classes apart."""

Found: TypeAlias = tuple[Any, Any, dict[str, NDArray[Any]]]
"""Solutions [entry…, set, column × score, 1 + width], statistics [entry…, set, column, split, statistic], and what only
logistic regression has, [entry…]."""

_UNITS = {"logistic": "nats", "ridge": "units of the label", "lda": "nats", "mass_mean": "squared activation"}


def probe(
    activations: xr.Dataset,
    labels: xr.DataArray,
    *,
    kind: str = "logistic",
    position: int | None = None,
    skip_positions: int = 1,
    validation: float | Iterable[int] = 0.2,
    C: float = 1.0,
    alpha: float | Sequence[float] = 1.0,
    standardize: bool = True,
    controls: Sequence[str] = CONTROLS,
    confidence: float = 0.95,
    n_bootstrap: int = 500,
    max_iter: int = 500,
    max_bytes: int = 2**30,
    seed: int = 0,
) -> xr.Dataset:
    """Fit a linear probe at every layer (and head) and judge it on documents that it has not seen.

    `activations`: `value[…, token, …, width]` with the coordinates `document`, `sequence` and `position`, such as
    `open_run(path)["activations/hook_resid_post"]`; every other dimension has probes of its own. `labels` [token], or
    [sequence] or [document], whose tokens then all have that label: booleans, integers (classes; −1 is no label), or
    floats (NaN is none). `position` keeps one token of each sequence, counted from the end of what is given of it where
    it is negative. Tokens before position `skip_positions` are left out.

    `kind`:
    - `logistic`: minimises what scikit-learn's LogisticRegression does with `C` (softmax of more than two classes).
      Computed when called; a RuntimeWarning where `max_iter` steps are too few.
    - `mass_mean`: θ = μ₊ − μ₋, threshold midway; of more classes, the nearest mean. Lazy.
    - `lda`: θ = Σ⁻¹(μ₊ − μ₋), Σ the covariance within classes, with the classes' shares as priors; what Marks and
      Tegmark give as the mass-mean probe of independent and identically distributed data. Lazy.
    - `ridge`: linear regression on the label as a number, ‖w‖² weighted by `alpha`; several of them make a dimension
      `alpha`. Lazy.

    `validation`: the share of documents held out (a permutation seeded by `seed`), or which documents. In packed
    windows a held-out token also reads documents before it in its window: capture with layout="documents", or label
    such tokens −1. `standardize` scales rows by mean and standard deviation of the training split for logistic and
    ridge; what is given is folded back, so that `weight · value + bias` is the score: log-odds of the second class, or
    what is predicted.

    Gives `weight[…, (alpha, class,) width]` and `bias` (float64; of two classes one weight, positive for the second,
    otherwise one a `class`), and by `split` (train, validation): `n_example`; `accuracy`, `balanced_accuracy`, and of
    two classes `auc`, exact, or for ridge `r2`, each with `_low` and `_high` by `n_bootstrap` draws of documents, and
    Wilson's interval `accuracy_wilson_low` and `_high`, as of tokens that do not depend on each other, which is too
    narrow where they do. By `control`: the same probe's `control_accuracy` (`control_r2`) on labels drawn for each
    token id from those of the training split (token_type) or permuted within each split (shuffle), and `selectivity`,
    what the true labels have above that, with its interval, which leaves out that other control labels might have been
    drawn. A token with NaN or infinity counts nowhere. `class_count[split, class]`, and `held_out[document]`. Logistic:
    `converged`, and `n_evaluation` of the loss. Intervals hold `confidence`; they are NaN where there is one document.
    To choose `alpha` or a layer on the validation split makes its score too good.

    Labels, token ids and document numbers are read when called: about 100 bytes a token. Activations are read twice by
    lazy kinds, once to fit and once to score; compute the result as a whole. Logistic reads the layers of a chunk once
    where its examples, and those to train on in float64, take at most `max_bytes`; otherwise 2 + `n_evaluation` times,
    a chunk a thread in memory. Besides, width² numbers in float64 a layer, and scores, 8 bytes an example and set of
    labels (and class).

    SchemaError, before activations are read, for what is no such node, label or setting, and where a split lacks a
    class.
    """
    value = vectors(activations, "a probe")
    alphas = tuple(float(a) for a in np.atleast_1d(alpha))
    _check(kind, C, alphas, controls, confidence, n_bootstrap)
    examples = examples_of(
        activations,
        labels,
        classify=KINDS[kind],
        skip_positions=skip_positions,
        position=position,
        validation=validation,
        controls=controls,
        seed=seed,
    )
    solver = Solver(kind=kind, C=C, alpha=alphas, standardize=standardize, max_iter=max_iter)
    measures = examples.measures(n_bootstrap, confidence, seed)
    rows = rows_of(value, examples.chosen)
    if kind == "logistic":
        found = _computed(rows, examples, solver, measures, max_bytes)
    else:
        found = _lazy(rows, examples, solver, measures, lazy=value.chunks is not None)
    one_alpha = kind != "ridge" or np.ndim(alpha) == 0
    result = _dataset(value, examples, solver, measures, found, one_alpha)
    settings: dict[str, Any] = {"kind": kind, "skip_positions": skip_positions, "standardize": standardize}
    settings |= {"confidence": confidence, "n_bootstrap": n_bootstrap, "seed": seed}
    settings |= {"C": C} if kind == "logistic" else {}
    settings |= {} if position is None else {"position": position}
    return result.assign_attrs(settings)


def apply_probe(activations: xr.Dataset, result: xr.Dataset) -> xr.DataArray:
    """Scores `weight · value + bias` of every token by probes that `probe` found, or a selection of them: float32
    [layer, …, (alpha, class,) token], lazily where `value` is lazy.

    `activations` may be any node of the same kind of hook point, of which the layers (and heads) that `result` has are
    read. Computed in float64. SchemaError where the widths differ or a layer is missing.
    """
    value = vectors(activations, "a probe")
    width = str(value.dims[-1])
    if "weight" not in result or width not in result["weight"].dims:
        raise SchemaError(f"no probe of {width}: give what `probe` found of this kind of activations")
    if result.sizes[width] != value.sizes[width]:
        raise SchemaError(f"the probe has {width} {result.sizes[width]}, the activations {value.sizes[width]}")
    kept = [dim for dim in value.dims if dim not in ("token", width)]
    for dim in [dim for dim in kept if dim in result.coords]:
        if missing := sorted(set(np.atleast_1d(result[dim].values).tolist()) - set(value[dim].values.tolist())):
            raise SchemaError(f"the probe has {dim} {missing}, which the activations lack")
        value = value.sel({dim: result[dim].values})
    kept = [dim for dim in kept if dim in value.dims]
    template = value.isel({width: 0}, drop=True)
    weight = result["weight"]
    extra = [dim for dim in weight.dims if dim not in (*kept, width)]
    weight, bias = weight.transpose(*kept, *extra, width), result["bias"].transpose(*kept, *extra)
    parts: list[Any] = [value.transpose(*kept, "token", width), weight, bias]
    lazy = any(part.chunks is not None for part in parts)
    rows, weights, biases = [da.asarray(part.data) if lazy else part.values for part in parts]
    shape = (*weights.shape[: len(kept)], 1, -1)
    packed = [biases.reshape(*shape, 1), weights.reshape(*shape, weights.shape[-1])]
    scores = lazy_decision(rows, da.concatenate(packed, -1)) if lazy else decision(rows, np.concatenate(packed, -1))
    scores = scores.astype(np.float32).reshape(*scores.shape[:-2], *(weight.sizes[dim] for dim in extra))
    found = xr.DataArray(scores, dims=(*kept, "token", *extra), coords=template.coords)
    found = found.assign_coords({dim: result[dim] for dim in extra if dim in result.coords})
    found.attrs = {"long_name": "score of the probe", "units": _UNITS.get(result.attrs.get("kind", ""), "")}
    return found.rename("score").transpose(*kept, *extra, "token")


def _check(
    kind: str, C: float, alpha: tuple[float, ...], controls: Sequence[str], confidence: float, n_bootstrap: int
) -> None:
    if kind not in KINDS:
        raise SchemaError(f"kind = {kind!r}: a probe is one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    for control in controls:
        if control not in CONTROLS:
            raise SchemaError(f"control {control!r}: one of {', '.join(CONTROLS)}")
    if not C > 0 or not alpha or min(alpha) < 0:
        raise SchemaError(f"C = {C} must be above 0, and alpha = {alpha} at least 0")
    if not 0 < confidence < 1 or n_bootstrap < 0:
        raise SchemaError(f"confidence = {confidence} lies between 0 and 1, and n_bootstrap = {n_bootstrap} from 0 on")


def _lazy(rows: da.Array, examples: Examples, solver: Solver, measures: Measures, lazy: bool) -> Found:
    train, coding = ~examples.validation, examples.coding
    solution = closed_form(gather(rows, train), examples.labels[:, train], coding, solver)
    # Scored from chunks that are read again once everything is fitted: shared ones would all wait in memory for that.
    scores = lazy_decision(bind(rows, solution) if lazy else rows, solution)
    lead = rows.ndim - 2
    shape = (coding.n_set, solver.n_column, len(SPLITS), len(statistics_of(coding.n_class)))
    table = scores.rechunk({lead: -1}).map_blocks(
        measures.table,
        drop_axis=[lead, lead + 1, lead + 2],
        new_axis=list(range(lead, lead + 4)),
        chunks=(*scores.chunks[:lead], *((size,) for size in shape)),
        dtype=np.float64,
        meta=np.empty((0,) * (lead + 4)),
    )
    if not lazy:
        solution, table = compute(solution, table, scheduler="synchronous")
    return solution, table, {}


def _computed(rows: da.Array, examples: Examples, solver: Solver, measures: Measures, max_bytes: int) -> Found:
    """Logistic regression, the entries of a chunk together."""
    train, coding, lead = ~examples.validation, examples.coding, rows.shape[:-2]
    shape = (coding.n_set, coding.n_score, 1 + rows.shape[-1])
    solution = np.empty((*lead, *shape))
    table = np.empty((*lead, coding.n_set, 1, len(SPLITS), len(statistics_of(coding.n_class))))
    extra: dict[str, NDArray[Any]] = {"converged": np.empty(lead, bool), "n_evaluation": np.empty(lead, np.int64)}
    labels = examples.labels[:, train]
    for place in slices_from_chunks(rows.chunks[:-2]):
        some = rows[place]
        fits = some.nbytes + 8 * math.prod(some.shape) // len(train) * int(train.sum()) <= max_bytes
        if fits:
            held = some.compute()
            to_fit = da.from_array(held[..., train, :].astype(np.float64), chunks=-1, name=False)
            with dask.config.set(scheduler="synchronous"):
                found = logistic(to_fit, labels, coding, solver)
            scores = decision(held, found.solution)
        else:
            found = logistic(gather(some, train), labels, coding, solver)
            scores = lazy_decision(some, da.from_array(found.solution)).compute()
        solution[place], table[place] = found.solution, measures.table(scores)
        extra["converged"][place], extra["n_evaluation"][place] = found.converged, found.n_evaluation
    if not extra["converged"].all():
        warnings.warn(
            f"{int((~extra['converged']).sum())} of {extra['converged'].size} probes did not converge in "
            f"{solver.max_iter} steps: raise max_iter, or lower C (`converged` says which)",
            RuntimeWarning,
            stacklevel=3,
        )
    return solution, table, extra


def _dataset(
    value: xr.DataArray, examples: Examples, solver: Solver, measures: Measures, found: Found, one_alpha: bool
) -> xr.Dataset:
    width, coding, (solution, table, extra) = value.dims[-1], examples.coding, found
    kept = [dim for dim in value.dims if dim not in ("token", width)]
    every = (slice(None),) * len(kept)
    column, score = 0 if one_alpha else slice(None), 0 if coding.n_score == 1 else slice(None)
    several = [] if one_alpha else ["alpha"]
    dims = (*kept, *several, *([] if coding.n_score == 1 else ["class"]))
    parts = solution[(*every, 0)].reshape(*solution.shape[: len(kept)], -1, coding.n_score, solution.shape[-1])
    parts = parts[(*every, column, score)]
    result = xr.Dataset(variables(table[(*every, slice(None), column)], kept, several, coding.n_class))
    result["weight"] = ((*dims, width), parts[..., 1:], {"long_name": "weight on activations as they are"})
    result["bias"] = (dims, parts[..., 0], {"long_name": "bias of the probe", "units": _UNITS[solver.kind]})
    result = result.assign({name: (kept, held) for name, held in extra.items()})
    coords = {dim: value[dim].reset_coords(drop=True) for dim in (*kept, width) if dim in (*kept, *value.coords)}
    # Zarr has a type for text of any length, but none for numpy's.
    texts = {"split": np.array(SPLITS, dtype=object), "control": np.array(examples.sets[1:], dtype=object)}
    result = result.assign_coords({**coords, **texts, "document": examples.documents})
    if solver.kind == "ridge":
        result = result.assign_coords(alpha=solver.alpha[0] if one_alpha else list(solver.alpha))
    if coding.n_class:
        counts = [np.bincount(measures.labels[0, measures.validation == held]) for held in (False, True)]
        result = result.assign_coords({"class": examples.classes}).assign(class_count=(("split", "class"), counts))
    return result.assign(held_out=("document", examples.held_out))
