"""`forebay features`: how well a run's dictionaries fit, and where their features fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from ...stages.accessors import FeaturesAccessor
from ...stages.analyze.dictionary_fit import dictionary_fit
from ...stores.errors import SchemaError
from ...stores.features import Features
from ...stores.places import Place
from ...stores.tree import open_run

RARE, COMMON = 1e-4, 1e-2
"""Shares of the tokens between which features tend to be about something."""


@dataclass(frozen=True)
class FeatureReport:
    """One dictionary's fit (a row of `dictionary_fit`), counts of its features, and contexts of some of them."""

    name: str
    fit: xr.Dataset
    statistics: xr.Dataset
    contexts: xr.Dataset


def feature_report(run: Place, name: str | None, features: Sequence[int], n: int, window: int) -> FeatureReport:
    """Fit, statistics and the `n` strongest contexts of `features` of a run, or of five that say something.

    `name` may be left out where the run has one dictionary. SchemaError for what is not there.
    """
    found = one_of(run, name)
    statistics = found.statistics().drop_vars(["histogram", "histogram_edge"]).compute()
    chosen = list(features) or telling(statistics, 5)
    fit = dictionary_fit(found.by_token.store.path.parent).sel(dictionary=found.name)
    return FeatureReport(found.name, fit, statistics, found.top_contexts(chosen, n=n, window=window))


def one_of(run: Place, name: str | None) -> Features:
    """The features of a name in a run, or those of its only dictionary."""
    accessor: Any = FeaturesAccessor(open_run(run))
    if name is not None:
        return accessor(name)  # type: ignore[no-any-return]
    names = accessor.names
    if len(names) != 1:
        raise SchemaError(f"{run} has features of {', '.join(names) or 'no dictionary'}: say which")
    return accessor(names[0])  # type: ignore[no-any-return]


def telling(statistics: xr.Dataset, n: int) -> list[int]:
    """Features that fire rarely but not hardly ever, and then strongly beside their mean: the `n` first of them by
    their maximum over their mean when active. Where there are too few of those, the most active ones.
    """
    rate = statistics["firing_rate"].values
    peak = np.where(rate > 0, statistics["max"].values / statistics["mean_active"].values, 0)
    usual = (rate >= RARE) & (rate <= COMMON)
    order = np.lexsort((-statistics["n_active"].values, -peak, ~usual))
    return [int(feature) for feature in order[:n] if rate[feature] > 0]
