"""Models with random weights in the sizes of real ones, for machines with a GPU: how fast they run, and how much of the
time the device idles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from forebay.stages.models.families import parse_config
from forebay.stages.models.families.layout import name_tensors
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.taps import HookSpec

from . import forwards
from .measuring import Rows, Settings, Tables, timed


def _llama(
    d_model: int, n_layers: int, heads: int, kv_heads: int, d_head: int, d_mlp: int, vocab: int, tied: bool = True
) -> Mapping[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "intermediate_size": d_mlp,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "hidden_act": "silu",
    }


SHAPES: Mapping[str, Mapping[str, object]] = {
    "tiny": _llama(64, 4, 4, 2, 16, 160, 512),
    "thin": _llama(576, 10, 9, 1, 64, 64, 512),
    "toy": _llama(64, 30, 4, 2, 16, 160, 512),
    "0.5B": _llama(896, 24, 14, 2, 64, 4864, 151_936),  # as Qwen 2.5
    "1B": _llama(2048, 16, 32, 8, 64, 8192, 128_256),  # as Llama 3.2
    "8B": _llama(4096, 32, 32, 8, 128, 14_336, 128_256, tied=False),  # as Llama 3.1
}
"""Settings of a config.json. All are computed as Llama is, whatever the model of that size is."""


def random_models(settings: Settings, folder: Path) -> Tables:
    """Bare forwards, captures to disk and the share of time in which the device idles, of each shape that is asked for;
    of float32 in bfloat16."""
    dtype = "bfloat16" if settings.dtype == "float32" else settings.dtype
    tables: Tables = {}
    for name in settings.shapes:
        Console().print(f"[bold]{name}[/bold], random weights, {dtype}")
        made = saved(folder / name, SHAPES[name], settings.device, dtype)
        n = open_checkpoint(made).spec.n_layers
        here = replace(settings, source=str(made), dtype=dtype, layers=(n // 4, n // 2, 3 * n // 4))
        for subject in (forwards.forward, forwards.capture):
            within = folder / f"{name}-{subject.__name__}"
            within.mkdir()
            tables |= {f"{table} {name}": rows for table, rows in subject(here, within).items()}
        if settings.device.startswith("cuda"):
            with forwards.loading_once():
                tables[f"idle {name}"] = idleness(here, folder / f"{name}-idle")
    return tables


def saved(folder: Path, config: Mapping[str, object], device: str, dtype: str) -> Path:
    """A checkpoint of transformers' with weights drawn on the device, and a tokenizer that gives a token a byte."""
    folder.mkdir(parents=True)
    shown = dict(zip(range(256), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in shown.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    spec, layout = parse_config(config, {}, folder)
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for weight, tensor in name_tensors(spec, layout).items():
        shape = spec.weight_shapes()[weight]
        value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * shape[-1] ** -0.5
        tensors[tensor] = (value if len(shape) > 1 else torch.ones_like(value)).to(getattr(torch, dtype)).cpu()
    save_file(tensors, folder / "model.safetensors")
    return folder


def idleness(settings: Settings, folder: Path) -> Rows:
    """The share of time in which a GPU does nothing, in a bare forward and in a capture to disk."""
    folder.mkdir()
    model, rows = forwards.prepared(settings, folder)
    plan = forwards.planned(folder, settings, forwards.Layers(settings.layers, 0), settings.dtype)
    works: dict[str, Callable[[], object]] = {
        "forward": lambda: forwards.run(model, rows, HookSpec().capture("hook_final_norm")),
        f"layers {settings.layers} to disk": lambda: forwards.stored(plan),
    }
    found: Rows = []
    for name, work in works.items():
        work()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            timed(work, settings.device)
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiled.events()
            if event.device_type == DeviceType.CUDA
        ]
        found.append({"work": name, "idle": 1 - busy(spans)})
        Console().print(f"{name}: the device idles {1 - busy(spans):.1%} of the time")
    return found


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first beginning to the last end in which at least one span lies."""
    ordered = sorted(spans)
    covered, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered / (end - ordered[0][0])
