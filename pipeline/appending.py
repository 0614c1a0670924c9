"""More corpus files for a run that is there: what is computed stays, and only what is new is computed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..stages.encode import TRAINED
from ..stages.tokenize import Tokenize
from ..stores.corpus import Corpus
from ..stores.documents import Documents
from ..stores.errors import CorpusError, FingerprintMismatch, SchemaError, StoreNotFound
from ..stores.fingerprint import canonical_json, differences, fingerprint, sha256_files
from ..stores.growth import check_geometry, commit_growth, roll_forward, stage_growth, steady_tokens
from ..stores.ledger import read_json
from ..stores.places import Place, place
from ..stores.schema import DATA, Schema
from ..stores.store import Store
from ..stores.tree import run_stores
from .executors.units import settle_threads
from .foreign import require_same_corpus
from .plan import CountProgress, Plan, Step, make_plan, resolve_device, steps_before
from .progress import Progress, Quiet
from .recipe import Recipe
from .run import Outcome, is_complete, run
from .stopping import Stopped, stop_on_signals


def append(
    folder: str | Place,
    files: Iterable[str | Path] = (),
    *,
    device: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Puts corpus files behind those of the run in `folder`, computes what is new, and says what was done.

    The run grows where it lies, to what its recipe would have made of all files at once, bit for bit. Units that are
    whole, and that no sequence touches that becomes longer, keep what they hold; the others are computed again. The
    device is the run's own unless another of its kind is given. Trained dictionaries stay as they are; indexes are
    built anew. Killed at any instant, it goes on when it is called again, with the same files or with none.

    Everything that can be refused is refused before anything is touched: CorpusError for files that the run has, and if
    one of its own has changed or is gone; FingerprintMismatch for another torch or kind of device, other weights;
    SchemaError where what is stored would have to be cut otherwise. What `run` raises.
    """
    where, progress = local(folder), progress or Quiet()
    roll_forward(where)
    recipe, its_device = _recipe_of(where)
    on = resolve_device(device or its_device)
    known = KnownFiles.of(where, recipe)
    fresh = known.fresh(files)
    if not fresh:
        require_same_corpus(recipe, where)
    if not fresh and list(files):
        _refuse_complete(recipe, where, on, files)
    if fresh:
        with stop_on_signals() as stop, progress:

            def counted(documents: int, characters: int) -> None:
                progress.counted(documents, characters)
                if stop.is_set():
                    raise Stopped

            try:
                recipe = grow(known, fresh, on, counted)
            except Stopped:
                return Outcome(where, (), True)
    return run(recipe, where, device=on, progress=progress)


def local(folder: str | Place) -> Path:
    """A run's folder on this machine. SchemaError for one in an object store, where readers would meet metadata of
    which a part is new.
    """
    where = place(folder)
    if not isinstance(where, Path):
        raise SchemaError(
            f"{where} lies in an object store, where a run cannot grow. Run the new files into a folder of their own "
            "and put both together with `forebay concat`, or copy the run to this machine and append there"
        )
    return where


def _recipe_of(folder: Path) -> tuple[Recipe, str]:
    """The recipe of a run, and the device on which it was made."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise StoreNotFound(f"{folder} is no run: it has no recipe.json. Start one with `forebay run RECIPE`")
    said = read_json(path)
    return Recipe.from_json(said.get("recipe")), said["device"]


def _refuse_complete(recipe: Recipe, folder: Path, device: str, files: Iterable[str | Path]) -> None:
    """Files that are the run's already are no error as long as it is not complete: the same call goes on with it."""
    if is_complete(make_plan(recipe, folder, device)):
        raise CorpusError(f"{folder} has {', '.join(map(str, files))} already, and is complete: nothing is to be added")


