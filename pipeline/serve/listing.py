"""A dictionary's features in order, and those of them that a search finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.chunks import Spans
from ...stores.contexts import token_ids_at, windows_around
from ...stores.features import Features
from ..page.features import WINDOW
from ..page.values import MOST_TEXT
from ..report.features import telling

Order = Literal["telling", "density", "max", "id"]
ORDERS: tuple[Order, ...] = get_args(Order)

MOST_SEARCHED = 2**16
"""Features of a dictionary whose texts are searched."""
MOST_TOKENS = 2**24
"""Tokens of a run whose texts are searched."""

Ints = NDArray[np.int64]


def ordered(statistics: xr.Dataset, order: Order, descending: bool) -> Ints:
    """Every feature in an order: as `telling` has them (the most telling ones are the greatest), by firing rate, by
    greatest activation, or by number. Of equal ones the lower number comes first; those that never fire come last,
    except by number.
    """
    ids = np.arange(statistics.sizes["feature"])
    if order == "id":
        return ids[::-1] if descending else ids
    alive = np.flatnonzero(statistics["n_active"].values > 0)
    keys = {"density": "n_active", "max": "max"}
    if order == "telling":
        found = np.array(telling(statistics, len(ids)), np.int64)
        found = found if descending else found[::-1]
    else:
        key = statistics[keys[order]].values[alive].astype(np.float64)
        found = alive[np.lexsort((alive, -key if descending else key))]
    return np.concatenate([found, np.setdiff1d(ids, alive, assume_unique=True)])


@dataclass(frozen=True)
class Words:
    """What a search looks through: of each feature the text about its strongest activation, in lower case; no texts
    where there are too many, or none.
    """

    texts: tuple[str, ...]

    def among(self, features: Ints, search: str) -> Ints:
        """Those that a search finds: the feature of that number first, then those about whose strongest activation
        stands the text, upper and lower case alike, in the order in which they are given.
        """
        wanted = search.strip().lower()
        number = features[features == int(wanted)] if wanted.isascii() and wanted.isdecimal() else features[:0]
        if not self.texts:
            return number
        holding = np.fromiter((wanted in text for text in self.texts), bool, len(self.texts))
        holding[number] = False
        return np.concatenate([number, features[holding[features]]])


def searchable(found: Features) -> bool:
    """Whether texts are searched: they are read and made at once, when the first search asks for them."""
    few = found.n_feature <= MOST_SEARCHED and found.by_token.store.schema.n_token <= MOST_TOKENS
    return few and found.tokens is not None and found.decode is not None


def words_of(found: Features) -> Words:
    """Reads the strongest posting of every feature, and the tokens about it."""
    if not searchable(found) or found.tokens is None or found.decode is None:
        return Words(())
    index = found.index
    begins = np.flatnonzero(np.diff(index.ptr) > 0)
    strongest = np.full(found.n_feature, -1, np.int64)
    strongest[begins] = [int(index.postings(feature, 1)[0][0]) for feature in begins.tolist()]
    windows = windows_around(found.by_token.tables, strongest, np.arange(-WINDOW, WINDOW + 1))
    ids = token_ids_at(Spans(found.tokens, "token_id", keep=1), windows)
    texts = found.decode([row[row >= 0].tolist() for row in ids])
    return Words(tuple(text[:MOST_TEXT].lower() for text in texts))
