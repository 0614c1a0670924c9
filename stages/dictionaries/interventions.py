"""Interventions on features: what a dictionary's features write is added, taken out, set, or put in place of the whole.

They stand beside those of `stages.models.interventions`, are addressed in the same way, `.at(position=…, sequence=…)`,
and are checked against the model before anything is computed. Those of an autoencoder act at its hook point, by
`HookSpec.intervene(point, …)`. What reads at one point and writes at others, a transcoder or a set of them, takes
several interventions in one forward: `hooks()` gives the `HookSpec` with all of them, for an autoencoder too.

Features are encoded of what arrives at the hook point, in the dictionary's dtype and on its device. What they write is
added before the sum is rounded to the model's dtype, so that writing nothing changes nothing. Gradients flow through
encoder and decoder.
"""

import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..models.addressing import Part, Site, address, labelled
from ..models.errors import HookError
from ..models.interventions import Intervention, NamedIntervention, Value, finite, fitting
from ..models.points import HookPoint
from ..models.taps import HookSpec
from .dictionary import Dictionary, Encoder
from .transcoders import FeatureId, TranscoderSet

Feature: TypeAlias = int | FeatureId | tuple[int, int]
"""A feature of one dictionary by its number, one of a set by layer and number."""

Act: TypeAlias = Callable[[Tensor], Tensor | None]
"""From the vectors of the tokens addressed [..., width] to those that flow on, or None where they stay as they are."""

_TOKENS = ("sequence", "position")


@dataclass(frozen=True, slots=True, eq=False)
class OnTokens(NamedIntervention):
    """Works on the vectors of tokens at one point, heads laid flat or one head alone: what the interventions below are
    made of. `act` is given the site and the part of the tokens, and gives the function that the forward calls.
    """

    source: str
    point: HookPoint
    head: int | None
    width: int
    act: Callable[[Site, Part], Act]

    def bind(self, site: Site) -> Intervention:
        self._check(site)
        part = address(replace(site, sizes={dim: site.sizes[dim] for dim in _TOKENS}), self.where)
        act, head, n_dims = self.act(site, part), self.head, len(part.shape)

        def apply(value: Tensor, point: HookPoint) -> Tensor:
            place = value if head is None else value.select(2, head)
            here = part.read(place)
            new = act(here.flatten(n_dims))
            if new is not None:
                part.write(place, new.reshape(here.shape))
            return value

        return apply

    def _check(self, site: Site) -> None:
        if site.point != self.point:
            raise HookError(f"{self.source} belongs at {self.point}, not at {site.point}; hooks() puts it there")
        sizes = {dim: size for dim, size in site.sizes.items() if dim not in _TOKENS}
        if site.point.dims[:2] != _TOKENS or not sizes:
            raise HookError(f"there is no vector of each token here, of which features are made: {labelled(site.sizes)}")
        for dim in self.where:
            if dim not in _TOKENS:
                raise HookError(f"features are those of tokens: .at() takes position and sequence, not {dim}")
        if self.head is not None:
            first = next(iter(sizes))
            n_heads = sizes.pop(first) if first in ("head", "kv_head") else 0
            if not 0 <= self.head < n_heads:
                raise HookError(f"{self.source} is made of head {self.head}; there are {n_heads} heads here")
        if math.prod(sizes.values()) != self.width:
            raise HookError(
                f"{self.source} is {self.width} wide here, and the activation is {labelled(sizes)}: a dictionary of "
                "another model?"
            )


