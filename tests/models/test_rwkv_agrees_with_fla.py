"""Folders that flash-linear-attention (fla) saves itself, run by its own kernels in Triton's interpreter on the CPU.

Needs the packages flash-linear-attention and triton, and the interpreter from the start of the process:

TRITON_INTERPRET=1 pytest -m slow tests/models/test_rwkv_agrees_with_fla.py
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay.stages.models.load import load_model

from .rwkv_layouts import Json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="asks for TRITON_INTERPRET=1"),
]

SMALL: Json = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 70,
    "intermediate_size": 48,
    "fuse_norm": False,
    "fuse_cross_entropy": False,
}
FINCH: Json = {"expand_k": 1.0, "expand_v": 1.0, "num_heads": 2, "proj_low_rank_dim": 5, "gate_low_rank_dim": 6}
GOOSE: Json = {
    "head_dim": 16,
    "decay_low_rank_dim": 5,
    "gate_low_rank_dim": 6,
    "a_low_rank_dim": 7,
    "v_low_rank_dim": 8,
}
MODELS: dict[str, tuple[int, Json]] = {
    "rwkv6": (6, FINCH),
    "rwkv6, wider heads": (6, FINCH | {"expand_k": 2.0, "expand_v": 2.0, "num_heads": 4, "intermediate_size": None}),
    "rwkv6, tied, no biases": (6, FINCH | {"tie_word_embeddings": True, "norm_bias": False, "norm_eps": 1e-4}),
    "rwkv6, fused norms": (6, FINCH | {"fuse_norm": True}),
    "rwkv7": (7, GOOSE),
    "rwkv7, heads by their number": (7, GOOSE | {"head_dim": None, "num_heads": 4, "intermediate_size": None}),
    "rwkv7, tied, no biases": (7, GOOSE | {"tie_word_embeddings": True, "norm_bias": False, "norm_eps": 1e-4}),
    "rwkv7, fused norms": (7, GOOSE | {"fuse_norm": True}),
}


@pytest.fixture(scope="module")
def fla() -> Any:
    """The package's models, each of whose kernels is split up in the first of its ways: which of them is fastest is
    measured on a device."""
    pytest.importorskip("triton")
    models = pytest.importorskip("fla.models")
    from triton.runtime.autotuner import Autotuner

    for kernel in gc.get_objects():
        if isinstance(kernel, Autotuner):
            kernel.configs = kernel.configs[:1]
    return models


def theirs(fla: Any, version: int, settings: Json) -> Any:
    kind = f"RWKV{version}"
    torch.manual_seed(version)
    model = getattr(fla, f"{kind}ForCausalLM")(getattr(fla, f"{kind}Config")(**SMALL | settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_fla_saved_gives_the_logits_that_fla_gives(name: str, fla: Any, tmp_path: Path) -> None:
    """Of fewer tokens than 64, which fla runs one by one; its kernels for longer texts the interpreter cannot run."""
    version, settings = MODELS[name]
    model = theirs(fla, version, settings)
    ids = torch.randint(0, 70, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected: Tensor = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu")
    found = ours.forward(ids).logits
    assert ours.spec.n_parameters == sum(weight.numel() for weight in set(model.parameters()))
    assert (found - expected).norm() < 2e-6 * expected.norm()
