"""Tokens into activations: any hook points and layers of a model in one pass, labelled, in the dtype asked for."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..stores.dtypes import format_of
from ..stores.errors import SchemaError
from ..stores.grid import Unit
from ..stores.schema import (
    LABELS,
    Array,
    Schema,
    along_sequence,
    along_token,
    sequences_per_unit,
    unit_tokens_for,
)
from .models.points import STATE, HookPoint, expand, stored_dims
from .models.spec import ModelSpec
from .sequences import batches_of, sequences_span
from .stage import Apply, Stage, product_numerics
from .storing import Dtype
from .tokenize import ModelSource

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from .models.model import Model
    from .models.taps import Sink


@dataclass(frozen=True, kw_only=True)
class Capture(Stage):
    """Tokens → activations at `hooks`: names, with `{a,b}`, `[3-5]` and `*`, as in `blocks.[5-9].hook_resid_post`.

    The model computes in `dtype`, `batch` sequences at a time; `store_dtype` is what is kept, and a lossy one records
    the error it makes. `unit_tokens` is the unit of work (by default, as many tokens as make a shard of at most 64 MiB
    and 256 MiB in all, but a batch at least). `compression` is "none" (checksums only; for local disks) or "zstd" (1.4
    times smaller for bfloat16, slower). `state_positions` says after which tokens of every sequence recurrent states,
    `rwkv.hook_state`, are kept; negative numbers count from the sequence's own end. Where a sequence is too short for
    one there is NaN. `compile` is that of `load_model`; every batch is then padded to one shape, `batch` sequences of
    the longest one's length.

    Batches are cut from the sequences that touch the unit, in their order, so that a unit's values never depend on who
    computes it. `name` is that of a table [capture.NAME], which has a store of its own; it determines no value.
    """

    verb: ClassVar[str] = "capture"
    version: ClassVar[int] = 3
    told_elsewhere: ClassVar[frozenset[str]] = frozenset({"name", "model", "threads"})

    name: str | None = None
    model: ModelSource
    hooks: tuple[str, ...]
    dtype: Dtype = "float32"
    store_dtype: Dtype = "float32"
    batch: int = 8
    state_positions: tuple[int, ...] = (-1,)
    unit_tokens: int | None = None
    threads: int | None = None
    compile: bool = False
    compression: Literal["none", "zstd"] = "none"

    @property
    def store(self) -> str:
        return "activations" if self.name is None else f"activations-{self.name}"

    @property
    def table(self) -> str:
        """The recipe's table, for messages."""
        return self.verb if self.name is None else f"{self.verb}.{self.name}"

    @property
    def source(self) -> str | None:
        return "tokenize"

    def check(self) -> None:
        if self.batch < 1:
            raise SchemaError(f"{self.table}.batch = {self.batch} must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise SchemaError(f"{self.table}.threads = {self.threads} must be at least 1")
        if not self.hooks:
            raise SchemaError(
                f'{self.table}.hooks is empty: name at least one hook point, for example "blocks.*.hook_resid_post"'
            )
        if self.unit_tokens is not None and self.unit_tokens < 1:
            raise SchemaError(f"{self.table}.unit_tokens = {self.unit_tokens} must be at least 1")
        self._check_positions(self.points(self.model.open().spec))

    def _check_positions(self, kinds: Mapping[str, object]) -> None:
        asked = list(self.state_positions)
        if not asked or len(set(asked)) < len(asked):
            raise SchemaError(f"{self.table}.state_positions = {asked} names no position, or one of them twice")
        if STATE not in kinds and self.state_positions != (-1,):
            raise SchemaError(
                f"{self.table}.state_positions = {asked} says after which tokens states are kept, and its hooks name "
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
        if not self.compile:
            return product_numerics(device, self.threads)
        from .models.compiling import compiler_of, require_compilable

        require_compilable(self.model.open().spec, device)
        return {**product_numerics(device, self.threads), **compiler_of(device)}

    def points(self, spec: ModelSpec) -> dict[str, tuple[HookPoint, ...]]:
        """The hook points asked for, by kind, in the order of firing.

        HookError names one that the model does not have.
        """
        by_kind: dict[str, list[HookPoint]] = defaultdict(list)
        for point in expand(self.hooks, spec.points()):
            by_kind[point.kind].append(point)
        return {kind: tuple(points) for kind, points in by_kind.items()}

    @property
    def captured(self) -> tuple[HookPoint, ...]:
        """All the hook points asked for."""
        return tuple(point for points in self.points(self.model.open().spec).values() for point in points)

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
        per_unit = sequences_per_unit(starts, source.n_token, unit_tokens)
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
                    f"{self.table}.state_positions: no sequence has a state after its token {position}; the longest "
                    f"has {longest} tokens, so 0 to {longest - 1} or, from the end, -{longest} to -1"
                )

    def _unit_tokens(self, kinds: Mapping[str, Sequence[HookPoint]], sizes: Mapping[str, int], context: int) -> int:
        """Two units are in memory at once: each is bounded over all hook points too, but holds a batch at least."""
        itemsize = format_of(self.store_dtype).itemsize
        widths = {kind: _values_a_token(kind, sizes) * itemsize for kind in kinds}
        token_bytes = sum(widths[kind] * len(points) for kind, points in kinds.items())
        return unit_tokens_for(max(widths.values()), context, token_bytes=token_bytes, least=self.batch * context)

    def span(self, unit: Unit, source: Schema, own: Schema) -> slice:
        """The tokens of every sequence that touches the unit."""
        return sequences_span(unit, source)

    def load(self, device: str, own: Schema) -> Apply:
        """Loads the model. Pieces are the captures of one batch; the unembedding and layers above the last point are
        not computed.
        """
        import torch

        from .captured import CapturedBatch
        from .models.load import load_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = load_model(
            self.model.source, revision=self.model.revision, device=device, dtype=self.dtype, compile=self.compile
        )
        kinds = self.points(model.spec)
        context = int(np.diff(own.labels["sequences/start"][1], append=own.n_token).max())
        # A GPU computes the next batch while the captures of the last one are gathered; a CPU has no hands free.
        ahead = 1 if device.startswith("cuda") else 0

        def apply(block: xr.Dataset, unit: Unit) -> Iterator[xr.DataTree]:
            begun: deque[CapturedBatch] = deque()
            for batch in batches_of(unit, own, self.batch):
                captured = CapturedBatch(batch, own, kinds, self.store_dtype, f"{self.table}.store_dtype")
                rows = batch.token_ids(block)
                self._run(model, kinds, self._padded(rows, context) if self.compile else rows, captured)
                begun.append(captured)
                if len(begun) > ahead:
                    yield begun.popleft().piece()
            while begun:
                yield begun.popleft().piece()

        return apply

    def _padded(self, rows: Sequence[Sequence[int]], context: int) -> list[list[int]]:
        """Sequences of one shape, whatever the batch: what follows a sequence changes nothing in it."""
        filled = [[*row, *[0] * (context - len(row))] for row in rows]
        return filled + [[0] * context] * (self.batch - len(rows))

    def _run(
        self, model: Model, kinds: Mapping[str, Sequence[HookPoint]], rows: Sequence[Sequence[int]], sink: Sink
    ) -> None:
        """Run the model on the sequences of a batch. States come at all of `state_positions`, NaN where a sequence is
        too short for one.
        """
        import torch

        from .models.taps import HookSpec

        longest, states = max(map(len, rows)), kinds.get(STATE, ())
        others = [point for kind, points in kinds.items() if kind != STATE for point in points]
        held = [n for n, position in enumerate(self.state_positions) if -longest <= position < longest]

        def spread(point: HookPoint, tensor: torch.Tensor) -> None:
            if point.kind == STATE and tensor.shape[1] < len(self.state_positions):
                everywhere = tensor.new_full((len(rows), len(self.state_positions), *tensor.shape[2:]), torch.nan)
                everywhere[:, held] = tensor
                tensor = everywhere
            sink(point, tensor)

        hooks = HookSpec().capture(*others)
        if held:
            hooks = hooks.capture(*states, positions=[self.state_positions[n] for n in held])
        if others or (states and held):
            model.forward(rows, hooks, logits=False, sink=spread)
        for point in states if not held else ():
            shape = (len(rows), 0, *(model.spec.sizes[dim] for dim in point.dims[2:]))
            spread(point, torch.empty(shape, device=model.device))


def stored_points(schema: Schema) -> list[str]:
    """The hook points that a schema of activations, with its labels, has."""
    found = []
    for path in schema.arrays:
        kind = path.rpartition("/")[0]
        layers = schema.labels.get(f"{kind}/layer")
        found += [kind] if layers is None else [f"blocks.{layer}.{kind}" for layer in layers[1]]
    return found


def _values_a_token(kind: str, sizes: Mapping[str, int]) -> int:
    """Values that a layer of a kind takes a token; where they lie by sequence, on average."""
    dims = stored_dims(kind)
    width = int(np.prod([sizes[dim] for dim in dims if dim not in ("layer", "token", "sequence")], dtype=object))
    return width if "token" in dims else -(-width * sizes["sequence"] // sizes["token"])
