"""Specs → schemas, fingerprints, units, bytes and time: everything that can be refused is refused here, before any
work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import xarray as xr

from ..stages.encode import Encode
from ..stages.stage import Stage
from ..stages.tokenize import Tokenize
from ..stores.captures import joined_schema, read_captures
from ..stores.documents import Documents
from ..stores.errors import DiskFull, FingerprintMismatch, RecipeError, StoreNotFound
from ..stores.fingerprint import canonical_json, fingerprint, sha256_files, versions
from ..stores.grid import Unit
from ..stores.growth import roll_forward
from ..stores.html import html_table
from ..stores.ledger import Ledger, read_json, write_atomic
from ..stores.object_paths import ObjectPath
from ..stores.places import Place, free_space, place
from ..stores.schema import Schema, holds_store
from ..stores.store import Store, mismatch
from ..stores.tree import read_rows
from ..stores.untrusted import require_no_links
from .captures import addition, check_kept_once, check_trainable
from .foreign import require_same_corpus
from .recipe import Recipe, read_recipe

CountProgress = Callable[[int, int], None]


class Source(Protocol):
    """What a step reads: something with a schema, and rows of it as a labelled block."""

    @property
    def schema(self) -> Schema: ...
    def read(self, span: slice) -> xr.Dataset: ...


@dataclass(frozen=True)
class Step:
    """One step of a plan: a stage with its output fixed.

    `payload` is everything that determines the values, `fingerprint` its hash.
    """

    stage: Stage
    schema: Schema
    source_schema: Schema
    payload: Mapping[str, Any]
    fingerprint: str
    folder: Place

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a full unit, which is what one buffer of it takes in memory."""
        return -(-self.schema.nbytes * min(self.schema.unit_tokens, self.schema.n_token) // self.schema.n_token)

    def todo(self) -> list[Unit]:
        """Units without a record. Looks at the ledger only."""
        return self.schema.grid.left(self.ledger.done())

    def open(self) -> Store:
        """The step's store, made if it is not there. FingerprintMismatch if another recipe made it."""
        return Store.create(self.folder, self.schema, self.fingerprint, self.provenance)

    @property
    def provenance(self) -> dict[str, Any]:
        return {"determines": dict(self.payload), **self.stage.about(), "versions": versions()}

    def check_store(self) -> None:
        """FingerprintMismatch if there is a store that another recipe made."""
        if holds_store(self.folder):
            store = Store.open(self.folder)
            if store.fingerprint != self.fingerprint:
                said = mismatch(store, self.fingerprint, self.provenance)
                raise FingerprintMismatch(f"{said}{addition(self.stage, self.schema, self.payload, store)}")


@dataclass(frozen=True)
class StoreSource:
    """A finished step as the source of the next."""

    store: Store
    schema: Schema

    def read(self, span: slice) -> xr.Dataset:
        return read_rows(self.store, span)


@dataclass(frozen=True)
class CapturesSource:
    """Several finished captures of the same tokens as the source of the next step."""

    stores: tuple[Store, ...]
    schema: Schema

    def read(self, span: slice) -> xr.Dataset:
        return read_captures(self.stores, span)


@dataclass(frozen=True)
class Plan:
    """A recipe with one folder: steps in order, each with its geometry and fingerprint.

    `waiting` are the steps that cannot be planned before the dictionaries they encode with are trained.
    """

    recipe: Recipe
    folder: Place
    device: str
    documents: Documents
    steps: tuple[Step, ...]
    waiting: tuple[Encode, ...] = ()

    def _repr_html_(self) -> str:
        facts = {
            "recipe": self.recipe.name,
            "folder": self.folder,
            "model": self.recipe.model.source,
            "device": self.device,
            "to train first": ", ".join(stage.store for stage in self.waiting) or None,
        }
        rows = [
            (
                step.stage.store,
                f"{step.schema.n_token:,}",
                f"{len(step.schema.grid) - len(step.todo()):,} of {len(step.schema.grid):,}",
                f"{step.schema.nbytes:,}",
                step.fingerprint[:12],
            )
            for step in self.steps
        ]
        return html_table("Plan", facts, ("step", "tokens", "units recorded", "bytes", "fingerprint"), rows)

    def step(self, name: str) -> Step:
        """The step whose store has this name."""
        return next(step for step in self.steps if step.stage.store == name)

    def source(self, step: Step) -> Source:
        """What a step reads: the corpus, or the store of the step before it."""
        if step.stage.source is None:
            return self.documents
        stores = tuple(one.open() for one in steps_before(step.stage, self.steps))
        if len(stores) == 1:
            return StoreSource(stores[0], step.source_schema)
        return CapturesSource(stores, step.source_schema)

    def said(self) -> dict[str, Any]:
        """What recipe.json says of the run: the recipe, complete, with the fingerprint of every step."""
        return {
            "recipe": self.recipe.to_json(),
            "device": self.device,
            "fingerprints": {s.stage.store: s.fingerprint for s in self.steps},
            "versions": versions(),
        }

    def save(self) -> None:
        """Writes recipe.json and tokenizer.json into the run's folder, unless they stand there."""
        said = self.said()
        path = self.folder / "recipe.json"
        if not path.is_file() or {**read_json(path), "versions": said["versions"]} != said:
            write_atomic(path, canonical_json(said).encode())
        if not (self.folder / "tokenizer.json").is_file():
            tokenizer = self._tokenize.tokenizer(self.recipe.model.open())
            write_atomic(self.folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())

    def check_space(self) -> None:
        """DiskFull if what is left to write is more than what is free, before anything is written."""
        left = sum(step.unit_bytes * len(step.todo()) for step in self.steps)
        free = free_space(self.folder)
        if free is not None and left > free:
            raise DiskFull(
                f"{self.folder} needs {left:,} more bytes (before compression), and {free:,} are free. Capture fewer "
                "layers, choose "
                'store_dtype = "bfloat16", or run into a larger disk with --to'
            )

    @property
    def _tokenize(self) -> Tokenize:
        return next(stage for stage in self.recipe.stages if isinstance(stage, Tokenize))


def make_plan(
    recipe: Recipe,
    folder: Place,
    device: str,
    progress: CountProgress = lambda documents, characters: None,
    *,
    continues: Documents | None = None,
) -> Plan:
    """Checks the whole chain and fixes geometry and fingerprints.

    Reads the corpus once, to count its tokens, and keeps the counts. Where it `continues` a shorter one, those of the
    latter are taken, and the stores that were made of it are not refused.

    Raises every refusal there is: of the corpus, the model, the hook names, the geometry, a store made by another
    recipe.
    """
    tokenize = next(stage for stage in recipe.stages if isinstance(stage, Tokenize))
    placed = [replace(stage, run=str(folder)) if isinstance(stage, Encode) else stage for stage in recipe.stages]
    waiting = tuple(stage for stage in placed if isinstance(stage, Encode) and not stage.ready)
    stages = [stage for stage in placed if stage not in waiting]
    for stage in stages:
        stage.check()
    for name, training in recipe.training.items():
        if isinstance(folder, ObjectPath):
            raise RecipeError(
                f"train.{name}: a dictionary is trained into a folder of this machine, and {folder} is none. Run the "
                "recipe there without this table, train from it by forebay.stages.dictionaries.training.train, and "
                f"name the folder that it gives as `dictionary` of [encode.{name}]"
            )
        training.check()
        check_trainable(name, training, stages)
    check_kept_once(stages)
    paths = recipe.corpus.paths()
    folder.mkdir(parents=True, exist_ok=True)
    require_no_links(
        folder, *(folder / stage.store for stage in placed), folder / tokenize.store / "counts", folder / "claims"
    )
    roll_forward(folder)
    hashes = sha256_files(paths, folder / "files.json")
    corpus = {
        "files": {f"{i:06d} {os.path.relpath(path, recipe.corpus.root)}": hashes[path] for i, path in enumerate(paths)},
        "text_key": recipe.corpus.text_key,
        "id_key": recipe.corpus.id_key,
        **tokenize.identity(),
        "parse_special": tokenize.parse_special,
    }
    documents = Documents(recipe.corpus, folder / tokenize.store / "counts", fingerprint(corpus))
    if continues:
        documents.continues(continues)
    documents.count(tokenize.counter(), progress)
    steps: list[Step] = []
    for stage in stages:
        before = steps_before(stage, steps)
        source = joined_schema([step.schema for step in before]) if before else documents.schema
        read = {step.stage.store: step.fingerprint for step in before}
        upstream = corpus if not before else before[0].fingerprint if len(before) == 1 else read
        steps.append(_step(stage, source, upstream, folder, device))
        if continues is None:
            steps[-1].check_store()
    return Plan(recipe, folder, device, documents, tuple(steps), waiting)


def steps_before(stage: Stage, steps: Sequence[Step]) -> list[Step]:
    """The steps whose stores a stage reads: one, but for features of what several captures keep; none: the corpus."""
    held = {step.stage.store: step for step in steps if step.stage.verb == stage.source}
    return [held[name] for name in stage.read_from({name: step.schema for name, step in held.items()})]


def _step(stage: Stage, source: Schema, upstream: str | dict[str, Any], folder: Place, device: str) -> Step:
    schema = stage.schema(source)
    hashes = sha256_files(stage.files(), folder / "files.json")
    payload = {
        "step": stage.verb,
        "version": stage.version,
        "parameters": stage.determining(),
        "files": [[path.name, digest] for path, digest in hashes.items()],
        "identity": stage.identity(),
        "numerics": stage.numerics(device),
        "schema": schema.to_json(),
        "source": upstream,
    }
    payload = json.loads(canonical_json(payload))  # as a store gives it back, so that equal settings compare equal
    return Step(stage, schema, source, payload, fingerprint(payload), folder / stage.store)


def plan(recipe: str | Path | Recipe, folder: str | Place | None = None, *, device: str = "auto") -> Plan:
    """The plan of a recipe in `folder` (by default runs/<recipe's name>): every schema, fingerprint and refusal, and
    nothing computed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    return make_plan(recipe, default_folder(recipe, folder), resolve_device(device))


def load_plan(folder: Place, device: str) -> Plan:
    """The plan of a run that is there, from its recipe.json. StoreNotFound if the folder is no run."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise StoreNotFound(
            f"{folder} is no run: it has no recipe.json. Start one with `forebay run RECIPE --to {folder}`"
        )
    roll_forward(folder)  # a run that was killed while it was made longer has a recipe that is longer, too
    recipe = Recipe.from_json(read_json(path).get("recipe"))
    require_same_corpus(recipe, folder)
    return make_plan(recipe, folder, device)


def default_folder(recipe: Recipe, folder: str | Place | None) -> Place:
    """Where a recipe's run lies if nothing else is said: runs/<name> in the current folder."""
    return place(folder) if folder is not None else Path("runs") / recipe.name


def resolve_device(device: str) -> str:
    """A device by name, `auto` as the best there is: cuda, then mps, then cpu. ModelError if it is not there."""
    from ..stages.models import devices

    return str(devices.resolve_device(device))
