"""Which tokens hold which characters of a text, and which characters each token stands for.

    python docs/examples/token_positions.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Published (candle-mi, the default text): "Eiffel Tower", characters 4 to 16, is 4, 2 and 5 tokens of Llama 3.2, Gemma 2
and StarCoder2; "Paris" (31 to 36) 1, 1 and 2; "France" (38 to 44) one of each. Those tokenizers were not at hand.

Measured here: of SmolLM2, whose tokens take the space before a word with them, "Eiffel Tower" is 3 tokens (" E",
"iffel", " Tower"), positions 1 to 3; "Paris" is position 7, "France" 9, one token each; 11 tokens in all.
"""

from pathlib import Path

import click
import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.models.offsets import EncodingWithOffsets, convert_positions


@click.command(help=__doc__)
@click.option("--model", "source", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/token_positions"))
@click.option("--text", default="The Eiffel Tower is located in Paris, France.", show_default=True)
@click.option("--span", "spans", multiple=True, default=["Eiffel Tower", "Paris", "France"], help="Parts of the text.")
def main(source: str, output: Path, text: str, spans: tuple[str, ...]) -> None:
    encoding = forebay.load_model(source).tokenizer.encode(text)
    tokens, held = table_of_tokens(encoding, spans), table_of_spans(encoding, spans)
    result = tokens.merge(held)
    result.to_zarr(output / "token_positions.zarr", mode="w", consolidated=False)
    draw(result, output)
    console = Console()
    console.print(shown_tokens(tokens))
    console.print(shown_spans(held, encoding))


def table_of_tokens(encoding: EncodingWithOffsets, spans: tuple[str, ...]) -> xr.Dataset:
    """Every token with its characters, [char_start, char_end), −1 for one that stands for none, and its span."""
    chars = np.array([(-1, -1) if chars is None else chars for chars in encoding.offsets])
    return xr.Dataset(
        {
            "char_start": ("position", chars[:, 0], {"long_name": "first character"}),
            "char_end": ("position", chars[:, 1], {"long_name": "character after the last"}),
            "label": ("position", np.array(encoding.token_labels({span: span for span in spans}), dtype=object)),
        },
        coords={
            "position": np.arange(len(encoding)),
            "token_id": ("position", np.array(encoding.token_ids)),
            "token_text": ("position", np.array(encoding.tokens, dtype=object)),
        },
    )


def table_of_spans(encoding: EncodingWithOffsets, spans: tuple[str, ...]) -> xr.Dataset:
    """Every span with its first and last token; what lies between belongs to it."""
    found = [encoding.label_spans({span: span})[span] for span in spans]
    starts = [encoding.text.index(span) for span in spans]
    return xr.Dataset(
        {
            "span_start": ("span", starts, {"long_name": "first character"}),
            "first_token": ("span", [positions[0] for positions in found]),
            "last_token": ("span", [positions[-1] for positions in found]),
            "n_token": ("span", [len(positions) for positions in found], {"long_name": "tokens of a span"}),
        },
        coords={"span": np.array(spans, dtype=object)},
    )


def draw(result: xr.Dataset, output: Path) -> None:
    """How many characters every token stands for."""
    from matplotlib import pyplot

    from forebay import plot

    length = (result["char_end"] - result["char_start"]).assign_attrs(long_name="characters of a token")
    figure = plot.bars(length).figure
    figure.savefig(output / "token_positions.png", dpi=120)
    pyplot.close(figure)


def shown_tokens(tokens: xr.Dataset) -> Table:
    table = Table("position", "id", "token", "characters", "label", title="Tokens")
    for position in tokens["position"].values:
        here = tokens.sel(position=position)
        chars = f"{int(here['char_start'])}–{int(here['char_end'])}" if int(here["char_start"]) >= 0 else "none"
        token = repr(here["token_text"].item())
        table.add_row(str(position), str(int(here["token_id"])), token, chars, here["label"].item())
    return table


def shown_spans(held: xr.Dataset, encoding: EncodingWithOffsets) -> Table:
    """Spans, and the token that the first character of each is converted to."""
    table = Table("span", "characters", "tokens", "number", "token of its first character", title="Spans")
    converted = convert_positions(encoding, held["span_start"].values.tolist())
    for span, one in zip(held["span"].values.tolist(), converted, strict=True):
        here = held.sel(span=span)
        start, first, last = (int(here[name]) for name in ("span_start", "first_token", "last_token"))
        exact = "" if one.exact else " (nearest)"
        number = str(int(here["n_token"]))
        table.add_row(
            span, f"{start}–{start + len(span)}", f"{first}–{last}", number, f"{one.position} {one.token!r}{exact}"
        )
    return table


if __name__ == "__main__":
    main()
