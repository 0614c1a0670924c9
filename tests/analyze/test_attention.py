"""Attention patterns are summarised as counting by hand does, sequence by sequence; beyond an end nothing counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr

import forebay
from forebay.stages.analyze.attention import (
    attention_distance,
    attention_entropy,
    attention_from,
    attention_to,
    attention_to_targets,
    top_edges,
)
from forebay.stages.analyze.effective_attention import normalize_effective_attention
from forebay.stages.analyze.tokens import as_run
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..models.rwkv_models import write_pth
from .laziness import forbidden

PATTERN = "activations/attn.hook_pattern"
LENGTHS = (13, 4, 9, 1)
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def ragged() -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(1, 300, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def captured(tiny_model: Path, ragged: list[list[int]]) -> xr.Dataset:
    """Patterns of four sequences of different lengths, from one forward."""
    model = forebay.load_model(tiny_model, device="cpu")
    hooks = HookSpec().capture("blocks.{0,2}.attn.hook_pattern")
    return as_run(model.forward(ragged, hooks, logits=False))[PATTERN].to_dataset()


@pytest.fixture(scope="module")
def alone(tiny_model: Path, ragged: list[list[int]]) -> list[list[torch.Tensor]]:
    """The oracle's weights [head, query, key] by sequence and layer: transformers' own, each sequence run by itself."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    with torch.inference_mode():
        found = [model(torch.tensor([ids]), output_attentions=True).attentions for ids in ragged]
    return [[attentions[layer][0].double() for layer in LAYERS] for attentions in found]


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


# ── of one query, of one key ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("position", [0, 3, 8, -1, -4])
def test_positions_are_counted_in_each_sequences_own_terms(
    position: int, captured: xr.Dataset, alone: list[list[torch.Tensor]]
) -> None:
    leaves, arrives = attention_from(captured, position), attention_to(captured, position)
    assert leaves.dims == ("layer", "sequence", "head", "key")
    assert arrives.dims == ("layer", "sequence", "head", "query")
    assert leaves.dtype == arrives.dtype == np.float32
    assert leaves["layer"].values.tolist() == [0, 2]
    for s, n in enumerate(LENGTHS):
        there = -n <= position < n
        for i in range(len(LAYERS)):
            for found, dim in ((leaves, "query"), (arrives, "key")):
                here = found.isel(layer=i, sequence=s).values
                assert np.isnan(here[:, n if there else 0 :]).all()
                if there:
                    weights = alone[s][i] if dim == "query" else alone[s][i].mT
                    close(here[:, :n], weights[:, position])


def test_a_mean_over_heads_is_one(captured: xr.Dataset) -> None:
    for function in (attention_from, attention_to):
        mean = function(captured, -2, mean_over_heads=True)
        assert mean.dims[:2] == ("layer", "sequence")
        close(mean, sum(function(captured, -2).isel(head=h) for h in range(4)) / 4)


@pytest.mark.parametrize("targets", [[0], [2, -3], [0, 5, 11], -1, [7]])
@pytest.mark.parametrize("position", [-1, 5])
def test_attention_to_targets_is_the_mean_over_those_that_a_sequence_has(
    targets: Any, position: int, captured: xr.Dataset, alone: list[list[torch.Tensor]]
) -> None:
    found = attention_to_targets(captured, targets, position)
    by_head = attention_to_targets(captured, targets, position, mean_over_heads=False)
    assert found.dims == ("layer", "sequence")
    for s, n in enumerate(LENGTHS):
        valid = [t for t in ([targets] if isinstance(targets, int) else targets) if -n <= t < n]
        for i in range(len(LAYERS)):
            here = float(found.isel(layer=i, sequence=s))
            if not valid or position >= n:
                assert math.isnan(here)
                continue
            weights = [[float(head[position, t]) for t in valid] for head in alone[s][i]]
            close(here, sum(map(sum, weights)) / (4 * len(valid)))
            close(by_head.isel(layer=i, sequence=s), [sum(row) / len(row) for row in weights])


