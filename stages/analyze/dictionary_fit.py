"""How well a dictionary fits the activations it encoded, from what every unit of a features store recorded."""

from __future__ import annotations

from collections import defaultdict
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from ...stores.store import Store

if TYPE_CHECKING:
    import xarray as xr


def dictionary_fit(folder: str | PathLike[str]) -> xr.Dataset:
    """The fit of every dictionary of a features store (the folder of an encode step), from its records; reads no data.

    Along `dictionary` (the store's groups): `n_token` counted, `l0` (mean number of features that fire on a token), and
    over the sample of `n_fit` tokens on which reconstructions were compared: `fvu`, the fraction of variance
    unexplained, Σ‖x̂ − x‖² / Σ‖x − mean‖², and `cosine`, the mean cosine of x̂ and x; NaN where there was nothing to
    compare with. The first positions of every sequence are left out, as many as `attrs["skip_positions"]` says. Counts
    the units that are recorded, be they all or not.
    """
    import xarray as xr

    store = Store.open(folder)
    groups = list(store.header.provenance["dictionaries"])
    sums: dict[str, dict[str, np.ndarray]] = {group: defaultdict(lambda: np.zeros(1)) for group in groups}
    for index in sorted(store.ledger.done()):
        for group, found in store.ledger.record(index)["statistics"].items():
            for name, values in found.items():
                sums[group][name] = sums[group][name] + np.asarray(values, dtype=np.float64)
    rows = [_of_group(sums[group]) for group in groups]
    columns = {name: (("dictionary",), np.array([row[name] for row in rows])) for name in rows[0]}
    attrs = {"skip_positions": store.header.provenance["skip_positions"]}
    return xr.Dataset(columns, coords={"dictionary": groups}, attrs=attrs)


def _of_group(sums: dict[str, np.ndarray]) -> dict[str, float]:
    with np.errstate(invalid="ignore", divide="ignore"):
        n_token, n_fit = sums["token_sum"][0], sums["fit_token_sum"][0]
        spread = sums["target_square_sum"][0] - np.square(sums["target_sum"]).sum() / n_fit
        return {
            "n_token": int(n_token),
            "l0": sums["l0_sum"][0] / n_token,
            "n_fit": int(n_fit),
            "fvu": sums["error_square_sum"][0] / spread,
            "cosine": sums["cosine_sum"][0] / n_fit,
        }
