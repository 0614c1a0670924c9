"""What the model side refuses with, and how it suggests what was probably meant."""

import difflib
import itertools
from collections.abc import Iterable

_LONGEST, _MOST_CHOICES = 200, 10_000
"""Comparing words takes the product of their lengths."""


class ModelError(ValueError):
    """A configuration, checkpoint, tokenizer or batch of tokens that cannot be used; the message names the offender."""


class HookError(ValueError):
    """A hook point, pattern or intervention that the model cannot serve; the message says what it can."""


class UnverifiedModelWarning(UserWarning):
    """A model of a kind that forebay does not know was read by analogy, and nobody has compared its numbers yet."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Give `" Did you mean 'x'?"` for the choice most like `word`, or the empty string where none is close."""
    known = list(itertools.islice(choices, _MOST_CHOICES)) if len(word) <= _LONGEST else []
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""
