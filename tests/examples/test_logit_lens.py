"""The example of the logit lens writes what the library gives, of a prompt and of a run that its recipe makes."""

from __future__ import annotations

import runpy
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from click.testing import CliRunner

import forebay

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
ANSWER = "a"


def run_script(model: Path, output: Path, *options: str) -> tuple[xr.Dataset, str]:
    main = runpy.run_path(str(EXAMPLES / "logit_lens.py"))["main"]
    given = ["--model", str(model), "--output", str(output), "--answer", ANSWER, *options]
    ran = CliRunner().invoke(main, given, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    assert (output / "logit_lens.png").stat().st_size > 10_000
    return xr.open_zarr(output / "logit_lens.zarr", consolidated=False), ran.output


def check(found: xr.Dataset, said: str, model: Path, prompt: str) -> None:
    """By transformers' hidden states, final norm and head."""
    from transformers import LlamaForCausalLM

    tokenizer = forebay.load_model(model).tokenizer
    reference = LlamaForCausalLM.from_pretrained(model).eval()
    ids, answer = tokenizer.to_tokens(prompt), tokenizer.find_token_id(ANSWER)
    with torch.inference_mode():
        states = reference(ids, output_hidden_states=True).hidden_states[1:]
        logits = [reference.lm_head(reference.model.norm(state[0])) for state in states[:-1]]
        logits.append(reference.lm_head(states[-1][0]))  # transformers gives the last one normed
    for layer, own in enumerate(logits):
        here = found.sel(layer=layer)
        strongest = own.softmax(-1).topk(4)
        np.testing.assert_array_equal(here["top_token_id"], strongest.indices)
        np.testing.assert_allclose(here["top_probability"], strongest.values, rtol=1e-3)
        stronger = (own > own[:, answer, None]).sum(-1)
        np.testing.assert_array_equal(here["token_rank"].sel(vocab=answer), stronger)
    ranks = found["token_rank"].sel(vocab=answer).values[:, -1]
    for k in (1, 5, 10):
        first = next((layer for layer in range(3) if ranks[layer] < k), None)
        shown = "never" if first is None else f"first in layer {first}"
        assert f"{ANSWER!r} among the {k} strongest: {shown}" in said
    texts = [tokenizer.to_string([one]) for one in found["top_token_id"].values[2, -1].tolist()]
    assert found["top_token_text"].values[2, -1].tolist() == texts


def test_of_a_prompt(tiny_model: Path, tmp_path: Path) -> None:
    prompt = "It is a truth [universally acknowledged"
    found, said = run_script(tiny_model, tmp_path, "--prompt", prompt, "--top", "4")
    check(found, said, tiny_model, prompt)


def test_of_a_document_of_a_run_that_its_recipe_makes(tiny_model: Path, tmp_path: Path) -> None:
    recipe = (EXAMPLES / "logit_lens.toml").read_text()
    (tmp_path / "recipe.toml").write_text(recipe.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model)))
    corpus = tomllib.loads(recipe)["corpus"]["files"]
    shutil.copy(EXAMPLES / corpus[0], tmp_path)
    assert forebay.run(tmp_path / "recipe.toml", tmp_path / "run").code == 0
    options: tuple[Any, ...] = ("--run", str(tmp_path / "run"), "--document", "1", "--top", "4")
    found, said = run_script(tiny_model, tmp_path / "out", *options)
    check(found, said, tiny_model, "The capital of Japan is the city of")
