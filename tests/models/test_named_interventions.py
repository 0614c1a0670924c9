"""Replace, Add, Scale, Zero and Apply do at every kind of point what the same edit does to transformers' Llama."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.models.errors import HookError
from forebay.stages.models.families import parse_config
from forebay.stages.models.interventions import Add, Apply, NamedIntervention, Replace, Scale, Zero
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.points import BLOCK, HookPoint
from forebay.stages.models.taps import HookSpec

from .conftest import ODD
from .edited import edited_logits

LLAMA, _ = parse_config({**ODD, "model_type": "llama"}, {}, Path("odd"))
KINDS = tuple(dict.fromkeys(point.kind for point in LLAMA.points()))
EDGES = ("attn.hook_attn_scores", "attn.hook_pattern")
POINT = "blocks.1.hook_resid_mid"

WHERE: dict[str, Any] = {
    "sequence": [2, 0],
    "position": [-1, 5, 21],
    "head": slice(1, None, 2),
    "kv_head": -1,
    "d_model": slice(3, 30),
    "d_head": [7, 0, -2],
    "d_mlp": slice(-20, None),
    "vocab": range(5, 60, 3),
    "query": [30, -1],
    "key": slice(4, 20),
}


def name_of(kind: str, layer: int = 1) -> str:
    return f"blocks.{layer}.{kind}" if kind in BLOCK else kind


def where_of(kind: str) -> dict[str, Any]:
    return {dim: WHERE[dim] for dim in HookPoint.parse(name_of(kind)).dims}


def selected(shape: tuple[int, ...], dims: tuple[str, ...]) -> Tensor:
    """Mark the elements that WHERE means, one by one."""
    mask = torch.zeros(shape, dtype=torch.bool)
    lists = [numpy.arange(size)[WHERE[dim]].reshape(-1) for dim, size in zip(dims, shape, strict=True)]
    for place in itertools.product(*lists):
        mask[place] = True
    return mask


def part_of(whole: Tensor, dims: tuple[str, ...]) -> Tensor:
    """The elements that WHERE means, in its order, an axis for each index that is no single number."""
    array = whole.numpy()
    for axis, dim in reversed(list(enumerate(dims))):
        array = numpy.take(array, numpy.arange(array.shape[axis])[WHERE[dim]], axis=axis)
    return torch.from_numpy(array.copy())


@pytest.fixture
def pair(tiny: Model, random_llama: Callable[..., LlamaForCausalLM]) -> Iterator[tuple[Model, LlamaForCausalLM]]:
    with torch.no_grad():
        yield tiny, random_llama()


def operations(shape: tuple[int, ...], dims: tuple[str, ...]) -> dict[str, tuple[NamedIntervention, Any]]:
    """Interventions, and what each does to a whole activation."""
    whole = torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.1
    part = part_of(whole, dims)
    return {
        "Replace": (Replace(part), lambda value: whole),
        "Add": (Add(part.double().numpy(), scale=-1.5), lambda value: value - 1.5 * whole),
        "Scale": (Scale(part), lambda value: value * whole),
        "Zero": (Zero(), lambda value: torch.zeros_like(value)),
        "Apply": (Apply(lambda value: value.square() / 2), lambda value: value.square() / 2),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_a_part_equals_the_same_edit_of_transformers(
    kind: str, pair: tuple[Model, LlamaForCausalLM], tokens: Tensor, worst_token: Callable[[Tensor, Tensor], float]
) -> None:
    model, reference = pair
    point = HookPoint.parse(name_of(kind))
    plain = model.forward(tokens, HookSpec().capture(point))
    shape = tuple(plain[point].shape)
    chosen = selected(shape, point.dims)
    if kind in EDGES:
        chosen &= torch.ones(shape[-2:], dtype=torch.bool).tril()
    for name, (intervention, operation) in operations(shape, point.dims).items():
        if name == "Zero" and kind.endswith("hook_scale"):
            continue  # refused: a norm divides by its scale
        out = model.forward(tokens, HookSpec().intervene(point, intervention.at(**where_of(kind))).capture(point))
        expected = edited_logits(
            reference, tokens, str(point), lambda value, do=operation: torch.where(chosen, do(value), value)
        )
        assert out.logits is not None
        assert plain.logits is not None
        assert worst_token(out.logits, expected) < 2e-5, name
        assert worst_token(out.logits, plain.logits) > 1e-3, name
        assert torch.equal(out[point][~chosen], plain[point][~chosen]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_activation_can_be_edited(
    kind: str, pair: tuple[Model, LlamaForCausalLM], tokens: Tensor, worst_token: Callable[[Tensor, Tensor], float]
) -> None:
    """By a value that broadcasts along every dimension but the last."""
    model, reference = pair
    size = model.forward(tokens, HookSpec().capture(name_of(kind)), logits=False)[name_of(kind)].shape[-1]
    slope = torch.linspace(0.5, 1.5, size)
    hooks = HookSpec().intervene(name_of(kind), Scale(slope)).intervene(name_of(kind), Add(slope))
    out = model.forward(tokens, hooks)

    def edit(value: Tensor) -> Tensor:
        edited = value * slope + slope
        return edited.tril() if kind == "attn.hook_pattern" else edited

    assert out.logits is not None
    assert worst_token(out.logits, edited_logits(reference, tokens, name_of(kind), edit)) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_replaced_by_itself_changes_no_bit(kind: str, tiny: Model, tokens: Tensor) -> None:
    ragged = [tokens[0].tolist(), tokens[1, :17].tolist(), tokens[2, :1].tolist()]
    for batch in (tokens, ragged):
        plain = tiny.forward(batch, HookSpec().capture(name_of(kind)))
        itself = HookSpec().intervene(name_of(kind), Replace(plain[name_of(kind)])).capture(name_of(kind))
        out = tiny.forward(batch, itself)
        assert torch.equal(out[name_of(kind)], plain[name_of(kind)])
        assert torch.equal(out.logits, plain.logits)  # type: ignore[arg-type]
        numbered = Replace(plain[name_of(kind)].numpy()).at(sequence=range(3))
        out = tiny.forward(batch, HookSpec().intervene(name_of(kind), numbered))
        assert torch.equal(out.logits, plain.logits)  # type: ignore[arg-type]


def test_several_at_one_point_act_in_the_order_of_registration(tiny: Model, tokens: Tensor) -> None:
    plain = tiny.forward(tokens, HookSpec().capture(POINT))[POINT]
    first, second = Scale(2.0).at(position=3), Add(1.0).at(position=[2, 3])
    one = HookSpec().capture(POINT).intervene(POINT, first).intervene(POINT, second)
    other = HookSpec().intervene(POINT, second).intervene(POINT, lambda value, point: -value).intervene(POINT, first)
    expected, turned = plain.clone(), plain.clone()
    expected[:, 3] *= 2
    expected[:, 2:4] += 1
    turned[:, 2:4] += 1
    turned = -turned
    turned[:, 3] *= 2
    assert torch.equal(tiny.forward(tokens, one)[POINT], expected)
    assert torch.equal(tiny.forward(tokens, other.capture(POINT))[POINT], turned)


def test_hooks_are_joined_with_the_interventions_of_the_second_after_those_of_the_first(
    tiny: Model, tokens: Tensor
) -> None:
    first, second = HookSpec().intervene(POINT, Add(1.0)), HookSpec().capture(POINT).intervene(POINT, Scale(3.0))
    plain = tiny.forward(tokens, HookSpec().capture(POINT))[POINT]
    assert torch.equal(tiny.forward(tokens, first.extend(second))[POINT], (plain + 1) * 3)
    assert torch.equal(tiny.forward(tokens, second.extend(first))[POINT], plain * 3 + 1)


@pytest.mark.parametrize("value", [3, 0.1, numpy.float32(0.1), torch.tensor(7, dtype=torch.int16), numpy.arange(36)])
def test_values_are_cast_to_the_dtype_of_the_activation(
    value: Any, random_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, tokens: Tensor
) -> None:
    random_llama().save_pretrained(tmp_path / "half")
    model = load_model(tmp_path / "half", device="cpu", dtype="bfloat16")
    out = model.forward(tokens, HookSpec().intervene(POINT, Replace(value)).capture(POINT))
    expected = torch.as_tensor(value).to(torch.bfloat16).expand_as(out[POINT])
    assert out[POINT].dtype == torch.bfloat16
    assert torch.equal(out[POINT], expected)


def test_an_array_that_cannot_be_written_to_is_taken(tiny: Model, tokens: Tensor) -> None:
    array = numpy.broadcast_to(numpy.arange(36.0)[::-1], (40, 36))
    out = tiny.forward(tokens, HookSpec().intervene(POINT, Replace(array)).capture(POINT))
    assert torch.equal(out[POINT], torch.arange(35.0, -1, -1).expand(3, 40, 36))


def test_an_edit_never_lets_a_query_see_what_the_mask_hides(tiny: Model, tokens: Tensor) -> None:
    """Zero scores make attention uniform over what is visible, and a factor of any sign leaves the mask alone."""
    scores, pattern = (f"blocks.1.{kind}" for kind in EDGES)
    uniform = torch.ones(40, 40).tril() / torch.arange(1, 41)[:, None]
    for edit in (Zero(), Scale(0.0), Replace(torch.full((40, 40), 3.0)), Apply(torch.zeros_like)):
        out = tiny.forward(tokens, HookSpec().intervene(scores, edit).capture(pattern), logits=False)
        assert torch.allclose(out[pattern], uniform.expand_as(out[pattern]))
    plain = tiny.forward(tokens, HookSpec().capture(scores, pattern), logits=False)
    out = tiny.forward(tokens, HookSpec().intervene(scores, Scale(-1)).capture(pattern), logits=False)
    powers = (-plain[scores].tril()).exp().tril()
    assert torch.allclose(out[pattern], powers / powers.sum(-1, keepdim=True), atol=1e-6)
    out = tiny.forward(tokens, HookSpec().intervene(pattern, Add(0.25)).capture(pattern), logits=False)
    assert torch.equal(out[pattern], (plain[pattern] + 0.25).tril())


def test_an_edit_of_scores_does_not_let_padding_in(tiny: Model, tokens: Tensor) -> None:
    hooks = HookSpec().intervene("blocks.*.attn.hook_{attn_scores,pattern}", Replace(0.02))
    together = tiny.forward([tokens[0].tolist(), tokens[1, :13].tolist()], hooks).logits
    alone = tiny.forward(tokens[1:2, :13], hooks).logits
    assert torch.allclose(together[1, :13], alone[0], rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_names_of_the_front_door_are_these() -> None:
    import forebay

    assert (forebay.Replace, forebay.Add, forebay.Scale, forebay.Zero) == (Replace, Add, Scale, Zero)
    assert forebay.Apply is Apply


@pytest.mark.parametrize(
    ("point", "intervention", "message"),
    [
        (POINT, Replace(torch.zeros(37)), r"Replace at blocks\.1\.hook_resid_mid: the value has shape \[d_model=37\], "
         r"which does not broadcast to the part addressed, \[sequence=3, position=40, d_model=36\]"),
        (POINT, Add(torch.zeros(40, 36)).at(position=-1),
         r"shape \[sequence=40, d_model=36\].* part addressed, \[sequence=3, d_model=36\]"),
        (POINT, Replace(numpy.zeros((1, 3, 40, 36))), r"shape \[\?=1, sequence=3, position=40, d_model=36\]"),
        (POINT, Replace(torch.zeros(2, 40, 36)).at(sequence=0), r"part addressed, \[position=40, d_model=36\]"),
        (POINT, Scale(torch.ones(3, 40, 36)).at(d_model=0), r"factor has shape .* \[sequence=3, position=40\]"),
        (POINT, Scale(float("nan")), r"factor must be finite.*nan"),
        (POINT, Scale(numpy.array([1.0, numpy.inf] * 18)), r"factor must be finite"),
        (POINT, Add(1.0, scale=torch.tensor(float("nan"))), r"scale must be finite"),
        (POINT, Scale(None), r"factor is a NoneType that cannot be put in"),
        (POINT, Add("0.5"), r"value is a str that cannot be put in"),
        (POINT, Replace(True), r"value is a bool that cannot be put in \(dtype bool\)"),
        (POINT, Replace(1j), r"value is a complex that cannot be put in"),
        (POINT, Replace(torch.zeros(36, dtype=torch.complex64)), r"dtype torch\.complex64; integers or floating-point"),
        (POINT, Replace(torch.zeros(36, dtype=torch.bool)), r"dtype torch\.bool"),
        (POINT, Replace([[1.0], [1.0, 2.0]]), r"value is a list that cannot be put in"),
        ("ln_final.hook_scale", Zero(), r"a norm divides by its scale, so the value cannot be 0 here"),
        ("blocks.0.ln2.hook_scale", Scale(numpy.arange(40)), r"the factor cannot be 0 here"),
        ("blocks.0.ln1.hook_scale", Replace(torch.zeros(3, 1)), r"the value cannot be 0 here"),
        (POINT, Apply(3), r"function of the part addressed is expected, not int"),
        (POINT, torch.zeros(36), r"intervention at blocks\.1\.hook_resid_mid is a Tensor: a function.*Replace, Add"),
        (POINT, Zero, r"is the class Zero: make one, Zero\(…\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    point: str, intervention: Any, message: str, tiny: Model, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(HookError, match=message):
        tiny.forward(tokens, HookSpec().intervene(point, intervention))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda part: part[0], r"function of Apply at blocks\.1\.hook_resid_mid gave a tensor of shape \(36,\)"),
        (lambda part: part.double(), r"dtype torch\.float64 on cpu; the part it was given, \[sequence=3, d_model=36\]"),
        (lambda part: None, r"gave NoneType; the part"),
    ],
)
def test_a_function_of_a_part_must_give_such_a_part(function: Any, message: str, tiny: Model, tokens: Tensor) -> None:
    with pytest.raises(HookError, match=message):
        tiny.forward(tokens, HookSpec().intervene(POINT, Apply(function).at(position=4)))


def test_making_one_does_nothing_and_addressing_makes_another() -> None:
    value = object()
    plain = Replace(value)  # type: ignore[arg-type]
    narrowed = plain.at(position=[1]).at(head="no head", position=-1)
    assert plain.where == {}
    assert narrowed.where == {"position": -1, "head": "no head"}
    assert narrowed.value is value


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


def loss_of(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits.log_softmax(-1)[torch.tensor([0, 1, 2]), [20, 39, 3], [7, 8, 9]].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_can_be_differentiated_by_whatever_is_captured(
    kind: str, tiny: Model, random_llama: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    """Against the gradient, by transformers' own autograd, of a change of 0 that is added to the same activation."""
    everything = tiny.forward(tokens, HookSpec().capture("*", "blocks.*.attn.hook_result"), gradients=True)
    out = tiny.forward(tokens, HookSpec().capture(name_of(kind)), gradients=True)
    (ours,) = torch.autograd.grad(loss_of(out.logits), out[name_of(kind)])
    nothing = torch.zeros_like(out[name_of(kind)], requires_grad=True)
    loss = loss_of(edited_logits(random_llama(), tokens, name_of(kind), lambda value: value + nothing))
    (expected,) = torch.autograd.grad(loss, nothing)
    assert expected.norm() > 0
    assert (ours - expected).norm() < 2e-5 * expected.norm()
    (among_all,) = torch.autograd.grad(loss_of(everything.logits), everything[name_of(kind)])
    assert (among_all - expected).norm() < 2e-5 * expected.norm()


