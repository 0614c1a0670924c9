"""The parts of a transformer block as functions of tensors.

Legend, as suffixes: B sequence, T position, D channel (d_model), H query head, K key-value head, G the query heads that
share one key-value head (H = K·G), E head channel (d_head), e = E / 2 pairs of head channels, F hidden channel (d_mlp),
Q and S the positions of query and key.

Each takes `at`, the taps that lie in it by kind. A point is looked up, never called, unless something is registered.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import ModelSpec, RopeSpec
from .taps import Tap, changes
from .weights import BlockWeights

At: TypeAlias = Mapping[str, Tap]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: x.clamp_min(0),
}
"""Activation functions by the names that `ModelSpec.activation` takes. Their gradient must not need their result, which
is multiplied in place: so relu is a clamp."""

_SCALE_KINDS: Mapping[str, tuple[str, str]] = {
    name: (f"{name}.hook_scale", f"{name}.hook_normalized") for name in ("ln1", "ln2", "ln_final")
}


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float, at: At, name: str) -> Tensor:
    """Root mean square norm, x / sqrt(mean(x²) + eps) · weight, computed in float32 whatever the dtype of x.

    Source: Zhang and Sennrich 2019; order of casts as in transformers' LlamaRMSNorm. `hook_scale` is the square root,
    in float32; only where it is intervened on does the quotient use it, so that capturing it changes no bit.
    """
    scale_kind, normalized_kind = _SCALE_KINDS[name]
    normalized_BTD = None
    if scale_kind in at:
        scale_BT = at[scale_kind]((x_BTD.float().square().mean(-1) + eps).sqrt())
        if changes(at, scale_kind):
            normalized_BTD = (x_BTD.float() / scale_BT[..., None]).to(x_BTD.dtype)
    if normalized_BTD is None:
        normalized_BTD = F.rms_norm(x_BTD, (x_BTD.shape[-1],), None, eps)
    if normalized_kind in at:
        return at[normalized_kind](normalized_BTD) * weight_D
    return normalized_BTD.mul_(weight_D)  # nobody else holds it; a new tensor of this size costs page faults


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of the angles by which pairs of head channels turn at each position."""

    cos_TE: Tensor
    sin_Te: Tensor


def inverse_frequencies(rope: RopeSpec, d_head: int) -> Tensor:
    """Angle a position of each pair of channels, [d_head / 2] in float32 on the CPU.

    Computed in float32 as the reference implementation does (transformers' modeling_rope_utils), so that angles at long
    positions agree with it.
    """
    frequencies = 1.0 / (rope.base ** (torch.arange(0, d_head, 2).float() / d_head))
    return _FREQUENCY_RULES[rope.kind](frequencies, rope)


def _llama3(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    turns = rope.original_context * frequencies / (2 * math.pi)  # full turns within the original context
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = ramp.clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


_FREQUENCY_RULES: Mapping[str, Callable[[Tensor, RopeSpec], Tensor]] = {
    "default": lambda frequencies, rope: frequencies,
    "linear": lambda frequencies, rope: frequencies / rope.factor,
    "llama3": _llama3,
    "divided": lambda frequencies, rope: frequencies / torch.tensor(rope.divisors),
}


def rotation(frequencies_e: Tensor, n_positions: int, dtype: torch.dtype) -> Rotation:
    """Give the rotation for positions 0 to `n_positions` − 1; angles are computed in float32, then cast."""
    positions_T = torch.arange(n_positions, device=frequencies_e.device, dtype=torch.float32)
    angles_Te = positions_T[:, None] * frequencies_e
    cos_Te = angles_Te.cos().to(dtype)
    return Rotation(torch.cat((cos_Te, cos_Te), -1), angles_Te.sin().to(dtype))


def rotate(x_BTHE: Tensor, by: Rotation) -> Tensor:
    """Turn channel j together with channel j + E/2, the layout of transformers' Llama. Gives a new tensor."""
    half = x_BTHE.shape[-1] // 2
    sin_T1e = by.sin_Te[:, None]
    turned_BTHE = x_BTHE * by.cos_TE[:, None]
    turned_BTHE[..., :half].addcmul_(x_BTHE[..., half:], sin_T1e, value=-1)
    turned_BTHE[..., half:].addcmul_(x_BTHE[..., :half], sin_T1e)
    return turned_BTHE


def attention(x_BTD: Tensor, w: BlockWeights, spec: ModelSpec, by: Rotation, at: At) -> Tensor:
    """Causal attention with grouped key-value heads; gives the module's raw output [B, T, D]."""
    if "attn.hook_in" in at:
        x_BTD = at["attn.hook_in"](x_BTD)
    heads, keys = spec.n_heads, spec.n_kv_heads
    fused_BTHE = F.linear(x_BTD, w.qkv, w.qkv_bias).view(*x_BTD.shape[:2], heads + 2 * keys, spec.d_head)
    q_BTHE, k_BTKE, v_BTKE = torch.split(fused_BTHE, [heads, keys, keys], -2)
    if "attn.hook_q" in at:
        q_BTHE = at["attn.hook_q"](q_BTHE)
    if "attn.hook_k" in at:
        k_BTKE = at["attn.hook_k"](k_BTKE)
    if "attn.hook_v" in at:
        v_BTKE = at["attn.hook_v"](v_BTKE)
    q_BTHE, k_BTKE = rotate(q_BTHE, by), rotate(k_BTKE, by)
    if "attn.hook_rot_q" in at:
        q_BTHE = at["attn.hook_rot_q"](q_BTHE)
    if "attn.hook_rot_k" in at:
        k_BTKE = at["attn.hook_rot_k"](k_BTKE)
    explicit = "attn.hook_attn_scores" in at or "attn.hook_pattern" in at
    attend = _attend_explicitly if explicit else _attend
    z_BTHE = attend(q_BTHE, k_BTKE, v_BTKE, spec, at)
    if "attn.hook_z" in at:
        z_BTHE = at["attn.hook_z"](z_BTHE)
    out_BTD = _merge_heads(z_BTHE, w, at)
    if "attn.hook_out" in at:
        out_BTD = at["attn.hook_out"](out_BTD)
    return out_BTD


def _attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, spec: ModelSpec, at: At) -> Tensor:
    z_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BTKE.transpose(1, 2),
        v_BTKE.transpose(1, 2),
        is_causal=True,
        scale=spec.d_head**-0.5,
        enable_gqa=spec.n_heads != spec.n_kv_heads,
    )
    return z_BHTE.transpose(1, 2)


