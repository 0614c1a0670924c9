"""What a model is, as plain values: enough to list its hook points, their sizes and its weights without loading any.

Every way in which the families differ is a field here, and the one forward reads nothing else: defaults are Llama's.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from . import points
from .points import HookPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: angle = position · base^(−2i/n), its frequencies rescaled by `kind`, n = `dims`
    channels of every head being turned (None: all of them).

    Kinds, as transformers' modeling_rope_utils defines them (`rope.FREQUENCIES` holds the rules):

    * `default`; `linear` (every frequency divided by `factor`);
    * `dynamic` (NTK: the base grows with the length of the sequence beyond `original_context`);
    * `llama3` (long wavelengths divided by `factor`, short ones kept, a ramp between `low_freq_factor` and
      `high_freq_factor` turns within `original_context`);
    * `yarn` (a ramp over the channels between `beta_fast` and `beta_slow` turns; Peng et al. 2023);
    * `longrope` (frequency i divided by `short_divisors[i]` in a sequence of at most `original_context` tokens, by
      `divisors[i]` in a longer one);
    * `divided` (frequency i divided by `divisors[i]`, the form in which GGUF files keep the result of any such rule).

    Cosines and sines are multiplied by `attention_factor`.
    """

    base: float
    kind: str = "default"
    dims: int | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    original_context: int = 0
    divisors: tuple[float, ...] = ()
    short_divisors: tuple[float, ...] = ()
    attention_factor: float = 1.0


