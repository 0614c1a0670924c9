"""The same work gives the same bits: twice in a row, and with one thread or two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

HOOKS = HookSpec().capture("blocks.[0,15,29].hook_resid_post")


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_one_thread_and_two(smollm2: Model, english: Tensor, restore_threads: None) -> None:
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(smollm2.forward(english[:2], HOOKS, logits=False))
    for again in results[1:]:
        for point, value in again.captures.items():
            assert torch.equal(value, results[0][point]), point
