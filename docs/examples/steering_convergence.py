"""Whether the layers above an injection lead the residual stream back to where it was.

    python docs/examples/steering_convergence.py --model HuggingFaceTB/SmolLM2-135M-Instruct

What tells "The capital of France is" from "The capital of Germany is" in a layer, v = clean − contrastive at the last
token, is added there, layer by layer, and the residual streams of the layers above are compared with those without it.
The first whose cosine is at least 0.95 has absorbed the push. The highest layer whose injection is absorbed is then
pushed with twelve strengths from 0.5 to 6.

Published (candle-mi, float32): Llama 3.2 1B absorbs 13 of its 16 layers, 1.5 layers above the injection, Gemma 2 2B 24
of 26, 1.0 above; in both a strength of 1.0 is absorbed and one of 1.5 is not. Pushed into the last layer, " Paris"
rises to .903 and .368.

Measured here (SmolLM2-135M-Instruct from its Q4_1 file, float32): 24 of 30 layers absorb, 1.0 above the injection; in
layer 23 a strength of 1.0 is absorbed and one of 1.5 is not; pushed into the last layer, " Paris" rises from .773 to
.913. But a cosine sees little of what happens: up to layer 22 that at the injection itself is .990 or more, so that
nothing was there to be absorbed. By length, relative to the stream, a push into layers 0 to 8 ends at half of what it
was or less (.0408 becomes .0174 in layer 8), one into layer 12 or above at 0.6 to 1.5 times it.
"""

from pathlib import Path

import click
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.analyze.steering_convergence import steering_convergence, strength_sweep


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/steering_convergence"))
@click.option("--prompt", default="The capital of France is", show_default=True)
@click.option("--contrastive", default="The capital of Germany is", show_default=True)
@click.option("--word", default="Paris", show_default=True, help="Followed by the last of its tokens.")
@click.option("--threshold", default=0.95, show_default=True, help="Cosine from which on a push is absorbed.")
def main(source: str, output: Path, prompt: str, contrastive: str, word: str, threshold: float) -> None:
    model = forebay.load_model(source)
    matrix = steering_convergence(model, prompt, contrastive, tokens=word, threshold=threshold)
    best = int(matrix["best_injection_layer"])
    sweep = strength_sweep(model, prompt, contrastive, layer=best, tokens=word, threshold=threshold)
    matrix.to_zarr(output / "steering_convergence.zarr", mode="w", consolidated=False)
    sweep.to_zarr(output / "strength_sweep.zarr", mode="w", consolidated=False)
    draw(matrix, sweep, output)
    console = Console()
    absorbed = matrix["absorption_layer"] >= 0
    depth = float(matrix["absorption_depth"].mean())
    console.print(
        f"{int(absorbed.sum())} of {absorbed.size} injections are absorbed, {depth:.1f} layers above on average; "
        f"{word!r} without injection: {matrix['baseline_probability'].item():.4f}"
    )
    console.print(table(matrix, "injection_layer", "Injections of strength 1, by layer"))
    console.print(table(sweep, "strength", f"Injections into layer {best}, by strength"))


def draw(matrix: xr.Dataset, sweep: xr.Dataset, output: Path) -> None:
    """The convergence matrix, and beside it what a stronger injection does to the word."""
    from matplotlib import pyplot

    from forebay import plot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    plot.heat_map(matrix["cosine"], ax=axes[0])
    plot.line(sweep["probability"].isel(vocab=0), x="strength", ax=axes[1])
    figure.savefig(output / "steering_convergence.png", dpi=120)
    pyplot.close(figure)


def table(found: xr.Dataset, dim: str, title: str) -> Table:
    """A row for every layer or strength."""
    shown = Table(title=title)
    heads = (dim.replace("_", " "), "cosine there", "absorbed in", "distance there", "in the end", "KL", "probability")
    for name in heads:
        shown.add_column(name, justify="right")
    for place in found[dim].values:
        row = found.sel({dim: place})
        there, end = row.sel(layer=row["injection_layer"]), row.isel(layer=-1)
        at = int(row["absorption_layer"])
        numbers = (there["distance"], end["distance"], row["kl_divergence"], row["probability"])
        cells = [f"{value.item():.4f}" for value in numbers]
        shown.add_row(f"{place:g}", f"{float(there['cosine']):.3f}", "never" if at < 0 else str(at), *cells)
    return shown


if __name__ == "__main__":
    main()
