"""Features of a set are read in their layer and written in every layer in which the set has them write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay.stages.dictionaries.interventions import Clamp, FeatureIntervention, Inject, Suppress
from forebay.stages.dictionaries.transcoders import FeatureId, TranscoderSet
from forebay.stages.models.forward import Forward
from forebay.stages.models.interventions import Add
from forebay.stages.models.points import HookPoint
from forebay.stages.models.recurrence import Recurrence
from forebay.stages.models.taps import HookSpec

from .feature_edits import LENGTHS, TOKENS, D, logits_differ
from .feature_models import InMemory, model_of, set_of

N_FEATURES = (5, 7, 6, 9)
SAID = {FeatureId(0, 0): 2.0, FeatureId(2, 5): -3.0, FeatureId(0, 4): 1.5, FeatureId(1, 3): 4.0}
CROSS, PER_LAYER = "cross-layer", "per layer"
STREAMS = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]


def transcoders(which: str, **settings: Any) -> TranscoderSet:
    return set_of(D, N_FEATURES, cross_layer=which == CROSS, **settings)


def decoder(of: TranscoderSet, layer: int, target: int) -> Tensor:
    """What features of a layer write at another [feature, d_out]."""
    reader = of.reader
    assert isinstance(reader, InMemory)
    return reader.decoders[layer, target]


def by_hand(
    of: TranscoderSet,
    said: Mapping[FeatureId, float],
    counts: bool,
    where: str | None = None,
    position: int | None = None,
) -> HookSpec:
    """The same edit as plain functions: one at every point that is read and one for each feature and layer written."""
    held: dict[int, Tensor] = {}
    spec = HookSpec()
    for layer in {feature.layer for feature in said}:

        def read(value: Tensor, point: HookPoint, layer: int = layer) -> Tensor:
            held[layer] = of.encoder(layer).encode(value)
            return value

        spec = spec.intervene(of.hooks_in[layer], read)
    for feature, number in said.items():
        for target in of.targets(feature.layer):

            def write(
                value: Tensor,
                point: HookPoint,
                feature: FeatureId = feature,
                number: float = number,
                target: int = target,
            ) -> Tensor:
                row = decoder(of, feature.layer, target)[feature.index]
                change = number - (held[feature.layer][..., feature.index, None] if counts else 0.0)
                added = change * row
                rows = slice(None) if position is None else [length + position for length in LENGTHS]
                keep = torch.zeros(value.shape[:2], dtype=torch.bool)
                keep[range(len(LENGTHS)) if position is not None else slice(None), rows] = True
                return torch.where(keep[..., None], value + added, value)

            spec = spec.intervene(of.hooks_out[target] if where is None else f"blocks.{target}.{where}", write)
    return spec


EDITS: dict[str, tuple[Callable[[TranscoderSet], FeatureIntervention], Mapping[FeatureId, float], bool]] = {
    "Inject": (lambda of: Inject(of, SAID), SAID, False),
    "Clamp": (lambda of: Clamp(of, SAID), SAID, True),
    "Suppress": (lambda of: Suppress(of, list(SAID)), dict.fromkeys(SAID, 0.0), True),
    "features as pairs": (
        lambda of: Clamp(of, {(0, 0): 2.0, (3, 8): 1.0}),
        {FeatureId(0, 0): 2.0, FeatureId(3, 8): 1.0},
        True,
    ),
}


def assert_same_streams(found: Forward, expected: Forward, clean: Forward) -> None:
    """Equal but for rounding after every block, and not what the model gives by itself."""
    for name in STREAMS:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    assert logits_differ(found, expected) < 1e-6
    assert logits_differ(found, clean) > 1e-3


@pytest.mark.parametrize("where", [None, "hook_resid_post"], ids=["at their own points", "into the stream"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("which", [CROSS, PER_LAYER])
def test_an_edit_of_a_sets_features_is_the_one_that_is_written_out(
    which: str, kind: str, edit: str, where: str | None
) -> None:
    """In all layers at once: later ones read what earlier edits made of the stream."""
    model, of = model_of(), transcoders(which, kind=kind)
    make, said, counts = EDITS[edit]
    clean = model.forward(TOKENS)
    for position in (None, -1):
        intervention = make(of) if position is None else make(of).at(position=position)
        found = model.forward(TOKENS, intervention.hooks(where).capture(*STREAMS))
        expected = model.forward(TOKENS, by_hand(of, said, counts, where, position).capture(*STREAMS))
        assert_same_streams(found, expected, clean)


def test_an_injection_across_layers_is_one_vector_added_in_each_of_them() -> None:
    """candle-mi's: Σ strength · row of every feature that writes in a layer, at that layer's residual stream."""
    model, of = model_of(), transcoders(CROSS)
    adds = HookSpec()
    for target in range(4):
        vector = torch.zeros(D, dtype=torch.float64)
        for feature, strength in SAID.items():
            if feature.layer <= target:
                vector += strength * decoder(of, feature.layer, target)[feature.index]
        adds = adds.intervene(f"blocks.{target}.hook_resid_post", Add(vector).at(position=-1))
    found = model.forward(TOKENS, Inject(of, SAID).at(position=-1).hooks(where="hook_resid_post").capture(*STREAMS))
    expected = model.forward(TOKENS, adds.capture(*STREAMS))
    for name in STREAMS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", [CROSS, PER_LAYER])
def test_features_write_in_their_own_and_later_layers_or_in_their_own_alone(which: str) -> None:
    model, of = model_of(), transcoders(which)
    points = [f"blocks.{layer}.mlp.hook_out" for layer in range(4)]
    hooks = Inject(of, {FeatureId(1, 3): 4.0}).hooks()
    assert [str(change.pattern) for change in hooks.changes] == (points[1:] if which == CROSS else points[1:2])
    clean, out = (model.forward(TOKENS, spec.capture(*points)) for spec in (HookSpec(), hooks))
    assert torch.equal(out[points[0]], clean[points[0]])
    added = (out[points[1]] - clean[points[1]]).mean((0, 1))
    torch.testing.assert_close(added, 4 * decoder(of, 1, 1)[3], rtol=0, atol=1e-12)


def test_what_is_read_of_a_set_is_read_once_and_no_more_rows_than_features_are_named() -> None:
    model, of = model_of(), transcoders(CROSS)
    assert isinstance(of.reader, InMemory)
    hooks = Clamp(of, SAID).hooks()
    of_layer = {0: 2, 1: 1, 2: 1}
    expected = [("encoder", layer) for layer in of_layer]
    expected += [("rows", layer, target, n) for layer, n in of_layer.items() for target in range(layer, 4)]  # type: ignore[misc]
    assert sorted(of.reader.asked, key=str) == sorted(expected, key=str)
    for _ in range(2):
        model.forward(TOKENS, hooks)
    assert len(of.reader.asked) == len(expected)


def test_a_layer_of_a_set_alone_is_a_transcoder() -> None:
    model, of = model_of(), transcoders(PER_LAYER, skip=True)
    of_set = model.forward(TOKENS, Clamp(of, {FeatureId(2, 5): 3.0}).hooks())
    of_layer = model.forward(TOKENS, Clamp(of.layer(2), {5: 3.0}).hooks())
    assert logits_differ(of_set, of_layer) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_set_of_another_dtype_than_the_model(dtype: str) -> None:
    """What is written is added in the wider dtype, so that clamping features to what they are changes little."""
    model, of = model_of(dtype=dtype), transcoders(CROSS, dtype=torch.float64)
    point = "blocks.3.mlp.hook_out"
    clean = model.forward(TOKENS, HookSpec().capture(point, of.hooks_in[3]))
    f = of.encode(3, clean[of.hooks_in[3]])
    out = model.forward(TOKENS, Clamp(of, {FeatureId(3, 2): 1.0}).hooks().capture(point))
    exact = clean[point].double() + (1 - f[..., 2:3]) * decoder(of, 3, 3)[2]
    assert out[point].dtype == clean[point].dtype
    assert bool(((out[point] - exact).abs() <= 0.51 * torch.finfo(out[point].dtype).eps * exact.abs() + 1e-12).all())


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (2, 3)])
def test_where_layers_are_run_again_features_are_read_again(first: int, last: int) -> None:
    """Also where the point that is read lies in the loop and one that is written beyond it, or the other way round."""
    model, of = model_of(), transcoders(CROSS)
    again = Recurrence(first=first, last=last, depth=3)
    found = model.forward(TOKENS, Clamp(of, SAID).hooks().capture(*STREAMS), recurrence=again)
    expected = model.forward(TOKENS, by_hand(of, SAID, counts=True).capture(*STREAMS), recurrence=again)
    assert_same_streams(found, expected, model.forward(TOKENS, recurrence=again))


def test_gradients_flow_from_a_clamp_into_every_layer_that_is_written() -> None:
    model, of = model_of(), transcoders(CROSS)
    slopes = []
    for hooks in (Clamp(of, SAID).hooks(), by_hand(of, SAID, counts=True)):
        out = model.forward(TOKENS, hooks.capture("hook_embed"), gradients=True)
        assert out.logits is not None
        slopes += torch.autograd.grad(out.logits[0, -1].square().sum(), out["hook_embed"])
    found, expected = slopes
    assert float(expected.norm()) > 1e-3
    assert float((found - expected).norm() / expected.norm()) < 1e-6
