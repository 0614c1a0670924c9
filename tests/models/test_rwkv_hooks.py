"""What is done at a hook point of RWKV is what the same change of the equations does; what is not asked is free."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from forebay.stages.models.edges import Knockout, KnockoutSpec, SteerAttention
from forebay.stages.models.errors import HookError, ModelError
from forebay.stages.models.interventions import Add, Apply, Replace, Scale, Zero
from forebay.stages.models.points import EFFECTIVE_ATTN, STATE, HookPoint
from forebay.stages.models.recurrence import Feedback, Recurrence
from forebay.stages.models.state_taps import StateTap
from forebay.stages.models.taps import HookSpec, Tap

from .rwkv_edits import LENGTHS, ROWS, Rwkv, dims_after_position, error, is_in_a_block, name_of
from .rwkv_models import write_pth
from .rwkv_naive import Edit, effective_attention
from .test_memory import Held

pytestmark = pytest.mark.usefixtures("one_thread")

EFFECTIVE = f"blocks.1.{EFFECTIVE_ATTN}"
WKV = "blocks.1.rwkv.hook_wkv"


@pytest.fixture(scope="module", params=[6, 7], ids=["RWKV-6", "RWKV-7"])
def rwkv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rwkv:
    return Rwkv.make(request.param, tmp_path_factory.mktemp("rwkv"))


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
    plain = [rwkv.naive(row).logits for row in range(3)]
    last = rwkv.model.spec.n_layers - 1
    for kind in rwkv.kinds:
        pattern = f"blocks.[0-1].{kind}" if is_in_a_block(kind) else kind
        part = {dim: PARTS[dim] for dim in dims_after_position(kind)}
        hooks = HookSpec().intervene(pattern, Scale(1.7).at(position=[2, -1], **part))
        hooks = hooks.intervene(pattern, Replace(0.3).at(position=-3)).capture(f"blocks.{last}.hook_resid_post")
        with rwkv.in_float64() as model:
            out = model.forward(ROWS, hooks)
        for row, length in enumerate(LENGTHS):
            edit = scaled_and_replaced(tuple(part.values()), length)
            naive = rwkv.naive(row, edits={name_of(kind, layer): edit for layer in range(1 + is_in_a_block(kind))})
            assert out.logits is not None
            assert error(out.logits[row, :length], naive.logits) < 1e-9, kind
            stream = f"blocks.{last}.hook_resid_post"
            assert error(out[stream][row, :length], naive.values[stream]) < 1e-9, kind
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
    for length in (37, 12):
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
            counted[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

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


# ── labels, weights, memory ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_forward_has_labels_and_nothing_where_there_is_no_token(rwkv: Rwkv) -> None:
    hooks = HookSpec().capture(f"blocks.[0,2].{STATE}", positions=[4, -1]).capture(EFFECTIVE, WKV)
    out = rwkv.model.forward(ROWS, hooks)
    data = out.to_dataset()
    state, effective = data[STATE], data[EFFECTIVE_ATTN]
    assert state.dims == ("layer", "sequence", "state_position", "head", "d_key", "d_value")
    assert state["state_position"].values.tolist() == [4, -1]
    assert numpy.isfinite(state.sel(layer=[0, 2])).all()
    assert numpy.isnan(state.sel(layer=1)).all()
    one = state.sel(layer=2, state_position=-1, sequence=1)
    assert error(torch.from_numpy(one.values), rwkv.naive(1).states[2][-1]) < 1e-5
    assert effective.dims == ("layer", "sequence", "head", "query", "key")
    for row, length in enumerate(LENGTHS):
        mine = effective.sel(layer=1, sequence=row)
        assert numpy.isfinite(mine.sel(query=slice(0, length - 1), key=slice(0, length - 1))).all()
        assert numpy.isnan(mine.sel(query=slice(length, None))).all()
        assert numpy.isnan(mine.sel(key=slice(length, None))).all()
        assert int(numpy.isfinite(data["rwkv.hook_wkv"].sel(layer=1, sequence=row, head=0, d_head=0)).sum()) == length


def test_weights_multiply_from_the_left(rwkv: Rwkv) -> None:
    """What the token before and this one are mixed to, computed here, times a weight is what the forward computes."""
    views, at = rwkv.model.views, "blocks.0."
    out = rwkv.model.forward(ROWS[:1], HookSpec().capture("*"))
    z, post, logits = (out[name] for name in (at + "rwkv.hook_z", at + "mlp.hook_post", "hook_final_norm"))
    assert error(torch.einsum("bthe,hed->btd", z, views.W_O(0)), out[at + "rwkv.hook_out"].double()) < 1e-5
    assert error(post @ views.W_out(0), out[at + "mlp.hook_out"].double()) < 1e-5
    assert error(logits @ views.W_U, out["hook_logits"].double()) < 1e-5
    assert torch.equal(views.W_E, rwkv.tensors["emb.weight"])
    names = {"r": "receptance", "k": "key", "v": "value"}
    for letter, view in {"r": views.W_R, "k": views.W_K, "v": views.W_V}.items():
        theirs = rwkv.tensors[f"{at}att.{names[letter]}.weight"]
        assert view(0).shape == (3, 36, 12)
        x = torch.randn(5, 36)
        assert error(torch.einsum("td,hde->the", x, view(0)).flatten(1), (x @ theirs.T).double()) < 1e-6
    mix = rwkv.tensors[f"{at}ffn.{'time_maa_k' if rwkv.version == 6 else 'x_k'}"].flatten()
    entered = out[at + "mlp.hook_in"][0]
    before = torch.cat((torch.zeros(1, 36), entered[:-1]))
    assert error((entered + (before - entered) * mix) @ views.W_in(0), out[at + "mlp.hook_pre"][0].double()) < 1e-5


def test_weights_that_rwkv_does_not_have_are_refused(rwkv: Rwkv) -> None:
    views = rwkv.model.views
    for lacking in (views.W_Q, views.b_Q, views.b_K, views.b_V, views.b_O, views.b_in, views.b_out):
        with pytest.raises(ModelError, match=rf"this model \(rwkv{rwkv.version}\) has time mixing in the place of att"):
            lacking(0)
    with pytest.raises(ModelError, match="no gate in its MLP"):
        views.W_gate(0)
    with pytest.raises(ModelError, match="no learned positions"):
        _ = views.W_pos
    with pytest.raises(ModelError, match="no bias of the unembedding"):
        _ = views.b_U
    for view in (views.W_R, views.W_K, views.W_V, views.W_O, views.W_in, views.W_out):
        with pytest.raises(ModelError, match="there is no layer 3; the layers of this model are 0 to 2"):
            view(3)


SIZES: dict[str, dict[str, int]] = {
    "as wide as the stream": {},
    "wide heads": {"n_heads": 4, "d_head": 16, "d_model": 24, "d_mlp": 20},
    "wide hidden layers": {"n_heads": 2, "d_head": 8, "d_model": 32, "d_mlp": 300},
}
ASKED = {
    "bare": HookSpec(),
    "residual streams": HookSpec().capture("blocks.*.hook_resid_post", "embed.ln.hook_scale"),
    "states": HookSpec().capture(f"blocks.*.{STATE}", positions=[0, 3, 7, -1]),
    "effective attention": HookSpec().capture(EFFECTIVE),
    "everything": HookSpec().capture("*", f"blocks.*.{EFFECTIVE_ATTN}"),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("version", [6, 7])
def test_the_estimate_of_memory_bounds_what_is_held(version: int, sizes: str, tmp_path: Path) -> None:
    from forebay.stages.models.load import load_model

    model = load_model(write_pth(tmp_path / "model.pth", version, **SIZES[sizes]), device="cpu")
    for shape in ((3, 16), (1, 200)):
        tokens = torch.randint(0, 70, shape, generator=torch.Generator().manual_seed(0))
        for asked, hooks in ASKED.items():
            estimate = model.forward_memory(*shape, hooks, logits=asked == "bare")
            with Held() as held:
                out = model.forward(tokens, hooks, logits=asked == "bare")
            assert estimate.captures == sum(value.nbytes for value in out.captures.values())
            assert estimate.logits == (0 if out.logits is None else out.logits.nbytes)
            assert held.peak <= estimate.total - estimate.weights, asked
            assert estimate.total - estimate.weights <= 2 * held.peak, asked


def test_states_keep_nothing_of_the_tokens_alive(rwkv: Rwkv) -> None:
    for batch in (ROWS, ROWS[:1]):
        out = rwkv.model.forward(batch, HookSpec().capture(f"blocks.*.{STATE}"))
        assert out.states is not None
        for layer in out.states.layers:
            for part in (layer.wkv, layer.time_shift, layer.channel_shift):
                assert part.untyped_storage().nbytes() == part.nbytes
        for value in out.captures.values():
            assert value.untyped_storage().nbytes() == value.nbytes
