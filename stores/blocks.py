"""Text files cut into blocks of whole documents: JSON lines, plain text, Parquet."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import streams
from .errors import CorpusError, nearest

_LINE_LIMIT = 1 << 30  # a longer line, or document, is a file in another format; reading on would fill the memory
_AT_ONCE = 1 << 24
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of a corpus.

    `path` is the file's name below the corpus' root, `line` the 1-based line (Parquet: row; plain text: 1) in it.
    `id` is the document's own, as a string, or ``"<path>:<line>"``.
    """

    id: str
    text: str
    path: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive whole documents of one file; plain values, so that it can be kept as JSON.

    `start` and `stop` are offsets into the uncompressed bytes (Parquet: row-group numbers), `first_line` and `n_line`
    count lines from 1 (Parquet: rows), `last` says that the file ends here. `sha256` is of the uncompressed bytes
    (Parquet: of the texts, each behind its length in bytes as 8 little-endian bytes).
    """

    path: str
    start: int
    stop: int
    first_line: int
    n_line: int
    last: bool
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the files of a corpus lie, and under which keys their texts and ids are."""

    root: str
    text_key: str
    id_key: str | None

    def locate(self, name: str) -> Path:
        """The file that a `Block.path` or `Document.path` names."""
        return Path(self.root, name)


# ── documents out of bytes ───────────────────────────────────────────────────────────────────────────────────────────


class _Place(NamedTuple):
    """Where in a corpus something is wrong, for messages."""

    path: Path
    line: int
    byte: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} (byte {self.byte})"


def _decode(place: _Place, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = _Place(place.path, place.line + data.count(b"\n", 0, error.start), place.byte + error.start)
        utf16 = data.startswith(_UTF16_BOMS)
        hint = "it looks like UTF-16: `iconv -f UTF-16 -t UTF-8` converts it" if utf16 else "convert or repair the file"
        raise CorpusError(f"{wrong} is not UTF-8: byte 0x{data[error.start]:02x}, {error.reason}; {hint}") from error


def _json_object(place: _Place, line: bytes) -> dict[str, Any]:
    text = _decode(place, line)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        wrong = place._replace(byte=place.byte + len(text[: error.pos].encode("utf-8")))
        raise CorpusError(f"{wrong} is not JSON: {error.msg}; expected one JSON object a line") from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place} cannot be read as JSON: {error}; expected one JSON object a line") from error
    if not isinstance(record, dict):
        hint = "; `jq -c '.[]'` turns an array into lines" if isinstance(record, list) else ""
        raise CorpusError(f"{place} is a JSON {type(record).__name__}; expected one JSON object a line{hint}")
    return record


def _required(place: object, key: str, keys: list[str]) -> None:
    if key not in keys:
        shown = f"{keys[:20]}" + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
        raise CorpusError(
            f"{place} has no {key!r}; it has {shown}.{nearest(key, keys)} Set text_key to the one with text"
        )


