"""SAELens' runner that caches activations, at the work of `common`: one layer a pass, over transformers' model."""

from __future__ import annotations

import shutil

import datasets
import torch
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

from benchmarks.peers.common import Task, Work, report, task


def works(task: Task, layer: int) -> dict[str, Work]:
    """The layer in the middle, stopped after it: one, and, since it takes one a pass, the time of all in turn."""
    n_sequences, context = task.batches[0].shape
    rows = datasets.Dataset.from_dict({"tokens": torch.cat(task.batches).tolist()})
    width = task.model.config.hidden_size

    def runner(layer: int) -> CacheActivationsRunner:
        shutil.rmtree(task.scratch / "cached", ignore_errors=True)
        config = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=str(task.folder),
            model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
            model_batch_size=n_sequences,
            hook_name=f"model.layers.{layer}",
            d_in=width,
            training_tokens=task.n_token,
            context_size=context,
            new_cached_activations_path=str(task.scratch / "cached"),
            shuffle=False,
            device="cpu",
            prepend_bos=False,
            streaming=False,
            buffer_size_gb=(task.n_token + 1) * width * 4 / 1e9,
        )
        return CacheActivationsRunner(config, override_dataset=rows)

    made = {number: runner(number) for number in {layer, *task.layers}}

    def to_disk(numbers: tuple[int, ...]) -> None:
        for number in numbers:
            shutil.rmtree(task.scratch / "cached", ignore_errors=True)
            made[number].run()

    return {
        f"SAELens: layer {layer}, stopped, to disk": lambda: to_disk((layer,)),
        f"SAELens: layers {','.join(map(str, task.layers))}, a pass each, to disk": lambda: to_disk(task.layers),
    }


if __name__ == "__main__":
    asked = task()
    report(asked, "sae_lens", works(asked, asked.layers[len(asked.layers) // 2]))
