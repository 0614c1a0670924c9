"""The residual stream is the sum of its components, each of them what a module of transformers writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from transformers import PreTrainedModel

import forebay
from forebay.stages.analyze import residual_decomposition as module
from forebay.stages.analyze.logit_lens import logit_lens
from forebay.stages.analyze.residual_decomposition import accumulated_resid, decompose_resid
from forebay.stages.analyze.tokens import as_run
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..models.rwkv_edits import ROWS as RWKV_ROWS
from ..models.rwkv_edits import Rwkv
from .decomposed_families import HOOKS, NEURONS, ROWS, ByHand
from .laziness import forbidden

STORED = ["hook_embed", "blocks.*.{hook_attn_out,hook_mlp_out,attn.hook_z,mlp.hook_post,hook_resid_post}"]


@pytest.fixture(scope="module")
def model(both: tuple[PreTrainedModel, Model]) -> Model:
    return both[1]


def close(ours: Any, theirs: torch.Tensor, stream: torch.Tensor) -> bool:
    """Equal but for rounding in float32, beside the largest number of the stream."""
    off = np.abs(np.asarray(ours, dtype=np.float64) - theirs.numpy())
    return bool(off.max() <= 3e-6 * max(1.0, float(stream.abs().max())))


# ── families ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_whole_outputs_and_their_biases_are_those_of_transformers_modules(
    captures: xr.DataTree, model: Model, expected: ByHand
) -> None:
    found = decompose_resid(captures, model)
    assert found["value"].dims == ("component", "token", "d_model")
    assert found["value"].dtype == np.float32
    names = found["component"].values.tolist()
    assert names == [name for name in names if name in expected.components]
    biases = [name for name in expected.components if name.endswith("bias")]
    assert set(biases) < set(names), "biases of attention and MLP, where there are any, are terms of their own"
    for name in names:
        assert close(found["value"].sel(component=name), expected.components[name], expected.streams[-1]), name


def test_heads_and_neurons_are_what_their_rows_of_the_weights_write(
    captures: xr.DataTree, model: Model, expected: ByHand
) -> None:
    found = decompose_resid(captures, model, heads=True, neurons=NEURONS)
    names = found["component"].values.tolist()
    assert len(set(names)) == len(names)
    assert {"L0H8", "L1N51", "L1N0", "L3N17", "1_mlp_rest", "0_mlp_out"} < set(names)
    assert "0_attn_out" not in names
    for name in names:
        assert close(found["value"].sel(component=name), expected.components[name], expected.streams[-1]), name


def test_components_below_a_layer_add_up_to_the_stream_that_enters_it(
    captures: xr.DataTree, model: Model, expected: ByHand
) -> None:
    for layer, settings in ((0, {}), (2, {}), (2, {"heads": True, "neurons": {1: [3]}}), (4, {"heads": True})):
        found = decompose_resid(captures, model, layer, **settings)
        assert close(found["value"].sum("component"), expected.streams[layer], expected.streams[layer])
        assert int(found["layer"].max()) == layer - 1


def test_the_scale_is_that_by_which_the_final_norm_divides(
    captures: xr.DataTree, model: Model, expected: ByHand
) -> None:
    run = captures
    without = xr.DataTree.from_dict(
        {path: node.to_dataset() for path, node in run.subtree_with_keys if "ln_final" not in path}
    )
    for captures, layer in ((run, None), (without, None), (without, 2), (without, 0)):
        stream = expected.streams[-1 if layer is None else layer]
        if model.spec.norm == "layer":
            stream = stream - stream.mean(-1, keepdim=True)
        scale = (stream.square().mean(-1) + model.spec.norm_eps).sqrt()
        np.testing.assert_allclose(decompose_resid(captures, model, layer)["scale"], scale, rtol=1e-5)


def test_the_stream_so_far_is_that_of_transformers_hidden_states(
    captures: xr.DataTree, model: Model, expected: ByHand
) -> None:
    found = accumulated_resid(captures, model)
    assert found["component"].values.tolist() == ["0_pre", *(f"{layer}_post" for layer in range(4))]
    for ours, theirs in zip(found["value"], expected.streams, strict=True):
        assert close(ours, theirs, expected.streams[-1])
    embedded = HookSpec().capture("hook_*embed", "blocks.[0-2].hook_resid_post")
    early = accumulated_resid(model.forward(ROWS, embedded), model, 3)
    xr.testing.assert_allclose(early["value"], found["value"].isel(component=slice(4)), atol=1e-5)


def test_between_attention_and_mlp_lies_another_stream(captures: xr.DataTree, model: Model, expected: ByHand) -> None:
    if model.spec.parallel:
        with pytest.raises(SchemaError, match="side by side: there is no mid=True"):
            accumulated_resid(captures, model, mid=True)
        return
    found = accumulated_resid(captures, model, 2, mid=True)
    assert found["component"].values.tolist() == ["0_pre", "0_mid", "0_post", "1_mid", "1_post"]
    parts = expected.components
    bias = parts.get("0_attn_bias", torch.zeros(1))
    mid = expected.streams[0] + parts["0_attn_out"] + bias
    assert close(found["value"].sel(component="0_mid"), mid, expected.streams[-1])
    assert found["kind"].values.tolist() == ["resid_pre", "resid_mid", "resid_post", "resid_mid", "resid_post"]


def test_an_unembedding_serves_but_leaves_biases_where_they_are(
    captures: xr.DataTree, model: Model, expected: ByHand
) -> None:
    found = decompose_resid(captures, model.unembedding)
    assert not any("bias" in name for name in found["component"].values)
    assert close(found["value"].sum("component"), expected.streams[-1], expected.streams[-1])
    with pytest.raises(SchemaError, match="no weights of heads and neurons"):
        decompose_resid(captures, model.unembedding, heads=True)


# ── recurrent models ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_heads_and_neurons_of_recurrent_models(rwkv: Rwkv) -> None:
    """By the tensors under their authors' names; in RWKV-6 the receptance multiplies what neurons write."""
    model, last = rwkv.model, rwkv.model.spec.n_layers - 1
    kinds = "{rwkv.hook_z,mlp.hook_post,hook_mlp_out,hook_resid_post}"
    gate = ["blocks.*.mlp.hook_receptance"] if rwkv.version == 6 else []
    forward = model.forward(RWKV_ROWS, HookSpec().capture("hook_embed", f"blocks.*.{kinds}", *gate))
    found = decompose_resid(forward, model, heads=True, neurons={last: [7, 2]})
    run = as_run(forward)["activations"]
    stream = run["hook_resid_post"]["value"].sel(layer=last)
    np.testing.assert_allclose(found["value"].sum("component"), stream, atol=2e-5 * float(np.abs(stream).max()))
    z = run["rwkv.hook_z"]["value"].sel(layer=1)
    width = z.sizes["d_head"]
    out = rwkv.tensors["blocks.1.att.output.weight"].double().numpy()
    head = z.values[:, 1].astype(np.float64) @ out[:, width : 2 * width].T
    np.testing.assert_allclose(found["value"].sel(component="L1H1"), head, rtol=1e-4, atol=1e-5)
    post = run["mlp.hook_post"]["value"].sel(layer=last).values.astype(np.float64)
    neuron = post[:, [7]] * rwkv.tensors[f"blocks.{last}.ffn.value.weight"].double().numpy()[:, 7]
    if gate:
        neuron *= run["mlp.hook_receptance"]["value"].sel(layer=last).values
    np.testing.assert_allclose(found["value"].sel(component=f"L{last}N7"), neuron, rtol=1e-4, atol=1e-5)


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(run_once: Callable[..., Path]) -> xr.DataTree:
    return forebay.open_run(run_once(capture={"hooks": STORED, "unit_tokens": 176}))


