"""The residual stream as the sum of what was written to it: embedding, attention or its heads, MLP or its neurons.

Every block reads the stream and adds to it, so that the stream is a sum of components: Elhage et al. (2021), "A
Mathematical Framework for Transformer Circuits". Where a norm stands between a module and the stream, as in Gemma 2,
its scale is that of the token, frozen: it is then linear, and heads and neurons add up to what the module wrote.

Nothing is decomposed of a forward in which an intervention changed the stream itself, or some layers ran several times:
there it is no such sum.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.forward import Forward
from ..models.model import Model
from ..models.norms import NORMS
from ..models.points import HookPoint
from ..models.reader import Norm
from ..models.spec import ModelSpec
from ..models.unembedding import Unembedding
from .tokens import as_run

Captures: TypeAlias = xr.DataTree | Forward
"""A run, `open_run(path)` or `as_run(forward)`, or a forward as it is."""

AT_ONCE = 2**24
"""Numbers of components that are held at a time: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Component:
    """The labels of one term of the sum; -1 where it has no such number."""

    component: str
    kind: str
    layer: int = -1
    head: int = -1
    neuron: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The components that come of one place: `split` makes them, [component, token, d_model], of the values [token, …]
    that were captured at `points`.
    """

    points: tuple[HookPoint, ...]
    components: tuple[Component, ...]
    split: Callable[..., Tensor]


def accumulated_resid(
    captures: Captures,
    model: Model | Unembedding,
    layer: int | None = None,
    *,
    mid: bool = False,
    select: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """The residual stream as it grows: as it enters block 0 and after each block, with `mid` also between a block's
    attention and MLP. TransformerLens' `accumulated_resid`.

    Arguments are those of `decompose_resid`, as are the dimensions, labels and laziness of the result: components
    `0_pre`, `0_mid`, `0_post`, `1_mid` and so on, of the kinds resid_pre, resid_mid and resid_post. `logit_lens` reads
    it as it is.

    SchemaError where something is not captured: `blocks.*.hook_resid_post`; with `mid`, `hook_resid_mid`, which models
    whose attention and MLP stand side by side do not have; and for the first, `blocks.0.hook_resid_pre` or `hook_embed`
    (with `hook_pos_embed` where there are learned positions).
    """
    spec, beyond = model.spec, beyond_of(model.spec, layer)
    if mid and spec.parallel:
        raise SchemaError(f"attention and MLP of this model ({spec.family}) stand side by side: there is no mid=True")
    held = Held.of(captures, select)
    first = Part((HookPoint("hook_resid_pre", 0),), (Component("0_pre", "resid_pre", 0),), _as_it_is)
    if not held.has(first.points[0]):
        points = tuple(point for part in _embeddings(spec) for point in part.points)
        first = Part(points, first.components, lambda *terms: torch.stack(terms).sum(0)[None])
    written = [
        Part((HookPoint(f"hook_resid_{at}", block),), (Component(f"{block}_{at}", f"resid_{at}", block),), _as_it_is)
        for block in range(beyond)
        for at in ("mid", "post")[not mid :]
    ]
    return _decomposed(held, [first, *written], model, beyond, "the accumulated residual stream")


def decompose_resid(
    captures: Captures,
    model: Model | Unembedding,
    layer: int | None = None,
    *,
    heads: bool = False,
    neurons: Mapping[int, Sequence[int]] | None = None,
    select: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """The residual stream that enters block `layer`, or leaves the last one (None), as the components it is the sum of.

    `captures`: a run or a forward in which was captured `hook_embed`, `hook_pos_embed` where the model has one, and of
    every block below: `hook_attn_out`, or with `heads` `attn.hook_z` (`rwkv.hook_z`); `hook_mlp_out`, or, of layers
    in `neurons`, `mlp.hook_post` (in RWKV-6 also `mlp.hook_receptance`). `neurons` names some of a layer's: each is a
    component, and the rest of that MLP is one, so that d_mlp · d_model numbers are never there. `select` takes labels
    of tokens as `.sel` does: `{"document": 7, "position": slice(0, 9)}`. `model` is that of the captures; an
    `Unembedding`, which has no blocks, serves where neither heads nor neurons are wanted, and leaves the biases in what
    attention and MLP wrote.

    Gives `value[component, token, d_model]`, float32, lazily where the captures are lazy, with the tokens' labels and
    along `component`: its name as in TransformerLens (`embed`, `pos_embed`, `3_attn_out`, `L3H5`, `3_mlp_out`,
    `L3N120`; and `3_attn_bias`, `3_mlp_bias`, `3_mlp_rest`), its `kind` (embed, pos_embed, attn, head, attn_bias,
    mlp, neuron, mlp_rest, mlp_bias), `layer`, `head` and `neuron` (-1 where there is none). Biases of the output of
    attention and MLP are components of their own; those of values are in what the heads wrote. Residual multipliers
    are included, and norms on what a module gives (the biases of such a model need `attn.hook_out`, `mlp.hook_out` in
    the place of `hook_attn_out`, `hook_mlp_out`). Beside it `scale[token]`, by which the model's final norm would
    divide this stream, where it was captured: `ln_final.hook_scale`, or the stream itself, `hook_resid_post` of the
    block before or `hook_resid_pre`. Memory: one chunk of a capture and 64 MiB of heads or neurons a thread.

    SchemaError with the points that must be captured; for a layer or neuron that is not there; for another model's
    captures.
    """
    beyond = beyond_of(model.spec, layer)
    parts = parts_of(model, beyond, heads=heads, neurons=neurons or {})
    return _decomposed(Held.of(captures, select), parts, model, beyond, "the decomposition of the residual stream")


def parts_of(
    model: Model | Unembedding, beyond: int, *, heads: bool, neurons: Mapping[int, Sequence[int]]
) -> list[Part]:
    """What the stream that leaves block `beyond` - 1 is the sum of. SchemaError for neurons that are not there."""
    spec = model.spec
    if isinstance(model, Unembedding) and (heads or neurons):
        raise SchemaError("an unembedding has no weights of heads and neurons: give the model itself, by load_model")
    for layer, some in neurons.items():
        if not 0 <= layer < beyond or not all(0 <= one < spec.d_mlp for one in some) or len(set(some)) < len(some):
            raise SchemaError(
                f"neurons {list(some)} of layer {layer}: each once is expected, of 0 to {spec.d_mlp - 1:,} of layers 0 "
                f"to {beyond - 1}"
            )
    parts = list(_embeddings(spec))
    for layer in range(beyond):
        attention, mlp = modules_of(model, layer)
        parts.append(_by_head(attention, model) if heads and isinstance(model, Model) else _whole(attention))
        chosen = neurons.get(layer)
        parts.append(_by_neuron(mlp, model, chosen) if chosen and isinstance(model, Model) else _whole(mlp))
    return parts


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """Attention or time mixing, "attn", or MLP or channel mixing, "mlp", of a block: what is known of its output."""

    name: str
    layer: int
    spec: ModelSpec
    bias: Tensor | None
    norm: Norm | None

    @property
    def is_biased(self) -> bool:
        return self.bias is not None or (self.norm is not None and self.norm.bias is not None)

    def components(self, *own: Component) -> tuple[Component, ...]:
        bias = Component(f"{self.layer}_{self.name}_bias", f"{self.name}_bias", self.layer)
        return (*own, bias) if self.is_biased else own

    def write(self, raws: Tensor, gate: Tensor | None = None) -> Tensor:
        """What [component, token, d_model] writes to the stream, whose sum, with the bias, is the module's output
        before the gate; that of the bias comes last.
        """
        if self.is_biased:
            own = raws.new_zeros(raws.shape[-1]) if self.bias is None else self.bias.float()
            raws = torch.cat([raws, own.expand(1, *raws.shape[1:])])
        if gate is not None:
            raws = raws * gate
        if self.norm is not None:
            centred, weight = NORMS[self.spec.norm].centre(raws), self.norm.weight
            raws = centred / root_mean_square(centred.sum(0), self.spec)[:, None]
            raws = raws if weight is None else raws * weight
            if self.norm.bias is not None:
                raws[-1] += self.norm.bias
        return raws * self.spec.residual_scale


def modules_of(model: Model | Unembedding, layer: int) -> tuple[Module, Module]:
    """Attention and MLP of a block; nothing is known of their biases and norms where there are no weights."""
    attn: tuple[Tensor | None, Norm | None] = (None, None)
    mlp = attn
    if isinstance(model, Model) and model.spec.rwkv is None:
        block = model.weights.blocks[layer]
        attn, mlp = (block.out_bias, block.ln1_post), (block.down_bias, block.ln2_post)
    elif isinstance(model, Model):
        mixing = model.weights.rwkv_blocks[layer]
        attn, mlp = (None, mixing.ln1_post), (None, mixing.ln2_post)
    return Module("attn", layer, model.spec, *attn), Module("mlp", layer, model.spec, *mlp)


def root_mean_square(centred: Tensor, spec: ModelSpec) -> Tensor:
    """The scale [token] of the model's norms, of a stream [token, d_model] that is centred where they centre."""
    return (centred.square().mean(-1) + spec.norm_eps).sqrt()


