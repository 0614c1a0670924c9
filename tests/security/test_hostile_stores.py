"""A store from a stranger can run nothing, read nothing beside itself because its records say so, and write nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from forebay.pipeline.cli import main
from forebay.pipeline.report.status import status
from forebay.stores.errors import CorruptStore, ForebayError, SchemaError, UnsafePath
from forebay.stores.growth import roll_forward
from forebay.stores.ledger import read_json
from forebay.stores.schema import Array, Schema, along_token, read_header
from forebay.stores.store import Store
from forebay.stores.tree import open_run, open_store
from forebay.stores.untrusted import LABEL_CHUNK, is_key, is_path

from .hostile_stores import N_TOKEN, UNIT, edit, edit_header, edit_schema, write_run, write_unit
from .watching import MARK, contents, watched

NAME = "hook_embed/value"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    write_run(folder)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's, of which nothing may change."""
    folder = tmp_path / "home"
    (folder / "c" / "0").mkdir(parents=True)
    for name in ("secret.json", "000000.json", "0", "c/0/0", "x.partial", ".x.tmp", "000000.1.json"):
        (folder / name).write_text(f'{{"canary": "{name}"}}')
    return folder


def reads(run: Path) -> list[Callable[[], object]]:
    """Every way in which a store is looked at."""
    store = run / "activations"
    return [
        lambda: read_header(store / "data.zarr"),
        lambda: Store.open(store),
        lambda: open_store(store),
        lambda: open_run(run, partial=True),
        lambda: status(run),
    ]


def test_what_was_made_is_read(run: Path) -> None:
    tree = open_run(run)
    assert tree["activations/hook_embed/value"].values.shape == (2, N_TOKEN, 3)
    assert tree["activations/hook_embed/layer"].values.tolist() == [0, 2]
    assert tree["documents/id"].values.tolist() == ["a", "b"]
    assert Store.open(run / "activations").verify() == {}
    [step] = status(run)
    assert step.units_done == 2


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = [
    "../../home/secret",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "./value",
    "a//b",
    "a/",
    "",
    "a\\..\\b",
    "a\0b",
    "a\x1b[2J/value",
    "\u202egnp.exe",
    "c/0/0",
    ".hidden/value",
    "zarr.json",
    "x" * 300,
    "/".join(["deep"] * 500),
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_no_array_is_named_out_of_its_store(run: Path, outside: Path, name: str) -> None:
    before = contents(outside)
    edit_schema(run, lambda said: said["arrays"].update({name: said["arrays"].pop(NAME)}))
    assert not is_path(name)
    with watched(run) as watch:
        for read in reads(run):
            with pytest.raises(CorruptStore, match="no path in a store"):
                read()
    assert not any(str(outside) in path for path in watch.opened)
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["hook_resid_post/value", "attn.hook_q/value", "sae/layer_3/feature", "naïve 1/x"])
def test_names_that_are_written_are_names(name: str) -> None:
    assert is_path(name)


