"""The random models of RWKV whose hooks are tested, a batch of different lengths, and what the equations make of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.points import EFFECTIVE_ATTN, STATE, HookPoint
from forebay.stages.models.weights import read_weights

from .rwkv_models import random_tensors
from .rwkv_naive import Edit, Naive, run
from .test_rwkv_at_every_hook_point import float64_throughout

LENGTHS = (34, 6, 17)
"""Of the sequences of the batch: a little more than a chunk of RWKV-7, hardly any, a little more than one of RWKV-6."""

ROWS: Sequence[Sequence[int]] = [
    torch.randint(70, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS
]


@dataclass(frozen=True, eq=False)
class Rwkv:
    """A random model: as forebay runs it, in float32, and as its tensors by their own names."""

    version: int
    tensors: Mapping[str, Tensor]
    model: Model

    @classmethod
    def make(cls, version: int, folder: Path) -> Rwkv:
        tensors = random_tensors(version, seed=version)
        torch.save(tensors, folder / "model.pth")
        return cls(version, tensors, load_model(folder / "model.pth", device="cpu"))

    @contextlib.contextmanager
    def in_float64(self) -> Iterator[Model]:
        """The model in float64 throughout, so that what differs from the equations differs in meaning."""
        at, cpu = self.model.checkpoint, self.model.device
        assert at is not None
        with float64_throughout():
            yield Model(at.spec, read_weights(at, cpu, torch.float64), cpu, torch.float64, at)

    @property
    def kinds(self) -> list[str]:
        """The kinds of points at which every token has a value of its own: all but states and effective attention."""
        kinds = dict.fromkeys(point.kind for point in self.model.spec.points())
        return [kind for kind in kinds if kind not in (STATE, EFFECTIVE_ATTN)]

    def naive(
        self,
        row: int = 0,
        *,
        edits: Mapping[str, Edit] | None = None,
        writes: Mapping[int, Tensor] | None = None,
        states: Mapping[tuple[int, int], Callable[[Tensor], Tensor]] | None = None,
    ) -> Naive:
        """What the equations make of a row of the batch."""
        return run(self.tensors, self.version, ROWS[row], edits=edits, writes=writes, states=states)


def name_of(kind: str, layer: int) -> str:
    """The name of a point of this kind, in this layer where it lies in one."""
    return f"blocks.{layer}.{kind}" if is_in_a_block(kind) else kind


def is_in_a_block(kind: str) -> bool:
    return not kind.startswith(("embed.", "ln_final.")) and kind not in ("hook_embed", "hook_final_norm", "hook_logits")


def dims_after_position(kind: str) -> tuple[str, ...]:
    """The dimensions of what one token has at a point."""
    return HookPoint.parse(name_of(kind, 0)).dims[2:]


def error(ours: Tensor | None, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert ours is not None
    assert ours.shape == expected.shape
    return float((ours.double() - expected).norm() / expected.norm())
