"""What is injected into a layer is followed through the layers above as PyTorch hooks on transformers' model see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import LlamaForCausalLM

import forebay
from forebay.stages.analyze.steering_convergence import _absorption, steering_convergence, strength_sweep
from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stores.errors import SchemaError

from ..models.families import SIZES, make

IDS, OTHER = [17, 50, 3, 88, 41, 9, 60], [17, 50, 3, 88, 99]
N_LAYERS = 4


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    return make("llama", dict(SIZES["llama"]))


@pytest.fixture(scope="module")
def model(theirs: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return forebay.load_model(str(folder), device="cpu")


@torch.no_grad()
def streams(theirs: LlamaForCausalLM, ids: list[int], push: tuple[int, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """What every layer gives at the last token, [layer, d_model], and the logits there; with a vector added in one."""
    given: list[Tensor] = []

    def hook(number: int) -> Any:
        def see(module: Any, args: Any, result: Tensor) -> Tensor:
            if push is not None and push[0] == number:
                result = result.clone()
                result[0, -1] += push[1]
            given.append(result[0, -1].clone())
            return result

        return see

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(theirs.model.layers)]
    logits = theirs(torch.tensor([ids])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return torch.stack(given).double(), logits.double()


def by_hand(theirs: LlamaForCausalLM, layer: int, strength: float) -> tuple[list[float], list[float], float, Tensor]:
    """Cosines and relative distances by layer, divergence, probabilities."""
    natural, base = streams(theirs, IDS)
    v = (natural - streams(theirs, OTHER)[0])[layer]
    steered, logits = streams(theirs, IDS, (layer, (strength * v).float()))
    cosine = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(steered, natural, strict=True)]
    p, q = base.softmax(-1), logits.softmax(-1)
    distance = [float((a - b).norm() / b.norm()) for a, b in zip(steered, natural, strict=True)]
    return cosine, distance, float((p * (p / q).log()).sum()), q


def first_above(cosine: list[float], layer: int, threshold: float) -> int:
    return next((m for m in range(layer + 1, N_LAYERS) if cosine[m] >= threshold), -1)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_convergence_matrix_is_that_of_hooks_on_transformers(
    model: Model, theirs: LlamaForCausalLM, batch_size: int
) -> None:
    found = steering_convergence(model, IDS, OTHER, strength=0.8, threshold=0.9, tokens=[3, 100], batch_size=batch_size)
    assert found["cosine"].dims == ("injection_layer", "layer")
    for layer in range(N_LAYERS):
        cosine, distance, kl, probability = by_hand(theirs, layer, 0.8)
        got = found.sel(injection_layer=layer)
        np.testing.assert_allclose(got["cosine"], cosine, atol=2e-5)
        np.testing.assert_allclose(got["distance"], distance, rtol=1e-3, atol=1e-5)
        assert (got["cosine"][:layer] > 1 - 1e-6).all()
        assert got["kl_divergence"].item() == pytest.approx(kl, rel=2e-3)
        np.testing.assert_allclose(got["probability"], probability[[3, 100]], rtol=1e-3)
        assert got["absorption_layer"].item() == first_above(cosine, layer, 0.9)
    natural, other = streams(theirs, IDS)[0], streams(theirs, OTHER)[0]
    np.testing.assert_allclose(found["direction_norm"], (natural - other).norm(dim=-1), rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_strength_sweep_is_that_of_hooks_on_transformers(model: Model, theirs: LlamaForCausalLM, layer: int) -> None:
    strengths = [0.1, 1.0, 5.5]
    found = strength_sweep(model, IDS, OTHER, layer=layer, strengths=strengths, threshold=0.97, tokens=7, batch_size=2)
    for strength in strengths:
        cosine, distance, kl, probability = by_hand(theirs, layer, strength)
        got = found.sel(strength=strength)
        np.testing.assert_allclose(got["cosine"], cosine, atol=2e-5)
        np.testing.assert_allclose(got["distance"], distance, rtol=1e-3, atol=1e-5)
        assert got["kl_divergence"].item() == pytest.approx(kl, rel=2e-3)
        assert got["probability"].item() == pytest.approx(float(probability[7]), rel=1e-3)
        assert got["absorption_layer"].item() == first_above(cosine, layer, 0.97)
    assert found["injection_layer"].item() == layer


def test_a_sweep_takes_twelve_strengths_from_a_half_to_six_and_agrees_with_the_matrix(model: Model) -> None:
    sweep = strength_sweep(model, IDS, OTHER, layer=1)
    np.testing.assert_allclose(sweep["strength"], np.arange(1, 13) / 2)
    matrix = steering_convergence(model, IDS, OTHER, layers=[1], strength=2.5)
    names = ["cosine", "kl_divergence", "absorption_layer", "direction_norm"]
    one = sweep.sel(strength=2.5)[names]
    xr.testing.assert_allclose(one, matrix.isel(injection_layer=0)[names], atol=1e-5)


def test_nothing_injected_is_absorbed_at_once_and_changes_nothing(model: Model) -> None:
    found = steering_convergence(model, IDS, OTHER, strength=0.0)
    assert found["absorption_layer"].values.tolist() == [1, 2, 3, -1]
    np.testing.assert_array_equal(found["absorption_depth"], [1, 1, 1, np.nan])
    assert (found["kl_divergence"] < 1e-9).all()
    assert found["best_injection_layer"].item() == 2


def test_where_nothing_is_absorbed_the_best_layer_is_the_one_of_least_divergence(model: Model) -> None:
    found = steering_convergence(model, IDS, OTHER, strength=-4.0, threshold=1.0)
    assert (found["absorption_layer"] == -1).all()
    assert found["absorption_depth"].isnull().all()
    assert found["best_injection_layer"].item() == int(found["kl_divergence"].values.argmin())


def test_absorption_is_looked_for_above_the_injection_alone() -> None:
    cosine = np.array([[1.0, 0.5, 0.96, 0.9], [1.0, 0.99, 0.5, 0.95], [1.0, 1.0, 1.0, 0.2]], dtype=np.float32)
    assert _absorption(cosine, np.array([1, 1, 2]), 0.95).tolist() == [2, 3, -1]
    assert _absorption(cosine, np.array([0, 0, 0]), 0.95).tolist() == [2, 1, 1]
    assert _absorption(cosine, np.array([3, 3, 3]), 0.95).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"threshold": 1.5}, SchemaError, "a cosine is expected"),
        ({"strength": float("nan")}, SchemaError, "all of them finite"),
        ({"layers": [0, 4]}, HookError, "layer=4 is out of range"),
        ({"tokens": 101}, SchemaError, "there is no token 101"),
        ({"batch_size": 0}, SchemaError, "batch_size = 0"),
        ({"contrastive": [[1], [2]]}, SchemaError, "one prompt is expected"),
        ({"contrastive": IDS}, SchemaError, "the same tokens"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_before_anything_is_computed(
    model: Model, given: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(error, match=message):
        steering_convergence(model, IDS, **{"contrastive": OTHER, **given})


def test_texts_are_prompts_too(tiny_model: Path) -> None:
    model = forebay.load_model(str(tiny_model), device="cpu")
    texts = "a truth universally", "a truth"
    by_ids = steering_convergence(model, *(model.tokenizer.to_tokens(text) for text in texts))
    xr.testing.assert_identical(steering_convergence(model, *texts), by_ids)
