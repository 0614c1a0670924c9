"""What the benchmarks say is what was measured: rivals compute the same as forebay, ratios are those of the rounds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import forebay
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model

SCRIPTS = Path(__file__).parents[1] / "scripts"
Script = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """The modules of the scripts, and one thread: tiny models gain nothing from a second."""
    monkeypatch.syspath_prepend(SCRIPTS)
    torch.set_num_threads(1)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Gives a command, whose file has no ending, as a module."""

    def load(name: str) -> ModuleType:
        loader = SourceFileLoader(name.replace("-", "_"), str(SCRIPTS / name))
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, loader.name, module)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(module)
        return module

    return load


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """A tiny Llama with random weights, two batches of three sequences of 20 tokens."""
    from benchmarks.measuring import Settings
    from benchmarks.shapes import SHAPES, saved

    source = saved(tmp_path / "tiny", SHAPES["tiny"], "cpu", "float32")
    return Settings(source=str(source), batch=3, context=20, batches=2, rounds=2, device="cpu", layers=(0, 2))


@pytest.fixture
def prepared(settings: Any, tmp_path: Path) -> tuple[Model, list[torch.Tensor]]:
    from benchmarks.forwards import prepared

    model, rows = prepared(settings, tmp_path)
    return model, rows


def test_files_written_by_hand_hold_what_transformers_computes_and_what_a_store_holds(
    settings: Any, prepared: tuple[Model, list[torch.Tensor]], tmp_path: Path
) -> None:
    from benchmarks import forwards, rivals

    model, rows = prepared
    rival = rivals.transformers_of(model)
    rivals.handwritten(rival, rows, (0, 2), tmp_path / "by-hand")
    plan = forwards.planned(tmp_path / "run", settings, forwards.Layers((0, 2), 4), "float32")
    assert forwards.stored(plan) > 0
    kept = forebay.open_run(Path(str(plan.folder)))["activations/hook_resid_post"]["value"]
    for layer in (0, 2):
        written = np.fromfile(tmp_path / "by-hand" / f"{layer}.bin", dtype=np.float32).reshape(120, 64)
        states = [rival.model(ids, output_hidden_states=True).hidden_states[layer + 1] for ids in rows]
        np.testing.assert_array_equal(written, torch.cat(states).detach().reshape(120, 64).numpy())
        np.testing.assert_allclose(kept.sel(layer=layer).values, written, rtol=1e-4, atol=1e-5)


def test_the_handwritten_capture_ends_after_the_last_layer_wanted(prepared: tuple[Model, list[torch.Tensor]]) -> None:
    from benchmarks import rivals

    model, rows = prepared
    rival = rivals.transformers_of(model)
    ran: list[int] = []
    for n, layer in enumerate(rival.model.layers):
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
    rivals.handwritten(rival, rows, (0, 2))
    assert ran == [0, 1, 2] * len(rows)


def test_the_ceiling_counts_every_matrix_of_every_layer_once(prepared: tuple[Model, list[torch.Tensor]]) -> None:
    from benchmarks import ceilings

    model, _ = prepared
    shapes = model.spec.weight_shapes()
    matrices = [shape for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2]
    assert len(matrices) == 4 * 7
    assert ceilings.flops(model, 5) == sum(2 * 5 * rows * columns for rows, columns in matrices)
    ceilings.products(model, 5)()


