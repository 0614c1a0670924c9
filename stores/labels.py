"""Where a token belongs: `sequence`, `position` and `document` as lazy coordinates with an index.

A store's axis `token` is its sequences laid end to end, and at the same time its documents laid end to end. The two
tables of offsets are all that is kept; labels are computed for the tokens that are asked for, and selections come from
arithmetic on the offsets, so that neither depends on how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing
from xarray.core.indexing import IndexSelResult
from xarray.indexes import Index

from .selections import LEVELS, LabelTables, Listed, Rows, Span, select, tokens_at

_COMPARED_ROWS = 1 << 20


def token_coords(n_token: int, sequence_start: npt.ArrayLike, document_start: npt.ArrayLike) -> xr.Coordinates:
    """The labels of `n_token` tokens as coordinates on dimension `token`, for `xr.Dataset(..., coords=...)`.

    Gives `sequence`, `position` (in its sequence) and `document`, all int64[token] and lazy, with one `TokenIndex`.
    `sequence_start[sequence]` and `document_start[document]` are the first token of each: int64, ascending from 0;
    sequences hold at least one token, documents may be empty (the next one then has the same start). Takes about 16
    bytes a sequence and document, and none a token. Raises SchemaError for offsets that break these rules.
    """
    tables = LabelTables.checked(n_token, sequence_start, document_start)
    return xr.Coordinates.from_xindex(TokenIndex(tables, range(tables.n_token)))


class _LazyLabel(BackendArray):
    """One label of some tokens as an array that computes the elements asked for."""

    __slots__ = ("level", "rows", "tables")

    dtype = np.dtype(np.int64)

    def __init__(self, tables: LabelTables, level: str, rows: Rows) -> None:
        self.tables = tables
        self.level = level
        self.rows = rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows),)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        # VECTORIZED, because any array of positions on one dimension is answered elementwise
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.VECTORIZED, self._labels)

    def _labels(self, key: tuple[Any, ...]) -> Any:
        return self.tables.labels(self.level, tokens_at(self.rows, key[0]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.level}, {len(self.rows)} tokens)"


class TokenIndex(Index):
    """Selection of tokens by `sequence`, `position` and `document`; made by `token_coords`.

    `.sel` takes for each label an integer, a list, or a slice, which includes its stop as in pandas. What it gives
    always keeps the dimension `token`, even for one token, as a pandas index that is not unique does. Tokens keep their
    order; a list that does not ascend gives its tokens in the list's order, and repeats what it repeats. Several lists
    nest: documents, in them sequences, in them positions. A contiguous result is a basic slice, any other an array of
    8 bytes a token; for a condition on all tokens of a large store, `.where` on chunked labels stays lazy.

    Raises KeyError for an integer or an element of a list that no token here has, and for a combination of integers
    that no token has. Slices are cut to what is there and may select nothing.

    `isel` with slices costs nothing; with arrays it keeps 8 bytes a selected token. Two objects align where their
    tokens have the same labels, and are refused otherwise; there is no silent inner join.
    """

    def __init__(
        self, tables: LabelTables, rows: Rows, dim: Hashable = "token", names: Mapping[str, Hashable] | None = None
    ) -> None:
        self.tables = tables
        self.rows = rows
        self.dim = dim
        self.names = dict(names) if names is not None else {level: level for level in LEVELS}

    @classmethod
    def from_variables(cls, variables: Mapping[Any, xr.Variable], *, options: Mapping[str, Any]) -> Self:
        raise NotImplementedError(
            "a TokenIndex is made from offsets: assign forebay's token_coords(...) as coordinates"
        )

    @classmethod
    def concat(
        cls, indexes: Sequence[Self], dim: Hashable, positions: Iterable[Iterable[int]] | None = None
    ) -> NoReturn:
        raise NotImplementedError(
            f"objects labelled by a TokenIndex cannot be concatenated along {dim!r}: both count their sequences and "
            f"documents from 0. Drop the labels first (.drop_vars({list(LEVELS)})), then assign token_coords(...) "
            "with the offsets of the whole"
        )

    def create_variables(self, variables: Mapping[Any, xr.Variable] | None = None) -> dict[Any, xr.Variable]:
        made: dict[Any, xr.Variable] = {}
        for level, name in self.names.items():
            old = variables.get(name) if variables is not None else None
            data = indexing.LazilyIndexedArray(_LazyLabel(self.tables, level, self.rows))
            made[name] = xr.Variable((self.dim,), data, old.attrs if old is not None else None)
        return made

    def isel(self, indexers: Mapping[Any, int | slice | npt.NDArray[Any] | xr.Variable]) -> TokenIndex | None:
        key = indexers[self.dim]
        if isinstance(key, xr.Variable):
            # An array on other dimensions makes the labels' shape its own, which no index on one dimension fits; and
            # to look into one that is not computed would compute it twice.
            if key.dims != (self.dim,) or key.chunks is not None:
                return None
            key = key.to_numpy()
        if not isinstance(key, slice):
            key = np.asarray(key)  # lists arrive as they are
            if key.ndim == 0:
                return None
        rows = tokens_at(self.rows, key)
        assert not isinstance(rows, int)
        return TokenIndex(self.tables, rows, self.dim, self.names)

    def sel(self, labels: dict[Any, Any], method: str | None = None, tolerance: float | None = None) -> IndexSelResult:
        if method is not None or tolerance is not None:
            raise ValueError("token labels are exact: method= and tolerance= do not apply; select a range with a slice")
        level_of = {name: level for level, name in self.names.items()}
        wanted = {level_of[name]: _wanted(name, value) for name, value in labels.items()}
        indexer = select(self.tables, self.rows, wanted, self.names)
        return IndexSelResult({self.dim: indexer})

    def equals(self, other: Index, *, exclude: frozenset[Hashable] | None = None) -> bool:
        if not isinstance(other, TokenIndex) or self.dim != other.dim or self.names != other.names:
            return False
        if len(self.rows) != len(other.rows):
            return False
        if self.tables.equals(other.tables) and _same_rows(self.rows, other.rows):
            return True
        for start in range(0, len(self.rows), _COMPARED_ROWS):
            part = slice(start, start + _COMPARED_ROWS)
            mine, theirs = tokens_at(self.rows, part), tokens_at(other.rows, part)
            if not all(
                np.array_equal(self.tables.labels(level, mine), other.tables.labels(level, theirs)) for level in LEVELS
            ):
                return False
        return True

    def join(self, other: Self, how: Any = "inner") -> NoReturn:
        raise xr.AlignmentError(
            f"the operands cover different tokens ({len(self.rows)} and {len(other.rows)}, or other labels), and are "
            "not cut to what they share by themselves. Select the same tokens of both first, or drop the labels of one"
        )

    def reindex_like(self, other: Self) -> NoReturn:
        self.join(other)

    def rename(self, name_dict: Mapping[Any, Hashable], dims_dict: Mapping[Any, Hashable]) -> TokenIndex:
        names = {level: name_dict.get(name, name) for level, name in self.names.items()}
        return TokenIndex(self.tables, self.rows, dims_dict.get(self.dim, self.dim), names)

    def __repr__(self) -> str:
        tables = self.tables
        return (
            f"TokenIndex({len(self.rows)} of {tables.n_token} tokens, "
            f"{tables.n_label('sequence')} sequences, {tables.n_label('document')} documents)"
        )

    def _repr_inline_(self, max_width: int) -> str:
        return f"TokenIndex ({len(self.rows)} tokens)"


def _same_rows(a: Rows, b: Rows) -> bool:
    if isinstance(a, range) or isinstance(b, range):
        return isinstance(a, range) and isinstance(b, range) and a == b
    return np.array_equal(a, b)


def _wanted(name: Hashable, value: Any) -> Span | Listed:
    """What `.sel(name=value)` asks for. Raises TypeError for anything but an integer, a list of them, or a slice."""
    expected = "expected an integer, a list of integers, or a slice"
    if isinstance(value, slice):
        bounds = (value.start, value.stop)
        if value.step not in (None, 1):
            raise TypeError(f"{name}={value}: a range of labels has no step; give range(start, stop, step) instead")
        if not all(bound is None or isinstance(bound, int | np.integer) for bound in bounds):
            raise TypeError(f"{name}={value}: {expected} of integers")
        start, stop = (None if bound is None else int(bound) for bound in bounds)
        return Span(start, None if stop is None else stop + 1)
    if isinstance(value, xr.Variable | xr.DataArray) and value.ndim:
        raise TypeError(
            f"{name} is an array on {value.dims}: a label stands for any number of tokens, so its dimension cannot be "
            f"kept; give its .values as a list"
        )
    values = np.asarray(value)
    if values.ndim > 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError(f"{name} has dtype {values.dtype} and shape {values.shape}; {expected}")
    return Listed(np.atleast_1d(values).astype(np.int64), scalar=values.ndim == 0)
