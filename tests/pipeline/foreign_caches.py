"""Files as delphi and activault lay them out, written from what is known of their formats and from nothing of ours; and
a call that ends before they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from forebay.pipeline.progress import Quiet
from forebay.stores.grid import Unit
from forebay.stores.ledger import Record


class Ending(Quiet):
    """Ends the call when so many units are recorded."""

    def __init__(self, units: int) -> None:
        self.units = units

    def recorded(self, unit: Unit, record: Record) -> None:
        self.units -= 1
        if not self.units:
            raise KeyboardInterrupt


def latents(shape: tuple[int, int, int], seed: int = 0, dead: Sequence[int] = ()) -> NDArray[np.float16]:
    """[sequence, position, latent], some of either sign, some tokens without any; `dead` latents never fire."""
    rng = np.random.default_rng(seed)
    found = np.where(rng.random(shape) < 0.3, rng.standard_normal(shape), 0)
    found[rng.random(shape[:2]) < 0.2] = 0
    found[..., list(dead)] = 0
    return found.astype(np.float16)


def write_delphi(
    root: Path,
    values: NDArray[Any],
    tokens: NDArray[np.int64],
    *,
    hookpoint: str = "layers.1.mlp",
    starts: Sequence[int] = (0,),
    locations: str = "uint16",
    config: Mapping[str, Any] = {"model_name": "org/model", "n_tokens": 35},
) -> Path:
    """A hookpoint of a cache, a file for the latents from each of `starts` on."""
    folder = root / "latents" / hookpoint
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for start, stop in zip(starts, [*starts[1:], values.shape[2]], strict=True):
        where = np.argwhere(values[..., start:stop] != 0)
        kept = {
            "locations": np.ascontiguousarray(where, locations),
            "activations": values[..., start:stop][tuple(where.T)],
            "tokens": tokens,
        }
        save_file(kept, folder / f"{start}_{stop - 1}.safetensors")
    (root / "log").mkdir(exist_ok=True)
    (root / "log" / "hookpoint_firing_counts.pt").write_bytes(b"never read")
    return folder


def write_activault(
    root: Path,
    hooks: Mapping[str, Sequence[torch.Tensor]],
    tokens: Sequence[torch.Tensor],
    *,
    jobs: Sequence[str] | None = None,
    config: Mapping[str, Any] = {"transformer_config": {"model_name": "org/model"}},
) -> Path:
    """A run with a file for each tensor of states [B, T, d], file n of every hook with `tokens[n]` and one uuid. Uuids
    sort against the order of files."""
    root.mkdir(parents=True)
    (root / "cfg.json").write_text(json.dumps(config))
    for name, files in hooks.items():
        (root / name).mkdir()
        said = {
            "batch_size": 2,
            "sequence_length": files[0].shape[1],
            "dtype": str(files[0].dtype),
            "d_in": files[0].shape[2],
            "batches_per_file": 1,
            "shape": list(files[0].shape),
            "input_ids_shape": list(tokens[0].shape),
            "bytes_per_file": 1,
        }
        (root / name / "metadata.json").write_text(json.dumps(said))
        (root / name / "statistics.json").write_text("{}")
        for n, (states, ids) in enumerate(zip(files, tokens, strict=True)):
            job = "0" if jobs is None else jobs[n]
            held = {"states": states, "input_ids": ids, "tensor_bytes": states.nbytes + ids.nbytes}
            torch.save(held, root / name / f"{uuid(n)}--{n + 1}_{job}.saved.pt")
    return root


def uuid(n: int) -> str:
    return f"{99 - n:08x}-0000-4000-8000-000000000000"
