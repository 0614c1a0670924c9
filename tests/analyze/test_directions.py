"""Directions are what numpy makes of the whole arrays, lazily, and of what transformers gives for the prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from transformers import LlamaForCausalLM

import forebay
from forebay.stages.analyze.directions import contrastive_direction, mean_difference, separation, token_direction
from forebay.stages.analyze.tokens import as_run, label
from forebay.stages.models.model import Model
from forebay.stores.errors import SchemaError

N_LAYERS, N_TOKENS, WIDTH = 3, 41, 7
CHUNKS = [None, {"token": 7}, {"token": 41}, {"token": 13, "layer": 2, "d_model": 3}]


def computes_nothing(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("something was computed")


def node(chunks: Any = None, *, dtype: Any = np.float32, with_nan: bool = False) -> xr.Dataset:
    """Tokens far from 0, of sequences of 9, the two sides apart by a different vector in every layer."""
    generator = np.random.default_rng(5)
    value = generator.normal(size=(N_LAYERS, N_TOKENS, WIDTH)) + 100.0
    value[:, positive()] += generator.normal(size=(N_LAYERS, 1, WIDTH))
    if with_nan:
        value[1, 20, 3] = np.nan
    held = xr.Dataset(
        {"value": (("layer", "token", "d_model"), value.astype(dtype))},
        coords={
            "layer": [2, 5, 6],
            "position": ("token", np.arange(N_TOKENS) % 9),
            "sequence": ("token", np.arange(N_TOKENS) // 9),
        },
    )
    return held if chunks is None else held.chunk(chunks)


def positive() -> np.ndarray:
    return np.random.default_rng(1).random(N_TOKENS) < 0.4


def mask(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims="token")


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("skip", [0, 2])
def test_the_difference_of_means_is_that_of_numpy_on_the_whole_array(chunks: Any, skip: int) -> None:
    held = node(chunks)
    if chunks:
        with dask.config.set(scheduler=computes_nothing):
            found = mean_difference(held, mask(positive()), skip_positions=skip)
    else:
        found = mean_difference(held, mask(positive()), skip_positions=skip)
    value, counts = node()["value"].values.astype(np.float64), node()["position"].values >= skip
    on, off = value[:, positive() & counts].mean(1), value[:, ~positive() & counts].mean(1)
    np.testing.assert_allclose(found["direction"], on - off, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(found["mean_positive"], on, rtol=1e-13)
    np.testing.assert_allclose(found["mean_negative"], off, rtol=1e-13)
    assert found["direction"].dims == ("layer", "d_model")
    assert found["direction"].dtype == np.float64
    assert found["layer"].values.tolist() == [2, 5, 6]
    assert (found["n_positive"] == (positive() & counts).sum()).all()
    assert (found["n_negative"] == (~positive() & counts).sum()).all()
    assert found["n_positive"].dtype == np.int64


def test_a_direction_is_normalised_layer_by_layer_and_nothing_stays_nothing() -> None:
    held = node()
    held["value"][1] = 3.0
    plain = mean_difference(held, mask(positive()))["direction"]
    unit = mean_difference(held, mask(positive()), normalize=True)["direction"]
    np.testing.assert_allclose(unit[[0, 2]], plain[[0, 2]] / np.linalg.norm(plain[[0, 2]], axis=1, keepdims=True))
    assert (unit[1] == 0).all()


def test_sides_may_leave_tokens_out_and_tokens_with_nan_are_on_neither_side_of_their_layer() -> None:
    on, off = np.zeros((2, N_TOKENS), bool)
    on[3:22], off[22:30] = True, True
    found = mean_difference(node({"token": 7}, with_nan=True), mask(on), mask(off), skip_positions=0).compute()
    value = node(with_nan=True)["value"].values.astype(np.float64)
    expected = np.nanmean(np.where(np.isnan(value).any(-1, keepdims=True), np.nan, value)[:, on], axis=1)
    np.testing.assert_allclose(found["mean_positive"], expected, rtol=1e-12)
    assert found["n_positive"].values.tolist() == [19, 18, 19]
    assert found["n_negative"].values.tolist() == [8, 8, 8]


def test_infinities_in_tokens_that_are_not_meant_change_nothing() -> None:
    held, sides = node(), positive()
    held["value"][:, 9, 2] = np.inf  # the first position of a sequence
    held["value"][1, 20, 3] = -np.inf
    others = ~sides
    others[[20]] = sides[20] = False
    found = mean_difference(held, mask(sides), mask(others))
    expected = mean_difference(node(), mask(sides), mask(others))
    xr.testing.assert_allclose(found, expected)
    assert np.isfinite(expected["direction"]).all()
    apart = separation(held, found["direction"], mask(sides), mask(others))
    xr.testing.assert_allclose(apart, separation(node(), expected["direction"], mask(sides), mask(others)))


def test_a_direction_of_other_layers_is_refused() -> None:
    direction = mean_difference(node(), mask(positive()))["direction"]
    with pytest.raises(SchemaError, match="differ in layer"):
        separation(node(), direction.assign_coords(layer=[3, 4, 7]), mask(positive()))


def test_a_side_without_tokens_gives_no_direction() -> None:
    found = mean_difference(node(), mask(np.zeros(N_TOKENS, bool)))
    assert found["direction"].isnull().all()
    assert (found["n_positive"] == 0).all()
    assert found["mean_negative"].notnull().all()


def test_units_that_are_not_recorded_count_on_neither_side() -> None:
    done = np.arange(N_TOKENS) < 25
    partial = node().assign_coords(done=("token", done))
    found = mean_difference(partial, mask(positive()), skip_positions=0)
    assert (found["n_positive"] + found["n_negative"] == 25).all()


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_the_separation_is_cohens_d_of_the_components_along_the_direction(chunks: Any) -> None:
    held = node(chunks)
    direction = mean_difference(held, mask(positive()))["direction"].compute() * 17
    if chunks:
        with dask.config.set(scheduler=computes_nothing):
            found = separation(held, direction, mask(positive()))
    else:
        found = separation(held, direction, mask(positive()))
    found, counts = found.compute(), node()["position"].values >= 1
    for layer in range(N_LAYERS):
        unit = direction[layer].values / np.linalg.norm(direction[layer])
        along = node()["value"].values[layer].astype(np.float64) @ unit
        a, b = along[positive() & counts], along[~positive() & counts]
        pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
        got = found.isel(layer=layer)
        assert got["cohens_d"].item() == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-9)
        assert got["mean_positive"].item() == pytest.approx(a.mean(), rel=1e-12)
        assert got["std_negative"].item() == pytest.approx(b.std(ddof=1), rel=1e-10)
        assert (got["n_positive"].item(), got["n_negative"].item()) == (len(a), len(b))
    assert (found["cohens_d"] > 0.5).all()


def test_a_direction_of_one_layer_is_measured_in_every_layer() -> None:
    found = separation(node(), xr.DataArray(np.ones(WIDTH), dims="d_model"), mask(positive()))
    assert found["cohens_d"].dims == ("layer",)
    by_layer = separation(node().sel(layer=5), xr.DataArray(np.ones(WIDTH), dims="d_model"), mask(positive()))
    assert by_layer["cohens_d"].item() == pytest.approx(found["cohens_d"].sel(layer=5).item())


def test_a_store_and_the_captures_of_one_forward_have_the_same_direction(
    model: Model, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(tokenize={"context": 64, "layout": "documents", "long_documents": "split"})
    assert forebay.run(recipe, tmp_path / "run").code == 0
    run = forebay.open_run(tmp_path / "run", chunks={"token": 50})
    rows = [ids.values.tolist() for _, ids in run["tokens"].to_dataset()["token_id"].groupby("sequence")]
    forward = model.forward(rows, forebay.HookSpec().capture("blocks.*.hook_resid_post"), logits=False)
    found = []
    for tree in (run, as_run(forward)):
        held = tree["activations/hook_resid_post"].to_dataset()
        frequent = label(held, "token_id") < 150
        with dask.config.set(scheduler=computes_nothing):
            lazy = mean_difference(held, frequent)
        found.append(lazy.compute())
    assert found[0]["n_positive"][0] > 50
    for name in ("direction", "n_positive", "n_negative"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positive": mask(np.ones(N_TOKENS))}, r"`positive` must be boolean \[token\] of the 41 tokens"),
        ({"positive": mask(np.ones(40, bool))}, "token=40"),
        ({"negative": mask(positive())}, "tokens are on both sides"),
        ({"negative": xr.DataArray(np.zeros(N_TOKENS, bool), dims="position")}, "`negative` must be boolean"),
        ({"skip_positions": -1}, "at least 0"),
    ],
    ids=str,
)
def test_masks_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        mean_difference(node(), **{"positive": mask(positive()), **given})


def test_a_direction_that_is_lazy_or_of_another_width_is_refused() -> None:
    lazy = mean_difference(node({"token": 7}), mask(positive()))["direction"]
    with pytest.raises(SchemaError, match=r"give direction\.compute\(\)"):
        separation(node({"token": 7}), lazy, mask(positive()))
    with pytest.raises(SchemaError, match="a direction of 7 d_model is expected"):
        separation(node(), xr.DataArray(np.ones(6), dims="d_model"), mask(positive()))


# ── from prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────

POSITIVE = [[5, 9, 200, 41], [7, 77, 31], [250, 3, 3, 8, 19, 60], [8, 12], [90, 91, 92, 93, 94]]
NEGATIVE = [[5, 9, 201, 44], [7, 70, 32], [250, 6, 3, 9, 19, 61], [11, 12], [90, 96, 92, 93, 99]]


@torch.no_grad()
def of_transformers(folder: Path, prompts: list[list[int]], position: int) -> np.ndarray:
    """What each layer of transformers' model gives, [layer, prompt, d_model]."""
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    given: list[torch.Tensor] = []
    for layer in theirs.model.layers:
        layer.register_forward_hook(lambda module, args, result: given.append(result[0, position]))
    for ids in prompts:
        theirs(torch.tensor([ids]))
    return torch.stack(given).view(len(prompts), 3, -1).transpose(0, 1).double().numpy()


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("position", [-1, 1])
def test_a_contrastive_direction_is_the_difference_of_what_transformers_gives(
    model: Model, tiny_model: Path, position: int, batch_size: int
) -> None:
    found = contrastive_direction(model, POSITIVE, NEGATIVE[:4], position=position, batch_size=batch_size)
    on = of_transformers(tiny_model, POSITIVE, position).mean(1)
    off = of_transformers(tiny_model, NEGATIVE[:4], position).mean(1)
    np.testing.assert_allclose(found["direction"], on - off, rtol=1e-4, atol=1e-5)
    assert (found["n_positive"], found["n_negative"]) == (5, 4)
    assert found["direction"].dtype == np.float32
    unit = contrastive_direction(model, POSITIVE, NEGATIVE, layers=[2], normalize=True)["direction"]
    assert unit["layer"].values.tolist() == [2]
    assert np.linalg.norm(unit) == pytest.approx(1, rel=1e-6)


