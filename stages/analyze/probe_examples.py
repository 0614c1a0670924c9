"""What a probe is trained and judged on: which tokens count, their labels, documents and split, and control labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from .probe_scores import SPLITS, Measures, by_type, held_out, permuted
from .probe_solvers import Coding
from .tokens import needs

CONTROLS = ("token_type", "shuffle")
MAX_CLASSES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The tokens that are `chosen` [token], and what is known of them: `labels` [set, example] of every name of `sets`,
    the true ones first; `document` [example], numbers of `documents`; `validation` [example].
    """

    chosen: NDArray[np.bool_]
    sets: tuple[str, ...]
    labels: NDArray[Any]
    classes: NDArray[Any]
    document: NDArray[np.int64]
    documents: NDArray[np.int64]
    held_out: NDArray[np.bool_]

    @property
    def validation(self) -> NDArray[np.bool_]:
        return self.held_out[self.document]

    @property
    def coding(self) -> Coding:
        return Coding(len(self.sets), len(self.classes))

    def measures(self, n_bootstrap: int, confidence: float, seed: int) -> Measures:
        return Measures(
            labels=self.labels,
            document=self.document,
            validation=self.validation,
            n_class=self.coding.n_class,
            n_bootstrap=n_bootstrap,
            confidence=confidence,
            seed=seed,
        )


def examples_of(
    activations: xr.Dataset,
    labels: xr.DataArray,
    *,
    classify: bool,
    skip_positions: int,
    position: int | None,
    validation: float | Iterable[int],
    controls: Sequence[str],
    seed: int,
) -> Examples:
    """The tokens of a node that have a label and count, with the labels that are predicted and those of the controls.

    Arguments are those of `probe`; `classify` says that labels are classes, and not numbers. Labels, token ids and
    document numbers are read; activations are not. SchemaError for labels that do not fit the node, classes of which a
    split has none, and labels that are all the same.
    """
    eligible = _eligible(activations, skip_positions, position)
    given = _label_of_tokens(activations, labels, classify)
    chosen = eligible & ~np.isnan(given)
    documents, document = np.unique(activations["document"].values[chosen], return_inverse=True)
    is_held_out = held_out(documents, validation, seed)
    true: NDArray[Any] = given[chosen]
    classes = np.empty(0)
    if classify:
        classes, true = _classes(true, labels.dtype)
        _refuse_empty(true, classes, is_held_out[document])
    elif np.ptp(true) == 0:
        raise SchemaError(f"every label is {true[0]}: there is nothing to predict")
    rows = [true]
    for number, control in enumerate(controls):
        rng = np.random.default_rng([seed, 1 + number])
        if control == "shuffle":
            rows.append(permuted(true, is_held_out[document], rng))
        else:
            needs(activations, ["token_id"], "the control task of token types")
            rows.append(by_type(true, ~is_held_out[document], activations["token_id"].values[chosen], rng))
    return Examples(
        chosen=chosen,
        sets=("label", *controls),
        labels=np.stack(rows),
        classes=classes,
        document=document,
        documents=documents,
        held_out=is_held_out,
    )


def _eligible(activations: xr.Dataset, skip_positions: int, position: int | None) -> NDArray[np.bool_]:
    """Which tokens may be examples."""
    if skip_positions < 0:
        raise SchemaError(f"skip_positions = {skip_positions}: at least 0")
    needs(activations, ["document", "sequence", "position"], "a probe")
    at = activations["position"].values
    counts = at >= skip_positions
    if "done" in activations.coords:
        counts &= activations["done"].values
    if position is not None and position < 0:
        _, sequence = np.unique(activations["sequence"].values, return_inverse=True)
        last = np.zeros(sequence.max(initial=-1) + 1, dtype=at.dtype)
        np.maximum.at(last, sequence, at)
        counts &= at == last[sequence] + 1 + position
    elif position is not None:
        counts &= at == position
    return np.asarray(counts)


def _label_of_tokens(activations: xr.Dataset, labels: xr.DataArray, classify: bool) -> NDArray[np.float64]:
    """The label of every token, NaN where it has none."""
    if labels.ndim != 1 or labels.dims[0] not in ("token", "sequence", "document") or labels.dtype.kind not in "biuf":
        raise SchemaError(
            "labels are booleans, integers or floats along token, sequence or document, not "
            f"{labels.dtype} [{', '.join(map(str, labels.dims))}]"
        )
    found = labels.values.astype(np.float64)
    if np.isinf(found).any():
        raise SchemaError(f"{int(np.isinf(found).sum()):,} labels are infinite: they must be finite, or NaN for none")
    if labels.dtype.kind in "iu" or classify:
        found[found == -1] = np.nan
    dim = str(labels.dims[0])
    if dim == "token":
        if len(found) != activations.sizes[dim]:
            raise SchemaError(f"{len(found):,} labels for {activations.sizes[dim]:,} tokens: select the same of both")
        for name in {"sequence", "position"} & set(labels.coords):
            if not np.array_equal(labels[name].values, activations[name].values):
                raise SchemaError(f"labels and activations differ in `{name}`: select the same tokens of both")
        return found
    own = labels[dim].values if dim in labels.coords else np.arange(len(found))
    order = np.argsort(own)
    wanted = activations[dim].values
    place = order[np.minimum(np.searchsorted(own, wanted, sorter=order), len(own) - 1)]
    return np.where(own[place] == wanted, found[place], np.nan)


def _classes(labels: NDArray[np.float64], dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The classes there are, as they were given, and the number of each label's."""
    classes, found = np.unique(labels, return_inverse=True)
    if len(classes) > MAX_CLASSES or not np.array_equal(classes, np.round(classes)):
        raise SchemaError(
            f"labels have {len(classes):,} values, such as {classes[:3].tolist()}: a probe of classes takes whole "
            f'numbers, at most {MAX_CLASSES} of them; kind="ridge" predicts numbers'
        )
    if len(classes) < 2:
        raise SchemaError(
            f"labels have one class, {classes.tolist()}, where at least two are told apart (−1: no label)"
        )
    return classes.astype(bool if dtype.kind == "b" else np.int64), found


def _refuse_empty(labels: NDArray[np.int64], classes: NDArray[Any], validation: NDArray[np.bool_]) -> None:
    for name, split in zip(SPLITS, (~validation, validation), strict=True):
        if missing := [c for i, c in enumerate(classes.tolist()) if not (labels[split] == i).any()]:
            raise SchemaError(
                f"the {name} split has no example of class {', '.join(map(str, missing))}: hold out other documents "
                "(validation=, seed=), or give more of them"
            )
