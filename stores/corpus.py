"""Text at rest: documents in JSON lines, plain text or Parquet files, cut into blocks that can be read again.

A block is a run of whole documents of one file and remembers where it lies and the checksum of its bytes, so that a
count of a corpus can stop after any block, go on later, and read any block again without the ones before it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .blocks import Block, Document, Layout, format_of
from .errors import CorpusError, nearest

__all__ = ["BLOCK_BYTES", "Block", "Corpus", "Document"]

BLOCK_BYTES = 32 << 20
"""Uncompressed bytes of a block, up to the end of the line that crosses the edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Where documents are: `files` are paths or globs relative to `root`, read in the order in which they are given.

    The format follows from the suffix: JSON lines (.jsonl, .ndjson, .json), one document a file (.txt, .md), each
    also with .gz or .zst behind it; and .parquet. `text_key` and `id_key` name the key or column; where a document has
    no `id_key`, or `id_key` is None, its id is ``"<path>:<line>"``. Nothing is opened before it is asked for.
    """

    files: tuple[str, ...]
    root: str
    text_key: str = "text"
    id_key: str | None = "id"

    def __post_init__(self) -> None:
        if isinstance(self.files, str):
            raise CorpusError(
                f"files is the string {self.files!r}; expected a tuple of paths or globs: ({self.files!r},)"
            )

    def paths(self) -> tuple[Path, ...]:
        """The files in reading order: globs expanded, each in natural order (shard-2 before shard-10).

        Raises CorpusError for a missing file, a glob without a match, a file named twice, and an unknown suffix.
        """
        if not self.files:
            raise CorpusError("the corpus names no files; expected at least one path or glob")
        origin: dict[str, str] = {}
        for pattern in self.files:
            if "://" in pattern:
                raise CorpusError(
                    f"{pattern} is an address; a corpus lies in files of this machine: copy it there, for example with "
                    "`aws s3 cp`, `gsutil cp` or rclone, and name the copies"
                )
            for path in _expand(self.root, pattern):
                format_of(path)
                absolute = os.path.abspath(path)
                if absolute in origin:
                    known = origin[absolute]
                    raise CorpusError(f"{path} is named twice, by {known!r} and by {pattern!r}; name each file once")
                origin[absolute] = pattern
        return tuple(Path(path) for path in origin)

    def blocks(
        self, path: Path | str, after: Block | None = None, *, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[tuple[Block, list[Document]]]:
        """The blocks of one file in order, each with its documents; `after` continues behind a block already seen.

        A line of JSON belongs to the block in which it starts; a plain text is one block, a Parquet row group is one.
        A file without documents gives one block without documents, so that the last block always has `last` set.
        One block is in memory at a time. Raises CorpusError, with file, line and byte, for what cannot be read.
        """
        name = self._name(path)
        if after is not None and after.path != name:
            raise CorpusError(f"cannot continue {name} behind a block of {after.path}")
        if after is not None and after.last:
            return
        yield from format_of(name).blocks(self._layout, name, after, block_bytes)

    def read(self, block: Block) -> list[Document]:
        """The documents of a block that `blocks` gave, read again.

        Consecutive blocks of a compressed file cost one pass over it. Raises CorpusError if the bytes have changed.
        """
        return format_of(block.path).read(self._layout, block)

    def documents(self) -> Iterator[Document]:
        """All documents in reading order, one block in memory at a time; raises CorpusError if there are none."""
        n_document = 0
        for path in self.paths():
            for _, documents in self.blocks(path):
                n_document += len(documents)
                yield from documents
        self.require_documents(n_document)

    def require_documents(self, n_document: int) -> None:
        """Raise CorpusError if a complete pass over the corpus found no documents."""
        if n_document == 0:
            raise CorpusError(
                f"the corpus {list(self.files)} below {self.root} holds no documents; "
                "every file is empty, or has empty lines only"
            )

    def locate(self, name: str) -> Path:
        """The file that a `Block.path` or `Document.path` names."""
        return self._layout.locate(name)

    @property
    def _layout(self) -> Layout:
        return Layout(root=self.root, text_key=self.text_key, id_key=self.id_key)

    def _name(self, path: Path | str) -> str:
        absolute, root = Path(os.path.abspath(Path(self.root, path))), Path(os.path.abspath(self.root))
        return (absolute.relative_to(root) if absolute.is_relative_to(root) else absolute).as_posix()


# ── which files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _natural_key(name: str) -> tuple[list[int | str], str]:
    parts = re.split(r"([0-9]+)", name)  # text and digits take turns, so that equal indices have equal types
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _expand(root: str, pattern: str) -> list[str]:
    path = os.path.join(root, pattern)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        raise CorpusError(f"{path} is a folder; name its files, for example {os.path.join(pattern, '*.jsonl')!r}")
    if not any(sign in pattern for sign in "*?["):
        folder = os.path.dirname(path)
        there = os.listdir(folder) if os.path.isdir(folder) else []
        raise CorpusError(
            f"{path} does not exist; paths are taken below the root {root}.{nearest(os.path.basename(path), there)}"
        )
    matches = (os.path.join(root, match) for match in glob.glob(pattern, root_dir=root, recursive=True))
    found = sorted((match for match in matches if os.path.isfile(match)), key=_natural_key)
    if not found:
        raise CorpusError(f"the glob {pattern!r} matches no file below {root}")
    return found
