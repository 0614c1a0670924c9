"""Outputs and every hook point agree with PyTorch's own modules; interventions do what their names say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from forebay.stages.algzoo.spec import AlgZooPoint
from forebay.stages.algzoo.tasks import all_functions, sample_inputs
from forebay.stages.models.edges import Knockout
from forebay.stages.models.errors import HookError
from forebay.stages.models.interventions import Add, Apply, Replace, Scale, Zero
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from .networks import random_rnn, random_transformer

CLOSE = {"float64": 1e-13, "float32": 5e-6}


def close(ours: Tensor, theirs: Tensor, dtype: str = "float64") -> None:
    """By magnitude, relative to the largest number."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= CLOSE[dtype] * theirs.abs().max()
    assert theirs.abs().max() > 0.1


# ── recurrent networks ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("task", ["2nd_argmax", "argmedian", "median"])
def test_a_recurrent_network_agrees_with_pytorchs(task: str, dtype: str) -> None:
    ours, theirs = random_rnn(task=task, dtype=dtype)
    x = torch.randn(37, 4, dtype=getattr(torch, dtype), generator=torch.Generator().manual_seed(1))
    found = ours.forward(x, HookSpec().capture("rnn.hook_hidden.*"))
    with torch.no_grad():
        output, states = theirs(x)
    close(found.output, output, dtype)
    close(torch.stack([found[f"rnn.hook_hidden.{t}"] for t in range(4)], 1), states, dtype)


def test_pre_activations_are_what_the_relu_is_given() -> None:
    ours, _ = random_rnn()
    x = sample_inputs(ours.spec, 11, seed=2)
    found = ours.forward(x, HookSpec().capture("rnn.hook_{pre,hidden}.*", "hook_output"))
    W_ih, W_hh, W_oh = (weight.numpy() for weight in (ours.W_ih, ours.W_hh, ours.W_oh))
    hidden = np.zeros((11, 5))
    for t in range(4):
        pre = x.values[:, t, None] * W_ih + hidden @ W_hh.T
        hidden = np.maximum(pre, 0)
        np.testing.assert_allclose(found[f"rnn.hook_pre.{t}"].numpy(), pre, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(found[f"rnn.hook_hidden.{t}"].numpy(), hidden, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found["hook_output"].numpy(), hidden @ W_oh.T, rtol=1e-12, atol=1e-13)
    assert [str(point) for point in found.captures] == [str(point) for point in ours.spec.points()]
    assert sorted(found.captures) == list(found.captures)


def test_captures_are_labelled() -> None:
    ours, _ = random_rnn()
    hooks = HookSpec().capture("rnn.hook_hidden.[0,2-3]", "rnn.hook_pre.1")
    found = ours.forward(sample_inputs(ours.spec, 7, seed=0), hooks)
    labelled = found.to_dataset()
    hidden = labelled["rnn.hook_hidden"]
    assert hidden.dims == ("input", "time", "neuron")
    assert hidden.dropna("time", how="all").time.values.tolist() == [0, 2, 3]
    np.testing.assert_array_equal(hidden.sel(time=2).values, found["rnn.hook_hidden.2"].numpy())
    np.testing.assert_array_equal(labelled["rnn.hook_pre"].sel(time=1).values, found["rnn.hook_pre.1"].numpy())
    np.testing.assert_array_equal(labelled["hook_output"].values, found.output.numpy())
    assert labelled["hook_output"].dims == ("input", "output")


def test_one_sequence_is_a_batch_of_one() -> None:
    ours, _ = random_rnn()
    x = sample_inputs(ours.spec, 3, seed=0)
    torch.testing.assert_close(ours.forward(x[1]).output, ours.forward(x).output[1:2], rtol=1e-14, atol=0)
    assert ours.forward(x.values.tolist()).output.equal(ours.forward(torch.from_numpy(x.values)).output)


def test_candle_mis_names_mean_the_same() -> None:
    ours, _ = random_rnn()
    names = {
        "rnn.hook_pre_activation.1": "rnn.hook_pre.1",
        "rnn.hook_final_state": "rnn.hook_hidden.3",
        "rnn.hook_output": "hook_output",
    }
    found = ours.forward(sample_inputs(ours.spec, 2, seed=0), HookSpec().capture(*names))
    assert [str(point) for point in found.captures] == list(names.values())
    assert all(found[theirs].equal(found[own]) for theirs, own in names.items())


@pytest.mark.parametrize(
    ("intervention", "by_hand"),
    [
        (Zero().at(neuron=[1, 3]), lambda h: h * torch.tensor([1, 0, 1, 0, 1])),
        (Replace(2.5).at(neuron=-1, input=slice(4, 6)), lambda h: _put(h, 2.5)),
        (Add(torch.arange(5.0), scale=-2.0), lambda h: h - 2 * torch.arange(5.0)),
        (Scale(np.linspace(0, 1, 7)[:, None]), lambda h: h * torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]),
        (Apply(lambda h: h.flip(-1)), lambda h: h.flip(-1)),
        (lambda h, point: h + point.layer, lambda h: h + 2),
    ],
    ids=["Zero", "Replace", "Add", "Scale", "Apply", "function"],
)
def test_an_intervention_on_neurons_at_a_time_is_what_pytorch_gives_when_the_state_is_changed_by_hand(
    intervention: object, by_hand: object
) -> None:
    ours, theirs = random_rnn()
    x = torch.from_numpy(sample_inputs(ours.spec, 7, seed=5).values)
    hooks = HookSpec().intervene("rnn.hook_hidden.2", intervention).capture("rnn.hook_hidden.2")  # type: ignore[arg-type]
    found = ours.forward(x, hooks)
    with torch.no_grad():
        _, first = theirs.rnn(x[:, :3, None])
        changed = by_hand(first[0])  # type: ignore[operator]
        _, last = theirs.rnn(x[:, 3:, None], changed[None])
        close(found.output, theirs.linear(last[0]))
        close(found["rnn.hook_hidden.2"], changed)
    assert (found.output - ours.forward(x).output).abs().max() > 1e-3


