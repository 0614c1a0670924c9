"""What the Tab key offers: names of a run's steps, dictionaries and hook points, from listings of its folder.

Everything here must be quick and must not fail: it lists folders of this machine, opens nothing but a recipe, and
offers nothing where something is not as it should be.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import click

Offer = Callable[[click.Context, click.Parameter, str], list[str]]
_NAME = re.compile(r"\w[\w.-]*")
_DATA, _FEATURES, _INDEX, _TRAINED = "data.zarr", "features-", "index", "dictionaries"


def _offer(choices: Callable[[click.Context], Iterable[str]]) -> Offer:
    """Offers those of the choices that go on as what is typed."""

    def offer(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [choice for choice in choices(ctx) if choice.startswith(incomplete)]

    return offer


def _given(ctx: click.Context, name: str) -> list[Path]:
    """The folders or files of this machine that are typed already for an argument; none for an address."""
    found = ctx.params.get(name)
    typed = found if isinstance(found, tuple) else (found,)
    if not any(typed) or not isinstance(typed[0], Path):
        # Behind an option whose value is being typed, click has parsed no argument yet and left the words in order.
        arguments = [param for param in ctx.command.params if isinstance(param, click.Argument)]
        at = next(i for i, param in enumerate(arguments) if param.name == name)
        words = ctx.args[at:] if arguments[at].nargs < 0 else ctx.args[at : at + 1]
        typed = tuple(Path(word) for word in words if "://" not in word)
    return [one for one in typed if isinstance(one, Path)]


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder; none where there is none."""
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []
    return [name for name in found if _NAME.fullmatch(name)]


def _steps(run: Path) -> list[str]:
    return [name for name in _folders(run) if (run / name / _DATA).is_dir()]


def _kinds(ctx: click.Context) -> list[str]:
    """Kinds of hook points that a run has activations of."""
    steps = [run / step for run in _given(ctx, "run") for step in _steps(run)]
    data = [step / _DATA for step in steps if step.name.partition("-")[0] == "activations"]
    return list(dict.fromkeys(kind for one in data for kind in _folders(one) if (one / kind / "value").is_dir()))


def _named(kinds: Iterable[str]) -> list[str]:
    """Kinds as patterns over all layers."""
    from ...stages.models.points import BLOCK

    return [f"blocks.*.{kind}" if kind in BLOCK else kind for kind in kinds]


def _known(ctx: click.Context) -> list[str]:
    from ...stages.models.points import AFTER, BEFORE, BLOCK

    return _named((*BEFORE, *BLOCK, *AFTER))


def _dictionaries(ctx: click.Context) -> list[str]:
    """Names of the features of a run: those of each step's groups."""
    steps = [run / step for run in _given(ctx, "run") for step in _steps(run) if step.startswith(_FEATURES)]
    return list(dict.fromkeys(name for step in steps for name in _groups(step / _DATA)))


def _groups(data: Path) -> list[str]:
    """The groups of a store of features: folders that hold a `feature`, one or two levels deep."""
    outer = _folders(data)
    inner = [f"{name}/{part}" for name in outer for part in _folders(data / name)]
    return [name for name in (*outer, *inner) if (data / name / "feature").is_dir()]


def _parts(ctx: click.Context) -> list[str]:
    """What `forebay delete` takes."""
    found: list[str] = []
    for run in _given(ctx, "run"):
        features = [step for step in _steps(run) if step.startswith(_FEATURES)]
        indexed = [step.removeprefix(_FEATURES) for step in features if (run / step / _INDEX).is_dir()]
        found += [*_steps(run), *(f"index-{name}" for name in indexed)]
        found += [f"dictionary-{name}" for name in _folders(run / _TRAINED)]
    return found


def _trained(ctx: click.Context) -> list[str]:
    """The tables [train.NAME] of a recipe."""
    found: list[str] = []
    for recipe in _given(ctx, "recipe"):
        try:
            tables = tomllib.loads(recipe.read_text(encoding="utf-8")).get("train")
        except (OSError, ValueError):
            continue
        found += [name for name in tables if _NAME.fullmatch(name)] if isinstance(tables, dict) else []
    return found


def _step_list(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Steps, the last one of a list with commas."""
    several = any(param.name == "runs" for param in ctx.command.params)
    before, comma, last = incomplete.rpartition(",")
    steps = dict.fromkeys(step for run in _given(ctx, "runs" if several else "run") for step in _steps(run))
    return [f"{before}{comma}{step}" for step in steps if step.startswith(last) and step not in before.split(",")]


kinds = _offer(_kinds)
"""Kinds of hook points of a run: hook_resid_post."""
hooks = _offer(lambda ctx: _named(_kinds(ctx)))
"""Hook points of a run, over all layers: blocks.*.hook_resid_post."""
known_hooks = _offer(_known)
"""Hook points that forebay knows, over all layers."""
dictionaries = _offer(_dictionaries)
"""Names of the features of a run."""
parts = _offer(_parts)
"""Parts of a run that can be deleted."""
trained = _offer(_trained)
"""Names of the dictionaries that a recipe trains."""
devices = _offer(lambda ctx: ("auto", "cpu", "cuda", "mps"))
"""Devices by their general names."""
step_list: Offer = _step_list
"""Steps of a run, or of several, as a list with commas."""
