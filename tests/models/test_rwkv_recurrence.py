"""The recurrence of RWKV: tokens in chunks give what tokens one by one give, and both what the equations say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forebay.stages.models.rwkv import wkv as of_forebay
from forebay.stages.models.rwkv.wkv import Wkv, chunked, recur, step_by_step

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 2e-6
"""Relative error of a tensor; it is some 3e-7 as a rule."""
FORGOTTEN = 2.1e-9
"""What chunks keep of a state, instead of nothing, when a factor of less than that comes: exp(−20)."""

VERSIONS = pytest.mark.parametrize("version", [6, 7], ids=["RWKV-6", "RWKV-7"])
FORMS: Mapping[str, Callable[[Wkv, Tensor], tuple[Tensor, Tensor]]] = {
    "step by step": step_by_step,
    "in chunks": chunked,
    "the quicker": recur,
}
WITH_FORMS = pytest.mark.parametrize("form", FORMS)

DECAYS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mild": lambda noise: -0.2 * noise.sigmoid(),
    "of RWKV-7": lambda noise: -0.6065306597 * (2 * noise).sigmoid(),
    "none": lambda noise: noise * 0,
    "hardly any": lambda noise: -1e-6 * noise.abs(),
    "strong": lambda noise: -4 - noise.abs(),
    "of every strength": lambda noise: -(10 ** (2 * noise - 1)).clamp_max(18),
    "growing": lambda noise: 0.1 * noise.abs(),
}
"""Logarithms of the factors, from noise of the normal distribution."""

SHAPES: Mapping[str, tuple[int, int, int, int, int]] = {
    "one token": (2, 1, 3, 8, 8),
    "two tokens": (1, 2, 2, 4, 4),
    "less than a chunk": (2, 13, 2, 5, 5),
    "a chunk of RWKV-6": (1, 16, 3, 8, 8),
    "a chunk of RWKV-7": (1, 32, 3, 8, 8),
    "a token more": (2, 33, 1, 12, 12),
    "many chunks": (1, 101, 2, 16, 16),
    "values narrower than keys": (2, 50, 2, 16, 3),
    "values wider than keys": (3, 50, 2, 3, 20),
}
"""Sequences, tokens, heads, key channels, value channels."""


def drawn(version: int, shape: tuple[int, int, int, int, int], decays: str, *, seed: int = 0) -> tuple[Wkv, Tensor]:
    """Random inputs of the recurrence, and a random state to begin with."""
    n_sequences, n_positions, n_heads, n_keys, n_values = shape
    generator = torch.Generator().manual_seed(seed)

    def noise(width: int) -> Tensor:
        return torch.randn(n_sequences, n_positions, n_heads, width, generator=generator)

    wkv = Wkv(r=noise(n_keys), k=noise(n_keys), v=noise(n_values), log_decay=DECAYS[decays](noise(n_keys)))
    if version == 7:
        removal = torch.nn.functional.normalize(noise(n_keys), dim=-1)
        wkv = replace(wkv, removal=removal, rate=noise(n_keys).sigmoid())
    return wkv, torch.randn(n_sequences, n_heads, n_keys, n_values, generator=generator)


def given_of(wkv: Wkv) -> dict[str, Tensor]:
    values = {field.name: getattr(wkv, field.name) for field in fields(wkv)}
    return {name: value for name, value in values.items() if value is not None}


def by_the_equations(wkv: Wkv, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence, one head, one token after another, in float64; gradients flow."""
    of = {name: value.double() for name, value in given_of(wkv).items()}
    read = torch.zeros(of["v"].shape, dtype=torch.float64)
    after = torch.zeros(state.shape, dtype=torch.float64)
    for b in range(state.shape[0]):
        for h in range(state.shape[1]):
            matrix = state[b, h].double()
            for t in range(read.shape[1]):
                r, k, v, decay = (of[name][b, t, h] for name in ("r", "k", "v", "log_decay"))
                then = torch.diag(decay.exp()) @ matrix + torch.outer(k, v)
                if "removal" in of:
                    removal, rate = of["removal"][b, t, h], of["rate"][b, t, h]
                    then = then - torch.outer(removal * rate, removal) @ matrix
                read[b, t, h] = r @ (then if "removal" in of else matrix)
                matrix = then
            after[b, h] = matrix
    return read, after


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@VERSIONS
@WITH_FORMS
@pytest.mark.parametrize("decays", DECAYS)
def test_every_form_reads_and_keeps_what_the_equations_say(version: int, form: str, decays: str) -> None:
    for name, shape in SHAPES.items():
        wkv, state = drawn(version, shape, decays)
        expected_read, expected_after = by_the_equations(wkv, state)
        read, after = FORMS[form](wkv, state)
        assert read.dtype == after.dtype == torch.float32
        assert read.shape == expected_read.shape
        assert after.shape == expected_after.shape
        assert error(read, expected_read) <= BOUND, name
        assert error(after, expected_after) <= BOUND, name


