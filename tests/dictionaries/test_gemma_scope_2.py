"""Gemma Scope 2 is read as SAELens reads it, and its cross-layer transcoders as their closed form, lazily."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forebay.stages.dictionaries.activation import Sparse
from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.load import load_dictionary
from forebay.stages.dictionaries.transcoders import TranscoderSet

from .saelens_files import GOLDEN, agree, said_by_saelens

ROOT = GOLDEN / "gemma_scope_2"
FOLDERS = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("params.safetensors"))
POINTS = {
    "resid_post/layer_17_width_16k_l0_big": ("blocks.17.hook_resid_post",) * 2,
    "attn_out/layer_9_width_16k_l0_small": ("blocks.9.attn.hook_z",) * 2,
    "mlp_out_all/layer_0_width_262k_l0_medium": ("blocks.0.hook_mlp_out",) * 2,
    "transcoder_all/layer_5_width_16k_l0_big": ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out"),
    "transcoder/layer_12_width_16k_l0_small_affine": ("blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out"),
}


def load(source: Path, **options: Any) -> Dictionary:
    found = load_dictionary(source, **options)
    assert isinstance(found, Dictionary)
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_features_are_those_of_saelens(folder: str) -> None:
    dictionary = load(ROOT / folder)
    values, _ = said_by_saelens(ROOT / folder)
    features = dictionary.encode(values["x"])
    assert torch.equal(features != 0, values["features"] != 0)
    agree(features, values["features"])
    agree(dictionary.reconstruct(values["x"]), values["reconstruction"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_skip_connection_multiplies_from_the_right_as_it_is_stored(folder: str) -> None:
    dictionary = load(ROOT / folder)
    assert (dictionary.W_skip is not None) == folder.endswith("affine")
    x = torch.randn(6, dictionary.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    said = {name: one.double() for name, one in load_file(ROOT / folder / "params.safetensors").items()}
    h = x @ said["w_enc"] + said["b_enc"]
    features = torch.where(h > said["threshold"], h, 0)
    expected = features @ said["w_dec"] + said["b_dec"]
    if "affine_skip_connection" in said:
        expected = expected + x @ said["affine_skip_connection"]
    agree(dictionary.encode(x), features)
    agree(dictionary.reconstruct(x), expected)


@pytest.mark.parametrize("folder", FOLDERS)
def test_places_in_transformers_become_hook_points(folder: str) -> None:
    dictionary = load(ROOT / folder)
    _, said = said_by_saelens(ROOT / folder)
    assert (dictionary.hook, dictionary.hook_out) == POINTS[folder.split("/", 1)[1]]
    assert dictionary.denormalize == (dictionary.hook == dictionary.hook_out)
    assert dictionary.provenance.model == said["model"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_without_a_configuration_the_folder_says_the_same(folder: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / folder / "config.json").unlink(missing_ok=True)
    found, expected = load(tmp_path / folder), load(ROOT / folder)
    assert (found.hook, found.hook_out) == (expected.hook, expected.hook_out)
    assert found.provenance.model == expected.provenance.model


def copied(tmp_path: Path, **said: Any) -> Path:
    """A transcoder without a skip connection, with other words in its configuration."""
    folder = tmp_path / "made"
    shutil.copytree(ROOT / "gemma-scope-2-1b-it/transcoder_all/layer_5_width_16k_l0_big", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return folder


UNKNOWN = "model.layers.5.post_attention_layernorm.output"


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"architecture": "topk"}, "architecture is 'topk'; 'jump_relu' was expected"),
        ({"type": "crosscoder"}, "a crosscoder makes one set of features of several layers"),
        ({"type": "lorsa"}, "type is 'lorsa'"),
        ({"affine_connection": True}, "has no affine_skip_connection; config.json says affine_connection True"),
        ({"hf_hook_point_in": UNKNOWN}, "'model.layers.5.post_attention_layernorm.output' is no place .* hook="),
        ({"hf_hook_point_out": UNKNOWN}, "is no place that forebay knows; give it with hook_out="),
        ({"hf_hook_point_in": None}, "does not say at which hook point it reads"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(tmp_path: Path, said: Any, match: str) -> None:
    with pytest.raises(DictionaryError, match=match):
        load(copied(tmp_path, **said))


def test_a_place_that_is_not_known_can_be_given(tmp_path: Path) -> None:
    dictionary = load(copied(tmp_path, hf_hook_point_in=UNKNOWN), hook="blocks.5.hook_attn_out")
    assert (dictionary.hook, dictionary.hook_out) == ("blocks.5.hook_attn_out", "blocks.5.hook_mlp_out")
    both = load(copied(tmp_path / "x", hf_hook_point_in=UNKNOWN, hf_hook_point_out=UNKNOWN), hook="hook_embed")
    assert (both.hook, both.hook_out) == ("hook_embed", "hook_embed")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"threshold": None}, "has no threshold"),
        ({"w_gate": torch.ones(3)}, "has w_gate, which this format does not know"),
        ({"affine_skip_connection": torch.ones(3, 4)}, "has a affine_skip_connection"),
        ({"b_enc": torch.ones(23)}, r"b_enc has shape \(23,\)"),
        ({"w_dec": torch.ones(2, 3)}, r"W_dec has shape \(2, 3\)"),
        ({"b_dec": torch.full((11,), torch.inf)}, "b_dec has 11 values that are NaN or infinite"),
    ],
)
def test_weights_that_do_not_make_the_dictionary_are_refused(tmp_path: Path, change: Any, match: str) -> None:
    folder = copied(tmp_path)
    tensors = load_file(folder / "params.safetensors") | change
    save_file({name: one for name, one in tensors.items() if one is not None}, folder / "params.safetensors")
    with pytest.raises(DictionaryError, match=match):
        load(folder)


# ── cross-layer transcoders ──────────────────────────────────────────────────────────────────────────────────────────

D_IN, D_OUT, WIDTH, N_LAYERS = 7, 9, (24, 26, 25), 3
CONFIG = {
    "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
    "width": sum(WIDTH),
    "model_name": "google/gemma-3-270m-pt",
    "architecture": "jump_relu",
    "l0": 150,
    "affine_connection": True,
    "type": "clt",
}


@dataclass(frozen=True)
class Written:
    folder: Path
    layers: list[dict[str, Tensor]]


def write_clt(folder: Path, skips: bool = True, dtype: torch.dtype = torch.float32, **said: Any) -> Written:
    """A random set of three layers of different widths; rows of layers before its own are written too, and not zero."""
    folder.mkdir(parents=True)
    layers = []
    for layer, width in enumerate(WIDTH):
        random = torch.Generator().manual_seed(layer)
        tensors = {
            "w_enc": torch.randn(D_IN, width, generator=random),
            "b_enc": torch.randn(width, generator=random),
            "w_dec": torch.randn(width, N_LAYERS, D_OUT, generator=random),
            "b_dec": torch.randn(D_OUT, generator=random),
            "threshold": torch.rand(width, generator=random),
        }
        if skips:
            tensors["affine_skip_connection"] = torch.randn(D_IN, D_OUT, generator=random)
        tensors = {name: one if name == "threshold" else one.to(dtype) for name, one in tensors.items()}
        save_file(tensors, folder / f"params_layer_{layer}.safetensors")
        layers.append({name: one.double() for name, one in tensors.items()})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"affine_connection": skips} | said))
    return Written(folder, layers)


def open_clt(source: Path, **options: Any) -> TranscoderSet:
    found = load_dictionary(source, **options)
    assert isinstance(found, TranscoderSet)
    return found


@pytest.mark.parametrize("skips", [True, False], ids=["affine", "plain"])
def test_cross_layer_transcoders_compute_their_closed_form(tmp_path: Path, skips: bool) -> None:
    written = write_clt(tmp_path / "clt" / "width_75_l0_big", skips)
    transcoders = open_clt(written.folder)
    x = torch.randn(N_LAYERS, 11, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    features = []
    for layer, weights in enumerate(written.layers):
        h = x[layer] @ weights["w_enc"] + weights["b_enc"]
        features.append(torch.where(h > weights["threshold"], h, 0))
        agree(transcoders.encode(layer, x[layer]), features[-1])
    sparse = {layer: Sparse.from_dense(transcoders.encode(layer, x[layer])) for layer in range(N_LAYERS)}
    for target, weights in enumerate(written.layers):
        expected = weights["b_dec"].expand(11, D_OUT)
        for layer in range(target + 1):
            expected = expected + features[layer] @ written.layers[layer]["w_dec"][:, target]
        if skips:
            expected = expected + x[target] @ weights["affine_skip_connection"]
        agree(transcoders.decode(target, sparse, x[target]), expected)


def test_a_set_says_its_sizes_and_places(tmp_path: Path) -> None:
    transcoders = open_clt(write_clt(tmp_path / "set").folder)
    assert (transcoders.n_features, transcoders.d_in, transcoders.d_out) == (WIDTH, D_IN, D_OUT)
    assert transcoders.hooks_in == tuple(f"blocks.{layer}.mlp.hook_in" for layer in range(N_LAYERS))
    assert transcoders.hooks_out == tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(N_LAYERS))
    assert transcoders.cross_layer
    assert transcoders.provenance.model == "google/gemma-3-270m"
    assert [path.name for path in transcoders.provenance.files] == [
        "config.json",
        *(f"params_layer_{layer}.safetensors" for layer in range(N_LAYERS)),
    ]


def test_chosen_rows_are_read_in_any_order_and_those_before_the_own_layer_never(tmp_path: Path) -> None:
    written = write_clt(tmp_path / "set")
    transcoders = open_clt(written.folder)
    rows = transcoders.decoder_rows(1, 2, [20, 0, 7])
    assert torch.equal(rows.double(), written.layers[1]["w_dec"][[20, 0, 7], 2])
    assert torch.equal(transcoders.decoder_rows(0, 1).double(), written.layers[0]["w_dec"][:, 1])
    with pytest.raises(DictionaryError, match="features of layer 2 write at layers 2 to 2, not at 1"):
        transcoders.decoder_rows(2, 1)


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    written = write_clt(tmp_path / "set")
    for layer in range(N_LAYERS):  # what follows the headers is made a hole
        path = written.folder / f"params_layer_{layer}.safetensors"
        size, header = path.stat().st_size, int.from_bytes(path.read_bytes()[:8], "little") + 8
        with path.open("r+b") as file:
            file.truncate(header)
            file.truncate(size)
    transcoders = open_clt(written.folder)
    assert transcoders.n_features == WIDTH
    assert not transcoders.decoder_rows(0, 2).any()


def test_a_set_in_bfloat16_keeps_its_thresholds_and_can_be_pickled(tmp_path: Path) -> None:
    written = write_clt(tmp_path / "set", dtype=torch.bfloat16)
    transcoders = pickle.loads(pickle.dumps(open_clt(written.folder, dtype=torch.bfloat16)))  # noqa: S301  our own
    encoder = transcoders.encoder(1)
    assert encoder.dtype == torch.bfloat16
    assert torch.equal(encoder.W_enc.double(), written.layers[1]["w_enc"])
    assert torch.equal(encoder.activation.threshold.double(), written.layers[1]["threshold"])


def test_a_set_without_a_configuration_is_told_by_its_folder(tmp_path: Path) -> None:
    written = write_clt(tmp_path / "gemma-scope-2-1b-pt" / "clt" / "width_75_l0_big_affine")
    (written.folder / "config.json").unlink()
    transcoders = open_clt(written.folder)
    assert (transcoders.hooks_in[2], transcoders.hooks_out[2]) == ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    assert transcoders.provenance.model == "google/gemma-3-1b-pt"
    shutil.move(written.folder, tmp_path / "elsewhere")
    with pytest.raises(DictionaryError, match=r"has no config\.json that says where it reads and writes"):
        open_clt(tmp_path / "elsewhere")


def _resave(path: Path, **change: Tensor) -> None:
    save_file(load_file(path) | change, path)


def test_a_set_with_a_gap_a_double_or_a_layer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "set").folder
    with pytest.raises(DictionaryError, match="its hook points cannot be given"):
        open_clt(folder, hook="blocks.0.hook_resid_mid")
    shutil.copy(folder / "params_layer_2.safetensors", folder / "layer_2_width_25_l0_big.safetensors")
    with pytest.raises(DictionaryError, match="has 2 files of layer 2: layer_2_width_25_l0_big"):
        open_clt(folder)
    (folder / "layer_2_width_25_l0_big.safetensors").unlink()
    _resave(folder / "params_layer_2.safetensors", w_dec=torch.ones(25, 4, D_OUT))
    with pytest.raises(DictionaryError, match=r"w_dec has shape \(25, 4, 9\); \(25, 3, 9\) was expected, of 3 layers"):
        open_clt(folder)
    _resave(folder / "params_layer_2.safetensors", w_dec=torch.ones(25, 3, D_OUT), w_enc=torch.ones(D_IN + 1, 25))
    with pytest.raises(DictionaryError, match=r"affine_skip_connection has shape \(7, 9\); \(8, 9\) was expected"):
        open_clt(folder)
    (folder / "params_layer_1.safetensors").unlink()
    with pytest.raises(DictionaryError, match="has no file of layer 1, and one of layer 2"):
        open_clt(folder)


def test_layers_of_different_widths_of_the_stream_are_refused(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "set", skips=False).folder
    _resave(folder / "params_layer_0.safetensors", w_enc=torch.ones(D_IN + 1, WIDTH[0]))
    with pytest.raises(DictionaryError, match=r"layers of one width were expected; theirs are \[\(7, 9\), \(8, 9\)\]"):
        open_clt(folder)


def test_a_layer_that_is_cut_off_or_not_finite_is_refused(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "set").folder
    _resave(folder / "params_layer_1.safetensors", b_dec=torch.full((D_OUT,), torch.nan))
    transcoders = open_clt(folder)
    with pytest.raises(DictionaryError, match="b_dec has 9 values that are NaN or infinite"):
        transcoders.decoder_bias(1)
    path = folder / "params_layer_0.safetensors"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DictionaryError, match="cut off"):
        transcoders.encoder(0)
    with pytest.raises(DictionaryError, match="cut off"):
        open_clt(folder)
