"""Principal components of activations over a store that does not fit in memory: exact, by the covariance, or by
randomised subspace iteration, which needs no matrix of width × width.

Pearson (1901); Halko, Martinsson and Tropp (2011), "Finding structure with randomness", sections 4.5 and 5.3. Signs are
scikit-learn's: the entry of a component with the largest magnitude is positive.
"""

from __future__ import annotations

from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr
from dask.graph_manipulation import bind
from numpy.typing import NDArray

from ...stores.errors import SchemaError, nearest
from .moments import ROWS_AT_ONCE, Packed, merged_moments, packed_moments, reduce_tokens, token_rows
from .tokens import counted

OVERSAMPLES = 10

Method = Literal["covariance", "randomized"]


def pca(
    activations: xr.Dataset,
    n_components: int,
    *,
    where: xr.DataArray | None = None,
    skip_positions: int = 1,
    method: Method = "covariance",
    n_omit: int = 0,
    seed: int = 0,
    n_iter: int = 4,
) -> xr.Dataset:
    """Principal components of the tokens that count, for each layer (and head), lazily where `value` is lazy.

    `activations`: `value[…, token, …, width]`; every other dimension is kept. Tokens count as in `moments`. The first
    `n_omit` components are left out of what is given: `component` runs from `n_omit` to `n_omit + n_components − 1`.

    Gives, float64 but `n_token` int64: `components[…, component, width]`, orthonormal, `mean[…, width]`,
    `explained_variance[…, component]` (n − 1), `explained_variance_ratio[…, component]` of the variance of all
    components, `singular_values[…, component]` of the centred rows, and `n_token[…]`. NaN where fewer than two tokens
    count. Components past the rank of the data are orthonormal, arbitrary, and explain nothing.

    `method="covariance"`: exact, one pass; memory (1 + width)² numbers an entry and chunk being merged.
    `method="randomized"`: `n_iter` power iterations from n_omit + n_components + 10 random directions of `seed`, in
    n_iter + 2 passes, one after another, each reading `value` again; memory a chunk a thread and width × directions
    numbers. The components are the better, the faster variances fall; variances are never above the exact ones.

    SchemaError for what is no such node or mask, and for more components than the width has.
    """
    rows = token_rows(activations, "PCA")
    return _pca_of_rows(
        rows, counted(activations, skip_positions, where), n_components, method, n_omit=n_omit, seed=seed, n_iter=n_iter
    )


def pca_of(vectors: xr.DataArray, dim: str, n_components: int, *, n_omit: int = 0) -> xr.Dataset:
    """Principal components of labelled vectors [..., dim, ..., width] over `dim`, whatever it is called; such as
    mean vectors over `character_count`, or decoder rows over `feature`.

    `width` is the last dimension that is not `dim`. Gives what `pca` gives, exactly; a vector with NaN or infinity does
    not count, and `n_token` is the number of those that do. Lazy where `vectors` are. SchemaError for a `dim` that is
    not there, and for more components than the width has.
    """
    others = [name for name in vectors.dims if name != dim]
    if dim not in vectors.dims or not others:
        raise SchemaError(
            f"PCA over {dim!r} reads vectors [..., {dim}, ..., width], not {list(map(str, vectors.dims))}"
        )
    along = [name for name, coord in vectors.coords.items() if dim in coord.dims]
    rows = vectors.drop_vars(along).transpose(*others[:-1], dim, others[-1])
    counts = xr.DataArray(np.ones(vectors.sizes[dim], dtype=bool), dims=dim)
    return _pca_of_rows(rows, counts, n_components, "covariance", n_omit=n_omit, seed=0, n_iter=0)


def project(vectors: xr.Dataset | xr.DataArray, pca: xr.Dataset, n_omit: int = 0) -> xr.DataArray:
    """Scores of vectors: what is left of them without the mean, along each component; the first `n_omit` left out.

    `vectors`: a node with `value[…, width]`, or a variable [..., width], with or without tokens; where it has a
    coordinate that `pca` has too, such as `layer`, each goes by the components of its own. Gives [..., component],
    float32, or float64 of float64; lazy where either is; the coordinates of `vectors` stay. Memory: a chunk a thread,
    twice. SchemaError where widths differ or `pca` has no such layer.
    """
    value = _value(vectors)
    own = _matching(pca, value, n_omit)
    width = _width(pca)
    if width not in value.dims or value.sizes[width] != pca.sizes[width]:
        found = ", ".join(f"{dim}={size}" for dim, size in value.sizes.items())
        raise SchemaError(f"these components are {pca.sizes[width]} wide on {width!r}; what was given is [{found}]")
    dtype = np.promote_types(value.dtype, np.float32)
    scores: xr.DataArray = xr.apply_ufunc(
        lambda x, mean, components: _times(x - mean, np.swapaxes(components, -1, -2)).astype(dtype),
        _rows_last(value, own, width),
        own["mean"],
        own["components"],
        input_core_dims=[[width], [width], ["component", width]],
        output_core_dims=[["component"]],
        dask="parallelized",
        output_dtypes=[dtype],
    )
    scores = scores.transpose(*(dim for dim in value.dims if dim != width), ..., "component")
    return scores.rename("score").assign_attrs(long_name="score")


