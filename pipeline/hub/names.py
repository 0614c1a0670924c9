"""The names of files that a run can have: what may be published of one, and what may be fetched as one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ...stages.encode import TRAINED
from ...stores.errors import UnsafePath
from ...stores.feature_index import FOLDER as INDEX
from ...stores.ledger import Ledger
from ...stores.schema import DATA
from ...stores.untrusted import is_key, is_path
from ..deleting import STORE

RECIPE = "recipe.json"
CARD = "README.md"
BESIDE = (CARD, ".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""What a repository of the hub may hold beside a run. Passed over."""

Kind = Literal["about", "data", "record", "dictionary"]

_STEP = STORE.pattern
_HOME = rf"(?P<store>(?P<step>{_STEP})|(?P<features>features-[\w-]+)/{INDEX}/(?P<group>.+?))"
_FORMS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("about", re.compile(r"recipe\.json|tokenizer\.json")),
    ("about", re.compile(r"(?P<step>tokens)/counts/(done/\d{6,}|grown)\.json")),
    ("data", re.compile(rf"{_HOME}/{re.escape(DATA)}/(?P<key>.+)")),
    ("record", re.compile(rf"{_HOME}/done/(?P<unit>\d{{6,12}})\.json")),
    (
        "dictionary",
        re.compile(rf"{TRAINED}/[\w-]+/(cfg\.json|training\.json|metrics\.jsonl|sae_weights\.safetensors)"),
    ),
)


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a run, by its path below the run's folder, with slashes.

    `store` is the folder of the store or index that it belongs to and `key` its place in `data.zarr`; `unit` is whose
    record it is.
    """

    path: str
    kind: Kind
    step: str | None = None
    store: str | None = None
    key: str | None = None
    unit: int | None = None

    @property
    def is_header(self) -> bool:
        """Whether it is the file with which a store is there."""
        return self.key == "zarr.json"


def part_of(path: str) -> Part:
    """What a path is in a run. UnsafePath for one that leads elsewhere, or that no run has."""
    if not _is_safe(path):
        raise UnsafePath(
            f"{path!r:.199} is no name of a file in a run: it is absolute, has '..', '\\', ':', a hidden part or a "
            "character that cannot be seen. Nothing was fetched"
        )
    for kind, form in _FORMS:
        if found := form.fullmatch(path):
            said = found.groupdict()
            if said.get("group") is not None and not is_path(said["group"]):
                continue
            unit = int(said["unit"]) if said.get("unit") else None
            if unit is not None and Ledger.name(unit) != path.rpartition("/")[2]:
                continue
            step = said.get("step") or said.get("features")
            return Part(path, kind, step, said.get("store"), said.get("key"), unit)
    raise UnsafePath(
        f"{path!r:.199} is no file that a run of forebay has, and a repository with a run holds nothing else. Ask its "
        "owner to take it out, or to push the run to a repository of its own"
    )


def parts_of(paths: Iterable[str]) -> list[Part]:
    """The parts of a run among the paths of a repository, in their order. UnsafePath names one that is none of a run
    and is not usual beside one, or two that would fall together on a disk.
    """
    found = [part_of(path) for path in paths if path not in BESIDE]
    seen: dict[str, str] = {}
    for part in found:
        if (other := seen.setdefault(part.path.casefold(), part.path)) != part.path:
            raise UnsafePath(f"{other!r:.199} and {part.path!r:.199} are one file where a disk ignores case")
    for path in seen:
        folders = path.split("/")[:-1]
        for n in range(1, len(folders) + 1):
            if (folder := "/".join(folders[:n])) in seen:
                raise UnsafePath(f"{seen[folder]!r:.199} is a file and, for {seen[path]!r:.199}, a folder as well")
    return found


def _is_safe(path: str) -> bool:
    endings = (".partial", ".tmp", ".", " ")
    return (
        is_key(path)
        and ":" not in path
        and not any(part.startswith((".", " ", "-")) or part.endswith(endings) for part in path.split("/"))
    )
