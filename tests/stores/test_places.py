"""One set of calls for folders of this machine and of object stores: what it promises holds for both."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3

from forebay.stores.digests import digest_of, disagreement, recorded
from forebay.stores.errors import SchemaError, StorageError
from forebay.stores.object_paths import RETRY, TIMEOUT, ObjectPath
from forebay.stores.places import (
    Place,
    changed_at,
    delete_tree,
    free_space,
    names,
    place,
    put_new,
    size_of,
    sync_folder,
    write_atomic,
)

from .s3_server import Proxy


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder with nothing in it, of each kind."""
    if request.param == "s3":
        return place(request.getfixturevalue("bucket") + "/folder")
    where = place(tmp_path / "folder" if request.param == "disk" else f"memory://{tmp_path.name}/folder")
    where.mkdir()
    return where


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("runs/one", Path("runs/one")),
        ("/runs/one", Path("/runs/one")),
        ("a: b", Path("a: b")),
        ("file:///runs/one%20two", Path("/runs/one two")),
        ("file://localhost/runs", Path("/runs")),
        ("s3://bucket/one/two/", ObjectPath("s3://bucket/one/two")),
        ("gs://bucket", ObjectPath("gs://bucket")),
        ("az://container/one", ObjectPath("az://container/one")),
        ("memory://one/two", ObjectPath("memory://one/two")),
    ],
)
def test_a_text_names_a_place(text: str, due: Place) -> None:
    assert place(text) == due
    assert place(due) == due


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("S3://bucket/x", r"Did you mean 's3'\?|Known: a folder"),
        ("ftp://host/x", r"Known: a folder of this machine, file:///…, s3://…"),
        ("s3://", "something in each place"),
        ("s3://bucket//x", "something in each place"),
        ("s3://bucket/../x", "something in each place"),
        ("s3://bucket/x?versionId=1", "something in each place"),
        ("file://host/x", "three slashes"),
        (Path("s3://bucket/x"), "lost a slash"),
    ],
)
def test_other_addresses_are_refused_by_name(text: str | Path, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        place(text)


def test_an_address_has_the_parts_of_a_path() -> None:
    run = ObjectPath("s3://bucket/some/run")
    data = run / "tokens" / "data.zarr"
    assert (str(data), data.name, data.parent) == ("s3://bucket/some/run/tokens/data.zarr", "data.zarr", run / "tokens")
    assert (data.root, data.key) == ("s3://bucket", "some/run/tokens/data.zarr")
    assert run.parent.parent == run.parent.parent.parent == ObjectPath("s3://bucket")
    assert data.with_name("x") == run / "tokens/x"
    assert pickle.loads(pickle.dumps(data)) == data  # noqa: S301 - our own bytes
    assert sorted([data, run]) == [run, data]
    with pytest.raises(SchemaError, match=r"s3://bucket/some/run lies in an object store"):
        Path(run)


def test_what_is_put_is_there_whole(folder: Place) -> None:
    file = folder / "a" / "b.json"
    assert not file.exists()
    assert names(folder) == names(folder / "none") == []
    (folder / "a").mkdir(parents=True, exist_ok=True)
    for data in (b"", b"one", bytes(range(256)) * 5000):
        write_atomic(file, data)
        assert file.read_bytes() == data
        assert size_of(file) == len(data)
        assert digest_of(file, "sha256") == (len(data), hashlib.sha256(data).hexdigest())
        entry = {"bytes": len(data), "blake3": blake3(data).hexdigest()}
        assert recorded([data[:5], data[5:]]) == entry
        assert disagreement(file, entry) is None
        assert "they were recorded (blake3 " in str(disagreement(file, entry | {"blake3": "0" * 64}))
    assert file.exists()
    assert file.is_file()
    assert (folder / "a").exists()
    assert not (folder / "a").is_file()
    assert (folder / "a").is_dir()
    assert changed_at(file) > 1.7e18
    write_atomic(folder / "c", b"2")
    assert sorted(names(folder)) == ["a", "c"]
    assert sorted(folder.iterdir()) == [folder / "a", folder / "c"]
    assert names(folder / "a") == ["b.json"]
    sync_folder(folder)
    assert (free_space(folder) is None) == isinstance(folder, ObjectPath)


def test_what_is_not_there_is_said_to_be_missing(folder: Place) -> None:
    asks: tuple[Callable[[Place], object], ...] = (
        size_of,
        changed_at,
        lambda file: digest_of(file, "sha256"),
        lambda file: file.read_bytes(),
    )
    for ask in asks:
        with pytest.raises(FileNotFoundError):
            ask(folder / "none")
    with pytest.raises(FileNotFoundError):
        (folder / "none").unlink()
    (folder / "none").unlink(missing_ok=True)
    delete_tree(folder / "none")


def test_a_tree_is_deleted_and_its_neighbours_stay(folder: Place) -> None:
    for name in ("a/x", "a/deep/er/y", "ab"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, b"1")
    delete_tree(folder / "a")
    assert names(folder) == ["ab"]


def test_of_many_that_put_a_new_file_one_does(folder: Place) -> None:
    for attempt in range(3):
        file = folder / f"{attempt}.json"
        texts = [f"mine is {n}".encode() * 1000 for n in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda data, file=file: put_new(file, data), texts))
        assert won.count(True) == 1
        assert file.read_bytes() == texts[won.index(True)]
    assert len(names(folder)) == 3  # and nothing aside


