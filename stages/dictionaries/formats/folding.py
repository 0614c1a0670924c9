"""Folding into the weights what a format does to activations besides: constant factors, whitening, decoder lengths."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DictionaryError

LEAST_NORM = 1e-8
"""Decoder rows shorter than this are divided by it: they write nothing either way."""

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unified(tensors: Mapping[str, Tensor], path: Path, *, folds: bool = False) -> dict[str, Tensor]:
    """The tensors in the one dtype that loses nothing of any of them; at least float32 where something is folded into
    them. DictionaryError for tensors of integers, or of floats smaller than 16 bits.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise DictionaryError(f"{path}: {name} is {tensor.dtype}; float64, 32 or 16, or bfloat16, was expected")
    dtype = torch.float32 if folds else next(iter(tensors.values())).dtype
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def scaled(tensors: Mapping[str, Tensor], scale_in: float, scale_out: float) -> dict[str, Tensor]:
    """Weights for activations as they are, of weights for activations multiplied by a constant.

    Features stay as they were: W_enc · scale_in, W_dec / scale_out, b_dec / scale_out.
    """
    return {
        **tensors,
        "W_enc": tensors["W_enc"] * scale_in,
        "W_dec": tensors["W_dec"] / scale_out,
        "b_dec": tensors["b_dec"] / scale_out,
    }


def with_unit_decoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose features carry the length of their decoder rows: W_enc · n, b_enc · n, W_dec / n.

    What is decoded stays as it was; which features are the largest k may change.
    """
    norms = torch.linalg.vector_norm(tensors["W_dec"], dim=-1)
    return {
        **tensors,
        "W_enc": tensors["W_enc"] * norms,
        "b_enc": tensors["b_enc"] * norms,
        "W_dec": tensors["W_dec"] / norms.clamp(min=LEAST_NORM)[:, None],
    }


def whitened(
    tensors: Mapping[str, Tensor], mean: Tensor, matrix: Tensor, inverse: Tensor, *, subtracts_b_dec: bool
) -> dict[str, Tensor]:
    """Weights for activations as they are, of weights for (x − mean) @ matrix, whose output goes back by x̂ @ inverse +
    mean. `b_dec` becomes the bias in the space of x; where it is subtracted from the input it takes the mean along,
    otherwise the biases of the encoder do. Computed in float64.
    """
    dtype = tensors["W_enc"].dtype
    mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
    W_enc = matrix @ tensors["W_enc"].double()
    folded = {
        **tensors,
        "W_enc": W_enc.to(dtype),
        "W_dec": (tensors["W_dec"].double() @ inverse).to(dtype),
        "b_dec": (tensors["b_dec"].double() @ inverse + mean).to(dtype),
    }
    if subtracts_b_dec:
        return folded
    shift = mean @ W_enc
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in tensors:
            own = shift * tensors["r_mag"].double().exp() if name == "b_mag" else shift
            folded[name] = (tensors[name].double() - own).to(tensors[name].dtype)
    return folded
