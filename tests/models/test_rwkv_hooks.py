"""What is done at a hook point of RWKV is what the same change of the equations does; what is not asked is free."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay.stages.models.edges import Knockout, KnockoutSpec, SteerAttention
from forebay.stages.models.errors import HookError
from forebay.stages.models.interventions import Add, Apply, Replace, Scale, Zero
from forebay.stages.models.points import EFFECTIVE_ATTN, STATE, HookPoint
from forebay.stages.models.recurrence import Feedback, Recurrence
from forebay.stages.models.state_taps import StateKnockout, StateSteering, StateTap
from forebay.stages.models.taps import HookSpec, Tap

from .rwkv_edits import LENGTHS, ROWS, Rwkv, dims_after_position, error, is_in_a_block, name_of
from .rwkv_naive import Edit, effective_attention

pytestmark = pytest.mark.usefixtures("one_thread")

EFFECTIVE = f"blocks.1.{EFFECTIVE_ATTN}"
WKV = "blocks.1.rwkv.hook_wkv"


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Rwkv:
    return Rwkv.make(7, tmp_path_factory.mktemp("rwkv"))


# ── the same change of the equations ─────────────────────────────────────────────────────────────────────────────────


PARTS: dict[str, Any] = {
    "head": slice(1, None),
    "d_head": slice(2, 9),
    "d_model": slice(4, 30),
    "d_mlp": slice(-20, None),
    "vocab": slice(5, 60),
}


def test_an_edit_at_any_point_is_the_same_edit_of_the_equations(rwkv: Rwkv) -> None:
    """Of a part at some positions, scaled, and of the whole at another, replaced, in two layers of a ragged batch."""
    plain = {row: rwkv.naive(row).logits for row in (1, 2)}
    last = rwkv.model.spec.n_layers - 1
    for kind in rwkv.kinds:
        pattern = f"blocks.[0-1].{kind}" if is_in_a_block(kind) else kind
        part = {dim: PARTS[dim] for dim in dims_after_position(kind)}
        hooks = HookSpec().intervene(pattern, Scale(1.7).at(position=[2, -1], **part))
        hooks = hooks.intervene(pattern, Replace(0.3).at(position=-3)).capture(f"blocks.{last}.hook_resid_post")
        with rwkv.in_float64() as model:
            out = model.forward(ROWS[1:], hooks)
        for place, row in enumerate(plain):
            length = LENGTHS[row]
            edit = scaled_and_replaced(tuple(part.values()), length)
            naive = rwkv.naive(row, edits={name_of(kind, layer): edit for layer in range(1 + is_in_a_block(kind))})
            assert out.logits is not None
            assert error(out.logits[place, :length], naive.logits) < 1e-9, kind
            stream = f"blocks.{last}.hook_resid_post"
            assert error(out[stream][place, :length], naive.values[stream]) < 1e-9, kind
            assert error(naive.logits, plain[row]) > 1e-3, kind


def scaled_and_replaced(part: tuple[slice, ...], length: int) -> Edit:
    def edit(value: Tensor, position: int) -> Tensor:
        if position in (2, length - 1):
            value[part] *= 1.7
        return torch.full_like(value, 0.3) if position == length - 3 else value

    return edit


def test_an_edit_of_what_layer_0_writes_is_what_later_layers_of_rwkv_7_remember(seven: Rwkv) -> None:
    hooks = HookSpec().intervene("blocks.0.rwkv.hook_v", Add(0.7).at(position=4))
    out = seven.model.forward(ROWS[:1], hooks.capture("blocks.2.rwkv.hook_v"))
    naive = seven.naive(edits={"blocks.0.rwkv.hook_v": lambda value, position: value + 0.7 * (position == 4)})
    assert error(out["blocks.2.rwkv.hook_v"][0], naive.values["blocks.2.rwkv.hook_v"]) < 1e-5


def test_an_identity_at_any_point_changes_no_bit(rwkv: Rwkv) -> None:
    plain = rwkv.model.forward(ROWS, HookSpec().capture("*", f"blocks.*.{EFFECTIVE_ATTN}"))
    for kind in (*rwkv.kinds, EFFECTIVE_ATTN, STATE):
        point = name_of(kind, 1)
        itself = Replace(plain[point])
        hooks = HookSpec().intervene(point, itself.at(position=[-1]) if kind == STATE else itself)
        out = rwkv.model.forward(ROWS, hooks.capture(point, "hook_final_norm"))
        assert torch.equal(out[point], plain[point]), kind
        assert torch.equal(out["hook_final_norm"], plain["hook_final_norm"]), kind
        assert torch.equal(out.logits, plain.logits), kind  # type: ignore[arg-type]


def test_several_interventions_act_in_their_order(rwkv: Rwkv) -> None:
    first, second = Scale(2.0).at(position=3), Add(1.0).at(position=[2, 3])
    plain = rwkv.model.forward(ROWS, HookSpec().capture(WKV))[WKV]
    out = rwkv.model.forward(ROWS, HookSpec().intervene(WKV, first).intervene(WKV, second).capture(WKV))[WKV]
    other = rwkv.model.forward(ROWS, HookSpec().intervene(WKV, second).intervene(WKV, first).capture(WKV))[WKV]
    assert torch.equal(out[:, 3], plain[:, 3] * 2 + 1)
    assert torch.equal(other[:, 3], (plain[:, 3] + 1) * 2)
    assert torch.equal(out[:, 2], plain[:, 2] + 1)


# ── decay ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_decay_of_zero_forgets_everything_before(rwkv: Rwkv) -> None:
    """The state is what the token wrote itself, less what RWKV-7 removes of what was there."""
    decay, state = "blocks.1.rwkv.hook_decay", f"blocks.1.{STATE}"
    hooks = HookSpec().intervene(decay, Zero().at(position=9)).capture(state, positions=[9]).capture(WKV)
    if rwkv.version == 7:
        hooks = hooks.intervene("blocks.1.rwkv.hook_a", Zero().at(position=9))
    for length in (34, 12):
        out = rwkv.model.forward([ROWS[0][:length]], hooks.capture("blocks.1.rwkv.hook_{k,v}"))
        k, v = (out[f"blocks.1.rwkv.hook_{letter}"][0, 9] for letter in "kv")
        assert error(out[state][0, 0], torch.einsum("hk,hv->hkv", k, v).double()) < 1e-6


def test_a_factor_of_the_decay_may_exceed_one(rwkv: Rwkv) -> None:
    decay = "blocks.1.rwkv.hook_decay"
    out = rwkv.model.forward(ROWS[:1], HookSpec().intervene(decay, Scale(2.5)))
    naive = rwkv.naive(edits={decay: lambda value, position: value * 2.5})
    assert error(out.logits[0], naive.logits) < 1e-5  # type: ignore[index]


@pytest.mark.parametrize("edit", [Replace(-0.1), Scale(torch.tensor([1.0, -1.0, 1.0])[:, None])])
def test_a_decay_below_zero_is_refused_before_anything_is_computed(
    rwkv: Rwkv, edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(HookError, match=r"at blocks\.1\.rwkv\.hook_decay: .* factors from 0 on, so the"):
        rwkv.model.forward(ROWS, HookSpec().intervene("blocks.1.rwkv.hook_decay", edit))


@pytest.mark.parametrize("edit", [Add(-2.0), lambda value, point: value * torch.nan])
def test_a_decay_that_comes_out_below_zero_is_refused(rwkv: Rwkv, edit: Any) -> None:
    with pytest.raises(HookError, match=r"at blocks\.1\.rwkv\.hook_decay gave a factor below 0, or NaN"):
        rwkv.model.forward(ROWS, HookSpec().intervene("blocks.1.rwkv.hook_decay", edit))


# ── effective attention ──────────────────────────────────────────────────────────────────────────────────────────────


def test_effective_attention_is_that_of_the_equations(rwkv: Rwkv) -> None:
    out = rwkv.model.forward(ROWS, HookSpec().capture(EFFECTIVE, WKV, "blocks.1.rwkv.hook_v"))
    for row, length in enumerate(LENGTHS):
        expected = effective_attention(rwkv.naive(row).values, rwkv.tensors, rwkv.version, 1)
        assert error(out[EFFECTIVE][row, :, :length, :length], expected) < 1e-5
    assert (out[EFFECTIVE].triu(1) == 0).all()
    read = torch.einsum("bhqk,bkhe->bqhe", out[EFFECTIVE], out["blocks.1.rwkv.hook_v"])
    for row, length in enumerate(LENGTHS):
        assert error(out[WKV][row, :length], read[row, :length].double()) < 1e-5


def test_an_edge_set_to_zero_takes_exactly_its_value_from_what_is_read(rwkv: Rwkv) -> None:
    edge = Zero().at(query=-2, key=1, head=2)
    with rwkv.in_float64() as model:
        plain = model.forward(ROWS, HookSpec().capture(EFFECTIVE, WKV, "blocks.1.rwkv.hook_v"))
        out = model.forward(ROWS, HookSpec().intervene(EFFECTIVE, edge).capture(EFFECTIVE, WKV))
    for row, length in enumerate(LENGTHS):
        gone = plain[EFFECTIVE][row, 2, length - 2, 1] * plain["blocks.1.rwkv.hook_v"][row, 1, 2]
        less = plain[WKV][row, length - 2, 2] - out[WKV][row, length - 2, 2]
        assert error(less, gone) < 1e-10
        changed = (out[WKV][row, :length] != plain[WKV][row, :length]).any(-1).nonzero().tolist()
        assert changed == [[length - 2, 2]]
        assert out[EFFECTIVE][row, 2, length - 2, 1] == 0


def test_an_edit_of_effective_attention_never_lets_a_token_read_what_comes_after_it(rwkv: Rwkv) -> None:
    hooks = HookSpec().intervene(EFFECTIVE, Replace(0.25)).intervene(EFFECTIVE, Add(0.5)).capture(EFFECTIVE)
    together = rwkv.model.forward(ROWS, hooks)
    assert torch.equal(together[EFFECTIVE], torch.full_like(together[EFFECTIVE], 0.75).tril())
    alone = rwkv.model.forward(ROWS[1:2], hooks)
    assert error(together.logits[1, :6], alone.logits[0].double()) < 1e-5  # type: ignore[index]


# ── what is not asked ────────────────────────────────────────────────────────────────────────────────────────────────


def calls(rwkv: Rwkv, hooks: HookSpec | None) -> Counter[str]:
    """Count the functions of the model's own code that a forward calls."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "models" in frame.f_code.co_filename:
            counted[frame.f_code.co_qualname] += 1

    rwkv.model.forward(ROWS, hooks)  # what is cached is cached now
    sys.setprofile(count)
    try:
        rwkv.model.forward(ROWS, hooks)
    finally:
        sys.setprofile(None)
    return counted


