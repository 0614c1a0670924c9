"""The next token is drawn from the distribution that temperature, top-k and top-p define, and from no other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import ModelError
from forebay.stages.models.sampling import GREEDY, Sampling, extract_token_prob

LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.5, 0.5, -4.0])


def by_hand(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[:top_k]
    total = sum(weights[i] for i in kept)
    probabilities = [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]
    nucleus, held = [], 0.0
    for i in kept:
        nucleus.append(i)
        held += probabilities[i]
        if top_p is not None and held >= top_p:
            break
    held = sum(probabilities[i] for i in nucleus)
    return [probabilities[i] / held if i in nucleus else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.8, 1.0])
def test_probabilities_are_those_of_the_definition(temperature: float, top_k: int | None, top_p: float | None) -> None:
    ours = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(LOGITS)
    expected = torch.tensor(by_hand(LOGITS.tolist(), temperature, top_k, top_p))
    assert torch.allclose(ours, expected, atol=1e-6)


def draw(sampling: Sampling, n: int) -> Tensor:
    generators = sampling.generators(1)
    return torch.cat([sampling.choose(LOGITS[None], generators) for _ in range(n)])


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(temperature=1.5, top_k=4, seed=11)
    found = torch.bincount(draw(sampling, 4000), minlength=6) / 4000
    expected = sampling.probabilities(LOGITS)
    assert (found[expected == 0] == 0).all()
    assert torch.allclose(found, expected, atol=4 * 0.5 / math.sqrt(4000))  # four standard deviations at most


def test_a_seed_is_a_sequence_of_draws() -> None:
    one, same, other = (draw(Sampling(temperature=1.0, seed=seed), 30).tolist() for seed in (3, 3, 4))
    assert one == same != other


def test_greedy_is_the_strongest_and_the_first_among_equals() -> None:
    tied = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    assert GREEDY.choose(tied, GREEDY.generators(2)).tolist() == [1, 0]
    assert Sampling(temperature=1e-4).probabilities(LOGITS)[0] > 1 - 1e-6


def test_a_token_that_cannot_come_is_never_drawn() -> None:
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 2] = 0.0
    sampling = Sampling(temperature=1.0)
    generators = sampling.generators(1)
    assert {int(sampling.choose(logits, generators)) for _ in range(50)} == {2}


def test_the_probability_of_one_token_after_the_last_position() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    expected = logits.double().exp()[:, -1, 4] / logits.double().exp()[:, -1].sum(-1)
    assert torch.allclose(extract_token_prob(logits, 4).double(), expected, atol=1e-6)
    assert extract_token_prob(logits[0], 4) == extract_token_prob(logits[0, -1], 4) == extract_token_prob(logits, 4)[0]
    for outside in (-1, 7):
        with pytest.raises(ModelError, match="outside the vocabulary of 7 tokens"):
            extract_token_prob(logits, outside)
