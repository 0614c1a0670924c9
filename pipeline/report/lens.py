"""`forebay lens`: the logit lens over a selection of a run's store."""

from __future__ import annotations

import re
from collections import UserDict
from pathlib import Path
from typing import Any

import xarray as xr

from ...stages.analyze.logit_lens import logit_lens
from ...stores.errors import FingerprintMismatch, SchemaError, nearest
from ...stores.fingerprint import sha256_files
from ...stores.places import Place
from ...stores.tree import open_run
from ..recipe import Recipe


class TokenTexts(UserDict[int, str]):
    """Token id → its text, from a run's own tokenizer."""

    def __init__(self, folder: Place) -> None:
        from ...stages.models.tokenizer_json import read_tokenizer

        super().__init__()
        path = folder / "tokenizer.json"
        self.tokenizer = read_tokenizer(path if isinstance(path, Path) else path.read_text())

    def __missing__(self, token_id: int) -> str:
        self[token_id] = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return self[token_id]


def lens_of_run(
    folder: Place,
    *,
    document: int | None,
    sequence: int | None,
    positions: str,
    layers: str | None,
    hook: str,
    partial: bool,
    top: int = 1,
) -> tuple[xr.Dataset, TokenTexts]:
    """The computed lens of a selection, and the texts of its tokens.

    SchemaError or KeyError name what is not in the store.
    """
    run = open_run(folder, partial=partial)
    kinds = list(run["activations"].children) if "activations" in run.children else []
    if hook not in kinds:
        raise SchemaError(
            f"{folder} has no activations of {hook!r}.{nearest(hook, kinds)} It has: {', '.join(kinds) or 'none'}"
        )
    first, last = _positions(positions)
    # One position more, so that the last one's next token is known too; it is dropped again below.
    selection: dict[str, Any] = {"position": slice(first, last if last is None else last + 1)}
    if document is not None:
        selection["document"] = document
    if sequence is not None or document is None:
        selection["sequence"] = sequence or 0
    activations = run[f"activations/{hook}"].to_dataset()
    if layers is not None and "layer" in activations.dims:
        selection["layer"] = _layers(layers)
        there = activations["layer"].values.tolist()
        if absent := set(selection["layer"]) - set(there):
            raise SchemaError(
                f"{folder} has no layer {', '.join(map(str, sorted(absent)))} of {hook!r}; it has "
                f"{', '.join(map(str, there))}"
            )
    try:
        activations = activations.sel(selection)
    except KeyError as error:
        raise SchemaError(f"{folder}: {error.args[0]}") from error
    lens = logit_lens(activations, unembedding_of(folder, run), top=top)
    if last is not None:
        lens = lens.isel(token=lens["position"].values <= last)
    return lens.compute(), TokenTexts(folder)


def unembedding_of(folder: Place, run: xr.DataTree) -> Any:
    """The unembedding of the model that made the run. FingerprintMismatch if its files have changed since."""
    from ...stages.models.unembedding import load_unembedding

    recipe = Recipe.from_json(run.attrs.get("recipe"))
    checkpoint = recipe.model.open()
    made_from = run["activations"].attrs["determines"]["files"]
    now = [[path.name, digest] for path, digest in sha256_files(checkpoint.files, folder / "files.json").items()]
    if made_from != now:
        raise FingerprintMismatch(
            f"{recipe.model.source} is not the model that made this run: its files have changed since"
        )
    return load_unembedding(recipe.model.source, revision=recipe.model.revision)


def _positions(text: str) -> tuple[int, int | None]:
    """First and last position of FIRST:LAST, of FIRST: (to the end), or of one number."""
    found = re.fullmatch(r"(\d*):(\d*)|(\d+)", text)
    if not found:
        raise SchemaError(f"positions {text!r} are not FIRST:LAST, as in 0:16, 100: or 7")
    if found[3]:
        return int(found[3]), int(found[3])
    return int(found[1] or 0), int(found[2]) if found[2] else None


def _layers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found:
            raise SchemaError(f"layers {text!r} are not a list such as 0,10-12")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers
