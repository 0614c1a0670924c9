"""A scheduler, or a function, that must not be called while a result is only described."""

from __future__ import annotations

from typing import Any, NoReturn


def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("something was computed")
