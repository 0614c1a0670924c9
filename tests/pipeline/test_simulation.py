"""The simulated schedule: closed forms where there are any, the order of the real ranks, and the tables of its page."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forebay.pipeline.executors.ranks import Ranks
from forebay.stores.grid import Grid

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def scheduling() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("simulations.scheduling")
    sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("how", ["ranks", "queue"])
@pytest.mark.parametrize(("units", "workers"), [(1000, 1), (1000, 8), (1003, 8), (5, 8), (1024, 1024)])
def test_equal_workers_take_as_many_rounds_as_there_are_units_for_each(
    scheduling: Any, how: str, units: int, workers: int
) -> None:
    found = scheduling.simulate(units, scheduling.Cluster(workers=workers, unit_seconds=7.0), how)
    rounds = math.ceil(units / workers)
    assert found.makespan == pytest.approx(rounds * 7.0)
    assert found.ideal == pytest.approx(units * 7.0 / workers)
    assert (found.lost, found.preemptions) == (0, 0)
    # Who has no unit in the last round computes one that another is at; a queue gives it none.
    without = (-units) % workers if how == "ranks" else 0
    assert found.duplicates == without


def test_a_single_worker_of_another_speed_and_its_preemptions_add_up(scheduling: Any) -> None:
    """All that a worker does is work, lost work, and coming back: the makespan is their sum."""
    cluster = scheduling.Cluster(workers=1, unit_seconds=60.0, preemptions=6.0, restart=100.0, spread=0.3, seed=4)
    for how in ("ranks", "queue"):
        found = scheduling.simulate(1000, cluster, how)
        assert found.preemptions > 50
        assert found.duplicates == 0
        assert found.makespan == pytest.approx(found.ideal + found.lost + found.preemptions * cluster.restart)
    # Of a Poisson process, each loses on average a little less than half a unit of its own speed.
    assert 0.35 < found.lost / found.preemptions / (found.ideal / 1000) < 0.6


def test_a_queue_bounds_the_makespan_by_its_last_unit(scheduling: Any) -> None:
    """A list schedule: nobody waits while there is a unit, so that it ends within one unit of the slowest worker."""
    for seed in range(5):
        cluster = scheduling.Cluster(workers=16, unit_seconds=10.0, spread=0.3, seed=seed)
        simulation = scheduling.Simulation(500, cluster, scheduling.Queue(500, 16))
        slowest = 10.0 / min(simulation.speeds)
        found = simulation.run()
        assert found.ideal <= found.makespan <= found.ideal + slowest


def test_every_unit_is_recorded_and_a_seed_gives_the_same_again(scheduling: Any) -> None:
    harsh = {"workers": 13, "spread": 0.4, "stragglers": 0.05, "preemptions": 20.0, "restart": 300.0}
    for how, make in scheduling.SOURCES.items():
        source = make(1000, 13)
        found = scheduling.Simulation(1000, scheduling.Cluster(**harsh, seed=3), source).run()
        assert source.done.all()
        assert found == scheduling.simulate(1000, scheduling.Cluster(**harsh, seed=3), how)
        assert found != scheduling.simulate(1000, scheduling.Cluster(**harsh, seed=4), how)
        assert found.makespan >= found.ideal


@pytest.mark.parametrize("world", [1, 3, 8])
def test_simulated_ranks_take_units_in_the_order_of_the_real_ones(scheduling: Any, world: int, tmp_path: Path) -> None:
    """With the same units recorded at the start, and none recorded since."""
    chance = np.random.default_rng(world)
    done = chance.random(100) < 0.4
    units = [unit for unit in Grid(1000, 10) if not done[unit.index]]
    step: Any = SimpleNamespace(todo=lambda: list(units), ledger=SimpleNamespace(failed_folder=tmp_path))
    for rank in range(world):
        source = scheduling.Ranks(100, world)
        source.done = done
        simulated = list(iter(lambda s=source, r=rank: s.next(r), None))
        assert simulated == [unit.index for unit in Ranks(rank, world)._units(step, {})]
