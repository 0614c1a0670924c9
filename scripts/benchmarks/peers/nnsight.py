"""nnsight at the work of `common`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nnsight import LanguageModel

from benchmarks.peers.common import Task, Work, report, task, write


def works(task: Task, model: LanguageModel) -> dict[str, Work]:
    """Each trace saves the outputs of the layers in their order; stopped ones end after the last of them."""
    layers = task.layers

    def captured(stop: bool) -> Iterator[dict[int, torch.Tensor]]:
        for batch in task.batches:
            with torch.inference_mode():
                found = stopped(model, batch, layers) if stop else whole(model, batch, layers)
            yield {layer: value if torch.is_tensor(value) else value[0] for layer, value in found.items()}

    def last(stop: bool) -> torch.Tensor:
        for tensors in captured(stop):
            value = tensors[max(layers)]
        return value

    return {
        f"nnsight: {len(layers)} layers": lambda: last(False),
        f"nnsight: {len(layers)} layers, stopped": lambda: last(True),
        f"nnsight: {len(layers)} layers, stopped, to disk": lambda: write(task, lambda: captured(True)),
    }


def whole(model: LanguageModel, batch: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    with model.trace(batch, use_cache=False):
        found = {}.save()
        for layer in layers:
            found[layer] = model.model.layers[layer].output
    return found


def stopped(model: LanguageModel, batch: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    with model.trace(batch, use_cache=False) as tracer:
        found = {}.save()
        for layer in layers:
            found[layer] = model.model.layers[layer].output
        tracer.stop()
    return found


if __name__ == "__main__":
    asked = task()
    loaded = LanguageModel(str(asked.folder), dispatch=True, dtype=torch.float32, attn_implementation="sdpa")
    report(asked, "nnsight", works(asked, loaded))
