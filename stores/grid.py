"""Cutting the `token` axis into units of work that own whole shards."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import chain


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
        starts = range(0, self.size, self.step)
        return map(Unit, range(len(self)), starts, chain(starts[1:], (self.size,)))

    def known(self, units: set[int]) -> set[int]:
        """Those of some numbers that are units: a folder of records may hold others by mistake."""
        return units if max(units, default=-1) < len(self) else {index for index in units if index < len(self)}

    def left(self, done: Set[int]) -> list[Unit]:
        """The units that are not among `done`, in order."""
        return [self[index] for index in range(len(self)) if index not in done]

    def tokens(self, units: set[int]) -> int:
        """Tokens of some units, by arithmetic; numbers that are no units have none."""
        known = self.known(units)
        last = len(self) - 1
        return len(known) * self.step - (len(self) * self.step - self.size if last in known else 0)
