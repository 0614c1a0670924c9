"""A recipe over a .pth file of RWKV: from texts, by the World tokenizer, to labelled activations and states."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.pipeline.cli import main
from forebay.stages.models.taps import HookSpec
from forebay.stores.store import Store

from ..models.rwkv_models import write_pth
from .test_kill import assert_what_is_recorded_is_whole, data, recorded

STATE = "rwkv.hook_state"
RESID = "activations/hook_resid_post"
SMALL = {"d_vocab": 65_536, "d_model": 12, "n_heads": 2, "d_head": 6, "n_layers": 3, "d_mlp": 20}
CAPTURE: dict[str, Any] = {
    "hooks": ["blocks.*.hook_resid_post", f"blocks.[0,1].{STATE}", "blocks.2.rwkv.hook_effective_attn", "hook_embed"],
    "state_positions": [3, -1],
    "batch": 3,
    "unit_tokens": 40,
    "threads": 1,
}


@pytest.fixture(scope="module", params=[6, 7], ids=["rwkv6", "rwkv7"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows as the World models have, and little else."""
    return write_pth(tmp_path_factory.mktemp("models") / f"x{request.param}.pth", request.param, **SMALL)


@pytest.fixture
def recipe(model: Path, make_recipe: Callable[..., Path]) -> Path:
    """Packed windows, of which most units' edges cut one."""
    return make_recipe(model=model, tokenize={"context": 13, "unit_tokens": 65}, capture=CAPTURE)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def finished(shelf: Path, model: Path, recipe: Path) -> Path:
    """A run that is complete; made once a model, to be looked at and never changed."""
    folder = shelf / model.stem
    if not folder.exists():
        assert forebay.run(recipe, folder, device="cpu").code == 0
    return folder


