"""Which features write in a direction: decoder rows projected onto it, ranked, of a dictionary or a set of transcoders.

Definitions are candle-mi's (score_features_by_decoder_projection and its attribution graph, which is this ranking with
edges from features to one direction; there are none between features).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ..dictionaries.dictionary import Dictionary
from ..dictionaries.errors import DictionaryError
from ..dictionaries.selection import top_k as largest
from ..dictionaries.transcoders import FeatureId, TranscoderSet
from ..models.html import html_table
from ..models.points import HookPoint

Direction: TypeAlias = "Tensor | NDArray[Any]"

AT_ONCE = 2**24
"""Numbers of decoder rows, and scores of them, that are held at a time: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class AttributionEdge:
    """How strongly a feature writes in a direction at a layer. `feature` is a number of one dictionary, or a FeatureId
    of a set; `target_layer` is None where a dictionary writes outside the blocks.
    """

    feature: int | FeatureId
    score: float
    target_layer: int | None


@dataclass(frozen=True, slots=True)
class AttributionGraph:
    """Edges from features to one direction, the highest score first; `target_layer` is that at which all of them write,
    None where each has its own.
    """

    target_layer: int | None
    edges: tuple[AttributionEdge, ...]

    def __len__(self) -> int:
        return len(self.edges)

    def _repr_html_(self) -> str:
        facts = {"edges": f"{len(self.edges):,}", "target layer": self.target_layer}
        rows = [(edge.feature, f"{edge.score:.4g}", edge.target_layer) for edge in self.edges]
        return html_table("AttributionGraph", facts, ("feature", "score", "target layer"), rows)

    def top_k(self, k: int) -> AttributionGraph:
        """The k edges with the highest scores."""
        return AttributionGraph(self.target_layer, self.edges[: max(k, 0)])

    def threshold(self, least: float) -> AttributionGraph:
        """The edges whose score is at least `least`, or at most −`least`."""
        return AttributionGraph(self.target_layer, tuple(edge for edge in self.edges if abs(edge.score) >= least))

    def features(self) -> tuple[int | FeatureId, ...]:
        """The features of the edges, in their order: what `Inject`, `Suppress` and `Clamp` take."""
        return tuple(edge.feature for edge in self.edges)

    def to_dataset(self) -> xr.Dataset:
        """The edges along `rank`: `score` (float32), `feature`, `layer` (of the feature) and `target_layer` (int64, −1
        where there is none).
        """
        targets = [-1 if edge.target_layer is None else edge.target_layer for edge in self.edges]
        found = [
            (target, edge.feature) if isinstance(edge.feature, int) else (edge.feature.layer, edge.feature.index)
            for edge, target in zip(self.edges, targets, strict=True)
        ]
        columns = {
            "score": np.array([edge.score for edge in self.edges], dtype=np.float32),
            "feature": np.array([feature for _, feature in found], dtype=np.int64),
            "layer": np.array([layer for layer, _ in found], dtype=np.int64),
            "target_layer": np.array(targets, dtype=np.int64),
        }
        return xr.Dataset({name: ("rank", column) for name, column in columns.items()})


def score_features_by_decoder_projection(
    dictionary: Dictionary | TranscoderSet,
    direction: Direction,
    target_layer: int | None = None,
    *,
    top_k: int = 10,
    cosine: bool = False,
) -> tuple[AttributionEdge, ...]:
    """The `top_k` features whose decoder rows point most in a direction [d_out], such as a row of the unembedding; the
    highest score first. The score is row · direction, or with `cosine` that over both lengths.

    Of a set, features of all layers that write at `target_layer` are scored: in a cross-layer set every layer up to it,
    otherwise the layer itself. None: all features of the set, each at the layer where its score is highest, of equal
    ones at the lowest (with `cosine` and the unembedding of a word, how candle-mi finds features that say the word).
    One dictionary writes in the layer of its `hook_out`, which may be left out.

    Of equal scores the lower layer, then the lower feature comes first; scores that are not finite are left out (a row
    of zeros has no cosine). Decoder rows are read once, 64 MiB at a time, and computed with in float32 at least. Raises
    DictionaryError for a layer that is not there, for fewer than one feature, and for a direction that does not fit,
    is not finite or, with `cosine`, is zero; HookError where one dictionary's `hook_out` has an unknown name.
    """
    return build_attribution_graph(dictionary, direction, target_layer, top_k=top_k, cosine=cosine).edges


def build_attribution_graph(
    dictionary: Dictionary | TranscoderSet,
    direction: Direction,
    target_layer: int | None = None,
    *,
    top_k: int = 10,
    cosine: bool = False,
) -> AttributionGraph:
    """What `score_features_by_decoder_projection` gives, as a graph."""
    (graph,) = build_attribution_graphs(dictionary, direction[None], target_layer, top_k=top_k, cosine=cosine)
    return graph


def build_attribution_graphs(
    dictionary: Dictionary | TranscoderSet,
    directions: Direction,
    target_layer: int | None = None,
    *,
    top_k: int = 10,
    cosine: bool = False,
) -> tuple[AttributionGraph, ...]:
    """A graph for each of several directions [direction, d_out], as `build_attribution_graph` gives them; decoders are
    read once for all.
    """
    is_set = isinstance(dictionary, TranscoderSet)
    target = _checked_target(dictionary, target_layer)
    if top_k < 1:
        raise DictionaryError(f"top_k = {top_k} features are asked for; at least one can be given")
    ranking = _Ranking(_checked_directions(directions, dictionary, cosine), top_k, cosine)
    for layer, targets in _sources(dictionary, target):
        for first, blocks in _blocks(dictionary, layer, targets, len(directions)):
            ranking.include(layer, first, targets, blocks)
    return tuple(
        AttributionGraph(
            target,
            tuple(
                AttributionEdge(FeatureId(layer, feature) if is_set else feature, score, None if at < 0 else at)
                for score, layer, feature, at in row
            ),
        )
        for row in ranking.rows()
    )


