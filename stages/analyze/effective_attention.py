"""A recurrence as attention: the effective attention of RWKV, made comparable to the patterns of a transformer."""

from __future__ import annotations

import xarray as xr

from ...stores.errors import SchemaError

_LEAST_SUM = 1e-10


def normalize_effective_attention(alpha: xr.DataArray) -> xr.DataArray:
    """Give effective attention with what is read negatively left out and each row divided by its sum + 1e-10.

    `alpha` [..., query, key], in any order: `rwkv.hook_effective_attn` of a store or of a forward, signed, so that what
    is read is Σ α v exactly. Gives the same dimensions, coordinates and dtype, lazily where `alpha` is lazy. Rows add
    up to 1 where anything positive is in them that 1e-10 does not outweigh, else to 0. NaN, beyond a sequence's end,
    stays NaN and counts in no sum. This is for looking at: what is read is no longer its product with the values.

    Definition: candle-mi's `RwkvEffectiveAttn`. SchemaError where there is no dimension `query` or `key`.
    """
    if not {"query", "key"} <= set(alpha.dims):
        dims = ", ".join(map(str, alpha.dims))
        raise SchemaError(f"effective attention has the dimensions query and key; what was given is [{dims}]")
    positive = alpha.clip(min=0)
    # What a store says of its own values, such as their dtype, is not true of these.
    return (positive / (positive.sum("key", skipna=True) + _LEAST_SUM)).transpose(*alpha.dims).drop_attrs()
