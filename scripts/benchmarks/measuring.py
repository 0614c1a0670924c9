"""Variants of a piece of work, measured in turn within one run, and shown as ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from rich.table import Table

Measurement: TypeAlias = Callable[[], float]
"""Does the work once and gives the seconds it took."""
Rows: TypeAlias = list[dict[str, object]]
"""Of a table, for machines."""
Tables: TypeAlias = dict[str, Rows]
"""By what they are called in the file of figures."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says. `chosen`: parts of the names of the variants that are measured; none: all."""

    source: str
    batch: int
    context: int
    batches: int
    rounds: int
    device: str
    dtype: str = "float32"
    layers: tuple[int, ...] = (7, 15, 22)
    nonzeros: float = 1e8
    units: int = 24
    shapes: tuple[str, ...] = ()
    many: int = 500
    chosen: tuple[str, ...] = ()

    @property
    def n_token(self) -> int:
        """Tokens of a measurement."""
        return self.batch * self.context * self.batches


Subject: TypeAlias = Callable[[Settings, Path], Tables]
"""Measures, prints its tables and gives them. The folder is empty, and removed afterwards."""


@dataclass(frozen=True)
class Goal:
    """How many times as fast as `beside` a variant is meant to be."""

    variant: str
    beside: str
    ratio: float


def measure(variants: Mapping[str, Measurement], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, every round beginning with another one."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(variants[name]())
    return times


def compare(
    settings: Settings,
    variants: Mapping[str, Measurement],
    n_token: int,
    *,
    goals: Sequence[Goal] = (),
    ceiling: str | None = None,
) -> Rows:
    """Measures the variants that were chosen, the first of them always, after a round to warm up; prints and gives
    them, as `measured` and `reached` do."""
    first, *_ = variants
    kept = {name: work for name, work in variants.items() if name == first or wanted(settings, name)}
    measure(kept, 1)
    times = measure(kept, settings.rounds)
    return measured(times, n_token, ceiling) + reached(times, goals)


def wanted(settings: Settings, name: str) -> bool:
    """Whether a variant was chosen."""
    return not settings.chosen or any(part in name for part in settings.chosen)


def measured(times: Mapping[str, list[float]], n_token: int, ceiling: str | None = None) -> Rows:
    """Prints speed as a ratio to the first variant, the median over rounds of the ratio within a round, with absolute
    figures beside it, and as a share of the speed of `ceiling`, another variant; gives the same for machines."""
    base, *_ = times
    bounded = ceiling in times
    table = Table(box=None, pad_edge=False, title=f"speed as a ratio to: {base}", title_justify="left")
    for name in ("variant", "ratio", "min–max", "tokens/s", *(["of the ceiling"] if bounded else [])):
        table.add_column(name, justify="left" if name == "variant" else "right")
    rows: Rows = []
    for name, seconds in times.items():
        found = ratios(times[base], seconds)
        rate = n_token / statistics.median(seconds)
        cells = [name, f"{statistics.median(found):.3f}", f"{min(found):.2f}–{max(found):.2f}", f"{rate:,.0f}"]
        row = {"variant": name, "ratio": statistics.median(found), "ratios": found, "tokens_per_second": rate}
        if bounded:
            assert ceiling is not None
            row["of_ceiling"] = share = statistics.median(ratios(times[ceiling], seconds))
            cells.append(f"{share:.2f}")
        table.add_row(*cells)
        rows.append(row)
    show(table)
    return rows


def reached(times: Mapping[str, list[float]], goals: Sequence[Goal]) -> Rows:
    """Prints, and gives, how near the goals are whose variants were measured: medians over rounds of the ratio within
    a round."""
    table = Table(box=None, pad_edge=False, title="goals", title_justify="left")
    for name in ("variant", "beside", "goal", "ratio", "min–max", ""):
        table.add_column(name, justify="left" if name in ("variant", "beside") else "right")
    rows: Rows = []
    for goal in goals:
        if goal.variant not in times or goal.beside not in times:
            continue
        found = ratios(times[goal.beside], times[goal.variant])
        middle = statistics.median(found)
        said = "reached" if middle >= goal.ratio else "missed"
        spread = f"{min(found):.2f}–{max(found):.2f}"
        table.add_row(goal.variant, goal.beside, f"{goal.ratio:.2f}", f"{middle:.3f}", spread, said)
        rows.append({"goal": goal.variant, "beside": goal.beside, "at_least": goal.ratio, "ratio": middle})
    if rows:
        show(table)
    return rows


def show(table: Table) -> None:
    """Print a table, wider than the terminal where it must be."""
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def ratios(base: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """How many times as fast as the base, round by round."""
    return [b / s for b, s in zip(base, seconds, strict=True)]


def timed(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of a piece of work, to the end of what it has set going on a device."""
    on = torch.device(device)
    finish(on)
    started = time.perf_counter()
    work()
    finish(on)
    return time.perf_counter() - started


def finish(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
