"""Where features fire strongest, with what stands around: windows of tokens, cut where their sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chunks import Spans
from .feature_index import FeatureIndex
from .feature_rows import FeatureRows
from .selections import LEVELS, LabelTables

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""Token ids of several texts → the texts, each as it reads behind another one."""

LONG = 2**22
"""Longer lists of postings are not read whole to find a few tokens in them; the rows of these tokens are."""
COARSE_BITS = 20
"""Bits of a token's number that are looked at before the rest."""

Ints = NDArray[np.int64]


def top_contexts(rows: FeatureRows, index: FeatureIndex, features: Ints, n: int, offsets: Ints) -> dict[str, Any]:
    """The `n` strongest tokens of each feature: `token`, its `sequence`, `position`, `document`, and `value` [feature,
    context]; the feature's `activation` at `offsets` from them, and the tokens at these, `window` [feature, context,
    offset]. −1 or NaN where there is nothing.
    """
    found = [index.postings(feature, n) for feature in features.tolist()]
    n_context = max(len(tokens) for tokens, _ in found)
    token = np.full((len(features), n_context), -1, np.int64)
    value = np.full(token.shape, np.nan, rows.read_dtype)
    for i, (tokens, values) in enumerate(found):
        token[i, : len(tokens)], value[i, : len(tokens)] = tokens, values
    window = windows_around(rows.tables, token, offsets)
    activation = np.full(window.shape, np.nan, rows.read_dtype)
    for i, feature in enumerate(features.tolist()):
        near = np.unique(window[i][window[i] >= 0])
        near = near[rows.tables.labels("position", near) >= index.skip_positions]
        known = np.isin(window[i], near)
        activation[i][known] = values_at(rows, index, feature, near)[np.searchsorted(near, window[i][known])]
    there = np.maximum(token, 0)
    labels = {level: np.where(token >= 0, rows.tables.labels(level, there), -1) for level in LEVELS}
    return {"token": token, **labels, "value": value, "activation": activation, "window": window}


def windows_around(tables: LabelTables, token: Ints, offsets: Ints) -> Ints:
    """The tokens at `offsets` from each of `token` [..., offset]; −1 where they are not of the same sequence, or where
    the token itself is −1.
    """
    edges = tables.sequence_edges
    sequence = tables.labels("sequence", np.maximum(token, 0))
    windows = token[..., None] + offsets
    inside = (windows >= edges[sequence][..., None]) & (windows < edges[sequence + 1][..., None])
    return np.where(inside & (token >= 0)[..., None], windows, -1)


def values_at(rows: FeatureRows, index: FeatureIndex, feature: int, tokens: Ints) -> NDArray[Any]:
    """The values of a feature at ascending tokens that the index has not left out, 0 where it does not fire."""
    if index.ptr[feature + 1] - index.ptr[feature] > LONG:
        return _values_in_rows(rows, feature, tokens)
    listed, values = index.postings(feature)
    coarse = max(0, rows.store.schema.n_token.bit_length() - COARSE_BITS)
    near = np.zeros((rows.store.schema.n_token >> coarse) + 1, bool)
    near[tokens >> coarse] = True
    likely = np.flatnonzero(near.take(listed >> coarse))
    place = np.searchsorted(tokens, listed[likely])
    exact = np.append(tokens, -1)[place] == listed[likely]
    found = np.zeros(len(tokens), rows.read_dtype)
    found[place[exact]] = values[likely[exact]]
    return found


def _values_in_rows(rows: FeatureRows, feature: int, tokens: Ints) -> NDArray[Any]:
    some = rows.at(tokens)
    own = some.feature == feature
    found = np.zeros(len(tokens), rows.read_dtype)
    found[np.repeat(np.arange(len(tokens)), some.count)[own]] = some.value[own]
    return found


def token_ids_at(ids: Spans, windows: Ints) -> Ints:
    """Token ids of tokens of any shape, −1 where a token is. Reads each chunk once."""
    known = np.unique(windows[windows >= 0])
    rows = ids.array.chunks[0]
    found = [
        ids.read(int(near[0]), int(near[-1]) + 1)[near - near[0]]
        for near in np.split(known, np.flatnonzero(np.diff(known // rows)) + 1)
        if len(near)
    ]
    values = np.concatenate([*found, [-1]]).astype(np.int64)
    return values[np.where(windows >= 0, np.searchsorted(known, windows), -1)]


def texts_of(token_id: Ints, before: int, decode: Decode) -> dict[str, NDArray[Any]]:
    """The text of every window before its token, of the token, and after it [feature, context]; "" of no tokens."""
    spans = {"text_before": slice(0, before), "text": slice(before, before + 1), "text_after": slice(before + 1, None)}
    flat = token_id.reshape(-1, token_id.shape[-1])
    texts = decode([ids[ids >= 0].tolist() for span in spans.values() for ids in flat[:, span]])
    columns = np.array([*texts, None], dtype=object)[:-1].reshape(len(spans), *token_id.shape[:-1])
    return dict(zip(spans, columns, strict=True))
