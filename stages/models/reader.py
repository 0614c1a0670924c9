"""Reading the weights of a checkpoint onto a device, one tensor of it at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Weight and bias of a norm, [D] or None. The weight includes `spec.norm_offset`; both are in float32 where
    `spec.norm_float32`."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the weights of a checkpoint onto a device in a dtype. `within` is put before every name."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    within: str = ""

    def has(self, name: str) -> bool:
        """Whether the model has a weight of this name."""
        return self.within + name in self.checkpoint.spec.weight_shapes()

    def read(self, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        """Give weights laid one below the other, as one new tensor."""
        return _read(self.checkpoint, [self.within + name for name in names], self.device, dtype or self.dtype)

    def read_if(self, *names: str) -> Tensor | None:
        """The same, or None where the model does not have them."""
        return self.read(*names) if self.has(names[0]) else None

    def norm(self, name: str) -> Norm:
        """Give weight and bias of a norm, either of which it may not have."""
        spec = self.checkpoint.spec
        as_ = torch.float32 if spec.norm_float32 else self.dtype
        weight, bias = (
            self.read(f"{name}.{part}", dtype=as_) if self.has(f"{name}.{part}") else None
            for part in ("weight", "bias")
        )
        return Norm(weight if weight is None or not spec.norm_offset else weight.add_(spec.norm_offset), bias)

    def norm_if(self, present: bool, name: str) -> Norm | None:
        """The same, or None where there is no such norm."""
        return self.norm(name) if present else None


def _read(checkpoint: Checkpoint, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> Tensor:
    shapes = [checkpoint.spec.weight_shapes()[name] for name in names]
    rows = [shape[0] for shape in shapes]
    fused = torch.empty((sum(rows), *shapes[0][1:]), device=device, dtype=dtype)
    for part, name in zip(torch.split(fused, rows), names, strict=True):
        part.copy_(checkpoint.read(name))
    return fused
