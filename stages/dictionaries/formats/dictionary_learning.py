"""dictionary_learning (Marks, Karvonen, Mueller): `ae.pt`, a state dict, beside the `config.json` of its training.

The class that config.json names is read as the library's `load_dictionary` reads it and as its `encode` computes by
default: AutoEncoderTopK takes the top k and not its threshold, BatchTopKSAE and MatryoshkaBatchTopKSAE take their
threshold, and an AutoEncoder's features are scaled so that its decoder's columns have length 1. Facts from 0.1.0.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import nearest
from ..activation import Activation
from ..dictionary import Dictionary, Provenance
from ..errors import DictionaryError
from ..place import Place
from .folding import unified
from .format import Format, Hooks, exactly, read_json, read_pickled
from .modules import Side, hook_of_module

CONFIG, WEIGHTS = "config.json", "ae.pt"
_NO_WEIGHTS = ("k", "threshold", "group_sizes")

_Tensors = Mapping[str, Tensor]
_POINTS = {
    ("resid", "pre"): "hook_resid_pre",
    ("resid", "mid"): "hook_resid_mid",
    ("resid", "post"): "hook_resid_post",
    ("resid", "out"): "hook_resid_post",
    ("attn", "out"): "attn.hook_out",
    ("mlp", "in"): "mlp.hook_in",
    ("mlp", "out"): "mlp.hook_out",
}
_POINT = re.compile(
    r"(?:blocks\.(?P<block>\d+)\.)?(?P<what>resid|attn|mlp)_(?P<side>pre|mid|post|in|out)"
    r"(?:_layer_?(?P<layer>\d+))?"
)


@dataclass(frozen=True, slots=True)
class _Class:
    """A class of the library: tensors that its state dict must have and may have, and the parts of a `Dictionary`."""

    needed: frozenset[str]
    parts: Callable[[_Tensors, int | None], dict[str, Any]]
    optional: frozenset[str] = frozenset()


def _read(place: Place, hooks: Hooks) -> Dictionary:
    path, config_path = place.require(WEIGHTS), place.require(CONFIG)
    config = read_json(config_path)
    trainer = _table(config, "trainer", config_path)
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise DictionaryError(
            f"{config_path}: dict_class {name!r} is not known; known are {', '.join(_CLASSES)}."
            f"{nearest(str(name), _CLASSES)}"
        )
    chosen = _CLASSES[name]
    tensors = _state_dict(path)
    exactly(tensors, chosen.needed, path, optional=chosen.optional)
    tensors |= unified({name: value for name, value in tensors.items() if name not in _NO_WEIGHTS}, path)
    hook, hook_out = _hooks_of(config, config_path, hooks, place)
    try:
        parts = chosen.parts(tensors, _k(tensors, trainer))
    except DictionaryError as error:
        raise DictionaryError(f"{path}: {error}") from error
    return Dictionary(
        **parts,
        hook=hook,
        hook_out=hook_out,
        provenance=Provenance(
            source=place.source,
            format="dictionary-learning",
            revision=place.revision,
            model=trainer.get("lm_name"),
            files=(config_path, path),
            details=config,
        ),
    )


def _table(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    found = config.get(name)
    if not isinstance(found, dict):
        raise DictionaryError(f"{path} has no table {name!r}, as dictionary_learning writes it")
    return found


def _state_dict(path: Path) -> dict[str, Tensor]:
    found = read_pickled(path)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DictionaryError(f"{path} holds no state dict: tensors by their names were expected")
    return {str(name): value.detach() for name, value in found.items()}


def _k(tensors: _Tensors, trainer: Mapping[str, Any]) -> int | None:
    """How many features a token or, on average, the tokens of a batch have: by the weights and by config.json."""
    said = [trainer["k"]] if trainer.get("k") is not None else []
    said += tensors["k"].flatten().tolist() if "k" in tensors else []
    if len(set(said)) > 1 or any(type(k) is not int for k in said):
        raise DictionaryError(f"k is {' and '.join(map(str, said))} by {CONFIG} and by the weights; one number is k")
    return said[0] if said else None


def _relu(tensors: _Tensors, k: int | None) -> dict[str, Any]:
    """x is encoded as relu((x − bias) W + b). The library scales features so that decoder columns have length 1."""
    encoder, b_enc, decoder = (tensors[name] for name in ("encoder.weight", "encoder.bias", "decoder.weight"))
    norms = torch.linalg.vector_norm(decoder, dim=0)
    if not torch.allclose(norms, torch.ones_like(norms)):
        encoder, b_enc, decoder = encoder * norms[:, None], b_enc * norms, decoder / norms
    return {
        "W_enc": encoder.T,
        "b_enc": b_enc,
        "b_in": tensors["bias"],
        "activation": Activation(kind="relu"),
        "W_dec": decoder.T,
        "b_dec": tensors["bias"],
    }


def _relu_of_april(tensors: _Tensors, k: int | None) -> dict[str, Any]:
    return {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "activation": Activation(kind="relu"),
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder.bias"],
    }


def _gated(tensors: _Tensors, k: int | None) -> dict[str, Any]:
    return {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["gate_bias"],
        "b_in": tensors["decoder_bias"],
        "activation": Activation(kind="gated", r_mag=tensors["r_mag"], b_mag=tensors["mag_bias"]),
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder_bias"],
    }


def _jumprelu(tensors: _Tensors, k: int | None) -> dict[str, Any]:
    parts = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return parts | {"activation": Activation(kind="jumprelu", threshold=tensors["threshold"])}


def _linear(tensors: _Tensors, activation: Activation) -> dict[str, Any]:
    return {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "b_in": tensors["b_dec"],
        "activation": activation,
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["b_dec"],
    }


def _topk(tensors: _Tensors, k: int | None) -> dict[str, Any]:
    return _linear(tensors, Activation(kind="topk", k=k))


def _over_threshold(tensors: _Tensors, n_feature: int, k: int | None) -> Activation:
    # never estimated, it is −1, and everything positive passes
    threshold = tensors["threshold"].float()
    if threshold.numel() != 1:
        raise DictionaryError(f"threshold has shape {tuple(threshold.shape)}; one number was expected")
    return Activation(kind="batchtopk", k=k, threshold=threshold.reshape(1).expand(n_feature).clone())


def _batchtopk(tensors: _Tensors, k: int | None) -> dict[str, Any]:
    return _linear(tensors, _over_threshold(tensors, len(tensors["encoder.weight"]), k))


def _matryoshka(tensors: _Tensors, k: int | None) -> dict[str, Any]:
    sizes = tensors["group_sizes"]
    if int(sizes.sum()) != tensors["W_enc"].shape[-1]:
        raise DictionaryError(f"groups of {sizes.tolist()} features do not make {tensors['W_enc'].shape[-1]}")
    parts = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return parts | {"b_in": parts["b_dec"], "activation": _over_threshold(tensors, int(sizes.sum()), k)}


_MATRICES = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
_LAYERS = frozenset({"encoder.weight", "encoder.bias", "decoder.weight"})

_CLASSES: Mapping[Any, _Class] = {
    "AutoEncoder": _Class(_LAYERS | {"bias"}, _relu),
    "AutoEncoderNew": _Class(_LAYERS | {"decoder.bias"}, _relu_of_april),
    "GatedAutoEncoder": _Class(
        frozenset({"encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"}), _gated
    ),
    "JumpReluAutoEncoder": _Class(_MATRICES | {"threshold"}, _jumprelu),
    # Both are buffers that the class got later.
    "AutoEncoderTopK": _Class(_LAYERS | {"b_dec"}, _topk, frozenset({"k", "threshold"})),
    "BatchTopKSAE": _Class(_LAYERS | {"b_dec", "threshold"}, _batchtopk, frozenset({"k"})),
    "MatryoshkaBatchTopKSAE": _Class(_MATRICES | {"threshold", "group_sizes"}, _matryoshka, frozenset({"k"})),
}


def _hooks_of(config: Mapping[str, Any], path: Path, hooks: Hooks, place: Place) -> tuple[str, str]:
    """Where the autoencoder reads and writes, by `submodule_name`, `layer` and the buffer's `io`.

    DictionaryError where they contradict each other, and for a transcoder ("in_and_out"), unless the caller says both.
    """
    if hooks.hook is not None and hooks.hook_out is not None:
        return hooks.hook, hooks.hook_out
    buffer = config.get("buffer")
    io = buffer.get("io") if isinstance(buffer, dict) else None
    if io not in (None, "in", "out"):
        raise DictionaryError(
            f"{path}: io is {io!r}, which is a transcoder: give hook and hook_out, as in "
            'hook="blocks.10.mlp.hook_in", hook_out="blocks.10.mlp.hook_out"'
        )
    if hooks.hook is not None:
        return hooks.choose(place, None)
    trainer = config["trainer"]
    return hooks.choose(place, _hook(str(trainer.get("submodule_name")), trainer.get("layer"), io, path))


def _hook(name: str, layer: Any, io: Side | None, path: Path) -> str | None:
    """The hook point of a name such as "resid_post_layer_12", or of a path of modules; None where it says none."""
    found = _POINT.fullmatch(name)
    if found is None:
        return hook_of_module(name, io or "out")
    kind = _POINTS.get((found["what"], found["side"]))
    layers = {int(said) for said in (found["block"], found["layer"]) if said is not None}
    layers |= {layer} if type(layer) is int else set()
    side = "in" if found["side"] in ("pre", "in") else "out"
    if len(layers) > 1 or (found["side"] != "mid" and io not in (None, side)):
        raise DictionaryError(
            f"{path} says submodule_name {name!r}, layer {layer} and io {io!r}, which contradict each other: give "
            'hook, as in hook="blocks.12.hook_resid_post"'
        )
    return None if kind is None or not layers else f"blocks.{layers.pop()}.{kind}"


FORMAT = Format(recognizes=lambda place: WEIGHTS in place.names, read=_read)