def _as_it_is(x: Tensor) -> Tensor:
    return x[None]


def _embeddings(spec: ModelSpec) -> Iterator[Part]:
    for name in ("embed", "pos_embed") if spec.learned_positions else ("embed",):
        yield Part((HookPoint(f"hook_{name}"),), (Component(name, name),), _as_it_is)


def _whole(module: Module) -> Part:
    components = module.components(Component(f"{module.layer}_{module.name}_out", module.name, module.layer))
    added, bias = HookPoint(f"hook_{module.name}_out", module.layer), module.bias
    if not module.is_biased:
        return Part((added,), components, _as_it_is)
    if module.norm is not None or bias is None:
        raw = HookPoint(f"{module.name}.hook_out", module.layer)
        return Part((raw,), components, lambda x: module.write((x if bias is None else x - bias.float())[None]))
    own = bias.float() * module.spec.residual_scale
    return Part((added,), components, lambda x: torch.stack([x - own, own.expand_as(x)]))


def _by_head(module: Module, model: Model) -> Part:
    layer, views = module.layer, model.views
    own = (Component(f"L{layer}H{head}", "head", layer, head=head) for head in range(model.spec.n_heads))

    def split(z: Tensor) -> Tensor:
        return module.write(z.transpose(0, 1) @ views.W_O(layer).float())

    kind = "attn.hook_z" if model.spec.rwkv is None else "rwkv.hook_z"
    return Part((HookPoint(kind, layer),), module.components(*own), split)


