"""A corpus is counted once: a killed count goes on, a changed one begins anew, and every text is found again."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.stores.corpus import Corpus
from forebay.stores.documents import Documents
from forebay.stores.errors import CorpusError, CorruptStore

# Six blocks: four row groups of one file, then two files; the second row group holds the longest texts.
ROW_GROUPS = [["one", ""], ["two two 🐟", "drei drei drei"], ["four"], ["five", "six six"]]
LINES = ["", "seven\nseven", "eight"]
WHOLE = "nine nine nine\n"
TEXTS = [*(text for group in ROW_GROUPS for text in group), *LINES, WHOLE]
IDS = [*(f"p-{i}" for i in range(7)), "b.jsonl.gz:1", "b.jsonl.gz:2", "l-2", "c.txt:1"]


class Killed(BaseException):
    """Stands for whatever ends a process."""


class Words:
    """Counts words, and remembers what it was asked; dies when `dies_at` texts have been counted."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.seen: list[str] = []
        self.dies_at = dies_at

    def __call__(self, texts: Sequence[str]) -> list[int]:
        if self.dies_at is not None and len(self.seen) + len(texts) > self.dies_at:
            raise Killed
        self.seen += texts
        return [len(text.split()) for text in texts]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    root = tmp_path / "texts"
    root.mkdir()
    with pq.ParquetWriter(root / "a.parquet", pa.schema([("text", pa.string()), ("id", pa.string())])) as file:
        for first, group in zip([0, 2, 4, 5], ROW_GROUPS, strict=True):
            ids = [f"p-{first + i}" for i in range(len(group))]
            file.write_table(pa.table({"text": group, "id": ids}), row_group_size=len(group))
    lines = [json.dumps({"text": text, **({"id": "l-2"} if i == 2 else {})}) for i, text in enumerate(LINES)]
    (root / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (root / "c.txt").write_text(WHOLE)
    return Corpus(files=("a.parquet", "b.jsonl.gz", "c.txt"), root=str(root))


def documents_of(corpus: Corpus, folder: Path, fingerprint: str = "f" * 64) -> Documents:
    """As a process of its own would have it: nothing is remembered from an earlier one."""
    return Documents(corpus, folder / "counts", fingerprint)


def counted(corpus: Corpus, folder: Path, fingerprint: str = "f" * 64) -> Documents:
    documents = documents_of(corpus, folder, fingerprint)
    documents.count(Words())
    return documents


def texts_of(documents: Documents, start: int, stop: int) -> list[str]:
    return documents.read(slice(start, stop))["text"].values.tolist()


# ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_document_is_counted_in_the_order_of_the_files(corpus: Corpus, tmp_path: Path) -> None:
    labels = counted(corpus, tmp_path).schema.labels
    assert labels["documents/id"][1].tolist() == IDS
    assert labels["documents/n_token"][1].tolist() == [len(text.split()) for text in TEXTS]
    assert labels["documents/n_char"][1].tolist() == [len(text) for text in TEXTS]
    assert counted(corpus, tmp_path).schema.n_token == len(" ".join(TEXTS).split())


def test_one_record_stands_for_every_block(corpus: Corpus, tmp_path: Path) -> None:
    counted(corpus, tmp_path)
    records = sorted((tmp_path / "counts" / "done").iterdir())
    assert [path.name for path in records] == [f"{block:06d}.json" for block in range(6)]
    first = json.loads(records[1].read_text())
    assert (first["id"], first["n_token"], first["n_char"]) == (["p-2", "p-3"], [3, 3], [9, 14])
    assert first["block"]["path"] == "a.parquet"


def test_progress_adds_up_whether_counted_or_remembered(corpus: Corpus, tmp_path: Path) -> None:
    def told() -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        documents_of(corpus, tmp_path).count(Words(), lambda *one: found.append(one))
        return found

    blocks = [*ROW_GROUPS, LINES, [WHOLE]]
    expected = [(len(block), len("".join(block))) for block in blocks]
    assert told() == expected
    assert told() == expected


# ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=3))
def test_a_count_that_was_killed_goes_on_where_it_stopped(
    tmp_path_factory: pytest.TempPathFactory, dies_at: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    corpus = Corpus(files=("*.jsonl",), root=str(folder))
    for i, text in enumerate(TEXTS):  # a block a document
        (folder / f"{i}.jsonl").write_text(json.dumps({"text": text}))
    seen: list[str] = []
    for attempt in dies_at:
        words = Words(attempt)
        if len(seen) + attempt < len(TEXTS):
            with pytest.raises(Killed):
                documents_of(corpus, folder).count(words)
        else:
            documents_of(corpus, folder).count(words)
        assert words.seen == TEXTS[len(seen) : len(seen) + attempt]
        seen += words.seen
    words = Words()
    documents = documents_of(corpus, folder)
    documents.count(words)
    assert seen + words.seen == TEXTS
    assert texts_of(documents, 0, len(TEXTS)) == TEXTS


@pytest.mark.parametrize(("dies_at", "blocks"), [(0, 0), (3, 1), (4, 2), (5, 3), (6, 3), (10, 5)])
def test_whole_blocks_are_kept_and_the_broken_one_is_not(
    corpus: Corpus, tmp_path: Path, dies_at: int, blocks: int
) -> None:
    with pytest.raises(Killed):
        documents_of(corpus, tmp_path).count(Words(dies_at))
    documents, words = documents_of(corpus, tmp_path), Words()
    assert documents.ledger.done() == set(range(blocks))
    documents.count(words)
    assert words.seen == TEXTS[[0, 2, 4, 5, 7, 10][blocks] :]
    assert texts_of(documents, 0, len(TEXTS)) == TEXTS


def test_what_was_counted_is_not_counted_again(corpus: Corpus, tmp_path: Path) -> None:
    first = counted(corpus, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "counts" / "done").iterdir()}
    again = documents_of(corpus, tmp_path)
    again.count(Words(dies_at=0))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "counts" / "done").iterdir()} == before
    for path, (_, values) in first.schema.labels.items():
        assert again.schema.labels[path][1].tolist() == values.tolist()


