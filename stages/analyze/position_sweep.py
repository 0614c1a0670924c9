"""Position sweeps: where along a prompt an intervention moves a prediction, position by position.

The protocol is that of Figure 13 of Lindsey et al. (2025), "On the Biology of a Large Language Model", as candle-mi
replicates it: features are suppressed and injected at every position in turn, and the probability of the injected word
is read at the last one. Effects are signed and at a fixed position, for a maximum over positions cannot fall.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..dictionaries.interventions import AtOnePoint, FeatureIntervention
from ..models.addressing import Part, Site
from ..models.errors import HookError
from ..models.interventions import NamedIntervention
from ..models.model import Model
from ..models.points import HookPoint, expand
from ..models.taps import HookSpec
from .metrics import Metric
from .patching import Variant, check_metric, metric_position, variant_logits
from .prompts import Prompt, one_prompt, position_coords

Edit: TypeAlias = "FeatureIntervention | HookSpec"
"""What is done at a position: features injected, suppressed or clamped, or any named interventions of a `HookSpec`."""


def position_sweep(
    model: Model,
    prompt: Prompt,
    edits: Edit | Sequence[Edit],
    *,
    metric: Metric | Sequence[Metric],
    positions: Sequence[int] | None = None,
    where: str | None = None,
    batch_size: int = 32,
) -> xr.Dataset:
    """Make the same edits at every position in turn, and give what each did to a prediction at a fixed position.

    `prompt`: one text, or token ids. `edits`: `Inject`, `Suppress` or `Clamp` of a dictionary or of a set of
    transcoders, several of them acting in their order, and `HookSpec`s of other interventions that can be put `.at` a
    position. What names a position of its own, `.at(position=5)`, stays there in every run. candle-mi's suppression
    subtracts a constant whatever fires, and that is `Inject` with a strength below 0: its protocol is
    `[Inject(clt, {f: -10.0 for f in suppressed}), Inject(clt, {injected: 10.0})]` with `where="hook_resid_post"`, the
    kind of point that features are written at instead of their own, as in `FeatureIntervention.hooks`.

    `metric`: one, or several of different kinds at the same position, such as `Probability(token=t)` and
    `Logit(token=t)`. `positions` None means all; negative ones count from the end.

    Gives for each metric, in its units, float32: `probability` (or `logit`, …: the name of its class) [position], that
    of the run edited at that position; `probability_baseline`, that of the run without edits; `probability_change`
    [position], the first minus the second. Coordinates `position`, counted from 0, `token_id` and, where the model has
    a tokenizer, `token_text`. Every position is a run of its own: effects of neighbours need not add up.

    Runs `batch_size` positions in one forward, and one run more; a set's encoders and decoder rows are read once.
    Memory: a forward of `batch_size` sequences, whose logits exist at one position only.

    Everything that does not fit is refused before anything is computed: SchemaError for several prompts, positions and
    tokens that are not there, metrics of equal kind or at different positions, and where nothing is swept; HookError
    for features, hook points and interventions that the model cannot serve, and for plain functions.
    """
    token_ids = one_prompt(model, prompt)
    metrics = _named([metric] if isinstance(metric, Metric) else list(metric))
    for one in metrics.values():
        check_metric(model, one, [len(token_ids)])
    at = _measured(metrics, len(token_ids))
    places = _places(positions, len(token_ids))
    every = [edits] if isinstance(edits, FeatureIntervention | HookSpec) else list(edits)
    changes = _changes(model, every, where)
    variants: Iterator[Variant] = (_variant(changes, place) for place in [None, *places])
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for logits in variant_logits(model, token_ids, variants, at, batch_size=batch_size):
        prompt_number = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        for name, one in metrics.items():
            found[name].append(one.at_position(logits, prompt_number).cpu())
    shown = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    return _labelled(model, token_ids, places, metrics, shown)


@dataclass(frozen=True, slots=True)
class _Change:
    """What is done at one point."""

    point: HookPoint
    function: NamedIntervention

    @property
    def swept(self) -> bool:
        return "position" not in self.function.where

    def at(self, place: int, passed: dict[object, Tensor]) -> NamedIntervention:
        """The same at a position. What features are read as is passed on to where they are written in `passed`: runs
        share a forward, and each has its own.
        """
        here = self.function.at(position=place) if self.swept else self.function
        if not isinstance(here, AtOnePoint):
            return here
        act = here.act

        def act_in_this_run(site: Site, part: Part) -> Any:
            return act(replace(site, passed=passed), part)

        return replace(here, act=act_in_this_run)


def _changes(model: Model, edits: Sequence[Edit], where: str | None) -> list[_Change]:
    """What the edits do, point by point; the files of a set are read here."""
    changes = []
    for edit in edits:
        hooks = edit.hooks(where) if isinstance(edit, FeatureIntervention) else edit
        if not isinstance(hooks, HookSpec) or hooks.captures:
            raise HookError(f"an edit is an Inject, Suppress or Clamp, or a HookSpec without captures, not {edit!r}")
        for change in hooks.changes:
            if not isinstance(change.function, NamedIntervention):
                raise HookError(
                    f"what is done at {change.pattern} is a plain {type(change.function).__name__}, which cannot be "
                    "put at a position: wrap a function in Apply"
                )
            for point in expand([change.pattern], model.spec.points()):
                changes.append(_Change(point, change.function))
    if not any(change.swept for change in changes):
        raise SchemaError("nothing is swept: give at least one edit that names no position of its own")
    return changes


def _variant(changes: Sequence[_Change], place: int | None) -> Variant:
    passed: dict[object, Tensor] = {}
    return [] if place is None else [(change.point, change.at(place, passed)) for change in changes]


def _named(metrics: Sequence[Metric]) -> dict[str, Metric]:
    """Metrics by the names of their variables."""
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(one).__name__).lower() for one in metrics]
    if not names or len(set(names)) < len(names):
        raise SchemaError(f"metrics of different kinds are expected, at least one, not {names}")
    return dict(zip(names, metrics, strict=True))


def _measured(metrics: dict[str, Metric], length: int) -> int:
    """Where in the prompt the metrics are measured."""
    places = {name: metric_position(metric, length) for name, metric in metrics.items()}
    if len(set(places.values())) > 1:
        raise SchemaError(f"all metrics of a sweep are measured at the same position, and these are at {places}")
    return next(iter(places.values()))


def _places(positions: Sequence[int] | None, length: int) -> list[int]:
    asked = range(length) if positions is None else positions
    if outside := [position for position in asked if not -length <= position < length]:
        raise SchemaError(f"there is no position {outside[0]}: the prompt has {length} tokens")
    found = [position % length for position in asked]
    if not found or len(set(found)) < len(found):
        raise SchemaError(f"positions = {list(asked)} names none, or one of them twice")
    return found


def _labelled(
    model: Model,
    token_ids: Tensor,
    places: Sequence[int],
    metrics: dict[str, Metric],
    shown: dict[str, Any],
) -> xr.Dataset:
    """`shown` holds the metric of the run without edits, and then those of each position."""
    variables: dict[str, Any] = {}
    for name, metric in metrics.items():
        baseline, edited = shown[name][0], shown[name][1:]
        units = {"units": metric.unit}
        variables[name] = ("position", edited, {**units, "long_name": f"{metric.unit} of the edited run"})
        variables[f"{name}_baseline"] = ((), baseline, {**units, "long_name": f"{metric.unit} without edits"})
        change = {**units, "long_name": "change by the edits"}
        variables[f"{name}_change"] = ("position", edited - baseline, change)
    first = next(iter(metrics.values()))
    attrs = {"metric": ", ".join(type(one).__name__ for one in metrics.values()), "metric_position": first.position}
    every = position_coords(model, token_ids)
    here = {name: (dim, np.asarray(values)[list(places)]) for name, (dim, values) in every.items()}
    return xr.Dataset(variables, coords=here, attrs=attrs)
