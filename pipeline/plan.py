"""Specs → schemas, fingerprints, units, bytes and time: everything that can be refused is refused here, before any
work.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import xarray as xr

from ..stages.capture import Capture
from ..stages.encode import Encode
from ..stages.models.points import HookPoint
from ..stages.stage import Stage
from ..stages.tokenize import Tokenize
from ..stages.train import Training
from ..stores.documents import Documents
from ..stores.errors import DiskFull, SchemaError, StoreNotFound, nearest
from ..stores.fingerprint import canonical_json, fingerprint, sha256_files, versions
from ..stores.grid import Unit
from ..stores.ledger import Ledger, read_json, write_atomic
from ..stores.schema import DATA, Schema
from ..stores.store import Store, mismatch
from ..stores.tree import read_rows
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
    folder: Path

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a full unit, which is what one buffer of it takes in memory."""
        return -(-self.schema.nbytes * min(self.schema.unit_tokens, self.schema.n_token) // self.schema.n_token)

    def todo(self) -> list[Unit]:
        """Units without a record. Looks at the ledger only."""
        done = self.ledger.done()
        return [unit for unit in self.schema.grid if unit.index not in done]

    def open(self) -> Store:
        """The step's store, made if it is not there. FingerprintMismatch if another recipe made it."""
        return Store.create(self.folder, self.schema, self.fingerprint, self._provenance)

    @property
    def _provenance(self) -> dict[str, Any]:
        return {"determines": dict(self.payload), **self.stage.about(), "versions": versions()}

    def check_store(self) -> None:
        """FingerprintMismatch if there is a store that another recipe made."""
        if (self.folder / DATA).exists():
            store = Store.open(self.folder)
            if store.fingerprint != self.fingerprint:
                raise mismatch(store, self.fingerprint, self._provenance)


@dataclass(frozen=True)
class StoreSource:
    """A finished step as the source of the next."""

    store: Store
    schema: Schema

    def read(self, span: slice) -> xr.Dataset:
        return read_rows(self.store, span)


@dataclass(frozen=True)
class Plan:
    """A recipe with one folder: steps in order, each with its geometry and fingerprint.

    `waiting` are the steps that cannot be planned before the dictionaries they encode with are trained.
    """

    recipe: Recipe
    folder: Path
    device: str
    documents: Documents
    steps: tuple[Step, ...]
    waiting: tuple[Encode, ...] = ()

    def step(self, name: str) -> Step:
        """The step whose store has this name."""
        return next(step for step in self.steps if step.stage.store == name)

    def source(self, step: Step) -> Source:
        """What a step reads: the corpus, or the store of the step before it."""
        if step.stage.source is None:
            return self.documents
        before = next(s for s in self.steps if s.stage.verb == step.stage.source)
        return StoreSource(before.open(), before.schema)

    def save(self) -> None:
        """Writes recipe.json and tokenizer.json into the run's folder, unless they stand there."""
        said = {
            "recipe": self.recipe.to_json(),
            "device": self.device,
            "fingerprints": {s.stage.store: s.fingerprint for s in self.steps},
        }
        path = self.folder / "recipe.json"
        if not path.exists() or {k: v for k, v in read_json(path).items() if k != "versions"} != said:
            write_atomic(path, canonical_json({**said, "versions": versions()}).encode())
        if not (self.folder / "tokenizer.json").exists():
            tokenizer = self._tokenize.tokenizer(self.recipe.model.open())
            write_atomic(self.folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())

    def check_space(self) -> None:
        """DiskFull if what is left to write is more than what is free, before anything is written."""
        left = sum(step.unit_bytes * len(step.todo()) for step in self.steps)
        free = shutil.disk_usage(self.folder).free
        if left > free:
            raise DiskFull(
                f"{self.folder} needs {left:,} more bytes (before compression), and {free:,} are free. Capture fewer "
                "layers, choose "
                'store_dtype = "bfloat16", or run into a larger disk with --to'
            )

    @property
    def _tokenize(self) -> Tokenize:
        return next(stage for stage in self.recipe.stages if isinstance(stage, Tokenize))


def make_plan(
    recipe: Recipe, folder: Path, device: str, progress: CountProgress = lambda documents, characters: None
) -> Plan:
    """Checks the whole chain and fixes geometry and fingerprints.

    Reads the corpus once, to count its tokens, and keeps the counts.

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
        training.check()
        _check_kept(name, training, stages)
    paths = recipe.corpus.paths()
    folder.mkdir(parents=True, exist_ok=True)
    hashes = sha256_files(paths, folder / "files.json")
    corpus = {
        "files": {f"{i:06d} {os.path.relpath(path, recipe.corpus.root)}": hashes[path] for i, path in enumerate(paths)},
        "text_key": recipe.corpus.text_key,
        "id_key": recipe.corpus.id_key,
        **tokenize.identity(),
        "parse_special": tokenize.parse_special,
    }
    documents = Documents(recipe.corpus, folder / tokenize.store / "counts", fingerprint(corpus))
    documents.count(tokenize.counter(), progress)
    steps: list[Step] = []
    for stage in stages:
        before = next((step for step in steps if step.stage.verb == stage.source), None)
        source = before.schema if before else documents.schema
        upstream = before.fingerprint if before else corpus
        steps.append(_step(stage, source, upstream, folder, device))
        steps[-1].check_store()
    return Plan(recipe, folder, device, documents, tuple(steps), waiting)


def _check_kept(name: str, training: Training, stages: Sequence[Stage]) -> None:
    """SchemaError unless the recipe captures what a dictionary is trained on."""
    capture = next((stage for stage in stages if isinstance(stage, Capture)), None)
    kept = [str(point) for point in capture.captured] if capture else []
    for hook in (training.hook, training.hook_out):
        if hook is not None and str(HookPoint.parse(hook)) not in kept:
            raise SchemaError(
                f"train.{name} needs the activations of {hook}, which the recipe does not capture."
                f"{nearest(hook, kept)} Add it to capture.hooks"
            )


def _step(stage: Stage, source: Schema, upstream: str | dict[str, Any], folder: Path, device: str) -> Step:
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


def plan(recipe: str | Path | Recipe, folder: str | Path | None = None, *, device: str = "auto") -> Plan:
    """The plan of a recipe in `folder` (by default runs/<recipe's name>): every schema, fingerprint and refusal, and
    nothing computed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    return make_plan(recipe, default_folder(recipe, folder), resolve_device(device))


def load_plan(folder: Path, device: str) -> Plan:
    """The plan of a run that is there, from its recipe.json. StoreNotFound if the folder is no run."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise StoreNotFound(
            f"{folder} is no run: it has no recipe.json. Start one with `forebay run RECIPE --to {folder}`"
        )
    return make_plan(Recipe.from_json(read_json(path)["recipe"]), folder, device)


def default_folder(recipe: Recipe, folder: str | Path | None) -> Path:
    """Where a recipe's run lies if nothing else is said: runs/<name> in the current folder."""
    return Path(folder) if folder is not None else Path("runs") / recipe.name


def resolve_device(device: str) -> str:
    """A device by name, `auto` as the best there is: cuda, then mps, then cpu. ModelError if it is not there."""
    from ..stages.models import devices

    return str(devices.resolve_device(device))
