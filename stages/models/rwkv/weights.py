"""The weights of a block of RWKV in the shape in which the forward uses them. D channel, A channels of all heads
together, H head, E head channel, F hidden channel, R some rank; matrices are [out, in]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reader import Norm, Reader
from ..spec import MIXED


@dataclass(frozen=True, slots=True)
class LowRank:
    """A product of two matrices, `down` [R, D] and `up` [A, R], and what is added to it, `start` [A] or None."""

    down: Tensor
    up: Tensor
    start: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimeMixWeights:
    """Those of time mixing. `mix` [n, D] says how much of the token before enters each of the n inputs, in the order of
    `MIXED`; in version 6 `mix_x` [D], `mix_down` [n·R, D] and `mix_up` [n, D, R] make it depend on the token. None for
    what the version does not have. `decay.start`, `bonus` and the group norm's are in float32.
    """

    mix: Tensor
    mix_x: Tensor | None
    mix_down: Tensor | None
    mix_up: Tensor | None
    r: Tensor  # [A, D], and so the next three
    k: Tensor
    v: Tensor
    g: Tensor | None
    decay: LowRank
    rate: LowRank | None
    value: LowRank | None  # not in layer 0
    gate: LowRank | None
    removal: Tensor | None  # [A]
    rate_on_k: Tensor | None  # [A]
    bonus: Tensor  # [H, E]
    norm_weight: Tensor  # [A]
    norm_bias: Tensor  # [A]
    out: Tensor  # [D, A]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelMixWeights:
    """Those of channel mixing: `up` [F, D], `down` [D, F], and `mix_k` [D] for what enters them; in version 6
    `receptance` [D, D] with `mix_r` [D]."""

    mix_k: Tensor
    up: Tensor
    down: Tensor
    mix_r: Tensor | None
    receptance: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RwkvBlockWeights:
    """The weights of one block."""

    ln1: Norm
    time: TimeMixWeights
    ln2: Norm
    channel: ChannelMixWeights
    ln1_post: Norm | None = None
    ln2_post: Norm | None = None


def read_rwkv_block(reader: Reader) -> RwkvBlockWeights:
    """Read the weights of one block."""
    rwkv = reader.checkpoint.spec.rwkv
    assert rwkv is not None
    mixed = MIXED[rwkv.version]
    ups = [reader.read(f"rwkv.mix_{name}_up") for name in mixed if reader.has(f"rwkv.mix_{name}_up")]
    time = TimeMixWeights(
        mix=torch.stack([reader.read(f"rwkv.mix_{name}") for name in mixed]),
        mix_x=reader.read_if("rwkv.mix_x"),
        mix_down=reader.read_if(*(f"rwkv.mix_{name}_down" for name in mixed)),
        mix_up=torch.stack(ups) if ups else None,
        r=reader.read("rwkv.r.weight"),
        k=reader.read("rwkv.k.weight"),
        v=reader.read("rwkv.v.weight"),
        g=reader.read_if("rwkv.g.weight"),
        decay=_low_rank(reader, "decay", torch.float32),
        rate=_low_rank(reader, "rate") if reader.has("rwkv.rate_down") else None,
        value=_low_rank(reader, "value") if reader.has("rwkv.value_down") else None,
        gate=_low_rank(reader, "gate") if reader.has("rwkv.gate_down") else None,
        removal=reader.read_if("rwkv.removal"),
        rate_on_k=reader.read_if("rwkv.rate_on_k"),
        bonus=reader.read("rwkv.bonus", dtype=torch.float32),
        norm_weight=reader.read("rwkv.norm.weight", dtype=torch.float32),
        norm_bias=reader.read("rwkv.norm.bias", dtype=torch.float32),
        out=reader.read("rwkv.out.weight"),
    )
    channel = ChannelMixWeights(
        mix_k=reader.read("mlp.mix_k"),
        up=reader.read("mlp.up.weight"),
        down=reader.read("mlp.down.weight"),
        mix_r=reader.read_if("mlp.mix_r"),
        receptance=reader.read_if("mlp.receptance.weight"),
    )
    return RwkvBlockWeights(ln1=reader.norm("ln1"), time=time, ln2=reader.norm("ln2"), channel=channel)


def _low_rank(reader: Reader, name: str, dtype: torch.dtype | None = None) -> LowRank:
    start = reader.read(f"rwkv.{name}", dtype=dtype) if reader.has(f"rwkv.{name}") else None
    return LowRank(reader.read(f"rwkv.{name}_down"), reader.read(f"rwkv.{name}_up"), start)
