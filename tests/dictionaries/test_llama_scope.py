"""Llama Scope is read as its authors compute: as SAELens does where decoder rows have length one, and where they have
not, by the closed form of the authors' own inference.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.load import load_dictionary

from .saelens_files import GOLDEN, agree, said_by_saelens

ROOT = GOLDEN / "llama_scope"
FOLDERS = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("golden.safetensors"))
D, WIDTH = 9, 31
MEANS = {"in": 2.5, "out": 0.75}
THRESHOLD = 0.3


def load(source: Path, **options: Any) -> Dictionary:
    found = load_dictionary(source, **options)
    assert isinstance(found, Dictionary)
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_with_decoder_rows_of_length_one_features_are_those_of_saelens(folder: str) -> None:
    values, said = said_by_saelens(ROOT / folder)
    dictionary = load(ROOT / folder)
    features = dictionary.encode(values["x"])
    assert torch.equal(features != 0, values["features"] != 0)
    agree(features, values["features"])
    agree(dictionary.reconstruct(values["x"]), values["reconstruction"])
    assert dictionary.hook == dictionary.hook_out == said["hook"]


def test_models_are_told_by_the_repositories() -> None:
    models = {folder.split("/")[0]: load(ROOT / folder).provenance.model for folder in FOLDERS}
    assert models == {
        "Llama-Scope-R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "Llama3_1-8B-Base-LXR-8x": "meta-llama/Llama-3.1-8B",
    }


@dataclass(frozen=True)
class Written:
    folder: Path
    tensors: dict[str, Tensor]


def written(folder: Path, *, successor: bool = False, transcodes: bool = False, **said: Any) -> Written:
    """A folder of either layout, with decoder rows of many lengths, and an input and an output of different scale."""
    random = torch.Generator().manual_seed(5)
    lengths = torch.linspace(0.4, 2.5, WIDTH)
    tensors = {
        "encoder.weight": torch.randn(WIDTH, D, generator=random) * 0.6,
        "encoder.bias": torch.randn(WIDTH, generator=random) * 0.25,
        "decoder.weight": torch.randn(D, WIDTH, generator=random) * lengths,
        "decoder.bias": torch.randn(D, generator=random) * 0.25,
    }
    hook = "blocks.8.ln2.hook_normalized" if transcodes else "blocks.8.hook_resid_post"
    hook_out = "blocks.8.hook_mlp_out" if transcodes else hook
    means = MEANS if transcodes else dict.fromkeys(MEANS, MEANS["in"])
    config = {
        "d_model": D,
        "hook_point_in": hook,
        "hook_point_out": hook_out,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
    }
    if successor:
        tensors["log_jumprelu_threshold"] = torch.linspace(-2, 0.5, WIDTH)
        tensors |= {f"dataset_average_activation_norm.{at}": torch.tensor(means[end]) for at, end in
                    ((hook, "in"), (hook_out, "out"))}  # fmt: skip
        config |= {"expansion_factor": WIDTH / D}
    else:
        config |= {"d_sae": WIDTH, "jump_relu_threshold": THRESHOLD, "dataset_average_activation_norm": means}
    (folder / "checkpoints").mkdir(parents=True)
    names = ("config.json", "sae_weights") if successor else ("hyperparams.json", "checkpoints/final")
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / f"{names[1]}.safetensors")
    (folder / names[0]).write_text(json.dumps({key: one for key, one in (config | said).items() if one != "absent"}))
    return Written(folder, {name: one.double() for name, one in tensors.items()})


def inference(made: Written, x: Tensor, scale_in: float, scale_out: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the authors' inference, the reconstruction, and the factor from these features to those before: the
    scales go into the weights, decoder rows are made of length one, then thresholds are compared.
    """
    tensors = made.tensors
    W_enc, b_enc = tensors["encoder.weight"].T, tensors["encoder.bias"] / scale_in
    W_dec, b_dec = tensors["decoder.weight"].T * scale_in / scale_out, tensors["decoder.bias"] / scale_out
    lengths = W_dec.norm(dim=-1)
    h = (x @ W_enc + b_enc) * lengths
    features = torch.where(h > THRESHOLD, h, 0)
    return features, features @ (W_dec / lengths[:, None]) + b_dec, scale_in / lengths


@pytest.mark.parametrize("transcodes", [False, True], ids=["autoencoder", "transcoder"])
def test_the_threshold_is_of_features_that_carry_the_decoders_length_in_units_of_the_output(
    tmp_path: Path, transcodes: bool
) -> None:
    made = written(tmp_path / "sae", transcodes=transcodes)
    scale_in = math.sqrt(D) / MEANS["in"]
    scale_out = math.sqrt(D) / MEANS["out"] if transcodes else scale_in
    dictionary = load(made.folder)
    x = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 0.3
    theirs, reconstruction, back = inference(made, x, scale_in, scale_out)
    features = dictionary.encode(x)
    assert torch.equal(features != 0, theirs != 0)
    assert 0.05 < float((theirs != 0).double().mean()) < 0.95
    agree(features, theirs * back)
    agree(dictionary.reconstruct(x), reconstruction)
    assert (dictionary.hook == dictionary.hook_out) != transcodes
    assert dictionary.denormalize != transcodes


