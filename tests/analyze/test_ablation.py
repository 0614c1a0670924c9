"""Ablated runs are those of transformers with the values put in by hand, whatever store they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import forebay
from forebay.stages.analyze import statistics
from forebay.stages.analyze.ablation import ablation_effect
from forebay.stages.analyze.metrics import Logit, LogProbability
from forebay.stages.analyze.tokens import as_run
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .hooked_llama import put, run

PROMPTS = [[5, 71, 8, 130, 44, 9, 280], [12, 3, 99, 41], [7, 7, 61, 250, 18]]
TARGETS = [17, 203, 4]
METRIC = Logit(token=TARGETS)
E = 10
"""d_head of the tiny model."""


@pytest.fixture
def folder(run_once: Callable[..., Path]) -> Path:
    """A run of documents of one to 20 tokens in units of 90."""
    return run_once(
        tokenize={"context": 20, "layout": "documents", "long_documents": "split"},
        capture={"hooks": ["blocks.*.hook_mlp_out", "blocks.*.attn.hook_z", "hook_embed"], "unit_tokens": 90},
    )


@pytest.fixture
def store(folder: Path) -> xr.DataTree:
    return forebay.open_run(folder)["activations"]


def logit(tiny_model: Path, number: int, edits: Any = None) -> float:
    return float(run(tiny_model, PROMPTS[number], edits)[0][-1, TARGETS[number]])


def close(found: xr.DataArray, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


# ── nothing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_mlp_set_to_0_behind_the_first_position_is_that_of_transformers(model: Model, tiny_model: Path) -> None:
    found = ablation_effect(model, PROMPTS, ["hook_mlp_out"], metric=METRIC)
    assert found["hook_mlp_out"].dims == ("sequence", "layer")
    assert found["hook_mlp_out"].dtype == found["baseline"].dtype == np.float32
    assert found["layer"].values.tolist() == [0, 1, 2]
    for number, prompt in enumerate(PROMPTS):
        close(found["baseline"][number], logit(tiny_model, number))
        for layer in range(3):
            edits = {("hook_mlp_out", layer): put(torch.zeros(28), range(1, len(prompt)))}
            close(found["hook_mlp_out"][number, layer], logit(tiny_model, number, edits))
    assert float(abs(found["hook_mlp_out"] - found["baseline"]).min()) > 1e-3


def test_a_head_set_to_0_everywhere_is_that_of_transformers(model: Model, tiny_model: Path) -> None:
    by = ("head", "layer")
    found = ablation_effect(model, PROMPTS, "attn.hook_z", metric=METRIC, by=by, skip_positions=0, layers=[2, 0])
    assert found["attn.hook_z"].dims == ("sequence", "layer", "head")
    assert found["attn.hook_z"].shape == (3, 2, 4)
    for number, prompt in enumerate(PROMPTS):
        for layer in (0, 2):
            for head in range(4):
                columns = slice(E * head, E * head + E)
                edits = {("attn.hook_z", layer): put(torch.zeros(E), range(len(prompt)), columns)}
                here = found["attn.hook_z"].sel(sequence=number, layer=layer, head=head)
                close(here, logit(tiny_model, number, edits))


def test_keys_and_values_are_ablated_by_key_value_head(model: Model, tiny_model: Path) -> None:
    found = ablation_effect(model, PROMPTS[:1], ["attn.hook_v"], metric=METRIC, by=["layer", "head"])
    assert found["attn.hook_v"].dims == ("sequence", "layer", "kv_head")
    edits = {("attn.hook_v", 1): put(torch.zeros(E), range(1, 7), slice(E, 2 * E))}
    close(found["attn.hook_v"][0].sel(layer=1, kv_head=1), logit(tiny_model, 0, edits))


def test_single_positions_of_all_layers_are_ablated_together_where_layers_are_not_swept(
    model: Model, tiny_model: Path
) -> None:
    found = ablation_effect(model, PROMPTS, ["hook_attn_out"], metric=METRIC, by=["position"])
    value = found["hook_attn_out"]
    assert value.dims == ("sequence", "position")
    assert np.isnan(value).values.tolist() == [
        [True] + [False] * 6,
        [True, False, False, False, True, True, True],
        [True] + [False] * 4 + [True] * 2,
    ]
    assert found["token_id"].values.tolist() == [p + [-1] * (7 - len(p)) for p in PROMPTS]
    assert found["token_text"].dims == ("sequence", "position")
    for number, prompt in enumerate(PROMPTS):
        for position in range(1, len(prompt)):
            edits = {("hook_attn_out", layer): put(torch.zeros(28), [position]) for layer in range(3)}
            close(value[number, position], logit(tiny_model, number, edits))


def test_positions_asked_for_are_ablated_in_each_prompts_own_terms(model: Model, tiny_model: Path) -> None:
    settings: dict[str, Any] = {"metric": METRIC, "positions": [-2, 0], "by": ["layer", "position"]}
    found = ablation_effect(model, PROMPTS, ["hook_mlp_out"], **settings)
    assert found["position"].values.tolist() == [-2, 0]
    for number, prompt in enumerate(PROMPTS):
        for place in (len(prompt) - 2, 0):
            edits = {("hook_mlp_out", 1): put(torch.zeros(28), [place])}
            here = found["hook_mlp_out"].sel(layer=1, sequence=number, position=-2 if place else 0)
            close(here, logit(tiny_model, number, edits))
    together = ablation_effect(model, PROMPTS, ["hook_mlp_out"], **settings | {"by": []})
    assert together["hook_mlp_out"].dims == ("sequence",)
    edits = {("hook_mlp_out", layer): put(torch.zeros(28), [2, 0]) for layer in range(3)}
    close(together["hook_mlp_out"][1], logit(tiny_model, 1, edits))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_few_runs_at_a_time_are_the_same_as_many(model: Model, batch_size: int) -> None:
    settings: dict[str, Any] = {"metric": METRIC, "by": ("layer", "head", "position")}
    many = ablation_effect(model, PROMPTS, ["attn.hook_z", "attn.hook_k"], **settings)
    few = ablation_effect(model, PROMPTS, ["attn.hook_z", "attn.hook_k"], **settings, batch_size=batch_size)
    xr.testing.assert_allclose(few, many, rtol=1e-5, atol=1e-5)
    assert many["attn.hook_z"].shape == (3, 3, 4, 7)


# ── means ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(store: xr.DataTree, kind: str, where: Any = slice(None)) -> Tensor:
    """Every row [layer, token, …] of the store beyond the first position of its sequence, float64."""
    node = store[kind].to_dataset().compute()
    counts = (node["position"].values >= 1) & np.isin(np.arange(node.sizes["token"]), np.arange(10**4)[where])
    return torch.from_numpy(node["value"].values[:, counts].astype(np.float64))


def test_a_mean_is_that_of_the_tokens_that_count(model: Model, tiny_model: Path, store: xr.DataTree) -> None:
    found = ablation_effect(model, PROMPTS, ["hook_mlp_out"], metric=METRIC, kind="mean", from_=store)
    mean = rows_of(store, "hook_mlp_out").mean(1)
    for number, prompt in enumerate(PROMPTS):
        for layer in range(3):
            edits = {("hook_mlp_out", layer): put(mean[layer], range(1, len(prompt)))}
            close(found["hook_mlp_out"][number, layer], logit(tiny_model, number, edits))


@pytest.mark.parametrize("chunks", [{"token": 7}, {"token": 100, "layer": 2}, {"token": -1}, None], ids=str)
def test_a_mean_of_heads_is_the_same_however_the_store_is_cut(
    model: Model, tiny_model: Path, store: xr.DataTree, chunks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a mask narrows the tokens further; a node is as good as the tree."""
    monkeypatch.setattr(statistics, "ROWS_AT_ONCE", 25)
    node = store["attn.hook_z"].to_dataset()
    node = node.compute() if chunks is None else node.chunk(chunks)
    where = xr.DataArray(np.arange(node.sizes["token"]) < 61, dims="token")
    settings: dict[str, Any] = {"metric": METRIC, "kind": "mean", "by": ("layer", "head"), "where": where}
    found = ablation_effect(model, PROMPTS[:1], ["attn.hook_z"], from_=node, layers=[1, 2], **settings)
    mean = rows_of(store, "attn.hook_z", slice(0, 61)).mean(1)
    for layer in (1, 2):
        for head in range(4):
            columns = slice(E * head, E * head + E)
            edits = {("attn.hook_z", layer): put(mean[layer, head], range(1, 7), columns)}
            close(found["attn.hook_z"][0].sel(layer=layer, head=head), logit(tiny_model, 0, edits))


