"""One store made, joined and written by several processes, killed ones and such without room among them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay.stores.errors import CorruptStore, DiskFull, FingerprintMismatch, StoreNotFound
from forebay.stores.schema import DATA, Array, Schema, along_token
from forebay.stores.store import Store

from .made_stores import (
    MADE_BY,
    OURS,
    THEIRS,
    Values,
    assert_holds,
    child,
    contents,
    create,
    objects,
    random_values,
    schema_of,
    write,
    written,
)

# ── making and joining ───────────────────────────────────────────────────────────────────────────────────────────────


def test_joining_a_store_leaves_it_as_it_is(complete: Store) -> None:
    folder, before = complete.path.parent, contents(complete)
    joined = create(folder, schema_of())
    assert contents(joined) == before
    assert joined.complete
    assert sorted(path.name for path in folder.iterdir()) == [DATA, "done"]


def test_a_store_of_another_recipe_is_refused_with_both_fingerprints_and_the_difference(tmp_path: Path) -> None:
    schema = schema_of()
    store = create(tmp_path / "activations", schema)
    determines: dict[str, Any] = MADE_BY["determines"]
    other = {"determines": {**determines, "parameters": {"context": 8, "hooks": ["a", "b"]}}, "versions": {"x": "1"}}
    with pytest.raises(FingerprintMismatch) as refused:
        Store.create(store.path.parent, schema, THEIRS, other)
    assert str(refused.value).splitlines() == [
        f"{tmp_path}/activations was made by another recipe: its fingerprint is {OURS[:12]}, this recipe gives "
        f"{THEIRS[:12]}.",
        "  parameters.context: 8 here, 4 in the store",
        f"Run into another folder, or delete {tmp_path}/activations to compute it anew",
    ]


def test_records_whose_data_are_gone_are_not_believed(complete: Store) -> None:
    """Fill values would pass for the values of units that are recorded as done."""
    shutil.rmtree(complete.path)
    with pytest.raises(CorruptStore, match=rf"has records of 4 units, but .*{DATA} with their data is gone"):
        create(complete.path.parent, schema_of())
    assert not complete.path.exists()


JOIN_AND_WRITE = """
import os, sys
from pathlib import Path
import numpy as np, pandas as pd, xarray as xr
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

n = 8
schema = Schema(kind="tokens", n_token=4 * n, unit_tokens=4,
    arrays={"token_id": along_token(("token",), {"token": 4 * n}, "uint32", 4)},
    labels={"sequences/start": (("sequence",), np.arange(0, 4 * n, 4))})

def join_and_write(unit):
    store = Store.create(Path(sys.argv[1]), schema, "f" * 64, {"determines": {}})
    writer, own = UnitWriter(store, store.schema.grid[unit]), np.arange(4 * unit, 4 * unit + 4, dtype=np.uint32)
    writer.put(xr.DataTree(xr.Dataset({"token_id": (("token",), own + 100)}, coords={"token": pd.Index(own)})))
    writer.finish({})
"""

EIGHT_AT_ONCE = """
import traceback

gate, opener = os.pipe()
for child in range(n):
    if os.fork() == 0:
        os.close(opener)
        os.read(gate, 1)        # comes back when the last opener is closed
        try:
            for unit in eval(sys.argv[2]):
                join_and_write(unit)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
os.close(opener)
sys.exit(sum(os.wait()[1] != 0 for _ in range(n)))
"""


def test_eight_processes_make_one_store_at_once(tmp_path: Path) -> None:
    with child(JOIN_AND_WRITE + EIGHT_AT_ONCE, tmp_path / "step", "[child]") as process:
        process.communicate()
    assert process.returncode == 0
    store = Store.open(tmp_path / "step")
    assert store.array("token_id")[...].tolist() == list(range(100, 132))
    assert (store.complete, store.verify()) == (True, {})
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [DATA, "done"]


def test_processes_that_compute_the_same_units_do_no_harm(tmp_path: Path) -> None:
    """Two runs of one recipe that do not know of each other: work is done twice, and that is all."""
    with child(JOIN_AND_WRITE + EIGHT_AT_ONCE, tmp_path / "step", "[0, 1, child // 4, 0]") as process:
        process.communicate()
    assert process.returncode == 0
    store = Store.open(tmp_path / "step")
    assert store.array("token_id")[:8].tolist() == list(range(100, 108))
    assert (store.ledger.done(), store.verify()) == ({0, 1}, {})


def test_what_is_written_again_is_whole_all_the_time(tmp_path: Path) -> None:
    schema = schema_of()
    values = random_values(schema)
    store = written(tmp_path, schema, values)
    stop = threading.Event()

    def write_again() -> None:
        while not stop.is_set():
            write(store, schema.grid[3], values)

    with ThreadPoolExecutor(1) as executor:
        writing = executor.submit(write_again)
        try:
            for _ in range(20):
                assert_holds(Store.open(tmp_path), values)
        finally:
            stop.set()
        writing.result()


KILLED = """
import os, sys, time
import forebay.stores.ledger, forebay.stores.store