def test_a_torn_record_is_refused_by_name(corpus: Corpus, tmp_path: Path) -> None:
    documents = counted(corpus, tmp_path)
    os.truncate(documents.ledger.path(4), 30)
    with pytest.raises(CorruptStore, match=r"counts/done/000004\.json is not readable as JSON .*; delete it and run"):
        documents_of(corpus, tmp_path).count(Words())
    documents.ledger.path(4).unlink()
    words = Words()
    documents_of(corpus, tmp_path).count(words)
    assert words.seen == LINES


# ── what has changed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_way_of_counting_counts_anew(corpus: Corpus, tmp_path: Path) -> None:
    counted(corpus, tmp_path)
    documents, words = documents_of(corpus, tmp_path, "0" * 64), Words()
    documents.count(lambda texts: [2 * n for n in words(texts)])
    assert words.seen == TEXTS
    assert documents.schema.labels["documents/n_token"][1].tolist() == [2 * len(text.split()) for text in TEXTS]


def test_a_count_killed_while_another_replaced_it_mixes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    counted(corpus, tmp_path)
    with pytest.raises(Killed):
        documents_of(corpus, tmp_path, "0" * 64).count(Words(dies_at=5))
    documents, words = documents_of(corpus, tmp_path, "0" * 64), Words()
    documents.count(words)
    assert words.seen == TEXTS[5:]
    assert texts_of(documents, 0, len(TEXTS)) == TEXTS


