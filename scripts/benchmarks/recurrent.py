"""RWKV: its recurrence and its tokenizer."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from forebay.stages.models.memory import keep_freed_memory
from forebay.stages.models.rwkv.wkv import Wkv, chunked, step_by_step
from forebay.stages.models.world import load_world_tokenizer

from .forwards import NOVELS
from .measuring import Measurement, Settings, Tables, compare, timed

TOKENS = 512
"""In the sequence that RWKV's recurrence is run over."""
Form = Callable[[Wkv, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def recurrence(settings: Settings, folder: Path) -> Tables:
    """The recurrence of both versions, with few heads and with many."""
    return {
        f"recurrence {version}, {n_heads} heads": compare(
            settings, recurrences(version, n_heads, settings.device), TOKENS
        )
        for version, n_heads in itertools.product((6, 7), (4, 12))
    }


def tokenizer(settings: Settings, folder: Path) -> Tables:
    """The World tokenizer beside that of its authors."""
    variants, n_token = world_tokenizers()
    return {"tokenizer": compare(settings, variants, n_token)}


def recurrences(version: int, n_heads: int, device: str) -> dict[str, Measurement]:
    """RWKV's recurrence over one sequence, heads of 64 channels, with decays such as its models have, in a process
    that keeps freed memory, as one does that has loaded a model."""
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    r, k, v, w, removal, rate = torch.randn(6, 1, TOKENS, n_heads, 64, generator=generator).to(device)
    state = torch.zeros(1, n_heads, 64, 64, device=device)
    if version == 6:
        driven = Wkv(r=r, k=k, v=v, log_decay=-(w - 3).exp())
    else:
        removal = torch.nn.functional.normalize(removal, dim=-1)
        log_decay = -math.exp(-0.5) * w.sigmoid()
        driven = Wkv(r=r, k=k, v=v, log_decay=log_decay, removal=removal, rate=rate.sigmoid())
    forms: dict[str, Form] = {"step by step": step_by_step, "in chunks": chunked}
    return {
        f"RWKV-{version}, {n_heads} heads, {name}": functools.partial(run, form, driven, state)
        for name, form in forms.items()
    }


def run(form: Form, driven: Wkv, state: torch.Tensor) -> float:
    """Seconds of one run of the recurrence."""
    with torch.no_grad():
        return timed(lambda: form(driven, state), state.device)


def world_tokenizers() -> tuple[dict[str, Measurement], int]:
    """The World tokenizer of the package `rwkv`, and forebay's, over the novels; and how many tokens those are."""
    from rwkv import rwkv_tokenizer

    texts = [json.loads(line)["text"] for line in NOVELS.read_text(encoding="utf-8").splitlines()]
    ours = load_world_tokenizer()
    theirs = rwkv_tokenizer.TRIE_TOKENIZER(str(Path(rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")))

    def seconds(encode: Callable[[bytes], list[int]]) -> float:
        return timed(lambda: [encode(text.encode()) for text in texts])

    n_token = sum(len(ours.encode_bytes(text.encode())) for text in texts)
    return {
        "World tokenizer of the package rwkv": lambda: seconds(theirs.encodeBytes),
        "forebay's": lambda: seconds(ours.encode_bytes),
    }, n_token
