"""Choosing the next token from logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen: the strongest where `temperature` is 0; else by chance, from the softmax of
    logits / temperature over the `top_k` strongest, and of these the fewest that hold a probability of `top_p`
    (Holtzman et al. 2020, nucleus sampling). Filters apply in this order; None leaves one out.

    `seed`: sequence i of a batch draws from a generator of its own, seeded with seed + i, on the CPU whatever the
    device: what one sequence draws does not depend on the others.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise ModelError for values that no choice can be made by."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ModelError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ModelError(f"top_k must be 1 or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ModelError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ModelError("top_k and top_p choose by chance, which a temperature of 0 excludes: set temperature=1.0")

    def generators(self, n_sequences: int) -> list[torch.Generator]:
        """Give the sources of chance of a batch."""
        return [torch.Generator().manual_seed(self.seed + index) for index in range(n_sequences)]

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Give one token id a sequence, int64 [sequence] on the CPU, from logits [sequence, vocab]."""
        if self.temperature == 0:
            return logits.argmax(-1).cpu()
        probabilities = self.probabilities(logits).cpu()
        draws = torch.tensor([float(torch.rand((), generator=one, dtype=torch.float64)) for one in generators])
        cumulative = probabilities.double().cumsum(-1)
        wanted = draws.double()[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Give the probabilities [..., vocab], float32, from which a token is drawn at a temperature above 0."""
        scaled = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            strongest = scaled.sort(descending=True, stable=True).indices[..., : self.top_k]  # the first among equals
            kept = torch.zeros_like(scaled, dtype=torch.bool).scatter_(-1, strongest, True)
            scaled = scaled.masked_fill(~kept, -torch.inf)
        probabilities = scaled.softmax(-1)
        if self.top_p is None:
            return probabilities
        ordered, order = probabilities.sort(descending=True, stable=True)
        held = ordered.cumsum(-1) - ordered  # by those before it
        kept = torch.zeros_like(held, dtype=torch.bool).scatter_(-1, order, held < self.top_p)
        nucleus = probabilities.masked_fill(~kept, 0.0)
        return nucleus / nucleus.sum(-1, keepdim=True)


GREEDY = Sampling()
"""The strongest token every time."""


def extract_token_prob(logits: Tensor, token_id: int) -> Tensor:
    """Give the probability, float32, that `token_id` comes next: of logits [vocab] a scalar, of [position, vocab] that
    after the last position, of [sequence, position, vocab] one a sequence, after the last position of all (in a batch
    of different lengths that is padding for the shorter ones: give each sequence's own rows).

    Raises ModelError for a token id outside the vocabulary.
    """
    if not 0 <= token_id < logits.shape[-1]:
        raise ModelError(f"token id {token_id} lies outside the vocabulary of {logits.shape[-1]} tokens")
    last = logits if logits.dim() == 1 else logits[..., -1, :]
    return last.float().softmax(-1)[..., token_id]