@dataclass(frozen=True)
class KnownFiles:
    """The corpus of a run as its tokens say: names below the recipe's root, in order, with their sha256."""

    folder: Path
    recipe: Recipe
    tokens: Store
    names: tuple[str, ...]
    hashes: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, recipe: Recipe) -> KnownFiles:
        """StoreNotFound if the run has no tokens yet."""
        store = next(stage.store for stage in recipe.stages if isinstance(stage, Tokenize))
        if not (folder / store / DATA).exists():
            raise StoreNotFound(f"{folder} has no tokens yet to append to: finish it first with `forebay run`")
        tokens = Store.open(folder / store)
        source = tokens.header.provenance["determines"]["source"]
        if "files" not in source:
            raise SchemaError(
                f"{folder} was written from rows of other runs, not of a corpus: append to these, or run the files "
                "into a folder of their own and put all together with `forebay concat`"
            )
        files: Mapping[str, str] = source["files"]
        keys = sorted(files)
        return cls(folder, recipe, tokens, tuple(key[7:] for key in keys), tuple(files[key] for key in keys))

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(Path(os.path.abspath(Path(self.recipe.corpus.root, name))) for name in self.names)

    @property
    def documents(self) -> Documents:
        """The documents as they were counted."""
        source = self.tokens.header.provenance["determines"]["source"]
        return Documents(self.recipe.corpus, self.tokens.path.parent / "counts", fingerprint(source))

    def fresh(self, files: Iterable[str | Path]) -> tuple[Path, ...]:
        """The files that are to be added, whole paths; none if all of them are the run's already.

        A path is taken from the current folder, or else from the corpus' own. CorpusError for what is no file, for a
        file twice, and for some that are the run's among others that are not.
        """
        found: dict[Path, None] = {}
        for file in files:
            places = [Path(os.path.abspath(place / file)) for place in (Path.cwd(), Path(self.recipe.corpus.root))]
            path = next((place for place in places if place.is_file()), None)
            if path is None:
                raise CorpusError(f"there is no file {file}: neither {places[0]} nor {places[1]}")
            if path in found:
                raise CorpusError(f"{file} is named twice; name each file once")
            found[path] = None
        held = [path for path in found if path in self.paths]
        if held and len(held) < len(found):
            raise CorpusError(f"{self.folder} has {held[0]} already: name only files that it does not have")
        return () if held else tuple(found)

    def require_unchanged(self) -> None:
        """CorpusError if a file of the run is gone or holds other bytes than those that were read."""
        for path in self.paths:
            if not path.is_file():
                raise CorpusError(f"{path}, of which {self.folder} was made, is gone. Put it back to add files to it")
        now = sha256_files(self.paths, self.folder / "files.json")
        for path, before in zip(self.paths, self.hashes, strict=True):
            if now[path] != before:
                raise CorpusError(
                    f"{path} has changed since {self.folder} was made of it: sha256 {now[path][:12]}, not "
                    f"{before[:12]}. Put it back as it was, or run all files into another folder"
                )

    def corpus_with(self, fresh: Sequence[Path]) -> Corpus:
        """The corpus with files behind it. Globs that by now match other files are written out."""
        corpus = self.recipe.corpus
        root = os.path.abspath(corpus.root)
        added = [str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in fresh]
        as_said = tuple(map(Path, map(os.path.abspath, corpus.paths()))) == self.paths
        return replace(corpus, files=(*(corpus.files if as_said else self.names), *added))