def test_records_of_a_corpus_that_was_longer_do_not_count(corpus: Corpus, tmp_path: Path) -> None:
    counted(corpus, tmp_path)
    shorter = counted(Corpus(files=("c.txt", "b.jsonl.gz"), root=corpus.root), tmp_path, "0" * 64)
    assert shorter.schema.labels["documents/id"][1].tolist() == ["c.txt:1", "b.jsonl.gz:1", "b.jsonl.gz:2", "l-2"]
    assert texts_of(shorter, 0, 4) == [WHOLE, *LINES]
    assert texts_of(counted(corpus, tmp_path), 0, len(TEXTS)) == TEXTS


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_span_is_that_of_the_list_of_texts(corpus: Corpus, tmp_path: Path) -> None:
    documents = counted(corpus, tmp_path)
    for start in range(len(TEXTS)):
        for stop in range(start + 1, len(TEXTS) + 1):
            found = documents.read(slice(start, stop))
            assert found["text"].values.tolist() == TEXTS[start:stop]
            assert found["id"].values.tolist() == IDS[start:stop]
            assert found.indexes["document"].tolist() == list(range(start, stop))


def test_texts_stay_text_whatever_they_look_like(tmp_path: Path) -> None:
    """Numpy would cut trailing NULs from strings of its own, and take lists of equal lengths for two dimensions."""
    texts = ["a\0", "1.5", "", " "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = counted(Corpus(files=("a.jsonl",), root=str(tmp_path)), tmp_path)
    assert texts_of(documents, 0, 4) == texts
    assert texts_of(documents, 3, 4) == [" "]
    assert documents.read(slice(0, 4))["text"].dims == ("document",)


def test_a_file_without_documents_is_counted_and_passed_over(tmp_path: Path) -> None:
    for name, text in {"a": "", "b": '{"text": "one"}', "c": "\n\n", "d": '{"text": "two"}\n', "e": ""}.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    documents, words = documents_of(Corpus(files=("*.jsonl",), root=str(tmp_path)), tmp_path), Words()
    documents.count(words)
    assert words.seen == ["one", "two"]
    assert len(documents.ledger.done()) == 5
    assert texts_of(documents, 0, 2) == ["one", "two"]
    assert texts_of(documents, 1, 2) == ["two"]


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n")
    for _ in range(2):
        with pytest.raises(CorpusError, match=rf"the corpus \['a.jsonl'\] below {tmp_path} holds no documents"):
            counted(Corpus(files=("a.jsonl",), root=str(tmp_path)), tmp_path)


@pytest.mark.parametrize(("name", "document"), [("a.parquet", 0), ("b.jsonl.gz", 9), ("c.txt", 10)])
def test_a_file_that_changed_after_it_was_counted_is_refused(
    corpus: Corpus, tmp_path: Path, name: str, document: int
) -> None:
    documents = counted(corpus, tmp_path)
    path = Path(corpus.root, name)
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["ONE", *TEXTS[1:7]], "id": IDS[:7]}), path, row_group_size=2)
    elif name == "b.jsonl.gz":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"eight", b"EIGHT")))
    else:
        path.write_text(WHOLE.upper())
    with pytest.raises(
        CorpusError, match=rf"{path} has changed since its documents were counted: lines \d+ to \d+ had"
    ):
        texts_of(documents, document, document + 1)
    for other in {0, 9, 10} - {document}:
        assert texts_of(documents, other, other + 1) == [TEXTS[other]]


def test_unreadable_text_is_named_and_what_was_counted_before_stays(corpus: Corpus, tmp_path: Path) -> None:
    good = Path(corpus.root, "b.jsonl.gz").read_bytes()
    Path(corpus.root, "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "seven"}\n{"text": 8}\n'))
    with pytest.raises(CorpusError, match=r"b\.jsonl\.gz:2 .*'text' is a int; expected a string"):
        counted(corpus, tmp_path)
    Path(corpus.root, "b.jsonl.gz").write_bytes(good)
    documents, words = documents_of(corpus, tmp_path), Words()
    documents.count(words)
    assert words.seen == TEXTS[7:]
    assert texts_of(documents, 0, len(TEXTS)) == TEXTS
