"""What a patch or an ablation is measured by: one signed number a sequence, from its logits at a fixed position.

A maximum over positions or tokens cannot see an effect that lowers what it looks at; so every metric names its
position. All of them can be differentiated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.model import Model
from ..models.points import HookPoint
from ..models.taps import HookSpec

_FINAL = HookPoint("hook_final_norm")

TokenOf = int | Sequence[int]
"""A token of the vocabulary, or one for each prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(ABC):
    """A number a sequence, at `position`, counted in each sequence's own terms: −1 is its last token."""

    position: int = -1
    unit: ClassVar[str]

    @abstractmethod
    def at_position(self, logits: Tensor, prompt: Tensor) -> Tensor:
        """The metric [sequence] of logits [sequence, vocab], float32 or wider, of the prompts with these numbers."""

    def __call__(self, logits: Tensor, lengths: Sequence[int], prompt: Sequence[int] | None = None) -> Tensor:
        """The metric, float32 [sequence], of logits [sequence, position, vocab] of sequences of these lengths.

        `prompt` [sequence] says to which prompt each sequence belongs, where the metric has a token, or logits, of its
        own for each; None: they are the prompts in their order. SchemaError for a position that a sequence lacks.
        """
        places = [self.position if self.position >= 0 else length + self.position for length in lengths]
        for place, length in zip(places, lengths, strict=True):
            if not 0 <= place < length:
                raise SchemaError(f"position {self.position} is measured, and a sequence has {length} tokens")
        rows = torch.arange(len(lengths), device=logits.device)
        numbers = rows if prompt is None else torch.tensor(list(prompt), device=logits.device)
        return self.at_position(logits[rows, torch.tensor(places, device=logits.device)].float(), numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logit(Metric):
    """The logit of `token`."""

    token: TokenOf
    unit: ClassVar[str] = "logit"

    def at_position(self, logits: Tensor, prompt: Tensor) -> Tensor:
        return _of_token(logits, self.token, prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbability(Metric):
    """The logarithm of the probability of `token`, in nats."""

    token: TokenOf
    unit: ClassVar[str] = "log probability (nats)"

    def at_position(self, logits: Tensor, prompt: Tensor) -> Tensor:
        return _of_token(logits.log_softmax(-1), self.token, prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probability(Metric):
    """The probability of `token`."""

    token: TokenOf
    unit: ClassVar[str] = "probability"

    def at_position(self, logits: Tensor, prompt: Tensor) -> Tensor:
        return _of_token(logits.softmax(-1), self.token, prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitDifference(Metric):
    """The logit of `correct` minus that of `wrong` (Wang et al. 2022, "Interpretability in the Wild")."""

    correct: TokenOf
    wrong: TokenOf
    unit: ClassVar[str] = "logit difference"

    def at_position(self, logits: Tensor, prompt: Tensor) -> Tensor:
        return _of_token(logits, self.correct, prompt) - _of_token(logits, self.wrong, prompt)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Divergence(Metric):
    """KL(p ‖ q) = Σ p ln(p / q), in nats, p being the softmax of `reference` [prompt, vocab] and q the model's."""

    reference: Tensor
    unit: ClassVar[str] = "KL divergence (nats)"

    def at_position(self, logits: Tensor, prompt: Tensor) -> Tensor:
        if self.reference.dim() != 2 or self.reference.shape[1] != logits.shape[-1]:
            raise SchemaError(
                f"the reference of a divergence is logits [prompt, vocab] of a vocabulary of {logits.shape[-1]:,} "
                f"tokens, not of shape {tuple(self.reference.shape)}"
            )
        if int(prompt.max()) >= len(self.reference):
            raise SchemaError(f"the divergence has the logits of {len(self.reference)} prompts, and there are more")
        return divergence(self.reference.to(logits.device)[prompt], logits)


def place_of(position: int, length: int) -> int:
    """A position of a prompt of this many tokens, counted from 0. SchemaError where it is outside."""
    if not -length <= position < length:
        raise SchemaError(f"position {position} is measured, and the prompt has {length} tokens")
    return position % length


def logits_at(model: Model, token_ids: Tensor, hooks: HookSpec, position: int) -> Tensor:
    """The logits of a forward at one position, float32 [sequence, vocab]: those of the others are never made."""
    kept: list[Tensor] = []

    def keep(point: HookPoint, value: Tensor) -> None:
        if point == _FINAL:
            kept.append(value[:, position].clone())

    model.forward(token_ids, hooks.capture(_FINAL), logits=False, sink=keep)
    with torch.no_grad():
        return model.unembedding.project(kept.pop()).float()


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base ‖ other) of logits [..., vocab], float32 [...], in nats.

    Computed in float64, for in float32 the rounding of a large vocabulary exceeds small divergences; on Apple's GPUs,
    which have none, in float32.
    """
    wide = torch.float32 if other.device.type == "mps" else torch.float64
    log_p, log_q = base.to(wide).log_softmax(-1), other.to(wide).log_softmax(-1)
    # A probability of 0 adds nothing, though its logarithm is −∞.
    terms = (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0)
    return terms.sum(-1).clamp_min(0).float()


def _of_token(logits: Tensor, token: TokenOf, prompt: Tensor) -> Tensor:
    alone = np.ndim(token) == 0  # a number, of Python's or of numpy's
    asked = [int(one) for one in np.atleast_1d(np.asarray(token))]
    for one in asked:
        if not 0 <= one < logits.shape[-1]:
            raise SchemaError(
                f"there is no token {one}: the vocabulary has {logits.shape[-1]:,} tokens, numbered from 0"
            )
    if not alone and int(prompt.max()) >= len(asked):
        raise SchemaError(f"the metric has {len(asked)} tokens, and there are more prompts: give one for each")
    ids = torch.tensor(asked, device=logits.device)
    ids = ids.expand(len(logits)) if alone else ids[prompt]
    return logits.gather(-1, ids[:, None])[:, 0]
