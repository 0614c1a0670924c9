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
from ..stores.untrusted import is_name

TRAIN = "train"
MOST_RECIPE_BYTES = 2**24
MOST_DEPTH = 8
MOST_NUMBER = 2**53
MOST_THREADS = 4096
NAMED = (TRAIN, Encode.verb)
"""Tables that hold a table for each name, as in [encode.NAME]. [capture] may have keys of its own beside them."""
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
            named = stage.name if isinstance(stage, Encode | Capture) else None
            if named is not None:
                steps.setdefault(stage.verb, {})[named] = table
            else:
                steps.setdefault(stage.verb, {}).update(table)
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
    def from_json(cls, value: Any) -> Recipe:
        """The recipe that `to_json` wrote, as it stands in a run's recipe.json. RecipeError for anything else."""
        said = value.get("corpus") if isinstance(value, Mapping) else None
        if not isinstance(said, Mapping) or not all(isinstance(n, str) for n in (said.get("root"), value.get("name"))):
            raise RecipeError(
                "recipe.json holds no recipe as `forebay run` writes it. A run that was imported has none, and nothing "
                "of it can be computed again, or from its model or corpus; else it is damaged"
            )
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
        if path.is_file() and path.stat().st_size > MOST_RECIPE_BYTES:
            raise RecipeError(f"{path} is larger than {MOST_RECIPE_BYTES:,} bytes, as no recipe is")
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}. docs/recipes.md shows how to write one") from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path} is a folder; a recipe is a TOML file. For a run's folder use `forebay status {path}`"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 at byte {error.start}; TOML files are") from error
    except (ValueError, RecursionError) as error:  # also of numbers with too many digits, of tables too deep
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    return parse(tables, name=path.stem, folder=path.resolve().parent, file=str(path))


def parse(tables: Mapping[str, Any], *, name: str, folder: Path, file: str) -> Recipe:
    """Checked specs from a recipe's tables.

    Unknown tables and keys, missing ones and wrong types are refused by name.
    """
    for fault in _faults(tables, 0):
        raise RecipeError(f"{file} {fault}")
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
        _build(Tokenize, tables[Tokenize.verb], Tokenize.verb, file, model=dataclasses.asdict(model)),
        *_captures(tables, model, file),
        *_encodes(tables, model, training, folder, file),
    )
    return Recipe(name=name, corpus=corpus, model=model, stages=stages, training=training)


def _captures(tables: Mapping[str, Any], model: ModelSource, file: str) -> Iterator[Stage]:
    """The step of [capture], unless it holds nothing but named tables, and one for each [capture.NAME]."""
    verb, given = Capture.verb, {"model": dataclasses.asdict(model)}
    table: Mapping[str, Any] = tables.get(verb, {})
    fields = [field.name for field in dataclasses.fields(Capture)]
    own = {key: value for key, value in table.items() if key in fields or not isinstance(value, Mapping)}
    if own or (verb in tables and not table):
        yield _build(Capture, own, verb, file, **given, name=None)
    for name, one in _named({verb: {k: v for k, v in table.items() if k not in own}}, verb, file).items():
        yield _build(Capture, one, f"{verb}.{name}", file, **given, name=name)


def _encodes(
    tables: Mapping[str, Any], model: ModelSource, training: Mapping[str, Training], folder: Path, file: str
) -> Iterator[Stage]:
    for name, table in _named(tables, Encode.verb, file).items():
        given = {"model": dataclasses.asdict(model), "name": name, "run": None}
        many = table.get("dictionary")
        if wrong := [key for key in many if not is_name(key)] if isinstance(many, Mapping) else []:
            raise RecipeError(
                f"{file}: [encode.{name}] calls a dictionary {wrong[0]!r:.99}, which cannot be the name of a group: "
                "use letters, digits, _ and -"
            )
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
        if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", name):
            raise RecipeError(
                f"{file}: [{kind}.{name}]: a name consists of letters, digits, _ and -, at most a hundred"
            )
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


def _faults(value: Any, depth: int) -> Iterator[str]:
    """What no recipe holds, whoever wrote it: tables in tables without end, numbers that no array could have."""
    if depth > MOST_DEPTH:
        yield f"has tables or arrays more than {MOST_DEPTH} deep"
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if key == "threads" and isinstance(one, int) and one > MOST_THREADS:
                yield f"asks for {one} threads; at most {MOST_THREADS:,} are started"
            yield from _faults(key, depth + 1)
            yield from _faults(one, depth + 1)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _faults(one, depth + 1)
    elif isinstance(value, int) and abs(value) > MOST_NUMBER:
        yield f"holds the number {str(value)[:40]}; none is beyond {MOST_NUMBER:,}"
    elif isinstance(value, str) and "\0" in value:
        yield f"holds the text {value[:40]!r} with a null character"


def _given(found: Mapping[str, Any]) -> str:
    return "" if found["type"] == "missing" else f", not {found['input']!r}"


def _refuse_unknown(values: Mapping[str, Any], known: Collection[str], message: str) -> None:
    for key in values:
        if key not in known:
            raise RecipeError(f"{message.format(key)}.{nearest(key, known)} Known: {', '.join(known)}")
