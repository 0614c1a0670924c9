"""A text of RWKV in pieces is the text at once, a batch is its sequences, and states are all that goes between."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import ModelError
from forebay.stages.models.forward import Forward
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.points import dims_of
from forebay.stages.models.rwkv.states import LayerState, RecurrentStates
from forebay.stages.models.sampling import Sampling
from forebay.stages.models.taps import HookSpec

from . import rwkv_naive
from .rwkv_models import random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 1e-5
"""Relative error of a tensor: pieces and padding cut the recurrence into other chunks, which round otherwise."""
VERSIONS = pytest.mark.parametrize("version", [6, 7], ids=["RWKV-6", "RWKV-7"])
SIZES = {"d_model": 30, "n_heads": 3, "d_head": 8}
LENGTHS = (17, 1, 40, 2, 33, 5, 32)
EVERYTHING = HookSpec().capture("*", "blocks.*.rwkv.hook_effective_attn")
EVERY_TOKEN = HookSpec().capture("*")


@dataclass(frozen=True)
class Made:
    tensors: Mapping[str, Tensor]
    model: Model


Make: TypeAlias = Callable[[int], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @functools.cache
    def made(version: int) -> Made:
        tensors = random_tensors(version, seed=20, **SIZES)
        path = tmp_path_factory.mktemp("model") / "model.pth"
        torch.save(tensors, path)
        return Made(tensors, load_model(path, device="cpu"))

    return made


def some_ids(n: int, seed: int = 0) -> list[int]:
    drawn: list[int] = torch.randint(70, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def texts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [some_ids(length, seed) for seed, length in enumerate(lengths)]


def logits_of(out: Forward) -> Tensor:
    assert out.logits is not None
    return out.logits


def states_of(out: Forward) -> RecurrentStates:
    assert out.states is not None
    return out.states


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def parts_of(states: RecurrentStates) -> dict[str, Tensor]:
    return {
        f"{name} of layer {layer}": getattr(state, name)
        for layer, state in enumerate(states.layers)
        for name in ("wkv", "time_shift", "channel_shift")
    }


def check_states(found: RecurrentStates, expected: RecurrentStates, bound: float = BOUND) -> None:
    for (name, ours), other in zip(parts_of(found).items(), parts_of(expected).values(), strict=True):
        assert ours.shape == other.shape, name
        assert ours.dtype == other.dtype, name
        assert error(ours, other) <= bound, name


@VERSIONS
@pytest.mark.parametrize("cuts", [[1], [20], [32], [1, 2, 3, 4], [5, 10, 15, 40, 69], [64, 69]], ids=str)
def test_a_text_in_pieces_is_the_text_at_once(make: Make, version: int, cuts: list[int]) -> None:
    model, ids = make(version).model, some_ids(70)
    whole = model.forward([ids], EVERY_TOKEN)
    pieces: list[Forward] = []
    states: RecurrentStates | None = None
    for first, beyond in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        pieces.append(model.forward([ids[first:beyond]], EVERY_TOKEN, states=states))
        states = pieces[-1].states
    assert error(torch.cat([logits_of(piece) for piece in pieces], 1), logits_of(whole)) <= BOUND
    check_states(states_of(pieces[-1]), states_of(whole))
    for point, expected in whole.captures.items():
        if "position" in point.dims:
            assert error(torch.cat([piece[point] for piece in pieces], 1), expected) <= BOUND, str(point)
        else:
            assert error(pieces[-1][point], expected) <= BOUND, str(point)


@VERSIONS
def test_every_layer_begins_with_a_state_of_its_own(make: Make, version: int) -> None:
    """Exchanging what two layers, or two tokens, left behind is not without effect: nothing is ignored."""
    model, ids = make(version).model, some_ids(40)
    states = states_of(model.forward([ids[:30]]))
    expected = logits_of(model.forward([ids[30:]], states=states))
    layers = states.layers
    zero = RecurrentStates.zero(model.spec, 1, model.device, model.dtype).layers
    for layer in range(model.spec.n_layers):
        for name in ("wkv", "time_shift", "channel_shift"):
            without = replace(layers[layer], **{name: getattr(zero[layer], name)})
            other = RecurrentStates((*layers[:layer], without, *layers[layer + 1 :]))
            assert error(logits_of(model.forward([ids[30:]], states=other)), expected) > 1e-3, (layer, name)


@VERSIONS
def test_a_padded_batch_is_each_of_its_sequences_alone(make: Make, version: int) -> None:
    model = make(version).model
    hooks = EVERYTHING.extend(HookSpec().capture("blocks.*.rwkv.hook_state", positions=(-1,)))
    out = model.forward(texts(), hooks)
    for row, ids in enumerate(texts()):
        alone = model.forward([ids], hooks)
        assert error(logits_of(out)[row, : len(ids)], logits_of(alone)[0]) <= BOUND, row
        check_states(states_of(out).select([row]), states_of(alone))
        for point, expected in alone.captures.items():
            found = out[point][row : row + 1]
            for axis, dim in enumerate(dims_of(point.kind)):
                found = found.narrow(axis, 0, len(ids)) if dim in ("position", "query", "key") else found
            assert error(found, expected) <= BOUND, (row, str(point))


@VERSIONS
@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_a_captured_state_is_that_of_each_sequences_own_token(make: Make, version: int, position: int) -> None:
    made = make(version)
    hooks = HookSpec().capture("blocks.*.rwkv.hook_state", positions=[position])
    out = made.model.forward(texts(), hooks)
    for row, ids in enumerate(texts()):
        truth = rwkv_naive.run(made.tensors, version, ids)
        for layer, after in enumerate(truth.states):
            assert error(out[f"blocks.{layer}.rwkv.hook_state"][row, 0], after[position]) <= BOUND, (row, layer)


@VERSIONS
def test_sequences_may_stand_in_any_order(make: Make, version: int) -> None:
    model, order = make(version).model, [3, 0, 6, 2, 5, 1, 4]
    out = model.forward(texts(), EVERY_TOKEN)
    turned = model.forward([texts()[row] for row in order], EVERY_TOKEN)
    check_states(states_of(turned), states_of(out).select(order), 1e-6)
    for place, row in enumerate(order):
        length = LENGTHS[row]
        assert error(logits_of(turned)[place, :length], logits_of(out)[row, :length]) <= 1e-6


@VERSIONS
def test_pieces_of_different_lengths_continue_texts_of_different_lengths(make: Make, version: int) -> None:
    model, first = make(version).model, texts()
    second = [some_ids(length, 50 + length) for length in (1, 40, 3, 33, 2, 17, 5)]
    begun = model.forward(first)
    out = model.forward(second, EVERY_TOKEN, states=begun.states)
    for row, (before, after) in enumerate(zip(first, second, strict=True)):
        whole = model.forward([before + after], EVERY_TOKEN)
        assert error(logits_of(out)[row, : len(after)], logits_of(whole)[0, len(before) :]) <= BOUND, row
        check_states(states_of(out).select([row]), states_of(whole))


@VERSIONS
def test_states_are_not_changed_by_being_used(make: Make, version: int) -> None:
    model = make(version).model
    states = states_of(model.forward(texts()))
    before = {name: part.clone() for name, part in parts_of(states).items()}
    once = model.forward(texts(), states=states)
    twice = model.forward(texts(), states=states)
    assert all(torch.equal(part, before[name]) for name, part in parts_of(states).items())
    assert torch.equal(logits_of(once), logits_of(twice))
    assert all(
        torch.equal(one, two)
        for one, two in zip(parts_of(states_of(once)).values(), parts_of(states_of(twice)).values(), strict=True)
    )


@VERSIONS
def test_selected_states_continue_the_sequences_that_were_selected(make: Make, version: int) -> None:
    model, more = make(version).model, some_ids(9, 99)
    states = states_of(model.forward(texts()))
    chosen = states.select([4, 0, 4])
    assert chosen.n_sequences == 3
    out = model.forward([more] * 3, states=chosen)
    for place, row in enumerate([4, 0, 4]):
        whole = model.forward([texts()[row] + more])
        assert error(logits_of(out)[place], logits_of(whole)[0, -len(more) :]) <= BOUND
    for part in parts_of(chosen).values():
        part.zero_()
    assert all(part[4].abs().sum() > 0 for part in parts_of(states).values()), "what is selected is new"


@VERSIONS
def test_zero_states_are_those_before_the_first_token(make: Make, version: int) -> None:
    model = make(version).model
    zero = RecurrentStates.zero(model.spec, len(LENGTHS), model.device, model.dtype)
    assert torch.equal(logits_of(model.forward(texts(), states=zero)), logits_of(model.forward(texts())))


def _of_other_heads(states: RecurrentStates) -> RecurrentStates:
    return RecurrentStates(tuple(replace(layer, wkv=layer.wkv[:, :2]) for layer in states.layers))


def _of_another_width(states: RecurrentStates) -> RecurrentStates:
    return RecurrentStates(tuple(replace(layer, time_shift=layer.time_shift[:, :7]) for layer in states.layers))


def _of_another_width_later(states: RecurrentStates) -> RecurrentStates:
    *first, last = states.layers
    return RecurrentStates((*first, replace(last, channel_shift=last.channel_shift[:, :7])))


def _in_bfloat16(states: RecurrentStates) -> RecurrentStates:
    return RecurrentStates(
        tuple(
            LayerState(
                wkv=layer.wkv, time_shift=layer.time_shift.bfloat16(), channel_shift=layer.channel_shift.bfloat16()
            )
            for layer in states.layers
        )
    )


MISFITS: Mapping[str, Callable[[RecurrentStates], RecurrentStates]] = {
    "of too few sequences": lambda states: states.select([0]),
    "of too many sequences": lambda states: states.select([0, 1, 0]),
    "of too few layers": lambda states: RecurrentStates(states.layers[:-1]),
    "of too many layers": lambda states: RecurrentStates((*states.layers, states.layers[0])),
    "of other heads": _of_other_heads,
    "of another width": _of_another_width,
    "of another width in the last layer": _of_another_width_later,
    "of another dtype": _in_bfloat16,
}


@VERSIONS
@pytest.mark.parametrize("misfit", MISFITS)
def test_states_that_do_not_fit_are_refused(make: Make, version: int, misfit: str) -> None:
    model = make(version).model
    states = states_of(model.forward([[1, 2], [3]]))
    with pytest.raises(ModelError, match="states"):
        model.forward([[1, 2], [3]], states=MISFITS[misfit](states))


def test_a_transformer_has_no_states_and_takes_none(make: Make, tiny: Model) -> None:
    states = states_of(make(7).model.forward([[1]]))
    with pytest.raises(ModelError, match="not recurrent"):
        tiny.forward([[1]], states=states)
    assert tiny.forward([[1]]).states is None


@VERSIONS
def test_a_forward_that_ends_early_gives_no_states(make: Make, version: int) -> None:
    model = make(version).model
    out = model.forward(texts(), HookSpec().capture("blocks.1.rwkv.hook_wkv"), logits=False)
    assert out.states is None
    last = model.spec.n_layers - 1
    ends = model.forward(texts(), HookSpec().capture(f"blocks.{last}.hook_resid_mid"), logits=False)
    assert ends.states is None


@VERSIONS
def test_greedy_generation_chooses_what_the_equations_find_strongest(make: Make, version: int) -> None:
    made, prompts = make(version), texts([3, 1, 20])
    found = made.model.generate(prompts, max_new_tokens=6)
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(rwkv_naive.run(made.tensors, version, ids).logits[-1].argmax()))
        assert continuation.token_ids.tolist() == ids[len(prompt) :]


SAMPLINGS = {
    "greedy": Sampling(),
    "by chance": Sampling(temperature=1.0, seed=3),
    "nucleus": Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=5),
}


@VERSIONS
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_generation_with_states_is_generation_without(make: Make, version: int, sampling: str) -> None:
    model = make(version).model
    chosen = SAMPLINGS[sampling]
    kept, anew = (
        [one.token_ids.tolist() for one in model.generate(texts(), max_new_tokens=25, sampling=chosen, cache=cache)]
        for cache in (True, False)
    )
    assert kept == anew
    assert len({tuple(ids) for ids in kept}) > 4, "texts that all go on alike would show little"


@VERSIONS
def test_a_sequence_that_has_ended_does_not_touch_the_others(make: Make, version: int) -> None:
    model = make(version).model
    free = [one.token_ids.tolist() for one in model.generate(texts(), max_new_tokens=20)]
    ended = {token: sum(token in ids for ids in free) for token in chain(*free)}
    stop = next(token for token, count in ended.items() if 1 < count < len(free) - 1)
    stopped = model.generate(texts(), max_new_tokens=20, stops=[stop])
    for ids, one in zip(free, stopped, strict=True):
        assert one.token_ids.tolist() == (ids[: ids.index(stop)] if stop in ids else ids)
        assert one.stopped_by == (stop if stop in ids else None)


@VERSIONS
def test_a_sequence_of_which_nothing_comes_for_a_while_goes_on_where_it_was(make: Make, version: int) -> None:
    model = make(version).model
    rows = [some_ids(24, 1), some_ids(24, 2), some_ids(24, 3)]
    past, seen = model.remember(3, 24), [0, 0, 0]
    found: list[list[Tensor]] = [[], [], []]
    for counts in ([5, 0, 1], [0, 9, 0], [0, 0, 0], [1, 1, 1], [18, 14, 22]):
        width = max(*counts, 1)
        pieces = [row[at : at + n] + [69] * (width - n) for row, at, n in zip(rows, seen, counts, strict=True)]
        with torch.no_grad():
            resid_BTD = model.extend(torch.tensor(pieces), counts, past)
        for row, n in enumerate(counts):
            found[row].append(resid_BTD[row, :n])
            seen[row] += n
    expected = model.forward(rows, HookSpec().capture(f"blocks.{model.spec.n_layers - 1}.hook_resid_post"))
    for row, resid in enumerate(found):
        assert error(torch.cat(resid), next(iter(expected.captures.values()))[row]) <= BOUND, row
