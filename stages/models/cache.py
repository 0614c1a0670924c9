"""Keys and values of the positions that a model has seen, so that the next token needs no recomputation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Past
from .spec import ModelSpec


@dataclass(slots=True, eq=False)
class LayerCache:
    """Keys, after rotation, and values of one layer: [sequence, position, kv_head, d_head], filled as the model runs.

    `positions_BT` says where the tokens of the next call belong, `n_keys` how far the longest sequence then reaches.
    """

    keys: Tensor
    values: Tensor
    positions_BT: Tensor
    n_keys: int = 0

    def extend(self, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Put in the keys and values of the tokens at hand, give those of all positions so far [B, S, K, E]."""
        rows_B1 = torch.arange(len(k_BTKE), device=k_BTKE.device)[:, None]
        self.keys[rows_B1, self.positions_BT] = k_BTKE
        self.values[rows_B1, self.positions_BT] = v_BTKE
        return self.keys[:, : self.n_keys], self.values[:, : self.n_keys]


class KeyValueCache(Past):
    """The caches of all layers for a batch of sequences, with room for `n_positions` of each.

    Memory: 2 · layers · sequences · n_positions · kv heads · d_head numbers in the model's dtype (`cache_bytes`).
    Sequences of different lengths each go on at their own position: what lay there as padding is overwritten.
    """

    def __init__(
        self, spec: ModelSpec, n_sequences: int, n_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(n_sequences)
        shape = (spec.n_layers, n_sequences, n_positions, spec.n_kv_heads, spec.d_head)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        nowhere = torch.empty(0, dtype=torch.int64, device=device)
        self.layers = [LayerCache(k, v, nowhere) for k, v in zip(keys, values, strict=True)]
        self._device = device

    def place(self, counts: Sequence[int], n_tokens: int) -> tuple[Tensor, int]:
        """Say that `n_tokens` tokens follow in every sequence, of which the first `counts[i]` of sequence i are no
        padding. Gives their positions [sequence, token] and the number of keys that any of them can see."""
        positions_BT, n_keys = self.positions(n_tokens, self._device), max(self.lengths) + n_tokens
        for layer in self.layers:
            layer.positions_BT, layer.n_keys = positions_BT, n_keys
        self.lengths = [seen + count for seen, count in zip(self.lengths, counts, strict=True)]
        return positions_BT, n_keys


def cache_bytes(spec: ModelSpec, n_sequences: int, n_positions: int, dtype: torch.dtype) -> int:
    """Bytes that a `KeyValueCache` takes."""
    return 2 * spec.n_layers * n_sequences * n_positions * spec.n_kv_heads * spec.d_head * dtype.itemsize
