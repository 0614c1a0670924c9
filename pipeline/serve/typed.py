"""A text that the reader types: which features of a dictionary fire in it, by the run's own model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...stages.capture import Capture
from ...stages.encode import Encode
from ...stages.tokenize import Tokenize
from ...stores.feature_rows import Rows
from ...stores.ledger import read_json
from ...stores.store import Store
from ..page.features import rows
from ..page.logits import dictionary_source, is_here, unchanged
from ..page.values import TokenSet, numbers
from ..recipe import Recipe
from .reads import Reads
from .refusal import Refused

if TYPE_CHECKING:
    from ...stages.encode_text import TextEncoder
    from ...stores.features import Features

MOST_TOKENS = 256
"""Tokens of a text."""
MOST_FEATURES = 100
"""Features that are told of a text."""


@dataclass
class Typed:
    """Runs the model on one text at a time. It is loaded for the first, with the dictionary that is asked for; of
    dictionaries the last one is kept.
    """

    reads: Reads
    device: str
    _lock: Lock = field(default_factory=Lock, repr=False)
    _loaded: tuple[str, TextEncoder] | None = field(default=None, repr=False)

    def __call__(self, name: str, text: str) -> dict[str, Any]:
        """The tokens of a text, and the features that fire strongest in it, with their activation at each token: None
        at the first positions, which are left out of what is told of features.

        Refused for more than 256 tokens, or more than the model reads, for what is no text, and where model or
        dictionary are not at hand, or are no longer those of the run.
        """
        found, statistics = self.reads.numbers(name)
        with self._lock:
            encoder = self._encoder(found)
            ids = encoder.token_ids(text)
            most = min(MOST_TOKENS, encoder.model.spec.n_ctx or MOST_TOKENS)
            if not ids or len(ids) > most:
                raise Refused(422, f"the text has {len(ids)} tokens; 1 to {most} are read")
            fired = encoder(ids)
        skip = found.index.skip_positions
        chosen, values = strongest(fired, skip, MOST_FEATURES)
        tokens = TokenSet()
        return {
            "name": name,
            "skip_positions": skip,
            "tokens": tokens.add(np.array(ids)),
            "shown": [
                {**row, "values": [None] * min(skip, len(ids)) + numbers(own[skip:])}
                for row, own in zip(rows(statistics, chosen) if chosen else [], values, strict=True)
            ],
            "texts": tokens.texts(self.reads.folder),
        }

    def _encoder(self, found: Features) -> TextEncoder:
        if self._loaded is None or self._loaded[0] != found.name:
            self._loaded = None  # before the next one takes its memory
            self._loaded = found.name, self._load(found)
        return self._loaded[1]

    def _load(self, found: Features) -> TextEncoder:
        from ...stages.encode_text import load_text_encoder
        from ..plan import resolve_device

        folder, store = self.reads.folder, found.by_token.store
        recipe = Recipe.from_json(read_json(folder / "recipe.json").get("recipe"))
        if not self.reads.fetch:
            self._require_here(recipe, found)
        encode = next((one for one in recipe.stages if isinstance(one, Encode) and one.store == store.name), None)
        if encode is None:
            raise Refused(409, f"the recipe of the run has no step that makes {store.name}")
        encode = replace(encode, run=str(folder))
        site = next(one for one in encode.sites if one.group == found.name)
        if not unchanged(store, site.files):
            raise Refused(409, f"the files of {site.source} have changed since it encoded")
        capture = None if encode.fused else _capturing(recipe, site.hook)
        self._require_same_model(encode.model.open().files, store if capture is None else self._store(capture.store))
        [tokenize] = [one for one in recipe.stages if isinstance(one, Tokenize)]
        return load_text_encoder(tokenize, capture, encode, site, resolve_device(self.device))

    def _require_here(self, recipe: Recipe, found: Features) -> None:
        for what, name, here in (
            ("model", recipe.model.source, is_here(recipe.model.source)),
            ("dictionary", found.attrs.get("source"), dictionary_source(found) is not None),
        ):
            if not here:
                raise Refused(
                    409, f"the {what} {name} is not on this machine. With --fetch it is looked for on its hub"
                )

    def _store(self, name: str) -> Store:
        return Store.open(self.reads.folder / name)

    def _require_same_model(self, files: tuple[Path, ...], store: Store) -> None:
        if not unchanged(store, files):
            raise Refused(409, "the model is not the one that made this run: its files have changed since")


def _capturing(recipe: Recipe, hook: str) -> Capture:
    """The step that keeps the activations of a hook point."""
    for stage in recipe.stages:
        if isinstance(stage, Capture) and hook in map(str, stage.captured):
            return stage
    raise Refused(409, f"no step of the run's recipe captures {hook}")


def strongest(fired: Rows, skip: int, most: int) -> tuple[list[int], NDArray[np.float64]]:
    """The features with the greatest activations behind the first `skip` tokens, those first, of equal ones the lower
    number; and their activations [feature, token].
    """
    token = np.repeat(np.arange(len(fired.count)), fired.count)
    counted = token >= skip
    token, value = token[counted], fired.value[counted].astype(np.float64)
    ids, at = np.unique(fired.feature[counted], return_inverse=True)
    greatest = np.full(len(ids), -np.inf)
    np.maximum.at(greatest, at, value)
    order = np.lexsort((ids, -greatest))[:most]
    place = np.full(len(ids), -1)
    place[order] = np.arange(len(order))
    told = place[at] >= 0
    found = np.zeros((len(order), len(fired.count)))
    found[place[at][told], token[told]] = value[told]
    return ids[order].tolist(), found
