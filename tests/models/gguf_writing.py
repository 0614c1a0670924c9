"""Writes models of transformers as GGUF files, in the way of llama.cpp's convert_hf_to_gguf.

The names of tensors and of metadata are those of the format's own library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import PreTrainedModel

Values = np.ndarray[Any, np.dtype[np.float32]]

ARCHITECTURES: Mapping[str, MODEL_ARCH] = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}
"""By transformers' `model_type`."""


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    kind: str = "F32",
    architecture: str | None = None,
    tensors: Mapping[str, Values | None] | None = None,
    **settings: Any,
) -> Path:
    """Write a model. Matrices are quantised as `kind`; `settings` are methods of the writer and their arguments, called
    last; `tensors` are added, put in the place of others or, where None, left out."""
    writer = GGUFWriter(path, architecture or gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
    writer.add_name("tiny")
    _write_settings(writer, model.config)
    for name, given in settings.items():
        getattr(writer, name)(*given)
    for name, values in {**stored_tensors(model), **(tensors or {})}.items():
        if values is not None and (kind == "F32" or values.ndim == 1):
            writer.add_tensor(name, values)
        elif values is not None:
            quantised = GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def round_trip(weight: Tensor, kind: str) -> Tensor:
    """The values that are left of a matrix once it was quantised; a vector stays as it is."""
    quantised = GGMLQuantizationType[kind]
    if weight.dim() == 1:
        return weight
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(_values(weight), quantised), quantised).copy())


def _values(weight: Tensor) -> Values:
    return weight.detach().float().numpy()


def _write_settings(writer: GGUFWriter, config: Any) -> None:
    # What the converter writes for every architecture, which it does not ask of the first two Gemmas.
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if (d_head := getattr(config, "head_dim", None)) is not None:
        writer.add_key_length(d_head)
        writer.add_value_length(d_head)
    if config.model_type not in ("gemma", "gemma2"):
        _write_rotary(writer, config.rope_parameters)
    if config.model_type == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(d_head)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None) is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if "sliding_attention" in getattr(config, "layer_types", ()):
        writer.add_sliding_window(config.sliding_window)


def _write_rotary(writer: GGUFWriter, tables: Mapping[str, Any]) -> None:
    rope = tables.get("full_attention", tables)
    writer.add_rope_freq_base(rope["rope_theta"])
    # The converter writes it since transformers has the setting; without it 10,000 is implied.
    if (near := tables.get("sliding_attention", {}).get("rope_theta", 1e4)) != 1e4:
        writer.add_rope_freq_base_swa(near)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def stored_tensors(model: PreTrainedModel) -> dict[str, Values]:
    """The tensors of a file, by their names in it."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _values(weight)
        if architecture == MODEL_ARCH.LLAMA and ".q_proj." in name:
            values = _interleaved(values, config.num_attention_heads)
        if architecture == MODEL_ARCH.LLAMA and ".k_proj." in name:
            values = _interleaved(values, config.num_key_value_heads)
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    if config.rope_parameters.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _divisors(model)
    return tensors


def _interleaved(rows: Values, n_heads: int) -> Values:
    """The two halves of a head alternate, so that channels that turn together are neighbours."""
    split = rows.reshape(n_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def _divisors(model: PreTrainedModel) -> Values:
    d_head = model.config.head_dim
    plain = model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, d_head, 2) / d_head)
    return _values(plain / model.model.rotary_emb.inv_freq)
