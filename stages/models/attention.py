"""Causal attention, with grouped key-value heads, over the whole past or a window of it. Legend as in `parts`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import LayerCache
from .norms import normalize
from .rope import Rotation, rotate
from .spec import ModelSpec
from .taps import At, changes, flows
from .weights import BlockWeights


@dataclass(slots=True, eq=False)
class Sight:
    """How a layer's attention sees positions: by which angles queries and keys turn (None: not at all), and which keys
    each query may look at.

    `visible` is a boolean mask that broadcasts to [B, H, Q, S]; None where every query sees itself and all before it,
    and the queries stand at the positions of the keys.
    """

    rotation: Rotation | None
    visible: Tensor | None
    _hidden: Tensor | None = None

    def hide(self, scores_BHQS: Tensor) -> Tensor:
        """Give the scores with −∞ where a key may not be looked at. In place: nobody else holds them, no gradient needs
        them, and fresh memory costs page faults."""
        if self._hidden is None:  # made when first asked for, by one of the layers that share it
            self._hidden = self._mask(scores_BHQS)
        if scores_BHQS.dtype == torch.float16:  # a product can overflow there, and ∞ − ∞ would be no number
            return scores_BHQS.masked_fill_(self._hidden.isinf(), -torch.inf)
        return scores_BHQS.add_(self._hidden)  # a fifth of the time of masked_fill_

    def _mask(self, scores_BHQS: Tensor) -> Tensor:
        """0 where a key may be looked at, −∞ where not."""
        if self.visible is None:
            return torch.full_like(scores_BHQS[0, 0], -torch.inf).triu_(1)
        return torch.zeros_like(self.visible, dtype=scores_BHQS.dtype).masked_fill_(~self.visible, -torch.inf)


def scale_of(spec: ModelSpec, layer: int) -> float:
    """What the products of queries and keys are multiplied by."""
    scale: float = spec.d_head**-0.5 if spec.attn_scale is None else spec.attn_scale
    return scale / (layer + 1) if spec.attn_scale_by_layer else scale


def attention(
    x_BTD: Tensor, w: BlockWeights, spec: ModelSpec, layer: int, sight: Sight, cache: LayerCache | None, at: At
) -> Tensor:
    """Give the module's raw output [B, T, D]. With a `cache`, keys and values of earlier positions come from it, and
    those of these tokens go into it."""
    if "attn.hook_in" in at:
        x_BTD = at["attn.hook_in"](x_BTD)
    q_BTHE, k_BTKE, v_BTKE = _turned(_project(x_BTD, w, spec), w, spec, sight, at)
    if cache is not None:
        k_BTKE, v_BTKE = cache.extend(k_BTKE, v_BTKE)
    explicit = spec.attn_softcap is not None or "attn.hook_attn_scores" in at or "attn.hook_pattern" in at
    attend = _attend_explicitly if explicit else _attend
    z_BTHE = attend(q_BTHE, k_BTKE, v_BTKE, spec, layer, sight, at).contiguous()  # as the output projection reads it
    if "attn.hook_z" in at:
        z_BTHE = at["attn.hook_z"](z_BTHE)
    out_BTD = _merge_heads(z_BTHE, w, at)
    if "attn.hook_out" in at:
        out_BTD = at["attn.hook_out"](out_BTD)
    return out_BTD


def _project(x_BTD: Tensor, w: BlockWeights, spec: ModelSpec) -> Tensor:
    """Queries, keys and values, head behind head: [B, T, H + 2 K, E]."""
    fused_BTX = F.linear(x_BTD, w.qkv, w.qkv_bias)
    if spec.clip_qkv is not None:
        fused_BTX = fused_BTX.clamp(-spec.clip_qkv, spec.clip_qkv)
    return fused_BTX.view(*x_BTD.shape[:2], spec.n_heads + 2 * spec.n_kv_heads, spec.d_head)


def _turned(
    fused_BTHE: Tensor, w: BlockWeights, spec: ModelSpec, sight: Sight, at: At
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normalised where the model does and turned by their positions, and values; each through its
    taps."""
    heads, keys = spec.n_heads, spec.n_kv_heads
    q_BTHE, k_BTKE, v_BTKE = torch.split(fused_BTHE, [heads, keys, keys], -2)
    if w.q_norm is None and sight.rotation is not None and not at.keys() & _QUERIES_AND_KEYS:
        # All heads at once: half as many passes.
        q_BTHE, k_BTKE = rotate(fused_BTHE[:, :, : heads + keys], sight.rotation).split([heads, keys], -2)
        return q_BTHE, k_BTKE, at["attn.hook_v"](v_BTKE) if "attn.hook_v" in at else v_BTKE
    return _turned_apart(q_BTHE, k_BTKE, v_BTKE, w, spec, sight, at)


_QUERIES_AND_KEYS = frozenset({"attn.hook_q", "attn.hook_k", "attn.hook_rot_q", "attn.hook_rot_k"})


