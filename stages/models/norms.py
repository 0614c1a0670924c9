"""Norms: of the residual stream, of what is added to it, and of queries and keys. Legend as in `parts`.

Each is computed by torch's own kernel, in one pass. The scale and the normalised value are worked out beside it where
they are captured, so that a capture changes no bit, and take its place only in the tokens in which an intervention
changed them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .reader import Norm
from .spec import ModelSpec
from .taps import At, flows


def _rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps). Source: Zhang and Sennrich 2019."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


def _layer(x: Tensor, eps: float) -> Tensor:
    """(x − mean(x)) / sqrt(var(x) + eps). Source: Ba, Kiros and Hinton 2016."""
    return F.layer_norm(x, x.shape[-1:], None, None, eps)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class _Kind:
    normalize: Callable[[Tensor, float], Tensor]
    centre: Callable[[Tensor], Tensor]


NORMS: Mapping[str, _Kind] = {"rms": _Kind(_rms, _as_it_is), "layer": _Kind(_layer, _centred)}
"""The norms by the names that `ModelSpec.norm` takes."""

_POINTS: Mapping[str, tuple[str, str]] = {
    name: (f"{name}.hook_scale", f"{name}.hook_normalized") for name in ("ln1", "ln2", "ln_final", "embed.ln")
}


def normalize(x: Tensor, w: Norm, spec: ModelSpec) -> Tensor:
    """Give the norm of x along its last axis, same shape and dtype; the statistics are computed in float32.

    The order of casts is that of transformers: Llama's norm casts back before the weight is applied, Gemma's and
    OLMo 2's after it (`spec.norm_float32`).
    """
    if spec.norm == "layer" and not spec.norm_float32:
        return F.layer_norm(x, x.shape[-1:], w.weight, w.bias, spec.norm_eps)
    wide = x.float() if spec.norm_float32 else x
    return _weighted(NORMS[spec.norm].normalize(wide, spec.norm_eps), w).to(x.dtype)


def _weighted(normalized: Tensor, w: Norm) -> Tensor:
    """Apply weight and bias in place: nobody else holds the value, and a new tensor of this size costs page faults."""
    if w.weight is not None:
        normalized = normalized.mul_(w.weight)
    return normalized if w.bias is None else normalized.add_(w.bias)


def norm(x_BTD: Tensor, w: Norm, spec: ModelSpec, at: At, name: str) -> Tensor:
    """Give the norm of the residual stream, with its points: `hook_scale` [B, T], the root of mean square or variance
    plus eps, in float32; `hook_normalized` [B, T, D], the quotient, before the norm's weight, in the dtype of x."""
    scale_kind, normalized_kind = _POINTS[name]
    if scale_kind not in at and normalized_kind not in at:
        return normalize(x_BTD, w, spec)
    kind = NORMS[spec.norm]
    normalized_BTD = plain_BTD = kind.normalize(x_BTD, spec.norm_eps)
    if scale_kind in at:
        normalized_BTD = _scaled(x_BTD, plain_BTD, spec, at, scale_kind)
    if normalized_kind in at:
        normalized_BTD = at[normalized_kind](normalized_BTD)
    in_two_steps = spec.norm == "rms" and w.bias is None and (x_BTD.dtype == torch.float32 or not spec.norm_float32)
    out_BTD = plain_BTD * w.weight if in_two_steps and w.weight is not None else normalize(x_BTD, w, spec)
    if not flows(at, scale_kind) and not flows(at, normalized_kind):
        return out_BTD
    wide = normalized_BTD.float() if spec.norm_float32 else normalized_BTD
    weighted_BTD = _weighted(wide.clone(), w).to(x_BTD.dtype)
    return _where_changed(normalized_BTD, plain_BTD, weighted_BTD, out_BTD)


def _scaled(x_BTD: Tensor, plain_BTD: Tensor, spec: ModelSpec, at: At, scale_kind: str) -> Tensor:
    """Fire the point of the scale; give the quotient, by another scale in the tokens that were given one."""
    centred_BTD = NORMS[spec.norm].centre(x_BTD.float())
    given_BT = centred_BTD.square().mean(-1).add_(spec.norm_eps).sqrt()
    scale_BT = at[scale_kind](given_BT)
    if not flows(at, scale_kind):
        return plain_BTD
    divided_BTD = (centred_BTD / scale_BT[..., None]).to(x_BTD.dtype)
    return _where_changed(scale_BT[..., None], given_BT[..., None], divided_BTD, plain_BTD)


def _where_changed(now: Tensor, before: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Give `new` in the tokens in which `now` differs from `before`, `old` elsewhere; `new` throughout where gradients
    are wanted, for they must flow through `now` even if it is equal."""
    if torch.is_grad_enabled():
        return new
    return torch.where((now != before).any(-1, keepdim=True), new, old)
