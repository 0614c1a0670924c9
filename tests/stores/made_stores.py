"""Small stores of every layout, full of random bits: what the tests of stores write, damage and read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from numpy.typing import NDArray

from forebay.stores.dtypes import format_of
from forebay.stores.grid import Unit
from forebay.stores.ledger import Record
from forebay.stores.schema import Schema, along_sequence, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

OURS, THEIRS = "0123456789ab" * 5 + "0123", "ba9876543210" * 5 + "3210"
MADE_BY = {"determines": {"step": "capture", "parameters": {"context": 4, "hooks": ["a", "b"]}}, "versions": {}}
IDS = ["novel-1", "", "zwölf 🐟", "novel-1"]

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """Sequences laid end to end, and how many of them lie in one shard."""

    lengths: tuple[int, ...]
    per_unit: int

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *self.lengths[:-1]])


UNIT = 8
EVEN = Layout((4, 4, 4, 4, 4, 4, 2), per_unit=2)
VARYING = Layout((3, 9, 1, 8, 5), per_unit=1)
GAPS = Layout((3, 15, 8), per_unit=1)  # in the second and in the last unit no sequence starts
LAYOUTS = pytest.mark.parametrize("layout", [EVEN, VARYING, GAPS], ids=["even", "varying", "gaps"])


def schema_of(layout: Layout = EVEN, compression: str = "none", unit_tokens: int = UNIT) -> Schema:
    """A value a token, a vector a token and layer (several chunks in a shard), a square a sequence and layer."""
    n_token, widest = sum(layout.lengths), max(layout.lengths)
    sizes = {"token": n_token, "sequence": len(layout.lengths), "layer": 2, "d_model": 3, "head": 2}
    sizes |= {"query": widest, "key": widest}
    stream = along_token(("layer", "token", "d_model"), sizes, "bfloat16", unit_tokens)
    pattern = along_sequence(("layer", "sequence", "head", "query", "key"), sizes, "float32", layout.per_unit)
    return Schema(
        kind="activations",
        n_token=n_token,
        unit_tokens=unit_tokens,
        arrays={
            "token_id": along_token(("token",), sizes, "uint32", unit_tokens),
            "hook_resid_post/value": replace(stream, chunks=(1, unit_tokens // 2, 3)),
            "attn.hook_pattern/value": pattern,
        },
        labels={
            "sequences/start": (("sequence",), layout.starts),
            "sequences/document": (("sequence",), np.zeros(len(layout.lengths), dtype=np.int64)),
            "documents/start": (("document",), np.array([0, 0, 5, n_token])),
            "documents/id": (("document",), np.array(IDS, dtype=object)),
            "hook_resid_post/layer": (("layer",), np.array([0, 11])),
        },
        compression=compression,
    )


def random_values(schema: Schema, seed: int = 0) -> Values:
    """Any bits at all, in the form in which they are kept: NaNs of every payload are among them."""
    rng = np.random.default_rng(seed)
    return {
        path: np.frombuffer(rng.bytes(array.nbytes), dtype=format_of(array.dtype).kept).reshape(array.shape)
        for path, array in schema.arrays.items()
    }


def create(folder: Path, schema: Schema, fingerprint: str = OURS) -> Store:
    return Store.create(folder, schema, fingerprint, MADE_BY)


def pieces(schema: Schema, values: Values, unit: Unit, size: int) -> Iterator[xr.DataTree]:
    """A unit in pieces of `size` rows: what lies along `token` first, then what lies along `sequence`."""
    rows = schema.rows(unit)
    for long in ("token", "sequence"):
        own = {path: array for path, array in schema.arrays.items() if long in array.dims}
        for start in range(rows[long].start, rows[long].stop, size):
            stop = min(start + size, rows[long].stop)
            nodes: dict[str, dict[str, Any]] = {}
            for path, array in own.items():
                group, _, name = path.rpartition("/")
                part = values[path].take(np.arange(start, stop), axis=array.dims.index(long))
                nodes.setdefault(f"/{group}", {})[name] = (array.dims, part)
            coords = {long: pd.RangeIndex(start, stop)}
            yield xr.DataTree.from_dict({name: xr.Dataset(found, coords=coords) for name, found in nodes.items()})


def write(store: Store, unit: Unit, values: Values, size: int = 3) -> Record:
    writer = UnitWriter(store, unit)
    for piece in pieces(store.schema_with_labels, values, unit, size):
        writer.put(piece)
    return writer.finish({"compute": 0.5})


def written(folder: Path, schema: Schema, values: Values) -> Store:
    store = create(folder, schema)
    for unit in schema.grid:
        write(store, unit, values)
    return store


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "once"
    written(folder, schema_of(), random_values(schema_of()))
    return folder


@pytest.fixture
def complete(made_once: Path, tmp_path: Path) -> Store:
    """A complete store of the even layout, to be damaged at will."""
    shutil.copytree(made_once, tmp_path / "activations")
    return Store.open(tmp_path / "activations")


def objects(store: Store) -> dict[str, Path]:
    """Every object of every array of the schema, by its key below data.zarr."""
    found = (path for array in store.schema.arrays for path in (store.path / array / "c").rglob("*") if path.is_file())
    return {path.relative_to(store.path).as_posix(): path for path in found}


def contents(store: Store) -> dict[str, bytes]:
    """All of data.zarr."""
    return {str(p.relative_to(store.path)): p.read_bytes() for p in sorted(store.path.rglob("*")) if p.is_file()}


def assert_holds(store: Store, values: Values) -> None:
    for path, expected in values.items():
        found = store.array(path)[...]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()


def child(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Another process that runs `code`, with `arguments` in sys.argv."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "text": True, **options})
