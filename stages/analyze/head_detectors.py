"""Heads that attend by a rule: to the previous token, to the same token, or to what followed it (induction heads).

Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", and Olsson et al. (2022), "In-context
Learning and Induction Heads". The rules are the detection patterns of TransformerLens' head detector. They are
scored on any stored patterns and their tokens, or, the standard test, on random tokens that come twice, where nothing
but the repetition can be attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import dask.array as da
import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError, nearest
from ..models.points import EFFECTIVE_ATTN, HookPoint
from ..models.taps import HookSpec
from .attention import Pattern, lengths_of, weights_of
from .effective_attention import normalize_effective_attention

if TYPE_CHECKING:
    from ..models.checkpoint import Tokenizer
    from ..models.model import Model

KINDS = ("previous_token", "duplicate_token", "induction")
"""The rules, in the order of a result's `kind`."""
Tokens: TypeAlias = "xr.Dataset | xr.DataTree | npt.ArrayLike | Sequence[Sequence[int]] | torch.Tensor"
"""A node `token_id[token]` with `sequence` and `position`, such as `run["tokens"]`, or ids [sequence, position]."""

_PATTERN = "attn.hook_pattern"


def detection_patterns(token_ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which keys each rule names for each query of one sequence [position]: boolean [kind, query, key], as `KINDS`.

    Previous token: the position before the query's. Duplicate token: earlier positions of the same token. Induction:
    positions after earlier ones of the same token, the query's own among them where a token comes twice running. Ids
    below 0 stand for no token. TransformerLens' definitions.
    """
    n = len(token_ids)
    same = (token_ids[:, None] == token_ids) & (token_ids >= 0) & np.tri(n, k=-1, dtype=bool)
    after = np.zeros_like(same)
    after[:, 1:] = same[:, :-1]
    previous = np.eye(n, k=-1, dtype=bool) & (token_ids >= 0)[:, None]
    return np.stack([previous, same, after])


def head_detectors(
    pattern: Pattern,
    tokens: Tokens,
    *,
    measure: str = "mass",
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    by_sequence: bool = False,
) -> xr.Dataset:
    """Score heads by how far they attend as the rules of `KINDS` say, lazily where the patterns are lazy.

    `pattern` is what the functions of `attention` take; `tokens` are those of its sequences: `run["tokens"]`, or ids
    [sequence, position], −1 or nothing beyond a sequence's end ([position] for a pattern without `sequence`).

    Gives `score[kind, …]` (float32; of a store [kind, layer, head]), and `n_query[kind]` (int64), how many queries a
    rule names a key for. `measure`: "mass", the attention to keys that the rule names, a mean over those queries of
    all sequences (all 1 for a head that does nothing else); and TransformerLens' two, each a mean over sequences:
    "mul", the share of a sequence's attention that is on the pattern, and "abs", 1 − Σ |attention − pattern| / number
    of positions (which TransformerLens rounds). `exclude_bos` takes edges to position 0, `exclude_current_token` those
    of queries to themselves out of attention and pattern alike. `by_sequence` keeps a dimension `sequence`. NaN where
    there is no such query, or no attention. Sequences that are not recorded do not count. Memory: a chunk of patterns.

    SchemaError for what is no pattern, tokens that do not fit it, and an unknown measure.
    """
    _check_measure(measure)
    value = weights_of(pattern, "head_detectors")
    single = "sequence" not in value.dims
    value = value.expand_dims("sequence") if single else value.transpose("sequence", ...)
    ids = _ids_of(tokens, value, single)
    score, weight, n_query = xr.apply_ufunc(
        lambda block, held: _scores(block, held, measure, exclude_bos, exclude_current_token),
        value,
        ids,
        input_core_dims=[["query", "key"], ["position"]],
        output_core_dims=[["kind"]] * 3,
        keep_attrs=False,
        dask="parallelized",
        output_dtypes=[np.float64, np.float64, np.int64],
        dask_gufunc_kwargs={"output_sizes": {"kind": len(KINDS)}},
    )
    others = [dim for dim in value.dims if dim not in ("sequence", "query", "key")]
    n_query = n_query.isel(dict.fromkeys(others, 0), drop=True)
    if not by_sequence:
        score, n_query = _pooled(score, weight), n_query.sum("sequence")
    return _result(score, n_query, measure)


def random_repeats(
    vocab: Model | int,
    *,
    n_sequences: int = 16,
    length: int = 50,
    seed: int = 0,
    bos: int | Literal["model"] | None = "model",
) -> torch.Tensor:
    """Random tokens that come twice: int64 [sequence, position], `length` tokens and the same again, after one
    beginning-of-sequence token where there is `bos`.

    No token comes twice within a half, so that what follows the earlier occurrence of one is one token. They are drawn
    evenly from `vocab`: a number of tokens, or a model, whose special tokens and `bos` are left out. `bos`: an id,
    None, or "model", the model's own where it has one. SchemaError where there are not so many different tokens.
    """
    first = bos
    special: set[int] = set()
    size = vocab if isinstance(vocab, int) else vocab.spec.d_vocab
    if not isinstance(vocab, int) and vocab.has_tokenizer:
        known = vocab.tokenizer.vocabulary.special
        size = min(size, vocab.tokenizer.tokenizer.get_vocab_size())
        special = {one for one in (known.bos, known.eos, known.unk) if one is not None}
        special |= _special(vocab.tokenizer.tokenizer, size)
        first = known.bos if bos == "model" else bos
    head = [int(first)] if isinstance(first, int) else []
    choices = np.setdiff1d(np.arange(size), [*special, *head])
    if not 1 <= length <= len(choices) or n_sequences < 1:
        raise SchemaError(
            f"{n_sequences} sequences of {length} different tokens, twice, are asked for: at least 1 of each, and at "
            f"most {len(choices):,} tokens, which are all there are"
        )
    generator = np.random.default_rng(seed)
    halves = [generator.choice(choices, length, replace=False) for _ in range(n_sequences)]
    return torch.tensor([[*head, *half, *half] for half in np.stack(halves).tolist()], dtype=torch.int64)


def _special(tokenizer: Tokenizer, size: int) -> set[int]:
    """The tokens that a tokenizer itself takes for special: those that it can leave out of a text."""
    rows = [[one] for one in range(size)]
    with_them, without = (tokenizer.decode_batch(rows, skip_special_tokens=skip) for skip in (False, True))
    return {one for one in range(size) if with_them[one] and not without[one]}


def detect_heads(
    model: Model,
    *,
    n_sequences: int = 16,
    length: int = 50,
    seed: int = 0,
    bos: int | Literal["model"] | None = "model",
    measure: str = "mass",
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    batch_size: int = 8,
) -> xr.Dataset:
    """Score every head of a model on random tokens that come twice (`random_repeats`): `score[kind, layer, head]`
    (float32) and `n_query[kind]`, as `head_detectors` gives them.

    There the rules are stripes: a previous-token head attends from q to q − 1, a duplicate-token head, in the second
    half, to q − `length` and an induction head to q − (`length` − 1). Of a recurrent model the effective attention is
    scored, normalised. Memory: the patterns of one layer of `batch_size` sequences. Same seed, same tokens.

    Raises as `Model.forward` does for what the model cannot run, and SchemaError as `random_repeats` does, for an
    unknown measure and a `batch_size` below 1, all before anything is computed.
    """
    _check_measure(measure)
    if batch_size < 1:
        raise SchemaError(f"batch_size = {batch_size}: at least 1 sequence at a time")
    tokens = random_repeats(model, n_sequences=n_sequences, length=length, seed=seed, bos=bos)
    recurrent = model.spec.rwkv is not None
    hooks = HookSpec().capture(f"blocks.*.{EFFECTIVE_ATTN if recurrent else _PATTERN}")
    found: dict[int, list[tuple[NDArray[Any], ...]]] = {}

    def sink(point: HookPoint, tensor: torch.Tensor) -> None:
        block = tensor.float().cpu().numpy()
        if recurrent:
            block = normalize_effective_attention(xr.DataArray(block, dims=point.dims)).values
        scores = _scores(block, batch.numpy()[:, None], measure, exclude_bos, exclude_current_token)
        found.setdefault(int(point.layer or 0), []).append(scores)

    for batch in tokens.split(batch_size):
        model.forward(batch, hooks, logits=False, sink=sink)
    score, weight, n_query = (
        np.stack([np.concatenate([part[i] for part in parts]) for parts in found.values()], 1) for i in range(3)
    )
    dims = ("sequence", "layer", "head", "kind")
    pooled = _pooled(xr.DataArray(score, dims=dims, coords={"layer": list(found)}), xr.DataArray(weight, dims=dims))
    result = _result(pooled, xr.DataArray(n_query[:, 0, 0], dims=("sequence", "kind")).sum("sequence"), measure)
    return result.assign_attrs(n_sequences=n_sequences, length=length, seed=seed)


def _check_measure(measure: str) -> None:
    if measure not in _MEASURES:
        known = ", ".join(map(repr, _MEASURES))
        raise SchemaError(f"there is no measure {measure!r}, only {known}.{nearest(measure, _MEASURES)}")


def _pooled(score: xr.DataArray, weight: xr.DataArray) -> xr.DataArray:
    """The mean over sequences, by weight; NaN where there is no weight."""
    total = weight.sum("sequence")
    return (score.fillna(0.0) * weight).sum("sequence") / total.where(total > 0)


def _result(score: xr.DataArray, n_query: xr.DataArray, measure: str) -> xr.Dataset:
    told = {"units": "fraction", "long_name": _MEASURES[measure][0]}
    found = {
        "score": score.astype(np.float32).transpose("kind", ...).assign_attrs(told),
        "n_query": n_query.transpose("kind", ...).assign_attrs(
            units="queries", long_name="queries with a key of the rule"
        ),
    }
    return xr.Dataset(found).assign_coords(kind=np.array(KINDS, dtype=object)).assign_attrs(measure=measure)


def _scores(
    block: NDArray[Any], ids: NDArray[Any], measure: str, exclude_bos: bool, exclude_current_token: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Score, its weight in a mean over sequences, and number of queries, all [sequence, …, kind], of patterns
    [sequence, …, query, key] and ids [sequence, …1, position]."""
    score = np.full((*block.shape[:-2], len(KINDS)), np.nan)
    weight, count = np.zeros_like(score), np.zeros(score.shape, dtype=np.int64)
    for s, held in enumerate(ids.reshape(len(ids), ids.shape[-1])):
        attention = np.where(np.isnan(block[s]), 0.0, block[s]).astype(np.float64)
        recorded = ~np.isnan(block[s][..., 0, 0])
        # Beyond the end of the patterns ids may be padding that looks like a token.
        n = int(lengths_of(block[s]).max(initial=0))
        rules = detection_patterns(np.where(np.arange(len(held)) < n, held, -1))
        if exclude_bos:
            attention[..., 0] = 0
            rules[..., 0] = False
        if exclude_current_token:
            own = np.arange(attention.shape[-1])
            attention[..., own, own] = 0
            rules[:, own, own] = False
        for i, rule in enumerate(rules):
            n_query = int(rule.any(-1).sum())
            own_score = _MEASURES[measure][1](attention, rule, n_query, n)
            score[s, ..., i] = np.where(recorded, own_score, np.nan)
            count[s, ..., i] = np.where(recorded, n_query, 0)
            share = n_query if measure == "mass" else 1
            weight[s, ..., i] = np.where(np.isnan(score[s, ..., i]), 0, share)
    return score, weight, count


def _mass(attention: NDArray[Any], rule: NDArray[np.bool_], n_query: int, n: int) -> NDArray[Any]:
    on = attention[..., rule].sum(-1)
    return np.asarray(on / n_query if n_query else np.full_like(on, np.nan))


def _mul(attention: NDArray[Any], rule: NDArray[np.bool_], n_query: int, n: int) -> NDArray[Any]:
    total = attention.sum((-1, -2))
    on = attention[..., rule].sum(-1)
    return np.asarray(np.divide(on, total, out=np.full_like(total, np.nan), where=total != 0))


def _abs(attention: NDArray[Any], rule: NDArray[np.bool_], n_query: int, n: int) -> NDArray[Any]:
    on = attention[..., rule]
    off = np.abs(attention).sum((-1, -2)) - np.abs(on).sum(-1)
    return np.asarray(1 - (off + np.abs(on - 1).sum(-1)) / max(n, 1))


_MEASURES = {
    "mass": ("attention to the keys of the rule", _mass),
    "mul": ("attention to the keys of the rule, of all", _mul),
    "abs": ("1 − |attention − pattern|, a position", _abs),
}


def _ids_of(tokens: Tokens, value: xr.DataArray, single: bool) -> xr.DataArray:
    """Ids [sequence, position], −1 where there is no token, chunked along `sequence` as the patterns are."""
    n = value.sizes["query"]
    if not isinstance(tokens, xr.Dataset | xr.DataTree):
        held = _padded(tokens, n, single)
        if len(held) != value.sizes["sequence"]:
            raise SchemaError(f"there are tokens of {len(held)} sequences, and patterns of {value.sizes['sequence']}")
        ids = xr.DataArray(held, dims=("sequence", "position"))
        return ids if value.chunks is None else ids.chunk({"sequence": value.chunksizes["sequence"]})
    if "token_id" not in tokens or not {"sequence", "position"} <= set(tokens.coords):
        raise SchemaError('tokens are token_id[token] with `sequence` and `position`: give open_run(path)["tokens"]')
    table = (tokens if isinstance(tokens, xr.Dataset) else tokens.to_dataset())[["token_id"]]
    wanted = np.atleast_1d(value["sequence"].values)
    if value.chunks is None:
        return xr.DataArray(_read(table, wanted, n), dims=("sequence", "position"))
    chunks = (value.chunksizes["sequence"], (n,))

    def read(block_info: Any = None) -> NDArray[np.int64]:
        (start, stop), _ = block_info[None]["array-location"]
        return _read(table, wanted[start:stop], n)

    lazy = da.map_blocks(read, chunks=chunks, dtype=np.int64, meta=np.empty((0, 0), dtype=np.int64))
    return xr.DataArray(lazy, dims=("sequence", "position"))


def _padded(tokens: Any, n: int, single: bool) -> NDArray[np.int64]:
    rows = [np.asarray(row, dtype=np.int64) for row in ([tokens] if single and np.ndim(tokens[0]) == 0 else tokens)]
    held = np.full((len(rows), n), -1, dtype=np.int64)
    for s, row in enumerate(rows):
        if row.ndim != 1 or len(row) > n:
            raise SchemaError(f"the tokens of sequence {s} have the shape {row.shape}; at most {n} ids are expected")
        held[s, : len(row)] = row
    return held


def _read(table: xr.Dataset, wanted: NDArray[Any], n: int) -> NDArray[np.int64]:
    """The ids of some sequences of a table of tokens [sequence, position], −1 beyond their end."""
    found = np.full((len(wanted), n), -1, dtype=np.int64)
    for row, sequence in zip(found, wanted.tolist(), strict=True):
        try:
            own = table.sel(sequence=sequence)
        except KeyError:
            raise SchemaError(f"there are patterns of sequence {sequence}, and no tokens: another run's?") from None
        place = own["position"].values
        if len(place) and place.max() >= n:
            raise SchemaError(f"sequence {sequence} has a token at position {place.max()}, and patterns have {n}")
        row[place] = own["token_id"].values
    return found