def test_a_mean_may_be_that_of_the_same_position(model: Model, tiny_model: Path, store: xr.DataTree) -> None:
    node = store["hook_mlp_out"].to_dataset().compute()
    settings: dict[str, Any] = {"metric": METRIC, "kind": "mean", "per_position": True, "skip_positions": 0}
    found = ablation_effect(
        model, PROMPTS, ["hook_mlp_out"], from_=store["hook_mlp_out"].chunk({"token": 33}), **settings
    )
    for number, prompt in enumerate(PROMPTS):
        means = [node["value"].values[2, node["position"].values == p].mean(0) for p in range(len(prompt))]
        edits = {("hook_mlp_out", 2): put(torch.from_numpy(np.stack(means)), range(len(prompt)))}
        close(found["hook_mlp_out"][number].sel(layer=2), logit(tiny_model, number, edits))


def test_what_is_outside_the_blocks_has_no_layer(model: Model, tiny_model: Path, store: xr.DataTree) -> None:
    found = ablation_effect(model, PROMPTS, ["hook_embed"], metric=METRIC, kind="mean", from_=store, by=["position"])
    assert found["hook_embed"].dims == ("sequence", "position")
    mean = rows_of_global(store)
    edits = {("hook_resid_pre", 0): put(mean, [3])}
    close(found["hook_embed"][0, 3], logit(tiny_model, 0, edits))


