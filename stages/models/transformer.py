"""The blocks of a transformer, run over whole sequences or over what follows those that are cached."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .attention import Sight, attention
from .blocks import Blocks, Past, Run
from .cache import KeyValueCache, LayerCache
from .compiling import Compiled, compiled_block, only_around, tapped
from .errors import ModelError
from .masks import visible_keys
from .parts import block, mlp
from .rope import LENGTH_DEPENDENT, Rotation, frequencies_of, rotation
from .rwkv.states import RecurrentStates
from .spec import ModelSpec, RopeSpec
from .taps import Taps
from .weights import BlockWeights


class TransformerBlocks(Blocks):
    """Those of a transformer; rotary frequencies that do not depend on a sequence's length are worked out once."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: tuple[BlockWeights, ...],
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        self._spec, self._weights, self._device, self._dtype = spec, weights, device, dtype
        self._frequencies: dict[RopeSpec, Tensor] = {}
        self._compiled = compiled_block(spec) if compiled else None

    def start(self, lengths: Sequence[int], states: RecurrentStates | None) -> Run:
        if states is not None:
            raise ModelError(f"this model ({self._spec.family}) is not recurrent: it has no states to begin with")
        positions_1T = torch.arange(max(lengths), device=self._device)[None]
        return _Run(self._spec, self._weights, self._sights(positions_1T, lengths), None, self._compiled)

    def past(self, n_sequences: int, n_positions: int) -> Past:
        return KeyValueCache(self._spec, n_sequences, n_positions, self._device, self._dtype)

    def follow(self, past: Past, counts: Sequence[int], n_tokens: int) -> Run:
        assert isinstance(past, KeyValueCache)
        anew = not any(past.lengths)
        positions_BT, n_keys = past.place(counts, n_tokens)
        at, keys = (positions_BT[:1], None) if anew else (positions_BT, n_keys)
        sights = self._sights(at, (n_keys,), keys)
        return _Run(self._spec, self._weights, sights, past.layers)

    def _sights(self, positions_bT: Tensor, lengths: Sequence[int], n_keys: int | None = None) -> tuple[Sight, Sight]:
        """Give the sight of layers that see the whole past, and of those that slide. `n_keys` is given where keys come
        from a cache; otherwise they are those of the same tokens."""
        spec = self._spec
        turns = None if spec.rope is None else self._rotation(spec.rope, positions_bT, lengths)
        local = turns if spec.sliding_rope is None else self._rotation(spec.sliding_rope, positions_bT, lengths)
        reach = positions_bT.shape[1] if n_keys is None else n_keys
        visible = None if n_keys is None else visible_keys(positions_bT, reach)[:, None]
        near = visible
        if spec.window is not None and reach > spec.window:
            near = visible_keys(positions_bT, reach, spec.window)[:, None]
        return Sight(turns, visible), Sight(local, near)

    def _rotation(self, rope: RopeSpec, positions_bT: Tensor, lengths: Sequence[int]) -> Rotation:
        frequencies_be = self._frequencies.get(rope)
        if frequencies_be is None:
            frequencies_be = frequencies_of(rope, self._spec.d_head, lengths).to(self._device)
            if rope.kind not in LENGTH_DEPENDENT:
                self._frequencies[rope] = frequencies_be
        return rotation(frequencies_be, positions_bT, rope.attention_factor, self._dtype)


class _Run(Run):
    def __init__(
        self,
        spec: ModelSpec,
        weights: tuple[BlockWeights, ...],
        sights: tuple[Sight, Sight],
        caches: Sequence[LayerCache] | None,
        compiled: Compiled | None = None,
    ) -> None:
        self._spec, self._weights, self._sights, self._caches = spec, weights, sights, caches
        self._compiled = compiled

    def __call__(self, x_BTD: Tensor, first: int, beyond: int, taps: Taps | None) -> Tensor:
        spec = self._spec
        for layer in range(first, beyond):
            w, at = self._weights[layer], {} if taps is None else taps.blocks[layer]
            sight = self._sights[spec.slides(layer)]
            if self._compiled is not None and only_around(at) and not torch.is_grad_enabled():
                x_BTD = tapped(at, "hook_resid_pre", x_BTD)
                x_BTD = self._compiled(x_BTD, w, sight.rotation, sight.visible)
                x_BTD = tapped(at, "hook_resid_post", x_BTD)
                continue
            cache = None if self._caches is None else self._caches[layer]
            attend = partial(attention, w=w, spec=spec, layer=layer, sight=sight, cache=cache, at=at)
            x_BTD = block(x_BTD, w, spec, at, attend, partial(mlp, w=w, spec=spec, at=at))
        return x_BTD
