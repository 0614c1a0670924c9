"""Recurrent feedback: whether running layers again, or pushing what enters them, makes a model plan a rhyme.

A model is given the first line of a couplet and writes the second; does it end in a rhyme? Between two passes of a loop
of layers the direction of the words that rhyme is added at the last token of the line, where a model that plans ahead
would choose its rhyme (Lindsey et al. 2025, "On the Biology of a Large Language Model", planning in poems). Couplets,
families and protocol are candle-mi's.

Only the condition without feedback is real recurrence. With feedback every later pass starts anew from what entered
the loop the first time plus the push, so that what the first pass gave is thrown away: it is, and is run as, a push of
the residual stream before the loop in a plain forward, whatever the depth above 1.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.errors import nearest
from ..models.interventions import Add
from ..models.model import Model
from ..models.points import HookPoint
from ..models.recurrence import Recurrence
from ..models.taps import EMPTY, HookSpec
from .directions import token_direction
from .steering import in_batches


@dataclass(frozen=True, slots=True)
class Couplet:
    """The first line of a couplet, and the family of words that rhyme with it, by its key."""

    line: str
    family: str


COUPLETS: Sequence[Couplet] = (
    Couplet("The moon casts silver light,", "light"),
    Couplet("The children laugh and play,", "play"),
    Couplet("The thunder makes a sound,", "sound"),
    Couplet("The clouds bring heavy rain,", "rain"),
    Couplet("The old clock measures time,", "time"),
    Couplet("The geese fly through the air,", "air"),
    Couplet("The sunset gleams like gold,", "gold"),
    Couplet("The embers feed the fire,", "fire"),
    Couplet("The castle walls of stone,", "stone"),
    Couplet("I wandered through a dream,", "dream"),
    Couplet("The silence felt so strange,", "strange"),
    Couplet("I never knew such love,", "love"),
    Couplet("She spoke the honest truth,", "truth"),
    Couplet("He traveled all the world,", "world"),
    Couplet("The seeds lay in the earth,", "earth"),
)

_FAMILIES = {
    "light": "night bright sight might flight right tight white bite kite quite knight delight blight plight slight "
    "fright height",
    "play": "day way say stay sway ray bay may lay pay gray away display pray stray clay hay decay delay",
    "sound": "ground found round bound around mound pound hound wound profound abound astound",
    "rain": "pain gain main vain plain chain train brain strain remain again drain lane crane bane wane reign feign",
    "time": "rhyme climb crime dime lime mime prime chime sublime paradigm thyme",
    "air": "there fair care bare dare rare share stare where pair aware compare despair prayer hair chair bear wear "
    "spare snare glare",
    "gold": "old bold cold fold hold told sold mold behold unfold rolled controlled",
    "fire": "hire wire desire tire inspire acquire higher entire admire liar dire sire pyre mire conspire expire",
    "stone": "bone tone lone zone throne phone own known blown grown shown moan groan clone drone",
    "dream": "stream seem team beam cream gleam scheme theme extreme esteem scream steam",
    "strange": "change range arrange exchange grange",
    "love": "above dove of shove glove thereof",
    "truth": "youth tooth booth smooth sleuth ruth uncouth",
    "world": "curled unfurled whirled hurled swirled pearled furled twirled",
    "earth": "birth worth mirth berth girth dearth rebirth hearth",
}
RHYME_FAMILIES: Mapping[str, Sequence[str]] = {key: (key, *words.split()) for key, words in _FAMILIES.items()}
"""Words that rhyme with each other, by the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackCondition:
    """Layers `first` to `last`, both included, run `depth` times: with feedback of this `strength`, or, where it is
    None, each pass from what the one before it gave. Feedback stands at the last token of the first line, and with
    `sustained` also at whatever token is the last while text is written: at the first step it counts twice there.
    """

    first: int
    last: int
    strength: float | None = None
    sustained: bool = False
    depth: int = 2

    def __str__(self) -> str:
        if self.strength is None:
            return f"layers {self.first}–{self.last}, {self.depth} passes"
        kept = ", sustained" if self.sustained else ""
        return f"layers {self.first}–{self.last}, feedback {self.strength:g}{kept}"


