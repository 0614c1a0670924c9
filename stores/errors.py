"""What can go wrong with data at rest: one tree of exceptions whose leaves are also the standard ones they resemble."""

from __future__ import annotations

import difflib
import errno
import itertools
from collections.abc import Iterable

FULL = (errno.ENOSPC, errno.EDQUOT)
"""How a file system says that there is no room, for anyone or for this user."""


_LONGEST, _MOST_CHOICES = 200, 10_000
"""Comparing words takes the product of their lengths."""


class ForebayError(Exception):
    """Any error that forebay raises on purpose; its message names the offender and what to do."""


class CorpusError(ForebayError, ValueError):
    """The text of a corpus is not what it was said to be: missing, broken, or changed since it was counted."""


class SchemaError(ForebayError, ValueError):
    """What a store would hold contradicts itself, or contradicts what a reader asks of it."""


class RecipeError(ForebayError, ValueError):
    """A recipe asks for something that does not exist or cannot be computed."""


class FingerprintMismatch(ForebayError, ValueError):
    """Data made from other settings stands where this recipe's data would go."""


class IncompleteStore(ForebayError, RuntimeError):
    """A store lacks units that the question needs; running its recipe again completes it."""


class CorruptStore(ForebayError, OSError):
    """Bytes at rest do not agree with their recorded checksums or sizes."""


class StoreNotFound(ForebayError, FileNotFoundError):
    """No run or store lies at the path given."""


class StorageError(ForebayError, OSError):
    """An object store does not answer, refuses, or cannot be reached with the settings there are."""


class HubError(ForebayError, OSError):
    """The Hugging Face hub refuses, lacks what was asked for, or cannot be reached."""


class UnsafePath(ForebayError, OSError):
    """A name or a link in a run leads out of the run's folder, and something was to be written or removed there."""


class DiskFull(ForebayError, OSError):
    """The file system has no room for what is to be written."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint to append to an error message: ``" Did you mean 'x'?"``, or ``""`` where no choice resembles `word`."""
    known = list(itertools.islice(choices, _MOST_CHOICES)) if len(word) <= _LONGEST else []
    found = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {found[0]!r}?" if found else ""
