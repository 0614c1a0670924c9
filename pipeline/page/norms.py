"""What a run's activations look like: norms layer by layer, and the largest values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stages.analyze.massive_activations import massive_activations
from ...stages.analyze.statistics import norm_statistics
from ...stores.errors import CorruptStore, SchemaError
from ...stores.places import Place
from ...stores.store import Store
from ...stores.tree import CAPTURED, run_stores
from .values import TokenSet, number, numbers, some

LARGEST = 3
"""Values of the largest magnitude that are told of a layer."""
MOST_RECORDS = 4096
"""Records that the sums over a whole step are taken from."""
_COLUMNS = ("mean_norm", "std_norm", "min_norm", "max_norm", "kurtosis", "nan_fraction", "infinite_fraction")


def norms(folder: Place, run: xr.DataTree, tokens: TokenSet, n_token: int) -> dict[str, Any]:
    """Of every kind of hook point that keeps a vector a token: what `norm_statistics` and `massive_activations` give of
    the first `n_token` tokens, those of unfinished units left out; and of every kind what the records tell of all of
    them.
    """
    recorded = {kind: told for store in run_stores(folder) for kind, told in _recorded(store)}
    kinds = run.children[CAPTURED].children if CAPTURED in run.children else {}
    shown = [
        {"hook": kind, "recorded": recorded.get(kind), **_vectors(node, tokens, n_token)}
        for kind, node in kinds.items()
    ]
    return some(shown, "The run keeps no activations.")


def _vectors(node: xr.DataTree, tokens: TokenSet, n_token: int) -> dict[str, Any]:
    """The statistics of a node with a vector a token and layer; nothing of any other."""
    dataset = node.to_dataset()
    dims = dataset["value"].dims
    if len(dims) < 2 or dims[-2] != "token" or dims[:-2] not in ((), ("layer",)):
        return {}
    some_tokens = dataset.isel(token=slice(0, n_token))
    done = some_tokens["done"].reset_coords(drop=True)
    statistics = norm_statistics(some_tokens, where=done).compute()
    largest = massive_activations(some_tokens, LARGEST, where=done).compute()
    if "layer" not in dims:
        statistics, largest = statistics.expand_dims("layer"), largest.expand_dims("layer")
    quantiles = statistics["quantile_norm"].transpose("layer", "quantile")
    return {
        "layers": dataset["layer"].values.tolist() if "layer" in dims else [None],
        "width": dataset.sizes[dims[-1]],
        "n_token": int(statistics["n_token"].max()),
        **{name: numbers(statistics[name].values) for name in _COLUMNS},
        "quantiles": quantiles["quantile"].values.tolist(),
        "quantile_norm": numbers(quantiles.values),
        "median_magnitude": numbers(largest["median_magnitude"].values),
        "largest": [_largest(largest.isel(layer=i), tokens) for i in range(largest.sizes["layer"])],
    }


def _largest(found: xr.Dataset, tokens: TokenSet) -> list[dict[str, Any]]:
    """The largest values of a layer, those there are."""
    there = found.isel(rank=found["channel"].values >= 0)
    whole = ("channel", "sequence", "position")
    ids = tokens.add(there["token_id"].values)
    return [
        {
            "value": number(float(one["value"])),
            "ratio": number(float(one["ratio"])),
            "massive": bool(one["massive"]),
            "token_id": ids[rank],
            **{name: int(one[name]) for name in whole},
        }
        for rank in range(there.sizes["rank"])
        for one in (there.isel(rank=rank),)
    ]


def _recorded(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every kind in a store of activations, over all recorded units: the largest magnitude of each layer, the root
    of the mean squared norm of a token, and the root of the relative squared error of storing.
    """
    from ...stages.captured import STATISTICS

    if store.schema.kind != CAPTURED:
        return
    units = sorted(store.done())
    units = units[:: -(-len(units) // MOST_RECORDS) or 1]
    sums: dict[str, dict[str, NDArray[Any]]] = {kind.rpartition("/")[0]: {} for kind in store.schema.arrays}
    n_token = 0
    for unit in units:
        record = store.ledger.record(unit)
        try:
            start, stop = record["rows"]["token"]
            n_token += int(stop) - int(start)
            for kind, known in sums.items():
                _merge(known, record["statistics"].get(kind, {}), STATISTICS)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptStore(f"{store.ledger.path(unit)} is not the record of a unit ({error!r})") from error
    for kind, known in ((kind, known) for kind, known in sums.items() if known):
        layer = store.labels.get(f"{kind}/layer")
        yield kind, {"layers": None if layer is None else layer[1].tolist(), **_told(store, kind, known, n_token)}


def _merge(known: dict[str, NDArray[Any]], said: Mapping[str, Any], names: Sequence[str]) -> None:
    """Takes what a record says of a kind into the sums. ValueError where it is no number a layer."""
    for name in names:
        if name in said:
            found = np.asarray(said[name], dtype=np.float64)
            merge = np.maximum if name.endswith("max") else np.add
            known[name] = merge(known[name], found) if name in known else found


def _told(store: Store, kind: str, known: dict[str, NDArray[Any]], n_token: int) -> dict[str, Any]:
    largest, square, error = (known.get(name) for name in ("abs_max", "square_sum", "error_square_sum"))
    if largest is None or square is None:
        raise SchemaError(f"{store.path.parent} has records without the statistics of {kind}")
    by_token = "token" in store.schema.arrays[f"{kind}/value"].dims
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "abs_max": numbers(largest),
            "rms_norm": numbers(np.sqrt(square / n_token)) if by_token else None,
            "relative_error": None if error is None else numbers(np.sqrt(error / square)),
            "n_token": n_token,
        }