@dataclass(frozen=True, slots=True, eq=False)
class FeatureIntervention(NamedIntervention):
    """One on the features of a dictionary, or of a set of transcoders."""

    dictionary: Dictionary | TranscoderSet

    @abstractmethod
    def hooks(self, where: str | None = None) -> HookSpec:
        """Give the `HookSpec` that does this, at all the points that it takes; `HookSpec.extend` adds it to another.

        `where` is the kind of point, in the same layers, at which is written in place of the dictionary's own: with
        "hook_resid_post" to the residual stream after the block, as candle-mi does. Of a set, encoders and decoder rows
        of the features named are read now, and no others. Raises HookError for features that are not there, for
        hook points that forebay does not know, and DictionaryError for files that cannot be read; what depends on the
        model is checked by the forward.
        """

    @abstractmethod
    def here(self, dictionary: Dictionary) -> OnTokens:
        """Give what acts at the one point of an autoencoder. HookError where one point is not enough."""

    def bind(self, site: Site) -> Intervention:
        if isinstance(self.dictionary, TranscoderSet):
            raise HookError("it acts in many layers: take its hooks(), which puts it at all points that it needs")
        return self.here(self.dictionary).bind(site)


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Chosen features of one encoder, what is said of each, and the rows [chosen, d_out] that they write at points."""

    encoder: Encoder
    chosen: Tensor
    values: Sequence[Value]
    rows: Mapping[HookPoint, Tensor]

    @property
    def point(self) -> HookPoint:
        return _point_of(self.encoder.hook, self.encoder)

    @property
    def undoes_a_norm(self) -> bool:
        return isinstance(self.encoder, Dictionary) and self.encoder.denormalize and self.encoder.input_norm != "none"

    def stacked(self, part: Part, noun: str) -> Tensor:
        """The values [..., chosen] that are said of a part. HookError for those that do not fit or are not finite."""
        numbers = [finite(fitting(value, part, noun), noun) for value in self.values]
        cast = [torch.as_tensor(number).to(self.encoder.device, self.encoder.dtype) for number in numbers]
        return torch.stack(torch.broadcast_tensors(*cast), dim=-1)

    def encoding(self) -> Callable[[Tensor], Tensor]:
        """The function from activations [..., d_in] to the chosen features [..., chosen]."""
        encoder, chosen = self.encoder, self.chosen
        if encoder.activation.counted:  # which features are let through depends on all of them
            return lambda x: encoder.encode(x)[..., chosen]
        return _narrowed(encoder, chosen).encode

    def scaled(self, change: Tensor, x: Tensor) -> Tensor:
        """A change of features as the decoder rows are to be multiplied by it."""
        scale = self.encoder.output_scale(x) if isinstance(self.encoder, Dictionary) else None
        return change if scale is None else change * scale


@dataclass(frozen=True, slots=True, eq=False)
class _OfSome(FeatureIntervention):
    """One that changes how strongly some features write and leaves everything else, also what no feature explains."""

    @abstractmethod
    def said(self) -> tuple[str, Mapping[Feature, Value], bool]:
        """What is said of the features: its name, its value of each, and whether their activation counts against it."""

    def hooks(self, where: str | None = None) -> HookSpec:
        sources = self._sources(where)
        points = sorted({point for source in sources for point in source.rows})
        if isinstance(self.dictionary, Dictionary) and points == [sources[0].point]:
            return HookSpec().intervene(points[0], self)
        if not self._reads(sources):
            return _joined((point, self._writing(sources, point, None)) for point in points)
        for source in sources:
            _check_order(source.point, min(source.rows), source.encoder)
        keys = {id(source): object() for source in sources}
        reading = ((source.point, self._reading(source, keys[id(source)])) for source in sources)
        writing = ((point, self._writing(sources, point, keys)) for point in points)
        return _joined((*reading, *writing))

    def here(self, dictionary: Dictionary) -> OnTokens:
        (source,) = self._sources(None)
        (point,) = source.rows
        if not self._reads([source]):
            return self._writing([source], point, None)
        if source.point != point:
            raise HookError(f"it reads at {source.point} what is written at {point}: take its hooks()")
        rows = source.rows[point]

        def act(site: Site, part: Part) -> Act:
            change = self._change(source, part)
            return lambda x: _sum(x, change(x) @ rows)

        return self._on(source.encoder, point, dictionary.d_out, act)

    def _sources(self, where: str | None) -> list[_Source]:
        _, values, _ = self.said()
        if isinstance(self.dictionary, TranscoderSet):
            return [
                _source_of_layer(self.dictionary, layer, chosen, where)
                for layer, chosen in _by_layer(values, self.dictionary).items()
            ]
        dictionary = self.dictionary
        chosen = torch.tensor(_numbers(values, dictionary), device=dictionary.device)
        rows = {_written_at(dictionary.hook_out, where, dictionary): dictionary.W_dec[chosen]}
        return [_Source(dictionary, chosen, list(values.values()), rows)]

    def _reads(self, sources: Sequence[_Source]) -> bool:
        return self.said()[2] or any(source.undoes_a_norm for source in sources)

    def _change(self, source: _Source, part: Part) -> Callable[[Tensor], Tensor]:
        """The function from activations [..., d_in] to what their features [..., chosen] are to change by."""
        noun, _, counts = self.said()
        values = source.stacked(part, noun)
        encode = source.encoding()
        return lambda x: source.scaled(values - encode(x) if counts else values, x)

    def _reading(self, source: _Source, key: object) -> OnTokens:
        def act(site: Site, part: Part) -> Act:
            change = self._change(source, part)

            def remember(x: Tensor) -> None:
                site.passed[key] = change(x)

            return remember

        return self._on(source.encoder, source.point, source.encoder.d_in, act)

    def _writing(self, sources: Sequence[_Source], point: HookPoint, keys: Mapping[int, object] | None) -> OnTokens:
        """Writes at a point what was remembered under `keys`, or without them the values as they are given."""
        here = [source for source in sources if point in source.rows]

        def act(site: Site, part: Part) -> Act:
            given = [source.stacked(part, self.said()[0]) for source in here] if keys is None else []

            def write(x: Tensor) -> Tensor:
                changes = given if keys is None else [site.passed[keys[id(source)]] for source in here]
                written = [change @ source.rows[point] for change, source in zip(changes, here, strict=True)]
                return _sum(x, torch.stack(torch.broadcast_tensors(*written)).sum(0))

            return write

        return self._on(here[0].encoder, point, here[0].rows[point].shape[-1], act)

    def _on(self, encoder: Encoder, point: HookPoint, width: int, act: Callable[[Site, Part], Act]) -> OnTokens:
        return OnTokens(_named(encoder), point, _head_at(point, encoder), width, act, where=self.where)


@dataclass(frozen=True, slots=True, eq=False)
class Inject(_OfSome):
    """Adds strength · decoder row of every feature named: `features` maps features to strengths, in units of their
    activation (where the dictionary undoes a norm of its input, the row is multiplied as in decoding).

    A strength is a finite number, or real numbers that broadcast to the tokens addressed, [sequence, position]; below 0
    it pushes the other way, whatever the feature's activation is. Features are named by number, those of a set by
    `FeatureId` or (layer, number): these are written in every layer in which the set has them write.

    Source: candle-mi's prepare_hook_injection; steering vectors of SAELens.
    """

    features: Mapping[Feature, Value]

    def said(self) -> tuple[str, Mapping[Feature, Value], bool]:
        return "strength", _mapping(self.features), False


@dataclass(frozen=True, slots=True, eq=False)
class Clamp(_OfSome):
    """Sets features to values: adds (value − activation) · decoder row of each, and leaves everything else as it is,
    with what the dictionary does not explain. `features` maps features to values, as `Inject` does to strengths.

    The activation is that at the point where it is read, when the forward comes there: one that was clamped in an
    earlier layer has had its effect. In a set that writes across layers, every layer's part of it is corrected.
    """

    features: Mapping[Feature, Value]

    def said(self) -> tuple[str, Mapping[Feature, Value], bool]:
        return "value", _mapping(self.features), True


@dataclass(frozen=True, slots=True, eq=False)
class Suppress(_OfSome):
    """Takes out what features write: `Clamp` to 0. A feature that does not fire loses nothing.

    To subtract a constant whatever fires, as candle-mi suppresses, `Inject` with a strength below 0.
    """

    features: Sequence[Feature]

    def said(self) -> tuple[str, Mapping[Feature, Value], bool]:
        features = list(self.features)
        if len(set(features)) < len(features):
            twice = next(feature for feature in features if features.count(feature) > 1)
            raise HookError(f"feature {twice} is named twice")
        return "value", dict.fromkeys(features, 0.0), True


@dataclass(frozen=True, slots=True, eq=False)
class Splice(FeatureIntervention):
    """Puts the reconstruction in place of the activation at `hook_out`; with `error` what the dictionary does not
    explain is kept, so that only what `edit` does to the features has an effect, and without it none.

    `edit`: values by feature, as `Clamp` takes them, or a function from features [..., feature] to features, of the
    tokens addressed. With f the features and f′ the edited ones, what flows on is decode(f′), or with `error`
    decode(f′) + x − decode(f), computed as x + decode(f′) − decode(f).
    """

    error: bool = field(default=False, kw_only=True)
    edit: Mapping[int, Value] | Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)

    def hooks(self, where: str | None = None) -> HookSpec:
        dictionary = self._one()
        read = _point_of(dictionary.hook, dictionary)
        written = _written_at(dictionary.hook_out, where, dictionary)
        if read == written:
            return HookSpec().intervene(written, self)
        _check_order(read, written, dictionary)
        key = object()

        def remember(site: Site, part: Part) -> Act:
            made = self._made(dictionary, part)

            def act(x: Tensor) -> None:
                site.passed[key] = made(x)

            return act

        def write(site: Site, part: Part) -> Act:
            return lambda here: self._placed(here, site.passed[key])

        reading = OnTokens(_named(dictionary), read, dictionary.head, dictionary.d_in, remember, where=self.where)
        head = _head_at(written, dictionary)
        writing = OnTokens(_named(dictionary), written, head, dictionary.d_out, write, where=self.where)
        return HookSpec().intervene(read, reading).intervene(written, writing)

    def here(self, dictionary: Dictionary) -> OnTokens:
        read, written = (_point_of(hook, dictionary) for hook in (dictionary.hook, dictionary.hook_out))
        if read != written:
            raise HookError(f"it reads at {read} what it writes at {written}: take its hooks()")

        def act(site: Site, part: Part) -> Act:
            made = self._made(dictionary, part)
            return lambda x: self._placed(x, made(x))

        return OnTokens(_named(dictionary), written, dictionary.head, dictionary.d_out, act, where=self.where)

    def _one(self) -> Dictionary:
        if isinstance(self.dictionary, TranscoderSet):
            raise HookError("one dictionary is spliced in at a time: give the transcoder of one layer, set.layer(…)")
        return self.dictionary

    def _placed(self, here: Tensor, made: Tensor) -> Tensor:
        return _sum(here, made) if self.error else made.to(here)

    def _made(self, dictionary: Dictionary, part: Part) -> Callable[[Tensor], Tensor]:
        """The function from activations to their reconstruction, or with `error` to what its edit changes."""
        edited = self._edited(dictionary, part)

        def made(x: Tensor) -> Tensor:
            f = dictionary.encode(x)
            if not self.error:
                return dictionary.decode(edited(f), x)
            change, scale = (edited(f) - f) @ dictionary.W_dec, dictionary.output_scale(x)
            return change if scale is None else change * scale

        return made

    def _edited(self, dictionary: Dictionary, part: Part) -> Callable[[Tensor], Tensor]:
        edit = self.edit
        if edit is None:
            return lambda f: f
        if isinstance(edit, Mapping):
            chosen = torch.tensor(_numbers(edit, dictionary), device=dictionary.device)
            values = _Source(dictionary, chosen, list(edit.values()), {}).stacked(part, "value")
            return lambda f: f.index_copy(-1, chosen, values.expand(*f.shape[:-1], len(chosen)))
        if not callable(edit):
            raise HookError(f"edit is a {type(edit).__name__}: values by feature are expected, or a function")
        function = edit

        def apply(f: Tensor) -> Tensor:
            result = function(f.clone())
            if not isinstance(result, Tensor) or result.shape != f.shape:
                given = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise HookError(f"the edit of features [..., feature] gave {given}; {tuple(f.shape)} was expected")
            return result.to(f)

        return apply


def _sum(here: Tensor, written: Tensor) -> Tensor:
    """The sum, in the wider of the two dtypes, as the activation is."""
    return (here + written.to(here.device)).to(here.dtype)


def _joined(changes: Iterable[tuple[HookPoint, NamedIntervention]]) -> HookSpec:
    spec = HookSpec()
    for point, change in changes:
        spec = spec.intervene(point, change)
    return spec


def _narrowed(encoder: Encoder, chosen: Tensor) -> Encoder:
    """The encoder of some of its features, where each is let through by what it is alone."""
    activation = encoder.activation
    of_features = {
        name: None if value is None else value[chosen.to(value.device)]
        for name, value in (
            ("threshold", activation.threshold),
            ("r_mag", activation.r_mag),
            ("b_mag", activation.b_mag),
        )
    }
    return Encoder(
        W_enc=encoder.W_enc[:, chosen],
        b_enc=encoder.b_enc[chosen],
        activation=Activation(kind=activation.kind, **of_features),
        hook=encoder.hook,
        b_in=encoder.b_in,
        input_norm=encoder.input_norm,
        head=encoder.head,
        provenance=encoder.provenance,
    )


def _source_of_layer(
    transcoders: TranscoderSet, layer: int, values: Mapping[int, Value], where: str | None
) -> _Source:
    encoder, chosen = transcoders.encoder(layer), torch.tensor(list(values), device=transcoders.device)
    if not encoder.activation.counted:  # keep what is needed of an encoder, which is large
        encoder, chosen_of_it = _narrowed(encoder, chosen), torch.arange(len(chosen), device=chosen.device)
    else:
        chosen_of_it = chosen
    rows = {
        _written_at(transcoders.hooks_out[target], where, encoder): transcoders.decoder_rows(layer, target, chosen)
        for target in transcoders.targets(layer)
    }
    return _Source(encoder, chosen_of_it, list(values.values()), rows)


def _mapping(features: object) -> Mapping[Feature, Value]:
    if not isinstance(features, Mapping):
        raise HookError(f"a mapping from features to numbers is expected, such as {{7: 3.0}}, not {features!r}")
    return features


def _numbers(features: Iterable[Feature], dictionary: Dictionary) -> list[int]:
    """The features of one dictionary. HookError for those that it does not have, and where there are none."""
    numbers = [_number(feature, dictionary.n_feature, dictionary.provenance.source) for feature in features]
    return _once(numbers)


def _by_layer(features: Mapping[Feature, Value], transcoders: TranscoderSet) -> dict[int, dict[int, Value]]:
    """The features of a set with what is said of them, layer by layer."""
    source = transcoders.provenance.source
    found: dict[int, dict[int, Value]] = {}
    for feature, value in features.items():
        pair = (feature.layer, feature.index) if isinstance(feature, FeatureId) else feature
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise HookError(f"{source} has many layers: FeatureId(layer, feature) is expected, not {feature!r}")
        layer = _number(pair[0], transcoders.n_layers, source, "layer")
        ...
    return found
