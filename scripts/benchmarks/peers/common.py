"""What the peers' scripts share: the model and the tokens that forebay has written, rounds in which every variant is
measured beside the bare forward of transformers, figures as JSON.

Runs in the peers' own environments, where forebay is not installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Measurement, measure, ratios, timed

BARE = "transformers, no logits"
Work = Callable[[], Any]
"""Runs all batches; may give the last batch's stream after the last of the layers, which is then compared."""


@dataclass(frozen=True)
class Task:
    """`model` in a folder of transformers'; `batches` of token ids [sequence, position]; the `layers` whose residual
    streams are wanted; `scratch`, a folder to write to."""

    folder: Path
    model: Any
    batches: list[torch.Tensor]
    layers: tuple[int, ...]
    rounds: int
    out: Path
    scratch: Path

    @property
    def n_token(self) -> int:
        return sum(batch.numel() for batch in self.batches)


def task() -> Task:
    """What the command line asks for, with the model loaded."""
    parser = argparse.ArgumentParser()
    for name in ("folder", "tokens", "out", "scratch"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    return Task(
        folder=given.folder,
        model=model.requires_grad_(False),
        batches=[torch.tensor(batch) for batch in json.loads(given.tokens.read_text())],
        layers=tuple(int(layer) for layer in given.layers.split(",")),
        rounds=given.rounds,
        out=given.out,
        scratch=given.scratch,
    )


def keep_freed_memory() -> None:
    """As forebay does it, for all: nothing is trimmed, blocks of up to a GiB lie on the heap, which grows by 64 MiB."""
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for name, value in ((-1, -1), (-3, 2**30), (-2, 2**26)) if mallopt else ():
            mallopt(name, value)


def report(task: Task, package: str, variants: Mapping[str, Work]) -> None:
    """Measure in rounds, each beginning with another variant, after one to warm up and to compare; write the figures.

    A variant that this version cannot do says why, and is left out.
    """
    works = {BARE: lambda: bare(task), **variants}
    expected = stream(task)
    errors: dict[str, str] = {}
    differences: dict[str, float] = {}
    for name, work in works.items():
        try:
            found = work()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:300]
            print(f"{package}: {name}: {errors[name]}", file=sys.stderr)
            continue
        if isinstance(found, torch.Tensor):
            differences[name] = float((found.reshape(expected.shape) - expected).norm() / expected.norm())
    times = measure({name: timer(work) for name, work in works.items() if name not in errors}, task.rounds)
    rows = []
    for name, seconds in times.items():
        found = ratios(times[BARE], seconds)
        rows.append(
            {
                "variant": name,
                "ratio": statistics.median(found),
                "ratios": found,
                "tokens_per_second": task.n_token / statistics.median(seconds),
                "relative_difference": differences.get(name),
            }
        )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", package)}
    task.out.write_text(json.dumps({"versions": versions, "rows": rows, "errors": errors}, indent=1))


def timer(work: Work) -> Measurement:
    return lambda: timed(work)


def bare(task: Task) -> None:
    with torch.inference_mode():
        for batch in task.batches:
            task.model.model(batch, use_cache=False)


def stream(task: Task) -> torch.Tensor:
    """The last batch's residual stream after the last of the layers, as transformers has it."""
    with torch.inference_mode():
        found = task.model.model(task.batches[-1], use_cache=False, output_hidden_states=True)
    return found.hidden_states[max(task.layers) + 1]


def write(task: Task, batches: Callable[[], Any]) -> None:
    """Write what each batch gives, one tensor a layer, at the end of a file for each, flushed at the end of all."""
    files = {layer: open(task.scratch / f"{layer}.bin", "wb") for layer in task.layers}  # noqa: SIM115
    try:
        for tensors in batches():
            for layer, file in files.items():
                file.write(tensors[layer].detach().contiguous().view(torch.uint8).numpy())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