def test_saelens_fires_other_features_where_rows_are_not_of_length_one(tmp_path: Path) -> None:
    made = written(tmp_path / "sae")
    scale = math.sqrt(D) / MEANS["in"]
    x = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 0.3
    h = (x * scale) @ made.tensors["encoder.weight"].T + made.tensors["encoder.bias"]
    as_saelens = h > THRESHOLD * scale
    fires = load(made.folder).encode(x) != 0
    assert bool((fires != as_saelens).any())
    without = load(written(tmp_path / "other", sparsity_include_decoder_norm=False).folder)
    assert torch.equal(without.encode(x) != 0, as_saelens)


def test_the_successors_thresholds_are_of_normalised_activations(tmp_path: Path) -> None:
    made = written(tmp_path / "sae", successor=True, transcodes=True)
    scale_in, scale_out = (math.sqrt(D) / MEANS[end] for end in ("in", "out"))
    dictionary = load(made.folder)
    x = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) + 0.3
    tensors = made.tensors
    h = (x * scale_in) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    fires = h * tensors["decoder.weight"].norm(dim=0) > tensors["log_jumprelu_threshold"].exp()
    expected = torch.where(fires, h, 0)
    assert torch.equal(dictionary.encode(x) != 0, fires)
    agree(dictionary.encode(x), expected)
    decoded = expected @ tensors["decoder.weight"].T + tensors["decoder.bias"]
    agree(dictionary.reconstruct(x), decoded / scale_out)


def test_weights_that_were_made_for_inference_are_not_scaled_again(tmp_path: Path) -> None:
    made = written(tmp_path / "sae", norm_activation="inference", dataset_average_activation_norm="absent")
    dictionary = load(made.folder)
    assert torch.equal(dictionary.W_enc.double(), made.tensors["encoder.weight"].T)
    lengths = made.tensors["decoder.weight"].norm(dim=0)
    assert dictionary.activation.threshold is not None
    agree(dictionary.activation.threshold, THRESHOLD / lengths)


def test_a_feature_whose_decoder_row_is_zero_never_fires(tmp_path: Path) -> None:
    made = written(tmp_path / "sae")
    path = made.folder / "checkpoints" / "final.safetensors"
    tensors = {name: one.float().contiguous() for name, one in made.tensors.items()}
    tensors["decoder.weight"][:, 4] = 0
    save_file(tensors, path)
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(8)) * 100
    features = load(made.folder).encode(x)
    assert not features[:, 4].any()
    assert features[:, 5].any()


def test_a_decoder_without_a_bias_and_one_that_is_subtracted_are_read_as_the_configuration_says(tmp_path: Path) -> None:
    subtracts = load(written(tmp_path / "subtracts", apply_decoder_bias_to_pre_encoder=True).folder)
    assert subtracts.b_in is not None
    assert torch.equal(subtracts.b_in, subtracts.b_dec)
    assert load(written(tmp_path / "not").folder).b_in is None
    without = written(tmp_path / "without", use_decoder_bias=False)
    with pytest.raises(DictionaryError, match=r"has decoder\.bias, which this format does not know"):
        load(without.folder)
    tensors = {name: one.float().contiguous() for name, one in without.tensors.items() if name != "decoder.bias"}
    save_file(tensors, without.folder / "checkpoints" / "final.safetensors")
    assert not load(without.folder).b_dec.any()


def test_weights_in_bfloat16_are_folded_in_float32(tmp_path: Path) -> None:
    made = written(tmp_path / "sae")
    low = {name: one.bfloat16().contiguous() for name, one in made.tensors.items()}
    save_file(low, made.folder / "checkpoints" / "final.safetensors")
    expected = low["encoder.weight"].T.double() * math.sqrt(D) / MEANS["in"]
    agree(load(made.folder).W_enc, expected)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"act_fn": "batchtopk"}, "act_fn is 'batchtopk'; 'jumprelu' was expected"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        ({"sparsity_include_decoder_norm": "yes"}, "sparsity_include_decoder_norm is 'yes'"),
        ({"jump_relu_threshold": "absent"}, "jump_relu_threshold is None"),
        ({"jump_relu_threshold": -1}, "jump_relu_threshold is -1"),
        ({"dataset_average_activation_norm": "absent"}, "the mean norm of activations, .* is None for 'in'"),
        ({"dataset_average_activation_norm": {"in": 0}}, "is 0 for 'in'"),
        ({"d_model": "9"}, "d_model is '9'"),
        ({"d_model": 8}, r"encoder.weight has shape \(31, 9\); \(31, 8\) was expected"),
        ({"d_sae": 30}, r"encoder.weight has shape \(31, 9\); \(30, 9\) was expected"),
        ({"hook_point_in": "absent", "hook_point_out": "absent"}, "does not say at which hook point it reads"),
        ({"apply_decoder_bias_to_pre_encoder": True, "hook_point_out": "blocks.8.hook_mlp_out"}, "of its output"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(tmp_path: Path, said: Any, match: str) -> None:
    with pytest.raises(DictionaryError, match=match):
        load(written(tmp_path / "sae", **said).folder)


def test_the_caller_says_where_it_reads(tmp_path: Path) -> None:
    dictionary = load(written(tmp_path / "sae").folder, hook="blocks.9.hook_resid_pre")
    assert (dictionary.hook, dictionary.hook_out) == ("blocks.9.hook_resid_pre",) * 2
