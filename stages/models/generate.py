"""Generating text: one token after another, with interventions in force or with the past kept in a cache."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .batch import Batch
from .errors import HookError, ModelError
from .recurrence import Recurrence
from .rope import LENGTH_DEPENDENT
from .sampling import Sampling
from .spec import ModelSpec
from .taps import HookSpec

if TYPE_CHECKING:
    from .model import Model

Step: TypeAlias = tuple[int | None, ...]
"""The token that each sequence goes on with; None for those that have ended."""

_Logits: TypeAlias = Generator[Tensor, Step, None]
"""Gives the logits of the next token, [sequence, vocab], and is sent the step that was taken with them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Continuation:
    """What followed one prompt: int64 token ids on the CPU, without the prompt and without the stop token that ended
    it; that token, or None where the number of tokens did; and the text of the ids, None for a model without tokenizer.
    """

    prompt: Tensor
    token_ids: Tensor
    stopped_by: int | None
    text: str | None


def stream(
    model: "Model",
    batch: Batch,
    *,
    max_new_tokens: int,
    hooks: HookSpec,
    sampling: Sampling,
    stops: Sequence[int],
    cache: bool | None,
    recurrence: Recurrence | None,
) -> Iterator[Step]:
    """Give the tokens that continue the sequences of a batch, step by step; arguments are those of `Model.stream`.
    Checks them when it is called, before the first step is asked for."""
    lengths, spec = batch.lengths, model.spec
    sampling.check()
    if max_new_tokens < 1:
        raise ModelError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    beyond = max(lengths) + max_new_tokens
    if spec.n_ctx is not None and beyond > spec.n_ctx:
        raise ModelError(
            f"a prompt of {max(lengths):,} tokens and {max_new_tokens:,} new ones exceed the context of this model, "
            f"{spec.n_ctx:,}"
        )
    if hooks.captures:
        raise HookError(
            "captures of a text that is still being written are not kept: run forward on prompt and continuation"
        )
    if recurrence is not None:
        recurrence.check(spec, lengths)
        recurrence = recurrence.while_generating(lengths)
    changed = bool(hooks.changes) or recurrence is not None
    if cache and changed:
        raise HookError(
            "a cache would keep what interventions at later steps change: leave cache=None, which runs the whole "
            "sequence at every step while interventions are in force"
        )
    if cache and not _keeps(spec, beyond):
        raise ModelError(
            "this model's rotary embedding turns all keys anew in a sequence longer than its original context: leave "
            "cache=None"
        )
    if cache is None:
        cache = not changed and _keeps(spec, beyond)
    logits = _cached(model, batch, max_new_tokens) if cache else _recomputed(model, batch, hooks, recurrence)
    return _choose(logits, len(lengths), max_new_tokens, sampling, frozenset(stops))


def _keeps(spec: ModelSpec, n_positions: int) -> bool:
    """Whether keys in a cache stay right up to a length: some rotary embeddings turn all of them anew beyond one."""
    ropes = [rope for rope in (spec.rope, spec.sliding_rope) if rope is not None]
    return all(rope.kind not in LENGTH_DEPENDENT or n_positions <= rope.original_context for rope in ropes)


def _choose(
    logits: _Logits, n_sequences: int, max_new_tokens: int, sampling: Sampling, stops: frozenset[int]
) -> Iterator[Step]:
    generators = sampling.generators(n_sequences)
    ended = [False] * n_sequences
    following = next(logits)
    for n in range(max_new_tokens):
        ids = sampling.choose(following, generators).tolist()
        step = tuple(None if over else token for token, over in zip(ids, ended, strict=True))
        yield step
        ended = [over or token in stops for token, over in zip(step, ended, strict=True)]
        if all(ended) or n == max_new_tokens - 1:
            return
        following = logits.send(step)


def _recomputed(model: "Model", batch: Batch, hooks: HookSpec, recurrence: Recurrence | None) -> _Logits:
    """Run the whole of every sequence at every step, so that each position can be intervened on at each of them."""
    rows = batch.rows()
    index = torch.arange(len(rows), device=model.device)
    while True:
        out = model.forward(rows, hooks, recurrence=recurrence)
        assert out.logits is not None
        last = torch.tensor(out.lengths, device=model.device) - 1
        step = yield out.logits[index, last]
        rows = [
            row if token is None else torch.cat((row, row.new_tensor([token])))
            for row, token in zip(rows, step, strict=True)
        ]


def _cached(model: "Model", batch: Batch, max_new_tokens: int) -> _Logits:
    """Run the prompts once and then the new tokens alone, on what is remembered of all before them."""
    n_sequences, n_positions = batch.token_ids.shape
    past = model.remember(n_sequences, n_positions + max_new_tokens)
    index = torch.arange(n_sequences, device=model.device)
    with torch.no_grad():
        resid_BTD = model.extend(batch.token_ids, batch.lengths, past)
        resid_BD = resid_BTD[index, torch.tensor(batch.lengths, device=model.device) - 1]
    while True:
        with torch.no_grad():
            logits_BV = model.unembedding.project(model.unembedding.normalize(resid_BD))
        step = yield logits_BV
        # A sequence that has ended goes on in place, unread.
        tokens_B1 = torch.tensor([[0 if token is None else token] for token in step], device=model.device)
        with torch.no_grad():
            resid_BD = model.extend(tokens_B1, [int(token is not None) for token in step], past)[:, -1]
