"""What the neurons of a recurrent network compute: functions of the input that they follow, and what is readable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from ..models.taps import HookSpec
from .load import AlgZooNetwork
from .rnn import AlgZooRNN
from .tasks import recurrent

Floats = NDArray[np.float64]
UNKNOWN = "unknown"


def probe_neurons(
    network: AlgZooNetwork,
    inputs: object | None = None,
    *,
    n_input: int = 1000,
    seed: int = 0,
    threshold: float = 0.8,
) -> xr.Dataset:
    """Which known function of the inputs so far each neuron follows, at every time step.

    `inputs` are as `network.forward` takes them; None: `n_input` sequences whose numbers are uniform on [−3, 3), drawn
    with `seed`. The functions ("roles", candle-mi's), of x_0 … x_t at step t, r being the ReLU:

        RunningMax r(max x)   RunningMin r(min x)   RecentInput r(x_t)   MaxIncrement r(r(max x) − r(max x_0 … x_{t−1}))
        LeaveOneOutMax r(r(max x) − x_t)   Comparator(a, b) r(x_a − x_b)

    Gives `correlation` [role, neuron, time], Pearson's between a role and the neuron's hidden value over the inputs,
    float64, NaN where either is constant and where a role needs inputs to come; `best_correlation` [neuron, time], the
    one furthest from 0, and `best_role`, its name, or "unknown" where it lies within ±`threshold`. candle-mi tells the
    last step's, without its sign: `.isel(time=-1)`. Roles that are equal at a step tie; the first of the list is told.

    SchemaError for fewer than two inputs, a `threshold` outside [0, 1], and for a transformer.
    """
    rnn = recurrent(network, "probe_neurons")
    if not 0 <= threshold <= 1:
        raise SchemaError(f"threshold = {threshold}: a correlation from 0 to 1")
    x, hidden = _states(rnn, _uniform(rnn, n_input, seed) if inputs is None else inputs)
    by_time = [_roles(x, t) for t in range(rnn.spec.n)]
    names = list(by_time[-1])
    absent = np.full(len(x), np.nan)
    values = np.array([[found.get(name, absent) for name in names] for found in by_time])
    correlation = np.stack([_correlation(values[t], hidden[:, t].T) for t in range(rnn.spec.n)], axis=-1)
    strength = np.nan_to_num(abs(correlation), nan=-1.0).argmax(0)
    best = np.take_along_axis(correlation, strength[None], axis=0)[0]
    role = np.where(abs(best) >= threshold, np.array(names, dtype=object)[strength], UNKNOWN)
    steps, roles = np.arange(rnn.spec.n), np.array(names, dtype=object)
    coords = {"role": roles, "neuron": np.arange(rnn.spec.hidden), "time": steps}
    attrs = {"long_name": "Pearson's r with the role", "units": "1"}
    made = {
        "correlation": (("role", "neuron", "time"), correlation, attrs),
        "best_correlation": (("neuron", "time"), best, {**attrs, "long_name": "Pearson's r with the best role"}),
        "best_role": (("neuron", "time"), role, {"long_name": "role of the neuron"}),
    }
    return xr.Dataset(made, coords=coords)


def linear_readout(
    network: AlgZooNetwork,
    inputs: object | None = None,
    *,
    quantities: Mapping[str, object] | None = None,
    n_input: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How well quantities can be read off the hidden state by a linear function, at every time step.

    `quantities` are numbers [input] by name; None: each input (`x_0` …), and the maximum, the second largest, the
    minimum and the mean of those so far, which is why they differ from step to step. A function with intercept is
    fitted by least squares to the first half of the inputs and judged by the second. Gives `r2` [quantity, time],
    float64: 1 − residual / total sum of squares, 1 for what is read exactly, 0 for no better than the mean of the
    half judged, and below 0 for worse; NaN for what is constant there or is yet to come. Inputs as in `probe_neurons`.

    SchemaError for quantities that are no numbers [input], for fewer than two inputs in a half a neuron and intercept,
    and for a transformer.
    """
    rnn = recurrent(network, "linear_readout")
    x, hidden = _states(rnn, _uniform(rnn, n_input, seed) if inputs is None else inputs)
    if len(x) // 2 < 2 * (rnn.spec.hidden + 1):
        raise SchemaError(f"{len(x)} inputs are too few to fit {rnn.spec.hidden + 1} numbers to half of them")
    by_time = [_quantities(x, t) if quantities is None else _given(quantities, len(x), t) for t in range(rnn.spec.n)]
    names = list(by_time[-1])
    absent = np.full(len(x), np.nan)
    r2 = [
        _r2(hidden[:, t], np.stack([found.get(name, absent) for name in names], 1)) for t, found in enumerate(by_time)
    ]
    coords = {"quantity": np.array(names, dtype=object), "time": np.arange(rnn.spec.n)}
    attrs = {"long_name": "R² of a linear readout", "units": "1"}
    return xr.Dataset({"r2": (("quantity", "time"), np.stack(r2, axis=1), attrs)}, coords=coords)


def _uniform(rnn: AlgZooRNN, n_input: int, seed: int) -> Floats:
    return np.random.default_rng(seed).uniform(-3.0, 3.0, (max(n_input, 0), rnn.spec.n))


def _states(rnn: AlgZooRNN, inputs: object) -> tuple[Floats, Floats]:
    """Inputs [input, time] and hidden states [input, time, neuron] in float64."""
    x = rnn.read(inputs).double().cpu().numpy()
    if len(x) < 2:
        raise SchemaError(f"a correlation needs at least two inputs, not {len(x)}")
    hidden = rnn.forward(inputs, HookSpec().capture("rnn.hook_hidden.*")).to_dataset()["rnn.hook_hidden"]
    return x, hidden.values.astype(np.float64)


def _roles(x: Floats, t: int) -> dict[str, Floats]:
    """The roles that are defined at step t, [input] each, RunningMax first."""
    largest, now = x[:, : t + 1].max(1), x[:, t]
    roles = {
        "RunningMax": _relu(largest),
        "RunningMin": _relu(x[:, : t + 1].min(1)),
        "MaxIncrement": _relu(_relu(largest) - _relu(x[:, :t].max(1))) if t else _relu(largest),
        "LeaveOneOutMax": _relu(_relu(largest) - now),
        "RecentInput": _relu(now),
    }
    for a in range(t + 1):
        roles |= {f"Comparator({a}, {b})": _relu(x[:, a] - x[:, b]) for b in range(t + 1) if b != a}
    return roles


def _quantities(x: Floats, t: int) -> dict[str, Floats]:
    ordered = np.sort(x[:, : t + 1], axis=1)
    made = {f"x_{s}": x[:, s] for s in range(t + 1)}
    made |= {"max": ordered[:, -1], "min": ordered[:, 0], "mean": ordered.mean(1)}
    return made | ({"second_max": ordered[:, -2]} if t else {})


def _given(quantities: Mapping[str, object], n_input: int, t: int) -> dict[str, Floats]:
    made = {name: np.asarray(values, dtype=np.float64) for name, values in quantities.items()}
    for name, values in made.items():
        if values.shape != (n_input,) or not np.isfinite(values).all():
            raise SchemaError(f"the quantity {name!r} is {list(values.shape)}: {n_input} finite numbers are expected")
    return made


def _relu(x: Any) -> Floats:
    return np.asarray(np.maximum(x, 0.0))


def _correlation(a: Floats, b: Floats) -> Floats:
    """Pearson's correlation of rows [a, input] with rows [b, input], [a, b]; NaN for a row that is constant."""
    varies = np.outer(np.ptp(a, axis=1) > 0, np.ptp(b, axis=1) > 0)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(varies, np.clip(a @ b.T / size, -1.0, 1.0), np.nan)


def _r2(hidden: Floats, quantity: Floats) -> Floats:
    """The share [quantity] of the variance in the second half that a fit to the first half explains."""
    half = len(hidden) // 2
    design = np.hstack([hidden, np.ones((len(hidden), 1))])
    known = np.isfinite(quantity).all(0)
    fitted, *_ = np.linalg.lstsq(design[:half], np.where(known, quantity, 0.0)[:half], rcond=None)
    judged = quantity[half:]
    left = ((judged - design[half:] @ fitted) ** 2).sum(0)
    total = ((judged - judged.mean(0)) ** 2).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known & (np.ptp(judged, axis=0) > 0), 1 - left / total, np.nan)
