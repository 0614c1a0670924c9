"""Coders of sparsify compute here what they compute there, and what is written here is a coder of sparsify's.

The values are sparsify's own, by golden/write_sparsify.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forebay.stages.dictionaries.activation import Activation
from forebay.stages.dictionaries.dictionary import Dictionary, Provenance
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.save import save_dictionary

from .golden_values import (
    GOLDEN,
    assert_equal,
    assert_same_features,
    edit_json,
    edit_tensors,
    one,
    refused,
    values_of,
)

# case → the folder of the coder, where it reads and writes, its activation
CASES = {
    "topk": ("layers.10", "blocks.10.hook_resid_post", "blocks.10.hook_resid_post", ("topk", 5)),
    "expanded": ("layers.3.mlp", "blocks.3.mlp.hook_out", "blocks.3.mlp.hook_out", ("topk", 4)),
    "groupmax": ("h.2.attn", "blocks.2.attn.hook_out", "blocks.2.attn.hook_out", ("groupmax", 6)),
    "transcoder": ("layers.7.mlp", "blocks.7.mlp.hook_in", "blocks.7.mlp.hook_out", ("topk", 3)),
    "skip": ("layers.1.mlp", "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out", ("topk", 4)),
    "skip_of_2024": ("layers.5.mlp", "blocks.5.mlp.hook_in", "blocks.5.mlp.hook_out", ("topk", 2)),
    "bfloat16": ("layers.4/seed1", "blocks.4.hook_resid_post", "blocks.4.hook_resid_post", ("topk", 7)),
}


def folder_of(case: str) -> Path:
    return GOLDEN / "sparsify" / case / (CASES[case][0] if case in CASES else "layers.6")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A coder to be damaged."""
    return Path(shutil.copytree(folder_of("skip"), tmp_path / "layers.1.mlp"))


def a_dictionary(**changes: Any) -> Dictionary:
    """One that sparsify can express, unless it is changed."""
    d, width = 5, 12
    torch.manual_seed(3)
    bias = torch.randn(d)
    parts: dict[str, Any] = {
        "W_enc": torch.randn(d, width),
        "b_enc": torch.randn(width),
        "b_in": bias,
        "activation": Activation(kind="topk", k=3),
        "hook": "blocks.2.hook_resid_post",
        "W_dec": torch.randn(width, d),
        "b_dec": bias,
        "hook_out": "blocks.2.hook_resid_post",
        "provenance": Provenance(source="trained here", format="forebay"),
    }
    return Dictionary(**parts | changes)


@pytest.mark.parametrize("case", CASES)
def test_a_coder_encodes_and_decodes_as_sparsify_does(case: str) -> None:
    expected = values_of(GOLDEN / "sparsify" / case)
    coder = one(folder_of(case))
    features = coder.encode(expected["x"])
    assert_same_features(features, expected["features"])
    assert_equal(coder.reconstruct(expected["x"]), expected["out"])
    if coder.W_skip is None:
        assert_equal(coder.decode(features), expected["decoded"])
    else:
        zero = torch.zeros_like(expected["x"])
        assert_equal(coder.decode(features, zero), expected["decoded"])


@pytest.mark.parametrize("case", CASES)
def test_the_name_of_the_folder_says_where_a_coder_reads_and_writes(case: str) -> None:
    _, hook, hook_out, (kind, k) = CASES[case]
    coder = one(folder_of(case))
    assert (coder.hook, coder.hook_out) == (hook, hook_out)
    assert (coder.activation.kind, coder.activation.k) == (kind, k)


def test_of_equal_preactivations_the_lower_feature_wins_and_the_output_is_sparsifys() -> None:
    expected = values_of(GOLDEN / "sparsify" / "ties")
    coder = one(folder_of("ties"))
    half = coder.n_feature // 2
    assert torch.equal(coder.W_enc[:, :half], coder.W_enc[:, half:])
    features = coder.encode(expected["x"])
    assert_equal(features.sort(dim=-1).values, expected["features"].sort(dim=-1).values)
    odd = (features[:, :half] != 0) & (features[:, half:] == 0)
    assert odd.any()
    assert not ((features[:, :half] == 0) & (features[:, half:] != 0)).any()
    assert_equal(coder.reconstruct(expected["x"]), expected["out"])


@pytest.mark.parametrize("case", ["topk", "skip_of_2024"])
def test_an_autoencoder_and_a_transcoder_of_2024_subtract_the_decoders_bias(case: str) -> None:
    coder = one(folder_of(case))
    assert coder.b_in is not None
    assert torch.equal(coder.b_in, coder.b_dec)


@pytest.mark.parametrize("case", ["transcoder", "skip"])
def test_a_transcoder_subtracts_nothing(case: str) -> None:
    assert one(folder_of(case)).b_in is None


