"""What a prediction loses when its last token may not attend to the first one, to the subject, or to itself.

    python docs/examples/attention_knockout.py --model HuggingFaceTB/SmolLM2-135M-Instruct

One knockout: the edge from the last token to the first, in all heads of the layer in the middle; its divergence from
the model as it is, and the tokens whose probabilities change most. Then the same edge in one head of one layer after
another, and, in windows of layers, edges to the first token, to the subject and to the last token itself. Geva et al.
(2023, "Dissecting Recall of Factual Associations in Auto-Regressive Language Models") plot the same, the relative
change of the probability of the model's own answer, for windows of 9 of GPT-2 XL's 48 layers.

Published (candle-mi, float32, the default prompt with each tokenizer's special tokens), the first knockout: Llama 3.2
1B, layer 8: KL .05591, " Paris" from .39345 to .26044; Gemma 2 2B, layer 13: .01705, .03878 to .06650; StarCoder2 3B,
layer 15: .02852, " Par" .40931 to .32178. Its Llama has unscaled rotary frequencies, and its knockout on Gemma 2
leaves a small weight, for it stands before the soft-cap. None of these models was at hand, nor GPT-2 XL.

Measured here: SmolLM2-135M-Instruct (Q4_1 weights, no beginning-of-sequence token), layer 15: KL .05086, " Paris" from
.77253 to .66253, its logit lowered by .962. One head carries most of what the edge to the first token does: L18H8, KL
.882; the next one, L15H6, .109. In windows of 5 layers " Paris" loses 87 to 90 % where layer 23 is among those that
cannot see the subject (around layers 21 to 25) and 40 % around layers 12 and 13; all of it where around layer 20 the
first token, which heads attend to when they attend to nothing in particular, is out of sight; and 17 % at most where
the last token cannot see itself.
"""

from pathlib import Path

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.analyze.attention_ablation import knockout_effect, knockout_sweep
from forebay.stages.analyze.metrics import Probability
from forebay.stages.models.model import Model

LAST_TO_FIRST = [(-1, 0)]


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/attention_knockout"))
@click.option("--prompt", default="The capital of France is", show_default=True)
@click.option("--subject", default="France", show_default=True, help="A part of the prompt.")
@click.option("--window", default=5, show_default=True, help="Layers cut together in the sweep by layer.")
def main(source: str, output: Path, prompt: str, subject: str, window: int) -> None:
    model = forebay.load_model(source)
    spec = forebay.KnockoutSpec(edges=LAST_TO_FIRST, layers=model.spec.n_layers // 2)
    effect = knockout_effect(model, prompt, spec, tokens=answer_to(model, prompt))
    by_head = knockout_sweep(model, prompt, LAST_TO_FIRST, by=("layer", "head"))
    by_layer = sweep_by_layer(model, prompt, subject, window)
    result = effect.assign(by_head=by_head["change"], by_layer=by_layer)
    result.to_zarr(output / "attention_knockout.zarr", mode="w", consolidated=False)
    draw(result, output)
    console = Console()
    console.print(top_changes(effect, model.spec.n_layers // 2))
    console.print(most_affected(result["by_layer"], window))


def answer_to(model: Model, prompt: str) -> int:
    """The token that the model predicts."""
    logits = model.forward(model.tokenizer.to_tokens(prompt)).logits
    assert logits is not None
    return int(logits[0, -1].argmax())


def sweep_by_layer(model: Model, prompt: str, subject: str, window: int) -> xr.DataArray:
    """The relative change of the answer's probability [target, layer], in percent."""
    positions = list(model.tokenizer.encode(prompt).label_spans({"subject": subject})["subject"])
    targets = {"first": [(-1, 0)], "subject": [(-1, positions)], "last": [(-1, -1)]}
    metric = Probability(token=answer_to(model, prompt))
    found = [knockout_sweep(model, prompt, edges, metric=metric, window=window) for edges in targets.values()]
    change = xr.concat([100 * one["change"] / one["baseline"] for one in found], "target")
    return change.assign_coords(target=np.array(list(targets), dtype=object)).assign_attrs(
        units="%", long_name="change of the answer's probability"
    )


def draw(result: xr.Dataset, output: Path) -> None:
    from matplotlib import pyplot

    from forebay import plot

    figure, axes = pyplot.subplots(1, 3, figsize=(19, 6), layout="constrained")
    plot.bars(result["probability_change"], title="last → first cut in the middle layer", ax=axes[0])
    plot.heat_map(result["by_head"], title="last → first cut in one head", ax=axes[1])
    plot.line(result["by_layer"], title="cut around each layer", ax=axes[2])
    figure.savefig(output / "attention_knockout.png", dpi=110)
    pyplot.close(figure)


def top_changes(effect: xr.Dataset, layer: int) -> Table:
    title = f"Last → first cut in layer {layer}: KL {float(effect['kl_divergence']):.5f} nats"
    table = Table("token", "base", "knocked out", "logit, base − changed", title=title)
    names = ("base_probability", "changed_probability", "logit_difference")
    for rank in effect["rank"].values:
        here = effect.sel(rank=rank)
        text = here["token_text"].item() if "token_text" in here.coords else here["top_token_id"].item()
        table.add_row(repr(text), *(f"{float(here[name]):.5f}" for name in names))
    return table


def most_affected(by_layer: xr.DataArray, window: int) -> Table:
    title = f"Edges from the last token, cut in windows of {window} layers"
    table = Table("to", "most affected layer", "change of the answer's probability", title=title)
    for target in by_layer["target"].values.tolist():
        here = by_layer.sel(target=target)
        worst = here.isel(layer=int(here.argmin("layer")))
        table.add_row(target, str(int(worst["layer"])), f"{float(worst):+.1f} %")
    return table


if __name__ == "__main__":
    main()
