"""The attention that a recurrence amounts to: how much of the value of each token is read at each later one.

What is read is linear in the values: y_t = Σ_s α[t, s] v_s, plus what is read of a state that was there before. So α is
what the recurrence itself gives when token s carries, as its value, the s-th unit vector. Definition: candle-mi's
`RwkvEffectiveAttn` before its ReLU and division by the row's sum; for RWKV-6 the bonus stands on the diagonal.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .wkv import Wkv, recur


def attended(wkv: Wkv, bonus_HE: Tensor | None) -> Tensor:
    """Give α in float32 [B, H, T, T], query before key: 0 above the diagonal, of either sign elsewhere. `bonus_HE` is
    that of version 6. Takes memory as attention patterns do, and once more as much for every `CHUNK` tokens."""
    n_sequences, n_positions, n_heads, n_channels = wkv.r.shape
    units_TT = torch.eye(n_positions, device=wkv.r.device)
    units_BTHT = units_TT[None, :, None].expand(n_sequences, -1, n_heads, -1)
    nothing = torch.zeros(n_sequences, n_heads, n_channels, n_positions, device=wkv.r.device)
    alpha_BTHT, _ = recur(replace(wkv, v=units_BTHT), nothing)
    alpha_BHTT = alpha_BTHT.transpose(1, 2)
    if bonus_HE is None:
        return alpha_BHTT
    own_BTH = (wkv.r.float() * wkv.k.float() * bonus_HE).sum(-1)
    return alpha_BHTT + torch.diag_embed(own_BTH.transpose(1, 2))
