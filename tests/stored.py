"""What a run holds, byte for byte: equal for a run that was killed and one that never was."""

from __future__ import annotations

from pathlib import Path


def data(folder: Path) -> dict[str, bytes]:
    """Every file of every store of a run but the half-written ones that Zarr never takes for its own."""
    return _read(folder, [path for store in folder.glob("*/data.zarr") for path in store.rglob("*")])


def values(folder: Path) -> dict[str, bytes]:
    """Every object and label of a run's stores and indexes. Headers tell where a trained dictionary lay."""
    stores = folder.rglob("data.zarr")
    return _read(
        folder, [path for store in stores for path in store.rglob("*") if "c" in path.relative_to(store).parts]
    )


def _read(folder: Path, paths: list[Path]) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(paths)
        if path.is_file() and path.suffix != ".partial"
    }