# ── edges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("excluded", [{}, {"exclude_bos": True}, {"exclude_current_token": True, "exclude_bos": True}])
def test_the_strongest_edges_are_those_that_sorting_finds(excluded: dict[str, bool], captured: xr.Dataset) -> None:
    found, by_query = top_edges(captured, 12, **excluded), top_edges(captured, 3, by_query=True, **excluded)
    assert found["key"].dims == found["query"].dims == found["weight"].dims == ("layer", "sequence", "head", "rank")
    assert by_query["weight"].dims == ("layer", "sequence", "head", "query", "rank")
    assert found["key"].dtype == found["query"].dtype == by_query["key"].dtype == np.int32
    for i, s, h in np.ndindex(2, len(LENGTHS), 4):
        here = {"layer": i, "sequence": s, "head": h}
        weight = captured["value"].isel(here).values
        edges = [
            (-float(weight[q, k]), q, k)
            for q in range(LENGTHS[s])
            for k in range(q + 1)
            if not (k == 0 and excluded.get("exclude_bos")) and not (k == q and excluded.get("exclude_current_token"))
        ]
        check_edges(found.isel(here), sorted(edges)[:12], 12)
        for q in range(13):
            check_edges(by_query.isel(here).isel(query=q), sorted(edge for edge in edges if edge[1] == q)[:3], 3)


def check_edges(found: xr.Dataset, expected: list[tuple[float, int, int]], k: int) -> None:
    nothing = k - len(expected)
    assert found["key"].values.tolist() == [key for _, _, key in expected] + [-1] * nothing
    if "query" in found.data_vars:
        assert found["query"].values.tolist() == [query for _, query, _ in expected] + [-1] * nothing
    np.testing.assert_array_equal(found["weight"], [-w for w, _, _ in expected] + [np.nan] * nothing)


def test_of_equal_edges_the_earlier_query_and_then_the_earlier_key_comes_first() -> None:
    even = xr.DataArray(np.tri(5) / np.arange(1, 6)[:, None], dims=("query", "key"))
    found = top_edges(even, 6)
    pairs = list(zip(found["query"].values.tolist(), found["key"].values.tolist(), strict=True))
    assert pairs == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert top_edges(even, 3, by_query=True).isel(query=4)["key"].values.tolist() == [0, 1, 2]


# ── how widely and how far ───────────────────────────────────────────────────────────────────────────────────────────


def test_entropy_is_that_of_the_weights_and_its_share_that_of_the_visible_keys(
    captured: xr.Dataset, alone: list[list[torch.Tensor]]
) -> None:
    found = attention_entropy(captured)
    assert found["entropy"].dims == ("layer", "sequence", "head", "query")
    assert found["entropy"].dtype == found["normalized_entropy"].dtype == np.float32
    for s, n in enumerate(LENGTHS):
        assert np.isnan(found["entropy"].isel(sequence=s, query=slice(n, None))).all()
        assert np.isnan(found["normalized_entropy"].isel(sequence=s, query=0)).all()
        for i in range(len(LAYERS)):
            for h, q in np.ndindex(4, n):
                here = found.isel(layer=i, sequence=s, head=h, query=q)
                expected = -sum(w * math.log(w) for w in alone[s][i][h, q, : q + 1].tolist() if w > 0)
                close(here["entropy"], expected)
                if q:
                    close(here["normalized_entropy"], expected / math.log(q + 1))


def test_an_even_row_has_all_the_entropy_there_is_also_in_a_window() -> None:
    n, window = 7, 3
    place = np.arange(n)
    seen = (place <= place[:, None]) & (place[:, None] - place < window)
    even = xr.DataArray(seen / seen.sum(-1, keepdims=True), dims=("query", "key"))
    found = attention_entropy(even, window=window)
    close(found["entropy"], np.log(np.minimum(place + 1, window)))
    close(found["normalized_entropy"][1:], 1.0)
    assert attention_entropy(even)["normalized_entropy"][-1] < 0.6