def test_bfloat16_weights_come_bit_by_bit() -> None:
    kept = load_file(folder_of("bfloat16") / "sae.safetensors")
    coder = one(folder_of("bfloat16"), dtype=torch.bfloat16)
    assert coder.dtype == torch.bfloat16
    for found, name in ((coder.W_enc.T, "encoder.weight"), (coder.W_dec, "W_dec"), (coder.b_dec, "b_dec")):
        assert torch.equal(found.view(torch.uint16), kept[name].view(torch.uint16))
    assert torch.equal(one(folder_of("bfloat16")).W_dec, kept["W_dec"].float())


def test_signed_coders_of_2024_keep_the_k_largest_by_magnitude(tmp_path: Path) -> None:
    """sparsify dropped `signed` before its first release: the formula is that of its code of 2024, in float64."""
    folder = Path(shutil.copytree(folder_of("topk"), tmp_path / "layers.10"))
    edit_json(folder / "cfg.json", signed=True, activation=None)
    x = values_of(GOLDEN / "sparsify" / "topk")["x"]
    kept = {name: value.double().numpy() for name, value in load_file(folder / "sae.safetensors").items()}
    h = (x.double().numpy() - kept["b_dec"]) @ kept["encoder.weight"].T + kept["encoder.bias"]
    expected = np.zeros_like(h)
    chosen = np.argsort(-np.abs(h), axis=-1)[:, :5]
    np.put_along_axis(expected, chosen, np.take_along_axis(h, chosen, -1), -1)
    assert (expected < 0).any()
    coder = one(folder)
    assert_same_features(coder.encode(x), torch.from_numpy(expected).float())
    assert_equal(coder.reconstruct(x), torch.from_numpy(expected @ kept["W_dec"] + kept["b_dec"]).float())


def test_what_a_coder_was_trained_with_is_kept_as_its_provenance() -> None:
    provenance = one(folder_of("expanded")).provenance
    assert provenance.format == "sparsify"
    assert provenance.details["expansion_factor"] == 3
    assert {path.name for path in provenance.files} == {"cfg.json", "sae.safetensors"}


# ── modules whose hook points are known ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("layers.0", "blocks.0.hook_resid_post"),
        ("layers.31.mlp", "blocks.31.mlp.hook_out"),
        ("h.4", "blocks.4.hook_resid_post"),
        ("layers.0.attention", "blocks.0.attn.hook_out"),
        ("layers.2.self_attn", "blocks.2.attn.hook_out"),
        ("layers.2.self_attn.o_proj", "blocks.2.attn.hook_out"),
        ("language_model.layers.6.mlp.down_proj", "blocks.6.mlp.hook_out"),
    ],
)
def test_modules_of_a_block_are_known_by_their_paths(tmp_path: Path, folder: str, hook: str) -> None:
    coder = one(shutil.copytree(folder_of("topk"), tmp_path / folder))
    assert (coder.hook, coder.hook_out) == (hook, hook)


@pytest.mark.parametrize("folder", ["embed_tokens", "norm", "layers.3.post_attention_layernorm", "encoder.layers.3"])
def test_a_module_that_is_no_hook_point_in_every_family_asks_for_hook(tmp_path: Path, folder: str) -> None:
    copy = shutil.copytree(folder_of("topk"), tmp_path / folder)
    assert 'hook="blocks.' in refused(copy)
    given = one(copy, hook="hook_embed")
    assert (given.hook, given.hook_out) == ("hook_embed", "hook_embed")


def test_a_transcoder_of_an_unknown_module_asks_for_both_hooks(tmp_path: Path) -> None:
    copy = shutil.copytree(folder_of("transcoder"), tmp_path / "layers.7.block_sparse_moe")
    assert "hook_out=" in refused(copy, hook="blocks.7.mlp.hook_in")
    given = one(copy, hook="blocks.7.mlp.hook_in", hook_out="blocks.7.mlp.hook_out")
    assert (given.hook, given.hook_out) == ("blocks.7.mlp.hook_in", "blocks.7.mlp.hook_out")


def test_the_callers_hook_of_an_autoencoder_is_where_it_writes_too() -> None:
    given = one(folder_of("topk"), hook="blocks.4.hook_resid_pre")
    assert (given.hook, given.hook_out) == ("blocks.4.hook_resid_pre", "blocks.4.hook_resid_pre")


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "binary"}, "activation 'binary'"),
        ({"activation": "groupmax", "signed": True}, "activation 'groupmax' with signs"),
        ({"normalize_io": True}, "normalize_io = True"),
        ({"k": 0}, "k is 0"),
        ({"k": None}, "k is None"),
        ({"d_in": "ten"}, "d_in is 'ten'"),
        ({"num_latents": 32}, "(31, 10); by cfg.json it is (32, 10)"),
        ({"skip_connection": False}, "W_skip, which this format does not know"),
    ],
)
def test_a_configuration_that_says_what_is_not_computed_is_refused(
    copied: Path, changes: dict[str, Any], says: str
) -> None:
    edit_json(copied / "cfg.json", **changes)
    assert says in refused(copied)


