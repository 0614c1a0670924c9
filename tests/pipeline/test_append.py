"""A run that corpus files were appended to holds, object by object, what one run over all files at once holds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

import forebay
from forebay.pipeline.cli import main
from forebay.stages.capture import Capture
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stores.errors import CorpusError, FingerprintMismatch, SchemaError, StoreNotFound
from forebay.stores.fingerprint import fingerprint
from forebay.stores.ledger import read_json
from forebay.stores.store import Store

HOOK = "blocks.1.hook_resid_post"
MakeRecipe = Callable[..., Path]

PACKED = {
    "tokenize": {"context": 16, "unit_tokens": 48},
    "capture": {
        "hooks": ["blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern"],
        "store_dtype": "bfloat16",
        "unit_tokens": 32,
        "batch": 3,
    },
}
STRADDLING = {
    "tokenize": {"context": 60, "layout": "documents", "long_documents": "split", "unit_tokens": 100},
    "capture": {"hooks": ["blocks.*.hook_resid_post"], "store_dtype": "bfloat16", "unit_tokens": 40, "batch": 2},
}
PATTERNS = {
    "tokenize": {"context": 24, "layout": "documents", "long_documents": "split", "unit_tokens": 70},
    "capture": {"hooks": ["blocks.1.attn.hook_pattern", "hook_embed"], "unit_tokens": 40, "batch": 2},
}
ODD = {
    "tokenize": {"context": 16, "unit_tokens": 32},
    "capture": {"hooks": ["blocks.2.hook_resid_post"], "unit_tokens": 37, "batch": 2, "compression": "zstd"},
}


@pytest.fixture
def corpora(texts: list[str], tmp_path: Path) -> list[Path]:
    """Nine documents in three files: four, two of which the first is empty, and three."""
    cuts = [(0, 4), (4, 6), (6, 9)]
    paths = [tmp_path / f"part-{n}.jsonl" for n in range(len(cuts))]
    for path, (first, last) in zip(paths, cuts, strict=True):
        rows = [json.dumps({"id": f"doc-{i}", "text": texts[i]}) + "\n" for i in range(first, last)]
        path.write_text("".join(rows))
    return paths


@pytest.fixture
def recipe_over(make_recipe: MakeRecipe) -> Callable[..., Path]:
    """A recipe over some of the files."""

    def make(files: Sequence[Path], **tables: Any) -> Path:
        path = make_recipe("of-" + "-".join(file.stem for file in files), **tables)
        lines = path.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("files = "))
        lines[at] = f"files = {json.dumps([file.name for file in files])}"
        path.write_text("\n".join(lines))
        return path

    return make


def objects(folder: Path) -> dict[str, bytes]:
    """Every file of every store of a run, but for the headers, which remember what they grew from."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for store in sorted(folder.rglob("data.zarr"))
        for path in sorted(store.rglob("*"))
        if path.is_file() and path != store / "zarr.json"
    }


