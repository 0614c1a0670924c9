"""At every hook point RWKV-6 and RWKV-7 have the value that the equations give it.

Two things are told apart. That forebay's formulas are the right ones: there it computes in float64, and differs from
the equations by what float64 rounds. And that float32 is enough: there every layer is entered by the true residual
stream, so that what is seen is a layer's own rounding and not what the layers before it made of theirs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from unittest import mock

import pytest
import torch
from torch import Tensor

from forebay.stages.models.interventions import Replace
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.rwkv import wkv
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.taps import HookSpec
from forebay.stages.models.weights import read_weights

from . import rwkv_naive
from .rwkv_models import random_tensors
from .rwkv_naive import Naive

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-12
"""Relative error of a tensor in float64; a token may be off by ten times as much."""
ONE_LAYER, WORST_TOKEN = 1e-6, 1e-5
"""Relative error of a tensor, and of a token's part of it, in float32."""

VERSIONS = pytest.mark.parametrize("version", [6, 7], ids=["RWKV-6", "RWKV-7"])
SHAPES: Mapping[str, Mapping[str, int]] = {
    "wider than the stream": {"n_heads": 4, "d_head": 11},
    "narrower than the stream": {"n_heads": 2, "d_head": 10},
    "one layer of one head": {"n_layers": 1, "n_heads": 1, "d_head": 16, "d_model": 9},
}
DECAYS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mixed": lambda start: start + (torch.arange(start.numel()) % 3 - 1) * 5,
    "strong": lambda start: start + 4,
    "slow": lambda start: start - 9,
}
"""What is done to the decay's start: RWKV-6's factor is exp(−exp(start + …)), and underflows float32 from 4.5 on."""


def make_tensors(version: int, shape: str, decays: str | None) -> dict[str, Tensor]:
    tensors = random_tensors(version, seed=10 + version, **SHAPES[shape])
    for name, tensor in tensors.items():
        if decays is not None and name.endswith(("att.time_decay", "att.w0")):
            tensors[name] = DECAYS[decays](tensor)
    return tensors


def some_ids(n: int, seed: int = 0) -> list[int]:
    drawn: list[int] = torch.randint(70, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


@dataclass(frozen=True)
class Case:
    path: Path
    tensors: Mapping[str, Tensor]
    ids: Sequence[int]
    truth: Naive


Cases: TypeAlias = Callable[[int, str, str | None, int], Case]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """A random checkpoint and what the equations make of some tokens, by version, shape, decays and length."""

    @functools.cache
    def make(version: int, shape: str, decays: str | None, length: int) -> Case:
        tensors = make_tensors(version, shape, decays)
        path = tmp_path_factory.mktemp("model") / "model.pth"
        torch.save(tensors, path)
        ids = some_ids(length)
        return Case(path, tensors, ids, rwkv_naive.run(tensors, version, ids))

    return make


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """While it lasts, whoever asks for float32 gets float64, and factors are not taken for 2e-9 that are below it."""
    before = torch.get_default_dtype()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(wkv, "_LEAST_LOG_DECAY", -40.0),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm())


def worst_token(ours: Tensor, expected: Tensor) -> tuple[float, int]:
    """Relative error of the token that is off most, and its position."""
    found, true = ours.double().reshape(len(ours), -1), expected.reshape(len(ours), -1)
    errors = (found - true).norm(dim=1) / true.norm(dim=1)
    return float(errors.max()), int(errors.argmax())


STATES = "blocks.*.rwkv.hook_state"


def captured(model: Model, case: Case, hooks: HookSpec, positions: Sequence[int]) -> dict[str, Tensor]:
    """Every hook point but effective attention, of the one sequence; states after the tokens at `positions`."""
    apart = (".hook_state", ".hook_effective_attn")
    rest = [str(point) for point in model.spec.points() if not str(point).endswith(apart)]
    out = model.forward([case.ids], hooks.capture(*rest).capture(STATES, positions=positions))
    found = {str(point): value[0] for point, value in out.captures.items()}
    assert {name for name in found if not name.endswith(apart)} == set(case.truth.values)
    return found


def expected_value(case: Case, name: str, positions: Sequence[int]) -> Tensor:
    if name.endswith(".hook_state"):
        return case.truth.states[int(name.split(".")[1])][list(positions)]
    return case.truth.values[name]


def check(found: Mapping[str, Tensor], case: Case, positions: Sequence[int], bound: float, worst: float) -> None:
    """Report every point that is further off than it may be, with its worst token."""
    off = {}
    for name, value in found.items():
        expected = expected_value(case, name, positions)
        assert value.shape == expected.shape, name
        of_token, position = worst_token(value, expected)
        if not (error(value, expected) <= bound and of_token <= worst):
            off[name] = f"{error(value, expected):.1e}, {of_token:.1e} at position {position}"
    assert not off


LENGTHS = {"one layer of one head": 512, "narrower than the stream": 70}


@VERSIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decays", [None, *DECAYS])
def test_in_float64_every_point_is_what_the_equations_say(
    cases: Cases, version: int, shape: str, decays: str | None
) -> None:
    case = cases(version, shape, decays, LENGTHS.get(shape, 40))
    with float64_throughout():
        at = open_checkpoint(case.path)
        cpu = torch.device("cpu")
        model = Model(at.spec, read_weights(at, cpu, torch.float64), cpu, torch.float64, at)
        check(captured(model, case, HookSpec(), [-1]), case, [-1], EXACT, 10 * EXACT)
        everywhere = range(len(case.ids))
        check(captured(model, case, HookSpec(), everywhere), case, everywhere, EXACT, 10 * EXACT)


@VERSIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decays", [None, *DECAYS])
@pytest.mark.parametrize("positions", [[-1], [0, 3, 33, 34, -1]], ids=["at once", "with stops"])
def test_in_float32_every_layer_is_as_near_as_it_can_be(
    cases: Cases, version: int, shape: str, decays: str | None, positions: list[int]
) -> None:
    case = cases(version, shape, decays, LENGTHS.get(shape, 40))
    hooks = HookSpec()
    for name, value in case.truth.values.items():
        if name.endswith(("hook_resid_pre", "hook_final_norm")):
            hooks = hooks.intervene(name, Replace(value.float()))
    model = load_model(case.path, device="cpu")
    check(captured(model, case, hooks, positions), case, positions, ONE_LAYER, WORST_TOKEN)
