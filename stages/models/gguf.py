"""A checkpoint as one GGUF file: metadata to a `ModelSpec`, quantised blocks to float32 tensors.

Metadata keys are those of llama.cpp's gguf-py `constants.py`; blocks are dequantised by that package. Only files of
architecture `llama` in one piece are read.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .errors import ModelError, nearest
from .families.family import match_tensors, name_tensors
from .gguf_container import Container, StoredTensor, read_container
from .spec import ModelSpec, RopeSpec
from .tokenizers_gguf import read_vocabulary

if TYPE_CHECKING:
    import torch

_FREQUENCY_DIVISORS = "rope_freqs.weight"

# Stems of forebay's weight names → those of the file, by architecture.
_ARCHITECTURES: Mapping[str, Mapping[str, str]] = {
    "llama": {
        "embed": "token_embd",
        "blocks.{layer}.ln1": "blk.{layer}.attn_norm",
        "blocks.{layer}.attn.q": "blk.{layer}.attn_q",
        "blocks.{layer}.attn.k": "blk.{layer}.attn_k",
        "blocks.{layer}.attn.v": "blk.{layer}.attn_v",
        "blocks.{layer}.attn.out": "blk.{layer}.attn_output",
        "blocks.{layer}.ln2": "blk.{layer}.ffn_norm",
        "blocks.{layer}.mlp.gate": "blk.{layer}.ffn_gate",
        "blocks.{layer}.mlp.up": "blk.{layer}.ffn_up",
        "blocks.{layer}.mlp.down": "blk.{layer}.ffn_down",
        "ln_final": "output_norm",
        "unembed": "output",
    }
}

# Metadata that changes no number of a forward pass, or that the tokenizer's reader answers for.
_ELSEWHERE = ("general.", "tokenizer.", "quantize.", "imatrix.")
# Settings on which no kind of rotary scaling that is honoured depends.
_IRRELEVANT = ("llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned")
# Settings that are harmless at one value only.
_ONLY: Mapping[str, Any] = {
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.attention.causal": True,
    "llama.rope.scaling.attn_factor": 1.0,
    "split.no": 0,
    "split.count": 1,
}


class _Metadata:
    """The settings of the architecture, remembering which were asked for, so that the rest can be refused."""

    def __init__(self, container: Container) -> None:
        self._values = container.metadata
        self._path = container.path
        self._prefix = f"{container.metadata['general.architecture']}."
        self._taken: set[str] = set()

    def take(self, key: str, kind: type[Any], default: Any = None) -> Any:
        self._taken.add(self._prefix + key)
        value = self._values.get(self._prefix + key, default)
        if value is None:
            raise ModelError(f"{self._path} has no {self._prefix + key!r} in its metadata")
        if not isinstance(value, kind) or (kind is not str and not value > 0):
            raise ModelError(
                f"{self._path} says {self._prefix + key} = {value!r}, which is no positive {kind.__name__}"
            )
        return value

    def refuse_the_rest(self) -> None:
        for key in sorted(self._values.keys() - self._taken):
            if key.startswith(_ELSEWHERE) or key in _IRRELEVANT or (key in _ONLY and self._values[key] == _ONLY[key]):
                continue
            raise ModelError(f"{self._path} has the setting {key} = {self._values[key]!r}, which nothing here honours")


def open_gguf(path: Path, source: str) -> Checkpoint:
    """Open a GGUF file; reads its metadata, its list of tensors and, where there are any, its few rotary divisors.

    Raises ModelError for a damaged or truncated file, an architecture other than llama, and for every setting or
    tensor that would not be honoured.
    """
    container = read_container(path)
    architecture = str(container.metadata.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise ModelError(
            f"{path} is of architecture {architecture!r}; GGUF files are read for: {', '.join(_ARCHITECTURES)}."
            f"{nearest(architecture, _ARCHITECTURES)}"
        )
    for name, tensor in container.tensors.items():
        _check_extent(container, name, tensor)
    spec = _read_spec(container)
    shapes = {name: tensor.shape for name, tensor in container.tensors.items()}
    wanted = name_tensors(spec, _ARCHITECTURES[architecture])
    match_tensors(spec, wanted, shapes, buffers=(_FREQUENCY_DIVISORS,), where=str(path))
    heads = {"attn.q": spec.n_heads, "attn.k": spec.n_kv_heads}

    def read(name: str) -> "torch.Tensor":
        stem = name.split(".", 2)[-1].rpartition(".")[0]
        tensor = _dequantize(container, wanted[name])
        return _uninterleave(tensor, heads[stem]) if stem in heads else tensor

    return Checkpoint(
        source=source,
        revision=None,
        files=(path,),
        spec=spec,
        reader=read,
        vocabulary=functools.cache(lambda: read_vocabulary(container.metadata, path)),
    )


def _read_spec(container: Container) -> ModelSpec:
    metadata = _Metadata(container)
    d_model, n_heads = metadata.take("embedding_length", int), metadata.take("attention.head_count", int)
    n_kv_heads = metadata.take("attention.head_count_kv", int, n_heads)
    d_head = metadata.take("attention.key_length", int, d_model // n_heads)
    if n_heads % n_kv_heads:
        raise ModelError(
            f"{container.path}: {n_heads} attention heads cannot share {n_kv_heads} key-value heads evenly"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if (length := metadata.take(key, int, d_head)) != d_head:
            raise ModelError(
                f"{container.path} says llama.{key} = {length}; only that of the keys, {d_head}, can be honoured"
            )
    embedding = container.tensors.get("token_embd.weight")
    stored_vocabulary = embedding.shape[0] if embedding is not None else None
    biases = {name.rsplit(".", 2)[1] for name in container.tensors if name.endswith(".bias")}
    spec = ModelSpec(
        family="llama",
        n_layers=metadata.take("block_count", int),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=metadata.take("feed_forward_length", int),
        d_vocab=metadata.take("vocab_size", int, stored_vocabulary),
        n_ctx=metadata.take("context_length", int),
        norm_eps=metadata.take("attention.layer_norm_rms_epsilon", float),
        rope=_read_rope(metadata, container),
        qkv_bias="attn_q" in biases,
        out_bias="attn_output" in biases,
        mlp_bias="ffn_down" in biases,
        tied="output.weight" not in container.tensors,
    )
    metadata.refuse_the_rest()
    return spec


def _read_rope(metadata: _Metadata, container: Container) -> RopeSpec:
    base = metadata.take("rope.freq_base", float, 10_000.0)
    kind = metadata.take("rope.scaling.type", str, "none")
    factor = metadata.take("rope.scaling.factor", float, 1.0)
    factor *= metadata.take("rope.scale_linear", float, 1.0)  # the older spelling, which had no type
    if kind not in ("none", "linear"):
        raise ModelError(
            f"{container.path} says llama.rope.scaling.type = {kind!r}; only 'none' and 'linear' can be honoured"
        )
    divisors = (
        tuple(_dequantize(container, _FREQUENCY_DIVISORS).tolist()) if _FREQUENCY_DIVISORS in container.tensors else ()
    )
    if divisors and factor != 1.0:
        raise ModelError(
            f"{container.path} has both {_FREQUENCY_DIVISORS} and a linear scaling of {factor}; only one can be"
        )
    if divisors:
        return RopeSpec(base=base, kind="divided", divisors=divisors)
    return RopeSpec(base=base, kind="linear", factor=factor) if factor != 1.0 else RopeSpec(base=base)


def _extent(container: Container, name: str, tensor: StoredTensor) -> tuple[int, ...]:
    """Give the shape of a tensor in bytes: its rows, then the bytes of one row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError) as error:
        raise ModelError(f"{container.path} stores {name} in the unknown type {tensor.kind}") from error
    return (*tensor.shape[:-1], tensor.shape[-1] // block * size)


def _check_extent(container: Container, name: str, tensor: StoredTensor) -> None:
    end = tensor.start + math.prod(_extent(container, name, tensor))
    if end > len(container.bytes_):
        raise ModelError(
            f"{container.path} is cut off: {name} should end at byte {end:,} and the file has {len(container.bytes_):,}"
        )


def _dequantize(container: Container, name: str) -> "torch.Tensor":
    import numpy
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = container.tensors[name]
    shape = _extent(container, name, tensor)
    stored = numpy.frombuffer(container.bytes_, numpy.uint8, math.prod(shape), tensor.start).reshape(shape)
    kind = GGMLQuantizationType(tensor.kind)
    try:
        values = dequantize(stored, kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{container.path} stores {name} as {kind.name}, which the gguf package cannot dequantise"
        ) from error
    return torch.from_numpy(numpy.require(values, numpy.float32, ["C", "W"]))


def _uninterleave(rows: "torch.Tensor", n_heads: int) -> "torch.Tensor":
    """Undo llama.cpp's order of q and k rows, in which the two halves of a head that rotate together alternate."""
    rest = rows.shape[1:]
    return rows.reshape(n_heads, -1, 2, *rest).swapaxes(1, 2).reshape(rows.shape)