def test_no_store_is_made_with_a_name_that_leads_out(tmp_path: Path) -> None:
    array = along_token(("token",), {"token": 4}, "uint32", 4)
    labels = {"sequences/start": (("sequence",), np.array([0]))}
    schema = Schema(kind="features", n_token=4, unit_tokens=4, arrays={"../../x/value": array}, labels=labels)
    with pytest.raises(CorruptStore, match="no path in a store"):
        Store.create(tmp_path / "features", schema, "f" * 64, {"determines": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_step_in_a_folder_that_no_step_is_named_as_is_refused_by_its_name_spelt_out(run: Path) -> None:
    (run / "activations").rename(run / "evil\x1b]0;owned\x07")
    with pytest.raises(UnsafePath, match=r"evil\\x1b\]0;owned\\x07"):
        status(run)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SCHEMAS: dict[str, Change] = {
    "negative tokens": lambda s: s.update(n_token=-1),
    "a billion billion tokens": lambda s: s.update(n_token=10**18),
    "more tokens than 64 bits": lambda s: s.update(n_token=10**40),
    "a fraction of a token": lambda s: s.update(n_token=1.5),
    "tokens in words": lambda s: s.update(n_token="12"),
    "true for a number": lambda s: s.update(unit_tokens=True),
    "units of nothing": lambda s: s.update(unit_tokens=0),
    "units without end": lambda s: s.update(n_token=2**47, unit_tokens=1),
    "a codec as compression": lambda s: s.update(compression="numcodecs.pickle"),
    "a kind with escapes": lambda s: s.update(kind="\x1b[31mtokens"),
    "arrays as a list": lambda s: s.update(arrays=[1, 2]),
}
ARRAYS: dict[str, dict[str, Any]] = {
    "shape beyond memory": {"shape": [2, N_TOKEN, 2**50], "chunks": [1, 8, 2**50], "shards": [1, 8, 2**50]},
    "negative shape": {"shape": [2, -12, 3]},
    "zero chunks": {"chunks": [1, 0, 3]},
    "negative shards": {"shards": [1, -8, 3]},
    "shards that chunks do not divide": {"chunks": [1, 5, 3]},
    "shards that are no units": {"shards": [1, 4, 3], "chunks": [1, 4, 3]},
    "another number of tokens": {"shape": [2, 13, 3]},
    "a dimension too few": {"dims": ["layer", "token"]},
    "a dimension twice": {"dims": ["layer", "token", "token"]},
    "no dimensions": {"dims": [], "shape": [], "chunks": [], "shards": []},
    "more sequences than tokens": {"dims": ["layer", "token", "sequence"], "shape": [2, 12, 13]},
    "a billion objects a unit": {"shape": [2, 12, 10**9], "chunks": [1, 8, 1], "shards": [1, 8, 1]},
    "objects": {"dtype": "object"},
    "a numpy dtype string": {"dtype": "|O"},
    "a dtype that is no text": {"dtype": ["float32"]},
    "numbers in words": {"shape": ["2", "12", "3"]},
    "a dimension that leads out": {"dims": ["layer", "token", "../x"]},
}


@pytest.mark.parametrize("change", SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_no_store_has_is_refused_before_anything_is_made_of_it(run: Path, change: Change) -> None:
    edit_schema(run, change)
    for read in reads(run):
        with pytest.raises(CorruptStore):
            read()


def test_a_header_with_arrays_without_end_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.stores.untrusted.MOST_ARRAYS", 9)
    edit_schema(run, lambda said: said.update(arrays={f"a{i}/value": said["arrays"][NAME] for i in range(10)}))
    with pytest.raises(CorruptStore, match="it names 10 arrays"):
        read_header(run / "activations" / "data.zarr")


@pytest.mark.parametrize("keys", ARRAYS.values(), ids=ARRAYS)
def test_an_array_that_no_store_has_is_refused_before_anything_is_made_of_it(run: Path, keys: dict[str, Any]) -> None:
    edit_schema(run, lambda said: said["arrays"][NAME].update(keys))
    for read in reads(run):
        with pytest.raises(CorruptStore):
            read()


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.update(fingerprint=5),
        lambda said: said.update(provenance=[1]),
        lambda said: said.update(provenance={"grown_from": [5]}),
        lambda said: said.update(provenance={"grown_from": 5}),
        lambda said: said.update(schema=None),
        lambda said: said.pop("fingerprint"),
        lambda said: said["schema"].update(format=[1]),
    ],
    ids=range(7),
)
def test_a_header_of_another_form_is_refused(run: Path, change: Change) -> None:
    edit_header(run, change)
    for read in reads(run):
        with pytest.raises(ForebayError):
            read()


# ── sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_nested_without_end_is_refused(run: Path) -> None:
    path = run / "activations" / "data.zarr" / "zarr.json"
    path.write_text('{"attributes": ' + "[" * 100_000 + "]" * 100_000 + "}")
    for read in reads(run):
        with pytest.raises(CorruptStore, match="not readable as JSON"):
            read()
    record = run / "activations" / "done" / "000000.json"
    record.write_text('{"a":' * 100_000)
    with pytest.raises(CorruptStore, match="not readable as JSON"):
        read_json(record)


@pytest.mark.parametrize("name", ["data.zarr/zarr.json", "done/000000.json", "data.zarr/hook_embed/value/zarr.json"])
def test_a_file_of_gigabytes_is_not_read(run: Path, name: str) -> None:
    os.truncate(run / "activations" / name, 2**34)  # of a sparse file nothing is on the disk

    def read() -> None:
        store = Store.open(run / "activations")
        store.ledger.record(0)
        store.array(NAME)

    with pytest.raises(CorruptStore, match=r"17,179,869,184 bytes|larger than"):
        read()


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run: Path) -> None:
    for name in ("done/000000.json", "data.zarr/hook_embed/layer/c/0"):
        (run / "activations" / name).unlink()
        os.mkfifo(run / "activations" / name)
    store = Store.open(run / "activations")
    with pytest.raises(CorruptStore, match="no file"):
        store.ledger.record(0)
    with pytest.raises(CorruptStore, match="no file"):
        store.labels  # noqa: B018


