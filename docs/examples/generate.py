"""Continues a prompt greedily, token by token, and says how sure the model was of each.

    python docs/examples/generate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --prompt "The capital of France is"

candle-mi's example of the same name: 20 tokens, the strongest one each time; no numbers are published. It runs the
whole sequence anew for every token. So does this with `--no-cache`; otherwise keys and values of the past are kept,
which gives the same tokens.

Measured here: SmolLM2-135M-Instruct (Q4_1 weights) says " Paris.", two line breaks and "The answer is: 2018-01-22 ";
it is surest of the second hyphen (99.9%) and of " Paris" (77.3%).
"""

from pathlib import Path

import click
import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.markup import escape

import forebay
from forebay.stages.models.model import Model


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/generate"))
@click.option("--prompt", default="The capital of France is", show_default=True)
@click.option("--tokens", "n_token", default=20, show_default=True)
@click.option("--cache/--no-cache", default=True, show_default=True)
def main(source: str, output: Path, prompt: str, n_token: int, cache: bool) -> None:
    model = forebay.load_model(source)
    result = continuation(model, prompt, n_token, cache)
    result.to_zarr(output / "generate.zarr", mode="w", consolidated=False)
    draw(result, output)
    text = "".join(result["token_text"].values.tolist())
    Console().print(f"[dim]{escape(prompt)}[/dim][bold]{escape(text)}[/bold]", highlight=False)


def continuation(model: Model, prompt: str, n_token: int, cache: bool) -> xr.Dataset:
    """The tokens that greedily follow a prompt, `token_id[position]`, with the probability that each was given."""
    (found,) = model.generate(prompt, max_new_tokens=n_token, cache=cache)
    ids, before = found.token_ids, len(found.prompt)
    out = model.forward(torch.cat([found.prompt, ids])[None])  # once more over all of it, for the probabilities
    assert out.logits is not None
    said = out.logits[0, before - 1 : before - 1 + len(ids)].float().softmax(-1).cpu()
    position = np.arange(before, before + len(ids))
    attrs = {"units": "probability", "long_name": "probability of each generated token"}
    texts = np.array([model.tokenizer.to_string([token]) for token in ids.tolist()], dtype=object)
    return xr.Dataset(
        {"probability": ("position", said.gather(-1, ids[:, None])[:, 0].numpy(), attrs)},
        coords={
            "position": position,
            "token_id": ("position", ids.numpy()),
            "token_text": ("position", texts),
        },
        attrs={"prompt": prompt},
    )


def draw(result: xr.Dataset, output: Path) -> None:
    from forebay import plot

    axes = plot.line(result["probability"], title=f"greedily after {result.attrs['prompt']!r}")
    axes.figure.savefig(output / "generate.png", dpi=110)


if __name__ == "__main__":
    main()
