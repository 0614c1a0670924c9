"""Values on their way from the device to a store: cast, checked, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..stores.errors import SchemaError

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]


def cast(values: torch.Tensor, dtype: Dtype, what: str, key: str) -> torch.Tensor:
    """Values in the dtype in which they are kept. SchemaError as `refuse_overflow` says if a finite one does not fit
    the dtype.
    """
    import torch

    kept = values.to(getattr(torch, dtype))
    if values.dtype != kept.dtype and bool((torch.isinf(kept) & ~torch.isinf(values)).any()):
        refuse_overflow(float(values.float().nan_to_num(posinf=0.0, neginf=0.0).abs().amax()), dtype, what, key)
    return kept


def refuse_overflow(largest: float, dtype: Dtype, what: str, key: str) -> NoReturn:
    """Raises SchemaError, naming `what` the values are and the recipe's `key` that set the dtype."""
    import torch

    raise SchemaError(
        f"{what}: the value {largest:.6g} does not fit {dtype}, whose largest is "
        f"{torch.finfo(getattr(torch, dtype)).max:.6g}. "
        f'Set {key} to "bfloat16" or "float32"'
    )


def on_host(values: torch.Tensor) -> NDArray[Any]:
    """Values as numpy holds them in their kept form: bfloat16 as the uint16 of the same bits."""
    return as_numpy(values.detach().contiguous().cpu())


def as_numpy(host: torch.Tensor) -> NDArray[Any]:
    """A tensor of the host as numpy sees it, in its kept form. Shares its memory."""
    import torch

    return host.view(torch.int16).numpy().view(np.uint16) if host.dtype == torch.bfloat16 else host.numpy()
