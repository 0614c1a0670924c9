"""Text goes on one token at a time: the same tokens with and without a cache, and as transformers continues it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from forebay.stages.models.errors import HookError, ModelError
from forebay.stages.models.interventions import Scale
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.recurrence import Recurrence
from forebay.stages.models.rope import LENGTH_DEPENDENT
from forebay.stages.models.sampling import Sampling
from forebay.stages.models.taps import HookSpec

from .families import ORIGINAL_CONTEXT, build

PROMPTS = [torch.arange(3, 15), torch.arange(40, 43), torch.arange(60, 69)]


def ids(model: Model, prompts: object, **settings: object) -> list[list[int]]:
    return [one.token_ids.tolist() for one in model.generate(prompts, stops=(), **settings)]  # type: ignore[arg-type]


def test_a_cache_gives_the_tokens_of_a_full_recomputation_in_every_family(ours: Model) -> None:
    """Prompts of different lengths, with tokens to come beyond the sliding window and beyond the original context."""
    n = min(ORIGINAL_CONTEXT - len(PROMPTS[-1]) + 1, ours.spec.n_ctx - 12)
    kept = ours.generate(PROMPTS, max_new_tokens=n, stops=())
    again = ours.generate(PROMPTS, max_new_tokens=n, stops=(), cache=False)
    for one, other in zip(kept, again, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert len(one.token_ids) == n


def test_greedy_continuations_are_those_of_transformers(ours: Model, theirs: PreTrainedModel, variant: str) -> None:
    prompt = PROMPTS[0][None]
    expected = prompt
    remembers = ours.spec.rope is not None and ours.spec.rope.kind in LENGTH_DEPENDENT
    with torch.no_grad():
        for _ in range(6):
            model = build(variant) if remembers else theirs  # such rotations of transformers keep what came before
            logits = model(expected, use_cache=False).logits
            expected = torch.cat((expected, logits[:, -1:].argmax(-1)), 1)
    assert ids(ours, prompt, max_new_tokens=6) == expected[:, 12:].tolist()


def test_a_batch_is_continued_as_each_sequence_alone(tiny: Model) -> None:
    for sampling in (Sampling(), Sampling(temperature=1.3, top_k=40, top_p=0.9, seed=5)):
        together = ids(tiny, PROMPTS, max_new_tokens=10, sampling=sampling)
        for index, prompt in enumerate(PROMPTS):
            own = Sampling(**{**_values(sampling), "seed": sampling.seed + index})
            assert ids(tiny, [prompt], max_new_tokens=10, sampling=own) == [together[index]]


def _values(sampling: Sampling) -> dict[str, object]:
    return {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "seed")}


def test_a_stop_token_ends_one_sequence_and_not_the_others(tiny: Model) -> None:
    free = ids(tiny, PROMPTS, max_new_tokens=8)
    stop = free[1][2]
    assert stop not in free[0][:5]
    out = tiny.generate(PROMPTS, max_new_tokens=8, stops=[stop])
    assert out[1].stopped_by == stop
    assert out[1].token_ids.tolist() == free[1][: free[1].index(stop)]
    for one, whole in zip(out, free, strict=True):
        end = whole.index(stop) if stop in whole else 8
        assert one.token_ids.tolist() == whole[:end]
    steps = list(tiny.stream(PROMPTS, max_new_tokens=8, stops=[stop]))
    assert [step[1] for step in steps][: free[1].index(stop) + 1] == free[1][: free[1].index(stop) + 1]
    assert all(step[1] is None for step in steps[free[1].index(stop) + 1 :])


def test_a_text_that_ends_at_once_has_no_tokens(tiny: Model) -> None:
    (first,) = ids(tiny, PROMPTS[:1], max_new_tokens=1)
    (out,) = tiny.generate(PROMPTS[:1], stops=first)
    assert out.stopped_by == first[0]
    assert out.token_ids.dtype == torch.int64
    assert out.token_ids.shape == (0,)


def test_the_stream_gives_tokens_as_they_come(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = tiny.stream(PROMPTS, max_new_tokens=4, stops=())
    first = next(steps)
    monkeypatch.setattr(Model, "extend", None)  # nothing more can be computed
    assert [row[0] for row in ids_before(tiny, first)] == list(first)
    with pytest.raises(TypeError):
        next(steps)


def ids_before(model: Model, first: tuple[int | None, ...]) -> list[list[int | None]]:
    out = model.forward(PROMPTS)
    assert out.logits is not None
    return [[int(row[length - 1].argmax())] for row, length in zip(out.logits, out.lengths, strict=True)]


def test_interventions_are_in_force_at_every_step(tiny: Model) -> None:
    hooks = HookSpec().intervene("blocks.1.hook_mlp_out", Scale(-3.0).at(position=-1))
    sequence = PROMPTS[0]
    expected: list[int] = []
    for _ in range(6):
        logits = tiny.forward(sequence[None], hooks).logits
        assert logits is not None
        expected.append(int(logits[0, -1].argmax()))
        sequence = torch.cat((sequence, torch.tensor(expected[-1:])))
    assert ids(tiny, [PROMPTS[0]], max_new_tokens=6, hooks=hooks) == [expected]
    assert expected != ids(tiny, [PROMPTS[0]], max_new_tokens=6)[0]


def test_without_interventions_each_step_runs_one_token(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    extend = Model.extend

    def noting(self: Model, token_ids: Tensor, *rest: object) -> Tensor:
        widths.append(token_ids.shape[1])
        return extend(self, token_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "extend", noting)
    tiny.generate(PROMPTS, max_new_tokens=5, stops=())
    assert widths == [12, 1, 1, 1, 1]
    tiny.generate(PROMPTS, max_new_tokens=5, stops=(), recurrence=Recurrence(first=1, last=1))
    assert len(widths) == 5


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_new_tokens": 53}, ModelError, "12 tokens and 53 new ones exceed the context of this model, 64"),
        ({"max_new_tokens": 0}, ModelError, "max_new_tokens must be 1 or more, not 0"),
        ({"sampling": Sampling(temperature=-1.0)}, ModelError, "temperature must be 0 or more"),
        ({"sampling": Sampling(temperature=float("nan"))}, ModelError, "temperature must be 0 or more"),
        ({"sampling": Sampling(top_k=4)}, ModelError, "which a temperature of 0 excludes"),
        ({"sampling": Sampling(temperature=1.0, top_k=0)}, ModelError, "top_k must be 1 or more"),
        ({"sampling": Sampling(temperature=1.0, top_p=1.5)}, ModelError, r"top_p must lie in \(0, 1\]"),
        ({"hooks": HookSpec().capture("hook_embed")}, HookError, "captures of a text that is still being written"),
        (
            {"hooks": HookSpec().intervene("hook_embed", Scale(2.0)), "cache": True},
            HookError,
            "a cache would keep what interventions at later steps change",
        ),
        ({"recurrence": Recurrence(first=2, last=3)}, HookError, "layers 2 to 3 cannot be repeated"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_computed(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(error, match=message):
        tiny.stream(PROMPTS, **settings)  # type: ignore[arg-type]


def test_texts_go_in_and_come_out(tiny_model: Path) -> None:
    model = load_model(tiny_model, device="cpu")
    out = model.generate(["It is a truth", "My dear"], max_new_tokens=6, stops=())
    for one, prompt in zip(out, ("It is a truth", "My dear"), strict=True):
        assert model.tokenizer.to_string(one.prompt) == prompt
        assert one.text == model.tokenizer.to_string(one.token_ids, continues=True)
        assert model.tokenizer.to_string(torch.cat((one.prompt, one.token_ids))) == prompt + one.text
        assert len(one.token_ids) == 6


def test_a_real_model_speaks_english(smollm2: Model) -> None:
    (paris,) = smollm2.generate("The capital of France is", max_new_tokens=3)
    assert paris.text is not None
    assert paris.text.startswith(" Paris")
