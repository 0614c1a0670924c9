"""A run comes from the hub: headers first, then object after object, each checked, and a unit's record behind them.

So what a killed pull leaves is a run of which some units are not there yet, as a killed run leaves one; and what stands
in it has been checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from ...stores.digests import disagreement, is_entry
from ...stores.errors import (
    FULL,
    CorruptStore,
    DiskFull,
    FingerprintMismatch,
    IncompleteStore,
    SchemaError,
    nearest,
)
from ...stores.fingerprint import canonical_json
from ...stores.html import html_table
from ...stores.ledger import read_json
from ...stores.places import Place, delete_tree, free_space, names, place, sync_folder, write_atomic
from ...stores.schema import DATA, read_header
from ...stores.store import Store
from ...stores.untrusted import require_no_links
from ..audit import MOST_SAID, audit
from ..progress import Progress, Quiet
from .names import RECIPE, Part, parts_of
from .remote import Commit, Repository, no_bars

ASIDE = ".pull"
"""Folder in a run for what is on its way. Readers pass over it."""
PROVENANCE = "pulled.json"
"""File in a run that says where it was pulled from."""
FETCHERS = 8


@dataclass(frozen=True)
class Pulled:
    """What a pull did: `n_file` files of `nbytes` were asked for, `n_fetched` of `fetched_bytes` were not there yet.

    `commit` is the one that was read, whatever branch or tag `revision` names (None: the main branch).
    """

    folder: Path
    repository: str
    revision: str | None
    commit: str
    n_file: int
    nbytes: int
    n_fetched: int
    fetched_bytes: int

    def _repr_html_(self) -> str:
        facts = {
            "folder": self.folder,
            "repository": self.repository,
            "revision": self.revision,
            "commit": self.commit,
            "files": f"{self.n_file:,}, {self.nbytes:,} bytes",
            "fetched": f"{self.n_fetched:,}, {self.fetched_bytes:,} bytes",
        }
        return html_table("Pulled", facts)


def from_hub(
    repository: str,
    folder: str | os.PathLike[str] | Place,
    *,
    revision: str | None = None,
    steps: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Fetches a run that was pushed to the dataset repository `owner/name` of the Hugging Face hub into `folder`, or
    goes on with that. `revision` is a branch, a tag or a commit; `steps` (names of stores, as "tokens") choose a part,
    to which another call may add.

    The folder is new, or holds the same run: then only what is missing or damaged is fetched. Every path is checked
    before anything is written, every object against its record, everything else against the commit. Killed at any time,
    the same call goes on. `pulled.json` then says where the run is from. One pull into a folder at a time.

    UnsafePath for names that no run has, SchemaError for a repository that holds no run and for steps it lacks,
    FingerprintMismatch where the folder holds something else, CorruptStore where bytes are not those that were
    recorded, IncompleteStore where the run there is not whole, DiskFull, and HubError for what the hub refuses.
    """
    where = place(folder)
    if not isinstance(where, Path):
        raise SchemaError(f"{folder} lies in an object store: pull into a folder of this machine, and copy that")
    there, progress = Repository(repository), progress or Quiet()
    with no_bars(), progress:
        commit = there.at(revision)
        parts = _chosen(there.name, parts_of(commit.files), [steps] if isinstance(steps, str) else steps)
        pull = _Pull(there, commit, where, parts, progress)
        try:
            pull.all()
        except OSError as error:
            if error.errno in FULL:
                raise DiskFull(
                    f"no space left for {where}. What is there is kept: free some, and run the same command again"
                ) from error
            raise
    _require_whole(where, {part.step for part in parts if part.kind == "data"}, f"{repository} at {commit.sha[:12]}")
    said = {"repository": repository, "revision": revision, "commit": commit.sha, "endpoint": there.api.endpoint}
    write_atomic(where / PROVENANCE, canonical_json(said).encode())
    delete_tree(where / ASIDE)
    total = sum(commit.files[part.path].nbytes for part in parts)
    return Pulled(where, repository, revision, commit.sha, len(parts), total, len(pull.fetched), pull.fetched_bytes)


def _chosen(name: str, parts: list[Part], steps: Sequence[str] | None) -> list[Part]:
    """The parts that are asked for. SchemaError for a repository without a run, or without a step."""
    there = sorted({part.step for part in parts if part.is_header and part.step is not None})
    if not there or all(part.path != RECIPE for part in parts):
        raise SchemaError(
            f"{name} holds no run of forebay: it has no {RECIPE} or no store. Give a repository that `forebay push` "
            "made, and a revision at which the run is in it"
        )
    for step in steps or ():
        if step not in there:
            raise SchemaError(f"{name} has no step {step!r:.199}.{nearest(step, there)} It has {', '.join(there)}")
    if steps is None:
        return parts
    trained = {step.removeprefix("features-") for step in steps}
    return [part for part in parts if _is_of(part, set(steps), trained)]


