"""What a model is, as plain values: enough to list its hook points, their sizes and its weights without loading any.

A family that needs more (soft-caps, norms after the sublayers, learned positions, sliding windows) adds fields whose
defaults leave the families before it as they were.
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
    """Rotary position embedding: angle = position · base^(−2i/d_head), its frequencies rescaled by `kind`.

    Kinds: `default`; `linear` (every frequency divided by `factor`); `llama3` (long wavelengths divided by `factor`,
    short ones kept, a ramp between, as Llama 3.1 defines it); `divided` (frequency i divided by `divisors[i]`, the form
    in which GGUF files keep the result of any such rule).
    """

    base: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The architecture of one decoder-only transformer. Counts are plain integers; nothing is derived on construction.

    `d_vocab` is the number of rows of the embedding; `n_ctx` the longest sequence the model was made for; `activation`
    a key of `parts.ACTIVATIONS`. `tied` says that the unembedding is the embedding.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm_eps: float
    rope: RopeSpec
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    logit_softcap: float | None = None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of the dimensions that do not depend on the tokens."""
        return {
            "layer": self.n_layers,
            "d_model": self.d_model,
            "head": self.n_heads,
            "kv_head": self.n_kv_heads,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp,
            "vocab": self.d_vocab,
        }

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


@functools.lru_cache(maxsize=16)
def _points(spec: ModelSpec) -> tuple[HookPoint, ...]:
    absent = {"hook_pos_embed"}  # positions are rotary
    return (
        *(HookPoint(kind) for kind in points.BEFORE if kind not in absent),
        *(HookPoint(kind, layer) for layer in range(spec.n_layers) for kind in points.BLOCK),
        *(HookPoint(kind) for kind in points.AFTER),
    )


@functools.lru_cache(maxsize=16)
def _weight_shapes(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.d_vocab, spec.d_model)}
    for layer in range(spec.n_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block_shapes(spec).items()}
    shapes["ln_final.weight"] = (spec.d_model,)
    if not spec.tied:
        shapes["unembed.weight"] = (spec.d_vocab, spec.d_model)
    return MappingProxyType(shapes)


def _block_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    queries, keys = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    matrices = {  # name: (out, in, whether it has a bias)
        "attn.q": (queries, spec.d_model, spec.qkv_bias),
        "attn.k": (keys, spec.d_model, spec.qkv_bias),
        "attn.v": (keys, spec.d_model, spec.qkv_bias),
        "attn.out": (spec.d_model, queries, spec.out_bias),
        "mlp.gate": (spec.d_mlp, spec.d_model, spec.mlp_bias),
        "mlp.up": (spec.d_mlp, spec.d_model, spec.mlp_bias),
        "mlp.down": (spec.d_model, spec.d_mlp, spec.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"ln1.weight": (spec.d_model,), "ln2.weight": (spec.d_model,)}
    for name, (out, into, biased) in matrices.items():
        shapes[f"{name}.weight"] = (out, into)
        if biased:
            shapes[f"{name}.bias"] = (out,)
    return shapes
