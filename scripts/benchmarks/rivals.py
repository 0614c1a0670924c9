"""What forebay is measured against, with the very same weights: `transformers`, and the capture that a good user of it
writes by hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from forebay.stages.models.checkpoint import Checkpoint
from forebay.stages.models.families import FAMILIES
from forebay.stages.models.families.layout import name_tensors
from forebay.stages.models.model import Model
from forebay.stages.models.spec import ModelSpec


def transformers_of(model: Model) -> LlamaForCausalLM:
    """Llama of transformers with the weights, the dtype and the device of a model of forebay's; attention runs through
    scaled_dot_product_attention. UsageError for other architectures."""
    assert model.checkpoint is not None
    spec = model.spec
    if spec.family != "llama" or spec.rope is None or spec.rope.kind != "default":
        raise click.UsageError(f"the comparison is written for Llama without rescaled positions; this is {spec.family}")
    with torch.device("meta"):
        rival = LlamaForCausalLM._from_config(config_of(spec), attn_implementation="sdpa")
    rival.load_state_dict(state_of(model.checkpoint, model.dtype, model.device), strict=False, assign=True)
    rival.tie_weights()
    rival.model.rotary_emb = LlamaRotaryEmbedding(rival.config).to(model.device)
    left = [name for name, weight in rival.named_parameters() if weight.is_meta]
    assert not left, f"weights that nothing was read into: {left}"
    return rival.eval().requires_grad_(False)


def config_of(spec: ModelSpec) -> LlamaConfig:
    assert spec.rope is not None
    return LlamaConfig(
        vocab_size=spec.d_vocab,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_mlp,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.d_head,
        max_position_embeddings=spec.n_ctx,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.base},
        tie_word_embeddings=spec.tied,
    )


def state_of(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A Llama's weights by the names of transformers, in memory of their own."""
    names = name_tensors(checkpoint.spec, FAMILIES["llama"].layout)
    return {
        tensor: checkpoint.read(weight).to(device=device, dtype=dtype, copy=True) for weight, tensor in names.items()
    }


def bare(rival: LlamaForCausalLM, rows: Sequence[Tensor], *, logits: bool = False) -> None:
    """Forwards of which nothing is kept, the unembedding left out unless it is asked for."""
    module = rival if logits else rival.model
    with torch.inference_mode():
        for token_ids in rows:
            module(token_ids.to(rival.device), use_cache=False)


class Stop(Exception):
    """Raised by the hook on the last layer that is wanted."""


def handwritten(
    rival: LlamaForCausalLM, rows: Sequence[Tensor], layers: Sequence[int], folder: Path | None = None
) -> None:
    """Hooks on the decoder layers, which end the forward after the last one wanted; a batch's arrays are collected and,
    where there is a folder, written at the end of a file for each layer, as they are in memory, and flushed at the end
    of all batches."""
    kept: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[[Any, Any, Any], None]:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            kept[layer] = output if isinstance(output, Tensor) else output[0]
            if layer == max(layers):
                raise Stop

        return keep

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(rival.model.layers[layer].register_forward_hook(hook(layer)).remove)
        files: dict[int, BinaryIO] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files = {layer: stack.enter_context(open(folder / f"{layer}.bin", "wb")) for layer in layers}
        with torch.inference_mode():
            for token_ids in rows:
                with suppress(Stop):
                    rival.model(token_ids.to(rival.device), use_cache=False)
                for layer, file in files.items():
                    file.write(kept[layer].contiguous().cpu().view(torch.uint8).numpy())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
