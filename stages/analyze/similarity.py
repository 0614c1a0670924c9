"""How alike representations are: cosines of the same token's vectors at two layers, of a token's vector and a
direction, and linear CKA, which compares whole clouds of tokens whatever their bases.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError, nearest
from .moments import ROWS_AT_ONCE, labelled_moments, reduce_tokens, token_rows
from .tokens import counted, same_tokens, vectors

CKA = Literal["exact", "minibatch"]


def layer_cosine(
    activations: xr.Dataset, *, where: xr.DataArray | None = None, skip_positions: int = 1
) -> xr.DataArray:
    """The cosine of each token's vectors at two layers, its mean over the tokens that count: [..., layer, layer_2].

    `activations`: `value[…, layer, token, width]`; every other dimension, such as `head`, is kept. float64, lazily in
    one pass where `value` is lazy. A token with NaN or infinity, or a vector of zeros, at any layer does not count; NaN
    where none does. Memory: all layers of one chunk of tokens a thread; `open_run(path, chunks=None)` and
    `.chunk({"token": 4096, "layer": -1})` keep that small. SchemaError for what is no such node or mask, and without
    `layer`.
    """
    rows, layers, width = _by_layer(activations, "a cosine between layers")
    counts = counted(activations, skip_positions, where)
    n_layer = activations.sizes["layer"]
    shape = (1 + n_layer, n_layer)
    sums = reduce_tokens(partial(_cosines, width=width), np.add, rows, (counts,), shape=shape)
    mean = sums[..., 1:, :] / _positive(sums[..., :1, :1])
    return _between(mean, rows, layers, "cosine", "mean cosine between layers")


def _cosines(rows: NDArray[Any], counts: NDArray[np.bool_], *, width: int) -> NDArray[np.float64]:
    """The number of rows [..., token, layer × width] that count, and below it the sums of cosines [layer, layer]."""
    n_layer = rows.shape[-1] // width
    found = np.zeros((*rows.shape[:-2], 1 + n_layer, n_layer))
    for place in np.ndindex(*rows.shape[:-2]):
        for first in range(0, len(counts), ROWS_AT_ONCE):
            some = rows[place][first : first + ROWS_AT_ONCE][counts[first : first + ROWS_AT_ONCE]]
            unit = some.reshape(len(some), n_layer, width).astype(np.float64)
            norm = np.linalg.norm(unit, axis=-1, keepdims=True)
            kept = ((norm > 0) & np.isfinite(norm)).all((1, 2))
            unit = np.swapaxes(unit[kept] / norm[kept], 0, 1).reshape(n_layer, -1)
            found[place][0] += kept.sum()
            found[place][1:] += unit @ unit.T
    return found


def direction_cosine(activations: xr.Dataset, direction: xr.DataArray | NDArray[Any]) -> xr.DataArray:
    """The cosine of each token's vector and a direction: [..., token] float32, with the node's coordinates; lazy where
    `value` is.

    `activations`: `value[…, token, …, width]`. `direction` [width], or a variable [..., width] with dimensions of its
    own, such as one a layer or one a feature; its layers are the node's. NaN for a vector of zeros and where a value is
    NaN or infinite. Memory: a chunk a thread, in float64. SchemaError where widths differ.
    """
    value = vectors(activations, "a cosine with a direction")
    width = str(value.dims[-1])
    towards = direction if isinstance(direction, xr.DataArray) else xr.DataArray(np.asarray(direction), dims=width)
    if towards.dims[-1:] != (width,) or towards.sizes[width] != value.sizes[width]:
        said = ", ".join(f"{dim}={size}" for dim, size in towards.sizes.items())
        raise SchemaError(f"a direction must be [..., {width}={value.sizes[width]}], not [{said}]")

    def of(x: NDArray[Any], d: NDArray[Any]) -> NDArray[np.float32]:
        x, d = x.astype(np.float64), d.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = (x * d).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(d, axis=-1))
        return np.asarray(cosine, dtype=np.float32)

    found: xr.DataArray = xr.apply_ufunc(
        of,
        value.chunk({width: -1}) if value.chunks is not None else value,
        towards,
        input_core_dims=[[width], [width]],
        join="exact",
        dask="parallelized",
        output_dtypes=[np.float32],
    )
    return found.rename("cosine").assign_attrs(long_name="cosine with the direction", units="1")


# ── linear CKA ───────────────────────────────────────────────────────────────────────────────────────────────────────


def linear_cka(
    activations: xr.Dataset,
    other: xr.Dataset | None = None,
    *,
    where: xr.DataArray | None = None,
    skip_positions: int = 1,
    method: CKA = "exact",
    batch: int = 256,
) -> xr.DataArray:
    """Linear centred kernel alignment between layers, or between the layers of two stores of the same tokens:
    [layer, layer_2] float64, lazily in one pass where `value` is lazy.

    ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms, of X [token, width] and Y [token, width of its own] without their means
    (Kornblith et al. 2019, "Similarity of neural network representations revisited", equation 2): from 0 to 1, the same
    whatever orthogonal maps and scales are put on either. `other` holds the same tokens in the same order, say of
    another model, and makes the dimension `layer_2`. Tokens count as in `moments`, and only where all layers are
    finite.

    `method="exact"`: from the joint covariance of all layers; memory (layers × width)² float64 numbers a chunk being
    merged: for some layers of a model. It is too high where there are not many more tokens than the width.
    `method="minibatch"`: from the unbiased estimates of HSIC in batches of `batch` tokens that follow one another in a
    chunk (Nguyen, Raghu and Kornblith 2021, "Do wide and deep networks learn the same things?", equation 3): memory
    batch² numbers a layer; for all layers. An estimate for other numbers than "exact" gives, and possibly below 0; a
    batch of fewer than 4 tokens, or at the end of a chunk and not full, counts for nothing.

    Memory besides: all layers of one chunk of tokens a thread. SchemaError for what is no [layer, token, width], for
    masks and stores of other tokens.
    """
    if method not in (known := ("exact", "minibatch")):
        raise SchemaError(f"method = {method!r}.{nearest(method, known)} Known: {', '.join(known)}")
    if batch < 4:
        raise SchemaError(f"batch = {batch}: the unbiased estimate needs at least 4 tokens")
    nodes = [activations] if other is None else [activations, other]
    if len({node.sizes["token"] for node in nodes}) > 1:
        sizes = " and ".join(f"{node.sizes['token']:,}" for node in nodes)
        raise SchemaError(f"CKA compares representations of the same tokens; what was given has {sizes}")
    if other is not None:
        same_tokens(activations, other, "`other`")
    rows, layers, widths = _joint(nodes)
    counts = counted(activations, skip_positions, where)
    spans = [slice(end - width, end) for width, end in zip(widths, np.cumsum(widths).tolist(), strict=True)]
    n_first = activations.sizes["layer"]
    square = (len(spans), len(spans))
    if method == "exact":
        found = _solved(
            partial(_cka_of_covariance, spans=spans), labelled_moments(rows, counts)["covariance"].data, square
        )
    else:
        shared = reduce_tokens(partial(_hsic, spans=spans, batch=batch), np.add, rows, (counts,), shape=square)
        found = _solved(_normalized, shared, square)
    part = found if other is None else found[:n_first, n_first:]
    return _between(part, rows, layers, "cka", "linear CKA")


def _solved(solve: Any, matrix: Any, shape: tuple[int, int]) -> Any:
    if isinstance(matrix, np.ndarray):
        return solve(matrix)
    return matrix.map_blocks(solve, chunks=tuple((size,) for size in shape), dtype=np.float64)


def _cka_of_covariance(covariance: NDArray[np.float64], *, spans: list[slice]) -> NDArray[np.float64]:
    return _normalized(np.array([[np.square(covariance[a, b]).sum() for b in spans] for a in spans]))


def _normalized(shared: NDArray[np.float64]) -> NDArray[np.float64]:
    own = np.diag(shared)
    norm = np.sqrt(np.where(own > 0, own, np.nan))
    return shared / np.outer(norm, norm)  # type: ignore[no-any-return]


def _hsic(rows: NDArray[Any], counts: NDArray[np.bool_], *, spans: list[slice], batch: int) -> NDArray[np.float64]:
    """Sums over batches of the unbiased HSIC of every two layers, [layer, layer], of rows [token, layer × width]."""
    found = np.zeros((len(spans), len(spans)))
    kept = np.flatnonzero(counts & np.isfinite(rows).all(-1))
    for first in range(0, len(kept) - batch + 1, batch):
        some = rows[kept[first : first + batch]].astype(np.float64)
        some -= some.mean(0)
        kernels = np.stack([some[:, span] @ some[:, span].T for span in spans])
        for kernel in kernels:
            np.fill_diagonal(kernel, 0.0)
        found += _unbiased(kernels)
    return found


def _unbiased(kernels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The unbiased estimate of HSIC (Song et al. 2012) of every two kernels [layer, n, n] without their diagonals."""
    n = kernels.shape[-1]
    flat, columns, total = kernels.reshape(len(kernels), -1), kernels.sum(1), kernels.sum((1, 2))
    product = flat @ flat.T + np.outer(total, total) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (columns @ columns.T)
    return product / (n * (n - 3))  # type: ignore[no-any-return]