def test_a_capture_leads_to_later_captures(tiny: Model, tokens: Tensor) -> None:
    names = ["hook_embed", "blocks.0.attn.hook_v", "blocks.1.attn.hook_pattern", "blocks.2.mlp.hook_post"]
    out = tiny.forward(tokens, HookSpec().capture(*names), logits=False, gradients=True)
    for earlier, later in itertools.pairwise(names):
        (gradient,) = torch.autograd.grad(out[later].square().sum(), out[earlier], retain_graph=True)
        assert gradient.norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_to_what_is_put_in_and_past_it(kind: str, tiny: Model, tokens: Tensor) -> None:
    """The gradient of what an edit puts in is that of the activation there, taken at the part that is edited."""
    point = HookPoint.parse(name_of(kind))
    shape = tiny.forward(tokens, HookSpec().capture(point), logits=False)[point].shape
    chosen = selected(tuple(shape), point.dims)
    if kind in EDGES:
        chosen &= torch.ones(shape[-2:], dtype=torch.bool).tril()
    value = torch.rand(part_of(torch.zeros(shape), point.dims).shape, requires_grad=True)
    for edit in (Replace(value), Add(value), Scale(value)):
        hooks = HookSpec().intervene(point, edit.at(**where_of(kind)))
        after = tiny.forward(tokens, hooks.capture(point), gradients=True)
        by_value, at_point = torch.autograd.grad(loss_of(after.logits), [value, after[point]])
        before = tiny.forward(tokens, hooks.capture(point, before=True), gradients=True)
        (past,) = torch.autograd.grad(loss_of(before.logits), before[point])
        whole = torch.zeros_like(at_point)
        arrived = before[point].detach().masked_fill(~chosen, 0.0)
        expected = at_point * arrived if isinstance(edit, Scale) else at_point
        assert torch.allclose(by_value, part_of(torch.where(chosen, expected, 0.0), point.dims), rtol=1e-4, atol=1e-7)
        factors = spread(value.detach(), chosen, point.dims)
        through = {Replace: whole, Add: at_point, Scale: at_point * factors}[type(edit)]
        hidden = torch.zeros_like(chosen) if kind not in EDGES else ~torch.ones(shape[-2:], dtype=torch.bool).tril()
        expected_past = torch.where(chosen, through, at_point).masked_fill(hidden, 0.0)
        assert torch.allclose(past, expected_past, rtol=1e-4, atol=1e-7)


def spread(part: Tensor, chosen: Tensor, dims: tuple[str, ...]) -> Tensor:
    """Put the elements of a part back where they were taken from."""
    index = torch.arange(chosen.numel()).reshape(chosen.shape)
    whole = torch.zeros(chosen.numel(), dtype=part.dtype)
    whole[part_of(index, dims).flatten()] = part.flatten()
    return whole.reshape(chosen.shape)


def test_a_query_that_attends_to_nothing_has_finite_gradients(tiny: Model, tokens: Tensor) -> None:
    hooks = HookSpec().intervene(
        "blocks.1.attn.hook_attn_scores", lambda scores, point: scores.index_fill(2, torch.tensor(9), -torch.inf)
    )
    out = tiny.forward(tokens, hooks.capture("blocks.0.hook_resid_post"), gradients=True)
    (gradient,) = torch.autograd.grad(loss_of(out.logits), out["blocks.0.hook_resid_post"])
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
