"""A GGUF file is read block by block as its library reads it, and refused by name where that cannot be done."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import RopeScalingType
from transformers import LlamaForCausalLM

from forebay.stages.models.errors import ModelError
from forebay.stages.models.source import open_checkpoint

from .gguf_writing import write_gguf

LONGROPE, YARN = RopeScalingType.LONGROPE, RopeScalingType.YARN

Write = Callable[..., Path]


@pytest.fixture
def write(random_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Write:
    """Writes a Llama of transformers, a random one where none is given, as llama.cpp's converter does."""

    def make(model: LlamaForCausalLM | None = None, **settings: Any) -> Path:
        return write_gguf(model or random_llama(), tmp_path / "tiny.gguf", **settings)

    return make


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
    ("settings", "message"),
    [
        ({"architecture": "lama"}, "is of architecture 'lama'; GGUF files are read for: llama,.* Did you mean 'llama'"),
        ({"architecture": "mamba"}, "is of architecture 'mamba'; GGUF files are read for: llama, qwen2, "),
        ({"add_rope_scaling_type": (LONGROPE,)}, "rope.scaling.type = 'longrope', but only one of 'none', 'linear', "),
        ({"add_rope_scaling_factor": (0.0,)}, "rope.scaling.factor = 0.0, but only a positive float can"),
        ({"add_rope_scaling_type": (YARN,), "add_rope_scaling_factor": (0.5,)}, "only a factor of at least 1 for yarn"),
        ({"add_rope_scaling_yarn_attn_factor": (1.5,)}, "the setting llama.rope.scaling.yarn_attn_factor = 1.5"),
        ({"add_rope_dimension_count": (4,)}, "rope.dimension_count = 4, but only that of the keys, 10, can"),
        ({"add_value_length": (12,)}, "attention.value_length = 12, but only that of the keys, 10, can"),
        ({"add_expert_count": (8,)}, "the setting llama.expert_count = 8, which nothing here honours"),
        ({"add_sliding_window": (128,)}, "the setting llama.attention.sliding_window = 128, which nothing here"),
        ({"add_attention_scale": (0.2,)}, "the setting llama.attention.scale = 0.2"),
        ({"add_uint32": ("split.count", 3)}, "the setting split.count = 3"),
        ({"add_head_count_kv": (4,)}, "6 attention heads cannot share 4 key-value heads evenly"),
        ({"add_head_count_kv": ([2, 2, 1],)}, r"head_count_kv = \[2, 2, 1\], but only a positive int can"),
        ({"add_layer_norm_rms_eps": (float("nan"),)}, "layer_norm_rms_epsilon = nan, but only a positive float can"),
        ({"add_block_count": (2**32 - 1,)}, "only as many blocks as its 30 tensors can make up"),
        ({"add_block_count": (2,)}, r"holds blk\.2\.attn_k\.weight, .* and 3 more, which nothing here reads"),
        ({"add_block_count": (4,)}, r"lacks blk\.3\.attn_k\.weight, .* and 3 more, which its configuration asks for"),
        ({"add_feed_forward_length": (53,)}, r"ffn_gate\.weight of shape \(52, 36\), but .* makes it \(53, 36\)"),
        ({"add_vocab_size": (99,)}, r"token_embd\.weight of shape \(101, 36\), but .* makes it \(99, 36\)"),
    ],
)
def test_settings_that_are_not_honoured_are_refused(settings: dict[str, Any], message: str, write: Write) -> None:
    with pytest.raises(ModelError, match=rf"tiny\.gguf.*{message}"):
        open_checkpoint(write(**settings))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.attn_q_norm.weight": np.ones(10)}, r"holds blk\.0\.attn_q_norm\.weight, which nothing here reads"),
        ({"blk.1.attn_q.bias": np.ones(60)}, r"lacks blk\.0\.attn_k\.bias, .* and 2 more, which its configuration"),
        ({"blk.1.ffn_up.weight": None}, r"lacks blk\.1\.ffn_up\.weight, which its configuration asks for"),
        ({"token_embd.weight": None}, r"lacks token_embd\.weight"),
        ({"output_norm.weight": np.ones(35)}, r"output_norm\.weight of shape \(35,\), but .* makes it \(36,\)"),
        ({"rope_freqs.weight": np.ones(4)}, r"rope_freqs\.weight with 4 values, but heads of 10 channels turn at 5"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Any], message: str, write: Write) -> None:
    given = {name: values if values is None else values.astype(np.float32) for name, values in tensors.items()}
    with pytest.raises(ModelError, match=rf"tiny\.gguf.*{message}"):
        open_checkpoint(write(tensors=given))


