"""Every setting that a Llama's configuration can ask for is honoured, in either spelling, in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.models.load import load_model
from forebay.stages.models.taps import HookSpec

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "grouped heads wider than the stream": {},
    "one key-value head": {"num_key_value_heads": 1},
    "as many key-value heads as heads": {"num_key_value_heads": 6},
    "heads narrower than the stream": {"head_dim": 4},
    "attention biases": {"attention_bias": True},
    "mlp biases": {"mlp_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "exact gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "another rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3 scaling": {"rope_parameters": LLAMA3},
    "everything at once": {
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 3,
        "rope_parameters": LLAMA3,
        "hidden_act": "gelu_new",
        "rms_norm_eps": 0.03,
    },
}


@pytest.mark.parametrize("spelling", ["old", "v5"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_point_agrees(
    settings: dict[str, Any],
    spelling: str,
    random_llama: Callable[..., LlamaForCausalLM],
    reference_points: Callable[[LlamaForCausalLM, Tensor], Mapping[str, Tensor]],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    theirs = random_llama(**settings)
    theirs.save_pretrained(tmp_path)
    if spelling == "old":
        _respell(tmp_path / "config.json")
    ours = load_model(tmp_path, device="cpu")
    reference = reference_points(theirs, tokens)
    kinds = {name for name in reference if "pattern" not in name}
    fused = ours.forward(tokens, HookSpec().capture(*kinds))
    explicit = ours.forward(tokens, HookSpec().capture(*reference))
    for out in (fused, explicit):
        for point, value in out.captures.items():
            _assert_same_vectors(value, reference[str(point)], str(point))


def test_shards_hold_the_same_model(
    random_llama: Callable[..., LlamaForCausalLM], tokens: Tensor, tmp_path: Path
) -> None:
    theirs = random_llama()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (load_model(tmp_path / name, device="cpu") for name in ("one", "many"))
    assert torch.equal(_logits(one.forward(tokens).logits), _logits(many.forward(tokens).logits))
    assert many.checkpoint is not None
    names = [path.name for path in many.checkpoint.files]
    assert names[:2] == ["config.json", "model.safetensors.index.json"]
    assert len(names) == 2 + len(list((tmp_path / "many").glob("*.safetensors")))


def test_weights_stored_in_half_precision_are_cast(
    random_llama: Callable[..., LlamaForCausalLM], tokens: Tensor, tmp_path: Path
) -> None:
    random_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    with torch.no_grad():
        reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
    _assert_same_vectors(_logits(load_model(tmp_path, device="cpu").forward(tokens).logits), reference, "logits")


def _respell(path: Path) -> None:
    """Write a config.json as transformers 4 did."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "linear":
        config["rope_scaling"] = {"type": "linear", "factor": rope["factor"]}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


def _assert_same_vectors(ours: Tensor, reference: Tensor, name: str) -> None:
    """The last dimension is a vector: its direction and its length agree for every token (and head, or query)."""
    assert ours.shape == reference.shape, name
    ours, reference = ours.double(), reference.double()
    cosine = torch.nn.functional.cosine_similarity(ours, reference, dim=-1)
    magnitude = ours.norm(dim=-1) / reference.norm(dim=-1)
    assert cosine.min() > 1 - 1e-8, name
    assert (magnitude - 1).abs().max() < 2e-5, name


def _logits(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits
