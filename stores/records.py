"""What the record of a finished unit must say: which unit it is, the rows it owns and every object of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .digests import is_entry
from .grid import Unit

LONG = ("token", "sequence")
"""The axes of which a record names the rows."""


def record_faults(
    record: Mapping[str, Any], unit: Unit, rows: Mapping[str, slice], objects: Collection[str]
) -> list[str]:
    """What is wrong with the record of `unit`, which owns `rows` in `objects`, one line a fault. Reads none of the
    objects. Empty if all is well.
    """
    if record.get("unit") != unit.index:
        return [f"it is the record of unit {record.get('unit')}"]
    said, kept = record.get("rows"), record.get("objects")
    if not isinstance(said, dict) or not isinstance(kept, dict):
        return ["it names no rows or no objects"]
    due = {dim: [rows[dim].start, rows[dim].stop] for dim in LONG if dim == LONG[0] or dim in said}
    found = [
        f"it says that it has {dim} {said.get(dim)}; the unit owns {own}"
        for dim, own in due.items()
        if said.get(dim) != own
    ]
    found += [f"{key}: not in the record of unit {unit.index}" for key in sorted(set(objects) - set(kept))]
    found += [
        f"{key}: in the record of unit {unit.index}, which does not own it" for key in sorted(set(kept) - set(objects))
    ]
    found += [f"{key}: its size or checksum is not recorded" for key in sorted(kept) if not is_entry(kept[key])]
    if not found and record.get("bytes") != sum(entry["bytes"] for entry in kept.values()):
        found.append(f"it says {record.get('bytes')} bytes; its objects have {sum(e['bytes'] for e in kept.values())}")
    return found
