"""The same work gives the same bits again, and the same numbers with any number of threads.

The bits may depend on the number of threads: a matrix library may split a long sum between threads when there are few
rows (MKL does, below some 256 rows, unless MKL_CBWR=AVX512,STRICT or COMPATIBLE is set).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

HOOKS = HookSpec().capture("blocks.[0,15,29].hook_resid_post")


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_again(smollm2: Model, english: Tensor) -> None:
    first, again = (smollm2.forward(english[:2], HOOKS, logits=False) for _ in range(2))
    for point, value in first.captures.items():
        assert torch.equal(value, again[point]), point


def test_one_thread_and_two(smollm2: Model, english: Tensor, worst_token: Callable[[Tensor, Tensor], float]) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(smollm2.forward(english[:1], HOOKS, logits=False))
    for point, value in results[0].captures.items():
        assert worst_token(value, results[1][point]) < 1e-5, point
