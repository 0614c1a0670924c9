"""Forwards of a model: bare, with hooks, and captured to disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import torch

from forebay.pipeline.executors.this_process import run_step
from forebay.pipeline.plan import Plan, make_plan
from forebay.pipeline.progress import Quiet
from forebay.pipeline.recipe import parse
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .measuring import Measurement

NOVELS = Path(__file__).resolve().parents[2] / "docs" / "examples" / "novels.jsonl"


def to_disk(plan: Plan, model: Model, rows: Sequence[torch.Tensor], layers: str) -> dict[str, Measurement]:
    """The capture step, and the same forward without it."""
    deepest = max(int(layer) for layer in layers.split(","))
    return {
        f"forward, to layer {deepest}": lambda: forward(model, rows, deepest),
        "forward, all layers": lambda: forward(model, rows, model.spec.n_layers - 1),
        f"capture of layers {layers} to disk": lambda: capture(plan),
    }


def with_hooks(model: Model, rows: Sequence[torch.Tensor]) -> dict[str, Measurement]:
    """Forwards with more and more hooks."""
    everything = HookSpec().capture("*")
    return {
        "forward with logits": lambda: hooked(model, rows, None),
        "the same, an empty HookSpec": lambda: hooked(model, rows, HookSpec()),
        "every hook point captured": lambda: hooked(model, rows, everything),
        "and the contribution of each head": lambda: hooked(model, rows, everything.capture("*.hook_result")),
    }


def planned(
    folder: Path, source: str, batch: int, context: int, batches: int, layers: str, dtype: str, device: str
) -> Plan:
    """A run over just enough text for `batches` batches, its tokens already made."""
    wanted = batch * context * batches
    text = "\n\n".join(json.loads(line)["text"] for line in NOVELS.open(encoding="utf-8"))
    recipe = {
        "corpus": {"files": ["text.jsonl"]},
        "model": {"source": source},
        "tokenize": {"context": context, "layout": "documents", "long_documents": "truncate", "prepend_bos": False},
        "capture": {"hooks": [f"blocks.[{layers}].hook_resid_post"], "batch": batch, "dtype": dtype},
    }
    # Ten characters a token are more than any tokenizer needs: every document fills its sequence.
    size, start = 10 * context, 0
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for _ in range(wanted // context):
            file.write(json.dumps({"text": text[start : start + size]}) + "\n")
            start = (start + size) % (len(text) - size)
    plan = make_plan(parse(recipe, name="bench", folder=folder, file="bench"), folder / "run", device)
    assert plan.steps[0].schema.n_token == wanted, "the text made shorter sequences than the benchmark asks for"
    run_step(plan, plan.steps[0], Quiet(), Event())
    return plan


def batches_of(plan: Plan, batch: int, context: int, batches: int) -> list[torch.Tensor]:
    """The run's own tokens, as the capture will batch them: [sequence, position] each."""
    token_id = plan.source(plan.steps[1]).read(slice(0, batch * context * batches))["token_id"].values
    return list(torch.from_numpy(token_id.astype("int64")).reshape(batches, batch, context))


def forward(model: Model, rows: Sequence[torch.Tensor], layer: int) -> float:
    """Seconds of the bare forward up to a layer's end: one capture, which is dropped."""
    hooks = HookSpec().capture(f"blocks.{layer}.hook_resid_post")
    started = time.perf_counter()
    for token_ids in rows:
        model.forward(token_ids, hooks, logits=False, sink=lambda point, tensor: None)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def hooked(model: Model, rows: Sequence[torch.Tensor], hooks: HookSpec | None) -> float:
    """Seconds of whole forwards whose captures are collected in memory, one batch's at a time."""
    started = time.perf_counter()
    for token_ids in rows:
        model.forward(token_ids, hooks)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def capture(plan: Plan) -> float:
    """Seconds of the capture step: reading tokens, forward, dtype, shards, fsync, checksums, records; no loading."""
    step = plan.steps[1]
    shutil.rmtree(step.folder, ignore_errors=True)
    outcome = run_step(plan, step, Quiet(), Event())
    assert not outcome.failed
    assert not step.todo()
    return outcome.seconds
