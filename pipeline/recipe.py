"""The user's TOML ↔ frozen specs, 1:1: one table a step, whose keys are the fields of its stage."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..stages.capture import Capture
from ..stages.stage import Stage
from ..stages.tokenize import ModelSource, Tokenize
from ..stores.corpus import Corpus
from ..stores.errors import RecipeError, nearest

STAGES: dict[str, type[Stage]] = {stage.verb: stage for stage in (Tokenize, Capture)}
"""Every step a recipe may have, in the order in which they run."""

TABLES = ("corpus", "model", *STAGES)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to compute: a corpus, a model and the steps. `name` is the name of the recipe's file, without its suffix."""

    name: str
    corpus: Corpus
    model: ModelSource
    stages: tuple[Stage, ...]

    def to_json(self) -> dict[str, Any]:
        """The recipe complete, defaults filled in, as JSON values. `from_json` gives back an equal recipe."""
        steps = {stage.verb: {k: v for k, v in stage.parameters().items() if k != "model"} for stage in self.stages}
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
                f"{file} has no table [{table}]. A recipe needs [corpus], [model] and [tokenize], and [capture] to "
                "keep activations"
            )
    corpus = _build(Corpus, tables["corpus"], "corpus", file, root=str(folder))
    model = _build(ModelSource, _locate(tables["model"], folder), "model", file)
    stages = tuple(
        _build(stage, tables[verb], verb, file, model=dataclasses.asdict(model))
        for verb, stage in STAGES.items()
        if verb in tables
    )
    return Recipe(name=name, corpus=corpus, model=model, stages=stages)


def _locate(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A model's source that exists as a path, beside the recipe or else in the current folder, is that path, whole;
    anything else is a hub id or a package's file.
    """
    source = table.get("source")
    for place in (folder, Path.cwd()):
        if isinstance(source, str) and source and (place / source).exists():
            return {**table, "source": str((place / source).resolve())}
    return dict(table)


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
