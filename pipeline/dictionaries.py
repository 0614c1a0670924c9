"""What a run does for dictionaries beside its steps: trains them on its activations, and indexes the features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Event

from ..stages.encode import TRAINED
from ..stores.errors import ForebayError, RecipeError, SchemaError, nearest
from ..stores.store import Store
from ..stores.tree import run_stores
from .exit_codes import COMPLETE, INTERRUPTED
from .plan import default_folder, resolve_device
from .progress import Progress
from .recipe import Recipe
from .stopping import Stopped, stop_on_signals


def index_features(folder: Path, progress: Progress, stop: Event) -> bool:
    """Builds the indexes of the features in a step's folder that are not there. Whether all are: False if `stop` was
    set before the end; what was done then is not lost.
    """
    from ..stores.feature_rows import groups_of

    source = Store.open(folder)
    return all(_is_indexed(source, one) or _built(folder, one, progress, stop) for one in groups_of(source))


def are_indexed(folder: Path) -> bool:
    """Whether all the features in a step's folder have their indexes."""
    from ..stores.feature_rows import groups_of

    source = Store.open(folder)
    return all(_is_indexed(source, one) for one in groups_of(source))


def is_trained(folder: Path, name: str) -> bool:
    """Whether the dictionary of [train.NAME] is in a run's folder, whole."""
    return (folder / TRAINED / name / "cfg.json").exists()


def _is_indexed(source: Store, group: str) -> bool:
    """Whether a group has an index of these very features. Its objects are not read."""
    from ..stores.feature_index import FeatureIndex

    try:
        FeatureIndex.open(source, group)
    except ForebayError:
        return False
    return True


def _built(folder: Path, group: str, progress: Progress, stop: Event) -> bool:
    from ..stores.index_builder import Advance, build_index

    def advance(at: Advance) -> None:
        progress.working(f"index of {at.group}", at.done, at.total, at.phase)
        if stop.is_set():
            raise Stopped

    try:
        build_index(folder, group, progress=advance)
    except Stopped:
        return False
    return True


def index_run(run: Path, name: str | None, progress: Progress) -> int:
    """Builds, or mends, the index of the features in a run called `name` (those of a step, or of one of its
    dictionaries), or of all, and gives the exit code. SchemaError for a name that is not there.
    """
    from ..stores.feature_rows import groups_of

    stores = [store for store in run_stores(run) if store.schema.kind == "features"]
    held = [(store.path.parent, group) for store in stores for group in groups_of(store)]
    chosen = [(folder, group) for folder, group in held if name in (None, group, group.split("/")[0])]
    if not chosen:
        names = [group for _, group in held]
        raise SchemaError(
            f"{run} has no features called {name!r}.{nearest(name or '', names)} It has: {', '.join(names) or 'none'}"
        )
    with stop_on_signals() as stop, progress:
        for folder, group in chosen:
            if not _built(folder, group, progress, stop):
                return INTERRUPTED
    return COMPLETE


def train_in_run(recipe: Recipe, folder: Path, name: str, device: str, progress: Progress, stop: Event) -> bool:
    """Trains the dictionary of [train.NAME] on the activations of the run in `folder`, or goes on with it. Whether it
    is done: False if `stop` was set before the end.
    """
    from ..stages.dictionaries.training import Metrics, train
    from ..stages.dictionaries.training import Stopped as TrainingStopped

    def said(metrics: Metrics) -> None:
        progress.working(
            f"train.{name}",
            metrics.step,
            metrics.n_step,
            f"FVU {metrics.fvu:.3f}, L0 {metrics.l0:.1f}, {metrics.dead:.1%} dead, "
            f"{metrics.tokens_per_second:,.0f} tokens/s",
        )

    try:
        train(recipe.training[name], folder, folder / TRAINED / name, device=device, progress=said, stop=stop.is_set)
    except TrainingStopped:
        return False
    return True


def train_recipe(recipe: Recipe, names: Sequence[str], to: Path | None, device: str, progress: Progress) -> int:
    """Trains the dictionaries of a recipe, or those named, on what its run has captured, and gives the exit code.

    RecipeError for a name that has no table; what `train` raises.
    """
    for name in names:
        if name not in recipe.training:
            raise RecipeError(f"the recipe has no [train.{name}].{nearest(name, recipe.training)}")
    folder, on = default_folder(recipe, to), resolve_device(device)
    with stop_on_signals() as stop, progress:
        for name in names or recipe.training:
            if not train_in_run(recipe, folder, name, on, progress, stop):
                return INTERRUPTED
    return COMPLETE
