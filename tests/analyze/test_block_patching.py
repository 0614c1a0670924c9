"""A block of layers takes the counterfactual's stream at one position, and what the model then says is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.analyze.block_patching import block_patching, map_positions
from forebay.stages.models.errors import HookError, ModelError
from forebay.stages.models.model import Model
from forebay.stores.errors import SchemaError

from . import patched_llama
from .laziness import forbidden

ORIGINAL = [[7, 31, 250, 8, 99, 12], [1, 77, 5, 200]]
COUNTERFACTUAL = [[7, 30, 8, 99, 12], [2, 77, 6, 3, 9, 200]]
MAPS = [[0, 1, 1, 2, 3, 4], [0, 4, 2, 5]]

FACTS = ["Mr. Bennet is a single man", "Netherfield Park is let"]
OTHERS = ["Mrs. Long wants", "My dear Mr. Bennet is surprised at last"]
TEMPLATE = "\n\nDo you know who?"


def divergence(base: Tensor, other: Tensor) -> float:
    log_p, log_q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


@pytest.mark.parametrize("kind", ["hook_resid_post", "hook_mlp_out"])
@pytest.mark.parametrize(("block_size", "blocks"), [(1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (9, [[0, 1, 2]])])
def test_every_cell_is_the_run_with_a_block_replaced_by_hand(
    kind: str, block_size: int, blocks: list[list[int]], model: Model, eager: LlamaForCausalLM
) -> None:
    result = block_patching(
        model, ORIGINAL, COUNTERFACTUAL, block_size=block_size, hook=kind, position_map=MAPS, batch_size=5
    )
    assert dict(result.sizes) == {"pair": 2, "block": len(blocks), "position": 6}
    assert result["first_layer"].values.tolist() == [block[0] for block in blocks]
    assert result["last_layer"].values.tolist() == [block[-1] for block in blocks]
    for pair, (ids, others, places) in enumerate(zip(ORIGINAL, COUNTERFACTUAL, MAPS, strict=True)):
        base, other = (patched_llama.run(eager, row, {}) for row in (ids, others))
        own = result.sel(pair=pair)
        assert int(own["original_top_token_id"]) == int(base.argmax())
        assert int(own["counterfactual_top_token_id"]) == int(other.argmax())
        assert float(own["counterfactual_kl_divergence"]) == pytest.approx(divergence(base, other), rel=1e-3)
        states = {layer: patched_llama.seen(eager, others, (kind, layer)) for layer in range(3)}
        for number, block in enumerate(blocks):
            for position, place in enumerate(places):
                edits = {(kind, layer): patched_llama.put(states[layer][place], position) for layer in block}
                patched = patched_llama.run(eager, ids, edits)
                cell = own.sel(block=number, position=position)
                assert float(cell["kl_divergence"]) == pytest.approx(divergence(base, patched), rel=1e-3, abs=1e-6)
                assert int(cell["top_token_id"]) == int(patched.argmax())
                assert float(cell["changed"]) == float(patched.argmax() != base.argmax())
        beyond = own.sel(position=slice(len(ids), None))
        assert np.isnan(beyond["kl_divergence"]).all()
        assert np.isnan(beyond["changed"]).all()
        assert (beyond["top_token_id"] == -1).all()
    assert 0 < float(result["changed"].mean()) < 1


def test_prompts_of_equal_lengths_are_patched_position_by_position(model: Model) -> None:
    equal = [[*row[:2], 44, *row[3:]] for row in ORIGINAL]
    result = block_patching(model, ORIGINAL, equal, block_size=2)
    mapped = block_patching(model, ORIGINAL, equal, block_size=2, position_map=[list(range(len(row))) for row in equal])
    xr.testing.assert_identical(result, mapped)
    np.testing.assert_allclose(result["kl_divergence"].sel(position=[0, 1]), 0, atol=1e-9)
    last = result.isel(block=1, position=5).sel(pair=0)
    assert float(last["kl_divergence"]) == pytest.approx(float(last["counterfactual_kl_divergence"]), rel=1e-4)
    assert int(last["top_token_id"]) == int(last["counterfactual_top_token_id"])


def test_a_prompt_in_place_of_itself_changes_nothing(model: Model) -> None:
    result = block_patching(model, ORIGINAL, ORIGINAL, block_size=2)
    real = result["token_id"] >= 0
    np.testing.assert_allclose(result["kl_divergence"].where(real, 0), 0, atol=1e-9)
    assert float(result["changed"].sum()) == 0
    np.testing.assert_allclose(result["counterfactual_kl_divergence"], 0, atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_results_do_not_depend_on_how_many_runs_share_a_forward(batch_size: int, model: Model) -> None:
    one, other = (
        block_patching(model, ORIGINAL, COUNTERFACTUAL, block_size=2, position_map=MAPS, batch_size=size)
        for size in (32, batch_size)
    )
    xr.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# ── positions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_up_to_the_end_of_a_fact_positions_are_the_same_and_after_it_count_from_the_end() -> None:
    assert map_positions(7, 9, fact=[1, 2, 3]) == [0, 1, 2, 3, 6, 7, 8]
    assert map_positions(7, 5, fact=[0, 1, 2, 3]) == [0, 1, 2, 3, 2, 3, 4]
    assert map_positions(4, 4, fact=[0]) == [0, 1, 2, 3]
    assert map_positions(6, 2, fact=[0, 1, 2, 3]) == [0, 1, 1, 1, 0, 1]
    with pytest.raises(SchemaError, match="the fact has no token"):
        map_positions(4, 5, fact=[])


def test_texts_with_a_fact_are_mapped_and_labelled_by_it(model: Model) -> None:
    original, counterfactual = ([fact + TEMPLATE for fact in facts] for facts in (FACTS, OTHERS))
    result = block_patching(model, original, counterfactual, spans=[{"fact": fact} for fact in FACTS])
    ids = [[model.tokenizer.to_tokens(text)[0].tolist() for text in texts] for texts in (original, counterfactual)]
    template = len(model.tokenizer.to_tokens(TEMPLATE)[0])
    for pair, (own, other) in enumerate(zip(*ids, strict=True)):
        assert len(own) != len(other)
        n_fact = len(own) - template
        labels = ["fact"] * (n_fact - 1) + ["fact_final"] + ["other"] * template
        here = result.sel(pair=pair, position=slice(0, len(own) - 1))
        assert here["token_type"].values.tolist() == labels
        places = [min(at, len(other) - 1) for at in range(n_fact)]
        places += range(len(other) - template, len(other))
        assert here["counterfactual_position"].values.tolist() == places
        assert here["token_id"].values.tolist() == own
        assert here["counterfactual_token_id"].values.tolist() == [other[place] for place in places]
        assert here["token_id"].values.tolist()[n_fact:] == here["counterfactual_token_id"].values.tolist()[n_fact:]
        assert here["token_text"].values.tolist() == model.tokenizer.to_str_tokens(original[pair])
        texts = model.tokenizer.to_str_tokens(counterfactual[pair])
        assert here["counterfactual_token_text"].values.tolist() == [texts[place] for place in places]


def test_shares_by_type_of_token_are_means_of_what_changed(model: Model) -> None:
    original, counterfactual = ([fact + TEMPLATE for fact in facts] for facts in (FACTS, OTHERS))
    spans = [{"fact": fact} for fact in FACTS]
    result = block_patching(model, original, counterfactual, spans=spans, block_size=1)
    shares = result["changed"].groupby("token_type").mean()
    for name in ("fact", "fact_final", "other"):
        for block in range(3):
            own = result["changed"].values[:, block][result["token_type"].values == name]
            assert float(shares.sel(token_type=name, block=block)) == pytest.approx(own.mean())


def test_texts_alone_are_of_no_type(model: Model) -> None:
    result = block_patching(model, FACTS[0], FACTS[0])
    assert set(result["token_type"].values.ravel()) == {"other"}
    assert result["changed"].attrs["units"] == "fraction"
    assert result["kl_divergence"].attrs["units"] == "nats"
    assert (result.attrs["hook"], result.attrs["block_size"]) == ("hook_resid_post", 4)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"position_map": None}, SchemaError, "pair 0 have 6 and 5 tokens: give a position_map, or spans"),
    ({"position_map": MAPS[:1]}, SchemaError, "2 pairs and maps of 1"),
    ({"position_map": [MAPS[0][:5], MAPS[1]]}, SchemaError, "map of pair 0 .* each of the 6 positions"),
    ({"position_map": [[0, 1, 1, 2, 3, 5], MAPS[1]]}, SchemaError, "map of pair 0 .*0 to 4"),
    ({"counterfactual": COUNTERFACTUAL[:1]}, SchemaError, "2 original prompts and 1 counterfactual"),
    ({"hook": "attn.hook_z"}, HookError, "attn.hook_z is not one vector a position"),
    ({"hook": "hook_embed"}, HookError, "hook_embed is not one vector"),
    ({"hook": "hook_resid"}, HookError, "no kind of hook point 'hook_resid'"),
    ({"block_size": 0}, SchemaError, "block_size = 0"),
    ({"batch_size": 0}, SchemaError, "batch_size = 0"),
    ({"spans": [{}]}, SchemaError, "2 original prompts and spans of 1"),
    ({"spans": [{}, {}]}, SchemaError, "spans are those of texts"),
    ({"original": FACTS, "spans": [{"fact": "Paris"}, {}]}, ModelError, "'Paris' does not occur"),
]


@pytest.mark.parametrize(("changed", "error", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    changed: dict[str, Any], error: type[Exception], said: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "forward", forbidden)
    asked: dict[str, Any] = {"original": ORIGINAL, "counterfactual": COUNTERFACTUAL, "position_map": MAPS, **changed}
    with pytest.raises(error, match=said):
        block_patching(model, **asked)


def test_a_map_may_be_a_tensor(model: Model) -> None:
    maps: Any = [torch.tensor(places) for places in MAPS]
    found = block_patching(model, ORIGINAL, COUNTERFACTUAL, position_map=maps)
    xr.testing.assert_identical(found, block_patching(model, ORIGINAL, COUNTERFACTUAL, position_map=MAPS))


def test_spans_of_one_pair_may_stand_alone(model: Model) -> None:
    settings: dict[str, Any] = {"block_size": 2}
    text, other = "truth is so well fixed", "truth was so well fixed"
    one = block_patching(model, text, other, spans={"fact": "truth is"}, **settings)
    xr.testing.assert_identical(one, block_patching(model, text, other, spans=[{"fact": "truth is"}], **settings))
