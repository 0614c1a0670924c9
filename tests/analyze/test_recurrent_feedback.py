"""The rhyme experiment writes what recurrence writes one couplet at a time, and judges the last word of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from forebay.stages.analyze.recurrent_feedback import (
    COUPLETS,
    RHYME_FAMILIES,
    Couplet,
    FeedbackCondition,
    feedback_sweep,
    last_word,
    rhyme_conditions,
    rhyme_experiment,
)
from forebay.stages.models.errors import HookError, ModelError
from forebay.stages.models.model import Model
from forebay.stages.models.recurrence import Feedback, Recurrence
from forebay.stores.errors import SchemaError

MINE = (Couplet("a fortune in the neighbourhood,", "man"), Couplet("some", "wife"), Couplet("It is a truth,", "man"))
FAMILIES = {"man": ("man", "can"), "wife": ("wife", "life", "strife")}
NEW = 9


def alone(model: Model, couplet: Couplet, condition: FeedbackCondition | None) -> str:
    """One couplet, by the model's own recurrence with its own feedback; the first line with text of what it wrote."""
    ids = model.tokenizer.to_tokens(couplet.line + "\n")
    recurrence = None
    if condition is not None:
        rows = [model.weights.embed[model.tokenizer.to_tokens(f" {w}")[0, -1]] for w in FAMILIES[couplet.family]]
        mean = torch.stack(rows).mean(0)
        push = Feedback(position=-1, vector=mean / mean.norm(), strength=condition.strength or 0.0)
        recurrence = Recurrence(
            first=condition.first,
            last=condition.last,
            depth=condition.depth,
            feedback=() if condition.strength is None else (push,),
            sustained=condition.sustained,
        )
    (found,) = model.generate(ids, max_new_tokens=NEW, recurrence=recurrence)
    return next((line.strip() for line in str(found.text).split("\n") if line.strip()), "")


CONDITIONS = [
    FeedbackCondition(first=1, last=2),
    FeedbackCondition(first=0, last=1, depth=3),
    FeedbackCondition(first=1, last=2, strength=6.0),
    FeedbackCondition(first=1, last=1, strength=6.0, depth=4),
    FeedbackCondition(first=2, last=2, strength=-3.0, sustained=True),
    FeedbackCondition(first=0, last=2, strength=9.0, depth=1),
]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_every_line_is_what_recurrence_writes_one_couplet_at_a_time(model: Model, batch_size: int) -> None:
    found = feedback_sweep(
        model, CONDITIONS, couplets=MINE, families=FAMILIES, max_new_tokens=NEW, batch_size=batch_size
    )
    for couplet, plain in zip(MINE, found["baseline_line"].values, strict=True):
        assert plain == alone(model, couplet, None)
    for condition, lines in zip(CONDITIONS, found["line"].values, strict=True):
        assert lines.tolist() == [alone(model, couplet, condition) for couplet in MINE]
    assert len(np.unique(found["line"].sel(couplet=1))) >= 4  # the conditions matter
    assert (found["line"][-1] == found["baseline_line"]).all()  # one pass is the plain forward
    assert found["strength"].values[2:5].tolist() == [6, 6, -3]
    assert math.isnan(found["strength"][0])
    assert found["first_line"].values.tolist() == [one.line for one in MINE]


