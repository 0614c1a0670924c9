"""Several captures of the same tokens, read as one: what one encodes may have been kept at different times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from xarray.core import indexing

from .errors import SchemaError
from .joined import joined_layers
from .schema import Array, Schema
from .store import Store
from .tree import KeptArray, read_rows


def joined_schema(schemas: Sequence[Schema]) -> Schema:
    """The schema of captures that are read as one: the kinds of all, each with the layers of all. What else it says,
    units above all, is the first's. No layer may be kept twice. SchemaError where they are of other tokens.
    """
    first = schemas[0]
    arrays: dict[str, Array] = {}
    labels: dict[str, Any] = {}
    starts = first.labels["sequences/start"][1]
    for schema in schemas:
        if schema.n_token != first.n_token or not np.array_equal(schema.labels["sequences/start"][1], starts):
            raise SchemaError(f"captures of {first.n_token:,} and of {schema.n_token:,} tokens cannot be read as one")
        for path, array in schema.arrays.items():
            name = f"{path.rpartition('/')[0]}/layer"
            if path in arrays and name in schema.labels:
                layers = np.concatenate([labels[name][1], schema.labels[name][1]])
                axis = array.dims.index("layer")
                shape = (*array.shape[:axis], len(layers), *array.shape[axis + 1 :])
                arrays[path], labels[name] = replace(arrays[path], shape=shape), (("layer",), np.sort(layers))
            else:
                arrays[path] = array
                labels |= {key: value for key, value in schema.labels.items() if key not in labels}
    return replace(first, arrays=arrays, labels=labels)


def read_captures(stores: Sequence[Store], span: slice) -> xr.Dataset:
    """Tokens [start, stop) of several complete captures as `read_rows` gives those of one: each kind with the layers of
    all, ascending.
    """
    block = read_rows(stores[0], span)
    holders: dict[str, list[Store]] = defaultdict(list)
    for store in stores:
        for path, array in store.schema.arrays.items():
            if "token" in array.dims:
                holders[path].append(store)
    for path, held in holders.items():
        if held == [stores[0]]:
            continue
        if len(held) == 1:
            block = block.merge(read_rows(held[0], span)[[path]])
            continue
        group, dims = path.rpartition("/")[0], held[0].schema.arrays[path].dims
        values = [(KeptArray(one, path, complete=True), one.labels[f"{group}/layer"][1]) for one in held]
        joined, layers = joined_layers(values, dims.index("layer"))
        names = [dim if dim == "token" else f"{group}/{dim}" for dim in dims]
        variable = xr.Variable(names, indexing.LazilyIndexedArray(joined)).isel(token=span)
        block = block.drop_dims(f"{group}/layer").assign({path: variable}).assign_coords({f"{group}/layer": layers})
    return block
