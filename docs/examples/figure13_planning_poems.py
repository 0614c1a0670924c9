"""Where a poem's next rhyme is planned: features suppressed and injected at every position in turn.

    python docs/examples/figure13_planning_poems.py --preset llama3.2-1b-524k
    python docs/examples/figure13_planning_poems.py --dictionary FOLDER --word around

The sweep of Figure 13 of "On the Biology of a Large Language Model" (Lindsey et al. 2025) with open cross-layer
transcoders. The prompt ends in a space. Features of the rhyme that is due are suppressed and that of another word is
injected at one position, in every layer that they write in, and the probability of that word is read at the last token.
Suppression subtracts strength · decoder row whatever fires, as candle-mi's does. Effects are signed, at every position.

Published (candle-mi, float32, strength 10; P is that of the injected word): llama3.2-1b-524k 1.06e-6 → 0.687 (logit
8.13 → 23.97) at the last space, 4.9e-4 one position before; gemma2-2b-426k 4.84e-8 → 0.457, gemma2-2b-2.5m 1.9e-11 →
0.464, both at the last space too.

Measured on SmolLM2-135M-Instruct (4-bit weights, float32), which has no cross-layer transcoder, with the autoencoder of
2,048 features after layer 15 that `docs/examples/smollm2.toml` trains: the poem of the dark passage, the feature whose
decoder row is most like " around" (cosine .157) injected with --strength 100, nothing suppressed. " around" rises from
1.01e-6 to 5.29e-6, its logit by 7.31, at the last space; at every other position the logit moves by less than 0.8, most
at " about", and at the ends of lines it falls. With strength 10 the logit rises by 0.38 at the last space, and yet the
probability falls by 5.9e-8: the logits of other words rise more.
"""

from pathlib import Path
from typing import Any

import click
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay import Dictionary, FeatureId, Inject, TranscoderSet
from forebay.stages.analyze.metrics import Logit, Probability
from forebay.stages.analyze.position_sweep import position_sweep

