"""What activations look like before anything is asked of them: norms and their spread, what is not finite, means by
label. One lazy pass over a store each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from .moments import ROWS_AT_ONCE, reduce_tokens, token_rows
from .tokens import counted, label, needs, same_tokens

NORM_BITS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_COLUMNS = ("n_token", "n_nan", "n_infinite", "n_finite", "mean", "scatter", "min", "max", "kurtosis")
_AT = {name: place for place, name in enumerate(_COLUMNS)}


def norm_statistics(
    activations: xr.Dataset,
    *,
    by: str | xr.DataArray | None = None,
    groups: int | Sequence[int] | None = None,
    quantiles: Sequence[float] = QUANTILES,
    where: xr.DataArray | None = None,
    skip_positions: int = 1,
) -> xr.Dataset:
    """How long the vectors of tokens are, and how many are not finite, lazily in one pass where `value` is lazy.

    `activations`: `value[…, token, …, width]`; every other dimension is kept. With `by`, a row a group, as in
    `mean_by`: `by="position", groups=512` gives a profile along the sequence. Along […] or […, by], float64:

    - `n_token` (int64): the tokens counted; `nan_fraction`, `infinite_fraction`: those of them with a NaN, and those
      with an infinity and no NaN. All that follows is over the others.
    - `mean_norm`, `std_norm` (n − 1), `min_norm`, `max_norm`: of the Euclidean norm; NaN where there is none.
    - `kurtosis`: the mean over tokens of the kurtosis of a token's own values, Σ(x − x̄)⁴ / width over the square of
      Σ(x − x̄)² / width: 1 at least (and where all are equal), 3 where they are normal, nearly `width` where one
      channel holds it all.
    - `quantile_norm[…, quantile]`, without `by` only: the smallest norm that this share of the tokens does not exceed,
      of its 24 bits the highest 11: exact, or at most 0.1 % too small.

    Memory: a chunk a thread, and 2 MiB an entry of the other dimensions and chunk being merged. SchemaError for what is
    no such node, mask or label, and for a quantile outside [0, 1].
    """
    if wrong := [q for q in quantiles if not 0 <= q <= 1]:
        raise SchemaError(f"quantiles = {wrong}: a quantile lies between 0 and 1")
    rows = token_rows(activations, "a norm")
    kept = list(map(str, rows.dims[:-2]))
    name, values, number = _groups(activations, by, groups)
    bits = NORM_BITS if by is None else 0
    packed = reduce_tokens(
        partial(_norms_of_block, n_group=len(values), bits=bits),
        _merged_norms,
        rows,
        (number.where(counted(activations, skip_positions, where), -1),),
        shape=(len(values), len(_COLUMNS) + (_n_bin(bits) if bits else 0)),
    )
    found = xr.DataArray(packed, dims=(*kept, name, "column"), coords={name: values})
    found = found.assign_coords({key: coord for key, coord in rows.coords.items() if rows.dims[-1] not in coord.dims})
    result = _named_norms(found.isel(column=slice(len(_COLUMNS))))
    if by is not None:
        return result
    histogram = found.isel(column=slice(len(_COLUMNS), None))
    result["quantile_norm"] = histogram_quantile(histogram, quantiles, bits, "column")
    result["quantile_norm"].attrs = {"long_name": "quantile of the norm"}
    return result.isel({name: 0}, drop=True)


def _named_norms(found: xr.DataArray) -> xr.Dataset:
    column = {name: found.isel(column=place) for name, place in _AT.items()}
    finite = column["n_finite"]
    n_token = column["n_token"].where(column["n_token"] > 0)
    share = {name: column[name] / n_token for name in ("n_nan", "n_infinite")}
    said: dict[str, tuple[xr.DataArray, str]] = {
        "n_token": (column["n_token"].astype(np.int64), "tokens counted"),
        "nan_fraction": (share["n_nan"], "fraction of tokens with NaN"),
        "infinite_fraction": (share["n_infinite"], "fraction of tokens with an infinity"),
        "mean_norm": (column["mean"], "mean norm"),
        "std_norm": ((column["scatter"] / (finite - 1).where(finite > 1)) ** 0.5, "standard deviation of the norm"),
        "min_norm": (column["min"].where(finite > 0), "smallest norm"),
        "max_norm": (column["max"].where(finite > 0), "largest norm"),
        "kurtosis": (column["kurtosis"], "kurtosis of a token's values"),
    }
    fractions = {"nan_fraction", "infinite_fraction"}
    units = {"n_token": "tokens", **dict.fromkeys(fractions, "fraction")}
    return xr.Dataset(
        {
            name: value.assign_attrs(long_name=text, **({"units": units[name]} if name in units else {}))
            for name, (value, text) in said.items()
        }
    )


def _norms_of_block(rows: NDArray[Any], number: NDArray[Any], *, n_group: int, bits: int) -> NDArray[np.float64]:
    """Numbers of a block [..., group, column + bin], some rows at a time."""
    n_bin = _n_bin(bits) if bits else 0
    found = _nothing((*rows.shape[:-2], n_group), n_bin)
    for place in np.ndindex(*rows.shape[:-2]):
        for first in range(0, len(number), ROWS_AT_ONCE):
            group = number[first : first + ROWS_AT_ONCE]
            some = np.asarray(rows[place][first : first + ROWS_AT_ONCE][group >= 0], dtype=np.float64)
            part = _norms_of_rows(some, group[group >= 0], n_group, bits)
            found[place] = _merged_norms(found[place], part)
    return found


def _nothing(shape: tuple[int, ...], n_bin: int) -> NDArray[np.float64]:
    found = np.zeros((*shape, len(_COLUMNS) + n_bin))
    found[..., [_AT["mean"], _AT["kurtosis"]]] = np.nan
    found[..., _AT["min"]], found[..., _AT["max"]] = np.inf, -np.inf
    return found


def _norms_of_rows(
    rows: NDArray[np.float64], group: NDArray[np.integer[Any]], n_group: int, bits: int
) -> NDArray[np.float64]:
    """Numbers [group, column + bin] of rows [token, width] that all count."""
    found = _nothing((n_group,), _n_bin(bits) if bits else 0)
    finite = np.isfinite(rows).all(-1)
    nan = np.isnan(rows).any(-1) if not finite.all() else ~finite
    for name, mask in {"n_token": slice(None), "n_nan": nan, "n_infinite": ~nan & ~finite, "n_finite": finite}.items():
        found[:, _AT[name]] = np.bincount(group[mask], minlength=n_group)
    rows, group = (rows, group) if finite.all() else (rows[finite], group[finite])
    norm = np.linalg.norm(rows, axis=-1)
    square = np.square(rows - rows.mean(-1, keepdims=True))
    variance, fourth = square.mean(-1), np.einsum("tw,tw->t", square, square) / rows.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        kurtosis = fourth / np.square(variance)
        n = found[:, _AT["n_finite"]]
        for name, value in {"mean": norm, "kurtosis": np.where(np.isnan(kurtosis), 1.0, kurtosis)}.items():
            found[:, _AT[name]] = np.bincount(group, value, n_group) / n
    deviation = norm - found[group, _AT["mean"]]
    found[:, _AT["scatter"]] = np.bincount(group, np.square(deviation), n_group)
    np.minimum.at(found[:, _AT["min"]], group, norm)
    np.maximum.at(found[:, _AT["max"]], group, norm)
    if bits:
        found[0, len(_COLUMNS) :] = magnitude_histogram(norm, bits)
    return found


def _merged_norms(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    found = a + b
    n_a, n_b = a[..., _AT["n_finite"]], b[..., _AT["n_finite"]]
    share = np.divide(n_b, n_a + n_b, out=np.zeros_like(n_a), where=n_a + n_b > 0)
    for name in ("mean", "kurtosis"):
        of_a, of_b = a[..., _AT[name]], b[..., _AT[name]]
        between = np.where(n_a == 0, 0.0, np.where(n_b == 0, 0.0, of_b - of_a))
        found[..., _AT[name]] = np.where(n_a == 0, of_b, of_a) + between * share
        if name == "mean":
            found[..., _AT["scatter"]] += n_a * share * np.square(between)
    found[..., _AT["min"]] = np.minimum(a[..., _AT["min"]], b[..., _AT["min"]])
    found[..., _AT["max"]] = np.maximum(a[..., _AT["max"]], b[..., _AT["max"]])
    return found


# ── quantiles of magnitudes ──────────────────────────────────────────────────────────────────────────────────────────


def _n_bin(bits: int) -> int:
    return int(2 ** (8 + bits))


def magnitude_histogram(values: NDArray[Any], bits: int) -> NDArray[np.float64]:
    """How many values have each magnitude, float64 [2^(8 + bits)]: a bin for each float32 ≥ 0 of `bits` bits of
    mantissa, in ascending order, to which magnitudes are cut off. 7 bits are bfloat16's.
    """
    magnitude = np.abs(np.asarray(values, dtype=np.float32)).reshape(-1)
    return np.bincount(magnitude.view(np.uint32) >> np.uint32(23 - bits), minlength=_n_bin(bits)).astype(np.float64)


def histogram_quantile(counts: xr.DataArray, quantiles: Sequence[float], bits: int, dim: str) -> xr.DataArray:
    """Quantiles [..., quantile] of magnitudes, of their histograms along `dim`: numpy's "inverted_cdf" of the values
    cut off to `bits` bits of mantissa; NaN where nothing was counted. Lazy where the histograms are.
    """

    def of(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
        reached = np.cumsum(histogram, -1)
        total = reached[..., -1:]
        rank = np.maximum(np.ceil(np.asarray(quantiles) * total), 1)
        bins = (reached[..., None, :] < rank[..., None]).sum(-1, dtype=np.uint32)
        found = (bins << np.uint32(23 - bits)).view(np.float32).astype(np.float64)
        return np.where(total > 0, found, np.nan)

    found: xr.DataArray = xr.apply_ufunc(
        of,
        counts,
        input_core_dims=[[dim]],
        output_core_dims=[["quantile"]],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": {"quantile": len(quantiles)}},
    )
    return found.assign_coords(quantile=list(quantiles))


# ── means by label ───────────────────────────────────────────────────────────────────────────────────────────────────


def mean_by(
    activations: xr.Dataset,
    by: str | xr.DataArray,
    groups: int | Sequence[int],
    *,
    where: xr.DataArray | None = None,
    skip_positions: int = 1,
) -> xr.Dataset:
    """The mean vector of each group of tokens, lazily in one pass where `value` is lazy.

    `activations`: `value[…, token, …, width]`; every other dimension is kept. `by` says to which group a token belongs:
    the name of a coordinate, such as "position", or integers or booleans [token], such as `label(activations,
    "token_id") == 13`. `groups` are the values looked for, which become a coordinate; a number n stands for 0 to n − 1.
    Tokens of no such group, tokens with NaN or infinity, and the first `skip_positions` of a sequence do not count.

    Gives `n_token[…, by]` (int64), `mean[…, by, width]` (float64; NaN for a group without tokens), and `variance[…,
    by]` (float64, NaN for fewer than two): the mean squared distance from the group's mean, n − 1; divided by
    `n_token`, it is the squared error of the mean that is to be expected. The dimension is called as `by` is, or
    "group". Memory: a chunk a thread, and groups × width numbers an entry and chunk being
    merged. SchemaError for what is no such node, mask or label.
    """
    rows = token_rows(activations, "a mean by group")
    *kept, _, width = map(str, rows.dims)
    name, values, number = _groups(activations, by, groups)
    packed = reduce_tokens(
        partial(_means_of_block, n_group=len(values)),
        _merged_means,
        rows,
        (number.where(counted(activations, skip_positions, where), -1),),
        shape=(len(values), 2 + rows.sizes[width]),
    )
    found = xr.DataArray(packed, dims=(*kept, name, width), coords=rows.drop_vars(width, errors="ignore").coords)
    n, scatter = found.isel({width: 0}), found.isel({width: 1})
    result = xr.Dataset(
        {
            "n_token": n.astype(np.int64).assign_attrs(units="tokens", long_name="tokens counted"),
            "mean": found.isel({width: slice(2, None)}).where(n > 0).assign_attrs(long_name="mean"),
            "variance": (scatter / (n - 1).where(n > 1)).assign_attrs(long_name="variance about the group's mean"),
        }
    )
    return result.assign_coords(rows.coords).assign_coords({name: values})


def _means_of_block(rows: NDArray[Any], number: NDArray[Any], *, n_group: int) -> NDArray[np.float64]:
    """Of a block, [..., group, 2 + width]: the number of tokens, their scatter about the mean, and the mean."""
    from scipy.sparse import csr_array

    found = np.zeros((*rows.shape[:-2], n_group, 2 + rows.shape[-1]))
    for place in np.ndindex(*rows.shape[:-2]):
        for first in range(0, len(number), ROWS_AT_ONCE):
            group, some = number[first : first + ROWS_AT_ONCE], rows[place][first : first + ROWS_AT_ONCE]
            kept = (group >= 0) & np.isfinite(some).all(-1)
            group, some = group[kept], some[kept].astype(np.float64)
            part = np.zeros_like(found[place])
            part[:, 0] = np.bincount(group, minlength=n_group)
            chosen = csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(n_group, len(group)))
            part[:, 2:] = (chosen @ some) / part[:, :1].clip(min=1)
            some -= part[group, 2:]
            part[:, 1] = np.bincount(group, np.einsum("tw,tw->t", some, some), n_group)
            found[place] = _merged_means(found[place], part)
    return found


def _merged_means(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    found = a + b
    share = np.divide(b[..., 0], found[..., 0], out=np.zeros_like(b[..., 0]), where=found[..., 0] > 0)
    between = b[..., 2:] - a[..., 2:]
    found[..., 1] += a[..., 0] * share * np.square(between).sum(-1)
    found[..., 2:] = a[..., 2:] + between * share[..., None]
    return found


def _groups(
    activations: xr.Dataset, by: str | xr.DataArray | None, groups: int | Sequence[int] | None
) -> tuple[str, NDArray[np.int64], xr.DataArray]:
    """What the groups are called, their values, and the number of each token's group, int64 [token], −1 for none."""
    if by is None:
        return "group", np.zeros(1, dtype=np.int64), label(activations, "position") * 0
    if groups is None:
        raise SchemaError("`groups` is missing: say which values of `by` make a group, or how many from 0 on")
    if isinstance(by, str):
        needs(activations, [by], "a mean by group")
        name, labels = by, label(activations, by)
    else:
        name, labels = str(by.name or "group"), by
    if (
        labels.dims != ("token",)
        or labels.sizes["token"] != activations.sizes["token"]
        or labels.dtype.kind not in "biu"
    ):
        raise SchemaError(
            f"`by` must be integers or booleans [token] of the {activations.sizes['token']:,} tokens given, not "
            f"{labels.dtype} [{', '.join(f'{dim}={size}' for dim, size in labels.sizes.items())}]"
        )
    if not isinstance(by, str):
        same_tokens(activations, by, "`by`")
    values = np.asarray(range(groups) if isinstance(groups, int) else groups, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    if not len(values) or (np.diff(values[order]) == 0).any():
        raise SchemaError(f"groups = {groups}: at least one value, and none twice")

    def number(found: NDArray[Any]) -> NDArray[np.int64]:
        wanted = found.astype(np.int64)
        place = order[np.searchsorted(values[order], wanted).clip(max=len(values) - 1)]
        return np.where(values[place] == wanted, place, -1)

    bare = xr.DataArray(labels.data, dims="token")
    return name, values, xr.apply_ufunc(number, bare, dask="parallelized", output_dtypes=[np.int64])