@pytest.fixture
def whole(tiny: Model, run: xr.DataTree) -> xr.Dataset:
    """The decomposition of the run's text in one forward, sequence by sequence."""
    tokens = run["tokens"].to_dataset()
    rows = [part["token_id"].values.tolist() for _, part in tokens.groupby("sequence")]
    return decompose_resid(tiny.forward(rows, HookSpec().capture(*STORED)), tiny, heads=True, neurons={2: [40, 1]})


def test_over_a_store_nothing_is_read_before_it_is_asked_for(
    run: xr.DataTree, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dask.config.set(scheduler=forbidden), monkeypatch.context() as reading:
        reading.setattr("forebay.stores.tree.KeptArray._read", forbidden)
        found = decompose_resid(run, tiny, heads=True, neurons={2: [40, 1]}, select={"position": slice(2, 9)})
        assert all(found[name].chunks for name in found.data_vars)
        with pytest.raises(AssertionError, match="something was computed"):
            found.compute()


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_store_gives_what_one_forward_gives(
    run: xr.DataTree, tiny: Model, whole: xr.Dataset, chunk: int | None
) -> None:
    tree = (
        run if chunk is None else run.map_over_datasets(lambda x: x.chunk({"token": chunk}) if "token" in x.dims else x)
    )
    found = decompose_resid(tree, tiny, heads=True, neurons={2: [40, 1]})
    assert len(found["value"].chunksizes["token"]) > 3
    for name in ("value", "scale"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-5, atol=2e-5)
    for name in ("component", "kind", "layer", "head", "neuron", "sequence", "position", "token_id"):
        np.testing.assert_array_equal(found[name], whole[name])


def test_blocks_of_heads_are_cut_where_they_would_be_large(
    run: xr.DataTree, tiny: Model, whole: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 11 * 4 * 28)
    found = decompose_resid(run, tiny, heads=True, neurons={2: [40, 1]})
    assert max(found["value"].chunksizes["token"]) <= 11
    np.testing.assert_allclose(found["value"], whole["value"], atol=2e-5)


def test_labels_select_tokens_before_and_after(run: xr.DataTree, tiny: Model, whole: xr.Dataset) -> None:
    for select in ({"document": 3}, {"sequence": [4, 2], "position": slice(1, 3)}):
        found = decompose_resid(run, tiny, heads=True, neurons={2: [40, 1]}, select=select)
        after = decompose_resid(run, tiny, heads=True, neurons={2: [40, 1]}).sel(select)
        np.testing.assert_array_equal(found["position"], after["position"])
        np.testing.assert_allclose(found["value"], after["value"], atol=1e-6)
        np.testing.assert_allclose(found["scale"], after["scale"], rtol=1e-6)


def test_the_logit_lens_reads_the_stream_so_far(run: xr.DataTree, tiny: Model) -> None:
    streams = accumulated_resid(run, tiny)
    lens = logit_lens(streams, tiny.unembedding, top=2).compute()
    plain = logit_lens(run["activations/hook_resid_post"], tiny.unembedding, top=2).compute()
    assert lens["top_token_id"].dims == ("component", "token", "rank")
    np.testing.assert_array_equal(lens["top_token_id"][1:], plain["top_token_id"])
    np.testing.assert_allclose(lens["next_log_probability"][1:], plain["next_log_probability"], rtol=1e-5)


def test_a_decomposition_can_be_written_and_read_again(tiny: Model, tmp_path: Path) -> None:
    found = decompose_resid(tiny.forward(ROWS, HOOKS), tiny, heads=True)
    found.drop_vars(["sequence", "position", "document"]).to_zarr(tmp_path / "kept.zarr", consolidated=False)
    again = xr.open_zarr(tmp_path / "kept.zarr", consolidated=False)
    np.testing.assert_array_equal(again["value"].sel(component="L1H2"), found["value"].sel(component="L1H2"))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_missing_is_named_as_a_recipe_would_capture_it(tiny: Model) -> None:
    some = tiny.forward(ROWS, HookSpec().capture("blocks.[0,2].hook_mlp_out", "blocks.*.attn.hook_z"))
    said = r'hooks = \["hook_embed", "blocks.\*.hook_attn_out", "blocks.\[1\].hook_mlp_out"\]. There is: attn.hook_z, '
    with pytest.raises(SchemaError, match=said):
        decompose_resid(some, tiny)
    with pytest.raises(SchemaError, match=r'hooks = \["hook_embed", "blocks.\[1\].mlp.hook_post"\]'):
        decompose_resid(some, tiny, 2, heads=True, neurons={1: [3]})
    with pytest.raises(SchemaError, match=r'hooks = \["hook_embed", "blocks.\*.hook_resid_post"\]'):
        accumulated_resid(some, tiny)


def test_a_layer_or_neuron_that_is_not_there_is_refused(tiny: Model) -> None:
    forward = tiny.forward(ROWS, HOOKS)
    with pytest.raises(SchemaError, match="layer 4: the stream enters blocks 0 to 2"):
        decompose_resid(forward, tiny, 4)
    for neurons in ({3: [1]}, {1: [44]}, {0: [2, 2]}):
        with pytest.raises(SchemaError, match=r"neurons .* each once is expected, of 0 to 43 of layers 0 to 2"):
            decompose_resid(forward, tiny, neurons=neurons)


def test_what_is_no_run_is_refused(tiny: Model, run: xr.DataTree) -> None:
    with pytest.raises(SchemaError, match="a run with activations is read here"):
        decompose_resid(run["tokens"], tiny)


def test_captures_of_another_model_are_refused(run: xr.DataTree, model: Model) -> None:
    if not model.spec.learned_positions:
        with pytest.raises(SchemaError, match="d_model = 28, and the model has"):
            decompose_resid(run, model.unembedding, 2)
