"""What is no store, or is damaged, is refused by who opens it and named by `verify`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay.stores.errors import CorruptStore, SchemaError, StoreNotFound
from forebay.stores.ledger import Record
from forebay.stores.schema import DATA
from forebay.stores.store import Store

from .made_stores import OURS, THEIRS, VARYING, create, objects, random_values, schema_of, write, written

# ── opening what is none ─────────────────────────────────────────────────────────────────────────────────────────────


def test_no_store_is_there(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=rf"{DATA} holds no store: zarr\.json is missing"):
        Store.open(tmp_path / "nowhere")


def alter(header: Path, change: Callable[[dict[str, Any]], None]) -> None:
    said = json.loads(header.read_text())
    change(said["attributes"])
    header.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda said: said["forebay"]["schema"].update(format=2),
            SchemaError,
            rf"{DATA} has format 2; this forebay reads format 1\. Update forebay",
        ),
        (lambda said: said.pop("forebay"), CorruptStore, r"zarr\.json is Zarr, but not a store of forebay"),
        (lambda said: said["forebay"].pop("fingerprint"), CorruptStore, r"zarr\.json: .* damaged \(KeyError\('finger"),
        (lambda said: said["forebay"]["schema"].pop("arrays"), CorruptStore, r"zarr\.json: .* damaged"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], error: type[Exception], message: str
) -> None:
    store = create(tmp_path, schema_of())
    alter(store.path / "zarr.json", change)
    for open_ in (Store.open, lambda folder: create(folder, schema_of())):
        with pytest.raises(error, match=message):
            open_(tmp_path)


def test_a_torn_header_is_refused(tmp_path: Path) -> None:
    store = create(tmp_path, schema_of())
    os.truncate(store.path / "zarr.json", 100)
    with pytest.raises(CorruptStore, match=rf"{DATA}/zarr\.json is not readable as JSON"):
        Store.open(tmp_path)


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────

STREAM_OF_UNIT_2 = "hook_resid_post/value/c/1/2/0"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"{path}: missing"),
        (lambda path: os.truncate(path, 40), r"{path}: 40 bytes, 1?\d\d were recorded \(truncated or overwritten\)"),
        (lambda path: os.truncate(path, 0), r"{path}: 0 bytes, "),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), r"{path}: \d+ bytes, \d+ were recorded"),
        (lambda path: flip(path, 0), r"{path}: its bytes have changed since they were recorded \(blake3 "),
        (lambda path: flip(path, -1), r"{path}: its bytes have changed"),
    ],
)
def test_verify_names_the_damaged_object_and_its_unit(
    complete: Store, damage: Callable[[Path], object], message: str
) -> None:
    path = complete.path / STREAM_OF_UNIT_2
    damage(path)
    checked: list[int] = []
    [(unit, [line])] = complete.verify(lambda unit: checked.append(unit.index)).items()
    assert unit == 2
    assert re.match(message.replace("{path}", re.escape(str(path))), line)
    assert checked == [0, 1, 2, 3]
    write(complete, complete.schema.grid[2], random_values(complete.schema))
    assert complete.verify() == {}


def test_verify_sees_every_bit_of_every_object(tmp_path: Path) -> None:
    schema = schema_of(VARYING)
    store = written(tmp_path, schema, random_values(schema))
    owner = {key: unit.index for unit in schema.grid for key in store.ledger.record(unit.index)["objects"]}
    for key, path in objects(store).items():
        at = len(key) * 31 % path.stat().st_size
        flip(path, at)
        [(unit, [line])] = store.verify().items()
        assert (unit, line.startswith(f"{path}: ")) == (owner[key], True)
        flip(path, at)
    assert store.verify() == {}


def test_verify_reports_units_that_are_recorded_only(tmp_path: Path) -> None:
    schema = schema_of()
    store = create(tmp_path, schema)
    write(store, schema.grid[1], random_values(schema))
    (store.path / "token_id" / "c" / "3").write_bytes(b"garbage of a killed writer")
    assert store.verify() == {}


def record_of_unit_2(store: Store, change: Callable[[Record], object]) -> None:
    record = store.ledger.record(2)
    change(record)
    store.ledger.complete(2, record)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda store: record_of_unit_2(store, lambda record: record.update(fingerprint=THEIRS)),
            rf"done/000002\.json: its fingerprint {THEIRS} is not the store's {OURS}",
        ),
        (
            lambda store: record_of_unit_2(store, lambda record: record["objects"].pop(STREAM_OF_UNIT_2)),
            rf"{STREAM_OF_UNIT_2}: not in the record of unit 2",
        ),
        (lambda store: os.truncate(store.ledger.path(2), 20), r"done/000002\.json is not readable as JSON"),
    ],
)
def test_verify_finds_a_record_that_is_not_the_units(
    complete: Store, damage: Callable[[Store], object], message: str
) -> None:
    damage(complete)
    [(unit, [line])] = complete.verify().items()
    assert unit == 2
    assert re.search(message, line)