# ── layers side by side ──────────────────────────────────────────────────────────────────────────────────────────────


def _by_layer(activations: xr.Dataset, what: str) -> tuple[xr.DataArray, list[Any], int]:
    """Rows [..., token, layer × width] with all layers of a token in one, the two labels of the layers, the width."""
    rows = token_rows(activations, what)
    if "layer" not in rows.dims:
        found = list(map(str, activations["value"].dims))
        raise SchemaError(f"{what} reads value[…, layer, token, …, width], not {found}")
    label = rows["layer"].values if "layer" in rows.coords else np.arange(rows.sizes["layer"])
    width = str(rows.dims[-1])
    bare = rows.drop_vars(["layer", width], errors="ignore")
    size = rows.sizes[width]
    others = [dim for dim in bare.dims if dim not in ("layer", "token", width)]
    together = bare.transpose(*others, "token", "layer", width)
    data = together.data.reshape(*together.shape[:-2], -1) if together.chunks is None else _flat(together.data)
    coords = {name: coord for name, coord in bare.coords.items() if not {"layer", width} & set(coord.dims)}
    return xr.DataArray(data, dims=(*others, "token", width), coords=coords), [label, label], size


def _flat(data: Any) -> Any:
    whole = data.rechunk({data.ndim - 2: -1, data.ndim - 1: -1})
    chunks = (*whole.chunks[:-2], (whole.shape[-2] * whole.shape[-1],))
    return whole.map_blocks(
        lambda block: block.reshape(*block.shape[:-2], -1), drop_axis=whole.ndim - 1, chunks=chunks, dtype=whole.dtype
    )