def test_an_empty_spec_makes_no_tap(rwkv: Rwkv, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rwkv.model.forward(ROWS).logits
    for kind in (Tap, StateTap):
        monkeypatch.setattr(kind, "__init__", None)
    assert torch.equal(rwkv.model.forward(ROWS, HookSpec()).logits, expected)  # type: ignore[arg-type]


def test_a_hook_costs_one_call_and_no_other_point_anything(rwkv: Rwkv) -> None:
    bare, hooked = calls(rwkv, None), calls(rwkv, HookSpec().capture("blocks.1.rwkv.hook_z"))
    within = [
        name for name in bare if name.startswith(("time_mix", "channel_mix", "_recur", "recur", "chunked", "_de"))
    ]
    assert {"time_mix", "channel_mix", "recur", "_recur"} <= {*within}
    assert {name: hooked[name] for name in within} == {name: bare[name] for name in within}
    assert hooked["Tap.__call__"] == hooked["Tap.__init__"] == 1
    assert not any(name.startswith(("Tap", "StateTap", "attended", "flows")) for name in bare)


def test_captures_change_no_bit(rwkv: Rwkv) -> None:
    """States after the last token among them; where the recurrence has to pause, the rest agrees up to rounding."""
    bare = rwkv.model.forward(ROWS).logits
    everything = HookSpec().capture("*", f"blocks.*.{EFFECTIVE_ATTN}")
    assert torch.equal(rwkv.model.forward(ROWS, everything).logits, bare)  # type: ignore[arg-type]
    paused = rwkv.model.forward(ROWS, HookSpec().capture(f"blocks.*.{STATE}", positions=[1, -2]))
    for row, length in enumerate(LENGTHS):
        assert error(paused.logits[row, :length], bare[row, :length].double()) < 1e-5  # type: ignore[index]


def test_points_fire_in_the_order_of_the_vocabulary(rwkv: Rwkv) -> None:
    fired: list[HookPoint] = []
    hooks = HookSpec().capture("*", f"blocks.*.{EFFECTIVE_ATTN}")
    rwkv.model.forward(ROWS, hooks, sink=lambda point, value: fired.append(point))
    assert fired == list(rwkv.model.spec.points())


@pytest.mark.parametrize("kind", ["rwkv.hook_decay", EFFECTIVE_ATTN, STATE, "mlp.hook_pre"])
def test_the_forward_ends_at_the_last_point(rwkv: Rwkv, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = f"blocks.1.{kind}"
    expected = rwkv.model.forward(ROWS, HookSpec().capture(point))[point]
    above = ("out", "norm_weight") if kind.startswith("rwkv.") else ()
    entered = [getattr(rwkv.model.weights.rwkv_blocks[1].time, name) for name in above]
    monkeypatch.setattr("forebay.stages.models.unembedding.F.linear", refusing(entered))
    out = rwkv.model.forward(ROWS, HookSpec().capture(point), logits=False)
    assert torch.equal(out[point], expected)
    assert out.states is None


def refusing(weights: list[Tensor]) -> Any:
    linear = torch.nn.functional.linear

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        assert not any(weight is refused for refused in weights)
        return linear(x, weight, bias)

    return multiply


def test_interventions_act_in_every_pass_of_a_recurrence_and_passes_begin_alike(rwkv: Rwkv) -> None:
    """Two passes over layer 1, the second from what entered plus a push: as the equations, entered by that."""
    state, push = f"blocks.1.{STATE}", torch.linspace(-2, 2, 36)
    seen: list[Tensor] = []

    def note(part: Tensor) -> Tensor:
        seen.append(part.clone())
        return part * 0.5

    hooks = HookSpec().intervene(state, Apply(note).at(position=4)).capture(state, positions=[4])
    recurrence = Recurrence(first=1, last=1, feedback=(Feedback(position=2, vector=push),))
    out = rwkv.model.forward(ROWS[:1], hooks, recurrence=recurrence)
    naive = rwkv.naive(
        edits={"blocks.1.hook_resid_pre": lambda value, position: value + push * (position == 2)},
        states={(1, 4): lambda value: value * 0.5},
    )
    assert len(seen) == 2
    assert error(seen[0][0], rwkv.naive().states[1][4]) < 1e-5
    assert error(out[state][0, 0], naive.states[1][4]) < 1e-5
    assert error(out.logits[0], naive.logits) < 1e-5  # type: ignore[index]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("blocks.0.attn.hook_z", "blocks.0.rwkv.hook_z"),
        ("blocks.0.attn.hook_q", "blocks.0.rwkv.hook_r"),
        ("blocks.*.attn.hook_pattern", "blocks.*.rwkv.hook_effective_attn"),
        ("blocks.2.attn.hook_out", "blocks.2.rwkv.hook_out"),
        ("blocks.0.rwkv.state", "blocks.0.rwkv.hook_state"),
        ("blocks.0.rwkv.hook_log_decay", "blocks.0.rwkv.hook_decay"),
        ("blocks.1.mlp.hook_pre_linear", "blocks.1.mlp.hook_pre"),
    ],
)
def test_what_is_probably_meant_is_told(rwkv: Rwkv, asked: str, meant: str) -> None:
    with pytest.raises(HookError, match=rf"hook point.*Did you mean '{meant}'".replace("*.", r"\*\.")):
        rwkv.model.forward(ROWS, HookSpec().capture(asked))


