"""The features of a run's dictionaries: overview, and of the most telling ones all that a browser shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from ...stages.accessors import FeaturesAccessor
from ...stages.analyze.dictionary_fit import dictionary_fit
from ...stores.errors import ForebayError
from ...stores.features import Features
from ...stores.selections import expanded
from ..report.features import telling
from .logits import LogitEffects
from .values import TokenSet, absent, number, numbers, some

CONTEXTS = 10
WINDOW = 10
"""Tokens shown before and after the one at which a feature fires."""
TOGETHER = 8
"""Features named that fire where a feature fires."""
FIRING = 1000
"""Tokens of a feature, the strongest, at which others are counted."""
AT_ONCE = 16
"""Features whose tokens are read together: of neighbours once."""
BINS = 4
"""Bins of firing rates in a power of ten."""
_ABOUT = ("source", "hook", "hook_out", "activation", "n_feature")


def features(run: xr.DataTree, tokens: TokenSet, n: int, effects: LogitEffects) -> dict[str, Any]:
    """Of every dictionary of the run how well it fits, how often its features fire, and the `n` most telling ones, as
    `forebay features` chooses them; or why it cannot be shown, such as without an index.
    """
    accessor: Any = FeaturesAccessor(run)
    return some(
        (_checked(accessor, name, tokens, n, effects) for name in accessor.names),
        "The run keeps no features: no table [encode.NAME] is in its recipe, or it is not done yet.",
    )


def _checked(accessor: Any, name: str, tokens: TokenSet, n: int, effects: LogitEffects) -> dict[str, Any]:
    try:
        found: Features = accessor(name)
        return {"name": name, **dictionary(found, tokens, n, effects)}
    except ForebayError as error:
        return {"name": name, **absent(error)}


def dictionary(found: Features, tokens: TokenSet, n: int, effects: LogitEffects) -> dict[str, Any]:
    """One dictionary: raises what its index raises."""
    statistics = found.statistics().compute()
    chosen = telling(statistics, n)
    return {
        **about(found, statistics),
        **effects.of(found, chosen, tokens),
        "features": details(found, statistics, chosen, tokens) if chosen else [],
    }


def about(found: Features, statistics: xr.Dataset) -> dict[str, Any]:
    """What a dictionary is, how well it fits and how often its features fire."""
    fit = dictionary_fit(found.by_token.store.path.parent).sel(dictionary=found.name)
    rate = statistics["firing_rate"].values
    lowest = -max(1, len(str(int(statistics.attrs["n_token"]))))
    edges = np.linspace(lowest, 0, BINS * -lowest + 1)
    said = found.attrs
    return {
        "about": {key: str(said[key]) for key in _ABOUT if said.get(key) is not None},
        "n_feature": found.n_feature,
        "n_token": int(statistics.attrs["n_token"]),
        "skip_positions": int(statistics.attrs["skip_positions"]),
        "fit": {name: number(float(fit[name])) for name in ("l0", "fvu", "cosine")},
        "n_fit": int(fit["n_fit"]),
        "dead": int(statistics["dead"].sum()),
        "dense": int(statistics["dense"].sum()),
        "rates": {"edges": edges.tolist(), "counts": np.histogram(np.log10(rate[rate > 0]), edges)[0].tolist()},
    }


def rows(statistics: xr.Dataset, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """Some features as a list of them tells each: how often it fires, and how strongly."""
    picked = statistics.sel(feature=list(chosen))
    columns = {
        name: picked[name].values.tolist() for name in ("n_active", "firing_rate", "max", "mean_active", "dense")
    }
    return [
        {"id": id, "n_active": n, "rate": number(rate), "max": number(most), "mean": number(mean), "dense": dense}
        for id, n, rate, most, mean, dense in zip(chosen, *columns.values(), strict=True)
    ]


def details(found: Features, statistics: xr.Dataset, chosen: Sequence[int], tokens: TokenSet) -> list[dict[str, Any]]:
    """All that is told of some features; `statistics` may be lazy, and of these features only."""
    statistics = statistics.sel(feature=list(chosen)).compute()
    contexts = found.top_contexts(chosen, n=CONTEXTS, window=WINDOW, text=False)
    together = _together(found, chosen)
    return [
        {
            **row,
            "histogram": own["histogram"].values.tolist(),
            "range": numbers(own["histogram_edge"].values[[0, -1]]),
            "contexts": _contexts(contexts.isel(feature=i), tokens),
            "together": together[i],
            "together_of": min(row["n_active"], FIRING),
        }
        for i, row in enumerate(rows(statistics, chosen))
        for own in (statistics.isel(feature=i),)
    ]


def _contexts(found: xr.Dataset, tokens: TokenSet) -> list[dict[str, Any]]:
    """The strongest contexts of a feature: token ids and activations of each window, and which of them it is about.
    Activations are None where the index has not counted them.
    """
    rows: list[dict[str, Any]] = []
    if "token_id" not in found:
        return rows
    for place in np.flatnonzero(found["token"].values >= 0).tolist():
        own = found.isel(context=place)
        inside = own["token_id"].values >= 0
        rows.append(
            {
                "document": int(own["document"]),
                "sequence": int(own["sequence"]),
                "position": int(own["position"]),
                "at": int(inside[:WINDOW].sum()),
                "tokens": tokens.add(own["token_id"].values[inside]),
                "values": numbers(own["activation"].values[inside]),
            }
        )
    return rows


def _together(found: Features, chosen: Sequence[int]) -> list[list[list[int]]]:
    """Of each feature the others that fire at its `FIRING` strongest tokens: feature, and at how many of them; most
    first, of equal ones the lower number.
    """
    return [
        named
        for first in range(0, len(chosen), AT_ONCE)
        for named in _together_of(found, chosen[first : first + AT_ONCE])
    ]


def _together_of(found: Features, chosen: Sequence[int]) -> list[list[list[int]]]:
    """The same of a few, whose tokens are read together."""
    strongest = [found.index.postings(feature, FIRING)[0] for feature in chosen]
    known = np.unique(np.concatenate(strongest))
    held = found.by_token.at(known)
    ends = np.cumsum(held.count)
    named = []
    for own, tokens in zip(chosen, strongest, strict=True):
        at = np.searchsorted(known, tokens)
        there = held.feature[expanded((ends - held.count)[at], held.count[at])]
        other, count = np.unique(there[there != own], return_counts=True)
        order = np.lexsort((other, -count))[:TOGETHER]
        named.append([[int(other[i]), int(count[i])] for i in order])
    return named