def _is_of(part: Part, steps: set[str], trained: set[str]) -> bool:
    """Whether a part is of these steps, of dictionaries of these names, or of the run as a whole."""
    if part.kind == "dictionary":
        return part.path.split("/")[1] in trained
    return part.step is None or part.step in steps


@dataclass
class _Pull:
    """One pull under way. `fetched` are the paths that were put into the run by it."""

    there: Repository
    commit: Commit
    run: Path
    parts: Sequence[Part]
    progress: Progress
    fetched: list[str] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    @property
    def fetched_bytes(self) -> int:
        return sum(self.commit.files[path].nbytes for path in self.fetched)

    def all(self) -> None:
        """Fetches what is missing, in the order in which it may stand."""
        self.check_folder()
        by = {kind: [part for part in self.parts if part.kind == kind] for kind in ("about", "data", "dictionary")}
        headers = [part for part in by["data"] if part.is_header]
        owned = self.objects(headers)
        plain = [part for part in by["data"] if not part.is_header and part.path not in owned]
        small = [*by["about"], *by["dictionary"], *plain, *headers]
        for n, _ in enumerate(self.each(self.bring, small), 1):
            self.progress.working("files", n, len(small), f"from {self.there.name}")
        for part in (*by["about"], *by["dictionary"]):
            self.put(part.path)
        for header in headers:
            self.lay_out(str(header.store), [part for part in (*plain, *headers) if part.store == header.store])
        for header in sorted(headers, key=lambda part: (part.store != part.step, part.path)):
            self.store(str(header.store))

    def check_folder(self) -> None:
        """The folder is new, or holds this run; and it has room. Fetches the recipe, and nothing else."""
        require_no_links(self.run, self.run / ASIDE, *(self.run / part.path for part in self.parts))
        for folder, folders, files in os.walk(self.run / ASIDE):
            require_no_links(self.run, *(Path(folder) / name for name in (*folders, *files)))
        for other in names(self.run / ASIDE):
            if other != self.commit.sha:
                delete_tree(self.run / ASIDE / other)
        self.run.mkdir(parents=True, exist_ok=True)
        recipe = self.run / RECIPE
        if not recipe.is_file() and (others := [name for name in names(self.run) if name != ASIDE]):
            raise FingerprintMismatch(
                f"{self.run} is not empty and holds no run ({min(others)!r:.99} lies in it). Pull into a new folder"
            )
        left = sum(self.commit.files[part.path].nbytes for part in self.parts if not (self.run / part.path).exists())
        if (free := free_space(self.run)) is not None and left > free:
            raise DiskFull(
                f"{self.run} needs {left:,} more bytes, and {free:,} are free. Choose fewer steps, or a larger disk"
            )
        if recipe.is_file() and not self.commit.files[RECIPE].agrees(recipe):
            own, said = _fingerprints(recipe), _fingerprints(self.fetch(RECIPE))
            if not own or any(said.get(step) != fingerprint for step, fingerprint in own.items()):
                raise FingerprintMismatch(
                    f"{self.run} holds another run than {self.there.name} at {self.commit.sha[:12]}, or what that was "
                    "before it grew. Pull into a new folder"
                )

    def objects(self, headers: Iterable[Part]) -> set[str]:
        """Paths of the objects that units own, by the headers, which are fetched aside. A header that stands is of the
        same store, or the pull is refused.
        """
        found: set[str] = set()
        for part in headers:
            standing = self.run / part.path
            if not self.commit.files[part.path].agrees(standing):
                self.fetch(part.path)
                said = read_header((self.aside / part.path).parent)
                if standing.is_file() and read_header(standing.parent).fingerprint != said.fingerprint:
                    raise FingerprintMismatch(
                        f"{standing.parent} holds other values than {self.there.name} at {self.commit.sha[:12]}. Pull "
                        "into a new folder"
                    )
            else:
                said = read_header(standing.parent)
            arrays = tuple(f"{part.store}/{DATA}/{path}/c/" for path in said.schema.arrays)
            found |= {one.path for one in self.parts if one.store == part.store and one.path.startswith(arrays)}
        return found

    def store(self, home: str) -> None:
        """The units of one store: the objects of each, then its record. Its header and labels stand."""
        store = Store.open(self.run / home)
        _ = store.schema_with_labels  # read once, before threads ask for it
        records = [part for part in self.parts if part.kind == "record" and part.store == home]
        for part in records:
            if part.unit is None or part.unit >= len(store.schema.grid):
                raise CorruptStore(
                    f"{self.there.name}: {part.path} is the record of a unit that {home} does not have "
                    f"({len(store.schema.grid):,} units, numbered from 0). Nothing of it was kept"
                )
        self.progress.start(home, store.schema.n_token, 0)
        for part in self.each(lambda part: self.unit(store, home, part), records):
            self.progress.advance(len(store.schema.grid[int(part.unit or 0)]))

    def unit(self, store: Store, home: str, part: Part) -> None:
        """The objects of a unit, and then its record."""
        index = int(part.unit or 0)
        path = self.run / part.path
        stands = self.commit.files[part.path].agrees(path)
        held = path if stands else self.fetch(part.path)
        record = read_json(held)
        faults = store.record_faults(store.schema.grid[index], record)
        if faults:
            raise CorruptStore(f"{self.there.name}: the record {part.path} is not this store's: {faults[0]}")
        for key, entry in sorted(record["objects"].items()):
            self.put_object(f"{home}/{DATA}/{key}", entry)
        if not stands:
            self.put(part.path)

    def put_object(self, path: str, entry: Mapping[str, Any]) -> None:
        """An object by the entry of its record: left where it is the same, fetched and checked where it is not."""
        if not is_entry(entry) or path not in self.commit.files:
            raise CorruptStore(
                f"{self.there.name} lacks {path}, which a record there names. Ask its owner to push again"
            )
        if disagreement(self.run / path, entry) is None:
            return
        if wrong := disagreement(self.fetch(path, checked=False), entry):
            (self.aside / path).unlink()
            raise CorruptStore(
                f"{path} of {self.there.name} at {self.commit.sha[:12]} is not what its record says: {wrong}. Run the "
                "same command again; if it says so again, the run there is damaged"
            )
        self.put(path)

    def bring(self, part: Part) -> None:
        """Fetches a file that no record names, unless it stands as the commit has it."""
        if not self.commit.files[part.path].agrees(self.run / part.path):
            self.fetch(part.path)

    def lay_out(self, home: str, parts: Sequence[Part]) -> None:
        """Puts what is aside of a store's metadata and labels in place: all at once where there is no store yet."""
        data = self.run / home / DATA
        if data.exists():
            for part in parts:
                self.put(part.path)
            return
        data.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.aside / home / DATA, data)
        sync_folder(data.parent)
        self.fetched += [part.path for part in parts]

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def aside(self) -> Path:
        """By commit: what a killed pull of another one left is never taken for this one's."""
        return self.run / ASIDE / self.commit.sha

    def fetch(self, path: str, checked: bool = True) -> Path:
        """Fetches a file aside, durably, and gives it; `checked` against the hub's digest."""
        file = self.aside / path
        listed = self.commit.files[path]
        if not listed.agrees(file):
            file.unlink(missing_ok=True)
            self.there.fetch(self.commit, path, self.aside)
        if checked and not listed.agrees(file):
            file.unlink(missing_ok=True)
            raise CorruptStore(
                f"{path} of {self.there.name} came with other bytes than its commit {self.commit.sha[:12]} lists. Run "
                "the same command again"
            )
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        return file

    def put(self, path: str) -> None:
        """Puts what is aside into the run, durably and at once; nothing if nothing is."""
        target = self.run / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(self.aside / path, target)
        except FileNotFoundError:
            return
        sync_folder(target.parent)
        with self.lock:
            self.fetched.append(path)

    def each(self, work: Callable[[Part], None], parts: Sequence[Part]) -> Iterator[Part]:
        """Does it for all parts, some at once, and gives each when it is done."""
        with ThreadPoolExecutor(FETCHERS, "pull") as pool:
            for part, _ in zip(parts, pool.map(work, parts), strict=True):
                yield part


def _fingerprints(recipe: Path) -> dict[str, Any]:
    said = read_json(recipe).get("fingerprints")
    return said if isinstance(said, dict) else {}


def _require_whole(run: Path, steps: set[str | None], source: str) -> None:
    """IncompleteStore or CorruptStore unless what was asked for is there, and rows in are rows out."""
    found = [one for one in audit(run, partial=True) if one.step in steps]
    if found:
        raise CorruptStore(
            f"{source}: what its records say does not add up:" + "".join(f"\n  {one}" for one in found[:MOST_SAID])
        )
    for step in sorted(filter(None, steps)):
        store = Store.open(run / step)
        if not store.complete:
            raise IncompleteStore(
                f"{source} is not whole: {step} has {len(store.done()):,} of {len(store.schema.grid):,} units there. "
                f"{run} holds those. Pull again when its owner has pushed the rest"
            )