def _put(h: Tensor, value: float) -> Tensor:
    h = h.clone()
    h[4:6, -1] = value
    return h


def test_a_capture_may_hold_what_arrived() -> None:
    ours, _ = random_rnn()
    x = sample_inputs(ours.spec, 7, seed=5)
    cut = HookSpec().intervene("rnn.hook_pre.*", Zero())
    before = ours.forward(x, cut.capture("rnn.hook_pre.0", before=True))["rnn.hook_pre.0"]
    assert before.equal(ours.forward(x, HookSpec().capture("rnn.hook_pre.0"))["rnn.hook_pre.0"])
    assert not ours.forward(x, cut.capture("rnn.hook_pre.0"))["rnn.hook_pre.0"].any()
    assert not ours.forward(x, cut).output.any()


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (HookSpec().capture("rnn.hook_hiden.1"), "no hook point 'rnn.hook_hiden.1'.*Did you mean 'rnn.hook_hidden.1'"),
        (HookSpec().capture("rnn.hook_hidden.[2-4]"), "no hook point 'rnn.hook_hidden.4'; .*4 time steps"),
        (HookSpec().capture("blocks.*.hook_resid_post"), "no hook point 'blocks"),
        (HookSpec().capture("rnn.hook_hidden.[a]"), "no list of whole numbers"),
        (HookSpec().capture("rnn.hook_pre.0", positions=[0]), "positions=… is for the states of RWKV"),
        (HookSpec().intervene("rnn.hook_pre.0", Zero().at(d_model=1)), "no dimension 'd_model'.*input=7, neuron=5"),
        (HookSpec().intervene("rnn.hook_pre.0", Zero().at(neuron=5)), "neuron=5 is out of range"),
        (HookSpec().intervene("rnn.hook_pre.0", Add(torch.ones(4))), r"shape \[neuron=4\]"),
        (HookSpec().intervene("rnn.hook_pre.0", Knockout([(0, 0)])), "takes Replace"),
        (HookSpec().intervene("rnn.hook_pre.0", Zero), "takes Replace"),
        (HookSpec().capture("rnn.hook_pre.0").capture("rnn.hook_pre.*", before=True), "before=True and without it"),
    ],
)
def test_hooks_that_do_not_fit_are_refused(hooks: HookSpec, message: str) -> None:
    ours, _ = random_rnn()
    with pytest.raises(HookError, match=message):
        ours.forward(sample_inputs(ours.spec, 7, seed=0), hooks)


def test_a_point_outside_the_vocabulary_is_none() -> None:
    with pytest.raises(HookError, match=r"Did you mean 'rnn.hook_pre'"):
        AlgZooPoint("rnn.hook_prex", 0)
    ours, _ = random_rnn()
    with pytest.raises(HookError, match=r"'rnn.hook_pre.1' was not captured; captured: nothing"):
        ours.forward([[1.0, 2, 3, 4]])["rnn.hook_pre.1"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.ones((2, 3)), r"the inputs are \[2, 3\]"),
        (np.full((2, 4), np.inf), "NaN or infinity"),
        (np.ones((2, 4, 1)), "reads sequences"),
        ([["a"] * 4], "no numbers"),
    ],
)
def test_inputs_that_are_no_sequences_are_refused(inputs: object, message: str) -> None:
    ours, _ = random_rnn()
    with pytest.raises(SchemaError, match=message):
        ours.forward(inputs)


