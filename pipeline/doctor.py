"""`forebay doctor`: whether this machine can run forebay, and what to do where it cannot.

Every check says one thing and is `ok`, a `note` (good to know), or a `problem`. Nothing is changed; the network is
asked for a model only, and only if one is named.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..stores.places import sync_folder
from ..stores.threads import N_CORE

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "note", "problem"]
PROBE_BYTES = 8 * 2**20
"""Written to a folder, in blocks of a MiB, to see how fast it is."""
LITTLE_SPACE = 2 * 10**9
"""Bytes that a small run takes: less is worth a note."""
SLOW = 20e6
"""Bytes a second below which most runs wait for their folder."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at (`area` and `name`), how it is, what was found, and what to do about it, if anything."""

    area: str
    name: str
    state: State
    said: str
    todo: str = ""


def examine(folder: Path, model: str | None = None, revision: str | None = None) -> Iterator[Check]:
    """All checks, one after the other: installation, devices, the disk under `folder`, access to models, and whether
    `model` (a source, as recipes have it) can be read. Raises nothing.
    """
    yield from installation()
    yield from devices()
    yield from disk(folder)
    yield from hub(os.environ, Path.home())
    if model is not None:
        yield model_access(model, revision)


# ── installation ─────────────────────────────────────────────────────────────────────────────────────────────────────


def installation() -> Iterator[Check]:
    """Python and the packages, by what the distribution of forebay says that it needs."""
    try:
        found, requires = metadata.metadata("forebay"), metadata.requires("forebay") or []
        import packaging  # noqa: F401 - by which bounds are read
    except ImportError as error:  # which an absent distribution is, too
        name = error.name or "forebay"
        yield Check("installation", name, "problem", "is not installed", f"pip install {name}")
        return
    yield python_version(platform.python_version(), found["Requires-Python"] or "")
    yield from packages(requires)
    yield from extras(requires, found.get_all("Provides-Extra") or [])


def installed(name: str) -> str | None:
    """The version of a distribution that is installed, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python_version(running: str, needed: str) -> Check:
    """Whether the Python that runs is within the bounds, as in ">=3.11"."""
    from packaging.specifiers import SpecifierSet

    right = SpecifierSet(needed).contains(running, prereleases=True)
    todo = "" if right else f"make an environment with Python {needed}"
    return Check("installation", "python", "ok" if right else "problem", f"{running} ({needed})", todo)


def packages(requires: Iterable[str]) -> Iterator[Check]:
    """Of every package that is needed always, whether it is there, and of a version within its bounds. `requires` are
    requirements as a distribution's metadata have them; those of extras are passed over.
    """
    from packaging.requirements import Requirement

    for needed in map(Requirement, requires):
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        wrong, said = _look(needed)
        todo = f"pip install '{needed.name}{needed.specifier}'" if wrong else ""
        yield Check("installation", needed.name, "problem" if wrong else "ok", said, todo)


def extras(requires: Sequence[str], names: Iterable[str]) -> Iterator[Check]:
    """Of every extra but that of the tests, whether its packages are there: a note where they are not."""
    from packaging.requirements import Requirement

    needed = [one for one in map(Requirement, requires) if one.marker is not None]
    for name in names:
        if name == "test":
            continue
        own = [one for one in needed if one.marker and one.marker.evaluate({"extra": name})]
        own = [one for one in own if one.marker and not one.marker.evaluate({"extra": ""})]
        looked = [(one.name, *_look(one)) for one in own]
        wrong = any(missing for _, missing, _ in looked)
        said = ", ".join(f"{package} {version}" for package, _, version in looked)
        todo = f"pip install 'forebay[{name}]', if you need it" if wrong else ""
        yield Check("installation", f"forebay[{name}]", "note" if wrong else "ok", said, todo)


def _look(needed: Requirement) -> tuple[bool, str]:
    """Whether a package is missing or out of bounds, and what to say of it."""
    version = installed(needed.name)
    if version is None:
        return True, f"is not installed ({needed.specifier} is needed)"
    wrong = not needed.specifier.contains(version, prereleases=True)
    return wrong, f"{version} ({needed.specifier})" if str(needed.specifier) else version


# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def devices() -> Iterator[Check]:
    """Processors and memory of this process, and the devices that torch sees. Imports torch."""
    yield _memory()
    try:
        import torch
    except (ImportError, OSError) as error:
        todo = "install it as https://pytorch.org/get-started says for this machine"
        yield Check("devices", "torch", "problem", f"cannot be imported: {error}", todo)
        return
    threads = torch.get_num_threads()
    few = threads < N_CORE
    todo = "set OMP_NUM_THREADS, or leave it as it is where several runs share the machine" if few else ""
    said = f"processors: {N_CORE}; threads of torch: {threads}"
    yield Check("devices", "cpu", "note" if few else "ok", said, todo)
    yield from _accelerators()


def _accelerators() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            try:
                free, whole = torch.cuda.mem_get_info(i)
            except RuntimeError as error:
                yield Check("devices", f"cuda:{i}", "problem", str(error).splitlines()[0], "look at nvidia-smi")
                continue
            said = f"{torch.cuda.get_device_name(i)}, {free / 1e9:.1f} of {whole / 1e9:.1f} GB free"
            yield Check("devices", f"cuda:{i}", "ok", said)
    elif torch.version.cuda is not None:
        said = f"none, though torch is built for CUDA {torch.version.cuda}"
        yield Check("devices", "cuda", "note", said, "look at nvidia-smi if this machine has a GPU")
    else:
        yield Check("devices", "cuda", "ok", "none: torch is built without it")
    if torch.backends.mps.is_available():
        yield Check("devices", "mps", "ok", "there")


def _memory() -> Check:
    """Memory of this machine, or of the container that the process is in."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _first_number(Path("/sys/fs/cgroup/memory.max"))
    if limit is not None and limit < whole:
        return Check("devices", "memory", "ok", f"{limit / 1e9:.1f} GB, the limit of this container")
    return Check("devices", "memory", "ok", f"{whole / 1e9:.1f} GB")


