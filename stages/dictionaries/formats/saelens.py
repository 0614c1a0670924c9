"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, of any version, and checkpoints of its training.

Read as SAELens 6.54 computes. What it does to activations at run time and what is linear is folded into the weights:

* `expected_average_only_in`: W_enc · s, W_dec / s, b_dec / s with s = √d_in / mean ‖x‖. SAELens folds s into what it
  saves when training ends, and then says "none"; s is asked for only where it was not folded: under
  `norm_scaling_factor` in `cfg.json`, or in the `activation_scaler.json` of a training checkpoint. Without it features
  would be wrong in scale and in number, so the dictionary is refused.
* `covariance_whitening`: with the checkpoint's `activation_whitening.safetensors`, unless it was folded likewise.
* `rescale_acts_by_decoder_norm`: W_enc · n, b_enc · n, W_dec / n with n the lengths of the decoder's rows.
* `finetuning_scaling_factor`: a factor a feature that acts when decoding only, so it goes into W_dec. (It is gone since
  6.0; versions 3 to 5 apply it so.)

A checkpoint of BatchTopK training has one threshold for all features; its inference file is a JumpReLU like any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation, Kind
from ..dictionary import Dictionary, Provenance
from ..errors import DictionaryError
from ..place import Place
from .folding import scaled, unified, whitened, with_unit_decoder
from .format import Format, Hooks, exactly, read_safetensors
from .saelens_config import Config, read_config, read_scale
from .saelens_export import write

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
_FINETUNED = ("scaling_factor", "finetuning_scaling_factor")
_CLOSE_TO_ONE = 1e-5  # as SAELens compares a factor with one


@dataclass(frozen=True, slots=True)
class Layout:
    """The activation of an architecture, and the tensors that it has beside W_enc, W_dec and b_dec."""

    kind: Kind
    tensors: tuple[str, ...]
    transcodes: bool = False


LAYOUTS: Mapping[str, Layout] = {
    "standard": Layout("relu", ("b_enc",)),
    "gated": Layout("gated", ("b_gate", "b_mag", "r_mag")),
    "topk": Layout("topk", ("b_enc",)),
    "abstopk": Layout("abstopk", ("b_enc",)),
    "jumprelu": Layout("jumprelu", ("b_enc", "threshold")),
    "batchtopk": Layout("batchtopk", ("b_enc", "topk_threshold")),
    "matryoshka_batchtopk": Layout("batchtopk", ("b_enc", "topk_threshold")),
    "transcoder": Layout("relu", ("b_enc",), True),
    "skip_transcoder": Layout("relu", ("b_enc", "W_skip"), True),
    "jumprelu_transcoder": Layout("jumprelu", ("b_enc", "threshold"), True),
    "jumprelu_skip_transcoder": Layout("jumprelu", ("b_enc", "threshold", "W_skip"), True),
}


def _recognizes(place: Place) -> bool:
    return CONFIG in place.names and WEIGHTS in place.names


def _read(place: Place, hooks: Hooks) -> Dictionary:
    cfg = place.require(CONFIG)
    config, details = read_config(cfg)
    path = place.require(WEIGHTS)
    layout = LAYOUTS[config.architecture]
    _check(config, layout, cfg)
    tensors = _tensors(read_safetensors(path), config, layout, path)
    folds, files = _fold(tensors, config, place)
    subtracts = config.subtracts_b_dec is not False and not layout.transcodes
    hook, hook_out = _hooks(place, hooks, config, layout, cfg)
    return Dictionary(
        W_enc=folds["W_enc"],
        b_enc=folds["b_gate" if layout.kind == "gated" else "b_enc"],
        activation=_activation(folds, config, layout),
        hook=hook,
        b_in=folds["b_dec"] if subtracts else None,
        input_norm=config.input_norm,
        head=config.head,
        W_dec=folds["W_dec"],
        b_dec=folds["b_dec"],
        hook_out=hook_out,
        W_skip=folds["W_skip"].T if "W_skip" in folds else None,
        denormalize=not layout.transcodes,
        provenance=Provenance(
            source=place.source,
            format="saelens",
            revision=place.revision,
            model=config.model,
            files=(cfg, path, *files),
            details=details,
        ),
    )


def _check(config: Config, layout: Layout, path: Path) -> None:
    """DictionaryError for combinations that have no meaning, or none that forebay's dictionaries express."""
    said = config.normalization
    if config.rescales and layout.kind not in ("topk", "abstopk", "batchtopk"):
        raise DictionaryError(f"{path}: rescale_acts_by_decoder_norm is not known of a {config.architecture}")
    if not layout.transcodes:
        return
    if config.d_out is None:
        raise DictionaryError(f"{path} has no d_out, which a {config.architecture} needs")
    if config.subtracts_b_dec:
        raise DictionaryError(
            f"{path}: apply_b_dec_to_input in a {config.architecture}, whose b_dec belongs to its output, not its input"
        )
    if said in ("expected_average_only_in", "covariance_whitening"):
        raise DictionaryError(
            f"{path}: {said} in a {config.architecture}: how its output is scaled is not said, so it cannot be folded"
        )
    if said != "none" and "W_skip" in layout.tensors:
        raise DictionaryError(
            f"{path}: {said} in a {config.architecture}, whose skip connection reads what was not normalised: "
            "forebay's dictionaries normalise for both"
        )