def _text(place: object, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{place}: {key!r} is a {type(value).__name__}; expected a string")
    return value


def _id(place: object, key: str | None, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise CorpusError(
            f"{place}: {key!r} is a {type(value).__name__}; expected a string or an integer "
            "(id_key=None numbers the documents by file and line)"
        )
    return str(value)


def _no_lone_surrogates(place: object, key: str | None, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise CorpusError(
            f"{place}: {key!r} holds the lone surrogate \\u{code:04x} at character {error.start}, which is no text; "
            "remove or replace it"
        ) from error


def _json_document(layout: Layout, name: str, place: _Place, line: bytes) -> Document:
    record = _json_object(place, line)
    _required(place, layout.text_key, list(record))
    text = _text(place, layout.text_key, record[layout.text_key])
    key = layout.id_key
    identifier = _id(place, key, record[key]) if key is not None and key in record else f"{name}:{place.line}"
    if b"\\u" in line:  # UTF-8 cannot spell a surrogate, only an escape can
        _no_lone_surrogates(place, layout.text_key, text)
        _no_lone_surrogates(place, layout.id_key, identifier)
    return Document(id=identifier, text=text, path=name, line=place.line)


def _parse_lines(layout: Layout, block: Block, data: bytes) -> list[Document]:
    path = layout.locate(block.path)
    documents, line = [], block.first_line
    offset = len(_BOM) if block.start == 0 and data.startswith(_BOM) else 0
    while offset < len(data):
        end = data.find(b"\n", offset)
        end = len(data) if end < 0 else end
        content = data[offset:end]
        if content.strip(b" \t\r"):
            place = _Place(path, line, block.start + offset)
            documents.append(_json_document(layout, block.path, place, content))
        offset, line = end + 1, line + 1
    return documents


def _parse_whole(layout: Layout, block: Block, data: bytes) -> list[Document]:
    place = _Place(layout.locate(block.path), 1, 0)
    text = _decode(place, data).removeprefix("\ufeff")
    return [Document(id=f"{block.path}:1", text=text, path=block.path, line=1)]


# ── blocks of bytes ──────────────────────────────────────────────────────────────────────────────────────────────────


def _cut_lines(stream: streams.Stream, n_byte: int) -> bytes:
    data = stream.read(n_byte)
    if data and not data.endswith(b"\n"):
        rest = stream.readline(_LINE_LIMIT)
        if len(rest) == _LINE_LIMIT:
            raise CorpusError(
                f"{stream.path}: the line around byte {stream.position} is longer than {_LINE_LIMIT} bytes; "
                "expected one JSON object a line"
            )
        data += rest
    return data


def _cut_whole(stream: streams.Stream, n_byte: int) -> bytes:
    parts = list[bytes]()
    while part := stream.read(_AT_ONCE):
        parts.append(part)
        if stream.position > _LINE_LIMIT:
            raise CorpusError(f"{stream.path} is one document of more than {_LINE_LIMIT} bytes; cut it into several")
    return b"".join(parts)


class _ByteFormat(NamedTuple):
    """A format whose blocks are ranges of the uncompressed bytes."""

    cut: Callable[[streams.Stream, int], bytes]
    parse: Callable[[Layout, Block, bytes], list[Document]]

    def blocks(
        self, layout: Layout, name: str, after: Block | None, block_bytes: int
    ) -> Iterator[tuple[Block, list[Document]]]:
        start, line = (after.stop, after.first_line + after.n_line) if after else (0, 1)
        with streams.opened_at(layout.locate(name), start) as stream:
            last = False
            while not last:
                data = self.cut(stream, block_bytes)
                last = not stream.more()
                block = Block(
                    path=name,
                    start=start,
                    stop=start + len(data),
                    first_line=line,
                    n_line=data.count(b"\n") + (data[-1:] not in (b"", b"\n")),
                    last=last,
                    sha256=hashlib.sha256(data).hexdigest(),
                )
                yield block, self.parse(layout, block, data)
                start, line = block.stop, line + block.n_line

    def read(self, layout: Layout, block: Block) -> list[Document]:
        path = layout.locate(block.path)
        data = streams.read_range(path, block.start, block.stop)
        _require_unchanged(path, block, hashlib.sha256(data).hexdigest())
        return self.parse(layout, block, data)


def _require_unchanged(path: Path, block: Block, sha256: str) -> None:
    if sha256 != block.sha256:
        raise CorpusError(
            f"{path} has changed since its documents were counted: lines {block.first_line} to "
            f"{block.first_line + block.n_line - 1} had sha256 {block.sha256}, now {sha256}; "
            "restore the file, or start another run with the new text"
        )


# ── blocks of Parquet ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(f"{path} is Parquet, which needs pyarrow: pip install 'forebay[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path} is damaged, or not Parquet: {error}; fetch the file again") from error


def _utf8_column(place: str, key: str, column: Any) -> list[bytes | None]:
    """A string column as bytes: decoding row by row is what lets a message name the row."""
    import pyarrow.types

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise CorpusError(f"{place}: column {key!r} has type {kind}; expected strings")
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def _row_group(layout: Layout, name: str, file: Any, group: int, first_line: int) -> tuple[str, list[Document]]:
    """The sha256 of a row group's texts, and its documents."""
    path, columns = layout.locate(name), list(file.schema_arrow.names)
    _required(path, layout.text_key, columns)
    id_key = layout.id_key if layout.id_key in columns else None
    table = file.read_row_group(group, columns=[layout.text_key, *([id_key] if id_key else [])])
    texts = _utf8_column(str(path), layout.text_key, table.column(layout.text_key))
    ids = table.column(id_key).to_pylist() if id_key else []
    digest, documents = hashlib.sha256(), []
    for row, data in enumerate(texts):
        line = first_line + row
        place = f"{path}: row {line} (row group {group})"
        if data is None:
            raise CorpusError(f"{place}: {layout.text_key!r} is null; expected a string")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{place}: {layout.text_key!r} is not UTF-8 at its byte {error.start}: {error.reason}; write it again"
            ) from error
        identifier = _id(place, id_key, ids[row]) if id_key else f"{name}:{line}"
        digest.update(len(data).to_bytes(8, "little") + data)
        documents.append(Document(id=identifier, text=text, path=name, line=line))
    return digest.hexdigest(), documents


class _ParquetFormat(NamedTuple):
    """Parquet: a block is a row group."""

    def blocks(
        self, layout: Layout, name: str, after: Block | None, block_bytes: int
    ) -> Iterator[tuple[Block, list[Document]]]:
        start, line = (after.stop, after.first_line + after.n_line) if after else (0, 1)
        with _parquet(layout.locate(name)) as file:
            n_group = file.num_row_groups
            if n_group == 0:
                empty = hashlib.sha256().hexdigest()
                yield Block(path=name, start=0, stop=0, first_line=1, n_line=0, last=True, sha256=empty), []
            for group in range(start, n_group):
                sha256, documents = _row_group(layout, name, file, group, line)
                block = Block(
                    path=name,
                    start=group,
                    stop=group + 1,
                    first_line=line,
                    n_line=len(documents),
                    last=group + 1 == n_group,
                    sha256=sha256,
                )
                yield block, documents
                line += len(documents)

    def read(self, layout: Layout, block: Block) -> list[Document]:
        path = layout.locate(block.path)
        sha256, documents = hashlib.sha256().hexdigest(), list[Document]()
        with _parquet(path) as file:
            if block.start < min(block.stop, file.num_row_groups):
                sha256, documents = _row_group(layout, block.path, file, block.start, block.first_line)
        _require_unchanged(path, block, sha256)
        return documents


# ── which format ─────────────────────────────────────────────────────────────────────────────────────────────────────


_LINES = _ByteFormat(_cut_lines, _parse_lines)
_WHOLE = _ByteFormat(_cut_whole, _parse_whole)
_BYTE_FORMATS = {".jsonl": _LINES, ".ndjson": _LINES, ".json": _LINES, ".txt": _WHOLE, ".md": _WHOLE}
FORMATS: dict[str, _ByteFormat | _ParquetFormat] = {
    **_BYTE_FORMATS,
    **{kind + packed: how for kind, how in _BYTE_FORMATS.items() for packed in streams.COMPRESSIONS},
    ".parquet": _ParquetFormat(),
}
"""Suffix → how such a file is cut into blocks and read."""


def format_of(path: str) -> _ByteFormat | _ParquetFormat:
    """How to read a file, by its suffix; raises CorpusError with the known ones if there is no way."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in streams.COMPRESSIONS:
        suffix = os.path.splitext(stem)[1] + suffix
    if suffix not in FORMATS:
        raise CorpusError(
            f"{path} has the suffix {suffix!r}; known are {', '.join(FORMATS)}.{nearest(suffix, FORMATS)}"
        )
    return FORMATS[suffix]
