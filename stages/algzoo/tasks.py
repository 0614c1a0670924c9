"""The four tasks: inputs to try, the right answers, and how well a network does.

Answers are those of AlgZoo's own definitions. Two differ from candle-mi's. The median of an even number of values is
the mean of the two in the middle. And the class of `longest_cycle` is the length of the longest cycle minus 1: lengths
go from 1 to n and classes from 0 to n − 1, so that a length taken for a class is wrong by one everywhere. A cycle is
what comes back to where it started: the tail that leads into one does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from .load import AlgZooNetwork
from .rnn import AlgZooRNN, sequences
from .spec import RNN, AlgZooSpec

MOST_FUNCTIONS = 1_000_000


def sample_inputs(spec: AlgZooSpec, n_input: int, *, seed: int) -> xr.DataArray:
    """Draw inputs as AlgZoo trains on them: independent standard normal numbers, float64 [input, time]; for
    `longest_cycle` functions from {0, …, n−1} to itself, every value equally likely, int64 [input, position].

    The same seed gives the same inputs (numpy's `default_rng`). SchemaError for an `n_input` below 1.
    """
    if n_input < 1:
        raise SchemaError(f"n_input = {n_input}: at least one input is drawn")
    rng = np.random.default_rng(seed)
    shape = (n_input, spec.n)
    values = rng.standard_normal(shape) if spec.architecture == RNN else rng.integers(0, spec.n, shape)
    return _labelled(spec, values)


def all_functions(spec: AlgZooSpec) -> xr.DataArray:
    """Every input of `longest_cycle`: the n^n functions, int64 [input, position], the last value counting fastest.

    SchemaError for another task, and for more than a million functions.
    """
    if spec.architecture == RNN or spec.n**spec.n > MOST_FUNCTIONS:
        raise SchemaError(f"the inputs of {spec.task} with n = {spec.n} cannot be listed: draw some with sample_inputs")
    return _labelled(spec, np.indices((spec.n,) * spec.n).reshape(spec.n, -1).T)


def targets(spec: AlgZooSpec, inputs: object) -> xr.DataArray:
    """The right answers [input]: a class (int64), or the median (float64).

    `2nd_argmax`: the position of the second largest value. `argmedian`: that of the value with n // 2 smaller ones.
    `median`: the median. `longest_cycle`: the length of the longest cycle of f, minus 1. Of equal values, which have
    probability 0, the later one counts as larger. SchemaError for inputs that are no sequences of this length.
    """
    x = sequences(inputs, spec.n).cpu().numpy()
    if not np.isfinite(x).all():
        raise SchemaError("there is NaN or infinity in the inputs")
    if spec.architecture != RNN and not ((x % 1 == 0) & (x >= 0) & (x < spec.n)).all():
        raise SchemaError(f"the inputs of {spec.task} are whole numbers from 0 to {spec.n - 1}")
    values = _TRUTHS[spec.task](x)
    name = "median" if spec.scalar else "class"
    attrs = {"long_name": f"target of {spec.task}", "units": "input value" if spec.scalar else name}
    return xr.DataArray(values, dims="input", coords={"input": np.arange(len(x))}, name="target", attrs=attrs)


def evaluate(network: AlgZooNetwork, inputs: object) -> xr.Dataset:
    """How well a network does its task on inputs, as `network.forward` takes them.

    Gives `prediction`, `target` and `error` [input], and `score`, a number. Where classes are predicted `error` is 1
    for a wrong one and 0 for the right one, and the score is the accuracy; for `median` `error` is the output minus
    the median, and the score is minus the root of its mean square, so that a higher one is better, too. Of equal
    outputs the first is the prediction. Raises as `network.forward` does.
    """
    spec = network.spec
    output = outputs(network, inputs)
    target = targets(spec, inputs)
    prediction = target.copy(data=predictions(spec, output))
    prediction.attrs["long_name"] = "prediction of the network"
    wrong = prediction - target if spec.scalar else (prediction != target).astype(np.float64)
    wrong.attrs = {"long_name": "error of the prediction", "units": target.attrs["units"] if spec.scalar else "wrong"}
    made = {"prediction": prediction, "target": target, "error": wrong}
    return xr.Dataset(made | {"score": score(spec, output, target.values)})


def outputs(network: AlgZooNetwork, inputs: object) -> NDArray[Any]:
    """The outputs of a network [input, output], on the CPU."""
    return network.forward(inputs).output.cpu().numpy()


def predictions(spec: AlgZooSpec, output: NDArray[Any]) -> NDArray[Any]:
    """What outputs [..., output] predict [...]: the first of the largest, int64, or the number itself, float64."""
    return output[..., 0].astype(np.float64) if spec.scalar else output.argmax(-1)


def score(spec: AlgZooSpec, output: NDArray[Any], target: NDArray[Any]) -> xr.DataArray:
    """The score of outputs [..., input, output] against answers [input], float64 [...] without labels but `units`: the
    accuracy, or minus the root mean squared error.
    """
    wrong = predictions(spec, output) - target
    value = -np.sqrt((wrong**2).mean(-1)) if spec.scalar else (wrong == 0).mean(-1)
    return xr.DataArray(value, dims=[f"dim_{i}" for i in range(np.ndim(value))], attrs=score_attrs(spec))


def score_attrs(spec: AlgZooSpec) -> dict[str, str]:
    """Name and unit of a score."""
    if spec.scalar:
        return {"long_name": "minus the root mean squared error", "units": "input value"}
    return {"long_name": "accuracy", "units": "fraction of inputs"}


def recurrent(network: AlgZooNetwork, what: str) -> AlgZooRNN:
    """The network, if it is recurrent. SchemaError otherwise, naming the analysis."""
    if not isinstance(network, AlgZooRNN):
        raise SchemaError(f"{what} is for recurrent networks; that for {network.spec.task} is a transformer")
    return network


def _labelled(spec: AlgZooSpec, values: NDArray[Any]) -> xr.DataArray:
    along = "time" if spec.architecture == RNN else "position"
    coords = {"input": np.arange(len(values)), along: np.arange(spec.n)}
    return xr.DataArray(values, dims=("input", along), coords=coords, name="inputs")


def _second_argmax(x: NDArray[Any]) -> NDArray[Any]:
    return np.argsort(x, axis=-1, kind="stable")[:, -2]


def _argmedian(x: NDArray[Any]) -> NDArray[Any]:
    return np.argsort(x, axis=-1, kind="stable")[:, x.shape[1] // 2]


def _median(x: NDArray[Any]) -> NDArray[Any]:
    return np.median(x.astype(np.float64), axis=-1)


def _longest_cycle(x: NDArray[Any]) -> NDArray[Any]:
    """From every start, follow f and see when it is back for the first time."""
    n = x.shape[1]
    start = np.broadcast_to(np.arange(n), x.shape)
    function, here = x.astype(np.int64), start
    first_return = np.zeros(x.shape, dtype=np.int64)
    for steps in range(1, n + 1):
        here = np.take_along_axis(function, here, axis=1)
        first_return[(here == start) & (first_return == 0)] = steps
    return np.asarray(first_return.max(-1) - 1)


_TRUTHS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "2nd_argmax": _second_argmax,
    "argmedian": _argmedian,
    "median": _median,
    "longest_cycle": _longest_cycle,
}
