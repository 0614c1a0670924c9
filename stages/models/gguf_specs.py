"""The architectures that are read from GGUF files: metadata to a `ModelSpec`, and the names of their tensors.

Metadata keys are those of llama.cpp's gguf-py `constants.py`; what the file does not say, llama.cpp's
`llama-model.cpp` and `llama-context.cpp` say for every model of the architecture.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import ModelError
from .families.layout import Layout
from .families.rotary import stretched
from .gguf_container import Container
from .spec import ModelSpec, RopeSpec

FREQUENCY_DIVISORS = "rope_freqs.weight"

_NAMES = {
    "embed": "token_embd",
    "blocks.{layer}.ln1": "blk.{layer}.attn_norm",
    "blocks.{layer}.attn.q": "blk.{layer}.attn_q",
    "blocks.{layer}.attn.k": "blk.{layer}.attn_k",
    "blocks.{layer}.attn.v": "blk.{layer}.attn_v",
    "blocks.{layer}.attn.q_norm": "blk.{layer}.attn_q_norm",
    "blocks.{layer}.attn.k_norm": "blk.{layer}.attn_k_norm",
    "blocks.{layer}.attn.out": "blk.{layer}.attn_output",
    "blocks.{layer}.ln1_post": "blk.{layer}.post_attention_norm",
    "blocks.{layer}.ln2": "blk.{layer}.ffn_norm",
    "blocks.{layer}.ln2_post": "blk.{layer}.post_ffw_norm",
    "blocks.{layer}.mlp.gate": "blk.{layer}.ffn_gate",
    "blocks.{layer}.mlp.up": "blk.{layer}.ffn_up",
    "blocks.{layer}.mlp.down": "blk.{layer}.ffn_down",
    "ln_final": "output_norm",
    "unembed": "output",
}
LAYOUT = Layout(names=_NAMES, buffers=(FREQUENCY_DIVISORS,))
"""The tensors of a GGUF file, whatever its architecture."""

# Metadata that changes no number of a forward pass, or that the tokenizer's reader answers for.
_ELSEWHERE = ("general.", "tokenizer.", "quantize.", "imatrix.")
# Settings that are harmless at one value only, whatever the architecture; llama.cpp's own notes are at any.
_ONLY: Mapping[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
}
_ONLY_OF_A_FILE: Mapping[str, Any] = {"split.no": 0, "split.count": 1}
_IRRELEVANT = ("rope.scaling.finetuned", "rope.scaling.original_context_length")


class Metadata:
    """The settings of the architecture, remembering which were asked for, so that the rest can be refused."""

    def __init__(self, container: Container, dequantize: Callable[[str], Any]) -> None:
        self.container = container
        self.dequantize = dequantize
        self.architecture = str(container.metadata["general.architecture"])
        self._prefix = f"{self.architecture}."
        self._taken: set[str] = set()

    def take(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """Give a setting. Raises ModelError where it is missing without a default, of another type, or no positive
        number."""
        value = self.find(key, kind, default)
        if value is None:
            raise ModelError(f"{self.container.path} has no {self._prefix + key!r} in its metadata")
        return value

    def find(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """The same, or None where it is missing."""
        self._taken.add(self._prefix + key)
        value = self.container.metadata.get(self._prefix + key, default)
        if value is not None and (not isinstance(value, kind) or (kind is not str and not 0 < value < math.inf)):
            raise self.refusal(key, value, f"a positive {kind.__name__}")
        return value

    def refusal(self, key: str, value: object, expected: str) -> ModelError:
        """Give the error for a setting that cannot be used."""
        return ModelError(
            f"{self.container.path} says {self._prefix + key} = {value!r}, but only {expected} can be honoured"
        )

    def refuse_the_rest(self) -> None:
        """Raise ModelError for every setting that nobody asked for and that is not known to be without effect."""
        only = {**_ONLY_OF_A_FILE, **{self._prefix + key: value for key, value in _ONLY.items()}}
        irrelevant = {self._prefix + key for key in _IRRELEVANT}
        values = self.container.metadata
        for key in sorted(values.keys() - self._taken - irrelevant):
            if key.startswith(_ELSEWHERE) or (key in only and values[key] == only[key]):
                continue
            raise ModelError(
                f"{self.container.path} has the setting {key} = {values[key]!r}, which nothing here honours"
            )


def _common(metadata: Metadata) -> dict[str, Any]:
    """The fields of `ModelSpec` that every architecture spells alike."""
    d_model, n_heads = metadata.take("embedding_length", int), metadata.take("attention.head_count", int)
    n_kv_heads = metadata.take("attention.head_count_kv", int, n_heads)
    d_head = metadata.take("attention.key_length", int, d_model // n_heads)
    tensors = metadata.container.tensors
    if n_heads % n_kv_heads:
        raise ModelError(
            f"{metadata.container.path}: {n_heads} attention heads cannot share {n_kv_heads} key-value heads evenly"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if (length := metadata.take(key, int, d_head)) != d_head:
            raise metadata.refusal(key, length, f"that of the keys, {d_head},")
    n_layers = metadata.take("block_count", int)
    if n_layers > len(tensors):
        raise metadata.refusal("block_count", n_layers, f"as many blocks as its {len(tensors)} tensors can make up")
    n_rows = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 1  # match_tensors refuses it
    n_ctx = metadata.take("context_length", int)
    rope = _read_rope(metadata, d_head, n_ctx)
    biases = {name.rsplit(".", 2)[1] for name in tensors if name.endswith(".bias")}
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "d_mlp": metadata.take("feed_forward_length", int),
        "d_vocab": metadata.take("vocab_size", int, n_rows),
        "n_ctx": stretched(n_ctx, rope),
        "norm_eps": metadata.take("attention.layer_norm_rms_epsilon", float),
        "rope": rope,
        "qkv_bias": "attn_q" in biases,
        "out_bias": "attn_output" in biases,
        "mlp_bias": "ffn_down" in biases,
        "tied": "output.weight" not in tensors,
    }


def _read_rope(metadata: Metadata, d_head: int, n_ctx: int) -> RopeSpec:
    rope = RopeSpec(base=metadata.take("rope.freq_base", float, 10_000.0))
    kind = metadata.take("rope.scaling.type", str, "linear")
    older = metadata.take("rope.scale_linear", float, 1.0)  # the spelling before there were types
    factor = metadata.take("rope.scaling.factor", float, older)
    if kind not in _SCALINGS:
        raise metadata.refusal("rope.scaling.type", kind, f"one of {', '.join(map(repr, _SCALINGS))}")
    scaled = _SCALINGS[kind](metadata, rope, factor, n_ctx)
    if FREQUENCY_DIVISORS not in metadata.container.tensors:
        return scaled
    if scaled != rope:
        raise ModelError(
            f"{metadata.container.path} has both {FREQUENCY_DIVISORS} and a {kind} scaling of {factor}; only one can be"
        )
    divisors = tuple(metadata.dequantize(FREQUENCY_DIVISORS).tolist())
    if len(divisors) != d_head // 2:
        raise ModelError(
            f"{metadata.container.path} holds {FREQUENCY_DIVISORS} with {len(divisors)} values, but heads of {d_head} "
            f"channels turn at {d_head // 2} frequencies"
        )
    return replace(rope, kind="divided", divisors=divisors)


def _unscaled(metadata: Metadata, rope: RopeSpec, factor: float, n_ctx: int) -> RopeSpec:
    return rope  # llama.cpp does not look at the factor then


def _linear(metadata: Metadata, rope: RopeSpec, factor: float, n_ctx: int) -> RopeSpec:
    return rope if factor == 1.0 else replace(rope, kind="linear", factor=factor)


def _yarn(metadata: Metadata, rope: RopeSpec, factor: float, n_ctx: int) -> RopeSpec:
    if factor < 1.0:
        raise metadata.refusal("rope.scaling.factor", factor, "a factor of at least 1 for yarn")
    return replace(
        rope,
        kind="yarn",
        factor=factor,
        beta_fast=metadata.take("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=metadata.take("rope.scaling.yarn_beta_slow", float, 1.0),
        original_context=metadata.take("rope.scaling.original_context_length", int, n_ctx),
        attention_factor=1.0 + 0.1 * math.log(factor),
    )


_SCALINGS: Mapping[str, Callable[[Metadata, RopeSpec, float, int], RopeSpec]] = {
    "none": _unscaled,
    "linear": _linear,
    "yarn": _yarn,
}


def _llama(metadata: Metadata) -> ModelSpec:
    return ModelSpec(family="llama", **_common(metadata))


def _qwen2(metadata: Metadata) -> ModelSpec:
    return ModelSpec(family="qwen2", **_common(metadata))


def _qwen3(metadata: Metadata) -> ModelSpec:
    return ModelSpec(family="qwen3", qk_norm="head", **_common(metadata))


def _gemma_fields(metadata: Metadata) -> dict[str, Any]:
    """What all Gemmas share. The files hold norm weights with their 1 already added."""
    fields = _common(metadata)
    return fields | {"norm_float32": True, "activation": "gelu_tanh", "embed_scale": fields["d_model"] ** 0.5}


def _gemma(metadata: Metadata) -> ModelSpec:
    return ModelSpec(family="gemma", **_gemma_fields(metadata))


def _scale(fields: Mapping[str, Any], n_layers_of_27b: int) -> float:
    """The one size whose attention does not scale by the width of its heads is told by its number of layers."""
    odd = fields["n_layers"] == n_layers_of_27b
    scale: float = (fields["d_model"] / fields["n_heads"] if odd else fields["d_head"]) ** -0.5
    return scale


def _gemma2(metadata: Metadata) -> ModelSpec:
    fields = _gemma_fields(metadata)
    return ModelSpec(
        family="gemma2",
        post_norms=True,
        attn_scale=_scale(fields, n_layers_of_27b=46),
        attn_softcap=metadata.take("attn_logit_softcapping", float, 50.0),
        logit_softcap=metadata.take("final_logit_softcapping", float, 30.0),
        window=metadata.take("attention.sliding_window", int, 4096),
        sliding=tuple(i % 2 == 0 for i in range(fields["n_layers"])),
        **fields,
    )


def _gemma3(metadata: Metadata) -> ModelSpec:
    fields = _gemma_fields(metadata)
    if fields["rope"].kind not in ("default", "linear"):  # how layers that slide would turn then is nowhere said
        raise ModelError(
            f"{metadata.container.path} has {fields['rope'].kind} frequencies, but those of a gemma3 file can only be "
            "scaled linearly"
        )
    window = metadata.find("attention.sliding_window", int)
    near = RopeSpec(base=metadata.take("rope.freq_base_swa", float, 10_000.0))
    slides = tuple((i + 1) % 6 != 0 for i in range(fields["n_layers"]))
    return ModelSpec(
        family="gemma3",
        post_norms=True,
        qk_norm="head",
        attn_scale=_scale(fields, n_layers_of_27b=62),
        logit_softcap=metadata.find("final_logit_softcapping", float),
        window=window,
        sliding=slides if window else (),
        sliding_rope=near if window else None,
        **fields,
    )


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table: how metadata reads, and whether rows of queries and keys are kept in llama.cpp's order, in
    which the two halves of a head that rotate together alternate."""

    parse: Callable[[Metadata], ModelSpec]
    interleaved: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_llama, interleaved=True),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "gemma": Architecture(_gemma),
    "gemma2": Architecture(_gemma2),
    "gemma3": Architecture(_gemma3),
}
"""The architectures by `general.architecture`."""