def test_the_first_component_is_the_leading_eigenvector_of_the_differences_towards_their_mean(
    model: Model, tiny_model: Path
) -> None:
    found = contrastive_direction(model, POSITIVE, NEGATIVE, method="first_component")
    difference = of_transformers(tiny_model, POSITIVE, -1) - of_transformers(tiny_model, NEGATIVE, -1)
    for layer in range(3):
        values, axes = np.linalg.eigh(difference[layer].T @ difference[layer])
        axis, mean = axes[:, -1], difference[layer].mean(0)
        got = found["direction"][layer].values
        np.testing.assert_allclose(got, axis * (axis @ mean), rtol=1e-3, atol=2e-4)
        assert got @ mean > 0
        assert found["explained"][layer].item() == pytest.approx(values[-1] / values.sum(), rel=1e-4)


def test_one_pair_has_one_direction_by_either_method(model: Model) -> None:
    mean, first = (
        contrastive_direction(model, POSITIVE[:1], NEGATIVE[:1], method=method)  # type: ignore[arg-type]
        for method in ("mean_difference", "first_component")
    )
    np.testing.assert_allclose(mean["direction"], first["direction"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first["explained"], 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "first_components"}, "Did you mean 'first_component'"),
        ({"method": "first_component", "negative_prompts": NEGATIVE[:3]}, "there are 5 and 3"),
        ({"position": 3}, "position 3 is read, and a prompt has 3 tokens"),
        ({"layers": [3]}, "there is no layer 3"),
        ({"hook": "attn.hook_pattern"}, "at which a token has one vector"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
    ids=str,
)
def test_prompts_that_make_no_direction_are_refused_before_anything_is_computed(
    model: Model, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(SchemaError, match=message):
        contrastive_direction(model, **{"positive_prompts": POSITIVE, "negative_prompts": NEGATIVE, **given})


# ── from tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("of", "tensor"), [("unembedding", "lm_head.weight"), ("embedding", "model.embed_tokens.weight")]
)
def test_a_token_direction_is_the_mean_row_of_the_last_tokens_of_words(
    model: Model, tiny_model: Path, of: Any, tensor: str
) -> None:
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    weight = load_file(tiny_model / "model.safetensors")[tensor]
    words = ["truth", "wife", "neighbourhood"]
    encode = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode
    ids = [encode(f" {word}").ids[-1] for word in words]
    mean = weight[[*ids, 7]].double().mean(0)
    found = token_direction(model, [*words, 7], of=of)
    np.testing.assert_allclose(found, mean / mean.norm(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(token_direction(model, [*words, 7], of=of, normalize=False), mean, rtol=1e-5, atol=1e-7)
    assert found.dims == ("d_model",)


def test_tokens_that_are_not_there_make_no_direction(model: Model) -> None:
    with pytest.raises(SchemaError, match="no words"):
        token_direction(model, [])
    with pytest.raises(SchemaError, match="there is no token 300"):
        token_direction(model, [3, 300])
    with pytest.raises(SchemaError, match="Did you mean 'embedding'"):
        token_direction(model, [3], of="embeddings")  # type: ignore[arg-type]
