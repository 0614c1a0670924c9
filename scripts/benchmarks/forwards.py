"""Forwards of a model beside those of transformers: bare, with hooks, and captured to memory and to disk."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from rich.console import Console

from forebay.pipeline.executors.this_process import run_step
from forebay.pipeline.plan import Plan, make_plan
from forebay.pipeline.progress import Quiet
from forebay.pipeline.recipe import parse
from forebay.stages.dictionaries.save import save_dictionary
from forebay.stages.models import load
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from . import ceilings, encoding, rivals
from .measuring import Goal, Measurement, Settings, Tables, compare, timed

NOVELS = Path(__file__).resolve().parents[2] / "docs" / "examples" / "novels.jsonl"
TRANSFORMERS = "transformers, no logits"
BARE = "forebay, no logits"
COMPILED = "forebay compiled, no logits"
PRODUCTS = "the products of its layers alone"
FEATURES = (16_384, 32, "topk")
"""Of the dictionary that encodes behind a forward: how many, how many at a token, how they are chosen."""


@dataclass(frozen=True)
class Layers:
    """The layers whose residual stream is captured."""

    numbers: tuple[int, ...]
    n_layers: int

    def __str__(self) -> str:
        if len(self.numbers) == self.n_layers:
            return "all layers"
        return f"layer{'s' * (len(self.numbers) > 1)} {','.join(map(str, self.numbers))}"

    @property
    def pattern(self) -> str:
        return f"blocks.[{','.join(map(str, self.numbers))}].hook_resid_post"


def forward(settings: Settings, folder: Path) -> Tables:
    """Bare forwards, with and without the unembedding, beside the matrix products alone."""
    model, rows = prepared(settings, folder)
    rival = rivals.transformers_of(model)
    on, n_rows = model.device, settings.batch * settings.context
    multiply = ceilings.products(model, n_rows)
    compiled = loaded(settings, compile=True)
    end = HookSpec().capture("hook_final_norm")
    variants: dict[str, Measurement] = {
        TRANSFORMERS: lambda: timed(lambda: rivals.bare(rival, rows), on),
        "transformers, with logits": lambda: timed(lambda: rivals.bare(rival, rows, logits=True), on),
        BARE: lambda: timed(lambda: run(model, rows, end), on),
        COMPILED: lambda: timed(lambda: run(compiled, rows, end), on),
        "forebay, with logits": lambda: timed(lambda: run(model, rows, None, logits=True), on),
        PRODUCTS: lambda: timed(lambda: [multiply() for _ in rows], on),
    }
    goals = (Goal(BARE, TRANSFORMERS, 1.1), Goal("forebay, with logits", "transformers, with logits", 1.1))
    rates = compare(settings, variants, settings.n_token, goals=goals, ceiling=PRODUCTS)
    linear = ceilings.flops(model, n_rows)
    every = 1 + ceilings.attention_flops(model, settings.batch, settings.context) / linear
    for row in rates:
        if row.get("variant") == PRODUCTS:
            row["gflops"] = float(str(row["tokens_per_second"])) * linear / n_rows / 1e9
        elif "of_ceiling" in row and "with logits" not in str(row["variant"]):
            row["mfu"] = float(str(row["of_ceiling"])) * every
            Console().print(f"MFU with attention's products, {row['variant']}: {row['mfu']:.2f}")
    return {"forward": rates}


def hooks(settings: Settings, folder: Path) -> Tables:
    """Whole forwards with more and more hooks, whose captures are collected in memory, one batch's at a time."""
    model, rows = prepared(settings, folder)
    everything = HookSpec().capture("*")
    specs = {
        "forward with logits": None,
        "the same, an empty HookSpec": HookSpec(),
        "every hook point captured": everything,
        "and the contribution of each head": everything.capture("*.hook_result"),
    }

    def of(spec: HookSpec | None) -> Measurement:
        return lambda: timed(lambda: run(model, rows, spec, logits=True), model.device)

    return {"hooks": compare(settings, {name: of(spec) for name, spec in specs.items()}, settings.n_token)}


def capture(settings: Settings, folder: Path) -> Tables:
    """Captures of residual streams, in memory and through the whole step to disk, beside bare forwards to the same
    depth and what a good user writes by hand."""
    with loading_once():
        variants, goals = captures(settings, folder)
        return {"capture": compare(settings, variants, settings.n_token, goals=goals)}


