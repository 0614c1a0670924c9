"""On random checkpoints of RWKV-6 and RWKV-7, logits and states are those that the authors' own package gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.rwkv.states import LayerState, RecurrentStates

from . import rwkv_naive
from .rwkv_models import Theirs, random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND, WORST_TOKEN = 3e-5, 1e-4
"""Relative errors of a tensor, and of one token's. The package itself is up to 1e-5 away from the equations here."""
VERSIONS = pytest.mark.parametrize("version", [6, 7], ids=["RWKV-6", "RWKV-7"])

SHAPES: Mapping[str, Mapping[str, int]] = {
    "heads of 12": {},
    "heads of 8": {"d_model": 32, "n_heads": 4, "d_head": 8},
    "heads of 32": {"d_model": 64, "n_heads": 2, "d_head": 32, "d_mlp": 96},
    "heads of 64": {"d_model": 128, "n_heads": 2, "d_head": 64, "n_layers": 2},
    "heads of 7": {"d_model": 35, "n_heads": 5, "d_head": 7},
    "one head": {"d_model": 20, "n_heads": 1, "d_head": 20},
    "one layer": {"n_layers": 1},
    "six layers": {"n_layers": 6},
}
"""What differs from `rwkv_models.SIZES`. The package wants as many channels in all heads as in the stream."""
LENGTHS = (1, 2, 31, 32, 33, 100)
"""On both sides of where one form of the recurrence ends and another begins, and of its chunks' ends."""
ALIKE = ("heads of 8", "heads of 32", "heads of 64", "one layer", "six layers")
"""The shapes that say least beside the others."""
EVERY_LENGTH = ("heads of 12", "heads of 64")
"""The shapes that are read at every length. The package takes its time, and the ends of chunks are the same in all."""


@dataclass(frozen=True)
class Pair:
    tensors: Mapping[str, Tensor]
    theirs: Theirs
    ours: Model


