"""Effective attention of RWKV: what each token reads of the value of each, exactly, and only when it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from forebay.stages.models.forward import Forward
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.rwkv import mixing
from forebay.stages.models.state_taps import StateKnockout, StateSteering
from forebay.stages.models.taps import HookSpec

from . import rwkv_naive
from .rwkv_models import random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 2e-6
"""Relative error of what is computed in float32 against the same from the same inputs in float64."""
VERSIONS = pytest.mark.parametrize("version", [6, 7], ids=["RWKV-6", "RWKV-7"])
SHAPES: Mapping[str, Mapping[str, int]] = {
    "as wide as the stream": {},
    "wider than the stream": {"n_heads": 4, "d_head": 11},
    "one layer of one head": {"n_layers": 1, "n_heads": 1, "d_head": 16, "d_model": 9},
}
ATTENTION = "rwkv.hook_effective_attn"
INPUTS = {6: ("r", "k", "v", "decay"), 7: ("r", "k", "v", "decay", "a", "kk")}
LENGTHS = (23, 1, 40, 2, 33)


@dataclass(frozen=True)
class Made:
    version: int
    tensors: Mapping[str, Tensor]
    model: Model

    @property
    def hooks(self) -> HookSpec:
        """Effective attention of every layer, what it follows from, and what is read."""
        kinds = ",".join((*INPUTS[self.version], "wkv", "effective_attn"))
        return HookSpec().capture(f"blocks.*.rwkv.hook_{{{kinds}}}")

    @property
    def layers(self) -> range:
        return range(self.model.spec.n_layers)


Make: TypeAlias = Callable[..., Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A random model of a version, by name of its shape; its decays are moved by `faster`."""

    @functools.cache
    def made(version: int, shape: str = "as wide as the stream", faster: float = 0.0) -> Made:
        tensors = random_tensors(version, seed=30, **SHAPES[shape])
        for name in tensors:
            if name.endswith(("att.time_decay", "att.w0")):
                tensors[name] = tensors[name] + faster
        path = tmp_path_factory.mktemp("model") / "model.pth"
        torch.save(tensors, path)
        return Made(version, tensors, load_model(path, device="cpu"))

    return made


