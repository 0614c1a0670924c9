"""Activation patching: which sites carry what divides two prompts, one site at a time.

Vig et al. (2020), "Investigating Gender Bias in Language Models Using Causal Mediation Analysis"; Meng et al. (2022),
"Locating and Editing Factual Associations in GPT"; Zhang and Nanda (2023), "Towards Best Practices of Activation
Patching in Language Models: Metrics and Methods", whose words for both directions are used here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.errors import nearest
from ..models.model import Model
from ..models.points import HookPoint, dims_of
from ..models.taps import HookSpec
from .metrics import Metric
from .patching import (
    Sites,
    Variant,
    check_metric,
    labelled,
    pairs_of,
    patch,
    run_baselines,
    run_variants,
    sites_of,
)
from .prompts import Prompts

Direction = Literal["denoising", "noising"]

DIRECTIONS: Mapping[str, tuple[str, str]] = {"denoising": ("corrupted", "clean"), "noising": ("clean", "corrupted")}
"""The run that is patched, and the one that the patches come from."""


def activation_patching(
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
    batch_size: int = 32,
) -> xr.Dataset:
    """Patch every site of some kinds of hook points, one a run, and give the metric of every patched run.

    `clean` and `corrupted`: prompts, texts or token ids, paired in their order, equally many tokens in each pair.
    `metric` is measured on the prompt that is run, with the token or logits of its own that the metric has for the
    pair. `direction`: "denoising" puts values of the clean run into the corrupted one, and what restores the metric is
    sufficient; "noising" puts corrupted values into the clean run, and what breaks it is necessary.

    `hooks` are kinds such as `hook_resid_pre`, `attn.hook_z` or `attn.hook_pattern`; `layers` and `positions` (negative
    ones count from the end of each prompt) None mean all. A site is a layer, a head or kv_head where the kind has them,
    and a position where it has them; without `by_position` all positions (those in `positions`) are patched at once. A
    kind laid out by query and key, such as a pattern, is patched head by head, whole.

    Gives one variable a kind, float32, along `pair`, `layer`, `head` or `kv_head`, and `position`: the metric of the
    run with that site patched; NaN beyond the end of a shorter pair. `clean` and `corrupted` [pair]: the metric of both
    runs. `recovery` puts the one between the others. Coordinates: see `pair_coords`. Units are the metric's.

    Takes, for each pair, one forward of the source, which captures the kinds, and a run for every site, `batch_size`
    runs to a forward. Memory: those captures, and a forward of `batch_size` sequences whose logits exist at one
    position only. Attention whose scores or pattern are patched is computed step by step and rounds otherwise (1e-6).

    Everything that does not fit is refused before anything is computed: SchemaError for prompts that cannot be paired,
    a metric's position or token that is not there, an unknown direction and what `sites_of` refuses; HookError for
    kinds and layers that the model does not have.
    """
    if direction not in DIRECTIONS:
        raise SchemaError(f"direction = {direction!r} is unknown.{nearest(direction, DIRECTIONS)}")
    if batch_size < 1:
        raise SchemaError(f"batch_size = {batch_size}: at least 1 variant is run at a time")
    pairs = pairs_of(model, clean, corrupted)
    sites = sites_of(model, pairs, hooks, layers=layers, positions=positions, by_position=by_position)
    check_metric(model, metric, pairs.lengths)
    base, source = DIRECTIONS[direction]
    values = {kind: sites.blank(kind, model, pairs) for kind in sites.kinds}
    baselines = run_baselines(model, pairs, metric)
    for number, (clean_ids, corrupted_ids) in enumerate(pairs):
        runs = {"clean": clean_ids, "corrupted": corrupted_ids}
        base_ids, source_ids = runs[base], runs[source]
        captured = model.forward(source_ids[None], HookSpec().capture(*sites.points()), logits=False).captures
        variants = _variants(model, sites, captured, len(base_ids))
        found = run_variants(model, base_ids, variants, metric, prompt=number, batch_size=batch_size).numpy()
        _fill(values, number, found, model, sites, len(base_ids))
    said = f"{metric.unit} of the {base} run with {{kind}} of the {source} run"
    return labelled(model, pairs, sites, metric, values, baselines, said).assign_attrs(direction=direction)


def _variants(model: Model, sites: Sites, captured: Mapping[HookPoint, Tensor], n_positions: int) -> Iterator[Variant]:
    """One run a site, kind by kind, in the order of `Sites.dims`."""
    for kind in sites.kinds:
        places = sites.places(kind, model, n_positions)
        at_once = {} if sites.by_position or "position" not in dims_of(kind) else {"position": sites.at(n_positions)}
        for site in itertools.product(*places.values()):
            where = dict(zip(places, site, strict=True))
            point = HookPoint(kind, where.pop("layer", None))
            yield [patch(point, captured[point], **where, **at_once)]


def _fill(
    values: Mapping[str, NDArray[np.float32]],
    number: int,
    found: NDArray[np.float32],
    model: Model,
    sites: Sites,
    n_positions: int,
) -> None:
    """Put what was found for the sites of a pair, in their order, in its place in the values of each kind."""
    start = 0
    for kind, value in values.items():
        shape = [len(places) for places in sites.places(kind, model, n_positions).values()]
        beyond = start + math.prod(shape)
        place: tuple[int | slice, ...] = (number, *(slice(size) for size in shape))
        value[place] = found[start:beyond].reshape(shape)
        start = beyond
