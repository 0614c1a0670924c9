"""A run's activations in other libraries' formats: what those read is what the store holds, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
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


def test_captures_of_other_tokens_are_refused(make_recipe: MakeRecipe, texts: list[str], tmp_path: Path) -> None:
    hooks = {"whole": "blocks.0.hook_resid_post", "shorter": "blocks.1.hook_mlp_out"}
    for name, kept in (("whole", texts), ("shorter", texts[:5])):
        recipe = make_recipe(name, texts=kept, capture={"hooks": [hooks[name]]})
        assert forebay.run(recipe, tmp_path / name, device="cpu").code == 0
    shutil.copytree(tmp_path / "shorter/activations", tmp_path / "whole/activations-shorter")
    with pytest.raises(SchemaError, match=r"has other tokens than .*run the recipe again"):
        forebay.to_safetensors(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ── SAELens ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def packed(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """Windows of 16 tokens, the last one shorter."""
    capture = {"hooks": ["blocks.{0,2}.hook_resid_post", "blocks.1.attn.hook_z"], "store_dtype": "bfloat16"}
    outcome = forebay.run(make_recipe("packed", capture=capture), tmp_path / "packed", device="cpu")
    assert outcome.code == 0
    assert outcome.steps[0].tokens % 16
    return Path(str(outcome.folder))


POINT = "blocks.2.hook_resid_post"


def expected(run: Path, n_row: int) -> dict[str, NDArray[Any]]:
    """What the rows should hold, through xarray."""
    tree, n = forebay.open_run(run), n_row * 16
    resid = tree["activations/hook_resid_post/value"].sel(layer=2).values[:n]
    z = tree["activations/attn.hook_z/value"].sel(layer=1).values[:n]
    return {
        POINT: resid.reshape(n_row, 16, 28),
        "blocks.1.attn.hook_z": z.reshape(n_row, 16, 40),
        "token_ids": tree["tokens/token_id"].values[:n].reshape(n_row, 16),
    }


@pytest.mark.parametrize("file_bytes", [1, 2**14, 2**29])
def test_rows_of_the_dataset_are_the_sequences(packed: Path, file_bytes: int, tmp_path: Path) -> None:
    n_row = forebay.to_sae_lens(packed, tmp_path / "out", hooks=[POINT, "blocks.1.attn.hook_z"], file_bytes=file_bytes)
    assert n_row == forebay.open_run(packed)["tokens"].sizes["token"] // 16
    names = [one["filename"] for one in json.loads((tmp_path / "out/state.json").read_text())["_data_files"]]
    table = pa.concat_tables([pa.ipc.open_stream((tmp_path / "out" / name).read_bytes()).read_all() for name in names])
    assert (len(names) == 1) == (file_bytes == 2**29)
    found = {name: np.array(table[name].to_pylist(), dtype=np.float32) for name in table.column_names}
    due = expected(packed, n_row)
    assert list(found) == ["blocks.1.attn.hook_z", POINT, "token_ids"]
    for name, values in due.items():
        np.testing.assert_array_equal(found[name], values)
    features = json.loads((tmp_path / "out/dataset_info.json").read_text())["features"]
    assert features[POINT] == {"shape": [16, 28], "dtype": "float32", "_type": "Array2D"}
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] == features


def test_sequences_that_would_be_lost_are_refused_unless_they_may_be(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"sequences have fewer than 13 tokens, the first is sequence \d+; .*packed"):
        forebay.to_sae_lens(run, tmp_path / "out", hooks="blocks.0.hook_resid_post")
    assert not (tmp_path / "out").exists()
    n_row = forebay.to_sae_lens(run, tmp_path / "out", hooks="blocks.0.hook_resid_post", drop_shorter=True)
    lengths = np.diff(forebay.open_run(run)["sequences"]["start"].values)
    assert 0 < n_row < len(lengths) + 1
    assert n_row == (lengths == 13).sum() + (forebay.open_run(run)["tokens"].position.values[-1] == 12)


def test_the_command_asks_for_hooks(packed: Path, tmp_path: Path) -> None:
    command = ["export", str(packed), str(tmp_path / "out"), "--format", "sae-lens"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert "--hooks blocks.15" in refused.output
    found = CliRunner().invoke(main, [*command, "--hooks", POINT])
    assert found.exit_code == 0, found.output
    assert "rows in" in found.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sae_lens_reads_it_as_its_own(packed: Path, tmp_path: Path) -> None:
    store = pytest.importorskip("sae_lens.training.activations_store")
    n_row = forebay.to_sae_lens(packed, tmp_path / "out", hooks=POINT)
    theirs = store.ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=POINT,
        hook_head_index=None,
        context_size=16,
        d_in=28,
        n_batches_in_buffer=2,
        total_training_tokens=n_row * 16,
        store_batch_size_prompts=n_row,
        train_batch_size_tokens=16,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(tmp_path / "out"),
    )
    values, ids = theirs.get_raw_llm_batch()
    due = expected(packed, n_row)
    np.testing.assert_array_equal(values.numpy().reshape(n_row, 16, 28), due[POINT])
    np.testing.assert_array_equal(ids.numpy().reshape(n_row, 16), due["token_ids"])