# ── codecs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def inner(said: dict[str, Any]) -> dict[str, Any]:
    return said["codecs"][0]["configuration"]  # type: ignore[no-any-return]


CODECS: dict[str, Change] = {
    "a pickle filter": lambda m: inner(m).update(codecs=[{"name": "numcodecs.pickle", "configuration": {}}]),
    "an object codec": lambda m: m.update(codecs=[{"name": "vlen-bytes"}]),
    "a codec by module": lambda m: m.update(codecs=[{"name": "os.system", "configuration": {"command": MARK}}]),
    "a codec of numcodecs": lambda m: inner(m)["codecs"].insert(1, {"name": "numcodecs.zlib", "configuration": {}}),
    "no shards": lambda m: m.update(codecs=inner(m)["codecs"]),
    "shards in shards": lambda m: inner(m).update(codecs=[m["codecs"][0] | {"configuration": dict(inner(m))}]),
    "another compressor": lambda m: inner(m)["codecs"][1]["configuration"].update(cname="lz4"),
    "another order of bytes": lambda m: inner(m)["codecs"][0]["configuration"].update(endian="big"),
    "no checksums": lambda m: inner(m)["codecs"].pop(),
    "a storage transformer": lambda m: m.update(storage_transformers=[{"name": MARK}]),
    "objects": lambda m: m.update(data_type="variable_length_bytes"),
    "structures": lambda m: m.update(data_type={"name": "structured", "configuration": {"fields": [["a", "int8"]]}}),
    "another data type": lambda m: m.update(data_type="float64"),
    "chunks of another size": lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[2**40, 8, 3]),
    "zero chunks": lambda m: inner(m).update(chunk_shape=[1, 0, 3]),
    "another grid": lambda m: m.update(chunk_grid={"name": "rectangular"}),
    "another shape": lambda m: m.update(shape=[2, 10**18, 3, 1]),
    "a shorter axis": lambda m: m.update(shape=[2, 11, 3]),
    "a group": lambda m: m.update(node_type="group"),
    "version 2": lambda m: m.update(zarr_format=2),
    "codecs that are none": lambda m: m.update(codecs="bytes"),
}