# ── transformers ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_a_transformer_agrees_with_pytorchs_attention(n_layers: int, dtype: str) -> None:
    ours, theirs = random_transformer(n_layers=n_layers, dtype=dtype)
    tokens = torch.from_numpy(all_functions(ours.spec).values)
    found = ours.forward(tokens, HookSpec().capture("*"))
    with torch.no_grad():
        output, streams, patterns = theirs(tokens)
    close(found.output, output, dtype)
    for layer in range(n_layers):
        close(found[f"blocks.{layer}.hook_resid_pre"], streams[layer], dtype)
        close(found[f"blocks.{layer}.hook_resid_post"], streams[layer + 1], dtype)
        close(found[f"blocks.{layer}.hook_attn_out"], streams[layer + 1] - streams[layer], dtype)
        close(found[f"blocks.{layer}.attn.hook_pattern"][:, 0], patterns[layer], dtype)
        scores = found[f"blocks.{layer}.attn.hook_attn_scores"]
        close(scores.softmax(-1), found[f"blocks.{layer}.attn.hook_pattern"], dtype)
        q, k = (found[f"blocks.{layer}.attn.hook_{name}"][:, :, 0] for name in "qk")
        close(q @ k.mT / math.sqrt(6), scores[:, 0], dtype)
    close(found["hook_embed"] + found["hook_pos_embed"], streams[0], dtype)
    assert [str(point) for point in found.captures] == [str(point) for point in ours.spec.points()]
    assert sorted(found.captures) == list(found.captures)


def test_points_of_transformers_have_transformerlens_names() -> None:
    ours, _ = random_transformer()
    for point in ours.spec.points()[:-1]:
        assert str(HookPoint.parse(str(point))) == str(point)


def test_captures_of_layers_are_labelled() -> None:
    ours, _ = random_transformer(n_layers=3)
    found = ours.forward([0, 1, 2, 3], HookSpec().capture("blocks.{0,2}.attn.hook_pattern", "blocks.*.hook_resid_pre"))
    labelled = found.to_dataset()
    assert labelled["attn.hook_pattern"].dims == ("layer", "input", "head", "query", "key")
    assert labelled["hook_resid_pre"].dims == ("layer", "input", "position", "d_model")
    pattern = labelled["attn.hook_pattern"]
    assert pattern.dropna("layer", how="all").layer.values.tolist() == [0, 2]
    np.testing.assert_array_equal(pattern.sel(layer=2).values, found["blocks.2.attn.hook_pattern"].numpy())


def test_an_edge_that_is_cut_has_no_weight_and_a_query_without_edges_attends_to_nothing() -> None:
    ours, _ = random_transformer()
    hooks = (
        HookSpec()
        .intervene("blocks.0.attn.hook_attn_scores", Replace(-math.inf).at(query=2, key=3))
        .intervene("blocks.1.attn.hook_scores", Replace(-math.inf).at(query=-1))
        .capture("blocks.*.attn.hook_pattern", "blocks.1.hook_{resid_pre,resid_post}")
    )
    found = ours.forward(all_functions(ours.spec), hooks)
    plain = ours.forward(all_functions(ours.spec), HookSpec().capture("blocks.*.attn.hook_pattern"))
    pattern, whole = found["blocks.0.attn.hook_pattern"], plain["blocks.0.attn.hook_pattern"]
    kept = whole[:, :, 2, :3] / whole[:, :, 2, :3].sum(-1, keepdim=True)
    torch.testing.assert_close(pattern[:, :, 2, :3], kept)
    assert not pattern[:, :, 2, 3].any()
    assert pattern[:, :, :2].equal(whole[:, :, :2])
    assert not found["blocks.1.attn.hook_pattern"][:, :, -1].any()
    assert found["blocks.1.hook_resid_post"][:, -1].equal(found["blocks.1.hook_resid_pre"][:, -1])


def test_scores_above_the_diagonal_can_be_changed_for_nothing_is_masked() -> None:
    ours, _ = random_transformer()
    x = all_functions(ours.spec)[:5]
    double = HookSpec().intervene("blocks.0.attn.hook_pattern", Scale(2.0)).capture("blocks.0.attn.hook_pattern")
    plain = ours.forward(x, HookSpec().capture("blocks.0.attn.hook_pattern"))["blocks.0.attn.hook_pattern"]
    assert ours.forward(x, double)["blocks.0.attn.hook_pattern"].equal(2 * plain)


def test_patching_the_stream_at_the_last_position_makes_the_other_inputs_output() -> None:
    ours, _ = random_transformer()
    clean, other = all_functions(ours.spec)[17], all_functions(ours.spec)[200]
    donor = ours.forward(other, HookSpec().capture("blocks.1.hook_resid_post"))
    patch = Replace(donor["blocks.1.hook_resid_post"][:, -1]).at(position=-1)
    found = ours.forward(clean, HookSpec().intervene("blocks.1.hook_resid_post", patch))
    assert found.output.equal(donor.output)
    assert not ours.forward(clean).output.equal(donor.output)


@pytest.mark.parametrize("inputs", [[0, 1, 2, 4], [0, 1, 2, -1], [0.5, 1, 2, 3], [[0, 1, 2]]])
def test_inputs_that_are_no_functions_are_refused(inputs: object) -> None:
    ours, _ = random_transformer()
    with pytest.raises(SchemaError, match=r"whole numbers from 0 to 3|reads sequences"):
        ours.forward(inputs)
