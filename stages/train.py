"""Provisional."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Training:
    hook: str
    n_feature: int
