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
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..models.addressing import Part, Site, address, labelled
from ..models.errors import HookError
from ..models.interventions import Intervention, NamedIntervention, Value
from ..models.points import HookPoint
from ..models.taps import HookSpec
from .chosen import Chosen, Feature, Features, choose, numbers_of, point_of, stacked, written_at
from .dictionary import Dictionary, Encoder
from .transcoders import TranscoderSet

_TOKENS = ("sequence", "position")

_Act: TypeAlias = Callable[[Tensor], Tensor | None]
"""From vectors [..., width] to those that flow on, or None where they stay as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class _Vectors:
    """The vectors of tokens at a hook point, `width` wide, where there are heads laid flat or those of one of them."""

    source: str
    point: HookPoint
    head: int | None
    width: int

    @classmethod
    def of(cls, encoder: Encoder, point: HookPoint, width: int) -> "_Vectors":
        head = encoder.head if point == point_of(encoder.hook, encoder) else None
        return cls(encoder.provenance.source, point, head, width)

    def check(self, site: Site) -> None:
        """HookError for a site that is not of this point, or has other vectors."""
        if site.point != self.point:
            raise HookError(f"{self.source} belongs at {self.point}; hooks() puts it there")
        sizes = {dim: size for dim, size in site.sizes.items() if dim not in _TOKENS}
        if site.point.dims[:2] != _TOKENS or not sizes:
            raise HookError(f"features are those of a token's vector, and there is none here: {labelled(site.sizes)}")
        if self.head is not None:
            n_heads = sizes.pop(next(iter(sizes))) if len(sizes) > 1 else 0
            if not 0 <= self.head < n_heads:
                raise HookError(f"{self.source} is that of head {self.head}; there are {n_heads} here")
        if math.prod(sizes.values()) != self.width:
            raise HookError(f"{self.source} is {self.width} wide here, and this model is {labelled(sizes)}")

    def change(self, value: Tensor, part: Part, act: _Act) -> Tensor:
        """Let a function change the vectors of the tokens of a part, in the value itself."""
        place = value if self.head is None else value.select(2, self.head)
        here = part.read(place)
        new = act(here.flatten(len(part.shape)))
        if new is not None:
            part.write(place, new.reshape(here.shape).to(here))
        return value


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What is made of the vectors at a point."""

    at: _Vectors
    make: Callable[[Part], Callable[[Tensor], Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class _Write:
    """What is put at a point, from the vectors there and from what the reads `takes` made."""

    at: _Vectors
    takes: tuple[int, ...]
    combine: Callable[[Part], Callable[[Tensor, Sequence[Tensor]], Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class AtOnePoint(NamedIntervention):
    """The share of a `FeatureIntervention` at one of its points: `hooks()` makes them. `act` is told the site and the
    part of its tokens.
    """

    vectors: _Vectors
    act: Callable[[Site, Part], _Act]

    def bind(self, site: Site) -> Intervention:
        self.vectors.check(site)
        for dim in self.where:
            if dim not in _TOKENS:
                raise HookError(f"features are those of tokens: .at() takes position and sequence, not {dim}")
        part = address(replace(site, sizes={dim: site.sizes[dim] for dim in _TOKENS}), self.where)
        act, vectors = self.act(site, part), self.vectors
        return lambda value, point: vectors.change(value, part, act)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureIntervention(NamedIntervention):
    """One on features of a dictionary, or of a set of transcoders."""

    dictionary: Dictionary | TranscoderSet

    @abstractmethod
    def plan(self, where: str | None) -> tuple[list[_Read], list[_Write]]:
        """Give what is read and what is written, at which points. Raises as `hooks`."""

    def hooks(self, where: str | None = None) -> HookSpec:
        """Give the `HookSpec` that does this at every point that it takes; `HookSpec.extend` adds it to another.

        With `where` it is written at another kind of point of the same layers than the dictionary's own: with
        "hook_resid_post" into the residual stream after the block, as candle-mi does. Of a set, the encoders and
        decoder rows of the features named are read now, once for all forwards.

        Raises HookError for features that are not there, for hook points of unknown names and where what is to be
        written is read later, and DictionaryError for files that cannot be read; what depends on the model, the
        forward refuses.
        """
        reads, writes = self.plan(where)
        if where is None and _one_point(reads, writes) and isinstance(self.dictionary, Dictionary):
            return HookSpec().intervene(writes[0].at.point, self)
        keys = [object() for _ in reads]
        spec = HookSpec()
        for read, key in zip(reads, keys, strict=True):
            spec = spec.intervene(read.at.point, self._share(read.at, _remembering(read, key)))
        for write in writes:
            for n in write.takes:
                if write.at.point < reads[n].at.point:
                    raise HookError(f"what is read at {reads[n].at.point} comes too late for {write.at.point}")
            taken = [keys[n] for n in write.takes]
            spec = spec.intervene(write.at.point, self._share(write.at, _writing(write, taken)))
        return spec

    def bind(self, site: Site) -> Intervention:
        if isinstance(self.dictionary, TranscoderSet):
            raise HookError("it acts at points of many layers: take its hooks(), which puts it at all of them")
        reads, writes = self.plan(None)
        if not _one_point(reads, writes):
            read, written = reads[0].at.point, writes[0].at.point
            raise HookError(f"it reads at {read} what it writes at {written}: take its hooks(), which puts it at both")

        def act(site: Site, part: Part) -> _Act:
            makes, combine = [read.make(part) for read in reads], writes[0].combine(part)
            return lambda x: combine(x, [make(x) for make in makes])

        return self._share(writes[0].at, act).bind(site)

    def _share(self, vectors: _Vectors, act: Callable[[Site, Part], _Act]) -> AtOnePoint:
        return AtOnePoint(vectors, act, where=self.where)


def _one_point(reads: Sequence[_Read], writes: Sequence[_Write]) -> bool:
    return len({read.at.point for read in reads} | {write.at.point for write in writes}) == 1


def _remembering(read: _Read, key: object) -> Callable[[Site, Part], _Act]:
    def act(site: Site, part: Part) -> _Act:
        make = read.make(part)

        def remember(x: Tensor) -> None:
            site.passed[key] = make(x)

        return remember

    return act


def _writing(write: _Write, keys: Sequence[object]) -> Callable[[Site, Part], _Act]:
    def act(site: Site, part: Part) -> _Act:
        combine = write.combine(part)
        return lambda here: combine(here, [site.passed[key] for key in keys])

    return act


@dataclass(frozen=True, slots=True, eq=False)
class _OfSome(FeatureIntervention):
    """One that changes how strongly some features write, and leaves all else, with what no feature explains."""

    @abstractmethod
    def said(self) -> tuple[str, Features, bool]:
        """What is said of the features: its name, it itself, and whether their activations are taken from it."""

    def plan(self, where: str | None) -> tuple[list[_Read], list[_Write]]:
        noun, values, encodes = self.said()
        if not isinstance(values, Mapping):
            raise HookError(f"a mapping from features to {noun}s is expected, such as {{7: 3.0}}, not {values!r}")
        chosen = choose(self.dictionary, values, where)
        # What changes by a number that is given, and is written as it is, is known without reading.
        reading = encodes or any(one.scale is not None for one in chosen)
        reads = [_change_of(one, noun, encodes) for one in chosen] if reading else []
        points = sorted({point for one in chosen for point in one.rows})
        return reads, [_sum_at(point, chosen, noun, reading) for point in points]


def _change_of(chosen: Chosen, noun: str, encodes: bool) -> _Read:
    """Reads by how much features are to change [..., chosen]."""

    def make(part: Part) -> Callable[[Tensor], Tensor]:
        values = chosen.stacked(part, noun)

        def change(x: Tensor) -> Tensor:
            by = values - chosen.encode(x) if encodes else values
            return by if chosen.scale is None else by * chosen.scale(x)

        return change

    encoder = chosen.encoder
    return _Read(_Vectors.of(encoder, point_of(encoder.hook, encoder), encoder.d_in), make)


def _sum_at(point: HookPoint, chosen: Sequence[Chosen], noun: str, reading: bool) -> _Write:
    """Writes at a point what features of several layers write there, by the changes read or else by their values."""
    takes = tuple(n for n, one in enumerate(chosen) if point in one.rows)
    rows = [chosen[n].rows[point] for n in takes]

    def combine(part: Part) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
        given = [] if reading else [chosen[n].stacked(part, noun) for n in takes]

        def add(here: Tensor, changes: Sequence[Tensor]) -> Tensor:
            for by, of_layer in zip(given or changes, rows, strict=True):
                here = here + (by @ of_layer).to(here.device)
            return here

        return add

    vectors = _Vectors.of(chosen[takes[0]].encoder, point, rows[0].shape[-1])
    return _Write(vectors, takes if reading else (), combine)


@dataclass(frozen=True, slots=True, eq=False)
class Inject(_OfSome):
    """Adds strength · decoder row of every feature named: `features` maps features to strengths, in units of their
    activation (where the dictionary undoes a norm of its input, rows are multiplied as in decoding).

    A strength is a finite number, or real numbers that broadcast to the tokens addressed, [sequence, position]; below 0
    it pushes the other way, whatever the activation is. Features are numbers, those of a set `FeatureId` or (layer,
    number): these are written in every layer in which the set has them write.

    Sources: steering with decoder rows, as in SAELens; candle-mi's prepare_hook_injection.
    """

    features: Features

    def said(self) -> tuple[str, Features, bool]:
        return "strength", self.features, False


@dataclass(frozen=True, slots=True, eq=False)
class Clamp(_OfSome):
    """Sets features to values: adds (value − activation) · decoder row of each, and leaves all else as it is, with what
    the dictionary does not explain. `features` maps features to values, which are what strengths are to `Inject`.

    The activation is that which the forward has when it comes there, after what was done in earlier layers. Of a
    set that writes across layers, the share of every later layer is corrected too.
    """

    features: Features

    def said(self) -> tuple[str, Features, bool]:
        return "value", self.features, True


@dataclass(frozen=True, slots=True, eq=False)
class Suppress(_OfSome):
    """Takes out what features write: `Clamp` to 0. A feature that does not fire changes nothing.

    To subtract a constant whatever fires, which is candle-mi's suppression, `Inject` with a strength below 0.
    """

    features: Sequence[Feature]

    def said(self) -> tuple[str, Features, bool]:
        try:
            features = list(self.features)
        except TypeError:
            raise HookError(f"a list of features is expected, such as [7], not {self.features!r}") from None
        values = dict.fromkeys(features, 0.0)
        if len(values) < len(features):
            raise HookError(f"a feature is named twice in {features}")
        return "value", values, True


@dataclass(frozen=True, slots=True, eq=False)
class Splice(FeatureIntervention):
    """Puts the reconstruction in place of the activation at `hook_out`. With `error` what the dictionary does not
    explain is kept, so that only what `edit` does to the features has an effect.

    `edit`: values by feature, as `Clamp` takes them, or a function from the features [..., feature] of the tokens
    addressed to others of the same shape. With f the features and f′ the edited ones, decode(f′) flows on, or with
    `error` decode(f′) + x − decode(f), computed as x + (f′ − f) W_dec: without an edit the activation as it was.
    """

    error: bool = field(default=False, kw_only=True)
    edit: Mapping[int, Value] | Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)

    def plan(self, where: str | None) -> tuple[list[_Read], list[_Write]]:
        dictionary = self.dictionary
        if isinstance(dictionary, TranscoderSet):
            raise HookError("one dictionary is spliced in at a time: give the transcoder of one layer, set.layer(…)")
        edited = _edited(self.edit, dictionary)
        of_errors = self.error

        def make(part: Part) -> Callable[[Tensor], Tensor]:
            edit = edited(part)

            def made(x: Tensor) -> Tensor:
                f = dictionary.encode(x)
                if not of_errors:
                    return dictionary.decode(edit(f), x)
                return (edit(f) - f) @ dictionary.W_dec * dictionary.output_scale(x)

            return made

        def combine(part: Part) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
            return lambda here, made: here + made[0].to(here.device) if of_errors else made[0].to(here.device)

        read = _Vectors.of(dictionary, point_of(dictionary.hook, dictionary), dictionary.d_in)
        written = _Vectors.of(dictionary, written_at(dictionary.hook_out, where, dictionary), dictionary.d_out)
        return [_Read(read, make)], [_Write(written, (0,), combine)]


def _edited(
    edit: Mapping[int, Value] | Callable[[Tensor], Tensor] | None, dictionary: Dictionary
) -> Callable[[Part], Callable[[Tensor], Tensor]]:
    """For a part of the tokens, the function from its features to the edited ones."""
    if edit is None:
        return lambda part: lambda f: f
    if isinstance(edit, Mapping):
        features = torch.tensor(numbers_of(edit, dictionary), device=dictionary.device)

        def clamping(part: Part) -> Callable[[Tensor], Tensor]:
            values = stacked(edit.values(), part, "value", dictionary)
            return lambda f: f.index_copy(-1, features, values.expand(*f.shape[:-1], len(features)))

        return clamping
    if not callable(edit):
        raise HookError(f"edit is a {type(edit).__name__}: values by feature are expected, or a function of features")

    def called(f: Tensor) -> Tensor:
        result = edit(f.clone())
        if not isinstance(result, Tensor) or result.shape != f.shape:
            found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise HookError(f"the edit of features of shape {tuple(f.shape)} gave {found}: the same shape is expected")
        return result.to(f)

    return lambda part: called