def test_a_row_of_nothing_has_neither_entropy_nor_distance() -> None:
    pattern = np.tri(4) / np.arange(1, 5)[:, None]
    pattern[2] = 0
    value = xr.DataArray(pattern, dims=("query", "key"))
    entropy, distance = attention_entropy(value)["entropy"].values, attention_distance(value).values
    assert np.isnan(entropy).tolist() == np.isnan(distance).tolist() == [False, False, True, False]
    close(distance[[0, 1, 3]], [0, 0.5, 1.5])
    signed = xr.DataArray(np.array([[1.0, 0.0], [1.5, -0.5]]), dims=("query", "key"))
    assert np.isnan(attention_entropy(signed)["entropy"]).values.tolist() == [False, True]


@pytest.mark.parametrize("exclude_bos", [False, True])
def test_distance_is_the_mean_number_of_positions_back(
    exclude_bos: bool, captured: xr.Dataset, alone: list[list[torch.Tensor]]
) -> None:
    found = attention_distance(captured, exclude_bos=exclude_bos)
    for s, n in enumerate(LENGTHS):
        assert np.isnan(found.isel(sequence=s, query=slice(n, None))).all()
        for i in range(len(LAYERS)):
            for h, q in np.ndindex(4, n):
                row = [(w, q - k) for k, w in enumerate(alone[s][i][h, q].tolist()) if k or not exclude_bos]
                total = sum(w for w, _ in row)
                here = float(found.isel(layer=i, sequence=s, head=h, query=q))
                close(here, sum(w * back for w, back in row) / total if total else math.nan)


# ── stores, chunks, laziness ─────────────────────────────────────────────────────────────────────────────────────────

EVERY: dict[str, Callable[[Any], Any]] = {
    "from": lambda p: attention_from(p, -1),
    "to": lambda p: attention_to(p, 2, mean_over_heads=True),
    "targets": lambda p: attention_to_targets(p, [0, -2]),
    "edges": lambda p: top_edges(p, 4),
    "edges by query": lambda p: top_edges(p, 2, by_query=True, exclude_bos=True),
    "entropy": attention_entropy,
    "distance": lambda p: attention_distance(p, exclude_bos=True),
}