def test_the_captures_of_a_forward_are_a_store_too(model: Model, tiny_model: Path) -> None:
    hooks = HookSpec().capture("blocks.*.hook_mlp_out")
    held = as_run(model.forward([[4, 8, 15, 16], [23, 42]], hooks, logits=False))
    found = ablation_effect(model, PROMPTS, "hook_mlp_out", metric=METRIC, kind="mean", from_=held, layers=[1])
    mean = held["activations/hook_mlp_out"]["value"].values[1, [1, 2, 3, 5]].mean(0)
    edits = {("hook_mlp_out", 1): put(torch.from_numpy(mean), range(1, 4))}
    close(found["hook_mlp_out"][1, 0], logit(tiny_model, 1, edits))


def rows_of_global(store: xr.DataTree) -> Tensor:
    node = store["hook_embed"].to_dataset().compute()
    return torch.from_numpy(node["value"].values[node["position"].values >= 1].astype(np.float64)).mean(0)


def test_tokens_without_values_do_not_count(model: Model, store: xr.DataTree) -> None:
    """Those of units that are not recorded read as NaN."""
    node = store["hook_mlp_out"].to_dataset().compute()
    gone = xr.DataArray(np.arange(node.sizes["token"]) % 90 < 45, dims="token")
    settings: dict[str, Any] = {"metric": METRIC, "kind": "mean"}
    holes = ablation_effect(
        model, PROMPTS, ["hook_mlp_out"], from_=node.assign(value=node["value"].where(~gone)), **settings
    )
    masked = ablation_effect(model, PROMPTS, ["hook_mlp_out"], from_=node, where=~gone, **settings)
    xr.testing.assert_identical(holes, masked)


# ── random tokens ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_put_in_are_the_rows_of_the_tokens_that_the_result_names(
    model: Model, tiny_model: Path, store: xr.DataTree
) -> None:
    settings: dict[str, Any] = {"metric": METRIC, "kind": "resample", "from_": store, "draws": 3, "seed": 5}
    found = ablation_effect(model, PROMPTS, ["hook_mlp_out"], **settings)
    assert found["hook_mlp_out"].dims == ("sequence", "draw", "layer")
    assert found["drawn_token"].dims == ("draw", "sequence", "position")
    assert found.attrs["seed"] == 5
    node = store["hook_mlp_out"].to_dataset().compute()
    for number, prompt in enumerate(PROMPTS):
        drawn = found["drawn_token"].values[:, number]
        assert (drawn[:, [0, *range(len(prompt), 7)]] == -1).all()
        assert (node["position"].values[drawn[:, 1 : len(prompt)]] >= 1).all()
        for draw in range(3):
            for layer in range(3):
                rows = torch.from_numpy(node["value"].values[layer, drawn[draw, 1 : len(prompt)]])
                edits = {("hook_mlp_out", layer): put(rows, range(1, len(prompt)))}
                close(found["hook_mlp_out"][number, draw, layer], logit(tiny_model, number, edits))
    assert len(np.unique(found["drawn_token"])) > 20


def test_layers_heads_and_kinds_of_a_run_come_from_the_same_tokens(
    model: Model, tiny_model: Path, store: xr.DataTree
) -> None:
    settings: dict[str, Any] = {"metric": METRIC, "kind": "resample", "from_": store, "seed": 1, "positions": [-1, 2]}
    found = ablation_effect(model, PROMPTS, ["attn.hook_z", "hook_mlp_out"], by=["position"], **settings)
    node = store["attn.hook_z"].to_dataset().compute()
    for number, prompt in enumerate(PROMPTS):
        for column, place in enumerate((len(prompt) - 1, 2)):
            token = int(found["drawn_token"][0, number, column])
            rows = torch.from_numpy(node["value"].values[:, token]).flatten(1)
            edits = {("attn.hook_z", layer): put(rows[layer], [place]) for layer in range(3)}
            close(found["attn.hook_z"][number, 0, column], logit(tiny_model, number, edits))