def reconstruct(scores: xr.DataArray, pca: xr.Dataset, n_omit: int = 0) -> xr.DataArray:
    """The vectors that scores stand for: mean + Σ score × component, over the components from `n_omit` on.

    `scores` [..., component] as `project` gives them, possibly of some components only. Gives [..., width] of the
    scores' dtype; lazy where either is. SchemaError where `pca` has not those components.
    """
    width = _width(pca)
    chosen = scores.isel(component=np.flatnonzero(scores["component"].values >= n_omit))
    own = _matching(pca, chosen.drop_vars("component"), 0)
    if missing := sorted(set(chosen["component"].values.tolist()) - set(own["component"].values.tolist())):
        raise SchemaError(f"the components {missing} of the scores are not in this PCA")
    own = own.sel(component=chosen["component"].values)
    found: xr.DataArray = xr.apply_ufunc(
        lambda score, mean, components: (_times(score, components) + mean).astype(scores.dtype),
        _rows_last(chosen, own, "component"),
        own["mean"],
        own["components"],
        input_core_dims=[["component"], [width], ["component", width]],
        output_core_dims=[[width]],
        dask="parallelized",
        output_dtypes=[scores.dtype],
    )
    found = found.transpose(*(dim for dim in scores.dims if dim != "component"), ..., width)
    return found.rename("value").drop_attrs()


def _value(vectors: xr.Dataset | xr.DataArray) -> xr.DataArray:
    if isinstance(vectors, xr.DataArray):
        return vectors
    if "value" not in vectors:
        held = ", ".join(map(str, vectors.data_vars)) or "nothing"
        raise SchemaError(f"a projection reads the variable `value` of a node; what was given holds {held}")
    return vectors["value"]


def _rows_last(value: xr.DataArray, own: xr.Dataset, width: str) -> xr.DataArray:
    """The value with what each component set has many rows of last, so that a product takes them all at once."""
    whole = value.chunk({width: -1}) if value.chunks is not None else value
    return whole.transpose(*(dim for dim in own["mean"].dims if dim in value.dims and dim != width), ...)


def _times(rows: NDArray[Any], matrices: NDArray[Any]) -> NDArray[Any]:
    """Rows [..., a] times matrices [..., a, b], both as xarray has broadcast them."""
    if rows.ndim > 1 and (matrices.ndim == 2 or matrices.shape[-3] == 1):
        return np.asarray(np.matmul(rows, matrices if matrices.ndim == 2 else matrices[..., 0, :, :]))
    return np.asarray(np.matmul(rows[..., None, :], matrices)[..., 0, :])


def _width(pca: xr.Dataset) -> str:
    return str(pca["mean"].dims[-1])


def _matching(pca: xr.Dataset, value: xr.DataArray, n_omit: int) -> xr.Dataset:
    """The PCA of the layers (and heads) that `value` has, from component `n_omit` on, without labels but those."""
    own = pca[["mean", "components"]].sel(component=slice(n_omit, None))
    for dim in map(str, own["mean"].dims[:-1]):
        if dim in own.coords and dim in value.coords:
            held, wanted = own[dim].values, value[dim].reset_coords(drop=True)
            if missing := sorted(set(np.atleast_1d(wanted.values).tolist()) - set(held.tolist())):
                raise SchemaError(f"this PCA has the {dim}s {held.tolist()}, not {missing}")
            own = own.sel({dim: wanted})
    return own.drop_vars([name for name, coord in own.coords.items() if not coord.dims])


