"""How a public name or an argument is renamed: the old spelling works for two minor versions, and warns.

The one thing that the model side has in common with the rest: it needs the standard library only.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

KEPT = 2
"""Minor versions for which an old spelling works."""


class ForebayDeprecationWarning(FutureWarning):
    """An old spelling of something public that will go. Shown by default; the message says what to write instead."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """An old spelling of something public: `what` it is ("forebay.old", "the argument `old` of forebay.f"), what to
    write `instead`, and `since` which version it warns, "0.3". ValueError for a version that does not read so.
    """

    what: str
    instead: str
    since: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+\.\d+", self.since):
            raise ValueError(f"{self.what} is deprecated since {self.since!r}: a version as '0.3' is expected")
        known.append(self)

    @property
    def gone(self) -> str:
        """The version without the old spelling: two minor ones later."""
        major, minor = self.since.split(".")
        return f"{major}.{int(minor) + KEPT}"

    def outlives(self, version: str) -> bool:
        """Whether a version, such as "0.4.0" or "0.5.0.dev1", should be without the old spelling."""
        major, minor = (int(part) for part in self.gone.split("."))
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None:
            raise ValueError(f"{version!r} is no version: one as '0.4.0' is expected")
        return (int(found[1]), int(found[2])) >= (major, minor)

    def warn(self, stacklevel: int = 2) -> None:
        """Warns at the line that is `stacklevel` calls above, 1 being the caller of this."""
        message = f"{self.what} is deprecated since forebay {self.since} and goes in {self.gone}: write {self.instead}"
        warnings.warn(message, ForebayDeprecationWarning, stacklevel=stacklevel + 1)


known: list[Renamed] = []
"""Every old spelling that works, as far as its module is imported."""


def renamed_argument(old: str, new: str, *, since: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Lets a function or method take the argument `new` by the keyword `old`, too, which warns.

    The signature shows `new` alone. TypeError at a call that gives both.
    """

    def renamed(function: Callable[P, T]) -> Callable[P, T]:
        name = f"{function.__module__}.{function.__qualname__}"
        said = Renamed(f"the argument {old!r} of {name}", repr(new), since)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{name} was given {new!r} and, by its old name {old!r}, the same again")
                said.warn()
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return called

    return renamed
