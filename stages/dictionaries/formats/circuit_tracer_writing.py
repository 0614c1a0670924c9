"""Writing sets of transcoders as circuit-tracer reads them, layer by layer: what one layer takes is in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...models.errors import HookError
from ...models.points import HookPoint
from ..dictionary import Dictionary, Encoder
from ..errors import DictionaryError
from ..transcoders import TranscoderSet

CONFIG = "config.yaml"


@dataclass(frozen=True, slots=True)
class _One:
    """A dictionary as a set of one layer."""

    dictionary: Dictionary

    def encoder(self, layer: int) -> Encoder:
        return self.dictionary

    def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
        return self.dictionary.W_dec[features]

    def decoder_bias(self, target: int) -> Tensor:
        return self.dictionary.b_dec

    def skip(self, layer: int) -> Tensor | None:
        return self.dictionary.W_skip


def write(dictionary: Dictionary | TranscoderSet, folder: Path) -> None:
    """Write a set of transcoders, or a dictionary of layer 0 as the set of one layer; config.yaml comes last.

    Weights have the dtype of the set. DictionaryError for what circuit-tracer does not compute, or not so: activations
    other than ReLU and thresholds (its releases take TopK for ReLU), input norms, b_in, layers of different widths,
    hook points that are not of one kind in all layers, and skip connections across layers.
    """
    import yaml

    transcoders = dictionary if isinstance(dictionary, TranscoderSet) else _set_of_one(dictionary)
    hook, hook_out = (_kind(hooks, transcoders) for hooks in (transcoders.hooks_in, transcoders.hooks_out))
    _check_set(transcoders)
    has_thresholds = _has_thresholds(transcoders.encoder(0))
    put = _put_across if transcoders.cross_layer else _put_layer
    for layer in range(transcoders.n_layers):
        encoder = transcoders.encoder(layer)
        if _has_thresholds(encoder) != has_thresholds:
            raise DictionaryError(f"{transcoders.provenance.source}: layer {layer} has another activation than layer 0")
        put(transcoders, layer, encoder, folder)
    config = {
        "model_name": transcoders.provenance.model,
        "model_kind": "cross_layer_transcoder" if transcoders.cross_layer else "transcoder_set",
        "feature_input_hook": hook,
        "feature_output_hook": hook_out,
    }
    said = {name: value for name, value in config.items() if value is not None}
    (folder / CONFIG).write_text(yaml.safe_dump(said, sort_keys=False))


def _set_of_one(dictionary: Dictionary) -> TranscoderSet:
    return TranscoderSet(
        reader=_One(dictionary),
        n_features=(dictionary.n_feature,),
        d_in=dictionary.d_in,
        d_out=dictionary.d_out,
        hooks_in=(dictionary.hook,),
        hooks_out=(dictionary.hook_out,),
        cross_layer=False,
        provenance=dictionary.provenance,
        dtype=dictionary.dtype,
    )


def _kind(hooks: tuple[str, ...], transcoders: TranscoderSet) -> str:
    """The kind of the hook points of all layers, in the order of the layers."""
    try:
        points = [HookPoint.parse(hook) for hook in hooks]
    except HookError as error:
        raise DictionaryError(f"{transcoders.provenance.source} cannot be written: {error}") from error
    kind = points[0].kind
    if points != [HookPoint(kind, layer) for layer in range(len(hooks))]:
        raise DictionaryError(
            f"{transcoders.provenance.source}: a set of circuit-tracer's has a transcoder at one kind of hook point "
            f"for every layer from 0 on; this has {', '.join(hooks[:4])}{', …' if len(hooks) > 4 else ''}"
        )
    return kind


def _check_set(transcoders: TranscoderSet) -> None:
    source = transcoders.provenance.source
    if len(set(transcoders.n_features)) > 1 or transcoders.d_in != transcoders.d_out:
        raise DictionaryError(
            f"{source}: circuit-tracer's layers have one width and one number of features; these read "
            f"{transcoders.d_in} and write {transcoders.d_out} wide, with {sorted({*transcoders.n_features})} features"
        )
    if transcoders.cross_layer and any(transcoders.skip(layer) is not None for layer in range(transcoders.n_layers)):
        raise DictionaryError(f"{source}: circuit-tracer keeps no skip connections of cross-layer transcoders")


def _has_thresholds(encoder: Encoder) -> bool:
    """Whether an encoder has thresholds or is a ReLU. DictionaryError for what circuit-tracer does not compute."""
    kind, source = encoder.activation.kind, encoder.provenance.source
    if kind not in ("relu", "jumprelu", "batchtopk"):
        raise DictionaryError(f"{source}: circuit-tracer's releases read ReLU and JumpReLU; this is {kind}")
    for what, is_so in (
        ("an input norm", encoder.input_norm != "none"),
        ("a b_in", encoder.b_in is not None),
        ("one head only", encoder.head is not None),
    ):
        if is_so:
            raise DictionaryError(f"{source}: circuit-tracer's transcoders have no such thing as {what}")
    return kind != "relu"


def _parts(transcoders: TranscoderSet, layer: int, encoder: Encoder) -> dict[str, Tensor]:
    parts = {"W_enc": encoder.W_enc.T, "b_enc": encoder.b_enc, "b_dec": transcoders.decoder_bias(layer)}
    if encoder.activation.threshold is not None:
        # Nothing negative passes here, whatever the threshold; there, only if it is 0 or more.
        parts["threshold"] = encoder.activation.threshold.clamp(min=0)
    return parts


def _put_layer(transcoders: TranscoderSet, layer: int, encoder: Encoder, folder: Path) -> None:
    parts = _parts(transcoders, layer, encoder)
    if "threshold" in parts:
        parts["activation_function.threshold"] = parts.pop("threshold")
    parts["W_dec"] = transcoders.decoder_rows(layer, layer)
    skip = transcoders.skip(layer)
    _save(parts if skip is None else parts | {"W_skip": skip.T}, folder / f"layer_{layer}.safetensors")


def _put_across(transcoders: TranscoderSet, layer: int, encoder: Encoder, folder: Path) -> None:
    parts = _parts(transcoders, layer, encoder)
    _save({f"{part}_{layer}": value for part, value in parts.items()}, folder / f"W_enc_{layer}.safetensors")
    targets = transcoders.targets(layer)
    decoder = torch.empty(encoder.n_feature, len(targets), transcoders.d_out, dtype=transcoders.dtype)
    for place, target in enumerate(targets):
        decoder[:, place] = transcoders.decoder_rows(layer, target)
    _save({f"W_dec_{layer}": decoder}, folder / f"W_dec_{layer}.safetensors")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