MIXED: Mapping[int, tuple[str, ...]] = {6: ("r", "w", "k", "v", "g"), 7: ("r", "w", "k", "v", "a", "g")}
"""What RWKV's time mixing makes of each token and the one before it, by version: w is the decay, a the rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RwkvSpec:
    """What a model of RWKV has in the place of attention: time mixing of `version` 6 (Finch; Peng et al. 2024,
    arXiv:2404.05892) or 7 (Goose; Peng et al. 2025, arXiv:2503.14456).

    `group_norm_eps` is that of the norm over each head's output. Ranks are those of the products of two matrices that
    make the decay and, in version 6, the token shift (`mix_rank`), in version 7 the learning rate (`rate_rank`), the
    value residual (`value_rank`) and the gate (`gate_rank`); 0 for those that the version does not have.
    """

    version: int
    group_norm_eps: float
    decay_rank: int
    mix_rank: int = 0
    rate_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The architecture of one decoder-only model. Counts are plain integers; nothing is derived on construction.

    Sizes: `d_vocab` is the number of rows of the embedding, `n_ctx` the longest sequence the model was made for, None
    for a recurrent model, whose sequences may be of any length.

    Blocks: attention and MLP, or, where there is `rwkv`, time mixing and channel mixing: then `n_heads` heads of
    `d_head` channels each have a state, there is a norm on the embedding, and of what follows only the norms and the
    multiplier and soft-cap of the logits apply.

    Positions: `rope`, or None where there is no rotation; `learned_positions` adds a row of `pos_embed` to the
    embedding. Layers that `sliding` marks see only the last `window` positions, themselves included, and turn by
    `sliding_rope` where there is one.

    Norms: `norm` is a key of `norms.NORMS`; they have a weight and perhaps a bias (`norm_weight`, `norm_bias`);
    `norm_offset` is added to the weight; `norm_float32` says that the weight is applied before the cast back to the
    model's dtype. `pre_norms` stand before attention and MLP, `post_norms` on what they give (sandwich norms have
    both). `parallel`: attention and MLP both read the block's input; with `shared_norm` through the same norm.
    `qk_norm` is "head" (over the channels of each head), "full" (over all heads together) or None.

    Attention: scores are multiplied by `attn_scale` (None: d_head^−½), divided by the layer's number from 1 on where
    `attn_scale_by_layer`, and capped as c·tanh(x/c) by `attn_softcap`; `clip_qkv` bounds queries, keys and values.

    MLP: `activation` is a key of `parts.ACTIVATIONS`; without `gated` there is no gate.

    Multipliers: of the embedding, of what attention and MLP add to the residual stream, and of the logits.
    `logit_softcap` caps the logits. `tied` says that the unembedding is the embedding.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int | None
    norm_eps: float
    rope: RopeSpec | None
    learned_positions: bool = False
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    sliding_rope: RopeSpec | None = None
    norm: str = "rms"
    norm_weight: bool = True
    norm_bias: bool = False
    norm_offset: float = 0.0
    norm_float32: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    shared_norm: bool = False
    qk_norm: str | None = None
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    tied: bool = False
    attn_scale: float | None = None
    attn_scale_by_layer: bool = False
    attn_softcap: float | None = None
    clip_qkv: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    rwkv: RwkvSpec | None = None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of the dimensions that do not depend on the tokens."""
        recurrent = {} if self.rwkv is None else {"d_key": self.d_head, "d_value": self.d_head}
        return {
            **recurrent,
            "layer": self.n_layers,
            "d_model": self.d_model,
            "head": self.n_heads,
            "kv_head": self.n_kv_heads,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp,
            "vocab": self.d_vocab,
        }

    def slides(self, layer: int) -> bool:
        """Whether the attention of a layer sees only the last `window` positions."""
        return bool(self.sliding) and self.sliding[layer]

    def points(self) -> tuple[HookPoint, ...]:
        """Every hook point this model has, in the order of firing."""
        return _points(self)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every weight, by forebay's name for it. Matrices are [out, in], as `torch.nn.Linear` keeps them.

        Without an entry there is no such weight: biases that the model lacks, and `unembed.weight` where it is tied.
        """
        return _weight_shapes(self)

    @property
    def n_parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())


def _absent(spec: ModelSpec) -> set[str]:
    """The kinds of points that a model of this shape does not have."""
    lacks = {
        "hook_pos_embed": not spec.learned_positions,
        "ln1.hook_scale": not spec.pre_norms,
        "ln1.hook_normalized": not spec.pre_norms,
        "attn.hook_rot_q": spec.rope is None,
        "attn.hook_rot_k": spec.rope is None,
        "hook_resid_mid": spec.parallel,
        "ln2.hook_scale": not spec.pre_norms or spec.shared_norm,
        "ln2.hook_normalized": not spec.pre_norms or spec.shared_norm,
        "mlp.hook_pre_linear": not spec.gated,
        "embed.ln.hook_scale": spec.rwkv is None,
        "embed.ln.hook_normalized": spec.rwkv is None,
        "rwkv.hook_a": spec.rwkv is not None and spec.rwkv.version == 6,
        "rwkv.hook_kk": spec.rwkv is not None and spec.rwkv.version == 6,
        "mlp.hook_receptance": spec.rwkv is None or spec.rwkv.version == 7,
    }
    elsewhere = "rwkv." if spec.rwkv is None else "attn."
    return {kind for kind, is_lacking in lacks.items() if is_lacking} | {
        kind for kind in points.BLOCK if kind.startswith(elsewhere)
    }


@functools.lru_cache(maxsize=16)
def _points(spec: ModelSpec) -> tuple[HookPoint, ...]:
    absent = _absent(spec)
    return (
        *(HookPoint(kind) for kind in points.BEFORE if kind not in absent),
        *(HookPoint(kind, layer) for layer in range(spec.n_layers) for kind in points.BLOCK if kind not in absent),
        *(HookPoint(kind) for kind in points.AFTER),
    )


@functools.lru_cache(maxsize=16)
def _weight_shapes(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.d_vocab, spec.d_model)}
    if spec.learned_positions and spec.n_ctx is not None:
        shapes["pos_embed.weight"] = (spec.n_ctx, spec.d_model)
    if spec.rwkv is not None:
        shapes |= _norm_shapes(spec, {"embed.ln": spec.d_model})
    for layer in range(spec.n_layers):
        block = _block_shapes(spec) if spec.rwkv is None else _rwkv_shapes(spec, spec.rwkv, layer)
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= _norm_shapes(spec, {"ln_final": spec.d_model})
    if not spec.tied:
        shapes["unembed.weight"] = (spec.d_vocab, spec.d_model)
    if spec.unembed_bias:
        shapes["unembed.bias"] = (spec.d_vocab,)
    return MappingProxyType(shapes)


def _block_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    queries, keys = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    norms: dict[str, int] = {}
    if spec.pre_norms:
        norms |= {"ln1": spec.d_model} if spec.shared_norm else {"ln1": spec.d_model, "ln2": spec.d_model}
    if spec.post_norms:
        norms |= {"ln1_post": spec.d_model, "ln2_post": spec.d_model}
    if spec.qk_norm is not None:
        per_head = spec.qk_norm == "head"
        norms |= {
            "attn.q_norm": spec.d_head if per_head else queries,
            "attn.k_norm": spec.d_head if per_head else keys,
        }
    matrices = {  # name: (out, in, whether it has a bias)
        "attn.q": (queries, spec.d_model, spec.qkv_bias),
        "attn.k": (keys, spec.d_model, spec.qkv_bias),
        "attn.v": (keys, spec.d_model, spec.qkv_bias),
        "attn.out": (spec.d_model, queries, spec.out_bias),
        "mlp.gate": (spec.d_mlp, spec.d_model, spec.mlp_bias),
        "mlp.up": (spec.d_mlp, spec.d_model, spec.mlp_bias),
        "mlp.down": (spec.d_model, spec.d_mlp, spec.mlp_bias),
    }
    if not spec.gated:
        del matrices["mlp.gate"]
    shapes = _norm_shapes(spec, norms)
    for name, (out, into, biased) in matrices.items():
        shapes[f"{name}.weight"] = (out, into)
        if biased:
            shapes[f"{name}.bias"] = (out,)
    return shapes


def _rwkv_shapes(spec: ModelSpec, rwkv: RwkvSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's weights. D channel, A channels of all heads together: vectors are what their names say, pairs
    `_down` [rank, D] and `_up` [out, rank] make one of low rank that depends on the token."""
    wide, heads = spec.d_model, spec.n_heads * spec.d_head
    low_rank = {"decay": rwkv.decay_rank}
    if rwkv.version == 7:
        low_rank |= {"rate": rwkv.rate_rank, "gate": rwkv.gate_rank} | ({"value": rwkv.value_rank} if layer else {})
    shapes = _norm_shapes(spec, {"ln1": wide, "ln2": wide})
    shapes |= {f"rwkv.{name}.weight": (heads, wide) for name in ("r", "k", "v", "g")[: 4 if rwkv.version == 6 else 3]}
    shapes |= {f"rwkv.{name}": (heads,) for name in low_rank if name != "gate"}
    for name, rank in low_rank.items():
        shapes |= {f"rwkv.{name}_down": (rank, wide), f"rwkv.{name}_up": (heads, rank)}
    shapes |= {f"rwkv.mix_{name}": (wide,) for name in MIXED[rwkv.version]}
    if rwkv.version == 6:
        shapes["rwkv.mix_x"] = (wide,)
        for name in MIXED[6]:
            shapes |= {f"rwkv.mix_{name}_down": (rwkv.mix_rank, wide), f"rwkv.mix_{name}_up": (wide, rwkv.mix_rank)}
    else:
        shapes |= {"rwkv.removal": (heads,), "rwkv.rate_on_k": (heads,)}
    shapes |= {
        "rwkv.bonus": (spec.n_heads, spec.d_head),
        "rwkv.norm.weight": (heads,),
        "rwkv.norm.bias": (heads,),
        "rwkv.out.weight": (wide, heads),
        "mlp.mix_k": (wide,),
        "mlp.up.weight": (spec.d_mlp, wide),
        "mlp.down.weight": (wide, spec.d_mlp),
    }
    if rwkv.version == 6:
        shapes |= {"mlp.mix_r": (wide,), "mlp.receptance.weight": (wide, wide)}
    return shapes


def _norm_shapes(spec: ModelSpec, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, width in widths.items():
        if spec.norm_weight:
            shapes[f"{name}.weight"] = (width,)
        if spec.norm_bias:
            shapes[f"{name}.bias"] = (width,)
    return shapes
