"""TransformerLens at the work of `common`: its bridge over transformers' model, and its own HookedTransformer with the
same weights, neither folded nor centred."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from benchmarks.peers.common import Task, Work, report, task, write


def works(task: Task, model: Any, kind: str) -> dict[str, Work]:
    """Without the logits wherever the library can leave them out."""
    names = {f"blocks.{layer}.hook_resid_post": layer for layer in task.layers}
    beyond = max(task.layers) + 1

    def captured(**settings: Any) -> Iterator[dict[int, torch.Tensor]]:
        for batch in task.batches:
            with torch.inference_mode():
                _, cache = model.run_with_cache(batch, return_type=None, **settings)
            yield {layer: cache[name] for name, layer in names.items()}

    def last(**settings: Any) -> torch.Tensor:
        for tensors in captured(**settings):
            found = tensors[max(task.layers)]
        return found

    def forward() -> None:
        for batch in task.batches:
            with torch.inference_mode():
                model(batch, return_type="logits")

    chosen = {"names_filter": list(names)}
    return {
        f"{kind}: forward with logits": forward,
        f"{kind}: {len(names)} layers": lambda: last(**chosen),
        f"{kind}: {len(names)} layers, stopped": lambda: last(**chosen, stop_at_layer=beyond),
        f"{kind}: {len(names)} layers, stopped, to disk": lambda: write(
            task, lambda: captured(**chosen, stop_at_layer=beyond)
        ),
        f"{kind}: every hook": lambda: last(),
    }


def hooked(task: Task) -> HookedTransformer:
    """Its own model of Llama's architecture, of which a folder's name tells it nothing."""
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = task.model.config
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    own = HookedTransformerConfig(
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=max(batch.shape[1] for batch in task.batches),
        eps=config.rms_norm_eps,
        d_vocab=config.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=config.head_dim,
        rotary_base=int(rope["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    model = HookedTransformer(own)
    model.load_state_dict(convert_llama_weights(task.model, own), strict=False)
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    asked = task()
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(asked.folder), device="cpu", dtype=torch.float32)
    variants = works(asked, bridge, "bridge") | works(asked, hooked(asked), "HookedTransformer")
    report(asked, "transformer_lens", variants)
