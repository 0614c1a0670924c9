"""Sparse features read by token and by feature: one interface whatever the layout. Opening computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.core import indexing

from .chunks import Spans
from .contexts import Decode, texts_of, token_ids_at, top_contexts
from .errors import SchemaError
from .feature_index import FeatureIndex
from .feature_rows import FeatureRows, Rows
from .feature_views import Cooccurrence, Dense
from .html import html_table
from .labels import TokenIndex, token_coords
from .postings import BINS
from .selections import LEVELS, tokens_at
from .store import Store
from .tree import MOST_CHUNKS


@dataclass(frozen=True)
class Features:
    """The features of one dictionary, as [encode] has stored them. Picklable; files are opened when they are read.

    A feature fires at a token if the dictionary gives it there; what does not fire is absent and reads as zero.
    `tokens` (the run's store of tokens) and `decode` give top contexts their token ids and their text. What is asked by
    feature needs the index (IncompleteStore says how to build it, FingerprintMismatch that it is of other features,
    CorruptStore that it is damaged) and leaves out the first `skip_positions` tokens of every sequence, as the index
    does. SchemaError for features that do not exist.
    """

    by_token: FeatureRows
    tokens: Store | None = None
    decode: Decode | None = None

    @classmethod
    def open(cls, store: Store, group: str, tokens: Store | None = None, decode: Decode | None = None) -> Features:
        """The features in a group of a store. SchemaError for a group that is not there, IncompleteStore."""
        if tokens is not None and tokens.schema.n_token != store.schema.n_token:
            raise SchemaError(
                f"{tokens.path.parent} holds {tokens.schema.n_token:,} tokens, {store.path.parent} features of "
                f"{store.schema.n_token:,}: they are not of one run"
            )
        return cls(FeatureRows.open(store, group), tokens, decode)

    @property
    def name(self) -> str:
        return self.by_token.group

    @property
    def n_feature(self) -> int:
        """Features of the dictionary, dead ones included."""
        return self.by_token.n_feature

    @property
    def hook(self) -> str:
        """The hook point that the dictionary reads."""
        return str(self.attrs["hook"])

    @property
    def attrs(self) -> dict[str, Any]:
        """What the store tells of the dictionary: its source, hook, activation, and so on."""
        return self.by_token.attrs

    @property
    def index(self) -> FeatureIndex:
        """The feature-major index, opened again if it was built anew."""
        known: FeatureIndex | None = self.__dict__.get("_index")
        if known is None or not known.current:
            known = self.__dict__["_index"] = FeatureIndex.open(self.by_token.store, self.name)
        return known

    def __repr__(self) -> str:
        n_token = self.by_token.store.schema.n_token
        return f"Features({self.name}: {self.n_feature:,} features of {n_token:,} tokens, read at {self.hook})"

    def _repr_html_(self) -> str:
        facts = {
            "name": self.name,
            "features": f"{self.n_feature:,}",
            "tokens": f"{self.by_token.store.schema.n_token:,}",
            "run": self.by_token.store.path.parent.parent,
        }
        told = {name: value for name, value in self.attrs.items() if isinstance(value, str | int | float | bool)}
        return html_table("Features", facts | {name: told[name] for name in told if name not in facts})

    # ── by token ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def rows(self, start: int, stop: int) -> Rows:
        """The features of tokens [start, stop) in memory, in the order in which they are kept: ascending features in a
        token, or, of TopK dictionaries, descending values.
        """
        return self.by_token.read(start, stop)

    def of_tokens(
        self,
        token: int | slice | Sequence[int] | None = None,
        *,
        sequence: Any = None,
        position: Any = None,
        document: Any = None,
    ) -> xr.Dataset:
        """The features of some tokens, in memory: `feature` and `value` [nonzero], ascending features in a token, with
        `token`, `sequence`, `position` and `document` as coordinates.

        Either `token` as `isel` takes it (a slice leaves its stop out), or some of the labels as `sel` takes them (a
        slice includes its stop). IndexError and KeyError for tokens and labels that are not there.
        """
        given = {"sequence": sequence, "position": position, "document": document}
        labels = {name: value for name, value in given.items() if value is not None}
        if (token is None) == (not labels):
            raise SchemaError("of_tokens takes either `token`, or some of `sequence`, `position` and `document`")
        every = range(self.by_token.store.schema.n_token)
        if token is None:
            key = TokenIndex(self.by_token.tables, every).sel(labels).dim_indexers["token"]
        else:
            key = token if isinstance(token, slice) else np.atleast_1d(np.asarray(token))
        tokens = np.asarray(tokens_at(every, key), np.int64)
        rows = self.by_token.at(tokens)
        row = np.repeat(np.arange(len(tokens)), rows.count)
        order = np.lexsort((rows.feature, row))
        columns = {"feature": ("nonzero", rows.feature[order]), "value": ("nonzero", rows.value[order])}
        return xr.Dataset(columns, coords=self.by_token.labels(tokens[row], "nonzero"), attrs=self.attrs)

    def dense(self, features: int | Sequence[int]) -> xr.DataArray:
        """Features as a lazy dask array [token, feature] (of one: [token]) in chunks of whole shards, zero where they
        do not fire; of all tokens, also those that the index leaves out. Each chunk reads all rows of its tokens.
        """
        wanted = self._known(features)
        unit_tokens, n_unit = self.by_token.store.schema.unit_tokens, len(self.by_token.store.schema.grid)
        lazy = indexing.LazilyIndexedArray(Dense(self.by_token, wanted))
        variable = xr.Variable(("token", "feature"), lazy, attrs=self.attrs)
        coords = token_coords(
            lazy.shape[0], self.by_token.tables.sequence_edges[:-1], self.by_token.tables.document_edges[:-1]
        )
        found = xr.DataArray(
            variable.chunk({"token": unit_tokens * -(-n_unit // MOST_CHUNKS)}), coords=coords, name="value"
        ).assign_coords(feature=wanted)
        return found if np.ndim(features) else found.isel(feature=0)

    def cooccurrence(self, features: Sequence[int], skip_positions: int | None = None) -> xr.DataArray:
        """In how many tokens two features fire both, lazy [feature, other]; on the diagonal how often each does.
        The sum over units, each of which reads all of its rows. Leaves out the first `skip_positions` tokens of every
        sequence, by default as many as [encode] says.
        """
        wanted = self._known(features)
        skip = int(self.by_token.store.header.provenance.get("skip_positions", 1))
        lazy = Cooccurrence(self.by_token, wanted, skip if skip_positions is None else skip_positions)
        variable = xr.Variable(("unit", "feature", "other"), indexing.LazilyIndexedArray(lazy)).chunk({"unit": 1})
        return xr.DataArray(variable.sum("unit"), coords={"feature": wanted, "other": wanted}, name="cooccurrence")

    # ── by feature ───────────────────────────────────────────────────────────────────────────────────────────────────

    def statistics(self, *, dense: float = 0.1) -> xr.Dataset:
        """Statistics of every feature, lazy over `feature`: `n_active` (tokens at which it fires), `firing_rate` (their
        share of the tokens counted), `max`, `min` and `mean_active` of its values (NaN where it never fires), their
        `square_sum`; `histogram[feature, bin]` between the edges `histogram_edge[feature, edge]`, equally wide bins
        from 0, or the lowest value if that is negative, to the highest; `dead` (never fires) and `dense` (fires at more
        than this share of the tokens).
        """
        index = self.index
        names = ("n_active", "max", "min", "sum", "square_sum", "histogram")
        kept = {
            name: index.variable(name).chunk({"feature": index.store.schema.arrays[name].shards[0]}) for name in names
        }
        found = xr.Dataset(kept)
        edges = xr.DataArray(np.arange(BINS + 1) / BINS, dims="edge")
        low, high = found["min"].clip(max=0).fillna(0), found["max"].clip(min=0).fillna(0)
        found = found.assign(
            firing_rate=found["n_active"] / index.n_token,
            mean_active=found["sum"] / found["n_active"].where(found["n_active"] > 0),
            histogram_edge=low + (high - low) * edges,
            dead=found["n_active"] == 0,
        )
        found = found.assign(dense=found["firing_rate"] > dense, feature=np.arange(self.n_feature)).drop_vars("sum")
        return found.assign_attrs(**self.attrs, skip_positions=index.skip_positions, n_token=index.n_token)

    def activations(self, feature: int) -> xr.DataArray:
        """Where a feature fires, in memory: its values along `token`, which holds only those tokens, ascending, with
        `token`, `sequence`, `position` and `document` as coordinates to select by.
        """
        (one,) = self._known(feature).tolist()
        index = self.index
        token, value = index.postings(one)
        order = np.argsort(token)
        attrs = {**self.attrs, "feature": one, "skip_positions": index.skip_positions}
        coords = self.by_token.labels(token[order], "token")
        return xr.DataArray(value[order], dims="token", coords=coords, name="value", attrs=attrs)

    def top_contexts(
        self,
        features: int | Sequence[int],
        n: int = 20,
        window: int | tuple[int, int] = 10,
        text: bool = True,
    ) -> xr.Dataset:
        """The `n` tokens at which a feature fires strongest, with the tokens around them, in memory.

        Over `context`, strongest first, of equal values the earlier token first: `token`, `sequence`, `position`,
        `document`, `value`. Over [context, offset], `window` tokens before and after: `token_id`, and the feature's
        `activation` at each. Windows end where their sequence does: beyond it, `token_id` is −1 and `activation` NaN,
        which is also NaN at the positions that the index leaves out. With `text` also `text_before`, `text` (the token
        itself) and `text_after`. Where a feature fires less than `n` times, there are fewer contexts; of several
        features [feature, context, …], what is missing is −1, NaN or "".

        SchemaError if there are no token ids or no tokenizer to make text of: text=False does without.
        """
        wanted = self._known(features)
        before, after = (window, window) if isinstance(window, int) else window
        if n < 1 or before < 0 or after < 0:
            raise SchemaError(f"n = {n} must be at least 1, and the window {before}, {after} at least 0")
        if text and (self.decode is None or self.tokens is None):
            raise SchemaError(
                f"{self.by_token.store.path.parent.parent} has no tokens, or no tokenizer.json, to make text of; "
                "ask with text=False, or copy the model's tokenizer.json into that folder"
            )
        index, offsets = self.index, np.arange(-before, after + 1)
        found = top_contexts(self.by_token, index, wanted, n, offsets)
        tokens = found.pop("window")
        if self.tokens is not None:
            found["token_id"] = token_ids_at(self._token_ids, tokens)
            if text and self.decode is not None:
                found |= texts_of(found["token_id"], before, self.decode)
        dims = ("feature", "context", "offset") if np.ndim(features) else ("context", "offset")
        columns = {
            name: (dims[: values.ndim - 3 + len(dims)], values if np.ndim(features) else values[0])
            for name, values in found.items()
        }
        labels = {name: columns.pop(name) for name in ("token", *LEVELS)}
        feature = wanted if np.ndim(features) else wanted[0]
        attrs = {**self.attrs, "skip_positions": index.skip_positions}
        return xr.Dataset(columns, coords={"feature": feature, "offset": offsets, **labels}, attrs=attrs)

    @cached_property
    def _token_ids(self) -> Spans:
        """Token ids, of which the last 64 MiB are remembered: strong tokens are often looked at again."""
        assert self.tokens is not None
        return Spans(self.tokens, "token_id", keep=64)

    def _known(self, features: int | Sequence[int]) -> NDArray[np.int64]:
        """Distinct features that exist. SchemaError for others."""
        wanted = np.atleast_1d(np.asarray(features))
        if wanted.ndim != 1 or not len(wanted) or wanted.dtype.kind not in "iu":
            raise SchemaError(f"features are an integer or a list of them, at least one; given is {features!r}")
        wrong = wanted[(wanted < 0) | (wanted >= self.n_feature)]
        if len(wrong):
            raise SchemaError(
                f"{self.name} has no feature {wrong[0]}: it has {self.n_feature:,}, numbered from 0 to "
                f"{self.n_feature - 1}"
            )
        if len(np.unique(wanted)) < len(wanted):
            raise SchemaError(f"features are named more than once: {features!r}")
        return wanted.astype(np.int64)
