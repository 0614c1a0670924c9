"""A corpus from a stranger is text: it takes a bounded part of memory, and what is wrong with it is said."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from forebay.stores.corpus import Corpus
from forebay.stores.documents import Documents
from forebay.stores.errors import CorpusError, CorruptStore
from forebay.stores.fingerprint import known_hashes, sha256_file, sha256_files

from .watching import contents, watched


def corpus(folder: Path, *files: str) -> Corpus:
    return Corpus(files=files, root=str(folder))


def packed(how: str, data: bytes) -> bytes:
    return gzip.compress(data, 1) if how == "gz" else zstandard.compress(data, 1)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bounds as they are, but for their sizes."""
    monkeypatch.setattr("forebay.stores.blocks._LINE_LIMIT", 10_000)
    monkeypatch.setattr("forebay.stores.blocks._AT_ONCE", 1_000)
    return 10_000


@pytest.mark.parametrize("how", ["", "gz", "zst"])
def test_a_line_without_end_is_given_up_at_a_limit(tmp_path: Path, how: str, limit: int) -> None:
    line = json.dumps({"text": "a" * (limit + 100)}).encode() + b"\n"
    name = "x.jsonl" + (f".{how}" if how else "")
    (tmp_path / name).write_bytes(packed(how, line) if how else line)
    one = corpus(tmp_path, name)
    with pytest.raises(CorpusError, match="is longer than 10000 bytes"):
        list(one.blocks(name, block_bytes=50))


@pytest.mark.parametrize("how", ["", "gz", "zst"])
def test_a_document_that_grows_without_end_is_given_up_at_a_limit(
    tmp_path: Path, how: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten megabytes of zeros in ten kilobytes only the first few thousand bytes are unpacked."""
    from forebay.stores import streams

    name = "x.txt" + (f".{how}" if how else "")
    (tmp_path / name).write_bytes(packed(how, bytes(10**7)) if how else bytes(10**6))
    most, read = [0], streams.Stream.read

    def counting(self: streams.Stream, n_byte: int) -> bytes:
        data = read(self, n_byte)
        most[0] = max(most[0], self.position)
        return data

    monkeypatch.setattr(streams.Stream, "read", counting)
    with pytest.raises(CorpusError, match="one document of more than 10000 bytes"):
        list(corpus(tmp_path, name).documents())
    assert most[0] <= limit + 1_000


def test_the_limits_are_a_gigabyte() -> None:
    from forebay.stores import blocks

    assert blocks._LINE_LIMIT == 2**30


def test_a_text_within_the_limit_is_read_in_pieces_as_it_is(tmp_path: Path, limit: int) -> None:
    text = "zwölf 🐟 " * 700
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert [one.text for one in corpus(tmp_path, "x.txt.gz").documents()] == [text]


LINES = {
    "nested without end": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number without end": b'{"id": ' + b"9" * 10_000 + b', "text": "a"}',
    "a text that is a number": b'{"text": 5}',
    "a text that is a table": b'{"text": {"$oid": "x"}}',
    "an id that is a list": b'{"id": [1], "text": "a"}',
    "half a surrogate": b'{"text": "\\ud800"}',
    "bytes that are no text": b'{"text": "\xff\xfe"}',
    "an array": b"[1, 2]",
    "a thousand keys": json.dumps({f"\x1b[31m{i}": 1 for i in range(1000)}).encode(),
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_that_is_no_document_is_refused_with_its_place(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "first"}\n' + line + b"\n")
    with watched(), pytest.raises(CorpusError, match=r"x\.jsonl:2") as refused:
        list(corpus(tmp_path, "x.jsonl").documents())
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 3000


def test_names_in_documents_are_data(tmp_path: Path) -> None:
    """An id that is a path names no file, whatever it leads to."""
    ids = ["../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "x" * 10_000]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"id": one, "text": "a"}) + "\n" for one in ids))
    folder = tmp_path / "run" / "tokens" / "counts"
    documents = Documents(corpus(tmp_path, "x.jsonl"), folder, "f" * 64)
    before = {*contents(tmp_path)}
    with watched(tmp_path / "run"):
        documents.count(lambda texts: [1] * len(texts))
    assert documents.schema.labels["documents/id"][1].tolist() == ids
    assert {*contents(tmp_path)} - before == {"run/tokens/counts/done/000000.json"}


def test_what_is_no_file_is_no_corpus(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    for name in ("x.jsonl", "*.jsonl", "../" * 30 + "dev/zero", "x\0.jsonl"):
        with pytest.raises(CorpusError):
            corpus(tmp_path, name).paths()


PARQUET: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "a footer beyond the file": lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1"),
}


@pytest.mark.parametrize("change", PARQUET.values(), ids=PARQUET)
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, change: Callable[[Path], object]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    change(tmp_path / "x.parquet")
    with pytest.raises(CorpusError):
        list(corpus(tmp_path, "x.parquet").documents())


@pytest.mark.parametrize("said", ["[" * 100_000, "[1]", '{"x": 5}', '{"x": [1, 2, ["y"]]}', "nonsense", '{"x": []}'])
def test_hashes_that_a_stranger_kept_are_not_believed_unless_they_are_of_their_form(tmp_path: Path, said: str) -> None:
    file, cache = tmp_path / "x", tmp_path / "files.json"
    file.write_text("text")
    cache.write_text(said)
    assert known_hashes(cache) == {}
    assert sha256_files([file], cache)[file] == sha256_file(file)


def test_counts_that_a_stranger_kept_are_refused_where_they_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    folder = tmp_path / "counts"
    (folder / "done").mkdir(parents=True)
    (folder / "done" / "000000.json").write_text("[" * 100_000)
    with pytest.raises(CorruptStore):
        Documents(corpus(tmp_path, "x.jsonl"), folder, "f" * 64).count(lambda texts: [1] * len(texts))
