"""A checkpoint as one GGUF file: metadata to a `ModelSpec`, quantised blocks to float32 tensors.

Blocks are dequantised by the `gguf` package. Only files in one piece are read, of the architectures in `gguf_specs`.
"""

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint
from .errors import ModelError, nearest
from .families.layout import match_tensors
from .gguf_container import Container, StoredTensor, read_container
from .gguf_specs import ARCHITECTURES, LAYOUT, Metadata
from .tokenizers_gguf import read_vocabulary

if TYPE_CHECKING:
    import torch

_AT_ONCE = 2**20  # values


def open_gguf(path: Path, source: str) -> Checkpoint:
    """Open a GGUF file; reads its metadata, its list of tensors and, where there are any, its few rotary divisors.

    Raises ModelError for a damaged or truncated file, an architecture that is not read from such files, and for every
    setting or tensor that would not be honoured.
    """
    container = read_container(path)
    name = str(container.metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{path} is of architecture {name!r}; GGUF files are read for: {', '.join(ARCHITECTURES)}."
            f"{nearest(name, ARCHITECTURES)}"
        )
    for tensor in container.tensors:
        _check_extent(container, tensor, container.tensors[tensor])
    architecture = ARCHITECTURES[name]
    metadata = Metadata(container, functools.partial(_dequantize, container))
    spec = architecture.parse(metadata)
    metadata.refuse_the_rest()
    shapes = {name: tensor.shape for name, tensor in container.tensors.items()}
    parts = match_tensors(spec, LAYOUT, shapes, where=str(path))
    heads = {"attn.q": spec.n_heads, "attn.k": spec.n_kv_heads} if architecture.interleaved else {}

    def read(weight: str) -> "torch.Tensor":
        stem = weight.split(".", 2)[-1].rpartition(".")[0]
        tensor = _dequantize(container, parts[weight].tensor)
        return _uninterleave(tensor, heads[stem]) if stem in heads else tensor

    return Checkpoint(
        source=source,
        revision=None,
        files=(path,),
        spec=spec,
        reader=read,
        vocabulary=functools.cache(lambda: read_vocabulary(container.metadata, path)),
    )


def _extent(container: Container, name: str, tensor: StoredTensor) -> tuple[int, ...]:
    """Give the shape of a tensor in bytes: its rows, then the bytes of one row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError) as error:
        raise ModelError(f"{container.path} stores {name} in the unknown type {tensor.kind}") from error
    if tensor.shape[-1] % block:
        raise ModelError(
            f"{container.path} stores {name} in blocks of {block} values, which its rows of {tensor.shape[-1]} do not "
            "fill"
        )
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
    extent, kind = _extent(container, name, tensor), GGMLQuantizationType(tensor.kind)
    stored = numpy.frombuffer(container.bytes_, numpy.uint8, math.prod(extent), tensor.start).reshape(-1, extent[-1])
    values = numpy.empty((len(stored), tensor.shape[-1]), numpy.float32)
    # Some rows at a time: the package holds what it gives twice while it works.
    n_rows = max(1, _AT_ONCE // tensor.shape[-1])
    try:
        for at in range(0, len(stored), n_rows):
            values[at : at + n_rows] = dequantize(stored[at : at + n_rows], kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{container.path} stores {name} as {kind.name}, which the gguf package cannot dequantise"
        ) from error
    container.release(tensor.start, stored.nbytes)
    return torch.from_numpy(values.reshape(tensor.shape))


def _uninterleave(rows: "torch.Tensor", n_heads: int) -> "torch.Tensor":
    """Undo llama.cpp's order of q and k rows, in which the two halves of a head that rotate together alternate."""
    rest = rows.shape[1:]
    return rows.reshape(n_heads, -1, 2, *rest).swapaxes(1, 2).reshape(rows.shape)
