"""Features chosen by name, of a dictionary or of a set: checked, with what encodes them and what they write."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from ..models.addressing import Part
from ..models.errors import HookError
from ..models.interventions import Value, finite, fitting
from ..models.points import HookPoint
from .activation import Activation
from .dictionary import Dictionary, Encoder
from .transcoders import FeatureId, TranscoderSet

Feature: TypeAlias = int | FeatureId | tuple[int, int]
"""A feature of one dictionary by its number, one of a set by layer and number."""

Features: TypeAlias = (
    Mapping[int, Value] | Mapping[FeatureId, Value] | Mapping[tuple[int, int], Value] | Mapping[Feature, Value]
)
"""What is said of each of some features. (A mapping's type holds for its very type of keys.)"""


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Features of one encoder with a value each, and the decoder rows [chosen, d_out] that they write at points.

    `features` [chosen] are counted in `encoder`, which may hold these features and no others. `scale` is the factor
    [..., 1], from activations [..., d_in], by which what they write is multiplied; None where it is 1.
    """

    encoder: Encoder
    features: Tensor
    values: Sequence[Value]
    rows: Mapping[HookPoint, Tensor]
    scale: Callable[[Tensor], Tensor] | None = None

    def stacked(self, part: Part, noun: str) -> Tensor:
        """The values of the tokens of a part, [..., chosen]. HookError for what does not fit them or is not finite."""
        return stacked(self.values, part, noun, self.encoder)

    def encode(self, x: Tensor) -> Tensor:
        """The chosen features of activations: [..., chosen] of [..., d_in]."""
        return self.encoder.encode(x)[..., self.features]


def choose(dictionary: Dictionary | TranscoderSet, values: Features, where: str | None) -> list[Chosen]:
    """The features that `values` names, of one dictionary or by layer of a set, whose files are read for them.

    They write at `hook_out`, or in the same layers at the kind of point `where`. HookError for features that are not
    there, or named twice, for none at all, and for hook points of unknown names.
    """
    if isinstance(dictionary, Dictionary):
        features = torch.tensor(numbers_of(values, dictionary), device=dictionary.device)
        rows = {written_at(dictionary.hook_out, where, dictionary): dictionary.W_dec[features]}
        chosen = _chosen(dictionary, features, list(values.values()), rows)
        return [replace(chosen, scale=dictionary.output_scale) if dictionary.undoes_norm else chosen]
    return [_of_layer(dictionary, layer, of_layer, where) for layer, of_layer in _by_layer(values, dictionary).items()]


def numbers_of(features: Iterable[Feature], dictionary: Dictionary) -> list[int]:
    """Features of one dictionary as numbers, each once. HookError for those that it does not have."""
    source = dictionary.provenance.source
    return _once([_number(feature, dictionary.n_feature, "feature", source) for feature in features], source)


def stacked(values: Iterable[Value], part: Part, noun: str, encoder: Encoder) -> Tensor:
    """Values that each broadcast to the tokens of a part, side by side [..., chosen], in the encoder's dtype.

    HookError for what does not fit or is not finite; `noun` says in messages what they are.
    """
    numbers = [finite(fitting(value, part, noun), noun) for value in values]
    cast = [torch.as_tensor(number, dtype=encoder.dtype, device=encoder.device) for number in numbers]
    return torch.stack(torch.broadcast_tensors(*cast), dim=-1)


def point_of(hook: str, encoder: Encoder) -> HookPoint:
    """The hook point that a dictionary names. HookError where forebay knows none of that name."""
    try:
        return HookPoint.parse(hook)
    except HookError as error:
        raise HookError(
            f"{encoder.provenance.source} names {hook!r}; load it with hook= or hook_out=: {error}"
        ) from error


def written_at(hook_out: str, where: str | None, encoder: Encoder) -> HookPoint:
    """The point of `hook_out`, or that of the kind `where` in its layer."""
    point = point_of(hook_out, encoder)
    return point if where is None else HookPoint(where, point.layer)


def _chosen(encoder: Encoder, features: Tensor, values: Sequence[Value], rows: Mapping[HookPoint, Tensor]) -> Chosen:
    if encoder.activation.counted:  # which are let through depends on all of them
        return Chosen(encoder, features, values, rows)
    within = torch.arange(len(features), device=features.device)
    return Chosen(_narrowed(encoder, features), within, values, rows)


def _of_layer(transcoders: TranscoderSet, layer: int, values: Mapping[int, Value], where: str | None) -> Chosen:
    encoder, features = transcoders.encoder(layer), torch.tensor(list(values))
    rows = {
        written_at(transcoders.hooks_out[target], where, encoder): transcoders.decoder_rows(layer, target, features)
        for target in transcoders.targets(layer)
    }
    return _chosen(encoder, features.to(encoder.device), list(values.values()), rows)


def _narrowed(encoder: Encoder, features: Tensor) -> Encoder:
    """The encoder of some of its features: a set's are large, and few of them are asked for."""
    activation = encoder.activation
    threshold, r_mag, b_mag = (
        None if value is None else value[features]
        for value in (activation.threshold, activation.r_mag, activation.b_mag)
    )
    return Encoder(
        W_enc=encoder.W_enc[:, features],
        b_enc=encoder.b_enc[features],
        activation=Activation(kind=activation.kind, threshold=threshold, r_mag=r_mag, b_mag=b_mag),
        hook=encoder.hook,
        b_in=encoder.b_in,
        input_norm=encoder.input_norm,
        head=encoder.head,
        provenance=encoder.provenance,
    )


def _by_layer(values: Features, transcoders: TranscoderSet) -> dict[int, dict[int, Value]]:
    source = transcoders.provenance.source
    pairs: list[tuple[int, int]] = []
    for feature in values:
        pair = (feature.layer, feature.index) if isinstance(feature, FeatureId) else feature
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise HookError(f"{source} has many layers: FeatureId(layer, index) is expected, not {feature!r}")
        layer = _number(pair[0], transcoders.n_layers, "layer", source)
        pairs.append((layer, _number(pair[1], transcoders.n_features[layer], "feature", f"layer {layer} of {source}")))
    _once(pairs, source)
    found: dict[int, dict[int, Value]] = {}
    for (layer, feature), value in sorted(zip(pairs, values.values(), strict=True), key=operator.itemgetter(0)):
        found.setdefault(layer, {})[feature] = value
    return found


def _number(given: object, size: int, noun: str, source: str) -> int:
    try:
        number = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        raise HookError(f"{given!r} names no {noun} of {source}: a whole number is expected") from None
    if not 0 <= number < size:
        raise HookError(f"{source} has {noun}s 0 to {size - 1}, and no {number}")
    return number


_Named = TypeVar("_Named")


def _once(named: list[_Named], source: str) -> list[_Named]:
    if not named:
        raise HookError(f"no feature of {source} is named")
    if len(set(named)) < len(named):
        twice = next(one for one in named if named.count(one) > 1)
        raise HookError(f"feature {twice} of {source} is named twice")
    return named
