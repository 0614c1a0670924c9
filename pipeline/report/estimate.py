"""What a plan will cost: units, bytes and memory exactly; time from this run's own records or a short measurement."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ...stages.capture import Capture
from ...stages.models.points import BEFORE, HookPoint
from ...stages.models.spec import ModelSpec
from ..plan import Plan, Step
from ..progress import duration
from .status import StepStatus, step_status
from .tables import size

EFFICIENCY = 0.75
"""Of the matrix-product rate, what a whole forward was seen to reach on a CPU (0.7 to 0.85)."""


def plan_table(plan: Plan) -> RenderableType:
    """One row a step: units done and in all, tokens, bytes before compression, memory for buffers, time left."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "units", "done", "tokens", "size", "buffers", "time left"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for step in plan.steps:
        state = step_status(step.folder, step.schema)
        table.add_row(
            step.stage.store,
            str(state.units),
            str(state.units_done),
            f"{state.n_token:,}",
            size(state.nbytes),
            size(2 * step.unit_bytes),
            _time(step, state, plan.device),
        )
    for stage in plan.waiting:
        table.add_row(stage.store, *["?"] * 5, escape(f"when [train.{stage.name}] is done"))
    arrays = [
        f"{step.stage.store}/{path}: {array.dtype} {dict(zip(array.dims, array.shape, strict=True))}"
        for step in plan.steps
        for path, array in step.schema.arrays.items()
    ]
    return Group(f"run folder: {escape(str(plan.folder))}   device: {plan.device}", table, *map(escape, arrays))


def _time(step: Step, state: StepStatus, device: str) -> str:
    if state.left is not None:
        return duration(state.left) if state.left else "done"
    if not isinstance(step.stage, Capture):
        return "seconds" if state.n_token < 10**7 else "?"
    spec = step.stage.model.open().spec
    last = max(points[-1] for points in step.stage.points(spec).values())
    flops = flops_per_token(spec, last)
    return f"about {duration(state.n_token * flops / (EFFICIENCY * matrix_product_rate(device, step.stage.dtype)))}"


def flops_per_token(spec: ModelSpec, last: HookPoint) -> int:
    """Floating-point operations of the matrix products that a token goes through up to a hook point, attention itself
    left out.
    """
    layers = 0 if last.kind in BEFORE else spec.n_layers if last.layer is None else last.layer + 1
    shapes = {name: shape for name, shape in spec.weight_shapes().items() if len(shape) == 2}
    block = sum(a * b for name, (a, b) in shapes.items() if name.startswith("blocks.0."))
    unembed = spec.d_model * spec.d_vocab if last.kind == "hook_logits" else 0
    return 2 * (layers * block + unembed)


def matrix_product_rate(device: str, dtype: str, seconds: float = 0.3) -> float:
    """Floating-point operations a second that this machine reaches in a product of two 1024 × 1024 matrices (median of
    a few).
    """
    import torch

    a = torch.ones(1024, 1024, device=device, dtype=getattr(torch, dtype))
    found: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(found) < 3:
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        found.append(2 * 1024**3 / (time.perf_counter() - started))
    return sorted(found)[len(found) // 2]
