"""The logit lens is the model's own final norm and unembedding on every layer's stored stream, computed when asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr

import forebay
from forebay.stages.analyze import logit_lens as module
from forebay.stages.analyze.logit_lens import logit_lens
from forebay.stages.models.unembedding import Unembedding
from forebay.stores.errors import SchemaError

from .laziness import forbidden

RESID = "activations/hook_resid_post"


@pytest.fixture
def run(run_once: Callable[..., Path]) -> Path:
    """Documents of one to 64 tokens in units of 90, all layers and the logits in float32."""
    return run_once(
        tokenize={"context": 64, "layout": "documents", "long_documents": "split"},
        capture={"hooks": ["blocks.*.hook_resid_post", "hook_logits"], "unit_tokens": 90},
    )


@pytest.fixture(scope="module")
def unembedding(tiny_model: Path) -> Unembedding:
    return forebay.load_unembedding(tiny_model, device="cpu")


def node(run: Path, chunks: Any = "auto") -> xr.Dataset:
    return forebay.open_run(run, chunks=chunks)[RESID].to_dataset()


def directly(activations: xr.Dataset, model: Path) -> torch.Tensor:
    """The oracle: transformers' own norm and head on every stored vector, log probabilities [layer, token, vocab]."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(model).eval()
    with torch.inference_mode():
        stream = torch.from_numpy(activations["value"].values)
        return reference.lm_head(reference.model.norm(stream)).log_softmax(-1)


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_strongest_tokens_are_those_of_transformers_norm_and_head(
    run: Path, unembedding: Unembedding, tiny_model: Path
) -> None:
    lens = logit_lens(node(run), unembedding, top=4).compute()
    expected = directly(node(run), tiny_model).topk(4)
    assert lens["top_token_id"].dims == lens["top_probability"].dims == ("layer", "token", "rank")
    assert lens["top_token_id"].dtype == np.int32
    assert lens["layer"].values.tolist() == [0, 1, 2]
    assert all(set(lens[name].attrs) == {"long_name", "units"} for name in lens.data_vars), "none are the store's"
    np.testing.assert_allclose(lens["top_probability"], expected.values.exp(), rtol=1e-4)
    np.testing.assert_array_equal(lens["top_token_id"], expected.indices)


def test_rank_and_probability_of_the_next_token_are_what_counting_gives(
    run: Path, unembedding: Unembedding, tiny_model: Path
) -> None:
    """Token by token, layer by layer: how many tokens are stronger than the one that follows in the same sequence."""
    activations = node(run)
    lens = logit_lens(activations, unembedding).compute()
    said = directly(activations, tiny_model).numpy()
    ids, sequence = activations["token_id"].values.tolist(), activations["sequence"].values.tolist()
    last_of_sequence = 0
    for token, (own, following) in enumerate(zip(sequence, [*sequence[1:], None], strict=True)):
        here = lens.isel(token=token)
        if own != following:
            last_of_sequence += 1
            assert int(here["next_token_id"]) == -1
            assert np.isnan(here["next_rank"]).all()
            assert np.isnan(here["next_log_probability"]).all()
            continue
        follows = ids[token + 1]
        assert int(here["next_token_id"]) == follows
        for layer in range(3):
            row = said[layer, token]
            assert int(here["next_rank"][layer]) == sum(1 for value in row.tolist() if value > row[follows])
            np.testing.assert_allclose(here["next_log_probability"][layer], row[follows], rtol=1e-4)
    assert last_of_sequence == sequence[-1] + 1


def test_the_last_layers_lens_is_what_the_model_says(run: Path, unembedding: Unembedding) -> None:
    lens = logit_lens(node(run), unembedding, top=1).sel(layer=2).compute()
    logits = forebay.open_run(run)["activations/hook_logits"]["value"].values
    np.testing.assert_array_equal(lens["top_token_id"].squeeze("rank"), logits.argmax(-1))
    probability = torch.from_numpy(logits).softmax(-1).amax(-1)
    np.testing.assert_allclose(lens["top_probability"].squeeze("rank"), probability, rtol=1e-4)


def test_a_soft_cap_is_part_of_the_unembedding(run: Path, unembedding: Unembedding) -> None:
    capped = dataclasses.replace(unembedding, spec=dataclasses.replace(unembedding.spec, logit_softcap=2.0))
    part = node(run).isel(token=slice(0, 20))
    plain = unembedding.project_to_vocab(torch.from_numpy(part["value"].values))
    expected = (2 * torch.tanh(plain / 2)).softmax(-1).amax(-1)
    lens = logit_lens(part, capped, top=1).compute()
    np.testing.assert_allclose(lens["top_probability"].squeeze("rank"), expected, rtol=1e-4)


# ── how it computes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_computed_or_read_before_it_is_asked_for(
    run: Path, unembedding: Unembedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dask.config.set(scheduler=forbidden), monkeypatch.context() as reading:
        reading.setattr("forebay.stores.tree.KeptArray._read", forbidden)
        lens = logit_lens(node(run).sel(position=slice(0, 40)), unembedding)
        assert all(lens[name].chunks for name in lens.data_vars)
        with pytest.raises(AssertionError, match="something was computed"):
            lens.compute()
    assert np.isfinite(lens["top_probability"].compute()).all()


