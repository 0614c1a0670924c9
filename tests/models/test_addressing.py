"""Parts of an activation are addressed by the names of its dimensions, as loops over the same indices address them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import HookError
from forebay.stages.models.families import parse_config
from forebay.stages.models.interventions import Add, Apply, Replace, Scale, Zero
from forebay.stages.models.model import Model
from forebay.stages.models.points import BLOCK, HookPoint
from forebay.stages.models.taps import HookSpec

from .conftest import ODD

RAGGED = (40, 13, 1, 26)
POINT = "blocks.1.hook_resid_mid"
PER_TOKEN = ("position", "query", "key")


@pytest.fixture
def ragged(tokens: Tensor) -> list[list[int]]:
    rows = torch.cat((tokens, tokens.flip(0)))
    return [row[:length].tolist() for row, length in zip(rows, RAGGED, strict=False)]


def looped(
    value: Tensor, dims: tuple[str, ...], where: dict[str, Any], lengths: tuple[int, ...], new: Tensor
) -> Tensor:
    """Put `new`, an axis for each index that is no single number, in its place one element at a time."""
    value = value.clone()
    sizes = dict(zip(dims, value.shape, strict=True))
    for row_place, row in numbered(where.get("sequence", slice(None)), sizes["sequence"]):
        own = [lengths[row] if dim in where and dim in PER_TOKEN else sizes[dim] for dim in dims[1:]]
        others = [numbered(where.get(dim, slice(None)), size) for dim, size in zip(dims[1:], own, strict=True)]
        for chosen in itertools.product(*others):
            source = tuple(place for place, _ in ((row_place, row), *chosen) if place is not None)
            value[(row, *(number for _, number in chosen))] = new[source]
    return value


def numbered(index: Any, size: int) -> list[tuple[int | None, int]]:
    """The numbers an index means, each with its place along the axis it leaves; None where it leaves none."""
    if isinstance(index, slice):
        return list(enumerate(range(size)[index]))
    found = numpy.asarray(index)
    if found.ndim == 0:
        return [(None, range(size)[int(found)])]
    return [(place, range(size)[int(number)]) for place, number in enumerate(found)]


def any_index(size: int, rng: random.Random, *, from_start: bool = False) -> Any:
    """An index of any type, valid for this size; with `from_start` no slice counts from the end."""
    count = rng.randint(1, min(size, 4))
    some = [rng.choice((number, number - size)) for number in rng.sample(range(size), count)]
    start = rng.randrange(size)
    stop = rng.randint(start + 1, size)
    slices = [slice(start, stop), slice(None, stop, 2), slice(start, None), slice(None)]
    if not from_start:
        slices += [slice(start - size, None), slice(None, None, -1), slice(stop - 1, None, -2)]
    return rng.choice(
        [
            some[0],
            numpy.int32(some[0]),
            torch.tensor(some[0]),
            some,
            tuple(some),
            numpy.array(some),
            torch.tensor(some),
            range(start, stop),
            rng.choice(slices),
        ]
    )


LLAMA, _ = parse_config({**ODD, "model_type": "llama"}, {}, Path("odd"))
KINDS = tuple(dict.fromkeys(point.kind for point in LLAMA.points()))


@pytest.mark.parametrize("seed", range(60))
def test_any_address_means_what_loops_over_it_mean(seed: int, tiny: Model, tokens: Tensor) -> None:
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    point = HookPoint(kind, 1) if kind in BLOCK else HookPoint(kind)
    plain = tiny.forward(tokens, HookSpec().capture(point), logits=False)[point]
    sizes = dict(zip(point.dims, plain.shape, strict=True))
    where = {dim: any_index(sizes[dim], rng) for dim in rng.sample(point.dims, rng.randint(1, len(point.dims)))}
    compare(tiny, tokens, point, plain, where, (40,) * 3)


@pytest.mark.parametrize("seed", range(60))
def test_in_a_ragged_batch_every_sequence_is_addressed_in_its_own_terms(seed: int, tiny: Model, tokens: Tensor) -> None:
    rng = random.Random(seed)
    lengths = tuple(rng.randint(3, 20) for _ in range(3))
    batch = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    kind = rng.choice(KINDS)
    point = HookPoint(kind, 1) if kind in BLOCK else HookPoint(kind)
    plain = tiny.forward(batch, HookSpec().capture(point), logits=False)[point]
    sizes = dict(zip(point.dims, plain.shape, strict=True))
    others = [dim for dim in point.dims if dim not in (*PER_TOKEN, "sequence")]
    where = {dim: any_index(sizes[dim], rng) for dim in others if rng.random() < 0.5}
    where |= {dim: own_index(min(lengths), rng) for dim in point.dims if dim in PER_TOKEN}
    if rng.random() < 0.5:
        where["sequence"] = any_index(3, rng)
    compare(tiny, batch, point, plain, where, lengths)


def own_index(shortest: int, rng: random.Random) -> Any:
    """An index that means as many positions in every sequence: those from the start or from the end, but not both."""
    index = any_index(shortest, rng, from_start=True)
    if isinstance(index, slice):
        return slice(index.start, index.stop or shortest, index.step)
    numbers = numpy.asarray(index)
    sign = -shortest if rng.random() < 0.7 else 0
    return (numbers % shortest + sign).tolist()


def compare(
    model: Model, batch: Any, point: HookPoint, plain: Tensor, where: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    """Against loops: a part that random numbers replace, or are added to, and what a function is given of it."""
    given: list[Tensor] = []

    def keep(part: Tensor) -> Tensor:
        given.append(part.clone())
        return part

    model.forward(batch, HookSpec().intervene(point, Apply(keep).at(**where)), logits=False)
    new = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    visible = torch.ones(plain.shape, dtype=torch.bool)
    if "query" in point.dims:
        visible = visible.tril()

    def captured(edit: Any) -> Tensor:
        hooks = HookSpec().intervene(point, edit.at(**where)).capture(point)
        return model.forward(batch, hooks, logits=False)[point]

    expected = looped(plain, point.dims, where, lengths, new)
    assert torch.equal(captured(Replace(new)), torch.where(visible, expected, plain))
    assert torch.equal(looped(plain, point.dims, where, lengths, given[0]), plain)
    added = looped(plain, point.dims, where, lengths, given[0] + new)
    assert torch.equal(captured(Add(new)), torch.where(visible, added, plain))


def test_the_last_position_is_each_sequences_own(tiny: Model, ragged: list[list[int]]) -> None:
    """Steering the last position of a ragged batch gives the logits of steering each sequence alone."""
    direction = torch.linspace(-1, 1, 36)
    hooks = HookSpec().intervene("blocks.[0-1].hook_resid_post", Add(direction, scale=2.0).at(position=-1))
    together = tiny.forward(ragged, hooks).logits
    plain = tiny.forward(ragged).logits
    for row, ids in enumerate(ragged):
        alone = tiny.forward([ids], hooks).logits
        assert together is not None
        assert alone is not None
        assert plain is not None
        n = len(ids)
        assert torch.allclose(together[row, :n], alone[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[row, n - 1], plain[row, n - 1], rtol=1e-2, atol=1e-2)
        assert torch.allclose(together[row, : n - 1], plain[row, : n - 1], rtol=1e-4, atol=1e-5)


def test_sequences_that_are_as_long_as_each_other_take_any_slice(tiny: Model, tokens: Tensor) -> None:
    batch = [tokens[0].tolist(), tokens[1, :17].tolist(), tokens[2, :17].tolist()]
    edit = Zero().at(sequence=[1, 2], position=slice(-3, None))
    out = tiny.forward(batch, HookSpec().intervene(POINT, edit).capture(POINT))[POINT]
    zero = (out == 0).all(-1)
    assert zero.nonzero().tolist() == [[row, position] for row in (1, 2) for position in (14, 15, 16)]


def test_a_slice_without_an_end_reaches_the_end_of_every_sequence(tiny: Model, tokens: Tensor) -> None:
    batch = [tokens[0, :9].tolist(), tokens[1, :4].tolist()]
    for start in (None, 2):
        edit = Zero().at(position=slice(start, None))
        out = tiny.forward(batch, HookSpec().intervene(POINT, edit).capture(POINT))[POINT]
        for row, length in enumerate((9, 4)):
            assert (out[row, :length] == 0).all(-1).tolist() == [place >= (start or 0) for place in range(length)]


def test_a_value_for_each_position_of_each_sequence(tiny: Model, ragged: list[list[int]]) -> None:
    """Values follow the order in which sequences and positions are named."""
    values = torch.arange(4.0).reshape(2, 2, 1)
    edit = Replace(values).at(sequence=[3, 1], position=[-1, 0])
    out = tiny.forward(ragged, HookSpec().intervene(POINT, edit).capture(POINT))[POINT]
    assert [float(out[row, place, 7]) for row, place in ((3, 25), (3, 0), (1, 12), (1, 0))] == [0.0, 1.0, 2.0, 3.0]
    assert int((out == out[..., :1]).all(-1).sum()) == 4


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"postion": 3}, r"no dimension 'postion' here, only \[sequence=4, position=40, d_model=36\].*'position'"),
        ({"head": 3}, r"no dimension 'head' here"),
        ({"query": 3}, r"no dimension 'query' here.*Did you mean 'position'"),
        ({"layer": 3}, r"no dimension 'layer' here"),
        ({"d_model": 36}, r"d_model=36 is out of range: the size of d_model is 36, so 0 to 35 or, from the end, -36"),
        ({"d_model": [1, -37]}, r"d_model=-37 is out of range"),
        ({"sequence": 4}, r"sequence=4 is out of range"),
        ({"position": 13}, r"position=13 is out of range in sequence 1, of 13 tokens"),
        ({"position": -2}, r"position=-2 is out of range in sequence 2, of 1 tokens"),
        ({"position": [0, -14], "sequence": [0, 1]}, r"position=-14 is out of range in sequence 1, of 13 tokens"),
        ({"position": slice(-2, None)}, r"counts from the end, .* different lengths: give a number or a list, such as "
         r"position=\[-2, -1\], or run one sequence at a time"),
        ({"position": slice(None, None, -1)}, r"counts from the end"),
        ({"position": slice(13, 20), "sequence": slice(0, 2)}, r"names nothing in sequence 1, of 13 tokens"),
        ({"d_model": slice(36, 40)}, r"names nothing: the size of d_model is 36"),
        ({"d_model": []}, r"d_model=\[\] names nothing"),
        ({"d_model": [3, 5, -33]}, r"d_model=\[3, 5, -33\] names d_model 3 twice"),
        ({"position": [0, -1]}, r"names position 0 twice in sequence 2, of 1 tokens"),
        ({"d_model": 1.0}, r"d_model=1\.0 is no index: a whole number, a slice or a flat list"),
        ({"d_model": True}, r"d_model=True is no index"),
        ({"d_model": [True] * 36}, r"is no index"),
        ({"d_model": numpy.ones(36, dtype=bool)}, r"is no index"),
        ({"d_model": torch.ones(36)}, r"is no index"),
        ({"d_model": [[1, 2]]}, r"is no index"),
        ({"d_model": torch.zeros(1, 1, dtype=torch.int64)}, r"is no index"),
        ({"d_model": "3"}, r"is no index"),
        ({"d_model": None}, r"is no index"),
        ({"d_model": {3}}, r"is no index"),
        ({"d_model": iter([3])}, r"is no index"),
        ({"d_model": slice(0.5)}, r"is no index"),
        ({"d_model": slice(0, 3, 0)}, r"is no index"),
    ],
)  # fmt: skip
def test_what_cannot_be_addressed_is_refused_before_anything_is_computed(
    where: dict[str, Any], message: str, tiny: Model, ragged: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(HookError, match=rf"^Scale at blocks\.1\.hook_resid_mid: .*{message}"):
        tiny.forward(ragged, HookSpec().intervene(POINT, Scale(2.0).at(**where)))


@pytest.mark.parametrize(
    ("kind", "where", "message"),
    [
        ("attn.hook_k", {"head": 3}, r"Did you mean 'kv_head'\? Query head h reads kv_head h // 3\."),
        ("attn.hook_q", {"kv_head": 0}, r"Did you mean 'head'\?$"),
        ("attn.hook_pattern", {"position": 0}, r"Did you mean 'query'"),
        ("attn.hook_pattern", {"key": 13}, r"key=13 is out of range in sequence 1, of 13 tokens"),
        ("ln1.hook_scale", {"d_model": 0}, r"no dimension 'd_model' here, only \[sequence=4, position=40\]"),
    ],
)
def test_a_dimension_of_another_point_is_refused_with_the_one_that_is_meant(
    kind: str, where: dict[str, Any], message: str, tiny: Model, ragged: list[list[int]]
) -> None:
    with pytest.raises(HookError, match=message):
        tiny.forward(ragged, HookSpec().intervene(f"blocks.1.{kind}", Scale(2.0).at(**where)))


def test_an_index_along_positions_must_suit_every_sequence_addressed_and_no_other(
    tiny: Model, ragged: list[list[int]]
) -> None:
    out = tiny.forward(ragged, HookSpec().intervene(POINT, Zero().at(position=20, sequence=[0, 3])).capture(POINT))
    assert (out[POINT] == 0).all(-1).nonzero().tolist() == [[0, 20], [3, 20]]
    with pytest.raises(HookError, match="in sequence 1, of 13 tokens"):
        tiny.forward(ragged, HookSpec().intervene(POINT, Zero().at(position=20, sequence=[0, 1])))
