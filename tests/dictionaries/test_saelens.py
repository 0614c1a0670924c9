"""Dictionaries of SAELens are read as SAELens computes them, and refused by name where that is not known."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.formats.format import read_pickled
from forebay.stages.dictionaries.formats.hub_names import hook_of
from forebay.stages.dictionaries.load import load_dictionary

from .saelens_files import CASES, D_IN, D_OUT, D_SAE, Golden, agree, cfg_of, golden, tensors_of, write_folder

EXACT = [name for name in CASES if "ties" not in name]
KINDS = {
    **{name: name for name in ("gated", "topk", "abstopk", "jumprelu", "batchtopk")},
    **dict.fromkeys(("standard", "transcoder", "skip_transcoder"), "relu"),
    **dict.fromkeys(("jumprelu_transcoder", "jumprelu_skip_transcoder"), "jumprelu"),
    "matryoshka_batchtopk": "batchtopk",
}


def load(folder: Path, **options: Any) -> Dictionary:
    found = load_dictionary(folder, **options)
    assert isinstance(found, Dictionary)
    return found


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    return golden(request.param, tmp_path / "sae")


@pytest.mark.parametrize("case", EXACT, indirect=True)
def test_features_and_reconstructions_are_those_of_saelens(case: Golden) -> None:
    dictionary = load(case.folder)
    features = dictionary.encode(case.x)
    assert torch.equal(features != 0, case.features != 0)
    agree(features, case.features)
    agree(dictionary.reconstruct(case.x), case.reconstruction)
    agree(dictionary.decode(case.features, case.x), case.reconstruction)
    sparse = dictionary.encode_sparse(case.x.flatten(0, 1))
    agree(dictionary.decode_sparse(sparse, case.x.flatten(0, 1)), case.reconstruction.flatten(0, 1))


@pytest.mark.parametrize("case", EXACT, indirect=True)
def test_kind_place_and_origin_are_those_of_the_file(case: Golden) -> None:
    dictionary = load(case.folder)
    cfg = json.loads((case.folder / "cfg.json").read_text())
    metadata = cfg.get("metadata", cfg)
    architecture = "topk" if "activation_fn_kwargs" in cfg else case.how["architecture"]
    assert dictionary.activation.kind == KINDS[architecture]
    assert dictionary.hook == metadata.get("hook_name", metadata.get("hook_point"))
    assert dictionary.hook_out == metadata.get("hook_name_out", dictionary.hook)
    assert dictionary.provenance.model == "gpt2-small"
    assert dictionary.provenance.details == cfg
    assert {path.name for path in dictionary.provenance.files} >= {"cfg.json", "sae_weights.safetensors"}


@pytest.mark.parametrize("case", [name for name in CASES if "bfloat16" in name], indirect=True)
def test_in_bfloat16_the_same_features_fire_with_the_values_of_saelens(case: Golden) -> None:
    dictionary = load(case.folder, dtype=torch.bfloat16)
    assert case.low is not None
    features = dictionary.encode(case.x)
    assert features.dtype == torch.bfloat16
    assert torch.equal(features != 0, case.low[0] != 0)
    # SAELens rounds twice where x W + b is rounded once here
    agree(features, case.low[0], 2**-7)
    agree(dictionary.reconstruct(case.x), case.low[1], 2**-6)


def test_a_threshold_stays_float32_in_a_bfloat16_dictionary(tmp_path: Path) -> None:
    bound = torch.full((D_SAE,), 0.1)
    assert bound.bfloat16()[0] > bound[0]
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of().items()} | {"threshold": bound}
    tensors["W_enc"] = torch.zeros_like(tensors["W_enc"])
    tensors["b_enc"] = torch.full((D_SAE,), 0.1).bfloat16()
    folder = write_folder(tmp_path / "sae", cfg_of("jumprelu", dtype="bfloat16"), tensors)
    dictionary = load(folder, dtype=torch.bfloat16)
    assert dictionary.activation.threshold is not None
    assert dictionary.activation.threshold.dtype == torch.float32
    # 0.1 in bfloat16 is above 0.1 and not above itself: all features fire, and none would with a rounded threshold.
    assert bool((dictionary.encode(torch.zeros(1, D_IN)) != 0).all())


@pytest.mark.parametrize("case", ["topk_ties", "abstopk_ties"], indirect=True)
def test_of_features_that_tie_saelens_takes_any_and_the_lower_is_taken_here(case: Golden) -> None:
    dictionary = load(case.folder)
    features = dictionary.encode(case.x)
    # Feature i is like feature 29 − i in all its weights.
    half = dictionary.n_feature // 2
    twins = [found[..., :half] + found[..., half:].flip(-1) for found in (features, case.features)]
    ranked = [found.abs().sort(-1).values for found in (features, case.features)]
    assert torch.equal(*ranked)
    lower, upper = features[..., :half] != 0, features[..., half:].flip(-1) != 0
    once = lower ^ upper
    assert bool(once.any())
    assert not bool((upper & ~lower).any())
    # Where k ends within no group of equal values, SAELens has the same choice.
    h = dictionary.preactivations(case.x)
    size = (h.abs() if case.how["architecture"] == "abstopk" else h).sort(-1, descending=True).values
    clear = size[..., 4] != size[..., 5]
    assert torch.equal(twins[0][clear], twins[1][clear])
    agree(dictionary.decode(case.features), case.reconstruction)


def test_a_checkpoint_of_batchtopk_has_its_one_threshold_for_every_feature(tmp_path: Path) -> None:
    made = golden("batchtopk_unscaled_none", tmp_path / "sae")
    dictionary = load(made.folder)
    assert dictionary.activation.kind == "batchtopk"
    assert dictionary.activation.threshold is not None
    assert torch.equal(dictionary.activation.threshold, torch.full((dictionary.n_feature,), 1.3))
    assert dictionary.activation.k is None  # 4.5 on average is no k of a token
    assert load(golden("matryoshka_none", tmp_path / "other").folder).activation.k == 4


def test_a_head_of_its_own_and_heads_laid_flat_are_told_apart(tmp_path: Path) -> None:
    one = cfg_of(metadata=cfg_of()["metadata"] | {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 0})
    assert load(write_folder(tmp_path / "one", one, tensors_of())).head == 0
    flat = load(golden("hook_z", tmp_path / "flat").folder)
    assert (flat.head, flat.hook, flat.d_in) == (None, "blocks.3.attn.hook_z", 15)


def test_a_finetuning_factor_acts_when_decoding_and_not_on_features(tmp_path: Path) -> None:
    factor = torch.linspace(0.5, 2, D_SAE)
    tensors = tensors_of(scaling_factor=factor)
    cfg = {"hook_name": "blocks.1.hook_resid_pre", "d_in": D_IN, "d_sae": D_SAE, "finetuning_scaling_factor": True}
    dictionary = load(write_folder(tmp_path / "sae", cfg, tensors))
    x = torch.randn(11, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    W_enc, b_enc, W_dec, b_dec = (tensors[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    features = ((x - b_dec) @ W_enc + b_enc).relu()
    agree(dictionary.encode(x), features)
    agree(dictionary.reconstruct(x), (features * factor.double()) @ W_dec + b_dec)


def test_a_factor_for_activations_may_stand_in_the_configuration_or_beside_it(tmp_path: Path) -> None:
    cfg = cfg_of(normalize_activations="expected_average_only_in")
    x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(2))
    tensors = tensors_of()
    expected = ((x * 1.7 - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    said = load(write_folder(tmp_path / "said", cfg | {"norm_scaling_factor": 1.7}, tensors))
    beside = load(write_folder(tmp_path / "beside", cfg, tensors, {"scaling_factor": 1.7, "has_whitening": False}))
    for dictionary in (said, beside):
        agree(dictionary.encode(x), expected)
    with pytest.raises(DictionaryError, match=r"gives the factor 1\.5, activation_scaler\.json 1\.7"):
        load(write_folder(tmp_path / "beside", cfg | {"norm_scaling_factor": 1.5}, tensors, {"scaling_factor": 1.7}))


def test_what_was_folded_when_it_was_saved_is_not_folded_again(tmp_path: Path) -> None:
    tensors, scaler = tensors_of(), {"scaling_factor": 3.0, "has_whitening": False}
    dictionary = load(write_folder(tmp_path / "sae", cfg_of(), tensors, scaler))
    assert torch.equal(dictionary.W_enc, tensors["W_enc"])
    assert torch.equal(dictionary.b_dec, tensors["b_dec"])


@pytest.mark.parametrize("scaler", [None, {"scaling_factor": None, "has_whitening": False}])
def test_without_its_factor_a_dictionary_of_scaled_activations_is_refused(tmp_path: Path, scaler: Any) -> None:
    cfg = cfg_of(normalize_activations="expected_average_only_in")
    with pytest.raises(DictionaryError, match=r"nowhere to be found.*norm_scaling_factor"):
        load(write_folder(tmp_path / "sae", cfg, tensors_of(), scaler))


@pytest.mark.parametrize("factor", [0, -1.5, "1.7", True, [1.7], 1e400])
def test_a_factor_that_is_no_positive_number_is_refused(tmp_path: Path, factor: Any) -> None:
    cfg = cfg_of(normalize_activations="expected_average_only_in", norm_scaling_factor=factor)
    with pytest.raises(DictionaryError, match=r"norm_scaling_factor is .*a positive number was expected"):
        load(write_folder(tmp_path / "sae", cfg, tensors_of()))


def test_whitening_without_its_matrices_is_refused(tmp_path: Path) -> None:
    cfg = cfg_of(normalize_activations="covariance_whitening")
    with pytest.raises(DictionaryError, match=r"without a activation_whitening\.safetensors"):
        load(write_folder(tmp_path / "sae", cfg, tensors_of()))


THRESHOLD = torch.ones(D_SAE)
GATES = {name: torch.ones(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
OLD = {"hook_name": "blocks.1.hook_resid_pre", "d_in": D_IN, "d_sae": D_SAE}


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        (cfg_of("temporal"), "architecture 'temporal' is no encoder.*earlier tokens"),
        (cfg_of("matching_pursuit"), "architecture 'matching_pursuit'.*one after another"),
        (cfg_of("jumpreluu"), "architecture 'jumpreluu' is not known. Did you mean 'jumprelu'?"),
        (cfg_of(7), "architecture is 7; str was expected"),
        (cfg_of(normalize_activations="layernorm"), "normalize_activations is 'layernorm'.*Did you mean 'layer_norm'?"),
        (cfg_of(normalize_activations="constant_scalar_rescale"), "normalize_activations is 'constant_scalar_rescale'"),
        (cfg_of(reshape_activations="hook_q"), "reshape_activations is 'hook_q'"),
        (cfg_of(apply_b_dec_to_inputs=False), "'apply_b_dec_to_inputs' is not known.*'apply_b_dec_to_input'"),
        (cfg_of(decoder_temperature=2), "'decoder_temperature' is not known, and may change what comes out"),
        (cfg_of(rescale_acts_by_decoder_norm=True), "rescale_acts_by_decoder_norm is not known of a standard"),
        (cfg_of(apply_b_dec_to_input="no"), "apply_b_dec_to_input is 'no'; bool was expected"),
        (cfg_of(d_in="7"), "d_in is '7'; int was expected"),
        (cfg_of(d_in=True), "d_in is True; int was expected"),
        (cfg_of(d_sae=None), "has no d_sae"),
        (cfg_of(d_sae=D_SAE + 1), r"W_enc has shape \(7, 26\); \(7, 27\) was expected"),
        (cfg_of(d_in=D_IN - 1), r"W_enc has shape \(7, 26\); \(6, 26\) was expected"),
        (cfg_of(metadata=[]), "metadata is .*dict was expected"),
        (cfg_of(metadata={"sae_lens_version": "newest"}), "sae_lens_version is 'newest'"),
        (cfg_of(metadata=cfg_of()["metadata"] | {"hook_name": "blocks.3.hook_resid_pots"}), "hook_resid_post.*hook="),
        (cfg_of(metadata=cfg_of()["metadata"] | {"hook_name": "blocks.3.hook_mlp_in"}), "hook_mlp_in.*hook="),
        (cfg_of(metadata={"sae_lens_version": "6.1.0"}), "does not say at which hook point it reads"),
        (cfg_of(metadata=cfg_of()["metadata"] | {"hook_head_index": "3"}), "hook_head_index is '3'"),
        (cfg_of(metadata=cfg_of()["metadata"] | {"hook_head_index_out": 3}), "hook_head_index_out"),
        (OLD | {"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        (OLD | {"activation_fn_str": "topk"}, "k is None; topk"),
        (OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 0}}, "k is 0; topk"),
        (OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3, "signed": True}}, "'signed' in activ"),
        (
            OLD | {"activation_fn": "relu", "activation_fn_str": "topk"},
            "activation_fn_str is 'topk', and by another name",
        ),
        (OLD | {"normalise_activations": "layer_norm"}, "'normalise_activations' is not known.*normalize_activations"),
        (OLD | {"finetuning_scaling_factor": True}, "has no scaling_factor"),
        (OLD | {"architecture": "gated", "activation_fn": "topk"}, "activation_fn 'topk' of architecture 'gated'"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused_by_name(tmp_path: Path, cfg: Any, match: str) -> None:
    with pytest.raises(DictionaryError, match=match):
        load(write_folder(tmp_path / "sae", cfg, tensors_of()))


TRANSCODER = {"d_out": D_OUT, "apply_b_dec_to_input": False}
BOTH = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out", "sae_lens_version": "6.0.0"}


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        (cfg_of("transcoder", metadata=BOTH, **TRANSCODER | {"apply_b_dec_to_input": True}), "belongs to its output"),
        (cfg_of("transcoder", **TRANSCODER), "does not say at which hook point it writes"),
        (cfg_of("transcoder", metadata=BOTH, apply_b_dec_to_input=False), "has no d_out, which a transcoder needs"),
        (
            cfg_of("transcoder", metadata=BOTH, **TRANSCODER, normalize_activations="expected_average_only_in"),
            "expected_average_only_in in a transcoder: how its output is scaled is not said",
        ),
        (
            cfg_of("skip_transcoder", metadata=BOTH, **TRANSCODER, normalize_activations="layer_norm"),
            "layer_norm in a skip_transcoder, whose skip connection reads what was not normalised",
        ),
    ],
)
def test_a_transcoder_without_a_meaning_is_refused(tmp_path: Path, cfg: Any, match: str) -> None:
    with pytest.raises(DictionaryError, match=match):
        load(write_folder(tmp_path / "sae", cfg, tensors_of(d_out=D_OUT)))


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors_of().items() if key != name}


@pytest.mark.parametrize(
    ("architecture", "tensors", "match"),
    [
        ("standard", _without("b_dec"), r"has no b_dec\. Did you mean 'b_enc'"),
        ("jumprelu", tensors_of(), "has no threshold"),
        ("standard", tensors_of(threshold=THRESHOLD), "has threshold, which this format does not know"),
        ("gated", tensors_of(**GATES), "has b_enc, which this format does not know"),
        ("gated", _without("b_enc") | {"b_gate": THRESHOLD, "r_mag": -THRESHOLD}, "has no b_mag"),
        ("standard", tensors_of(b_enc=torch.zeros(D_SAE + 1)), r"b_enc has shape \(27,\); \(26,\) was expected"),
        ("standard", tensors_of(W_dec=torch.ones(D_IN, D_SAE)), r"W_dec has shape \(7, 26\); \(26, 7\) was expected"),
        ("standard", tensors_of(b_dec=torch.zeros(D_IN + 1)), r"b_dec has shape \(8,\)|b_in has shape \(8,\)"),
        ("jumprelu", tensors_of(threshold=torch.ones(D_SAE - 1)), r"threshold has shape \(25,\)"),
        ("standard", tensors_of(b_enc=torch.full((D_SAE,), torch.nan)), "b_enc has 26 values that are NaN or infinite"),
        ("jumprelu", tensors_of(threshold=THRESHOLD / 0), "threshold has 26 values that are NaN"),
        ("standard", tensors_of(W_enc=torch.ones(D_IN, D_SAE, dtype=torch.int32)), "W_enc is torch.int32"),
        ("standard", tensors_of(scaling_factor=THRESHOLD * 2), "has a scaling_factor other than one"),
        ("standard", tensors_of(scaling_factor=torch.ones(3)), r"scaling_factor has shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_make_the_dictionary_are_refused_by_name(
    tmp_path: Path, architecture: str, tensors: Any, match: str
) -> None:
    with pytest.raises(DictionaryError, match=match):
        load(write_folder(tmp_path / "sae", cfg_of(architecture), tensors))


@pytest.mark.parametrize("said", ['["standard"]', "standard", "", "{", '"jumprelu"'])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, said: str) -> None:
    folder = write_folder(tmp_path / "sae", cfg_of(), tensors_of())
    (folder / "cfg.json").write_text(said)
    with pytest.raises(DictionaryError, match=r"cfg\.json"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 1500])
def test_weights_that_are_cut_off_are_refused(tmp_path: Path, keep: int) -> None:
    path = write_folder(tmp_path / "sae", cfg_of(), tensors_of()) / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DictionaryError, match="damaged or cut off"):
        load(path.parent)


class Runs:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_in_a_pickle_are_neither_opened_nor_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sae", cfg_of(), tensors_of())
    (folder / "sae_weights.safetensors").write_bytes(pickle.dumps(Runs(tmp_path / "was run")))
    with pytest.raises(DictionaryError, match="damaged"):
        load(folder)
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.pt")
    with pytest.raises(DictionaryError, match="is of no known format"):
        load(folder)
    torch.save({"W_enc": Runs(tmp_path / "was run")}, folder / "sae_weights.pt")
    with pytest.raises(DictionaryError, match="only running code from the file could make; nothing of it was run"):
        read_pickled(folder / "sae_weights.pt")
    assert not (tmp_path / "was run").exists()


def test_weights_of_mixed_precision_lose_nothing(tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors["W_enc"] = tensors["W_enc"].bfloat16()
    dictionary = load(write_folder(tmp_path / "sae", cfg_of(), tensors))
    assert torch.equal(dictionary.W_enc, tensors["W_enc"].float())
    assert torch.equal(dictionary.b_enc, tensors["b_enc"])


def test_thresholds_of_older_checkpoints_are_logarithms(tmp_path: Path) -> None:
    log = torch.linspace(-3, 1, D_SAE)
    dictionary = load(write_folder(tmp_path / "sae", cfg_of("jumprelu"), tensors_of(log_threshold=log)))
    assert dictionary.activation.threshold is not None
    agree(dictionary.activation.threshold, log.double().exp())


def test_of_two_names_for_one_key_the_one_that_says_something_counts(tmp_path: Path) -> None:
    cfg = OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "activation_fn": None}
    assert load(write_folder(tmp_path / "sae", cfg, tensors_of())).activation.k == 3


def test_a_folder_with_a_file_of_another_library_beside_is_still_saelens(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sae", cfg_of(), tensors_of())
    (folder / "config.json").write_text("{}")
    assert load(folder).provenance.format == "saelens"


def test_the_caller_says_where_a_dictionary_reads_that_does_not(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sae", cfg_of(metadata={"hook_name": "layer 3"}), tensors_of())
    dictionary = load(folder, hook="blocks.3.hook_resid_mid")
    assert (dictionary.hook, dictionary.hook_out) == ("blocks.3.hook_resid_mid",) * 2


def test_a_point_that_only_transformers_names_is_found_by_that_name(tmp_path: Path) -> None:
    metadata = {
        "hook_name": "blocks.3.hook_mlp_in",
        "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
        "hook_name_out": "blocks.3.hook_mlp_out",
        "sae_lens_version": "6.30.0",
    }
    folder = write_folder(
        tmp_path / "sae", cfg_of("transcoder", metadata=metadata, **TRANSCODER), tensors_of(d_out=D_OUT)
    )
    dictionary = load(folder)
    assert (dictionary.hook, dictionary.hook_out) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")


@pytest.mark.parametrize(
    ("place", "point"),
    [
        ("model.layers.12.output", "blocks.12.hook_resid_post"),
        ("model.layers.0.input", "blocks.0.hook_resid_pre"),
        ("model.language_model.layers.7.self_attn.o_proj.input", "blocks.7.attn.hook_z"),
        ("layers.3.mlp.input", "blocks.3.mlp.hook_in"),
        ("model.layers.3.post_feedforward_layernorm.output", "blocks.3.hook_mlp_out"),
        ("model.layers.3.pre_feedforward_layernorm.output", "blocks.3.mlp.hook_in"),
        ("model.layers.3.pre_feedforward_layernorm.input", "blocks.3.hook_resid_mid"),
        ("model.layers.3.input_layernorm.output", "blocks.3.attn.hook_in"),
        ("model.layers.3.post_attention_layernorm.output", None),
        ("model.layers.3", None),
        ("model.norm.output", None),
    ],
)
def test_places_in_transformers_are_the_hook_points_of_the_same_tensors(place: str, point: str | None) -> None:
    assert hook_of(place) == point
