"""Tokens into activations: any hook points and layers of a model in one pass, labelled, in the dtype asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..stores.dtypes import format_of
from ..stores.errors import SchemaError
from ..stores.grid import Unit
from ..stores.schema import LABELS, Array, Schema, along_sequence, along_token, unit_tokens_for
from .models.points import BLOCK, STATE, HookPoint, dims_of, expand
from .models.spec import ModelSpec
from .stage import Apply, Stage
from .tokenize import ModelSource

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from .models.model import Model
    from .models.taps import Sink

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Capture(Stage):
    """Tokens → activations at `hooks`: names, with `{a,b}`, `[3-5]` and `*`, as in `blocks.[5-9].hook_resid_post`.

    The model computes in `dtype`, `batch` sequences at a time; `store_dtype` is what is kept, and a lossy one records
    the error it makes. `unit_tokens` is the unit of work (by default, as many tokens as make a shard of at most 64
    MiB). `compression` is "none" (checksums only; for local disks) or "zstd" (1.4 times smaller for bfloat16, slower).
    `state_positions` says after which tokens of every sequence recurrent states, `rwkv.hook_state`, are kept; negative
    numbers count from the sequence's own end. Where a sequence is too short for one there is NaN.

    Batches are cut from the sequences that touch the unit, in their order, so that a unit's values never depend on who
    computes it.
    """

    verb: ClassVar[str] = "capture"
    store: ClassVar[str] = "activations"
    source: ClassVar[str | None] = "tokenize"
    version: ClassVar[int] = 2
    told_elsewhere: ClassVar[frozenset[str]] = frozenset({"model", "threads"})

    model: ModelSource
    hooks: tuple[str, ...]
    dtype: Dtype = "float32"
    store_dtype: Dtype = "float32"
    batch: int = 8
    state_positions: tuple[int, ...] = (-1,)
    unit_tokens: int | None = None
    threads: int | None = None
    compression: Literal["none", "zstd"] = "none"

    def check(self) -> None:
        if self.batch < 1:
            raise SchemaError(f"capture.batch = {self.batch} must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise SchemaError(f"capture.threads = {self.threads} must be at least 1")
        if not self.hooks:
            raise SchemaError(
                'capture.hooks is empty: name at least one hook point, for example "blocks.*.hook_resid_post"'
            )
        if self.unit_tokens is not None and self.unit_tokens < 1:
            raise SchemaError(f"capture.unit_tokens = {self.unit_tokens} must be at least 1")
        self._check_positions(self.points(self.model.open().spec))

    def _check_positions(self, kinds: Mapping[str, object]) -> None:
        asked = list(self.state_positions)
        if not asked or len(set(asked)) < len(asked):
            raise SchemaError(f"capture.state_positions = {asked} names no position, or one of them twice")
        if STATE not in kinds and self.state_positions != (-1,):
            raise SchemaError(
                f"capture.state_positions = {asked} says after which tokens states are kept, and capture.hooks names "
                f'none: add "blocks.*.{STATE}" to them (models of RWKV have it), or leave state_positions out'
            )

    def determining(self) -> dict[str, Any]:
        """Where no state is captured, no position of one is a part of the fingerprint."""
        held = super().determining()
        if STATE not in self.points(self.model.open().spec):
            del held["state_positions"]
        return held

    def files(self) -> tuple[Path, ...]:
        return tuple(self.model.open().files)

    def numerics(self, device: str) -> dict[str, Any]:
        """What changes the last bits of a matrix product: torch's version, the kind of device, and on a CPU the number
        of threads among which it is divided.
        """
        import torch

        kind = device.split(":")[0]
        threads = {"threads": self.threads or torch.get_num_threads()} if kind == "cpu" else {}
        return {"torch": metadata.version("torch"), "device": kind, **threads}

    def points(self, spec: ModelSpec) -> dict[str, tuple[HookPoint, ...]]:
        """The hook points asked for, by kind, in the order of firing.

        HookError names one that the model does not have.
        """
        by_kind: dict[str, list[HookPoint]] = defaultdict(list)
        for point in expand(self.hooks, spec.points()):
            by_kind[point.kind].append(point)
        return {kind: tuple(points) for kind, points in by_kind.items()}

    def about(self) -> dict[str, Any]:
        return {"model": self.model.about()}

    def schema(self, source: Schema) -> Schema:
        """One group a kind of hook point: `value[layer, token, …]`, or `value[layer, sequence, …]` for attention
        patterns and scores and for recurrent states.

        SchemaError for one of `state_positions` that no sequence is long enough for.
        """
        spec = self.model.open().spec
        kinds = self.points(spec)
        starts = source.labels["sequences/start"][1]
        lengths = np.diff(starts, append=source.n_token)
        if STATE in kinds:
            self._check_lengths(lengths)
        context = int(lengths.max())
        sizes = {**spec.sizes, "token": source.n_token, "sequence": len(starts), "query": context, "key": context}
        sizes["state_position"] = len(self.state_positions)
        unit_tokens = self.unit_tokens or self._unit_tokens(kinds, sizes, context)
        per_unit = _sequences_per_unit(starts, source.n_token, unit_tokens)
        arrays: dict[str, Array] = {}
        labels = {name: source.labels[name] for name in LABELS}
        for kind, points in kinds.items():
            dims, layers = (
                stored_dims(kind),
                np.array([point.layer for point in points if point.layer is not None], dtype=np.int64),
            )
            own = {**sizes, "layer": len(layers)}
            if "token" in dims:
                arrays[f"{kind}/value"] = along_token(dims, own, self.store_dtype, unit_tokens)
            else:
                arrays[f"{kind}/value"] = along_sequence(dims, own, self.store_dtype, per_unit)
            if len(layers):
                labels[f"{kind}/layer"] = (("layer",), layers)
            if "state_position" in dims:
                positions = np.array(self.state_positions, dtype=np.int64)
                labels[f"{kind}/state_position"] = (("state_position",), positions)
        return Schema(
            kind="activations",
            n_token=source.n_token,
            unit_tokens=unit_tokens,
            arrays=arrays,
            labels=labels,
            compression=self.compression,
        )

    def _check_lengths(self, lengths: NDArray[np.int64]) -> None:
        longest = int(lengths.max())
        for position in self.state_positions:
            if not -longest <= position < longest:
                raise SchemaError(
                    f"capture.state_positions: no sequence has a state after its token {position}; the longest has "
                    f"{longest} tokens, so 0 to {longest - 1} or, from the end, -{longest} to -1"
                )

    def _unit_tokens(self, kinds: Iterable[str], sizes: Mapping[str, int], context: int) -> int:
        return unit_tokens_for(
            max((_values_a_token(kind, sizes) for kind in kinds), default=1) * format_of(self.store_dtype).itemsize,
            context,
        )

    def span(self, unit: Unit, source: Schema, own: Schema) -> slice:
        """The tokens of every sequence that touches the unit; one that straddles its edge is computed by both
        neighbours.
        """
        starts = source.labels["sequences/start"][1]
        first, beyond = _touching(starts, unit)
        return slice(int(starts[first]), int(starts[beyond]) if beyond < len(starts) else source.n_token)

    def load(self, device: str, own: Schema) -> Apply:
        """Loads the model. Pieces are the captures of one batch; the unembedding and layers above the last point are
        not computed.
        """
        import torch

        from .models.load import load_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = load_model(self.model.source, revision=self.model.revision, device=device, dtype=self.dtype)
        starts = own.labels["sequences/start"][1]
        ends = np.append(starts[1:], own.n_token)

        def apply(block: xr.Dataset, unit: Unit) -> Iterator[xr.DataTree]:
            token_id, origin = block["token_id"].values.astype(np.int64), int(block.indexes["token"][0])
            first, beyond = _touching(starts, unit)
            for at in range(first, beyond, self.batch):
                batch = Batch(np.arange(at, min(at + self.batch, beyond)), starts, ends, unit)
                rows = [token_id[starts[s] - origin : ends[s] - origin].tolist() for s in batch.sequences]
                yield self._capture(model, rows, batch, own)

        return apply

    def _capture(self, model: Model, rows: Sequence[Sequence[int]], batch: Batch, own: Schema) -> xr.DataTree:
        import xarray as xr

        kept: dict[str, list[NDArray[Any]]] = defaultdict(list)
        statistics: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

        def sink(point: HookPoint, tensor: torch.Tensor) -> None:
            values = batch.own_rows(tensor, own.arrays[f"{point.kind}/value"])
            stored, found = _store(values, self.store_dtype, point)
            kept[point.kind].append(stored)
            for name, value in found.items():
                statistics[point.kind][name].append(value)

        self._run(model, rows, sink)
        nodes = {}
        for kind, layers in kept.items():
            dims = stored_dims(kind)
            values = np.stack(layers) if dims[0] == "layer" else layers[0]
            if values.shape[dims.index(batch.long(dims))]:
                said = {name: np.array(v) for name, v in statistics[kind].items()}
                nodes[kind] = xr.Dataset(
                    {"value": (dims, values)}, coords=batch.coords(dims), attrs={"statistics": said}
                )
        return xr.DataTree.from_dict(nodes)

    def _run(self, model: Model, rows: Sequence[Sequence[int]], sink: Sink) -> None:
        """Run the model on the sequences of a batch. States come at all of `state_positions`, NaN where a sequence is
        too short for one.
        """
        import torch

        from .models.taps import HookSpec

        kinds, longest = self.points(model.spec), max(map(len, rows))
        states = kinds.pop(STATE, ())
        held = [n for n, position in enumerate(self.state_positions) if -longest <= position < longest]

        def spread(point: HookPoint, tensor: torch.Tensor) -> None:
            if point.kind == STATE and tensor.shape[1] < len(self.state_positions):
                everywhere = tensor.new_full((len(rows), len(self.state_positions), *tensor.shape[2:]), torch.nan)
                everywhere[:, held] = tensor
                tensor = everywhere
            sink(point, tensor)

        hooks = HookSpec().capture(*(point for points in kinds.values() for point in points))
        if held:
            hooks = hooks.capture(*states, positions=[self.state_positions[n] for n in held])
        if kinds or (states and held):
            model.forward(rows, hooks, logits=False, sink=spread)
        for point in states if not held else ():
            shape = (len(rows), 0, *(model.spec.sizes[dim] for dim in point.dims[2:]))
            spread(point, torch.empty(shape))


def stored_dims(kind: str) -> tuple[str, ...]:
    """Dimensions of a kind of hook point in a store: `token` where one forward has `sequence` and `position`, layers in
    front.
    """
    dims = dims_of(kind)
    dims = ("token", *dims[2:]) if dims[:2] == ("sequence", "position") else dims
    return ("layer", *dims) if kind in BLOCK else dims


def _values_a_token(kind: str, sizes: Mapping[str, int]) -> int:
    """Values that a layer of a kind takes a token; where they lie by sequence, on average."""
    dims = stored_dims(kind)
    width = int(np.prod([sizes[dim] for dim in dims if dim not in ("layer", "token", "sequence")], dtype=object))
    if "token" in dims:
        return width
    # Attention's have never counted: units of another size would be another store.
    return 1 if kind.startswith("attn.") else -(-width * sizes["sequence"] // sizes["token"])


@dataclass(frozen=True)
class Batch:
    """Sequences that are computed together, and which of their rows belong to the unit that asked."""

    sequences: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    unit: Unit

    @property
    def lengths(self) -> list[int]:
        return [int(self.ends[s] - self.starts[s]) for s in self.sequences]

    @property
    def tokens(self) -> tuple[int, int]:
        """The part of the token axis that the batch covers and the unit owns."""
        first, last = self.sequences[0], self.sequences[-1]
        return max(int(self.starts[first]), self.unit.start), min(int(self.ends[last]), self.unit.stop)

    @property
    def own_sequences(self) -> tuple[int, int]:
        """The sequences of the batch that start in the unit."""
        first, beyond = np.searchsorted(self.starts, [self.unit.start, self.unit.stop])
        return max(int(first), int(self.sequences[0])), min(int(beyond), int(self.sequences[-1]) + 1)

    def long(self, dims: Sequence[str]) -> str:
        return "token" if "token" in dims else "sequence"

    def coords(self, dims: Sequence[str]) -> dict[str, Any]:
        import pandas as pd

        return (
            {"token": pd.RangeIndex(*self.tokens)}
            if "token" in dims
            else {"sequence": pd.RangeIndex(*self.own_sequences)}
        )

    def own_rows(self, tensor: torch.Tensor, array: Array) -> torch.Tensor:
        """The unit's part of a capture, without padding: `[token, …]`, or `[sequence, …]`, of which `[…, query, key]`
        has NaN beyond a sequence's end.
        """
        if "token" in array.dims:
            return self._own_tokens(tensor)
        first, beyond = self.own_sequences
        if "query" not in array.dims:
            origin = int(self.sequences[0])
            return tensor[first - origin : max(first, beyond) - origin]
        width = array.shape[-1]
        own = tensor.new_full((max(0, beyond - first), *tensor.shape[1:-2], width, width), float("nan"))
        for row, sequence in enumerate(range(first, beyond)):
            n = int(self.ends[sequence] - self.starts[sequence])
            own[row, ..., :n, :n] = tensor[sequence - int(self.sequences[0]), ..., :n, :n]
        return own

    def _own_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        first, beyond = self.tokens
        origin = int(self.starts[self.sequences[0]])
        if len(set(self.lengths)) == 1:
            flat = tensor.flatten(0, 1)
        else:
            flat = torch.cat([row[:n] for row, n in zip(tensor, self.lengths, strict=True)])
        return flat[first - origin : max(first, beyond) - origin]


def _store(values: torch.Tensor, dtype: str, point: HookPoint) -> tuple[NDArray[Any], dict[str, float]]:
    """Values as they are kept, on the host, and what is recorded of them. SchemaError if one does not fit the dtype."""
    import torch

    stored = values.to(getattr(torch, dtype))
    # Of what is finite: a masked attention score is minus infinity, and a record could not say so in JSON.
    found = values.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(found.abs().amax()) if found.numel() else 0.0
    if values.dtype != stored.dtype:
        if bool((torch.isinf(stored) & ~torch.isinf(values)).any()):
            raise SchemaError(
                f"{point}: the value {largest:.6g} does not fit {dtype}, whose largest is "
                f"{torch.finfo(stored.dtype).max:.6g}. "
                'Set capture.store_dtype to "bfloat16" or "float32"'
            )
        error = _square_sum((stored.float() - values.float()).nan_to_num())
    else:
        error = 0.0
    statistics = {
        "abs_max": largest,
        "square_sum": _square_sum(found),
        "error_square_sum": error,
    }
    host = stored.detach().contiguous().cpu()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(np.uint16), statistics
    return host.numpy(), statistics


def _square_sum(values: torch.Tensor) -> float:
    """In float64, which Apple's GPUs do not have."""
    import torch

    wide = values.cpu() if values.device.type == "mps" else values
    return float(wide.square().sum(dtype=torch.float64))


def _touching(starts: NDArray[np.int64], unit: Unit) -> tuple[int, int]:
    """The sequences [first, beyond) that have tokens in the unit."""
    return int(np.searchsorted(starts, unit.start, "right")) - 1, int(np.searchsorted(starts, unit.stop, "left"))


def _sequences_per_unit(starts: NDArray[np.int64], n_token: int, unit_tokens: int) -> int:
    """Sequences in a shard: as many as start in every unit, if that is the same for all but the last; else one."""
    edges = np.arange(0, n_token + unit_tokens, unit_tokens)
    counts = np.diff(np.searchsorted(starts, edges))
    full = counts[:-1] if len(counts) > 1 else counts
    return int(full[0]) if len(full) and (full == full[0]).all() and counts[-1] <= full[0] and full[0] > 0 else 1