def test_frequencies_that_are_scaled_twice_are_refused(write: Write) -> None:
    divisors = {"rope_freqs.weight": np.full(5, 2, dtype=np.float32)}
    with pytest.raises(ModelError, match=r"has both rope_freqs\.weight and a linear scaling of 4\.0; only one can be"):
        open_checkpoint(write(tensors=divisors, add_rope_scaling_factor=(4.0,)))


def test_settings_that_change_nothing_are_let_pass(write: Write) -> None:
    before = open_checkpoint(write()).spec
    harmless = {
        "add_expert_count": (0,),
        "add_causal_attention": (True,),
        "add_rope_scaling_attn_factors": (1.0,),
        "add_rope_scaling_finetuned": (False,),
        "add_rope_scaling_orig_ctx_len": (16,),
        "add_quantization_version": (2,),
        "add_license": ("MIT",),
        "add_uint32": ("split.count", 1),
    }
    assert open_checkpoint(write(**harmless)).spec == before


def test_a_file_cut_off_anywhere_is_refused_by_name(write: Write) -> None:
    path = write()
    whole = path.read_bytes()
    for kept in (0, 3, 10, 30, 100, 500, 1500, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=r"tiny\.gguf.*(no GGUF file|cut off)"):
            open_checkpoint(path)


def test_a_damaged_header_is_refused(write: Write) -> None:
    path = write()
    whole = path.read_bytes()
    for at in (16, 24, 60, 200):
        path.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        with pytest.raises(ModelError, match=r"tiny\.gguf"):
            open_checkpoint(path)
    path.write_bytes(whole[:4] + b"\x09\x00\x00\x00" + whole[8:])
    with pytest.raises(ModelError, match="its version is 9"):
        open_checkpoint(path)
    path.write_bytes(whole[:4] + b"\x00\x00\x00\x03" + whole[8:])
    with pytest.raises(ModelError, match="it was written for big-endian machines"):
        open_checkpoint(path)


def test_a_header_with_one_byte_changed_is_refused_or_is_read(write: Write) -> None:
    """Whatever the byte: no other error comes out of it."""
    path = write()
    whole = path.read_bytes()
    n_header = whole.index(b"output_norm.weight") + 200
    for at in range(0, n_header, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(ModelError):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", 8, "stores output_norm.weight in blocks of 32 values, which its rows of 36 do not fill"),
        ("kind", 4, "stores output_norm.weight in the unknown type 4"),
        ("kind", 999, "stores output_norm.weight in the unknown type 999"),
        ("length", 2**40, "is cut off: output_norm.weight should end at byte 4,398,0"),
        ("length", 0, "is damaged: its tensor 'output_norm.weight' has no values"),
        ("offset", 2**40, "is cut off: output_norm.weight should end at byte 1,099,5"),
        ("n_dims", 0, "is damaged: its tensor 'output_norm.weight' has 0 dimensions"),
        ("n_dims", 2**31, "is damaged: its tensor 'output_norm.weight' has 2147483648 dimensions"),
    ],
)
def test_tensors_that_no_file_can_hold(field: str, value: int, message: str, write: Write) -> None:
    path = write()
    whole = path.read_bytes()
    layouts = {"n_dims": (0, "<I"), "length": (4, "<Q"), "kind": (12, "<I"), "offset": (16, "<Q")}
    at, layout = layouts[field]
    at += whole.index(b"output_norm.weight") + len(b"output_norm.weight")
    new = struct.pack(layout, value)
    path.write_bytes(whole[:at] + new + whole[at + len(new) :])
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_an_alignment_that_is_none(write: Write) -> None:
    with pytest.raises(ModelError, match="is damaged: its tensors are aligned to 'wide' bytes"):
        open_checkpoint(write(add_string=("general.alignment", "wide")))
