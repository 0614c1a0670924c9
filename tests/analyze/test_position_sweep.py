"""A sweep is one run a position, each with the edit written out by hand in transformers' own model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from forebay.stages.analyze.metrics import Logit, LogProbability, Probability
from forebay.stages.analyze.position_sweep import position_sweep
from forebay.stages.dictionaries.interventions import Clamp, Inject, Suppress
from forebay.stages.dictionaries.transcoders import FeatureId, TranscoderSet
from forebay.stages.models.errors import HookError
from forebay.stages.models.interventions import Add, Zero
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..dictionaries.feature_models import InMemory, dictionary_of, set_of
from .hooked_llama import Edit, Place, run
from .laziness import forbidden

PROMPT = [5, 71, 8, 130, 44, 9, 280]
TOKEN = 17
D = 28
N_FEATURES = (5, 7, 6)
SUPPRESSED = {FeatureId(0, 1): -3.0, FeatureId(1, 4): -3.0}
INJECTED = {FeatureId(1, 6): 3.0}
METRICS = [Probability(token=TOKEN), Logit(token=TOKEN), LogProbability(token=TOKEN)]


def transcoders(cross_layer: bool = True) -> TranscoderSet:
    """It reads the stream between attention and MLP and writes what the MLP adds."""
    return set_of(D, N_FEATURES, cross_layer=cross_layer, hook_out="hook_mlp_out", dtype=torch.float32)


def reader(of: TranscoderSet) -> InMemory:
    assert isinstance(of.reader, InMemory)
    return of.reader


def added(of: TranscoderSet, strengths: Mapping[FeatureId, float], position: int, kind: str) -> dict[Place, Edit]:
    """Σ strength · decoder row of features, in every layer that they write in, at one position."""
    rows: dict[int, Tensor] = {}
    for feature, strength in strengths.items():
        for target in of.targets(feature.layer):
            row = strength * reader(of).decoders[feature.layer, target][feature.index].float()
            rows[target] = rows.get(target, torch.zeros(D)) + row

    def add(value: Tensor, row: Tensor) -> Tensor:
        value[position] += row
        return value

    return {(kind, target): lambda value, row=row: add(value, row) for target, row in rows.items()}


def clamped(of: TranscoderSet, values: Mapping[FeatureId, float], position: int) -> dict[Place, Edit]:
    """(value − activation) · decoder row, the activation being what is found when the run comes there."""
    held: dict[FeatureId, float] = {}
    edits: dict[Place, Edit] = {}

    def read(value: Tensor, layer: int) -> Tensor:
        encoder = reader(of).encoders[layer]
        pre = (value[position].double() - encoder.b_in) @ encoder.W_enc + encoder.b_enc
        held.update({feature: float(pre[feature.index].clamp_min(0)) for feature in values if feature.layer == layer})
        return value

    def write(value: Tensor, target: int) -> Tensor:
        for feature, number in values.items():
            if target in of.targets(feature.layer):
                row = reader(of).decoders[feature.layer, target][feature.index].float()
                value[position] += (number - held[feature]) * row
        return value

    for layer in {feature.layer for feature in values}:
        edits["ln2_in", layer] = lambda value, layer=layer: read(value, layer)
    for target in range(min(feature.layer for feature in values), 3):
        edits["hook_mlp_out", target] = lambda value, target=target: write(value, target)
    return edits


def values_of(logits: Tensor) -> list[float]:
    last = logits[-1]
    return [float(last.softmax(-1)[TOKEN]), float(last[TOKEN]), float(last.log_softmax(-1)[TOKEN])]


def check(found: xr.Dataset, tiny_model: Path, by_position: Mapping[int, Mapping[Place, Edit]]) -> None:
    """Every metric at every position, and its signed difference from the run without edits."""
    baseline = values_of(run(tiny_model, PROMPT)[0])
    moved = 0.0
    for column, edits in enumerate(by_position.values()):
        expected = values_of(run(tiny_model, PROMPT, edits)[0])
        for name, value, base in zip(("probability", "logit", "log_probability"), expected, baseline, strict=True):
            np.testing.assert_allclose(found[name][column], value, rtol=2e-4, atol=1e-6)
            np.testing.assert_allclose(found[f"{name}_baseline"], base, rtol=2e-4)
            np.testing.assert_allclose(found[f"{name}_change"][column], value - base, rtol=2e-3, atol=2e-5)
            moved = max(moved, abs(value - base))
    assert moved > 0.05


# ── what it gives ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["hook_resid_post", None])
def test_constants_suppressed_and_injected_are_added_to_every_layer_written_at_one_position(
    model: Model, tiny_model: Path, where: str | None
) -> None:
    """candle-mi's protocol of Figure 13, whose suppression is a constant that is subtracted whatever fires."""
    of = transcoders()
    found = position_sweep(model, PROMPT, [Inject(of, SUPPRESSED), Inject(of, INJECTED)], metric=METRICS, where=where)
    kind = where or "hook_mlp_out"
    check(found, tiny_model, {p: added(of, {**SUPPRESSED, **INJECTED}, p, kind) for p in range(7)})


