"""Devices and dtypes by the names that recipes and command lines use."""

from collections.abc import Mapping

import torch

from .errors import ModelError, nearest

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Give the torch dtype of a name in `DTYPES`. Raises ModelError for another one."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"models run in {', '.join(DTYPES)}, not in {dtype}.{nearest(str(dtype), DTYPES)}")
    return DTYPES[str(dtype)]


def resolve_device(device: str | torch.device) -> torch.device:
    """Give the device of a name; `auto` is the first of cuda, mps and cpu that this machine has.

    Raises ModelError for a name that torch does not know and for a device that is not there.
    """
    present = [name for name in ("cuda", "mps") if torch.get_device_module(name).is_available()] + ["cpu"]
    if device == "auto":
        return torch.device(present[0])
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"{device!r} is no device; this machine has {', '.join(present)}") from error
    if found.type not in present:
        raise ModelError(f"there is no {found.type} on this machine, which has {', '.join(present)}")
    return found
