"""Sequences that are computed together, and which of their rows belong to the unit of work that asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..stores.grid import Unit
from ..stores.schema import Array, Schema

if TYPE_CHECKING:
    import torch
    import xarray as xr


@dataclass(frozen=True)
class Batch:
    """Sequences that are computed together, and which of their rows belong to the unit that asked."""

    sequences: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    unit: Unit

    @property
    def lengths(self) -> list[int]:
        return [int(self.ends[s] - self.starts[s]) for s in self.sequences]

    @property
    def tokens(self) -> tuple[int, int]:
        """The part of the token axis that the batch covers and the unit owns."""
        first, last = self.sequences[0], self.sequences[-1]
        return max(int(self.starts[first]), self.unit.start), min(int(self.ends[last]), self.unit.stop)

    @property
    def own_sequences(self) -> tuple[int, int]:
        """The sequences of the batch that start in the unit."""
        first, beyond = np.searchsorted(self.starts, [self.unit.start, self.unit.stop])
        return max(int(first), int(self.sequences[0])), min(int(beyond), int(self.sequences[-1]) + 1)

    def token_ids(self, block: xr.Dataset) -> list[list[int]]:
        """The token ids of each sequence, from a block of tokens that holds them whole."""
        ids, origin = block["token_id"].values.astype(np.int64), int(block.indexes["token"][0])
        return [ids[self.starts[s] - origin : self.ends[s] - origin].tolist() for s in self.sequences]

    def long(self, dims: Sequence[str]) -> str:
        return "token" if "token" in dims else "sequence"

    def coords(self, dims: Sequence[str]) -> dict[str, Any]:
        import pandas as pd

        return (
            {"token": pd.RangeIndex(*self.tokens)}
            if "token" in dims
            else {"sequence": pd.RangeIndex(*self.own_sequences)}
        )

    def own_rows(self, tensor: torch.Tensor, array: Array) -> torch.Tensor:
        """The unit's part of a capture, without padding: `[token, …]`, or `[sequence, …]`, of which `[…, query, key]`
        has NaN beyond a sequence's end.
        """
        if "token" in array.dims:
            return self.own_tokens(tensor)
        first, beyond = self.own_sequences
        if "query" not in array.dims:
            origin = int(self.sequences[0])
            return tensor[first - origin : max(first, beyond) - origin]
        width = array.shape[-1]
        own = tensor.new_full((max(0, beyond - first), *tensor.shape[1:-2], width, width), float("nan"))
        for row, sequence in enumerate(range(first, beyond)):
            n = int(self.ends[sequence] - self.starts[sequence])
            own[row, ..., :n, :n] = tensor[sequence - int(self.sequences[0]), ..., :n, :n]
        return own

    def own_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """The unit's tokens [token, …] of a capture [sequence, position, …]."""
        import torch

        first, beyond = self.tokens
        origin = int(self.starts[self.sequences[0]])
        if len(set(self.lengths)) == 1:
            flat = tensor.flatten(0, 1)
        else:
            flat = torch.cat([row[:n] for row, n in zip(tensor, self.lengths, strict=True)])
        return flat[first - origin : max(first, beyond) - origin]


def batches_of(unit: Unit, own: Schema, size: int) -> Iterator[Batch]:
    """The sequences that touch a unit, `size` at a time, in their order: how they are batched never depends on who
    computes the unit.
    """
    starts = own.labels["sequences/start"][1]
    ends = np.append(starts[1:], own.n_token)
    first, beyond = touching(starts, unit)
    for at in range(first, beyond, size):
        yield Batch(np.arange(at, min(at + size, beyond)), starts, ends, unit)


def sequences_span(unit: Unit, source: Schema) -> slice:
    """The tokens of every sequence that touches a unit; one that straddles its edge is computed by both neighbours."""
    starts = source.labels["sequences/start"][1]
    first, beyond = touching(starts, unit)
    return slice(int(starts[first]), int(starts[beyond]) if beyond < len(starts) else source.n_token)


def touching(starts: NDArray[np.int64], unit: Unit) -> tuple[int, int]:
    """The sequences [first, beyond) that have tokens in the unit."""
    return int(np.searchsorted(starts, unit.start, "right")) - 1, int(np.searchsorted(starts, unit.stop, "left"))
