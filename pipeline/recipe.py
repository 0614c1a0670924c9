"""The user's TOML ↔ frozen specs, 1:1: one table a step, whose keys are the fields of its stage."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..stages.capture import Capture
from ..stages.encode import Encode
from ..stages.stage import Stage
from ..stages.tokenize import ModelSource, Tokenize
from ..stages.train import Training
from ..stores.corpus import Corpus
from ..stores.errors import RecipeError, nearest

STAGES: dict[str, type[Stage]] = {stage.verb: stage for stage in (Tokenize, Capture, Encode)}
"""Every step a recipe may have, in the order in which they run."""

TRAIN = "train"
NAMED = (TRAIN, Encode.verb)
"""Tables that hold a table for each name, as in [encode.NAME]."""
TABLES = ("corpus", "model", "tokenize", "capture", *NAMED)
GIVEN = ("model", "name", "run")
"""Fields of steps that no table sets."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to compute: a corpus, a model, the steps, and the dictionaries to train by name. `name` is the name of the
    recipe's file, without its suffix.
    """

    name: str
    corpus: Corpus
    model: ModelSource
    stages: tuple[Stage, ...]
    training: Mapping[str, Training] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The recipe complete, defaults filled in, as JSON values. `from_json` gives back an equal recipe."""
        steps: dict[str, Any] = {}
        for stage in self.stages:
            table = {k: v for k, v in stage.parameters().items() if k not in GIVEN}
            if isinstance(stage, Encode):
                steps.setdefault(stage.verb, {})[stage.name] = table
            else:
                steps[stage.verb] = table
        if self.training:
            steps[TRAIN] = {name: dataclasses.asdict(one) for name, one in self.training.items()}
        value = {
            "name": self.name,
            "corpus": dataclasses.asdict(self.corpus),
            "model": dataclasses.asdict(self.model),
            **steps,
        }
        return json.loads(json.dumps(value))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote, as it stands in a run's recipe.json."""
        tables = {name: table for name, table in value.items() if name in TABLES}
        corpus = {key: entry for key, entry in value["corpus"].items() if key != "root"}
        folder = Path(value["corpus"]["root"])
        return parse({**tables, "corpus": corpus}, name=value["name"], folder=folder, file="recipe.json")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file.

    Paths in it are relative to its folder. RecipeError names file, table and key of what is wrong.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}. docs/recipes.md shows how to write one") from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path} is a folder; a recipe is a TOML file. For a run's folder use `forebay status {path}`"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 at byte {error.start}; TOML files are") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    return parse(tables, name=path.stem, folder=path.resolve().parent, file=str(path))


def parse(tables: Mapping[str, Any], *, name: str, folder: Path, file: str) -> Recipe:
    """Checked specs from a recipe's tables.

    Unknown tables and keys, missing ones and wrong types are refused by name.
    """
    _refuse_unknown(tables, TABLES, f"{file}: [{{}}] is not a table of a recipe")
    for table, content in tables.items():
        if not isinstance(content, Mapping):
            raise RecipeError(f"{file}: {table} is a table: write [{table}] and its keys below")
    for table in ("corpus", "model", "tokenize"):
        if table not in tables:
            raise RecipeError(
                f"{file} has no table [{table}]. A recipe needs [corpus], [model] and [tokenize], [capture] to keep "
                "activations, and [encode.NAME] for features"
            )
    corpus = _build(Corpus, tables["corpus"], "corpus", file, root=str(folder))
    model = _build(ModelSource, _locate(tables["model"], folder, "source"), "model", file)
    training = {name: _build(Training, one, f"train.{name}", file) for name, one in _named(tables, TRAIN, file).items()}
    stages = (
        *(
            _build(STAGES[verb], tables[verb], verb, file, model=dataclasses.asdict(model))
            for verb in STAGES
            if verb in tables and verb not in NAMED
        ),
        *_encodes(tables, model, training, folder, file),
    )
    return Recipe(name=name, corpus=corpus, model=model, stages=stages, training=training)


def _encodes(
    tables: Mapping[str, Any], model: ModelSource, training: Mapping[str, Training], folder: Path, file: str
) -> Iterator[Stage]:
    for name, table in _named(tables, Encode.verb, file).items():
        given = {"model": dataclasses.asdict(model), "name": name, "run": None}
        stage = _build(Encode, _locate(table, folder, "dictionary"), f"encode.{name}", file, **given)
        if stage.dictionary is None and name not in training:
            raise RecipeError(
                f"{file}: [encode.{name}] says no dictionary, and there is no [train.{name}] that would make one."
                f"{nearest(name, training)} Give `dictionary`, or train one of that name"
            )
        if not stage.fused and "capture" not in tables:
            raise RecipeError(
                f"{file}: [encode.{name}] reads activations, and there is no [capture]. Add one, or set fused = true "
                "to encode behind the forward"
            )
        yield stage


def _named(tables: Mapping[str, Any], kind: str, file: str) -> Mapping[str, Any]:
    """The tables [kind.NAME]. RecipeError for names that would not do as a folder's, and for a table without one."""
    found: Mapping[str, Any] = tables.get(kind, {})
    for name, table in found.items():
        if not isinstance(table, Mapping):
            raise RecipeError(f"{file}: [{kind}] holds a table for each name: write [{kind}.NAME] above {name!r}")
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            raise RecipeError(f"{file}: [{kind}.{name}]: a name consists of letters, digits, _ and -")
    return found


def _locate(table: Mapping[str, Any], folder: Path, key: str) -> dict[str, Any]:
    """A source that exists as a path, beside the recipe or else in the current folder, is that path, whole; anything
    else is a hub id or a package's file. `key` may hold several, by name.
    """

    def located(source: Any) -> Any:
        for place in (folder, Path.cwd()):
            if isinstance(source, str) and source and (place / source).exists():
                return str((place / source).resolve())
        return source

    if key not in table:
        return dict(table)
    found = table[key]
    many = {name: located(one) for name, one in found.items()} if isinstance(found, Mapping) else located(found)
    return {**table, key: many}


def _build(cls: type[Any], values: Mapping[str, Any], table: str, file: str, **given: Any) -> Any:
    """A spec from its table; `given` are the fields that no table may set."""
    names = [field.name for field in dataclasses.fields(cls) if field.name not in given]
    _refuse_unknown(values, names, f"{file}: [{table}] has no key {{!r}}")
    try:
        return TypeAdapter(cls).validate_json(json.dumps({**values, **given}), strict=True)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in found['loc']) or table}: {found['msg']}{_given(found)}"
            for found in error.errors()
        ]
        raise RecipeError(f"{file}: [{table}] is not usable:\n" + "\n".join(lines)) from None
    except TypeError as error:
        raise RecipeError(f"{file}: [{table}] holds a value that a recipe cannot ({error})") from error


def _given(found: Mapping[str, Any]) -> str:
    return "" if found["type"] == "missing" else f", not {found['input']!r}"


def _refuse_unknown(values: Mapping[str, Any], known: Collection[str], message: str) -> None:
    for key in values:
        if key not in known:
            raise RecipeError(f"{message.format(key)}.{nearest(key, known)} Known: {', '.join(known)}")
