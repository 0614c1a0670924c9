"""Logit lens: what the model would say if each layer's residual stream were its last.

nostalgebraist (2020), "interpreting GPT: the logit lens". Every residual stream goes through the model's own final norm
and unembedding, final soft-cap included; so the last layer's lens is the model's prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError

if TYPE_CHECKING:
    from ..models.unembedding import Unembedding

AT_ONCE = 2**24
"""Logits held at a time: 64 MiB in float32."""


def logit_lens(activations: xr.Dataset, unembedding: Unembedding, *, top: int = 5) -> xr.Dataset:
    """The lens over stored residual streams, lazily where they are lazy.

    `activations`: a node such as `open_run(path)["activations/hook_resid_post"]`, or a selection of it: `value[layer,
    token, d_model]` with the coordinates `token_id`, `sequence` and `position`. `unembedding` comes from
    `load_unembedding`.

    Gives, along `layer` and `token`: `top_token_id[…, rank]` (int32) and `top_probability[…, rank]` (float32) of the
    `top` strongest tokens, rank 0 first; `next_rank` (float32: how many tokens are stronger than the one that really
    follows; NaN where none follows in the sequence or in the selection) and `next_log_probability` (float32, nats, NaN
    likewise); and the coordinate `next_token_id` (-1 where there is none). Where `value` is NaN, as in units that are
    not recorded, so is the lens, and its token ids are -1. Memory: one chunk of activations and 64 MiB of logits a
    thread.

    SchemaError if the dimensions or labels are not there, or the widths differ.
    """
    value = _checked(activations, unembedding)
    following = next_tokens(activations)
    lens: tuple[xr.DataArray, ...] = xr.apply_ufunc(
        lambda resid, token: _lens_block(resid, token, unembedding, top),
        value,
        following,
        input_core_dims=[["d_model"], []],
        output_core_dims=[["rank"], ["rank"], [], []],
        keep_attrs=False,
        dask="parallelized",
        output_dtypes=[np.int32, np.float32, np.float32, np.float32],
        dask_gufunc_kwargs={"output_sizes": {"rank": top}},
    )
    names = ("top_token_id", "top_probability", "next_rank", "next_log_probability")
    return xr.Dataset(dict(zip(names, lens, strict=True))).assign_coords(
        next_token_id=following.reset_coords(drop=True)
    )


def next_tokens(activations: xr.Dataset) -> xr.DataArray:
    """The token that really follows each token, in its own sequence and next to it in the selection; -1 where there is
    none. int64, read chunk by chunk when asked for where `value` is lazy.
    """
    labels = activations[["token_id", "sequence", "position"]]
    chunks = activations["value"].chunksizes.get("token") if "value" in activations else None
    if chunks is None:
        return xr.DataArray(_following(labels, 0, activations.sizes["token"]), dims="token")

    def read(block_info: Any = None) -> NDArray[np.int64]:
        ((start, stop),) = block_info[None]["array-location"]
        return _following(labels, start, stop)

    lazy = da.map_blocks(read, chunks=(chunks,), dtype=np.int64, meta=np.empty(0, dtype=np.int64))
    return xr.DataArray(lazy, dims="token")


def _following(labels: xr.Dataset, start: int, stop: int) -> NDArray[np.int64]:
    """The next tokens of tokens [start, stop), one more being read where there is one."""
    part = labels.isel(token=slice(start, stop + 1))
    ids, sequence, position = (part[name].values.astype(np.int64) for name in ("token_id", "sequence", "position"))
    follows = (np.diff(sequence) == 0) & (np.diff(position) == 1)
    found = np.where(follows, ids[1:], -1)
    return found if len(found) == stop - start else np.append(found, [-1] * (stop - start - len(found)))


def _checked(activations: xr.Dataset, unembedding: Unembedding) -> xr.DataArray:
    needs = {"token_id", "sequence", "position"}
    if "value" not in activations or activations["value"].dims[-2:] != ("token", "d_model"):
        said = activations["value"].dims if "value" in activations else sorted(map(str, activations.data_vars))
        raise SchemaError(f"the logit lens reads value[layer, token, d_model] of a residual stream, not {said}")
    if missing := needs - set(activations.coords):
        raise SchemaError(
            f"the logit lens needs the coordinates {sorted(missing)} on `token`; open the store with open_run"
        )
    if activations.sizes["d_model"] != unembedding.weight.shape[1]:
        raise SchemaError(
            f"the activations are {activations.sizes['d_model']} wide and the unembedding reads "
            f"{unembedding.weight.shape[1]}: another model's?"
        )
    return activations["value"]


def _lens_block(
    resid: NDArray[Any], following: NDArray[np.int64], unembedding: Unembedding, top: int
) -> tuple[NDArray[Any], ...]:
    """One block: resid [..., token, d_model] and following [token] or its broadcast, as torch sees it, some rows at a
    time.
    """
    import torch

    lead = resid.shape[:-1]
    rows = torch.from_numpy(np.array(resid, dtype=np.float32, order="C")).reshape(-1, resid.shape[-1])
    wanted = torch.from_numpy(np.array(np.broadcast_to(following, lead))).reshape(-1)
    parts = [
        _lens_rows(some, want, unembedding, top)
        for some, want in zip(
            *(x.split(max(1, AT_ONCE // unembedding.weight.shape[0])) for x in (rows, wanted)), strict=True
        )
    ]
    ids, probabilities, rank, log_probability = (
        (torch.cat(column).numpy() for column in zip(*parts, strict=True)) if parts else _nothing(top)
    )
    return ids.reshape(*lead, top), probabilities.reshape(*lead, top), rank.reshape(lead), log_probability.reshape(lead)


def _lens_rows(resid: Any, following: Any, unembedding: Unembedding, top: int) -> tuple[Any, Any, Any, Any]:
    import torch

    with torch.inference_mode():
        device = unembedding.weight.device
        logits = unembedding.project_to_vocab(resid.to(device)).cpu()
        normalizer = logits.logsumexp(-1, keepdim=True)
        strongest = logits.topk(top)
        own = logits.gather(-1, following.clamp(min=0)[:, None])
        nothing = own.isnan()  # a token of a unit that is not recorded
        absent = (following < 0) | nothing[:, 0]
        rank = (logits > own).sum(-1).float().masked_fill(absent, float("nan"))
        log_probability = (own - normalizer)[:, 0].masked_fill(absent, float("nan"))
        ids = strongest.indices.int().masked_fill(nothing, -1)
        return ids, (strongest.values - normalizer).exp(), rank, log_probability


def _nothing(top: int) -> tuple[NDArray[Any], ...]:
    return (
        np.empty((0, top), np.int32),
        np.empty((0, top), np.float32),
        np.empty(0, np.float32),
        np.empty(0, np.float32),
    )
