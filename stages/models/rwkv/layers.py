"""The blocks of RWKV, run over whole sequences, over the next piece of them, or token by token."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..blocks import Blocks, Past, Run
from ..parts import block
from ..spec import ModelSpec
from ..taps import At, Taps
from .mixing import Stretch, channel_mix, time_mix
from .states import LayerState, RecurrentStates
from .weights import RwkvBlockWeights


class RwkvBlocks(Blocks):
    """Those of RWKV-6 or RWKV-7."""

    def __init__(
        self, spec: ModelSpec, weights: tuple[RwkvBlockWeights, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._spec, self._weights, self._device, self._dtype = spec, weights, device, dtype

    def start(self, lengths: Sequence[int], states: RecurrentStates | None) -> Run:
        if states is None:
            states = RecurrentStates.zero(self._spec, len(lengths), self._device, self._dtype)
        states.check(self._spec, len(lengths), self._dtype)
        return _Run(self._spec, self._weights, states, self._stretch(lengths, max(lengths)))

    def past(self, n_sequences: int, n_positions: int) -> Past:
        return StatesSoFar(RecurrentStates.zero(self._spec, n_sequences, self._device, self._dtype))

    def follow(self, past: Past, counts: Sequence[int], n_tokens: int) -> Run:
        assert isinstance(past, StatesSoFar)
        past.lengths = [seen + count for seen, count in zip(past.lengths, counts, strict=True)]
        return _Run(self._spec, self._weights, past.states, self._stretch(counts, n_tokens), past)

    def _stretch(self, counts: Sequence[int], n_tokens: int) -> Stretch:
        counts_B = torch.tensor(counts, device=self._device)
        if min(counts) == n_tokens:
            return Stretch(counts_B, None)
        return Stretch(counts_B, torch.arange(n_tokens, device=self._device) < counts_B[:, None])


class StatesSoFar(Past):
    """The states after the tokens that were seen last. Takes the same memory however many they are."""

    def __init__(self, states: RecurrentStates) -> None:
        super().__init__(states.n_sequences)
        self.states = states


class _Run(Run):
    """Every layer begins with the states that were there before the run, however often it is run."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: tuple[RwkvBlockWeights, ...],
        before: RecurrentStates,
        stretch: Stretch,
        past: StatesSoFar | None = None,
    ) -> None:
        self._spec, self._weights, self._before, self._stretch, self._past = spec, weights, before, stretch, past
        self._after: dict[int, LayerState] = {}

    def __call__(self, x_BTD: Tensor, first: int, beyond: int, taps: Taps | None) -> Tensor:
        for layer in range(first, beyond):
            x_BTD = self._layer(x_BTD, layer, {} if taps is None else taps.blocks[layer])
        if self._past is not None and self.states is not None:
            self._past.states = self.states
        return x_BTD

    @property
    def states(self) -> RecurrentStates | None:
        n_layers = self._spec.n_layers
        return (
            RecurrentStates(tuple(map(self._after.__getitem__, range(n_layers))))
            if len(self._after) == n_layers
            else None
        )

    def _layer(self, x_BTD: Tensor, layer: int, at: At) -> Tensor:
        w, spec, stretch = self._weights[layer], self._spec, self._stretch
        before = after = self._before.layers[layer]

        def mix_time(normed_BTD: Tensor) -> Tensor:
            nonlocal after
            out_BTD, wkv_BHKV, in_BD = time_mix(normed_BTD, w.time, spec, layer, before, stretch, at)
            after = replace(after, wkv=wkv_BHKV, time_shift=in_BD)
            return out_BTD

        def mix_channels(normed_BTD: Tensor) -> Tensor:
            nonlocal after
            out_BTD, in_BD = channel_mix(normed_BTD, w.channel, spec, before.channel_shift, stretch, at)
            after = replace(after, channel_shift=in_BD)
            return out_BTD

        x_BTD = block(x_BTD, w, spec, at, mix_time, mix_channels)
        self._after[layer] = after
        return x_BTD