def captures(settings: Settings, folder: Path) -> tuple[dict[str, Measurement], tuple[Goal, ...]]:
    """All of them, and what those of float32 are meant to reach."""
    model, rows = prepared(settings, folder)
    n, chosen = model.spec.n_layers, settings.layers
    one, three = Layers(chosen[len(chosen) // 2 :][:1], n), Layers(chosen, n)
    last, every = Layers((*chosen[:-1], n - 1), n), Layers(tuple(range(n)), n)
    variants = by_hand(model, rows, (three, last, every), folder)
    for name, end in {to_depth(layers): max(layers.numbers) for layers in (one, three, every)}.items():
        only_end = HookSpec().capture(f"blocks.{end}.hook_resid_post")
        variants[name] = lambda spec=only_end: timed(lambda: run(model, rows, spec), model.device)  # type: ignore[misc]
    for layers in (one, three, every):
        spec = HookSpec().capture(layers.pattern)
        variants[f"forebay: {layers} in memory"] = lambda spec=spec: timed(  # type: ignore[misc]
            lambda: run(model, rows, spec, collect=True), model.device
        )
    kept = [(settings.dtype, layers, False) for layers in (one, three, last, every)]
    kept += [("bfloat16", three, False), *((settings.dtype, layers, True) for layers in (three, every))]
    for dtype, layers, compiled in kept:
        plan = planned(folder, settings, layers, dtype, compile=compiled)
        variants[to_disk(layers, dtype, settings, compiled)] = lambda plan=plan: stored(plan)  # type: ignore[misc]
    case = encoding.Case(model.spec.d_model, *FEATURES)
    save_dictionary(encoding.dictionary_of(case, f"blocks.{one.numbers[0]}.hook_resid_post"), folder / "sae")
    plan = planned(folder, settings, one, settings.dtype, dictionary=folder / "sae")
    variants[f"forebay: {one}, encoded behind the forward ({case}), to disk"] = lambda plan=plan: stored(plan)  # type: ignore[misc]
    n_bytes = settings.n_token * model.spec.d_model * len(three.numbers) * model.dtype.itemsize
    variants[f"raw bytes of {three}, flushed"] = lambda: timed(lambda: ceilings.raw_bytes(folder / "raw.bin", n_bytes))
    return variants, goals_of(settings, three, last, every) if settings.dtype == "float32" else ()


def goals_of(settings: Settings, three: Layers, last: Layers, every: Layers) -> tuple[Goal, ...]:
    disk = {layers: to_disk(layers, settings.dtype, settings) for layers in (three, last, every)}
    return (
        Goal(disk[three], to_depth(three), 0.97),
        Goal(disk[every], to_depth(every), 0.90),
        Goal(disk[three], TRANSFORMERS, 1.40),
        Goal(disk[last], TRANSFORMERS, 1.05),
        Goal(to_disk(three, "bfloat16", settings), TRANSFORMERS, 2.8),
        *(Goal(name, f"handwritten: {layers} to disk", 1.0) for layers, name in disk.items()),
    )


def to_depth(layers: Layers) -> str:
    """The name of the bare forward to the last of the layers."""
    return f"forebay, to layer {max(layers.numbers)}"


def to_disk(layers: Layers, dtype: str, settings: Settings, compiled: bool = False) -> str:
    """The name of a capture step."""
    how = (" compiled" if compiled else "") + ("" if dtype == settings.dtype else f" in {dtype}")
    return f"forebay{how}: {layers} to disk"


def by_hand(
    model: Model, rows: Sequence[torch.Tensor], kinds: Sequence[Layers], folder: Path
) -> dict[str, Measurement]:
    """The bare forward of transformers, and captures written by hand on top of it."""
    rival, on = rivals.transformers_of(model), model.device
    variants: dict[str, Measurement] = {
        TRANSFORMERS: lambda: timed(lambda: rivals.bare(rival, rows), on),
        f"handwritten: {kinds[0]} in memory": lambda: timed(
            lambda: rivals.handwritten(rival, rows, kinds[0].numbers), on
        ),
    }

    def written(layers: Layers) -> float:
        shutil.rmtree(folder / "by-hand", ignore_errors=True)
        return timed(lambda: rivals.handwritten(rival, rows, layers.numbers, folder / "by-hand"), on)

    for layers in kinds:
        variants[f"handwritten: {layers} to disk"] = lambda layers=layers: written(layers)  # type: ignore[misc]
    return variants


def prepared(settings: Settings, folder: Path) -> tuple[Model, list[torch.Tensor]]:
    """The model, and its batches of real text as the capture will see them: [sequence, position] each."""
    plan = planned(folder, settings, Layers((0,), 0), settings.dtype)
    token_id = plan.source(plan.steps[1]).read(slice(0, settings.n_token))["token_id"].values
    rows = torch.from_numpy(token_id.astype("int64")).reshape(settings.batches, settings.batch, settings.context)
    return loaded(settings), list(rows)


def loaded(settings: Settings, *, compile: bool = False) -> Model:
    """As a capture loads it."""
    return load.load_model(
        settings.source, revision=None, device=settings.device, dtype=settings.dtype, compile=compile
    )


@contextmanager
def loading_once() -> Iterator[None]:
    """Whoever loads a model meanwhile in this process has the same one, and at once: no measurement counts loading."""
    loads = load.load_model
    load.load_model = functools.cache(loads)
    try:
        yield
    finally:
        load.load_model = loads


def planned(
    folder: Path,
    settings: Settings,
    layers: Layers,
    dtype: str,
    *,
    unit_tokens: int | None = None,
    compile: bool = False,
    dictionary: Path | None = None,
) -> Plan:
    """A run over just enough text for the batches, which computes and keeps in one dtype: captures of the layers, or
    behind the forward the features of a dictionary; its tokens already made. The plans of several may share a folder,
    in which only one of them stands at a time.
    """
    capture = {"hooks": [layers.pattern], "dtype": dtype, "store_dtype": dtype, "compile": compile}
    encode = {"dictionary": str(dictionary), "fused": True, "model_dtype": dtype}
    limits = {"batch": settings.batch, **({} if unit_tokens is None else {"unit_tokens": unit_tokens})}
    recipe = {
        "corpus": {"files": ["text.jsonl"]},
        "model": {"source": settings.source},
        "tokenize": {
            "context": settings.context,
            "layout": "documents",
            "long_documents": "truncate",
            "prepend_bos": False,
        },
        **({"capture": capture | limits} if dictionary is None else {"encode": {"sae": encode | limits}}),
    }
    folder.mkdir(exist_ok=True)
    write_text(folder / "text.jsonl", settings)
    plan = make_plan(parse(recipe, name="bench", folder=folder, file="bench"), folder / "run", settings.device)
    made = plan.steps[0].schema.n_token
    assert made == settings.n_token, "the text made shorter sequences than the benchmark asks for"
    run_step(plan, plan.steps[0], Quiet(), Event())
    return plan


def write_text(path: Path, settings: Settings) -> None:
    """As many documents as there are sequences, each of which fills its own: ten characters a token are more than any
    tokenizer needs."""
    text = "\n\n".join(json.loads(line)["text"] for line in NOVELS.read_text(encoding="utf-8").splitlines())
    size, start = 10 * settings.context, 0
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(settings.batch * settings.batches):
            file.write(json.dumps({"text": text[start : start + size]}) + "\n")
            start = (start + size) % (len(text) - size)


def run(
    model: Model, rows: Sequence[torch.Tensor], spec: HookSpec | None, *, logits: bool = False, collect: bool = False
) -> None:
    """Forwards; without logits captures are dropped as they come, unless they are to be collected."""
    sink = None if logits or collect else lambda point, tensor: None
    for token_ids in rows:
        model.forward(token_ids, spec, logits=logits, sink=sink)


def stored(plan: Plan) -> float:
    """Seconds of the step behind the tokens: reading them, forward, dtype or features, shards, fsync, checksums,
    records; no loading."""
    step = plan.steps[1]
    shutil.rmtree(step.folder, ignore_errors=True)
    outcome = run_step(plan, step, Quiet(), Event())
    assert not outcome.failed
    assert not step.todo()
    return outcome.seconds
