"""Time mixing and channel mixing of RWKV-6 and RWKV-7. Legend as in `parts`; A channels of all heads together, n
inputs.

Sources: Peng et al. 2024 (arXiv:2404.05892) and 2025 (arXiv:2503.14456), and their authors' package `rwkv`, whose order
of operations this follows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HookError
from ..parts import ACTIVATIONS
from ..points import EFFECTIVE_ATTN, STATE
from ..spec import ModelSpec
from ..state_taps import StateTap
from ..taps import At, changes, flows
from .effective import attended, own_weight
from .states import LayerState
from .weights import ChannelMixWeights, LowRank, TimeMixWeights
from .wkv import Wkv, recur


@dataclass(slots=True, eq=False)
class Stretch:
    """The tokens of one run: how many of each sequence, `counts_B`, the rest of each row being padding; `within` [B, T]
    marks the tokens, None where there is no padding. `v_first` are the values of layer 0, once they are known."""

    counts_B: Tensor
    within_BT: Tensor | None
    v_first: Tensor | None = None

    def shifted(self, x_BTD: Tensor, before_BD: Tensor) -> Tensor:
        """Give at every token what stood at the one before it, at the first of the run what stood before that."""
        return torch.cat((before_BD[:, None], x_BTD[:, :-1]), 1)

    def last(self, x_BTD: Tensor, before_BD: Tensor) -> Tensor:
        """Give what stands at each sequence's last token, or stood before this run where it has none in it."""
        if self.within_BT is None:
            return x_BTD[:, -1].clone()  # a view would keep what stood at every token alive
        rows = torch.arange(len(x_BTD), device=x_BTD.device)
        last_BD = x_BTD[rows, self.counts_B.clamp_min(1) - 1]
        return torch.where((self.counts_B == 0)[:, None], before_BD, last_BD)

    def without_padding(self, wkv: Wkv) -> Wkv:
        """The same recurrence, in which padding changes no state: it neither decays, nor removes, nor writes."""
        if self.within_BT is None:
            return wkv
        within = self.within_BT[..., None, None]
        rate = None if wkv.rate is None else wkv.rate * within
        # A product would not do for decays and keys: −∞ or NaN times 0 is NaN.
        return replace(wkv, k=wkv.k.masked_fill(~within, 0), log_decay=wkv.log_decay.masked_fill(~within, 0), rate=rate)


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """What a version makes of the tokens: what drives the recurrence, and the gate [B, T, H, E]."""

    wkv: Wkv
    gate_BTHE: Tensor


