"""Memory that a step takes, before it is run: an upper bound from the model, the batch, the unit and the shards.

A run holds two units at a time, one that is filled and one that is written:

    host = process + 100 MB + labels + source + 2 × unit + 2 × batch's captures + 3 × largest array of a unit
    forward = weights + working + 5 × widest capture in float32, and that of a layer's captures in the model's dtype
    encoders = weights + preactivations + 4 × activations of a block in float32

What starts with the first unit takes the 100 MB; an array of a unit, or a layer of it, is encoded as it is written.
On a CPU the host takes all three, and once more the weights' file, whose pages it holds while it loads; on another
device the last two are the device's. `working` is what `forward_memory` says of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...stages.capture import Capture
from ...stages.encode import Encode
from ...stages.models.points import HookPoint
from ...stages.models.spec import ModelSpec
from ...stores.dtypes import format_of
from ...stores.schema import Array, Schema
from ..plan import Step

PROCESS = 600_000_000
"""Bytes of a process that has imported everything and done nothing, as seen on Linux; where none was measured."""
STARTED = 100_000_000
"""Bytes of what is imported and set up with the first unit: codecs, threads and their pools."""
ENCODED_TOKEN = 400
"""Bytes of a token while its text is encoded: its id, offsets and string, as Python objects and as the tokenizer's."""
COPIES = 5
"""Of a capture in float32 that exist at once while it is cast, checked and summed up."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a step on the host, without the process itself, and on the device; 0 where the host is the device."""

    host: int
    device: int


def memory_of(step: Step, device: str, nonzeros: Mapping[str, float] | None = None) -> Memory:
    """The most that a step takes. `nonzeros` are values a token of ragged arrays, where a profile tells."""
    schema, stage = step.schema, step.stage
    rows = _rows(schema)
    host = STARTED + sum(values.nbytes for _, values in schema.labels.values() if values.dtype != object) * 2
    host += 2 * _unit_bytes(schema, rows, nonzeros or {}) + 3 * _largest_write(schema, rows)
    host += _source_bytes(step)
    computing = 0
    if isinstance(stage, Capture):
        points = [point for each in stage.points(stage.model.open().spec).values() for point in each]
        weights, working = _forward(stage.model.open().spec, points, stage.batch, schema, stage.dtype, captured=True)
        host += 2 * _batch_bytes(schema, stage.batch)
        computing = weights + working
    if isinstance(stage, Encode):
        weights, computing = _encoding(stage, schema)
        computing += weights
    if device.startswith("cpu"):
        files = sum(path.stat().st_size for path in stage.files())
        return Memory(host + computing + files, 0)
    return Memory(host, computing)


def _rows(schema: Schema) -> Mapping[str, int]:
    """How many rows of each long axis a unit has, at most."""
    edges = [min(edge, schema.n_token) for edge in range(0, schema.n_token + schema.unit_tokens, schema.unit_tokens)]
    starts = np.searchsorted(schema.labels["sequences/start"][1], edges)
    return {
        "token": min(schema.unit_tokens, schema.n_token),
        "sequence": int(np.diff(starts).max(initial=0)),
        "unit": 1,
    }


def _array_bytes(array: Array, rows: Mapping[str, int]) -> int:
    shape = (rows.get(dim, size) for dim, size in zip(array.dims, array.shape, strict=True))
    return math.prod(shape) * format_of(array.dtype).itemsize


def _unit_bytes(schema: Schema, rows: Mapping[str, int], nonzeros: Mapping[str, float]) -> int:
    """Bytes of a unit's buffers. A ragged row is taken to be full where nothing tells how full it is."""
    return sum(
        math.ceil(nonzeros[path] * rows["token"]) * format_of(array.dtype).itemsize
        if path in nonzeros
        else _array_bytes(array, rows)
        for path, array in schema.arrays.items()
    )


def _largest_write(schema: Schema, rows: Mapping[str, int]) -> int:
    """Bytes that are written in one call: of an array with layers one layer's."""
    return max(
        _array_bytes(array, rows) // (array.shape[0] if array.dims[0] == "layer" and array.shape[0] else 1)
        for array in schema.arrays.values()
    )


def _source_bytes(step: Step) -> int:
    """Two blocks of what the step reads: tokens, or texts as they are encoded, 64 documents at a time. Stored
    activations are read a few thousand tokens at a time, and counted with the encoders.
    """
    if step.stage.source is None:
        n_char = step.source_schema.labels["documents/n_char"][1]
        n_token = step.source_schema.labels["documents/n_token"][1]
        share = min(1.0, 2 * step.schema.unit_tokens / step.schema.n_token)
        texts = int(n_char.sum() * share) * 4 + 2 * int(n_char.max(initial=0)) * 4
        return texts + min(64 * int(n_token.max(initial=0)), int(n_token.sum())) * ENCODED_TOKEN
    values = sum(format_of(a.dtype).itemsize for path, a in step.source_schema.arrays.items() if "/" not in path)
    return 2 * values * (step.schema.unit_tokens + _longest(step.schema))


def _longest(schema: Schema) -> int:
    """Tokens of the longest sequence."""
    return int(np.diff(schema.labels["sequences/start"][1], append=schema.n_token).max())


def _batch_bytes(schema: Schema, batch: int) -> int:
    """Bytes of what is kept of a batch."""
    rows = {"token": min(batch * _longest(schema), schema.unit_tokens), "sequence": batch}
    return sum(_array_bytes(array, rows) for array in schema.arrays.values())


def _forward(
    spec: ModelSpec, points: Sequence[HookPoint], batch: int, schema: Schema, dtype: str, captured: bool
) -> tuple[int, int]:
    """Bytes of the model's weights, and of what a batch works with: its captures cast and summed up one by one."""
    import torch

    from ...stages.models.memory import forward_memory

    sizes = {"n_sequences": batch, "n_positions": _longest(schema), "dtype": getattr(torch, dtype)}
    found = forward_memory(spec, points, logits=False, **sizes)
    widest = max((forward_memory(spec, [p], logits=False, **sizes).captures for p in points), default=0)
    wide = widest // format_of(dtype).itemsize * 4
    return found.weights, found.working + widest + (COPIES * wide if captured else 0)


def _encoding(stage: Encode, schema: Schema) -> tuple[int, int]:
    """Bytes of encoders, decoders and, fused, the model; and of what a block or a batch works with."""
    from ...stages.dictionaries.encoding import PIECE_TOKENS

    item = format_of(stage.dtype).itemsize
    weights = sum((2 * site.d_in + 3) * site.n_feature * item for site in stage.sites)
    tokens = min(PIECE_TOKENS, schema.unit_tokens)
    working = stage.memory
    if stage.fused:
        spec = stage.model.open().spec
        points = [HookPoint.parse(site.hook) for site in stage.sites]
        of_model, forward = _forward(spec, points, stage.batch, schema, stage.model_dtype, captured=False)
        tokens = stage.batch * _longest(schema)
        weights, working = weights + of_model, working + forward
    return weights, working + sum(4 * 4 * tokens * site.d_in for site in stage.sites)