# ── components ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _pca_of_rows(
    rows: xr.DataArray,
    counts: xr.DataArray,
    n_components: int,
    method: Method,
    *,
    n_omit: int,
    seed: int,
    n_iter: int,
) -> xr.Dataset:
    wanted, width = slice(n_omit, n_omit + n_components), rows.sizes[rows.dims[-1]]
    if n_omit < 0 or n_components < 1 or wanted.stop > width:
        raise SchemaError(f"components {n_omit} to {wanted.stop - 1} were asked for, of a width of {width}")
    if method not in (known := ("covariance", "randomized")):
        raise SchemaError(f"method = {method!r}.{nearest(method, known)} Known: {', '.join(known)}")
    if n_iter < 0:
        raise SchemaError(f"n_iter = {n_iter}: at least 0")
    if method == "covariance":
        shape = (1 + width, 1 + width)
        scatter = reduce_tokens(packed_moments, merged_moments, rows, (counts,), shape=shape)
        solved = _per_entry(_of_scatter, (1 + n_components, 2 + width), scatter, wanted=wanted)
    else:
        sketch, basis = _subspace(rows, counts, min(wanted.stop + OVERSAMPLES, width), seed, n_iter)
        solved = _per_entry(_of_sketch, (1 + n_components, 2 + width), sketch, basis, wanted=wanted)
    return _labelled(solved, rows, wanted)


def _labelled(solved: Any, rows: xr.DataArray, wanted: slice) -> xr.Dataset:
    """The results by name, of [..., 1 + component, 2 + width]: n, total scatter and mean in the first row, and in each
    other one the component behind its share of the scatter and 0.
    """
    *kept, _, width = map(str, rows.dims)
    n, total, mean, scatter, components = (
        solved[..., 0, 0],
        solved[..., 0, 1],
        solved[..., 0, 2:],
        solved[..., 1:, 0],
        solved[..., 1:, 2:],
    )
    xp = np if isinstance(solved, np.ndarray) else da
    variance = scatter / xp.where(n > 1, n - 1, np.nan)[..., None]
    of_component = (*kept, "component")
    found = xr.Dataset(
        {
            "components": ((*of_component, width), components, {"long_name": "component"}),
            "mean": ((*kept, width), mean, {"long_name": "mean"}),
            "explained_variance": (of_component, variance, {"long_name": "variance explained"}),
            "explained_variance_ratio": (
                of_component,
                scatter / xp.where(total > 0, total, np.nan)[..., None],
                {"units": "fraction", "long_name": "fraction of variance explained"},
            ),
            "singular_values": (of_component, scatter**0.5, {"long_name": "singular value"}),
            "n_token": (kept, n.astype(np.int64), {"units": rows.dims[-2], "long_name": "rows counted"}),
        }
    )
    return found.assign_coords(rows.coords).assign_coords(component=range(wanted.start, wanted.stop))


def _per_entry(solve: Any, shape: tuple[int, int], packed: Any, *others: Any, **settings: Any) -> Any:
    """Solve for each entry [..., *shape] of arrays [..., a, b], lazily where they are lazy."""
    if isinstance(packed, np.ndarray):
        return solve(packed, *others, **settings)
    chunks = (*packed.chunks[:-2], *((size,) for size in shape))
    return da.map_blocks(solve, packed, *others, chunks=chunks, dtype=np.float64, **settings)


def _of_scatter(packed: Packed, *, wanted: slice) -> NDArray[np.float64]:
    """Solutions, as `_labelled` reads them, of moments [..., 1 + width, 1 + width]."""
    found = np.full((*packed.shape[:-2], 1 + wanted.stop - wanted.start, packed.shape[-1] + 1), np.nan)
    for place in np.ndindex(*packed.shape[:-2]):
        n, mean, scatter = packed[place][0, 0], packed[place][0, 1:], packed[place][1:, 1:]
        found[place] = _solution(n, np.trace(scatter), mean, scatter, np.eye(len(mean)), wanted)
    return found


def _of_sketch(sketch: Packed, basis: NDArray[np.float64], *, wanted: slice) -> NDArray[np.float64]:
    """Solutions, as `_labelled` reads them, of scatter @ basis, by the Rayleigh-Ritz procedure in the basis."""
    found = np.full((*sketch.shape[:-2], 1 + wanted.stop - wanted.start, sketch.shape[-2]), np.nan)
    for place in np.ndindex(*sketch.shape[:-2]):
        n, total, mean, product = sketch[place][0, 0], sketch[place][1, 0], sketch[place][2:, 0], sketch[place][2:, 1:]
        within = basis[place].T @ product
        found[place] = _solution(n, total, mean, (within + within.T) / 2, basis[place], wanted)
    return found