def rhyme_conditions(n_layers: int) -> list[FeedbackCondition]:
    """candle-mi's 27 conditions, for a model of any depth: loops that begin after 3/4, 5/8, 1/2 and 7/8 of the layers
    (12, 10, 8 and 14 of 16) and go to the last, each without feedback and with a strength of 1, 2, 5, 10 and 20; and
    the last of them sustained, with 0.5, 1 and 2. In a shallow model loops coincide; each is named once."""
    firsts = list(dict.fromkeys(n_layers * eighths // 8 for eighths in (6, 5, 4, 7)))
    strengths = (None, 1.0, 2.0, 5.0, 10.0, 20.0)
    last = n_layers - 1
    plain = [FeedbackCondition(first=first, last=last, strength=one) for first in firsts for one in strengths]
    first = n_layers * 7 // 8
    return plain + [FeedbackCondition(first=first, last=last, strength=one, sustained=True) for one in (0.5, 1.0, 2.0)]


def rhyme_experiment(
    model: Model,
    condition: FeedbackCondition,
    *,
    couplets: Sequence[Couplet] = COUPLETS,
    families: Mapping[str, Sequence[str]] = RHYME_FAMILIES,
    max_new_tokens: int = 30,
    batch_size: int = 32,
) -> xr.Dataset:
    """Have a model write the second line of couplets, plainly and under a condition: what `feedback_sweep` gives of one
    condition, without the dimension `condition`, and `result` [couplet]: `OK` where both lines rhyme, `RESCUED` where
    only the one under the condition does, `LOST` where only the plain one does, `-` where neither does.
    """
    found = feedback_sweep(
        model, [condition], couplets=couplets, families=families, max_new_tokens=max_new_tokens, batch_size=batch_size
    ).isel(condition=0)
    pairs = zip(found["baseline_rhymes"].values, found["rhymes"].values, strict=True)
    return found.assign(result=("couplet", _texts([_RESULTS[bool(before), bool(after)] for before, after in pairs])))


_RESULTS = {(True, True): "OK", (False, True): "RESCUED", (True, False): "LOST", (False, False): "-"}


def feedback_sweep(
    model: Model,
    conditions: Sequence[FeedbackCondition],
    *,
    couplets: Sequence[Couplet] = COUPLETS,
    families: Mapping[str, Sequence[str]] = RHYME_FAMILIES,
    max_new_tokens: int = 30,
    batch_size: int = 32,
) -> xr.Dataset:
    """Have a model write the second line of couplets, plainly and under each of some conditions, greedily.

    The prompt is the first line and a line break. Feedback is the mean embedding, of length 1, of the last tokens of
    the words of the couplet's family (`token_direction`). The second line is the first that holds any text; its word is
    the last between blanks, without punctuation behind it and in lower case; it rhymes where it is in the family, which
    in candle-mi's families the word of the first line is itself: `repeats` says where it came again.

    Gives along `condition` and `couplet`: `line`, `word` (texts), `rhymes` and `repeats` (bool); `n_rhymes`,
    `n_repeats`, `n_rescued` and `n_lost` [condition] (int64), couplets that rhyme, that repeat the word (and so rhyme
    in candle-mi's families), that rhyme now, that no longer do; `baseline_line`, `baseline_word`, `baseline_rhymes`
    and `baseline_repeats` [couplet]; `n_baseline_rhymes` and `n_baseline_repeats`.
    Coordinates: `first_line` and `family` [couplet], which counts from 1; `first_layer`, `last_layer`, `strength` (NaN:
    no feedback), `sustained` and `depth` [condition], whose own are texts.

    While a condition is in force every sequence is run anew for each token, all of a batch in one forward, until its
    second line is written or `max_new_tokens` are. Greedy text is chaotic: a rounding error can change a line.
    Refuses before anything is computed: ModelError for a model without tokenizer, HookError for layers and depths,
    SchemaError for families that are not there and for strengths that are not finite.
    """
    rows = [model.tokenizer.to_tokens(f"{one.line}\n")[0] for one in couplets]
    _check(model, conditions, couplets, families, rows)
    _check_room(model, max(map(len, rows)), max_new_tokens)
    batches = in_batches(range(len(couplets)), batch_size)
    rhymes_with = [[word.lower() for word in families[one.family]] for one in couplets]
    by_family = {one.family: _direction(model, families[one.family]) for one in couplets}
    pushes = torch.stack([by_family[one.family] for one in couplets])

    def written(condition: FeedbackCondition | None) -> tuple[list[str], list[str], list[bool]]:
        lines: list[str] = []
        for some in batches:
            lines += _second_lines(model, [rows[i] for i in some], condition, pushes[list(some)], max_new_tokens)
        words = [last_word(line) for line in lines]
        return lines, words, [word in family for word, family in zip(words, rhymes_with, strict=True)]

    plain = written(None)
    return _labelled(conditions, couplets, plain, [written(condition) for condition in conditions])


def last_word(line: str) -> str:
    """The last word of a line, without ASCII punctuation behind it and in lower case; empty where there is none."""
    words = line.split()
    return words[-1].rstrip(string.punctuation).lower() if words else ""


def _direction(model: Model, words: Sequence[str]) -> Tensor:
    return torch.from_numpy(token_direction(model, words, of="embedding").values)


def _second_lines(
    model: Model, rows: Sequence[Tensor], condition: FeedbackCondition | None, pushes_BD: Tensor, max_new_tokens: int
) -> list[str]:
    """The first line that holds text of what a model writes after each prompt, as far as it is written."""
    if condition is None or condition.depth == 1:
        # Without a cache, as under the other conditions: else rounding might tell their texts apart.
        written = model.generate(rows, max_new_tokens=max_new_tokens, cache=False)
        return [_first_line(model, one.token_ids.tolist())[0] for one in written]
    stops = model.tokenizer.vocabulary.stops
    ids: list[list[int]] = [[] for _ in rows]
    going = list(range(len(rows)))
    for _ in range(max_new_tokens):
        # Everything is run anew for each token: what is finished need not be, so that every step is a new batch.
        hooks, recurrence = _acting(condition, [len(rows[i]) for i in going], pushes_BD[going])
        so_far = [torch.cat((rows[i], rows[i].new_tensor(ids[i]))) for i in going]
        (step,) = model.stream(so_far, max_new_tokens=1, hooks=hooks, recurrence=recurrence, stops=())
        for i, token in zip(tuple(going), step, strict=True):
            ids[i] += [] if token is None or token in stops else [token]
            if token in stops or _first_line(model, ids[i])[1]:
                going.remove(i)
        if not going:
            break
    return [_first_line(model, one)[0] for one in ids]


def _first_line(model: Model, ids: Sequence[int]) -> tuple[str, bool]:
    """The first line that holds text, and whether a line break follows it."""
    line, end, _ = model.tokenizer.to_string(ids, continues=True).lstrip().partition("\n")
    return line.strip(), bool(end)


def _acting(
    condition: FeedbackCondition, prompt_lengths: Sequence[int], pushes_BD: Tensor
) -> tuple[HookSpec, Recurrence | None]:
    """What a condition does to a batch of sequences that begin with prompts: hooks, and layers that are run again."""
    if condition.strength is None:
        return EMPTY, Recurrence(first=condition.first, last=condition.last, depth=condition.depth)
    point, hooks = HookPoint("hook_resid_pre", condition.first), EMPTY
    for number, length in enumerate(prompt_lengths):
        push = Add(pushes_BD[number], scale=condition.strength).at(sequence=number, position=length - 1)
        hooks = hooks.intervene(point, push)
    if condition.sustained:
        hooks = hooks.intervene(point, Add(pushes_BD, scale=condition.strength).at(position=-1))
    return hooks, None


_Written = tuple[list[str], list[str], list[bool]]


def _labelled(
    conditions: Sequence[FeedbackCondition],
    couplets: Sequence[Couplet],
    plain: _Written,
    changed: Sequence[_Written],
) -> xr.Dataset:
    before = np.array(plain[2])
    rhymes = np.array([one[2] for one in changed])
    repeats = np.array([_repeats(couplets, one[1]) for one in changed])
    again = {"long_name": "couplets that repeat the word", "units": "couplets"}
    both = ("condition", "couplet")
    variables = {
        "line": (both, _texts([one[0] for one in changed])),
        "word": (both, _texts([one[1] for one in changed])),
        "rhymes": (both, rhymes),
        "repeats": (both, repeats),
        "n_rhymes": ("condition", rhymes.sum(1), {"long_name": "couplets that rhyme", "units": "couplets"}),
        "n_repeats": ("condition", repeats.sum(1), again),
        "n_rescued": ("condition", (rhymes & ~before).sum(1), {"long_name": "that rhyme now", "units": "couplets"}),
        "n_lost": ("condition", (~rhymes & before).sum(1), {"long_name": "that rhyme no longer", "units": "couplets"}),
        "baseline_line": ("couplet", _texts(plain[0])),
        "baseline_word": ("couplet", _texts(plain[1])),
        "baseline_rhymes": ("couplet", before),
        "baseline_repeats": ("couplet", _repeats(couplets, plain[1])),
        "n_baseline_rhymes": ((), int(before.sum()), {"long_name": "couplets that rhyme plainly", "units": "couplets"}),
        "n_baseline_repeats": ((), int(_repeats(couplets, plain[1]).sum()), again),
    }
    strengths = [math.nan if one.strength is None else one.strength for one in conditions]
    coords = {
        "couplet": np.arange(1, len(couplets) + 1),
        "first_line": ("couplet", _texts([one.line for one in couplets])),
        "family": ("couplet", _texts([one.family for one in couplets])),
        "condition": _texts([str(one) for one in conditions]),
        "first_layer": ("condition", [one.first for one in conditions]),
        "last_layer": ("condition", [one.last for one in conditions]),
        "strength": ("condition", strengths),
        "sustained": ("condition", [one.sustained for one in conditions]),
        "depth": ("condition", [one.depth for one in conditions]),
    }
    return xr.Dataset(variables, coords=coords)


def _repeats(couplets: Sequence[Couplet], words: Sequence[str]) -> NDArray[np.bool_]:
    return np.array([last_word(one.line) == word for one, word in zip(couplets, words, strict=True)])


def _texts(texts: Sequence[str] | Sequence[Sequence[str]]) -> NDArray[np.object_]:
    """As an array of Python's strings, which Zarr keeps as they are."""
    return np.array(texts, dtype=object)


def _check(
    model: Model,
    conditions: Sequence[FeedbackCondition],
    couplets: Sequence[Couplet],
    families: Mapping[str, Sequence[str]],
    rows: Sequence[Tensor],
) -> None:
    if not couplets or not conditions:
        raise SchemaError("there is nothing to write: give couplets and conditions")
    for couplet in couplets:
        if couplet.family not in families:
            raise SchemaError(f"there is no family of {couplet.family!r}.{nearest(couplet.family, families)}")
    for condition in conditions:
        if condition.strength is not None and not math.isfinite(condition.strength):
            raise SchemaError(f"feedback of a strength of {condition.strength} cannot be given: it must be finite")
        loop = Recurrence(first=condition.first, last=condition.last, depth=condition.depth)
        loop.check(model.spec, [len(row) for row in rows])


def _check_room(model: Model, length: int, max_new_tokens: int) -> None:
    n_ctx = model.spec.n_ctx
    if max_new_tokens < 1:
        raise SchemaError(f"max_new_tokens = {max_new_tokens}: at least 1 is written")
    if n_ctx is not None and length + max_new_tokens > n_ctx:
        raise SchemaError(
            f"{max_new_tokens:,} new tokens after prompts of up to {length:,} do not fit into a context of {n_ctx:,}"
        )
