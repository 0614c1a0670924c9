"""What recurrent models remember of single tokens: their writes to the state left out or scaled, one at a time.

At `rwkv.hook_state` a token t adds k_t v_tᵀ to the state that the tokens behind it read; everything else, such as decay
and what RWKV-7 removes, happens as ever. In RWKV-6 a token reads the state before it writes, and is itself unaffected;
in RWKV-7 it reads its own write, but for a bonus that does not pass through the state. State knockout and steering
are candle-mi's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.addressing import Index, counted, listed
from ..models.errors import ModelError
from ..models.model import Model
from ..models.points import STATE, HookPoint
from ..models.state_taps import StateSteering
from ..models.taps import EMPTY
from .intervention_effect import intervention_effect
from .metrics import Metric
from .prompts import Prompt, one_prompt, position_coords
from .steering import Tokens, in_batches, logits_at, prediction_change, token_ids_of


def state_knockout_effect(
    model: Model,
    prompt: Prompt,
    positions: Index,
    *,
    layers: Index | None = None,
    heads: Index | None = None,
    scale: float = 0.0,
    top: int = 10,
) -> xr.Dataset:
    """What becomes of a prompt's predictions when the tokens at `positions` are not written to the state, all together.

    `positions`, `layers` (None: all) and `heads` (None: all) are numbers (negative ones count from the end), lists or
    slices. `scale` multiplies what is written: 0 leaves it out, 1 changes nothing.

    Gives what `intervention_effect` gives, without the dimension `sequence`: `kl_divergence` [position], the `top`
    tokens that changed most, and the coordinates of the positions. Memory as there. ModelError for a model that is not
    recurrent, HookError and SchemaError for what is not there, before anything is computed.
    """
    _check_recurrent(model)
    ids = one_prompt(model, prompt)
    steer = StateSteering(scale).at(position=_places(positions, len(ids)))
    if heads is not None:
        counted(heads, "head", model.spec.n_heads)
        steer = steer.at(head=heads)
    hooks = EMPTY
    for layer in _layers(model, layers):
        hooks = hooks.intervene(HookPoint(STATE, layer), steer)
    found = intervention_effect(model, ids[None], hooks, top=top).isel(sequence=0, drop=True)
    found["kl_divergence"].attrs = {"long_name": "KL(base ‖ changed)", "units": "nats"}
    return found.assign_coords(position_coords(model, ids))


def state_sweep(
    model: Model,
    prompt: Prompt,
    *,
    metric: Metric | None = None,
    scale: float = 0.0,
    layers: Index | None = None,
    positions: Index | None = None,
    heads: Index | None = None,
    tokens: Tokens | None = None,
    batch_size: int = 32,
) -> xr.Dataset:
    """What a prediction loses when one token is not written to the state of one layer, for every token and layer: a
    heat map of what is remembered where.

    `layers` and `positions` (None: all) are those swept; what tokens write to `heads` (None: all) is multiplied by
    `scale`: 0 leaves it out, 1 changes nothing. The prediction is that at the position of `metric`, at the last one
    without a metric. `tokens` are ids, or words, as `find_token_id(word, last=True)` finds them.

    Gives [layer, position], float32: `kl_divergence` (nats) from the model as it is; with a metric `effect`, changed −
    base; with tokens `probability` and `logit_change` [layer, position, vocab], changed − base. Without those
    dimensions: `baseline`, the metric as it is, and `baseline_probability` [vocab]. Coordinates of the positions are
    those of the tokens that are not written; what lies behind the prediction has no effect on it.

    Forwards of `batch_size` sequences, one for each layer and position. Memory: the activations of a batch in one
    layer, and logits at one position of each. ModelError for a model that is not recurrent, HookError and SchemaError
    for what is not there, before anything is computed.
    """
    _check_recurrent(model)
    ids = one_prompt(model, prompt)
    chosen, places = _layers(model, layers), _places(slice(None) if positions is None else positions, len(ids))
    (read,) = _places(-1 if metric is None else metric.position, len(ids))
    if heads is not None:
        counted(heads, "head", model.spec.n_heads)
    if not np.isfinite(scale):
        raise SchemaError(f"writes cannot be multiplied by {scale}: the scale must be finite")
    asked = token_ids_of(model, tokens)
    batches = in_batches([(layer, place) for layer in chosen for place in places], batch_size)
    base = logits_at(model, ids[None], EMPTY, read)[0]
    found: list[xr.Dataset] = []
    for variants in batches:
        hooks = EMPTY
        for row, (layer, place) in enumerate(variants):
            steer = StateSteering(scale).at(sequence=row, position=place)
            hooks = hooks.intervene(HookPoint(STATE, layer), steer if heads is None else steer.at(head=heads))
        changed = logits_at(model, ids.expand(len(variants), -1), hooks, read)
        found.append(_measured(model, base, changed, metric, asked))
    swept = _by_layer(xr.concat(found, "variant", data_vars="minimal", coords="minimal", compat="override"), chosen)
    at = xr.Dataset(coords=position_coords(model, ids)).isel(position=places)
    return swept.assign_coords(at.coords).assign_coords(layer=chosen, scale=float(scale))


def _measured(model: Model, base: Tensor, changed: Tensor, metric: Metric | None, tokens: Sequence[int]) -> xr.Dataset:
    """What is told of logits [variant, vocab], along `variant`."""
    found = prediction_change(model, base, changed, "variant", tokens)
    if metric is None:
        return found
    before = metric.at_position(base[None], torch.zeros(1, dtype=torch.int64))
    effect = metric.at_position(changed, torch.zeros(len(changed), dtype=torch.int64)) - before
    found["effect"] = ("variant", effect.numpy(), {"long_name": f"{metric.unit}, changed − base", "units": metric.unit})
    found["baseline"] = ((), before[0].numpy(), {"long_name": metric.unit, "units": metric.unit})
    return found


def _by_layer(flat: xr.Dataset, layers: Sequence[int]) -> xr.Dataset:
    """Give the dimension `variant` as [layer, position]."""
    found = xr.Dataset(coords={name: flat[name] for name in flat.coords})
    for name, value in flat.data_vars.items():
        if "variant" in value.dims:
            rest = value.dims[1:]
            shape = (len(layers), -1, *value.shape[1:])
            found[name] = (("layer", "position", *rest), value.values.reshape(shape), value.attrs)
        else:
            found[name] = value
    return found


def _check_recurrent(model: Model) -> None:
    if model.spec.rwkv is None:
        raise ModelError(
            f"this model ({model.spec.family}) is not recurrent and keeps no state: what a token is remembered by is "
            f"attention, whose edges Knockout and SteerAttention change"
        )


def _layers(model: Model, layers: Index | None) -> list[int]:
    n_layers = model.spec.n_layers
    return list(listed(counted(slice(None) if layers is None else layers, "layer", n_layers), n_layers))


def _places(positions: Index, n_positions: int) -> list[int]:
    return list(listed(counted(positions, "position", n_positions), n_positions))
