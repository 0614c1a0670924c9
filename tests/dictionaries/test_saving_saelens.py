"""Dictionaries are written as SAELens reads them, and come back as they were; what SAELens cannot say is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay.stages.dictionaries.activation import Activation
from forebay.stages.dictionaries.dictionary import Dictionary, Provenance
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.load import load_dictionary
from forebay.stages.dictionaries.save import save_dictionary

from .saelens_files import CASES, agree, golden

D_IN, N_FEATURE, D_OUT = 9, 31, 12
AUTOENCODER = {"hook": "blocks.5.hook_resid_mid", "hook_out": "blocks.5.hook_resid_mid"}
TRANSCODER = {"hook": "blocks.5.ln2.hook_normalized", "hook_out": "blocks.5.hook_mlp_out", "denormalize": False}


def _activation(kind: Any, random: torch.Generator) -> Activation:
    some = torch.rand(N_FEATURE, generator=random)
    parameters: Mapping[str, dict[str, Any]] = {
        "topk": {"k": 4},
        "abstopk": {"k": 4},
        "groupmax": {"k": 1},
        "jumprelu": {"threshold": some},
        "batchtopk": {"threshold": torch.full((N_FEATURE,), 0.7), "k": 5},
        "gated": {"r_mag": some - 0.5, "b_mag": some.flip(0) - 0.3},
    }
    return Activation(kind=kind, **parameters.get(kind, {}))


def made(kind: str, *, dtype: torch.dtype = torch.float32, skips: bool = False, **settings: Any) -> Dictionary:
    """A random dictionary: an autoencoder that subtracts nothing, unless settings say otherwise."""
    random = torch.Generator().manual_seed(len(kind))
    d_out = D_OUT if settings.get("hook_out", "") == TRANSCODER["hook_out"] else D_IN

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    settings = AUTOENCODER | settings
    if settings.pop("subtracts", False):
        settings["b_in"] = settings["b_dec"] = randn(d_out)
    return Dictionary(
        **{"b_dec": randn(d_out), **settings},
        W_enc=randn(D_IN, N_FEATURE),
        b_enc=randn(N_FEATURE),
        W_dec=randn(N_FEATURE, d_out),
        W_skip=randn(D_IN, d_out) if skips else None,
        activation=_activation(kind, random),
        provenance=Provenance(source="made here", format="none", model="EleutherAI/pythia-70m"),
    )


WRITTEN = {
    **{f"{kind} autoencoder": made(kind) for kind in ("relu", "gated", "topk", "abstopk", "jumprelu", "batchtopk")},
    **{
        f"{kind} autoencoder, {norm}, b_dec subtracted": made(kind, input_norm=norm, subtracts=True)
        for kind in ("relu", "gated", "topk", "jumprelu")
        for norm in ("none", "constant_norm_rescale", "layer_norm")
    },
    **{
        f"{kind} transcoder{', skip' * skips}": made(kind, skips=skips, **TRANSCODER)
        for kind in ("relu", "jumprelu", "batchtopk")
        for skips in (False, True)
    },
    "relu transcoder, layer_norm": made("relu", input_norm="layer_norm", **TRANSCODER),
    "jumprelu transcoder, constant_norm_rescale": made("jumprelu", input_norm="constant_norm_rescale", **TRANSCODER),
    "autoencoder with a skip connection": made("relu", skips=True, denormalize=False),
    "autoencoder that leaves a norm on its output": made("relu", input_norm="layer_norm", denormalize=False),
    "all heads": made("relu", hook="blocks.2.attn.hook_z", hook_out="blocks.2.attn.hook_z"),
    "one head": made("relu", hook="blocks.2.attn.hook_z", hook_out="blocks.2.attn.hook_z", head=3),
    **{
        f"{kind} autoencoder in {str(dtype)[6:]}": made(kind, dtype=dtype)
        for kind in ("relu", "jumprelu", "gated")
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    },
}


def assert_same(found: Dictionary, expected: Dictionary) -> None:
    """Every field bit for bit, apart from where it comes from; a BatchTopK is the JumpReLU that it computes."""
    for field in fields(Dictionary):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, Tensor):
            assert torch.equal(one, other), field.name
            assert one.dtype == other.dtype, field.name
        elif field.name not in ("activation", "provenance"):
            assert one == other, field.name
    ours, theirs = found.activation, expected.activation
    batch = theirs.kind == "batchtopk"
    assert (ours.kind, ours.k) == (("jumprelu", None) if batch else (theirs.kind, theirs.k))
    for name in ("threshold", "r_mag", "b_mag"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None)
        assert other is None or (one.dtype == torch.float32 and torch.equal(one, other))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Dictionary:
    found = load_dictionary(folder, dtype=dtype)
    assert isinstance(found, Dictionary)
    return found


@pytest.mark.parametrize("name", WRITTEN)
def test_a_dictionary_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    dictionary = WRITTEN[name]
    found = load(save_dictionary(dictionary, tmp_path / "sae"), dictionary.dtype)
    assert_same(found, dictionary)
    assert (found.provenance.format, found.provenance.model) == ("saelens", "EleutherAI/pythia-70m")


@pytest.mark.parametrize("name", CASES)
def test_what_saelens_wrote_is_written_again_as_the_same(tmp_path: Path, name: str) -> None:
    made = golden(name, tmp_path / "theirs")
    first = load(made.folder)
    second = load(save_dictionary(first, tmp_path / "ours"))
    assert_same(second, first)
    assert second.provenance.model == first.provenance.model
    said, again = (json.loads((tmp_path / whose / "cfg.json").read_text()) for whose in ("theirs", "ours"))
    assert again["metadata"]["context_size"] == said.get("metadata", said)["context_size"]


def test_the_file_says_what_saelens_is_to_do(tmp_path: Path) -> None:
    cfg = json.loads((save_dictionary(WRITTEN["all heads"], tmp_path / "z") / "cfg.json").read_text())
    assert (cfg["reshape_activations"], cfg["metadata"]["hook_head_index"]) == ("hook_z", None)
    cfg = json.loads((save_dictionary(WRITTEN["one head"], tmp_path / "head") / "cfg.json").read_text())
    assert (cfg["reshape_activations"], cfg["metadata"]["hook_head_index"]) == ("none", 3)
    cfg = json.loads((save_dictionary(WRITTEN["relu transcoder"], tmp_path / "mlp") / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_out"], cfg["apply_b_dec_to_input"]) == ("transcoder", D_OUT, False)
    assert cfg["metadata"]["hook_name_out"] == "blocks.5.hook_mlp_out"
    cfg = json.loads((save_dictionary(made("topk", subtracts=True), tmp_path / "topk") / "cfg.json").read_text())
    assert (cfg["k"], cfg["apply_b_dec_to_input"]) == (4, True)
    cfg = json.loads((save_dictionary(WRITTEN["batchtopk autoencoder"], tmp_path / "batch") / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["metadata"]["training_architecture"]) == ("jumprelu", "batchtopk")


def test_saelens_is_told_to_compute_in_a_dtype_that_does_not_round_thresholds(tmp_path: Path) -> None:
    rounded = made("jumprelu", dtype=torch.bfloat16)
    exact = replace(rounded, activation=Activation(kind="jumprelu", threshold=torch.full((N_FEATURE,), 0.25)))
    for dictionary, dtype in ((rounded, "float32"), (exact, "bfloat16")):
        folder = save_dictionary(dictionary, tmp_path / dtype)
        assert json.loads((folder / "cfg.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    ("dictionary", "match"),
    [
        (made("groupmax"), "SAELens has no groupmax autoencoders"),
        (made("topk", **TRANSCODER), "SAELens has no topk transcoders"),
        (made("gated", skips=True), "SAELens has no gated transcoders"),
        (made("relu", b_in=torch.ones(D_IN)), "b_in is another vector here"),
        (made("relu", **TRANSCODER, b_in=torch.ones(D_IN)), "subtract nothing from the input, and this one b_in"),
        (made("relu", **TRANSCODER | {"denormalize": True}, input_norm="layer_norm"), "do not undo the input's layer_"),
        (made("relu", skips=True, **TRANSCODER, input_norm="layer_norm"), "the skip connection of SAELens reads"),
    ],
)
def test_what_saelens_could_not_reproduce_is_refused(tmp_path: Path, dictionary: Dictionary, match: str) -> None:
    with pytest.raises(DictionaryError, match=match):
        save_dictionary(dictionary, tmp_path / "sae")


def _inputs(dictionary: Dictionary) -> Tensor:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, D_IN, generator=random) * torch.linspace(0.3, 3, 10).view(2, 5, 1) + 0.5
    return x.to(dictionary.dtype).double()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITTEN)
def test_saelens_opens_what_is_written_and_computes_the_same(tmp_path: Path, name: str) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    dictionary = WRITTEN[name]
    folder = save_dictionary(dictionary, tmp_path / "sae")
    sae = sae_lens.SAE.load_from_disk(folder)
    wide = dictionary.to(dtype=sae.W_enc.dtype)
    x = _inputs(dictionary)
    heads = (3,) if sae.cfg.reshape_activations == "hook_z" else ()
    with torch.no_grad():
        given = x.view(2, 5, *heads, -1).to(sae.W_enc.dtype)
        features, reconstruction = sae.encode(given), sae(given).flatten(2)
    # In less than 32 bits SAELens rounds twice where x W + b is rounded once here.
    close = 1e-6 if sae.W_enc.dtype in (torch.float32, torch.float64) else 2**-7
    agree(wide.encode(x), features, close)
    agree(wide.reconstruct(x), reconstruction, close)
    assert sae.cfg.metadata.hook_name == dictionary.hook
    assert sae.cfg.metadata.model_name == "EleutherAI/pythia-70m"
