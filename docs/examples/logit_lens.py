"""The logit lens: what a model would say after each of its layers, and where the answer first appears.

    python docs/examples/logit_lens.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    forebay run docs/examples/logit_lens.toml
    python docs/examples/logit_lens.py --run runs/logit_lens --document 1 --answer " Tokyo"

The prompt is run in one forward, or is a document of a run that logit_lens.toml made; what reads them is the same.

Published (candle-mi, float32, "The capital of France is", the last token, final soft-cap left out): " Paris" is first
in layer 11 of Llama 3.2 1B; in layer 25 of Gemma 2 2B it is ninth (p 1.35e-5); " Par" of StarCoder2 3B is first from
layer 22 on (.330). None of the three models was at hand.

Measured here: in SmolLM2-135M-Instruct (Q4_1 weights, no beginning-of-sequence token) " Paris" is among the ten
strongest from layer 27 of 30 on (rank 6, 1.1%), third in layer 28 (7.0%) and first in layer 29 alone, the last (77.3%).
Layers 1 to 22 say a full stop or a space.
"""

from pathlib import Path

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import forebay
from forebay.stages.analyze.logit_lens import first_appearance, format_probability, format_token, logit_lens
from forebay.stages.analyze.tokens import as_run
from forebay.stages.models.model import Model

HOOK = "hook_resid_post"


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/logit_lens"))
@click.option("--prompt", default="The capital of France is", show_default=True)
@click.option(
    "--run", "folder", type=click.Path(path_type=Path, exists=True), help="A run to read, in place of --prompt."
)
@click.option("--document", default=0, show_default=True, help="Which document of the run.")
@click.option("--answer", default=" Paris", show_default=True, help="One token, whose rank is told in every layer.")
@click.option("--top", default=5, show_default=True)
@click.option("--softcap/--no-softcap", default=True, show_default=True)
def main(
    source: str,
    output: Path,
    prompt: str,
    folder: Path | None,
    document: int,
    answer: str,
    top: int,
    softcap: bool,
) -> None:
    model = forebay.load_model(source)
    streams = of_prompt(model, prompt) if folder is None else of_run(folder, document)
    token = model.tokenizer.find_token_id(answer)
    lens = logit_lens(streams, model.unembedding, top=max(top, 10), tokens=[token], softcap=softcap)
    lens["first_appearance"] = xr.concat(
        [first_appearance(lens, token, k) for k in (1, 5, 10)], xr.Variable("k", [1, 5, 10])
    )
    lens = with_texts(model, lens.isel(rank=slice(top)).compute())
    lens.to_zarr(output / "logit_lens.zarr", mode="w", consolidated=False)
    draw(model, lens, output)
    console = Console()
    console.print(table(lens.isel(token=-1), answer))
    for k in (1, 5, 10):
        layer = float(lens["first_appearance"].isel(token=-1).sel(k=k))
        found = "never" if np.isnan(layer) else f"first in layer {layer:.0f}"
        console.print(escape(f"{answer!r} among the {k} strongest: {found}"), highlight=False)


def of_prompt(model: Model, prompt: str) -> xr.Dataset:
    """The residual stream after every layer, of one prompt."""
    hooks = forebay.HookSpec().capture(f"blocks.*.{HOOK}")
    forward = model.forward(model.tokenizer.to_tokens(prompt), hooks, logits=False)
    return as_run(forward)[f"activations/{HOOK}"].to_dataset()


def of_run(folder: Path, document: int) -> xr.Dataset:
    """The same of a document of a run, lazily."""
    return forebay.open_run(folder)[f"activations/{HOOK}"].to_dataset().sel(document=document)


def with_texts(model: Model, lens: xr.Dataset) -> xr.Dataset:
    """The lens with the texts of the tokens that it tells."""
    known = {token: model.tokenizer.to_string([token]) for token in np.unique(lens["top_token_id"]).tolist()}
    texts = np.vectorize(known.__getitem__, otypes=[object])(lens["top_token_id"].values)
    return lens.assign(
        top_token_text=(lens["top_token_id"].dims, texts, {"long_name": "texts of the strongest tokens"})
    )


def draw(model: Model, lens: xr.Dataset, output: Path) -> None:
    from forebay import plot

    axes = plot.lens_table(lens, decode=model.tokenizer.to_str_tokens, title="the strongest token after each layer")
    axes.figure.savefig(output / "logit_lens.png", dpi=110)


def table(last: xr.Dataset, answer: str) -> Table:
    """Of one token: the strongest tokens of every layer, and how the answer does."""
    names = [f"rank {rank}" for rank in range(last.sizes["rank"])]
    shown = Table("layer", *names, escape(f"rank of {answer!r}"), "probability", title="After the last token")
    for layer in last["layer"].values:
        here = last.sel(layer=layer)
        pairs = zip(here["top_token_text"].values, here["top_probability"].values, strict=True)
        cells = [escape(f"'{format_token(text)}' {format_probability(float(p))}") for text, p in pairs]
        rank, probability = int(here["token_rank"][0]), float(here["token_probability"][0])
        shown.add_row(str(layer), *cells, str(rank), format_probability(probability))
    return shown


if __name__ == "__main__":
    main()
