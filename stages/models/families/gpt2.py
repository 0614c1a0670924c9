"""GPT-2: `model_type` "gpt2". Learned positions; matrices are stored [in, out], queries, keys and values in one.

Source of the defaults: transformers' GPT2Config; of the tensor names: GPT2LMHeadModel.
"""

from ..errors import ModelError
from ..spec import ModelSpec
from .config import Config
from .family import ACTIVATIONS, Family
from .layout import Layout


def _parse(config: Config) -> ModelSpec:
    d_model, n_heads = config.count("n_embd", 768), config.count("n_head", 12)
    if d_model % n_heads:
        raise ModelError(f"{n_heads} attention heads cannot share {d_model} channels evenly")
    n_ctx = config.count("n_positions", 1024)
    config.only("n_ctx", n_ctx)
    config.only("n_special", 0)
    config.only("predict_special_tokens", True)
    config.only("reorder_and_upcast_attn", False, True)  # a question of rounding in float16: softmax is float32 here
    return ModelSpec(
        family="gpt2",
        n_layers=config.count("n_layer", 12),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=config.count("n_inner", 4 * d_model),
        d_vocab=config.count("vocab_size", 50_257),
        n_ctx=n_ctx,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        rope=None,
        learned_positions=True,
        activation=ACTIVATIONS[config.choice("activation_function", "gelu_new", ACTIVATIONS)],
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attn_scale=None if config.flag("scale_attn_weights", True) else 1.0,
        attn_scale_by_layer=config.flag("scale_attn_by_inverse_layer_idx", False),
        tied=config.flag("tie_word_embeddings", True),
    )


_QKV = "transformer.h.{layer}.attn.c_attn"
_MATRICES = {
    "blocks.{layer}.attn.q": _QKV,
    "blocks.{layer}.attn.k": _QKV,
    "blocks.{layer}.attn.v": _QKV,
    "blocks.{layer}.attn.out": "transformer.h.{layer}.attn.c_proj",
    "blocks.{layer}.mlp.up": "transformer.h.{layer}.mlp.c_fc",
    "blocks.{layer}.mlp.down": "transformer.h.{layer}.mlp.c_proj",
}
GPT2 = Family(
    parse=_parse,
    layout=Layout(
        prefix="transformer.",
        names={
            "embed": "transformer.wte",
            "pos_embed": "transformer.wpe",
            "blocks.{layer}.ln1": "transformer.h.{layer}.ln_1",
            **_MATRICES,
            "blocks.{layer}.ln2": "transformer.h.{layer}.ln_2",
            "ln_final": "transformer.ln_f",
            "unembed": "lm_head",
        },
        transposed=frozenset(_MATRICES.values()),
        buffers=(r"h\.\d+\.attn\.bias", r"h\.\d+\.attn\.masked_bias"),  # the causal mask, of old checkpoints
    ),
)