@pytest.mark.parametrize("cross_layer", [True, False], ids=["cross-layer", "per layer"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_every_position_clamps_by_the_activations_that_its_own_run_has(
    model: Model, tiny_model: Path, cross_layer: bool, batch_size: int
) -> None:
    """Runs that share a forward do not see each other's."""
    of = transcoders(cross_layer)
    values = {FeatureId(0, 1): 0.0, FeatureId(0, 3): 4.0, FeatureId(1, 4): 0.0}
    edits = [Suppress(of, [FeatureId(0, 1)]), Clamp(of, {FeatureId(0, 3): 4.0}), Suppress(of, [FeatureId(1, 4)])]
    found = position_sweep(model, PROMPT, edits, metric=METRICS, batch_size=batch_size)
    writes = {p: clamped(of, values, p) for p in range(7)}
    if not cross_layer:
        writes = {p: {k: v for k, v in edit.items() if k != ("hook_mlp_out", 2)} for p, edit in writes.items()}
    check(found, tiny_model, writes)


def test_a_dictionary_of_one_point_is_swept_as_well(model: Model, tiny_model: Path) -> None:
    sae = dictionary_of("blocks.1.hook_resid_post", D, kind="jumprelu", dtype=torch.float32)
    found = position_sweep(model, PROMPT, Clamp(sae, {4: 5.0, 30: -2.0}), metric=METRICS, positions=[2, -1])

    def edit(value: Tensor, position: int) -> Tensor:
        assert sae.b_in is not None
        assert sae.activation.threshold is not None
        pre = (value[position] - sae.b_in) @ sae.W_enc + sae.b_enc
        f = pre * (pre > sae.activation.threshold)
        value[position] += (5.0 - f[4]) * sae.W_dec[4] + (-2.0 - f[30]) * sae.W_dec[30]
        return value

    assert found["position"].values.tolist() == [2, 6]
    check(found, tiny_model, {p: {("hook_resid_post", 1): lambda v, p=p: edit(v, p)} for p in (2, 6)})


def test_an_edit_that_names_its_position_stays_there(model: Model, tiny_model: Path) -> None:
    of = transcoders()
    edits = [Inject(of, SUPPRESSED).at(position=-3), Inject(of, INJECTED)]
    found = position_sweep(model, PROMPT, edits, metric=METRICS, where="hook_resid_post", positions=[0, 5])

    def both(p: int) -> dict[Place, Edit]:
        fixed, swept = (added(of, of_one, at, "hook_resid_post") for of_one, at in ((SUPPRESSED, 4), (INJECTED, p)))
        return {
            place: lambda value, place=place: swept.get(place, lambda v: v)(fixed.get(place, lambda v: v)(value))
            for place in {*fixed, *swept}
        }

    check(found, tiny_model, {p: both(p) for p in (0, 5)})


def test_other_interventions_are_swept_too(model: Model, tiny_model: Path) -> None:
    vector = torch.linspace(-2, 2, D)
    hooks = HookSpec().intervene("blocks.*.hook_attn_out", Add(vector)).intervene("blocks.1.hook_mlp_out", Zero())

    def edits(p: int) -> dict[Place, Edit]:
        def add(value: Tensor) -> Tensor:
            value[p] += vector
            return value

        def cut(value: Tensor) -> Tensor:
            value[p] = 0
            return value

        return {("hook_mlp_out", 1): cut} | {("hook_attn_out", layer): add for layer in range(3)}

    check(position_sweep(model, PROMPT, hooks, metric=METRICS), tiny_model, {p: edits(p) for p in range(7)})


def test_what_comes_after_the_position_measured_changes_nothing(model: Model) -> None:
    of = transcoders()
    found = position_sweep(model, PROMPT, Inject(of, INJECTED), metric=Logit(token=TOKEN, position=3))
    assert found.attrs["metric_position"] == 3
    assert (abs(found["logit_change"][4:]) < 1e-5).all()
    assert (abs(found["logit_change"][:4]) > 1e-3).all()


def test_an_opposite_injection_has_the_opposite_sign_where_it_is_small(model: Model) -> None:
    """A signed effect: what pushes a logit up at a position pushes it down with its strength negated."""
    of = transcoders()
    up, down = (
        position_sweep(model, PROMPT, Inject(of, {FeatureId(1, 6): by}), metric=Logit(token=TOKEN))["logit_change"]
        for by in (0.05, -0.05)
    )
    np.testing.assert_allclose(up, -down, rtol=0.2, atol=2e-4)
    assert (up < 0).any()
    assert (up > 0).any()


def test_a_sets_files_are_read_once_however_many_positions_there_are(model: Model) -> None:
    few, many = transcoders(), transcoders()
    for of, positions in ((few, [3]), (many, None)):
        edits = [Suppress(of, list(SUPPRESSED)), Inject(of, INJECTED)]
        position_sweep(model, PROMPT, edits, metric=METRICS[0], positions=positions, batch_size=2)
    assert reader(few).asked == reader(many).asked
    assert sum(asked[0] == "encoder" for asked in reader(many).asked) == 3


# ── labels and refusals ──────────────────────────────────────────────────────────────────────────────────────────────


def test_positions_are_labelled_with_their_tokens(model: Model) -> None:
    text = "You want to tell me"
    ids = model.tokenizer.to_tokens(text)[0].tolist()
    settings: dict[str, Any] = {"metric": METRICS[0], "positions": [-1, 1]}
    found = position_sweep(model, text, Inject(transcoders(), INJECTED), **settings)
    assert found["position"].values.tolist() == [len(ids) - 1, 1]
    assert found["token_id"].values.tolist() == [ids[-1], ids[1]]
    texts = model.tokenizer.to_str_tokens(torch.tensor(ids))
    assert found["token_text"].values.tolist() == [texts[-1], texts[1]]
    xr.testing.assert_identical(found, position_sweep(model, ids, Inject(transcoders(), INJECTED), **settings))


def test_variables_have_units(model: Model) -> None:
    found = position_sweep(model, PROMPT, Inject(transcoders(), INJECTED), metric=METRICS)
    assert found["probability"].dtype == np.float32
    assert found["logit_change"].attrs == {"units": "logit", "long_name": "change by the edits"}
    assert found["probability_baseline"].dims == ()
    assert set(found.data_vars) == {
        f"{name}{of}" for name in ("probability", "logit", "log_probability") for of in ("", "_baseline", "_change")
    }


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"positions": [7]}, SchemaError, "there is no position 7: the prompt has 7 tokens"),
    ({"positions": [6, -1]}, SchemaError, r"positions = \[6, -1\] names none, or one of them twice"),
    ({"positions": []}, SchemaError, "names none"),
    ({"metric": []}, SchemaError, "at least one"),
    ({"metric": [Logit(token=1), Logit(token=2)]}, SchemaError, "different kinds"),
    ({"metric": [Logit(token=1), Probability(token=1, position=2)]}, SchemaError, "measured at the same position"),
    ({"metric": Logit(token=300)}, SchemaError, "no token 300"),
    ({"prompt": [PROMPT, PROMPT]}, SchemaError, "one prompt is expected"),
    ({"edits": Inject(transcoders(), INJECTED).at(position=2)}, SchemaError, "nothing is swept"),
    ({"edits": []}, SchemaError, "nothing is swept"),
    ({"edits": Inject(transcoders(), {FeatureId(1, 7): 1.0})}, HookError, "has features 0 to 6, and no 7"),
    ({"edits": HookSpec().capture("hook_embed")}, HookError, "without captures"),
    ({"edits": HookSpec().intervene("hook_embed", lambda x, point: x)}, HookError, "wrap a function in Apply"),
    ({"edits": HookSpec().intervene("blocks.9.hook_mlp_out", Zero())}, HookError, "0 to 2"),
    ({"edits": HookSpec().intervene("blocks.0.attn.hook_pattern", Zero())}, HookError, "no dimension 'position' here"),
    ({"batch_size": 0}, SchemaError, "batch_size = 0"),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    model: Model, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(Model, "_run", forbidden)
    settings = {"prompt": PROMPT, "edits": Inject(transcoders(), INJECTED), "metric": METRICS[0]} | changed
    with pytest.raises(error, match=message):
        position_sweep(model, **settings)
