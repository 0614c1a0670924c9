"""Attribution patching: activation patching of every site at once, estimated by gradients.

To first order a patch moves the metric by its gradient, at the activation of the run that is patched, times how far the
patch moves that activation: Nanda (2023), "Attribution Patching: Activation Patching at Industrial Scale"; Syed, Rager
and Conmy (2023), "Attribution Patching Outperforms Automated Circuit Discovery". Averaged along the way from one input
to the other, gradients see past saturation: Hanna, Pezzelle and Belinkov (2024), "Have Faith in Faithfulness" (EAP-IG).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.errors import nearest
from ..models.interventions import Replace
from ..models.model import Model
from ..models.points import HookPoint
from ..models.taps import HookSpec
from .activation_patching import DIRECTIONS, Direction
from .metrics import Metric
from .patching import BASELINES, Pairs, Sites, check_metric, labelled, metric_position, pairs_of, sites_of
from .prompts import Prompts

_EMBED = HookPoint("hook_embed")
_FINAL = HookPoint("hook_final_norm")


def attribution_patching(
    model: Model,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    *,
    hooks: Sequence[str] = ("hook_resid_pre",),
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    by_position: bool = True,
    direction: Direction = "denoising",
    steps: int | None = None,
    batch_size: int = 8,
) -> xr.Dataset:
    """Estimate what `activation_patching` measures, for every site at once.

    Arguments are those of `activation_patching`, and so is the result: one variable a kind, float32, along `pair`,
    `layer`, `head` or `kv_head`, and `position`, here the metric of the run that would be patched, plus
    Σ gradient · (source − own), the sum being over all that the site holds; `clean` and `corrupted` [pair].
    `patching_agreement` compares the two.

    The gradient is that in the run that is patched, the corrupted one when denoising. With `steps` = n it is the mean
    of those in n runs whose input embeddings lie k/n of the way from that run's to the other's, k = 1 … n: the effects
    of all positions of `hook_embed` then add up to the difference between both runs, but for an error of order 1/n.

    Takes, for `batch_size` pairs at a time, two forwards and one backward (with `steps` n + 2 and n), however many
    sites there are. Memory: the captures of both forwards, their gradients, and all that a forward with gradients
    keeps, whose logits exist at one position only.

    An estimate is exact where what follows the site is linear, and the better the smaller the patch; it misleads most
    at the residual stream of early layers and where a norm or a softmax saturates. Refuses as `activation_patching`
    does, before anything is computed, and SchemaError for `steps` below 1.
    """
    if direction not in DIRECTIONS:
        raise SchemaError(f"direction = {direction!r} is unknown.{nearest(direction, DIRECTIONS)}")
    if batch_size < 1 or (steps is not None and steps < 1):
        raise SchemaError(f"batch_size = {batch_size} and steps = {steps}: at least 1")
    pairs = pairs_of(model, clean, corrupted)
    sites = sites_of(model, pairs, hooks, layers=layers, positions=positions, by_position=by_position)
    check_metric(model, metric, pairs.lengths)
    values = {kind: sites.blank(kind, model, pairs) for kind in sites.kinds}
    baselines = {name: np.empty(len(pairs), np.float32) for name in BASELINES}
    base, source = DIRECTIONS[direction]
    for first in range(0, len(pairs), batch_size):
        numbers = range(first, min(first + batch_size, len(pairs)))
        task = _Task(model=model, metric=metric, points=sites.points(), numbers=numbers)
        runs = {name: [rows[n] for n in numbers] for name, rows in _rows(pairs).items()}
        other = task.run(runs[source])
        own = task.run(runs[base], gradients=steps is None)
        gradients = own.gradients if steps is None else task.along_the_way(runs[base], own, other, steps)
        for name, run in ((base, own), (source, other)):
            baselines[name][list(numbers)] = run.metric.cpu().numpy()
        _fill(values, sites, pairs, numbers, own, other, gradients)
    said = f"{metric.unit} of the {base} run with {{kind}} of the {source} run, estimated by gradients"
    found = labelled(model, pairs, sites, metric, values, baselines, said)
    return found.assign_attrs(direction=direction, steps=0 if steps is None else steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """What a forward gave: captures and gradients by point, [pair, …], and the metric [pair]."""

    captures: Mapping[HookPoint, Tensor]
    metric: Tensor
    gradients: Mapping[HookPoint, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Task:
    """Runs of the pairs with these numbers, all of them in one forward."""

    model: Model
    metric: Metric
    points: tuple[HookPoint, ...]
    numbers: Sequence[int]

    def run(self, rows: Sequence[Tensor], hooks: HookSpec | None = None, *, gradients: bool = False) -> _Run:
        """Captures at the points and at the embedding, the metric, and if asked its gradients at the points."""
        spec = (hooks or HookSpec()).capture(*self.points, _EMBED, _FINAL)
        out = self.model.forward(rows, spec, logits=False, gradients=gradients)
        places = [metric_position(self.metric, length) for length in out.lengths]
        numbers = torch.tensor(list(self.numbers), device=out[_FINAL].device)
        with torch.set_grad_enabled(gradients):
            logits = self.model.unembedding.project(out[_FINAL][range(len(places)), places]).float()
            metric = self.metric.at_position(logits, numbers)
        found: dict[HookPoint, Tensor] = {}
        if gradients:
            at = [out[point] for point in self.points]
            parts = torch.autograd.grad(metric.sum(), at, allow_unused=True)
            for point, value, part in zip(self.points, at, parts, strict=True):
                found[point] = torch.zeros_like(value) if part is None else part
        captures = {point: value.detach() for point, value in out.captures.items()}
        return _Run(captures=captures, metric=metric.detach(), gradients=found)

    def along_the_way(self, rows: Sequence[Tensor], own: _Run, other: _Run, steps: int) -> dict[HookPoint, Tensor]:
        """Means of the gradients in runs whose embeddings lie between those of two."""
        total: dict[HookPoint, Tensor] = {}
        start, end = own.captures[_EMBED], other.captures[_EMBED]
        for k in range(1, steps + 1):
            between = HookSpec().intervene(_EMBED, Replace(start + k / steps * (end - start)))
            for point, gradient in self.run(rows, between, gradients=True).gradients.items():
                total[point] = total[point] + gradient / steps if point in total else gradient / steps
        return total


def _rows(pairs: Pairs) -> dict[str, list[Tensor]]:
    return {"clean": pairs.clean.rows(), "corrupted": pairs.corrupted.rows()}


def _fill(
    values: Mapping[str, NDArray[np.float32]],
    sites: Sites,
    pairs: Pairs,
    numbers: Sequence[int],
    own: _Run,
    other: _Run,
    gradients: Mapping[HookPoint, Tensor],
) -> None:
    """Put the estimates of some pairs in their place in the values of each kind."""
    for point in sites.points():
        here = own.captures[point].float()
        there = other.captures[point].float()
        # Where both are −∞, as scores of hidden keys are, nothing is moved.
        moved = torch.where(here == there, 0.0, there - here)
        effect = gradients[point].float() * moved
        dims = sites.dims(point.kind)
        summed = [axis for axis, dim in enumerate(point.dims) if axis and dim not in (*dims, "position")]
        kept = (effect.sum(summed) if summed else effect).cpu()
        axes = [dim for dim in point.dims[1:] if dim in (*dims, "position")]
        layer = sites.layers.index(point.layer) if point.layer is not None else None
        for row, number in enumerate(numbers):
            estimate = kept[row]
            if "position" in axes:
                axis = axes.index("position")
                chosen = torch.tensor(sites.at(pairs.lengths[number]))
                estimate = estimate.index_select(axis, chosen)
                estimate = estimate.movedim(axis, -1) if "position" in dims else estimate.sum(axis)
            result = (own.metric[row].cpu() + estimate).numpy()
            site = (number,) if layer is None else (number, layer)
            values[point.kind][(*site, *(slice(size) for size in result.shape))] = result


def patching_agreement(exact: xr.Dataset, approximate: xr.Dataset, *, least: float = 1e-3) -> xr.Dataset:
    """How well estimated effects of patches agree with measured ones: `activation_patching` and `attribution_patching`
    of the same sites.

    What is compared, all sites and pairs of a kind together, is how far each patch moves the metric from that of the
    run that is patched. Sites that both leave alone are left out, and those that are NaN: where the prompts do not
    differ yet, an estimate is exactly 0 and a measured effect rounding, less than `least` of the kind's largest effect.

    Gives, float64 along `kind`: `pearson` and `spearman` correlation (ties have their mean rank); `slope`, of the
    least-squares line of the estimates over the measured effects; `sign_agreement`, the fraction of effects of at least
    `least` of the largest whose estimate moves the same way; `n_site` and `n_signed` (int64), how many sites were
    compared, and how many of them have such an effect. NaN where there are too few, or they are all alike.

    SchemaError where the two have not the same variables, sites, prompts, direction and metric.
    """
    kinds = [str(name) for name in exact.data_vars if name not in BASELINES]
    _check_comparable(exact, approximate, kinds)
    base = DIRECTIONS[exact.attrs["direction"]][0]
    rows = []
    for kind in kinds:
        moved, estimated = (
            (result[kind] - result[base]).transpose(*exact[kind].dims).values.astype(np.float64).ravel()
            for result in (exact, approximate)
        )
        there = ~(np.isnan(moved) | np.isnan(estimated))
        rows.append(_agreement(moved[there], estimated[there], least))
    said = {
        "pearson": "Pearson correlation of estimated and measured effects",
        "spearman": "Spearman correlation of estimated and measured effects",
        "slope": "slope of estimated over measured effects",
        "sign_agreement": "fraction of effects whose sign is estimated rightly",
        "n_site": "sites compared",
        "n_signed": "sites with an effect that has a sign",
    }
    variables: dict[str, Any] = {
        name: ("kind", [row[n] for row in rows], {"units": "1", "long_name": said[name]}) for n, name in enumerate(said)
    }
    return xr.Dataset(variables, coords={"kind": kinds})


def _check_comparable(exact: xr.Dataset, approximate: xr.Dataset, kinds: Sequence[str]) -> None:
    for name in (*kinds, *BASELINES):
        if name not in exact or name not in approximate or exact[name].sizes != approximate[name].sizes:
            sizes = [dict(result[name].sizes) if name in result else None for result in (exact, approximate)]
            raise SchemaError(f"results of the same sites are compared, and {name} is {sizes[0]} and {sizes[1]}")
        for label in sorted(
            {*map(str, exact[name].dims), "token_id", "corrupted_token_id"} & {*map(str, exact.coords)}
        ):
            if label not in approximate.coords or not exact[label].equals(approximate[label]):
                raise SchemaError(f"results of the same sites are compared, and their {label} differ")
    for name in ("direction", "metric", "metric_position"):
        if exact.attrs.get(name) != approximate.attrs.get(name) or name not in exact.attrs:
            said = [result.attrs.get(name) for result in (exact, approximate)]
            raise SchemaError(f"results of the same {name} are compared, not of {said[0]} and {said[1]}")


def _agreement(moved: NDArray[np.float64], estimated: NDArray[np.float64], least: float) -> list[float]:
    from scipy.stats import rankdata

    has_effect = np.abs(moved) > least * np.abs(moved).max(initial=0.0)
    touched = has_effect | (estimated != 0)
    moved, estimated, signed = moved[touched], estimated[touched], has_effect[touched]
    same = float((np.sign(moved) == np.sign(estimated))[signed].mean()) if signed.any() else np.nan
    variance = float(np.square(moved - moved.mean()).sum()) if len(moved) else 0.0
    together = float(((moved - moved.mean()) * estimated).sum()) if len(moved) else 0.0
    slope = together / variance if variance > 0 else np.nan
    ranks = _correlation(rankdata(moved), rankdata(estimated))
    return [_correlation(moved, estimated), ranks, slope, same, len(moved), int(signed.sum())]


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if len(x) < 2:
        return float(np.nan)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt(np.square(x).sum() * np.square(y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else float(np.nan)
