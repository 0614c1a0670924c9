"""Loads a model, runs it on a prompt and says with which tokens it would go on: the first program with forebay.

    python docs/examples/quick_start.py --model HuggingFaceTB/SmolLM2-135M-Instruct --prompt "The capital of France is"

Published (candle-mi, float32, the same prompt): Llama 3.2 1B " Paris" 39.3%, " a" 8.4%, " the" 7.0%, " one" 3.1%,
" also" 3.1%; Gemma 2 2B " a" 20.7%, " the" 10.0%, " one" 8.1%, " also" 7.8%, " home" 5.0%. Neither model was at hand.

Measured here: SmolLM2-135M-Instruct (Q4_1 weights) " Paris" 77.3%, " the" 6.5%, " London" 1.2%, " Le" 0.985%, " New"
0.930%.
"""

from pathlib import Path

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import forebay
from forebay.stages.analyze.logit_lens import format_probability, format_token
from forebay.stages.models.model import Model


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/quick_start"))
@click.option("--prompt", default="The capital of France is", show_default=True)
@click.option("--top", default=5, show_default=True)
def main(source: str, output: Path, prompt: str, top: int) -> None:
    model = forebay.load_model(source)
    result = strongest(model, prompt, top)
    result.to_zarr(output / "quick_start.zarr", mode="w", consolidated=False)
    draw(result, output)
    table = Table("rank", "token", "id", "probability", title=escape(f"{prompt!r} goes on with"))
    for one in result["probability"]:
        text = format_token(str(one["token_text"].item()))
        table.add_row(
            str(int(one["rank"])), escape(f"'{text}'"), str(int(one["token_id"])), format_probability(float(one))
        )
    Console().print(table)


def strongest(model: Model, prompt: str, top: int) -> xr.Dataset:
    """The `top` tokens that follow a prompt: `probability[rank]` with their ids and texts."""
    out = model.forward(model.tokenizer.to_tokens(prompt))
    assert out.logits is not None
    found = out.logits[0, -1].float().softmax(-1).topk(top)
    texts = [model.tokenizer.to_string([token]) for token in found.indices.tolist()]
    coords = {
        "rank": np.arange(top),
        "token_id": ("rank", found.indices.cpu().numpy()),
        "token_text": ("rank", np.array(texts, dtype=object)),
    }
    attrs = {"units": "probability", "long_name": "probability of the next token"}
    probability = xr.DataArray(found.values.cpu().numpy(), dims="rank", coords=coords, attrs=attrs)
    return probability.to_dataset(name="probability").assign_attrs(prompt=prompt)


def draw(result: xr.Dataset, output: Path) -> None:
    from forebay import plot

    axes = plot.bars(result["probability"], title=f"next token after {result.attrs['prompt']!r}")
    axes.figure.savefig(output / "quick_start.png", dpi=110)


if __name__ == "__main__":
    main()