@pytest.mark.parametrize("change", CODECS.values(), ids=CODECS)
def test_no_codec_comes_into_play_but_those_that_forebay_writes(
    run: Path, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(run / "activations" / "data.zarr" / NAME / "zarr.json", change)
    store = Store.open(run / "activations")
    assert store.labels
    import zarr

    def reached(*arguments: Any, **options: Any) -> None:
        raise AssertionError("Zarr was asked before the metadata were looked at")

    monkeypatch.setattr(zarr.Group, "__getitem__", reached)
    with watched(run), pytest.raises(CorruptStore):
        store.array(NAME)
    with watched(run), pytest.raises(CorruptStore):
        write_unit(store, 0)


def test_metadata_that_zarr_consolidated_are_not_believed(run: Path) -> None:
    """Another reader may take them; forebay reads the array's own, and those alone."""

    def change(said: dict[str, Any]) -> None:
        for node in said.get("consolidated_metadata", {}).get("metadata", {}).values():
            if node["node_type"] == "array":
                node["codecs"] = [{"name": "numcodecs.pickle"}]

    edit(run / "activations" / "data.zarr" / "zarr.json", change)
    with watched(run):
        assert open_run(run)["activations/hook_embed/value"].values.shape == (2, N_TOKEN, 3)


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LABELS: dict[str, tuple[str, Change]] = {
    "longer than its axis": ("hook_embed/layer", lambda m: m.update(shape=[3])),
    "of a billion billion": ("sequences/start", lambda m: m.update(shape=[10**18])),
    "mostly absent": ("documents/id", lambda m: m.update(shape=[2**30])),
    "negative": ("documents/start", lambda m: m.update(shape=[-2])),
    "of two dimensions": ("documents/start", lambda m: m.update(shape=[2, 1], dimension_names=["document", "x"])),
    "of bytes": ("documents/id", lambda m: m.update(data_type="variable_length_bytes")),
    "in one huge chunk": (
        "documents/start",
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[LABEL_CHUNK * 2]),
    ),
    "by another codec": ("documents/id", lambda m: m["codecs"].append({"name": "numcodecs.lzma"})),
    "along another axis": ("sequences/start", lambda m: m.update(dimension_names=["document"])),
    "without an axis": ("sequences/start", lambda m: m.update(dimension_names=None)),
}


@pytest.mark.parametrize(("path", "change"), LABELS.values(), ids=LABELS)
def test_labels_that_no_store_has_are_refused(run: Path, path: str, change: Change) -> None:
    edit(run / "activations" / "data.zarr" / path / "zarr.json", change)
    with watched(run), pytest.raises(CorruptStore):
        Store.open(run / "activations").labels  # noqa: B018


@pytest.mark.parametrize("starts", [[0, 8, 4], [4, 8, 9], [0, 4, 4], [0, 4, 12], [0, 4, 99]])
def test_sequences_that_do_not_ascend_are_refused(run: Path, starts: list[int]) -> None:
    import zarr

    zarr.open_array(run / "activations" / "data.zarr" / "sequences" / "start", mode="r+")[...] = np.array(starts)
    for look in (lambda: open_run(run), lambda: Store.open(run / "activations").verify()):
        with pytest.raises(CorruptStore, match="ascend"):
            look()


def test_a_label_that_would_unpack_to_gigabytes_is_not_unpacked(run: Path) -> None:
    """A frame of Zstandard says how long it is; one of ten gigabytes takes some hundred bytes."""
    path = run / "activations" / "data.zarr" / "sequences" / "start" / "c" / "0"
    path.write_bytes(struct.pack("<IBQ", 0xFD2FB528, 0xE0, 10 * 2**30) + b"\x03\x00\x00a")
    with pytest.raises(CorruptStore, match="would unpack to 10,737,418,240 bytes"):
        Store.open(run / "activations").labels  # noqa: B018
    path.write_bytes(b"no frame")
    with pytest.raises(CorruptStore, match="cannot be unpacked"):
        Store.open(run / "activations").labels  # noqa: B018


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────

KEYS = ["../../../home/secret.json", "/etc/passwd", "hook_embed/value/c/0/../../../../../home/secret.json", "a\0b"]