class _Ranking:
    """The highest scores so far of each direction, with layer, feature and target of each, best first."""

    def __init__(self, directions: Tensor, top_k: int, cosine: bool) -> None:
        self._directions, self._top_k, self._cosine = directions, top_k, cosine
        self._scores = directions.new_empty(len(directions), 0)
        self._names = torch.empty(len(directions), 0, 3, dtype=torch.int64, device=directions.device)

    def include(self, layer: int, first: int, targets: Sequence[int], blocks: Iterator[Tensor]) -> None:
        """Take in features of a layer from `first` on, by what they write at each of the targets."""
        best, at = self._best(targets, blocks)
        scores, order = largest(best, self._top_k)
        names = torch.stack([torch.full_like(order, layer), order + first, at.gather(1, order)], dim=-1)
        scores, names = torch.cat([self._scores, scores], 1), torch.cat([self._names, names], 1)
        self._scores, order = largest(scores, self._top_k)
        self._names = names.gather(1, order[..., None].expand(-1, -1, 3))

    def rows(self) -> Iterator[list[tuple[float, int, int, int]]]:
        """Score, layer, feature and target of what is finite."""
        for scores, names in zip(self._scores, self._names, strict=True):
            n_finite = int(torch.isfinite(scores).sum())  # what is not, is −∞ and stands last
            yield [(score, *name) for score, name in zip(scores.tolist(), names.tolist(), strict=True)][:n_finite]

    def _best(self, targets: Sequence[int], blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """The highest score of each feature [direction, feature], and the first target that has it."""
        best = at = None
        for target, rows in zip(targets, blocks, strict=True):
            wide = rows.to(self._directions.dtype)
            scores = self._directions @ wide.T
            if self._cosine:
                scores = scores / torch.linalg.vector_norm(wide, dim=-1)
            scores = scores.where(scores.isfinite(), -torch.inf)
            if best is None or at is None:
                best, at = scores, torch.full(scores.shape, target, device=scores.device)
            else:
                at = torch.where(scores > best, target, at)
                best = torch.maximum(best, scores)
        assert best is not None
        assert at is not None
        return best, at


def _sources(dictionary: Dictionary | TranscoderSet, target: int | None) -> Iterator[tuple[int, Sequence[int]]]:
    """The layers whose features are scored, each with the targets at which; −1 outside the blocks."""
    if isinstance(dictionary, Dictionary):
        layer = -1 if target is None else target
        yield layer, [layer]
        return
    for layer in range(dictionary.n_layers):
        targets = dictionary.targets(layer)
        if target is None:
            yield layer, targets
        elif target in targets:
            yield layer, [target]


def _blocks(
    dictionary: Dictionary | TranscoderSet, layer: int, targets: Sequence[int], n_directions: int
) -> Iterator[tuple[int, Iterator[Tensor]]]:
    """The rows of a layer's features, some features at a time: the first feature, and rows target by target."""
    n_feature = dictionary.n_feature if isinstance(dictionary, Dictionary) else dictionary.n_features[layer]
    step = max(1, AT_ONCE // max(dictionary.d_out, n_directions))
    for first in range(0, n_feature, step):
        some = slice(first, min(first + step, n_feature))
        if isinstance(dictionary, Dictionary):
            yield first, iter([dictionary.W_dec[some]])
        else:
            yield first, (dictionary.decoder_rows(layer, target, some) for target in targets)


def _checked_target(dictionary: Dictionary | TranscoderSet, target_layer: int | None) -> int | None:
    source = dictionary.provenance.source
    if isinstance(dictionary, Dictionary):
        layer = HookPoint.parse(dictionary.hook_out).layer
        if target_layer not in (None, layer):
            raise DictionaryError(f"{source} writes at {dictionary.hook_out}; layer {target_layer} was asked for")
        return layer
    if target_layer is not None and not 0 <= target_layer < dictionary.n_layers:
        raise DictionaryError(f"{source} has layers 0 to {dictionary.n_layers - 1}; {target_layer} was asked for")
    return target_layer


def _checked_directions(directions: Direction, dictionary: Dictionary | TranscoderSet, cosine: bool) -> Tensor:
    given = directions if isinstance(directions, torch.Tensor) else torch.from_numpy(np.array(directions))
    if given.dim() != 2 or given.shape[1] != dictionary.d_out or not len(given):
        raise DictionaryError(
            f"directions of shape {tuple(given.shape)}: {dictionary.provenance.source} writes {dictionary.d_out} "
            "numbers, so that many are expected of each"
        )
    wide = torch.promote_types(dictionary.dtype, torch.float32)
    given = given.detach().to(dictionary.device, wide)
    lengths = torch.linalg.vector_norm(given, dim=-1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()):
        raise DictionaryError("a direction has values that are NaN, infinite or too large")
    if cosine and not bool(lengths.all()):
        raise DictionaryError("a direction of zeros makes no angle: leave it out, or cosine=False")
    return given / lengths if cosine else given
