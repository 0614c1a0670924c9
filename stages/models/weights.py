"""Weights in the shape in which the forward uses them, read one tensor at a time.

Projections that read the same input are fused into one matrix. Each is filled slice by slice from the checkpoint, so
that beside the model only one tensor of it is ever held.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Weight and bias of a norm, [D] or None. The weight includes `spec.norm_offset`; both are in float32 where
    `spec.norm_float32`."""

    weight: Tensor | None
    bias: Tensor | None


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
    """All weights of a model: `embed` [vocab, D], `pos_embed` [position, D] or None, its blocks, the final norm, and
    `unembed` [vocab, D], which is `embed` itself where they are tied, with its bias [vocab] or None."""

    embed: Tensor
    pos_embed: Tensor | None
    blocks: tuple[BlockWeights, ...]
    ln_final: Norm
    unembed: Tensor
    unembed_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the weights of a checkpoint onto a device in a dtype. `within` is put before every name."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    within: str = ""

    def has(self, name: str) -> bool:
        """Whether the model has a weight of this name."""
        return self.within + name in self.checkpoint.spec.weight_shapes()

    def read(self, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        """Give weights laid one below the other, as one new tensor."""
        return _read(self.checkpoint, [self.within + name for name in names], self.device, dtype or self.dtype)

    def read_if(self, *names: str) -> Tensor | None:
        """The same, or None where the model does not have them."""
        return self.read(*names) if self.has(names[0]) else None

    def norm(self, name: str) -> Norm:
        """Give weight and bias of a norm, either of which it may not have."""
        spec = self.checkpoint.spec
        as_ = torch.float32 if spec.norm_float32 else self.dtype
        weight, bias = (
            self.read(f"{name}.{part}", dtype=as_) if self.has(f"{name}.{part}") else None
            for part in ("weight", "bias")
        )
        return Norm(weight if weight is None or not spec.norm_offset else weight.add_(spec.norm_offset), bias)

    def norm_if(self, present: bool, name: str) -> Norm | None:
        """The same, or None where there is no such norm."""
        return self.norm(name) if present else None


def read_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Weights:
    """Read all weights of a checkpoint onto a device in one dtype."""
    reader = Reader(checkpoint, device, dtype)
    embed = reader.read("embed.weight")
    return Weights(
        embed=embed,
        pos_embed=reader.read_if("pos_embed.weight"),
        blocks=tuple(
            _read_block(Reader(checkpoint, device, dtype, f"blocks.{layer}."))
            for layer in range(checkpoint.spec.n_layers)
        ),
        ln_final=reader.norm("ln_final"),
        unembed=embed if checkpoint.spec.tied else reader.read("unembed.weight"),
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


def _read(checkpoint: Checkpoint, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> Tensor:
    shapes = [checkpoint.spec.weight_shapes()[name] for name in names]
    rows = [shape[0] for shape in shapes]
    fused = torch.empty((sum(rows), *shapes[0][1:]), device=device, dtype=dtype)
    for part, name in zip(torch.split(fused, rows), names, strict=True):
        part.copy_(checkpoint.read(name))
    return fused
