"""What a run does for dictionaries beside its steps: trains them on its activations, and indexes the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from threading import Event

from ..stages.encode import TRAINED
from ..stages.train import Training
from ..stores.errors import ForebayError, RecipeError, SchemaError, nearest
from ..stores.ledger import read_json
from ..stores.places import Place
from ..stores.store import Store
from ..stores.tree import run_stores
from ..stores.untrusted import require_no_links
from .claims import claimed
from .exit_codes import COMPLETE, INTERRUPTED
from .plan import default_folder, resolve_device
from .progress import Progress
from .recipe import Recipe
from .stopping import Stopped, stop_on_signals


def index_features(folder: Place, progress: Progress, stop: Event, wait: bool = True) -> bool:
    """Builds the indexes of the features in a step's folder that are not there. Whether all are: False if `stop` was
    set before the end; what was done then is not lost. Without `wait` those that another process is building are left
    to it.
    """
    return all(index_group(folder, one, progress, stop, wait) for one in unindexed(folder))


def unindexed(folder: Place) -> list[str]:
    """The groups of the features in a step's folder that have no index."""
    from ..stores.feature_rows import groups_of

    source = Store.open(folder)
    return [one for one in groups_of(source) if not _is_indexed(source, one)]


def are_indexed(folder: Place) -> bool:
    """Whether all the features in a step's folder have their indexes."""
    return not unindexed(folder)


def is_trained(folder: Place, name: str) -> bool:
    """Whether the dictionary of [train.NAME] is in a run's folder, whole."""
    return (folder / TRAINED / name / "cfg.json").exists()


def _trained_before_growth(training: Training, folder: Place, name: str) -> bool:
    """Whether the dictionary was trained, by these settings, on a run to which files were appended since. It stays."""
    path = folder / TRAINED / name / "training.json"
    if not is_trained(folder, name) or not path.exists():
        return False
    said, free = read_json(path), ("log_every", "checkpoint_every")
    before = {one["fingerprint"] for store in run_stores(folder) for one in store.header.grown_from}
    settings = {key: value for key, value in asdict(training).items() if key not in free}
    return said["training"] == settings and not before.isdisjoint(said["source"]["stores"])


def _is_indexed(source: Store, group: str) -> bool:
    """Whether a group has an index of these very features. Its objects are not read."""
    from ..stores.feature_index import FeatureIndex

    try:
        FeatureIndex.open(source, group)
    except ForebayError:
        return False
    return True


def index_group(folder: Place, group: str, progress: Progress, stop: Event, wait: bool = True) -> bool:
    """Builds the index of one group, unless another process has done so meanwhile, or is at it and nothing waits for
    it. False if `stop` was set before the end.
    """
    with claimed(claim_of(folder, f"index-{group}"), stop, progress.said, wait) as asked:
        if asked is None:
            return not stop.is_set()
        return _is_indexed(Store.open(folder), group) or _built(folder, group, progress, asked)


def _built(folder: Place, group: str, progress: Progress, stop: Event) -> bool:
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


def claim_of(folder: Place, work: str) -> Place:
    """Where a process says that it is at a piece of work in a folder."""
    return folder / "claims" / f"{work.replace('/', '-')}.json"


def index_run(run: Place, name: str | None, progress: Progress) -> int:
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
            with claimed(claim_of(folder, f"index-{group}"), stop, progress.said) as asked:
                if asked is None or not _built(folder, group, progress, asked):
                    return INTERRUPTED
    return COMPLETE


def train_in_run(
    recipe: Recipe, folder: Place, name: str, device: str, progress: Progress, stop: Event, wait: bool = True
) -> bool:
    """Trains the dictionary of [train.NAME] on the activations of the run in `folder`, or goes on with it. Whether it
    is done: False if `stop` was set before the end. One process trains it at a time; without `wait` it is left to
    another one that is at it.
    """
    require_no_links(folder, folder / TRAINED / name / ".dictionary", folder / "claims")
    if _trained_before_growth(recipe.training[name], folder, name):
        return True
    if is_trained(folder, name):
        return _trained(recipe, folder, name, device, progress, stop)  # which checks that it is of these settings
    with claimed(claim_of(folder, f"train-{name}"), stop, progress.said, wait) as asked:
        if asked is None:
            return not stop.is_set()
        return _trained(recipe, folder, name, device, progress, asked)


def _trained(recipe: Recipe, folder: Place, name: str, device: str, progress: Progress, stop: Event) -> bool:
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


def train_recipe(recipe: Recipe, names: Sequence[str], to: Place | None, device: str, progress: Progress) -> int:
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
