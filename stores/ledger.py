"""Done and failed records beside the data. A unit is done when its record stands; nothing else says so.

One small JSON file a unit, put atomically after the data it speaks of is durable: a reader sees a whole record or none.
Standard library only, so that the state of a run is one directory listing away.
"""

from __future__ import annotations

import json
import os
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CorruptStore, UnsafePath
from .object_paths import ObjectPath
from .places import Place, names, put_new
from .places import sync_folder as sync_folder
from .places import write_atomic as write_atomic

FAILED = re.compile(r"(\d+)\.(\d+)\.json")
MOST_JSON_BYTES = 2**30
"""Longer files are not read: a record of a million documents has a tenth of it."""


Record = dict[str, Any]
"""What is known of one finished unit: JSON values only. `objects` maps each object's key to its bytes and checksum."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The records of one step, in the folders `done` and `failed` of `folder`."""

    folder: Place

    @property
    def done_folder(self) -> Place:
        return self.folder / "done"

    @property
    def failed_folder(self) -> Place:
        return self.folder / "failed"

    @staticmethod
    def name(index: int) -> str:
        """The file of a unit's record, in `done`."""
        return f"{index:06d}.json"

    def path(self, index: int) -> Place:
        """Where the record of a unit stands once it is done."""
        return self.done_folder / self.name(index)

    def done(self) -> set[int]:
        """Indexes of the finished units: one listing, no file is opened."""
        # Names of files on their way begin with a dot.
        found = [name for name in names(self.done_folder) if not name.startswith(".")]
        # A listing may be a million names long, and is read in one go where it holds nothing but records.
        listing = "/".join(found) + "/"
        numbers = listing.replace(".json/", "/")
        whole = len(listing) - len(numbers) == 5 * len(found) and "//" not in f"/{numbers}"
        if whole and numbers.replace("/", "").isdecimal() and numbers.isascii():
            return set(map(int, numbers[:-1].split("/")))
        return {int(name[:-5]) for name in found if name.endswith(".json") and name[:-5].isdecimal()}

    def failed(self) -> dict[int, int]:
        """Failed attempts by unit, of units that are not done."""
        attempts = self._attempts()
        done = self.done() if attempts else set()  # a listing may be a million names long
        return {unit: count for unit, count in sorted(attempts.items()) if unit not in done}

    def _attempts(self) -> dict[int, int]:
        attempts: dict[int, int] = {}
        for name in names(self.failed_folder):
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
        """Puts the record of a unit. Call it when everything the record names is durable.

        In an object store one of two writers of a unit puts it; the other's, if it says the same of the same objects,
        is not needed.
        """
        _require_own(self.done_folder)
        self.done_folder.mkdir(parents=True, exist_ok=True)
        path, data = self.path(index), json.dumps(record, indent=1, sort_keys=True).encode()
        if isinstance(path, ObjectPath) and (put_new(path, data) or self._says_the_same(index, record)):
            return
        write_atomic(path, data)

    def _says_the_same(self, index: int, record: Record) -> bool:
        """Whether the record that stands is of the same values."""
        try:
            there = self.record(index)
        except (CorruptStore, FileNotFoundError):
            return False
        return "objects" in record and all(there.get(key) == record.get(key) for key in ("fingerprint", "objects"))

    def fail(self, index: int, error: BaseException, about: Record) -> Place:
        """Records a failed attempt with its traceback and gives the record's path."""
        _require_own(self.failed_folder)
        self.failed_folder.mkdir(parents=True, exist_ok=True)
        attempt = 1
        while (path := self.failed_folder / f"{index:06d}.{attempt}.json").exists():
            attempt += 1
        text = "".join(traceback.format_exception(error))
        write_atomic(path, json.dumps({**about, "error": repr(error), "traceback": text}, indent=1).encode())
        return path

    def drop(self, index: int) -> None:
        """Takes a unit's record away, so that the next run computes the unit again."""
        _require_own(self.done_folder)
        self.path(index).unlink(missing_ok=True)
        if isinstance(self.done_folder, Path) and self.done_folder.is_dir():
            sync_folder(self.done_folder)


def _require_own(folder: Place) -> None:
    """UnsafePath if a folder of records is a link: what was put there, or dropped, would not be this run's."""
    if os.path.islink(str(folder)):
        raise UnsafePath(f"{folder} is a symbolic link, and no record is put or dropped through one. Remove the link")


def read_json(path: Place, most: int = MOST_JSON_BYTES) -> Record:
    """A JSON object at rest, of at most so many bytes. CorruptStore names the file if it is not one."""
    if isinstance(path, Path) and path.exists():
        if not path.is_file():
            raise CorruptStore(f"{path} is no file")  # a pipe would be waited on for ever
        if (size := path.stat().st_size) > most:
            raise CorruptStore(f"{path} has {size:,} bytes; what stands here has at most {most:,}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptStore(f"{path} is not readable as JSON ({error}); delete it and run again") from error
    if not isinstance(value, dict):
        raise CorruptStore(f"{path} holds {type(value).__name__}, not a JSON object; delete it and run again")
    return value
