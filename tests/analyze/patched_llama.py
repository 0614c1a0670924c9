"""transformers' Llama with any number of its vectors replaced at once, by plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

MODULES = {
    "hook_resid_post": "model.layers.{}",
    "hook_attn_out": "model.layers.{}.self_attn.o_proj",
    "hook_mlp_out": "model.layers.{}.mlp",
    "hook_embed": "model.embed_tokens",
}
Site = tuple[str, int]
"""A kind and a layer; of the embedding any layer."""


def run(model: LlamaForCausalLM, token_ids: Sequence[int], edits: Mapping[Site, Callable[[Tensor], None]]) -> Tensor:
    """The last logits of a run in which each edit has changed the vectors [position, d_model] of its site in place."""
    with ExitStack() as hooks:
        for (kind, layer), edit in edits.items():
            module = model.get_submodule(MODULES[kind].format(layer))

            def change(module: object, given: object, result: Tensor, edit: Callable[[Tensor], None] = edit) -> Tensor:
                changed = result.clone()
                edit(changed[0])
                return changed

            hooks.enter_context(module.register_forward_hook(change))
        return model(torch.tensor([token_ids])).logits[0, -1]


def seen(model: LlamaForCausalLM, token_ids: Sequence[int], site: Site) -> Tensor:
    """The vectors [position, d_model] of a site."""
    found: list[Tensor] = []
    run(model, token_ids, {site: lambda value: found.append(value.clone())})
    return found[0]


def put(vector: Tensor, position: int) -> Callable[[Tensor], None]:
    """The edit that puts a vector at a position."""

    def edit(value: Tensor) -> None:
        value[position] = vector

    return edit
