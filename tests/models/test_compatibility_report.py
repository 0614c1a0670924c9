"""What a checkpoint of unknown kind would lose is refused, and everything that stands in the way is said at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import ModelError
from forebay.stages.models.families import FAMILIES
from forebay.stages.models.source import check_compatibility

from .families import AS_IT_IS, SIZES
from .renaming import (
    HEADS,
    SLIDING,
    SMALL,
    Json,
    edit_config,
    edit_weights,
    foreign,
    open_unknown,
    refused,
    renamed,
    save,
)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama that calls itself something new."""
    save(f"llama: {AS_IT_IS}", tmp_path / "model")
    edit_config(tmp_path / "model", **renamed("llama"))
    return tmp_path / "model"


# ── traps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name.format(layer=layer): torch.ones(shape) for layer in range(4)})


def test_norms_of_queries_are_never_passed_over(llama: Path) -> None:
    """Every tensor that a Llama needs is there: a reader that looks for those alone would leave the norms out."""
    plain = open_unknown(llama).spec
    edit_weights(llama, add("model.layers.{layer}.self_attn.q_norm.weight", 10))
    assert [*refused(llama).tensors.missing] == [f"model.layers.{layer}.self_attn.k_norm.weight" for layer in range(4)]
    edit_weights(llama, add("model.layers.{layer}.self_attn.k_norm.weight", 10))
    assert open_unknown(llama).spec == dataclasses.replace(plain, qk_norm="head")
    edit_weights(llama, add("model.layers.{layer}.self_attn.q_norm.weight", 90))
    edit_weights(llama, add("model.layers.{layer}.self_attn.k_norm.weight", 30))
    assert open_unknown(llama).spec == dataclasses.replace(plain, qk_norm="full")
    edit_weights(llama, add("model.layers.{layer}.self_attn.q_norm.weight", 9, 10))
    report = refused(llama)
    assert report.tensors.misshapen["model.layers.2.self_attn.q_norm.weight"] == ((9, 10), (10,))
    assert "model.layers.*.self_attn.q_norm.weight (× 4) [9, 10], expected [10]" in str(report)


def test_a_tensor_that_nothing_reads(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.update({"model.layers.1.mlp.router.weight": torch.ones(8, 36)}))
    report = refused(llama)
    assert report.tensors.unread == {"model.layers.1.mlp.router.weight": (8, 36)}
    assert "model.layers.1.mlp.router.weight [8, 36]" in str(report)
    assert report.foreign == ("mixtures of experts (experts, router)",)


