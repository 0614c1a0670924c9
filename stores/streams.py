"""Files as streams of uncompressed bytes: plain, gzip or Zstandard, readable from any offset."""

from __future__ import annotations

import gzip
import io
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import zstandard

from .errors import CorpusError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_READ_BYTES = 1 << 20
_SOURCE_BYTES = 32 << 10  # what decompresses at once: small, since a run of zeros can grow ten-thousandfold
_MAX_WINDOW = 1 << 31  # `zstd --long=31`, which large public text dumps are made with
_N_PARKED = 4


class _ZstdFrames(io.RawIOBase):
    """The bytes of all frames of a .zst file, one behind the other.

    zstandard's own reader takes the end of a truncated file for the end of its text; this one raises EOFError.
    """

    def __init__(self, path: Path) -> None:
        self._source = open(path, "rb")  # noqa: SIM115  closed with this reader
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._source_bytes = b""
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._out:
            if not self._source_bytes:
                self._source_bytes = self._source.read(_SOURCE_BYTES)
            if not self._source_bytes:
                if self._frame is not None:
                    raise EOFError("the file ends inside a Zstandard frame")
                return 0
            self._advance()
        target = memoryview(buffer).cast("B")
        n_byte = min(len(target), len(self._out))
        target[:n_byte] = self._out[:n_byte]
        self._out = self._out[n_byte:]
        return n_byte

    def _advance(self) -> None:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        self._out = memoryview(self._frame.decompress(self._source_bytes))
        self._source_bytes = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._source.close()
        super().close()


def _open_plain(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=_READ_BYTES)


def _open_gzip(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb"))


def _open_zstd(path: Path) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_ZstdFrames(path), _READ_BYTES))


class _Compression(NamedTuple):
    open: Callable[[Path], BinaryIO]
    compressed: bool


COMPRESSIONS = {
    ".gz": _Compression(_open_gzip, True),
    ".zst": _Compression(_open_zstd, True),
}
_PLAIN = _Compression(_open_plain, False)


@contextmanager
def _damage_named(path: Path, position: int) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{path} is truncated or damaged: decompression fails behind byte {position} of its text ({error}); "
            "fetch or compress the file again"
        ) from error


class Stream:
    """The uncompressed bytes of one file, forwards; `position` is the offset of the next one.

    Reading a truncated or damaged compressed file raises CorpusError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.identity = identity(path)
        how = COMPRESSIONS.get(path.suffix.lower(), _PLAIN)
        self.compressed = how.compressed
        if how.compressed and self.identity.n_byte == 0:
            raise CorpusError(f"{path} is truncated: it has 0 bytes, and an empty compressed file has more")
        self._bytes = how.open(path)

    def read(self, n_byte: int) -> bytes:
        """The next `n_byte` bytes, fewer only at the end; all that is left for -1."""
        with _damage_named(self.path, self.position):
            data = self._bytes.read(n_byte)
        self.position += len(data)
        return data

    def readline(self, limit: int) -> bytes:
        """What is left of the line, with its newline, at most `limit` bytes."""
        with _damage_named(self.path, self.position):
            data = self._bytes.readline(limit)
        self.position += len(data)
        return data

    def more(self) -> bool:
        """Whether a byte follows."""
        with _damage_named(self.path, self.position):
            return bool(cast(io.BufferedReader, self._bytes).peek(1))

    def skip_to(self, position: int) -> None:
        """Go on to an offset that is not behind; a compressed file is decompressed up to there."""
        assert position >= self.position
        if not self.compressed:
            self._bytes.seek(position)
            self.position = position
        while self.position < position and self.read(min(_READ_BYTES, position - self.position)):
            pass

    def close(self) -> None:
        self._bytes.close()


class Identity(NamedTuple):
    """What tells a file from another one put in its place."""

    inode: int
    n_byte: int
    modified_ns: int


def identity(path: Path) -> Identity:
    stat = os.stat(path)
    return Identity(stat.st_ino, stat.st_size, stat.st_mtime_ns)


# Compressed streams that stand where the next block probably starts. Each belongs to whoever took it out.
_parked: list[Stream] = []
_parked_lock = threading.Lock()


def _take(path: Path, position: int) -> Stream | None:
    """The parked stream of this very file that stands nearest before `position`."""
    same = identity(path)
    with _parked_lock:
        usable = [s for s in _parked if s.path == path and s.identity == same and s.position <= position]
        if not usable:
            return None
        stream = max(usable, key=lambda s: s.position)
        _parked.remove(stream)
        return stream


def _park(stream: Stream) -> None:
    with _parked_lock:
        _parked.append(stream)
        dropped = _parked[:-_N_PARKED]
        del _parked[:-_N_PARKED]
    for old in dropped:
        old.close()


def _forget_parked() -> None:
    """A forked child shares file offsets with its parent, so it starts with streams of its own."""
    global _parked_lock
    _parked_lock = threading.Lock()
    for stream in _parked:
        stream.close()
    _parked.clear()


os.register_at_fork(after_in_child=_forget_parked)


@contextmanager
def opened_at(path: Path, position: int) -> Iterator[Stream]:
    """A stream of the file's uncompressed bytes from `position` on."""
    stream = Stream(path)
    try:
        stream.skip_to(position)
        yield stream
    finally:
        stream.close()


def read_range(path: Path, start: int, stop: int) -> bytes:
    """The uncompressed bytes [start, stop) of a file, fewer if it ends before.

    Ascending ranges of one compressed file cost one pass: the stream is kept where the last one ended, for whichever
    thread asks next.
    """
    stream = _take(path, start) or Stream(path)
    try:
        stream.skip_to(start)
        data = stream.read(stop - start)
    except BaseException:
        stream.close()
        raise
    if stream.compressed:
        _park(stream)
    else:
        stream.close()
    return data
