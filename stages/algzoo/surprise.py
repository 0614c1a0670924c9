"""How good an explanation of a network is, in bits: what it takes to say it, plus what it leaves surprising.

Surprise accounting (Jacob Hilton, "Formal verification, heuristic explanations and surprise accounting", Alignment
Research Center, 2024) adds up the surprise of an explanation and the surprise that is left given the explanation. Here:

    explanation_bits  the length of the estimator's description: its parameters at the precision they are used with
    residual_bits     Σ over inputs of −log2 of the probability that the estimator gave to what the network answers,
                      the cross-entropy of the network's answers under the estimator's predictive distribution
    total_bits        their sum: what it takes to send the network's answers to someone who knows the inputs
    baseline_bits     the same without an explanation: every class equally probable

An explanation is worth its length where total_bits is below baseline_bits, and says more than the weights do where it
is below parameter_bits, the network as an explanation of itself, its parameters told in as many bits a number. A
predictive distribution is a prediction and how far it is trusted: a class has the probability `confidence`, the others
share the rest evenly; around a number lies a Laplace distribution of scale `scale`, and numbers are told to RESOLUTION.
candle-mi's accounting computes no bits; the rest of its report is the same here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from .load import AlgZooNetwork
from .regions import region_facets, region_linear_map
from .spec import TASKS, AlgZooSpec
from .tasks import outputs, predictions, recurrent, sample_inputs, targets

Floats = NDArray[np.float64]

BITS = 16
"""Bits in which an estimator's numbers are told; region estimators compute with them as rounded to float16."""
RESOLUTION = 2.0**-8
"""The width of the cells in which the output for `median` is told."""


