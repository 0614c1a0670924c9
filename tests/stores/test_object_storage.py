"""A run in an object store is the run: the same bytes, kills and all, and never a hang where the store does not answer.

The server is a real one, on this machine, behind a proxy that fails as it is told to; the oracle is a run on disk.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result

import forebay
from forebay.pipeline.cli import main
from forebay.stores.errors import (
    CorpusError,
    CorruptStore,
    FingerprintMismatch,
    RecipeError,
    SchemaError,
    StorageError,
)
from forebay.stores.grid import Unit
from forebay.stores.ledger import Ledger
from forebay.stores.object_paths import RETRY, TIMEOUT, ObjectPath
from forebay.stores.places import delete_tree, place, write_atomic
from forebay.stores.schema import DATA, Schema, along_token
from forebay.stores.store import CLAIM, Store
from forebay.stores.writer import UnitWriter

from .s3_server import Fault, Proxy, Request

MakeRecipe = Callable[..., Path]
STEPS = ("tokens", "activations")
RESID = "blocks.1.hook_resid_post"
ON_DISK: list[Path] = []


def on_disk(folder: Path) -> dict[str, bytes]:
    """Every file of every store of a run."""
    files = [path for store in folder.rglob(DATA) for path in store.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.suffix != ".partial"}


def in_store(url: str) -> dict[str, bytes]:
    """Every object of every store of a run."""
    run = ObjectPath(url)
    return {key: (run / key).read_bytes() for key in run.sizes() if f"/{DATA}/" in key}


def recorded(url: str) -> int:
    return sum(len(Ledger(place(url) / step).done()) for step in STEPS)


def said_by(*arguments: str | Path) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(main, list(map(str, arguments)))


SMALL = Schema(
    kind="activations",
    n_token=64,
    unit_tokens=16,
    arrays={
        "resid/value": along_token(
            ("layer", "token", "d_model"), {"layer": 2, "token": 64, "d_model": 8}, "float32", 16
        )
    },
    labels={
        "sequences/start": (("sequence",), np.arange(2) * 32),
        "sequences/document": (("sequence",), np.arange(2)),
        "documents/start": (("document",), np.arange(2) * 32),
        "documents/id": (("document",), np.array(["a", "b"], object)),
        "resid/layer": (("layer",), np.arange(2)),
    },
)
"""One hook kind of two layers in four units, for what needs no model."""


def write_unit(store: Store, unit: Unit) -> None:
    """A unit whose values are its number."""
    writer = UnitWriter(store, unit)
    values = np.full((2, 16, 8), unit.index, np.float32)
    block = xr.Dataset({"value": (("layer", "token", "d_model"), values)}, {"token": range(unit.start, unit.stop)})
    writer.put(xr.DataTree.from_dict({"resid": block}))
    writer.finish({})


@pytest.fixture
def recipe(make_recipe: MakeRecipe, texts: list[str]) -> Path:
    """Three arrays, in units whose sequences straddle their edges."""
    return make_recipe(
        texts=texts[2:9],
        tokenize={"context": 60, "layout": "documents", "long_documents": "split", "unit_tokens": 200},
        capture={
            "hooks": ["blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern", "blocks.2.mlp.hook_post"],
            "store_dtype": "bfloat16",
            "unit_tokens": 80,
        },
    )


@pytest.fixture
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on disk, uninterrupted. It is made once: a store does not say where its recipe lay."""
    if not ON_DISK:
        folder = tmp_path_factory.mktemp("on-disk") / "run"
        assert forebay.run(recipe, folder, device="cpu").code == 0
        ON_DISK.append(folder)
    return ON_DISK[0]


