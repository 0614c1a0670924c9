"""Gemma Scope 2 (Gemma 3): `params.safetensors` beside `config.json`, or one file a layer for cross-layer transcoders.

JumpReLU everywhere, nothing subtracted from the input, no norm. `config.json` names places in transformers' modules
(`hub_names`): a residual stream is read at "model.layers.N.output", heads at "self_attn.o_proj.input", what the MLP
adds at "post_feedforward_layernorm.output"; transcoders read "pre_feedforward_layernorm.output", behind the norm's
weight. Where the file is missing, the name of the folder tells the same. The skip connection is x @
affine_skip_connection.

A `clt` folder, `clt/width_…_l0_…[_affine]`, has `params_layer_{i}.safetensors` for every layer, with `w_dec` [feature,
layer, d_model] of which the rows of layers before its own are not used, and `b_dec` and the skip connection of layer i.
It is opened as a `TranscoderSet`, by headers alone, and rows are read as they are needed. Crosscoders are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..activation import Activation
from ..dictionary import Dictionary, Encoder, Provenance
from ..errors import DictionaryError
from ..place import Place
from ..transcoders import TranscoderSet
from .folding import unified
from .format import Format, Hooks, exactly, read_json, read_safetensors
from .hub_names import ALL_LAYERS, hook_of
from .stored import Stored, finite, safetensors_headers

CONFIG, WEIGHTS, SKIP = "config.json", "params.safetensors", "affine_skip_connection"
_OF_LAYER = re.compile(r"(?:params_layer_(\d+)|layer_(\d+)_[^/]+)\.safetensors")
_TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_LAYER = re.compile(r"(?:^|/)layer_(\d+)_")

FOLDERS = {
    "resid_post": ("output", "output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "clt": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
"""Folder of a repository, also with `_all` behind it → places in a layer that are read and written."""


def _recognizes(place: Place) -> bool:
    return WEIGHTS in place.names or bool(_layer_files(place))


def _layer_files(place: Place) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in place.names:
        if match := _OF_LAYER.fullmatch(name):
            found.setdefault(int(match[1] or match[2]), []).append(name)
    return found


def _read(place: Place, hooks: Hooks) -> Dictionary | TranscoderSet:
    config, files = _config(place)
    return _read_one(place, hooks, config, files) if WEIGHTS in place.names else _open(place, hooks, config, files)


def _config(place: Place) -> tuple[Mapping[str, Any], tuple[Path, ...]]:
    """What is said about a dictionary, by its file or its folder's name. DictionaryError for another architecture."""
    if CONFIG not in place.names:
        return _told_by_folder(place), ()
    path = place.require(CONFIG)
    config = read_json(path)
    if config.get("architecture") != "jump_relu":
        raise DictionaryError(f"{path}: architecture is {config.get('architecture')!r}; 'jump_relu' was expected")
    kind = config.get("type")
    if kind == "crosscoder":
        raise DictionaryError(f"{path}: a crosscoder makes one set of features of several layers; it is not read")
    if kind not in (None, "sae", "transcoder", "clt"):
        raise DictionaryError(f"{path}: type is {kind!r}; 'sae', 'transcoder' or 'clt' was expected")
    return config, (path,)


def _told_by_folder(place: Place) -> Mapping[str, Any]:
    parts = place.text.split("/")
    kinds = [kind for part in parts if (kind := part.removesuffix("_all")) in FOLDERS]
    layer = _LAYER.search(place.text)
    if len(kinds) != 1 or (layer is None and kinds != ["clt"]):
        return {}
    number = ALL_LAYERS if kinds == ["clt"] or layer is None else layer[1]
    inside, outside = FOLDERS[kinds[0]]
    repository = re.search(r"gemma-scope-2-(\w+-(?:pt|it))", place.text)
    return {
        "hf_hook_point_in": f"model.layers.{number}.{inside}",
        "hf_hook_point_out": f"model.layers.{number}.{outside}",
        "model_name": f"gemma-3-{repository[1]}" if repository else None,
    }