def _first_number(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


# ── disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def disk(folder: Path) -> Iterator[Check]:
    """Room in a folder, and how fast a few MiB become durable there: written aside, and removed again."""
    if not folder.is_dir():
        yield Check("disk", "folder", "problem", f"{folder} is no folder", f"mkdir -p '{folder}', or name another one")
        return
    free = shutil.disk_usage(folder).free
    little = free < LITTLE_SPACE
    said = f"{free / 1e9:,.1f} GB free in {folder.resolve()}"
    todo = "free some space, or name another folder" if little else ""
    yield Check("disk", "space", "note" if little else "ok", said, todo)
    try:
        whole, small = _write(folder, PROBE_BYTES), _write(folder, 1)
    except OSError as error:
        said = f"{folder} cannot be written to: {error.strerror}"
        yield Check("disk", "writing", "problem", said, "name another folder, or change its permissions")
        return
    slow = PROBE_BYTES / whole < SLOW
    said = f"{PROBE_BYTES / whole / 1e6:,.0f} MB/s with fsync; a small file in {small * 1e3:,.1f} ms"
    todo = "`forebay plan RECIPE --measure` says whether a run would wait for it" if slow else ""
    yield Check("disk", "writing", "note" if slow else "ok", said, todo)


def _write(folder: Path, nbytes: int) -> float:
    """Seconds until a new file of so many bytes is durable. The file is removed."""
    path, block = folder / f".forebay-doctor-{uuid.uuid4().hex}.tmp", os.urandom(min(nbytes, 2**20))
    started = time.perf_counter()
    try:
        with open(path, "xb") as file:
            for _ in range(0, nbytes, len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
        return max(time.perf_counter() - started, 1e-9)
    finally:
        path.unlink(missing_ok=True)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def hub(environment: Mapping[str, str], home: Path) -> Iterator[Check]:
    """Where models of the Hugging Face hub are kept, whether it may be asked, and whether it knows who asks: the token
    itself is never shown.
    """
    area = "models"
    base = Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface"
    kept = Path(environment.get("HF_HOME") or base).expanduser()
    named = "HF_HOME" if environment.get("HF_HOME") else "HF_HOME is not set"
    yield Check(area, "cache", "ok", f"{kept} ({named}){'' if kept.is_dir() else ', made at the first download'}")
    file = Path(environment.get("HF_TOKEN_PATH") or kept / "token").expanduser()
    if environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"):
        yield Check(area, "token", "ok", "HF_TOKEN is set")
    elif file.is_file():
        yield Check(area, "token", "ok", f"there is one in {file}")
    else:
        yield Check(area, "token", "note", "none", "for gated models: 'hf auth login', or set HF_TOKEN")
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check(
            area, "network", "note", "HF_HUB_OFFLINE is set: models come from the cache only", "unset it to ask"
        )
    else:
        yield Check(area, "network", "ok", "the hub is asked for what is not in the cache")


def model_access(source: str, revision: str | None) -> Check:
    """Whether a model can be read, or reached on the hub, without fetching its weights."""
    import warnings

    from ..stages.models.errors import ModelError

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            from ..stages.models.source import check_access

            said = check_access(source, revision)
        except ModelError as error:
            return Check("models", source, "problem", str(error), "docs/models.md says what can be read")
        except ImportError as error:
            return Check("models", source, "problem", f"cannot be looked at: {error}", "mend the installation first")
        except OSError as error:
            return Check("models", source, "problem", f"cannot be reached: {error}", "is there a network, or a proxy?")
    doubts = [str(one.message) for one in warned if issubclass(one.category, UserWarning)]
    return Check("models", source, "note" if doubts else "ok", "; ".join([said, *doubts]))