# ── the same run ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_in_a_bucket_has_the_objects_and_values_of_one_on_disk(
    recipe: Path, whole: Path, s3: Proxy, bucket: str
) -> None:
    url = f"{bucket}/some/run"
    assert forebay.run(recipe, url, device="cpu").code == 0
    assert in_store(url) == on_disk(whole)

    ours, theirs = forebay.open_run(url), forebay.open_run(whole)
    for path in ("activations/hook_resid_post", "activations/attn.hook_pattern", "tokens"):
        assert ours[path].to_dataset().identical(theirs[path].to_dataset())
    batches = [run.batches(RESID, batch=50, seed=3) for run in (ours, theirs)]
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one, other)
    assert ours.to_str_tokens([70, 80]) == theirs.to_str_tokens([70, 80])
    for step in STEPS:
        kept, due = Store.open(f"{url}/{step}"), Store.open(whole / step)
        assert kept.verify() == {}
        for unit in due.schema.grid:
            assert kept.ledger.record(unit.index)["objects"] == due.ledger.record(unit.index)["objects"]

    before = len(s3.seen)
    assert forebay.run(recipe, url, device="cpu").code == 0
    assert not [one for one in s3.seen[before:] if one.method == "PUT"]


@pytest.mark.slow
def test_every_command_takes_an_address(recipe: Path, s3: Proxy, bucket: str) -> None:
    url = f"{bucket}/run"
    assert said_by("plan", recipe, "--to", url, "--device", "cpu").exit_code == 0
    done = said_by("run", recipe, "--to", url, "--device", "cpu")
    assert done.exit_code == 0, done.output
    status = said_by("status", url)
    assert status.exit_code == 0, status.output
    assert "activations" in status.output
    lens = said_by("lens", url, "--hook", "hook_resid_post", "--positions", "0:3")
    assert lens.exit_code == 0, lens.output
    verify = said_by("verify", url)
    assert verify.exit_code == 0, verify.output
    assert "are whole" in verify.output
    assert said_by("repair", url).exit_code == 0


@pytest.mark.slow
def test_features_are_indexed_and_found_in_a_bucket(make_recipe: MakeRecipe, bucket: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    sae = tmp_path / "sae"
    sae.mkdir()
    generator = torch.Generator().manual_seed(5)
    encoder = torch.randn(28, 40, generator=generator)
    weights = {"W_enc": encoder, "W_dec": encoder.T.clone(), "b_enc": torch.zeros(40), "b_dec": torch.zeros(28)}
    save_file({name: value.contiguous() for name, value in weights.items()}, sae / "sae_weights.safetensors")
    settings = {
        "architecture": "standard", "d_in": 28, "d_sae": 40, "dtype": "float32", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "metadata": {"hook_name": RESID},
    }  # fmt: skip
    (sae / "cfg.json").write_text(json.dumps(settings))
    recipe = make_recipe(encode={"sae": {"dictionary": str(sae)}})
    url = f"{bucket}/run"
    assert forebay.run(recipe, tmp_path / "run", device="cpu").code == 0
    assert forebay.run(recipe, url, device="cpu").code == 0
    assert in_store(url) == on_disk(tmp_path / "run")
    ours, theirs = (forebay.open_run(run).features("sae") for run in (url, tmp_path / "run"))
    assert ours.statistics().identical(theirs.statistics())
    assert ours.top_contexts([3, 7], n=3).identical(theirs.top_contexts([3, 7], n=3))

    index = ObjectPath(f"{url}/features-sae/index/sae")
    (index / "done" / "000000.json").unlink()
    assert said_by("index", url).exit_code == 0
    assert in_store(url) == on_disk(tmp_path / "run")
    assert "sae" in said_by("features", url, "sae", "3").output


# ── kills and company ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_killed_and_resumed_it_holds_the_bytes_of_one_that_never_was(
    recipe: Path, whole: Path, bucket: str, run_apart: Callable[[Path, str], Any]
) -> None:
    url, chance, hits = f"{bucket}/run", random.Random(4), 0
    for n in (0, 1, 3, 5, 8):
        process = run_apart(recipe, url)
        until = time.monotonic() + 120
        while recorded(url) < n and process.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        hits += process.exitcode == -signal.SIGKILL
        for step in STEPS:
            if (place(url) / step / DATA / "zarr.json").is_file():
                assert Store.open(f"{url}/{step}").verify() == {}
    assert hits >= 3
    process = run_apart(recipe, url)
    process.join()
    assert process.exitcode == 0
    assert in_store(url) == on_disk(whole)