@VERSIONS
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    decays=st.sampled_from(list(DECAYS)),
    at_once=st.sampled_from([1, 2**10, 2**21]),
    seed=st.integers(0, 2**30),
)
def test_chunks_give_what_steps_give_however_many_are_taken_at_once(
    version: int, shape: tuple[int, int, int, int, int], decays: str, at_once: int, seed: int
) -> None:
    wkv, state = drawn(version, shape, decays, seed=seed)
    expected_read, expected_after = step_by_step(wkv, state)
    with mock.patch.object(of_forebay, "_AT_ONCE", at_once):
        read, after = recur(wkv, state)
    # A single number read may be the difference of large ones, so that errors are relative to what it is made of.
    scale = float(wkv.r.norm(dim=-1).max() * wkv.v.norm(dim=-1).max())
    assert float((read - expected_read).norm()) <= 1e-5 * float(expected_read.norm()) + 1e-6 * scale
    assert error(after, expected_after) <= 1e-5


@VERSIONS
@WITH_FORMS
def test_a_factor_of_zero_forgets_a_channel_and_what_came_since_is_there_in_full(version: int, form: str) -> None:
    wkv, state = drawn(version, (2, 40, 2, 8, 8), "mild")
    log_decay = wkv.log_decay.clone()
    log_decay[:, 17, :, :5] = -torch.inf
    log_decay[0, [3, 4, 5, 39], :, 2:] = -torch.inf
    wkv = replace(wkv, log_decay=log_decay)
    read, after = FORMS[form](wkv, state)
    expected_read, expected_after = by_the_equations(wkv, state)
    assert error(read, expected_read) <= BOUND
    assert error(after, expected_after) <= BOUND


@WITH_FORMS
def test_forgetting_everything_leaves_no_more_of_a_state_than_two_billionths(form: str) -> None:
    wkv, state = drawn(6, (1, 40, 2, 8, 8), "none")
    log_decay = torch.zeros_like(wkv.log_decay)
    log_decay[:, 20] = -torch.inf
    silent = replace(wkv, k=torch.zeros_like(wkv.k), log_decay=log_decay)
    read, after = FORMS[form](silent, state)
    assert float(after.norm()) <= FORGOTTEN * float(state.norm())
    assert error(read[:, :21], by_the_equations(silent, state)[0][:, :21]) <= BOUND
    assert float(read[:, 21:].norm()) <= FORGOTTEN * float(read[:, :21].norm()) * 2


@WITH_FORMS
def test_at_a_rate_of_zero_nothing_is_removed(form: str) -> None:
    wkv, state = drawn(7, (2, 40, 2, 8, 8), "of RWKV-7")
    assert wkv.rate is not None
    still = replace(wkv, rate=torch.zeros_like(wkv.rate))
    _, after = FORMS[form](still, state)
    _, of_version_6 = FORMS[form](replace(wkv, rate=None, removal=None), state)
    assert error(after, of_version_6) <= BOUND
    assert error(FORMS[form](wkv, state)[1], of_version_6) > 0.1


@WITH_FORMS
def test_at_a_rate_of_one_what_was_stored_under_a_key_is_replaced(form: str) -> None:
    """The delta rule: with the key that is written also removed, and no decay, it is read back exactly."""
    wkv, state = drawn(7, (2, 40, 2, 8, 8), "none")
    assert wkv.removal is not None
    key = wkv.removal
    replacing = replace(wkv, r=key, k=key, rate=torch.ones_like(key))
    read, _ = FORMS[form](replacing, state)
    assert error(read, wkv.v) <= BOUND


@VERSIONS
@WITH_FORMS
def test_what_is_read_is_linear_in_values_and_state_together(version: int, form: str) -> None:
    wkv, state = drawn(version, (2, 40, 2, 8, 6), "of every strength")
    other, other_state = drawn(version, (2, 40, 2, 8, 6), "mild", seed=1)
    both = replace(wkv, v=2 * wkv.v - 3 * other.v)
    read, after = FORMS[form](both, 2 * state - 3 * other_state)
    one, one_after = FORMS[form](wkv, state)
    two, two_after = FORMS[form](replace(wkv, v=other.v), other_state)
    assert error(read, 2 * one - 3 * two) <= BOUND
    assert error(after, 2 * one_after - 3 * two_after) <= BOUND


@VERSIONS
@pytest.mark.parametrize("decays", ["of RWKV-7", "of every strength", "growing"])
def test_a_state_handed_from_piece_to_piece_is_that_of_the_whole(version: int, decays: str) -> None:
    wkv, state = drawn(version, (2, 90, 2, 8, 6), decays)
    whole, after = recur(wkv, state)
    for cuts in ([1, 2, 3], [45], [32, 64], [4, 5, 37, 89], [16, 17, 48]):
        pieces: list[Tensor] = []
        then = state
        for first, beyond in zip([0, *cuts], [*cuts, 90], strict=True):
            read, then = recur(wkv.part(first, beyond), then)
            pieces.append(read)
        assert error(torch.cat(pieces, 1), whole) <= BOUND, cuts
        assert error(then, after) <= BOUND, cuts


