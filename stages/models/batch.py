"""Token ids as a forward takes them: one rectangle, checked before anything is computed.

Sequences of different lengths are padded on the right. Under causal attention no position sees one to its right, so
padding needs no mask and changes no value before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import ModelError
from .spec import ModelSpec

TokenIds: TypeAlias = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]
"""Integers [sequence, position], or a list of sequences (lists, tensors or arrays) whose lengths may differ."""

_PADDING = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`token_ids` [sequence, position] int64, of which the first `lengths[i]` of row i are meant."""

    token_ids: Tensor
    lengths: tuple[int, ...]

    def rows(self) -> list[Tensor]:
        """The sequences without padding."""
        return [row[:length] for row, length in zip(self.token_ids, self.lengths, strict=True)]


def make_batch(token_ids: TokenIds, spec: ModelSpec, device: torch.device) -> Batch:
    """Check token ids and lay them out on a device.

    Raises ModelError for an empty batch or sequence, ids that are no integers or lie outside the vocabulary, and
    sequences longer than the context.
    """
    rows = [token_ids] if isinstance(token_ids, Tensor) and token_ids.dim() == 2 else _rows(token_ids)
    if not len(token_ids):
        raise ModelError("the batch is empty: there is no sequence in it")
    for index, row in enumerate(rows):
        _check(row, index, spec)
    if len(rows) == 1 and rows[0].dim() == 2:
        n_rows, n_positions = rows[0].shape
        return Batch(token_ids=rows[0].to(device, torch.int64), lengths=(n_positions,) * n_rows)
    lengths = tuple(len(row) for row in rows)
    padded = torch.full((len(rows), max(lengths)), _PADDING, dtype=torch.int64)
    for row, length, place in zip(rows, lengths, padded, strict=True):
        place[:length] = row
    return Batch(token_ids=padded.to(device), lengths=lengths)


def _rows(token_ids: TokenIds) -> list[Tensor]:
    rows = []
    for index, row in enumerate(token_ids):
        if isinstance(row, int) or (isinstance(row, Tensor) and row.dim() != 1):
            raise ModelError("token ids must be [sequence, position]: for one sequence of ids, write [ids]")
        try:
            rows.append(row if isinstance(row, Tensor) else torch.tensor(row, dtype=None if len(row) else torch.int64))
        except (TypeError, ValueError) as error:
            raise ModelError(f"sequence {index} of the batch is no list of token ids: {error}") from error
    return rows


def _check(row: Tensor, index: int, spec: ModelSpec) -> None:
    where = f"sequence {index} of the batch" if row.dim() == 1 else "the batch"
    if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
        raise ModelError(f"{where} has token ids of dtype {row.dtype}; integers are expected")
    if not row.numel():
        raise ModelError(f"{where} is empty: every sequence needs at least one token")
    if spec.n_ctx is not None and row.shape[-1] > spec.n_ctx:
        raise ModelError(f"{where} has {row.shape[-1]:,} tokens; the context of this model is {spec.n_ctx:,} long")
    low, high = (int(end) for end in row.aminmax())
    if low < 0 or high >= spec.d_vocab:
        raise ModelError(f"{where} has the token id {low if low < 0 else high}; ids go from 0 to {spec.d_vocab - 1}")
