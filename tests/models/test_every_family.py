"""On tiny random models of every family, with every odd setting switched on, every tensor is that of transformers."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .families import AS_IT_IS, ORIGINAL_CONTEXT, WINDOW, WITHOUT_EFFECT, build
from .old_spelling import respell
from .reference import reference_points

LEAST_COSINE = 1 - 1e-6
WORST_TOKEN = 1e-5
"""Relative error of a token's vector. Two correct float32 implementations differ by some 1e-6 in these models."""
LOOSER: Mapping[str, float] = {
    "granite: no attention multiplier": 1e-4,  # scores of ±40: the softmax multiplies their rounding
}
"""Variants whose reference is worse conditioned, and by how much a token may be off there."""

# Shorter than every window and original context; longer than all; and of every kind in one batch.
SHORT, LONG = WINDOW - 2, 40
RAGGED = (LONG, SHORT, 1, ORIGINAL_CONTEXT + 3)

EDGES = ("attn.hook_attn_scores", "attn.hook_pattern")
STREAMS = ("hook_resid_post", "hook_logits")
# No module of transformers holds these. Equations hold them to the other points: test_residual_identities.
UNSEEN = ("hook_scale", "hook_normalized", "hook_result")


def draw(length: int, n_sequences: int = 2) -> Tensor:
    return torch.randint(0, 101, (n_sequences, length), generator=torch.Generator().manual_seed(length))


@functools.lru_cache(maxsize=8)
def points_of(model: PreTrainedModel, length: int, n_sequences: int = 2) -> Mapping[str, Tensor]:
    """Every point that a model of transformers shows. A copy is run: rotary tables remember the longest sequence."""
    return reference_points(copy.deepcopy(model), draw(length, n_sequences), scores=True)


def only(points: Mapping[str, Tensor], *endings: str) -> dict[str, Tensor]:
    return {name: value for name, value in points.items() if name.endswith(endings)}


def captured(model: Model, token_ids: Tensor | Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    out = model.forward(token_ids, HookSpec().capture(*names))
    assert out.logits is out["hook_logits"]
    return {str(point): value for point, value in out.captures.items()}


def disagreement(ours: Tensor, reference: Tensor, name: str, tolerance: float) -> str | None:
    """How two tensors differ by more than rounding. What a token (or a query) has in all its heads is one vector."""
    if ours.shape != reference.shape:
        return f"shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
    hidden = reference == -torch.inf
    if not torch.equal(ours == -torch.inf, hidden):
        return "other keys are hidden"
    mine, other = (value.masked_fill(hidden, 0.0).double() for value in (ours, reference))
    mine, other = ((value.transpose(1, 2) if name.endswith(EDGES) else value).flatten(2) for value in (mine, other))
    cosine = float(torch.cosine_similarity(mine, other, dim=-1).min())
    worst = float(((mine - other).norm(dim=-1) / other.norm(dim=-1)).max())
    agrees = cosine >= LEAST_COSINE and worst <= tolerance
    return None if agrees else f"cosine {cosine:.9f}, worst token {worst:.1e}"


def disagreements(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor], variant: str) -> dict[str, str]:
    tolerance = LOOSER.get(variant, WORST_TOKEN)
    found = {name: disagreement(ours[name], reference[name], name, tolerance) for name in reference}
    return {name: what for name, what in found.items() if what is not None}


@pytest.mark.parametrize("length", [SHORT, LONG], ids=["within the window", "beyond the window"])
def test_every_point_agrees(variant: str, theirs: PreTrainedModel, ours: Model, length: int) -> None:
    reference = points_of(theirs, length)
    seen = [str(point) for point in ours.spec.points() if not point.kind.endswith(UNSEEN)]
    assert sorted(seen) == sorted(reference)
    fused = captured(ours, draw(length), [name for name in seen if not name.endswith(EDGES)])
    assert disagreements(fused, {name: reference[name] for name in fused}, variant) == {}
    explicit = captured(ours, draw(length), seen)
    assert disagreements(explicit, reference, variant) == {}


def test_sequences_of_a_batch_agree_with_each_alone(variant: str, theirs: PreTrainedModel, ours: Model) -> None:
    """A batch of transformers scales its rotary table by the longest sequence; here each sequence has its own."""
    sequences = [draw(length, 1)[0] for length in RAGGED]
    names = [str(point) for point in ours.spec.points() if not point.kind.endswith(UNSEEN)]
    fused = captured(ours, sequences, [name for name in names if not name.endswith(EDGES)])
    explicit = captured(ours, sequences, names)
    for row, n in enumerate(RAGGED):
        reference = points_of(theirs, n, 1)
        for together in (fused, explicit):
            alone = {
                name: value[[row], :, :n, :n] if name.endswith(EDGES) else value[[row], :n]
                for name, value in together.items()
            }
            assert disagreements(alone, {name: reference[name] for name in alone}, variant) == {}, f"{n} tokens"


def test_the_old_spelling_of_a_configuration_is_the_same_model(
    variant: str, theirs: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    try:
        old = respell(json.loads((folder / "config.json").read_text()))
    except ValueError as error:
        pytest.skip(str(error))
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    reference = only(points_of(reread, LONG), *STREAMS)
    assert torch.equal(reference["hook_logits"], points_of(theirs, LONG)["hook_logits"])  # the spelling itself
    ours = captured(load_model(tmp_path, device="cpu"), draw(LONG), [*reference])
    assert disagreements(ours, reference, variant) == {}


def test_bfloat16_stays_as_near_as_that_of_transformers(theirs: PreTrainedModel, folder: Path) -> None:
    exact = only(points_of(theirs, LONG), *STREAMS)
    other = points_of(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager"), LONG
    )
    mine = captured(load_model(folder, device="cpu", dtype="bfloat16"), draw(LONG), [*exact])
    assert {value.dtype for value in mine.values()} == {torch.bfloat16}

    def error(values: Mapping[str, Tensor], stream: str) -> float:
        """The median over tokens (and layers) of the relative error."""
        pairs = [(values[name].float(), value) for name, value in only(exact, stream).items()]
        return float(torch.stack([(v - full).norm(dim=-1) / full.norm(dim=-1) for v, full in pairs]).median())

    for stream in STREAMS:
        assert 1e-4 < error(mine, stream) < 1.5 * error(other, stream), stream


@functools.cache
def logits_as_it_is(family: str) -> Tensor:
    return points_of(build(f"{family}: {AS_IT_IS}"), LONG)["hook_logits"]


def test_every_odd_setting_matters(variant: str, theirs: PreTrainedModel) -> None:
    """Of transformers alone: what a setting changes is far more than what forebay's forward may differ by."""
    plain, logits = logits_as_it_is(theirs.config.model_type), points_of(theirs, LONG)["hook_logits"]
    change = float((logits - plain).norm() / plain.norm())
    assert change == 0.0 if variant in WITHOUT_EFFECT else change > 10 * WORST_TOKEN
