"""What is not written to a state is what the equations of RWKV give without it, for every layer and position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import forebay
from forebay.stages.analyze.intervention_effect import intervention_effect
from forebay.stages.analyze.metrics import LogitDifference, LogProbability
from forebay.stages.analyze.state_ablation import state_knockout_effect, state_sweep
from forebay.stages.models.errors import HookError, ModelError
from forebay.stages.models.state_taps import StateKnockout
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..models.rwkv_edits import Rwkv
from ..models.rwkv_naive import run

IDS = [5, 61, 13, 2, 44, 13, 69]
N_LAYERS, N_HEADS = 3, 3


@pytest.fixture(scope="module", params=[6, 7], ids=["RWKV-6", "RWKV-7"])
def rwkv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rwkv:
    return Rwkv.make(request.param, tmp_path_factory.mktemp("rwkv"))


def factors(position: int | list[int], scale: float, heads: Any = slice(None)) -> Tensor:
    """By how much each token's write is multiplied, [position, head]."""
    found = torch.ones(len(IDS), N_HEADS)
    for place in [position] if isinstance(position, int) else position:
        found[place, heads] = scale
    return found


def naive(rwkv: Rwkv, writes: dict[int, Tensor] | None = None) -> Tensor:
    """Logits [position, vocab] of the equations, written out in float64."""
    return run(rwkv.tensors, rwkv.version, IDS, writes=writes).logits


def divergence(base: Tensor, changed: Tensor) -> Tensor:
    p, q = base.softmax(-1), changed.softmax(-1)
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize(("scale", "heads"), [(0.0, None), (2.5, [0, 2])], ids=["knockout", "steering of two heads"])
def test_every_cell_of_a_sweep_is_what_the_equations_give_without_that_write(
    rwkv: Rwkv, scale: float, heads: list[int] | None
) -> None:
    metric = LogitDifference(correct=3, wrong=50)
    found = state_sweep(rwkv.model, IDS, metric=metric, scale=scale, heads=heads, tokens=[9, 60], batch_size=5)
    base = naive(rwkv)[-1]
    assert found["baseline"].item() == pytest.approx(float(base[3] - base[50]), rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(found["baseline_probability"], base.softmax(-1)[[9, 60]], rtol=1e-3)
    chosen = slice(None) if heads is None else heads
    for layer in range(N_LAYERS):
        for place in range(len(IDS)):
            changed = naive(rwkv, {layer: factors(place, scale, chosen)})[-1]
            cell = found.sel(layer=layer, position=place)
            assert cell["kl_divergence"].item() == pytest.approx(float(divergence(base, changed)), rel=0.01, abs=1e-8)
            effect = float((changed[3] - changed[50]) - (base[3] - base[50]))
            assert cell["effect"].item() == pytest.approx(effect, rel=2e-3, abs=3e-5)
            np.testing.assert_allclose(cell["probability"], changed.softmax(-1)[[9, 60]], rtol=1e-3)
            np.testing.assert_allclose(cell["logit_change"], (changed - base)[[9, 60]], atol=3e-5)
    assert found["effect"].dims == ("layer", "position")
    assert (abs(found["effect"][:, :-1]) > 1e-4).any()


def test_of_its_own_write_the_last_token_sees_nothing_in_rwkv_6_and_all_but_its_bonus_in_rwkv_7(rwkv: Rwkv) -> None:
    found = state_sweep(rwkv.model, IDS, positions=-1)["kl_divergence"].values[:, 0]
    assert (found < 1e-9).all() if rwkv.version == 6 else (found > 1e-7).all()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_sweep_of_some_layers_and_positions_is_that_part_of_the_whole(rwkv: Rwkv, batch_size: int) -> None:
    metric = LogProbability(token=4, position=-3)
    whole = state_sweep(rwkv.model, IDS, metric=metric)
    some = state_sweep(rwkv.model, IDS, metric=metric, layers=[2, 0], positions=slice(1, 6, 2), batch_size=batch_size)
    assert some["layer"].values.tolist() == [2, 0]
    assert some["position"].values.tolist() == [1, 3, 5]
    assert some["token_id"].values.tolist() == [61, 2, 13]
    xr.testing.assert_allclose(whole.sel(layer=[2, 0], position=[1, 3, 5]), some, atol=1e-5)
    assert (abs(whole["effect"].sel(position=[5, 6])) < 1e-5).all()  # behind the prediction


def test_a_scale_of_one_changes_nothing(rwkv: Rwkv) -> None:
    found = state_sweep(rwkv.model, IDS, scale=1.0, tokens=[1, 2], metric=LogProbability(token=4))
    assert (found["kl_divergence"] < 1e-10).all()
    assert (abs(found["effect"]) < 1e-5).all()
    effect = state_knockout_effect(rwkv.model, IDS, slice(None), scale=1.0)
    assert (effect["kl_divergence"] < 1e-10).all()


def test_several_tokens_are_left_out_together_in_the_layers_that_are_named(rwkv: Rwkv) -> None:
    found = state_knockout_effect(rwkv.model, IDS, [0, -3], layers=[1, -1], heads=slice(0, 2), top=4)
    writes = {layer: factors([0, 4], 0.0, slice(0, 2)) for layer in (1, 2)}
    base, changed = naive(rwkv), naive(rwkv, writes)
    np.testing.assert_allclose(found["kl_divergence"], divergence(base, changed), rtol=0.01, atol=1e-8)
    change = changed.softmax(-1) - base.softmax(-1)
    largest = change.abs().topk(4).values
    np.testing.assert_allclose(abs(found["probability_change"]), largest, rtol=5e-3, atol=1e-6)
    assert found["token_id"].values.tolist() == IDS
    assert found["kl_divergence"].dims == ("position",)


def test_a_knockout_is_that_of_state_knockout_in_every_layer(rwkv: Rwkv) -> None:
    found = state_knockout_effect(rwkv.model, torch.tensor([IDS]), 2)
    hooks = HookSpec().intervene("blocks.*.rwkv.hook_state", StateKnockout().at(position=2))
    by_hand = intervention_effect(rwkv.model, [IDS], hooks).isel(sequence=0)
    for name in ("kl_divergence", "top_token_id", "probability_change", "logit_difference"):
        np.testing.assert_array_equal(found[name], by_hand[name])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"layers": 3}, HookError, "layer=3 is out of range"),
        ({"positions": [0, 7]}, HookError, "position=7 is out of range"),
        ({"positions": []}, HookError, "names nothing"),
        ({"heads": 3}, HookError, "head=3 is out of range"),
        ({"scale": float("inf")}, SchemaError, "must be finite"),
        ({"tokens": 70}, SchemaError, "there is no token 70"),
        ({"metric": LogProbability(token=4, position=7)}, HookError, "position=7 is out of range"),
        ({"batch_size": 0}, SchemaError, "batch_size = 0"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_before_anything_is_computed(
    rwkv: Rwkv, given: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(error, match=message):
        state_sweep(rwkv.model, IDS, **given)


def test_a_model_that_is_not_recurrent_has_no_states_to_write_to(tiny_model: Path) -> None:
    model = forebay.load_model(str(tiny_model), device="cpu")
    with pytest.raises(ModelError, match=r"\(llama\) is not recurrent"):
        state_sweep(model, IDS)
    with pytest.raises(ModelError, match="is not recurrent"):
        state_knockout_effect(model, IDS, 0)
