"""Variants of a piece of work, measured in turn within one run, and shown as ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

Measurement = Callable[[], float]
"""Does the work once and gives the seconds it took."""


def measure(variants: dict[str, Measurement], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, every round beginning with another one."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(variants[name]())
    return times


def measured(times: dict[str, list[float]], n_token: int) -> list[dict[str, object]]:
    """Prints speed as a ratio to the first variant, the median over rounds of the ratio within a round, with absolute
    figures beside it; gives the same for machines."""
    base, *_ = times
    table = Table(box=None, pad_edge=False, title=f"speed as a ratio to: {base}", title_justify="left")
    for name in ("variant", "ratio", "min–max", "tokens/s"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    rows: list[dict[str, object]] = []
    for name, seconds in times.items():
        ratios = [b / s for b, s in zip(times[base], seconds, strict=True)]
        rate = n_token / statistics.median(seconds)
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        table.add_row(name, f"{statistics.median(ratios):.3f}", spread, f"{rate:,.0f}")
        rows.append({"variant": name, "ratio": statistics.median(ratios), "ratios": ratios, "tokens_per_second": rate})
    Console().print(table)
    return rows
