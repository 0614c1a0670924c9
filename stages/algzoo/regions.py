"""The linear regions of a recurrent network: which neurons are active when, and the linear map that holds meanwhile.

A ReLU network computes a linear function of its input wherever no neuron changes between active and inactive. Without
biases each such region is a cone: with x it holds every positive multiple of x. An activation pattern is boolean [time,
neuron], true where the pre-activation is at least 0 (candle-mi's definition).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from ..models.taps import HookSpec
from .load import AlgZooNetwork
from .rnn import AlgZooRNN
from .tasks import evaluate, recurrent

Floats = NDArray[np.float64]
_NONE, _NEAR = 1e-12, 1e-9
"""What is rounding of zero: of a linear map, and of the sine of an angle."""


def activation_patterns(network: AlgZooNetwork, inputs: object) -> xr.DataArray:
    """The activation pattern of every input, boolean [input, time, neuron].

    Inputs are as `network.forward` takes them, and are computed in the dtype of the network. Raises as it does, and
    SchemaError for a transformer.
    """
    rnn = recurrent(network, "activation_patterns")
    pre = rnn.forward(inputs, HookSpec().capture("rnn.hook_pre.*")).to_dataset()["rnn.hook_pre"]
    return (pre >= 0).rename("pattern").assign_attrs(long_name="active neurons", units="active")


def classify_regions(network: AlgZooNetwork, inputs: object) -> xr.Dataset:
    """The linear regions that inputs fall into, the most frequent first, of equally frequent ones the first seen.

    Gives, along `region`: `count` (int64) and `fraction` of the inputs, `representative` [region, time], the first
    input in it, `pattern` [region, time, neuron], and `linear_map` [region, output, time] (`region_linear_map`); and
    `region_of_input` [input], the number of the region that each input lies in. Regions that no input fell into are
    not seen: `enumerate_regions` finds all of them. Memory: one pattern an input. Raises as `activation_patterns`.
    """
    rnn = recurrent(network, "classify_regions")
    patterns = activation_patterns(network, inputs).values
    x = rnn.read(inputs).cpu().numpy()
    packed = np.packbits(patterns.reshape(len(patterns), -1), axis=1)
    _, first, which, count = np.unique(packed, axis=0, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -count))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    found = _described(rnn, patterns[first[order]], x[first[order]])
    counted = found.assign(count=("region", count[order]), fraction=("region", count[order] / len(x)))
    counted["count"].attrs = {"long_name": "inputs in the region", "units": "inputs"}
    counted["fraction"].attrs = {"long_name": "fraction of inputs in the region", "units": "fraction"}
    return counted.assign(region_of_input=("input", rank[which.reshape(-1)])).assign_coords(input=np.arange(len(x)))


def region_linear_map(network: AlgZooNetwork, pattern: object) -> xr.DataArray:
    """The matrix A, float64 [output, time], with output = A x for every input x whose activation pattern this is.

    Column t is W_oh (G_{T−1} W_hh) … (G_{t+1} W_hh) G_t W_ih, G_t having the pattern at time t on its diagonal. Of
    several patterns, [..., time, neuron], there is a matrix each, [..., output, time]. Computed in float64, so that A x
    equals the output of the network in float64 but for rounding.

    SchemaError for patterns of another shape, where the product overflows, and for a transformer.
    """
    rnn = recurrent(network, "region_linear_map")
    gates, lead, coords = _gates(rnn, pattern)
    made = _output_maps(rnn, gates).reshape(*lead.values(), rnn.spec.n_output, rnn.spec.n)
    along = {"output": np.arange(rnn.spec.n_output), "time": np.arange(rnn.spec.n)}
    attrs = {"long_name": "output by input", "units": "output / input"}
    return xr.DataArray(made, dims=(*lead, *along), coords=coords | along, name="linear_map", attrs=attrs)


def enumerate_regions(network: AlgZooNetwork, *, most: int = 10_000, thinnest: float = 1e-6) -> xr.Dataset:
    """All linear regions of a small network, whether or not an input was ever drawn from them.

    Walks the tree of activation patterns, neuron by neuron and step by step: given the signs so far, a pre-activation
    is a linear function of the input, and Farkas' lemma says whether it takes either sign anywhere within them. Gives,
    along `region`: `pattern` [region, time, neuron], `representative` [region, time], the centre of the largest ball in
    the region and in the cube |x_t| ≤ 1 (by a linear program), `radius` of that ball, `linear_map` [region, output,
    time], and `probability` that a standard normal input lies in it: exact where n is 2, NaN where it is not
    (`classify_regions` estimates it). The largest radius comes first.

    A region thinner than a `radius` of `thinnest` is left out, boundaries between regions among them. Where a
    pre-activation is zero throughout, its neuron counts as active. Time: a few milliseconds a region and neuron.
    SchemaError once there are more than `most`, where none is left, and for a transformer.
    """
    rnn = recurrent(network, "enumerate_regions")
    W_ih, W_hh = _wide(rnn.W_ih), _wide(rnn.W_hh)
    found = [_Branch(gates=(), rows=np.empty((0, rnn.spec.n)), inside=np.zeros(rnn.spec.n))]
    for time in range(rnn.spec.n):
        before, found = found, []
        for branch in before:
            gates = np.zeros((1, rnn.spec.n, rnn.spec.hidden), dtype=bool)
            gates[0, :time] = np.reshape(branch.gates, (time, rnn.spec.hidden))
            found += branch.split(_pre_activations(W_ih, W_hh, gates)[0, time])
            if len(found) > most:
                raise SchemaError(
                    f"there are more than {most:,} regions within the first {time + 1} of {rnn.spec.n} time steps: "
                    f"raise most=, or see those that inputs fall into with classify_regions"
                )
    balls = [(*_deepest(branch.rows), branch.gates) for branch in found]
    balls = sorted((ball for ball in balls if ball[0] > thinnest), key=lambda ball: -ball[0])
    if not balls:
        raise SchemaError(f"no region has a radius above thinnest = {thinnest:g}: lower it")
    radius, centre, kept = (np.array(column) for column in zip(*balls, strict=True))
    made = _described(rnn, kept.reshape(-1, rnn.spec.n, rnn.spec.hidden), centre)
    made = made.assign(radius=("region", radius))
    made["radius"].attrs = {"long_name": "radius of the largest ball inside", "units": "input value"}
    made = made.assign(probability=("region", _probabilities(rnn, made)))
    made["probability"].attrs = {"long_name": "probability of a standard normal input", "units": "probability"}
    return made


def region_facets(network: AlgZooNetwork, pattern: object, *, thinnest: float = 1e-6) -> xr.Dataset:
    """The half-spaces that bound one region: which neurons, at which steps, the region would be larger without.

    Gives `facet`, boolean [time, neuron], and `normal` [time, neuron, input_time], the vectors of length 1 whose
    product with every input of the region is at least 0, NaN for those that are no facet. An input lies in the region
    exactly if it does so for all facets; of several neurons with the same boundary the last one is told. SchemaError
    for a pattern of another shape, and for one that no input has (`thinnest` as in `enumerate_regions`).
    """
    rnn = recurrent(network, "region_facets")
    gates, lead, _ = _gates(rnn, pattern)
    if lead:
        raise SchemaError(f"the facets of one region are asked for, and there are {len(gates)} patterns")
    pre = _pre_activations(_wide(rnn.W_ih), _wide(rnn.W_hh), gates)[0].reshape(-1, rnn.spec.n)
    length = np.linalg.norm(pre, axis=1)
    kept = length > _NONE * length.max()
    rows = np.where(gates.reshape(-1, 1), 1, -1) * pre / np.where(kept, length, 1)[:, None]
    radius, centre = _deepest(rows[kept])
    if radius <= thinnest:
        raise SchemaError("no input has this activation pattern, or the region is thinner than `thinnest`")
    for i in np.flatnonzero(kept):
        kept[i] = _reached(rows[kept & (np.arange(len(rows)) != i)], centre, -rows[i]) is not None
    shape = (rnn.spec.n, rnn.spec.hidden)
    normal = np.where(kept[:, None], rows, np.nan).reshape(*shape, rnn.spec.n)
    coords = {"time": np.arange(rnn.spec.n), "neuron": np.arange(rnn.spec.hidden), "input_time": np.arange(rnn.spec.n)}
    facets = {"facet": (("time", "neuron"), kept.reshape(shape)), "normal": (("time", "neuron", "input_time"), normal)}
    return xr.Dataset(facets, coords=coords)


def exact_accuracy(network: AlgZooNetwork, regions: xr.Dataset | None = None) -> float:
    """The probability that a network answers a standard normal input of two numbers rightly, exactly.

    Deduced from the weights, not estimated from samples: in each linear region the outputs cross on a ray, and the
    right answer changes where x_0 = x_1, so that the plane falls into sectors in which everything stays as it is; their
    angles add up to the accuracy. Such is AlgZoo's mechanistic estimate of its smallest network. `regions` are those of
    `enumerate_regions`, found anew where they are left out.

    SchemaError for a network that reads more than two numbers or whose task is the median.
    """
    rnn = recurrent(network, "exact_accuracy")
    if rnn.spec.n != 2 or rnn.spec.scalar:
        raise SchemaError(f"exact_accuracy is for classes of sequences of 2, not {rnn.spec.task} of {rnn.spec.n}")
    middle, width = _sectors(rnn, enumerate_regions(network) if regions is None else regions)
    return float(((1 - evaluate(network, middle)["error"].values) * width).sum() / (2 * np.pi))


# ── linear maps ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _pre_activations(W_ih: Floats, W_hh: Floats, gates: NDArray[np.bool_]) -> Floats:
    """The pre-activations as linear maps of the input, [region, time, neuron, input_time]."""
    n_region, n, n_neuron = gates.shape
    made, hidden = [], np.zeros((n_region, n_neuron, n))
    for time in range(n):
        pre = W_hh @ hidden
        pre[:, :, time] += W_ih
        made.append(pre)
        hidden = pre * gates[:, time, :, None]
    return np.stack(made, axis=1)


def _output_maps(rnn: AlgZooRNN, gates: NDArray[np.bool_]) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        last = _pre_activations(_wide(rnn.W_ih), _wide(rnn.W_hh), gates)[:, -1] * gates[:, -1, :, None]
        made = _wide(rnn.W_oh) @ last
    if not np.isfinite(made).all():
        raise SchemaError("the product of the weights along a pattern overflows")
    return np.asarray(made)


def _gates(rnn: AlgZooRNN, pattern: object) -> tuple[NDArray[np.bool_], dict[str, int], dict[str, Any]]:
    """Patterns as [region, time, neuron], the sizes of their leading dimensions, and the coordinates of those."""
    held = np.asarray(pattern)
    if held.dtype != bool or held.shape[-2:] != (rnn.spec.n, rnn.spec.hidden):
        expected = f"[time={rnn.spec.n}, neuron={rnn.spec.hidden}]"
        raise SchemaError(f"a pattern is boolean {expected}, not {held.dtype} {list(held.shape)}")
    named = isinstance(pattern, xr.DataArray)
    dims = list(map(str, pattern.dims)) if named else [f"dim_{i}" for i in range(held.ndim)]  # type: ignore[attr-defined]
    lead = dict(zip(dims[:-2], held.shape[:-2], strict=True))
    coords = {dim: pattern.coords[dim].values for dim in lead if dim in pattern.coords} if named else {}  # type: ignore[attr-defined]
    return held.reshape(-1, *held.shape[-2:]), lead, coords


def _described(rnn: AlgZooRNN, patterns: NDArray[np.bool_], representative: NDArray[Any]) -> xr.Dataset:
    coords = {"region": np.arange(len(patterns)), "time": np.arange(rnn.spec.n), "neuron": np.arange(rnn.spec.hidden)}
    pattern = xr.DataArray(patterns, dims=tuple(coords), coords=coords, attrs={"long_name": "active neurons"})
    inside = (("region", "time"), representative, {"long_name": "an input in the region", "units": "input value"})
    return xr.Dataset({"pattern": pattern, "representative": inside, "linear_map": region_linear_map(rnn, pattern)})


def _wide(weight: Any) -> Floats:
    return np.asarray(weight.double().cpu().numpy())


# ── cones ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Branch:
    """Signs decided so far, `rows` whose products with an input must be positive, of length 1, and an input inside."""

    gates: tuple[bool, ...]
    rows: Floats
    inside: Floats

    def split(self, pre: Floats) -> list[_Branch]:
        """The branches in which every neuron of the next step, of these maps [neuron, input_time], has its sign."""
        branches = [self]
        for row in pre:
            branches = [further for branch in branches for further in branch._by_sign(row)]
        return branches

    def _by_sign(self, row: Floats) -> list[_Branch]:
        length = np.linalg.norm(row)
        if length < _NONE:
            return [_Branch((*self.gates, True), self.rows, self.inside)]
        made = []
        for sign in (1.0, -1.0):
            normal = sign * row / length
            inside = self.inside if normal @ self.inside > _NEAR else _reached(self.rows, self.inside, normal)
            if inside is not None:
                made.append(_Branch((*self.gates, sign > 0), np.vstack([self.rows, normal]), inside))
        return made


def _reached(rows: Floats, inside: Floats, normal: Floats) -> Floats | None:
    """An input of length 1 in the cone where all `rows` are positive, which holds `inside`, on the positive side of
    `normal`; None where no part of the cone lies there.

    By Farkas' lemma there is none exactly if −normal is a non-negative combination of the rows. Otherwise what the
    nearest combination leaves over is the direction of the cone that reaches furthest (Moreau).
    """
    from scipy.optimize import nnls

    if not len(rows):
        return normal
    weights, distance = nnls(rows.T, -normal)
    if distance < _NEAR:
        return None
    furthest = (normal + rows.T @ weights) / distance
    found = furthest + inside * distance / (2 * max(abs(float(normal @ inside)), distance))
    return np.asarray(found / np.linalg.norm(found))


def _deepest(rows: Floats) -> tuple[float, Floats]:
    """The largest ball in the cube |x_t| ≤ 1 and in the half-spaces of `rows` of length 1: radius and centre."""
    from scipy.optimize import linprog

    n = rows.shape[1]
    walls = np.vstack([-rows, np.eye(n), -np.eye(n)])
    found = linprog(
        np.array([0.0] * n + [-1.0]),
        A_ub=np.hstack([walls, np.ones((len(walls), 1))]),
        b_ub=np.concatenate([np.zeros(len(rows)), np.ones(2 * n)]),
        bounds=[(None, None)] * n + [(0, None)],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-9, "dual_feasibility_tolerance": 1e-9},
    )
    if not found.success:
        raise RuntimeError(f"scipy.optimize.linprog found no optimum: {found.message}")
    return float(found.x[n]), np.asarray(found.x[:n])


def _probabilities(rnn: AlgZooRNN, regions: xr.Dataset) -> Floats:
    patterns = regions["pattern"].values.reshape(regions.sizes["region"], -1)
    if rnn.spec.n != 2:
        return np.full(len(patterns), np.nan)
    middle, width = _sectors(rnn, regions)
    at = activation_patterns(rnn, middle).values.reshape(len(middle), -1)
    return np.asarray(((at == patterns[:, None]).all(-1) * width).sum(-1) / (2 * np.pi))


def _sectors(rnn: AlgZooRNN, regions: xr.Dataset) -> tuple[Floats, Floats]:
    """Cut the plane wherever a pre-activation or a difference of outputs may change its sign, and where x_0 = x_1.

    Gives an input in the middle of each sector [sector, time] and the sectors' angles [sector].
    """
    pre = _pre_activations(_wide(rnn.W_ih), _wide(rnn.W_hh), regions["pattern"].values).reshape(-1, 2)
    maps = regions["linear_map"].values
    difference = (maps[:, :, None] - maps[:, None]).reshape(-1, 2)
    normals = np.vstack([pre, difference, [1.0, -1.0]])
    normals = normals[np.linalg.norm(normals, axis=1) > _NONE]
    angle = np.arctan2(normals[:, 1], normals[:, 0])
    cuts = np.unique(np.concatenate([angle + np.pi / 2, angle - np.pi / 2]) % (2 * np.pi))
    width = np.diff(cuts, append=cuts[0] + 2 * np.pi)
    middle = cuts + width / 2
    return np.stack([np.cos(middle), np.sin(middle)], axis=1), width
