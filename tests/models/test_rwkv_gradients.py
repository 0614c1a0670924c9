"""A loss of RWKV's logits is differentiated at every hook point as the equations, differentiated, say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import HookError
from forebay.stages.models.interventions import Add, Replace, Scale
from forebay.stages.models.points import EFFECTIVE_ATTN
from forebay.stages.models.points import STATE as KIND
from forebay.stages.models.state_taps import StateKnockout, StateSteering
from forebay.stages.models.taps import HookSpec

from .rwkv_edits import ROWS, Rwkv, error, name_of
from .rwkv_naive import Naive

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = f"blocks.1.{KIND}"
EFFECTIVE = f"blocks.1.{EFFECTIVE_ATTN}"
EXACT = 1e-8
PAUSE = 5
"""The position at which the state of layer 1 is captured."""


def loss_of(logits: Tensor | None) -> Tensor:
    """Of one sequence, [position, vocab]."""
    assert logits is not None
    return logits.log_softmax(-1)[[3, 20, -1], [7, 8, 9]].sum()


def adding(zero: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda value, position: value + zero[position]


@dataclass(frozen=True, eq=False)
class Case:
    """A model, and the gradient of the loss at every point of layer 1, by kind, as the equations have it."""

    rwkv: Rwkv
    naive: Naive
    gradients: Mapping[str, Tensor]


@pytest.fixture(scope="module", params=[6, 7], ids=["RWKV-6", "RWKV-7"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """To every value of the equations a zero is added, and the loss is differentiated by it."""
    rwkv = Rwkv.make(request.param, tmp_path_factory.mktemp("rwkv"))
    plain = rwkv.naive()
    zeros = {kind: torch.zeros_like(plain.values[name_of(kind, 1)], requires_grad=True) for kind in rwkv.kinds}
    zeros[KIND] = torch.zeros_like(plain.states[1][PAUSE], requires_grad=True)

    naive = rwkv.naive(
        edits={name_of(kind, 1): adding(zeros[kind]) for kind in rwkv.kinds},
        states={(1, PAUSE): lambda state: state + zeros[KIND]},
    )
    found = torch.autograd.grad(loss_of(naive.logits), list(zeros.values()))
    gradients = dict(zip(zeros, found, strict=True))
    v = naive.values["blocks.1.rwkv.hook_v"].detach()
    gradients[EFFECTIVE_ATTN] = torch.einsum("qhe,khe->hqk", gradients["rwkv.hook_wkv"], v).tril()
    return Case(rwkv, naive, gradients)


def gradient(captured: Tensor, loss: Tensor) -> Tensor:
    """By a capture of the one sequence; of effective attention only where there is an edge."""
    (found,) = torch.autograd.grad(loss, captured, retain_graph=True)
    found = found[0].squeeze(0) if captured.shape[2:] == (3, 12, 12) else found[0]
    return found.tril() if found.shape[-2:] == (34, 34) else found


def test_a_loss_is_differentiated_by_whatever_is_captured(case: Case) -> None:
    """By every point captured alone, and by every one among all, so that what is captured leads on, and once."""
    with case.rwkv.in_float64() as model:
        names = [str(point) for point in model.spec.points() if point.layer == 1 and point.kind != KIND]
        names += [str(point) for point in model.spec.points() if point.layer is None]
        hooks = HookSpec().capture(*names).capture(STATE, positions=[PAUSE])
        every = model.forward(ROWS[:1], hooks, gradients=True)
        loss = loss_of(every.logits[0])  # type: ignore[index]
        for kind, expected in case.gradients.items():
            name = name_of(kind, 1)
            assert expected.norm() > 0
            assert error(gradient(every[name], loss), expected) < EXACT, kind
            asked = HookSpec().capture(name, positions=[PAUSE] if kind == KIND else None)
            alone = model.forward(ROWS[:1], asked, gradients=True)
            assert error(gradient(alone[name], loss_of(alone.logits[0])), expected) < EXACT, kind  # type: ignore[index]


def test_float32_differentiates_as_float64_does_up_to_rounding(case: Case) -> None:
    hooks = HookSpec().capture("*")
    out = case.rwkv.model.forward(ROWS[:1], hooks, gradients=True)
    loss = loss_of(out.logits[0])  # type: ignore[index]
    for kind in case.rwkv.kinds:
        assert error(gradient(out[name_of(kind, 1)], loss), case.gradients[kind]) < 1e-4, kind


def test_gradients_flow_to_what_is_put_in_and_past_it(case: Case) -> None:
    """By what is added at two positions, and by what a scale of one multiplies."""
    with case.rwkv.in_float64() as model:
        for kind in case.rwkv.kinds:
            at_point = case.gradients[kind][[2, -1]]
            there = case.naive.values[name_of(kind, 1)].detach()[[2, -1]]
            added = torch.zeros(at_point.shape, requires_grad=True)
            factor = torch.ones(at_point.shape, requires_grad=True)
            hooks = HookSpec().intervene(name_of(kind, 1), Add(added).at(position=[2, -1]))
            hooks = hooks.intervene(name_of(kind, 1), Scale(factor).at(position=[2, -1])).capture("hook_embed")
            out = model.forward(ROWS[:1], hooks, gradients=True)
            by_added, by_factor = torch.autograd.grad(
                loss_of(out.logits[0]),  # type: ignore[index]
                [added, factor],
                retain_graph=True,
            )
            assert error(by_added, at_point) < EXACT, kind
            assert error(by_factor, at_point * there) < EXACT, kind
            past = gradient(out["hook_embed"], loss_of(out.logits[0]))  # type: ignore[index]
            assert error(past, case.gradients["hook_embed"]) < EXACT, kind


def test_gradients_flow_through_an_edited_edge_of_effective_attention(case: Case) -> None:
    """What a factor of one on every edge does is what the edges do, and nothing is counted twice on the way down."""
    with case.rwkv.in_float64() as model:
        factor = torch.ones(3, 34, 34, requires_grad=True)
        hooks = HookSpec().intervene(EFFECTIVE, Scale(factor)).capture("hook_embed").capture(EFFECTIVE, before=True)
        out = model.forward(ROWS[:1], hooks, gradients=True)
        loss = loss_of(out.logits[0])  # type: ignore[index]
        (by_factor,) = torch.autograd.grad(loss, factor, retain_graph=True)
        assert error(by_factor, case.gradients[EFFECTIVE_ATTN] * out[EFFECTIVE][0].detach()) < EXACT
        assert error(gradient(out["hook_embed"], loss), case.gradients["hook_embed"]) < EXACT


def test_gradients_flow_to_a_state_that_is_put_in(case: Case) -> None:
    at_state = case.gradients[KIND]
    with case.rwkv.in_float64() as model:
        added = torch.zeros(1, 1, 2, 12, 12, requires_grad=True)
        edit = Add(added).at(position=[PAUSE], head=[2, 0])
        out = model.forward(ROWS[:1], HookSpec().intervene(STATE, edit), gradients=True)
        (found,) = torch.autograd.grad(loss_of(out.logits[0]), added)  # type: ignore[index]
        assert error(found[0, 0], at_state[[2, 0]]) < EXACT
        state = case.naive.states[1][PAUSE].detach().requires_grad_()
        edit = Replace(state).at(position=PAUSE)
        out = model.forward(ROWS[:1], HookSpec().intervene(STATE, edit), gradients=True)
        (found,) = torch.autograd.grad(loss_of(out.logits[0]), state)  # type: ignore[index]
        assert error(found, at_state) < EXACT


def test_gradients_flow_to_the_scale_of_what_is_written(case: Case) -> None:
    """At every token and head, where a factor of one changes nothing, and beside a knockout, which takes it away."""
    factors = torch.ones(34, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(case.rwkv.naive(writes={1: factors}).logits), factors)
    with case.rwkv.in_float64() as model:
        scale = torch.ones(34, 3, requires_grad=True)
        for global_mode in (True, False):  # the graph is kept wherever the spec was made
            with torch.set_grad_enabled(global_mode):
                hooks = HookSpec().intervene(STATE, StateSteering(scale))
                out = model.forward(ROWS[:1], hooks, gradients=True)
            (found,) = torch.autograd.grad(loss_of(out.logits[0]), scale)  # type: ignore[index]
            assert error(found, expected) < EXACT
        hooks = HookSpec().intervene(STATE, StateSteering(scale)).intervene(STATE, StateKnockout().at(position=4))
        out = model.forward(ROWS[:1], hooks, gradients=True)
        (found,) = torch.autograd.grad(loss_of(out.logits[0]), scale)  # type: ignore[index]
        assert (found[4] == 0).all()
        assert (found[5:20].norm(dim=-1) > 0).all()


def test_a_state_can_itself_be_differentiated(case: Case) -> None:
    """The last state of every sequence of a ragged batch, by what is written to it."""
    out = case.rwkv.model.forward(ROWS, HookSpec().capture(STATE, "blocks.1.rwkv.hook_v"), logits=False, gradients=True)
    (found,) = torch.autograd.grad(out[STATE].square().sum(), out["blocks.1.rwkv.hook_v"])
    for row, ids in enumerate(ROWS):
        zero = torch.zeros(len(ids), 3, 12, dtype=torch.float64, requires_grad=True)
        naive = case.rwkv.naive(row, edits={"blocks.1.rwkv.hook_v": adding(zero)})
        (expected,) = torch.autograd.grad(naive.states[1][-1].square().sum(), zero)
        assert error(found[row, : len(ids)], expected) < 1e-4
        assert (found[row, len(ids) :] == 0).all()


@pytest.mark.parametrize(
    ("batch", "positions"), [(ROWS[:1], [0, 3]), (ROWS, [-2])], ids=["two positions", "not one place of the batch"]
)
def test_states_by_which_no_loss_can_be_differentiated_are_refused_before_anything_is_computed(
    case: Case, batch: Any, positions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(HookError, match=r"blocks\.1\.rwkv\.hook_state: where gradients are kept, .* one position, the"):
        case.rwkv.model.forward(batch, HookSpec().capture(STATE, positions=positions), gradients=True)
