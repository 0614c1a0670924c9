"""What an intervention did to a model's predictions: two forwards compared token by token, as labelled data.

Definitions are those of candle-mi's results of ablation and steering, token by token and without its cut-off of small
probabilities: divergence from the base, and the tokens whose probabilities changed most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ...stores.errors import SchemaError

if TYPE_CHECKING:
    import torch

    from ..models.batch import TokenIds
    from ..models.model import Model
    from ..models.taps import HookSpec

AT_ONCE = 2**21
"""Logits compared at a time: 16 MiB in float64, of which about eight are in memory together."""

_TOP = ("base_probability", "changed_probability", "probability_change", "logit_difference")


def intervention_effect(
    model: Model, token_ids: TokenIds, hooks: HookSpec, *, baseline: HookSpec | None = None, top: int = 10
) -> xr.Dataset:
    """Run a model without and with `hooks`, and give what `compare_logits` gives of the two.

    `token_ids` are as `Model.forward` takes them. `baseline` are the hooks of the run that is compared with; None: no
    hooks. Captures are not kept. The coordinate `token_id` [sequence, position] holds the tokens that were read, int64,
    and −1 beyond a sequence's end. Memory: the logits of both runs, and what `compare_logits` takes.

    Attention that is intervened on is computed step by step and rounds otherwise than that which is not: give a
    `baseline` that captures the same patterns where differences of 1e-6 in a logit matter.

    Raises as `Model.forward` does, and SchemaError for a `top` that is not between 1 and the size of the vocabulary,
    both before anything is computed.
    """
    _check_top(top, model.spec.d_vocab)
    base = model.forward(token_ids, baseline, sink=lambda point, tensor: None)
    changed = model.forward(token_ids, hooks, sink=lambda point, tensor: None)
    assert base.logits is not None
    assert changed.logits is not None
    effect = compare_logits(base.logits, changed.logits, base.lengths, top=top)
    read = np.full(base.token_ids.shape, -1, dtype=np.int64)
    for row, length in enumerate(base.lengths):
        read[row, :length] = base.token_ids[row, :length].cpu().numpy()
    return effect.assign_coords(token_id=(("sequence", "position"), read))


def compare_logits(base: torch.Tensor, changed: torch.Tensor, lengths: Sequence[int], *, top: int = 10) -> xr.Dataset:
    """Compare the logits [sequence, position, vocab] of two forwards of the same tokens, in sequences of these lengths.

    Gives `kl_divergence` [sequence, position] (float32, nats): KL(base ‖ changed) = Σ p ln(p / q), p and q being the
    softmax of base and changed; 0 for equal logits, infinite where q is 0 and p is not. And, for the `top` tokens of
    the vocabulary whose probability changed most, along `rank`, the largest change first and of equal ones the lower
    id: `top_token_id` (int32), `base_probability`, `changed_probability`, `probability_change` (changed − base) and
    `logit_difference` (base − changed: positive where the logit was lowered), all float32. Beyond a sequence's end, and
    where a logit is NaN, values are NaN and ids −1. The coordinates `sequence` and `position` count from 0.

    Everything is computed in float64 (Apple's GPUs have none: there it is done on the CPU). Memory: about 128 MiB and
    the result, however large the vocabulary. SchemaError for shapes and lengths that do not fit each other, and for a
    `top` that is not between 1 and the vocabulary's size.
    """
    _check(base, changed, lengths)
    _check_top(top, base.shape[-1])
    shape = tuple(base.shape[:2])
    found = {name: np.full((*shape, top), np.nan, dtype=np.float32) for name in _TOP}
    ids = np.full((*shape, top), -1, dtype=np.int32)
    divergence = np.full(shape, np.nan, dtype=np.float32)
    for sequence, positions in _blocks(lengths, base.shape[-1]):
        kl, top_ids, columns = _compare(base[sequence, positions], changed[sequence, positions], top)
        divergence[sequence, positions] = kl.numpy()
        ids[sequence, positions] = top_ids.numpy()
        for name, column in zip(_TOP, columns, strict=True):
            found[name][sequence, positions] = column.numpy()
    along = ("sequence", "position")
    variables = {"top_token_id": ids, **found}
    return xr.Dataset(
        {"kl_divergence": (along, divergence)} | {name: ((*along, "rank"), v) for name, v in variables.items()},
        coords={"sequence": np.arange(shape[0]), "position": np.arange(shape[1])},
    )


def logit_change(
    base: torch.Tensor, changed: torch.Tensor, lengths: Sequence[int], token_id: int | Sequence[int]
) -> xr.DataArray:
    """Give by how much the logit of a token of the vocabulary was lowered, base − changed, float32 [sequence,
    position], NaN beyond a sequence's end. For several tokens there is a last dimension `vocab`, whose coordinate holds
    their ids.

    Arguments are those of `compare_logits`. SchemaError for shapes and lengths that do not fit each other, and for a
    token that is not in the vocabulary.
    """
    _check(base, changed, lengths)
    asked = np.atleast_1d(np.asarray(token_id, dtype=np.int64)).tolist()
    for one in asked:
        if not 0 <= one < base.shape[-1]:
            raise SchemaError(f"there is no token {one}: the vocabulary has {base.shape[-1]:,}, numbered from 0")
    lowered = (base[..., asked].cpu().double() - changed[..., asked].cpu().double()).float().detach().numpy()
    beyond = np.arange(base.shape[1]) >= np.asarray(lengths)[:, None]
    found = xr.DataArray(
        np.where(beyond[..., None], np.float32(np.nan), lowered),
        dims=("sequence", "position", "vocab"),
        coords={"sequence": np.arange(base.shape[0]), "position": np.arange(base.shape[1]), "vocab": asked},
        name="logit_difference",
    )
    return found if np.ndim(token_id) else found.isel(vocab=0, drop=True)


def _blocks(lengths: Sequence[int], n_vocab: int) -> Iterator[tuple[int, slice]]:
    """The tokens of the sequences, some positions at a time."""
    step = max(1, AT_ONCE // n_vocab)
    for sequence, length in enumerate(lengths):
        for first in range(0, length, step):
            yield sequence, slice(first, min(first + step, length))


def _compare(
    base_PV: torch.Tensor, changed_PV: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Divergence [position], and ids and what is told of them [position, rank], on the CPU."""
    import torch

    with torch.inference_mode():
        base_PV, changed_PV = _wide(base_PV), _wide(changed_PV)
        log_p_PV, log_q_PV = base_PV.log_softmax(-1), changed_PV.log_softmax(-1)
        p_PV, q_PV = log_p_PV.exp(), log_q_PV.exp()
        # A probability of 0 adds nothing, though its logarithm is −∞. NaN is none.
        terms_PV = (p_PV * (log_p_PV - log_q_PV)).masked_fill(p_PV == 0, 0)
        kl_P = terms_PV.sum(-1).clamp_min(0)  # which it is, but for rounding
        change_PV = q_PV - p_PV
        ids_PR = _largest(change_PV.abs().nan_to_num(nan=0.0), top)
        told = (p_PV, q_PV, change_PV, base_PV - changed_PV)
        nothing_P1 = change_PV.isnan().any(-1, keepdim=True)
        columns = tuple(x.gather(-1, ids_PR).masked_fill(nothing_P1, torch.nan).float().cpu() for x in told)
        kl_P = kl_P.masked_fill(nothing_P1[:, 0], torch.nan)
        return kl_P.float().cpu(), ids_PR.masked_fill(nothing_P1, -1).int().cpu(), columns


def _largest(size_PV: torch.Tensor, top: int) -> torch.Tensor:
    """Where the largest of each row stand [position, rank], of equal ones the first."""
    least_P1 = size_PV.topk(top).values[:, -1:]
    larger_PV, equal_PV = size_PV > least_P1, size_PV == least_P1
    room_P1 = top - larger_PV.sum(-1, keepdim=True)
    chosen_PV = larger_PV | (equal_PV & (equal_PV.cumsum(-1) <= room_P1))
    ids_PR = chosen_PV.nonzero()[:, 1].view(-1, top)
    return ids_PR.gather(-1, size_PV.gather(-1, ids_PR).argsort(dim=-1, descending=True, stable=True))


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """In float64, which Apple's GPUs do not have."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def _check(base: torch.Tensor, changed: torch.Tensor, lengths: Sequence[int]) -> None:
    if base.dim() != 3 or base.shape != changed.shape:
        raise SchemaError(
            f"logits of the same tokens are compared, [sequence, position, vocab] both: base is {tuple(base.shape)}, "
            f"changed {tuple(changed.shape)}"
        )
    if len(lengths) != base.shape[0] or not all(0 <= length <= base.shape[1] for length in lengths):
        raise SchemaError(
            f"lengths are {list(lengths)}: one a sequence is expected, {base.shape[0]} from 0 to {base.shape[1]}"
        )


def _check_top(top: int, n_vocab: int) -> None:
    if not 1 <= top <= n_vocab:
        raise SchemaError(
            f"top = {top} tokens are asked for; from 1 to {n_vocab:,}, all of the vocabulary, can be told"
        )
