"""The contract of a step: plain data that says what it will write and how one unit of it is computed."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..stores.grid import Unit
from ..stores.schema import Schema

if TYPE_CHECKING:
    import xarray as xr

Apply = Callable[["xr.Dataset", Unit], Iterator["xr.DataTree"]]
"""One labelled block in, its labelled pieces out, in order and each as soon as it is computed: `apply(block, unit)`.

Pure: equal blocks give equal pieces. A piece holds rows of `unit` only, and says which by an integer coordinate along
`token` (or `sequence`); node names and variables are the schema's. A run may stop between two pieces.
"""


def product_numerics(device: str, threads: int | None) -> dict[str, Any]:
    """What changes the last bits of a matrix product: torch's version, the kind of device, and on a CPU the number of
    threads among which it is divided, by default torch's own.
    """
    import torch

    kind = device.split(":")[0]
    divided = {"threads": threads or torch.get_num_threads()} if kind == "cpu" else {}
    return {"torch": metadata.version("torch"), "device": kind, **divided}


class Stage(ABC):
    """A step as plain data. Subclasses are frozen dataclasses of JSON values, which are part of the step's fingerprint.

    `verb` is the recipe's table. `version` is raised whenever the values of the output may change.
    """

    verb: ClassVar[str]
    version: ClassVar[int]
    told_elsewhere: ClassVar[frozenset[str]] = frozenset({"model"})
    """Fields that the fingerprint takes from `files`, `identity` or `numerics` instead, as what they stand for."""

    @property
    @abstractmethod
    def store(self) -> str:
        """The folder of what the step makes, in the run's."""

    @property
    @abstractmethod
    def source(self) -> str | None:
        """The verb of the step that this one reads; None: the corpus."""

    def read_from(self, held: Mapping[str, Schema]) -> tuple[str, ...]:
        """Which of the stores that steps of the verb `source` make are read, by name: all of them."""
        return tuple(held)

    @abstractmethod
    def check(self) -> None:
        """Refuses whatever can be refused without the source. Reads small headers at most."""

    @abstractmethod
    def schema(self, source: Schema) -> Schema:
        """What will be written, from what will be read. Refuses what the source does not allow."""

    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files beyond the recipe whose bytes determine the values, weights above all."""

    def identity(self) -> dict[str, Any]:
        """What else determines the values and is neither in the recipe nor a file of its own."""
        return {}

    @abstractmethod
    def span(self, unit: Unit, source: Schema, own: Schema) -> slice:
        """The rows of the source that a unit is computed from, along the source's long axis."""

    @abstractmethod
    def load(self, device: str, own: Schema) -> Apply:
        """Makes ready to compute; may take minutes and gigabytes. Called once a process."""

    def numerics(self, device: str) -> dict[str, Any]:
        """What else can change a bit of the output: libraries, kind of device. Part of the fingerprint."""
        return {}

    def about(self) -> dict[str, Any]:
        """What a reader of the store will want to know beyond what determines its values: names, not hashes."""
        return {}

    def parameters(self) -> dict[str, Any]:
        """The fields as JSON values: the recipe's table, complete."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def determining(self) -> dict[str, Any]:
        """The parameters that are part of the fingerprint as they are: all but what is told elsewhere."""
        return {name: value for name, value in self.parameters().items() if name not in self.told_elsewhere}