@VERSIONS
@WITH_FORMS
def test_sequences_and_heads_do_not_see_one_another(version: int, form: str) -> None:
    wkv, state = drawn(version, (3, 40, 3, 8, 8), "of RWKV-7")
    read, after = FORMS[form](wkv, state)
    alone = Wkv(**{name: value[1:2, :, 2:] for name, value in given_of(wkv).items()})
    read_alone, after_alone = FORMS[form](alone, state[1:2, 2:])
    assert error(read[1:2, :, 2:], read_alone) <= BOUND
    assert error(after[1:2, 2:], after_alone) <= BOUND


@VERSIONS
@WITH_FORMS
def test_no_token_reads_what_comes_after_it(version: int, form: str) -> None:
    wkv, state = drawn(version, (1, 50, 2, 8, 8), "of RWKV-7")
    later, _ = drawn(version, (1, 50, 2, 8, 8), "of RWKV-7", seed=1)
    mixed = {
        name: torch.cat((value[:, :23], given_of(later)[name][:, 23:]), 1) for name, value in given_of(wkv).items()
    }
    assert torch.equal(FORMS[form](Wkv(**mixed), state)[0][:, :23], FORMS[form](wkv, state)[0][:, :23])


@VERSIONS
@WITH_FORMS
def test_inputs_and_the_state_that_is_given_are_left_as_they_are(version: int, form: str) -> None:
    wkv, state = drawn(version, (1, 50, 2, 8, 8), "of every strength")
    before = {name: value.clone() for name, value in given_of(wkv).items()} | {"state": state.clone()}
    FORMS[form](wkv, state)
    assert all(torch.equal(value, before[name]) for name, value in (given_of(wkv) | {"state": state}).items())


def gradients(
    run: Callable[[Wkv, Tensor], tuple[Tensor, Tensor]], wkv: Wkv, state: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Those of a random weighting of everything that comes out, by everything that goes in."""
    into = {name: value.to(dtype).requires_grad_() for name, value in (given_of(wkv) | {"state": state}).items()}
    read, after = run(Wkv(**{name: value for name, value in into.items() if name != "state"}), into["state"])
    generator = torch.Generator().manual_seed(9)
    loss = (read.double() * torch.randn(read.shape, generator=generator)).sum()
    loss = loss + (after.double() * torch.randn(after.shape, generator=generator)).sum()
    return dict(zip(into, torch.autograd.grad(loss, list(into.values())), strict=True))


@VERSIONS
@WITH_FORMS
@pytest.mark.parametrize("decays", ["mild", "of RWKV-7", "none", "of every strength"])
def test_gradients_are_those_of_the_equations(version: int, form: str, decays: str) -> None:
    wkv, state = drawn(version, (2, 37, 2, 6, 5), decays)
    expected = gradients(by_the_equations, wkv, state, torch.float64)
    for name, found in gradients(FORMS[form], wkv, state, torch.float32).items():
        assert error(found, expected[name]) <= 1e-5, name


@VERSIONS
@WITH_FORMS
def test_gradients_are_finite_where_factors_are_zero(version: int, form: str) -> None:
    wkv, state = drawn(version, (1, 70, 2, 6, 6), "mild")
    log_decay = wkv.log_decay.clone()
    log_decay[:, 5:60, :, :3] = -90.0
    wkv = replace(wkv, log_decay=log_decay)
    expected = gradients(by_the_equations, wkv, state, torch.float64)
    for name, found in gradients(FORMS[form], wkv, state, torch.float32).items():
        assert error(found, expected[name]) <= 1e-5, name


@VERSIONS
def test_gradients_of_the_equations_are_differences_of_what_they_give(version: int) -> None:
    """So that what the two tests above compare with is known to be right."""
    wkv, state = drawn(version, (1, 6, 1, 3, 2), "of RWKV-7")
    names = list(given_of(wkv))

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return by_the_equations(Wkv(**dict(zip(names, values[:-1], strict=True))), values[-1])

    values = [value.double().requires_grad_() for value in (*given_of(wkv).values(), state)]
    assert torch.autograd.gradcheck(run, values)


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_inputs_are_summed_in_float32(version: int, dtype: torch.dtype) -> None:
    wkv, state = drawn(version, (1, 100, 2, 8, 8), "of RWKV-7")
    rounded = Wkv(**{name: value.to(dtype) for name, value in given_of(wkv).items()})
    for form in FORMS.values():
        read, after = form(rounded, state)
        expected_read, expected_after = by_the_equations(rounded, state)
        assert error(read, expected_read) <= BOUND
        assert error(after, expected_after) <= BOUND