def _read_one(place: Place, hooks: Hooks, config: Mapping[str, Any], files: tuple[Path, ...]) -> Dictionary:
    path = place.require(WEIGHTS)
    tensors = read_safetensors(path)
    exactly(tensors, _TENSORS, path, optional=(SKIP,))
    _check_skip(config, SKIP in tensors, path)
    threshold = tensors.pop("threshold")
    tensors = unified(tensors, path)
    hook, hook_out = hooks.choose(place, *_points(config, hooks, place, None))
    return Dictionary(
        W_enc=tensors["w_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["w_dec"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get(SKIP),
        activation=Activation(kind="jumprelu", threshold=threshold),
        hook=hook,
        hook_out=hook_out,
        denormalize=hook == hook_out,
        provenance=_provenance(place, config, (*files, path)),
    )


def _check_skip(config: Mapping[str, Any], has: bool, path: Path) -> None:
    said = config.get("affine_connection", has)
    if bool(said) != has:
        raise DictionaryError(f"{path} has {'a' if has else 'no'} {SKIP}; {CONFIG} says affine_connection {said!r}")


def _points(config: Mapping[str, Any], hooks: Hooks, place: Place, layer: int | None) -> tuple[str | None, str | None]:
    """The hook points read and written that the configuration names, where the caller does not; None for the second
    where both are one.
    """
    said, said_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    found = None if hooks.hook else _point(said, layer, place, "hook")
    if said_out == said:
        return found, None
    return found, None if hooks.hook_out else _point(said_out, layer, place, "hook_out")


def _point(said: Any, layer: int | None, place: Place, keyword: str) -> str | None:
    point = hook_of(str(said), layer) if said is not None else None
    if point is None and said is not None:
        raise DictionaryError(f"{place.source}: {said!r} is no place that forebay knows; give it with {keyword}=")
    return point


def _provenance(place: Place, config: Mapping[str, Any], files: tuple[Path, ...]) -> Provenance:
    return Provenance(
        source=place.source,
        format="gemma-scope-2",
        revision=place.revision,
        model=_model(config.get("model_name")),
        files=files,
        details=dict(config),
    )


def _model(said: Any) -> str | None:
    """The hub's name of a model: some files say v3, and the hub's 270m is the one without "-pt"."""
    if not isinstance(said, str):
        return None
    name = said.replace("-v3", "-3").replace("-270m-pt", "-270m")
    return name if name.startswith("google/") else f"google/{name}"


# ── cross-layer transcoders ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class CrossLayerReader:
    """Reads parts of the files of a `clt` folder, one a layer, which are fetched as they are needed."""

    place: Place
    names: tuple[str, ...]
    config: Mapping[str, Any]
    hooks: tuple[str, ...]
    provenance: Provenance

    def parts(self, layer: int) -> Mapping[str, Stored]:
        """What the file of a layer holds, by its header. DictionaryError for what does not fit together."""
        path = self.place.fetch(self.names[layer])
        found = safetensors_headers(path)
        exactly(found, _TENSORS, path, optional=(SKIP,))
        _check_skip(self.config, SKIP in found, path)
        d_in, width, d_out = ((found[name].shape or (0,))[0] for name in ("w_enc", "w_dec", "b_dec"))
        expected = {
            "w_enc": (d_in, width),
            "b_enc": (width,),
            "threshold": (width,),
            "w_dec": (width, len(self.names), d_out),
            "b_dec": (d_out,),
            SKIP: (d_in, d_out),
        }
        for name, stored in found.items():
            if stored.shape != expected[name]:
                said = f"{path}: {name} has shape {stored.shape}"
                raise DictionaryError(f"{said}; {expected[name]} was expected, of {len(self.names)} layers")
        return found

    def encoder(self, layer: int) -> Encoder:
        parts = self.parts(layer)
        weights = unified({name: parts[name].read() for name in ("w_enc", "b_enc")}, parts["w_enc"].path)
        return Encoder(
            W_enc=weights["w_enc"],
            b_enc=weights["b_enc"],
            activation=Activation(kind="jumprelu", threshold=parts["threshold"].read()),
            hook=self.hooks[layer],
            provenance=self.provenance,
        )

    def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
        stored = self.parts(layer)["w_dec"]
        return finite(stored.rows(features, target), stored)

    def decoder_bias(self, target: int) -> Tensor:
        stored = self.parts(target)["b_dec"]
        return finite(stored.read(), stored)

    def skip(self, layer: int) -> Tensor | None:
        stored = self.parts(layer).get(SKIP)
        return None if stored is None else finite(stored.read(), stored)


def _open(place: Place, hooks: Hooks, config: Mapping[str, Any], files: tuple[Path, ...]) -> TranscoderSet:
    if hooks.hook or hooks.hook_out:
        raise DictionaryError(f"{place.source} is of all layers: its hook points cannot be given, {CONFIG} names them")
    names = _names(place)
    points = [_points(config, hooks, place, layer) for layer in range(len(names))]
    hooks_in, hooks_out = (tuple(hook for hook in found if hook) for found in zip(*points, strict=True))
    if not len(hooks_in) == len(hooks_out) == len(names):
        raise DictionaryError(f"{place.source} has no {CONFIG} that says where it reads and writes")
    local = tuple(place.fetch(name) for name in names if place.repo is None)
    provenance = _provenance(place, config, (*files, *local))
    reader = CrossLayerReader(place, names, config, hooks_in, provenance)
    # Of the hub's files the first is fetched: all layers are of one width, and one that is not is refused when read.
    opened = [reader.parts(layer) for layer in range(len(names) if local else 1)]
    sizes = {(parts["w_enc"].shape[0], parts["b_dec"].shape[0]) for parts in opened}
    if len(sizes) != 1:
        raise DictionaryError(f"{place.source}: layers of one width were expected; theirs are {sorted(sizes)}")
    ((d_in, d_out),) = sizes
    widths = tuple(parts["b_enc"].shape[0] for parts in opened)
    return TranscoderSet(
        reader=reader,
        n_features=widths if local else widths * len(names),
        d_in=d_in,
        d_out=d_out,
        hooks_in=hooks_in,
        hooks_out=hooks_out,
        cross_layer=True,
        provenance=provenance,
    )


def _names(place: Place) -> tuple[str, ...]:
    """One file for each of the layers 0, 1, …; DictionaryError where one is missing or there are two."""
    found = _layer_files(place)
    for layer, names in found.items():
        if len(names) > 1:
            raise DictionaryError(f"{place.source} has {len(names)} files of layer {layer}: {', '.join(sorted(names))}")
    missing = [layer for layer in range(max(found)) if layer not in found]
    if missing:
        raise DictionaryError(f"{place.source} has no file of layer {missing[0]}, and one of layer {max(found)}")
    return tuple(found[layer][0] for layer in range(len(found)))


FORMAT = Format(recognizes=_recognizes, read=_read)
