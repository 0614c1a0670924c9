"""The parts of a transformer block as functions of tensors.

Legend, as suffixes: B sequence, T position, D channel (d_model), H query head, K key-value head, G the query heads that
share one key-value head (H = K·G), E head channel (d_head), F hidden channel (d_mlp), Q and S the positions of query
and key.

Each takes `at`, the taps that lie in it by kind. A point is looked up, never called, unless something is registered.
Which of them a model goes through, and how, is read from its `ModelSpec` alone: no part knows a family.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import norm, normalize
from .reader import Norm
from .spec import ModelSpec
from .taps import At
from .weights import BlockWeights

Branch: TypeAlias = Callable[[Tensor], Tensor]
"""What a block adds to the residual stream, from the normed stream: same shape."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * (1.702 * x).sigmoid(),
    "relu": lambda x: x.clamp_min(0),
    "relu_squared": lambda x: x.clamp_min(0).square(),
}
"""Activation functions by the names that `ModelSpec.activation` takes. Their gradient must not need their result, which
is multiplied in place: so relu is a clamp."""


def mlp(x_BTD: Tensor, w: BlockWeights, spec: ModelSpec, at: At) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)), or down(act(up(x))) without a gate; gives the module's raw output [B, T, D]."""
    if "mlp.hook_in" in at:
        x_BTD = at["mlp.hook_in"](x_BTD)
    pre_BTF = linear_BTF = F.linear(x_BTD, w.gate_up, w.gate_up_bias)
    if spec.gated:
        pre_BTF, linear_BTF = pre_BTF.chunk(2, -1)
    if "mlp.hook_pre" in at:
        pre_BTF = at["mlp.hook_pre"](pre_BTF)
    if "mlp.hook_pre_linear" in at:
        linear_BTF = at["mlp.hook_pre_linear"](linear_BTF)
    post_BTF = ACTIVATIONS[spec.activation](pre_BTF)
    if spec.gated:
        post_BTF = post_BTF.mul_(linear_BTF)
    if "mlp.hook_post" in at:
        post_BTF = at["mlp.hook_post"](post_BTF)
    out_BTD = F.linear(post_BTF, w.down, w.down_bias)
    if "mlp.hook_out" in at:
        out_BTD = at["mlp.hook_out"](out_BTD)
    return out_BTD


class BlockNorms(Protocol):
    """The norms of a block; None for those that the model does not have."""

    @property
    def ln1(self) -> Norm | None: ...
    @property
    def ln1_post(self) -> Norm | None: ...
    @property
    def ln2(self) -> Norm | None: ...
    @property
    def ln2_post(self) -> Norm | None: ...


def block(x_BTD: Tensor, w: BlockNorms, spec: ModelSpec, at: At, first: Branch, second: Branch) -> Tensor:
    """One block: `first`, attention or time mixing, and `second`, MLP or channel mixing, on the residual stream, one
    after the other or, where `spec.parallel`, side by side; each with a norm before it, on what it gives, both or
    neither."""
    if "hook_resid_pre" in at:
        x_BTD = at["hook_resid_pre"](x_BTD)
    normed_BTD = x_BTD if w.ln1 is None else norm(x_BTD, w.ln1, spec, at, "ln1")
    attn_BTD = first(normed_BTD)
    if w.ln1_post is not None:
        attn_BTD = normalize(attn_BTD, w.ln1_post, spec)
    if spec.residual_scale != 1.0:
        attn_BTD = attn_BTD * spec.residual_scale
    if "hook_attn_out" in at:
        attn_BTD = at["hook_attn_out"](attn_BTD)
    mid_BTD = _added(x_BTD, attn_BTD, at)
    if "hook_resid_mid" in at:
        mid_BTD = at["hook_resid_mid"](mid_BTD)
    if not spec.shared_norm:
        mlp_in_BTD = x_BTD if spec.parallel else mid_BTD
        normed_BTD = mlp_in_BTD if w.ln2 is None else norm(mlp_in_BTD, w.ln2, spec, at, "ln2")
    mlp_BTD = second(normed_BTD)
    if w.ln2_post is not None:
        mlp_BTD = normalize(mlp_BTD, w.ln2_post, spec)
    if spec.residual_scale != 1.0:
        mlp_BTD = mlp_BTD * spec.residual_scale
    if "hook_mlp_out" in at:
        mlp_BTD = at["hook_mlp_out"](mlp_BTD)
    x_BTD = _added(mid_BTD, mlp_BTD, at)
    if "hook_resid_post" in at:
        x_BTD = at["hook_resid_post"](x_BTD)
    return x_BTD


_STREAM = frozenset({"hook_resid_pre", "hook_resid_mid", "hook_resid_post"})


def _added(stream_BTD: Tensor, branch_BTD: Tensor, at: At) -> Tensor:
    """Their sum; in the place of what the branch gave where nobody else can hold that."""
    if torch.is_grad_enabled() or not at.keys() <= _STREAM:
        return stream_BTD + branch_BTD
    return branch_BTD.add_(stream_BTD)
