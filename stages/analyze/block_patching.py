"""Block patching: the residual stream of a counterfactual prompt in place of the original's, in blocks of layers.

The protocol is that of Transluce's activation patching on CounterFact prompts (Li et al. 2025, "Training Language
Models to Explain Their Own Computations", arXiv:2511.08579) as candle-mi reproduces it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.batch import Batch
from ..models.errors import HookError
from ..models.interventions import NamedIntervention
from ..models.model import Model
from ..models.offsets import OTHER
from ..models.points import BLOCK, HookPoint, dims_of
from ..models.taps import HookSpec
from .metrics import divergence
from .patching import Pairs, patch, sites_of, variant_logits
from .prompts import Prompts, many_prompts

Spans: TypeAlias = Mapping[str, tuple[int, int] | str]
"""Labelled spans of a text, as `EncodingWithOffsets.label_spans` takes them."""


def block_patching(
    model: Model,
    original: Prompts,
    counterfactual: Prompts,
    *,
    block_size: int = 4,
    hook: str = "hook_resid_post",
    position_map: Sequence[Sequence[int]] | None = None,
    spans: Spans | Sequence[Spans] | None = None,
    batch_size: int = 32,
) -> xr.Dataset:
    """Run each original prompt with the counterfactual's stream in every block of layers at every position, and compare
    what it says at its last token.

    Prompts are texts or token ids, paired in their order; a pair may have different lengths. The model is cut into
    blocks of `block_size` layers, the last one shorter where they do not come out even. In one run `hook` of every
    layer of a block is replaced, at one position, by the counterfactual's at the position that `position_map` gives:
    for each pair a list with, for each position of the original, one of the counterfactual, both counted from 0. None:
    the positions themselves where both are equally long; otherwise `map_positions` by the span "fact".

    `spans`: for each pair labelled spans of the original text (of one pair alone, its own), such as
    `{"fact": "The Eiffel Tower is in"}`, from which every token gets its `token_type`: "fact", "fact_final" for the
    last token of it, or "other".

    Gives, along `pair`, `block` and `position`: `kl_divergence` (float32, nats, KL(original ‖ patched)); `changed`
    (float32: 1 where another token became the likeliest, else 0; means of it are the shares that the protocol reports)
    and `top_token_id` (int64, the likeliest). NaN and −1 beyond the end of a shorter prompt. Along `pair`:
    `original_top_token_id`, `counterfactual_top_token_id` and `counterfactual_kl_divergence`, from the original.
    Coordinates: `first_layer` and `last_layer` on `block`; on [pair, position] `token_id`, `token_text`, `token_type`,
    and of the counterfactual token that is put there `counterfactual_position`, `…_token_id`, `…_token_text`.

    Memory: the counterfactual's captures, and a forward of `batch_size` sequences whose logits exist at one position.

    SchemaError for prompts, maps and spans that do not fit each other, HookError for a kind that is not one vector a
    position in every layer, ModelError for a span that is not in its text; all before anything is computed.
    """
    prompts = {"original": many_prompts(model, original), "counterfactual": many_prompts(model, counterfactual)}
    _check(model, prompts, hook, block_size, batch_size)
    labels = _labels(model, original, prompts["original"], spans)
    maps = _maps(prompts, position_map, labels)
    blocks = [
        range(first, min(first + block_size, model.spec.n_layers))
        for first in range(0, model.spec.n_layers, block_size)
    ]
    found = _blank(len(blocks), prompts["original"])
    rows = zip(prompts["original"].rows(), prompts["counterfactual"].rows(), maps, strict=True)
    for number, (ids, others, places) in enumerate(rows):
        base, other = (next(variant_logits(model, row, [()], len(row) - 1)) for row in (ids, others))
        found["original_top_token_id"][number] = int(base.argmax())
        found["counterfactual_top_token_id"][number] = int(other.argmax())
        found["counterfactual_kl_divergence"][number] = float(divergence(base, other))
        points = [HookPoint(hook, layer) for layer in range(model.spec.n_layers)]
        captured = model.forward(others[None], HookSpec().capture(*points), logits=False).captures
        variants = _variants(hook, blocks, captured, places)
        parts = [
            (divergence(base, logits).cpu(), logits.argmax(-1).cpu())
            for logits in variant_logits(model, ids, variants, len(ids) - 1, batch_size=batch_size)
        ]
        shape = (len(blocks), len(ids))
        kl, top = (torch.cat(column).reshape(shape).numpy() for column in zip(*parts, strict=True))
        found["kl_divergence"][number, :, : len(ids)] = kl
        found["top_token_id"][number, :, : len(ids)] = top
        found["changed"][number, :, : len(ids)] = top != int(base.argmax())
    return _labelled(model, found, blocks, prompts, maps, labels).assign_attrs(hook=hook, block_size=block_size)


def map_positions(n_original: int, n_counterfactual: int, fact: Sequence[int]) -> list[int]:
    """For each position of the original the position of the counterfactual that stands for it, where a fact of any
    length is followed by the same text in both: up to the last token of the fact the same position, after it the one
    that is as far from the end; none beyond the counterfactual.

    A position of a longer fact thus stands for one that follows the shorter one. SchemaError for an empty fact.
    """
    if not fact:
        raise SchemaError("the fact has no token: nothing says where the prompts begin to be the same")
    shift, last = n_counterfactual - n_original, n_counterfactual - 1
    return [min(max(at if at <= max(fact) else at + shift, 0), last) for at in range(n_original)]


def _check(model: Model, prompts: Mapping[str, Batch], hook: str, block_size: int, batch_size: int) -> None:
    original, counterfactual = prompts.values()
    if len(original.lengths) != len(counterfactual.lengths):
        raise SchemaError(
            f"there are {len(original.lengths)} original prompts and {len(counterfactual.lengths)} counterfactual "
            f"ones: give one for each"
        )
    sites_of(model, Pairs(clean=original, corrupted=original), [hook])
    if hook not in BLOCK or dims_of(hook)[:2] != ("sequence", "position") or len(dims_of(hook)) != 3:
        raise HookError(f"{hook} is not one vector a position in every layer, as hook_resid_post is")
    for name, number in (("block_size", block_size), ("batch_size", batch_size)):
        if number < 1:
            raise SchemaError(f"{name} = {number}: at least 1")


def _labels(model: Model, texts: Prompts, batch: Batch, spans: Spans | Sequence[Spans] | None) -> list[tuple[str, ...]]:
    """The type of every token of each original prompt."""
    if spans is None:
        return [(OTHER,) * length for length in batch.lengths]
    given = [texts] if isinstance(texts, str) else list(texts)
    spans = [spans] if isinstance(spans, Mapping) else spans
    if len(spans) != len(given):
        raise SchemaError(f"there are {len(given)} original prompts and spans of {len(spans)}: give those of each")
    labels = []
    for text, own in zip(given, spans, strict=True):
        if not isinstance(text, str):
            raise SchemaError("spans are those of texts, and the original prompts are token ids: give the texts")
        labels.append(model.tokenizer.encode(text).token_labels(own))
    return labels


def _maps(
    prompts: Mapping[str, Batch], position_map: Sequence[Sequence[int]] | None, labels: Sequence[Sequence[str]]
) -> list[list[int]]:
    lengths = list(zip(prompts["original"].lengths, prompts["counterfactual"].lengths, strict=True))
    if position_map is None:
        return [_default_map(number, *both, labels[number]) for number, both in enumerate(lengths)]
    if len(position_map) != len(lengths):
        raise SchemaError(f"there are {len(lengths)} pairs and maps of {len(position_map)}: give one for each")
    maps = [list(map(int, places)) for places in position_map]
    for number, (places, (n_original, n_counterfactual)) in enumerate(zip(maps, lengths, strict=True)):
        if len(places) != n_original or not all(0 <= place < n_counterfactual for place in places):
            raise SchemaError(
                f"the map of pair {number} is {places}: for each of the {n_original} positions of the original, "
                f"one of the counterfactual is expected, 0 to {n_counterfactual - 1}"
            )
    return maps


def _default_map(number: int, n_original: int, n_counterfactual: int, labels: Sequence[str]) -> list[int]:
    if n_original == n_counterfactual:
        return list(range(n_original))
    fact = [at for at, label in enumerate(labels) if label in ("fact", "fact_final")]
    if not fact:
        raise SchemaError(
            f"the prompts of pair {number} have {n_original} and {n_counterfactual} tokens: give a position_map, or "
            f'spans with a "fact" that the same text follows in both'
        )
    return map_positions(n_original, n_counterfactual, fact)


def _blank(n_blocks: int, batch: Batch) -> dict[str, Any]:
    n_pairs = len(batch.lengths)
    sites = (n_pairs, n_blocks, max(batch.lengths))
    return {
        "kl_divergence": np.full(sites, np.nan, dtype=np.float32),
        "changed": np.full(sites, np.nan, dtype=np.float32),
        "top_token_id": np.full(sites, -1, dtype=np.int64),
        "original_top_token_id": np.full(n_pairs, -1, dtype=np.int64),
        "counterfactual_top_token_id": np.full(n_pairs, -1, dtype=np.int64),
        "counterfactual_kl_divergence": np.full(n_pairs, np.nan, dtype=np.float32),
    }


def _variants(
    hook: str, blocks: Sequence[range], captured: Mapping[HookPoint, Tensor], places: Sequence[int]
) -> Iterator[list[tuple[HookPoint, NamedIntervention]]]:
    """One run a block and position."""
    for block, (position, place) in itertools.product(blocks, enumerate(places)):
        found = [patch(HookPoint(hook, layer), captured[HookPoint(hook, layer)], position=place) for layer in block]
        yield [(point, intervention.at(position=position)) for point, intervention in found]


_SAID = {
    "kl_divergence": ("nats", "KL(original ‖ patched)"),
    "changed": ("fraction", "runs in which another token became the likeliest"),
    "top_token_id": ("token id", "likeliest token of the patched run"),
    "original_top_token_id": ("token id", "likeliest token of the original run"),
    "counterfactual_top_token_id": ("token id", "likeliest token of the counterfactual run"),
    "counterfactual_kl_divergence": ("nats", "KL(original ‖ counterfactual)"),
}


def _labelled(
    model: Model,
    found: Mapping[str, Any],
    blocks: Sequence[range],
    prompts: Mapping[str, Batch],
    maps: Sequence[Sequence[int]],
    labels: Sequence[Sequence[str]],
) -> xr.Dataset:
    sites = ("pair", "block", "position")
    variables = {
        name: (sites[: value.ndim], value, {"units": _SAID[name][0], "long_name": _SAID[name][1]})
        for name, value in found.items()
    }
    original, counterfactual = (prompts[name].rows() for name in ("original", "counterfactual"))
    put = [row[list(places)] for row, places in zip(counterfactual, maps, strict=True)]
    per_token: dict[str, tuple[Sequence[Sequence[Any]], Any, Any]] = {
        "token_id": ([row.tolist() for row in original], -1, np.int64),
        "token_type": (labels, "", object),
        "counterfactual_position": (maps, -1, np.int64),
        "counterfactual_token_id": ([row.tolist() for row in put], -1, np.int64),
    }
    if model.has_tokenizer:
        for name, rows in (("token_text", original), ("counterfactual_token_text", put)):
            per_token[name] = ([model.tokenizer.to_str_tokens(row) for row in rows], "", object)
    coords: dict[str, Any] = {
        "pair": range(len(maps)),
        "block": range(len(blocks)),
        "position": range(max(map(len, maps))),
        "first_layer": ("block", [block[0] for block in blocks]),
        "last_layer": ("block", [block[-1] for block in blocks]),
    }
    for name, (of_each, nothing, dtype) in per_token.items():
        laid = np.full((len(maps), max(map(len, maps))), nothing, dtype=dtype)
        for number, own in enumerate(of_each):
            laid[number, : len(own)] = own
        coords[name] = (("pair", "position"), laid)
    return xr.Dataset(variables, coords=coords)
