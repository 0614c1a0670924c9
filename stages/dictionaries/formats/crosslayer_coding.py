"""crosslayer-coding (Tigges): checkpoints of cross-layer transcoders, one safetensors file beside `cfg.json`.

ReLU and JumpReLU, decoders of every pair of layers or tied by source or by target, scales of features, and activations
that were standardised by mean and standard deviation, where `norm_stats.json` of the activations' folder is copied
beside the checkpoint: its constants are folded into the weights. What one layer's features alone do not decide is
refused: TopK and BatchTopK as they are trained rank among a batch, offsets of features are no linear decoder, and its
skip connections read the inputs of all layers. Facts from the library's source, of June 2025.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation
from ..dictionary import Encoder, Provenance
from ..errors import DictionaryError
from ..place import Place
from ..transcoders import TranscoderSet
from .format import Format, Hooks, exactly, read_json
from .modules import at_every_layer, hook_of_module
from .stored import Stored, finite, safetensors_headers

CONFIG, STATISTICS = "cfg.json", "norm_stats.json"
LATEST = "clt_checkpoint_latest.safetensors"
EPSILON = 1e-6
"""What the library adds to every standard deviation."""

_CHECKPOINT = re.compile(r"(?:clt_checkpoint_\w+|model|full_model|clt)\.safetensors")
_SHARD = re.compile(r"rank_\d+_model\.(?:pt|safetensors)")
_THRESHOLDS = "theta_manager.log_threshold"
_SIZES = ("num_layers", "num_features", "d_model")
_TYINGS = ("none", "per_source", "per_target")

# What a configuration may say → why it is refused, or None.
_ACTIVATIONS: Mapping[Any, str | None] = {
    "relu": None,
    "jumprelu": None,
    "topk": "its TopK ranks preactivations by their mean and deviation among a batch",
    "batchtopk": "its BatchTopK chooses among a batch; convert it with the library's convert_batchtopk_to_jumprelu.py",
}
_NORMS: Mapping[Any, str | None] = {
    **dict.fromkeys(("none", "mean_std", "auto", "estimated_mean_std")),
    "sqrt_d_model": "how targets are scaled with it is not known",
}
_OPTIONS = {
    "skip_connection": "the output at a layer takes the inputs of all layers up to it",
    "enable_feature_offset": "what is added for every feature that fires is no linear decoder",
    "per_target_scale": "it is of an older version",
    "per_target_bias": "it is of an older version",
    "sqrt_d_model_normalize": "how targets are scaled with it is not known",
}


@dataclass(frozen=True, slots=True, eq=False)
class _Standard:
    """Mean and standard deviation [d_model], float64, by which activations at one point were standardised."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reader:
    """Reads a checkpoint. `inputs` and `targets` are by what activations were standardised, layer by layer, or None:
    what is folded comes in float32.
    """

    place: Place
    name: str
    tying: str
    hooks: tuple[str, ...]
    inputs: tuple[_Standard, ...] | None
    targets: tuple[_Standard, ...] | None
    provenance: Provenance

    def encoder(self, layer: int) -> Encoder:
        tensors = self.tensors()
        weight, bias = _linear(tensors, f"encoder_module.encoders.{layer}")
        W_enc, b_enc = weight.T.read(), bias.read()
        if self.inputs is not None:
            wide = W_enc.double() / self.inputs[layer].deviation[:, None]
            W_enc, b_enc = wide.float(), (b_enc.double() - self.inputs[layer].mean @ wide).float()
        threshold = None
        if _THRESHOLDS in tensors:
            threshold = tensors[_THRESHOLDS].rows(slice(layer, layer + 1))[0].float().exp()
        return Encoder(
            W_enc=W_enc,
            b_enc=b_enc,
            activation=Activation(kind="relu" if threshold is None else "jumprelu", threshold=threshold),
            hook=self.hooks[layer],
            provenance=self.provenance,
        )

    def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
        tensors = self.tensors()
        weight, _ = _linear(tensors, f"decoder_module.decoders.{_decoder(self.tying, layer, target)}")
        rows = finite(weight.T.rows(features), weight)
        scale = tensors.get(f"decoder_module.feature_scale.{target}")
        if scale is not None:
            rows = rows.float() * finite(scale.read(), scale).float()[features, None]
        return rows if self.targets is None else (rows.double() * self.targets[target].deviation).float()

    def decoder_bias(self, target: int) -> Tensor:
        """The sum of the biases of all decoders that write at a layer; tied by target, they are one."""
        tensors = self.tensors()
        keys = dict.fromkeys(_decoder(self.tying, layer, target) for layer in range(target + 1))
        biases = [_linear(tensors, f"decoder_module.decoders.{key}")[1] for key in keys]
        total = torch.stack([finite(bias.read(), bias).float() for bias in biases]).sum(0)
        if self.targets is None:
            return total
        return (total.double() * self.targets[target].deviation + self.targets[target].mean).float()

    def skip(self, layer: int) -> Tensor | None:
        return None

    def tensors(self) -> Mapping[str, Stored]:
        return safetensors_headers(self.place.fetch(self.name))