def _joint(nodes: list[xr.Dataset]) -> tuple[xr.DataArray, list[Any], list[int]]:
    """Rows [token, width] of all layers of all nodes side by side, the labels of the two, the width of each layer."""
    found = [_by_layer(node, "CKA") for node in nodes]
    if any(rows.ndim != 2 for rows, _, _ in found):
        dims = [list(map(str, node["value"].dims)) for node in nodes]
        raise SchemaError(f"CKA reads value[layer, token, width], not {dims}; select one head, or stack them")
    widths = [width for (_, label, width) in found for _ in label[0]]
    labels = [found[0][1][0], found[-1][1][0]]
    arrays = [rows.data for rows, _, _ in found]
    if any(rows.chunks is not None for rows, _, _ in found):
        lazy = [da.asarray(array) for array in arrays]
        tokens = next(rows.chunks for rows, _, _ in found if rows.chunks is not None)[0]
        joined = da.concatenate([array.rechunk((tokens, -1)) for array in lazy], axis=1)
    else:
        joined = np.concatenate(arrays, axis=1)
    return xr.DataArray(joined, dims=("token", "width")), labels, widths


def _between(data: Any, rows: xr.DataArray, layers: list[Any], name: str, said: str) -> xr.DataArray:
    """The result [..., layer, layer_2] with its labels."""
    dims = (*rows.dims[:-2], "layer", "layer_2")
    coords = {**rows.coords, "layer": layers[0], "layer_2": layers[1]}
    return xr.DataArray(data, dims=dims, coords=coords, name=name, attrs={"long_name": said, "units": "1"})


def _positive(n: Any) -> Any:
    return (np if isinstance(n, np.ndarray) else da).where(n > 0, n, np.nan)