@pytest.mark.parametrize("n_bytes", [0, 5, 2**22, 2**22 + 3])
def test_raw_bytes_are_all_written(n_bytes: int, tmp_path: Path) -> None:
    from benchmarks import ceilings

    ceilings.raw_bytes(tmp_path / "raw", n_bytes)
    assert (tmp_path / "raw").read_bytes() == (bytes(range(256)) * (n_bytes // 256 + 1))[:n_bytes]


def test_ratios_are_medians_of_those_within_a_round() -> None:
    from benchmarks.measuring import Goal, measured, reached

    times = {"one": [1.0, 2.0, 9.0], "two": [0.5, 4.0, 3.0]}  # of the medians it would be 2 / 3
    one, two = measured(times, 30, ceiling="two")
    assert (one["ratio"], two["ratio"], two["ratios"]) == (1.0, 2.0, [2.0, 0.5, 3.0])
    assert (one["tokens_per_second"], one["of_ceiling"]) == (15.0, 0.5)
    goals = (Goal("two", "one", 1.5), Goal("one", "two", 1.5), Goal("absent", "one", 1.5))
    assert [(row["goal"], row["beside"], row["ratio"]) for row in reached(times, goals)] == [
        ("two", "one", 2.0),
        ("one", "two", 0.5),
    ]


def test_every_round_begins_with_another_variant() -> None:
    from benchmarks.measuring import measure

    order: list[str] = []

    def noted(name: str) -> Callable[[], float]:
        return lambda: float(order.append(name) or len(order))

    times = measure({name: noted(name) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc"
    assert times["a"] == [1, 6, 8, 10]


@pytest.mark.parametrize(
    ("spans", "share"),
    [([(3, 5)], 1.0), ([(0, 1), (3, 4)], 0.5), ([(2, 4), (0, 3), (1, 2)], 1.0), ([(0, 8), (1, 2), (9, 10)], 0.9)],
)
def test_a_device_is_busy_where_at_least_one_kernel_runs(spans: list[tuple[float, float]], share: float) -> None:
    from benchmarks.shapes import busy

    assert busy(spans) == pytest.approx(share)


def test_random_models_of_any_size_are_measured(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = "--only shapes --shapes tiny --batch 2 --context 12 --batches 1 --rounds 1 --device cpu --json"
    chosen = ("transformers, no logits", "forebay, no logits", "handwritten: all", "forebay: all", "encoded behind")
    variants = (word for name in chosen for word in ("--variant", name))
    found = CliRunner().invoke(script("bench").main, [*options.split(), str(out), *variants])
    assert found.exit_code == 0, found.output
    tables = json.loads(out.read_text())
    assert "idle tiny" not in tables  # that is a GPU's
    of_forward, of_capture = (
        {row["variant"] for row in tables[f"{name} tiny"] if "variant" in row} for name in ("forward", "capture")
    )
    assert {"transformers, no logits", "forebay, no logits"} <= of_forward
    assert {"handwritten: all layers to disk", "forebay: all layers to disk"} <= of_capture
    assert sum("encoded behind the forward" in variant for variant in of_capture) == 1


def test_a_peer_that_cannot_do_a_variant_says_why_and_does_the_rest(
    prepared: tuple[Model, list[torch.Tensor]], tmp_path: Path
) -> None:
    from benchmarks.peers.common import BARE, Task, report, stream
    from benchmarks.rivals import transformers_of

    model, rows = prepared
    task = Task(tmp_path, transformers_of(model), rows, (0, 2), 2, tmp_path / "out.json", tmp_path)

    def refuses() -> None:
        raise NotImplementedError("no early end")

    report(task, "numpy", {"right": lambda: stream(task), "half": lambda: stream(task) / 2, "refuses": refuses})
    found = json.loads(task.out.read_text())
    assert found["errors"] == {"refuses": "NotImplementedError: no early end"}
    assert {row["variant"]: row["relative_difference"] for row in found["rows"]} == {
        BARE: None,
        "right": 0,
        "half": 0.5,
    }


def test_what_is_exported_for_the_peers_is_the_same_model_to_transformers(
    script: Script, settings: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, tokens = script("bench-peers").exported(settings, tmp_path)
    ids = torch.tensor(json.loads(tokens.read_text()))
    assert ids.shape == (2, 3, 20)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load_model(settings.source, device="cpu")
    logits = ours.forward(ids[1]).logits
    assert logits is not None
    torch.testing.assert_close(theirs(ids[1]).logits.detach(), logits, rtol=1e-4, atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000.0
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == list(ours.tokenizer.encode("ab").token_ids)
