"""A GGUF file written by the format's own library holds the same model as the folder it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.models.errors import ModelError
from forebay.stages.models.load import load_model
from forebay.stages.models.source import open_checkpoint

STEMS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a Llama of transformers as a GGUF file in the way of llama.cpp's converter."""

    def make(model: LlamaForCausalLM, *, architecture: str = "llama", kind: str = "F32", **settings: Any) -> Path:
        config, path = model.config, tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_name("tiny")
        for key, value in {"add_rope_dimension_count": (config.head_dim,), **settings}.items():
            getattr(writer, key)(*value)
        for name, weight in model.state_dict().items():
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                writer.add_tensor(*_stored(name, weight, model, kind))
        if config.rope_parameters["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", _divisors(model))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def _stored(name: str, weight: Tensor, model: LlamaForCausalLM, kind: str) -> tuple[Any, ...]:
    values = weight.float().numpy()
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    stem, _, last = name.rpartition(".")
    if (projection := stem.rpartition(".")[2]) in heads:
        # The converter lets the two halves of a head alternate, so that pairs that rotate together are neighbours.
        split = values.reshape(heads[projection], 2, -1, *values.shape[1:])
        values = np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
    parts = stem.split(".", 3)
    stem = f"blk.{parts[2]}.{STEMS[parts[3]]}" if parts[:2] == ["model", "layers"] else STEMS[stem]
    if kind == "F32" or values.ndim == 1:
        return f"{stem}.{last}", values
    quantised = gguf.GGMLQuantizationType[kind]
    return f"{stem}.{last}", gguf.quants.quantize(values, quantised), None, quantised


def _divisors(model: LlamaForCausalLM) -> np.ndarray[Any, np.dtype[np.float32]]:
    plain = model.config.rope_parameters["rope_theta"] ** (
        -torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
    )
    return (plain / model.model.rotary_emb.inv_freq).float().numpy()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3},
    ],
    ids=["plain", "tied", "one key-value head", "biases", "llama3 scaling as divisors"],
)
def test_logits_are_those_of_transformers(
    settings: dict[str, Any],
    random_llama: Callable[..., LlamaForCausalLM],
    write: Write,
    tokens: Tensor,
    worst_token: Callable[[Tensor, Tensor], float],
) -> None:
    theirs = random_llama(**settings)
    ours = load_model(write(theirs), device="cpu").forward(tokens).logits
    assert ours is not None
    with torch.no_grad():
        assert worst_token(ours, theirs(tokens).logits) < 2e-5


def test_linear_scaling(
    random_llama: Callable[..., LlamaForCausalLM],
    write: Write,
    tokens: Tensor,
    worst_token: Callable[[Tensor, Tensor], float],
) -> None:
    theirs = random_llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    settings = {
        "add_rope_scaling_type": (gguf.RopeScalingType.LINEAR,),
        "add_rope_scaling_factor": (4.0,),
        "add_rope_scaling_orig_ctx_len": (16,),
        "add_rope_scaling_finetuned": (False,),
    }
    ours = load_model(write(theirs, **settings), device="cpu").forward(tokens).logits
    assert ours is not None
    with torch.no_grad():
        assert worst_token(ours, theirs(tokens).logits) < 2e-5


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_blocks_are_read_as_their_library_reads_them(
    kind: str, random_llama: Callable[..., LlamaForCausalLM], write: Write
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96}
    theirs = random_llama(**sizes)
    checkpoint = open_checkpoint(write(theirs, kind=kind))
    original = theirs.model.layers[1].mlp.up_proj.weight.detach().numpy()
    quantised = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(original, quantised), quantised)
    assert np.array_equal(checkpoint.read("blocks.1.mlp.up.weight").numpy(), expected)
    queries = checkpoint.read("blocks.1.attn.q.weight")
    assert queries.dtype == torch.float32
    assert torch.allclose(queries, theirs.model.layers[1].self_attn.q_proj.weight, atol=0.1)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("gemma3", {}, "is of architecture 'gemma3'; GGUF files are read for: llama"),
        ("llama", {"add_rope_scaling_type": (gguf.RopeScalingType.YARN,)}, "rope.scaling.type = 'yarn'"),
        ("llama", {"add_expert_count": (8,)}, "the setting llama.expert_count = 8, which nothing here honours"),
        ("llama", {"add_sliding_window": (128,)}, "the setting llama.attention.sliding_window = 128"),
        ("llama", {"add_rope_dimension_count": (4,)}, "rope.dimension_count = 4; only that of the keys, 10"),
        ("llama", {"add_uint32": ("split.count", 3)}, "the setting split.count = 3"),
    ],
)
def test_what_is_not_honoured_is_refused(
    architecture: str,
    settings: dict[str, Any],
    message: str,
    random_llama: Callable[..., LlamaForCausalLM],
    write: Write,
) -> None:
    with pytest.raises(ModelError, match=message):
        open_checkpoint(write(random_llama(), architecture=architecture, **settings))


def test_a_tensor_that_nothing_reads(random_llama: Callable[..., LlamaForCausalLM], write: Write) -> None:
    extra = {"add_tensor": ("blk.0.attn_q_norm.weight", np.ones(10, dtype=np.float32))}
    with pytest.raises(ModelError, match=r"holds blk\.0\.attn_q_norm\.weight, which nothing here reads"):
        open_checkpoint(write(random_llama(), **extra))


def test_a_file_cut_off_anywhere_is_refused_by_name(
    random_llama: Callable[..., LlamaForCausalLM], write: Write
) -> None:
    path = write(random_llama())
    whole = path.read_bytes()
    for kept in (0, 3, 10, 30, 100, 500, 1500, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=r"tiny\.gguf.*(no GGUF file|cut off)"):
            open_checkpoint(path)


def test_a_damaged_header_is_refused(random_llama: Callable[..., LlamaForCausalLM], write: Write) -> None:
    path = write(random_llama())
    whole = path.read_bytes()
    for at in (16, 24, 60, 200):
        path.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        with pytest.raises(ModelError, match=r"tiny\.gguf"):
            open_checkpoint(path)
    path.write_bytes(whole[:4] + b"\x09\x00\x00\x00" + whole[8:])
    with pytest.raises(ModelError, match="its version is 9"):
        open_checkpoint(path)