class MechanisticEstimator(Protocol):
    """An explanation of a network that predicts its answers from the inputs alone."""

    @property
    def description(self) -> str:
        """What the explanation says, in a line."""
        ...

    @property
    def n_bits(self) -> float:
        """The length of the explanation."""
        ...

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """The expected answers [input] to inputs [input, time]: classes (−1: none is expected), or numbers (NaN)."""
        ...

    def surprise(self, inputs: NDArray[Any], answers: NDArray[Any]) -> Floats:
        """−log2 of the probability of the network's answers [input] given the inputs, float64 [input]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleEstimator:
    """Explains a network by its task: it answers rightly. Told in 2 bits, one of four tasks, and a number's 16.

    `confidence`, between 0 and 1, is the probability of the right class; `scale` that of the Laplace distribution
    around the median. The one that fits best is the `agreement`, or the `mean_deviation`, that was found on other
    inputs. Raises SchemaError for numbers out of range.
    """

    spec: AlgZooSpec
    confidence: float = 0.99
    scale: float = 0.1

    def __post_init__(self) -> None:
        _check_trust(self.confidence, self.scale)

    @property
    def description(self) -> str:
        return f"the right answer to {self.spec.task}"

    @property
    def n_bits(self) -> float:
        return math.log2(len(TASKS)) + BITS

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        return targets(self.spec, inputs).values

    def surprise(self, inputs: NDArray[Any], answers: NDArray[Any]) -> Floats:
        return _surprise(self.spec, self.predict(inputs), answers, self.confidence, self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionEstimator:
    """Explains a recurrent network by some of its linear regions; made by `from_regions`.

    `normals` [region][facet, time] bound the regions, `maps` [region, output, time] are the linear maps in them, all
    rounded to float16. An input is in the first region all of whose normals have a product of at least 0 with it; of
    inputs in none of them nothing is expected, and every class is equally probable. Told in 16 bits a number: those of
    normals and maps, the number of facets a region, the number of regions, and how far a prediction is trusted.
    """

    spec: AlgZooSpec
    normals: tuple[Floats, ...]
    maps: Floats
    confidence: float = 0.99
    scale: float = 0.1

    @classmethod
    def from_regions(
        cls,
        network: AlgZooNetwork,
        regions: xr.Dataset,
        *,
        most: int | None = None,
        confidence: float = 0.99,
        scale: float = 0.1,
    ) -> RegionEstimator:
        """Keep the first `most` of the regions that `classify_regions` (the most frequent first) or
        `enumerate_regions` found; None: all. Takes some milliseconds a region and neuron.

        SchemaError for a `most` below 1, for numbers that float16 does not hold, and as `region_facets` raises.
        """
        rnn = recurrent(network, "RegionEstimator")
        _check_trust(confidence, scale)
        if most is not None and most < 1:
            raise SchemaError(f"most = {most}: at least one region is kept")
        patterns = regions["pattern"].isel(region=slice(most))
        found = [region_facets(rnn, pattern.values, thinnest=1e-8) for pattern in patterns]
        normals = tuple(_rounded(one["normal"].values[one["facet"].values]) for one in found)
        maps = _rounded(region_linear_map(rnn, patterns).values)
        return cls(spec=rnn.spec, normals=normals, maps=maps, confidence=confidence, scale=scale)

    @property
    def description(self) -> str:
        return f"the linear maps of {len(self.maps)} regions with {sum(map(len, self.normals))} facets"

    @property
    def n_bits(self) -> float:
        numbers = self.maps.size + sum(normal.size + 1 for normal in self.normals) + 2
        return float(BITS * numbers)

    def region_of(self, inputs: NDArray[Any]) -> NDArray[np.int64]:
        """The number of the region of each input [input], −1 for none of those kept."""
        found = np.full(len(inputs), -1)
        for number, normal in reversed(list(enumerate(self.normals))):
            found[(inputs @ normal.T >= 0).all(1)] = number
        return found

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        region = self.region_of(inputs)
        output = np.einsum("iot,it->io", self.maps[region], inputs)
        return np.where(region < 0, np.nan if self.spec.scalar else -1, predictions(self.spec, output))

    def surprise(self, inputs: NDArray[Any], answers: NDArray[Any]) -> Floats:
        return _surprise(self.spec, self.predict(inputs), answers, self.confidence, self.scale)


def surprise_accounting(
    network: AlgZooNetwork,
    estimator: MechanisticEstimator,
    inputs: object | None = None,
    *,
    n_input: int = 1000,
    seed: int = 0,
    tolerance: float = 0.1,
) -> xr.Dataset:
    """Compare an explanation's predictions with what a network answers, and account for both in bits (see the module).

    `inputs` are as `network.forward` takes them; None: `n_input` of the task's own (`sample_inputs`), drawn with
    `seed`. Gives `answer` and `prediction` [input], `surprise` [input] (bits), and as numbers, float64:
    `model_accuracy`; `estimate_accuracy`, that of the predictions, which is the explanation's estimate of it;
    `agreement`, the fraction of answers that were predicted, and `disagreement`; `chance_accuracy`; `explanation_bits`,
    `residual_bits`, `total_bits`, `baseline_bits`, `parameter_bits`; `n_params`. For `median` numbers within
    `tolerance` of each other count as equal, `chance_accuracy` is NaN, the baseline is a Laplace distribution of scale
    1 around 0, and `mean_deviation` is the mean of |answer − prediction|, NaN where classes are answered.

    A number of bits depends on how many inputs there are: the explanation is told once. Raises as `network.forward`
    does.
    """
    spec = network.spec
    given = sample_inputs(spec, n_input, seed=seed) if inputs is None else inputs
    read = network.read(given)
    x = read.cpu().numpy().astype(np.float64 if read.is_floating_point() else np.int64)
    answer, target = predictions(spec, outputs(network, given)), targets(spec, x).values
    predicted = estimator.predict(x)
    surprise = estimator.surprise(x, answer)
    numbers = {
        "model_accuracy": (_equal(spec, answer, target, tolerance), "fraction of inputs"),
        "estimate_accuracy": (_equal(spec, predicted, target, tolerance), "fraction of inputs"),
        "agreement": (agreement := _equal(spec, answer, predicted, tolerance), "fraction of inputs"),
        "disagreement": (1 - agreement, "fraction of inputs"),
        "chance_accuracy": (math.nan if spec.scalar else 1 / spec.n_output, "fraction of inputs"),
        "mean_deviation": (_deviation(answer, predicted) if spec.scalar else math.nan, "input value"),
        "explanation_bits": (estimator.n_bits, "bit"),
        "residual_bits": (surprise.sum(), "bit"),
        "total_bits": (estimator.n_bits + surprise.sum(), "bit"),
        "baseline_bits": (_baseline(spec, answer).sum(), "bit"),
        "parameter_bits": (BITS * spec.n_params, "bit"),
        "n_params": (spec.n_params, "parameters"),
    }
    made: dict[str, Any] = {
        name: ((), float(value), {"long_name": name.replace("_", " "), "units": units})
        for name, (value, units) in numbers.items()
    }
    kind = "input value" if spec.scalar else "class"
    made["answer"] = ("input", answer, {"long_name": "answer of the network", "units": kind})
    made["prediction"] = ("input", predicted, {"long_name": "prediction of the explanation", "units": kind})
    made["surprise"] = ("input", surprise, {"long_name": "surprise given the explanation", "units": "bit"})
    coords = {"input": np.arange(len(x))}
    return xr.Dataset(made, coords=coords, attrs={"estimator": estimator.description, "task": spec.task})


def _surprise(
    spec: AlgZooSpec, predicted: NDArray[Any], answers: NDArray[Any], confidence: float, scale: float
) -> Floats:
    """−log2 of the probability of answers [input]; that of the baseline where nothing is predicted."""
    if spec.scalar:
        return np.where(np.isnan(predicted), _baseline(spec, answers), _laplace_bits(answers - predicted, scale))
    wrong = (1 - confidence) / (spec.n_output - 1)
    told = -np.log2(np.where(predicted == answers, confidence, wrong))
    return np.where(predicted < 0, _baseline(spec, answers), told)


def _baseline(spec: AlgZooSpec, answers: NDArray[Any]) -> Floats:
    return _laplace_bits(answers, 1.0) if spec.scalar else np.full(len(answers), math.log2(spec.n_output))


def _laplace_bits(deviation: NDArray[Any], scale: float) -> Floats:
    """−log2 of the mass of a Laplace distribution in a cell of width RESOLUTION, this far from its centre."""
    away, half = abs(deviation) / scale, RESOLUTION / 2 / scale
    # Beside the centre: (e^(half − away) − e^(−half − away)) / 2; around it: 1 less what lies on either side.
    beside = away - half - np.log1p(-np.exp(-2 * half)) + math.log(2)
    around = -np.log1p(-np.exp(-half) * np.cosh(np.minimum(away, half)))
    return np.asarray(np.where(away >= half, beside, around) / math.log(2))


def _equal(spec: AlgZooSpec, one: NDArray[Any], other: NDArray[Any], tolerance: float) -> float:
    """The fraction that is equal; NaN and −1, where nothing is predicted, are equal to nothing."""
    return float((abs(one - other) <= tolerance).mean() if spec.scalar else (one == other).mean())


def _deviation(answer: NDArray[Any], predicted: NDArray[Any]) -> float:
    told = ~np.isnan(predicted)
    return float(abs(answer - predicted)[told].mean()) if told.any() else math.nan


def _rounded(values: Floats) -> Floats:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float64)
    if not np.isfinite(rounded).all():
        raise SchemaError(f"float16 does not hold {abs(values).max():.3g}: a region estimator's numbers are told in it")
    return rounded


def _check_trust(confidence: float, scale: float) -> None:
    if not 0 < confidence < 1:
        raise SchemaError(
            f"confidence = {confidence}: a probability above 0 and below 1, so that no answer is ruled out"
        )
    if not 0 < scale < math.inf:
        raise SchemaError(f"scale = {scale}: a finite number above 0")
