"""A plan's costs from a profile: bytes, memory, hours on any number of workers, and what to store for many passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...stages.capture import Capture
from ...stages.encode import Encode
from ..plan import Plan, Step
from ..profile import Profile, StepProfile
from .costs import AtWorkers, Basis, Figure, Prices, Stored, Strategy, at_workers, cheapest, figure, stored
from .memory import PROCESS, memory_of

WORKERS = (1, 8, 64)
DENSE, FEATURES, RECOMPUTE = "store dense", "store features only", "recompute"


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is asked, and what is taken for granted: numbers of workers; passes over the data; the bandwidth in B/s that
    the folder gives all workers together (None: what one was measured to write); prices (None: hours are compared).
    """

    workers: tuple[int, ...] = WORKERS
    passes: int = 1
    bandwidth: float | None = None
    prices: Prices | None = None


@dataclass(frozen=True, kw_only=True)
class StepForecast:
    """One step: its units and tokens, its figures by name, and its time by number of workers."""

    name: str
    units: int
    unit_tokens: int
    n_token: int
    objects: int
    figures: Mapping[str, Figure]
    workers: tuple[AtWorkers, ...] = ()

    def to_json(self) -> dict[str, Any]:
        figures = {name: one.to_json() for name, one in self.figures.items()}
        sizes = {"units": self.units, "tokens": self.n_token, "objects": self.objects}
        counted = {unit: Figure(n, unit, "exact").to_json() for unit, n in sizes.items()}
        unit_tokens = Figure(self.unit_tokens, "tokens", "exact").to_json()
        at = [_at_json(one) for one in self.workers]
        return {"name": self.name, **counted, "unit_tokens": unit_tokens, "figures": figures, "workers": at}


def _at_json(at: AtWorkers) -> dict[str, Any]:
    seconds = {"compute": at.compute_seconds, "write": at.write_seconds, "whole": at.seconds}
    return {
        "workers": at.workers,
        **{f"{name}_time": figure(s, "s", "computed").to_json() for name, s in seconds.items()},
        "needed_bandwidth": figure(at.needed, "B/s", "computed").to_json(),
        "limit": at.limit,
    }


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A whole plan: its steps, and the strategies for passes over what it computes, where they can be compared."""

    folder: str
    device: str
    assumptions: Assumptions
    profile: Profile | None
    steps: tuple[StepForecast, ...]
    strategies: tuple[Strategy, ...] = ()
    waiting: tuple[str, ...] = field(default=())

    @property
    def best(self) -> Strategy | None:
        """The strategy that comes to least for the passes that are asked for."""
        if not self.strategies:
            return None
        return cheapest(self.strategies, self.assumptions.passes, self.assumptions.prices)

    @property
    def recompute(self) -> Strategy | None:
        return next((one for one in self.strategies if one.name == RECOMPUTE), None)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; no number but counts without its unit and basis."""
        asked, profile = self.assumptions, self.profile
        return {
            "folder": self.folder,
            "device": self.device,
            "profile": None if profile is None else {k: v for k, v in profile.to_json().items() if k != "steps"},
            "steps": [step.to_json() for step in self.steps],
            "waiting": list(self.waiting),
            "bandwidth": figure(asked.bandwidth, "B/s", "assumed").to_json(),
            "passes": asked.passes,
            "strategies": [self._strategy_json(one) for one in self.strategies],
            "cheapest": None if self.best is None else self.best.name,
        }

    def _strategy_json(self, one: Strategy) -> dict[str, Any]:
        prices, passes = self.assumptions.prices, self.assumptions.passes
        said = {
            "once": figure(one.once, "s", "computed"),
            "a_pass": figure(one.a_pass, "s", "computed"),
            "in_all": figure(one.seconds(passes), "s", "computed"),
            "kept": figure(one.nbytes, "B", "computed"),
            "price": figure(one.price(passes, prices) if prices else None, "€", "computed"),
        }
        against = self.recompute
        pays = one.pays_from(against, prices) if against is not None and one.name != RECOMPUTE else None
        figures = {name: value.to_json() for name, value in said.items()}
        return {"name": one.name, **figures, "pays_from": figure(pays, "passes", "computed").to_json()}


def forecast(plan: Plan, profile: Profile | None, assumptions: Assumptions) -> Forecast:
    """What a plan costs. Without a profile bytes and memory only; with one also rates, time, and passes."""
    measured = {step.stage.store: profile.step(step.stage.store) if profile else None for step in plan.steps}
    steps = tuple(_step(step, measured[step.stage.store], plan.device, assumptions) for step in plan.steps)
    return Forecast(
        folder=str(plan.folder),
        device=plan.device,
        assumptions=assumptions,
        profile=profile,
        steps=steps,
        strategies=strategies(plan.steps, measured),
        waiting=tuple(stage.store for stage in plan.waiting),
    )