@pytest.mark.slow
def test_two_runs_at_once_put_every_record_once(
    recipe: Path, whole: Path, s3: Proxy, bucket: str, run_apart: Callable[[Path, str], Any]
) -> None:
    url = f"{bucket}/run"
    processes = [run_apart(recipe, url) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert in_store(url) == on_disk(whole)
    assert all(Store.open(f"{url}/{step}").verify() == {} for step in STEPS)


def test_of_two_writers_of_a_unit_the_second_leaves_the_first_ones_record(s3: Proxy, bucket: str) -> None:
    ledger = Ledger(place(f"{bucket}/step"))
    objects = {"a/c/0": {"bytes": 3, "sha256": "0" * 64}}
    first = {"unit": 0, "fingerprint": "f", "objects": objects, "host": "one"}
    ledger.complete(0, first)
    ledger.complete(0, {**first, "host": "two"})
    assert ledger.record(0)["host"] == "one"
    assert s3.seen[-2].method == "GET"  # nothing was put by the second but what was refused
    other = {**first, "objects": {"a/c/0": {"bytes": 4, "sha256": "1" * 64}}, "host": "three"}
    ledger.complete(0, other)  # whose objects lie there now, for it put them last
    assert ledger.record(0) == other


def test_a_store_appears_with_its_last_object_and_a_crash_before_is_made_good(
    recipe: Path, whole: Path, s3: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/run"
    monkeypatch.setenv(RETRY, "0.3")
    last = f"tokens/{DATA}/zarr.json"
    s3.fault = lambda request: "500" if request.method == "PUT" and request.key.endswith(last) else None
    with pytest.raises(StorageError):
        forebay.run(recipe, url, device="cpu")
    s3.fault = lambda request: None
    left = ObjectPath(f"{url}/tokens").sizes()
    assert f"{DATA}/token_id/zarr.json" in left
    assert f"{DATA}/zarr.json" not in left
    with pytest.raises(forebay.stores.errors.StoreNotFound):
        forebay.open_run(url)
    assert forebay.run(recipe, url, device="cpu").code == 0
    assert in_store(url) == on_disk(whole)


def test_a_store_of_another_recipe_is_refused_also_where_only_its_claim_stands(bucket: str) -> None:
    folder = place(f"{bucket}/run/activations")
    ours, theirs = ({"determines": {"hooks": [name]}} for name in ("one", "two"))
    Store.create(folder, SMALL, "a" * 64, ours)
    for left in (f"{DATA}/zarr.json", f"{DATA}/resid/zarr.json", ""):
        with pytest.raises(
            FingerprintMismatch, match=r"gives b{12}\.\n  hooks: \['two'\] here, \['one'\] in the store"
        ):
            Store.create(folder, SMALL, "b" * 64, theirs)
        if left:
            (folder / left).unlink()
    Store.create(folder, SMALL, "a" * 64, ours)
    delete_tree(folder)
    assert Store.create(folder, SMALL, "b" * 64, theirs).fingerprint == "b" * 64


@pytest.mark.slow
def test_another_recipe_is_refused_also_where_only_the_claim_stands(
    recipe: Path, make_recipe: MakeRecipe, bucket: str
) -> None:
    url = f"{bucket}/run"
    assert forebay.run(recipe, url, device="cpu").code == 0
    claim = (ObjectPath(url) / "activations" / CLAIM).read_bytes()
    other = make_recipe("other", tokenize={"context": 60, "layout": "documents", "long_documents": "split"})
    with pytest.raises(FingerprintMismatch, match="unit_tokens"):
        forebay.run(other, url, device="cpu")
    delete_tree(ObjectPath(url))
    write_atomic(ObjectPath(url) / "activations" / CLAIM, claim)
    with pytest.raises(FingerprintMismatch, match=r"this recipe gives [0-9a-f]{12}\.\n  parameters\.hooks"):
        forebay.run(make_recipe("third", capture={"hooks": ["blocks.2.hook_resid_post"]}), url, device="cpu")
    delete_tree(ObjectPath(url) / "tokens")
    assert forebay.run(recipe, url, device="cpu").code == 0


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_deleted_truncated_and_altered_objects_are_named_refused_and_healed(
    recipe: Path, whole: Path, bucket: str
) -> None:
    url = f"{bucket}/run"
    assert forebay.run(recipe, url, device="cpu").code == 0
    data = ObjectPath(f"{url}/activations/{DATA}")
    gone, short, empty, changed = (data / f"hook_resid_post/value/c/0/{n}/0" for n in (0, 1, 2, 3))
    said = short.read_bytes()
    gone.unlink()
    write_atomic(short, said[: len(said) // 2])
    write_atomic(empty, b"")
    write_atomic(changed, bytes([said[0] ^ 1]) + changed.read_bytes()[1:])

    values = forebay.open_run(url, chunks=None)["activations/hook_resid_post"].value
    for unit in (0, 1, 2, 3):
        with pytest.raises(CorruptStore, match="forebay verify"):
            values[:, 80 * unit : 80 * unit + 5].load()
    with pytest.raises(CorruptStore):
        list(forebay.open_run(url).batches(RESID, batch=50))

    found = said_by("verify", url)
    assert found.exit_code == 1
    for path, what in ((gone, "missing"), (short, "truncated"), (empty, "truncated"), (changed, "bytes have changed")):
        assert any(str(path) in line and what in line for line in found.output.splitlines()), found.output
    assert said_by("repair", url).exit_code == 0
    assert forebay.run(recipe, url, device="cpu").code == 0
    assert said_by("verify", url).exit_code == 0
    assert in_store(url) == on_disk(whole)


# ── a server that fails ──────────────────────────────────────────────────────────────────────────────────────────────


def test_stores_are_made_written_and_read_through_a_server_that_fails_three_requests_of_ten(
    s3: Proxy, bucket: str, tmp_path: Path
) -> None:
    chance = random.Random(1)
    faults: tuple[Fault, ...] = ("500", "503", "cut")
    s3.fault = lambda request: chance.choice(faults) if chance.random() < 0.3 else None
    for run in (place(f"{bucket}/run"), tmp_path):
        store = Store.create(run / "activations", SMALL, "f" * 64, {"determines": {}})
        for unit in SMALL.grid:
            write_unit(store, unit)
        assert store.verify() == {}
        np.testing.assert_array_equal(
            forebay.open_run(run)["activations/resid"].value.values[1, :, 3], np.repeat(np.arange(4), 16)
        )
    assert Counter(s3.faults).keys() == {"500", "503", "cut"}
    s3.fault = lambda request: None
    assert in_store(f"{bucket}/run") == on_disk(tmp_path)


@pytest.mark.slow
def test_a_server_that_fails_three_requests_of_ten_is_survived(
    recipe: Path, whole: Path, s3: Proxy, bucket: str
) -> None:
    chance = random.Random(1)
    faults: tuple[Fault, ...] = ("500", "503", "cut")
    s3.fault = lambda request: chance.choice(faults) if chance.random() < 0.3 else None
    url = f"{bucket}/run"
    assert forebay.run(recipe, url, device="cpu").code == 0
    np.testing.assert_array_equal(
        forebay.open_run(url)["activations/hook_resid_post"].value.values,
        forebay.open_run(whole)["activations/hook_resid_post"].value.values,
    )
    assert all(Store.open(f"{url}/{step}").verify() == {} for step in STEPS)
    s3.fault = lambda request: None
    assert Counter(s3.faults).keys() == {"500", "503", "cut"}
    assert in_store(url) == on_disk(whole)


@pytest.mark.slow
def test_a_server_that_is_silent_once_is_asked_again(
    recipe: Path, s3: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TIMEOUT, "1")
    stalled: Counter[str] = Counter()

    def once_a_kind(request: Request) -> Fault:
        kind = f"{request.method} {request.key.rpartition('/')[2][-5:]}"
        stalled[kind] += 1
        return "stall" if stalled[kind] == 1 and kind in ("PUT .json", "PUT 0", "GET ", "HEAD .json") else None

    s3.fault = once_a_kind
    assert forebay.run(recipe, f"{bucket}/run", device="cpu").code == 0
    assert len(s3.faults) >= 3


@pytest.mark.parametrize("asked", ["status", "verify", "run"])
def test_a_server_that_is_silent_for_ever_ends_in_an_error_that_says_what_to_do(
    asked: str, recipe: Path, s3: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in ((TIMEOUT, 0.5), (RETRY, 1.0)):
        monkeypatch.setenv(name, str(seconds))
    s3.fault = lambda request: "stall"
    began = time.monotonic()
    to = ("run", recipe, "--to", bucket + "/run") if asked == "run" else (asked, bucket + "/run")
    said = said_by(*to)
    assert time.monotonic() - began < 30  # a few requests of at most 2 s each; the rest is the machine's
    assert said.exit_code == 1, said.output
    for word in (bucket, TIMEOUT, RETRY, "run again when the store answers"):
        assert word in said.output


@pytest.mark.slow
def test_a_run_whose_server_falls_silent_ends_and_goes_on_later(
    recipe: Path, whole: Path, s3: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in ((TIMEOUT, 1.0), (RETRY, 1.0)):
        monkeypatch.setenv(name, str(seconds))
    s3.fault = lambda request: "stall" if "activations/done/000003" in request.key else None
    with pytest.raises(StorageError, match=r"activations/done/000003\.json"):
        forebay.run(recipe, f"{bucket}/run", device="cpu")
    s3.fault = lambda request: None
    assert not ObjectPath(f"{bucket}/run/activations/failed").names()
    assert forebay.run(recipe, f"{bucket}/run", device="cpu").code == 0
    assert in_store(f"{bucket}/run") == on_disk(whole)


def test_a_bucket_that_is_not_there_is_named(recipe: Path, s3: Proxy) -> None:
    said = said_by("run", recipe, "--to", "s3://no-such-bucket/run", "--device", "cpu")
    assert said.exit_code == 1
    assert "There is no s3://no-such-bucket: make it first" in said.output


def test_an_unencrypted_server_must_be_allowed(s3: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StorageError, match="AWS_ALLOW_HTTP=true"):
        forebay.open_run(f"{bucket}/run")


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_store_costs_the_requests_that_the_documentation_says(s3: Proxy, bucket: str) -> None:
    """One hook kind of two layers in four units, without what a run asks besides."""
    store = Store.create(place(f"{bucket}/run/activations"), SMALL, "f" * 64, {"determines": {}})
    assert s3.counts()["PUT"] == 12 + 4
    for unit in SMALL.grid:
        before = s3.counts()
        write_unit(store, unit)
        if unit.index:  # the first one reads labels and metadata
            assert s3.counts() - before == Counter(PUT=2 + 1)
    s3.seen.clear()
    run = forebay.open_run(f"{bucket}/run")
    assert s3.counts().total() <= 30 + 5
    s3.seen.clear()
    with dask.config.set(scheduler="synchronous"):
        values = run["activations/resid"].value.values
    np.testing.assert_array_equal(values[1, :, 3], np.repeat(np.arange(4), 16))
    assert s3.counts() == Counter(GET=1 + 8)  # metadata; each object whole
    store = Store.open(f"{bucket}/run/activations")
    before = len(store.labels)  # which are read once
    s3.seen.clear()
    assert before
    assert store.verify() == {}
    assert s3.counts() == Counter(LIST=1, GET=4 + 8)


@pytest.mark.slow
def test_requests_grow_with_units_by_what_the_documentation_says(
    make_recipe: MakeRecipe, s3: Proxy, s3_server: tuple[str, int], bucket: str
) -> None:
    """A unit of captures: a PUT an object, one of its record, and a few looks; reading is by range."""
    asked: dict[int, Counter[str]] = {}
    opened: dict[int, Counter[str]] = {}
    for unit_tokens in (64, 128):
        recipe, url = make_recipe(capture={"unit_tokens": unit_tokens}), f"{bucket}/{unit_tokens}"
        s3.seen.clear()
        assert forebay.run(recipe, url, device="cpu").code == 0
        asked[unit_tokens] = Counter(
            "LIST" if "list-type" in one.query else one.method
            for one in s3.seen
            if "/activations/" in f"/{one.key}" or "activations" in one.query
        )
        s3.seen.clear()
        run = forebay.open_run(url)
        opened[unit_tokens] = s3.counts()
    n_unit = {one: len(Store.open(f"{bucket}/{one}/activations").schema.grid) for one in asked}
    more = n_unit[64] - n_unit[128]
    assert more >= 5
    grown = {method: (asked[64][method] - asked[128][method]) / more for method in ("PUT", "HEAD", "GET", "LIST")}
    assert grown["PUT"] == 3 + 1  # three layers of one array, and the record
    assert grown["HEAD"] <= 3  # has someone else recorded it by now?
    assert grown["GET"] == 1  # the record, when all are added up at the end
    assert grown["LIST"] == 0
    assert opened[64] == opened[128]  # whatever the number of units
    s3.seen.clear()
    with dask.config.set(scheduler="synchronous"):
        run["activations/hook_resid_post"].value.isel(layer=0).values  # noqa: B018
    assert s3.counts()["HEAD"] == 0
    assert s3.counts()["GET"] == 1 + n_unit[128]  # metadata; each object whole


# ── other stores ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_and_file_addresses_hold_the_same_run(recipe: Path, whole: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/run"
    assert forebay.run(recipe, url, device="cpu").code == 0
    assert in_store(url) == on_disk(whole)
    assert forebay.open_run(url)["tokens"].identical(forebay.open_run(whole)["tokens"])
    assert forebay.run(recipe, (tmp_path / "by url").as_uri(), device="cpu").code == 0
    assert on_disk(tmp_path / "by url") == on_disk(whole)
    assert forebay.open_store((tmp_path / "by url" / "tokens").as_uri()).attrs


def test_without_obstore_the_refusal_names_the_extra(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for arguments in (("status", "s3://bucket/run"), ("run", recipe, "--to", "gs://bucket/run")):
        said = said_by(*arguments)
        assert said.exit_code == 1
        assert "pip install 'forebay[cloud]'" in said.output


def test_training_corpora_and_growth_in_object_stores_are_refused_with_advice(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    training = {"sae": {"hook": RESID, "n_feature": 16, "k": 4}}
    with pytest.raises(RecipeError, match=r"train\.sae.*folder of this machine"):
        forebay.run(make_recipe(train=training), f"memory://{tmp_path.name}/run", device="cpu")
    with pytest.raises(CorpusError, match=r"s3://bucket/text\.jsonl.*copy"):
        forebay.plan(_with_corpus(make_recipe(), "s3://bucket/text.jsonl"), tmp_path / "run", device="cpu")
    with pytest.raises(SchemaError, match="needs a folder of this machine"):
        os.fspath(place(f"memory://{tmp_path.name}/run"))


def _with_corpus(recipe: Path, file: str) -> Path:
    lines = [f'files = ["{file}"]' if line.startswith("files") else line for line in recipe.read_text().splitlines()]
    recipe.write_text("\n".join(lines))
    return recipe


def test_a_process_that_was_forked_is_refused_and_does_not_hang(s3: Proxy, bucket: str) -> None:
    write_atomic(ObjectPath(f"{bucket}/a"), b"1")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ObjectPath(f"{bucket}/a").read_bytes()
        except StorageError as error:
            os.write(write, str(error).encode()[:500])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(child, 0)
    assert "was used before this process was forked" in said