@pytest.mark.parametrize("kind", ["rwkv.hook_a", "rwkv.hook_kk"])
def test_a_point_of_the_other_version_is_refused(tmp_path: Path, kind: str) -> None:
    six = Rwkv.make(6, tmp_path)
    with pytest.raises(HookError, match=f"this model has no hook point 'blocks.0.{kind}'"):
        six.model.forward(ROWS, HookSpec().capture(f"blocks.0.{kind}"))


@pytest.mark.parametrize("edit", [Knockout([(-1, 0)]), SteerAttention([(-1, 0)], scale=2.0)])
@pytest.mark.parametrize("kind", [EFFECTIVE_ATTN, STATE, "rwkv.hook_wkv"])
def test_edges_of_attention_are_refused_where_there_is_none(
    rwkv: Rwkv, edit: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    edit = edit.at(position=3) if kind == STATE else edit
    with pytest.raises(HookError, match=r"acts on attn\..* alone, and this model has no attention"):
        rwkv.model.forward(ROWS, HookSpec().intervene(f"blocks.1.{kind}", edit))


def test_a_knockout_of_edges_knows_that_there_is_no_attention(rwkv: Rwkv) -> None:
    spec = rwkv.model.spec
    for make in (KnockoutSpec(edges=[(-1, 0)]).hooks, lambda spec: KnockoutSpec(edges=[(-1, 0)]).mask(spec, 5)):
        with pytest.raises(HookError, match=rf"this model \(rwkv{rwkv.version}\) has no attention .*StateKnockout"):
            make(spec)


def test_names_of_the_front_door_are_these() -> None:
    import forebay

    assert (forebay.StateKnockout, forebay.StateSteering) == (StateKnockout, StateSteering)
    assert {"StateKnockout", "StateSteering"} <= {*forebay.__all__}
