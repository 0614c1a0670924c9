"""The recurrent networks of AlgZoo: one layer of ReLU neurons that reads a sequence number by number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.points import HookPoint
from ..models.taps import EMPTY, HookSpec
from .spec import AlgZooForward, AlgZooSpec, resolve, touched


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlgZooRNN:
    """A network of `torch.nn.RNN(1, hidden, nonlinearity="relu", bias=False)` and `torch.nn.Linear(…, bias=False)`.

    `W_ih` [neuron], `W_hh` [neuron, neuron], `W_oh` [output, neuron], of one dtype on one device:

        pre_t = W_ih x_t + W_hh hidden_{t−1},   hidden_t = relu(pre_t),   hidden_{−1} = 0,   output = W_oh hidden_{n−1}
    """

    spec: AlgZooSpec
    W_ih: Tensor
    W_hh: Tensor
    W_oh: Tensor

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The tensors by their names in AlgZoo's checkpoints."""
        return {"rnn.weight_ih_l0": self.W_ih[:, None], "rnn.weight_hh_l0": self.W_hh, "linear.weight": self.W_oh}

    def forward(self, inputs: object, hooks: HookSpec = EMPTY) -> AlgZooForward:
        """Run the network on sequences [input, time], or on one [time], cast to the weights' dtype; no gradients.

        Hook points, all [input, neuron], for every time step t from 0 on: `rnn.hook_pre.{t}`, `rnn.hook_hidden.{t}`;
        and `hook_output` [input, output]. Memory: what is captured, and one hidden state. Raises SchemaError for inputs
        that are no finite numbers of this length, HookError for hooks that do not fit (`resolve`).
        """
        x = self.read(inputs)
        captures: dict[HookPoint, Tensor] = {}
        taps = resolve(hooks, self.spec, len(x), captures.__setitem__)
        with torch.no_grad():
            hidden = x.new_zeros(len(x), self.spec.hidden)
            for t in range(self.spec.n):
                pre = touched(taps, f"rnn.hook_pre.{t}", torch.outer(x[:, t], self.W_ih) + hidden @ self.W_hh.T)
                hidden = touched(taps, f"rnn.hook_hidden.{t}", pre.relu())
            output = touched(taps, "hook_output", hidden @ self.W_oh.T)
        return AlgZooForward(spec=self.spec, output=output, captures=captures)

    def read(self, inputs: object) -> Tensor:
        """Sequences as a tensor [input, time] in dtype and on device of the weights. Raises SchemaError."""
        x = torch.as_tensor(sequences(inputs, self.spec.n), dtype=self.W_ih.dtype).to(self.W_ih.device)
        if not bool(x.isfinite().all()):
            raise SchemaError("there is NaN or infinity in the inputs")
        return x


def sequences(inputs: object, n: int) -> Tensor:
    """Numbers [input, n] of what was given as inputs: a tensor, an array, lists. SchemaError for another shape."""
    values = inputs.values if isinstance(inputs, xr.DataArray) else inputs
    try:
        x = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise SchemaError(f"the inputs are no numbers [input, {n}]: {error}") from error
    x = x[None] if x.dim() == 1 else x
    if x.dim() != 2 or x.shape[1] != n or x.is_complex():
        raise SchemaError(f"the inputs are {list(x.shape)} of {x.dtype}: this network reads sequences [input, {n}]")
    return x
