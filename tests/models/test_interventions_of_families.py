"""Every point of every family takes an intervention: the identity changes no bit, anything else what comes after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from forebay.stages.models.edges import Knockout
from forebay.stages.models.interventions import Add, Replace
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec

from .families import AS_IT_IS, SIZES, STRUCTURES

TOKENS = torch.randint(0, 101, (2, 19), generator=torch.Generator().manual_seed(4))  # longer than every window


def points_of(model: Model) -> list[HookPoint]:
    """One of every kind: in layer 1, which in some families slides and in others does not, or global."""
    return [point for point in model.spec.points() if point.layer in (None, 1)]


def logits_of(model: Model, hooks: HookSpec, tokens: Tensor = TOKENS) -> Tensor:
    logits = model.forward(tokens, hooks).logits
    assert logits is not None
    return logits


@pytest.fixture(params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, folder: Path) -> Model:
    return load_model(folder, device="cpu", dtype=request.param)


@pytest.mark.parametrize("variant", [f"{family}: {AS_IT_IS}" for family in SIZES], indirect=True)
def test_an_activation_replaced_by_itself_changes_no_bit(loaded: Model) -> None:
    points = points_of(loaded)
    # Scores, and results of heads, are computed only where they are asked for, and then all rounds otherwise.
    apart = [[point] for point in points if "key" in point.dims or point.kind.endswith("hook_result")]
    for together in ([point for point in points if [point] not in apart], *apart):
        captured = loaded.forward(TOKENS, HookSpec().capture(*together))
        assert captured.logits is not None
        for point in together:
            assert torch.equal(
                logits_of(loaded, HookSpec().intervene(point, Replace(captured[point]))), captured.logits
            )


@pytest.mark.parametrize("variant", STRUCTURES, indirect=True)
def test_a_change_of_the_last_position_changes_its_logits_and_those_of_no_other(ours: Model) -> None:
    """In one batch, in which every point is changed in a sequence of its own."""
    points = [point for point in points_of(ours) if "position" in point.dims]
    hooks = HookSpec()
    for row, point in enumerate(points):
        last = point.dims[-1]
        size = ours.spec.sizes.get(last, 1)
        tilt = torch.linspace(0.2, 0.9, size) if last in ours.spec.sizes else 0.7
        hooks = hooks.intervene(point, Add(tilt).at(position=-1, sequence=row))
    batch = TOKENS[:1].expand(len(points), -1)
    plain, changed = logits_of(ours, HookSpec(), batch), logits_of(ours, hooks, batch)
    for row, point in enumerate(points):
        assert torch.allclose(changed[row, :-1], plain[row, :-1], rtol=1e-4, atol=1e-5), point
        assert not torch.allclose(changed[row, -1], plain[row, -1], rtol=1e-3, atol=1e-4), point


@pytest.mark.parametrize("variant", STRUCTURES, indirect=True)
def test_a_knocked_out_edge_has_weight_zero_and_a_lone_query_attends_to_nothing(ours: Model) -> None:
    hooks = (
        HookSpec()
        .intervene("blocks.*.attn.hook_attn_scores", Knockout([(12, 10), (9, None)]).at(head=[0, 2]))
        .capture("blocks.*.attn.hook_{pattern,z}")
    )
    out = ours.forward(TOKENS, hooks)
    for layer in range(ours.spec.n_layers):
        pattern, z = out[f"blocks.{layer}.attn.hook_pattern"], out[f"blocks.{layer}.attn.hook_z"]
        assert (pattern[:, [0, 2], 12, 10] == 0).all()
        assert (pattern[:, [0, 2], 9] == 0).all()
        assert (z[:, 9, [0, 2]] == 0).all()
        assert torch.allclose(pattern[:, [0, 2], 12].sum(-1), torch.ones(()))
        assert (pattern[:, 1, 12, 10] > 0).all()
    assert out.logits is not None
    assert out.logits.isfinite().all()