def grow(known: KnownFiles, fresh: Sequence[Path], device: str, progress: CountProgress) -> Recipe:
    """Makes the stores of a run long enough for more files, and gives the recipe with these. Computes nothing."""
    known.require_unchanged()
    settle_threads(known.recipe.stages, known.folder, None)
    folder, stores = known.folder, {store.name: store for store in run_stores(known.folder)}
    recipe = replace(known.recipe, corpus=known.corpus_with(fresh))
    plan = make_plan(recipe, folder, device, progress, continues=known.documents)
    pinned = [_pinned(plan, stage.store, stores) for stage in recipe.stages]
    if any(pinned):
        # By default a unit follows from the longest sequence. The units that are there decide.
        stages = [replace(stage, **more) for stage, more in zip(recipe.stages, pinned, strict=True)]  # type: ignore[type-var]
        recipe = replace(recipe, stages=tuple(stages))
        plan = make_plan(recipe, folder, device, progress, continues=known.documents)
    _check_run(plan, stores)
    kept = units_kept(plan, known.tokens.schema_with_labels)
    grown = [step for step in plan.steps if step.stage.store in stores]
    for step in grown:
        _check_step(step, stores[step.stage.store], kept[step.stage.store])
    plan.check_space()
    entries = [
        stage_growth(stores[name], step.schema, step.fingerprint, step.provenance, kept[name])
        for step in grown
        for name in [step.stage.store]
    ]
    commit_growth(folder, entries, {"recipe.json": canonical_json(plan.said())})
    return recipe


def units_kept(plan: Plan, before: Schema) -> dict[str, int]:
    """How many units of each step stay as they are, by the names of the stores, when the corpus of `before` (a schema
    with its labels) becomes that of the plan.

    A unit does if it is whole, if no sequence that becomes longer touches it, and if what it reads is unchanged: tokens
    are the same whoever computes them, activations may differ in their last bits where they are batched otherwise.
    """
    steady = steady_tokens(before, plan.steps[0].schema)
    kept: dict[str, int] = {}
    for step in plan.steps:
        sources = steps_before(step.stage, plan.steps)
        limits = [before.n_token if not sources else steady]
        limits += [kept[s.stage.store] * s.schema.unit_tokens for s in sources if s.stage.source is not None]
        kept[step.stage.store] = min(limits) // step.schema.unit_tokens
    return kept


def _pinned(plan: Plan, name: str, stores: Mapping[str, Store]) -> dict[str, int]:
    """The step's `unit_tokens` as its store has them, if they would be others."""
    planned = next((step.schema.unit_tokens for step in plan.steps if step.stage.store == name), None)
    held = stores[name].schema.unit_tokens if name in stores else planned
    return {"unit_tokens": held} if planned is not None and held is not None and held != planned else {}


def _check_run(plan: Plan, stores: Mapping[str, Store]) -> None:
    """SchemaError for stores that would stay behind, and for a dictionary that is half trained."""
    planned = [step.stage.store for step in plan.steps]
    for name in stores:
        if name not in planned:
            raise SchemaError(
                f"{stores[name].path.parent} is no step of the run's recipe, which has {', '.join(planned)}: it would "
                "stay shorter than the others. Move it away, or delete it"
            )
    for name in plan.recipe.training:
        folder = plan.folder / TRAINED / name
        if folder.exists() and not (folder / "cfg.json").exists():
            raise SchemaError(
                f"train.{name} has begun and is not done: other tokens would change what it learns. Finish it first "
                f"with `forebay run`, or delete {folder} to train on all files"
            )


def _check_step(step: Step, store: Store, n_unit: int) -> None:
    """Refuses a step whose store was made by other settings, or is cut otherwise, by the name of what differs."""
    lines = differences(_settings(step.payload), _settings(store.header.provenance["determines"]))
    if lines:
        raise FingerprintMismatch(
            f"{store.path.parent} was made otherwise than these files would be:"
            + "".join(f"\n  {line}" for line in lines[:12])
            + "\nA run grows only by what made it: use the same versions, device and files, or run into another folder"
        )
    check_geometry(step.stage.store, store.schema, step.schema, n_unit)


def _settings(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the values of a step, but for how long its arrays are and which corpus they are of. The schema
    says `unit_tokens`, whether the recipe does or not.
    """
    source, left_out = payload["source"], {"schema": ("n_token", "arrays"), "parameters": ("unit_tokens",)}
    held = {name: value for name, value in payload.items() if name != "source"}
    for name, keys in left_out.items():
        held[name] = {key: value for key, value in payload[name].items() if key not in keys}
    if isinstance(source, Mapping) and "files" in source:
        held["source"] = {key: value for key, value in source.items() if key != "files"}
    return held
