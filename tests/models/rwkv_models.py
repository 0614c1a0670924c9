"""Random models of RWKV-6 and RWKV-7: as .pth files, and as their authors' own package `rwkv` runs them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

SIZES: Mapping[str, int] = {
    "d_model": 36,
    "n_heads": 3,
    "d_head": 12,
    "n_layers": 3,
    "d_vocab": 70,
    "d_mlp": 52,
    "rank": 5,
}
"""All heads together are as wide as the residual stream, which the package needs for RWKV-6; forebay does not."""


def random_tensors(version: int, *, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint as RWKV's authors name and lay them out; `sizes` replace those of SIZES."""
    given = {**SIZES, **sizes}
    wide, mlp, heads = given["d_model"], given["d_mlp"], given["n_heads"] * given["d_head"]
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors = {"emb.weight": noise(given["d_vocab"], wide, scale=1), "head.weight": noise(given["d_vocab"], wide)}
    norms = {"blocks.0.ln0": wide, "ln_out": wide}
    for layer in range(given["n_layers"]):
        block = f"blocks.{layer}."
        norms |= {f"{block}ln1": wide, f"{block}ln2": wide, f"{block}att.ln_x": heads}
        for name in ("receptance", "key", "value"):
            tensors[f"{block}att.{name}.weight"] = noise(heads, wide, scale=1.5 / wide**0.5)
        tensors[f"{block}att.output.weight"] = noise(wide, heads, scale=1.5 / heads**0.5)
        tensors[f"{block}ffn.key.weight"] = noise(mlp, wide, scale=1.5 / wide**0.5)
        tensors[f"{block}ffn.value.weight"] = noise(wide, mlp, scale=1.5 / mlp**0.5)
        own = _finch if version == 6 else _goose
        tensors |= {block + name: tensor for name, tensor in own(noise, given, layer).items()}
    for name, width in norms.items():
        tensors |= {f"{name}.weight": 1 + noise(width), f"{name}.bias": noise(width)}
    return tensors


def _finch(noise: Any, sizes: Mapping[str, int], layer: int) -> dict[str, Tensor]:
    wide, rank, heads = sizes["d_model"], sizes["rank"], sizes["n_heads"] * sizes["d_head"]
    return {
        **{f"att.time_maa_{name}": noise(1, 1, wide) for name in "xwkvrg"},
        "att.time_maa_w1": noise(wide, 5 * rank, scale=1 / wide**0.5),
        "att.time_maa_w2": noise(5, rank, wide),
        "att.time_decay": noise(1, 1, heads, scale=1.0) - 1,
        "att.time_decay_w1": noise(wide, rank + 2, scale=1 / wide**0.5),
        "att.time_decay_w2": noise(rank + 2, heads),
        "att.time_faaaa": noise(sizes["n_heads"], sizes["d_head"]),
        "att.gate.weight": noise(heads, wide, scale=1.5 / wide**0.5),
        "ffn.time_maa_k": noise(1, 1, wide),
        "ffn.time_maa_r": noise(1, 1, wide),
        "ffn.receptance.weight": noise(wide, wide, scale=1.5 / wide**0.5),
    }


def _goose(noise: Any, sizes: Mapping[str, int], layer: int) -> dict[str, Tensor]:
    wide, rank, heads = sizes["d_model"], sizes["rank"], sizes["n_heads"] * sizes["d_head"]
    ranks = {"w": rank, "a": rank + 1, "v": rank + 2, "g": rank + 3}
    if not layer:
        del ranks["v"]
    return {
        **{f"att.x_{name}": noise(1, 1, wide) for name in "rwkvag"},
        **{f"att.{name}0": noise(1, 1, heads, scale=1.0) for name in ranks if name != "g"},
        **{f"att.{name}1": noise(wide, rank, scale=1 / wide**0.5) for name, rank in ranks.items()},
        **{f"att.{name}2": noise(rank, heads) for name, rank in ranks.items()},
        "att.k_k": 1 + noise(1, 1, heads),
        "att.k_a": 1 + noise(1, 1, heads),
        "att.r_k": noise(sizes["n_heads"], sizes["d_head"]),
        "ffn.x_k": noise(1, 1, wide),
    }


def write_pth(path: Path, version: int, *, seed: int = 0, **sizes: int) -> Path:
    """Write a random checkpoint of these sizes, SIZES where nothing is said."""
    torch.save(random_tensors(version, seed=seed, **sizes), path)
    return path


_SETTINGS = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}


def _as_it_is(function: Any) -> Any:
    return function


@functools.cache
def _package(version: int, dtype: str) -> ModuleType:
    """The package's one module, which decides when it is imported which version it runs; and it keeps the dtype of the
    model that was loaded last, so that every dtype has a module of its own."""
    found = importlib.util.find_spec("rwkv")
    assert found is not None
    assert found.submodule_search_locations
    file = Path(found.submodule_search_locations[0]) / "model.py"
    spec = importlib.util.spec_from_file_location(f"rwkv_model_{version}_{dtype}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    settings = _SETTINGS | {"RWKV_V7_ON": str(int(version == 7))}
    as_written = {"ScriptModule": torch.nn.Module, "script_method": _as_it_is, "script": _as_it_is}
    quiet = contextlib.redirect_stdout(io.StringIO())
    # torch.jit is deprecated, which warns, and what it compiles it cannot compile twice.
    with mock.patch.dict(os.environ, settings), mock.patch.multiple(torch.jit, **as_written), quiet:
        spec.loader.exec_module(module)
    return module


class Theirs:
    """A .pth file run by the package `rwkv` on the CPU, in float32 ("fp32") or bfloat16 ("bf16")."""

    def __init__(self, path: Path, version: int, dtype: str = "fp32") -> None:
        self.version = version
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(os.environ, _SETTINGS):
            name = str(path.with_suffix("")) if version == 7 else str(path)
            self._model = _package(version, dtype).RWKV(name, f"cpu {dtype}")

    def run(self, ids: Sequence[int], state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits [position, vocab], and the state: for every layer what entered time mixing, the matrices of its heads,
        what entered channel mixing."""
        if state is not None:
            state = [part.clone() for part in state]
        with mock.patch.dict(os.environ, _SETTINGS):
            logits, state = self._model.forward(list(ids), state, full_output=True)
        return logits.view(len(ids), -1), state

    def matrices(self, state: list[Tensor], layer: int) -> Tensor:
        """The state of a layer's heads, [head, key channel, value channel]."""
        matrices = state[3 * layer + 1]
        return matrices.mT if self.version == 7 else matrices
