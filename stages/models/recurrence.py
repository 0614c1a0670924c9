"""Recurrent feedback: some layers are run again before the rest, with or without a push between the passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import HookError
from .spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Feedback:
    """A vector [d_model] that is added, `strength` times, to the residual stream at a position of every sequence;
    negative positions count from each sequence's own end."""

    position: int
    vector: Tensor
    strength: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recurrence:
    """Run layers `first` to `last`, both included, `depth` times before the layers above them.

    Without `feedback` every pass starts from what the one before it gave. With it every pass after the first starts
    from what entered the loop the first time plus Σ strength · vector: pushes do not add up, and passes 2, 3, … are
    equal. `depth` 1 is the plain forward. When text is generated, feedback stays at its positions in the prompt; with
    `sustained` it is also added at whatever position is the last.

    Interventions act in every pass; captures in the loop are those of the last. Source: candle-mi's
    `forward_recurrent` ("anacrousis").
    """

    first: int
    last: int
    depth: int = 2
    feedback: tuple[Feedback, ...] = ()
    sustained: bool = False

    def check(self, spec: ModelSpec, lengths: Sequence[int]) -> None:
        """Raise HookError for layers, positions or vectors that do not fit the model or the sequences."""
        if not 0 <= self.first <= self.last < spec.n_layers:
            raise HookError(
                f"layers {self.first} to {self.last} cannot be repeated; this model has layers 0 to {spec.n_layers - 1}"
            )
        if self.depth < 1:
            raise HookError(f"a recurrence of depth {self.depth} runs no layer; the plain forward has depth 1")
        for push in self.feedback:
            if tuple(push.vector.shape) != (spec.d_model,):
                raise HookError(
                    f"the feedback at position {push.position} has shape {tuple(push.vector.shape)}; the residual "
                    f"stream takes ({spec.d_model},)"
                )
            if not math.isfinite(push.strength):
                raise HookError(f"the feedback at position {push.position} has the strength {push.strength}")
            for index, length in enumerate(lengths):
                if not -length <= push.position < length:
                    raise HookError(
                        f"there is feedback at position {push.position}, but sequence {index} has {length} tokens"
                    )

    def push(self, entered_BTD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Give what a later pass starts from: the stream that entered the loop, with the feedback added."""
        pushed_BTD = entered_BTD.clone()
        rows_B = torch.arange(len(lengths), device=entered_BTD.device)
        for push in self.feedback:
            at_B = torch.tensor([push.position % length for length in lengths], device=entered_BTD.device)
            pushed_BTD[rows_B, at_B] += push.strength * push.vector.to(entered_BTD)
        return pushed_BTD

    def while_generating(self, prompt_lengths: Sequence[int]) -> "Recurrence":
        """Give the recurrence of one step of generation: feedback at the prompt's positions counted from the start,
        which for prompts of different lengths must be so already, and at the last position where it is sustained."""
        if any(push.position < 0 for push in self.feedback) and len(set(prompt_lengths)) > 1:
            raise HookError("feedback at a position counted from the end needs prompts of one length: count from 0")
        fixed = tuple(replace(push, position=push.position % prompt_lengths[0]) for push in self.feedback)
        again = tuple(replace(push, position=-1) for push in self.feedback) if self.sustained else ()
        return replace(self, feedback=fixed + again)