def _step(step: Step, measured: StepProfile | None, device: str, assumptions: Assumptions) -> StepForecast:
    schema = step.schema
    found = stored(schema, measured.ratios, measured.nonzeros) if measured else stored(schema)
    figures = {
        **{f"on disk, {_compressed(name)}": one for name, one in found.nbytes.items()},
        **{
            f"a layer of {path.rpartition('/')[0]}, {_compressed(name)}": one
            for path, each in found.a_layer.items()
            for name, one in each.items()
        },
        **_memory(step, measured, device),
    }
    workers: tuple[AtWorkers, ...] = ()
    if measured is not None:
        a_token, written, basis = _bytes_a_token(step, found), *_bandwidth(step, measured, assumptions)
        figures |= {
            "tokens a second": figure(measured.tokens_per_second, "tokens/s", "measured"),
            "loading": figure(measured.load_seconds, "s", "measured"),
            "bytes a token": figure(a_token, "B/token", "computed"),
            "bandwidth needed by one worker": figure(
                None if a_token is None else a_token * measured.tokens_per_second, "B/s", "computed"
            ),
            "bandwidth of the folder, writing": figure(written, "B/s", basis),
            "bandwidth of the folder, reading": figure(
                measured.read.bandwidth if measured.read else None, "B/s", "measured"
            ),
        }
        workers = tuple(
            at_workers(
                n_token=schema.n_token,
                unit_tokens=schema.unit_tokens,
                workers=n,
                tokens_per_second=measured.tokens_per_second,
                bytes_per_token=a_token,
                bandwidth=written,
                load_seconds=measured.load_seconds or 0.0,
            )
            for n in assumptions.workers
        )
    return StepForecast(
        name=step.stage.store,
        units=len(schema.grid),
        unit_tokens=schema.unit_tokens,
        n_token=schema.n_token,
        objects=found.objects,
        figures=figures,
        workers=workers,
    )


def _compressed(name: str) -> str:
    return "uncompressed" if name == "none" else name


def _memory(step: Step, measured: StepProfile | None, device: str) -> dict[str, Figure]:
    """Upper bounds by the formula of memory.py, with the process as it was measured or is taken to be."""
    found = memory_of(step, device, measured.nonzeros if measured else None)
    before = measured.host_before if measured else None
    figures = {
        "host memory, at most": Figure(found.host + (before or PROCESS), "B", "computed" if before else "assumed")
    }
    if measured is not None:
        figures["host memory, peak"] = figure(measured.host_peak, "B", "measured")
    if not device.startswith("cpu"):
        figures["device memory, at most"] = Figure(found.device, "B", "computed")
        figures["device memory, peak"] = figure(measured.device_peak if measured else None, "B", "measured")
    return figures


def _on_disk(step: Step, found: Stored) -> float | None:
    """Bytes of the store in the recipe's own compression; None where no profile tells."""
    kept = found.nbytes.get(step.schema.compression)
    return None if kept is None else kept.value


def _bytes_a_token(step: Step, found: Stored) -> float | None:
    nbytes = _on_disk(step, found)
    return None if nbytes is None else nbytes / step.schema.n_token


def _bandwidth(step: Step, measured: StepProfile, assumptions: Assumptions) -> tuple[float | None, Basis]:
    if assumptions.bandwidth is not None:
        return assumptions.bandwidth, "assumed"
    written = measured.written.get(step.schema.compression)
    return (written.bandwidth if written else None), "measured"


def strategies(steps: Sequence[Step], measured: Mapping[str, StepProfile | None]) -> tuple[Strategy, ...]:
    """The ways to serve passes over what a recipe computes: dense activations or features kept, or nothing."""
    ran = [(step, one) for step in steps if (one := measured[step.stage.store]) is not None]
    captures = [each for each in ran if isinstance(each[0].stage, Capture)]
    encodes = [each for each in ran if isinstance(each[0].stage, Encode)]
    forward = sum(_compute_seconds(*each) for each in captures)
    found: list[Strategy] = []
    if captures and None not in (kept := [_kept(*each) for each in captures]):
        found.append(_strategy(DENSE, forward, [each for each in kept if each is not None]))
    for step, one in encodes:
        fused = isinstance(step.stage, Encode) and step.stage.fused
        compute = _compute_seconds(step, one) + (0.0 if fused else forward)
        forward = forward or compute
        name = FEATURES if len(encodes) == 1 else f"{FEATURES} ({step.stage.store})"
        if (alone := _kept(step, one)) is not None:
            found.append(_strategy(name, compute, [alone]))
    if not found:
        return ()
    return *found, Strategy(name=RECOMPUTE, once=0.0, a_pass=forward, nbytes=0.0)


def _strategy(name: str, compute: float, kept: Sequence[tuple[float, float, float]]) -> Strategy:
    """One that computes once while it writes, and then reads; `kept` are seconds to write, to read, and bytes."""
    write, read, nbytes = (sum(column) for column in zip(*kept, strict=True))
    return Strategy(name=name, once=max(compute, write), a_pass=read, nbytes=nbytes)


def _compute_seconds(step: Step, one: StepProfile) -> float:
    return step.schema.n_token / one.tokens_per_second


def _kept(step: Step, one: StepProfile) -> tuple[float, float, float] | None:
    """Seconds to write a store, to read it, and its bytes; None where they are unknown. What was not read is taken to
    be read as fast as it is written.
    """
    nbytes = _on_disk(step, stored(step.schema, one.ratios, one.nonzeros))
    written = one.written.get(step.schema.compression)
    write = written.bandwidth if written else None
    read = one.read.bandwidth if one.read else write
    if nbytes is None or write is None or read is None:
        return None
    return nbytes / write, nbytes / read, nbytes
