"""Which layers and positions carry a country from its name to the prediction of its capital.

    python docs/examples/activation_patching.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The residual stream after every layer at every position of "The capital of France is" is put, one at a time, into the
run of "The capital of Poland is". Recovery is 1 − KL_patched / KL_corrupted, the divergences being those from what
the clean run says at its last token.

Published (candle-mi, float32): at the subject's position Llama 3.2 1B, KL_corrupted 3.78, recovers more than 99 % in
layers 0 to 8, and from 92 % down to 0 in layers 9 to 15; Gemma 2 2B and StarCoder2 3B recover more than 89 % and
94 % in their first 18 and 21 layers and little after them.

Measured on SmolLM2-135M-Instruct (4-bit weights, float32, 5 tokens): KL_corrupted 6.07 nats; at " France" 95 % or more
in layers 0 to 22 (at least 99.7 % up to layer 15) and nothing from layer 23 on; at " is" under 5 % up to layer 11, 34 %
at layer 22, and at least 99.9 % from 23 on: what names the capital is moved to the last token in one layer.
"""

from pathlib import Path

import click
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.analyze.activation_patching import activation_patching
from forebay.stages.analyze.patching import divergence_from, recovery


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/activation_patching"))
@click.option("--clean", default="The capital of France is", show_default=True)
@click.option("--corrupted", default="The capital of Poland is", show_default=True)
@click.option("--hook", "hooks", multiple=True, default=["hook_resid_post"], help="Kinds of hook point.")
@click.option("--batch-size", default=32, show_default=True)
def main(source: str, output: Path, clean: str, corrupted: str, hooks: tuple[str, ...], batch_size: int) -> None:
    model = forebay.load_model(source)
    metric = divergence_from(model, clean)
    result = activation_patching(model, clean, corrupted, metric, hooks=hooks, batch_size=batch_size)
    result.to_zarr(output / "activation_patching.zarr", mode="w", consolidated=False)
    fraction = recovery(result).isel(pair=0)
    draw(fraction, hooks, output)
    Console().print(table(fraction[hooks[0]], float(result["corrupted"][0])))


def draw(fraction: xr.Dataset, hooks: tuple[str, ...], output: Path) -> None:
    """A heat map of every kind; of kinds with heads that of the last position."""
    from matplotlib import pyplot

    from forebay import plot

    figure, axes = pyplot.subplots(len(hooks), squeeze=False, figsize=(8, 5 * len(hooks)), layout="constrained")
    for ax, kind in zip(axes[:, 0], hooks, strict=True):
        values = fraction[kind]
        plot.heat_map(values.isel(position=-1) if values.ndim > 2 else values, center=0.0, ax=ax)
    figure.savefig(output / "activation_patching.png", dpi=120)
    pyplot.close(figure)


def table(values: xr.DataArray, divergence: float) -> Table:
    """What is recovered where the prompts differ and at the last position, by layer; of heads the most by any."""
    differ = values["token_id"] != values["corrupted_token_id"]
    shown = values.isel(position=(differ | (values["position"] == values["position"][-1])).values)
    found = Table(title=f"Recovery by {values.name}; KL of the corrupted run: {divergence:.2f} nats")
    found.add_column("layer", justify="right")
    texts = shown["token_text"].values if "token_text" in shown.coords else shown["token_id"].values
    for text in texts:
        found.add_column(repr(text), justify="right")
    for layer in shown["layer"].values:
        rest = [dim for dim in shown.dims if dim not in ("layer", "position")]
        row = shown.sel(layer=layer).max(rest)
        found.add_row(str(layer), *(f"{100 * float(value):.1f} %" for value in row))
    return found


if __name__ == "__main__":
    main()
