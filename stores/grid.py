"""Cutting the `token` axis into units of work that own whole shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """Tokens [start, stop) of a store. `index` names the unit for ever, whoever computes it."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Grid:
    """`size` tokens in units of `step`; the last unit may be shorter."""

    size: int
    step: int

    def __len__(self) -> int:
        return -(-self.size // self.step)

    def __getitem__(self, index: int) -> Unit:
        if not 0 <= index < len(self):
            raise IndexError(f"unit {index} does not exist: there are {len(self)} units, numbered from 0")
        return Unit(index, index * self.step, min(self.size, (index + 1) * self.step))

    def __iter__(self) -> Iterator[Unit]:
        return (self[index] for index in range(len(self)))