@pytest.mark.parametrize("key", KEYS)
def test_a_record_has_nothing_read_or_removed_outside_its_store(run: Path, outside: Path, key: str) -> None:
    assert key == KEYS[2] or not is_key(key)
    before = contents(outside)
    record = run / "activations" / "done" / "000000.json"
    edit(record, lambda said: said["objects"].update({key: {"bytes": 5, "sha256": "0" * 64}}))
    with watched(run) as watch:
        assert list(Store.open(run / "activations").verify()) == [0]
        found = CliRunner().invoke(main, ["repair", str(run)])
        assert found.exit_code == 0, found.output
    assert not any("home" in path or "passwd" in path for path in watch.opened)
    assert contents(outside) == before
    assert not record.exists()


RECORDS: dict[str, Any] = {
    "nothing": {},
    "rows as text": {"rows": "all"},
    "objects as a list": {"objects": ["../../x"]},
    "no seconds": {"rows": {"token": [0, 8]}, "seconds": None},
    "seconds in words": {"rows": {"token": ["0", "8"]}, "seconds": {"compute": "x"}},
    "numbers beyond any": {"rows": {"token": [0, 10**300]}, "seconds": {"compute": -1}, "unit": 10**300},
    "escapes": {"host": "\x1b]8;;http://evil\x07", "pid": [], "finished": "never"},
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_a_record_of_any_form_is_told_as_damaged(run: Path, change: Any) -> None:
    path = run / "activations" / "done" / "000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change} if change else {}))
    shown = CliRunner().invoke(main, ["status", str(run)])
    assert shown.exit_code == 0, shown.output
    assert shown.exception is None
    assert "\x1b" not in shown.output
    found = CliRunner().invoke(main, ["verify", str(run)])
    assert found.exit_code == (0 if change == RECORDS["escapes"] else found.exit_code)
    assert isinstance(found.exception, SystemExit | None)
    assert "\x1b" not in found.output + found.stderr


def test_records_of_units_that_do_not_exist_do_not_make_a_store_whole(run: Path) -> None:
    done = run / "activations" / "done"
    (done / "000001.json").rename(done / f"{'9' * 200}.json")
    with pytest.raises(ForebayError, match="1 of 2 units"):
        open_run(run)
    assert CliRunner().invoke(main, ["status", str(run)]).exit_code == 0


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def link(path: Path, target: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target, target_is_directory=True)


@pytest.mark.parametrize("name", ["hook_embed/value/c", "hook_embed/value/c/0", "hook_embed/value/c/0/0"])
def test_nothing_is_written_through_a_link_below_data(run: Path, outside: Path, name: str) -> None:
    link(run / "activations" / "data.zarr" / name, outside)
    before = contents(outside)
    with watched(run), pytest.raises(UnsafePath, match="symbolic link"):
        write_unit(Store.open(run / "activations"), 0)
    assert contents(outside) == before


def test_an_object_that_is_a_link_is_replaced_and_what_it_leads_to_is_not_touched(run: Path, outside: Path) -> None:
    path = run / "activations" / "data.zarr" / NAME / "c" / "0" / "0" / "0"
    kept = path.read_bytes()
    path.unlink()
    path.symlink_to(outside / "secret.json")
    before = contents(outside)
    assert list(Store.open(run / "activations").verify()) == [0]
    with watched(run):
        write_unit(Store.open(run / "activations"), 0)
    assert contents(outside) == before
    assert not path.is_symlink()
    assert path.read_bytes() == kept


def test_a_store_that_is_a_link_is_read_and_not_written(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (run / "activations" / "data.zarr").rename(elsewhere)
    (run / "activations" / "data.zarr").symlink_to(elsewhere)
    (elsewhere / "mine.partial").write_text("mine")
    before = contents(elsewhere)
    store = Store.open(run / "activations")
    assert open_run(run)["activations/hook_embed/value"].values[1, 0, 0] == 24
    assert store.verify() == {}
    with watched(run):
        for change in (
            lambda: write_unit(store, 0),
            store.sweep,
            lambda: Store.create(run / "activations", store.schema_with_labels, store.fingerprint, {"determines": {}}),
        ):
            with pytest.raises(UnsafePath, match="symbolic link"):
                change()
    assert contents(elsewhere) == before


@pytest.mark.parametrize("folder", ["done", "failed"])
def test_no_record_is_put_or_dropped_through_a_link(run: Path, outside: Path, folder: str) -> None:
    link(run / "activations" / folder, outside)
    before, store = contents(outside), Store.open(run / "activations")
    changes: dict[str, list[Callable[[], object]]] = {
        "done": [lambda: store.ledger.complete(0, {}), lambda: store.ledger.drop(0), lambda: write_unit(store, 0)],
        "failed": [lambda: store.ledger.fail(0, ValueError("x"), {})],
    }
    with watched(run):
        for change in changes[folder]:
            with pytest.raises(UnsafePath, match="symbolic link"):
                change()
        store.sweep()
        CliRunner().invoke(main, ["repair", "--failed", str(run)])
    assert contents(outside) == before


# ── growth ───────────────────────────────────────────────────────────────────────────────────────────────────────────

STAGED = ".growing." + "0" * 32
ENTRY = {"step": "activations", "from": "a", "to": "b", "n_unit": 0, "staged": STAGED, "files": [], "gone": []}
JOURNALS: dict[str, Any] = {
    "a file outside": {"stores": [], "files": {"../home/secret.json": MARK}},
    "a file of the user's": {"stores": [], "files": {"/tmp/forebay-owned": MARK}},
    "a file that no growth replaces": {"stores": [], "files": {"tokenizer.json": MARK}},
    "objects outside": {"stores": [{**ENTRY, "gone": ["../../../home/secret.json"]}], "files": {}},
    "objects by an absolute path": {"stores": [{**ENTRY, "gone": ["/etc/passwd"]}], "files": {}},
    "metadata outside": {"stores": [{**ENTRY, "files": ["../../../home/secret.json"]}], "files": {}},
    "a step outside": {"stores": [{**ENTRY, "step": "../home"}], "files": {}},
    "staged elsewhere": {"stores": [{**ENTRY, "staged": "../../home"}], "files": {}},
    "files that are no list": {"stores": [{**ENTRY, "files": "zarr.json"}], "files": {}},
    "an entry that is none": {"stores": [5], "files": {}},
    "a unit in words": {"stores": [{**ENTRY, "n_unit": "all"}], "files": {}},
    "nothing": {},
}


@pytest.mark.parametrize("journal", JOURNALS.values(), ids=JOURNALS)
def test_the_journal_of_a_growth_has_nothing_written_or_removed_outside(
    run: Path, outside: Path, journal: dict[str, Any]
) -> None:
    (run / "growing.json").write_text(json.dumps(journal))
    before = contents(outside), contents(run)
    with watched(run), pytest.raises(UnsafePath):
        roll_forward(run)
    assert (contents(outside), contents(run)) == before


def test_a_growth_is_not_settled_by_what_a_stranger_announces(run: Path, outside: Path) -> None:
    (run / "activations" / "growing.json").write_text(json.dumps({**ENTRY, "gone": ["../../../home/0"]}))
    before = contents(outside)
    with watched(run), pytest.raises(UnsafePath):
        roll_forward(run)
    assert contents(outside) == before


# ── cost ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_checks_of_a_header_cost_a_small_part_of_reading_it(run: Path) -> None:
    """A store of 200 arrays; times of this process, the best of several."""
    import time

    from forebay.stores.untrusted import check_schema

    edit_schema(run, lambda said: said["arrays"].update({f"g{i}/value": said["arrays"][NAME] for i in range(200)}))
    path = run / "activations" / "data.zarr"

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(9):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return min(times)

    schema = read_header(path).schema
    assert best(lambda: check_schema(schema, path)) < 0.006
    assert isinstance(schema.arrays[NAME], Array)
    assert schema.unit_tokens == UNIT
    edit_schema(run, lambda said: said.update(format=2))
    with pytest.raises(SchemaError):
        read_header(path)
