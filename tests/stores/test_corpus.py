"""Text at rest: whatever its format and wherever it is cut, a corpus is the list of its documents."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from forebay.stores.corpus import BLOCK_BYTES, Block, Corpus, Document
from forebay.stores.errors import CorpusError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXTS = ["one", "", "zwölf 🐟", "line\nbreak\r\nand \u2028 more", "tab\tnul\x00", "\ufeffnot a mark"]


def jsonl(texts: list[str], **extra: Any) -> bytes:
    return b"".join(json.dumps({"text": text, **extra}).encode() + b"\n" for text in texts)


def read_all(corpus: Corpus, block_bytes: int = BLOCK_BYTES) -> list[Document]:
    return [
        document
        for path in corpus.paths()
        for _, documents in corpus.blocks(path, block_bytes=block_bytes)
        for document in documents
    ]


def one(folder: Path, name: str, data: bytes, **keys: Any) -> Corpus:
    (folder / name).write_bytes(data)
    return Corpus(files=(name,), root=str(folder), **keys)


def fails(corpus: Corpus, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read_all(corpus)


# ── every format ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
@pytest.mark.parametrize("block_bytes", [1, 30, BLOCK_BYTES])
def test_json_lines(tmp_path: Path, suffix: str, packed: str, block_bytes: int) -> None:
    name = f"a{suffix}{packed}"
    corpus = one(tmp_path, name, PACK[packed](jsonl(TEXTS)))
    expected = [Document(id=f"{name}:{i + 1}", text=t, path=name, line=i + 1) for i, t in enumerate(TEXTS)]
    assert read_all(corpus, block_bytes) == expected
    assert list(corpus.documents()) == expected


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_plain_text_is_one_document(tmp_path: Path, suffix: str, packed: str) -> None:
    corpus = Corpus(files=("*",), root=str(tmp_path))
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}{suffix}{packed}").write_bytes(PACK[packed](b"\xef\xbb\xbf" * (i % 2) + text.encode()))
    for i, document in enumerate(read_all(corpus, block_bytes=1)):
        # the mark at the very beginning of a file is never text
        text = TEXTS[i].removeprefix("\ufeff") if i % 2 == 0 else TEXTS[i]
        name = f"{i}{suffix}{packed}"
        assert document == Document(id=f"{name}:1", text=text, path=name, line=1)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    text = pa.array(TEXTS, pa.string()).cast(kind)
    table = pa.table({"text": text, "id": list(range(6)), "other": [0.5] * 6})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    corpus = Corpus(files=("a.parquet",), root=str(tmp_path))
    expected = [Document(id=str(i), text=t, path="a.parquet", line=i + 1) for i, t in enumerate(TEXTS)]
    assert read_all(corpus) == expected
    blocks = [block for block, _ in corpus.blocks("a.parquet")]
    assert [(b.start, b.stop, b.first_line, b.n_line, b.last) for b in blocks] == [
        (0, 1, 1, 4, False),
        (1, 2, 5, 2, True),
    ]
    assert [d for b in blocks for d in corpus.read(b)] == expected
    assert [d for _, ds in corpus.blocks("a.parquet", after=blocks[0]) for d in ds] == expected[4:]
    assert list(corpus.blocks("a.parquet", after=blocks[1])) == []


def test_parquet_without_rows_is_one_last_block(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    corpus = Corpus(files=("a.parquet",), root=str(tmp_path))
    [(block, documents)] = corpus.blocks("a.parquet")
    assert (block.last, documents, corpus.read(block)) == (True, [], [])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(one(tmp_path, "a.parquet", b"PAR1"), r"pip install 'forebay\[parquet\]'")


def test_lines_may_be_empty_and_end_in_any_way(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf\n{"text": "a"}\r\n  \t\n\n{"text": "b", "id": 7}\n{"text": "c", "id": "x"}'
    documents = read_all(one(tmp_path, "a.jsonl", data))
    assert [(d.id, d.text, d.line) for d in documents] == [("a.jsonl:2", "a", 2), ("7", "b", 5), ("x", "c", 6)]


def test_keys_are_chosen(tmp_path: Path) -> None:
    data = jsonl(["wrong"], body="right", id=1, uid="u")
    assert read_all(one(tmp_path, "a.jsonl", data, text_key="body", id_key="uid"))[0].id == "u"
    assert read_all(one(tmp_path, "a.jsonl", data, text_key="body", id_key=None))[0].id == "a.jsonl:1"
    assert read_all(one(tmp_path, "a.jsonl", data, text_key="body"))[0].text == "right"


def test_compressed_files_of_several_parts(tmp_path: Path) -> None:
    halves = jsonl(TEXTS[:3]), jsonl(TEXTS[3:])
    for packed in (".gz", ".zst"):
        corpus = one(tmp_path, f"a.jsonl{packed}", b"".join(PACK[packed](half) for half in halves))
        assert [d.text for d in read_all(corpus)] == TEXTS


# ── cutting and reading again ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


text = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.lists(st.none() | text, max_size=12), st.integers(1, 200), st.sampled_from(list(PACK)), st.booleans())
def test_any_cut_resumed_and_read_again(
    folder: Path, lines: list[str | None], block_bytes: int, packed: str, newline: bool
) -> None:
    raw = [b"" if line is None else json.dumps({"text": line}, ensure_ascii=False).encode() for line in lines]
    data = b"\n".join(raw) + (b"\n" if newline else b"")
    name = f"a.jsonl{packed}"
    corpus = one(folder, name, PACK[packed](data))
    expected = [(i + 1, line) for i, line in enumerate(lines) if line is not None]

    cut = list(corpus.blocks(name, block_bytes=block_bytes))
    assert [(d.line, d.text) for _, documents in cut for d in documents] == expected
    assert [block.start for block, _ in cut] == [0, *(block.stop for block, _ in cut[:-1])]
    assert cut[-1][0].stop == len(data)
    assert [block.last for block, _ in cut] == [False] * (len(cut) - 1) + [True]
    longest = max((len(line) + 1 for line in raw), default=1)
    assert all(block.stop - block.start < block_bytes + longest for block, _ in cut)
    for i, (block, documents) in enumerate(cut):
        assert Block(**json.loads(json.dumps(asdict(block)))) == block
        assert corpus.read(block) == documents
        assert list(corpus.blocks(name, after=block, block_bytes=block_bytes)) == cut[i + 1 :]
    for block, documents in reversed(cut):
        assert corpus.read(block) == documents


def test_consecutive_blocks_of_a_compressed_file_cost_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import forebay.stores.streams as streams

    opened: list[Path] = []
    original = streams.Stream.__init__

    def counted(self: streams.Stream, path: Path) -> None:
        opened.append(path)
        original(self, path)

    corpora = [one(tmp_path, f"a.jsonl{packed}", PACK[packed](jsonl(TEXTS * 50))) for packed in (".gz", ".zst")]
    cuts = [list(corpus.blocks(corpus.files[0], block_bytes=100)) for corpus in corpora]
    monkeypatch.setattr(streams.Stream, "__init__", counted)
    for corpus, cut in zip(corpora, cuts, strict=True):
        opened.clear()
        assert len(cut) > 20
        assert [corpus.read(block) for block, _ in cut] == [documents for _, documents in cut]
        assert len(opened) == 1


def test_threads_and_forked_children_read_the_same_file(tmp_path: Path) -> None:
    corpus = one(tmp_path, "a.jsonl.zst", PACK[".zst"](jsonl(TEXTS * 200)))
    cut = list(corpus.blocks("a.jsonl.zst", block_bytes=500))
    wrong: list[int] = []

    def read(first: int) -> None:
        wrong.extend(i for i in range(first, len(cut), 4) if corpus.read(cut[i][0]) != cut[i][1])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

    corpus.read(cut[0][0])
    child = os.fork()
    if child == 0:
        os._exit(0 if corpus.read(cut[1][0]) == cut[1][1] else 1)
    assert corpus.read(cut[1][0]) == cut[1][1]
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("packed", PACK)
def test_a_changed_file_is_noticed(tmp_path: Path, packed: str) -> None:
    name = f"a.jsonl{packed}"
    corpus = one(tmp_path, name, PACK[packed](jsonl(["aa", "bb"])))
    blocks = [block for block, _ in corpus.blocks(name, block_bytes=1)]
    corpus.read(blocks[0])
    one(tmp_path, name, PACK[packed](jsonl(["aa", "cc"])))
    assert corpus.read(blocks[0])[0].text == "aa"
    with pytest.raises(CorpusError, match=rf"{name} has changed since .* lines 2 to 2 had sha256 {blocks[1].sha256}"):
        corpus.read(blocks[1])
    one(tmp_path, name, PACK[packed](jsonl(["aa"])))
    with pytest.raises(CorpusError, match="has changed"):
        corpus.read(blocks[1])


def test_a_changed_parquet_is_noticed(tmp_path: Path) -> None:
    corpus = Corpus(files=("a.parquet",), root=str(tmp_path))
    pq.write_table(pa.table({"text": ["a", "bc"]}), tmp_path / "a.parquet", row_group_size=1)
    blocks = [block for block, _ in corpus.blocks("a.parquet")]
    pq.write_table(pa.table({"text": ["ab"]}), tmp_path / "a.parquet")
    for block in blocks:
        with pytest.raises(CorpusError, match="has changed"):
            corpus.read(block)


def test_a_block_of_another_file_is_refused(tmp_path: Path) -> None:
    corpus = one(tmp_path, "a.jsonl", jsonl(TEXTS))
    one(tmp_path, "b.jsonl", jsonl(TEXTS))
    [(block, _)] = corpus.blocks("a.jsonl")
    with pytest.raises(CorpusError, match=r"cannot continue b\.jsonl behind a block of a\.jsonl"):
        list(corpus.blocks("b.jsonl", after=block))


def test_one_block_is_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    corpus = one(tmp_path, "a.jsonl.gz", gzip.compress(jsonl(["x" * 1000] * 20_000), 1))
    tracemalloc.start()
    try:
        assert sum(len(documents) for _, documents in corpus.blocks("a.jsonl.gz", block_bytes=100_000)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6  # of 20e6


# ── which files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_globs_are_in_natural_order(tmp_path: Path) -> None:
    names = ["shard-1.jsonl", "shard-2.jsonl", "shard-02.txt", "shard-10.jsonl", "b/9.jsonl", "b/11.jsonl", "A.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*files: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in Corpus(files=files, root=str(tmp_path)).paths()]

    assert found("shard-*.jsonl") == ["shard-1.jsonl", "shard-2.jsonl", "shard-10.jsonl"]
    assert found("shard-10.jsonl", "shard-[12].jsonl") == ["shard-10.jsonl", "shard-1.jsonl", "shard-2.jsonl"]
    assert found("**/*.jsonl")[:2] == ["b/9.jsonl", "b/11.jsonl"]
    assert found(str(tmp_path / "b" / "*")) == ["b/9.jsonl", "b/11.jsonl"]


def test_a_name_may_look_like_a_glob(tmp_path: Path) -> None:
    assert read_all(one(tmp_path, "a[1].jsonl", jsonl(["x"])))[0].text == "x"


def test_names_are_relative_to_the_root(tmp_path: Path) -> None:
    corpus = one(tmp_path, "a.jsonl", jsonl(["x"]))
    [(block, [document])] = corpus.blocks(tmp_path / "a.jsonl")
    assert block.path == document.path == "a.jsonl"
    assert corpus.locate(block.path) == tmp_path / "a.jsonl"
    outside = Corpus(files=(str(tmp_path / "a.jsonl"),), root=str(tmp_path / "elsewhere"))
    assert read_all(outside)[0].path == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "names no files"),
        (("b.jsonl",), r"b.jsonl does not exist; paths are taken below the root .*\. Did you mean 'a.jsonl'\?"),
        (("no/b.jsonl",), r"no/b.jsonl does not exist; .*\.$"),
        (("b*.jsonl",), r"the glob 'b\*.jsonl' matches no file below"),
        (("a.jsonl", "*.jsonl"), r"a.jsonl is named twice, by 'a.jsonl' and by '\*.jsonl'"),
        (("a.jsonl", "./a.jsonl"), "named twice"),
        (("d",), r"d is a folder; name its files, for example 'd/\*.jsonl'"),
        (("c.jsonk",), r"c.jsonk has the suffix '.jsonk'; known are .*.jsonl.*.parquet\. Did you mean '.json"),
        (("c.parquet.gz",), r"suffix '.parquet.gz'; known are"),
        (("c.gz",), r"suffix '.gz'; known are"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in ("a.jsonl", "c.jsonk", "c.parquet.gz", "c.gz"):
        (tmp_path / name).touch()
    (tmp_path / "d").mkdir()
    with pytest.raises(CorpusError, match=message):
        Corpus(files=files, root=str(tmp_path)).paths()


def test_a_string_is_no_tuple_of_files() -> None:
    with pytest.raises(CorpusError, match="expected a tuple of paths or globs"):
        Corpus(files="a.jsonl", root=".")  # type: ignore[arg-type]


def test_a_corpus_without_documents_is_an_error(tmp_path: Path) -> None:
    for data in (b"", b"\n\n", b"\xef\xbb\xbf"):
        corpus = one(tmp_path, "a.jsonl", data)
        [(block, documents)] = corpus.blocks("a.jsonl")
        assert (block.last, documents, corpus.read(block)) == (True, [], [])
        with pytest.raises(CorpusError, match=r"\['a.jsonl'\] below .* holds no documents"):
            list(corpus.documents())


# ── what is wrong with a line ────────────────────────────────────────────────────────────────────────────────────────

GOOD = b'{"text": "good"}\n'  # 17 bytes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a\xff"}', r"a.jsonl:3 \(byte 45\) is not UTF-8: byte 0xff, invalid start byte; convert or repair"),
        (
            '{"text": "ö" 1}'.encode(),
            r"a.jsonl:3 \(byte 48\) is not JSON: Expecting ',' delimiter; expected one JSON ob",
        ),
        (b'\xef\xbb\xbf{"text": "a"}', r"a.jsonl:3 \(byte 34\) is not JSON: Unexpected UTF-8 BOM"),
        (b"[1, 2]", r"a.jsonl:3 \(byte 34\) is a JSON list; .*jq -c"),
        (b"7", r"a.jsonl:3 \(byte 34\) is a JSON int; expected one JSON object a line$"),
        (
            b'{"texts": "a", "b": 1}',
            r"a.jsonl:3 \(byte 34\) has no 'text'; it has \['texts', 'b'\]\. Did you mean 'texts'",
        ),
        (b'{"text": null}', r"a.jsonl:3 \(byte 34\): 'text' is a NoneType; expected a string"),
        (
            b'{"text": "a", "id": 1.5}',
            r"a.jsonl:3 \(byte 34\): 'id' is a float; expected a string or an integer \(id_key",
        ),
        (b'{"text": "a", "id": true}', r"'id' is a bool"),
        (b'{"text": "a", "id": null}', r"'id' is a NoneType"),
        (rb'{"text": "a\ud800b"}', r"a.jsonl:3 \(byte 34\): 'text' holds the lone surrogate \\ud800 at character 1"),
        (rb'{"text": "a", "id": "\uDFFF"}', r"'id' holds the lone surrogate \\udfff"),
        (b"[" * 100_000, r"a.jsonl:3 \(byte 34\) cannot be read as JSON|is not JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"a.jsonl:3 \(byte 34\) cannot be read as JSON: Exceeds"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, BLOCK_BYTES])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str, block_bytes: int) -> None:
    corpus = one(tmp_path, "a.jsonl", GOOD + GOOD + line + b"\n" + GOOD)
    with pytest.raises(CorpusError, match=message):
        read_all(corpus, block_bytes)


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    assert read_all(one(tmp_path, "a.jsonl", rb'{"text": "\ud83d\udc1f"}'))[0].text == "🐟"


def test_a_broken_plain_text_is_named(tmp_path: Path) -> None:
    fails(
        one(tmp_path, "a.txt", b"one\ntwo\xc3"), r"a.txt:2 \(byte 7\) is not UTF-8: byte 0xc3, unexpected end of data"
    )
    fails(one(tmp_path, "a.txt", "one".encode("utf-16")), r"it looks like UTF-16: `iconv -f UTF-16 -t UTF-8`")


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.stores.blocks._LINE_LIMIT", 100)
    corpus = one(tmp_path, "a.jsonl", jsonl(["x" * 200]))
    with pytest.raises(CorpusError, match="longer than 100 bytes; expected one JSON object a line"):
        read_all(corpus, block_bytes=10)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path: Path, kind: str, packed: str) -> None:
    whole = PACK[packed](jsonl(TEXTS))
    for length in range(len(whole)):
        fails(one(tmp_path, f"a{kind}{packed}", whole[:length]), rf"a{kind}{packed} is truncated")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_damaged_file_is_an_error(tmp_path: Path, packed: str) -> None:
    name = f"a.jsonl{packed}"
    fails(one(tmp_path, name, jsonl(TEXTS)), rf"{name} is truncated or damaged: .* behind byte 0 .*; fetch or compress")
    fails(one(tmp_path, name, PACK[packed](jsonl(TEXTS)) + b"garbage"), "is truncated or damaged")


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    def written(**columns: Any) -> Corpus:
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
        return Corpus(files=("a.parquet",), root=str(tmp_path))

    fails(one(tmp_path, "a.parquet", b"no"), "a.parquet is damaged, or not Parquet: .*; fetch the file again")
    fails(written(texts=["a"]), r"a.parquet has no 'text'; it has \['texts'\]\. Did you mean 'texts'")
    fails(written(text=[1]), "a.parquet: column 'text' has type int64; expected strings")
    fails(written(text=["a", "b", "c", None]), r"a.parquet: row 4 \(row group 1\): 'text' is null; expected a string")
    fails(written(text=["a"], id=[0.5]), r"a.parquet: row 1 \(row group 0\): 'id' is a float; expected a string or an")
    invalid = pa.StringArray.from_buffers(1, pa.array([b"a\xff"]).buffers()[1], pa.array([b"a\xff"]).buffers()[2])
    fails(written(text=invalid), r"a.parquet: row 1 \(row group 0\): 'text' is not UTF-8 at its byte 1: invalid start")
