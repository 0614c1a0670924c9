"""Llama 1, 2 and 3 and everything published in their shape (SmolLM, TinyLlama, Yi, …): `model_type` "llama".

Source of the defaults: transformers' LlamaConfig. Source of the tensor names: transformers' LlamaForCausalLM.
"""

from ..errors import ModelError
from ..spec import ModelSpec
from .config import Config, read_rope
from .family import ACTIVATIONS, Family


def _parse(config: Config) -> ModelSpec:
    d_model, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    n_kv_heads = config.count("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise ModelError(f"{n_heads} attention heads cannot share {n_kv_heads} key-value heads evenly")
    biased = config.flag("attention_bias", False)
    n_ctx = config.count("max_position_embeddings", 2048)
    return ModelSpec(
        family="llama",
        n_layers=config.count("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=config.count("head_dim", d_model // n_heads),
        d_mlp=config.count("intermediate_size"),
        d_vocab=config.count("vocab_size"),
        n_ctx=n_ctx,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config, default_base=10_000.0, n_ctx=n_ctx),
        activation=ACTIVATIONS[config.choice("hidden_act", "silu", ACTIVATIONS)],
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=config.flag("mlp_bias", False),
        tied=config.flag("tie_word_embeddings", False),
    )


FAMILY = Family(
    parse=_parse,
    names={
        "embed": "model.embed_tokens",
        "blocks.{layer}.ln1": "model.layers.{layer}.input_layernorm",
        "blocks.{layer}.attn.q": "model.layers.{layer}.self_attn.q_proj",
        "blocks.{layer}.attn.k": "model.layers.{layer}.self_attn.k_proj",
        "blocks.{layer}.attn.v": "model.layers.{layer}.self_attn.v_proj",
        "blocks.{layer}.attn.out": "model.layers.{layer}.self_attn.o_proj",
        "blocks.{layer}.ln2": "model.layers.{layer}.post_attention_layernorm",
        "blocks.{layer}.mlp.gate": "model.layers.{layer}.mlp.gate_proj",
        "blocks.{layer}.mlp.up": "model.layers.{layer}.mlp.up_proj",
        "blocks.{layer}.mlp.down": "model.layers.{layer}.mlp.down_proj",
        "ln_final": "model.norm",
        "unembed": "lm_head",
    },
    buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
)
