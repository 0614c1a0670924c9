"""Which keys a query may look at, against what the definition says of every pair."""

from __future__ import annotations

import pytest
import torch

import forebay
from forebay.stages.models.errors import ModelError
from forebay.stages.models.masks import causal_mask, visible_keys


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_a_query_sees_itself_and_those_before_it_in_its_window(window: int | None) -> None:
    mask = causal_mask(7, window)
    for query in range(7):
        for key in range(7):
            assert mask[query, key] == (key <= query and (window is None or query - key < window))


def test_tokens_that_follow_others_see_those_too() -> None:
    whole = causal_mask(9, 4)
    assert torch.equal(visible_keys(torch.arange(6, 9), 9, 4), whole[6:])
    assert visible_keys(torch.arange(10).view(2, 5), 10).shape == (2, 5, 10)


def test_a_mask_of_nothing_is_refused() -> None:
    for n, window in ((0, None), (3, 0)):
        with pytest.raises(ModelError, match="both are at least 1"):
            causal_mask(n, window)


def test_the_front_door_has_both() -> None:
    assert forebay.causal_mask is causal_mask
    assert forebay.visible_keys is visible_keys