def stop(*arguments):
    print("there", flush=True)
    time.sleep(60)

if sys.argv[2] == "making":
    os.rename = stop
else:
    forebay.stores.ledger.Ledger.complete = stop
join_and_write(2)
"""


@pytest.mark.parametrize("moment", ["making", "writing"])
def test_a_killed_process_leaves_nothing_that_counts(tmp_path: Path, moment: str) -> None:
    with child(JOIN_AND_WRITE + KILLED, tmp_path / "step", moment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        os.kill(process.pid, signal.SIGKILL)
    if moment == "making":
        with pytest.raises(StoreNotFound):
            Store.open(tmp_path / "step")
    else:
        assert len(Store.open(tmp_path / "step").todo()) == 8
    with child(JOIN_AND_WRITE + "join_and_write(2)", tmp_path / "step") as process:
        process.communicate()
    assert process.returncode == 0
    store = Store.open(tmp_path / "step")
    assert store.ledger.done() == {2}
    assert store.array("token_id")[8:12].tolist() == [108, 109, 110, 111]
    leftover = store.path / "token_id" / "c" / "7.0f0f.partial"
    leftover.write_bytes(b"what Zarr leaves of a write that was killed")
    store.sweep(before=leftover.stat().st_mtime)
    assert leftover.exists(), "what was touched since may be on its way"
    store.sweep()
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [DATA, "done"]
    assert set(objects(store)) == {"token_id/c/2"}


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def large_schema() -> tuple[Schema, Values]:
    """Units of 1 MiB."""
    sizes: Mapping[str, int] = {"token": 6 * 256, "d_model": 1024}
    array: Array = along_token(("token", "d_model"), sizes, "float32", 256)
    labels = {"sequences/start": (("sequence",), np.array([0]))}
    schema = Schema(kind="activations", n_token=6 * 256, unit_tokens=256, arrays={"value": array}, labels=labels)
    return schema, random_values(schema)


def test_a_full_disk_names_the_bytes_and_harms_no_earlier_unit(small_disk: Path) -> None:
    schema, values = large_schema()
    store = create(small_disk / "step", schema)
    (small_disk / "other").write_bytes(bytes(3 << 19))
    write(store, schema.grid[0], values)
    write(store, schema.grid[1], values)
    with pytest.raises(DiskFull) as full:
        write(store, schema.grid[2], values)
    assert f"no space for unit 2 of {store.path}: it takes 1,048,576 bytes, " in str(full.value)
    assert "2 units are recorded and safe. Free some space and run again" in str(full.value)
    assert (store.ledger.done(), store.verify()) == ({0, 1}, {})
    (small_disk / "other").unlink()
    write(store, schema.grid[2], values)
    assert store.array("value")[: 3 * 256].tobytes() == values["value"][: 3 * 256].tobytes()
    assert (store.ledger.done(), store.verify()) == ({0, 1, 2}, {})


def test_a_full_disk_makes_no_half_of_a_store(small_disk: Path) -> None:
    schema, _ = large_schema()
    free = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize))
    with pytest.raises(DiskFull, match=rf"no space to make .*{DATA}"):
        create(small_disk / "step", schema)
    assert list(small_disk.rglob(".*")) == []
    (small_disk / "other").unlink()
    assert len(create(small_disk / "step", schema).todo()) == 6
