"""The example says what a model's files are, and refuses what is not here without looking for it on a network."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path

import pytest
import xarray as xr
from click.testing import CliRunner, Result

EXAMPLE = Path(__file__).parents[2] / "docs/examples/download.py"


def run(*arguments: object) -> Result:
    found = CliRunner().invoke(runpy.run_path(str(EXAMPLE))["main"], [str(one) for one in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def into_cache(model: Path, cache: Path, name: str, commit: str) -> None:
    """Lay a model into a cache of the hub as huggingface_hub does."""
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)


def test_files_are_told_with_their_hashes(tiny_model: Path, tmp_path: Path) -> None:
    found = run("--model", tiny_model, "--output", tmp_path / "out")
    assert found.exit_code == 0, found.output
    result = xr.open_zarr(tmp_path / "out/download.zarr", consolidated=False).load()
    files = {file.name: file for file in tiny_model.iterdir()}
    assert {"config.json", "model.safetensors"} <= set(result.file.values.tolist()) <= set(files)
    for name in result.file.values:
        assert result["size"].sel(file=name) == files[name].stat().st_size
        assert result["sha256"].sel(file=name).item() == hashlib.sha256(files[name].read_bytes()).hexdigest()
    assert "llama: 3 layers" in found.output
    assert (tmp_path / "out/download.png").stat().st_size > 3_000


def test_what_is_in_the_cache_is_not_fetched_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    into_cache(tiny_model, tmp_path / "cache", "somebody/tiny", "a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    found = run("--model", "somebody/tiny", "--output", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert xr.open_zarr(tmp_path / "out/download.zarr", consolidated=False).attrs["revision"] == "a" * 40


def test_what_is_not_here_is_refused_with_what_to_do(tmp_path: Path) -> None:
    found = run("--model", "nobody/nothing", "--output", tmp_path / "out")
    assert found.exit_code == 1
    assert "Error: nobody/nothing is not in the local cache and the hub cannot be reached" in found.output
    assert "hf download nobody/nothing" in found.output
    assert not (tmp_path / "out").exists()