def _by_neuron(module: Module, model: Model, chosen: Sequence[int]) -> Part:
    layer, views, some = module.layer, model.views, list(chosen)
    own = [Component(f"L{layer}N{neuron}", "neuron", layer, neuron=neuron) for neuron in some]
    own.append(Component(f"{layer}_mlp_rest", "mlp_rest", layer))

    def split(post: Tensor, gate: Tensor | None = None) -> Tensor:
        W_out = views.W_out(layer).float()
        rest = post.index_fill(1, torch.tensor(some, device=post.device), 0.0)
        return module.write(torch.cat([post[:, some].T[..., None] * W_out[some, None], (rest @ W_out)[None]]), gate)

    return Part(neuron_points(model.spec, layer), module.components(*own), split)


def neuron_points(spec: ModelSpec, layer: int) -> tuple[HookPoint, ...]:
    """What must be captured of an MLP's neurons: their activations, and what their sum is multiplied by in RWKV-6."""
    gated = spec.rwkv is not None and spec.rwkv.version == 6
    return tuple(HookPoint(kind, layer) for kind in ("mlp.hook_post", *["mlp.hook_receptance"] * gated))


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The captures of a run, and of them the tokens that are selected."""

    nodes: Mapping[str, xr.Dataset]

    @classmethod
    def of(cls, captures: Captures, select: Mapping[str, Any] | None) -> Held:
        run = as_run(captures) if isinstance(captures, Forward) else captures
        if "activations" not in run.children:
            raise SchemaError("a run with activations is read here: open_run(path), as_run(forward), or a forward")
        found = {kind: node.to_dataset() for kind, node in run["activations"].children.items() if "token" in node.dims}
        return cls({kind: node.sel(select) for kind, node in found.items()} if select else found)

    def has(self, point: HookPoint) -> bool:
        node = self.nodes.get(point.kind)
        if node is None or point.layer is None:
            return node is not None
        return "layer" in node.dims and point.layer in node["layer"].values

    def require(self, points: Sequence[HookPoint], spec: ModelSpec, what: str) -> None:
        """SchemaError with all that was not captured, or where the sizes are not those of the model."""
        if missing := [point for point in dict.fromkeys(points) if not self.has(point)]:
            hooks, there = ", ".join(_patterns(missing, spec.n_layers)), ", ".join(self.nodes) or "nothing"
            raise SchemaError(f"{what} needs what was not captured: capture also hooks = [{hooks}]. There is: {there}")
        for kind in {point.kind: None for point in points}:
            for dim, size in self.nodes[kind].sizes.items():
                if dim != "layer" and spec.sizes.get(str(dim), size) != size:
                    expected = spec.sizes[str(dim)]
                    raise SchemaError(f"{kind} has {dim} = {size}, and the model has {expected}: another model's?")

    def read(self, point: HookPoint) -> xr.Variable:
        """The values [token, …] at a point."""
        value = self.nodes[point.kind]["value"]
        return value.variable if point.layer is None else value.sel(layer=point.layer).variable

    def labels(self, point: HookPoint) -> xr.Coordinates:
        """The coordinates of the tokens."""
        return self.nodes[point.kind].drop_dims("layer", errors="ignore").coords

    def scale(self, spec: ModelSpec, beyond: int) -> xr.Variable | None:
        """By what the final norm divides the stream that leaves block `beyond` - 1, [token]; None if not captured."""
        last = HookPoint("ln_final.hook_scale")
        if beyond == spec.n_layers and self.has(last):
            return self.read(last).astype(np.float32)
        streams = [HookPoint("hook_resid_post", beyond - 1)] if beyond else []
        streams += [HookPoint("hook_resid_pre", beyond)] if beyond < spec.n_layers else []
        for point in filter(self.has, streams):
            self.require([point], spec, "the scale of the final norm")
            find = Block(lambda x: root_mean_square(NORMS[spec.norm].centre(x), spec), torch.device("cpu"))
            return on_blocks(find, [self.read(point)], [])
        return None


def _patterns(points: Sequence[HookPoint], n_layers: int) -> Iterator[str]:
    layers: dict[str, list[str]] = {}
    for point in points:
        layers.setdefault(point.kind, []).extend([] if point.layer is None else [str(point.layer)])
    for kind, own in layers.items():
        which = "*" if len(own) == n_layers else "[" + ",".join(own) + "]"
        yield f'"blocks.{which}.{kind}"' if own else f'"{kind}"'


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A function of tensors as one of arrays: numbers in float32, integers as they are, on a device."""

    run: Callable[..., Tensor]
    device: torch.device
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __dask_tokenize__(self) -> str:
        return self.token  # dask would pickle the weights to find a name for it

    def __call__(self, *arrays: NDArray[Any]) -> NDArray[np.float32]:
        wide = [np.array(x, dtype=np.float32 if x.dtype.kind == "f" else np.int64) for x in arrays]
        with torch.inference_mode():
            found = self.run(*(torch.from_numpy(x).to(self.device) for x in wide))
            return np.asarray(found.float().cpu().numpy())