def time_mix(
    x_BTD: Tensor, w: TimeMixWeights, spec: ModelSpec, layer: int, before: LayerState, stretch: Stretch, at: At
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the raw output [B, T, D] and, of the last token, the state [B, H, K, V] and what entered [B, D]."""
    assert spec.rwkv is not None
    if "rwkv.hook_in" in at:
        x_BTD = at["rwkv.hook_in"](x_BTD)
    delta_BTD = stretch.shifted(x_BTD, before.time_shift) - x_BTD
    inputs = _INPUTS[spec.rwkv.version](x_BTD, delta_BTD, w, spec, layer, stretch, at)
    reads_own = spec.rwkv.version == 6  # the bonus, there, is what a token reads of itself
    y_BTHE, last_BHKV = _recur(inputs.wkv, w.bonus if reads_own else None, before.wkv, stretch, at)
    if "rwkv.hook_wkv" in at:
        y_BTHE = at["rwkv.hook_wkv"](y_BTHE)
    normed_BTA = F.group_norm(
        y_BTHE.flatten(0, 1).flatten(1), spec.n_heads, w.norm_weight, w.norm_bias, spec.rwkv.group_norm_eps
    )
    z_BTHE = normed_BTA.view(y_BTHE.shape)
    if not reads_own:
        z_BTHE = z_BTHE + _bonus(inputs.wkv, w.bonus)
    z_BTHE = z_BTHE.to(x_BTD.dtype) * inputs.gate_BTHE
    if "rwkv.hook_z" in at:
        z_BTHE = at["rwkv.hook_z"](z_BTHE)
    out_BTD = F.linear(z_BTHE.flatten(-2), w.out)
    if "rwkv.hook_out" in at:
        out_BTD = at["rwkv.hook_out"](out_BTD)
    return out_BTD, last_BHKV, stretch.last(x_BTD, before.time_shift)


def _bonus(wkv: Wkv, bonus_HE: Tensor) -> Tensor:
    """What a token reads of its own value, in float32 [B, T, H, E]."""
    return own_weight(wkv, bonus_HE)[..., None] * wkv.v.float()


def _recur(wkv: Wkv, bonus_HE: Tensor | None, state_BHKV: Tensor, stretch: Stretch, at: At) -> tuple[Tensor, Tensor]:
    """Run the recurrence, stopping where a state is looked at or changed. With the bonus of version 6."""
    states = at.get(STATE)
    driven = stretch.without_padding(wkv)
    read: list[Tensor] = []
    first, n_positions = 0, wkv.r.shape[1]
    if isinstance(states, StateTap):
        driven = replace(driven, k=states.written(driven.k))
        for stop in states.stops:
            y_BTHE, state_BHKV = recur(driven.part(first, stop + 1), state_BHKV)
            read.append(y_BTHE)
            first, state_BHKV = stop + 1, states.at(stop, state_BHKV)
    if first < n_positions:
        y_BTHE, state_BHKV = recur(driven.part(first, n_positions), state_BHKV)
        read.append(y_BTHE)
    y_BTHE = torch.cat(read, 1) if len(read) > 1 else read[0]
    if bonus_HE is not None:
        y_BTHE = y_BTHE + _bonus(wkv, bonus_HE)
    if EFFECTIVE_ATTN in at:
        own_BTH = None if bonus_HE is None else own_weight(wkv, bonus_HE)
        y_BTHE = _attend(y_BTHE, driven, own_BTH, at)
    if isinstance(states, StateTap):
        states.finish()
    return y_BTHE, state_BHKV


def _attend(y_BTHE: Tensor, wkv: Wkv, own_BTH: Tensor | None, at: At) -> Tensor:
    """Fire the point of effective attention; add to what was read what an intervention there lets be read besides."""
    given_BHQS = attended(wkv, own_BTH)
    # A copy, where gradients are kept, for what is captured must not be what it is compared with.
    effective_BHQS = at[EFFECTIVE_ATTN](given_BHQS.clone() if torch.is_grad_enabled() else given_BHQS)
    if not flows(at, EFFECTIVE_ATTN):
        return y_BTHE
    more_BTHE = ((effective_BHQS - given_BHQS) @ wkv.v.float().transpose(1, 2)).transpose(1, 2)
    if torch.is_grad_enabled():
        return y_BTHE + more_BTHE
    changed_BTH1 = (effective_BHQS != given_BHQS).any(-1).transpose(1, 2)[..., None]
    return torch.where(changed_BTH1, y_BTHE + more_BTHE, y_BTHE)


def _heads(x_BTA: Tensor, spec: ModelSpec) -> Tensor:
    return x_BTA.view(*x_BTA.shape[:-1], spec.n_heads, spec.d_head)


def _fire(value: Tensor, kind: str, at: At) -> Tensor:
    return at[kind](value) if kind in at else value


def _low_rank(x_BTD: Tensor, w: LowRank, activation: Callable[[Tensor], Tensor]) -> Tensor:
    made = F.linear(activation(F.linear(x_BTD, w.down)), w.up)
    return made if w.start is None else w.start + made


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _decay(log_decay_BTHE: Tensor, layer: int, at: At) -> Tensor:
    """Fire the point of the decay, and give its logarithm."""
    if "rwkv.hook_decay" not in at:
        return log_decay_BTHE
    given_BTHE = log_decay_BTHE.exp()
    decay_BTHE = at["rwkv.hook_decay"](given_BTHE)
    if not flows(at, "rwkv.hook_decay"):
        return log_decay_BTHE
    if changes(at, "rwkv.hook_decay") and not bool((decay_BTHE >= 0).all()):
        raise HookError(
            f"an intervention at blocks.{layer}.rwkv.hook_decay gave a factor below 0, or NaN; decays are from 0 on"
        )
    changed_BTHE = decay_BTHE.clamp_min(torch.finfo(decay_BTHE.dtype).tiny).log()
    if torch.is_grad_enabled():
        return changed_BTHE
    return torch.where(decay_BTHE != given_BTHE, changed_BTHE, log_decay_BTHE)


def _finch(
    x_BTD: Tensor, delta_BTD: Tensor, w: TimeMixWeights, spec: ModelSpec, layer: int, stretch: Stretch, at: At
) -> _Inputs:
    """Version 6: how much of the token before enters depends on the token; so does the decay."""
    assert w.mix_x is not None
    assert w.mix_down is not None
    assert w.mix_up is not None
    assert w.g is not None
    made_BTR = torch.tanh(F.linear(torch.addcmul(x_BTD, delta_BTD, w.mix_x), w.mix_down))
    made_nBTR = made_BTR.unflatten(-1, (len(w.mix_up), -1)).movedim(-2, 0)
    mix_nBTD = made_nBTR @ w.mix_up.mT[:, None] + w.mix[:, None, None]
    for_r, for_w, for_k, for_v, for_g = torch.addcmul(x_BTD, delta_BTD, mix_nBTD)
    r_BTHE = _fire(_heads(F.linear(for_r, w.r), spec), "rwkv.hook_r", at)
    omega_BTA = _low_rank(for_w, w.decay, torch.tanh).float()
    log_decay_BTHE = _decay(_heads(-omega_BTA.exp(), spec), layer, at)
    k_BTHE = _fire(_heads(F.linear(for_k, w.k), spec), "rwkv.hook_k", at)
    v_BTHE = _fire(_heads(F.linear(for_v, w.v), spec), "rwkv.hook_v", at)
    gate_BTHE = _fire(_heads(F.silu(F.linear(for_g, w.g)), spec), "rwkv.hook_g", at)
    return _Inputs(Wkv(r=r_BTHE, k=k_BTHE, v=v_BTHE, log_decay=log_decay_BTHE), gate_BTHE)


_FASTEST = math.exp(-0.5)  # no decay of RWKV-7 has a logarithm below minus this


def _goose(
    x_BTD: Tensor, delta_BTD: Tensor, w: TimeMixWeights, spec: ModelSpec, layer: int, stretch: Stretch, at: At
) -> _Inputs:
    """Version 7: keys that are removed at a learning rate of their own, and values that remember those of layer 0."""
    assert w.rate is not None
    assert w.gate is not None
    assert w.removal is not None
    assert w.rate_on_k is not None
    for_r, for_w, for_k, for_v, for_a, for_g = (torch.addcmul(x_BTD, delta_BTD, mix_D) for mix_D in w.mix)
    r_BTHE = _fire(_heads(F.linear(for_r, w.r), spec), "rwkv.hook_r", at)
    omega_BTA = _low_rank(for_w, w.decay, torch.tanh).float()
    log_decay_BTHE = _decay(_heads(-_FASTEST * omega_BTA.sigmoid(), spec), layer, at)
    rate_BTHE = _fire(_heads(_low_rank(for_a, w.rate, _as_it_is).sigmoid(), spec), "rwkv.hook_a", at)
    k_BTA = F.linear(for_k, w.k)
    removal_BTHE = F.normalize(_heads(k_BTA * w.removal, spec), dim=-1)
    removal_BTHE = _fire(removal_BTHE, "rwkv.hook_kk", at)
    k_BTHE = _heads(k_BTA * (1 + (rate_BTHE.flatten(-2) - 1) * w.rate_on_k), spec)
    k_BTHE = _fire(k_BTHE, "rwkv.hook_k", at)
    v_BTA = F.linear(for_v, w.v)
    if w.value is not None and stretch.v_first is not None:
        v_BTA = v_BTA + (stretch.v_first - v_BTA) * _low_rank(for_v, w.value, _as_it_is).sigmoid()
    v_BTHE = _fire(_heads(v_BTA, spec), "rwkv.hook_v", at)
    if layer == 0:
        stretch.v_first = v_BTHE.flatten(-2)
    gate_BTHE = _fire(_heads(_low_rank(for_g, w.gate, torch.sigmoid), spec), "rwkv.hook_g", at)
    wkv = Wkv(r=r_BTHE, k=k_BTHE, v=v_BTHE, log_decay=log_decay_BTHE, removal=removal_BTHE, rate=rate_BTHE)
    return _Inputs(wkv, gate_BTHE)


_INPUTS: Mapping[int, Callable[..., _Inputs]] = {6: _finch, 7: _goose}


def channel_mix(
    x_BTD: Tensor, w: ChannelMixWeights, spec: ModelSpec, before_BD: Tensor, stretch: Stretch, at: At
) -> tuple[Tensor, Tensor]:
    """Give channel mixing's output [B, T, D], down(relu(up(x mixed with the token before))²), in version 6 times the
    receptance; and what entered at the last token [B, D]."""
    x_BTD = _fire(x_BTD, "mlp.hook_in", at)
    delta_BTD = stretch.shifted(x_BTD, before_BD) - x_BTD
    pre_BTF = _fire(F.linear(torch.addcmul(x_BTD, delta_BTD, w.mix_k), w.up), "mlp.hook_pre", at)
    post_BTF = _fire(ACTIVATIONS[spec.activation](pre_BTF), "mlp.hook_post", at)
    last_BD = stretch.last(x_BTD, before_BD)
    if w.receptance is None or w.mix_r is None:
        return _fire(F.linear(post_BTF, w.down), "mlp.hook_out", at), last_BD
    receptance_BTD = F.linear(torch.addcmul(x_BTD, delta_BTD, w.mix_r), w.receptance).sigmoid()
    receptance_BTD = _fire(receptance_BTD, "mlp.hook_receptance", at)
    return receptance_BTD * _fire(F.linear(post_BTF, w.down), "mlp.hook_out", at), last_BD
