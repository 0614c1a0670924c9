"""Steering convergence: whether the layers above an injection lead the residual stream back to where it was.

What tells a prompt from a contrastive one in a layer, v_ℓ = clean − contrastive at the last token, is added there, and
every layer's residual stream is compared with what it is without that. A layer that is again as good as parallel to it
has absorbed the push. The protocol is candle-mi's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.interventions import Add
from ..models.model import Model
from ..models.points import HookPoint
from ..models.taps import HookSpec
from .prompts import Prompt, one_prompt
from .steering import Tokens, in_batches, logits_at, middle_layer, prediction_change, token_ids_of

RESID = "hook_resid_post"
STRENGTHS = tuple(np.linspace(0.5, 6.0, 12).tolist())
"""Multiples of v_ℓ that a sweep injects: 0.5, 1.0, … 6.0."""
ABSORBED = 0.95
"""Cosine from which on a residual stream counts as the one without injection."""
NEVER = -1


def steering_convergence(
    model: Model,
    prompt: Prompt,
    contrastive: Prompt,
    *,
    strength: float = 1.0,
    layers: Sequence[int] | None = None,
    threshold: float = ABSORBED,
    tokens: Tokens | None = None,
    batch_size: int = 32,
) -> xr.Dataset:
    """Inject v_ℓ · `strength` into the last token of `prompt` after each layer ℓ in turn, and follow what comes of it.

    `contrastive` is read for its last token alone and may have another length. `layers` are those injected into, all by
    default. `tokens` are ids, or words, as `find_token_id(word, last=True)` finds them.

    Gives `cosine` [injection_layer, layer] (float32) of the last token's residual stream after each layer with that of
    the same layer without injection, 1 below the injection; `distance` [injection_layer, layer] (float32), the length
    of their difference over that of the stream without injection; `absorption_layer` [injection_layer] (int32), the
    first layer above the injection whose cosine is at least `threshold`, −1 where there is none, as there is none above
    the last layer; `absorption_depth` (float32), by how many layers that is above, else NaN; `kl_divergence` (nats) of
    the prediction after the last token, and with tokens `probability` and `logit_change` (changed − base)
    [injection_layer, vocab]. `direction_norm` [injection_layer] is the length of v_ℓ. Without a dimension:
    `best_injection_layer`, the highest that is absorbed, and where none is the one with the least divergence;
    `baseline_probability` [vocab].

    Tokens of one kind have much in common, which a cosine counts as likeness: where that at the injection itself, the
    diagonal of `cosine`, is above the threshold already, there was nothing to be absorbed, and `distance` alone tells
    whether layers above lead back.

    A forward for `batch_size` layers. Memory: their activations in one layer, and two vectors of each layer.
    SchemaError, ModelError and HookError for what is not there, before anything is computed.
    """
    ids, other, asked = _checked(model, prompt, contrastive, tokens, threshold, [strength])
    chosen = [middle_layer(model, layer) for layer in (range(model.spec.n_layers) if layers is None else layers)]
    batches = in_batches([(layer, strength) for layer in chosen], batch_size)
    found = _followed(model, ids, other, batches, asked, "injection_layer", threshold)
    found = found.assign_coords(injection_layer=chosen)
    absorbed = [layer for layer, at in zip(chosen, found["absorption_layer"].values, strict=True) if at != NEVER]
    closest = chosen[int(found["kl_divergence"].values.argmin())]
    attrs = {"long_name": "highest layer whose injection is absorbed, or the one of least divergence"}
    found["best_injection_layer"] = ((), max(absorbed, default=closest), attrs)
    return found.assign_coords(strength=strength)


def strength_sweep(
    model: Model,
    prompt: Prompt,
    contrastive: Prompt,
    *,
    layer: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    threshold: float = ABSORBED,
    tokens: Tokens | None = None,
    batch_size: int = 32,
) -> xr.Dataset:
    """Inject v_ℓ of one layer (the middle one by default; `best_injection_layer` of `steering_convergence` is another)
    with each of `strengths`.

    Gives what `steering_convergence` gives but the best layer, along `strength` in the place of `injection_layer`,
    which is a coordinate without a dimension. Memory and errors as there.
    """
    ids, other, asked = _checked(model, prompt, contrastive, tokens, threshold, strengths)
    at = middle_layer(model, layer)
    batches = in_batches([(at, float(strength)) for strength in strengths], batch_size)
    found = _followed(model, ids, other, batches, asked, "strength", threshold)
    attrs = {"long_name": "strength of the injection", "units": "lengths of v"}
    return found.assign_coords(strength=("strength", list(map(float, strengths)), attrs), injection_layer=at)


def _checked(
    model: Model,
    prompt: Prompt,
    contrastive: Prompt,
    tokens: Tokens | None,
    threshold: float,
    strengths: Sequence[float],
) -> tuple[Tensor, Tensor, list[int]]:
    if not -1 <= threshold <= 1:
        raise SchemaError(f"threshold = {threshold}: a cosine is expected, from −1 to 1")
    if not len(strengths) or not np.isfinite(np.asarray(strengths, dtype=np.float64)).all():
        raise SchemaError(f"strengths of {list(strengths)} are asked for: at least one, all of them finite")
    ids, other = one_prompt(model, prompt), one_prompt(model, contrastive)
    if torch.equal(ids, other):
        raise SchemaError("prompt and contrastive prompt are the same tokens: v, their difference, is 0 in every layer")
    return ids, other, token_ids_of(model, tokens)


def _followed(
    model: Model,
    ids: Tensor,
    contrastive: Tensor,
    batches: Sequence[Sequence[tuple[int, float]]],
    tokens: Sequence[int],
    dim: str,
    threshold: float,
) -> xr.Dataset:
    """Inject at (layer, strength) in each variant, and follow it, along `dim`."""
    natural: list[Tensor] = []
    contrast: list[Tensor] = []
    everywhere = HookSpec().capture(f"blocks.*.{RESID}")
    base = logits_at(model, ids[None], everywhere, -1, sink=lambda point, value: natural.append(value[0, -1].float()))[
        0
    ]
    model.forward(
        contrastive[None], everywhere, logits=False, sink=lambda point, value: contrast.append(value[0, -1].float())
    )
    natural_LD = torch.stack(natural)
    v_LD = natural_LD - torch.stack(contrast)
    likeness: list[Tensor] = []
    changed: list[Tensor] = []
    for variants in batches:
        seen: list[Tensor] = []
        hooks = everywhere
        for row, (layer, strength) in enumerate(variants):
            push = Add(v_LD[layer], scale=strength).at(sequence=row, position=-1)
            hooks = hooks.intervene(HookPoint(RESID, layer), push)

        def compare(point: HookPoint, value: Tensor, seen: list[Tensor] = seen) -> None:
            assert point.layer is not None
            here_D, value_BD = natural_LD[point.layer].double(), value[:, -1].double()
            away_B = (value_BD - here_D).norm(dim=-1) / here_D.norm()
            seen.append(torch.stack((torch.cosine_similarity(value_BD, here_D, dim=-1), away_B), -1).cpu())

        changed.append(logits_at(model, ids.expand(len(variants), -1), hooks, -1, sink=compare))
        likeness.append(torch.stack(seen, 1).float())
    found = prediction_change(model, base, torch.cat(changed), dim, tokens)
    cosine, distance = torch.cat(likeness).numpy().transpose(2, 0, 1)
    injected = np.array([layer for variants in batches for layer, _ in variants])
    at = _absorption(cosine, injected, threshold)
    depth = np.where(at == NEVER, np.nan, at - injected).astype(np.float32)
    told = {
        "cosine": ((dim, "layer"), cosine, "with the stream without injection", "1"),
        "distance": ((dim, "layer"), distance, "from the stream without injection, over its length", "1"),
        "absorption_layer": (dim, at, f"first layer above with a cosine ≥ {threshold:g}; −1: none", "layer"),
        "absorption_depth": (dim, depth, "layers from injection to absorption", "layers"),
        "direction_norm": (dim, v_LD.norm(dim=-1).cpu().numpy()[injected], "length of v", "residual stream"),
    }
    for name, (dims, value, long_name, units) in told.items():
        found[name] = (dims, value, {"long_name": long_name, "units": units})
    return found.assign_coords(layer=np.arange(model.spec.n_layers))


def _absorption(cosine: NDArray[np.float32], injected: NDArray[np.int_], threshold: float) -> NDArray[np.int32]:
    """The first layer above each injection where cosine [variant, layer] reaches the threshold, or NEVER."""
    absorbed = (cosine >= threshold) & (np.arange(cosine.shape[1]) > injected[:, None])
    return np.where(absorbed.any(1), absorbed.argmax(1), NEVER).astype(np.int32)
