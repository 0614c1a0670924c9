"""Direct logit attribution: how much each component of the residual stream adds to the logit of a token.

With the scale of the final norm frozen at what it is, final norm and unembedding are linear, so that a logit is a sum
over the components that the stream is a sum of: Elhage et al. (2021), "A Mathematical Framework for Transformer
Circuits"; TransformerLens' `logit_attrs`. What is attributed is the logit before the final soft-cap, where a model has
one; logits of candidates keep their order under it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.model import Model
from ..models.norms import NORMS
from ..models.unembedding import Unembedding
from .residual_decomposition import (
    AT_ONCE,
    Block,
    Captures,
    Component,
    Held,
    beyond_of,
    labelled,
    modules_of,
    neuron_points,
    on_blocks,
    parts_of,
    root_mean_square,
)

Tokens: TypeAlias = int | Sequence[int] | xr.DataArray
"""A token of the vocabulary, several, or one for each token of the captures: ids [token], -1 where there is none."""

_SCALE = "the attribution of logits freezes the scale of the final norm, which was not captured: capture also hooks"


def logit_attribution(
    components: xr.Dataset | Captures,
    model: Model | Unembedding,
    tokens: Tokens,
    *,
    against: Tokens | None = None,
    layer: int | None = None,
    heads: bool = False,
    neurons: Mapping[int, Sequence[int]] | None = None,
    select: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """What every component adds to the logit of `tokens`, or to how much it exceeds the logit of `against`.

    `components` is what `decompose_resid` gave, or a selection of it, or a run or forward, which is then decomposed
    as `layer`, `heads`, `neurons` and `select` say; no vectors of components are then kept. At a `layer` the logits are
    those that the logit lens reads there. `tokens` are one id, several, or ids [token] such as `next_tokens(node)`;
    `against` likewise: as many, or one for all. `model` is that of the captures; its `Unembedding` serves as in
    `decompose_resid`.

    Gives `attribution[component, token]` (float32, in units of the logit), for several tokens with a last dimension
    `vocab` whose coordinate holds their ids, and `logit[token]` likewise, their sum. The components are labelled as
    those of `decompose_resid` are, and there are two more, `ln_final_bias` and `unembed_bias`, in models that have
    them: of a whole decomposition they add up to the model's logit before its soft-cap, but for rounding. The scale of
    the final norm is that of the whole stream, and a LayerNorm's centring is applied to each component. NaN where an
    id is -1 and where nothing is recorded. Lazily where the captures are lazy. Memory: one chunk of a capture and 64
    MiB of components a thread.

    SchemaError for what is not captured, the scale included (`decompose_resid` says where it comes from), for tokens
    that are not in the vocabulary, and for settings of a decomposition with one that is made.
    """
    reading, spec = _Reading.of(model, tokens, against), model.spec
    if isinstance(components, xr.Dataset):
        if layer is not None or heads or neurons or select:
            raise SchemaError("layer, heads, neurons and select are told decompose_resid; this is decomposed already")
        return _of_decomposition(components, reading)
    held, beyond = Held.of(components, select), beyond_of(spec, layer)
    parts = parts_of(model, beyond, heads=heads, neurons=neurons or {})
    held.require([point for part in parts for point in part.points], spec, "the attribution of logits")
    scale = held.scale(spec, beyond)
    if scale is None:
        needed = '"ln_final.hook_scale"' if beyond == spec.n_layers else f'"blocks.{beyond}.hook_resid_pre"'
        raise SchemaError(f"{_SCALE} = [{needed}]")
    reading.check(scale)
    terms = []
    for part in parts:
        values = [held.read(point) for point in part.points]
        terms.append(reading.contributions(part.split, values, scale, len(part.components)))
    own = [one for part in parts for one in part.components]
    return _sum(reading, terms, scale, own, held.labels(parts[0].points[0]))


def neuron_attribution(
    captures: Captures,
    model: Model,
    tokens: Tokens,
    *,
    against: Tokens | None = None,
    layers: Sequence[int] | None = None,
    top: int | None = 10,
    select: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """What every neuron of some layers adds to the logit of `tokens`, or to how much it exceeds that of `against`: its
    activation times what the logit reads of its row of W_out. `layers` None: all.

    Arguments as in `logit_attribution`; `mlp.hook_post` of the layers must be captured, and the scale of the final
    norm. Gives the `top` neurons of each layer and token that add or take away most, those first: `neuron[layer, token,
    rank]` (int64, -1 where there is none) and `attribution[layer, token, rank]` (float32); `top=None`: all,
    `attribution[layer, token, d_mlp]`. For several tokens there is a dimension `vocab` before the last. A whole
    decomposition has more terms: `decompose_resid(…, neurons={layer: …})` takes those that this finds. Lazily where
    the captures are lazy. Memory: one chunk of a capture and 64 MiB a thread; vectors of neurons are never made.

    SchemaError as `logit_attribution` raises it.
    """
    reading, spec, held = _Reading.of(model, tokens, against), model.spec, Held.of(captures, select)
    chosen = range(spec.n_layers) if layers is None else list(layers)
    if (absent := [layer for layer in chosen if not 0 <= layer < spec.n_layers]) or not chosen:
        raise SchemaError(f"layers {absent or 'none'}: the layers of this model are 0 to {spec.n_layers - 1}")
    if top is not None and not 1 <= top <= spec.d_mlp:
        raise SchemaError(f"top = {top} neurons are asked for; from 1 to {spec.d_mlp:,} can be told, or None: all")
    points = {layer: neuron_points(spec, layer) for layer in chosen}
    held.require([point for own in points.values() for point in own], spec, "the attribution of logits to neurons")
    scale = held.scale(spec, spec.n_layers)
    if scale is None:
        raise SchemaError(f'{_SCALE} = ["ln_final.hook_scale"]')
    reading.check(scale)
    size = ("d_mlp", spec.d_mlp) if top is None else ("rank", 2 * top)
    terms = []
    for layer in chosen:
        values = [held.read(point) for point in points[layer]]
        terms.append(reading.on_rows(_neurons(model, layer, top), values, scale, [size], reading.n_vocab * spec.d_mlp))
    found = xr.concat(terms, xr.Variable("layer", list(chosen)))
    found = reading.labelled(found.assign_coords(held.labels(points[chosen[0]][0])))
    attrs = {"long_name": "direct contribution of neurons", "units": reading.unit}
    if top is None:
        return found.to_dataset(name="attribution").map(lambda x: x.assign_attrs(attrs))
    number = found.isel(rank=slice(top, None))  # behind the values
    return xr.Dataset(
        {
            "neuron": number.fillna(-1).astype(np.int64).assign_attrs(long_name="neurons", units="number"),
            "attribution": found.isel(rank=slice(top)).assign_attrs(attrs),
        }
    )


def _neurons(model: Model, layer: int, top: int | None) -> Callable[..., Tensor]:
    """What neurons add along directions [token, vocab, d_model], of their activations [token, d_mlp] and what
    multiplies their sum, if anything: all, or the values of the `top` largest and then their numbers.
    """
    spec, (_, mlp) = model.spec, modules_of(model, layer)

    def run(directions: Tensor, post: Tensor, gate: Tensor | None = None) -> Tensor:
        W_out = model.views.W_out(layer).float()
        directions = directions * spec.residual_scale
        if gate is not None:
            directions = directions * gate[:, None]
        if mlp.norm is not None:  # the transpose of what the norm does to a component
            raw = post @ W_out if mlp.bias is None else post @ W_out + mlp.bias.float()
            centre, weight = NORMS[spec.norm].centre, mlp.norm.weight
            directions = centre(directions if weight is None else directions * weight)
            directions = directions / root_mean_square(centre(raw), spec)[:, None, None]
        found = post[:, None] * (directions @ W_out.T)
        if top is None:
            return found
        largest = found.abs().nan_to_num(-1.0).topk(top).indices
        values = found.gather(-1, largest)
        # Numbers of neurons are whole in float32 as well; NaN where there is nothing.
        return torch.cat([values, largest.float().masked_fill(values.isnan(), torch.nan)], -1)

    return run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reading:
    """How logits are read of a stream: of tokens `ids` [vocab], less those `against`; or, where `ids` is None, of a
    token of its own at each token of the captures, `own` (less another).
    """

    unembedding: Unembedding
    ids: Tensor | None
    against: Tensor | None
    own: tuple[xr.Variable, ...]
    is_single: bool
    is_difference: bool

    @classmethod
    def of(cls, model: Model | Unembedding, tokens: Tokens, against: Tokens | None) -> _Reading:
        unembedding = model.unembedding if isinstance(model, Model) else model
        given = [tokens] if against is None else [tokens, against]
        per_token = [one for one in given if isinstance(one, xr.DataArray)]
        for one in given:
            _check_ids(one, unembedding.weight.shape[0])
        settings: dict[str, Any] = {"unembedding": unembedding, "is_difference": against is not None}
        if per_token:
            if not all(isinstance(one, xr.DataArray) or np.ndim(one) == 0 for one in given):
                raise SchemaError("ids [token] go against one id, or against ids [token], not against a list of ids")
            own = (one if isinstance(one, xr.DataArray) else xr.full_like(per_token[0], one) for one in given)
            return cls(ids=None, against=None, own=tuple(one.variable for one in own), is_single=True, **settings)
        ids, *others = (np.atleast_1d(np.asarray(one, dtype=np.int64)) for one in given)
        if others and len(others[0]) not in (1, len(ids)):
            raise SchemaError(f"{len(ids)} tokens are compared with {len(others[0])}: as many are expected, or one")
        wide = [torch.from_numpy(np.broadcast_to(other, ids.shape).copy()) for other in others]
        device = unembedding.weight.device
        return cls(
            ids=torch.from_numpy(ids).to(device),
            against=wide[0].to(device) if wide else None,
            own=(),
            is_single=np.ndim(tokens) == 0,
            **settings,
        )

    @property
    def n_vocab(self) -> int:
        return 1 if self.ids is None else len(self.ids)

    @property
    def unit(self) -> str:
        return "logit difference" if self.is_difference else "logit"

    def check(self, scale: xr.Variable) -> None:
        for one in self.own:
            if one.dims != ("token",) or one.shape != scale.shape:
                raise SchemaError(f"ids are {dict(one.sizes)}, and there are {scale.size:,} tokens: give ids [token]")

    def directions(self, ids: Tensor) -> Tensor:
        """What the logits of tokens [n] read of a stream, times the scale: [n, d_model]."""
        rows, weight, spec = self.unembedding.weight[ids].float(), self.unembedding.norm.weight, self.unembedding.spec
        return NORMS[spec.norm].centre(rows if weight is None else rows * weight) * spec.logit_scale

    @property
    def constants(self) -> tuple[Component, ...]:
        """The components that no module writes."""
        present = {"ln_final_bias": self.unembedding.norm.bias, "unembed_bias": self.unembedding.bias}
        return tuple(Component(name, name) for name, bias in present.items() if bias is not None)

    def constant(self, ids: Tensor) -> Tensor:
        """What they add to the logits of tokens [n]: [n, constant]."""
        unembedding, found = self.unembedding, []
        if unembedding.norm.bias is not None:
            found.append(unembedding.weight[ids].float() @ unembedding.norm.bias.float())
        if unembedding.bias is not None:
            found.append(unembedding.bias[ids].float())
        return torch.stack(found, -1) * unembedding.spec.logit_scale

    def _less(self, read: Callable[[Tensor], Tensor], own: Sequence[Tensor]) -> Tensor:
        """What is read of the tokens, less that of those they are compared with: [token or 1, vocab or 1, …]."""
        if self.ids is not None:
            found = read(self.ids) if self.against is None else read(self.ids) - read(self.against)
            return found[None]
        found = read(own[0].clamp(min=0))
        found = found if len(own) == 1 else found - read(own[1].clamp(min=0))
        absent = torch.stack([one < 0 for one in own]).any(0)
        return found.masked_fill(absent.view(-1, *[1] * (found.dim() - 1)), torch.nan)[:, None]

    def on_rows(
        self,
        run: Callable[..., Tensor],
        values: Sequence[xr.Variable],
        scale: xr.Variable,
        sizes: Sequence[tuple[str, int]],
        width: int,
    ) -> xr.DataArray:
        """Apply `run` to directions [token, vocab, d_model] over the scale, and to values [token, …], some tokens at a
        time, for [token, vocab, *sizes]. `width`: the numbers that are held a token besides.
        """
        n_values, device = len(values), self.unembedding.weight.device
        widest = max(self.unembedding.weight.shape[1], *(size for _, size in sizes))
        step = max(1, AT_ONCE // max(width, self.n_vocab * widest))

        def block(*arrays: Tensor) -> Tensor:
            found = []
            for first in range(0, max(len(arrays[0]), 1), step):
                *xs, scale = (x[first : first + step] for x in arrays[: n_values + 1])
                own = [x[first : first + step] for x in arrays[n_values + 1 :]]
                found.append(run(self._less(self.directions, own) / scale[:, None, None], *xs))
            return torch.cat(found)

        dims = [("vocab", self.n_vocab), *sizes]
        return xr.DataArray(on_blocks(Block(block, device), [*values, scale, *self.own], dims))

    def constant_terms(self, scale: xr.Variable) -> xr.DataArray:
        """What the constants add to the logits: [token, vocab, constant], NaN where nothing is recorded."""

        def block(scale: Tensor, *own: Tensor) -> Tensor:
            return self._less(self.constant, own) + 0 * scale[:, None, None]

        dims = [("vocab", self.n_vocab), ("component", len(self.constants))]
        return xr.DataArray(on_blocks(Block(block, self.unembedding.weight.device), [scale, *self.own], dims))

    def contributions(
        self, split: Callable[..., Tensor], values: Sequence[xr.Variable], scale: xr.Variable, n: int
    ) -> xr.DataArray:
        """What n components add to the logits: [token, vocab, component]."""

        def run(directions: Tensor, *xs: Tensor) -> Tensor:
            return directions @ split(*xs).permute(1, 2, 0)

        return self.on_rows(run, values, scale, [("component", n)], n * self.unembedding.weight.shape[1])

    def labelled(self, found: xr.DataArray) -> xr.DataArray:
        """With the labels of the tokens that are asked for, or, where it is one, without the dimension."""
        if self.ids is None:
            own = self.own[0].data
            return found.isel(vocab=0).assign_coords(attributed_token_id=("token", own))
        coords = {"vocab": self.ids.cpu().numpy()}
        if self.against is not None:
            coords["against_token_id"] = ("vocab", self.against.cpu().numpy())  # type: ignore[assignment]
        found = found.assign_coords(coords)
        return found.isel(vocab=0) if self.is_single else found


def _check_ids(tokens: Tokens, n_vocab: int) -> None:
    least = 0
    if isinstance(tokens, xr.DataArray):
        if tokens.dtype.kind not in "iu":
            raise SchemaError(f"ids [token] are whole numbers, not {tokens.dtype}")
        if tokens.chunks is not None:
            return
        least = -1
    given = np.atleast_1d(np.asarray(tokens))
    if (absent := [one for one in np.unique(given).tolist() if not least <= one < n_vocab]) or not given.size:
        raise SchemaError(f"there is no token {absent or 'given'}: the vocabulary has {n_vocab:,}, numbered from 0")


def _of_decomposition(components: xr.Dataset, reading: _Reading) -> xr.Dataset:
    needed = {"value", "scale", *Component.__slots__}
    if missing := sorted(needed - set(map(str, components.variables))):
        if missing == ["scale"]:
            raise SchemaError(f'{_SCALE} = ["ln_final.hook_scale"], and decompose again')
        raise SchemaError(f"a decomposition that decompose_resid gave is read here; this one lacks {missing}")
    value, scale = components["value"], components["scale"].variable
    if value.dims[0] != "component" or value.sizes["d_model"] != reading.unembedding.weight.shape[1]:
        raise SchemaError(
            f"value[component, token, d_model = {reading.unembedding.weight.shape[1]}] is read here, not "
            f"{dict(value.sizes)}: select components with a list; is the unembedding another model's?"
        )
    reading.check(scale)
    edges = np.cumsum([0, *value.variable.chunksizes.get("component", (value.sizes["component"],))]).tolist()
    terms = []
    for first, beyond in itertools.pairwise(edges):
        some = value.variable.isel(component=slice(first, beyond)).transpose("token", "component", "d_model")
        terms.append(reading.contributions(lambda x: x.transpose(0, 1), [some], scale, beyond - first))
    rows = zip(*(components[name].values.tolist() for name in Component.__slots__), strict=True)
    labels = components.drop_dims(["component", "d_model"]).coords
    return _sum(reading, terms, scale, [Component(*row) for row in rows], labels)


def _sum(
    reading: _Reading,
    terms: Sequence[xr.DataArray],
    scale: xr.Variable,
    components: Sequence[Component],
    labels: xr.Coordinates,
) -> xr.Dataset:
    """The contributions [token, vocab, component], with those of the biases behind them, and their sum."""
    if reading.constants:
        terms = [*terms, reading.constant_terms(scale)]
    found = xr.concat(terms, "component").transpose("component", "token", "vocab").assign_coords(labels)
    found = reading.labelled(found.assign_coords(labelled([*components, *reading.constants])))
    what = "the difference of two logits" if reading.is_difference else "the logit"
    attribution = found.assign_attrs(long_name=f"direct contribution to {what}", units=reading.unit)
    total = found.sum("component", skipna=False).assign_attrs(
        long_name=f"{what} before the soft-cap, of these components", units=reading.unit
    )
    return xr.Dataset({"attribution": attribution, "logit": total}).unify_chunks()
