"""What transformers' own modules write to the residual stream, taken apart by hand in float64: the oracle of
decompositions and of the attribution of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from ..models.families import VARIANTS, make


@dataclass(frozen=True)
class Sites:
    """Where a family's modules are; paths below a block for what attention and MLP give, and for norms on that."""

    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    positions: str | None = None
    attn: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    attn_norm: str | None = None
    mlp_norm: str | None = None


_SANDWICH = Sites(attn_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")
SITES: Mapping[str, Sites] = {
    "gpt2": Sites("transformer.h", "transformer.ln_f", "transformer.wpe", "attn.c_proj", "mlp.c_proj"),
    "llama": Sites(),
    "gemma2": _SANDWICH,
    "gpt_neox": Sites("gpt_neox.layers", "gpt_neox.final_layer_norm", None, "attention.dense", "mlp.dense_4h_to_h"),
    "granite": Sites(),
    "olmo2": _SANDWICH,
}
CHOSEN = (
    "gpt2: as it is",
    "llama: llama3, biases",
    "gemma2: another scale, biases",
    "gpt_neox: as it is",
    "granite: everything at once",
    "olmo2: biases, one key-value head",
)
"""Learned positions and LayerNorm; biases everywhere; sandwich norms with biases inside, and soft-caps; attention and
MLP side by side; multipliers of embedding, residual stream and logits; norms on outputs alone."""

ROWS = [
    torch.randint(101, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (13, 1, 8)
]
HOOKS = HookSpec().capture(
    "hook_*embed",
    "blocks.*.hook_*",
    "blocks.*.{attn.hook_z,attn.hook_out,mlp.hook_post,mlp.hook_out}",
    "ln_final.hook_scale",
)
NEURONS = {1: [5, 0, 51], 3: [17]}


@dataclass(frozen=True, eq=False)
class ByHand:
    """Of sequences laid end to end, in float64: every component [token, d_model] by its name, heads, chosen neurons and
    biases included; the stream after the embedding and after each block; logits [token, vocab] before a soft-cap.
    """

    components: Mapping[str, Tensor]
    streams: list[Tensor]
    logits: Tensor
    final_norm: nn.Module
    unembed: nn.Linear


def load_both(variant: str, folder: Path) -> tuple[PreTrainedModel, Model]:
    """A variant as transformers makes it, and as forebay reads it."""
    theirs = make(*VARIANTS[variant])
    theirs.save_pretrained(folder)
    return theirs, load_model(folder, device="cpu")


def by_hand(theirs: PreTrainedModel) -> ByHand:
    theirs = theirs.double()
    rows = [_row(theirs, row) for row in ROWS]
    unembed = theirs.get_output_embeddings()
    return ByHand(
        components={name: torch.cat([row[0][name] for row in rows]) for name in rows[0][0]},
        streams=[torch.cat(each) for each in zip(*(row[1] for row in rows), strict=True)],
        logits=torch.cat([row[2] for row in rows]),
        final_norm=theirs.get_submodule(SITES[theirs.config.model_type].final_norm),
        unembed=unembed,
    )


@torch.inference_mode()
def _row(theirs: PreTrainedModel, row: list[int]) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    sites, config = SITES[theirs.config.model_type], theirs.config
    blocks = list(theirs.get_submodule(sites.blocks))
    taken: dict[nn.Module, Tensor] = {}
    given: dict[nn.Module, Tensor] = {}
    watched = [block.get_submodule(name) for block in blocks for name in (sites.attn, sites.mlp)]
    watched += [theirs.get_submodule(sites.final_norm), theirs.get_output_embeddings()]
    watched += [theirs.get_submodule(sites.positions)] if sites.positions else []

    def watch(module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        taken[module], given[module] = arguments[0][0], result[0]

    handles = [module.register_forward_hook(watch) for module in watched]
    out = theirs(torch.tensor([row]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    entered = out.hidden_states[0][0]
    components = {"embed": entered}
    if sites.positions:
        components["pos_embed"] = given[theirs.get_submodule(sites.positions)]
        components["embed"] = entered - components["pos_embed"]
    for layer, block in enumerate(blocks):
        heads = config.num_attention_heads
        for name, module, norm in (("attn", sites.attn, sites.attn_norm), ("mlp", sites.mlp, sites.mlp_norm)):
            linear = block.get_submodule(module)
            raws = _raws(linear, taken[linear], name, layer, heads)
            components |= _added(raws, block.get_submodule(norm) if norm else None, config, name, layer)
    streams = [*(state[0] for state in out.hidden_states[:-1]), taken[theirs.get_submodule(sites.final_norm)]]
    scaling = getattr(config, "logits_scaling", 1.0) if config.model_type == "granite" else 1.0
    return components, streams, given[theirs.get_output_embeddings()] / scaling


def _raws(linear: nn.Module, x: Tensor, name: str, layer: int, n_heads: int) -> dict[str, Tensor]:
    """What heads, or neurons, and the bias give, before any norm."""
    weight = linear.weight if type(linear).__name__ == "Conv1D" else linear.weight.T  # [in, out]
    if name == "attn":
        pieces = zip(x.chunk(n_heads, -1), weight.chunk(n_heads, 0), strict=True)
        raws = {f"L{layer}H{head}": z @ w for head, (z, w) in enumerate(pieces)}
    else:
        chosen = NEURONS.get(layer, [])
        raws = {f"L{layer}N{n}": x[:, n, None] * weight[n] for n in chosen}
        others = [n for n in range(len(weight)) if n not in chosen]
        raws[f"{layer}_mlp_rest"] = x[:, others] @ weight[others]
    if linear.bias is not None:
        raws[f"{layer}_{name}_bias"] = linear.bias.expand(len(x), -1)
    return raws


def _added(raws: dict[str, Tensor], norm: nn.Module | None, config: object, name: str, layer: int) -> dict[str, Tensor]:
    """The same as it reaches the stream, and the whole of it without the bias."""
    multiplier = getattr(config, "residual_multiplier", 1.0)
    if norm is not None:
        whole = torch.stack(list(raws.values())).sum(0)
        scale = (whole.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()  # type: ignore[attr-defined]
        weight = norm.weight + (config.model_type == "gemma2")  # type: ignore[attr-defined]
        raws = {key: raw / scale * weight for key, raw in raws.items()}
    added = {key: raw * multiplier for key, raw in raws.items()}
    added[f"{layer}_{name}_out"] = torch.stack([raw for key, raw in added.items() if not key.endswith("bias")]).sum(0)
    return added
