"""Sequences that are computed together, and which of their rows belong to the unit of work that asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """Sequences that are computed together, ascending, and which of their rows belong to the unit that asked."""

    sequences: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    unit: Unit

    @property
    def lengths(self) -> list[int]:
        return [int(self.ends[s] - self.starts[s]) for s in self.sequences]

    @cached_property
    def _parts(self) -> list[tuple[int, int]]:
        """The part [first, beyond) of the token axis of each sequence that the unit owns; empty for one that ends where
        the unit begins.
        """
        first = np.maximum(self.starts[self.sequences], self.unit.start)
        beyond = np.maximum(first, np.minimum(self.ends[self.sequences], self.unit.stop))
        return list(zip(first.tolist(), beyond.tolist(), strict=True))

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """The tokens that the batch covers and the unit owns, ascending."""
        return np.concatenate([np.arange(first, beyond) for first, beyond in self._parts])

    @cached_property
    def own_sequences(self) -> NDArray[np.int64]:
        """The sequences of the batch that start in the unit, ascending."""
        starts = self.starts[self.sequences]
        return self.sequences[(self.unit.start <= starts) & (starts < self.unit.stop)]

    def token_ids(self, block: xr.Dataset) -> list[list[int]]:
        """The token ids of each sequence, from a block of tokens that holds them whole."""
        ids, origin = block["token_id"].values.astype(np.int64), int(block.indexes["token"][0])
        return [ids[self.starts[s] - origin : self.ends[s] - origin].tolist() for s in self.sequences]

    def long(self, dims: Sequence[str]) -> str:
        return "token" if "token" in dims else "sequence"

    def coords(self, dims: Sequence[str]) -> dict[str, Any]:
        return {"token": self.tokens} if "token" in dims else {"sequence": self.own_sequences}

    def own_rows(self, tensor: torch.Tensor, array: Array) -> torch.Tensor:
        """The unit's part of a capture, without padding: `[token, …]`, or `[sequence, …]`, of which `[…, query, key]`
        has NaN beyond a sequence's end.
        """
        if "token" in array.dims:
            return self.own_tokens(tensor)
        rows = np.searchsorted(self.sequences, self.own_sequences).tolist()
        if "query" not in array.dims:
            return tensor if len(rows) == len(tensor) else tensor[rows]
        width = array.shape[-1]
        own = tensor.new_full((len(rows), *tensor.shape[1:-2], width, width), float("nan"))
        for row, at in enumerate(rows):
            n = self.lengths[at]
            own[row, ..., :n, :n] = tensor[at, ..., :n, :n]
        return own

    def own_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """The unit's tokens [token, …] of a capture [sequence, position, …]."""
        import torch

        if len(self.tokens) == tensor.shape[0] * tensor.shape[1]:
            return tensor.flatten(0, 1)
        origins = self.starts[self.sequences].tolist()
        own = zip(tensor, self._parts, origins, strict=True)
        return torch.cat([row[first - origin : beyond - origin] for row, (first, beyond), origin in own])


def batches_of(unit: Unit, own: Schema, size: int) -> Iterator[Batch]:
    """The sequences that touch a unit, `size` at a time: the longest first, those of one length in their order, so that
    little of a batch is padding. How they are batched never depends on who computes the unit.
    """
    starts = own.labels["sequences/start"][1]
    ends = np.append(starts[1:], own.n_token)
    first, beyond = touching(starts, unit)
    sequences = np.arange(first, beyond)
    by_length = sequences[np.argsort(starts[sequences] - ends[sequences], kind="stable")]
    for at in range(0, len(by_length), size):
        yield Batch(np.sort(by_length[at : at + size]), starts, ends, unit)


def sequences_span(unit: Unit, source: Schema) -> slice:
    """The tokens of every sequence that touches a unit; one that straddles its edge is computed by both neighbours."""
    starts = source.labels["sequences/start"][1]
    first, beyond = touching(starts, unit)
    return slice(int(starts[first]), int(starts[beyond]) if beyond < len(starts) else source.n_token)


def touching(starts: NDArray[np.int64], unit: Unit) -> tuple[int, int]:
    """The sequences [first, beyond) that have tokens in the unit."""
    return int(np.searchsorted(starts, unit.start, "right")) - 1, int(np.searchsorted(starts, unit.stop, "left"))