def test_a_new_file_is_never_torn_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert put_new(tmp_path / "a", b"one")
    assert not put_new(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_ranges_end_where_the_object_ends(tmp_path: Path, bucket: str) -> None:
    for file in (ObjectPath(f"memory://{tmp_path.name}/x"), ObjectPath(f"{bucket}/x")):
        write_atomic(file, b"0123456789")
        assert file.read_range(2, 3) == b"234"
        assert file.read_range(8, 9) == b"89"
        assert file.read_range(10, 1) == b""
        assert file.read_end(4) == b"6789"
        assert file.read_end(40) == b"0123456789"


def test_a_lost_answer_to_a_new_object_is_found_out(s3: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has put it and fell silent before it said so: the second request finds one's own bytes there."""
    monkeypatch.setenv(TIMEOUT, "1")
    file = ObjectPath(f"{bucket}/mine")
    s3.fault = lambda request: "lost" if request.method == "PUT" and not s3.faults else None
    assert put_new(file, b"mine")
    assert s3.faults == ["lost"]
    assert not put_new(file, b"another's")
    assert file.read_bytes() == b"mine"


@pytest.mark.slow
def test_a_listing_of_thousands_is_whole(s3: Proxy, bucket: str) -> None:
    folder = ObjectPath(f"{bucket}/done")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_atomic(folder / f"{n:06d}.json", b"{}"), range(1100)))
    before = len(s3.seen)
    assert sorted(names(folder)) == [f"{n:06d}.json" for n in range(1100)]
    assert len(s3.seen) - before == 2
    assert len(folder.sizes()) == 1100
    delete_tree(folder)
    assert names(folder) == []


def test_a_store_without_conditional_puts_gets_a_plain_one(s3: Proxy, bucket: str) -> None:
    s3.fault = lambda request: "501" if request.method == "PUT" and request.conditional else None
    assert put_new(ObjectPath(f"{bucket}/a"), b"one")
    assert not put_new(ObjectPath(f"{bucket}/a"), b"two")
    assert ObjectPath(f"{bucket}/a").read_bytes() == b"one"


def test_two_puts_that_the_store_refuses_for_each_other_are_tried_again(s3: Proxy, bucket: str) -> None:
    s3.fault = lambda request: "409" if request.conditional and not s3.faults else None
    assert put_new(ObjectPath(f"{bucket}/a"), b"one")
    assert ObjectPath(f"{bucket}/a").read_bytes() == b"one"


def test_no_error_tells_the_signature_of_an_address() -> None:
    error = OSError("Error performing GET https://one.blob.core.windows.net/c/x?sv=1&sig=SECRET in 3ms - HTTP error")
    said = str(ObjectPath("az://c/x").failure(error))
    assert "https://one.blob.core.windows.net/c/x in 3ms" in said
    assert "SECRET" not in said


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_time_that_is_none_is_refused(text: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RETRY, text)
    with pytest.raises(StorageError, match=f"{RETRY} = '{text}' is not a number of seconds"):
        names(ObjectPath(bucket))
