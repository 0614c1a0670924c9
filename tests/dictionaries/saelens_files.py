"""The golden files of SAELens as folders, and small folders of SAELens' that are made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, Any] = json.loads((GOLDEN / "saelens" / "cases.json").read_text())["cases"]
D_IN, D_SAE, D_OUT = 7, 26, 10


@cache
def _tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "saelens" / "cases.safetensors")


@dataclass(frozen=True)
class Golden:
    """A folder as SAELens saved it, random inputs [2, 5, d_in], and what SAELens makes of them."""

    folder: Path
    how: Mapping[str, Any]
    x: Tensor
    features: Tensor
    reconstruction: Tensor
    low: tuple[Tensor, Tensor] | None


def golden(name: str, folder: Path) -> Golden:
    """The files of a case in a folder, which is made; heads of inputs and outputs laid flat, as forebay takes them."""
    folder.mkdir(parents=True)
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors().items():
        case, file, tensor_name = key.split("/")
        if case == name:
            files.setdefault(file, {})[tensor_name] = tensor
    values = files.pop("golden")
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    for file, said in CASES[name]["files"].items():
        (folder / file).write_text(json.dumps(said))
    low = "bfloat16_features" in values
    return Golden(
        folder=folder,
        how=CASES[name],
        x=values["x"].flatten(2),
        features=values["features"],
        reconstruction=values["reconstruction"].flatten(2),
        low=(values["bfloat16_features"], values["bfloat16_reconstruction"]) if low else None,
    )


def said_by_saelens(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """x, features and reconstruction beside the files of a golden folder, and hook points and model as SAELens says."""
    with safe_open(folder / "golden.safetensors", framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        return values, json.loads(file.metadata()["said"])


def agree(found: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    """Equal to rounding: by norm, and by the largest error in units of the largest value."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs()
    assert float(error.norm()) <= relative * float(expected.double().norm())
    assert float(error.max()) <= relative * float(expected.double().abs().max())


def tensors_of(seed: int = 0, d_out: int = D_IN, **more: Tensor) -> dict[str, Tensor]:
    """Random weights of a standard autoencoder, or a transcoder, with what is given besides."""
    random = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(D_IN, D_SAE, generator=random),
        "b_enc": torch.randn(D_SAE, generator=random),
        "W_dec": torch.randn(D_SAE, d_out, generator=random),
        "b_dec": torch.randn(d_out, generator=random),
        **more,
    }


def cfg_of(architecture: str = "standard", **more: Any) -> dict[str, Any]:
    """A `cfg.json` of SAELens 6."""
    return {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2-small", "sae_lens_version": "6.5.1"},
        **more,
    }


def write_folder(folder: Path, cfg: Any, tensors: Mapping[str, Tensor], scaler: Any = None) -> Path:
    """A folder of SAELens' with these files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    if scaler is not None:
        (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    return folder
