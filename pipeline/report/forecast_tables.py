"""Forecasts as tables: every figure with its unit, and whether it is exact, measured, computed or assumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ..progress import duration
from .costs import Figure
from .forecast import RECOMPUTE, Forecast
from .tables import size

SHOWN: Mapping[str, Callable[[float], str]] = {
    "B": size,
    "B/s": lambda value: f"{size(value)}/s",
    "B/token": lambda value: f"{value:,.1f} B/token",
    "s": duration,
    "tokens/s": lambda value: f"{value:,.0f} tokens/s",
    "€": lambda value: f"{value:,.2f} €",
    "passes": lambda value: f"{value:,.0f} passes",
}
BASES = (
    "exact: follows from the geometry; measured: by the profile; computed: from those by the formulas of "
    "docs/planning.md; assumed: taken for granted."
)


def shown(one: Figure) -> str:
    """A figure as a person reads it, with its unit."""
    return "unknown" if one.value is None else SHOWN[one.unit](one.value)


def forecast_tables(found: Forecast) -> RenderableType:
    """What was measured where, the figures of each step, its time by workers, and passes."""
    parts: list[RenderableType] = [_taken(found), "", _figures(found), BASES]
    if found.profile is not None:
        parts += ["", _workers(found), _shared(found)]
    if found.strategies:
        parts += ["", _passes(found), *_advice(found)]
    parts += [f"{name}: not measured, for its dictionary is not trained yet" for name in map(escape, found.waiting)]
    return Group(*parts)


def _taken(found: Forecast) -> str:
    profile = found.profile
    if profile is None:
        return "no profile: bytes and memory only. Measure with --measure, or give --profile"
    how = "measured" if profile.origin == "measured" else f"from the records of {profile.folder},"
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(profile.taken))
    return escape(
        f"profile: {how} {when} UTC on {', '.join(profile.hosts)} ({profile.device_name}), torch "
        f"{profile.versions.get('torch', 'unknown')}, {profile.model['source']}"
    )


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return table


def _figures(found: Forecast) -> Table:
    table = _table("of the step", "", "figure", "basis", left=2)
    for step in found.steps:
        counts = f"{step.n_token:,} tokens in {step.units:,} units of {step.unit_tokens:,}, {step.objects:,} objects"
        table.add_row(escape(step.name), counts, "", "exact")
        for name, one in step.figures.items():
            table.add_row("", escape(name), shown(one), one.basis)
    return table


def _workers(found: Forecast) -> Table:
    table = _table("time of a whole step", "workers", "time", "bandwidth needed", "limit")
    total = dict.fromkeys(found.assumptions.workers, 0.0)
    for step in found.steps:
        for at in step.workers:
            total[at.workers] += at.seconds
            needed = "unknown" if at.needed is None else f"{size(at.needed)}/s"
            table.add_row(escape(step.name), f"{at.workers:,}", duration(at.seconds), needed, at.limit)
    for workers, seconds in total.items():
        table.add_row("all measured steps", f"{workers:,}", duration(seconds), "", "")
    return table


def _shared(found: Forecast) -> str:
    if found.assumptions.bandwidth is not None:
        return f"computed; assumed: all workers together write {size(found.assumptions.bandwidth)}/s (--bandwidth)."
    return (
        "computed; assumed: workers are equal, and share the bandwidth that one was measured to write with. "
        "--bandwidth says what the folder gives all of them."
    )


def _passes(found: Forecast) -> Table:
    asked = found.assumptions
    columns = ["to serve passes over the data", "once", "a pass", f"{asked.passes:,} passes", "kept", "pays from"]
    table = _table(*columns, *(["price"] if asked.prices else []))
    for said in found.to_json()["strategies"]:
        cells = {name: shown(Figure(**said[name])) for name in ("once", "a_pass", "in_all", "kept", "price")}
        pays = said["pays_from"]["value"]
        from_passes = "" if said["name"] == RECOMPUTE else "never" if pays is None else f"{pays:,} passes"
        row = [said["name"], cells["once"], cells["a_pass"], cells["in_all"], cells["kept"], from_passes]
        table.add_row(*map(escape, row), *([cells["price"]] if asked.prices else []))
    return table


def _advice(found: Forecast) -> list[str]:
    asked, best = found.assumptions, found.best
    assert best is not None
    by = "device time"
    if asked.prices is not None:
        by = (
            f"price (assumed: {asked.prices.gpu:g} €/h a device, {asked.prices.storage:g} €/TB-month for "
            f"{asked.prices.months:g} months)"
        )
    lines = [
        f"cheapest for {asked.passes:,} passes by {by}: {best.name}. Computed for one worker; a pass reads as fast as "
        "was measured."
    ]
    if found.profile is not None and any(step.read is None for step in found.profile.steps):
        lines.append("assumed: what was not read is read as fast as it was written.")
    return lines