def _linear(tensors: Mapping[str, Stored], name: str) -> tuple[Stored, Stored]:
    """Weight [out, in] and bias [out] of a linear map."""
    return tensors[f"{name}.weight"], tensors[f"{name}.bias_param"]


def _decoder(tying: str, layer: int, target: int) -> str:
    """What the decoder from a layer to a target is called."""
    return {"none": f"{layer}->{target}", "per_source": str(layer), "per_target": str(target)}[tying]


def _read(place: Place, hooks: Hooks) -> TranscoderSet:
    name = _checkpoint(place)
    path, config_path = place.fetch(name), place.fetch(CONFIG)
    if not config_path.is_file():
        raise DictionaryError(f"{place.source}: there is no {CONFIG} beside it")
    config = read_json(config_path)
    _refuse(config, config_path)
    n_layers, n_features, d_model = (_size(config, key, config_path) for key in _SIZES)
    _check(safetensors_headers(path), _shapes(config, n_layers, n_features, d_model), path)
    hooks_in = _hooks(hooks.hook, config, "input", n_layers, place)
    hooks_out = _hooks(hooks.hook_out, config, "output", n_layers, place)
    statistics = _statistics(place, config, n_layers, d_model)
    provenance = Provenance(
        source=place.source,
        format="crosslayer-coding",
        revision=place.revision,
        model=config.get("model_name"),
        files=(config_path, path, *([place.fetch(STATISTICS)] if statistics else [])),
        details=config,
    )
    reader = _Reader(
        place=place,
        name=name,
        tying=config.get("decoder_tying", "none"),
        hooks=hooks_in,
        inputs=statistics[0] if statistics else None,
        targets=statistics[1] if statistics else None,
        provenance=provenance,
    )
    return TranscoderSet(
        reader=reader,
        n_features=(n_features,) * n_layers,
        d_in=d_model,
        d_out=d_model,
        hooks_in=hooks_in,
        hooks_out=hooks_out,
        cross_layer=True,
        provenance=provenance,
    )


def _checkpoint(place: Place) -> str:
    """The name of the checkpoint: the file that was named, the latest, or the only one."""
    found = [name for name in place.names if _CHECKPOINT.fullmatch(name)]
    if LATEST in found:
        return LATEST
    if len(found) == 1:
        return found[0]
    if found:
        raise DictionaryError(f"{place.source} has the checkpoints {', '.join(found)}: name one of these files")
    raise DictionaryError(
        f"{place.source} has no checkpoint in one safetensors file, which clt_checkpoint_latest.safetensors or "
        "model.safetensors would be; shards of ranks are put together by the library's merge_tp_checkpoint.py"
    )


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    """DictionaryError for what a configuration asks for and cannot be reproduced, with the reason."""
    tying = config.get("decoder_tying", "none")
    activation = config.get("activation_fn", "jumprelu")
    norm = config.get("normalization_method", "none")
    reasons = {
        f"activation_fn {activation!r}": _ACTIVATIONS.get(str(activation), "it is not known"),
        f"decoder_tying {tying!r}": None if tying in _TYINGS else f"known are {', '.join(_TYINGS)}",
        f"normalization_method {norm!r}": _NORMS.get(str(norm), "it is not known"),
    }
    reasons |= {name: reason for name, reason in _OPTIONS.items() if config.get(name)}
    if tying == "none" and config.get("enable_feature_scale"):
        reasons["enable_feature_scale"] = "with a decoder for every pair of layers versions differ in what it does"
    for what, reason in reasons.items():
        if reason is not None:
            raise DictionaryError(f"{path} says {what}, which forebay does not reproduce: {reason}")


