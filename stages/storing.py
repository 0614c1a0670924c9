"""Values on their way from the device to a store: cast, checked, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..stores.errors import SchemaError

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]


def cast(values: torch.Tensor, dtype: Dtype, what: str, key: str) -> torch.Tensor:
    """Values in the dtype in which they are kept. SchemaError, naming `what` they are and the recipe's `key` that set
    the dtype, if a finite one does not fit.
    """
    import torch

    kept = values.to(getattr(torch, dtype))
    if values.dtype != kept.dtype and bool((torch.isinf(kept) & ~torch.isinf(values)).any()):
        largest = float(values.float().nan_to_num(posinf=0.0, neginf=0.0).abs().amax())
        raise SchemaError(
            f"{what}: the value {largest:.6g} does not fit {dtype}, whose largest is "
            f"{torch.finfo(kept.dtype).max:.6g}. "
            f'Set {key} to "bfloat16" or "float32"'
        )
    return kept


def on_host(values: torch.Tensor) -> NDArray[Any]:
    """Values as numpy holds them in their kept form: bfloat16 as the uint16 of the same bits."""
    import torch

    host = values.detach().contiguous().cpu()
    return host.view(torch.int16).numpy().view(np.uint16) if host.dtype == torch.bfloat16 else host.numpy()


def square_sum(values: torch.Tensor) -> float:
    """Σ x² in float64, which Apple's GPUs do not have."""
    import torch

    wide = values.cpu() if values.device.type == "mps" else values
    return float(wide.square().sum(dtype=torch.float64))
