"""A run's activations as the cached dataset on which SAELens trains: a row a sequence, a column a hook point."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...stores.dtypes import format_of
from ...stores.errors import SchemaError
from ...stores.fingerprint import fingerprint
from ...stores.places import Place, place, replacing, sync_folder, write_atomic
from ...stores.store import Store
from ...stores.tree import open_run
from ..progress import Progress, Quiet
from .columns import AT_ONCE, Column, columns_of, require_empty

if TYPE_CHECKING:
    import pyarrow as pa

ARRAY = "datasets.features.features.Array2DExtensionType"
"""What the library datasets calls a column of matrices."""
TOKENS = "token_ids"
DTYPES = ("float16", "float32", "float64")
"""Stored dtypes that stay as they are. bfloat16, for which Arrow has no type, becomes float32, exactly."""


def to_sae_lens(
    run: str | os.PathLike[str] | Place,
    folder: str | os.PathLike[str],
    *,
    hooks: str | Sequence[str],
    drop_shorter: bool = False,
    file_bytes: int = 2**29,
    progress: Progress | None = None,
) -> int:
    """Writes activations of a complete run as a dataset that SAELens reads (`use_cached_activations`,
    `cached_activations_path=folder`) and `datasets.load_from_disk` opens, into a new or empty folder, and gives the
    number of its rows.

    A row is a sequence of `context` tokens, those of the run's longest; it has a column a hook point, by its name,
    [context, d_model] (heads side by side), and `token_ids`, int32 [context]. A last sequence that is shorter is left
    out. SchemaError where others are shorter, unless `drop_shorter` leaves them out, too: SAELens has no shorter rows
    and no padding. Files are about `file_bytes` long; about 64 MiB are held at a time.

    Asks for pyarrow (`forebay[parquet]`). Raises what `to_safetensors` raises. Source of the layout: SAELens 6,
    `CacheActivationsRunner` and `ActivationsStore.load_cached_activation_dataset`.
    """
    source, target = place(run), Path(folder)
    columns = columns_of(source, hooks)
    for column in columns:
        if column.array.dtype not in (*DTYPES, "bfloat16"):
            raise SchemaError(f"{column.point} is kept as {column.array.dtype}; SAELens reads {', '.join(DTYPES)}")
    require_empty(target)
    starts, context = _rows(columns[0].store, drop_shorter)
    tokens = open_run(source, chunks=None)["tokens"]["token_id"]
    schema = _schema(columns, context)
    row_bytes = context * (4 + sum(column.row_bytes for column in columns))
    rows = max(1, file_bytes // row_bytes)
    n_file = -(-len(starts) // rows)
    names = [f"data-{n:05}-of-{n_file:05}.arrow" for n in range(n_file)]
    progress = progress or Quiet()
    with progress:
        progress.start("SAELens' dataset", len(starts) * context, 0)
        for n, name in enumerate(names):
            own = starts[n * rows : (n + 1) * rows]
            _write(target / name, schema, _batches(columns, tokens, own, context, max(1, AT_ONCE // row_bytes)))
            progress.advance(len(own) * context)
    sync_folder(target)
    _describe(target, _features(columns, context), names, fingerprint([c.store.fingerprint for c in columns]))
    return len(starts)


def _rows(store: Store, drop_shorter: bool) -> tuple[NDArray[np.int64], int]:
    """First tokens of the sequences that become rows, and the tokens of each."""
    starts = np.asarray(store.labels["sequences/start"][1], np.int64)
    lengths = np.diff(np.append(starts, store.schema.n_token))
    context = int(lengths.max())
    shorter = np.flatnonzero(lengths[:-1] < context)
    if len(shorter) and not drop_shorter:
        raise SchemaError(
            f"{len(shorter):,} of {len(starts):,} sequences have fewer than {context} tokens, the first is sequence "
            f'{shorter[0]}; rows of SAELens all have as many. Capture packed windows (layout = "packed"), or leave '
            "the shorter ones out with drop_shorter"
        )
    return starts[lengths == context], context


def _dtype(column: Column) -> str:
    return "float32" if column.array.dtype == "bfloat16" else column.array.dtype


def _width(column: Column) -> int:
    return int(np.prod(column.shape, dtype=np.int64))


def _features(columns: Sequence[Column], context: int) -> dict[str, Any]:
    """The columns as the library datasets describes them."""
    matrices = {str(c.point): {"shape": [context, _width(c)], "dtype": _dtype(c), "_type": "Array2D"} for c in columns}
    ids = {"feature": {"dtype": "int32", "_type": "Value"}, "length": context, "_type": "Sequence"}
    return {**matrices, TOKENS: ids}


def _schema(columns: Sequence[Column], context: int) -> pa.Schema:
    import pyarrow as pa

    fields = []
    for column in columns:
        said = {
            "ARROW:extension:name": ARRAY,
            "ARROW:extension:metadata": json.dumps([[context, _width(column)], _dtype(column)]),
        }
        kind = pa.list_(pa.list_(pa.from_numpy_dtype(_dtype(column))))
        fields.append(pa.field(str(column.point), kind, metadata=said))
    fields.append(pa.field(TOKENS, pa.list_(pa.int32(), context)))
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": _features(columns, context)}})})


def _batches(
    columns: Sequence[Column], tokens: Any, starts: NDArray[np.int64], context: int, at_once: int
) -> Iterator[list[pa.Array]]:
    """Columns of a few rows at a time."""
    import pyarrow as pa

    for at in range(0, len(starts), at_once):
        some = starts[at : at + at_once]
        found = []
        for column in columns:
            rows = [column.read(start, start + context) for start in some.tolist()]
            values = format_of(column.array.dtype).decode(np.stack(rows)).reshape(-1)
            width = _width(column)
            inner = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, width, dtype=np.int32), pa.array(values))
            outer = np.arange(0, len(inner) + 1, context, dtype=np.int32)
            found.append(pa.ListArray.from_arrays(outer, inner))
        own = (some[:, None] + np.arange(context)).ravel()
        ids = tokens.isel(token=own).values.astype(np.int32)
        yield [*found, pa.FixedSizeListArray.from_arrays(pa.array(ids), context)]


def _write(path: Path, schema: pa.Schema, batches: Iterator[list[pa.Array]]) -> None:
    import pyarrow as pa

    with replacing(path) as file, pa.ipc.new_stream(file, schema) as stream:
        for arrays in batches:
            stream.write_batch(pa.record_batch(arrays, schema=schema))


def _describe(folder: Path, features: dict[str, Any], names: Sequence[str], made_of: str) -> None:
    """What `load_from_disk` asks for, last, so that a dataset which is not whole does not open."""
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": made_of[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    for name, said in (("dataset_info.json", info), ("state.json", state)):
        write_atomic(folder / name, json.dumps(said, indent=2).encode())
