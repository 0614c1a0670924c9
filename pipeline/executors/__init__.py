"""Who computes the units of a step: this process, one rank of several, or the workers of a Dask cluster."""

from ...stores.errors import RecipeError
from .dask_workers import DaskWorkers
from .executor import Executor
from .ranks import Ranks, rank_of
from .this_process import ThisProcess

__all__ = ["DaskWorkers", "Executor", "Ranks", "ThisProcess", "executor_for"]


def executor_for(*, dask: str | None = None, rank: str | int | None = None, world: int | None = None) -> Executor:
    """The executor that the options `--dask`, `--rank` and `--world` ask for; this process without any.

    RecipeError for options that do not go together.
    """
    if dask is not None and (rank is not None or world is not None):
        raise RecipeError("--dask and --rank are two ways to divide a run: give one of them")
    if dask is not None:
        return DaskWorkers(dask)
    if rank is not None:
        return rank_of(rank, world)
    if world is not None:
        raise RecipeError(f"--world {world} needs --rank, the number of this process, or --rank auto")
    return ThisProcess()
