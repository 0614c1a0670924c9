"""States of RWKV: captured after chosen tokens, put in, and what single tokens write to them, against the equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from forebay.stages.models.batch import make_batch
from forebay.stages.models.errors import HookError
from forebay.stages.models.interventions import Add, Apply, NamedIntervention, Replace, Scale, Zero
from forebay.stages.models.model import Model
from forebay.stages.models.points import EFFECTIVE_ATTN, HookPoint
from forebay.stages.models.points import STATE as KIND
from forebay.stages.models.resolve import resolve
from forebay.stages.models.state_taps import StateKnockout, StateSteering, StateTap
from forebay.stages.models.taps import HookSpec

from .rwkv_edits import LENGTHS, ROWS, Rwkv, error
from .rwkv_naive import Naive, effective_attention

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = f"blocks.1.{KIND}"
WKV = "blocks.1.rwkv.hook_wkv"
EFFECTIVE = f"blocks.1.{EFFECTIVE_ATTN}"
EXACT = 1e-9


@pytest.fixture(scope="module")
def plain(rwkv: Rwkv) -> list[Naive]:
    return [rwkv.naive(row) for row in range(3)]


def check(model: Model, hooks: HookSpec, expected: Sequence[Naive], bound: float = EXACT) -> None:
    """Logits, what is read in the layer, and the states at the end of the layers, of every sequence."""
    out = model.forward(ROWS, hooks.capture(WKV))
    assert out.states is not None
    for row, (length, naive) in enumerate(zip(LENGTHS, expected, strict=True)):
        assert error(out[WKV][row, :length], naive.values[WKV]) < bound
        assert error(out.logits[row, :length], naive.logits) < bound  # type: ignore[index]
        for layer in range(3):
            found, last = out.states.layers[layer].wkv[row], naive.states[layer][-1]
            assert float((found - last).norm()) <= bound * float(last.norm())


# ── captured ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_positions_the_state_is_that_of_each_sequences_last_token(rwkv: Rwkv, plain: list[Naive]) -> None:
    out = rwkv.model.forward(ROWS, HookSpec().capture(f"blocks.*.{KIND}"))
    for layer in range(3):
        value = out[f"blocks.{layer}.{KIND}"]
        assert value.shape == (3, 1, 3, 12, 12)
        for row, naive in enumerate(plain):
            assert error(value[row, 0], naive.states[layer][-1]) < 1e-5
    assert out.state_positions == (-1,)


def test_states_are_captured_in_the_order_asked_and_counted_in_each_sequence(rwkv: Rwkv, plain: list[Naive]) -> None:
    positions = [4, -1, 0, -3, 5]
    with rwkv.in_float64() as model:
        out = model.forward(ROWS, HookSpec().capture(STATE, positions=positions))
    for row, naive in enumerate(plain):
        for place, position in enumerate(positions):
            assert error(out[STATE][row, place], naive.states[1][position]) < EXACT
    assert out.state_positions == tuple(positions)


def test_a_sequence_that_is_too_short_for_a_position_has_no_state_there(rwkv: Rwkv, plain: list[Naive]) -> None:
    longest = max(map(len, ROWS))
    out = rwkv.model.forward(ROWS, HookSpec().capture(STATE, positions=[longest - 1, 0]))
    for row, naive in enumerate(plain):
        if len(ROWS[row]) == longest:
            assert error(out[STATE][row, 0], naive.states[1][-1]) < 1e-5
        else:
            assert bool(out[STATE][row, 0].isnan().all())
        assert error(out[STATE][row, 1], naive.states[1][0]) < 1e-5
    assert len({len(row) for row in ROWS}) > 1


@pytest.mark.parametrize("positions", [range(3), numpy.array([2, 0]), torch.tensor([1, -1]), (numpy.int32(3),)])
def test_positions_are_any_list_of_whole_numbers(rwkv: Rwkv, positions: Any) -> None:
    out = rwkv.model.forward(ROWS, HookSpec().capture(STATE, positions=positions))
    assert out.state_positions == tuple(int(position) for position in positions)


def test_what_arrives_is_captured_before_and_what_is_handed_on_after_an_intervention(
    rwkv: Rwkv, plain: list[Naive]
) -> None:
    hooks = HookSpec().intervene(STATE, Scale(-2.0).at(position=[3, -1]))
    before = rwkv.model.forward(ROWS, hooks.capture(STATE, before=True, positions=[3, -1]))[STATE]
    after = rwkv.model.forward(ROWS, hooks.capture(STATE, positions=[3, -1]))[STATE]
    assert torch.equal(after, -2 * before)
    for row, naive in enumerate(plain):
        assert error(before[row, 0], naive.states[1][3]) < 1e-5


def test_a_sink_takes_the_states_of_each_layer_once(rwkv: Rwkv) -> None:
    hooks = HookSpec().capture(f"blocks.*.{KIND}", positions=[0, -1])
    taken: dict[HookPoint, Tensor] = {}
    out = rwkv.model.forward(ROWS, hooks, logits=False, sink=lambda point, value: taken.update({point: value}))
    assert [str(point) for point in taken] == [f"blocks.{layer}.{KIND}" for layer in range(3)]
    collected = rwkv.model.forward(ROWS, hooks, logits=False)
    assert not out.captures
    assert all(torch.equal(taken[point], value) for point, value in collected.captures.items())


# ── changed ──────────────────────────────────────────────────────────────────────────────────────────────────────────

HALF = torch.linspace(-1, 1, 12)

EDITS: dict[str, tuple[NamedIntervention, Callable[[Tensor], Tensor]]] = {
    "Replace": (Replace(HALF), lambda state: HALF.expand_as(state).clone()),
    "Add": (Add(HALF, scale=0.5), lambda state: state + 0.5 * HALF),
    "Scale": (Scale(-1.5), lambda state: state * -1.5),
    "Zero": (Zero(), torch.zeros_like),
    "Apply": (Apply(lambda state: state.mT.contiguous()), lambda state: state.mT.contiguous()),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_state_that_is_changed_is_what_the_next_token_is_given(rwkv: Rwkv, plain: list[Naive], name: str) -> None:
    """All heads of one position, one head of two; the token after which it is changed has read what it read."""
    edit, of_state = EDITS[name]

    def of_head(state: Tensor) -> Tensor:
        state[1] = of_state(state[1])
        return state

    hooks = HookSpec().intervene(STATE, edit.at(position=3)).intervene(STATE, edit.at(head=1, position=[-2, -1]))
    states = {(1, 3): lambda state: of_state(state)}
    expected = [
        rwkv.naive(row, states={**states, (1, length - 2): of_head, (1, length - 1): of_head})
        for row, length in enumerate(LENGTHS)
    ]
    with rwkv.in_float64() as model:
        check(model, hooks, expected)
    assert error(expected[0].logits, plain[0].logits) > 1e-4
    for naive, changed in zip(plain, expected, strict=True):
        assert torch.equal(naive.values[WKV][:4], changed.values[WKV][:4])


def test_changes_at_one_position_act_in_their_order(rwkv: Rwkv) -> None:
    one = HookSpec().intervene(STATE, Scale(2.0).at(position=3)).intervene(STATE, Add(1.0).at(position=[3, 5]))
    other = HookSpec().intervene(STATE, Add(1.0).at(position=[3, 5])).intervene(STATE, Scale(2.0).at(position=3))
    plain, first, second = (
        rwkv.model.forward(ROWS, hooks.capture(STATE, positions=[3]))[STATE] for hooks in (HookSpec(), one, other)
    )
    assert torch.equal(first, plain * 2 + 1)
    assert torch.equal(second, (plain + 1) * 2)


@pytest.mark.parametrize("positions", [[3], [-1], [3, -2, 0]])
def test_states_of_another_run_are_put_in_at_the_positions_they_are_of(rwkv: Rwkv, positions: list[int]) -> None:
    """Patched into the same run they change nothing; from another run they are what that run had there."""
    same = rwkv.model.forward(ROWS, HookSpec().capture(STATE, positions=positions))
    patch = HookSpec().intervene(STATE, Replace(same[STATE]).at(position=positions))
    out = rwkv.model.forward(ROWS, patch.capture(STATE, positions=positions))
    assert torch.equal(out[STATE], same[STATE])
    assert torch.equal(out.logits, same.logits)  # type: ignore[arg-type]
    others = [list(reversed(row)) for row in ROWS]
    theirs = rwkv.model.forward(others, HookSpec().capture(STATE, positions=positions))[STATE]
    patch = HookSpec().intervene(STATE, Replace(theirs.numpy()).at(position=positions))
    out = rwkv.model.forward(ROWS, patch.capture(STATE, positions=positions))
    assert torch.equal(out[STATE], theirs)
    for row, length in enumerate(LENGTHS):
        states = {
            (1, position % length): (lambda state, place=place, row=row: theirs[row, place])
            for place, position in enumerate(positions)
        }
        naive = rwkv.naive(row, states=states)
        assert error(out.logits[row, :length], naive.logits) < 1e-4  # type: ignore[index]


def test_values_are_dealt_out_to_sequences_positions_and_heads_as_they_are_named(rwkv: Rwkv) -> None:
    values = torch.arange(8.0).reshape(2, 2, 2, 1, 1)
    edit = Replace(values).at(sequence=[2, 0], position=[-1, 1], head=[2, 0])
    out = rwkv.model.forward(ROWS, HookSpec().intervene(STATE, edit).capture(STATE, positions=[-1, 1]))[STATE]
    for i, sequence in enumerate((2, 0)):
        for place in range(2):
            for h, head in enumerate((2, 0)):
                assert (out[sequence, place, head] == values[i, place, h]).all()
    plain = rwkv.model.forward(ROWS, HookSpec().capture(STATE, positions=[-1, 1]))[STATE]
    assert torch.equal(out[:, 1, 1], plain[:, 1, 1])
    assert torch.equal(out[1], plain[1])


def test_a_function_is_given_the_states_of_the_sequences_that_are_there(rwkv: Rwkv, plain: list[Naive]) -> None:
    given: list[Tensor] = []

    def keep(part: Tensor) -> Tensor:
        given.append(part.clone())
        return part

    rwkv.model.forward(ROWS, HookSpec().intervene(STATE, Apply(keep).at(position=-2, head=1)))
    assert [tuple(part.shape) for part in given] == [(1, 12, 12)] * 3
    for row, part in zip((1, 2, 0), given, strict=True):
        assert error(part[0], plain[row].states[1][-2][1]) < 1e-5


def test_a_slice_of_positions_is_every_position_of_each_sequence_in_it(rwkv: Rwkv) -> None:
    hooks = HookSpec().intervene(STATE, Zero().at(position=slice(1, None, 2), sequence=slice(1, None)))
    expected = [
        rwkv.naive(row, states={(1, position): torch.zeros_like for position in range(1, length, 2)} if row else {})
        for row, length in enumerate(LENGTHS)
    ]
    with rwkv.in_float64() as model:
        check(model, hooks, expected)


# ── written ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def ones(row: int) -> Tensor:
    return torch.ones(LENGTHS[row], 3, dtype=torch.float64)


def test_a_knocked_out_token_writes_nothing(rwkv: Rwkv, plain: list[Naive]) -> None:
    """Tokens 2 and the last but one of all sequences in all heads, token 4 in one head, token 0 of one sequence."""
    hooks = (
        HookSpec()
        .intervene(STATE, StateKnockout().at(position=[2, -2]))
        .intervene(STATE, StateKnockout().at(position=4, head=1))
    )
    hooks = hooks.intervene(STATE, StateKnockout().at(position=0, sequence=2))
    expected = []
    for row in range(3):
        factors = ones(row)
        factors[[2, -2]] = 0
        factors[4, 1] = 0
        factors[0] = float(row != 2)
        expected.append(rwkv.naive(row, writes={1: factors}))
    with rwkv.in_float64() as model:
        check(model, hooks, expected)
    assert error(expected[0].logits, plain[0].logits) > 1e-3


@pytest.mark.parametrize("scale", [0.3, -2.0, 4.0])
def test_a_steered_token_writes_so_many_times_as_much(rwkv: Rwkv, scale: float) -> None:
    hooks = HookSpec().intervene(STATE, StateSteering(scale).at(position=[1, -1]))
    hooks = hooks.intervene(STATE, StateSteering(torch.tensor([1.0, 0.5, -1.0])).at(position=slice(1, 4)))
    expected = []
    for row in range(3):
        factors = ones(row)
        factors[[1, -1]] *= scale
        factors[1:4] *= torch.tensor([1.0, 0.5, -1.0])
        expected.append(rwkv.naive(row, writes={1: factors}))
    with rwkv.in_float64() as model:
        check(model, hooks, expected)


def test_steering_by_one_changes_no_bit_and_by_zero_is_the_knockout(rwkv: Rwkv) -> None:
    bare = rwkv.model.forward(ROWS).logits
    one = rwkv.model.forward(ROWS, HookSpec().intervene(STATE, StateSteering(1.0))).logits
    zero, out = (
        rwkv.model.forward(ROWS, HookSpec().intervene(STATE, edit.at(position=[3, -1], head=[0, 2]))).logits
        for edit in (StateSteering(0.0), StateKnockout())
    )
    assert torch.equal(one, bare)  # type: ignore[arg-type]
    assert torch.equal(zero, out)  # type: ignore[arg-type]
    assert not torch.equal(zero, bare)  # type: ignore[arg-type]


def test_without_an_address_nothing_is_ever_written(rwkv: Rwkv) -> None:
    hooks = HookSpec().intervene(STATE, StateKnockout()).capture(STATE, positions=[0, 4, -1])
    out = rwkv.model.forward(ROWS, hooks)
    assert (out[STATE] == 0).all()


def test_a_knocked_out_token_itself_reads_what_it_read_in_rwkv_6_and_not_in_rwkv_7(rwkv: Rwkv) -> None:
    """RWKV-6 reads before it writes, and its bonus stays; RWKV-7 reads the state that it has written to."""
    hooks = HookSpec().intervene(STATE, StateKnockout().at(position=5)).capture(WKV)
    plain, out = (rwkv.model.forward(ROWS[:1], asked)[WKV][0] for asked in (HookSpec().capture(WKV), hooks))
    unaffected = (out == plain).flatten(1).all(1)
    assert unaffected[:5].all()
    assert bool(unaffected[5]) == (rwkv.version == 6)
    assert not unaffected[6:].any()


def test_what_is_written_and_what_is_handed_on_can_be_changed_together(rwkv: Rwkv) -> None:
    hooks = HookSpec().intervene(STATE, Scale(0.5).at(position=3)).intervene(STATE, StateSteering(3.0).at(position=3))
    hooks = hooks.intervene(STATE, StateKnockout().at(position=4)).intervene(STATE, Add(0.2).at(position=-1))
    expected = []
    for row, length in enumerate(LENGTHS):
        factors = ones(row)
        factors[3], factors[4] = 3.0, 0.0
        states = {(1, 3): lambda state: state * 0.5, (1, length - 1): lambda state: state + 0.2}
        expected.append(rwkv.naive(row, writes={1: factors}, states=states))
    with rwkv.in_float64() as model:
        check(model, hooks.capture(STATE, positions=[2, 3]), expected)


def test_effective_attention_is_that_of_what_was_written(rwkv: Rwkv, plain: list[Naive]) -> None:
    """A factor multiplies a token's column; RWKV-6's diagonal is the bonus, which nothing is written for."""
    hooks = (
        HookSpec()
        .intervene(STATE, StateSteering(3.0).at(position=2))
        .intervene(STATE, StateKnockout().at(position=4, head=1))
    )
    with rwkv.in_float64() as model:
        out = model.forward(ROWS, hooks.capture(EFFECTIVE, WKV, "blocks.1.rwkv.hook_v"))
    for row, length in enumerate(LENGTHS):
        alpha = effective_attention(plain[row].values, rwkv.tensors, rwkv.version, 1)
        diagonal = alpha.diagonal(dim1=1, dim2=2).clone()
        alpha[:, :, 2] *= 3
        alpha[1, :, 4] = 0
        if rwkv.version == 6:
            alpha.diagonal(dim1=1, dim2=2).copy_(diagonal)
        found = out[EFFECTIVE][row, :, :length, :length]
        assert error(found, alpha) < EXACT
        read = torch.einsum("hqk,khe->qhe", found, out["blocks.1.rwkv.hook_v"][row, :length])
        assert error(read, out[WKV][row, :length].double()) < EXACT


def test_everything_happens_on_the_device_of_the_states(rwkv: Rwkv) -> None:
    """On torch's device without memory, which refuses to be mixed with another; all that is put in is on the CPU."""
    hooks = HookSpec().intervene(STATE, StateSteering(torch.rand(3)).at(position=[0, -1]))
    hooks = hooks.intervene(STATE, Add(torch.rand(2, 12, 12)).at(position=-2, head=[2, 0]))
    batch = make_batch(ROWS, rwkv.model.spec, torch.device("cpu"))
    found: list[Tensor] = []
    asked = hooks.capture(STATE, positions=[3, -2])
    taps = resolve(asked, rwkv.model.spec, batch, lambda point, value: found.append(value), logits=True)
    tap = taps.blocks[1][KIND]
    assert isinstance(tap, StateTap)
    assert tap.written(torch.empty(3, 34, 3, 12, device="meta")).is_meta
    state = torch.empty(3, 3, 12, 12, device="meta")
    for stop in tap.stops:
        state = tap.at(stop, state)
        assert state.is_meta
    tap.finish()
    assert found[0].is_meta
    assert found[0].shape == (3, 2, 3, 12, 12)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value, point: value, r"is a function, which is not told after which token.*Apply\(function\)\.at\(pos"),
        (StateKnockout, r"is the class StateKnockout: make one, StateKnockout\(…\)"),
        (torch.zeros(3), r"is a Tensor: a function .* StateKnockout and StateSteering"),
        (Zero(), r"^Zero at blocks\.1\.rwkv\.hook_state: there is a state after every token: say after which"),
        (Zero().at(head=1), r"say after which, \.at\(position=…\)"),
        (Zero().at(position=6), r"position=6 is out of range in sequence 1, of 6 tokens"),
        (Zero().at(position=1, state_position=0), r"no dimension 'state_position' here, .*Did you mean 'position'"),
        (Zero().at(position=0, d_model=3), r"no dimension 'd_model' here, only \[sequence=3, position=34, head=3, d_k"),
        (Replace(torch.zeros(2, 3, 12, 12)).at(position=[0, 1, 2]), r"^Replace at .*does not broadcast.*position=3"),
        (Scale(torch.nan).at(position=0), r"factor must be finite"),
        (Apply(3).at(position=0), r"function of the part addressed is expected, not int"),
        (StateKnockout().at(d_key=3), r"a token writes to a head as a whole: .* not d_key"),
        (StateKnockout().at(position=[5, -1]), r"names position 5 twice in sequence 1"),
        (StateKnockout().at(head=3), r"head=3 is out of range: the size of head is 3"),
        (StateSteering(torch.nan), r"^StateSteering at .* scale must be finite"),
        (StateSteering(torch.ones(2)), r"scale has shape \[head=2\], .* \[sequence=3, position=34, head=3\]"),
        (StateSteering("2"), r"scale is a str that cannot be put in"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_to_states_is_refused_before_anything_is_computed(
    rwkv: Rwkv, edit: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(HookError, match=message):
        rwkv.model.forward(ROWS, HookSpec().intervene(STATE, edit))


@pytest.mark.parametrize("edit", [StateKnockout(), StateSteering(2.0).at(position=3)])
@pytest.mark.parametrize("point", ["blocks.2.hook_resid_mid", "blocks.2.rwkv.hook_k"])
def test_what_scales_writes_stands_at_states_alone(rwkv: Rwkv, edit: NamedIntervention, point: str) -> None:
    with pytest.raises(HookError, match=r"acts on rwkv\.hook_state alone: register it at 'blocks\.2\.rwkv\.hook_state"):
        rwkv.model.forward(ROWS, HookSpec().intervene(point, edit))


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (HookSpec().capture(STATE, positions=[34]), r"rwkv\.hook_state: position=34 is out of range in sequence 0"),
        (HookSpec().capture(STATE, positions=[]), r"names none, or one of them twice"),
        (HookSpec().capture(STATE, positions=[2, 2]), r"positions=\[2, 2\] names none, or one of them twice"),
        (HookSpec().capture(WKV, positions=[2]), r"says where states are captured; rwkv\.hook_wkv have every position"),
        (HookSpec().capture(STATE).capture("blocks.0.rwkv.hook_state", positions=[2]), r"not at \[-1\] and \[2\]"),
        (
            HookSpec().capture(STATE, EFFECTIVE).intervene(STATE, Zero().at(position=2)),
            r"blocks\.1\.rwkv\.hook_effective_attn is not defined where the state of its layer is changed",
        ),
    ],
)
def test_captures_that_cannot_be_made_are_refused_before_anything_is_computed(
    rwkv: Rwkv, hooks: HookSpec, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(HookError, match=message):
        rwkv.model.forward(ROWS, hooks)


@pytest.mark.parametrize("positions", [-1, [0.5], "last", [True, None], slice(3)])
def test_positions_that_are_no_list_of_whole_numbers_are_refused(positions: Any) -> None:
    with pytest.raises(HookError, match="a list of whole numbers is expected, such as"):
        HookSpec().capture(STATE, positions=positions)
