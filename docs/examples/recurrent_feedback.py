"""Whether running layers again, or pushing what enters them, makes a model end a couplet in a rhyme.

    python docs/examples/recurrent_feedback.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python docs/examples/recurrent_feedback.py --first 14 --last 15 --strength 1 --sustained

A model is given the first line of each of fifteen couplets and writes the second, greedily: as it is, with the upper
half of its layers run twice, and with a push towards the words that rhyme before that half, at the last token of the
line. Without options these are the conditions; `--all` runs the 27 of the published sweep.

Published (candle-mi, Llama 3.2 1B, float32): 9 of 15 couplets rhyme as it is, 11 with a push of strength 2 before
layers 8 to 15, none with those layers run twice; pushes of 10 and more make it worse. Greedy text is chaotic: such
numbers differ by one or two between implementations.

Measured here (SmolLM2-135M-Instruct from its Q4_1 file, float32, every token computed anew under each condition and
without one): 4 of 15 as it is, all of which repeat the word of the first line; the same lines, word for word, with a
push of strength 2 before layers 15 to 29, which is little beside a residual stream of length 155; none with those
layers run twice.
"""

from pathlib import Path

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.analyze.recurrent_feedback import FeedbackCondition, feedback_sweep, rhyme_conditions


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/recurrent_feedback"))
@click.option("--first", type=int, help="First layer of the loop; the middle one by default.")
@click.option("--last", type=int, help="Last layer of the loop; the last one by default.")
@click.option("--strength", default=2.0, show_default=True, help="Of the feedback.")
@click.option("--sustained", is_flag=True, help="Push also at each new token.")
@click.option("--depth", default=2, show_default=True, help="Passes through the loop.")
@click.option("--all", "everything", is_flag=True, help="The conditions of the published sweep.")
@click.option("--max-new-tokens", default=30, show_default=True)
def main(
    source: str,
    output: Path,
    first: int | None,
    last: int | None,
    strength: float,
    sustained: bool,
    depth: int,
    everything: bool,
    max_new_tokens: int,
) -> None:
    model = forebay.load_model(source)
    n_layers = model.spec.n_layers
    loop = {"first": n_layers // 2 if first is None else first, "last": n_layers - 1 if last is None else last}
    conditions = [
        FeedbackCondition(**loop, depth=depth),
        FeedbackCondition(**loop, depth=depth, strength=strength, sustained=sustained),
    ]
    result = feedback_sweep(
        model, rhyme_conditions(n_layers) if everything else conditions, max_new_tokens=max_new_tokens
    )
    result.to_zarr(output / "recurrent_feedback.zarr", mode="w", consolidated=False)
    draw(result, output)
    console = Console()
    console.print(counts(result))
    console.print(lines(result.isel(condition=-1)))


def draw(result: xr.Dataset, output: Path) -> None:
    """Two bars for every condition, under those of the model as it is: all rhymes, and those of another word."""
    from matplotlib import pyplot

    from forebay import plot

    names = np.array(["as it is", *result["condition"].values], dtype=object)
    plain = (result["baseline_rhymes"], result["baseline_rhymes"] & ~result["baseline_repeats"])
    changed = (result["rhymes"], result["rhymes"] & ~result["repeats"])
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.3 * len(names)), layout="constrained")
    for ax, before, after, title in zip(axes, plain, changed, ("all rhymes", "rhymes of another word"), strict=True):
        numbers = np.concatenate([[before.sum().item()], after.sum("couplet").values])
        counted = xr.DataArray(numbers, dims="condition", coords={"condition": names}, attrs=result["n_rhymes"].attrs)
        plot.bars(counted, title=title, ax=ax)
    figure.savefig(output / "recurrent_feedback.png", dpi=120)
    pyplot.close(figure)


def counts(result: xr.Dataset) -> Table:
    """A row for every condition."""
    plain = f"{int(result['n_baseline_rhymes'])} rhyme as it is, {int(result['n_baseline_repeats'])} repeat the word"
    found = Table(title=f"Of {result.sizes['couplet']} couplets {plain}")
    found.add_column("condition")
    for name in ("rhyme", "repeat", "rescued", "lost"):
        found.add_column(name, justify="right")
    for name in result["condition"].values:
        row = result.sel(condition=name)
        found.add_row(str(name), *(str(int(row[count])) for count in ("n_rhymes", "n_repeats", "n_rescued", "n_lost")))
    return found


def lines(result: xr.Dataset) -> Table:
    """What was written to each first line, as it is and under the last condition."""
    found = Table(
        "first line", "as it is", str(result["condition"].item()), title="Second lines; * rhymes, = repeats the word"
    )
    for couplet in result["couplet"].values:
        row = result.sel(couplet=couplet)
        marks = [
            "= " if bool(row[f"{of}repeats"]) else "* " if bool(row[f"{of}rhymes"]) else "" for of in ("baseline_", "")
        ]
        found.add_row(row["first_line"].item(), marks[0] + row["baseline_line"].item(), marks[1] + row["line"].item())
    return found


if __name__ == "__main__":
    main()
