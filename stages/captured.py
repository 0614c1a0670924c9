"""The captures of a batch on their way from the device to a store: cast, measured, copied while the device goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from ..stores.schema import Schema
from .models.points import HookPoint, stored_dims
from .sequences import Batch
from .storing import Dtype, as_numpy, refuse_overflow

if TYPE_CHECKING:
    from torch import Tensor

STATISTICS = ("abs_max", "square_sum", "error_square_sum")
"""What is recorded of a capture, of its finite values; the last one is of what rounding to the kept dtype adds."""


class CapturedBatch:
    """A sink for the captures of one forward, and the piece of a store that they make.

    Each is copied into its place on the host as soon as it is handed out, by a GPU on a stream of its own into pinned
    memory: nothing waits for it before `piece`. The host holds the batch's captures once, in the dtype in which they
    are kept, and the device each one until it has left.
    """

    def __init__(
        self, batch: Batch, own: Schema, points: Mapping[str, Sequence[HookPoint]], dtype: Dtype, key: str
    ) -> None:
        self._batch, self._own, self._key = batch, own, key
        self._name, self._dtype = dtype, getattr(torch, dtype)
        self._row = {point: n for kind in points.values() for n, point in enumerate(kind)}
        self._n_layer = {kind: len(found) for kind, found in points.items()}
        self._host: dict[str, Tensor] = {}
        self._measured: dict[HookPoint, Tensor] = {}
        self._copies: torch.cuda.Stream | None = None

    def __call__(self, point: HookPoint, tensor: Tensor) -> None:
        tensor = tensor.detach()[: len(self._batch.sequences)]  # rows behind those only fill a batch up
        values = self._batch.own_rows(tensor, self._own.arrays[f"{point.kind}/value"])
        if point.kind not in self._host:
            shape = (self._n_layer[point.kind], *values.shape)
            self._host[point.kind] = torch.empty(shape, dtype=self._dtype, pin_memory=values.is_cuda)
        place = self._host[point.kind][self._row[point]]
        if values.is_cuda:
            kept = values.to(self._dtype)
            self._copy(kept, place)
            found = measured(values, kept)
            self._measured[point] = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._copy(found, self._measured[point])
        else:  # Apple's GPUs have no float64 to measure in
            values = values.cpu()
            self._measured[point] = measured(values, place.copy_(values))

    def _copy(self, kept: Tensor, place: Tensor) -> None:
        """From a GPU, beside what it computes. Its memory is used again only when the copy is made."""
        if self._copies is None:
            self._copies = torch.cuda.Stream(kept.device)
        self._copies.wait_stream(torch.cuda.current_stream(kept.device))
        with torch.cuda.stream(self._copies):
            place.copy_(kept, non_blocking=True)
        kept.record_stream(self._copies)

    def piece(self) -> xr.DataTree:
        """`<kind>/value` with the rows that the unit owns, on the host; what was measured is in the attribute
        `statistics`, one number a layer. SchemaError, naming the first one, if a finite value does not fit the dtype.
        """
        if self._copies is not None:
            self._copies.synchronize()  # which does not wait for a forward that was begun since
        found = self._statistics()
        nodes = {}
        for kind, host in self._host.items():
            dims = stored_dims(kind)
            values = as_numpy(host if dims[0] == "layer" else host[0])
            if values.shape[dims.index(self._batch.long(dims))]:
                said = {name: found[kind][:, n] for n, name in enumerate(STATISTICS)}
                nodes[kind] = xr.Dataset(
                    {"value": (dims, values)}, coords=self._batch.coords(dims), attrs={"statistics": said}
                )
        return xr.DataTree.from_dict(nodes)

    def _statistics(self) -> dict[str, Any]:
        """[layer, statistic] of each kind, float64."""
        found = {kind: torch.zeros(n, len(STATISTICS), dtype=torch.float64) for kind, n in self._n_layer.items()}
        for point, row in self._measured.items():
            if torch.isinf(row[0].to(self._dtype)):
                refuse_overflow(float(row[0]), self._name, str(point), self._key)
            found[point.kind][self._row[point]] = row
        return {kind: rows.numpy() for kind, rows in found.items()}


def measured(values: Tensor, kept: Tensor) -> Tensor:
    """`STATISTICS` of a capture and of the same as it is kept: float64 [3], on the device and without waiting for it.
    Masked attention scores are minus infinity and positions beyond a sequence's end NaN: those are left out.
    """
    if not values.numel():
        return torch.zeros(len(STATISTICS), dtype=torch.float64, device=values.device)
    low, high = values.aminmax()
    # Only a CPU is asked whether all are finite: a GPU would have to be waited for, and copies fast.
    if values.is_cuda or not torch.isfinite(high - low):
        values = values.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        low, high = values.aminmax()
    lossy = values.dtype != kept.dtype
    error = _square_sum((kept.float() - values.float()).nan_to_num(0.0, 0.0, 0.0)) if lossy else torch.zeros_like(low)
    largest = torch.maximum(-low, high)
    return torch.stack([one.double() for one in (largest, _square_sum(values), error)])


def _square_sum(values: Tensor) -> Tensor:
    """Σ x²: rows in float32, with an error below 1e-7, and their sum in float64, which is slow for single values."""
    of_rows: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    return of_rows.double().square().sum()