def test_each_couplet_is_ok_rescued_lost_or_neither_and_they_are_counted(model: Model) -> None:
    """Without feedback families do not matter to what is written: here they are made of it."""
    starts = ("a fortune in the neighbourhood", "some", "It is a truth", "of the")
    couplets = [Couplet(start, str(number)) for number, start in enumerate(starts)]
    loop = FeedbackCondition(first=1, last=2)
    unknown = {str(number): ("man",) for number in range(4)}
    written = feedback_sweep(model, [loop], couplets=couplets, families=unknown, max_new_tokens=NEW).isel(condition=0)
    before, after = written["baseline_word"].values, written["word"].values
    assert (before != after).all()
    assert not written["rhymes"].any()
    families = {
        "0": (before[0].upper(), after[0].upper()),
        "1": ("man", after[1]),
        "2": (before[2], "man"),
        "3": ("man", "can"),
    }
    found = rhyme_experiment(model, loop, couplets=couplets, families=families, max_new_tokens=NEW)
    assert found["word"].values.tolist() == after.tolist()
    assert found["result"].values.tolist() == ["OK", "RESCUED", "LOST", "-"]
    assert found["rhymes"].values.tolist() == [True, True, False, False]
    assert found["baseline_rhymes"].values.tolist() == [True, False, True, False]
    ends = [last_word(start) for start in starts]
    assert found["repeats"].values.tolist() == [a == b for a, b in zip(after, ends, strict=True)]
    assert found["baseline_repeats"].values.tolist() == [a == b for a, b in zip(before, ends, strict=True)]
    counted = {name: found[name].item() for name in ("n_rhymes", "n_rescued", "n_lost", "n_baseline_rhymes")}
    assert counted == {"n_rhymes": 2, "n_rescued": 1, "n_lost": 1, "n_baseline_rhymes": 2}
    assert found["n_repeats"] == sum(a == b for a, b in zip(after, ends, strict=True))
    assert found["n_baseline_repeats"] == sum(a == b for a, b in zip(before, ends, strict=True))


def test_the_last_word_of_a_line_is_lower_case_and_without_punctuation_behind_it() -> None:
    lines = ['And all the night!"', "So bright...", "the WORLD", "it's o'clock", "", "  ", "a --", "naïve,"]
    assert [last_word(line) for line in lines] == ["night", "bright", "world", "o'clock", "", "", "", "naïve"]


def test_there_are_fifteen_couplets_whose_families_contain_their_last_words() -> None:
    assert len(COUPLETS) == len(RHYME_FAMILIES) == 15
    for couplet in COUPLETS:
        assert last_word(couplet.line) == couplet.family
        words = RHYME_FAMILIES[couplet.family]
        assert words[0] == couplet.family
        assert len(set(words)) == len(words) >= 6


def test_a_model_of_sixteen_layers_has_the_published_conditions() -> None:
    found = rhyme_conditions(16)
    assert len(found) == 27
    loops = [(one.first, one.last) for one in found if one.strength is None]
    assert loops == [(12, 15), (10, 15), (8, 15), (14, 15)]
    assert [one.strength for one in found if one.first == 10] == [None, 1, 2, 5, 10, 20]
    sustained = [(one.first, one.last, one.strength) for one in found if one.sustained]
    assert sustained == [(14, 15, 0.5), (14, 15, 1), (14, 15, 2)]
    assert all(one.depth == 2 for one in found)
    for n_layers in (1, 2, 3, 30):
        assert all(0 <= one.first <= one.last == n_layers - 1 for one in rhyme_conditions(n_layers))
        assert len(set(rhyme_conditions(n_layers))) == len(rhyme_conditions(n_layers))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"conditions": [FeedbackCondition(first=2, last=3)]}, HookError, "layers 2 to 3 cannot be repeated"),
        ({"conditions": [FeedbackCondition(first=0, last=1, depth=0)]}, HookError, "a recurrence of depth 0"),
        ({"conditions": [FeedbackCondition(first=0, last=1, strength=math.inf)]}, SchemaError, "must be finite"),
        ({"conditions": []}, SchemaError, "nothing to write"),
        ({"couplets": []}, SchemaError, "nothing to write"),
        ({"couplets": [Couplet("a", "wive")]}, SchemaError, "no family of 'wive'. Did you mean 'wife'"),
        ({"batch_size": 0}, SchemaError, "batch_size = 0"),
        ({"max_new_tokens": 0}, SchemaError, "max_new_tokens = 0: at least 1"),
        ({"max_new_tokens": 64}, SchemaError, "64 new tokens .* do not fit into a context of 64"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused_before_anything_is_computed(
    model: Model, given: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    settings = {"conditions": CONDITIONS[:1], "couplets": MINE, "families": FAMILIES, **given}
    with pytest.raises(error, match=message):
        feedback_sweep(model, settings.pop("conditions"), **settings)


def test_a_model_without_a_tokenizer_writes_no_couplets(model: Model) -> None:
    bare = Model(model.spec, model.weights, model.device, model.dtype)
    with pytest.raises(ModelError, match="has no tokenizer"):
        rhyme_experiment(bare, CONDITIONS[0])
