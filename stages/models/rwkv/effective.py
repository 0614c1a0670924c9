"""The attention that a recurrence amounts to: how much of the value of each token is read at each later one.

What is read is linear in the values: y_t = Σ_s α[t, s] v_s, plus what is read of a state that was there before. So α is
what the recurrence itself gives when token s carries, as its value, the s-th unit vector. Definition: candle-mi's
`RwkvEffectiveAttn` before its ReLU and division by the row's sum; for RWKV-6 the bonus stands on the diagonal.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .wkv import Wkv, recur


def attended(wkv: Wkv, own_BTH: Tensor | None) -> Tensor:
    """Give α in float32 [B, H, T, T], query before key: 0 above the diagonal, of either sign elsewhere. `own_BTH` is
    what each token reads of itself besides, in version 6. Takes the memory of attention patterns several times over."""
    n_sequences, n_positions, n_heads, n_channels = wkv.r.shape
    units_TT = torch.eye(n_positions, device=wkv.r.device)
    units_BTHT = units_TT[None, :, None].expand(n_sequences, -1, n_heads, -1)
    nothing = torch.zeros(n_sequences, n_heads, n_channels, n_positions, device=wkv.r.device)
    alpha_BTHT, _ = recur(replace(wkv, v=units_BTHT), nothing)
    alpha_BHTT = alpha_BTHT.transpose(1, 2)
    return alpha_BHTT if own_BTH is None else alpha_BHTT + torch.diag_embed(own_BTH.transpose(1, 2))


def own_weight(wkv: Wkv, bonus_HE: Tensor) -> Tensor:
    """Give what each token's value is multiplied by as its bonus, in float32 [B, T, H]."""
    weight_BTH: Tensor = (wkv.r.float() * wkv.k.float() * bonus_HE).sum(-1)
    return weight_BTH