def says(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def rows_of(run: xr.DataTree) -> list[list[int]]:
    """The token ids of every sequence."""
    tokens = run["tokens"].to_dataset()
    ids, sequence = tokens["token_id"].values.astype(np.int64), tokens["sequence"].values
    return [ids[sequence == i].tolist() for i in range(run["sequences"].sizes["sequence"])]


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tokens_are_those_of_the_texts_and_know_their_characters(finished: Path, texts: list[str]) -> None:
    run = forebay.open_run(finished)
    tokens = run["tokens"].to_dataset().compute()
    tokenizer = forebay.load_model(run.attrs["recipe"]["model"]["source"], device="cpu").tokenizer
    for document, text in enumerate(texts):
        own = tokens.isel(token=tokens["document"].values == document)
        assert tokenizer.to_string(own["token_id"].values[:-1].tolist()) == text
        assert own["token_id"].values[-1] == 0  # what ends a text, behind each
        if text.isascii():
            spans = zip(own["char_start"].values, own["char_end"].values, strict=True)
            assert "".join(text[start:end] for start, end in spans) == text


def test_activations_and_states_are_those_of_the_forward_and_are_selected_by_labels(
    finished: Path, model: Path
) -> None:
    run, loaded = forebay.open_run(finished), forebay.load_model(model, device="cpu")
    rows = rows_of(run)
    assert len(rows) > 10
    value, resid = run[f"activations/{STATE}/value"], run[f"{RESID}/value"]
    attention = run["activations/rwkv.hook_effective_attn/value"]
    hooks = HookSpec().capture("blocks.*.hook_resid_post", "blocks.2.rwkv.hook_effective_attn")
    hooks = hooks.capture(f"blocks.[0,1].{STATE}", positions=[3, -1])
    for sequence, row in enumerate(rows):
        out = loaded.forward([row], hooks)
        for layer in (0, 1):
            for place, position in enumerate((3, -1)):
                one = value.sel(layer=layer, sequence=sequence, state_position=position)
                close(one, out[f"blocks.{layer}.{STATE}"][0, place])
        close(resid.sel(layer=2, sequence=sequence), out["blocks.2.hook_resid_post"][0])
        close(
            attention.sel(layer=2, sequence=sequence).isel(query=slice(len(row)), key=slice(len(row))),
            out["blocks.2.rwkv.hook_effective_attn"][0],
        )


def close(found: xr.DataArray, wanted: torch.Tensor) -> None:
    assert found.shape == tuple(wanted.shape)
    assert np.linalg.norm(found.values - wanted.numpy()) <= 1e-5 * float(wanted.norm())


def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("something was computed")


def test_opening_and_selecting_computes_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dask.config.set(scheduler=forbidden), monkeypatch.context() as reading:
        reading.setattr("forebay.stores.tree.KeptArray._read", forbidden)
        run = forebay.open_run(finished)
        one = run[f"activations/{STATE}/value"].sel(layer=1, sequence=3, state_position=-1)
        assert one.dims == ("head", "d_key", "d_value")
        with pytest.raises(AssertionError, match="something was computed"):
            one.compute()
    assert np.isfinite(one.values).all()


def test_a_states_document_is_that_of_its_sequence(finished: Path) -> None:
    run = forebay.open_run(finished)
    states, tokens = run[f"activations/{STATE}"].to_dataset(), run["tokens"].to_dataset()
    first = tokens.sel(position=0)
    np.testing.assert_array_equal(states["sequence"], first["sequence"])
    np.testing.assert_array_equal(states["document"], first["document"])


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_plan_run_status_and_verify_tell_of_states(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    planned = says("plan", recipe, "--to", folder, "--device", "cpu")
    own = forebay.plan(recipe, folder, device="cpu").step("activations").schema
    array = own.arrays[f"{STATE}/value"]
    sizes = {"layer": 2, "sequence": array.shape[1], "state_position": 2, "head": 2, "d_key": 6, "d_value": 6}
    assert f"activations/{STATE}/value: float32 {sizes}" in planned
    assert not (folder / "activations" / "data.zarr").exists()
    assert array.nbytes == 4 * int(np.prod(list(sizes.values())))
    assert own.nbytes == sum(other.nbytes for other in own.arrays.values())
    said = says("run", recipe, "--to", folder, "--device", "cpu")
    assert "activations: " in said
    size = f"{own.nbytes / 1000:.3g} kB"
    assert size in planned
    assert size in says("status", folder)
    assert "done" in says("status", folder)
    says("verify", folder)
    again = says("run", recipe, "--to", folder, "--device", "cpu")
    assert "all of it was done before" in again


def test_a_position_that_no_window_has_is_refused_before_anything_is_written(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("state_positions = [3, -1]", "state_positions = [13]"))
    message = says("run", recipe, "--to", tmp_path / "run", "--device", "cpu", code=2)
    assert "no sequence has a state after its token 13; the longest has 13 tokens" in " ".join(message.split())
    assert not list((tmp_path / "run").glob("*/data.zarr"))


def test_other_positions_are_another_recipe(finished: Path, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("state_positions = [3, -1]", "state_positions = [-1, 3]"))
    message = says("run", recipe, "--to", finished, "--device", "cpu", code=2)
    assert "was made by another recipe" in message
    assert "state_positions" in message


def test_the_lens_of_the_last_layer_is_what_the_model_says(finished: Path, model: Path) -> None:
    run, loaded = forebay.open_run(finished), forebay.load_model(model, device="cpu")
    unembedding = forebay.load_unembedding(model, device="cpu")
    node = run[RESID].to_dataset().sel(layer=2, sequence=2)
    lens = forebay.logit_lens(node, unembedding, top=2).compute()
    logits = loaded.forward([rows_of(run)[2]]).logits
    assert logits is not None
    expected = logits[0].softmax(-1).topk(2)
    np.testing.assert_array_equal(lens["top_token_id"], expected.indices)
    np.testing.assert_allclose(lens["top_probability"], expected.values, rtol=1e-3)
    said = says("lens", finished, "--sequence", "2", "--positions", "0:8", "--layers", "0,2")
    lines = [line.split() for line in said.splitlines()]
    assert [line[:2] for line in lines[-9:]] == [["2", str(position)] for position in range(9)]
    assert f"{float(lens['top_probability'][4, 0]):.0%}" in " ".join(lines[-5])


# ── stopped at any time ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_it_holds_the_same_bytes(
    recipe: Path, finished: Path, fork_run: Callable[[Path, Path], Any], tmp_path: Path
) -> None:
    whole, chance = tmp_path / "uninterrupted", random.Random(3)
    process = fork_run(recipe, whole)
    process.join()
    n_unit = recorded(whole)
    assert process.exitcode == 0
    assert n_unit == sum(len(Store.open(whole / step).schema.grid) for step in ("tokens", "activations"))
    assert data(whole) == data(finished)
    folder, kills, hits = tmp_path / "killed", 0, 0
    while kills < 2:
        process = fork_run(recipe, folder)
        until = time.monotonic() + 60
        before = recorded(folder)
        # From what is there on, until some more is: else a slow start would be all that is ever killed.
        while recorded(folder) < before + 2 and time.monotonic() < until and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        hits += 0 < recorded(folder) < n_unit
        assert_what_is_recorded_is_whole(folder)
    assert hits >= 1
    process = fork_run(recipe, folder)
    process.join()
    assert process.exitcode == 0
    assert data(folder) == data(whole)
