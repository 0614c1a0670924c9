"""A model's blocks as something that can be run: what a transformer and a recurrent model have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .taps import Taps

if TYPE_CHECKING:
    from .rwkv.states import RecurrentStates


class Run(ABC):
    """The blocks as they are run over some tokens, from one layer to another, as often as is asked."""

    @abstractmethod
    def __call__(self, x_BTD: Tensor, first: int, beyond: int, taps: Taps | None) -> Tensor:
        """Run layers `first` to `beyond` − 1 on the residual stream [sequence, position, d_model]."""

    @property
    def states(self) -> "RecurrentStates | None":
        """The states after the last token, once all layers of a recurrent model have run."""
        return None


class Past:
    """What a model remembers of the tokens that it has seen, so that those which follow need no recomputation.

    `lengths` are the numbers of tokens seen of each sequence.
    """

    def __init__(self, n_sequences: int) -> None:
        self.lengths = [0] * n_sequences

    def positions(self, n_tokens: int, device: torch.device) -> Tensor:
        """Positions [sequence, token] of the next `n_tokens` tokens of every sequence."""
        first_B1 = torch.tensor(self.lengths, device=device)[:, None]
        return first_B1 + torch.arange(n_tokens, device=device)


class Blocks(ABC):
    """The blocks of a model. Made once a model; `start` and `follow` say over which tokens they are run."""

    @abstractmethod
    def start(self, lengths: Sequence[int], states: "RecurrentStates | None") -> Run:
        """Run them on whole sequences of these lengths, padded on the right to the longest, which begin with `states`
        where those are given. Raises ModelError for states that do not fit."""

    @abstractmethod
    def past(self, n_sequences: int, n_positions: int) -> Past:
        """Give the past of sequences of which nothing is seen yet, with room for `n_positions` of each."""

    @abstractmethod
    def follow(self, past: Past, counts: Sequence[int], n_tokens: int) -> Run:
        """Run them on tokens that follow those in `past`, which takes them in: the first `counts[i]` of the `n_tokens`
        in row i, the rest being padding."""
