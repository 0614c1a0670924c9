"""How a model keeps count of the characters in a line: the curve on which the mean vectors by character count lie.

Gurnee et al. (2025), "When Models Manipulate Manifolds: The Geometry of a Counting Task": prose is wrapped at fixed
widths, and the mean residual streams of tokens at 1, 2, 3, … characters since the last newline lie on a curve that
twists through a few dimensions. candle-mi's protocol has the same widths and counts; here counts are in characters,
not bytes, and it is centred means that are projected.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from ...stores.errors import SchemaError
from .pca import pca_of, project
from .statistics import mean_by
from .tokens import label

WIDTHS = tuple(range(20, 151, 10))


def wrap_prose(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, as many words on each as fit. Every run of white space, line and
    paragraph breaks too, counts as one space first; words are never cut, so that one longer than `width` is a line.
    """
    return textwrap.fill(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def character_counts(text: str, char_end: ArrayLike) -> NDArray[np.int64]:
    """How many characters of its line have been read where each token ends, the token's own included: int64, in the
    shape of `char_end`, its end in characters into `text`, end excluded. A line begins behind a newline: a token that
    ends with one has 0. SchemaError for an end beyond the text.
    """
    ends = np.asarray(char_end, dtype=np.int64)
    return _counts(ends, np.zeros_like(ends), starts=np.array([0, len(text) + 1]), newlines=_newlines([text]))


def characters_since_newline(tokens: xr.Dataset, texts: Sequence[str]) -> xr.DataArray:
    """`character_counts` of every token of a run: `character_count[token]` int64, −1 for a token that is not in the
    text, such as a separator; lazy where the node is.

    `tokens`: `open_run(path)["tokens"]`, with `char_start`, `char_end` and the coordinate `document`. `texts`: those of
    the documents, in their order, as the corpus has them; only where their newlines are is kept. A token's line may
    have begun in the sequence before its own. SchemaError for a node without these, and when it is computed for texts
    that are too few or too short for the tokens.
    """
    if missing := [name for name in ("char_start", "char_end", "document") if name not in tokens]:
        held = ", ".join(map(str, tokens.variables))
        raise SchemaError(f'counting characters reads open_run(path)["tokens"]; {missing} is not among {held}')
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    starts, newlines = np.concatenate([[0], np.cumsum(lengths + 1)]), _newlines(texts)
    document = label(xr.Dataset({"value": tokens["char_end"]}), "document")
    begin, end = (xr.DataArray(tokens[name].data, dims="token") for name in ("char_start", "char_end"))

    def count(begin: NDArray[Any], end: NDArray[Any], document: NDArray[Any]) -> NDArray[np.int64]:
        found = _counts(end.astype(np.int64), document.astype(np.int64), starts=starts, newlines=newlines)
        return np.where(begin == end, -1, found)

    found: xr.DataArray = xr.apply_ufunc(count, begin, end, document, dask="parallelized", output_dtypes=[np.int64])
    return found.rename("character_count").assign_attrs(units="characters", long_name="characters since the newline")


def _newlines(texts: Sequence[str]) -> NDArray[np.int64]:
    """Where newlines are in the texts laid end to end, with one before each text."""
    found, start = [], 0
    for text in texts:
        characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        found += [np.array([start - 1]), start + np.flatnonzero(characters == ord("\n"))]
        start += len(text) + 1
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _counts(
    char_end: NDArray[np.int64],
    document: NDArray[np.int64],
    *,
    starts: NDArray[np.int64],
    newlines: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Characters since the newline, of tokens by their ends in texts that start at `starts`, a newline apart."""
    n_text = len(starts) - 1
    if document.size and document.max() >= n_text:
        raise SchemaError(f"a token is of document {document.max()}, and {n_text} texts were given: give all, in order")
    end = starts[document] + char_end
    if (wrong := end >= starts[document + 1]).any():
        at = tuple(np.argwhere(wrong)[0])
        length = starts[document[at] + 1] - starts[document[at]] - 1
        raise SchemaError(
            f"a token ends at character {char_end[at]} of document {document[at]}, whose text is {length} long: "
            "these are not the texts that the tokens were cut from"
        )
    last = newlines[np.searchsorted(newlines, end, side="left") - 1]
    return end - last - 1


def character_count_manifold(
    activations: xr.Dataset,
    character_count: xr.DataArray,
    *,
    max_count: int = 150,
    n_components: int = 6,
    where: xr.DataArray | None = None,
    skip_positions: int = 1,
) -> xr.Dataset:
    """The mean vectors of tokens at 1 to `max_count` characters since the newline, and the principal components of
    those means; lazily in one pass where `value` is lazy.

    `activations`: `value[…, token, width]` of the residual stream, over prose wrapped at several widths;
    `character_count` [token] as `characters_since_newline` gives it. float64 but `n_token`, every count weighing the
    same:

    - `n_token[…, character_count]`, `mean[…, character_count, width]` and `variance[…, character_count]` of `mean_by`;
      NaN for a count without tokens, here and in all that follows;
    - `center[…, width]`, the mean of the means, `components[…, component, width]`, `explained_variance`,
      `explained_variance_ratio` and `singular_values[…, component]` of `pca_of` the means;
    - `projection[…, character_count, component]`: the means without the center along each component: the curve;
    - `cosine[…, character_count, character_count_2]` of the means without the center: where it falls below 0 and rises
      again with the distance between two counts, that is the ringing of a curve squeezed into few dimensions;
    - `sampling_fraction[…]`: how much of the variance of the means is to be expected from the spread of the tokens
      alone, (1 − 1 / k) Σ variance / n_token of the k counts that have tokens, over the sum of squares of the centred
      means. A count with one token has the variance of the others, weighed by n_token − 1; NaN where no count has two.
      Where it is not well below 1, there are too few tokens to see a curve, and no few components explain the rest of
      the variance.

    Memory as of `mean_by`. SchemaError for what is no such node, mask or label.
    """
    name = "character_count"
    means = mean_by(
        activations, character_count.rename(name), range(1, max_count + 1), where=where, skip_positions=skip_positions
    )
    found = pca_of(means["mean"], name, n_components)
    centred = means["mean"] - found["mean"]
    cosine = _cosines(centred, name)
    result = means.merge(found.drop_vars("n_token").rename(mean="center"))
    result["projection"] = project(means["mean"], found).assign_attrs(long_name="projection of the mean")
    result["cosine"] = cosine.assign_attrs(long_name="cosine of centred means", units="1")
    share = _sampling_fraction(means, centred, name)
    result["sampling_fraction"] = share.assign_attrs(units="fraction", long_name="fraction expected from sampling")
    result[name].attrs = {"units": "characters", "long_name": "characters since the newline"}
    return result


def _sampling_fraction(means: xr.Dataset, centred: xr.DataArray, name: str) -> xr.DataArray:
    n, variance = means["n_token"], means["variance"]
    degrees = (n - 1).clip(min=0).sum(name)
    pooled = (variance * (n - 1)).sum(name) / degrees.where(degrees > 0)
    k = (n > 0).sum(name)
    # The center is a mean of the same means, and takes one of their k errors away.
    error = (variance.fillna(pooled).where(n > 0) / n.where(n > 0)).sum(name) * (k - 1) / k.where(k > 0)
    total = (centred**2).sum((name, str(centred.dims[-1])))
    return error.where(np.isfinite(pooled)) / total.where(total > 0)


def _cosines(vectors: xr.DataArray, dim: str) -> xr.DataArray:
    """Cosines [..., dim, dim_2] of vectors [..., dim, width]; NaN of a vector with NaN or of zeros."""
    width, other = vectors.dims[-1], f"{dim}_2"

    def of(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        return np.matmul(unit, np.swapaxes(unit, -1, -2))  # type: ignore[no-any-return]

    found: xr.DataArray = xr.apply_ufunc(
        of,
        vectors,
        input_core_dims=[[dim, width]],
        output_core_dims=[[dim, other]],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": {other: vectors.sizes[dim]}},
    )
    return found.assign_coords({other: vectors[dim].values})
