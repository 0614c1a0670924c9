"""Which page of the reference a public name is on, and which names beside those of the front door are public."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import forebay


@dataclass(frozen=True)
class Theme:
    """One page. `homes` are the modules whose names of the front door are on it: the longest that fits decides.

    `given` are what these names give, take or raise, by their full names without `forebay.`.
    """

    page: str
    title: str
    homes: tuple[str, ...]
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Public:
    """A public thing under the name by which users import it."""

    name: str
    value: object


THEMES = (
    Theme(
        "models",
        "Models and hooks",
        ("stages.models",),
        (
            "stages.models.errors.HookError",
            "stages.models.errors.ModelError",
            "stages.models.errors.UnverifiedModelWarning",
            "stages.models.forward.Forward",
            "stages.models.generate.Continuation",
            "stages.models.memory.ForwardMemory",
            "stages.models.memory.release_freed_memory",
            "stages.models.model.Model",
            "stages.models.model_points.ModelPoints",
            "stages.models.offsets.EncodingWithOffsets",
            "stages.models.offsets.convert_positions",
            "stages.models.rwkv.states.RecurrentStates",
            "stages.models.spec.ModelSpec",
            "stages.models.text.ModelTokenizer",
            "stages.models.unembedding.Unembedding",
            "stages.models.views.WeightViews",
        ),
    ),
    Theme(
        "interventions",
        "Interventions",
        (
            "stages.dictionaries.interventions",
            "stages.models.edges",
            "stages.models.interventions",
            "stages.models.recurrence",
            "stages.models.state_taps",
        ),
    ),
    Theme(
        "dictionaries",
        "Dictionaries",
        ("stages.dictionaries",),
        (
            "stages.dictionaries.activation.Activation",
            "stages.dictionaries.activation.Sparse",
            "stages.dictionaries.dictionary.Encoder",
            "stages.dictionaries.dictionary.Provenance",
            "stages.dictionaries.errors.DictionaryError",
        ),
    ),
    Theme("analyses", "Analyses", ("stages.algzoo", "stages.analyze")),
    Theme(
        "runs",
        "Stores and runs",
        ("pipeline", "stores"),
        (
            "pipeline.executors.dask_workers.DaskWorkers",
            "pipeline.executors.executor.StepOutcome",
            "pipeline.executors.ranks.Ranks",
            "pipeline.hub.pull.Pulled",
            "pipeline.hub.push.Pushed",
            "pipeline.plan.Plan",
            "pipeline.recipe.Recipe",
            "pipeline.run.Outcome",
            "stages.accessors.BatchesAccessor",
            "stages.accessors.FeaturesAccessor",
            "stages.accessors.StrTokensAccessor",
            "stages.token_text.TokenText",
            "stores.batches.Batches",
            "stores.deprecation.ForebayDeprecationWarning",
            "stores.errors.CorpusError",
            "stores.errors.CorruptStore",
            "stores.errors.DiskFull",
            "stores.errors.FingerprintMismatch",
            "stores.errors.ForebayError",
            "stores.errors.HubError",
            "stores.errors.IncompleteStore",
            "stores.errors.RecipeError",
            "stores.errors.SchemaError",
            "stores.errors.StorageError",
            "stores.errors.StoreNotFound",
            "stores.errors.UnsafePath",
            "stores.features.Features",
        ),
    ),
    Theme("plotting", "Plotting", ("stages.plots",)),
)


def public_names(theme: Theme) -> Iterator[Public]:
    """What is on a page: names of the front door first, then what they give; the functions of a module one by one."""
    for name in sorted(forebay.__all__, key=str.lower):
        if theme_of(name) is not theme:
            continue
        value = getattr(forebay, name)
        if name not in forebay._MODULES:
            yield Public(f"forebay.{name}", value)
            continue
        for one in value.__all__:
            yield Public(f"forebay.{name}.{one}", getattr(value, one))
    for full in theme.given:
        module, _, name = full.rpartition(".")
        yield Public(f"forebay.{full}", getattr(import_module(f"forebay.{module}"), name))


def theme_of(name: str) -> Theme:
    """The page of a name of the front door. ValueError for one whose home is on none."""
    home = {**forebay._HOMES, **forebay._MODULES}[name].removeprefix("forebay.")
    fitting = [
        (len(own), theme) for theme in THEMES for own in theme.homes if home == own or home.startswith(f"{own}.")
    ]
    if not fitting:
        raise ValueError(f"forebay.{name} of {home} is on no page of the reference: add its home to THEMES")
    return max(fitting, key=lambda one: one[0])[1]
