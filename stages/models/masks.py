"""Which keys a query may look at."""

import torch
from torch import Tensor

from .errors import ModelError


def visible_keys(positions: Tensor, n_keys: int, window: int | None = None) -> Tensor:
    """Which of the keys at positions 0 to n_keys − 1 a query may look at: itself and those before it, of these the last
    `window`. Boolean [..., query, key] for queries at `positions` [..., query].
    """
    distance = positions[..., None] - torch.arange(n_keys, device=positions.device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def causal_mask(n_positions: int, window: int | None = None, *, device: torch.device | str = "cpu") -> Tensor:
    """The mask of a whole sequence, boolean [query, key]: True where a key may be looked at.

    Tokens that follow others see those too: `visible_keys(torch.arange(start, start + new), start + new)`. ModelError
    for no positions, and for a window below 1.
    """
    if n_positions < 1 or (window is not None and window < 1):
        raise ModelError(f"a mask of {n_positions} positions and a window of {window}: both are at least 1")
    return visible_keys(torch.arange(n_positions, device=device), n_positions, window)
