"""Rotary position embeddings: the angle a position of each pair of head channels, and the turning of queries and keys.

Legend as in `parts`; b is the number of sequences, or 1 where all turn alike, n the channels of a head that turn, and
e = n/2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import RopeSpec


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of the angles by which pairs of head channels turn at each position, to be laid over heads."""

    cos_bT1n: Tensor
    sin_bT1e: Tensor


def _exponents(n_channels: int) -> Tensor:
    return torch.arange(0, n_channels, 2, dtype=torch.int64).float() / n_channels


def _default(rope: RopeSpec, n_channels: int, length: int) -> Tensor:
    return 1.0 / torch.pow(rope.base, _exponents(n_channels))


def _linear(rope: RopeSpec, n_channels: int, length: int) -> Tensor:
    return _default(rope, n_channels, length) / rope.factor


def _dynamic(rope: RopeSpec, n_channels: int, length: int) -> Tensor:
    stretch = rope.factor * max(length, rope.original_context) / rope.original_context - (rope.factor - 1)
    base = rope.base * stretch ** (n_channels / (n_channels - 2))
    return 1.0 / torch.pow(base, _exponents(n_channels))


def _llama3(rope: RopeSpec, n_channels: int, length: int) -> Tensor:
    frequencies = _default(rope, n_channels, length)
    turns = rope.original_context * frequencies / (2 * math.pi)  # full turns within the original context
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: RopeSpec, n_channels: int, length: int) -> Tensor:
    frequencies = _default(rope, n_channels, length)

    def channel(turns: float) -> float:
        """The pair of channels, fractional, that makes so many full turns within the original context."""
        return n_channels * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, n_channels - 1.0)
    width = high - low or 0.001
    divided = ((torch.arange(n_channels // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / rope.factor * divided + frequencies * (1 - divided)


def _longrope(rope: RopeSpec, n_channels: int, length: int) -> Tensor:
    divisors = rope.divisors if length > rope.original_context else rope.short_divisors
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * torch.pow(rope.base, _exponents(n_channels)))


def _divided(rope: RopeSpec, n_channels: int, length: int) -> Tensor:
    return _default(rope, n_channels, length) / torch.tensor(rope.divisors, dtype=torch.float32)


FREQUENCIES: Mapping[str, Callable[[RopeSpec, int, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "divided": _divided,
}
"""The rules by `RopeSpec.kind`: from the number of turning channels and the length of the sequence to frequencies."""

LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
"""Kinds whose frequencies are others in a sequence longer than `original_context`."""


def frequencies_of(rope: RopeSpec, d_head: int, lengths: Sequence[int]) -> Tensor:
    """Angle a position of each pair of channels, [b, n / 2] in float32 on the CPU; one row where all turn alike.

    `lengths` are those of the sequences: each turns by its own, whatever it is batched with (where transformers takes
    the longest of the batch). Computed in float32 as the reference implementation does, so that angles at long
    positions agree with it.
    """
    n_channels = d_head if rope.dims is None else rope.dims
    rule = FREQUENCIES[rope.kind]
    if rope.kind not in LENGTH_DEPENDENT or max(lengths) <= rope.original_context:
        return rule(rope, n_channels, 0)[None]
    return torch.stack([rule(rope, n_channels, length) for length in lengths])


def rotation(frequencies_be: Tensor, positions_bT: Tensor, attention_factor: float, dtype: torch.dtype) -> Rotation:
    """Give the rotation at the positions [b, T]; angles are computed in float32, their cosines and sines then cast."""
    angles_bT1e = (positions_bT.float()[..., None] * frequencies_be[:, None])[:, :, None]
    cos_bT1e = (angles_bT1e.cos() * attention_factor).to(dtype)
    return Rotation(torch.cat((cos_bT1e, cos_bT1e), -1), (angles_bT1e.sin() * attention_factor).to(dtype))


def rotate(x_BTHE: Tensor, by: Rotation) -> Tensor:
    """Turn channel j together with channel j + n/2 of the first n of every head, the layout of transformers' Llama and
    GPT-NeoX; the channels beyond n stay. Gives a new tensor."""
    n_channels = by.cos_bT1n.shape[-1]
    half = n_channels // 2
    if n_channels == x_BTHE.shape[-1]:
        turned_BTHE = x_BTHE * by.cos_bT1n
    else:
        turned_BTHE = x_BTHE.clone()
        turned_BTHE[..., :n_channels].mul_(by.cos_bT1n)
    turned_BTHE[..., :half].addcmul_(x_BTHE[..., half:n_channels], by.sin_bT1e, value=-1)
    turned_BTHE[..., half:n_channels].addcmul_(x_BTHE[..., :half], by.sin_bT1e)
    return turned_BTHE
