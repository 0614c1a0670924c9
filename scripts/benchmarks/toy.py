"""What is left of a forward where the arithmetic takes no time, as on a GPU: a toy of 30 layers, 64 channels wide."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from forebay.stages.models.taps import HookSpec

from . import forwards, rivals
from .measuring import Rows, Settings, Tables, measure, show, timed
from .shapes import SHAPES, saved

LAYERS = (7, 15, 22)
CALLS = 10
"""In a measurement."""
ROUNDS = 20


def overhead(settings: Settings, folder: Path) -> Tables:
    """Milliseconds a call above the bare forward of the same library, over 2 sequences of 16 tokens."""
    source = str(saved(folder / "toy", SHAPES["toy"], settings.device, "float32"))
    small = replace(settings, source=source, dtype="float32", batch=2, context=16, batches=1)
    model, rows = forwards.prepared(small, folder)
    rival = rivals.transformers_of(model)
    final, three = HookSpec().capture("hook_final_norm"), HookSpec().capture("blocks.[7,15,22].hook_resid_post")
    whole = three.capture("hook_final_norm")
    works: dict[str, Callable[[], object]] = {
        "transformers": lambda: rivals.bare(rival, rows),
        "handwritten, 3 layers": lambda: rivals.handwritten(rival, rows, (*LAYERS, model.spec.n_layers - 1)),
        "forebay": lambda: forwards.run(model, rows, final, collect=True),
        "forebay, 3 layers": lambda: forwards.run(model, rows, whole, collect=True),
        "forebay, 3 layers, stopped": lambda: forwards.run(model, rows, three, collect=True),
        "forebay, every hook point": lambda: forwards.run(model, rows, HookSpec().capture("*"), collect=True),
    }

    def of(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: timed(lambda: [work() for _ in range(CALLS)], model.device) / CALLS

    variants = {name: of(work) for name, work in works.items()}
    measure(variants, 1)
    return {"toy": above(measure(variants, ROUNDS))}


def above(times: dict[str, list[float]]) -> Rows:
    """Prints and gives milliseconds a call, and how many more they are than the library's bare forward of the round."""
    table = Table(box=None, pad_edge=False, title="a toy of 30 layers, 64 wide", title_justify="left")
    for name in ("variant", "ms a call", "above the bare forward", "min–max"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    rows: Rows = []
    for name, seconds in times.items():
        base = times["forebay" if name.startswith("forebay") else "transformers"]
        more = [1000 * (s - b) for s, b in zip(seconds, base, strict=True)]
        took, middle = 1000 * statistics.median(seconds), statistics.median(more)
        table.add_row(name, f"{took:.1f}", f"{middle:+.2f}", f"{min(more):+.1f}–{max(more):+.1f}")
        rows.append({"variant": name, "ms": took, "ms_above": middle, "all_ms_above": more})
    show(table)
    return rows
