"""What a recurrent network loses without a neuron, without two of them, or without one at a single time step."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.errors import nearest
from .load import AlgZooNetwork
from .rnn import AlgZooRNN
from .tasks import predictions, recurrent, score, score_attrs, targets

VALUES = ("zero", "mean")


def ablate_neurons(
    network: AlgZooNetwork, inputs: object, *, value: str = "zero", by_time: bool = False, batch_size: int = 32
) -> xr.Dataset:
    """Hold each neuron at a constant after the ReLU, one after the other, and score the network's answers.

    `value`: `zero`, or `mean`, the neuron's mean over the inputs at each time step. It is held there at every step or,
    with `by_time`, at one step at a time. Gives `score` and `score_change` (score − baseline: negative where the
    neuron is needed) [neuron] or [neuron, time], `agreement` likewise, the fraction of inputs that are answered as
    before (for `median` the mean of |change of the output|, `output_change`, in its place), and `baseline`, a number.
    A score is the accuracy, or minus the root mean squared error of the median, float64.

    Definition: candle-mi's, and with `value="mean"` mean ablation. Memory: `batch_size` ablations are run together, a
    hidden state of every input each. Raises as `network.forward` does, and SchemaError for an unknown value and for a
    transformer.
    """
    rnn = recurrent(network, "ablate_neurons")
    n, n_neuron = rnn.spec.n, rnn.spec.hidden
    cut = torch.eye(n_neuron, dtype=torch.bool)[:, None, None] & torch.ones(1, 1, n, 1, dtype=torch.bool)
    if by_time:
        cut = cut & torch.eye(n, dtype=torch.bool)[None, :, :, None]
    coords = {"neuron": np.arange(n_neuron)} | ({"time": np.arange(n)} if by_time else {})
    return _scored(rnn, inputs, cut.reshape(-1, n, n_neuron), coords, value, batch_size)


def ablate_neuron_pairs(
    network: AlgZooNetwork, inputs: object, *, value: str = "zero", batch_size: int = 32
) -> xr.Dataset:
    """Hold every two neurons at a constant at every time step, and compare with what each of them does alone.

    Gives what `ablate_neurons` does [neuron, other], the same either way round; on the diagonal stand the single
    neurons. And `interaction` [neuron, other] = change of the pair − (change of one + change of the other), NaN on the
    diagonal: negative where two neurons stand in for each other, positive where both are of use only together.
    Arguments, memory and errors as there. Definition: candle-mi's.
    """
    rnn = recurrent(network, "ablate_neuron_pairs")
    n, n_neuron = rnn.spec.n, rnn.spec.hidden
    single = torch.eye(n_neuron, dtype=torch.bool)
    pairs = [(a, a) for a in range(n_neuron)] + list(combinations(range(n_neuron), 2))
    first, second = map(list, zip(*pairs, strict=True))
    cut = (single[first] | single[second])[:, None].expand(-1, n, -1)
    found = _scored(rnn, inputs, cut, {"pair": np.arange(len(pairs))}, value, batch_size)
    square = found[[name for name in found if "pair" in found[name].dims]].map(_squared, args=(n_neuron, first, second))
    change = square["score_change"]
    alone = np.diagonal(change.values)
    interaction = change - alone[:, None] - alone
    interaction.attrs = {"long_name": "interaction of two neurons", "units": score_attrs(rnn.spec)["units"]}
    return square.assign(interaction=interaction.where(~np.eye(n_neuron, dtype=bool)), baseline=found["baseline"])


def _scored(
    rnn: AlgZooRNN, inputs: object, cut: Tensor, coords: dict[str, Any], value: str, batch_size: int
) -> xr.Dataset:
    """The scores of networks in each of which some neurons are held, `cut` [variant, time, neuron]."""
    if value not in VALUES:
        raise SchemaError(f"value = {value!r}: neurons are held at {' or '.join(VALUES)}.{nearest(value, VALUES)}")
    if batch_size < 1:
        raise SchemaError(f"batch_size = {batch_size}: at least 1")
    spec, x, target = rnn.spec, rnn.read(inputs), targets(rnn.spec, inputs).values
    plain, hidden = _run(rnn, x, torch.zeros(1, spec.n, spec.hidden, dtype=torch.bool), x.new_zeros(spec.n, 1))
    held = hidden.mean(1) if value == "mean" else x.new_zeros(spec.n, spec.hidden)
    outputs = [_run(rnn, x, some.to(x.device), held)[0] for some in cut.split(batch_size)]
    baseline = score(spec, plain[0], target)
    scores = np.concatenate([score(spec, output, target).values for output in outputs])
    before = predictions(spec, plain[0])
    kept = [predictions(spec, output) - before for output in outputs]
    other = np.concatenate([(abs(k) if spec.scalar else k == 0).mean(-1) for k in kept])
    shape = tuple(map(len, coords.values()))
    attrs = score_attrs(spec)
    moved = {"long_name": "mean change of the output", "units": attrs["units"]}
    same = {"long_name": "answers that stay as they were", "units": "fraction of inputs"}
    made = {
        "score": (tuple(coords), scores.reshape(shape), attrs),
        "score_change": (tuple(coords), (scores - baseline.item()).reshape(shape), _changed(attrs)),
        "output_change" if spec.scalar else "agreement": (
            tuple(coords),
            other.reshape(shape),
            moved if spec.scalar else same,
        ),
    }
    return xr.Dataset({**made, "baseline": ((), baseline.item(), attrs)}, coords=coords)


def _run(rnn: AlgZooRNN, x: Tensor, cut: Tensor, held: Tensor) -> tuple[NDArray[Any], Tensor]:
    """Outputs [variant, input, output] where neurons are held, and the last variant's hidden states [time, input,
    neuron]."""
    states = []
    with torch.no_grad():
        hidden = x.new_zeros(len(cut), len(x), rnn.spec.hidden)
        for t in range(rnn.spec.n):
            pre = x[:, t, None] * rnn.W_ih + hidden @ rnn.W_hh.T
            hidden = torch.where(cut[:, None, t], held[t], pre.relu())
            states.append(hidden[-1])
        return (hidden @ rnn.W_oh.T).cpu().numpy(), torch.stack(states)


def _squared(values: xr.DataArray, n_neuron: int, first: list[int], second: list[int]) -> xr.DataArray:
    """Lay pairs out as a symmetric matrix [neuron, other]."""
    square = np.empty((n_neuron, n_neuron))
    square[first, second] = square[second, first] = values.values
    coords = {"neuron": np.arange(n_neuron), "other": np.arange(n_neuron)}
    return xr.DataArray(square, dims=tuple(coords), coords=coords, attrs=values.attrs)


def _changed(attrs: dict[str, str]) -> dict[str, str]:
    return {**attrs, "long_name": f"change of {attrs['long_name']}"}
