"""What each layer says along one direction: linear probes for two properties of tokens, beside their control tasks.

    python docs/examples/probe_layers.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Some documents are captured into a store (a run in --output), and logistic probes are fitted to the residual stream of
each layer: does the token begin with a space and a capital letter, which is a matter of its type; and is the next one a
comma, which is one of context. Shown are the AUC and accuracy (drawn: balanced accuracy) on held-out documents, the
share of the commoner class, and the selectivity, what accuracy has above that on labels drawn by token type.

Published (Hewitt and Liang 2019, "Designing and Interpreting Probes with Control Tasks", parts of speech on ELMo):
probes of the first layer are slightly more accurate, those of the second substantially more selective, since types are
told apart less well there. Another model and other labels here, so that the shape can be compared and not the figures.

Measured on SmolLM2-135M-Instruct (4-bit weights, float32): 13,532 tokens of 40 chapters of Jane Austen, 12 held out.
The capital is read almost without error up to layer 18 (AUC 0.999 or more, accuracy 0.995 or more where 0.931 have
none) and worse from layer 21 on (layer 27: 0.989, 0.978). The comma to come is read better the higher the layer: AUC
0.810 (0.785 to 0.830) in layer 0 and 0.914 (0.902 to 0.925) in layer 27; its accuracy passes the share without one
(0.936) in layer 24. In selectivity the capital stands 0.019 to 0.036 above its control task and the comma below it, by
0.052 in layer 0 and 0.023 in layer 27: labels that follow from the token type alone are easier to learn than that. In
packed windows, where tokens also read documents before their own, the same was found: each AUC within 0.003 of these in
layers 0 and 27, the comma's accuracy past the share from layer 18 on. The default strength was chosen on such held-out
documents, which flatters these figures: with C = 1 the comma's accuracy is below the commoner class.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.pipeline.recipe import Recipe, parse
from forebay.stages.analyze.probing import probe
from forebay.stages.models.model import Model

HOOK = "hook_resid_post"


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/probe_layers"))
@click.option("--text", type=click.Path(path_type=Path, exists=True), default=Path(__file__).parent / "novels.jsonl")
@click.option("--documents", default=40, show_default=True)
@click.option("--characters", default=1500, show_default=True, help="Of each document.")
@click.option("--context", default=128, show_default=True, help="Tokens of a window.")
@click.option("--layer-step", default=3, show_default=True, help="Of how many layers one is probed.")
@click.option("--kind", default="logistic", show_default=True, help="logistic, lda or mass_mean.")
@click.option("--strength", default=0.01, show_default=True, help="C of logistic probes: less is shrunk more.")
@click.option("--seed", default=0, show_default=True)
def main(
    source: str,
    output: Path,
    text: Path,
    documents: int,
    characters: int,
    context: int,
    layer_step: int,
    strength: float,
    **chosen: Any,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    entries = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()[:documents]]
    cut = (json.dumps({"id": one["id"], "text": one["text"][:characters]}) for one in entries)
    (output / "documents.jsonl").write_text("\n".join(cut) + "\n", encoding="utf-8")
    outcome = forebay.run(recipe(source, output, context), output / "run")
    if outcome.code:
        raise SystemExit(outcome.code)
    activations = forebay.open_run(output / "run")[f"activations/{HOOK}"].to_dataset()
    activations = activations.isel(layer=slice(None, None, layer_step))
    labels = properties(activations, forebay.load_model(source))
    found = [probe(activations, label, C=strength, validation=0.3, **chosen) for label in labels.values()]
    result = xr.concat(found, xr.Variable("label", np.array(list(labels), dtype=object)), combine_attrs="override")
    result = result.compute()
    result.to_zarr(output / "probe_layers.zarr", mode="w", consolidated=False)
    draw(result.sel(split="validation"), output)
    Console().print(table(result))


def recipe(source: str, folder: Path, context: int) -> Recipe:
    """The residual stream after every layer, of the documents in `folder`."""
    tables = {
        "corpus": {"files": ["documents.jsonl"]},
        "model": {"source": str(Path(source).resolve()) if Path(source).exists() else source},
        # So that no held-out token has read another document, as it would in a packed window.
        "tokenize": {"context": context, "layout": "documents", "long_documents": "split"},
        "capture": {"hooks": [f"blocks.*.{HOOK}"]},
    }
    return parse(tables, name="probe_layers", folder=folder.resolve(), file="probe_layers.py")


def properties(activations: xr.Dataset, model: Model) -> dict[str, xr.DataArray]:
    """Labels of every token: 1, 0, or −1 where a sequence ends and nothing says what comes next."""
    ids = activations["token_id"].values.astype(np.int64)
    texts = {token: model.tokenizer.to_string([token]) for token in np.unique(ids).tolist()}
    capital = np.array([texts[token][:1] == " " and texts[token][1:2].isupper() for token in ids.tolist()])
    comma = np.array([texts[token].startswith(",") for token in ids.tolist()])
    goes_on = np.diff(activations["sequence"].values, append=-1) == 0
    following = np.where(goes_on, np.roll(comma, -1), -1)
    return {"capital": xr.DataArray(capital, dims="token"), "comma next": xr.DataArray(following, dims="token")}


def draw(result: xr.Dataset, output: Path) -> None:
    from matplotlib import pyplot

    from forebay import plot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    result = result.sel(control="token_type")
    for ax, (name, chance) in zip(axes, (("auc", 0.5), ("balanced_accuracy", 0.5), ("selectivity", 0.0)), strict=True):
        low, high = result[f"{name}_low"], result[f"{name}_high"]
        title = f"{name.replace('_', ' ')}, held-out documents"
        plot.line(result[name], x="layer", low=low, high=high, chance=chance, ax=ax, title=title)
    figure.savefig(output / "probe_layers.png", dpi=120)
    pyplot.close(figure)


def table(result: xr.Dataset) -> Table:
    shown = Table(title="probes on held-out documents, 95 % intervals over documents", title_justify="left")
    for column in ("property", "layer", "AUC", "from", "to", "accuracy", "commoner", "selectivity"):
        shown.add_column(column, justify="right")
    held_out = result.sel(split="validation")
    for name in result["label"].values.tolist():
        for layer in result["layer"].values.tolist():
            one = held_out.sel(label=name, layer=layer)
            commoner = float(one["class_count"].max() / one["class_count"].sum())
            selectivity = float(one["selectivity"].sel(control="token_type"))
            cells = (*(float(one[cell]) for cell in ("auc", "auc_low", "auc_high", "accuracy")), commoner, selectivity)
            shown.add_row(name, str(layer), *(f"{cell:.3f}" for cell in cells))
    return shown


if __name__ == "__main__":
    main()
