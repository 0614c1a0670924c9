"""Done and failed records beside the data. A unit is done when its record stands; nothing else says so.

One small JSON file a unit, put atomically after the data it speaks of is durable: a reader sees a whole record or none.
Standard library only, so that the state of a run is one directory listing away.
"""

from __future__ import annotations

import json
import os
import re
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CorruptStore

DONE = re.compile(r"(\d+)\.json")
FAILED = re.compile(r"(\d+)\.(\d+)\.json")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable (a no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Puts a file whole or not at all: written aside, made durable, renamed into place."""
    # Writers on several machines, or in several containers, may share their process id.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


Record = dict[str, Any]
"""What is known of one finished unit: JSON values only. `objects` maps each object's key to its bytes and sha256."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The records of one step, in the folders `done` and `failed` of `folder`."""

    folder: Path

    @property
    def done_folder(self) -> Path:
        return self.folder / "done"

    @property
    def failed_folder(self) -> Path:
        return self.folder / "failed"

    def path(self, index: int) -> Path:
        """Where the record of a unit stands once it is done."""
        return self.done_folder / f"{index:06d}.json"

    def done(self) -> set[int]:
        """Indexes of the finished units: one listing, no file is opened."""
        return {int(match[1]) for name in _names(self.done_folder) if (match := DONE.fullmatch(name))}

    def failed(self) -> dict[int, int]:
        """Failed attempts by unit, of units that are not done."""
        attempts, done = self._attempts(), self.done()
        return {unit: count for unit, count in sorted(attempts.items()) if unit not in done}

    def _attempts(self) -> dict[int, int]:
        attempts: dict[int, int] = {}
        for name in _names(self.failed_folder):
            if match := FAILED.fullmatch(name):
                attempts[int(match[1])] = max(attempts.get(int(match[1]), 0), int(match[2]))
        return attempts

    def record(self, index: int) -> Record:
        """The record of a finished unit. CorruptStore if it cannot be read as one."""
        return read_json(self.path(index))

    def failure(self, index: int, attempt: int) -> Record:
        """The record of a failed attempt: its error and traceback."""
        return read_json(self.failed_folder / f"{index:06d}.{attempt}.json")

    def complete(self, index: int, record: Record) -> None:
        """Puts the record of a unit. Call it when everything the record names is durable."""
        self.done_folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path(index), json.dumps(record, indent=1, sort_keys=True).encode())

    def fail(self, index: int, error: BaseException, about: Record) -> Path:
        """Records a failed attempt with its traceback and gives the record's path."""
        self.failed_folder.mkdir(parents=True, exist_ok=True)
        path = self.failed_folder / f"{index:06d}.{self._attempts().get(index, 0) + 1}.json"
        text = "".join(traceback.format_exception(error))
        write_atomic(path, json.dumps({**about, "error": repr(error), "traceback": text}, indent=1).encode())
        return path

    def drop(self, index: int) -> None:
        """Takes a unit's record away, so that the next run computes the unit again."""
        self.path(index).unlink(missing_ok=True)
        if self.done_folder.is_dir():
            sync_folder(self.done_folder)


def read_json(path: Path) -> Record:
    """A JSON object at rest. CorruptStore names the file if it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptStore(f"{path} is not readable as JSON ({error}); delete it and run again") from error
    if not isinstance(value, dict):
        raise CorruptStore(f"{path} holds {type(value).__name__}, not a JSON object; delete it and run again")
    return value


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
