"""delphi's caches of latents as runs: every value is there, under its labels, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import forebay
from forebay.pipeline.audit import audit
from forebay.pipeline.cli import main
from forebay.pipeline.executors.units import run_unit
from forebay.pipeline.recompute import recompute
from forebay.stages.models.errors import HookError
from forebay.stores.errors import FingerprintMismatch, ForebayError, RecipeError, SchemaError
from forebay.stores.store import Store

from ..stored import data
from .foreign_caches import Ending, latents, write_delphi

TOKENS = np.random.default_rng(7).integers(0, 300, (7, 5))
MLP, BLOCK = "layers.1.mlp", "model.layers.2"


@pytest.fixture(scope="module")
def values() -> dict[str, NDArray[np.float16]]:
    """Of two hookpoints; in the first latent 4, which has a file of its own, never fires."""
    return {MLP: latents((7, 5, 11), dead=[4, 10]), BLOCK: latents((7, 5, 3), seed=1)}


@pytest.fixture(scope="module")
def cache(values: dict[str, NDArray[np.float16]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    write_delphi(root, values[MLP], TOKENS, hookpoint=MLP, starts=[0, 4, 5])
    write_delphi(root, values[BLOCK], TOKENS, hookpoint=BLOCK, locations="uint32")
    return root


@pytest.fixture(scope="module")
def run(cache: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "run"
    outcome = forebay.from_delphi(cache, folder, tokenizer=tiny_model / "tokenizer.json", unit_tokens=10)
    assert outcome.code == 0
    return folder


def test_features_are_those_of_the_cache(run: Path, values: dict[str, NDArray[np.float16]]) -> None:
    tree = forebay.open_run(run)
    assert tree.features.names == [MLP, BLOCK]
    for name, expected in values.items():
        found = tree.features(name)
        flat = expected.reshape(-1, expected.shape[2])
        assert found.n_feature == flat.shape[1]
        dense = found.dense(range(found.n_feature))
        assert dense.dtype == np.float16
        np.testing.assert_array_equal(dense.values, flat)
        np.testing.assert_array_equal(dense.sequence, np.repeat(np.arange(7), 5))
        np.testing.assert_array_equal(dense.position, np.tile(np.arange(5), 7))
        rows = found.rows(0, 35)
        np.testing.assert_array_equal(rows.feature, np.nonzero(flat)[1])
    np.testing.assert_array_equal(tree["tokens/token_id"].values, TOKENS.reshape(-1))


def test_statistics_and_contexts_are_those_of_any_run(run: Path, values: dict[str, NDArray[np.float16]]) -> None:
    found = forebay.open_run(run).features(MLP)
    counted = values[MLP][:, 1:]
    statistics = found.statistics().compute()
    np.testing.assert_array_equal(statistics.n_active, (counted != 0).sum((0, 1)))
    assert statistics.dead.values.tolist() == [feature in (4, 10) for feature in range(11)]
    top = found.top_contexts(0, n=1)
    sequence, position = np.unravel_index(counted[..., 0].argmax(), (7, 4))
    assert (int(top.sequence[0]), int(top.position[0])) == (sequence, position + 1)
    assert top.text.values[0] == forebay.open_run(run).to_str_tokens([TOKENS[sequence, position + 1]])[0]
    fit = forebay.dictionary_fit(run / f"features-{MLP}")
    assert float(fit.l0[0]) == pytest.approx((counted != 0).sum() / 28)


def test_commands_take_it_for_a_run(run: Path, tmp_path: Path) -> None:
    assert audit(run) == []
    for command in (
        ["status", run],
        ["verify", run],
        ["features", run, BLOCK],
        ["report", run, "--out", tmp_path / "page.html"],
        ["export", run, tmp_path / "part", "--documents", "0:3"],
        ["concat", tmp_path / "both", tmp_path / "part", run],
    ):
        found = CliRunner().invoke(main, list(map(str, command)))
        assert found.exit_code == 0, found.output
    assert Store.open(tmp_path / "part/tokens").header.provenance["imported"]["format"] == "delphi"
    tree = forebay.open_run(tmp_path / "both")
    np.testing.assert_array_equal(tree["tokens/token_id"].values, [*TOKENS[:3].reshape(-1), *TOKENS.reshape(-1)])


def test_what_needs_a_recipe_says_that_there_is_none(run: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "more"}\n')
    for call in (
        lambda: forebay.append(run, [tmp_path / "more.jsonl"], device="cpu"),
        lambda: run_unit(run, "tokens", 0, "cpu"),
        lambda: list(recompute(run, 1, "cpu")),
    ):
        with pytest.raises(RecipeError, match="was imported has none"):
            call()


def test_the_run_says_where_it_comes_from(run: Path, cache: Path) -> None:
    said = json.loads((run / "recipe.json").read_text())
    assert set(said) == {"imported", "fingerprints", "versions"}
    assert said["imported"]["model"] == "org/model"
    provenance = Store.open(run / f"features-{MLP}").header.provenance
    assert provenance["model"] == {"source": "org/model", "revision": None}
    assert provenance["imported"]["config"][MLP] == {"model_name": "org/model", "n_tokens": 35}
    files = provenance["determines"]["source"]["files"]
    assert sorted(files) == sorted(
        path.relative_to(cache / "latents").as_posix() for path in (cache / "latents").rglob("*") if path.is_file()
    )
    assert provenance["dictionaries"][MLP]["threshold"] == 1e-5
    tree = forebay.open_run(run)
    assert [tree.features(name).hook for name in (MLP, BLOCK)] == ["blocks.1.mlp.hook_out", "blocks.2.hook_resid_post"]


def test_a_hookpoint_reads_what_enters_its_module_if_that_was_transcoded(cache: Path, tmp_path: Path) -> None:
    forebay.from_delphi(cache, tmp_path / "a", hookpoints=[MLP], transcode=True)
    found = forebay.open_run(tmp_path / "a").features(MLP)
    assert (found.hook, found.attrs["hook_out"]) == ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")
    forebay.from_delphi(cache, tmp_path / "b", hookpoints=[MLP], rename={MLP: "blocks.1.hook_mlp_out"})
    assert forebay.open_run(tmp_path / "b").features(MLP).hook == "blocks.1.hook_mlp_out"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 2), (4, 1, 3)])
def test_odd_shapes_are_read(shape: tuple[int, int, int], tmp_path: Path) -> None:
    tokens = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    expected = latents(shape, seed=3)
    write_delphi(tmp_path, expected, tokens)
    assert forebay.from_delphi(tmp_path, tmp_path / "run", skip_positions=0).code == 0
    found = forebay.open_run(tmp_path / "run").features(MLP)
    np.testing.assert_array_equal(found.dense(range(shape[2])).values, expected.reshape(-1, shape[2]))
    np.testing.assert_array_equal(found.statistics().n_active, (expected != 0).sum((0, 1)))


def test_a_cache_in_which_nothing_fires_is_a_run(tmp_path: Path) -> None:
    write_delphi(tmp_path, np.zeros((7, 5, 4), np.float16), TOKENS, starts=[0, 2])
    assert forebay.from_delphi(tmp_path, tmp_path / "run", unit_tokens=5).code == 0
    found = forebay.open_run(tmp_path / "run").features(MLP)
    assert found.statistics().dead.values.all()
    assert len(found.rows(0, 35).feature) == 0


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("units", [1, 6])
def test_an_import_that_ended_goes_on_to_the_same_bytes(
    units: int, run: Path, cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"tokenizer": tiny_model / "tokenizer.json", "unit_tokens": 10}
    with pytest.raises(KeyboardInterrupt):
        forebay.from_delphi(cache, tmp_path / "run", progress=Ending(units), **settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/done/*.json")}
    assert len(before) == units
    assert forebay.from_delphi(cache, tmp_path / "run", **settings).code == 0
    assert data(tmp_path / "run") == data(run)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert audit(tmp_path / "run") == []


@pytest.mark.slow
def test_a_killed_import_goes_on_to_the_same_bytes(run: Path, cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    call = f"""
import os, forebay
from forebay.pipeline.executors.units import run_unit
from forebay.pipeline.progress import Quiet
from forebay.pipeline.recompute import recompute
class Killed(Quiet):
    def advance(self, tokens):
        if os.path.isdir("run/features-{BLOCK}/done"):
            os.kill(os.getpid(), 9)
