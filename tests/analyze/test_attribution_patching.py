"""Estimates are gradients times differences, taken by hand from transformers; exact where the model is linear."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

import forebay
from forebay.stages.analyze.activation_patching import activation_patching
from forebay.stages.analyze.attribution_patching import attribution_patching, patching_agreement
from forebay.stages.analyze.metrics import Logit, LogitDifference, LogProbability, Metric
from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stages.models.points import dims_of
from forebay.stores.errors import SchemaError

from ..dictionaries.feature_models import in_float64
from ..models.rwkv_models import write_pth
from .hooked_llama import Place, run
from .laziness import forbidden

CLEAN = [[7, 31, 250, 8, 99, 12], [1, 77, 5, 200], [9, 8, 7, 6, 5]]
CORRUPTED = [[7, 30, 251, 8, 98, 12], [2, 77, 6, 200], [9, 80, 7, 6, 5]]
METRIC = LogitDifference(correct=[17, 40, 2], wrong=[230, 41, 3])
KINDS = ("hook_resid_pre", "attn.hook_z", "attn.hook_v", "hook_mlp_out")
E = 10


def metric_by_hand(logits: Tensor, number: int) -> Tensor:
    return logits[-1, METRIC.correct[number]] - logits[-1, METRIC.wrong[number]]  # type: ignore[index]


def gradients_by_hand(
    folder: Path, prompt: list[int], number: int, embedded: Tensor | None = None
) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
    """What is at every place of a run, [position, …], and the metric's gradient there."""
    places = [(kind, layer) for kind in KINDS for layer in range(3)]
    edits = {} if embedded is None else {("hook_resid_pre", 0): lambda value: value - value.detach() + embedded}
    logits, kept = run(folder, prompt, edits, places, gradients=True)
    metric_by_hand(logits, number).backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for place, value in kept.items():
        assert value.grad is not None
        gradients[place] = value.grad[0]
    return {place: value.detach()[0] for place, value in kept.items()}, gradients


def expected(folder: Path, base: list[int], source: list[int], number: int) -> dict[Place, Tensor]:
    """Gradient in the base run · (source − base), by place [position, …], unsummed."""
    own, gradients = gradients_by_hand(folder, base, number)
    other, _ = gradients_by_hand(folder, source, number)
    return {place: gradients[place] * (other[place] - own[place]) for place in own}


def summed(kind: str, effect: Tensor) -> Tensor:
    """Over what a site holds: [head, position] of heads, [position] of vectors."""
    if "head" in dims_of(kind) or "kv_head" in dims_of(kind):
        return effect.unflatten(-1, (-1, E)).sum(-1).T
    return effect.sum(-1)


# ── what is estimated ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("batch_size", [8, 2])
def test_an_estimate_is_the_gradient_times_the_difference(
    model: Model, tiny_model: Path, direction: Any, batch_size: int
) -> None:
    found = attribution_patching(
        model, CLEAN, CORRUPTED, METRIC, hooks=KINDS, direction=direction, batch_size=batch_size
    )
    bases, sources = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
    assert found["attn.hook_z"].dims == ("pair", "layer", "head", "position")
    assert found["attn.hook_v"].dims == ("pair", "layer", "kv_head", "position")
    assert found["hook_resid_pre"].dims == ("pair", "layer", "position")
    for number, (base, source) in enumerate(zip(bases, sources, strict=True)):
        start = float(metric_by_hand(run(tiny_model, base)[0], number))
        for name, prompt in (("clean", CLEAN[number]), ("corrupted", CORRUPTED[number])):
            value = float(metric_by_hand(run(tiny_model, prompt)[0], number))
            np.testing.assert_allclose(found[name][number], value, rtol=1e-4)
        for (kind, layer), effect in expected(tiny_model, base, source, number).items():
            here = found[kind][number].sel(layer=layer)
            np.testing.assert_allclose(
                here[..., : len(base)], start + summed(kind, effect), rtol=2e-4, atol=2e-4, err_msg=f"{kind} {layer}"
            )
            assert np.isnan(here[..., len(base) :]).all()
            assert here.dtype == np.float32


def test_positions_together_are_the_sum_of_those_asked_for(model: Model) -> None:
    settings: dict[str, Any] = {"hooks": ["attn.hook_z", "hook_mlp_out"], "positions": [-1, 1], "layers": [2, 1]}
    single = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **settings)
    both = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **settings, by_position=False)
    assert single["position"].values.tolist() == [-1, 1]
    assert single["layer"].values.tolist() == [2, 1]
    for kind in settings["hooks"]:
        moved = (single[kind] - single["corrupted"]).sum("position")
        np.testing.assert_allclose(both[kind] - both["corrupted"], moved, atol=2e-5)
    every = attribution_patching(model, CLEAN, CORRUPTED, METRIC, hooks=["hook_mlp_out"])
    last = [every["hook_mlp_out"][n, :, len(CLEAN[n]) - 1] for n in range(3)]
    np.testing.assert_allclose(single["hook_mlp_out"].sel(position=-1, layer=[1, 2]), np.stack(last)[:, 1:], atol=2e-5)