def _solution(
    n: float,
    total: float,
    mean: NDArray[np.float64],
    scatter: NDArray[np.float64],
    basis: NDArray[np.float64],
    wanted: slice,
) -> NDArray[np.float64]:
    """One solution from the scatter [basis, basis] in a basis [width, basis] of orthonormal columns."""
    found = np.full((1 + wanted.stop - wanted.start, 2 + len(mean)), np.nan)
    found[0] = np.concatenate([[n, total], mean if n else np.full_like(mean, np.nan)])
    if n < 2 or not np.isfinite(scatter).all():
        return found
    values, vectors = np.linalg.eigh(scatter)
    chosen = np.argsort(-values, kind="stable")[wanted]
    components = (basis @ vectors[:, chosen]).T
    largest = np.take_along_axis(components, np.abs(components).argmax(-1)[:, None], -1)
    found[1:, 0], found[1:, 1] = values[chosen].clip(min=0), 0.0
    found[1:, 2:] = components * np.where(largest < 0, -1.0, 1.0)
    return found


# ── a sketch, pass by pass ───────────────────────────────────────────────────────────────────────────────────────────


def _subspace(rows: xr.DataArray, counts: xr.DataArray, size: int, seed: int, n_iter: int) -> tuple[Any, Any]:
    """The scatter times a basis of its dominant subspace, as `_sketched` packs it, and the basis [..., width, size]."""
    width = rows.sizes[rows.dims[-1]]
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, size)))[0]
    basis = np.broadcast_to(basis, (*rows.shape[:-2], width, size))
    shape = (2 + width, 1 + size)
    if rows.chunks is not None:
        basis = da.from_array(basis, chunks=(*rows.data.chunks[:-2], width, size))
    sketch = reduce_tokens(_sketched, _merged_sketches, rows, (counts,), (basis,), shape=shape)
    for number in range(n_iter + 1):
        basis = _per_entry(_orthonormal, (width, size), sketch)
        read, mask = _read_after(basis, rows, counts, number)
        sketch = reduce_tokens(_sketched, _merged_sketches, read, (mask,), (basis,), shape=shape)
    return sketch, basis


def _read_after(basis: Any, rows: xr.DataArray, counts: xr.DataArray, number: int) -> tuple[xr.DataArray, xr.DataArray]:
    """The rows, read again once the basis stands: dask would hold every chunk from the first pass to the last."""
    if rows.chunks is None:
        return rows, counts
    lazy, mask = bind((rows.data, da.asarray(counts.data)), basis, seed=number)
    return xr.DataArray(lazy, dims=rows.dims), xr.DataArray(mask, dims=counts.dims)


def _sketched(rows: NDArray[Any], counts: NDArray[np.bool_], basis: NDArray[np.float64]) -> Packed:
    """The scatter of rows [..., token, width] times a basis [..., width, size], in [..., 2 + width, 1 + size].

    The first row holds the count and the mean times the basis, the second the total scatter, and those below the mean
    and the product.
    """
    lead, (n_token, width) = rows.shape[:-2], rows.shape[-2:]
    found = np.zeros((*lead, 2 + width, 1 + basis.shape[-1]))
    for place in np.ndindex(*lead):
        for first in range(0, n_token, ROWS_AT_ONCE):
            some = np.asarray(rows[place][first : first + ROWS_AT_ONCE], dtype=np.float64)
            some = some[counts[first : first + ROWS_AT_ONCE] & np.isfinite(some).all(-1)]
            if len(some):
                found[place] = _merged_sketches(found[place], _sketch_of_rows(some, basis[place]))
    return found


def _sketch_of_rows(rows: NDArray[np.float64], basis: NDArray[np.float64]) -> Packed:
    mean = rows.mean(0)
    deviation = rows - mean
    rest = np.zeros((1, basis.shape[1]))
    return np.block(
        [
            [np.array([[len(rows)]]), (mean @ basis)[None]],
            [np.array([[np.square(deviation).sum()]]), rest],
            [mean[:, None], deviation.T @ (deviation @ basis)],
        ]
    )


def _merged_sketches(a: Packed, b: Packed) -> Packed:
    n_a, n_b = a[..., 0, 0, None], b[..., 0, 0, None]
    share = np.divide(n_b, n_a + n_b, out=np.zeros_like(n_a), where=n_a + n_b > 0)
    between, along = b[..., 2:, 0] - a[..., 2:, 0], b[..., 0, 1:] - a[..., 0, 1:]
    found = a + b
    found[..., 0, 1:] = a[..., 0, 1:] + along * share
    found[..., 2:, 0] = a[..., 2:, 0] + between * share
    found[..., 1, 0] += (n_a * share)[..., 0] * np.square(between).sum(-1)
    found[..., 2:, 1:] += (n_a * share)[..., None] * (between[..., :, None] * along[..., None, :])
    return found


def _orthonormal(sketch: Packed) -> NDArray[np.float64]:
    """An orthonormal basis [..., width, size] of what the scatter times a basis spans."""
    product = sketch[..., 2:, 1:]
    return np.linalg.qr(np.where(np.isfinite(product), product, 0.0))[0]
