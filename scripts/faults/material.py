"""A real model of a few thousand weights, a corpus, and a recipe of many small units: all that a torture needs."""

from __future__ import annotations

import json
import random
from pathlib import Path

D_MODEL, D_HEAD, D_MLP, N_LAYER, N_HEAD, N_KV = 24, 8, 40, 2, 4, 2
END = "<|endoftext|>"
WORDS = "the stream runs down to a mill and turns its wheel while rain falls on hills far above where no one looks"

RECIPE = """
[corpus]
files = ["corpus.jsonl"]

[model]
source = "model"

[tokenize]
context = 48
layout = "documents"
long_documents = "split"
unit_tokens = 96

[capture]
hooks = ["blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern"]
store_dtype = "bfloat16"
unit_tokens = 40
batch = 2
threads = 1
"""


def make(folder: Path, n_document: int, seed: int = 0) -> Path:
    """Writes model, corpus and recipe into a folder and gives the recipe's path. Sequences straddle units."""
    chance = random.Random(seed)
    _make_model(folder / "model", seed)
    words = WORDS.split()
    texts = (" ".join(chance.choices(words, k=chance.randrange(60))) for _ in range(n_document))
    lines = (json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def _make_model(folder: Path, seed: int) -> None:
    """A random Llama and a byte-level BPE, in the files that a hub's repository has."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    n_vocab = _train_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": n_vocab,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_KV,
        "head_dim": D_HEAD,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shapes = {"model.embed_tokens": (n_vocab, D_MODEL), "lm_head": (n_vocab, D_MODEL)}
    ones = {"model.norm.weight": (D_MODEL,)}
    for layer in range(N_LAYER):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj": (n * D_HEAD, D_MODEL) for name, n in (("q", N_HEAD), ("k", N_KV))}
        shapes |= {f"{at}.self_attn.v_proj": (N_KV * D_HEAD, D_MODEL)}
        shapes |= {f"{at}.self_attn.o_proj": (D_MODEL, N_HEAD * D_HEAD)}
        shapes |= {f"{at}.mlp.{name}_proj": (D_MLP, D_MODEL) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (D_MODEL, D_MLP)}
        ones |= {f"{at}.{name}_layernorm.weight": (D_MODEL,) for name in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(seed)
    weights = {f"{name}.weight": 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {name: torch.ones(shape) for name, shape in ones.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _train_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": END, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())