def on_blocks(function: Block, values: Sequence[xr.Variable], sizes: Sequence[tuple[str, int]]) -> xr.Variable:
    """Apply to every block of tokens a function of values [token, …] that gives [token, *sizes] in float32."""
    known = {dim for value in values for dim in value.dims}
    new = {dim: size for dim, size in sizes if dim not in known}
    found: xr.Variable = xr.apply_ufunc(
        function,
        *values,
        input_core_dims=[[dim for dim in value.dims if dim != "token"] for value in values],
        output_core_dims=[[dim for dim, _ in sizes]],
        dask="parallelized",
        output_dtypes=[np.float32],
        dask_gufunc_kwargs={"output_sizes": new, "allow_rechunk": True},
    )
    return found


def labelled(components: Sequence[Component]) -> dict[str, tuple[str, NDArray[Any]]]:
    """The coordinates along `component`."""
    columns = {name: [getattr(one, name) for one in components] for name in Component.__slots__}
    dtypes = {"component": object, "kind": object}
    return {name: ("component", np.array(held, dtype=dtypes.get(name, np.int64))) for name, held in columns.items()}


def _decomposed(held: Held, parts: Sequence[Part], model: Model | Unembedding, beyond: int, what: str) -> xr.Dataset:
    spec = model.spec
    held.require([point for part in parts for point in part.points], spec, what)
    device = model.device if isinstance(model, Model) else torch.device("cpu")
    terms = []
    for part in parts:
        values = [held.read(point) for point in part.points]
        n = len(part.components)
        if n > 2:
            values = [_thinner(value, max(1, AT_ONCE // (n * spec.d_model))) for value in values]
        block = Block(lambda *x, split=part.split: split(*x).transpose(0, 1), device)
        terms.append(xr.DataArray(on_blocks(block, values, [("component", n), ("d_model", spec.d_model)])))
    value = xr.concat(terms, "component").transpose("component", "token", "d_model")
    value.attrs = {"long_name": "components of the residual stream", "units": "activation"}
    labels = labelled([one for part in parts for one in part.components])
    found = value.to_dataset(name="value").assign_coords(held.labels(parts[0].points[0])).assign_coords(labels)
    scale = held.scale(spec, beyond)
    if scale is not None:
        found["scale"] = ("token", scale.data, {"long_name": "scale of the final norm", "units": "activation"})
    return found.unify_chunks()


def _thinner(value: xr.Variable, most: int) -> xr.Variable:
    """The same in chunks of at most this many tokens, where it is chunked. None are merged."""
    chunks = value.chunksizes.get("token", ())
    pieces = tuple(min(most, size - at) for size in chunks for at in range(0, max(size, 1), most))
    return value.chunk({"token": pieces}) if chunks else value


def beyond_of(spec: ModelSpec, layer: int | None) -> int:
    if layer is not None and not 0 <= layer <= spec.n_layers:
        raise SchemaError(f"layer {layer}: the stream enters blocks 0 to {spec.n_layers - 1}; None is what leaves them")
    return spec.n_layers if layer is None else layer
