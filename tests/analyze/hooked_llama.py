"""The oracle of analyses that run a model: transformers' own Llama, read and edited with PyTorch's hooks by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULES: Mapping[str, tuple[str, str]] = {
    "hook_resid_pre": ("", "in"),
    "hook_resid_post": ("", "out"),
    "hook_attn_out": ("self_attn", "out"),
    "hook_mlp_out": ("mlp", "out"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "attn.hook_q": ("self_attn.q_proj", "out"),
    "attn.hook_k": ("self_attn.k_proj", "out"),
    "attn.hook_v": ("self_attn.v_proj", "out"),
    "q_in": ("self_attn.q_proj", "in"),
    "k_in": ("self_attn.k_proj", "in"),
    "v_in": ("self_attn.v_proj", "in"),
    "mlp_in": ("mlp", "in"),
    "ln1_in": ("input_layernorm", "in"),
    "ln2_in": ("post_attention_layernorm", "in"),
}
"""Which module of a layer a value enters or leaves. Values of heads are laid flat."""

Place = tuple[str, int]
Edit = Callable[[Tensor], Tensor]


@functools.cache
def llama(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    return model.requires_grad_(False)


def run(
    folder: Path,
    token_ids: Sequence[int],
    edits: Mapping[Place, Edit] | None = None,
    keep: Sequence[Place] = (),
    gradients: bool = False,
) -> tuple[Tensor, dict[Place, Tensor]]:
    """Logits [position, vocab] of one prompt, and what is kept, [position, …] before an edit there."""
    model, kept, handles = llama(folder), {}, []
    edits = edits or {}
    for place in {*edits, *keep}:
        name, side = MODULES[place[0]]
        layer = model.model.layers[place[1]]
        module = layer.get_submodule(name) if name else layer
        hook = functools.partial(_at, place=place, kept=kept, edit=edits.get(place), gradients=gradients)
        if side == "in":
            handles.append(module.register_forward_pre_hook(functools.partial(_in, hook), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(functools.partial(_out, hook)))
    try:
        with torch.set_grad_enabled(gradients):
            embedded = model.model.embed_tokens(torch.tensor([list(token_ids)]))
            if gradients:
                embedded.requires_grad_()
            return model(inputs_embeds=embedded, use_cache=False).logits[0], kept
    finally:
        for handle in handles:
            handle.remove()


def _at(value: Tensor, place: Place, kept: dict[Place, Tensor], edit: Edit | None, gradients: bool) -> Tensor:
    kept[place] = value[0]
    if gradients:
        value.retain_grad()
        kept[place] = value
    return value if edit is None else edit(value[0].clone())[None]


def _in(hook: Edit, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (hook(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hook(kwargs["hidden_states"])}


def _out(hook: Edit, module: Any, args: Any, output: Any) -> Any:
    return (hook(output[0]), *output[1:]) if isinstance(output, tuple) else hook(output)


def put(new: Tensor, positions: Sequence[int], columns: slice = slice(None)) -> Edit:
    """Puts rows [position, …], or one for all, at positions of a value [position, width], in some of its columns."""

    def edit(value: Tensor) -> Tensor:
        value[list(positions), columns] = new.to(value.dtype)
        return value

    return edit
