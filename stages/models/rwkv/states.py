"""What a recurrent model keeps of the tokens that it has read: all that the next one needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerState:
    """The state of one layer after each sequence's last token: `wkv` [sequence, head, d_key, d_value] in float32, and
    what entered time mixing and channel mixing there, which the next token is mixed with, [sequence, d_model]."""

    wkv: Tensor
    time_shift: Tensor
    channel_shift: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RecurrentStates:
    """The states of all layers for some sequences. Given by a forward, and taken by the forward of what follows."""

    layers: tuple[LayerState, ...]

    @classmethod
    def zero(cls, spec: ModelSpec, n_sequences: int, device: torch.device, dtype: torch.dtype) -> "RecurrentStates":
        """Give the states before the first token."""
        wkv = torch.zeros(n_sequences, spec.n_heads, spec.d_head, spec.d_head, device=device)
        shift = torch.zeros(n_sequences, spec.d_model, device=device, dtype=dtype)
        return cls((LayerState(wkv=wkv, time_shift=shift, channel_shift=shift),) * spec.n_layers)

    @property
    def n_sequences(self) -> int:
        """How many sequences they are of."""
        return len(self.layers[0].wkv)

    def select(self, sequences: Sequence[int]) -> "RecurrentStates":
        """Give the states of some of the sequences, in the order given, as new tensors; a sequence may be repeated, to
        try several continuations."""
        rows = list(sequences)
        return RecurrentStates(
            tuple(
                LayerState(
                    wkv=layer.wkv[rows], time_shift=layer.time_shift[rows], channel_shift=layer.channel_shift[rows]
                )
                for layer in self.layers
            )
        )

    def check(self, spec: ModelSpec, n_sequences: int, dtype: torch.dtype) -> None:
        """Raise ModelError for states that are not those of this many sequences in a model of these sizes and dtype."""
        if len(self.layers) != spec.n_layers:
            raise ModelError(f"the states are of {len(self.layers)} layers; this model has {spec.n_layers}")
        expected = {
            "wkv": ((n_sequences, spec.n_heads, spec.d_head, spec.d_head), torch.float32),
            "time_shift": ((n_sequences, spec.d_model), dtype),
            "channel_shift": ((n_sequences, spec.d_model), dtype),
        }
        for number, layer in enumerate(self.layers):
            for name, (shape, as_) in expected.items():
                found = getattr(layer, name)
                if found.shape != shape or found.dtype != as_:
                    raise ModelError(
                        f"the states of layer {number} have {name} of shape {tuple(found.shape)} and dtype "
                        f"{found.dtype}; {n_sequences} sequences in this model take {shape} and {as_}. A forward of "
                        f"the same model gives states, and .select(…) those of some of its sequences"
                    )


def state_bytes(spec: ModelSpec, n_sequences: int, dtype: torch.dtype) -> int:
    """Bytes that the `RecurrentStates` of some sequences take."""
    matrix = 4 * spec.n_heads * spec.d_head**2
    return math.prod((n_sequences, spec.n_layers, matrix + 2 * spec.d_model * dtype.itemsize))
