"""Chosen tokens in the logit lens, the layer at which a token first appears, and what the lens can be given."""

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
from forebay.stages.analyze.logit_lens import first_appearance, format_probability, format_token, logit_lens
from forebay.stages.analyze.tokens import as_run
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError
from forebay.stores.tree import KeptArray

from .laziness import forbidden

ROWS = [
    torch.randint(300, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (11, 1, 6)
]
TOKENS = [250, 3, 77]
HOOKS = ("hook_embed", "blocks.*.{hook_resid_pre,hook_resid_mid,hook_resid_post,hook_attn_out}", "hook_final_norm")


@pytest.fixture(scope="module")
def captures(model: Model) -> xr.DataTree:
    return as_run(model.forward(ROWS, HookSpec().capture(*HOOKS)))


@pytest.fixture(scope="module")
def said(captures: xr.DataTree, tiny_model: Path) -> np.ndarray[Any, Any]:
    """The oracle: logits [layer, token, vocab] of every layer's stream by transformers' norm and head, in float64."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(tiny_model).eval().double()
    with torch.inference_mode():
        stream = torch.from_numpy(captures["activations/hook_resid_post"]["value"].values).double()
        return np.asarray(reference.lm_head(reference.model.norm(stream)).numpy())


def probability(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


# ── chosen tokens ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rank_and_probability_of_chosen_tokens_are_what_counting_gives(
    captures: xr.DataTree, model: Model, said: np.ndarray[Any, Any]
) -> None:
    lens = logit_lens(captures["activations/hook_resid_post"], model.unembedding, tokens=TOKENS)
    assert lens["token_rank"].dims == lens["token_probability"].dims == ("layer", "token", "vocab")
    assert lens["vocab"].values.tolist() == TOKENS
    assert lens["token_rank"].dtype == lens["token_probability"].dtype == np.float32
    for token in TOKENS:
        here = lens.sel(vocab=token)
        stronger = (said > said[..., token, None]).sum(-1)
        np.testing.assert_array_equal(here["token_rank"], stronger)
        np.testing.assert_allclose(here["token_probability"], probability(said)[..., token], rtol=1e-4)


def test_nothing_is_said_of_them_where_nothing_is_recorded(captures: xr.DataTree, model: Model) -> None:
    node = captures["activations/hook_resid_post"].to_dataset()
    gone = xr.DataArray(np.arange(18) % 5 == 2, dims="token")
    lens = logit_lens(node.assign(value=node["value"].where(~gone)), model.unembedding, tokens=TOKENS)
    for name in ("token_rank", "token_probability"):
        np.testing.assert_array_equal(np.isnan(lens[name]).all("vocab").all("layer"), gone)


@pytest.mark.parametrize("cap", [2.0, None])
def test_without_the_soft_cap_ranks_stay_and_probabilities_do_not(
    captures: xr.DataTree, model: Model, said: np.ndarray[Any, Any], cap: float | None
) -> None:
    from dataclasses import replace

    capped = replace(model.unembedding, spec=replace(model.spec, logit_softcap=cap))
    node = captures["activations/hook_resid_post"]
    plain, with_cap = (logit_lens(node, capped, tokens=TOKENS, softcap=softcap) for softcap in (False, True))
    np.testing.assert_allclose(plain["token_probability"], probability(said)[..., TOKENS], rtol=1e-4)
    expected = said if cap is None else cap * np.tanh(said / cap)
    np.testing.assert_allclose(with_cap["token_probability"], probability(expected)[..., TOKENS], rtol=1e-4)
    np.testing.assert_array_equal(plain["token_rank"], with_cap["token_rank"])
    np.testing.assert_array_equal(plain["next_rank"], with_cap["next_rank"])


def test_tokens_that_are_not_there_are_refused(captures: xr.DataTree, model: Model) -> None:
    node = captures["activations/hook_resid_post"]
    with pytest.raises(SchemaError, match="there is no token 300: the vocabulary has 300"):
        logit_lens(node, model.unembedding, tokens=[4, 300])
    for tokens in ([], [4, 4]):
        with pytest.raises(SchemaError, match="at least one id is expected, and each once"):
            logit_lens(node, model.unembedding, tokens=tokens)
    for top in (0, 301):
        with pytest.raises(SchemaError, match="from 1 to 300 can be told"):
            logit_lens(node, model.unembedding, top=top)


# ── first appearance ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [1, 6, 40])
def test_a_token_first_appears_in_the_lowest_layer_whose_strongest_it_is_among(
    captures: xr.DataTree, model: Model, said: np.ndarray[Any, Any], k: int
) -> None:
    order = np.argsort(-said, -1)[..., :k]
    node = captures["activations/hook_resid_post"].to_dataset()
    for wanted in ([int(order[2, 4, 0])], [int(order[1, 7, 0]), int(order[2, 4, 0]), 3]):
        expected = [
            next((float(layer) for layer in range(3) if set(wanted) & set(order[layer, token].tolist())), np.nan)
            for token in range(18)
        ]
        assert np.isfinite(expected).any()
        assert k > 1 or np.isnan(expected).any()
        told = logit_lens(node, model.unembedding, top=k)
        found = first_appearance(told, wanted if len(wanted) > 1 else wanted[0], k)
        assert found.dims == ("token",)
        np.testing.assert_array_equal(found, expected)
        by_rank = first_appearance(logit_lens(node, model.unembedding, top=1, tokens=wanted), wanted, k)
        np.testing.assert_array_equal(by_rank, expected)
        upside_down = logit_lens(node.isel(layer=[2, 0, 1]), model.unembedding, top=k)
        np.testing.assert_array_equal(first_appearance(upside_down, wanted, k), expected)


def test_what_the_lens_does_not_tell_is_refused(captures: xr.DataTree, model: Model) -> None:
    node = captures["activations/hook_resid_post"]
    lens = logit_lens(node, model.unembedding, top=2, tokens=[8])
    with pytest.raises(SchemaError, match="the 2 strongest tokens, not 3: make it with top=3, or with tokens="):
        first_appearance(lens, 9, 3)
    with pytest.raises(SchemaError, match="k = 0"):
        first_appearance(lens, 8, 0)
    with pytest.raises(SchemaError, match="the first of several layers is asked for"):
        first_appearance(lens.isel(layer=0), 8)


# ── what it can be given ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_attn_out"])
def test_whatever_lives_in_the_residual_stream_has_a_lens(captures: xr.DataTree, model: Model, kind: str) -> None:
    node = captures[f"activations/{kind}"]
    lens = logit_lens(node, model.unembedding, top=3)
    assert lens["top_token_id"].dims == ((*(() if kind == "hook_embed" else ("layer",)), "token", "rank"))
    logits = model.unembedding.project_to_vocab(torch.from_numpy(node["value"].values))
    np.testing.assert_array_equal(lens["top_token_id"], logits.topk(3).indices)


@pytest.mark.parametrize("name", ["hook_final_norm", "ln_final.hook_normalized", "ln1.hook_normalized", "mlp.hook_in"])
def test_what_is_normalised_already_is_refused(model: Model, name: str) -> None:
    hook = f"blocks.*.{name}" if name.startswith(("ln1", "mlp")) else name
    node = as_run(model.forward(ROWS, HookSpec().capture(hook)))[f"activations/{name}"]
    with pytest.raises(SchemaError, match=f"{name} is normalised already"):
        logit_lens(node, model.unembedding)


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(run_once: Callable[..., Path]) -> xr.DataTree:
    return forebay.open_run(run_once(capture={"unit_tokens": 96}))


def test_all_variables_come_of_one_reading(run: xr.DataTree, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = logit_lens(run["activations/hook_resid_post"], model.unembedding, tokens=TOKENS)
    lens["first"] = first_appearance(lens, 250, 2)
    n_chunks = run["activations/hook_resid_post"]["value"].data.npartitions
    reads: list[str] = []
    plain = KeptArray._read
    monkeypatch.setattr(KeptArray, "_read", lambda self, key: [reads.append(self.path), plain(self, key)][1])
    lens.compute()
    assert n_chunks > 3
    assert reads.count("hook_resid_post/value") == n_chunks


def test_nothing_is_computed_before_it_is_asked_for(run: xr.DataTree, model: Model) -> None:
    node = run["activations/hook_resid_post"]
    with dask.config.set(scheduler=forbidden):
        lens = logit_lens(node, model.unembedding, tokens=TOKENS)
        first = first_appearance(lens, 250, 20)
        assert first.chunks
    lazily = logit_lens(node.to_dataset().chunk({"token": 61}), model.unembedding, tokens=TOKENS).compute()
    whole = logit_lens(node.to_dataset().compute(), model.unembedding, tokens=TOKENS)
    np.testing.assert_array_equal(lazily["token_rank"], whole["token_rank"])
    np.testing.assert_allclose(lazily["token_probability"], whole["token_probability"], rtol=1e-5)
    np.testing.assert_array_equal(first, first_appearance(whole, 250, 20))


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_probabilities_are_printed_as_precisely_as_they_are_small() -> None:
    shown = {1.0: "100.0%", 0.0123: "1.2%", 0.01: "1.0%", 0.00999: "0.999%", 1e-4: "0.010%", 3.21e-6: "3.2e-04%"}
    assert {value: format_probability(value) for value in shown} == shown


def test_tokens_are_printed_on_one_line() -> None:
    assert format_token(" a\n\tb\r") == " a\\n\\tb\\r"
    assert format_token("zwölf 🐟\x1b[31m") == "zwölf 🐟\\x1b[31m"