def headers(folder: Path) -> dict[str, Any]:
    """The headers, without what they grew from."""
    found = {}
    for store in sorted(folder.rglob("data.zarr")):
        said = json.loads((store / "zarr.json").read_text())
        said["attributes"]["forebay"]["provenance"].pop("grown_from", None)
        found[str(store.relative_to(folder))] = said
    return found


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files objects and records are: writing one again, also with equal bytes, makes another. A new file may get
    the number of one that is gone, hence the time."""
    found = [*folder.glob("*/data.zarr/**/c/**/*"), *folder.glob("*/done/*.json")]
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found if path.is_file()
    }


def assert_same(folder: Path, whole: Path) -> None:
    """Stores, values, labels and coordinates; and that it says so itself."""
    found, expected = objects(folder), objects(whole)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert headers(folder) == headers(whole)
    one, other = forebay.open_run(folder, chunks=None), forebay.open_run(whole, chunks=None)
    assert one.groups == other.groups
    for node in one.groups:
        assert one[node].to_dataset().identical(other[node].to_dataset().assign_attrs(one[node].attrs)), node
    for path in folder.glob("*/data.zarr"):
        assert Store.open(path.parent).verify() == {}


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param(PACKED, id="packed"),
        pytest.param(STRADDLING, id="straddling", marks=pytest.mark.slow),
        pytest.param(PATTERNS, id="patterns", marks=pytest.mark.slow),
        pytest.param(ODD, id="odd", marks=pytest.mark.slow),
    ],
)
def test_two_appends_give_the_run_over_all_files(
    tables: dict[str, Any], corpora: list[Path], recipe_over: Callable[..., Path], tmp_path: Path
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert forebay.run(recipe_over(corpora, **tables), whole, device="cpu").code == 0
    assert forebay.run(recipe_over(corpora[:1], **tables), folder, device="cpu").code == 0
    for file in corpora[1:]:
        before = {path.parent.name: Store.open(path.parent) for path in folder.glob("*/data.zarr")}
        n_token = {name: store.schema.n_token for name, store in before.items()}
        starts = {name: store.labels["sequences/start"][1] for name, store in before.items()}
        files, outcome = versions(folder), forebay.append(folder, [file])
        assert outcome.code == 0
        grown = {name: Store.open(folder / name) for name in before}
        due, after = {}, versions(folder)
        for name, store in grown.items():
            # A last window that was not full becomes longer, and with it every unit that it touches changes.
            edges = [*store.labels["sequences/start"][1].tolist(), store.schema.n_token]
            step = store.schema.unit_tokens
            steady = n_token[name] if n_token[name] in edges or name == "tokens" else int(starts[name][-1])
            kept = steady // step
            due[name] = store.schema.n_token - kept * step
            for unit in range(kept):
                record = f"{name}/done/{unit:06d}.json"
                assert after[record] == files[record]
                for key in store.ledger.record(unit)["objects"]:
                    assert after[f"{name}/data.zarr/{key}"] == files[f"{name}/data.zarr/{key}"]
            for unit in range(kept, len(store.schema.grid)):
                assert after[f"{name}/done/{unit:06d}.json"] != files.get(f"{name}/done/{unit:06d}.json")
        assert {step.name: step.tokens for step in outcome.steps} == due
    assert_same(folder, whole)
    assert all(one["n_unit"] for name in before for one in Store.open(folder / name).header.grown_from)


# ── features ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_dictionary(folder: Path, architecture: str) -> Path:
    """A random autoencoder of 45 features on the residual stream of block 1, in SAELens' format."""
    rng = np.random.default_rng(45)
    tensors = {
        "W_enc": rng.normal(size=(28, 45)) / 28**0.5,
        "b_enc": rng.normal(size=45) * 0.3,
        "W_dec": rng.normal(size=(45, 28)) / 45**0.5,
        "b_dec": rng.normal(size=28),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = rng.uniform(0.2, 1.5, size=45)
    config = {
        "architecture": architecture,
        "d_in": 28,
        "d_sae": 45,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": HOOK, "hook_name_out": None, "sae_lens_version": "6.54.12"},
        **({"k": 6} if architecture == "topk" else {}),
    }
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def test_features_of_either_layout_grow_and_their_indexes_are_built_anew(
    corpora: list[Path], recipe_over: Callable[..., Path], tmp_path: Path
) -> None:
    tables = {
        "capture": {"hooks": [HOOK], "unit_tokens": 64, "batch": 3},
        "encode": {
            "top": {"dictionary": str(write_dictionary(tmp_path / "top", "topk")), "unit_tokens": 48},
            "jump": {"dictionary": str(write_dictionary(tmp_path / "jump", "jumprelu")), "fused": True},
        },
    }
    tables["encode"]["jump"] |= {"unit_tokens": 80, "batch": 2}
    folder, whole = tmp_path / "run", tmp_path / "all-at-once"
    assert forebay.run(recipe_over(corpora, **tables), whole, device="cpu").code == 0
    assert forebay.run(recipe_over(corpora[:2], **tables), folder, device="cpu").code == 0
    before = {name: Store.open(folder / f"features-{name}").schema for name in ("top", "jump")}
    outcome = forebay.append(folder, corpora[2:])
    assert outcome.code == 0
    assert_same(folder, whole)
    # What is encoded from activations that were batched otherwise is encoded again, though its own unit was whole.
    last, activations = Store.open(folder / "activations").header.grown_from[-1], before["top"].n_token
    assert last["n_unit"] * 64 <= activations
    kept = last["n_unit"] * 64 // 48
    assert Store.open(folder / "features-top").header.grown_from[-1]["n_unit"] == kept
    one, other = forebay.open_run(folder), forebay.open_run(whole)
    for name in ("top", "jump"):
        found = one.features(name).top_contexts(range(45), n=3)
        assert found.identical(other.features(name).top_contexts(range(45), n=3).assign_attrs(found.attrs))


@pytest.mark.slow
def test_a_dictionary_that_was_trained_in_the_run_stays_and_encodes_what_is_new(
    corpora: list[Path], recipe_over: Callable[..., Path], tmp_path: Path
) -> None:
    train = {"hook": HOOK, "n_feature": 36, "k": 5, "batch": 32, "n_batch": 4}
    tables = {"capture": {"hooks": [HOOK]}, "train": {"sae": train}, "encode": {"sae": {}}}
    folder = tmp_path / "run"
    assert forebay.run(recipe_over(corpora[:2], **tables), folder, device="cpu").code == 0
    weights = (folder / "dictionaries/sae/sae_weights.safetensors").read_bytes()
    assert forebay.append(folder, corpora[2:]).code == 0
    assert (folder / "dictionaries/sae/sae_weights.safetensors").read_bytes() == weights
    run, sae = forebay.open_run(folder), forebay.load_dictionary(folder / "dictionaries" / "sae")
    x = run["activations/hook_resid_post/value"].isel(layer=0).values
    found = run.features("sae").dense(range(36)).values
    assert np.abs(found - sae.encode(torch.from_numpy(x)).numpy()).max() <= 1e-5 * found.max()
    # The recipe with the files in it says the same run; other settings of the training are refused as ever.
    assert forebay.run(recipe_over(corpora, **tables), folder, device="cpu").code == 0
    tables["train"]["sae"] |= {"k": 6}
    with pytest.raises(DictionaryError, match=r"other settings: .*k: 6 here, 5 in the store"):
        forebay.run(recipe_over(corpora, **tables), folder, device="cpu")


# ── what is refused, before anything is touched ──────────────────────────────────────────────────────────────────────


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a run but the caches of hashes and counts, with its inode."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    caches = ("files.json", "tokens/counts/")
    return {name: (p.stat().st_ino, p.read_bytes()) for name, p in found.items() if not name.startswith(caches)}


def test_what_cannot_be_is_refused_by_name_and_nothing_is_touched(
    corpora: list[Path], recipe_over: Callable[..., Path], tmp_path: Path
) -> None:
    folder, first = tmp_path / "run", corpora[0].read_bytes()
    assert forebay.run(recipe_over(corpora[:2], **PACKED), folder, device="cpu").code == 0
    before = everything(folder)

    def refused(error: type[Exception], match: str, *files: str | Path) -> None:
        with pytest.raises(error, match=match):
            forebay.append(folder, files)
        assert everything(folder) == before

    refused(CorpusError, "has .*part-1.jsonl already, and is complete", corpora[1])
    refused(CorpusError, "has .*part-1.jsonl already: name only files that it does not", corpora[1], corpora[2])
    refused(CorpusError, "part-2.jsonl is named twice", corpora[2], corpora[2])
    refused(CorpusError, "there is no file nowhere.jsonl", "nowhere.jsonl")
    corpora[0].write_bytes(first.replace(b"truth", b"trust"))
    refused(CorpusError, "part-0.jsonl has changed since .* was made of it: sha256", corpora[2])
    corpora[0].unlink()
    refused(CorpusError, "part-0.jsonl, of which .* was made, is gone", corpora[2])
    corpora[0].write_bytes(first)
    header = folder / "activations/data.zarr/zarr.json"
    kept = header.read_text()
    header.write_text(kept.replace(f'"version": {Capture.version}', '"version": 1'))
    before = everything(folder)
    said = rf"activations was made otherwise .*\n  version: {Capture.version} here, 1 in the store"
    refused(FingerprintMismatch, said, corpora[2])
    header.write_text(kept)
    (folder / "features-old").mkdir()
    shutil.copytree(folder / "activations/data.zarr", folder / "features-old/data.zarr")
    before = everything(folder)
    refused(SchemaError, "features-old is no step of the run's recipe", corpora[2])
    shutil.rmtree(folder / "features-old")
    with pytest.raises(StoreNotFound, match=r"is no run: it has no recipe\.json"):
        forebay.append(tmp_path / "nowhere", [corpora[2]])
    with pytest.raises(SchemaError, match="lies in an object store, where a run cannot grow"):
        forebay.append("memory://somewhere/run", [corpora[2]])
    assert forebay.append(folder, corpora[2:]).code == 0


def test_a_longer_sequence_that_would_cut_patterns_anew_is_refused(
    make_recipe: MakeRecipe, texts: list[str], tmp_path: Path
) -> None:
    short = [text[:20] for text in texts]
    recipe = make_recipe("short", texts=short, **PATTERNS)
    folder = tmp_path / "run"
    assert forebay.run(recipe, folder, device="cpu").code == 0
    before = everything(folder)
    make_recipe("long", texts=[text[:60] for text in texts])
    with pytest.raises(SchemaError, match=r"attn.hook_pattern/value is kept in chunks .* units that are whole"):
        forebay.append(folder, ["long.jsonl"])
    assert everything(folder) == before


@pytest.mark.slow
def test_units_stay_as_they_are_where_a_longer_sequence_would_change_their_default(
    make_recipe: MakeRecipe, texts: list[str], tmp_path: Path
) -> None:
    tables: dict[str, Any] = {
        "tokenize": {"context": 60, "layout": "documents", "long_documents": "split"},
        "encode": {"top": {"dictionary": str(write_dictionary(tmp_path / "top", "topk")), "fused": True}},
        "capture": None,
    }
    recipe = make_recipe("short", texts=[text[:20] for text in texts], **tables)
    folder = tmp_path / "run"
    assert forebay.run(recipe, folder, device="cpu").code == 0
    unit_tokens = Store.open(folder / "features-top").schema.unit_tokens
    make_recipe("long", texts=texts)
    assert forebay.append(folder, [tmp_path / "long.jsonl"]).code == 0
    grown = Store.open(folder / "features-top")
    assert grown.schema.unit_tokens == unit_tokens
    assert read_json(folder / "recipe.json")["recipe"]["encode"]["top"]["unit_tokens"] == unit_tokens
    said = grown.header.provenance["determines"]
    assert grown.fingerprint == fingerprint(said)
    assert forebay.append(folder).code == 0


# ── killed, and from the command line ────────────────────────────────────────────────────────────────────────────────


def appended_until(folder: Path, file: Path, change: int) -> None:
    """Appends in this process, which is killed before its `change`-th change of the file system."""
    left = iter(range(change))

    def counted(known: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return known(*arguments, **options)

    for name in ("replace", "rename", "link", "unlink", "rmdir"):
        setattr(os, name, partial(counted, getattr(os, name)))
    forebay.append(folder, [file], device="cpu")


@pytest.mark.slow
def test_killed_at_any_change_it_goes_on_to_the_same(
    corpora: list[Path],
    recipe_over: Callable[..., Path],
    fork_run: Callable[[Path, Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # where the process to be killed finds this file
    base, whole, three = tmp_path / "base", tmp_path / "whole", recipe_over(corpora, **STRADDLING)
    for recipe, folder in ((recipe_over(corpora[:2], **STRADDLING), base), (three, whole)):
        process = fork_run(recipe, folder)
        process.join()
        assert process.exitcode == 0
    context = get_context("forkserver")
    for change in range(40, 10_000, 45):
        folder = tmp_path / f"killed-{change}"
        shutil.copytree(base, folder)
        process = context.Process(target=appended_until, args=(folder, corpora[2], change))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        # The recipe with all files goes on as well, once the growth was decided.
        if change % 2 and (folder / "growing.json").exists():
            assert forebay.run(three, folder, device="cpu").code == 0
        else:
            assert forebay.append(folder, [corpora[2]], device="cpu").code == 0
        assert_same(folder, whole)
    assert change > 130


def test_the_command_appends_says_so_and_goes_on_when_it_is_called_again(
    corpora: list[Path], recipe_over: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert forebay.run(recipe_over(corpora[:1], **STRADDLING), folder, device="cpu").code == 0

    def cli(*arguments: str | Path) -> Result:
        return CliRunner().invoke(main, [str(one) for one in arguments])

    Store.open(folder / "activations").ledger.drop(0)  # as of a run that was not complete
    first = cli("append", folder, *corpora[1:])
    assert first.exit_code == 0, first.output
    assert re.search(r"activations: \d+ tokens", first.output), first.output
    assert Store.open(folder / "activations").complete
    Store.open(folder / "activations").ledger.drop(0)
    again = cli("append", folder, *corpora[1:])  # as after a kill: the files are there, and not all units
    assert again.exit_code == 0, again.output
    third = cli("append", folder, *corpora[1:])
    assert (third.exit_code, "already, and is complete" in third.output) == (2, True)
    assert cli("verify", folder).exit_code == 0
