"""What one forward gives: logits, captures, and both with labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import HookError, nearest
from .html import html_table
from .points import HookPoint

if TYPE_CHECKING:
    import xarray

    from .rwkv.states import RecurrentStates

_PER_TOKEN = ("position", "query", "key")  # dimensions along which a shorter sequence of the batch ends early


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forward:
    """The result of `Model.forward`.

    `logits` [sequence, position, vocab] in the model's dtype, None where they were not asked for. `lengths` of the
    sequences: beyond them a row holds padding, whose values mean nothing. `captures` by hook point, in firing order,
    in the dtype and on the device of the model; empty where a sink took them. `token_ids` [sequence, position].
    `states` are those of a recurrent model after each sequence's last token, with which its next piece begins; None for
    a transformer, and where the forward ended before its last block. `state_positions` are those after which
    `rwkv.hook_state` is captured, along its dimension of that name, as they were asked for: −1 is the last one.
    """

    logits: Tensor | None
    lengths: tuple[int, ...]
    captures: Mapping[HookPoint, Tensor]
    token_ids: Tensor
    states: "RecurrentStates | None" = None
    state_positions: tuple[int, ...] = (-1,)

    def __getitem__(self, point: str | HookPoint) -> Tensor:
        """Give one capture by name or point; its dimensions are `point.dims`. Raises HookError for one not captured."""
        wanted = HookPoint.parse(point) if isinstance(point, str) else point
        if wanted not in self.captures:
            names = [str(captured) for captured in self.captures]
            raise HookError(
                f"{str(wanted)!r} was not captured in this forward; captured: {', '.join(names) or 'nothing'}."
                f"{nearest(str(wanted), names)}"
            )
        return self.captures[wanted]

    def _ipython_key_completions_(self) -> list[str]:
        return [str(point) for point in self.captures]

    def _repr_html_(self) -> str:
        facts = {
            "sequences": len(self.lengths),
            "tokens": sum(self.lengths),
            "logits": "not asked for" if self.logits is None else list(self.logits.shape),
        }
        rows = [
            (point, ", ".join(point.dims), list(value.shape), str(value.dtype).removeprefix("torch."))
            for point, value in self.captures.items()
        ]
        return html_table("Forward", facts, ("captured", "dimensions", "shape", "dtype") if rows else (), rows)

    def to_dataset(self) -> "xarray.Dataset":
        """Give the captures as an `xarray.Dataset` in memory: one variable a kind of point, named after it.

        Points within blocks have a leading dimension `layer`, whose coordinate holds the layers captured (NaN where a
        kind was captured in some of the dataset's layers only). `token_id` [sequence, position] is −1, and every value
        NaN, beyond the end of a shorter sequence. bfloat16, which numpy does not have, becomes float32.
        """
        import xarray

        kinds: dict[str, dict[int | None, Tensor]] = {}
        for point, tensor in self.captures.items():
            kinds.setdefault(point.kind, {})[point.layer] = tensor
        arrays = {kind: self._labelled(kind, by_layer) for kind, by_layer in kinds.items()}
        n_positions = self.token_ids.shape[1]
        beyond = torch.arange(n_positions) >= torch.tensor(self.lengths)[:, None]
        ids = self.token_ids.cpu().masked_fill(beyond, -1).numpy()
        coords: dict[str, Any] = {
            "sequence": range(len(self.lengths)),
            "position": range(n_positions),
            "token_id": (("sequence", "position"), ids),
        }
        return xarray.Dataset(coords=coords).merge(xarray.merge(arrays.values(), join="outer", compat="no_conflicts"))

    def _labelled(self, kind: str, by_layer: Mapping[int | None, Tensor]) -> "xarray.DataArray":
        import xarray

        dims = HookPoint(kind, next(iter(by_layer))).dims
        layers = [layer for layer in by_layer if layer is not None]
        blanked = [self._blank_padding(tensor.detach().cpu(), dims) for tensor in by_layer.values()]
        coords: dict[str, Any] = {dim: range(self.token_ids.shape[1]) for dim in dims if dim in _PER_TOKEN}
        coords["sequence"] = range(len(self.lengths))
        if "state_position" in dims:
            coords["state_position"] = list(self.state_positions)
        if not layers:
            return xarray.DataArray(blanked[0].numpy(), dims=dims, coords=coords, name=kind)
        coords["layer"] = layers
        return xarray.DataArray(torch.stack(blanked).numpy(), dims=("layer", *dims), coords=coords, name=kind)

    def _blank_padding(self, value: Tensor, dims: tuple[str, ...]) -> Tensor:
        value = value.float() if value.dtype == torch.bfloat16 else value
        if min(self.lengths) == self.token_ids.shape[1]:
            return value
        beyond = torch.arange(self.token_ids.shape[1]) >= torch.tensor(self.lengths)[:, None]
        for axis, dim in enumerate(dims):
            if dim in _PER_TOKEN:
                shape = [1] * len(dims)
                shape[0], shape[axis] = beyond.shape
                value = value.masked_fill(beyond.reshape(shape), torch.nan)
        return value
