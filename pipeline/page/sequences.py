"""A few sequences of a run, looked at token by token: logit lens and attention patterns."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stages.analyze.logit_lens import logit_lens
from ...stores.places import Place
from ...stores.tree import CAPTURED, run_stores
from .logits import AtHand
from .values import TokenSet, absent, numbers, some

LENS, PATTERN = "hook_resid_post", "attn.hook_pattern"
MOST_POSITIONS = 128
"""Positions of a sequence that the lens shows."""
TOP = 5
"""Strongest tokens of a cell."""
MOST_BEGINNING = 16
"""Tokens of a sequence by which it is told from others."""
MOST_QUERIES = 64
MOST_WEIGHTS = 2**20
"""Attention weights in a page, over all sequences, layers and heads: two bytes each."""
ALL = slice(None)
FULL = 65535
"""What stands for a weight of 1."""


def lens(run: xr.DataTree, tokens: TokenSet, sequences: Iterable[int], known: AtHand) -> dict[str, Any]:
    """The logit lens of some sequences, or why there is none."""
    if f"/{CAPTURED}/{LENS}" not in run.groups:
        return absent(f"The run keeps no {LENS}: add blocks.*.{LENS} to its hooks.")
    if known.unembedding is None:
        return absent(f"The lens asks for the model's unembedding: {known.reason}.")
    node = run[f"{CAPTURED}/{LENS}"].to_dataset()
    shown = []
    for sequence in sequences:
        # One position more, so that the last one's next token is known too.
        part = node.sel(sequence=sequence, position=slice(0, MOST_POSITIONS))
        part = part.assign(value=part["value"].where(part["done"].variable))
        found = logit_lens(part, known.unembedding, top=min(TOP, known.unembedding.weight.shape[0]))
        shown.append(_lens(found.isel(token=slice(0, MOST_POSITIONS)).compute(), sequence, tokens))
    return {"top": TOP, **some(shown, "No sequence was asked for.")}


def _lens(found: xr.Dataset, sequence: int, tokens: TokenSet) -> dict[str, Any]:
    return {
        "sequence": sequence,
        "document": int(found["document"].values[0]),
        "layers": found["layer"].values.tolist(),
        "position": found["position"].values.tolist(),
        "tokens": tokens.add(found["token_id"].values.astype(np.int64)),
        "next": tokens.add(found["next_token_id"].values),
        "top": tokens.add(found["top_token_id"].values),
        "probability": numbers(found["top_probability"].values),
        "rank": numbers(found["next_rank"].values),
    }


def attention(
    folder: Place, run: xr.DataTree, tokens: TokenSet, sequences: Iterable[int], layers: slice = ALL
) -> dict[str, Any]:
    """The attention patterns of those of some sequences that are recorded, as many of their first positions as fit, in
    all the layers that are kept or the places of some; or why there are none.
    """
    if f"/{CAPTURED}/{PATTERN}" not in run.groups:
        return absent(f"The run keeps no {PATTERN}: add blocks.*.{PATTERN} to its hooks.")
    whole = run[f"{CAPTURED}/{PATTERN}"].to_dataset()
    node = whole.isel(layer=layers)
    table = run["sequences"].to_dataset()
    starts, lengths = table["start"].values, table["n_token"].values
    chosen = [sequence for sequence in sequences if _recorded(folder, starts[sequence])]
    n_head = node.sizes["layer"] * node.sizes["head"] * max(len(chosen), 1)
    most = int(min(MOST_QUERIES, node.sizes["query"], max(2.0, np.sqrt(2 * MOST_WEIGHTS / n_head) - 1)))
    if "tokens" not in run.children:
        return absent("The run keeps no tokens, and so no texts to show patterns over.")
    ids = run["tokens"].to_dataset()["token_id"]
    shown = []
    for sequence in chosen:
        n = min(most, int(lengths[sequence]))
        cut = node["value"].isel(sequence=sequence, query=slice(0, n), key=slice(0, n))
        first = int(starts[sequence])
        shown.append(
            {
                "sequence": sequence,
                "document": int(np.atleast_1d(node["document"].values)[sequence]),
                "tokens": tokens.add(_ids(ids, first, n)),
                "weights": _packed(cut.transpose("layer", "head", "query", "key").values),
            }
        )
    if not shown:
        return absent("None of the sequences that were asked for is recorded yet.")
    return {"layers": whole["layer"].values.tolist(), "heads": node.sizes["head"], "shown": shown}


def sequences(run: xr.DataTree, tokens: TokenSet, chosen: range) -> list[dict[str, Any]]:
    """Some sequences with the tokens they begin with."""
    table = run["sequences"].to_dataset().isel(sequence=slice(chosen.start, chosen.stop)).compute()
    ids = run["tokens"].to_dataset()["token_id"] if "tokens" in run.children else None
    return [
        {
            "sequence": sequence,
            "document": int(document),
            "n_token": int(n),
            "tokens": [] if ids is None else tokens.add(_ids(ids, int(first), min(int(n), MOST_BEGINNING))),
        }
        for sequence, document, first, n in zip(
            chosen, *(table[name].values for name in ("document", "start", "n_token")), strict=True
        )
    ]


def _recorded(folder: Place, token: int) -> bool:
    """Whether the unit that a token belongs to is recorded in every store that keeps patterns."""
    holders = [store for store in run_stores(folder) if f"{PATTERN}/value" in store.schema.arrays]
    return all(token // store.schema.unit_tokens in store.done() for store in holders)


def _ids(ids: xr.DataArray, first: int, n: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = ids.isel(token=slice(first, first + n)).values.astype(np.int64)
    return found


def _packed(weights: NDArray[Any]) -> list[list[str]]:
    """Patterns [layer, head, query, key], each its rows up to the diagonal as 16-bit numbers in base64, 65535 for 1.
    What is NaN, of a unit that is not recorded, is 0.
    """
    below = np.tril_indices(weights.shape[-1])
    whole = np.rint(np.nan_to_num(weights[..., below[0], below[1]].astype(np.float64)).clip(0, 1) * FULL).astype("<u2")
    return [[base64.b64encode(head.tobytes()).decode() for head in layer] for layer in whole]
