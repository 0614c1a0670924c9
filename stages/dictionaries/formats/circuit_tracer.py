"""circuit-tracer (Hanna, Piotrowski and others): sets of transcoders, one a layer or cross-layer ones, read lazily.

`config.yaml` says which of both they are, at which kinds of hook points they read and write, and may list where the
file of each layer lies. Per layer: `layer_{i}.safetensors`, or of the list also Gemma Scope's .npz files and those of
Gemma Scope 2. Cross-layer: `W_enc_{i}.safetensors` and `W_dec_{i}.safetensors`. Facts from circuit-tracer 0.5.0, and
what `activation` means from its development of April 2026.

Two things are known to differ. Its TopK lets negative preactivations through where a token has fewer than k positive
ones; here they are absent. And TransformerLens' `ln2.hook_normalized` lies behind the weight of a LayerNorm and before
that of an RMSNorm; here it lies before both, which is what sets of models with RMSNorm mean.
"""

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...models.errors import nearest
from ..activation import Activation, Kind
from ..dictionary import Encoder, Provenance
from ..errors import DictionaryError
from ..place import Place, find
from ..transcoders import TranscoderSet
from .circuit_tracer_writing import CONFIG, write
from .folding import unified
from .format import Format, Hooks, exactly
from .modules import at_every_layer
from .stored import Stored, finite, npz_headers, safetensors_headers

MOST_CONFIG_BYTES = 2**20
MOST_LAYERS = 1024
MOST_DEPTH = 64