def some_ids(n: int, seed: int = 0) -> list[int]:
    drawn: list[int] = torch.randint(70, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def texts() -> list[list[int]]:
    return [some_ids(length, seed) for seed, length in enumerate(LENGTHS)]


def values_of(out: Forward, row: int, length: int) -> dict[str, Tensor]:
    """What was captured of one sequence, without its padding; effective attention apart."""
    return {
        str(point): value[row, :length].double() for point, value in out.captures.items() if "position" in point.dims
    }


def attention_of(out: Forward, layer: int, row: int, length: int) -> Tensor:
    return out[f"blocks.{layer}.{ATTENTION}"][row, :, :length, :length]


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def read_of(alpha: Tensor, values: Mapping[str, Tensor], layer: int) -> Tensor:
    """Σ_s α[t, s] v_s, in float64 [position, head, channel]."""
    return torch.einsum("hts,she->the", alpha.double(), values[f"blocks.{layer}.rwkv.hook_v"])


def read_of_the_start(made: Made, values: Mapping[str, Tensor], layer: int, state: Tensor) -> Tensor:
    """What every token reads of a state [head, key, value] that was there before the first, when nothing is written."""
    of = {kind: values[f"blocks.{layer}.rwkv.hook_{kind}"] for kind in INPUTS[made.version]}
    read = torch.zeros(of["v"].shape, dtype=torch.float64)
    for h, matrix in enumerate(state.double()):
        for t in range(len(read)):
            then = of["decay"][t, h][:, None] * matrix
            if made.version == 7:
                kk = of["kk"][t, h]
                then = then - torch.outer(kk * of["a"][t, h], kk @ matrix)
            read[t, h] = of["r"][t, h] @ (then if made.version == 7 else matrix)
            matrix = then
    return read


@VERSIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("faster", [0.0, 4.0, -8.0], ids=["decays as they come", "strong decays", "slow decays"])
def test_it_is_what_the_formulas_say_of_what_drives_the_recurrence(
    make: Make, version: int, shape: str, faster: float
) -> None:
    made = make(version, shape, faster)
    for length in (1, 4, 37):
        out = made.model.forward([some_ids(length, length)], made.hooks)
        values = values_of(out, 0, length)
        for layer in made.layers:
            expected = rwkv_naive.effective_attention(values, made.tensors, version, layer)
            found = attention_of(out, layer, 0, length)
            assert found.dtype == torch.float32
            assert found.shape == (made.model.spec.n_heads, length, length)
            assert error(found, expected) <= BOUND, (length, layer)


@VERSIONS
def test_it_is_what_the_formulas_say_of_the_equations_own_values(make: Make, version: int) -> None:
    made, ids = make(version), some_ids(70)
    out = made.model.forward([ids], made.hooks)
    truth = rwkv_naive.run(made.tensors, version, ids)
    for layer in made.layers:
        expected = rwkv_naive.effective_attention(truth.values, made.tensors, version, layer)
        assert error(attention_of(out, layer, 0, 70), expected) <= 1e-5
        read = read_of(expected, truth.values, layer)
        assert error(read, truth.values[f"blocks.{layer}.rwkv.hook_wkv"]) <= 1e-12, "of the formulas themselves"


@VERSIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("faster", [0.0, 4.0, -8.0], ids=["decays as they come", "strong decays", "slow decays"])
def test_with_the_values_it_gives_all_that_is_read(make: Make, version: int, shape: str, faster: float) -> None:
    made = make(version, shape, faster)
    out = made.model.forward([some_ids(70)], made.hooks)
    values = values_of(out, 0, 70)
    for layer in made.layers:
        read = read_of(attention_of(out, layer, 0, 70), values, layer)
        assert error(read, values[f"blocks.{layer}.rwkv.hook_wkv"]) <= BOUND


@VERSIONS
def test_after_a_state_it_leaves_what_is_read_of_that(make: Make, version: int) -> None:
    made, ids = make(version), some_ids(40, 1)
    states = made.model.forward([some_ids(30, 2)]).states
    assert states is not None
    out = made.model.forward([ids], made.hooks, states=states)
    values = values_of(out, 0, 40)
    for layer in made.layers:
        alpha = attention_of(out, layer, 0, 40)
        assert error(alpha, rwkv_naive.effective_attention(values, made.tensors, version, layer)) <= BOUND
        of_the_start = read_of_the_start(made, values, layer, states.layers[layer].wkv[0])
        wkv = values[f"blocks.{layer}.rwkv.hook_wkv"]
        assert error(read_of(alpha, values, layer) + of_the_start, wkv) <= BOUND
        assert error(read_of(alpha, values, layer)[:3], wkv[:3]) > 0.05, "the state must matter"


@VERSIONS
def test_no_token_attends_to_one_after_it(make: Make, version: int) -> None:
    made = make(version)
    for length in (2, 3, 17, 70):
        out = made.model.forward([some_ids(length)], made.hooks)
        for layer in made.layers:
            alpha = attention_of(out, layer, 0, length)
            assert not alpha.triu(1).any()
            assert (alpha.tril() != 0).sum() == made.model.spec.n_heads * length * (length + 1) // 2
            assert (alpha < 0).any(), "it is signed: nothing is clipped or normalised"


def test_the_bonus_of_rwkv_6_stands_on_the_diagonal_and_nowhere_else(make: Make) -> None:
    made, ids = make(6), some_ids(20)
    with_bonus = made.model.forward([ids], made.hooks)
    values = values_of(with_bonus, 0, 20)
    bonus = made.tensors["blocks.0.att.time_faaaa"].double()
    own = (values["blocks.0.rwkv.hook_r"] * values["blocks.0.rwkv.hook_k"] * bonus).sum(-1).T
    diagonal = attention_of(with_bonus, 0, 0, 20).diagonal(dim1=1, dim2=2)
    assert error(diagonal, own) <= BOUND


@VERSIONS
def test_in_a_batch_it_is_that_of_each_sequence_alone(make: Make, version: int) -> None:
    made = make(version)
    out = made.model.forward(texts(), made.hooks)
    for row, ids in enumerate(texts()):
        alone = made.model.forward([ids], made.hooks)
        values = values_of(out, row, len(ids))
        for layer in made.layers:
            alpha = attention_of(out, layer, row, len(ids))
            assert error(alpha, attention_of(alone, layer, 0, len(ids))) <= 1e-5, (row, layer)
            expected = rwkv_naive.effective_attention(values, made.tensors, version, layer)
            assert error(alpha, expected) <= BOUND, (row, layer)


@VERSIONS
def test_tokens_attend_to_padding_as_little_as_to_the_future(make: Make, version: int) -> None:
    made = make(version)
    out = made.model.forward(texts(), made.hooks)
    for row, length in enumerate(LENGTHS):
        for layer in made.layers:
            assert not out[f"blocks.{layer}.{ATTENTION}"][row, :, :length, length:].any()


def _refuse(*args: object) -> Tensor:
    raise AssertionError("effective attention was computed")


@VERSIONS
def test_it_is_computed_only_when_asked_for(make: Make, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(version)
    monkeypatch.setattr(mixing, "attended", _refuse)
    made.model.forward(texts())
    everything = made.model.forward(texts(), HookSpec().capture("*"))
    layerwise = made.model.forward(texts(), HookSpec().capture("blocks.*", "blocks.*.rwkv.*"))
    for out in (everything, layerwise):
        assert not [point for point in out.captures if str(point).endswith(ATTENTION)]
        assert [point for point in out.captures if str(point).endswith("rwkv.hook_wkv")]
    made.model.generate(texts(), max_new_tokens=2)
    for pattern in (f"blocks.0.{ATTENTION}", f"blocks.*.{ATTENTION}", "*hook_effective_attn"):
        with pytest.raises(AssertionError, match="was computed"):
            made.model.forward(texts(), HookSpec().capture(pattern))


@VERSIONS
def test_capturing_it_changes_no_bit(make: Make, version: int) -> None:
    made = make(version)
    plain = made.model.forward(texts(), HookSpec().capture("*"))
    watched = made.model.forward(texts(), HookSpec().capture("*", f"blocks.*.{ATTENTION}"))
    assert plain.logits is not None
    assert watched.logits is not None
    assert torch.equal(plain.logits, watched.logits)
    for point, value in plain.captures.items():
        assert torch.equal(value, watched[point]), str(point)


@VERSIONS
@pytest.mark.parametrize("scale", [0.0, 2.5, -1.0], ids=["knocked out", "more", "reversed"])
def test_what_is_read_of_a_scaled_write_is_scaled_and_nothing_else(make: Make, version: int, scale: float) -> None:
    made, ids = make(version), some_ids(40)
    change = StateSteering(scale).at(position=[7, 20], head=[0, 2])
    where = "blocks.1.rwkv.hook_state"
    plain = made.model.forward([ids], made.hooks)
    out = made.model.forward([ids], made.hooks.intervene(where, change))
    expected = attention_of(plain, 1, 0, 40).clone()
    for s in (7, 20):
        # RWKV-6 reads its own token past the state, RWKV-7 from it.
        first = s + 1 if version == 6 else s
        expected[[0, 2], first:, s] *= scale
    assert error(attention_of(out, 1, 0, 40), expected) <= BOUND
    values = values_of(out, 0, 40)
    read = read_of(attention_of(out, 1, 0, 40), values, 1)
    assert error(read, values["blocks.1.rwkv.hook_wkv"]) <= BOUND


@VERSIONS
def test_where_nothing_is_written_nothing_is_read_of_the_past(make: Make, version: int) -> None:
    made, ids = make(version), some_ids(20)
    out = made.model.forward([ids], made.hooks.intervene("blocks.0.rwkv.hook_state", StateKnockout()))
    alpha = attention_of(out, 0, 0, 20)
    assert not alpha.tril(-1).any()
    assert bool(alpha.any()) == (version == 6), "the bonus of RWKV-6 is not read from the state"
