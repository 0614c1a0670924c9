"""GPT-NeoX and Pythia: `model_type` "gpt_neox". Queries, keys and values lie in one matrix, head by head.

Source of the defaults: transformers' GPTNeoXConfig; of the tensor names: GPTNeoXForCausalLM.
"""

from ..spec import ModelSpec
from .common import read_sizes
from .config import Config
from .family import ACTIVATIONS, Family
from .layout import Layout
from .rotary import Rotary, read_rope, stretched


def _parse(config: Config) -> ModelSpec:
    sizes = read_sizes(config)
    n_ctx = config.count("max_position_embeddings", 2048)
    rotary = Rotary(
        d_head=sizes["d_head"],
        n_ctx=n_ctx,
        fraction=0.25,
        base_key="rotary_emb_base",
        fraction_key="rotary_pct",
    )
    config.only("rope_theta", config.take("rotary_emb_base", 10_000))  # written beside it by some versions
    config.only("partial_rotary_factor", config.take("rotary_pct", 0.25))
    rope = read_rope(config, rotary)
    biased = config.flag("attention_bias", True)
    return ModelSpec(
        family="gpt_neox",
        n_ctx=stretched(n_ctx, rope),
        rope=rope,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        parallel=config.flag("use_parallel_residual", True),
        activation=ACTIVATIONS[config.choice("hidden_act", "gelu", ACTIVATIONS)],
        gated=False,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=True,
        tied=config.flag("tie_word_embeddings", False),
        **sizes,
    )


_QKV = "gpt_neox.layers.{layer}.attention.query_key_value"
GPT_NEOX = Family(
    parse=_parse,
    layout=Layout(
        prefix="gpt_neox.",
        names={
            "embed": "gpt_neox.embed_in",
            "blocks.{layer}.ln1": "gpt_neox.layers.{layer}.input_layernorm",
            "blocks.{layer}.attn.q": _QKV,
            "blocks.{layer}.attn.k": _QKV,
            "blocks.{layer}.attn.v": _QKV,
            "blocks.{layer}.attn.out": "gpt_neox.layers.{layer}.attention.dense",
            "blocks.{layer}.ln2": "gpt_neox.layers.{layer}.post_attention_layernorm",
            "blocks.{layer}.mlp.up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
            "blocks.{layer}.mlp.down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
            "ln_final": "gpt_neox.final_layer_norm",
            "unembed": "embed_out",
        },
        by_head=frozenset({_QKV}),
        buffers=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    ),
)
