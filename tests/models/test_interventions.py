"""Interventions change what flows on, in the order in which they were added; captures see what they are said to see."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec

POINT = "blocks.1.hook_resid_mid"


def double(value: Tensor, point: HookPoint) -> Tensor:
    return value * 2


def add_one(value: Tensor, point: HookPoint) -> Tensor:
    return value + 1


def test_order_of_registration_is_order_of_application(tiny: Model, tokens: Tensor) -> None:
    plain = tiny.forward(tokens, HookSpec().capture(POINT))[POINT]
    first = HookSpec().intervene(POINT, double).intervene(POINT, add_one).capture(POINT)
    second = HookSpec().capture(POINT).intervene(POINT, add_one).intervene(POINT, double)
    assert torch.equal(tiny.forward(tokens, first)[POINT], plain * 2 + 1)
    assert torch.equal(tiny.forward(tokens, second)[POINT], (plain + 1) * 2)


def test_before_captures_the_value_that_arrived(tiny: Model, tokens: Tensor) -> None:
    plain = tiny.forward(tokens, HookSpec().capture(POINT))[POINT]
    hooks = HookSpec().intervene(POINT, double).capture(POINT, before=True)
    assert torch.equal(tiny.forward(tokens, hooks)[POINT], plain)


def test_both_sides_of_one_intervention_are_refused(tiny: Model, tokens: Tensor) -> None:
    hooks = HookSpec().capture(POINT).capture("blocks.*.hook_resid_mid", before=True)
    with pytest.raises(HookError, match=r"blocks\.1\.hook_resid_mid is captured with before=True and without"):
        tiny.forward(tokens, hooks)


def test_every_point_can_be_changed_and_everything_after_it_sees_that(tiny: Model, tokens: Tensor) -> None:
    def tilt(value: Tensor, point: HookPoint) -> Tensor:
        return value * torch.linspace(0.5, 1.5, value.shape[-1])  # a plain factor is undone by the next norm

    plain = tiny.forward(tokens).logits
    for point in tiny.spec.points():
        nudged = tiny.forward(tokens, HookSpec().intervene(point, tilt)).logits
        assert nudged is not None
        assert plain is not None
        assert nudged.isfinite().all()
        assert not torch.allclose(nudged, plain, rtol=1e-3, atol=1e-4), point


def test_the_identity_changes_nothing_anywhere(tiny: Model, tokens: Tensor) -> None:
    plain = tiny.forward(tokens).logits
    same = tiny.forward(tokens, HookSpec().intervene("*", lambda value, point: value)).logits
    assert torch.allclose(same, plain, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_a_function_may_work_in_place_without_touching_what_others_hold(tiny: Model, tokens: Tensor) -> None:
    before, after = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
    plain = tiny.forward(tokens, HookSpec().capture(before, "blocks.1.attn.hook_k"))
    hooks = (
        HookSpec()
        .capture(before)
        .intervene(after, lambda value, point: value.zero_())
        .capture("blocks.1.attn.hook_v", before=True)
        .intervene("blocks.1.attn.hook_q", lambda value, point: value.zero_())
    )
    out = tiny.forward(tokens, hooks)
    assert torch.equal(out[before], plain[before])
    bias_free_values_of_a_zero_stream = torch.zeros_like(out["blocks.1.attn.hook_v"])
    assert torch.equal(out["blocks.1.attn.hook_v"], bias_free_values_of_a_zero_stream)


def test_the_function_is_told_where_it_is(tiny: Model, tokens: Tensor) -> None:
    seen: list[str] = []

    def note(value: Tensor, point: HookPoint) -> Tensor:
        seen.append(str(point))
        return value

    tiny.forward(tokens, HookSpec().intervene("blocks.*.hook_mlp_out", note), logits=False)
    assert seen == [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]


def test_a_knocked_out_edge_has_weight_zero_and_a_lone_query_attends_to_nothing(tiny: Model, tokens: Tensor) -> None:
    def knock_out(scores: Tensor, point: HookPoint) -> Tensor:
        scores[..., 5, 2] = -torch.inf
        scores[..., 9, :] = -torch.inf
        return scores

    hooks = HookSpec().intervene("blocks.1.attn.hook_attn_scores", knock_out).capture("blocks.1.attn.hook_{pattern,z}")
    out = tiny.forward(tokens, hooks)
    pattern = out["blocks.1.attn.hook_pattern"]
    assert (pattern[..., 5, 2] == 0).all()
    assert torch.allclose(pattern[..., 5, :].sum(-1), torch.ones(()))
    assert (pattern[..., 9, :] == 0).all()
    assert (out["blocks.1.attn.hook_z"][:, 9] == 0).all()
    assert out.logits is not None
    assert out.logits.isfinite().all()


def test_a_head_is_ablated_through_z_and_through_its_result_alike(tiny: Model, tokens: Tensor) -> None:
    def ablate(value: Tensor, point: HookPoint) -> Tensor:
        value[:, :, 3] = 0
        return value

    by_z = tiny.forward(tokens, HookSpec().intervene("blocks.1.attn.hook_z", ablate)).logits
    by_result = tiny.forward(tokens, HookSpec().intervene("blocks.1.attn.hook_result", ablate)).logits
    assert torch.allclose(by_z, by_result, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda value, point: value[0],
            r"blocks\.1\.hook_resid_mid gave a tensor of shape \(40, 36\); what arrived there",
        ),
        (lambda value, point: value.double(), r"dtype torch\.float64; .* has torch\.float32"),
        (lambda value, point: None, r"gave NoneType; a tensor is expected"),
        (lambda value, point: value.to("meta"), r"device meta"),
    ],
)
def test_a_result_that_does_not_fit_is_refused(tiny: Model, tokens: Tensor, function: object, message: str) -> None:
    with pytest.raises(HookError, match=message):
        tiny.forward(tokens, HookSpec().intervene(POINT, function))  # type: ignore[arg-type]


def test_a_pattern_that_names_nothing_is_refused_before_anything_is_computed(
    tiny: Model, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    for hooks in (HookSpec().capture("blocks.3.hook_resid_post"), HookSpec().intervene("blocks.3.hook_z", double)):
        with pytest.raises(HookError, match=r"layers of this model are 0 to 2|no hook point"):
            tiny.forward(tokens, hooks)


def test_a_spec_is_never_changed(tiny: Model) -> None:
    empty = HookSpec()
    empty.capture("hook_embed")
    empty.intervene("hook_embed", double)
    assert empty == HookSpec()


def test_gradients_flow_to_what_an_intervention_puts_in(tiny: Model, tokens: Tensor) -> None:
    """Against a central difference, along one direction, in the loss of one token."""
    direction = torch.randn(36, generator=torch.Generator().manual_seed(1))

    def loss(step: Tensor, gradients: bool) -> Tensor:
        hooks = HookSpec().intervene("blocks.0.hook_resid_post", lambda value, point: value + step * direction)
        logits = tiny.forward(tokens, hooks, gradients=gradients).logits
        assert logits is not None
        return logits[0, 20].log_softmax(-1)[7]

    step = torch.zeros((), requires_grad=True)
    loss(step, gradients=True).backward()
    assert step.grad is not None
    with torch.no_grad():
        slope = (loss(torch.tensor(5e-3), gradients=False) - loss(torch.tensor(-5e-3), gradients=False)) / 1e-2
    assert torch.allclose(step.grad, slope, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_every_activation_can_be_differentiated(tiny: Model, tokens: Tensor, activation: str) -> None:
    model = dataclasses.replace(tiny, spec=dataclasses.replace(tiny.spec, activation=activation))
    nudge = torch.zeros(tiny.spec.d_model, requires_grad=True)
    hooks = HookSpec().intervene("hook_embed", lambda value, point: value + nudge)
    logits = model.forward(tokens, hooks, gradients=True).logits
    assert logits is not None
    logits.logsumexp(-1).sum().backward()
    assert nudge.grad is not None
    assert nudge.grad.norm() > 0


def test_captures_of_a_plain_forward_can_train_something(tiny: Model, tokens: Tensor) -> None:
    captured = tiny.forward(tokens, HookSpec().capture(POINT), logits=False)[POINT]
    assert not captured.requires_grad
    probe = torch.zeros(36, requires_grad=True)
    (captured @ probe).sum().backward()
    assert torch.allclose(probe.grad, captured.sum((0, 1)), rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