def test_heads_add_up_to_attention_which_adds_up_its_heads(model: Model) -> None:
    """Attention's output is linear in what its heads give, and in the pattern-weighted values."""
    found = attribution_patching(
        model, CLEAN, CORRUPTED, METRIC, hooks=["attn.hook_z", "attn.hook_result", "hook_attn_out"]
    )
    moved = found - found["corrupted"]
    for kind in ("attn.hook_z", "attn.hook_result"):
        np.testing.assert_allclose(moved[kind].sum("head", skipna=False), moved["hook_attn_out"], atol=2e-4)
    np.testing.assert_allclose(moved["attn.hook_z"], moved["attn.hook_result"], atol=2e-4)


def test_patterns_and_scores_are_estimated_by_head_and_hidden_keys_move_nothing(model: Model) -> None:
    kinds = ["attn.hook_pattern", "attn.hook_attn_scores"]
    found = attribution_patching(model, CLEAN, CORRUPTED, METRIC, hooks=kinds)
    exact = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=kinds)
    for kind in kinds:
        assert found[kind].dims == exact[kind].dims == ("pair", "layer", "head")
        assert np.isfinite(found[kind]).all()
    agreement = patching_agreement(exact, found)
    assert (agreement["pearson"] > 0.5).all()


# ── where it is exact ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["hook_final_norm", "ln_final.hook_normalized"])
def test_what_the_logits_are_linear_in_is_estimated_exactly(model: Model, tiny_model: Path, kind: str) -> None:
    """Behind the final norm a patch moves a logit by its row of the unembedding times the difference."""
    metric = Logit(token=[17, 40, 2])
    found = attribution_patching(model, CLEAN, CORRUPTED, metric, hooks=[kind])
    exact = activation_patching(model, CLEAN, CORRUPTED, metric, hooks=[kind])
    np.testing.assert_allclose(found[kind], exact[kind], rtol=1e-5, atol=1e-5)
    for number, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        ends = [float(run(tiny_model, prompt)[0][-1, metric.token[number]]) for prompt in (clean, corrupted)]  # type: ignore[index]
        np.testing.assert_allclose(found[kind][number, len(clean) - 1], ends[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[kind][number, : len(clean) - 1], ends[1], rtol=1e-4, atol=1e-4)


def test_an_estimate_tends_to_the_patch_as_the_runs_draw_near(model: Model) -> None:
    """Its error falls with the square of the difference, the effect itself with the difference."""
    wide = in_float64(model)
    delta = torch.randn(28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kinds = ["hook_resid_pre", "attn.hook_z", "attn.hook_k", "mlp.hook_post", "attn.hook_pattern"]
    errors, effects = [], []
    for size in (0.02, 0.01):
        embed = wide.weights.embed.clone()
        embed[251] = embed[250] + size * delta
        near = Model(wide.spec, dataclasses.replace(wide.weights, embed=embed), wide.device, wide.dtype)
        settings: dict[str, Any] = {"hooks": kinds, "metric": LogProbability(token=17)}
        pair = [[7, 31, 250, 8, 99]], [[7, 31, 251, 8, 99]]
        exact = activation_patching(near, *pair, **settings)
        found = attribution_patching(near, *pair, **settings)
        errors.append([float(abs(exact[kind] - found[kind]).max()) for kind in kinds])
        effects.append([float(abs(exact[kind] - exact["corrupted"]).max()) for kind in kinds])
        assert (patching_agreement(exact, found)["pearson"] > 0.9).all()
    for small, large in zip(errors[1], errors[0], strict=True):
        assert small < 0.4 * large + 1e-5
    for small, large in zip(effects[1], effects[0], strict=True):
        assert 0.3 * large < small < 0.7 * large


# ── integrated gradients ─────────────────────────────────────────────────────────────────────────────────────────────


def test_integrated_gradients_are_means_of_those_on_the_way_from_one_embedding_to_the_other(
    model: Model, tiny_model: Path
) -> None:
    found = attribution_patching(model, CLEAN, CORRUPTED, METRIC, hooks=KINDS, steps=3)
    for number, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        own, _ = gradients_by_hand(tiny_model, corrupted, number)
        other, _ = gradients_by_hand(tiny_model, clean, number)
        start, end = own["hook_resid_pre", 0], other["hook_resid_pre", 0]
        parts = [gradients_by_hand(tiny_model, corrupted, number, start + k / 3 * (end - start))[1] for k in (1, 2, 3)]
        base = float(metric_by_hand(run(tiny_model, corrupted)[0], number))
        for kind, layer in own:
            gradient = torch.stack([part[kind, layer] for part in parts]).mean(0)
            effect = summed(kind, gradient * (other[kind, layer] - own[kind, layer]))
            here = found[kind][number].sel(layer=layer)[..., : len(clean)]
            np.testing.assert_allclose(here, base + effect, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("version", [None, 7])
def test_integrated_gradients_of_the_embedding_add_up_to_the_whole_difference(
    model: Model, tmp_path: Path, version: int | None
) -> None:
    """Completeness, of whatever architecture: Sundararajan, Taly and Yan (2017)."""
    metric: Metric = METRIC
    clean, corrupted = CLEAN, CORRUPTED
    if version is not None:
        model = forebay.load_model(write_pth(tmp_path / "model.pth", version), device="cpu")
        clean, corrupted = ([[token % 70 for token in row] for row in rows] for rows in (clean, corrupted))
        metric = LogitDifference(correct=[17, 40, 2], wrong=[30, 41, 3])
    gaps = []
    for steps in (4, 32):
        found = attribution_patching(model, clean, corrupted, metric, hooks=["hook_embed"], steps=steps)
        assert found.attrs["steps"] == steps
        moved = (found["hook_embed"] - found["corrupted"]).sum("position")
        gaps.append(float(abs(moved - (found["clean"] - found["corrupted"])).max()))
    whole = float(abs(found["clean"] - found["corrupted"]).max())
    assert gaps[1] < 0.06 * whole
    assert gaps[1] < 0.4 * gaps[0]


# ── what it takes, and its agreement with patching ───────────────────────────────────────────────────────────────────


def test_all_sites_take_two_forwards_and_one_backward(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, backwards = [], []
    run_model, differentiate = Model._run, torch.autograd.grad
    monkeypatch.setattr(Model, "_run", lambda self, *args: forwards.append(1) or run_model(self, *args))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or differentiate(*a, **k))
    attribution_patching(model, CLEAN, CORRUPTED, METRIC, hooks=KINDS)
    assert (len(forwards), len(backwards)) == (2, 1)
    attribution_patching(model, CLEAN, CORRUPTED, METRIC, hooks=KINDS, steps=5)
    assert (len(forwards), len(backwards)) == (2 + 7, 1 + 5)


def test_it_gives_what_activation_patching_gives_but_for_the_values(model: Model) -> None:
    settings: dict[str, Any] = {"hooks": ["hook_resid_pre", "attn.hook_z"], "positions": [0, -1]}
    exact = activation_patching(model, CLEAN, CORRUPTED, METRIC, **settings)
    found = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **settings)
    assert set(found.data_vars) == set(exact.data_vars)
    assert set(found.coords) == set(exact.coords)
    for name, variable in exact.variables.items():
        assert found[name].dims == variable.dims
        assert found[name].attrs.get("units") == variable.attrs.get("units")
    xr.testing.assert_allclose(found[["clean", "corrupted"]], exact[["clean", "corrupted"]], rtol=1e-4)
    assert found["attn.hook_z"].attrs["long_name"].endswith("estimated by gradients")


def results(shape: tuple[int, ...] = (3, 4, 5)) -> tuple[xr.Dataset, xr.Dataset]:
    """Two results that agree in part, with ties, zeros and NaN."""
    random = np.random.default_rng(0)
    base = random.normal(size=shape[0])
    moved = np.round(random.normal(size=shape), 1)
    moved[0, 0] = 0.0
    estimated = 0.7 * moved + 0.4 * random.normal(size=shape)
    moved[1, 2, 3] = estimated[2, 1, 1] = np.nan
    made = []
    for effect in (moved, estimated):
        values = {"hook_resid_pre": (("pair", "layer", "position"), base[:, None, None] + effect)}
        rest = {"clean": ("pair", base + 1), "corrupted": ("pair", base)}
        attrs = {"direction": "denoising", "metric": "Logit", "metric_position": -1}
        made.append(xr.Dataset({**values, **rest}, attrs=attrs))
    return made[0], made[1]


def test_agreement_is_that_of_scipy_over_all_sites_that_both_have() -> None:
    exact, found = results()
    agreement = patching_agreement(exact, found).sel(kind="hook_resid_pre")
    x, y = (np.round((r["hook_resid_pre"] - r["corrupted"]).values.ravel(), 12) for r in (exact, found))
    both = ~np.isnan(x) & ~np.isnan(y)
    x, y = x[both], y[both]
    touched = (x != 0) | (y != 0)
    x, y = x[touched], y[touched]
    assert int(agreement["n_site"]) == len(x)
    np.testing.assert_allclose(agreement["pearson"], stats.pearsonr(x, y).statistic, rtol=1e-9)
    np.testing.assert_allclose(agreement["slope"], stats.linregress(x, y).slope, rtol=1e-9)
    signed = x != 0
    np.testing.assert_allclose(agreement["spearman"], stats.spearmanr(x, y).statistic, atol=0.02)
    assert float(agreement["sign_agreement"]) == pytest.approx((np.sign(x) == np.sign(y))[signed].mean(), abs=0.1)


def test_a_result_agrees_with_itself_and_one_that_moves_nothing_says_nothing() -> None:
    exact, _ = results()
    same = patching_agreement(exact, exact).isel(kind=0)
    for name in ("pearson", "spearman", "slope", "sign_agreement"):
        assert float(same[name]) == pytest.approx(1.0)
    still = exact.assign(hook_resid_pre=exact["corrupted"].broadcast_like(exact["hook_resid_pre"]))
    none = patching_agreement(still, exact).isel(kind=0)
    assert all(np.isnan(none[name]) for name in ("pearson", "spearman", "slope", "sign_agreement"))


def test_sites_that_both_leave_alone_count_for_nothing() -> None:
    """Where the prompts do not differ yet an estimate is 0 and a measured effect is rounding, of either sign."""
    exact, found = results()
    apart = patching_agreement(exact, found).isel(kind=0)
    rounding = np.random.default_rng(1).normal(size=(3, 20, 5)) * 1e-6
    base = exact["corrupted"].values[:, None, None]
    wider = [
        xr.Dataset(
            {
                "hook_resid_pre": (dims := ("pair", "layer", "position"), np.concatenate([values, base + more], 1)),
                "clean": one["clean"],
                "corrupted": one["corrupted"],
            },
            attrs=one.attrs,
        )
        for one, values, more in (
            (exact, exact["hook_resid_pre"].values, rounding),
            (found, found["hook_resid_pre"].values, np.zeros((3, 20, 5))),
        )
    ]
    assert dims == exact["hook_resid_pre"].dims
    together = patching_agreement(*wider).isel(kind=0)
    for name in apart.data_vars:
        assert float(together[name]) == pytest.approx(float(apart[name]), rel=1e-6)


def test_results_of_the_same_size_at_other_layers_or_of_other_prompts_are_not_compared() -> None:
    exact, found = (one.assign_coords(layer=[0, 1, 2, 3]) for one in results())
    with pytest.raises(SchemaError, match="their layer differ"):
        patching_agreement(exact, found.assign_coords(layer=[20, 21, 22, 23]))
    ids = ("pair", "position"), np.arange(15).reshape(3, 5)
    with pytest.raises(SchemaError, match="their token_id differ"):
        patching_agreement(exact.assign_coords(token_id=ids), found.assign_coords(token_id=(ids[0], ids[1] + 1)))
    turned = found.transpose("position", "layer", "pair")
    xr.testing.assert_allclose(patching_agreement(exact, turned), patching_agreement(exact, found))


def test_results_of_other_sites_directions_or_metrics_are_not_compared() -> None:
    exact, found = results()
    with pytest.raises(SchemaError, match="results of the same sites are compared, and hook_resid_pre is"):
        patching_agreement(exact, found.isel(layer=slice(2)))
    with pytest.raises(SchemaError, match=r"and hook_resid_pre is .* and None"):
        patching_agreement(exact, found.rename(hook_resid_pre="hook_mlp_out"))
    with pytest.raises(SchemaError, match="same direction are compared, not of denoising and noising"):
        patching_agreement(exact, found.assign_attrs(direction="noising"))
    with pytest.raises(SchemaError, match="same metric are compared, not of Logit and Probability"):
        patching_agreement(exact, found.assign_attrs(metric="Probability"))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"direction": "forwards"}, SchemaError, "direction = 'forwards' is unknown"),
        ({"steps": 0}, SchemaError, "steps = 0: at least 1"),
        ({"batch_size": 0}, SchemaError, "batch_size = 0"),
        ({"corrupted": CORRUPTED[:2]}, SchemaError, "3 clean prompts and 2 corrupted"),
        ({"hooks": ["hook_resid"]}, HookError, "no kind of hook point 'hook_resid'"),
        ({"hooks": ["hook_logits"]}, HookError, "hook_logits cannot be patched"),
        ({"layers": [5]}, HookError, "0 to 2"),
        ({"positions": [4]}, SchemaError, "no position 4 in pair 1"),
        ({"metric": Logit(token=[1, 2])}, SchemaError, "2 tokens, and there are more prompts"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    model: Model, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(Model, "forward", forbidden)
    settings = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC} | changed
    with pytest.raises(error, match=message):
        attribution_patching(model, **settings)