forebay.from_delphi({str(cache)!r}, "run", tokenizer={str(tiny_model / "tokenizer.json")!r}, unit_tokens=10,
                    progress=Killed())
"""
    assert subprocess.run([sys.executable, "-c", call], cwd=tmp_path, check=False).returncode == -9
    assert not Store.open(tmp_path / f"run/features-{BLOCK}").complete
    forebay.from_delphi(cache, tmp_path / "run", tokenizer=tiny_model / "tokenizer.json", unit_tokens=10)
    assert data(tmp_path / "run") == data(run)


def test_other_files_or_settings_are_refused_in_a_folder_that_has_a_run(cache: Path, tmp_path: Path) -> None:
    forebay.from_delphi(cache, tmp_path / "run")
    with pytest.raises(FingerprintMismatch, match="imported with other settings, or files that have changed"):
        forebay.from_delphi(cache, tmp_path / "run", skip_positions=0)
    assert forebay.from_delphi(cache / "latents", tmp_path / "run").steps[0].tokens == 0


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Change = Callable[[Path], object]


def changed(name: str, change: Callable[[dict[str, NDArray[Any]]], object]) -> Change:
    """A change of the tensors in one file."""

    def apply(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name)

    return apply


def put(key: str, where: Any, value: Any) -> Callable[[dict[str, NDArray[Any]]], None]:
    def apply(held: dict[str, NDArray[Any]]) -> None:
        held[key] = held[key].copy()
        held[key][where] = value

    return apply


def swapped(held: dict[str, NDArray[Any]]) -> None:
    held["locations"] = np.ascontiguousarray(held["locations"][::-1])


REFUSED: list[tuple[Change, str]] = [
    (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing: it holds delphi's settings"),
    (lambda folder: (folder / "config.json").write_text('{"a": NaN}'), r"NaN is no number of JSON's"),
    (lambda folder: (folder / "config.json").write_text("{}"), r"does not name the model .* --model"),
    (lambda folder: (folder / "0_3.safetensors").unlink(), r"latents 0 to 3 are in no file"),
    (lambda folder: (folder / "config.json").write_text('{"n_splits": 3}'), r"holds 2 of the 3 files"),
    (
        lambda folder: (folder / "4_8.safetensors").rename(folder / "3_8.safetensors"),
        r"begins with latent 3; .* with 3",
    ),
    (lambda folder: (folder / "4_8.safetensors").rename(folder / "all.safetensors"), r"not named <first>_<last>"),
    (lambda folder: (folder / "4_8.safetensors").write_bytes(b"\0" * 20), r"is no safetensors file"),
    (changed("4_8.safetensors", lambda held: held.pop("tokens")), r"has no tokens: cache again with save_tokens=True"),
    (changed("4_8.safetensors", put("tokens", (3, 2), 299)), r"other tokens than .*, first in sequence 3"),
    (changed("0_3.safetensors", put("tokens", (0, 0), -1)), r"holds -1 among its tokens"),
    (changed("4_8.safetensors", put("locations", (0, 2), 5)), r"row 0 of its locations is .* 5 latents in this file"),
    (changed("4_8.safetensors", put("locations", (-1, 0), 7)), r"locations is \[7, .* there are 7 sequences of 5"),
    (changed("4_8.safetensors", swapped), r"row 1 of its locations does not come behind the one before"),
    (changed("4_8.safetensors", put("activations", 2, np.inf)), r"row 2 of its activations is inf"),
    (changed("4_8.safetensors", lambda held: held.update(more=held["tokens"])), r"holds activations, locations, more"),
    (
        changed("4_8.safetensors", lambda held: held.update(activations=held["activations"].astype(np.float64))),
        r"activations are F64; expected was one of F16, F32",
    ),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=lambda case: case if isinstance(case, str) else "")
def test_what_delphi_does_not_write_is_refused_by_name(change: Change, said: str, tmp_path: Path) -> None:
    tokens = np.where(TOKENS == 299, 0, TOKENS)
    change(write_delphi(tmp_path, latents((7, 5, 9)), tokens, starts=[0, 4]))
    with pytest.raises(SchemaError, match=said) as refused:
        forebay.from_delphi(tmp_path, tmp_path / "run")
    assert str(tmp_path) in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_hookpoints_of_different_tokens_are_refused(tmp_path: Path) -> None:
    write_delphi(tmp_path, latents((7, 5, 2)), TOKENS)
    write_delphi(tmp_path, latents((7, 5, 2)), TOKENS + 1, hookpoint=BLOCK)
    with pytest.raises(SchemaError, match="of several hookpoints, import each into a run of its own"):
        forebay.from_delphi(tmp_path, tmp_path / "run")
    assert forebay.from_delphi(tmp_path, tmp_path / "run", hookpoints=[BLOCK]).code == 0


def test_names_that_mean_nothing_are_refused(cache: Path, tmp_path: Path) -> None:
    calls: list[tuple[dict[str, Any], type[ForebayError] | type[HookError], str]] = [
        ({"hookpoints": ["layers.1.mpl"]}, SchemaError, r"has no 'layers\.1\.mpl'\. Did you mean 'layers\.1\.mlp'"),
        ({"rename": {"layers.9": "hook_embed"}}, SchemaError, r"no hook point 'layers\.9' to rename"),
        ({"rename": {MLP: "blocks.1.hook_mpl_out"}}, HookError, r"Did you mean 'blocks\.1\.hook_mlp_out'"),
        ({"rename": {MLP: "blocks.1.attn.hook_z"}}, SchemaError, r"hook_z is \[sequence, position, head, d_head\]"),
        ({"unit_tokens": 7}, SchemaError, r"unit_tokens = 7 must be a multiple of the sequences' length, 5"),
        ({"skip_positions": -1}, SchemaError, r"skip_positions = -1 must be at least 0"),
        ({"tokenizer": cache / "log/hookpoint_firing_counts.pt"}, SchemaError, r"is no tokenizer\.json"),
    ]
    for settings, kind, said in calls:
        with pytest.raises(kind, match=said):
            forebay.from_delphi(cache, tmp_path / "run", **settings)
    write_delphi(tmp_path, latents((7, 5, 2)), TOKENS, hookpoint="layers.3.post_feedforward_layernorm")
    with pytest.raises(SchemaError, match=r"--rename layers\.3\.post_feedforward_layernorm=blocks\.3\.hook_mlp_out"):
        forebay.from_delphi(tmp_path, tmp_path / "run")
    with pytest.raises(SchemaError, match="is no folder of this machine"):
        forebay.from_delphi(tmp_path / "gone", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_positions_that_16_bits_have_cut_off_are_refused(tmp_path: Path) -> None:
    tokens = np.zeros((1, 2**16 + 1), np.int64)
    values = np.zeros((1, 2**16 + 1, 1), np.float16)
    values[0, 3] = 1
    write_delphi(tmp_path, values, tokens)
    with pytest.raises(SchemaError, match="positions up to 65536 do not fit its locations, which are U16"):
        forebay.from_delphi(tmp_path, tmp_path / "run")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_does_what_the_function_does(cache: Path, tmp_path: Path) -> None:
    arguments = ["import", str(cache), str(tmp_path / "run"), "--format", "delphi", "--hooks", MLP]
    found = CliRunner().invoke(main, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["complete"] is True
    assert [step["name"] for step in said["steps"]] == ["tokens", f"features-{MLP}"]
    assert all((step["tokens"], step["left"]) == (35, 0) for step in said["steps"])
    again = CliRunner().invoke(main, arguments)
    assert "all of it was done before" in again.output
    refused = CliRunner().invoke(main, [*arguments, "--rename", "layers.1.mlp"])
    assert refused.exit_code == 2
    assert "is not FROM=TO" in refused.output


@pytest.mark.slow
def test_what_delphi_itself_has_written_is_read(tmp_path: Path) -> None:
    """By its own cache, fed with latents as its hooks would feed it."""
    import torch

    cache = pytest.importorskip("delphi.latents.cache")
    values = torch.from_numpy(latents((8, 5, 11)).astype(np.float32))
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 300, (8, 5)))
    writer = cache.LatentCache(None, {}, batch_size=4)
    writer.width = 11
    for batch in range(2):
        part = slice(4 * batch, 4 * batch + 4)
        writer.cache.add(values[part], tokens[part], batch, BLOCK)
    writer.cache.save()
    writer.save_splits(3, tmp_path / "latents")
    (tmp_path / "latents" / BLOCK / "config.json").write_text('{"model_name": "org/model"}')
    forebay.from_delphi(tmp_path, tmp_path / "run", unit_tokens=10)
    tree = forebay.open_run(tmp_path / "run")
    np.testing.assert_array_equal(tree.features(BLOCK).dense(range(11)).values, values.numpy().reshape(-1, 11))
    np.testing.assert_array_equal(tree["tokens/token_id"].values, tokens.numpy().reshape(-1))