_REFERENCE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)/(?P<path>[\w./=+-]+)(?:\?revision=(?P<revision>[\w./-]+))?")
_ACTIVATIONS: Mapping[Any, Kind] = {"relu": "relu", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk"}

_Parts = Mapping[str, Stored]
_DIMS: Mapping[str, tuple[str, ...]] = {
    "b_enc": ("feature",),
    "b_dec": ("d_out",),
    "W_enc": ("d_in", "feature"),
    "W_dec": ("feature", "d_out"),
    "W_dec of every target": ("feature", "target", "d_out"),
    "threshold": ("feature",),
    "W_skip": ("d_in", "d_out"),
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the tensors of a layer are called in a file, part → name, and which of them it keeps transposed."""

    names: Mapping[str, str]
    transposed: frozenset[str]


_NAMES = {part: part for part in ("b_enc", "b_dec", "W_enc", "W_dec", "threshold", "W_skip")}
_OWN = _Layout(_NAMES | {"threshold": "activation_function.threshold"}, frozenset({"W_enc", "W_skip"}))
_GEMMA_SCOPE = _Layout(_NAMES, frozenset())
_GEMMA_SCOPE_2 = _Layout(_NAMES | {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}, frozenset())


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a place, which is fetched when it is needed."""

    place: Place
    name: str

    def headers(self) -> tuple[Path, _Parts]:
        path = self.place.fetch(self.name)
        return path, npz_headers(path) if path.suffix == ".npz" else safetensors_headers(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader(ABC):
    """What readers of both kinds of sets have: the activation, the hook points that are read, the sizes."""

    kind: Kind
    k: int | None
    hooks: tuple[str, ...]
    n_features: tuple[int, ...]
    d_in: int
    d_out: int
    provenance: Provenance

    @abstractmethod
    def found(self, layer: int) -> _Parts:
        """The parts of a layer that the file of its encoder holds, by its header."""

    def parts(self, layer: int) -> _Parts:
        """The same. DictionaryError unless they fit each other and the rest of the set."""
        found = self.found(layer)
        _fit(found, feature=self.n_features[layer], d_in=self.d_in, d_out=self.d_out)
        return found

    def encoder(self, layer: int) -> Encoder:
        parts = self.parts(layer)
        threshold = parts["threshold"].read().float() if "threshold" in parts else None
        if threshold is not None and bool((threshold < 0).any()):
            raise DictionaryError(
                f"{parts['threshold'].path}: layer {layer} has thresholds below 0, where circuit-tracer lets negative "
                "preactivations through; no JumpReLU of forebay's does"
            )
        weights = unified({name: parts[name].read() for name in ("W_enc", "b_enc")}, parts["W_enc"].path)
        return Encoder(
            W_enc=weights["W_enc"],
            b_enc=weights["b_enc"],
            activation=Activation(kind=self.kind, k=self.k, threshold=threshold),
            hook=self.hooks[layer],
            provenance=self.provenance,
        )

    @abstractmethod
    def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
        """Read rows [feature, d_out] of what the features of `layer` write at `target`, and no others."""

    def decoder_bias(self, target: int) -> Tensor:
        stored = self.parts(target)["b_dec"]
        return finite(stored.read(), stored)

    def skip(self, layer: int) -> Tensor | None:
        stored = self.parts(layer).get("W_skip")
        return None if stored is None else finite(stored.read(), stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PerLayer(_Reader):
    """Reads a set of one file a layer."""

    files: tuple[_File, ...]

    def found(self, layer: int) -> _Parts:
        return _parts_of_layer(self.files[layer], self.kind)

    def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
        stored = self.parts(layer)["W_dec"]
        return finite(stored.rows(features), stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class _CrossLayer(_Reader):
    """Reads a set with two files a layer: its encoder, and what its features write at this and every later layer."""

    place: Place

    def found(self, layer: int) -> _Parts:
        return _parts_of_encoder(_File(self.place, f"W_enc_{layer}.safetensors"), layer, self.kind)

    def decoder(self, layer: int) -> Stored:
        """W_dec of a layer [feature, target, d_out], by the header of its file."""
        name = f"W_dec_{layer}"
        path, headers = _File(self.place, f"{name}.safetensors").headers()
        exactly(headers, [name], path)
        targets = len(self.hooks) - layer
        _fit({"W_dec of every target": headers[name]}, feature=self.n_features[layer], target=targets, d_out=self.d_out)
        return headers[name]

    def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
        stored = self.decoder(layer)
        return finite(stored.rows(features, target - layer), stored)


def _fit(parts: _Parts, **known: int) -> Mapping[str, int]:
    """The sizes of dimensions by the shapes of parts. DictionaryError where two of them, or known ones, differ."""
    sizes = dict(known)
    for part, stored in parts.items():
        expected = tuple(sizes.setdefault(dim, n) for dim, n in zip(_DIMS[part], stored.shape, strict=False))
        if expected != stored.shape or len(expected) != len(_DIMS[part]):
            turn = slice(None, None, -1 if stored.transposed else 1)
            raise DictionaryError(
                f"{stored.path}: {stored.name} has shape {stored.shape[turn]}; {expected[turn]} was expected, "
                f"{' by '.join(_DIMS[part][turn])}"
            )
    return sizes


def _parts_of_layer(file: _File, kind: str) -> _Parts:
    """The parts of a transcoder of one layer, by the header of its file."""
    path, headers = file.headers()
    layout = _GEMMA_SCOPE if path.suffix == ".npz" else _GEMMA_SCOPE_2 if "w_enc" in headers else _OWN
    unneeded = {"W_skip"} if kind == "jumprelu" else {"W_skip", "threshold"}
    optional = [layout.names["W_skip"], *(["k"] if kind == "topk" else [])]
    exactly(headers, [name for part, name in layout.names.items() if part not in unneeded], path, optional=optional)
    found = {part: headers[name] for part, name in layout.names.items() if name in headers}
    return {part: stored.T if part in layout.transposed else stored for part, stored in found.items()}


def _parts_of_encoder(file: _File, layer: int, kind: str) -> _Parts:
    """The parts of one layer of a cross-layer set that lie beside its encoder, by the header of that file."""
    path, headers = file.headers()
    parts = ("b_enc", "b_dec", "W_enc", *(["threshold"] if kind == "jumprelu" else []))
    exactly(headers, [f"{part}_{layer}" for part in parts], path)
    found = {part: headers[f"{part}_{layer}"] for part in parts}
    return found | {"W_enc": found["W_enc"].T}


def _read(place: Place, hooks: Hooks) -> TranscoderSet:
    path = place.fetch(CONFIG) if CONFIG in place.names else None
    config = _read_yaml(path) if path else {"model_kind": "cross_layer_transcoder"}
    kind = str(config.get("model_kind"))
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise DictionaryError(
            f"{place.source}: model_kind {kind!r} of {CONFIG} is not known; known are {known}.{nearest(kind, _KINDS)}"
        )
    said = hooks.hook or config.get("feature_input_hook"), hooks.hook_out or config.get("feature_output_hook")
    if not all(isinstance(one, str) for one in said):
        raise DictionaryError(
            f"{place.source} does not say at which hook points it reads and writes; give them, as in "
            'hook="blocks.*.hook_resid_mid", hook_out="blocks.*.hook_mlp_out"'
        )
    return _KINDS[kind](place, config, [path] if path else [], *map(str, said))


def _open_per_layer(
    place: Place, config: Mapping[str, Any], paths: Sequence[Path], hook: str, hook_out: str
) -> TranscoderSet:
    listed = config.get("transcoders")
    files = _listed(listed, place) if listed is not None else _numbered(place, r"layer_(\d+)\.safetensors")
    first, headers = files[0].headers()
    kind, k = _activation(config, {"threshold", "activation_function.threshold"} & headers.keys(), place)
    sizes = _fit(_parts_of_layer(files[0], kind))
    local = [file.place.fetch(file.name) for file in files if file.place.repo is None]
    known = {"d_in": sizes["d_in"], "d_out": sizes["d_out"]}
    n_features = tuple(
        _fit(_parts_of_layer(file, kind), **known)["feature"] if file.place.repo is None else sizes["feature"]
        for file in files
    )
    reader = _PerLayer(
        kind=kind,
        k=k,
        hooks=at_every_layer(hook, len(files)),
        n_features=n_features,
        **known,
        provenance=_provenance(place, config, [*paths, first, *local]),
        files=files,
    )
    return _set(reader, hook_out, cross_layer=False)


def _open_cross_layer(
    place: Place, config: Mapping[str, Any], paths: Sequence[Path], hook: str, hook_out: str
) -> TranscoderSet:
    if "transcoders" in config:
        raise DictionaryError(f"{place.source} lists the files of a cross-layer set of Gemma Scope 2: name its folder")
    encoders = _numbered(place, r"W_enc_(\d+)\.safetensors")
    decoders = _numbered(place, r"W_dec_(\d+)\.safetensors", len(encoders))
    first, headers = encoders[0].headers()
    kind, _ = _activation(config, {"threshold_0"} & headers.keys(), place)
    if kind == "topk":
        raise DictionaryError(f"{place.source}: circuit-tracer knows no cross-layer transcoders with {kind}")
    sizes = _fit(_parts_of_encoder(encoders[0], 0, kind))
    known = {"d_in": sizes["d_in"], "d_out": sizes["d_out"]}
    n_features = [sizes["feature"]] * len(encoders)
    here = place.repo is None  # what lies on the hub is checked when it is fetched, layer by layer
    if here:
        n_features = [_fit(_parts_of_encoder(file, i, kind), **known)["feature"] for i, file in enumerate(encoders)]
    reader = _CrossLayer(
        kind=kind,
        k=None,
        hooks=at_every_layer(hook, len(encoders)),
        n_features=tuple(n_features),
        **known,
        provenance=_provenance(
            place, config, [*paths, first, *(place.fetch(file.name) for file in (*encoders, *decoders) if here)]
        ),
        place=place,
    )
    for layer in range(len(encoders) if here else 0):
        reader.decoder(layer)
    return _set(reader, hook_out, cross_layer=True)


_KINDS = {"transcoder_set": _open_per_layer, "cross_layer_transcoder": _open_cross_layer}


def _set(reader: _Reader, hook_out: str, cross_layer: bool) -> TranscoderSet:
    return TranscoderSet(
        reader=reader,
        n_features=reader.n_features,
        d_in=reader.d_in,
        d_out=reader.d_out,
        hooks_in=reader.hooks,
        hooks_out=at_every_layer(hook_out, len(reader.hooks)),
        cross_layer=cross_layer,
        provenance=reader.provenance,
    )


def _provenance(place: Place, config: Mapping[str, Any], files: Sequence[Path]) -> Provenance:
    """Where a set comes from; of what the configuration says, lines of one value, and the list of files."""
    plain = {str(name): value for name, value in config.items() if isinstance(value, str | int | float | bool)}
    listed = {"transcoders": config["transcoders"]} if "transcoders" in config else {}
    return Provenance(
        source=place.source,
        format="circuit-tracer",
        revision=place.revision,
        model=config.get("model_name") if isinstance(config.get("model_name"), str) else None,
        files=tuple(dict.fromkeys(files)),
        details=plain | listed,
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """A table in YAML, of plain values only. DictionaryError for anything else, tags that name Python's among them."""
    import yaml

    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise DictionaryError(f"{path} is larger than {MOST_CONFIG_BYTES:,} bytes, as no configuration is")
    text = path.read_bytes()
    if _deepest(text) > MOST_DEPTH:  # which takes YAML's reader the square of it
        raise DictionaryError(f"{path} has lists or tables more than {MOST_DEPTH} deep")
    try:
        # A few kilobytes of aliases of aliases would be gigabytes once they are written out.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise DictionaryError(f"{path} has aliases, which stand for other parts of it; write the values out")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, DictionaryError):
            raise
        raise DictionaryError(f"{path} is not readable as YAML of plain values: {error}") from error
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} holds {type(config).__name__}; a table was expected")
    return config


def _deepest(text: bytes) -> int:
    """How many brackets are open at most."""
    steps = (1 if one in b"[{" else -1 for one in text if one in b"[]{}")
    return max(itertools.accumulate(steps), default=0)


def _activation(config: Mapping[str, Any], thresholds: Collection[str], place: Place) -> tuple[Kind, int | None]:
    """The kind of activation and its k: JumpReLU where there are thresholds, else ReLU, unless the file says it."""
    said, k = config.get("activation", "jumprelu" if thresholds else "relu"), config.get("k")
    if not isinstance(said, str) or said not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise DictionaryError(f"{place.source}: activation {said!r} of {CONFIG} is not known; known are {known}")
    kind = _ACTIVATIONS[said]
    if (kind == "jumprelu") != bool(thresholds):
        have = f"has {', '.join(thresholds)}" if thresholds else "has no thresholds"
        raise DictionaryError(f"{place.source}: {CONFIG} says activation {said!r}, and layer 0 {have}")
    if kind == "topk" and (type(k) is not int or k < 1):
        raise DictionaryError(f"{place.source}: {CONFIG} says activation 'topk', and k is {k!r}")
    return kind, k if kind == "topk" else None


def _numbered(place: Place, pattern: str, n_layers: int | None = None) -> tuple[_File, ...]:
    """The files of layers 0, 1, … DictionaryError where one is missing."""
    found = {int(match[1]): name for name in place.names if (match := re.fullmatch(pattern, name))}
    shown = pattern.replace(r"(\d+)\.", "{i}.")
    if not found:
        raise DictionaryError(f"{place.source} has no files {shown}")
    missing = sorted(set(range(n_layers or max(found) + 1)) ^ found.keys())
    if missing or len(found) > MOST_LAYERS:
        have = f"has {len(found)} files {shown}, from {min(found)} to {max(found)}"
        raise DictionaryError(f"{place.source} {have}; every layer from 0 on must be there. Look at {missing[:8]}")
    return tuple(_File(place, found[layer]) for layer in range(len(found)))


def _listed(listed: Any, place: Place) -> tuple[_File, ...]:
    """The files of a list: references to the hub, or names of files of the place."""
    if not isinstance(listed, list) or not 0 < len(listed) <= MOST_LAYERS:
        raise DictionaryError(
            f"{place.source}: `transcoders` of {CONFIG} is no list of the files of at least one layer"
        )
    places: dict[tuple[str, str | None], Place] = {}
    files = []
    for entry in listed:
        match = _REFERENCE.fullmatch(entry) if isinstance(entry, str) else None
        if match is not None:
            key = match["repo"], match["revision"]
            places[key] = places.get(key) or find(f"hf://{key[0]}", key[1])
        file = _File(places[key], match["path"]) if match is not None else _File(place, str(entry))
        if not isinstance(entry, str) or file.name not in file.place.names:
            raise DictionaryError(
                f"{place.source}: {CONFIG} lists {entry!r}, which is no file of {file.place.source}; references are "
                f"hf://org/repo/path?revision=…, or files of the folder itself.{nearest(file.name, file.place.names)}"
            )
        files.append(file)
    return tuple(files)


def _recognizes(place: Place) -> bool:
    return CONFIG in place.names or {"W_enc_0.safetensors", "W_dec_0.safetensors"} <= set(place.names)


FORMAT = Format(recognizes=_recognizes, read=_read, write=write)
