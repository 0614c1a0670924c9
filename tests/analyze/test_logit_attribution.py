"""What components add to a logit, by the final norm and unembedding of transformers in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

import forebay
from forebay.stages.analyze import logit_attribution as module
from forebay.stages.analyze.logit_attribution import logit_attribution, neuron_attribution
from forebay.stages.analyze.logit_lens import next_tokens
from forebay.stages.analyze.residual_decomposition import decompose_resid
from forebay.stages.analyze.tokens import as_run
from forebay.stages.models.forward import Forward
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..models.rwkv_edits import ROWS as RWKV_ROWS
from ..models.rwkv_edits import Rwkv
from .decomposed_families import NEURONS, ROWS, ByHand
from .laziness import forbidden

STORED = [
    "hook_embed",
    "blocks.*.{hook_attn_out,hook_mlp_out,attn.hook_z,mlp.hook_post,hook_resid_post}",
    "ln_final.hook_scale",
]
TOKENS = [17, 100, 3]
AGAINST = [44, 0, 3]


@pytest.fixture(scope="module")
def model(both: tuple[PreTrainedModel, Model]) -> Model:
    return both[1]


def close(ours: Any, theirs: Any, logits: Tensor) -> bool:
    """Equal to 1e-5 of the largest logit."""
    off = np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs))
    return bool(off.max() <= 1e-5 * float(logits.abs().max()))


def contributions(expected: ByHand, model: Model, name: str) -> Tensor:
    """What a component adds to all logits [token, vocab]: the frozen norm of it, without a bias, times the head."""
    vectors, stream = expected.components[name], expected.streams[-1]
    if model.spec.norm == "layer":
        vectors, stream = (x - x.mean(-1, keepdim=True) for x in (vectors, stream))
    scale = (stream.square().mean(-1, keepdim=True) + model.spec.norm_eps).sqrt()
    weight = expected.final_norm.weight + (model.spec.family == "gemma2")
    return vectors / scale * weight @ expected.unembed.weight.T * model.spec.logit_scale


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [{}, {"heads": True}, {"heads": True, "neurons": NEURONS}])
def test_contributions_add_up_to_transformers_logits(
    captures: xr.DataTree, model: Model, expected: ByHand, settings: dict[str, Any]
) -> None:
    found = logit_attribution(captures, model, TOKENS, **settings)
    assert found["attribution"].dims == ("component", "token", "vocab")
    assert found["attribution"].dtype == np.float32
    assert found["vocab"].values.tolist() == TOKENS
    theirs = expected.logits[:, TOKENS]
    assert close(found["attribution"].sum("component"), theirs, expected.logits)
    assert close(found["logit"], theirs, expected.logits)


def test_each_component_adds_what_the_frozen_norm_and_the_head_make_of_it(
    captures: xr.DataTree, model: Model, expected: ByHand
) -> None:
    found = logit_attribution(captures, model, TOKENS, heads=True, neurons=NEURONS)
    extra = {"ln_final_bias", "unembed_bias"}
    names = [name for name in found["component"].values.tolist() if name not in extra]
    assert {"embed", "L0H0", "L3H8", "L1N51", "1_mlp_rest", "2_mlp_out"} < set(names)
    for name in names:
        theirs = contributions(expected, model, name)[:, TOKENS].detach()
        assert close(found["attribution"].sel(component=name), theirs, expected.logits), name


def test_the_bias_of_the_final_norm_is_a_component(captures: xr.DataTree, model: Model, expected: ByHand) -> None:
    found = logit_attribution(captures, model, TOKENS)
    bias = getattr(expected.final_norm, "bias", None)
    assert ("ln_final_bias" in found["component"]) == (bias is not None)
    if bias is not None:
        theirs = (bias @ expected.unembed.weight.T)[TOKENS].detach().expand(22, -1)
        assert close(found["attribution"].sel(component="ln_final_bias"), theirs, expected.logits)


def test_a_difference_of_logits_is_attributed_as_one(captures: xr.DataTree, model: Model, expected: ByHand) -> None:
    several = logit_attribution(captures, model, TOKENS, against=AGAINST, heads=True)
    assert several["attribution"].attrs["units"] == "logit difference"
    theirs = expected.logits[:, TOKENS] - expected.logits[:, AGAINST]
    assert close(several["logit"], theirs, expected.logits)
    assert (several["attribution"].sel(vocab=3) == 0).all()
    one = logit_attribution(captures, model, 17, against=44, heads=True)
    assert one["attribution"].dims == ("component", "token")
    np.testing.assert_allclose(one["attribution"], several["attribution"].sel(vocab=17), atol=1e-5)
    same = logit_attribution(captures, model, TOKENS, against=44)["logit"].sel(vocab=17)
    np.testing.assert_allclose(same, several["logit"].sel(vocab=17), atol=1e-4)


def test_every_token_can_have_an_id_of_its_own(captures: xr.DataTree, model: Model, expected: ByHand) -> None:
    """The tokens that follow: of none, nothing is said."""
    following = next_tokens(captures["activations/hook_embed"])
    assert following.values.tolist().count(-1) == 3
    found = logit_attribution(captures, model, following, heads=True)
    ids = following.values
    theirs = expected.logits.gather(1, torch.from_numpy(ids).clamp(min=0)[:, None])[:, 0]
    there = ids >= 0
    assert close(found["logit"][there], theirs[there], expected.logits)
    assert np.isnan(found["attribution"][:, ~there]).all()
    np.testing.assert_array_equal(found["attributed_token_id"], ids)
    less = logit_attribution(captures, model, following, against=44)["logit"]
    assert close(less[there], (theirs - expected.logits[:, 44])[there], expected.logits)


def test_a_decomposition_that_is_made_gives_the_same(captures: xr.DataTree, model: Model) -> None:
    whole = logit_attribution(captures, model, TOKENS, heads=True, neurons=NEURONS)
    made = decompose_resid(captures, model, heads=True, neurons=NEURONS)
    xr.testing.assert_allclose(logit_attribution(made, model, TOKENS), whole, rtol=1e-4, atol=1e-5)
    some = made.isel(component=[5, 3], token=slice(2, 9))
    part = logit_attribution(some, model.unembedding, TOKENS)["attribution"].isel(component=slice(2))
    expected = whole["attribution"].isel(component=[5, 3], token=slice(2, 9))
    np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)


def test_at_a_layer_it_is_the_logit_that_the_lens_reads(captures: xr.DataTree, model: Model, expected: ByHand) -> None:
    for layer in (1, 3):
        found = logit_attribution(captures, model, TOKENS, layer=layer, heads=True)
        with torch.inference_mode():
            theirs = expected.unembed(expected.final_norm(expected.streams[layer]))[:, TOKENS] * model.spec.logit_scale
        assert close(found["logit"], theirs, expected.logits)


def test_an_unembedding_serves_without_heads(captures: xr.DataTree, model: Model, expected: ByHand) -> None:
    found = logit_attribution(captures, model.unembedding, TOKENS)
    assert close(found["logit"], expected.logits[:, TOKENS], expected.logits)
    with pytest.raises(SchemaError, match="no weights of heads and neurons"):
        logit_attribution(captures, model.unembedding, TOKENS, heads=True)


def test_a_soft_cap_comes_after_what_is_attributed(captures: xr.DataTree, forward: Forward, model: Model) -> None:
    cap = model.spec.logit_softcap
    logits = logit_attribution(captures, model, TOKENS)["logit"].values
    assert forward.logits is not None
    said = torch.cat([forward.logits[i, : len(row), TOKENS] for i, row in enumerate(ROWS)]).numpy()
    np.testing.assert_allclose(logits if cap is None else cap * np.tanh(logits / cap), said, atol=1e-4)


# ── neurons ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_neurons_of_a_layer_add_what_each_adds_as_a_component(captures: xr.DataTree, model: Model) -> None:
    apart = decompose_resid(captures, model, neurons={2: range(52)})
    each = logit_attribution(apart, model, TOKENS, against=44)["attribution"]
    each = each.isel(component=np.flatnonzero(each["kind"] == "neuron"))
    found = neuron_attribution(captures, model, TOKENS, against=44, layers=[2, 0], top=None)["attribution"]
    assert found.dims == ("layer", "token", "vocab", "d_mlp")
    assert found["layer"].values.tolist() == [2, 0]
    expected = each.transpose("token", "vocab", "component").values
    np.testing.assert_allclose(found.sel(layer=2), expected, rtol=1e-3, atol=1e-4)


def test_the_neurons_told_are_those_that_add_or_take_away_most(captures: xr.DataTree, model: Model) -> None:
    following = next_tokens(captures["activations/hook_embed"])
    whole = neuron_attribution(captures, model, following, top=None)["attribution"]
    found = neuron_attribution(captures, model, following, top=5)
    assert found["attribution"].dims == found["neuron"].dims == ("layer", "token", "rank")
    there = following.values >= 0
    order = np.argsort(-np.abs(whole.values[:, there]), axis=-1)[..., :5]
    np.testing.assert_array_equal(found["neuron"][:, there], order)
    np.testing.assert_allclose(
        found["attribution"][:, there], np.take_along_axis(whole.values[:, there], order, -1), rtol=1e-4, atol=1e-6
    )
    assert (found["neuron"][:, ~there] == -1).all()
    assert np.isnan(found["attribution"][:, ~there]).all()


# ── recurrent models ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_logits_of_recurrent_models_are_sums_too(rwkv: Rwkv) -> None:
    model, last = rwkv.model, rwkv.model.spec.n_layers - 1
    kinds = "{rwkv.hook_z,mlp.hook_post,hook_mlp_out,hook_resid_post}"
    gate = ["blocks.*.mlp.hook_receptance"] if rwkv.version == 6 else []
    forward = model.forward(RWKV_ROWS, HookSpec().capture("hook_embed", f"blocks.*.{kinds}", *gate))
    found = logit_attribution(forward, model, [5, 60], heads=True, neurons={last: [7, 2]})
    assert forward.logits is not None
    said = torch.cat([forward.logits[i, : len(row), [5, 60]] for i, row in enumerate(RWKV_ROWS)])
    assert close(found["logit"], said, forward.logits)
    every = neuron_attribution(forward, model, [5, 60], layers=[last], top=None)["attribution"].squeeze("layer")
    for neuron in (7, 2):
        one = found["attribution"].sel(component=f"L{last}N{neuron}")
        np.testing.assert_allclose(every.isel(d_mlp=neuron), one, rtol=1e-3, atol=1e-5)


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(run_once: Callable[..., Path]) -> xr.DataTree:
    return forebay.open_run(run_once(capture={"hooks": [*STORED, "hook_logits"], "unit_tokens": 176}))


def test_over_a_store_nothing_is_computed_before_it_is_asked_for(
    run: xr.DataTree, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dask.config.set(scheduler=forbidden), monkeypatch.context() as reading:
        reading.setattr("forebay.stores.tree.KeptArray._read", forbidden)
        following = next_tokens(run["activations/hook_resid_post"])
        found = logit_attribution(run, tiny, following, heads=True)
        again = logit_attribution(decompose_resid(run, tiny), tiny, following, against=4)
        neurons = neuron_attribution(run, tiny, [3, 4])
        for each in (found, again, neurons):
            assert all(each[name].chunks for name in each.data_vars)
            with pytest.raises(AssertionError, match="something was computed"):
                each.compute()


@pytest.mark.parametrize("rows", [None, 7])
def test_over_a_store_contributions_add_up_to_its_logits(
    run: xr.DataTree, tiny: Model, monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    """However many tokens are taken together."""
    if rows is not None:
        monkeypatch.setattr(module, "AT_ONCE", rows * 28 * 4)
    logits = run["activations/hook_logits"]["value"].values
    following = next_tokens(run["activations/hook_resid_post"])
    found = logit_attribution(run, tiny, following, heads=True, neurons={0: [3]}).compute()
    ids = following.values
    there = ids >= 0
    said = np.take_along_axis(logits, np.clip(ids, 0, None)[:, None], 1)[:, 0]
    np.testing.assert_allclose(found["logit"][there], said[there], atol=1e-5 * np.abs(logits).max())
    top = neuron_attribution(run, tiny, [3, 290], layers=[1], top=2).sel(document=3).compute()
    whole = neuron_attribution(run, tiny, [3, 290], layers=[1], top=None, select={"document": 3}).compute()
    np.testing.assert_allclose(np.abs(top["attribution"][..., 0]), np.abs(whole["attribution"]).max("d_mlp"), rtol=1e-5)


def test_no_more_tokens_are_taken_together_than_the_limit_allows(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = as_run(tiny.forward(ROWS, HookSpec().capture(*STORED)))
    many = logit_attribution(captures, tiny, 9, heads=True)
    neurons = neuron_attribution(captures, tiny, 9, layers=[1], top=3)
    taken: list[int] = []
    plain = module._neurons

    def watched(*given: Any) -> Callable[..., Tensor]:
        run = plain(*given)

        def counting(directions: Tensor, post: Tensor) -> Tensor:
            taken.append(len(post))
            return run(directions, post)

        return counting

    monkeypatch.setattr(module, "AT_ONCE", 5 * 44)  # five tokens' neurons, one token's heads
    monkeypatch.setattr(module, "_neurons", watched)
    few = neuron_attribution(captures, tiny, np.int64(9), layers=[1], top=3)
    assert taken == [5, 5, 5, 5, 2]
    xr.testing.assert_allclose(few, neurons, rtol=1e-5)
    xr.testing.assert_allclose(logit_attribution(captures, tiny, 9, heads=True), many, rtol=1e-4, atol=1e-6)


def test_an_answer_for_each_sequence(run: xr.DataTree, tiny: Model) -> None:
    node = run["activations/hook_resid_post"].to_dataset()
    answers = np.arange(node["sequence"].values.max() + 1) % 300
    tokens = xr.DataArray(answers[node["sequence"].values], dims="token")
    found = logit_attribution(run, tiny, tokens)["attribution"].sel(sequence=5, position=2).compute()
    one = logit_attribution(run, tiny, 5, select={"sequence": 5, "position": 2})["attribution"].compute()
    np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-6)


def test_where_nothing_is_recorded_nothing_is_said(run: xr.DataTree, tiny: Model) -> None:
    """Tokens of units that are not recorded yet read as NaN."""

    def without(node: xr.Dataset) -> xr.Dataset:
        gone = xr.DataArray(np.arange(node.sizes.get("token", 0)) % 9 == 4, dims="token")
        return node.assign(value=node["value"].where(~gone)) if "value" in node and "token" in node.dims else node

    partial = run.map_over_datasets(without)
    for tokens in ([3, 4], xr.DataArray(np.full(673, 3), dims="token")):
        found = logit_attribution(partial, tiny, tokens, heads=True, neurons={1: [2]})["attribution"]
        whole = logit_attribution(run, tiny, tokens, heads=True, neurons={1: [2]})["attribution"]
        gone = np.arange(673) % 9 == 4
        assert np.isnan(found.isel(token=gone)).all()
        np.testing.assert_array_equal(found.isel(token=~gone), whole.isel(token=~gone))
    neurons = neuron_attribution(partial, tiny, 3, top=2)
    assert (neurons["neuron"].isel(token=gone) == -1).all()
    assert np.isnan(neurons["attribution"].isel(token=gone)).all()
    assert (neurons["neuron"].isel(token=~gone) >= 0).all()


def test_heads_come_apart_into_layers_and_heads(run: xr.DataTree, tiny: Model) -> None:
    found = logit_attribution(run, tiny, 7, heads=True, select={"document": 0})["attribution"]
    heads = found.sel(component=(found["kind"] == "head").values).set_index(component=["layer", "head"])
    grid = heads.unstack("component").compute()
    assert grid.sizes["layer"] == 3
    assert grid.sizes["head"] == 4
    np.testing.assert_array_equal(grid.sel(layer=2, head=1), found.sel(component="L2H1"))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_scale_must_have_been_captured(tiny: Model) -> None:
    bare = tiny.forward(ROWS, HookSpec().capture("hook_embed", "blocks.*.{hook_attn_out,hook_mlp_out,mlp.hook_post}"))
    for attribute in (
        lambda: logit_attribution(bare, tiny, 3),
        lambda: neuron_attribution(bare, tiny, 3),
        lambda: logit_attribution(decompose_resid(bare, tiny), tiny, 3),
    ):
        with pytest.raises(SchemaError, match=r'not captured: capture also hooks = \["ln_final.hook_scale"\]'):
            attribute()
    with pytest.raises(SchemaError, match=r'hooks = \["blocks.1.hook_resid_pre"\]'):
        logit_attribution(bare, tiny, 3, layer=1)


def test_what_is_missing_is_named(tiny: Model) -> None:
    bare = tiny.forward(ROWS, HookSpec().capture("hook_embed", "blocks.*.hook_resid_post"))
    with pytest.raises(SchemaError, match=r'needs what was not captured.*"blocks.\*.attn.hook_z"'):
        logit_attribution(bare, tiny, 3, heads=True)
    with pytest.raises(SchemaError, match=r'to neurons needs .*hooks = \["blocks.\[2\].mlp.hook_post"\]'):
        neuron_attribution(bare, tiny, 3, layers=[2])


def test_tokens_that_are_not_there_are_refused(tiny: Model) -> None:
    forward = tiny.forward(ROWS, HookSpec().capture(*STORED))
    for tokens in (300, [4, -1], [], xr.DataArray([-2] * 22, dims="token")):
        with pytest.raises(SchemaError, match=r"there is no token .* the vocabulary has 300"):
            logit_attribution(forward, tiny, tokens)
    with pytest.raises(SchemaError, match="there are 22 tokens: give ids"):
        logit_attribution(forward, tiny, xr.DataArray([5, 4], dims="token"))
    with pytest.raises(SchemaError, match="whole numbers, not float64"):
        logit_attribution(forward, tiny, xr.DataArray([5.0] * 22, dims="token"))
    with pytest.raises(SchemaError, match="3 tokens are compared with 2"):
        logit_attribution(forward, tiny, [1, 2, 3], against=[4, 5])
    with pytest.raises(SchemaError, match="not against a list of ids"):
        logit_attribution(forward, tiny, xr.DataArray([5] * 22, dims="token"), against=[4, 5])


def test_settings_that_make_no_sense_are_refused(tiny: Model) -> None:
    forward = tiny.forward(ROWS, HookSpec().capture(*STORED))
    made = decompose_resid(forward, tiny)
    with pytest.raises(SchemaError, match="this is decomposed already"):
        logit_attribution(made, tiny, 3, heads=True)
    with pytest.raises(SchemaError, match="select components with a list"):
        logit_attribution(made.sel(component="embed"), tiny, 3)
    with pytest.raises(SchemaError, match=r"this one lacks \['kind'\]"):
        logit_attribution(made.drop_vars("kind"), tiny, 3)
    for layers in ([3], []):
        with pytest.raises(SchemaError, match="the layers of this model are 0 to 2"):
            neuron_attribution(forward, tiny, 3, layers=layers)
    with pytest.raises(SchemaError, match="top = 45 neurons are asked for; from 1 to 44"):
        neuron_attribution(forward, tiny, 3, top=45)
