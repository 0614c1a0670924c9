"""How much memory captures take at their fullest, each in a process of its own, and whether it grows with batches."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TypeVar

import torch
from rich.table import Table

from forebay.pipeline.executors.this_process import run_step
from forebay.pipeline.progress import Quiet
from forebay.stages.models.memory import memory_in_use
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.spec import ModelSpec
from forebay.stages.models.taps import HookSpec

from . import forwards, rivals
from .measuring import Rows, Settings, Tables, show, wanted
from .shapes import SHAPES, saved

Result = TypeVar("Result")
MANY = "many batches of a tiny model"
UNIT = 20
"""Batches of it in a unit: a buffer that is being filled for the first time grows."""


def peaks(settings: Settings, folder: Path) -> Tables:
    """The most memory that a process ever had in which nothing else was done, for a piece of work each; for units of
    full size, which is what buffers are as large as; and how it changes over many batches."""
    title = f"resident memory, {settings.batch} × {settings.context} tokens, MB"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in ("work", "at its fullest", "above the weights", "of which a unit's values"):
        table.add_column(name, justify="left" if name == "work" else "right")
    rows: Rows = []
    for name, work in WORKS.items():
        if not wanted(settings, name):
            continue
        found = apart(work, settings, folder / name.replace(" ", "-"))
        cells = (found.peak, found.peak - found.weights, found.unit)
        table.add_row(name, *(f"{n / 1e6:,.0f}" for n in cells))
        rows.append({"work": name, "peak": found.peak, "weights": found.weights, "unit": found.unit})
    if wanted(settings, MANY):
        early, middle, late = apart(over_batches, settings, folder / "many")
        table.add_row(f"{MANY}: after 10 % of {settings.many}", f"{early / 1e6:,.0f}")
        table.add_row("after half of them", f"{middle / 1e6:,.0f}", f"{(middle - early) / 1e6:+,.1f} since")
        table.add_row("and at their end", f"{late / 1e6:,.0f}", f"{(late - middle) / 1e6:+,.1f} since")
        rows.append({"work": MANY, "batches": settings.many, "early": early, "middle": middle, "late": late})
    show(table)
    return {"memory": rows}


@dataclass(frozen=True)
class Found:
    """Bytes: the most that a process had, the weights of its model, the values of a unit that it wrote."""

    peak: int
    weights: int
    unit: int = 0


def loaded(settings: Settings, folder: Path) -> Found:
    model, _ = forwards.prepared(settings, folder)
    return Found(memory_in_use().peak_resident, weights(model.spec, settings))


def bare(settings: Settings, folder: Path) -> Found:
    model, rows = forwards.prepared(settings, folder)
    forwards.run(model, rows, HookSpec().capture("hook_final_norm"))
    return Found(memory_in_use().peak_resident, weights(model.spec, settings))


def some_layers(settings: Settings, folder: Path) -> Found:
    return captured(settings, folder, settings.layers)


def all_layers(settings: Settings, folder: Path) -> Found:
    return captured(settings, folder, tuple(range(open_checkpoint(settings.source).spec.n_layers)))


def full_units(settings: Settings, folder: Path) -> Found:
    """All ten layers of a thin model, as wide as the usual one, in two units of full size and a bit."""
    source = saved(folder / "thin", SHAPES["thin"], settings.device, "float32")
    batches = 61_440 // (settings.batch * settings.context)
    thin = replace(settings, source=str(source), dtype="float32", batches=batches)
    return captured(thin, folder / "full", tuple(range(10)))


def by_hand(settings: Settings, folder: Path) -> Found:
    """With transformers, the weights of which are all that is left of forebay's model when it begins."""
    model, rows = forwards.prepared(settings, folder)
    rival, spec = rivals.transformers_of(model), model.spec
    del model
    rivals.handwritten(rival, rows, range(spec.n_layers), folder / "by-hand")
    return Found(memory_in_use().peak_resident, weights(spec, settings))


def captured(settings: Settings, folder: Path, numbers: tuple[int, ...]) -> Found:
    folder.mkdir(exist_ok=True)
    plan = forwards.planned(folder / "run", settings, forwards.Layers(numbers, 0), settings.dtype)
    forwards.stored(plan)
    return Found(
        memory_in_use().peak_resident,
        weights(open_checkpoint(settings.source).spec, settings),
        plan.steps[1].unit_bytes,
    )


Work = Callable[[Settings, Path], Found]
WORKS: dict[str, Work] = {
    "the model loaded": loaded,
    "bare forward": bare,
    "the layers asked for to disk": some_layers,
    "all layers to disk": all_layers,
    "all layers to disk, handwritten": by_hand,
    "ten layers of a thin model to disk, full units": full_units,
}


def weights(spec: ModelSpec, settings: Settings) -> int:
    itemsize: int = getattr(torch, settings.dtype).itemsize
    return spec.n_parameters * itemsize


def over_batches(settings: Settings, folder: Path) -> tuple[int, int, int]:
    """Bytes in use after a tenth of many batches of a tiny model, after half of them, and after the last."""
    source = str(saved(folder / "tiny", SHAPES["tiny"], settings.device, "float32"))
    tiny = replace(settings, source=source, dtype="float32", batch=4, context=32, batches=settings.many)
    layers, unit = forwards.Layers((0, 1, 2), 4), UNIT * tiny.batch * tiny.context
    plan = forwards.planned(folder / "run", tiny, layers, "float32", unit_tokens=unit)
    watch = Watch()
    run_step(plan, plan.steps[1], watch, Event())
    return watch.seen[len(watch.seen) // 10], watch.seen[len(watch.seen) // 2], watch.seen[-1]


class Watch(Quiet):
    """Notes the memory in use whenever a batch is done."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def advance(self, n_token: int) -> None:
        self.seen.append(memory_in_use().resident)


def apart(work: Callable[[Settings, Path], Result], settings: Settings, folder: Path) -> Result:
    """Do it in a new process that does nothing else."""
    folder.mkdir()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, settings, folder).result()
