"""Weights in the shape in which the forward uses them, read one tensor at a time.

Projections that read the same input are fused into one matrix. Each is filled slice by slice from the checkpoint, so
that beside the model only one tensor of it is ever held.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockWeights:
    """The weights of one block. Matrices are [out, in]; D channel, H query heads, K key heads, E head channel,
    F hidden channel.

    `qkv` [(H + 2K)·E, D] holds the rows of q, k and v in this order, `gate_up` [2F, D] those of gate and up.
    """

    ln1: Tensor  # [D]
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor  # [D, H·E]
    out_bias: Tensor | None
    ln2: Tensor  # [D]
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor  # [D, F]
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """All weights of a model: `embed` [vocab, D], its blocks, the final norm [D] and `unembed` [vocab, D], which is
    `embed` itself where they are tied."""

    embed: Tensor
    blocks: tuple[BlockWeights, ...]
    ln_final: Tensor
    unembed: Tensor


def read_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Weights:
    """Read all weights of a checkpoint onto a device in one dtype."""
    spec = checkpoint.spec
    embed = read_tensor(checkpoint, ("embed.weight",), device, dtype)
    return Weights(
        embed=embed,
        blocks=tuple(_read_block(checkpoint, layer, device, dtype) for layer in range(spec.n_layers)),
        ln_final=read_tensor(checkpoint, ("ln_final.weight",), device, dtype),
        unembed=embed if spec.tied else read_tensor(checkpoint, ("unembed.weight",), device, dtype),
    )


def _read_block(checkpoint: Checkpoint, layer: int, device: torch.device, dtype: torch.dtype) -> BlockWeights:
    spec = checkpoint.spec

    def weight(*stems: str) -> Tensor:
        return read_tensor(checkpoint, [f"blocks.{layer}.{stem}.weight" for stem in stems], device, dtype)

    def bias(present: bool, *stems: str) -> Tensor | None:
        names = [f"blocks.{layer}.{stem}.bias" for stem in stems]
        return read_tensor(checkpoint, names, device, dtype) if present else None

    return BlockWeights(
        ln1=weight("ln1"),
        qkv=weight("attn.q", "attn.k", "attn.v"),
        qkv_bias=bias(spec.qkv_bias, "attn.q", "attn.k", "attn.v"),
        out=weight("attn.out"),
        out_bias=bias(spec.out_bias, "attn.out"),
        ln2=weight("ln2"),
        gate_up=weight("mlp.gate", "mlp.up"),
        gate_up_bias=bias(spec.mlp_bias, "mlp.gate", "mlp.up"),
        down=weight("mlp.down"),
        down_bias=bias(spec.mlp_bias, "mlp.down"),
    )


def read_tensor(checkpoint: Checkpoint, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Read weights laid one below the other into one new tensor."""
    shapes = [checkpoint.spec.weight_shapes()[name] for name in names]
    rows = [shape[0] for shape in shapes]
    fused = torch.empty((sum(rows), *shapes[0][1:]), device=device, dtype=dtype)
    for part, name in zip(torch.split(fused, rows), names, strict=True):
        part.copy_(checkpoint.read(name))
    return fused
