"""How often the stream of a counterfactual prompt, in blocks of four layers at one token, changes what a model answers.

    python docs/examples/counterfact_patching.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The protocol is Transluce's on CounterFact prompts (arXiv:2511.08579), as candle-mi reproduces it: a fact and its
counterfactual, each followed by the same question; hook_resid_post of every layer of a block is replaced at one
position by the counterfactual's, tokens of the fact by those at the same position, tokens of the question by the same
ones; reported is the share of runs whose likeliest next token is another, by block and by kind of token. A model that
does not follow the instruction is asked nothing (`--no-question`): it completes the fact, which then counts as far as
the prompts differ. `--data` takes JSON lines with the keys original, counterfactual, original_target and
counterfactual_target. The pairs below stand in for CounterFact's, which is published with the paper.

Measured on SmolLM2-135M-Instruct (4-bit weights, float32), which answers the question with a line break, with
--no-question, four pairs of which it completes every prompt rightly: of the patches at tokens of the fact 31 % change
the likeliest token in layers 0 to 3, 19 % to 25 % up to layer 23, none after; at the last of them 50 % up to layer 11,
25 % up to layer 23, none after; at the tokens that follow none up to layer 11, 6 % up to layer 19, 24 % from 20 on.
"""

import itertools
import json
from pathlib import Path

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.analyze.block_patching import block_patching

QUESTION = "\n\nRespond with one of {} or {} or unknown and nothing else.\n\nResponse:"
PAIRS = [
    ("The Eiffel Tower is located in the city of", "The Colosseum is located in the city of", "Paris", "Rome"),
    ("The Brandenburg Gate is located in the city of", "The Kremlin is located in the city of", "Berlin", "Moscow"),
    ("The mother tongue of Victor Hugo is", "The mother tongue of Leo Tolstoy is", "French", "Russian"),
    ("The capital of the Czech Republic is the city of", "The capital of Japan is the city of", "Prague", "Tokyo"),
]
KEYS = ("original", "counterfactual", "original_target", "counterfactual_target")


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/counterfact_patching"))
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="JSON lines instead of the pairs here.")
@click.option("--question/--no-question", default=True, show_default=True, help="Whether a question follows the fact.")
@click.option("--block-size", default=4, show_default=True)
@click.option("--limit", type=int, help="How many pairs to run.")
@click.option("--batch-size", default=32, show_default=True)
def main(
    source: str, output: Path, data: Path | None, question: bool, block_size: int, limit: int | None, batch_size: int
) -> None:
    model = forebay.load_model(source)
    pairs = (PAIRS if data is None else read(data))[:limit]
    asked = [QUESTION.format(*targets) if question else "" for _, _, *targets in pairs]
    result = block_patching(
        model,
        [pair[0] + after for pair, after in zip(pairs, asked, strict=True)],
        [pair[1] + after for pair, after in zip(pairs, asked, strict=True)],
        spans=[{"fact": (0, len(pair[0]) - (0 if question else shared_end(*pair[:2])))} for pair in pairs],
        block_size=block_size,
        batch_size=batch_size,
    )
    result = result.assign_coords(fact=("pair", np.array([pair[0] for pair in pairs], dtype=object)))
    result.to_zarr(output / "counterfact_patching.zarr", mode="w", consolidated=False)
    shares = 100 * result["changed"].groupby("token_type").mean()
    shares = shares.sel(token_type=[name for name in ("fact", "fact_final", "other") if name in shares["token_type"]])
    shares.attrs = {"units": "%", "long_name": "changed"}
    draw(shares, output)
    for pair, number in zip(pairs, result["pair"].values, strict=True):
        own = result.sel(pair=number)
        told = [model.tokenizer.to_string([int(own[f"{kind}_top_token_id"])]) for kind in KEYS[:2]]
        print(f"{pair[0]!r} → {told[0]!r} ({pair[2]}), {pair[1]!r} → {told[1]!r} ({pair[3]})")
    Console().print(table(result, shares))


def read(data: Path) -> list[tuple[str, str, str, str]]:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [tuple(row[key] for key in KEYS) for row in rows]


def shared_end(one: str, other: str) -> int:
    """How many characters of both texts' ends are the same words, the space before them included."""
    words = [list(reversed(text.split(" "))) for text in (one, other)]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*words, strict=False))
    return sum(len(word) + 1 for word, _ in same)


def draw(shares: xr.DataArray, output: Path) -> None:
    from matplotlib import pyplot

    from forebay import plot

    ends = zip(shares["first_layer"].values, shares["last_layer"].values, strict=True)
    blocks = [f"{first}–{last}" for first, last in ends]
    labelled = shares.drop_vars(["first_layer", "last_layer"]).assign_coords(block=blocks)
    ax = plot.heat_map(labelled.transpose("token_type", "block"), annotate=True)
    ax.figure.savefig(output / "counterfact_patching.png", dpi=120)
    pyplot.close(ax.figure)


def table(result: xr.Dataset, shares: xr.DataArray) -> Table:
    """The share of runs that changed, and the mean divergence, by block."""
    found = Table(title=f"Runs of {result.sizes['pair']} pairs whose likeliest token changed")
    names = shares["token_type"].values.tolist()
    for name in ("layers", *names, "all", "mean KL (nats)"):
        found.add_column(name, justify="right")
    for block in result["block"].values:
        own = result.sel(block=block)
        cells = [f"{float(shares.sel(block=block, token_type=name)):.1f} %" for name in names]
        cells += [f"{100 * float(own['changed'].mean()):.1f} %", f"{float(own['kl_divergence'].mean()):.3f}"]
        found.add_row(f"{int(own['first_layer'])}–{int(own['last_layer'])}", *cells)
    return found


if __name__ == "__main__":
    main()
