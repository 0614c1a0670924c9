"""Which tokens count, and what an analysis may rely on: the door that labelled activations come through.

Every analysis over tokens reads a node such as `open_run(path)["activations/hook_resid_post"]`, or `as_run(forward)`
of one forward: `value[…, token, …]` with the coordinates `token_id`, `sequence` and `position` on `token`. Both are the
same to it, but that one is lazy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from ...stores.labels import token_coords

if TYPE_CHECKING:
    from ..models.forward import Forward

PER_TOKEN = ("sequence", "position")


def as_run(forward: Forward) -> xr.DataTree:
    """Give the captures of one forward as the tree that `open_run` gives of a run, in memory.

    A node a kind of hook point under `activations`: `value[layer, token, …]`, sequences laid end to end without their
    padding, or `value[layer, sequence, …]` of what has no token axis; outside the blocks without `layer`. Every
    sequence is a document of its own. bfloat16, which numpy does not have, becomes float32. Values are copied.
    """
    starts = np.cumsum([0, *forward.lengths])[:-1]
    coords = token_coords(sum(forward.lengths), starts, starts)
    real = np.arange(forward.token_ids.shape[1]) < np.asarray(forward.lengths)[:, None]
    token_id = ("token", forward.token_ids.cpu().numpy()[real])
    nodes: dict[str, xr.Dataset] = {"/tokens": xr.Dataset({"token_id": token_id}, coords=coords)}
    layers: dict[str, list[int]] = {}
    for point in forward.captures:
        layers.setdefault(point.kind, []).extend([] if point.layer is None else [point.layer])
    labelled = forward.to_dataset()
    for kind, own in layers.items():
        value = labelled[kind].sel(layer=own) if own else labelled[kind]
        lead = value.dims[: bool(own)]
        if value.dims[len(lead) :][:2] != PER_TOKEN:
            own_document = ("sequence", np.arange(len(forward.lengths)))
            nodes[f"/activations/{kind}"] = value.to_dataset(name="value").assign_coords(document=own_document)
            continue
        held = value.values[:, real] if own else value.values[real]
        dims = (*lead, "token", *value.dims[len(lead) + 2 :])
        node = xr.Dataset({"value": (dims, held)}, coords={"layer": own} if own else {})
        nodes[f"/activations/{kind}"] = node.assign_coords(coords).assign_coords(token_id=token_id)
    return xr.DataTree.from_dict(nodes)


def vectors(activations: xr.Dataset, what: str) -> xr.DataArray:
    """Check that a node holds vectors of tokens, and give them: `value[…, token, …, width]`, whatever its last
    dimension is called. `what` names the analysis. SchemaError otherwise.
    """
    if "value" not in activations:
        held = ", ".join(map(str, activations.data_vars)) or "nothing"
        raise SchemaError(
            f"{what} reads the variable `value` of one kind of hook point, such as "
            f'open_run(path)["activations/hook_resid_post"]; what was given holds {held}'
        )
    value = activations["value"]
    if "token" not in value.dims or value.dims[-1] == "token":
        raise SchemaError(f"{what} reads value[…, token, …, width], not {list(map(str, value.dims))}")
    return value


def needs(activations: xr.Dataset, coords: Iterable[str], what: str) -> None:
    """SchemaError where coordinates are missing."""
    if missing := [name for name in coords if name not in activations.coords]:
        raise SchemaError(f"{what} needs the coordinates {missing} on `token`; open the store with open_run")


def counted(activations: xr.Dataset, skip_positions: int = 1, where: xr.DataArray | None = None) -> xr.DataArray:
    """Which tokens count: boolean [token], those from position `skip_positions` of their sequence on whose unit is
    recorded (`done`, in a tree opened with `partial=True`), narrowed by `where` boolean [token]. The first position
    holds massive activations that swamp every statistic. Lazy, chunked as `value`, where `value` is.

    SchemaError for a `skip_positions` below 0, without the coordinate `position`, and for a `where` of other tokens.
    """
    if skip_positions < 0:
        raise SchemaError(f"skip_positions = {skip_positions}: at least 0")
    needs(activations, ["position"], "skipping positions")
    counts = label(activations, "position") >= skip_positions
    if "done" in activations.coords:
        counts = counts & label(activations, "done")
    return counts if where is None else counts & _mask(where, activations)


def same_tokens(activations: xr.Dataset, other: xr.Dataset | xr.DataArray, what: str) -> None:
    """SchemaError where the labels of `token` say that `other`, which `what` names, belongs to other tokens than the
    activations; what has no such labels is taken to be of the same tokens. No value is computed.
    """
    others = {dim for dim in (*activations.dims, *other.dims) if dim != "token"}
    try:
        xr.align(activations, other, join="exact", copy=False, exclude=others)
    except xr.AlignmentError as error:
        raise SchemaError(f"{what} belongs to other tokens than the activations: select the same of both") from error


def _mask(where: xr.DataArray, activations: xr.Dataset) -> xr.DataArray:
    n_token = activations.sizes["token"]
    if where.dims != ("token",) or where.sizes["token"] != n_token or where.dtype != bool:
        raise SchemaError(
            f"`where` must be boolean [token] of the {n_token:,} tokens given, not {where.dtype} "
            f"[{', '.join(f'{dim}={size}' for dim, size in where.sizes.items())}]"
        )
    same_tokens(activations, where, "`where`")
    return xr.DataArray(where.data, dims="token")


def label(activations: xr.Dataset, name: str) -> xr.DataArray:
    """A coordinate of `token`, such as `position` or `document`, as a variable [token]: read chunk by chunk when it is
    asked for where `value` is lazy, so that it is never whole in memory.
    """
    coord = activations[name].reset_coords(drop=True)
    chunks = activations["value"].variable.chunksizes.get("token") if "value" in activations else None
    if chunks is None or coord.chunks is not None:
        return xr.DataArray(coord.data, dims="token", name=name)
    held = activations[name]

    def read(block_info: Any = None) -> NDArray[Any]:
        ((start, stop),) = block_info[None]["array-location"]
        return np.asarray(held.isel(token=slice(start, stop)).values)

    dtype = coord.dtype
    data = da.map_blocks(read, chunks=(chunks,), dtype=dtype, meta=np.empty(0, dtype))
    return xr.DataArray(data, dims="token", name=name)
