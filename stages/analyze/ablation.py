"""Ablation: what a prediction loses when activations are replaced by nothing, by their mean, or by those of other text.

Mean ablation as in Wang et al. (2022), "Interpretability in the Wild"; resample ablation as in Chan et al. (2022),
"Causal Scrubbing". Both take what they put in from a store: the reference is a corpus, not a few prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ...stores.fingerprint import sha256_file
from ..models.errors import HookError, nearest
from ..models.interventions import Replace
from ..models.model import Model
from ..models.points import BLOCK, HookPoint, dims_of
from .metrics import Metric
from .patching import Pairs, Sites, Variant, check_metric, pair_coords, run_variants, sites_of
from .prompts import Prompts, many_prompts
from .statistics import mean_by
from .tokens import counted, label, needs, vectors

Ablation: TypeAlias = Literal["zero", "mean", "resample"]
Nodes: TypeAlias = "xr.DataTree | xr.Dataset"
"""Activations of one kind of hook point, or the tree `run["activations"]` of several."""

SAID: Mapping[str, str] = {"zero": "set to 0", "mean": "set to its mean", "resample": "taken from random tokens"}
SWEPT = ("layer", "head", "position")
"""What can be ablated one by one."""
TRIES = 16
"""How often as many tokens are drawn as are needed before all that count are listed."""

_TOKENS = ("sequence", "position")
_HEADS = ("head", "kv_head")


def ablation_effect(
    model: Model,
    prompts: Prompts,
    hooks: Sequence[str],
    *,
    metric: Metric,
    kind: Ablation = "zero",
    from_: Nodes | None = None,
    where: xr.DataArray | None = None,
    by: Sequence[str] = ("layer",),
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    per_position: bool = False,
    skip_positions: int = 1,
    draws: int = 1,
    seed: int | None = None,
    batch_size: int = 32,
) -> xr.Dataset:
    """Ablate activations at some kinds of hook points, one place a run, and give the metric of every run.

    `prompts`: texts or token ids; `metric` has a token of its own for each, or one for all. `hooks` are kinds such as
    `hook_mlp_out` or `attn.hook_z`. `by` says what is ablated one by one: any of `layer`, `head` and `position`; what
    it leaves out is ablated together. `layers` None means all. `positions` (negative ones count from the end) None
    means all from `skip_positions` on, for what is put in the place of the first one, which all later ones attend to,
    breaks everything else.

    `kind` is what is put in: "zero" needs no store. "mean" is that over the tokens of the store that count: those from
    `skip_positions` on, of recorded units, without NaN, where `where` (boolean [token]) is true; with `per_position`
    the mean over those at the same position of their sequences. "resample" draws `draws` random tokens of the same for
    every position of every prompt, with `seed`; layers and heads of a run take them from the same tokens. `from_` is
    a node such as `open_run(path)["activations/attn.hook_z"]`, or the tree of several, `open_run(path)["activations"]`.

    Gives, float32 in the units of the metric, one variable a kind, along `sequence`, `draw` (when resampling) and what
    `by` names as far as the kind has it (`kv_head` for keys and values): the metric of the ablated run, NaN beyond a
    prompt's end and at positions that are not ablated. `baseline` [sequence]: that of the run as it is. Coordinates
    `token_id` and `token_text` [sequence, position] where positions are swept; `drawn_token` [draw, sequence, position]
    (int64, −1 where nothing was drawn) numbers the tokens drawn, as they stand in `from_`.

    A mean reads the store once, a chunk a thread; one opened with `chunks=None` whole. Resampling reads the rows drawn:
    those alone of a store opened with `chunks=None`, the whole chunks that they lie in of a dask array. Memory: what is
    put in at every point, draw and position, and a forward of `batch_size` sequences whose logits exist at one position
    only.

    Refused before anything is read or computed: SchemaError for a store that is none, lacks a layer or is another
    model's (by the name it records, or the hashes of its weights where the names differ; by its widths where it records
    none), a missing `seed`, and as `activation_patching` does; HookError for kinds and layers that the model does not
    have, for kinds that are not laid out by token, and for heads that a kind does not have. And before the model runs:
    SchemaError for a store in which no token counts.
    """
    batch = many_prompts(model, prompts)
    pairs = Pairs(clean=batch, corrupted=batch)
    sites = sites_of(model, pairs, hooks, layers=layers, positions=positions, by_position=True)
    task = _Task(model=model, pairs=pairs, sites=sites, by=tuple(by), skip_positions=skip_positions)
    task.check()
    check_metric(model, metric, batch.lengths)
    _check_settings(kind, from_, seed, draws, batch_size)
    nodes = {} if kind == "zero" else {name: _node(from_, name, sites, model) for name in sites.kinds}
    values, drawn = {name: torch.zeros(()) for name in sites.kinds}, None
    if kind == "mean":
        needed = np.asarray(task.ablated().any(0)) if per_position else None
        values = {name: _mean(node, where, skip_positions, name, needed) for name, node in nodes.items()}
    elif kind == "resample":
        drawn = _drawn(nodes, where, task, draws, seed)
        values = {name: _rows(node, drawn) for name, node in nodes.items()}
    n_draws = 1 if drawn is None else draws
    found = {name: task.run(name, values[name], n_draws, metric, batch_size) for name in sites.kinds}
    rows = enumerate(batch.rows())
    baseline = [float(run_variants(model, row, [()], metric, prompt=number)) for number, row in rows]
    return _labelled(task, metric, kind, found, baseline, drawn, seed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Task:
    """Which places of which prompts are ablated, and how they are gone through. `pairs` are prompts with themselves."""

    model: Model
    pairs: Pairs
    sites: Sites
    by: tuple[str, ...]
    skip_positions: int

    def check(self) -> None:
        """SchemaError and HookError for what cannot be swept."""
        if self.skip_positions < 0:
            raise SchemaError(f"skip_positions = {self.skip_positions}: at least 0")
        for dim in self.by:
            if dim not in SWEPT:
                raise SchemaError(
                    f"by = {list(self.by)}: {', '.join(SWEPT)} can be swept, not {dim!r}.{nearest(dim, SWEPT)}"
                )
        for kind in self.sites.kinds:
            dims = dims_of(kind)
            if dims[:2] != _TOKENS:
                raise HookError(f"{kind} is laid out [{', '.join(dims)}] and not by token: cut its edges with Knockout")
            if "head" in self.by and not set(_HEADS) & set(dims):
                raise HookError(f"{kind} has no heads, only [{', '.join(dims)}]; attn.hook_z has")
        for number, length in enumerate(self.pairs.lengths):
            if not self.places(length):
                raise SchemaError(
                    f"prompt {number} has {length} tokens, of which the first {self.skip_positions} are left alone: "
                    f"nothing would be ablated. Give a longer one, or skip_positions=0"
                )

    def dims(self, kind: str) -> tuple[str, ...]:
        """What is ablated one by one of a kind."""
        return tuple(dim for dim in self.sites.dims(kind) if dim in self.by or ("head" in self.by and dim == "kv_head"))

    def places(self, length: int) -> tuple[int, ...]:
        """The positions that are ablated of a prompt of this length, counted from 0, in the order of the result."""
        return tuple(range(self.skip_positions, length)) if self.sites.positions is None else self.sites.at(length)

    def ablated(self) -> NDArray[np.bool_]:
        """Whether a position is ablated, [sequence, position]."""
        lengths = self.pairs.lengths
        return np.array([[n in self.places(length) for n in range(max(lengths))] for length in lengths])

    def run(self, kind: str, values: Tensor, n_draws: int, metric: Metric, batch_size: int) -> NDArray[np.float32]:
        """The metric of every ablated run [sequence, draw, …]; `values` are as `_variants` says, but for sizes of 1."""
        longest, dims = max(self.pairs.lengths), self.dims(kind)
        points = [point for point in self.sites.points() if point.kind == kind]
        widths = [self.model.spec.sizes[dim] for dim in points[0].dims[2:]]
        values = values.expand(len(points), n_draws, len(self.pairs), longest, *widths)
        places = self.sites.places(kind, self.model, longest)
        shown = np.full((len(self.pairs), n_draws, *(len(places[dim]) for dim in dims)), np.nan, np.float32)
        for number, row in enumerate(self.pairs.clean.rows()):
            at = self.places(len(row))
            variants = _variants(points, dims, at, values[:, :, number])
            found = run_variants(self.model, row, variants, metric, prompt=number, batch_size=batch_size).numpy()
            if "position" not in dims:
                shown[number] = found.reshape(shown[number].shape)
                continue
            # Without positions asked for, the result has those that are left alone too.
            columns = at if self.sites.positions is None else range(len(at))
            shown[number][..., list(columns)] = found.reshape(*shown[number].shape[:-1], len(at))
        return shown


def _variants(
    points: Sequence[HookPoint], dims: tuple[str, ...], places: tuple[int, ...], values: Tensor
) -> Iterator[Variant]:
    """The runs of one prompt, draw by draw, in the order of `dims`; values [layer, draw, position, …] are put in."""
    by_head = next((dim for dim in dims if dim in _HEADS), None)
    layers = [[n] for n in range(len(points))] if "layer" in dims else [list(range(len(points)))]
    heads = [None] if by_head is None else list(range(values.shape[3]))
    positions: list[Any] = list(places) if "position" in dims else [list(places)]
    for draw, together, head, at in itertools.product(range(values.shape[1]), layers, heads, positions):
        put: list[tuple[HookPoint, Replace]] = []
        for layer in together:
            rows = values[layer, draw, at]  # of a head the first dimension behind the position's
            if by_head is None or head is None:
                put.append((points[layer], Replace(rows).at(position=at)))
            else:
                part = rows.select(0 if isinstance(at, int) else 1, head)
                put.append((points[layer], Replace(part).at(**{"position": at, by_head: head})))
        yield put


def _check_settings(kind: str, from_: Nodes | None, seed: int | None, draws: int, batch_size: int) -> None:
    if kind not in SAID:
        raise SchemaError(f"kind = {kind!r}: {', '.join(SAID)} are the kinds of ablation.{nearest(kind, SAID)}")
    if kind != "zero" and from_ is None:
        raise SchemaError(f'{kind} ablation takes values from a store: give from_=open_run(path)["activations"]')
    if kind == "resample" and seed is None:
        raise SchemaError("resample ablation draws random tokens: give a seed=…")
    if draws < 1 or batch_size < 1:
        raise SchemaError(f"draws = {draws} and batch_size = {batch_size}: at least 1")


# ── what is put in ───────────────────────────────────────────────────────────────────────────────────────────────────


def _node(from_: Nodes | None, kind: str, sites: Sites, model: Model) -> xr.Dataset:
    """The activations of a kind, checked: `value[layer, token, …]` of the layers asked for, in their order."""
    node = _named(from_, kind, sites)
    value = vectors(node, "ablation")
    point = HookPoint(kind, 0 if kind in BLOCK else None)
    expected = {dim: model.spec.sizes[dim] for dim in point.dims[2:]}
    held = {str(dim): size for dim, size in value.sizes.items() if dim not in ("layer", "token")}
    if held != expected:
        raise SchemaError(f"{kind} of this model is {expected} a token; the store holds {held}: that is another model")
    _check_model(node, kind, model)
    if kind not in BLOCK:
        return node.assign(value=value.expand_dims("layer").transpose("layer", "token", *expected))
    needs(node, ["layer"], "ablation")
    layers = np.atleast_1d(node["layer"].values).tolist()
    if missing := [layer for layer in sites.layers if layer not in layers]:
        raise SchemaError(f"the store holds {kind} of layers {layers}, and layers {missing} are to be ablated")
    chosen = node if "layer" in value.dims else node.expand_dims("layer")
    chosen = chosen.isel(layer=[layers.index(layer) for layer in sites.layers])
    return chosen.assign(value=chosen["value"].transpose("layer", "token", *expected))


def _named(from_: Nodes | None, kind: str, sites: Sites) -> xr.Dataset:
    """The node of a kind, out of a tree that may hold several."""
    if isinstance(from_, xr.DataTree) and "value" not in from_.data_vars:
        tree = from_["activations"] if "activations" in from_.children else from_
        if kind not in tree.children:
            held = ", ".join(tree.children) or "nothing"
            raise SchemaError(f"there is no {kind} in the store, which holds {held}.{nearest(kind, tree.children)}")
        return tree.children[kind].to_dataset()
    if len(sites.kinds) > 1:
        raise SchemaError(f'values of {", ".join(sites.kinds)} are needed: give from_=open_run(path)["activations"]')
    assert from_ is not None
    if not isinstance(from_, xr.DataTree):
        return from_
    if from_.name in BLOCK and from_.name != kind:
        raise SchemaError(f"the node given holds {from_.name}, and {kind} is to be ablated")
    return from_.to_dataset()


def _check_model(node: xr.Dataset, kind: str, model: Model) -> None:
    """SchemaError where the store says that it holds another model's activations, or another kind's."""
    said, determines = node.attrs.get("model"), node.attrs.get("determines", {})
    held = {path.rpartition("/")[0] for path in determines.get("schema", {}).get("arrays", {})}
    if held and kind not in held:
        raise SchemaError(f"the store holds {', '.join(sorted(held))}, and {kind} is to be ablated")
    checkpoint = model.checkpoint
    if said is None or checkpoint is None:
        return
    if (said["source"], said["revision"]) == (checkpoint.source, checkpoint.revision):
        return
    ours = {path.name: sha256_file(path) for path in checkpoint.files}
    if dict(determines.get("files", [])) != ours:
        raise SchemaError(
            f"the store holds activations of {said['source']} (revision {said['revision']}), and what is run is "
            f"{checkpoint.source} (revision {checkpoint.revision}), whose weights are others"
        )


def _mean(
    node: xr.Dataset, where: xr.DataArray | None, skip_positions: int, kind: str, needed: NDArray[np.bool_] | None
) -> Tensor:
    """Means over the tokens that count, float32 [layer, 1, 1, position or 1, …]; with `needed` [position] one for each
    position, NaN at those that are not needed and have none.
    """
    same = xr.zeros_like(label(node, "position")).rename("group")
    by, groups = (same, 1) if needed is None else ("position", len(needed))
    found = mean_by(node, by, groups, where=where, skip_positions=skip_positions)[["n_token", "mean"]].compute()
    name = "group" if needed is None else "position"
    lacking = (found["n_token"] == 0).any([dim for dim in found["n_token"].dims if dim != name]).values
    if (empty := np.flatnonzero(lacking & (True if needed is None else needed))).size:
        at = "" if needed is None else f" at position {empty[0]}"
        raise SchemaError(f"no token of the store counts{at}: there is no mean of {kind} to put in")
    laid = found["mean"].transpose("layer", name, ...)  # [layer, position, head, …], as a prompt's values are
    return torch.from_numpy(laid.values.astype(np.float32))[:, None, None]


def _drawn(
    nodes: Mapping[str, xr.Dataset], where: xr.DataArray | None, task: _Task, draws: int, seed: int | None
) -> NDArray[np.int64]:
    """Random tokens that count, with replacement, int64 [draw, sequence, position], −1 where nothing is ablated.

    Reads the labels of the tokens that it tries, and of all only where next to none count.
    """
    sizes = {kind: node.sizes["token"] for kind, node in nodes.items()}
    if where is not None:
        sizes["where"] = where.sizes.get("token", 0)
    if len(set(sizes.values())) > 1:
        raise SchemaError(f"all kinds are drawn from the same tokens, and there are {sizes} of them")
    labels = next(iter(nodes.values())).drop_vars("value")
    size, ablated = labels.sizes["token"], task.ablated()
    n, random, chosen = draws * int(ablated.sum()), np.random.default_rng(seed), np.zeros(0, np.int64)

    def count(tokens: Any) -> NDArray[np.bool_]:
        mask = None if where is None else where.isel(token=tokens)
        return counted(labels.isel(token=tokens), task.skip_positions, mask).values

    for _ in range(TRIES if size else 0):
        tried = random.integers(0, size, n)
        chosen = np.concatenate([chosen, tried[count(tried)]])
        if len(chosen) >= n:
            break
    else:
        every = np.flatnonzero(count(slice(None)))
        if not len(every):
            raise SchemaError("no token of the store counts: there is nothing to draw from")
        chosen = random.choice(every, n)
    drawn = np.full((draws, *ablated.shape), -1, dtype=np.int64)
    drawn[:, ablated] = chosen[:n].reshape(draws, -1)
    return drawn


def _rows(node: xr.Dataset, drawn: NDArray[np.int64]) -> Tensor:
    """The vectors of the tokens drawn, float32 [layer, draw, sequence, position, …]; of none, any."""
    tokens, place = np.unique(drawn[drawn >= 0], return_inverse=True)
    rows = node["value"].isel(token=tokens).values.astype(np.float32)
    if not np.isfinite(rows).all():
        raise SchemaError(
            "there is NaN or infinity among the activations of the tokens drawn: units that are not recorded, or "
            "values that overflowed"
        )
    where = np.zeros(drawn.shape, np.int64)
    where[drawn >= 0] = place
    return torch.from_numpy(rows[:, where])


def _labelled(
    task: _Task,
    metric: Metric,
    kind: str,
    found: Mapping[str, NDArray[np.float32]],
    baseline: Sequence[float],
    drawn: NDArray[np.int64] | None,
    seed: int | None,
) -> xr.Dataset:
    said = {"units": metric.unit}
    variables: dict[str, Any] = {
        name: (
            ("sequence", "draw", *task.dims(name)),
            value,
            {**said, "long_name": f"{metric.unit} with {name} {SAID[kind]}"},
        )
        for name, value in found.items()
    }
    run_as_it_is = {**said, "long_name": f"{metric.unit} of the run as it is"}
    variables["baseline"] = ("sequence", np.array(baseline, dtype=np.float32), run_as_it_is)
    used = {dim for name in found for dim in task.dims(name)}
    coords: dict[str, Any] = {"sequence": range(len(task.pairs))}
    for name, coord in pair_coords(task.model, task.pairs, task.sites).items():
        dims, values = coord if isinstance(coord, tuple) else ((name,), coord)
        dims = tuple("sequence" if dim == "pair" else dim for dim in dims)
        if not name.startswith("corrupted_") and name != "pair" and set(dims) <= used | {"sequence"}:
            coords[name] = (dims, list(values) if isinstance(values, range) else values)
    coords |= {dim: range(task.model.spec.sizes[dim]) for dim in _HEADS if dim in used}
    attrs = {"metric": type(metric).__name__, "units": metric.unit, "metric_position": metric.position}
    attrs |= {"ablation": kind, "skip_positions": task.skip_positions}
    result = xr.Dataset(variables, coords=coords, attrs=attrs)
    if drawn is None:
        return result.isel(draw=0)
    of_store = {"long_name": "token of the store whose activations are put in"}
    if task.sites.positions is not None:
        columns = [list(task.places(length)) for length in task.pairs.lengths]
        drawn = np.stack([drawn[:, number, here] for number, here in enumerate(columns)], axis=1)
    result = result.assign(drawn_token=(("draw", "sequence", "position"), drawn, of_store))
    return result.assign_coords(draw=range(len(drawn))).assign_attrs(seed=seed)
