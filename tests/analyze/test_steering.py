"""A dose–response curve is what one forward for each dose gives by hand, and its inversion is linear interpolation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import LlamaForCausalLM

import forebay
from forebay.stages.analyze.steering import (
    DOSE_LEVELS,
    SteeringCalibration,
    _marked,
    calibrate_steering,
    direction_dose_response,
    dose_response,
    edge_attention,
    scale_for_target,
)
from forebay.stages.models.edges import SteeringSpec
from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stores.errors import SchemaError

from ..models.edited import edited_logits
from ..models.rwkv_models import write_pth

IDS = [17, 250, 3, 88, 141, 9, 60, 204, 33, 121, 77]
DOSES = (0.0, 0.5, 1.0, 2.0, 5.0)
LAYER = 1


@pytest.fixture(scope="module")
def theirs(tiny_model: Path) -> LlamaForCausalLM:
    loaded = LlamaForCausalLM.from_pretrained(tiny_model).eval()
    loaded.set_attn_implementation("eager")
    return loaded


def steered_by_hand(pattern: Tensor, edges: list[tuple[int, int]], heads: list[int], scale: float) -> Tensor:
    """Each weight times the scale, each row that is touched over its sum: one number after the other."""
    found = pattern.clone()
    for head in heads:
        for query, key in edges:
            found[0, head, query, key] *= scale
        for query in {query for query, _ in edges}:
            found[0, head, query] /= found[0, head, query].sum()
    return found


def divergence(p: Tensor, q: Tensor) -> float:
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    return float((p * (p / q).log()).sum())


def test_the_edges_of_a_layer_do_not_keep_those_of_the_others(model: Model) -> None:
    marked = _marked(SteeringSpec(edges=[(-1, 0)]), model, LAYER, 11)
    assert marked.shape == (4, 11, 11)
    assert marked.untyped_storage().nbytes() == marked.numel()


@pytest.mark.parametrize("heads", [None, [0, 3]], ids=["every head", "two heads"])
@torch.no_grad()
def test_a_curve_of_attention_is_what_transformers_gives_with_its_pattern_rescaled(
    model: Model, theirs: LlamaForCausalLM, heads: list[int] | None
) -> None:
    edges, all_heads, ids = [(10, 0), (10, 4), (7, 2)], heads or [0, 1, 2, 3], torch.tensor([IDS])
    curve = dose_response(model, IDS, edges, layer=LAYER, heads=heads, doses=DOSES, tokens=[5, 204], position=-2)
    base = theirs(ids).logits[0, -2]
    for dose in DOSES:
        seen: list[Tensor] = []

        def edit(pattern: Tensor, dose: float = dose, seen: list[Tensor] = seen) -> Tensor:
            seen.append(steered_by_hand(pattern, edges, all_heads, dose))
            return seen[-1]

        logits = edited_logits(theirs, ids, f"blocks.{LAYER}.attn.hook_pattern", edit)[0, -2]
        found = curve.sel(dose=dose)
        weights = [float(seen[0][0, head, query, key]) for head in all_heads for query, key in edges]
        assert found["attention"].item() == pytest.approx(np.mean(weights), rel=1e-4, abs=1e-7)
        assert found["kl_divergence"].item() == pytest.approx(divergence(base, logits), rel=2e-3, abs=1e-9)
        np.testing.assert_allclose(found["probability"], logits.softmax(-1)[[5, 204]], rtol=1e-4)
        np.testing.assert_allclose(found["logit_change"], (logits - base)[[5, 204]], atol=3e-5)
    assert curve["attention"].sel(dose=0.0) == 0
    assert curve["attention"].sel(dose=1.0).item() == pytest.approx(curve["baseline_attention"].item(), rel=1e-6)
    np.testing.assert_allclose(curve["baseline_probability"], base.softmax(-1)[[5, 204]], rtol=1e-4)
    assert (curve["kl_divergence"].sel(dose=[0.0, 5.0]) > 1e-6).all()
    assert (curve["attention"].diff("dose") > 0).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_a_curve_does_not_depend_on_how_many_doses_are_run_at_a_time(model: Model, batch_size: int) -> None:
    settings: dict[str, Any] = {"layer": 0, "tokens": 7}
    whole = dose_response(model, IDS, [(-1, 0)], **settings)
    xr.testing.assert_allclose(
        whole, dose_response(model, IDS, [(-1, 0)], batch_size=batch_size, **settings), atol=1e-6
    )
    whole = direction_dose_response(model, IDS, torch.ones(28), **settings)
    some = direction_dose_response(model, IDS, torch.ones(28), batch_size=batch_size, **settings)
    xr.testing.assert_allclose(whole, some, atol=1e-5)


@pytest.mark.parametrize("unit", ["direction", "residual_norm"])
@pytest.mark.parametrize("at", [-1, [2, 9], None], ids=["last", "two", "all"])
@torch.no_grad()
def test_a_curve_of_a_direction_is_what_transformers_gives_with_the_vector_added(
    model: Model, theirs: LlamaForCausalLM, at: Any, unit: Any
) -> None:
    direction = torch.randn(28, generator=torch.Generator().manual_seed(3)) * 0.2
    doses, ids, name = (-1.5, 0.5, 2.0), torch.tensor([IDS]), "blocks.1.hook_resid_post"
    places = {None: list(range(len(IDS))), -1: [10]}.get(at if not isinstance(at, list) else 0, at)
    curve = direction_dose_response(
        model, IDS, direction, layer=1, at=at, unit=unit, doses=doses, tokens=(1, 2, 3), position=10
    )
    plain: list[Tensor] = []
    base = edited_logits(theirs, ids, name, lambda value: plain.append(value.clone()) or value)[0, 10]
    norms = plain[0][0, places].norm(dim=-1)
    for dose in doses:

        def edit(value: Tensor, dose: float = dose) -> Tensor:
            value = value.clone()
            for place, norm in zip(places, norms, strict=True):
                value[0, place] += dose * (direction if unit == "direction" else direction / direction.norm() * norm)
            return value

        logits = edited_logits(theirs, ids, name, edit)[0, 10]
        found = curve.sel(dose=dose)
        assert found["kl_divergence"].item() == pytest.approx(divergence(base, logits), rel=2e-3, abs=1e-8)
        np.testing.assert_allclose(found["probability"], logits.softmax(-1)[[1, 2, 3]], rtol=2e-4)
        np.testing.assert_allclose(found["logit_change"], (logits - base)[[1, 2, 3]], atol=1e-4)
        expected = abs(dose) * (1.0 if unit == "residual_norm" else float((direction.norm() / norms).mean()))
        assert found["relative_norm"].item() == pytest.approx(expected, rel=1e-4)


def test_a_direction_of_a_store_is_taken_with_its_labels_and_words_are_their_last_token(model: Model) -> None:
    direction = xr.DataArray(np.ones(28, np.float32), dims="d_model", coords={"layer": 2})
    curve = direction_dose_response(model, "a truth universally", direction, tokens="man", doses=[1.0])
    assert curve["vocab"].item() == model.tokenizer.find_token_id("man", last=True)
    assert curve["vocab_text"].item() == model.tokenizer.to_str_tokens([curve["vocab"].item()])[0]
    assert curve["layer"].item() == 1  # the middle one of three
    by_id = direction_dose_response(
        model, model.tokenizer.to_tokens("a truth universally"), direction, tokens=curve["vocab"].item(), doses=[1.0]
    )
    xr.testing.assert_identical(curve, by_id)


@torch.no_grad()
def test_edge_attention_is_the_mean_over_edges_and_heads_of_each_prompts_own_pattern(
    model: Model, theirs: LlamaForCausalLM
) -> None:
    prompts = [IDS, IDS[:4], IDS[2:9]]
    found = edge_attention(model, prompts, [(-1, 0), (slice(None), 1)], layer=2, heads=[1, 2], batch_size=2)
    for row, ids in enumerate(prompts):
        pattern = theirs(torch.tensor([ids]), output_attentions=True).attentions[2][0, 1:3]
        weights = [*pattern[:, -1, 0].tolist()]
        weights += [float(pattern[head, query, 1]) for head in range(2) for query in range(1, len(ids))]
        assert found[row].item() == pytest.approx(np.mean(weights), rel=1e-4)
    calibrated = calibrate_steering(model, prompts[:2], prompts[2:], [(-1, 0), (slice(None), 1)], layer=2, heads=[1, 2])
    assert calibrated.source_baseline == pytest.approx(float(found[:2].mean()), rel=1e-5)
    assert calibrated.target_baseline == pytest.approx(float(found[2]), rel=1e-5)
    assert (calibrated.layer, calibrated.n_source, calibrated.n_target) == (2, 2, 1)


# ── calibration and interpolation ────────────────────────────────────────────────────────────────────────────────────


def test_a_calibration_divides_the_source_by_the_target() -> None:
    calibration = SteeringCalibration(source_baseline=0.09, target_baseline=0.025, layer=8, n_source=6, n_target=5)
    assert calibration.ratio == pytest.approx(3.6)
    assert calibration.scale_factor_to_source() == pytest.approx(3.6)
    assert calibration.scale_factor_for_target(0.05) == pytest.approx(2.0)
    assert DOSE_LEVELS == (0.5, 1, 2, 3, 4, 6)
    absolute = calibration.dose_levels_absolute()
    np.testing.assert_allclose(absolute, [0.0125, 0.025, 0.05, 0.075, 0.1, 0.15])
    assert absolute["dose"].values.tolist() == list(DOSE_LEVELS)


def test_a_target_that_attends_to_nothing_has_no_ratio_and_nothing_to_scale() -> None:
    calibration = SteeringCalibration(source_baseline=0.09, target_baseline=1e-11, layer=0)
    assert calibration.ratio == 0
    assert calibration.scale_factor_for_target(0.3) == 1
    with pytest.raises(SchemaError, match="no scale leads from a weight of 1e-11"):
        calibration.renormalized_scale_for_target(0.3)
    with pytest.raises(SchemaError, match=r"to one of 1\.2"):
        SteeringCalibration(source_baseline=0.1, target_baseline=0.5, layer=0).renormalized_scale_for_target(1.2)


def test_the_renormalised_scale_leads_one_edge_of_one_head_to_its_target(model: Model) -> None:
    """Uniform rows: 1/4 scaled by 2 becomes 2/5. And on a model: what is asked for is measured."""
    assert SteeringCalibration(source_baseline=0, target_baseline=0.25, layer=0).renormalized_scale_for_target(
        0.4
    ) == pytest.approx(2.0)
    calibration = calibrate_steering(model, [IDS], [IDS], [(-1, 3)], layer=1, heads=2)
    scale = calibration.renormalized_scale_for_target(0.6)
    curve = dose_response(model, IDS, [(-1, 3)], layer=1, heads=2, doses=[scale])
    assert curve["attention"].item() == pytest.approx(0.6, rel=1e-5)
    naive = dose_response(model, IDS, [(-1, 3)], layer=1, heads=2, doses=[calibration.scale_factor_for_target(0.6)])
    assert naive["attention"].item() < 0.59


def curve_of(values: Any, doses: Any) -> xr.DataArray:
    return xr.DataArray(values, dims=("dose",), coords={"dose": doses}, name="attention")


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ([0.1, 0.2, 0.4, 0.5], 0.3, 2.5),
        ([0.1, 0.2, 0.4, 0.5], 0.1, 1.0),
        ([0.1, 0.2, 0.4, 0.5], 0.5, 5.0),
        ([0.5, 0.4, 0.2, 0.1], 0.25, 2.75),
        ([0.1, 0.5, 0.2, 0.9], 0.3, 1.5),
        ([0.3, 0.3, 0.3, 0.5], 0.3, 3.0),
        ([0.1, 0.2, 0.4, 0.5], 0.6, math.nan),
        ([0.1, math.nan, 0.4, 0.5], 0.2, math.nan),
        ([0.1, math.nan, 0.4, 0.5], 0.45, 4.0),
    ],
)
def test_the_first_adjacent_doses_that_enclose_a_target_are_interpolated(
    values: list[float], target: float, expected: float
) -> None:
    """Either way round, ends included; pairs that do not differ are passed over; NaN where no two enclose it."""
    found = scale_for_target(curve_of(values, [1.0, 2.0, 3.0, 5.0]), target)
    assert found.item() == pytest.approx(expected, nan_ok=True)


def test_doses_are_taken_in_the_order_in_which_they_stand_and_one_alone_encloses_nothing() -> None:
    assert scale_for_target(curve_of([0.1, 0.5, 0.3], [1.0, 4.0, 2.0]), 0.4).item() == pytest.approx(3.25)
    assert math.isnan(scale_for_target(curve_of([0.4], [1.0]), 0.4).item())


def test_other_dimensions_of_a_curve_are_kept_and_a_lazy_one_stays_lazy() -> None:
    values = np.cumsum(np.random.default_rng(0).random((3, 5, 4)), axis=1)
    curve = xr.Dataset(
        {"probability": (("layer", "dose", "vocab"), values)},
        coords={"dose": [1.0, 2.0, 4.0, 5.0, 7.0], "layer": [0, 3, 4]},
    )
    expected = np.array(
        [[np.interp(1.5, row, curve["dose"], left=np.nan, right=np.nan) for row in of.T] for of in values]
    )
    found = scale_for_target(curve, 1.5, variable="probability")
    assert found.dims == ("layer", "vocab")
    np.testing.assert_allclose(found, expected)
    with dask.config.set(scheduler=computes_nothing):
        lazy = scale_for_target(curve.chunk({"dose": 2, "layer": 1}), 1.5, variable="probability")
    np.testing.assert_allclose(lazy.compute(), expected)


def computes_nothing(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("something was computed")


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"doses": []}, SchemaError, "at least one, all of them finite"),
        ({"doses": [1, math.inf]}, SchemaError, "all of them finite"),
        ({"doses": [-1.0]}, HookError, "the scale must be at least 0"),
        ({"edges": [(0, 3)]}, HookError, "carries no weight"),
        ({"edges": []}, HookError, "names no edge"),
        ({"layer": 3}, HookError, "layer=3 is out of range"),
        ({"heads": 4}, HookError, "head=4 is out of range"),
        ({"tokens": 300}, SchemaError, "there is no token 300"),
        ({"tokens": [4, 4]}, SchemaError, "name each once"),
        ({"position": 11}, HookError, "position=11 is out of range"),
        ({"batch_size": 0}, SchemaError, "batch_size = 0"),
        ({"prompt": [[1, 2], [3, 4]]}, SchemaError, "one prompt is expected"),
    ],
    ids=str,
)
def test_what_cannot_be_steered_is_refused_before_anything_is_computed(
    model: Model, given: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    settings = {"prompt": IDS, "edges": [(-1, 0)], **given}
    with pytest.raises(error, match=message):
        dose_response(model, settings.pop("prompt"), settings.pop("edges"), **settings)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"direction": torch.ones(27)}, SchemaError, "a vector of 28 finite numbers"),
        ({"direction": torch.ones(3, 28)}, SchemaError, "choose one"),
        ({"direction": torch.zeros(28)}, SchemaError, "not all 0"),
        ({"hook": "attn.hook_q"}, SchemaError, "at which a token has one vector"),
        ({"hook": "hook_resid_pst"}, SchemaError, "Did you mean 'hook_resid_post'"),
        ({"unit": "residual"}, SchemaError, "Did you mean 'residual_norm'"),
        ({"at": 11}, HookError, "position=11 is out of range"),
    ],
    ids=str,
)
def test_what_cannot_be_added_is_refused_before_anything_is_computed(
    model: Model, given: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    settings = {"direction": torch.ones(28), **given}
    with pytest.raises(error, match=message):
        direction_dose_response(model, IDS, settings.pop("direction"), **settings)


def test_a_curve_without_doses_or_without_the_variable_is_refused() -> None:
    with pytest.raises(SchemaError, match="no variable 'attention'"):
        scale_for_target(curve_of([0.1, 0.2], [1, 2]).to_dataset(name="attentio"), 0.1)
    with pytest.raises(SchemaError, match="lies along doses"):
        scale_for_target(curve_of([0.1, 0.2], [1, 2]).rename(dose="scale"), 0.1)


def test_edges_are_steered_in_transformers_alone_and_directions_in_a_recurrent_model_too(tmp_path: Path) -> None:
    recurrent = forebay.load_model(str(write_pth(tmp_path / "model.pth", 7)), device="cpu")
    with pytest.raises(HookError, match="has no attention"):
        dose_response(recurrent, [1, 2, 3], [(-1, 0)])
    curve = direction_dose_response(recurrent, [1, 2, 3], torch.arange(36), doses=[0.0, 2.0])
    assert curve["kl_divergence"].sel(dose=0.0) < 1e-9
    assert curve["kl_divergence"].sel(dose=2.0) > 1e-5