Pairs: TypeAlias = Callable[[int, str], Pair]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The same random checkpoint in both implementations, by version and name of its shape."""

    @functools.cache
    def make(version: int, shape: str) -> Pair:
        tensors = random_tensors(version, seed=version, **SHAPES[shape])
        path = tmp_path_factory.mktemp("model") / "model.pth"
        torch.save(tensors, path)
        return Pair(tensors, Theirs(path, version), load_model(path, device="cpu"))

    return make


def some_ids(n: int, seed: int = 0) -> list[int]:
    drawn: list[int] = torch.randint(70, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def check_states(pair: Pair, ours: RecurrentStates | None, expected: list[Tensor], bound: float = BOUND) -> None:
    """Matrices, and what entered time mixing and channel mixing."""
    assert ours is not None
    assert len(ours.layers) * 3 == len(expected)
    for layer, state in enumerate(ours.layers):
        assert error(state.wkv[0], pair.theirs.matrices(expected, layer)) <= bound, layer
        assert error(state.time_shift[0], expected[3 * layer]) <= bound, layer
        assert error(state.channel_shift[0], expected[3 * layer + 2]) <= bound, layer


def as_states(pair: Pair, given: list[Tensor]) -> RecurrentStates:
    """A state of the package as forebay takes it."""
    return RecurrentStates(
        tuple(
            LayerState(
                wkv=pair.theirs.matrices(given, layer)[None].contiguous(),
                time_shift=given[3 * layer][None],
                channel_shift=given[3 * layer + 2][None],
            )
            for layer in range(len(given) // 3)
        )
    )


@VERSIONS
@pytest.mark.parametrize("shape", [pytest.param(s, marks=pytest.mark.slow) if s in ALIKE else s for s in SHAPES])
def test_whole_sequences_give_the_logits_and_states_of_the_package(pairs: Pairs, version: int, shape: str) -> None:
    pair = pairs(version, shape)
    for length in LENGTHS if shape in EVERY_LENGTH else (2, 33):
        ids = some_ids(length, seed=length)
        expected, state = pair.theirs.run(ids)
        ours = pair.ours.forward([ids])
        assert ours.logits is not None
        assert ours.logits.shape == (1, *expected.shape)
        assert error(ours.logits[0], expected) <= BOUND, length
        worst = max(error(one, other) for one, other in zip(ours.logits[0], expected, strict=True))
        assert worst <= WORST_TOKEN, length
        check_states(pair, ours.states, state)


@VERSIONS
@pytest.mark.parametrize("shape", ["heads of 12", "heads of 64", "heads of 7", "one layer"])
def test_one_token_at_a_time_gives_the_logits_and_states_of_the_package(pairs: Pairs, version: int, shape: str) -> None:
    pair = pairs(version, shape)
    state: list[Tensor] | None = None
    states: RecurrentStates | None = None
    for token in some_ids(33):
        expected, state = pair.theirs.run([token], state)
        ours = pair.ours.forward([[token]], states=states)
        states = ours.states
        assert ours.logits is not None
        assert error(ours.logits[0], expected) <= BOUND
        check_states(pair, states, state)


@VERSIONS
def test_what_the_package_reads_one_at_a_time_is_read_at_once_here(pairs: Pairs, version: int) -> None:
    pair = pairs(version, "heads of 12")
    ids = some_ids(70)
    state: list[Tensor] | None = None
    rows: list[Tensor] = []
    for token in ids:
        logits, state = pair.theirs.run([token], state)
        rows.append(logits[0])
    ours = pair.ours.forward([ids])
    assert ours.logits is not None
    assert state is not None
    assert error(ours.logits[0], torch.stack(rows)) <= BOUND
    check_states(pair, ours.states, state)


@VERSIONS
@pytest.mark.parametrize("length", [1, 7, 50])
def test_a_text_begun_by_the_package_is_continued_as_the_package_continues_it(
    pairs: Pairs, version: int, length: int
) -> None:
    pair = pairs(version, "heads of 12")
    _, state = pair.theirs.run(some_ids(40, seed=1))
    more = some_ids(length, seed=2)
    expected, after = pair.theirs.run(more, state)
    ours = pair.ours.forward([more], states=as_states(pair, state))
    assert ours.logits is not None
    assert error(ours.logits[0], expected) <= BOUND
    check_states(pair, ours.states, after)
    without = pair.ours.forward([more])
    assert without.logits is not None
    assert error(without.logits[0], expected) > 0.01, "the states must make a difference for this to say anything"


@VERSIONS
@pytest.mark.parametrize("shape", ["heads of 12", "six layers"])
def test_the_package_is_no_nearer_to_the_equations_than_forebay(pairs: Pairs, version: int, shape: str) -> None:
    pair = pairs(version, shape)
    ids = some_ids(60)
    expected, state = pair.theirs.run(ids)
    truth = rwkv_naive.run(pair.tensors, version, ids)
    ours = pair.ours.forward([ids])
    assert ours.logits is not None
    assert ours.states is not None
    assert error(ours.logits[0], truth.logits) <= 1.5 * error(expected, truth.logits) + 1e-7
    for layer, (into_time, matrices, into_channel) in enumerate(truth.end):
        theirs = (state[3 * layer], pair.theirs.matrices(state, layer), state[3 * layer + 2])
        mine = ours.states.layers[layer]
        for what, found, other, true in zip(
            ("into time mixing", "matrices", "into channel mixing"),
            (mine.time_shift[0], mine.wkv[0], mine.channel_shift[0]),
            theirs,
            (into_time, matrices, into_channel),
            strict=True,
        ):
            assert error(found, true) <= 2 * error(other, true) + 2e-7, (layer, what)


@pytest.mark.parametrize("version", [pytest.param(6, marks=pytest.mark.slow), 7], ids=["RWKV-6", "RWKV-7"])
def test_bfloat16_costs_no_more_precision_than_in_the_package(tmp_path: Path, version: int) -> None:
    ours, theirs, n_models = 0.0, 0.0, 2
    for seed in range(n_models):
        # Weights that bfloat16 holds exactly, so that only the computation rounds.
        drawn = random_tensors(version, seed=seed)
        tensors = {name: tensor.bfloat16().float() for name, tensor in drawn.items()}
        path = tmp_path / f"{seed}.pth"
        torch.save(tensors, path)
        ids = some_ids(25, seed=seed)
        truth = rwkv_naive.run(tensors, version, ids).logits
        out = load_model(path, device="cpu", dtype="bfloat16").forward([ids])
        assert out.logits is not None
        assert out.logits.dtype == torch.bfloat16
        ours += error(out.logits[0], truth) / n_models
        theirs += error(Theirs(path, version, "bf16").run(ids)[0], truth) / n_models
    assert ours <= 2 * theirs