def _attend_explicitly(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, spec: ModelSpec, at: At) -> Tensor:
    """The same with scores and pattern at hand. Softmax in float32; agrees with the fused kernel up to rounding."""
    n_sequences, n_positions = q_BTHE.shape[:2]
    edges = (n_sequences, spec.n_heads, n_positions, n_positions)
    # The G query heads of a key-value head are laid end to end, so that keys and values are never repeated.
    grouped = (n_sequences, spec.n_kv_heads, -1)
    queries_BKxE = q_BTHE.transpose(1, 2).reshape(*grouped, spec.d_head)
    scores_BHQS = (queries_BKxE @ k_BTKE.permute(0, 2, 3, 1)).view(edges)
    hidden_QS = torch.ones(edges[2:], dtype=torch.bool, device=q_BTHE.device).triu(1)
    scores_BHQS = (scores_BHQS * spec.d_head**-0.5).masked_fill(hidden_QS, -torch.inf)
    if "attn.hook_attn_scores" in at:
        scores_BHQS = at["attn.hook_attn_scores"](scores_BHQS)
    pattern_BHQS = scores_BHQS.softmax(-1, dtype=torch.float32).to(q_BTHE.dtype)
    if changes(at, "attn.hook_attn_scores"):
        # A row of −inf alone attends to nothing, where softmax would give NaN.
        pattern_BHQS = pattern_BHQS.masked_fill((scores_BHQS == -torch.inf).all(-1, keepdim=True), 0.0)
    if "attn.hook_pattern" in at:
        pattern_BHQS = at["attn.hook_pattern"](pattern_BHQS)
    z_BKxE = pattern_BHQS.reshape(*grouped, n_positions) @ v_BTKE.transpose(1, 2)
    return z_BKxE.view(n_sequences, spec.n_heads, n_positions, spec.d_head).transpose(1, 2)


def _merge_heads(z_BTHE: Tensor, w: BlockWeights, at: At) -> Tensor:
    if "attn.hook_result" in at:
        out_DHE = w.out.view(-1, *z_BTHE.shape[-2:])
        result_BTHD = at["attn.hook_result"](torch.einsum("bthe,dhe->bthd", z_BTHE, out_DHE))
        if changes(at, "attn.hook_result"):
            out_BTD = result_BTHD.sum(-2)
            return out_BTD if w.out_bias is None else out_BTD + w.out_bias
    return F.linear(z_BTHE.flatten(-2), w.out, w.out_bias)


def gated_mlp(x_BTD: Tensor, w: BlockWeights, spec: ModelSpec, at: At) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)); gives the module's raw output [B, T, D]."""
    if "mlp.hook_in" in at:
        x_BTD = at["mlp.hook_in"](x_BTD)
    pre_BTF, linear_BTF = F.linear(x_BTD, w.gate_up, w.gate_up_bias).chunk(2, -1)
    if "mlp.hook_pre" in at:
        pre_BTF = at["mlp.hook_pre"](pre_BTF)
    if "mlp.hook_pre_linear" in at:
        linear_BTF = at["mlp.hook_pre_linear"](linear_BTF)
    post_BTF = ACTIVATIONS[spec.activation](pre_BTF).mul_(linear_BTF)
    if "mlp.hook_post" in at:
        post_BTF = at["mlp.hook_post"](post_BTF)
    out_BTD = F.linear(post_BTF, w.down, w.down_bias)
    if "mlp.hook_out" in at:
        out_BTD = at["mlp.hook_out"](out_BTD)
    return out_BTD


def block(x_BTD: Tensor, w: BlockWeights, spec: ModelSpec, by: Rotation, at: At) -> Tensor:
    """One block: attention and MLP, each on the normalised residual stream and added to it."""
    if "hook_resid_pre" in at:
        x_BTD = at["hook_resid_pre"](x_BTD)
    attn_BTD = attention(rms_norm(x_BTD, w.ln1, spec.norm_eps, at, "ln1"), w, spec, by, at)
    if "hook_attn_out" in at:
        attn_BTD = at["hook_attn_out"](attn_BTD)
    x_BTD = x_BTD + attn_BTD
    if "hook_resid_mid" in at:
        x_BTD = at["hook_resid_mid"](x_BTD)
    mlp_BTD = gated_mlp(rms_norm(x_BTD, w.ln2, spec.norm_eps, at, "ln2"), w, spec, at)
    if "hook_mlp_out" in at:
        mlp_BTD = at["hook_mlp_out"](mlp_BTD)
    x_BTD = x_BTD + mlp_BTD
    if "hook_resid_post" in at:
        x_BTD = at["hook_resid_post"](x_BTD)
    return x_BTD