def test_the_seed_decides_what_is_drawn(model: Model, store: xr.DataTree) -> None:
    def drawn(seed: int) -> xr.Dataset:
        return ablation_effect(model, PROMPTS, ["hook_mlp_out"], metric=METRIC, kind="resample", from_=store, seed=seed)

    xr.testing.assert_identical(drawn(0), drawn(0))
    assert (drawn(0)["drawn_token"] != drawn(1)["drawn_token"]).any()


def test_tokens_are_drawn_evenly_from_those_that_count_even_if_they_are_few(model: Model, store: xr.DataTree) -> None:
    node = store["hook_mlp_out"].to_dataset()
    few = [40, 45, 333]
    where = xr.DataArray(np.isin(np.arange(node.sizes["token"]), few), dims="token")
    settings: dict[str, Any] = {"metric": METRIC, "kind": "resample", "seed": 1, "draws": 40, "layers": [0]}
    found = ablation_effect(model, PROMPTS, ["hook_mlp_out"], from_=node, where=where, **settings)
    drawn = found["drawn_token"].values
    ids, counts = np.unique(drawn[drawn >= 0], return_counts=True)
    assert ids.tolist() == few
    assert counts.min() > 0.25 * counts.sum()


def test_of_a_store_without_chunks_only_the_rows_drawn_are_read(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forebay.stores import tree

    sizes: list[tuple[str, int]] = []
    read = tree.KeptArray._read

    def noting(self: tree.KeptArray, key: tuple[Any, ...]) -> Any:
        found = read(self, key)
        sizes.append((self.path, found.size))
        return found

    node = forebay.open_run(folder, chunks=None)["activations/hook_mlp_out"]
    monkeypatch.setattr(tree.KeptArray, "_read", noting)
    found = ablation_effect(
        model, PROMPTS, ["hook_mlp_out"], metric=METRIC, kind="resample", from_=node, seed=3, layers=[1, 2]
    )
    n_drawn = len(np.unique(found["drawn_token"])) - 1
    assert sizes == [("hook_mlp_out/value", 2 * n_drawn * 28)]


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_result_says_what_it_is(model: Model, store: xr.DataTree) -> None:
    metric = LogProbability(token=7, position=2)
    found = ablation_effect(model, PROMPTS, ["hook_mlp_out"], metric=metric, kind="mean", from_=store)
    assert found["hook_mlp_out"].attrs == {
        "units": "log probability (nats)",
        "long_name": "log probability (nats) with hook_mlp_out set to its mean",
    }
    assert found["baseline"].attrs["units"] == "log probability (nats)"
    assert {k: found.attrs[k] for k in ("ablation", "metric", "metric_position", "skip_positions")} == {
        "ablation": "mean",
        "metric": "LogProbability",
        "metric_position": 2,
        "skip_positions": 1,
    }
    assert "draw" not in found.coords


def test_texts_are_prompts_too(model: Model) -> None:
    texts = ["It is a truth", "You want to tell me"]
    ids = [model.tokenizer.to_tokens(text)[0].tolist() for text in texts]
    settings: dict[str, Any] = {"metric": Logit(token=3), "by": ["layer", "position"]}
    found = ablation_effect(model, texts, ["hook_resid_post"], **settings)
    xr.testing.assert_identical(found, ablation_effect(model, ids, ["hook_resid_post"], **settings))


def test_a_mean_of_each_position_leaves_the_first_one_alone_by_default(
    model: Model, tiny_model: Path, store: xr.DataTree
) -> None:
    """No token of position 0 counts, and none is needed there."""
    settings: dict[str, Any] = {"metric": METRIC, "kind": "mean", "from_": store, "per_position": True}
    found = ablation_effect(model, PROMPTS, ["hook_mlp_out"], **settings)
    node = store["hook_mlp_out"].to_dataset().compute()
    for number, prompt in enumerate(PROMPTS):
        at = range(1, len(prompt))
        means = [node["value"].values[2][node["position"].values == p].astype(np.float64).mean(0) for p in at]
        edits = {("hook_mlp_out", 2): put(torch.from_numpy(np.stack(means)), at)}
        close(found["hook_mlp_out"][number, 2], logit(tiny_model, number, edits))
