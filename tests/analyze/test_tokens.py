"""One forward's captures and a store's node are the same to an analysis; which tokens count, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr

import forebay
from forebay.stages.analyze.directions import mean_difference
from forebay.stages.analyze.moments import moments
from forebay.stages.analyze.similarity import linear_cka
from forebay.stages.analyze.statistics import mean_by
from forebay.stages.analyze.tokens import as_run, counted, label, needs, vectors
from forebay.stores.errors import SchemaError

from .laziness import forbidden

HOOKS = ["blocks.{0,2}.hook_resid_post", "blocks.1.attn.hook_z", "blocks.{0,1,2}.attn.hook_pattern", "hook_embed"]


@pytest.fixture
def run(run_once: Callable[..., Path]) -> xr.DataTree:
    """Documents of one to some dozen tokens, a sequence each, in units of 20."""
    folder = run_once(
        texts=["It is a truth", "universally acknowledged, that", "a", "single man in possession"],
        tokenize={"context": 64, "layout": "documents", "long_documents": "split"},
        capture={"hooks": HOOKS, "unit_tokens": 20},
    )
    return forebay.open_run(folder)


@pytest.fixture
def forward(run: xr.DataTree, tiny_model: Path) -> Any:
    """The model over the same tokens: the sequences of the store, padded into one batch."""
    ids, starts = run["tokens/token_id"].values.astype(np.int64), run["sequences/start"].values
    sequences = [part.tolist() for part in np.split(ids, starts[1:])]
    hooks = forebay.HookSpec()
    for name in HOOKS:
        hooks = hooks.capture(name)
    return forebay.load_model(tiny_model, device="cpu").forward(sequences, hooks)


# ── one forward as a run ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["hook_resid_post", "attn.hook_z", "attn.hook_pattern", "hook_embed"])
def test_one_forward_gives_the_nodes_and_numbers_of_a_store_of_the_same_tokens(
    run: xr.DataTree, forward: Any, name: str
) -> None:
    stored, held = (
        run[f"activations/{name}"].to_dataset().compute(),
        as_run(forward)[f"activations/{name}"].to_dataset(),
    )
    assert held["value"].dims == stored["value"].dims
    assert held.sizes == stored.sizes
    assert set(stored.coords) <= set(held.coords)
    for coord in stored.coords:
        np.testing.assert_array_equal(held[coord], stored[coord], err_msg=coord)
    np.testing.assert_allclose(held["value"], stored["value"], rtol=2e-5, atol=2e-5)
    assert np.abs(stored["value"]).max() > 0.1


def test_one_forward_has_the_tokens_and_no_other_hook_points(run: xr.DataTree, forward: Any) -> None:
    held = as_run(forward)
    np.testing.assert_array_equal(held["tokens/token_id"], run["tokens/token_id"])
    assert set(held["activations"].children) == {"hook_resid_post", "attn.hook_z", "attn.hook_pattern", "hook_embed"}
    assert "layer" not in held["activations/hook_embed"].to_dataset().coords


def test_no_padding_is_among_the_tokens_of_a_forward(forward: Any) -> None:
    assert forward.token_ids.numel() > sum(forward.lengths)
    node = as_run(forward)["activations/hook_resid_post"].to_dataset()
    assert node.sizes["token"] == sum(forward.lengths)
    for sequence, length in enumerate(forward.lengths):
        own = node.sel(sequence=sequence)
        np.testing.assert_array_equal(own["position"], np.arange(length))
        direct = forward["blocks.2.hook_resid_post"][sequence, :length]
        np.testing.assert_array_equal(own["value"].sel(layer=2), direct.float().numpy())


def test_a_forwards_captures_stay_when_the_tensors_change(forward: Any) -> None:
    node = as_run(forward)["activations/hook_resid_post"].to_dataset()
    before = node["value"].values.copy()
    forward["blocks.2.hook_resid_post"].zero_()
    np.testing.assert_array_equal(node["value"], before)


def test_bfloat16_of_a_forward_becomes_float32(tiny_model: Path) -> None:
    model = forebay.load_model(tiny_model, device="cpu", dtype="bfloat16")
    out = model.forward([[5, 6, 7]], forebay.HookSpec().capture("blocks.1.hook_resid_post"))
    value = as_run(out)["activations/hook_resid_post"]["value"]
    assert out["blocks.1.hook_resid_post"].dtype == torch.bfloat16
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value[0], out["blocks.1.hook_resid_post"][0].float())


def test_an_analysis_says_the_same_of_a_forward_as_of_a_store(run: xr.DataTree, forward: Any) -> None:
    name = "activations/hook_resid_post"
    xr.testing.assert_allclose(moments(as_run(forward)[name]), moments(run[name]).compute(), rtol=1e-4, atol=1e-5)


# ── which tokens count ───────────────────────────────────────────────────────────────────────────────────────────────


def node(run: xr.DataTree) -> xr.Dataset:
    return run["activations/hook_resid_post"].to_dataset()


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_tokens_count_from_a_position_of_their_sequence_on(run: xr.DataTree, skip: int) -> None:
    expected = run["activations/hook_resid_post"]["position"].values >= skip
    np.testing.assert_array_equal(counted(node(run), skip), expected)
    assert expected.sum() == sum(max(0, n - skip) for n in run["sequences/n_token"].values)


def test_a_mask_narrows_what_counts(run: xr.DataTree) -> None:
    where = label(node(run), "document") == 1
    found = counted(node(run), 2, where)
    np.testing.assert_array_equal(
        found, (run["tokens"]["document"].values == 1) & (run["tokens"]["position"].values >= 2)
    )


def test_tokens_of_units_that_are_not_recorded_do_not_count(run: xr.DataTree) -> None:
    done = np.arange(node(run).sizes["token"]) % 3 > 0
    partial = node(run).assign_coords(done=("token", done))
    np.testing.assert_array_equal(counted(partial, 0), done)


def test_what_counts_is_lazy_and_chunked_as_the_values_are(run: xr.DataTree) -> None:
    lazy = node(run).chunk({"token": 7})
    with dask.config.set(scheduler=forbidden):
        found = counted(lazy, 1, label(lazy, "document") == 0)
    assert found.chunksizes["token"] == lazy.chunksizes["token"]
    np.testing.assert_array_equal(found, counted(node(run).compute(), 1, label(node(run).compute(), "document") == 0))


def test_labels_are_those_of_a_selection(run: xr.DataTree) -> None:
    chosen = node(run).sel(document=[1, 3], position=slice(1, 3))
    assert chosen["value"].chunks is not None
    for name in ("token_id", "document", "position", "sequence"):
        np.testing.assert_array_equal(label(chosen, name), chosen[name])


def test_a_node_of_the_tree_does_as_well_as_its_dataset(run: xr.DataTree) -> None:
    np.testing.assert_array_equal(counted(run["activations/hook_resid_post"]), counted(node(run)))
    by = mean_by(run["activations/hook_resid_post"], "position", 3)
    xr.testing.assert_equal(by.compute(), mean_by(node(run), "position", 3).compute())


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_node_without_values_names_what_it_holds(run: xr.DataTree) -> None:
    with pytest.raises(SchemaError, match=r"a mean reads the variable `value`.*char_end"):
        vectors(run["tokens"].to_dataset(), "a mean")


def test_what_has_no_vectors_of_tokens_is_refused(run: xr.DataTree) -> None:
    with pytest.raises(SchemaError, match="query"):
        vectors(run["activations/attn.hook_pattern"].to_dataset(), "a mean")
    with pytest.raises(SchemaError, match="token"):
        vectors(node(run).isel(d_model=0), "a mean")


def test_missing_coordinates_are_named(run: xr.DataTree) -> None:
    bare = node(run).drop_vars(["sequence", "position", "document"])
    with pytest.raises(SchemaError, match="position"):
        counted(bare)
    with pytest.raises(SchemaError, match=r"\['document'\]"):
        needs(bare, ["document", "token_id"], "an analysis")


def test_masks_labels_and_stores_of_other_tokens_are_refused_lazily(run: xr.DataTree) -> None:
    whole = node(run).chunk({"token": 7})
    there, other = whole.isel(token=slice(0, 20)), whole.isel(token=slice(20, 40))
    mask = other["token_id"] > 5
    refused = {
        "`where`": lambda: moments(there, where=mask),
        "`by`": lambda: mean_by(there, other["token_id"] % 3, 3),
        "`positive`": lambda: mean_difference(there, mask),
        "`negative`": lambda: mean_difference(there, there["token_id"] > 5, mask),
        "`other`": lambda: linear_cka(there, other),
    }
    with dask.config.set(scheduler=forbidden):
        for name, call in refused.items():
            with pytest.raises(SchemaError, match=f"{name} belongs to other tokens than the activations"):
                call()
        own = there["token_id"] > 5
        bare = xr.DataArray(own.data, dims="token")
        for given in (own, bare):
            moments(there, where=given), mean_by(there, given, [0, 1]), mean_difference(there, given)
        linear_cka(there, there.isel(layer=[1]))


def test_a_skip_below_0_and_masks_of_other_tokens_are_refused(run: xr.DataTree) -> None:
    with pytest.raises(SchemaError, match="skip_positions = -1"):
        counted(node(run), -1)
    n = node(run).sizes["token"]
    for where in (
        xr.DataArray(np.ones(n), dims="token"),
        xr.DataArray(np.ones(n - 1, dtype=bool), dims="token"),
        xr.DataArray(np.ones(n, dtype=bool), dims="document"),
    ):
        with pytest.raises(SchemaError, match=rf"boolean \[token\] of the {n} tokens"):
            counted(node(run), 1, where)
