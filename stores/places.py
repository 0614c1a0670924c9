"""Where things lie: folders of this machine and of object stores, by one small set of calls."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from .errors import SchemaError
from .object_paths import ObjectPath

Place = Path | ObjectPath
"""A folder or file of this machine, or what lies in an object store."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


def place(where: str | os.PathLike[str] | ObjectPath) -> Place:
    """What a text names: `s3://`, `gs://`, `az://` and `memory://` something in an object store, anything else, also
    `file:///…`, something on this machine. Nothing is looked at.

    SchemaError for other addresses, and for an address that went through `pathlib`, which takes a slash from it.
    """
    if isinstance(where, ObjectPath):
        return where
    text = os.fspath(where)
    if text.startswith("file://"):
        found = urlsplit(text)
        if found.netloc not in ("", "localhost") or not found.path:
            raise SchemaError(f"{text} names another machine: write file:///folder, with three slashes")
        return Path(unquote(found.path))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return ObjectPath(text)
    if re.match(r"(s3|gs|az|memory):/", text):
        raise SchemaError(f"{text} has lost a slash on its way through pathlib: give the address as a text")
    return Path(where)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def names(folder: Place) -> list[str]:
    """Names of what lies directly in a folder, in no order; none if there is no such folder. One listing."""
    if isinstance(folder, ObjectPath):
        return folder.names()
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def size_of(file: Place) -> int:
    """Bytes of a file. FileNotFoundError."""
    return file.size() if isinstance(file, ObjectPath) else file.stat().st_size


def changed_at(file: Place) -> int:
    """When a file was put, in nanoseconds since 1970. FileNotFoundError."""
    return file.changed() if isinstance(file, ObjectPath) else file.stat().st_mtime_ns


def free_space(folder: Place) -> int | None:
    """Bytes that may still be written to a folder that is there; None where nothing says so, as of object stores."""
    return None if isinstance(folder, ObjectPath) else shutil.disk_usage(folder).free


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def sync_folder(folder: Place) -> None:
    """Makes the names in a folder durable (a no-op where folders cannot be opened, and where there are none)."""
    if isinstance(folder, ObjectPath):
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Place, data: bytes) -> None:
    """Puts a file whole or not at all: written aside, made durable, renamed into place; or in an object store put."""
    if isinstance(path, ObjectPath):
        path.put(data)
        return
    aside = _aside(path, data)
    try:
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that is made durable, and then put at `path`; or taken away, where anything goes wrong. The name is not
    durable yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def put_new(path: Place, data: bytes) -> bool:
    """Puts a file whole unless there is one, and says whether it did: of any number of processes that try, one does.

    Two cases are weaker. A file system without hard links, and an object store without conditional puts, may let two
    through that try at the same moment: the later one's bytes stand. And where an object store's answer was lost, equal
    bytes are taken for this call's, so put something of one's own.
    """
    if isinstance(path, ObjectPath):
        return path.put_new(data)
    if path.exists():
        return False
    aside = _aside(path, data)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _aside(path: Path, data: bytes) -> Path:
    """A durable file beside `path`, by a name that readers ignore."""
    # Writers on several machines, or in several containers, may share their process id.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def delete_tree(folder: Place) -> None:
    """Deletes a folder with all that lies in it, if it is there; what cannot be deleted on this machine stays."""
    if isinstance(folder, ObjectPath):
        folder.delete_below()
    else:
        shutil.rmtree(folder, ignore_errors=True)
