"""What determines a store's values, as one hash; and what made it, as a record."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import socket
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .object_paths import ObjectPath
from .places import Place, write_atomic

PACKAGES = ("forebay", "torch", "tokenizers", "numpy", "zarr", "xarray", "gguf", "safetensors")


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, NaN refused. Equal values have equal texts in every
    process.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path], cache: Place) -> dict[Path, str]:
    """sha256 of each file, in the order given.

    A file whose path, size and time of change stand in `cache` (JSON) is not read again.
    """
    known = known_hashes(cache)
    found: dict[Path, str] = {}
    fresh = dict(known)
    for path in paths:
        stat = path.stat()
        key, seen = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        entry = known.get(key)
        digest = entry[2] if entry and entry[:2] == seen else sha256_file(path)
        fresh[key] = [*seen, digest]
        found[path] = digest
    if fresh != known and (isinstance(cache, ObjectPath) or cache.parent.is_dir()):
        write_atomic(cache, canonical_json(fresh).encode())
    return found


def known_hashes(cache: Place) -> dict[str, list[Any]]:
    """What a run's files.json says, path → size, time of change, sha256; nothing where it cannot be read: it only saves
    reading files twice.
    """
    try:
        said = json.loads(cache.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    entries = said.items() if isinstance(said, dict) else ()
    form = [int, int, str]
    return {key: entry for key, entry in entries if isinstance(entry, list) and list(map(type, entry)) == form}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in the numbers; a package that is not installed is left
    out.
    """
    return dict(_installed())


@functools.cache
def _installed() -> Mapping[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def whereabouts() -> dict[str, Any]:
    """Host, machine type and process that are doing the work now."""
    return {"host": socket.gethostname(), "machine": platform.machine(), "pid": os.getpid()}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys at which two nested mappings differ, each with both values, for messages."""
    found: list[str] = []
    for key in sorted({*ours, *theirs}):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            found.append(f"{prefix}{key}: {mine!r} here, {other!r} in the store")
    return found