def _size(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise DictionaryError(f"{path}: {name} is {value!r}; a number from 1 on was expected")
    return value


def _shapes(config: Mapping[str, Any], n_layers: int, n_features: int, d_model: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds, with its shape."""
    tying, layers = config.get("decoder_tying", "none"), range(n_layers)
    decoders = dict.fromkeys(_decoder(tying, layer, target) for layer in layers for target in range(layer, n_layers))
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        shapes[f"encoder_module.encoders.{layer}.weight"] = (n_features, d_model)
        shapes[f"encoder_module.encoders.{layer}.bias_param"] = (n_features,)
    for key in decoders:
        shapes[f"decoder_module.decoders.{key}.weight"] = (d_model, n_features)
        shapes[f"decoder_module.decoders.{key}.bias_param"] = (d_model,)
    if config.get("activation_fn", "jumprelu") == "jumprelu":
        shapes[_THRESHOLDS] = (n_layers, n_features)
    if config.get("enable_feature_scale"):
        shapes |= {f"decoder_module.feature_scale.{target}": (n_features,) for target in layers}
    return shapes


def _check(tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    exactly(tensors, shapes, path)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise DictionaryError(f"{path}: {name} has shape {tensors[name].shape}; by {CONFIG} it is {shape}")


def _hooks(asked: str | None, config: Mapping[str, Any], side: str, n_layers: int, place: Place) -> tuple[str, ...]:
    """The hook points of one side: as the caller says, or by the template of the modules that were captured.

    Templates of TransformerLens' names are labels, which its library does not capture by; ln2.hook_normalized lies
    behind the weight of a LayerNorm there, so that it is not taken for forebay's.
    """
    template, label = (config.get(f"{where}_{side}_template") for where in ("mlp", "tl"))
    if asked is not None:
        return at_every_layer(asked, n_layers)
    if isinstance(template, str):
        path, _, end = template.rpartition(".")
        path, end = (path, end) if end in ("input", "output") else (template, side)
        found = [hook_of_module(path.replace("{}", str(i)), "in" if end == "input" else "out") for i in range(n_layers)]
        if all(found):
            return tuple(map(str, found))
    elif isinstance(label, str) and not label.endswith("hook_normalized"):
        return at_every_layer(label, n_layers)
    name = "hook" if side == "input" else "hook_out"
    raise DictionaryError(
        f"{place.source}: where the {side}s of its layers were captured, {template or label!r}, is no hook point that "
        f'is known: give it, as in {name}="blocks.*.mlp.hook_{"in" if side == "input" else "out"}"'
    )


def _statistics(
    place: Place, config: Mapping[str, Any], n_layers: int, d_model: int
) -> tuple[tuple[_Standard, ...], tuple[_Standard, ...]] | None:
    """By what inputs and targets were standardised, layer by layer; None where they were not."""
    method = config.get("normalization_method", "none")
    if method == "none":
        return None
    path = place.fetch(STATISTICS) if STATISTICS in place.names or place.repo is None else None
    if path is None or not path.is_file():
        raise DictionaryError(
            f"{place.source} was trained on standardised activations (normalization_method {method!r}): copy "
            f"{STATISTICS} of their folder beside the checkpoint"
        )
    statistics = read_json(path)
    inputs, targets = (
        tuple(_standard(statistics, str(layer), side, d_model, path) for layer in range(n_layers))
        for side in ("inputs", "targets")
    )
    return inputs, targets


def _standard(statistics: Mapping[str, Any], layer: str, side: str, d_model: int, path: Path) -> _Standard:
    try:
        said = statistics[layer][side]
        mean, deviation = (torch.tensor(said[name], dtype=torch.float64) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise DictionaryError(f"{path} has no mean and std of the {side} of layer {layer}: {error!r}") from error
    for name, value in (("mean", mean), ("std", deviation)):
        if tuple(value.shape) != (d_model,) or not bool(torch.isfinite(value).all()):
            raise DictionaryError(f"{path}: {name} of the {side} of layer {layer} is not {d_model} finite numbers")
    if bool((deviation < 0).any()):
        raise DictionaryError(f"{path}: std of the {side} of layer {layer} has negative numbers")
    return _Standard(mean, deviation + EPSILON)


def _recognizes(place: Place) -> bool:
    if place.file is not None:
        return place.file.startswith("clt_checkpoint_")
    named = any(_CHECKPOINT.fullmatch(name) or _SHARD.fullmatch(name) for name in place.names)
    return CONFIG in place.names and named


FORMAT = Format(recognizes=_recognizes, read=_read)