STARS = (
    "The stars were twinkling in the night,\nThe lanterns cast a golden light.\n"
    "She wandered in the dark about,\nAnd found a hidden passage "
)
BIRDS = (
    "The birds were singing in the tree,\nAnd everything was wild and free.\n"
    "The river ran down to the sea,\nThere is so much we cannot "
)
PRESETS: dict[str, dict[str, Any]] = {
    "llama3.2-1b-524k": {
        "model": "meta-llama/Llama-3.2-1B",
        "dictionary": "mntss/clt-llama-3.2-1b-524k",
        "prompt": BIRDS,
        "suppress": ("13:30985", "9:5488", "14:27874", "13:32049"),
        "inject": "14:13043",
        "word": "that",
    },
    "gemma2-2b-426k": {
        "model": "google/gemma-2-2b",
        "dictionary": "mntss/clt-gemma-2-2b-426k",
        "prompt": STARS,
        "suppress": ("16:13725", "25:9385"),
        "inject": "22:10243",
        "word": "around",
    },
    "gemma2-2b-2.5m": {
        "model": "google/gemma-2-2b",
        "dictionary": "mntss/clt-gemma-2-2b-2.5M",
        "prompt": STARS,
        "suppress": ("25:57092", "23:49923", "20:77102"),
        "inject": "25:82839",
        "word": "can",
    },
}
OTHERWISE = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "prompt": STARS, "word": "around", "suppress": ()}


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(list(PRESETS)), help="A published sweep; other options replace its own.")
@click.option("--model", help="[default: the preset's, or HuggingFaceTB/SmolLM2-135M-Instruct]")
@click.option("--dictionary", help="A set of transcoders, or an autoencoder: what load_dictionary takes.")
@click.option("--prompt", help="[default: the preset's, or a poem]")
@click.option("--suppress", multiple=True, help="A feature, layer:number, or its number in one dictionary.")
@click.option("--inject", help="The same. [default: the feature whose decoder row is most like the word's unembedding]")
@click.option("--word", help="The word whose probability is read.")
@click.option("--strength", default=10.0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/figure13_planning_poems"))
def main(preset: str | None, strength: float, output: Path, **given: Any) -> None:
    asked = OTHERWISE | PRESETS.get(preset or "", {}) | {name: value for name, value in given.items() if value}
    if "dictionary" not in asked:
        raise click.UsageError("give --preset, or --dictionary")
    model = forebay.load_model(asked["model"])
    dictionary = forebay.load_dictionary(asked["dictionary"], device=str(model.device))
    token = model.tokenizer.find_token_id(asked["word"], last=True)
    inject = feature_of(dictionary, asked["inject"]) if "inject" in asked else nearest(model, dictionary, token)
    suppress = [feature_of(dictionary, text) for text in asked["suppress"]]
    edits = [Inject(dictionary, {inject: strength})]
    if suppress:
        edits.append(Inject(dictionary, dict.fromkeys(suppress, -strength)))
    result = position_sweep(
        model,
        asked["prompt"],
        edits,
        metric=[Probability(token=token), Logit(token=token)],
        where="hook_resid_post" if isinstance(dictionary, TranscoderSet) else None,
    )
    word = model.tokenizer.to_string([token])
    result = result.assign_attrs(word=word, inject=str(inject), suppress=list(map(str, suppress)), strength=strength)
    result.to_zarr(output / "figure13_planning_poems.zarr", mode="w", consolidated=False)
    draw(result, output)
    Console().print(table(result))


def feature_of(dictionary: Dictionary | TranscoderSet, text: str) -> int | FeatureId:
    layer, _, number = text.removeprefix("L").rpartition(":")
    return int(number) if isinstance(dictionary, Dictionary) else FeatureId(int(layer), int(number))


def nearest(model: Any, dictionary: Dictionary | TranscoderSet, token: int) -> int | FeatureId:
    """The feature whose decoder row is most like the unembedding of a token. Reads every decoder row."""
    direction = model.unembedding.weight[token]
    (edge,) = forebay.score_features_by_decoder_projection(dictionary, direction, top_k=1, cosine=True)
    return edge.feature


def draw(result: xr.Dataset, output: Path) -> None:
    """The signed change of probability and of logit, by position."""
    from matplotlib import pyplot

    from forebay import plot

    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7), layout="constrained")
    for ax, name, shown in zip(axes, ("probability_change", "logit_change"), ("ΔP", "Δlogit"), strict=True):
        plot.line(result[name], ax=ax)
        ax.set_ylabel(shown)
        ax.axhline(0, color="0.5", linewidth=1)
    axes[0].set_title(f"{result.attrs['word']!r} at the last token, with feature {result.attrs['inject']} injected")
    figure.savefig(output / "figure13_planning_poems.png", dpi=120)
    pyplot.close(figure)


def table(result: xr.Dataset) -> Table:
    """The ten positions whose edit moves the logit most, either way."""
    word, before = repr(result.attrs["word"]), result[["probability_baseline", "logit_baseline"]]
    probability, logit = float(before["probability_baseline"]), float(before["logit_baseline"])
    found = Table(title=f"P({word}) = {probability:.2e} (logit {logit:.2f}) without edits")
    for name in ("position", "token", f"P({word})", "ΔP", "Δlogit"):
        found.add_column(name, justify="left" if name == "token" else "right")
    for place in abs(result["logit_change"]).argsort().values[::-1][:10]:
        row = result.isel(position=int(place))
        shown = f"{float(row['probability']):.2e}", f"{float(row['probability_change']):+.2e}"
        moved = f"{float(row['logit_change']):+.2f}"
        found.add_row(str(int(row["position"])), repr(row["token_text"].item()), *shown, moved)
    return found


if __name__ == "__main__":
    main()
