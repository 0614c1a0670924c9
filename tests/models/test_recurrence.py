"""Recurrent feedback: layers run again, as candle-mi defines it, against the same written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stages.models.points import HookPoint
from forebay.stages.models.recurrence import Feedback, Recurrence
from forebay.stages.models.taps import HookSpec

PRE, POST = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"


def logits_of(model: Model, tokens: Tensor, hooks: HookSpec | None = None, **settings: object) -> Tensor:
    out = model.forward(tokens, hooks, **settings)  # type: ignore[arg-type]
    assert out.logits is not None
    return out.logits


def replaced(value: Tensor) -> HookSpec:
    return HookSpec().intervene(PRE, lambda given, point: value)


def push(d_model: int) -> Tensor:
    return torch.randn(d_model, generator=torch.Generator().manual_seed(1))


def test_depth_one_is_the_plain_forward(tiny: Model, tokens: Tensor) -> None:
    feedback = (Feedback(position=3, vector=push(36)),)
    for recurrence in (Recurrence(first=0, last=2, depth=1), Recurrence(first=1, last=1, depth=1, feedback=feedback)):
        assert torch.equal(logits_of(tiny, tokens, recurrence=recurrence), logits_of(tiny, tokens))


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_without_feedback_each_pass_starts_where_the_last_ended(tiny: Model, tokens: Tensor, depth: int) -> None:
    stream = tiny.forward(tokens, HookSpec().capture(POST))[POST]
    for _ in range(depth - 1):
        expected = logits_of(tiny, tokens, replaced(stream))
        stream = tiny.forward(tokens, replaced(stream).capture(POST))[POST]
    found = logits_of(tiny, tokens, recurrence=Recurrence(first=1, last=1, depth=depth))
    assert torch.equal(found, expected)


def test_a_loop_of_several_layers_to_the_last(tiny: Model, tokens: Tensor) -> None:
    last = tiny.forward(tokens, HookSpec().capture("blocks.2.hook_resid_post"))["blocks.2.hook_resid_post"]
    expected = logits_of(tiny, tokens, replaced(last))
    assert torch.equal(logits_of(tiny, tokens, recurrence=Recurrence(first=1, last=2)), expected)


@pytest.mark.parametrize("depth", [2, 4])
def test_with_feedback_every_pass_starts_from_what_entered_and_pushes_do_not_add_up(
    tiny: Model, tokens: Tensor, depth: int
) -> None:
    entered = tiny.forward(tokens, HookSpec().capture(PRE))[PRE]
    vector = push(36)
    pushed = entered.clone()
    pushed[:, 5] += 2.5 * vector
    pushed[:, -1] -= 0.5 * vector
    feedback = (
        Feedback(position=5, vector=vector, strength=2.5),
        Feedback(position=-1, vector=vector, strength=-0.5),
    )
    found = logits_of(tiny, tokens, recurrence=Recurrence(first=1, last=2, depth=depth, feedback=feedback))
    assert torch.allclose(found, logits_of(tiny, tokens, replaced(pushed)), rtol=1e-5, atol=1e-5)


def test_feedback_from_the_end_is_at_each_sequences_own(tiny: Model, tokens: Tensor) -> None:
    rows = [tokens[0, :9], tokens[1, :17]]
    recurrence = Recurrence(first=0, last=1, feedback=(Feedback(position=-2, vector=push(36)),))
    together = tiny.forward(rows, recurrence=recurrence)
    assert together.logits is not None
    for row, logits in zip(rows, together.logits, strict=True):
        alone = logits_of(tiny, row[None], recurrence=recurrence)[0]
        assert torch.allclose(logits[: len(row)], alone, rtol=1e-4, atol=1e-5)


def test_interventions_act_in_every_pass_and_captures_are_of_the_last(tiny: Model, tokens: Tensor) -> None:
    seen: list[str] = []

    def note(value: Tensor, point: HookPoint) -> Tensor:
        seen.append(str(point))
        return value

    taken: list[HookPoint] = []
    hooks = HookSpec().intervene("blocks.*.hook_mlp_out", note).capture(POST, "blocks.0.hook_resid_post")
    recurrence = Recurrence(first=1, last=1, depth=3)
    tiny.forward(tokens, hooks, recurrence=recurrence, sink=lambda point, value: taken.append(point))
    assert [int(name.split(".")[1]) for name in seen] == [0, 1, 1, 1, 2]
    assert [point.layer for point in taken] == [0, 1]
    out = tiny.forward(tokens, HookSpec().capture(POST), recurrence=recurrence, logits=False)
    twice = tiny.forward(tokens, HookSpec().capture(POST), recurrence=Recurrence(first=1, last=1, depth=2))
    again = tiny.forward(tokens, replaced(twice[POST]).capture(POST))
    assert torch.equal(out[POST], again[POST])


def test_sustained_feedback_is_also_at_the_position_that_is_being_continued(tiny: Model, tokens: Tensor) -> None:
    prompt, vector = tokens[:1, :10], 3 * push(36)
    for sustained in (False, True):
        recurrence = Recurrence(first=0, last=1, feedback=(Feedback(position=9, vector=vector),), sustained=sustained)
        sequence, expected = prompt, []
        for _ in range(5):
            pushes = [9] + ([sequence.shape[1] - 1] if sustained else [])
            step = Recurrence(first=0, last=1, feedback=tuple(Feedback(position=at, vector=vector) for at in pushes))
            following = logits_of(tiny, sequence, recurrence=step)[:, -1:].argmax(-1)
            expected.append(int(following))
            sequence = torch.cat((sequence, following), 1)
        (found,) = tiny.generate(prompt, max_new_tokens=5, stops=(), recurrence=recurrence)
        assert found.token_ids.tolist() == expected


@pytest.mark.parametrize(
    ("recurrence", "message"),
    [
        (Recurrence(first=2, last=1), "layers 2 to 1 cannot be repeated; this model has layers 0 to 2"),
        (Recurrence(first=-1, last=1), "layers -1 to 1 cannot be repeated"),
        (Recurrence(first=0, last=3), "layers 0 to 3 cannot be repeated"),
        (Recurrence(first=0, last=1, depth=0), "a recurrence of depth 0 runs no layer"),
        (Recurrence(first=0, last=1, feedback=(Feedback(position=0, vector=torch.ones(35)),)), r"shape \(35,\)"),
        (
            Recurrence(first=0, last=1, feedback=(Feedback(position=40, vector=torch.ones(36)),)),
            "feedback at position 40, but sequence 0 has 40 tokens",
        ),
        (
            Recurrence(first=0, last=1, feedback=(Feedback(position=0, vector=torch.ones(36), strength=torch.inf),)),
            "has the strength inf",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    tiny: Model, tokens: Tensor, recurrence: Recurrence, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(HookError, match=message):
        tiny.forward(tokens, recurrence=recurrence)
