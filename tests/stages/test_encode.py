"""What encode keeps are the features of the activations that were captured, whatever the layout, blocks and units."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from safetensors.numpy import save_file

import forebay
from forebay.pipeline.recipe import read_recipe
from forebay.stages.dictionaries import encoding
from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stores.dtypes import bfloat16_to_float32
from forebay.stores.errors import RecipeError, SchemaError
from forebay.stores.store import Store

MakeRecipe = Callable[..., Path]
Encoded = Callable[..., Path]

HOOK = "blocks.1.hook_resid_post"
WIDTH, FEATURES, K = 28, 45, 6


@dataclass(frozen=True)
class Weights:
    """A dictionary in float64, and the folder where SAELens' format of it lies."""

    folder: Path
    tensors: dict[str, NDArray[np.float64]]

    def preactivations(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        centred = x - self.tensors["b_dec"]
        return centred @ self.tensors["W_enc"] + self.tensors["b_enc"]


def write(
    folder: Path, architecture: str, *, hook: str = HOOK, hook_out: str | None = None, d_in: int = WIDTH
) -> Weights:
    """A random autoencoder, or transcoder to `hook_out`, in SAELens' format, of its own seed for each hook."""
    rng = np.random.default_rng([FEATURES, *map(ord, hook)])
    tensors = {
        "W_enc": rng.normal(size=(d_in, FEATURES)) / d_in**0.5,
        "b_enc": rng.normal(size=FEATURES) * 0.3,
        "W_dec": rng.normal(size=(FEATURES, d_in)) / FEATURES**0.5,
        "b_dec": rng.normal(size=d_in),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = rng.uniform(0.2, 1.5, size=FEATURES)
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    said = {"topk": {"k": K}, "transcoder": {"d_out": d_in, "apply_b_dec_to_input": False}}.get(architecture, {})
    folder.mkdir()
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": FEATURES,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if "hook_z" in hook else "none",
        "metadata": {"hook_name": hook, "hook_name_out": hook_out, "sae_lens_version": "6.54.12"},
        **said,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return Weights(folder, {name: value.astype(np.float64) for name, value in tensors.items()})


@pytest.fixture
def encoded(make_recipe: MakeRecipe, tmp_path: Path) -> Encoded:
    """Runs a recipe with the encode tables given into a folder of its own, which it gives. Captures in few units, whose
    edges are not those of features.
    """

    def run(name: str, encode: dict[str, dict[str, Any]], capture: dict[str, Any] | None = None, **tables: Any) -> Path:
        held = {"unit_tokens": 208, **(capture or {})}
        outcome = forebay.run(make_recipe(name, encode=encode, capture=held, **tables), tmp_path / name)
        assert outcome.code == 0
        return outcome.folder

    return run


def raw(folder: Path, step: str, path: str) -> NDArray[Any]:
    """An array of a store as it lies on disk, read without forebay."""
    found: NDArray[Any] = zarr.open_group(str(folder / step / "data.zarr"), mode="r", use_consolidated=False)[path][...]
    return found


def activations(folder: Path, kind: str = "hook_resid_post", layer: int = 1) -> NDArray[np.float64]:
    """Captured vectors [token, width] of one layer, heads end to end."""
    layers = raw(folder, "activations", f"{kind}/layer").tolist()
    values = raw(folder, "activations", f"{kind}/value")[layers.index(layer)]
    return values.reshape(len(values), -1).astype(np.float64)


def dense(folder: Path, name: str, group: str | None = None) -> NDArray[np.float64]:
    """Features [token, feature] from what lies on disk, in either layout, one token at a time."""
    group, step = group or name, f"features-{name}"
    arrays = Store.open(folder / step).schema.arrays
    feature, value = (raw(folder, step, f"{group}/{one}") for one in ("feature", "value"))
    if value.dtype == np.uint16:
        value = bfloat16_to_float32(value)
    if f"{group}/count" not in arrays:
        found = np.zeros((len(feature), FEATURES))
        for token, (names, values) in enumerate(zip(feature, value, strict=True)):
            fires = names >= 0
            assert (values[~fires] == 0).all()
            assert (np.diff(values) <= 0).all()
            found[token, names[fires]] = values[fires]
        return found
    count = raw(folder, step, f"{group}/count")
    unit = Store.open(folder / step).schema.unit_tokens
    found = np.zeros((len(count), FEATURES))
    for first in range(0, len(count), unit):
        at = 0
        for token in range(first, min(first + unit, len(count))):
            names = feature[first // unit, at : at + count[token]]
            assert (np.diff(names) > 0).all()
            found[token, names] = value[first // unit, at : at + count[token]]
            at += count[token]
    return found


def expected(weights: Weights, architecture: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
    h = weights.preactivations(x)
    if architecture == "jumprelu":
        return np.where(h > weights.tensors["threshold"], np.maximum(h, 0), 0)
    if architecture == "standard":
        return np.maximum(h, 0)
    kept = np.zeros_like(h)
    for row, values in enumerate(h):
        best = np.argsort(-values, kind="stable")[:K]
        kept[row, best] = np.maximum(values[best], 0)
    return kept


def assert_close(found: NDArray[np.float64], due: NDArray[np.float64], rounding: float = 1e-5) -> None:
    """By direction and by magnitude, and the very same features fire but for what lies within rounding."""
    assert (due > 0).sum() > len(due)
    assert np.abs(found - due).max() <= rounding * np.abs(due).max()
    assert (found * due).sum() / np.linalg.norm(found) / np.linalg.norm(due) >= 1 - 1e-6
    assert ((found > 0) == (due > 0)).mean() >= 1 - 1e-3


def test_features_are_those_of_the_captured_activations(encoded: Encoded, tmp_path: Path) -> None:
    """Of every architecture, encoded from what is stored and from a forward, each in a step of its own."""
    weights = {name: write(tmp_path / name, name) for name in ("topk", "standard", "jumprelu")}
    steps = {
        f"{name}-{how}": {"dictionary": str(weights[name].folder), "fused": how == "fused", "unit_tokens": 48}
        for name in weights
        for how in ("stored", "fused")
    }
    folder = encoded("run", steps)
    for step in steps:
        architecture = step.split("-")[0]
        assert_close(dense(folder, step), expected(weights[architecture], architecture, activations(folder)))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_blocks_units_and_batches_do_not_change_a_feature(encoded: Encoded, tmp_path: Path, architecture: str) -> None:
    source = str(write(tmp_path / "sae", architecture).folder)
    small = {"dictionary": source, "memory": 2**20, "unit_tokens": 32}
    folder = encoded(
        "run",
        {"whole": {"dictionary": source}, "small": small, "behind": {"dictionary": source, "fused": True, "batch": 3}},
    )
    whole = dense(folder, "whole")
    assert np.abs(dense(folder, "small") - whole).max() <= 1e-5 * whole.max()
    assert np.abs(dense(folder, "behind") - whole).max() <= 1e-5 * whole.max()


def test_blocks_hold_bit_for_bit_what_the_dense_features_of_their_rows_are(
    encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every dtype, with thresholds in float32. Products of other numbers of rows may differ in the last bit: the
    blocks are those that `memory` has room for.
    """
    monkeypatch.setattr(encoding, "COPIES", 700)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    weights = {name: write(tmp_path / name, name) for name in ("topk", "jumprelu")}
    tables = {name: {"dictionary": str(w.folder), "memory": 2**20, "unit_tokens": 48} for name, w in weights.items()}
    steps = {f"{name}-{dtype}": {**tables[name], "dtype": dtype} for name in weights for dtype in dtypes}
    folder = encoded("run", steps)
    x = torch.from_numpy(activations(folder)).float()
    for step, table in steps.items():
        name, dtype = step.split("-")[0], dtypes[str(table["dtype"])]
        dictionary = forebay.load_dictionary(str(table["dictionary"]))
        assert isinstance(dictionary, Dictionary)
        dictionary = dictionary.to(dtype=dtype)
        rows = 2**20 // (FEATURES * dtype.itemsize * 700)
        blocks = [block for unit in x.split(48) for block in unit.split(rows)]
        due = torch.cat([by_dense_path(name, dictionary.preactivations(block), weights[name]) for block in blocks])
        assert np.array_equal(dense(folder, step), due.double().numpy()), step


def by_dense_path(architecture: str, h: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Features [token, feature] of preactivations in whatever dtype, by a stable sort or a comparison in float32."""
    if architecture == "jumprelu":
        threshold = torch.from_numpy(weights.tensors["threshold"]).float()
        return torch.where((h.float() > threshold) & (h > 0), h, 0)
    best = torch.sort(h, dim=-1, descending=True, stable=True).indices[:, :K]
    return torch.zeros_like(h).scatter(-1, best, h.gather(-1, best).relu())


def test_documents_of_any_length_are_encoded_once_each(encoded: Encoded, tmp_path: Path) -> None:
    weights = write(tmp_path / "sae", "jumprelu")
    tokenize = {"context": 64, "layout": "documents", "long_documents": "split"}
    tables = {"a": {"dictionary": str(weights.folder)}, "b": {"dictionary": str(weights.folder), "fused": True}}
    folder = encoded("run", {name: {**table, "unit_tokens": 50} for name, table in tables.items()}, tokenize=tokenize)
    due = expected(weights, "jumprelu", activations(folder))
    assert_close(dense(folder, "a"), due)
    assert_close(dense(folder, "b"), due)


def test_several_dictionaries_share_a_pass_and_each_has_its_group(encoded: Encoded, tmp_path: Path) -> None:
    first = write(tmp_path / "first", "topk")
    second = write(tmp_path / "second", "jumprelu", hook="blocks.2.attn.hook_z", d_in=40)
    both = {"one": str(first.folder), "other": str(second.folder)}
    hooks = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z"]
    folder = encoded("run", {"two": {"dictionary": both}}, capture={"hooks": hooks})
    assert_close(dense(folder, "two", "two/one"), expected(first, "topk", activations(folder)))
    heads = activations(folder, "attn.hook_z", 2)
    assert_close(dense(folder, "two", "two/other"), expected(second, "jumprelu", heads))


def write_clt(folder: Path, layers: int = 3) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """A cross-layer transcoder in circuit-tracer's format: encoder [feature, width] and its bias, layer by layer."""
    rng = np.random.default_rng(7)
    folder.mkdir()
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(f"model_name: tiny\nmodel_kind: cross_layer_transcoder\n{hooks}")
    found = []
    for layer in range(layers):
        W_enc = (rng.normal(size=(FEATURES, WIDTH)) / WIDTH**0.5).astype(np.float32)
        b_enc = rng.normal(size=FEATURES).astype(np.float32)
        W_dec = rng.normal(size=(FEATURES, layers - layer, WIDTH)).astype(np.float32)
        encoder = {f"W_enc_{layer}": W_enc, f"b_enc_{layer}": b_enc, f"b_dec_{layer}": np.zeros(WIDTH, np.float32)}
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": W_dec}, folder / f"W_dec_{layer}.safetensors")
        found.append((W_enc.astype(np.float64), b_enc.astype(np.float64)))
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
def test_a_cross_layer_transcoder_fills_a_group_a_layer(encoded: Encoded, tmp_path: Path, fused: bool) -> None:
    weights = write_clt(tmp_path / "clt")
    table = {"dictionary": str(tmp_path / "clt"), "unit_tokens": 112, "fused": fused}
    some = {**table, "layers": [2, 0]}
    folder = encoded("run", {"clt": table, "some": some}, capture={"hooks": ["blocks.*.hook_resid_mid"]})
    for layer, (W_enc, b_enc) in enumerate(weights):
        due = np.maximum(activations(folder, "hook_resid_mid", layer) @ W_enc.T + b_enc, 0)
        assert_close(dense(folder, "clt", f"clt/layer_{layer}"), due)
        if layer != 1:
            assert_close(dense(folder, "some", f"some/layer_{layer}"), due)
    assert set(Store.open(folder / "features-some").header.provenance["dictionaries"]) == {
        "some/layer_2",
        "some/layer_0",
    }
    assert forebay.open_run(folder).features("clt/layer_2").hook == "blocks.2.hook_resid_mid"


@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
def test_a_transcoder_is_measured_against_what_it_predicts(encoded: Encoded, tmp_path: Path, fused: bool) -> None:
    weights = write(tmp_path / "plt", "transcoder", hook="blocks.1.hook_resid_mid", hook_out="blocks.1.hook_mlp_out")
    capture = {"hooks": ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]}
    table = {"dictionary": str(weights.folder), "fit_every": 1, "skip_positions": 0, "fused": fused}
    folder = encoded("run", {"plt": table}, capture=capture)
    x, y = activations(folder, "hook_resid_mid"), activations(folder, "hook_mlp_out")
    features = np.maximum(x @ weights.tensors["W_enc"] + weights.tensors["b_enc"], 0)
    assert_close(dense(folder, "plt"), features)
    decoded = features @ weights.tensors["W_dec"] + weights.tensors["b_dec"]
    fit = forebay.dictionary_fit(folder / "features-plt").sel(dictionary="plt")
    assert float(fit["fvu"]) == pytest.approx(((decoded - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize(("store_dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_values_are_kept_in_the_dtype_asked_for(
    encoded: Encoded, tmp_path: Path, store_dtype: str, rounding: float
) -> None:
    source = str(write(tmp_path / "sae", "topk").folder)
    folder = encoded("run", {"a": {"dictionary": source}, "b": {"dictionary": source, "store_dtype": store_dtype}})
    exact = dense(folder, "a")
    assert np.abs(dense(folder, "b") - exact).max() <= rounding * exact.max()
    assert Store.open(folder / "features-b").schema.arrays["b/value"].dtype == store_dtype


def test_tokens_on_which_nothing_fires_have_no_features(encoded: Encoded, tmp_path: Path) -> None:
    weights = write(tmp_path / "sae", "jumprelu")
    silent = {name: value.astype(np.float32) for name, value in weights.tensors.items()}
    silent["threshold"] = np.full(FEATURES, 1e9, dtype=np.float32)
    save_file(silent, weights.folder / "sae_weights.safetensors")
    folder = encoded("run", {"sae": {"dictionary": str(weights.folder), "unit_tokens": 48}})
    assert not dense(folder, "sae").any()
    assert Store.open(folder / "features-sae").verify() == {}


def test_the_statistics_of_units_add_up_to_fit_and_l0_without_first_positions(encoded: Encoded, tmp_path: Path) -> None:
    weights = write(tmp_path / "sae", "topk")
    table = {"dictionary": str(weights.folder), "fit_every": 3, "unit_tokens": 48}
    folder = encoded("run", {"sae": table}, capture={"hooks": [HOOK]})
    found = forebay.dictionary_fit(folder / "features-sae").sel(dictionary="sae")
    x, features = activations(folder), dense(folder, "sae")
    position = np.arange(len(x)) % 16
    sample = (position >= 1) & (np.arange(len(x)) % 3 == 0)
    decoded = features[sample] @ weights.tensors["W_dec"] + weights.tensors["b_dec"]
    error = ((decoded - x[sample]) ** 2).sum() / ((x[sample] - x[sample].mean(0)) ** 2).sum()
    cosine = (decoded * x[sample]).sum(1) / np.linalg.norm(decoded, axis=1) / np.linalg.norm(x[sample], axis=1)
    assert float(found["fvu"]) == pytest.approx(error, rel=1e-5)
    assert float(found["cosine"]) == pytest.approx(cosine.mean(), rel=1e-5)
    assert float(found["l0"]) == pytest.approx((features[position >= 1] > 0).sum(1).mean(), rel=1e-9)
    assert int(found["n_token"]) == (position >= 1).sum()


def test_a_store_says_which_dictionary_made_it(encoded: Encoded, tmp_path: Path) -> None:
    weights = write(tmp_path / "sae", "topk")
    folder = encoded("run", {"sae": {"dictionary": str(weights.folder)}})
    said = Store.open(folder / "features-sae").header.provenance["dictionaries"]["sae"]
    assert (said["hook"], said["n_feature"], said["k"], said["format"]) == (HOOK, FEATURES, K, "saelens")


def test_another_dictionary_in_the_same_folder_is_refused(
    encoded: Encoded, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    weights = write(tmp_path / "sae", "topk")
    folder = encoded("run", {"sae": {"dictionary": str(weights.folder)}})
    save_file(
        {name: 2 * value.astype(np.float32) for name, value in weights.tensors.items()},
        weights.folder / "sae_weights.safetensors",
    )
    recipe = make_recipe("run", capture={"unit_tokens": 208}, encode={"sae": {"dictionary": str(weights.folder)}})
    with pytest.raises(forebay.stores.errors.FingerprintMismatch, match=r"features-sae was made by another recipe"):
        forebay.run(recipe, folder)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"\[encode.sae\] says no dictionary"),
        ({"dictionary": "{sae}", "fusd": True}, r"Did you mean 'fused'"),
        ({"dictionary": "{sae}", "fused": "yes"}, r"fused: Input should be a valid boolean"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    source = str(write(tmp_path / "sae", "topk").folder)
    given = {key: source if value == "{sae}" else value for key, value in table.items()}
    with pytest.raises(RecipeError, match=message):
        read_recipe(make_recipe(encode={"sae": given}))


def test_encoding_without_captured_activations_is_refused_at_once(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    source = str(write(tmp_path / "sae", "topk").folder)
    with pytest.raises(RecipeError, match=r"reads activations, and there is no \[capture\]"):
        read_recipe(make_recipe(capture=None, encode={"sae": {"dictionary": source}}))


@pytest.mark.parametrize(
    ("hook", "d_in", "settings", "message"),
    [
        ("blocks.3.hook_resid_post", WIDTH, {}, r"does not have.* Did you mean 'blocks.\d.hook_resid_post'"),
        ("blocks.0.hook_resid_pre", WIDTH, {}, r"was not captured.*\.fused = true"),
        (HOOK, WIDTH - 1, {}, r"reads vectors of width 27; .* is 28 wide"),
        ("blocks.1.attn.hook_pattern", WIDTH, {"fused": True}, r"has no vector a token"),
        (HOOK, WIDTH, {"batch": 0}, r"batch = 0 must be at least 1"),
        (HOOK, WIDTH, {"layers": [1]}, r"is one dictionary, not a set of layers"),
    ],
)
def test_dictionaries_that_do_not_fit_the_model_are_refused_before_anything_is_computed(
    make_recipe: MakeRecipe, tmp_path: Path, hook: str, d_in: int, settings: dict[str, Any], message: str
) -> None:
    source = str(write(tmp_path / "sae", "topk", hook=hook, d_in=d_in).folder)
    with pytest.raises((SchemaError, DictionaryError), match=message):
        forebay.plan(make_recipe(encode={"sae": {"dictionary": source, **settings}}), tmp_path / "run")
    assert not (tmp_path / "run" / "features-sae").exists()


def test_a_unit_with_more_features_than_there_is_room_for_fails_and_says_so(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    texts = ["It is a truth universally acknowledged. " * 12] * 60
    weights = write(tmp_path / "sae", "standard")
    table = {"dictionary": str(weights.folder), "most_active": 1}
    recipe = make_recipe(texts=texts, capture={"unit_tokens": 2**14}, encode={"sae": {**table, "unit_tokens": 2**14}})
    outcome = forebay.run(recipe, tmp_path / "run")
    assert outcome.code == 1
    said = [json.loads(path.read_text())["error"] for step in outcome.steps for path in step.failed.values()]
    assert "Raise the step's `most_active`" in said[0]
