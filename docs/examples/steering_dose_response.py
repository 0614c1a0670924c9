"""How a prediction answers to more or less attention of the last token to the first one.

    python docs/examples/steering_dose_response.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The weight of the edge from the last token to the first is multiplied by each dose in all heads of the middle layer, and
its row divided by its sum. Reported are the attention that is left, the divergence of the prediction and what becomes
of one word; and, from the curve, the scale that would double the attention.

Published (candle-mi, float32, "The capital of France is", KL at doses of 0.5, 4 and 6): Llama 3.2 1B, layer 8, whose
attention is .630 without steering: .006, .029, .043; Gemma 2 2B, layer 13 (.589): .001, .002, .003; StarCoder2 3B,
layer 15 (.673): .002, .004, .005.

Measured here (SmolLM2-135M-Instruct from its Q4_1 file, float32): layer 15 (.784): .0012, .0036, .0053; " Paris" goes
from .756 over .773 without steering to .805. No scale doubles an attention of more than a half.
"""

from pathlib import Path

import click
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.analyze.steering import dose_response, scale_for_target


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/steering_dose_response"))
@click.option("--prompt", default="The capital of France is", show_default=True)
@click.option("--word", default="Paris", show_default=True, help="Followed by the last of its tokens.")
@click.option("--layer", type=int, help="The middle one by default.")
@click.option("--query", default=-1, show_default=True, help="The token that attends.")
@click.option("--key", default=0, show_default=True, help="The token that is attended to.")
def main(source: str, output: Path, prompt: str, word: str, layer: int | None, query: int, key: int) -> None:
    model = forebay.load_model(source)
    curve = dose_response(model, prompt, [(query, key)], layer=layer, tokens=word)
    doubled = 2 * curve["baseline_attention"]
    curve["scale_to_double"] = scale_for_target(curve, float(doubled))
    curve.to_zarr(output / "steering_dose_response.zarr", mode="w", consolidated=False)
    draw(curve, output)
    console = Console()
    console.print(table(curve))
    reached = float(curve["scale_to_double"])
    least, most = float(curve["attention"].min()), float(curve["attention"].max())
    console.print(
        f"A scale of {reached:.2f} doubles the attention to {float(doubled):.3f}."
        if reached == reached
        else f"No dose doubles the attention to {float(doubled):.3f}: it goes from {least:.3f} to {most:.3f}."
    )


def draw(curve: xr.Dataset, output: Path) -> None:
    """A panel for every variable over the dose."""
    from matplotlib import pyplot

    from forebay import plot

    axes = plot.dose_response(curve)
    axes[0].figure.savefig(output / "steering_dose_response.png", dpi=120)
    pyplot.close(axes[0].figure)


def table(curve: xr.Dataset) -> Table:
    """A row for every dose, under that of no steering."""
    before = (
        f"attention {float(curve['baseline_attention']):.3f}, probability {curve['baseline_probability'].item():.4f}"
    )
    found = Table(title=f"Layer {int(curve['layer'])}; without steering: {before}")
    for name in ("dose", "attention", "KL (nats)", "probability", "logit, base − changed"):
        found.add_column(name, justify="right")
    for dose in curve["dose"].values:
        row = curve.sel(dose=dose)
        found.add_row(
            f"{dose:g}",
            f"{float(row['attention']):.3f}",
            f"{float(row['kl_divergence']):.4f}",
            f"{row['probability'].item():.4f}",
            f"{row['logit_change'].item():+.3f}",
        )
    return found


if __name__ == "__main__":
    main()
