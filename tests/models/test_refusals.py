"""What a checkpoint asks for and nothing here honours is refused by name, never passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from forebay.stages.models.errors import ModelError
from forebay.stages.models.load import load_model
from forebay.stages.models.source import open_checkpoint

from .families import build


@pytest.fixture
def folder(random_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    random_llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_as_saved_it_opens(folder: Path) -> None:
    assert open_checkpoint(folder).spec.n_layers == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 128}, "sliding_window = 128, but forebay can take only None there"),
        ({"attention_multiplier": 0.5, "qk_norm": True}, "attention_multiplier = 0.5, qk_norm = True"),
        ({"auto_map": {"AutoModel": "own.py"}}, "auto_map"),
        ({"hidden_size": "absent"}, "has no 'hidden_size'"),
        ({"hidden_size": 0}, "hidden_size = 0, but forebay can take only a whole number above 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"hidden_act": "gelu_pytorch_tan"}, "hidden_act = 'gelu_pytorch_tan'.*Did you mean 'gelu_pytorch_tanh'"),
        ({"rms_norm_eps": True}, "rms_norm_eps = True"),
        ({"attention_bias": 1}, "attention_bias = 1, but forebay can take only true or false"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 key-value heads evenly"),
        ({"rope_interleaved": True}, "rope_interleaved = True, but forebay can take only False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            {"rope_parameters": {"rope_type": "yarm", "factor": 2.0}},
            "rope_type = 'yarm'.*one of default, dynamic, linear, llama3, longrope, su, yarn.*Did you mean 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters of .* has no 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "beta_fast": 32}}, "nothing here honours: beta_fast = 32"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\], but forebay can take only a table"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary settings disagree: rope_scaling gives .*linear"),
    ],
)
def test_settings(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(folder)


def test_settings_without_effect_are_let_pass(folder: Path) -> None:
    harmless = {"use_cache": False, "pretraining_tp": 2, "rope_interleaved": False, "top_k": 5, "pruned_heads": {}}
    before = open_checkpoint(folder).spec
    edit_config(folder, **harmless, transformers_version="9.9", id2label={"0": "a"}, quantization_config=None)
    assert open_checkpoint(folder).spec == before


def test_a_tensor_that_nothing_reads(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(10)}))
    with pytest.raises(
        ModelError, match=r"holds model\.layers\.1\.self_attn\.q_norm\.weight, which nothing here reads"
    ):
        open_checkpoint(folder)


def test_a_known_buffer_is_let_pass(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}))
    open_checkpoint(folder)


def test_a_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda w: w.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight, which its configuration asks"):
        open_checkpoint(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.3\.input_layernorm\.weight, .* and 12 more"):
        open_checkpoint(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=53)
    with pytest.raises(ModelError, match=r"mlp\.gate_proj\.weight of shape \(52, 36\), .* makes it \(53, 36\)"):
        open_checkpoint(folder)


def test_an_untied_head_beside_a_tied_configuration(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"ties the unembedding to the embedding, but holds another one in lm_head"):
        load_model(folder, device="cpu")


def test_a_tied_head_that_is_stored_once_more_is_the_embedding(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    model = load_model(folder, device="cpu")
    assert model.weights.unembed is model.weights.embed


@pytest.mark.parametrize("kept", [0, 5, 300, 20_000])
def test_a_safetensors_file_that_is_cut_off(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors.*cut off"):
        open_checkpoint(folder)


def test_a_safetensors_file_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b"not json!" + bytes(100))
    with pytest.raises(ModelError, match=r"header of .* cannot be read"):
        open_checkpoint(folder)


def test_a_shard_that_is_not_there(random_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"names {lost.name}, which the folder does not hold"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin would have to be unpickled, which is never done"):
        open_checkpoint(folder)


def test_a_config_that_is_absent_or_broken(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        open_checkpoint(folder)


def test_no_tokenizer(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json.*token ids can still be run"):
        checkpoint.tokenizer()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        checkpoint.tokenizer()


def test_a_weight_that_the_model_does_not_have(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"has no weight 'blocks\.0\.ln1\.wieght'\. Did you mean 'blocks\.0\.ln1\.weight'"
    ):
        open_checkpoint(folder).read("blocks.0.ln1.wieght")


def test_a_setting_that_the_models_own_code_does_not_read(tmp_path: Path) -> None:
    build("gemma3_text: as it is").save_pretrained(tmp_path)
    edit_config(tmp_path, attn_logit_softcapping=50.0)
    with pytest.raises(ModelError, match=r"attn_logit_softcapping = 50\.0, but forebay can take only None there"):
        open_checkpoint(tmp_path)