def _hooks(place: Place, hooks: Hooks, config: Config, layout: Layout, path: Path) -> tuple[str, str]:
    found = None if hooks.hook else config.point(path, "hook_name")
    if not layout.transcodes:
        return hooks.choose(place, found)
    found_out = hooks.hook_out or config.point(path, "hook_name_out")
    if found_out is None:
        raise DictionaryError(
            f"{place.source} does not say at which hook point it writes; give it, as in "
            'hook_out="blocks.12.hook_mlp_out"'
        )
    return hooks.choose(place, found, found_out)


def _tensors(found: Mapping[str, Tensor], config: Config, layout: Layout, path: Path) -> dict[str, Tensor]:
    """The tensors of an architecture, of the sizes that the configuration gives; thresholds in float32."""
    tensors = dict(found)
    if layout.kind == "jumprelu" and "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
    exactly(tensors, ("W_enc", "W_dec", "b_dec", *layout.tensors), path, optional=_FINETUNED)
    d_out = config.d_out if layout.transcodes else config.d_in
    sizes: dict[str, tuple[int | None, ...]] = {"W_enc": (config.d_in, config.d_sae), "W_dec": (config.d_sae, d_out)}
    if "topk_threshold" in layout.tensors:
        sizes["topk_threshold"] = ()
    for name, expected in sizes.items():
        if tuple(tensors[name].shape) != expected:
            raise DictionaryError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}; {expected} was expected, as {CONFIG} says"
            )
    return tensors


def _fold(tensors: dict[str, Tensor], config: Config, place: Place) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Weights with everything folded in that is constant, and the files that it took besides."""
    path = place.require(WEIGHTS)
    finetuned = _finetuning(tensors, config, path)
    averaged, whitens = (config.normalization == name for name in ("expected_average_only_in", "covariance_whitening"))
    apart = {name: tensors.pop(name).float() for name in ("threshold", "r_mag", "b_mag") if name in tensors}
    if "topk_threshold" in tensors:
        apart["threshold"] = tensors.pop("topk_threshold").float().expand(config.d_sae).clone()
    folds = averaged or whitens or config.rescales or finetuned is not None
    tensors = unified(tensors, path, folds=folds) | apart
    files: tuple[Path, ...] = ()
    if averaged:
        scale, files = _scale(config, place)
        tensors = scaled(tensors, scale, scale)
        if config.rescales and config.architecture.endswith("batchtopk"):
            tensors["threshold"] = tensors["threshold"] / scale  # of features that carry the decoder's length
    if config.rescales:
        tensors = with_unit_decoder(tensors)
    if whitens:
        tensors, files = _whiten(tensors, config, place)
    if finetuned is not None:
        tensors["W_dec"] = tensors["W_dec"] * finetuned.to(tensors["W_dec"])[:, None]
    return tensors, files


def _finetuning(tensors: dict[str, Tensor], config: Config, path: Path) -> Tensor | None:
    """The factors by which features are multiplied when decoding, taken out of the tensors; None where all are one."""
    found = [tensors.pop(name) for name in _FINETUNED if name in tensors]
    if not found:
        if config.finetuned:
            raise DictionaryError(f"{path} has no scaling_factor, and finetuning_scaling_factor is true")
        return None
    factor = found[0]
    if factor.shape != (config.d_sae,):
        raise DictionaryError(f"{path}: scaling_factor has shape {tuple(factor.shape)}; ({config.d_sae},) was expected")
    if torch.allclose(factor.float(), torch.ones(()), rtol=_CLOSE_TO_ONE, atol=1e-8):
        return None
    if not config.finetuned:
        raise DictionaryError(f"{path} has a scaling_factor other than one, and finetuning_scaling_factor is false")
    return factor


def _scale(config: Config, place: Place) -> tuple[float, tuple[Path, ...]]:
    said = place.require(SCALER) if SCALER in place.names else None
    scale = read_scale(said) if said is not None else None
    if config.scale is not None and scale is not None and config.scale != scale:
        raise DictionaryError(f"{place.source}: {CONFIG} gives the factor {config.scale}, {SCALER} {scale}")
    found = config.scale or scale
    if found is None:
        raise DictionaryError(
            f"{place.source}: normalize_activations is 'expected_average_only_in', and the factor is nowhere to be "
            f"found. Write it into {CONFIG} as norm_scaling_factor: √d_in / mean ‖x‖ of what it was trained on, which "
            "SAELens' list of published dictionaries gives"
        )
    return found, (said,) if said is not None else ()


def _whiten(tensors: dict[str, Tensor], config: Config, place: Place) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    if WHITENING not in place.names:
        raise DictionaryError(f"{place.source}: normalize_activations is 'covariance_whitening', without a {WHITENING}")
    path = place.require(WHITENING)
    found = read_safetensors(path)
    exactly(found, ("mean", "matrix", "inverse_matrix"), path)
    mean, matrix, inverse = (found[name] for name in ("mean", "matrix", "inverse_matrix"))
    square = (config.d_in, config.d_in)
    if mean.shape != (config.d_in,) or matrix.shape != square or inverse.shape != square:
        raise DictionaryError(f"{path}: activations {config.d_in} wide were expected to be whitened")
    subtracts = config.subtracts_b_dec is not False
    return whitened(tensors, mean, matrix, inverse, subtracts_b_dec=subtracts), (path,)


def _activation(tensors: Mapping[str, Tensor], config: Config, layout: Layout) -> Activation:
    given: dict[str, Any] = {name: tensors[name] for name in ("threshold", "r_mag", "b_mag") if name in tensors}
    if config.k is not None and float(config.k).is_integer():
        given["k"] = int(config.k)
    return Activation(kind=layout.kind, **given)


FORMAT = Format(recognizes=_recognizes, read=_read, write=write)
