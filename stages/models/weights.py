"""Weights in the shape in which the forward uses them, read one tensor at a time.

Projections that read the same input are fused into one matrix. Each is filled slice by slice from the checkpoint, so
that beside the model only one tensor of it is ever held.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .reader import Norm, Reader
from .rwkv.weights import RwkvBlockWeights, read_rwkv_block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockWeights:
    """The weights of one block; None for those that the model does not have. Matrices are [out, in]; D channel,
    H query heads, K key heads, E head channel, F hidden channel.

    `qkv` [(H + 2K)·E, D] holds the rows of q, k and v in this order, `gate_up` [2F, D] those of gate and up, or
    [F, D] those of up where there is no gate.
    """

    ln1: Norm | None
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Norm | None
    k_norm: Norm | None
    out: Tensor  # [D, H·E]
    out_bias: Tensor | None
    ln1_post: Norm | None
    ln2: Norm | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor  # [D, F]
    down_bias: Tensor | None
    ln2_post: Norm | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """All weights of a model: `embed` [vocab, D], the norm on it or None, `pos_embed` [position, D] or None, its blocks
    (`blocks` of a transformer, `rwkv_blocks` of RWKV; the other is empty), the final norm, and `unembed` [vocab, D],
    which is `embed` itself where they are tied, with its bias [vocab] or None."""

    embed: Tensor
    embed_ln: Norm | None
    pos_embed: Tensor | None
    blocks: tuple[BlockWeights, ...]
    rwkv_blocks: tuple[RwkvBlockWeights, ...]
    ln_final: Norm
    unembed: Tensor
    unembed_bias: Tensor | None


def read_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Weights:
    """Read all weights of a checkpoint onto a device in one dtype."""
    reader, spec = Reader(checkpoint, device, dtype), checkpoint.spec
    embed = reader.read("embed.weight")
    within = [Reader(checkpoint, device, dtype, f"blocks.{layer}.") for layer in range(spec.n_layers)]
    return Weights(
        embed=embed,
        embed_ln=reader.norm_if(spec.rwkv is not None, "embed.ln"),
        pos_embed=reader.read_if("pos_embed.weight"),
        blocks=() if spec.rwkv else tuple(map(_read_block, within)),
        rwkv_blocks=tuple(map(read_rwkv_block, within)) if spec.rwkv else (),
        ln_final=reader.norm("ln_final"),
        unembed=embed if spec.tied else reader.read("unembed.weight"),
        unembed_bias=reader.read_if("unembed.bias"),
    )


def _read_block(reader: Reader) -> BlockWeights:
    spec = reader.checkpoint.spec
    hidden = ("mlp.gate", "mlp.up") if spec.gated else ("mlp.up",)
    projections = ("attn.q", "attn.k", "attn.v")
    return BlockWeights(
        ln1=reader.norm_if(spec.pre_norms, "ln1"),
        qkv=reader.read(*(f"{name}.weight" for name in projections)),
        qkv_bias=reader.read_if(*(f"{name}.bias" for name in projections)),
        q_norm=reader.norm_if(spec.qk_norm is not None, "attn.q_norm"),
        k_norm=reader.norm_if(spec.qk_norm is not None, "attn.k_norm"),
        out=reader.read("attn.out.weight"),
        out_bias=reader.read_if("attn.out.bias"),
        ln1_post=reader.norm_if(spec.post_norms, "ln1_post"),
        ln2=reader.norm_if(spec.pre_norms and not spec.shared_norm, "ln2"),
        gate_up=reader.read(*(f"{name}.weight" for name in hidden)),
        gate_up_bias=reader.read_if(*(f"{name}.bias" for name in hidden)),
        down=reader.read("mlp.down.weight"),
        down_bias=reader.read_if("mlp.down.bias"),
        ln2_post=reader.norm_if(spec.post_norms, "ln2_post"),
    )