@pytest.mark.parametrize("function", EVERY.values(), ids=EVERY)
def test_a_store_is_read_when_it_is_asked_and_any_chunks_give_the_same(
    function: Callable[[Any], Any], patterns_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dask.config.set(scheduler=forbidden), monkeypatch.context() as reading:
        reading.setattr("forebay.stores.tree.KeptArray._read", forbidden)
        lazy = function(forebay.open_run(patterns_run)[PATTERN])
        with pytest.raises(AssertionError, match="something was computed"):
            lazy.compute()
    assert lazy["document"].chunks is None
    whole = function(forebay.open_run(patterns_run, chunks=None)[PATTERN].to_dataset().compute())
    xr.testing.assert_identical(lazy.compute(), whole)
    split = (
        forebay.open_run(patterns_run)[PATTERN].to_dataset().chunk({"sequence": 20, "head": 3, "query": 13, "key": 15})
    )
    xr.testing.assert_identical(function(split).compute(), whole)


def test_every_token_of_a_store_is_counted_and_nothing_else(patterns_run: Path) -> None:
    tree = forebay.open_run(patterns_run)
    lengths = tree["sequences/n_token"].values
    assert len(set(lengths.tolist())) > 3
    entropy = attention_entropy(tree[PATTERN])["entropy"].compute()
    counted = entropy.notnull().sum("query")
    assert (counted == xr.DataArray(lengths, dims="sequence")).all()
    last = attention_from(tree[PATTERN], -1).compute()
    close(last.sum("key"), 1.0)
    assert (last.notnull().sum("key") == xr.DataArray(lengths, dims="sequence")).all()


def test_a_selection_of_sequences_needs_no_table(patterns_run: Path) -> None:
    tree = forebay.open_run(patterns_run)
    whole = attention_from(tree[PATTERN], -1).compute()
    some = attention_from(tree[PATTERN].to_dataset().isel(sequence=[7, 2], layer=1, head=0), -1).compute()
    xr.testing.assert_identical(some, whole.isel(sequence=[7, 2], layer=1, head=0))
    assert "document" in some.coords


def test_units_that_are_not_recorded_say_nothing(captured: xr.Dataset) -> None:
    gone = captured["value"].where(captured["sequence"] != 2)
    assert np.isnan(attention_from(gone, -1).isel(sequence=2)).all()
    assert np.isnan(attention_distance(gone).isel(sequence=2)).all()
    assert (top_edges(gone, 5).isel(sequence=2)["key"] == -1).all()
    xr.testing.assert_equal(attention_from(gone, -1).isel(sequence=0), attention_from(captured, -1).isel(sequence=0))


def test_an_empty_selection_has_empty_results(captured: xr.Dataset) -> None:
    for function in EVERY.values():
        found = function(captured.isel(sequence=slice(0, 0)))
        assert found.sizes["sequence"] == 0


@pytest.mark.parametrize("version", [6, 7])
def test_effective_attention_of_a_recurrent_model_is_read_like_a_pattern(version: int, tmp_path: Path) -> None:
    model = forebay.load_model(write_pth(tmp_path / "rwkv.pth", version), device="cpu")
    ids = [[5, 3, 8, 13, 21, 2, 7], [9, 4, 1]]
    out = model.forward(ids, HookSpec().capture("blocks.*.rwkv.hook_effective_attn"), logits=False)
    alpha = as_run(out)["activations/rwkv.hook_effective_attn"]["value"]
    found = attention_from(normalize_effective_attention(alpha), -1)
    assert found.dims == ("layer", "sequence", "head", "key")
    for layer in range(3):
        for s, n in enumerate((7, 3)):
            row = out[f"blocks.{layer}.rwkv.hook_effective_attn"][s, :, n - 1, :n].clamp_min(0).double()
            close(found.isel(layer=layer, sequence=s)[:, :n], row / (row.sum(-1, keepdim=True) + 1e-10))
            assert np.isnan(found.isel(layer=layer, sequence=s)[:, n:]).all()


# ── labels and refusals ──────────────────────────────────────────────────────────────────────────────────────────────


def test_results_say_what_they_are(captured: xr.Dataset) -> None:
    for name, function in EVERY.items():
        found = function(captured)
        for variable in [found] if isinstance(found, xr.DataArray) else found.data_vars.values():
            assert variable.attrs["long_name"], name


def test_what_is_no_whole_pattern_is_refused(captured: xr.Dataset) -> None:
    with pytest.raises(SchemaError, match=r"attention_from reads the variable `value` .* holds other"):
        attention_from(captured.rename(value="other"))
    with pytest.raises(SchemaError, match=r"patterns \[..., query, key\], not \[layer, sequence, head, query\]"):
        attention_entropy(captured.isel(key=0))
    with pytest.raises(SchemaError, match=r"there are 5 queries and 13 keys\. Select from the result instead"):
        attention_distance(captured.isel(query=slice(0, 5)))


@pytest.mark.parametrize("position", [13, -14])
def test_a_position_that_no_sequence_can_have_is_refused(position: int, captured: xr.Dataset) -> None:
    for function in (attention_from, attention_to):
        with pytest.raises(SchemaError, match=f"position {position}: the sequences have at most 13, so -13 to 12"):
            function(captured, position)
    with pytest.raises(SchemaError, match="at most 13"):
        attention_to_targets(captured, [0, position])


def test_other_arguments_that_make_no_sense_are_refused(captured: xr.Dataset) -> None:
    with pytest.raises(SchemaError, match="targets is empty"):
        attention_to_targets(captured, [])
    with pytest.raises(SchemaError, match=r"k = 0: from 1 to 91 edges of a pattern"):
        top_edges(captured, 0)
    with pytest.raises(SchemaError, match=r"k = 14: from 1 to 13 edges of a query"):
        top_edges(captured, 14, by_query=True)
    with pytest.raises(SchemaError, match="window = 0"):
        attention_entropy(captured, window=0)
    with pytest.raises(SchemaError, match="no dimension `head`"):
        attention_from(captured.isel(head=0), mean_over_heads=True)