def test_a_bias_in_some_layers_only(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(90)}))
    assert len(refused(llama).tensors.missing) == 11  # those of the other projections and layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_dropout_scale": 0.5}, "residual_dropout_scale = 0.5"),
        ({"use_rope_half": False}, "use_rope_half = False"),
        ({"rms_norm_epsi": 1e-4}, "rms_norm_epsi = 0.0001 Did you mean 'rms_norm_eps'?"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"rotary_dim": 4}, "rotary_dim = 4"),
        ({"alibi": True}, "alibi = True, but forebay can take only False there"),
        ({"is_causal": False}, "is_causal = False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"max_window_layers": 2}, "max_window_layers = 2"),
        ({"attention_bias": True}, "says attention_bias = True, but the checkpoint has none"),
        ({"use_qk_norm": True}, "use_qk_norm = True, but forebay can take only False"),
        ({"n_embd": 37}, "n_embd = 37, but forebay can take only 36 there"),
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu', but forebay can take only 'silu' there"),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
        ({"hidden_act": "absent"}, "has no 'hidden_act'"),
        ({"rms_norm_eps": "absent"}, "has no 'rms_norm_eps'"),
        ({"rms_norm_eps": "absent", "norm_eps": 1e-5}, "the norms have no biases, and epsilon is norm_eps"),
        ({"norm_type": "layer_norm"}, "norm_type says 'layer', but biases and the name of epsilon say 'rms'"),
        ({"rope_parameters": "absent"}, "how a position enters cannot be told"),
        ({"rope_parameters": {"rope_type": "cubic", "rope_theta": 1e4}}, "rope_type = 'cubic'"),
        ({"rope_parameters": [1]}, r"rope_parameters = [1], but forebay can take only a table"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "has no 'sliding_attention'"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types = ['linear_attention'"),
        ({"layer_types": ["sliding_attention"] * 4}, "has no 'sliding_window'"),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": "2"}, "max_window_layers = '2'"),
        (
            {"use_sliding_window": False, "sliding_window": 7, "layer_types": ["sliding_attention"] * 4},
            "has layers that slide, and says use_sliding_window = False",
        ),
        ({"query_pre_attn_scalar": 9, "attention_multiplier": 0.1}, "scales attention scores in two ways"),
        ({"use_parallel_residual": "yes"}, "use_parallel_residual = 'yes'"),
        ({"num_key_value_heads": 4}, "9 attention heads cannot share 4 key-value heads evenly"),
        ({"hidden_size": "absent"}, "has no 'hidden_size'"),
    ],
    ids=str,
)
def test_settings(llama: Path, changes: Json, message: str) -> None:
    edit_config(llama, **changes)
    assert message in str(refused(llama))


def test_clipped_and_normalised_queries_have_no_known_order(tmp_path: Path) -> None:
    save(f"olmo2: {AS_IT_IS}", tmp_path)
    edit_config(tmp_path, **renamed("olmo2"), clip_qkv=1.0)
    assert "clips and normalises queries and keys, and nothing says which is first" in str(refused(tmp_path))


def test_names_of_gpt_neox_do_not_say_whether_attention_and_mlp_run_side_by_side(tmp_path: Path) -> None:
    save(f"gpt_neox: {AS_IT_IS}", tmp_path)
    edit_config(tmp_path, **renamed("gpt_neox"), use_parallel_residual="absent")
    assert "has no 'use_parallel_residual'" in str(refused(tmp_path))


def test_a_norm_that_is_lost_does_not_make_a_parallel_model(llama: Path) -> None:
    edit_weights(llama, lambda weights: [weights.pop(name) for name in [*weights] if "post_attention" in name])
    assert len(refused(llama).tensors.missing) == 4


def test_everything_that_stands_in_the_way_is_said_at_once(llama: Path) -> None:
    edit_config(llama, num_experts=8, shared_head=True, hidden_act="relu2", rms_norm_eps="absent")

    def damage(weights: dict[str, Tensor]) -> None:
        del weights["model.norm.weight"]
        weights["model.final_norm.weight"] = torch.ones(36)
        weights["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.ones(52, 36)
        weights["model.layers.3.mlp.up_proj.weight"] = torch.ones(53, 36)

    edit_weights(llama, damage)
    report = refused(llama)
    assert report.resembles == "llama"
    assert report.unhonoured == {"num_experts": 8, "shared_head": True}
    assert ["hidden_act" in report.problems[1], "rms_norm_eps" in report.problems[0]] == [True, True]
    assert report.tensors.missing == {"model.norm.weight": (36,)}
    assert report.tensors.misshapen == {"model.layers.3.mlp.up_proj.weight": ((53, 36), (52, 36))}
    assert [*report.tensors.unread] == [
        "model.final_norm.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
    ]
    assert report.foreign == ("mixtures of experts (experts, router)",)
    text = str(report)
    assert "model.norm.weight [36]; similar: model.final_norm.weight" in text
    assert [line.strip(" :") for line in text.splitlines() if line.endswith(":")] == [
        "problems",
        "settings that nothing here honours; a forward that ignored them could be silently wrong",
        "tensors expected and not found",
        "tensors of another shape",
        "tensors found that nothing here reads; a forward that ignored them could be silently wrong",
        "such names are known from",
    ]
    assert max(map(len, text.replace(str(llama), "model").splitlines())) < 200


HIDDEN: Mapping[str, tuple[str, Json, str]] = {
    "rotates neighbours": ("glm", HEADS, "turns channel i with channel i + 1"),
    "rotates neighbours, in every channel": ("helium", HEADS, "turns channel i with channel i + 1"),
    "layers without positions": ("exaone4", SLIDING, "positions do not enter into the others"),
    "layers without rotation": ("smollm3", {**SMALL}, "no_rope_layers"),
}


@pytest.mark.parametrize(("model_type", "settings", "reason"), HIDDEN.values(), ids=HIDDEN)
def test_what_would_be_read_wrongly_is_refused(model_type: str, settings: Json, reason: str, tmp_path: Path) -> None:
    foreign(model_type, settings).save_pretrained(tmp_path)
    assert reason in str(refused(tmp_path))


_TINY = {"vocab_size": 101}
FOREIGN: Mapping[str, tuple[Json, str]] = {
    "mamba": ({**SMALL, "state_size": 4}, "Mamba and other state-space models"),
    "bloom": ({**_TINY, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "BLOOM, whose attention is biased"),
    "falcon": (
        {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True},
        "Falcon and BLOOM (h.N.self_attention.)",
    ),
    "mpt": ({**_TINY, "d_model": 64, "n_layers": 2, "n_heads": 4}, "MPT and Falcon's first code"),
    "opt": ({**SMALL, "ffn_dim": 52, "word_embed_proj_dim": 64}, "OPT and encoder-decoder models"),
    "gptj": (
        {"vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "GPT-J, GPT-Neo and CodeGen",
    ),
    "mixtral": ({**SMALL, "num_local_experts": 2}, "mixtures of experts (experts, router)"),
    "rwkv": ({**_TINY, "hidden_size": 64, "num_hidden_layers": 2}, "RWKV-4 and RWKV-5 (time_mix_key, time_first)"),
}


@pytest.mark.parametrize("model_type", FOREIGN)
def test_names_from_elsewhere_are_recognised(model_type: str, tmp_path: Path) -> None:
    settings, hint = FOREIGN[model_type]
    if model_type in FAMILIES:
        pytest.skip("it has a row by now")
    foreign(model_type, settings).save_pretrained(tmp_path)
    report = refused(tmp_path)
    assert any(line.startswith(hint) for line in report.foreign), report.foreign
    assert report.tensors.unread


# ── reports on known families ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", SIZES)
def test_a_known_family_is_compatible_with_itself(family: str, tmp_path: Path) -> None:
    save(f"{family}: {AS_IT_IS}", tmp_path)
    report = check_compatibility(tmp_path)
    assert (report.compatible, report.known, report.resembles) == (True, True, family)
    assert str(report) == f"{tmp_path} is of model_type {family!r}, and forebay can run it"


def test_a_known_family_that_does_not_fit_is_reported_whole(llama: Path) -> None:
    edit_config(llama, model_type="llama", logit_scale=None, sliding_window=4)
    edit_weights(llama, add("model.layers.{layer}.self_attn.q_norm.weight", 10))
    edit_weights(llama, lambda weights: weights.pop("model.norm.weight"))
    report = check_compatibility(llama)
    assert not report.compatible
    assert report.unhonoured == {"logit_scale": None, "sliding_window": 4}
    assert [*report.tensors.missing] == ["model.norm.weight"]
    assert len(report.tensors.unread) == 4
    assert str(report).startswith(f"{llama} is of model_type 'llama', but forebay cannot run it\n")
    edit_config(llama, hidden_size="absent")
    assert "has no 'hidden_size'" in check_compatibility(llama).problems[0]


def test_a_report_is_on_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"is no folder with config\.json and safetensors"):
        check_compatibility(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="there is no file or folder"):
        check_compatibility(tmp_path / "no/such")


def test_a_report_is_made_without_torch(llama: Path) -> None:
    program = f"""
import sys
from forebay.stages.models.source import check_compatibility
assert check_compatibility({str(llama)!r}).compatible
assert not {{"torch", "transformers", "safetensors"}} & set(sys.modules), "something heavy was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
