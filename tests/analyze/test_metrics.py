"""A metric is one signed number a sequence at a position, by its closed form in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forebay.stages.analyze.metrics import Divergence, Logit, LogitDifference, LogProbability, Metric, Probability
from forebay.stages.analyze.prompts import one_prompt
from forebay.stages.models.load import load_model
from forebay.stores.errors import SchemaError

LENGTHS = (5, 3, 4)
LOGITS = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(3)) * 3


def softmax(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    return found


def row(sequence: int, position: int) -> np.ndarray:
    return LOGITS[sequence, position if position >= 0 else LENGTHS[sequence] + position].double().numpy()


@pytest.mark.parametrize("position", [-1, -3, 0, 2])
def test_metrics_are_taken_at_a_position_in_each_sequences_own_terms(position: int) -> None:
    rows = [row(i, position) for i in range(3)]
    reference = torch.randn(3, 11)
    p = [softmax(one.double().numpy()) for one in reference]
    due: dict[Metric, list[float]] = {
        Logit(token=7, position=position): [x[7] for x in rows],
        Probability(token=7, position=position): [softmax(x)[7] for x in rows],
        LogProbability(token=(7, 0, 2), position=position): [
            float(np.log(softmax(x)[t])) for x, t in zip(rows, (7, 0, 2), strict=True)
        ],
        LogitDifference(correct=(1, 2, 3), wrong=10, position=position): [
            x[t] - x[10] for x, t in zip(rows, (1, 2, 3), strict=True)
        ],
        Divergence(reference=reference, position=position): [
            float((q * np.log(q / softmax(x))).sum()) for q, x in zip(p, rows, strict=True)
        ],
    }
    for metric, expected in due.items():
        np.testing.assert_allclose(metric(LOGITS, LENGTHS), expected, rtol=1e-5, atol=1e-6)
        assert metric.unit


def test_rows_that_belong_to_one_prompt_share_its_token() -> None:
    found = Logit(token=(4, 9))(LOGITS, LENGTHS, prompt=[1, 0, 1])
    np.testing.assert_allclose(found, [row(0, -1)[9], row(1, -1)[4], row(2, -1)[9]], rtol=1e-6)


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    base = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1)).double()
    other = base + 1e-4 * torch.randn(1, 50_000, generator=torch.Generator().manual_seed(2)).double()
    p = base.softmax(-1)
    due = float((p * (base.log_softmax(-1) - other.log_softmax(-1))).sum())
    found = Divergence(reference=base)(other[:, None], [1])
    assert 0 < due < 1e-8
    np.testing.assert_allclose(found, due, rtol=1e-5)
    assert float(Divergence(reference=base)(base[:, None], [1])) == 0


def test_a_token_may_be_a_number_of_numpys() -> None:
    assert torch.equal(Logit(token=np.int64(4))(LOGITS, LENGTHS), Logit(token=4)(LOGITS, LENGTHS))  # type: ignore[arg-type]


def test_a_probability_of_zero_in_the_reference_adds_nothing() -> None:
    reference = torch.tensor([[0.0, -torch.inf, 1.0]])
    found = Divergence(reference=reference)(torch.tensor([[[0.0, 50.0, 1.0]]]), [1])
    assert torch.isfinite(found).all()


def test_metrics_can_be_differentiated() -> None:
    logits = LOGITS.clone().requires_grad_()
    LogProbability(token=3)(logits, LENGTHS).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    due = np.eye(11)[3] - softmax(row(1, -1))
    np.testing.assert_allclose(logits.grad[1, 2], due, atol=1e-6)
    assert not logits.grad[1, 3:].any()


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (Logit(token=11), "no token 11: the vocabulary has 11"),
        (Logit(token=-1), "no token -1"),
        (Logit(token=(1, 2)), "2 tokens, and there are more prompts"),
        (Logit(token=1, position=3), "position 3 is measured, and a sequence has 3 tokens"),
        (Logit(token=1, position=-4), "position -4 is measured, and a sequence has 3 tokens"),
        (Divergence(reference=torch.zeros(2, 11)), "the logits of 2 prompts, and there are more"),
        (Divergence(reference=torch.zeros(3, 10)), r"a vocabulary of 11 tokens, not of shape \(3, 10\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(metric: Metric, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        metric(LOGITS, LENGTHS)


def test_one_prompt_is_a_text_or_its_ids_however_they_come(tiny_model: Path) -> None:
    model = load_model(tiny_model, device="cpu")
    for given in ([5, 6, 7], [np.int64(5), 6, 7], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]), [[5, 6, 7]]):
        assert one_prompt(model, given).tolist() == [5, 6, 7]  # type: ignore[arg-type]
    text = one_prompt(model, "truth is").tolist()
    assert one_prompt(model, ["truth is"]).tolist() == text  # type: ignore[arg-type]
    for several in (["truth is", "so well"], [[5, 6], [7]], torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(SchemaError, match="one prompt is expected here, not 2"):
            one_prompt(model, several)  # type: ignore[arg-type]
