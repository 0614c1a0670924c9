"""A run's activations as safetensors: what the library reads is what the store holds, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import forebay
from forebay.pipeline.cli import main
from forebay.stages.models.errors import HookError
from forebay.stores.errors import CorruptStore, IncompleteStore, SchemaError
from forebay.stores.store import Store

MakeRecipe = Callable[..., Path]
HOOKS = ["hook_embed", "blocks.{0,2}.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"]
NAMES = ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def run(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    texts = ["It is a truth", "universally acknowledged, that a single man in possession", "of a good fortune"]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"id": text[:4], "text": text}) + "\n" for text in texts))
    (folder / "recipe.toml").write_text(
        f"""[corpus]
files = ["texts.jsonl"]
[model]
source = {json.dumps(str(tiny_model))}
[tokenize]
context = 13
layout = "documents"
long_documents = "split"
[capture]
hooks = {json.dumps(HOOKS)}
unit_tokens = 32
store_dtype = "{request.param}"
"""
    )
    outcome = forebay.run(folder / "recipe.toml", folder / "run", device="cpu")
    assert outcome.code == 0
    return Path(str(outcome.folder))


@pytest.mark.parametrize("file_bytes", [1, 2**13, 2**30])
def test_the_library_reads_what_the_store_holds(run: Path, file_bytes: int, tmp_path: Path) -> None:
    index = forebay.to_safetensors(run, tmp_path / "out", file_bytes=file_bytes)
    said = json.loads(index.read_text())
    files = [load_file(index.parent / one["file"]) for one in said["files"]]
    assert [one["first_token"] for one in said["files"]] == np.cumsum([0, *map(len_of, files)])[:-1].tolist()
    assert list(map(len_of, files)) == [one["n_token"] for one in said["files"]]
    assert {path.name for path in index.parent.iterdir()} == {index.name, *(one["file"] for one in said["files"])}
    found = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    tree = forebay.open_run(run)
    kept_as = Store.open(run / "activations").schema.arrays
    dtypes = {path: getattr(torch, array.dtype) for path, array in kept_as.items()}
    assert sorted(found) == sorted([*NAMES, "token_id", "sequence", "position", "document"])
    for name in NAMES:
        _, _, rest = name.rpartition("blocks.")
        layer, kind = rest.split(".", 1) if rest[0].isdigit() else (None, rest)
        kept = tree[f"activations/{kind}/value"]
        kept = kept if layer is None else kept.sel(layer=int(layer))
        assert found[name].dtype == dtypes[f"{kind}/value"]
        np.testing.assert_array_equal(found[name].to(torch.float32).numpy(), kept.values)
        assert said["tensors"][name]["shape"] == list(kept.shape[1:])
    for label in ("token_id", "sequence", "position", "document"):
        np.testing.assert_array_equal(found[label].numpy(), tree["activations/hook_embed"][label].values)
    assert said["run"]["recipe"] == json.loads((run / "recipe.json").read_text())


def len_of(file: dict[str, torch.Tensor]) -> int:
    return len(file["token_id"])


def test_only_the_hooks_that_are_asked_for_are_written(run: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(
        main, ["export", str(run), str(tmp_path / "out"), "--format", "safetensors", "--hooks", "blocks.*.attn.hook_z"]
    )
    assert found.exit_code == 0, found.output
    index = json.loads((tmp_path / "out" / "activations.safetensors.index.json").read_text())
    assert list(index["tensors"]) == ["blocks.1.attn.hook_z"]
    refused = CliRunner().invoke(
        main, ["export", str(run), str(tmp_path / "b"), "--format", "safetensors", "--layers", "0"]
    )
    assert refused.exit_code == 2
    assert "--layers chooses what a run has" in refused.output


def test_what_cannot_be_written_is_refused_before_anything_is(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(HookError, match=r"hook_resid_pst"):
        forebay.to_safetensors(run, out, hooks="blocks.0.hook_resid_pst")
    with pytest.raises(SchemaError, match=r"blocks\.1\.attn\.hook_pattern .* without a token axis"):
        forebay.to_safetensors(run, out, hooks=["hook_embed", "blocks.1.attn.hook_pattern"])
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(SchemaError, match="holds something already"):
        forebay.to_safetensors(run, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_damage_and_missing_units_are_refused_and_leave_no_index(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    shard = next(path for path in sorted((own / "activations/data.zarr/hook_embed").rglob("*")) if path.name == "0")
    shard = shard if shard.is_file() else next(path for path in shard.rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptStore, match="checksum"):
        forebay.to_safetensors(own, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))
    assert not list((tmp_path / "out").glob("*.partial"))
    next((own / "activations/done").glob("*.json")).unlink()
    with pytest.raises(IncompleteStore):
        forebay.to_safetensors(own, tmp_path / "other")