def test_chunk_by_chunk_is_the_same_as_all_at_once(run: Path, unembedding: Unembedding) -> None:
    chunked, whole = (logit_lens(data, unembedding) for data in (node(run), node(run).compute()))
    assert len(chunked["next_rank"].chunksizes["token"]) > 5
    assert whole["next_rank"].chunks is None
    xr.testing.assert_allclose(chunked.compute(), whole, rtol=1e-5)
    np.testing.assert_array_equal(chunked["next_token_id"].compute(), whole["next_token_id"])


def test_few_rows_at_a_time_are_the_same_as_many(
    run: Path, unembedding: Unembedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on logits in memory, made so small that every block is done in dozens of parts, the last one short."""
    data = node(run).compute()
    many = logit_lens(data, unembedding)
    monkeypatch.setattr(module, "AT_ONCE", 7 * 300)
    xr.testing.assert_allclose(logit_lens(data, unembedding), many, rtol=1e-5)


def test_a_selection_has_the_same_lens_as_the_whole_and_looks_no_further(run: Path, unembedding: Unembedding) -> None:
    """What follows counts only if it was selected as well."""
    whole = logit_lens(node(run), unembedding).compute()
    for selection in ({"layer": [2, 0], "sequence": 3}, {"document": [8, 2], "position": slice(2, 9)}, {"layer": 1}):
        data = node(run).sel(selection)
        lens, same = logit_lens(data, unembedding).compute(), whole.sel(selection)
        np.testing.assert_allclose(lens["top_probability"], same["top_probability"], rtol=1e-5)
        sequence, position = data["sequence"].values, data["position"].values
        ends = np.append((np.diff(sequence) != 0) | (np.diff(position) != 1), True)
        np.testing.assert_array_equal(lens["next_token_id"], np.where(ends, -1, same["next_token_id"]))
        np.testing.assert_array_equal(lens["next_rank"], same["next_rank"].where(~xr.DataArray(ends, dims="token")))


def test_every_other_token_has_no_next_one(run: Path, unembedding: Unembedding) -> None:
    lens = logit_lens(node(run).isel(token=slice(0, 60, 2)), unembedding).compute()
    assert (lens["next_token_id"] == -1).all()
    assert np.isnan(lens["next_rank"]).all()


def test_a_token_of_another_sequence_is_no_next_one_though_its_position_is(run: Path, unembedding: Unembedding) -> None:
    data = node(run)
    sequence, position = data["sequence"].values, data["position"].values
    here = np.flatnonzero((sequence == 2) & (position == 4))
    there = np.flatnonzero((sequence == 3) & (position == 5))
    lens = logit_lens(data.isel(token=np.concatenate([here, there])), unembedding).compute()
    assert lens["next_token_id"].values.tolist() == [-1, -1]


@pytest.mark.parametrize("chunks", ["auto", None])
def test_an_empty_selection_has_an_empty_lens(run: Path, unembedding: Unembedding, chunks: Any) -> None:
    lens = logit_lens(node(run, chunks).isel(token=slice(0, 0)), unembedding, top=2).compute()
    assert dict(lens.sizes) == {"layer": 3, "token": 0, "rank": 2}


def test_where_the_store_has_no_values_the_lens_says_nothing(run: Path, unembedding: Unembedding) -> None:
    """Tokens of units that are not recorded yet, in a store opened with partial=True, read as NaN."""
    data = node(run).compute()
    gone = xr.DataArray(np.arange(data.sizes["token"]) % 90 < 45, dims="token")
    lens = logit_lens(data.assign(value=data["value"].where(~gone)), unembedding)
    for name in ("next_rank", "next_log_probability", "top_probability"):
        assert np.isnan(lens[name].where(gone, drop=True)).all(), name
    assert (lens["top_token_id"].where(gone, drop=True) == -1).all()
    np.testing.assert_array_equal(
        lens["next_rank"].where(~gone), logit_lens(data, unembedding)["next_rank"].where(~gone)
    )


def test_bfloat16_stores_read_as_the_values_they_hold(
    runs: Path, make_recipe: Callable[..., Path], unembedding: Unembedding, tiny_model: Path
) -> None:
    recipe = make_recipe(capture={"store_dtype": "bfloat16", "unit_tokens": 512})
    assert forebay.run(recipe, runs / "bfloat16").code == 0
    data = node(runs / "bfloat16")
    lens = logit_lens(data, unembedding, top=1).compute()
    expected = directly(data, tiny_model).topk(1)
    np.testing.assert_array_equal(lens["top_token_id"], expected.indices)
    np.testing.assert_allclose(lens["top_probability"], expected.values.exp(), rtol=1e-4)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_of_another_width_is_refused(run: Path, unembedding: Unembedding) -> None:
    with pytest.raises(SchemaError, match="are 27 wide and the unembedding reads 28"):
        logit_lens(node(run).isel(d_model=slice(1, None)), unembedding)


def test_what_is_no_residual_stream_is_refused(run: Path, unembedding: Unembedding) -> None:
    tree = forebay.open_run(run)
    with pytest.raises(SchemaError, match=r"value\[layer, token, d_model\].*not \('token', 'vocab'\)"):
        logit_lens(tree["activations/hook_logits"].to_dataset(), unembedding)
    with pytest.raises(SchemaError, match=r"not \['char_end', 'char_start', 'token_id'\]"):
        logit_lens(tree["tokens"].to_dataset(), unembedding)


def test_missing_labels_are_named(run: Path, unembedding: Unembedding) -> None:
    with pytest.raises(SchemaError, match=r"needs the coordinates \['token_id'\] on `token`; open the store with"):
        logit_lens(node(run).drop_vars("token_id"), unembedding)