def _turned_apart(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, w: BlockWeights, spec: ModelSpec, sight: Sight, at: At
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with the same bits, where queries and keys are normalised or one of them is looked at. The taps fire
    in the order of the vocabulary."""
    if "attn.hook_q" in at:
        q_BTHE = at["attn.hook_q"](q_BTHE)
    if "attn.hook_k" in at:
        k_BTKE = at["attn.hook_k"](k_BTKE)
    if "attn.hook_v" in at:
        v_BTKE = at["attn.hook_v"](v_BTKE)
    if w.q_norm is not None and w.k_norm is not None:
        whole = spec.qk_norm == "full"  # over all heads together
        q, k = (q_BTHE.flatten(-2), k_BTKE.flatten(-2)) if whole else (q_BTHE, k_BTKE)
        q_BTHE = normalize(q, w.q_norm, spec).view(q_BTHE.shape)
        k_BTKE = normalize(k, w.k_norm, spec).view(k_BTKE.shape)
    if sight.rotation is not None:
        q_BTHE, k_BTKE = rotate(q_BTHE, sight.rotation), rotate(k_BTKE, sight.rotation)
    if "attn.hook_rot_q" in at:
        q_BTHE = at["attn.hook_rot_q"](q_BTHE)
    if "attn.hook_rot_k" in at:
        k_BTKE = at["attn.hook_rot_k"](k_BTKE)
    return q_BTHE, k_BTKE, v_BTKE


def _attend(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, spec: ModelSpec, layer: int, sight: Sight, at: At
) -> Tensor:
    z_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=sight.visible,
        is_causal=sight.visible is None,
        scale=scale_of(spec, layer),
        enable_gqa=spec.n_heads != spec.n_kv_heads,
    )
    return z_BHTE.transpose(1, 2)


def _attend_explicitly(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, spec: ModelSpec, layer: int, sight: Sight, at: At
) -> Tensor:
    """The same with scores and pattern at hand. Softmax in float32; agrees with the fused kernel up to rounding."""
    n_sequences, n_queries, n_keys = *q_BTHE.shape[:2], k_BSKE.shape[1]
    # The G query heads of a key-value head are laid end to end, so that keys and values are never repeated.
    grouped = (n_sequences, spec.n_kv_heads, -1)
    queries_BKxE = (q_BTHE * scale_of(spec, layer)).transpose(1, 2).reshape(*grouped, spec.d_head)
    scores_BKxS = queries_BKxE @ k_BSKE.permute(0, 2, 3, 1)
    scores_BHQS = scores_BKxS.view(n_sequences, spec.n_heads, n_queries, n_keys)
    if spec.attn_softcap is not None:
        scores_BHQS = spec.attn_softcap * torch.tanh(scores_BHQS / spec.attn_softcap)
    scores_BHQS = sight.hide(scores_BHQS)
    if "attn.hook_attn_scores" in at:
        scores_BHQS = at["attn.hook_attn_scores"](scores_BHQS)
    pattern_BHQS = _softmax(scores_BHQS, changes(at, "attn.hook_attn_scores")).to(q_BTHE.dtype)
    if "attn.hook_pattern" in at:
        pattern_BHQS = at["attn.hook_pattern"](pattern_BHQS)
    z_BKxE = pattern_BHQS.reshape(*grouped, n_keys) @ v_BSKE.transpose(1, 2)
    return z_BKxE.view(n_sequences, spec.n_heads, n_queries, spec.d_head).transpose(1, 2)


def _softmax(scores_BHQS: Tensor, may_hide_all: bool) -> Tensor:
    if not may_hide_all:
        return scores_BHQS.softmax(-1, dtype=torch.float32)
    # A row of −inf alone attends to nothing, where softmax would give NaN, and NaN as its gradient.
    alone_BHQ1 = (scores_BHQS == -torch.inf).all(-1, keepdim=True)
    pattern_BHQS = scores_BHQS.masked_fill(alone_BHQ1, 0.0).softmax(-1, dtype=torch.float32)
    return pattern_BHQS.masked_fill(alone_BHQ1, 0.0)


def _merge_heads(z_BTHE: Tensor, w: BlockWeights, at: At) -> Tensor:
    out_BTD = F.linear(z_BTHE.flatten(-2), w.out, w.out_bias)
    if "attn.hook_result" not in at:
        return out_BTD
    given_BTHD = _results(z_BTHE, w.out)
    result_BTHD = at["attn.hook_result"](given_BTHD)
    if not flows(at, "attn.hook_result"):
        return out_BTD
    summed_BTD = result_BTHD.sum(-2) if w.out_bias is None else result_BTHD.sum(-2) + w.out_bias
    if torch.is_grad_enabled():
        return summed_BTD
    # Tokens of which nothing was changed keep the bits of the fused product.
    return torch.where((result_BTHD != given_BTHD).flatten(-2).any(-1, keepdim=True), summed_BTD, out_BTD)


_FEW_TOKENS = 32


def _results(z_BTHE: Tensor, out_DX: Tensor) -> Tensor:
    """What each head adds to the module's output, [B, T, H, D]."""
    n_heads, d_head = z_BTHE.shape[-2:]
    z_xHE, out_HED = z_BTHE.flatten(0, 1), out_DX.view(-1, n_heads, d_head).permute(1, 2, 0)
    if len(z_xHE) < _FEW_TOKENS or torch.is_grad_enabled():
        results_xHD = torch.bmm(z_xHE.transpose(0, 1), out_HED).transpose(0, 1)
    else:
        # Head by head into its place: a batched product would have to be copied into this order.
        results_xHD = z_xHE.new_empty(len(z_xHE), n_heads, len(out_DX))
        for head in range(n_heads):
            torch.mm(z_xHE[:, head], out_HED[head], out=results_xHD[:, head])
    return results_xHD.view(*z_BTHE.shape[:2], n_heads, -1)