def test_a_missing_tensor_is_named(copied: Path) -> None:
    edit_tensors(copied / "sae.safetensors", W_dec=None)
    assert "has no W_dec" in refused(copied)


def test_a_tensor_of_another_shape_is_named(copied: Path) -> None:
    edit_tensors(copied / "sae.safetensors", W_dec=torch.zeros(30, 10))
    assert "W_dec has shape (30, 10); (31, 10) was expected" in refused(copied)
    edit_tensors(copied / "sae.safetensors", W_dec=torch.zeros(10, 31))
    assert "W_dec has shape (10, 31)" in refused(copied)


def test_weights_that_are_not_finite_are_counted(copied: Path) -> None:
    weight = load_file(copied / "sae.safetensors")["encoder.weight"]
    weight[2, 5] = torch.nan
    edit_tensors(copied / "sae.safetensors", encoder__weight=weight)
    assert "W_enc has 1 values that are NaN or infinite" in refused(copied)


def test_a_file_that_is_cut_off_is_refused(copied: Path) -> None:
    path = copied / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or cut off" in refused(copied)


def test_a_configuration_that_is_no_object_is_refused(copied: Path) -> None:
    (copied / "cfg.json").write_text("[1, 2]")
    assert "a JSON object was expected" in refused(copied)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_comes_back_bit_by_bit_under_any_name(tmp_path: Path, case: str) -> None:
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    coder = one(folder_of(case), dtype=dtype)
    again = one(save_dictionary(coder, tmp_path / "anything", format="sparsify"), dtype=dtype)
    for name in ("W_enc", "b_enc", "b_in", "W_dec", "b_dec", "W_skip"):
        before, after = getattr(coder, name), getattr(again, name)
        assert (before is None) == (after is None)
        assert before is None or (torch.equal(before, after) and before.dtype == after.dtype)
    assert (again.hook, again.hook_out) == (coder.hook, coder.hook_out)
    assert (again.activation.kind, again.activation.k) == (coder.activation.kind, coder.activation.k)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": Activation(kind="relu")}, "activation 'relu'"),
        ({"activation": Activation(kind="abstopk", k=3)}, "activation 'abstopk'"),
        ({"input_norm": "layer_norm"}, "input norm 'layer_norm'"),
        ({"head": 1}, "head 1 of blocks.2.hook_resid_post alone"),
        ({"b_in": None}, "autoencoder that subtracts nothing"),
        ({"b_in": torch.ones(5)}, "b_in that is not b_dec"),
        ({"W_dec": torch.ones(12, 4), "b_dec": torch.ones(4), "b_in": None}, "input 5 and output 4 wide"),
    ],
)
def test_what_sparsify_does_not_compute_is_not_written(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DictionaryError) as error:
        save_dictionary(a_dictionary(**changes), tmp_path / "out", format="sparsify")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["topk", "groupmax", "transcoder", "skip", "bfloat16", "trained here"])
def test_sparsify_loads_what_is_written_and_computes_the_same(tmp_path: Path, case: str) -> None:
    sparsify = pytest.importorskip("sparsify")
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    coder = a_dictionary() if case == "trained here" else one(folder_of(case), dtype=dtype)
    theirs = sparsify.SparseCoder.load_from_disk(save_dictionary(coder, tmp_path / "out", format="sparsify"))
    assert theirs.dtype == dtype
    ours, theirs = coder.to(dtype=torch.float32), theirs.float()
    x = torch.randn(23, ours.d_in)
    with torch.no_grad():
        encoded, out = theirs.encode(x), theirs(x).sae_out
    dense = torch.zeros(23, ours.n_feature).scatter(1, encoded.top_indices, encoded.top_acts)
    assert_same_features(ours.encode(x), dense)
    assert_equal(ours.reconstruct(x), out)


def test_the_written_configuration_is_sparsifys(tmp_path: Path) -> None:
    folder = save_dictionary(a_dictionary(), tmp_path / "out", format="sparsify")
    config = json.loads((folder / "cfg.json").read_text())
    ours = json.loads((folder_of("topk") / "cfg.json").read_text())
    assert set(ours) <= set(config)
    assert (config["d_in"], config["num_latents"], config["k"], config["transcode"]) == (5, 12, 3, False)
