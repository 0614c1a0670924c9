"""Llama Scope (Llama 3.1 8B) and its successor on DeepSeek-R1-Distill: SAEs and transcoders of OpenMOSS.

Llama Scope is `hyperparams.json` with `checkpoints/final.safetensors` and one `jump_relu_threshold` θ; the successor
is `config.json` with `sae_weights.safetensors`, `log_jumprelu_threshold` of every feature, and the mean norm of
activations among its tensors. Activations are multiplied by s = √d_model / mean ‖x‖, and nothing is subtracted.

How the thresholds are meant follows OpenMOSS' own inference (Language-Model-SAEs, `SparseAutoEncoder.from_config` and
`encode`). With h = (s_in x) W_enc + b_enc, n the length of a feature's published decoder row, and s_in, s_out the
factors of the points that are read and written:

* Llama Scope folds the factors into the weights and gives decoder rows length one, then compares: h n / s_out > θ. So
  θ is in units of the activation that is written, not of the normalised one: published values grow with mean ‖x‖ from
  layer to layer, and θ s_out does not. A feature fires where h > θ s_out / n.
* The successor compares as it is trained, in normalised units: n h > θ.

n is left out where `sparsity_include_decoder_norm` is false. Features are h, as in SAELens, whose loader has the factor
s on θ as well, so that both agree where rows have length one. It leaves n out, though the published rows are not of
length one: which features fire differs from SAELens there, and agrees with the authors. OpenMOSS' own inference gives
h n / s_out for h; the reconstruction is the same.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import nearest
from ..activation import Activation
from ..dictionary import Dictionary, Provenance
from ..errors import DictionaryError
from ..place import Place
from .folding import scaled, unified
from .format import Format, Hooks, exactly, read_json, read_safetensors

HYPERPARAMETERS, CHECKPOINT = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
SAELENS_CONFIG = "cfg.json"
LOG_THRESHOLD, MEAN_NORM = "log_jumprelu_threshold", "dataset_average_activation_norm"
_MODELS = {
    r"Llama-Scope-R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    r"Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B",
}
_TENSORS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}


def _recognizes(place: Place) -> bool:
    names = frozenset(place.names)
    return {HYPERPARAMETERS, CHECKPOINT} <= names or ({CONFIG, WEIGHTS} <= names and SAELENS_CONFIG not in names)


def _read(place: Place, hooks: Hooks) -> Dictionary:
    names = (HYPERPARAMETERS, CHECKPOINT) if HYPERPARAMETERS in place.names else (CONFIG, WEIGHTS)
    said, path = (place.require(name) for name in names)
    config, tensors = read_json(said), read_safetensors(path)
    _check(config, said)
    means = {name: tensors.pop(name) for name in [*tensors] if name.startswith(MEAN_NORM)}
    scale_in, scale_out = _scales(config, means, said)
    threshold = _threshold(config, tensors, scale_out, said)
    weights = _weights(tensors, config, path)
    if config.get("sparsity_include_decoder_norm", True):
        threshold = _divided(threshold, torch.linalg.vector_norm(weights["W_dec"], dim=-1))
    weights = scaled(weights, scale_in, scale_out)
    hook, hook_out = hooks.choose(place, *_points(config))
    return Dictionary(
        W_enc=weights["W_enc"],
        b_enc=weights["b_enc"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        b_in=_subtracted(config, weights["b_dec"], hook == hook_out, said),
        activation=Activation(kind="jumprelu", threshold=threshold.expand(weights["b_enc"].shape).clone()),
        hook=hook,
        hook_out=hook_out,
        denormalize=hook == hook_out,
        provenance=Provenance(
            source=place.source,
            format="llama-scope",
            revision=place.revision,
            model=next((model for name, model in _MODELS.items() if re.search(name, place.text)), None),
            files=(said, path),
            details=config,
        ),
    )


def _check(config: Mapping[str, Any], path: Path) -> None:
    """DictionaryError for what would compute other features than these formats' JumpReLU."""
    if type(config.get("d_model")) is not int:
        raise DictionaryError(f"{path}: d_model is {config.get('d_model')!r}; a whole number was expected")
    function = config.get("act_fn", "jumprelu")
    if function not in ("jumprelu", "topk"):
        raise DictionaryError(f"{path}: act_fn is {function!r}; 'jumprelu' was expected")
    if config.get("use_glu_encoder"):
        raise DictionaryError(f"{path}: use_glu_encoder, a second encoder that gates the first, is not read")
    norm = config.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        near = nearest(str(norm), ("dataset-wise", "inference"))
        raise DictionaryError(f"{path}: norm_activation is {norm!r}; 'dataset-wise' or 'inference' was expected.{near}")
    for key in ("sparsity_include_decoder_norm", "use_decoder_bias", "apply_decoder_bias_to_pre_encoder"):
        if not isinstance(config.get(key, True), bool):
            raise DictionaryError(f"{path}: {key} is {config[key]!r}; true or false was expected")


def _weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """W_enc, W_dec, b_enc and b_dec, of the sizes that the configuration gives."""
    biased = config.get("use_decoder_bias", True)
    exactly(tensors, [name for name in _TENSORS if biased or name != "decoder.bias"], path)
    known = {_TENSORS[name]: tensor for name, tensor in unified(tensors, path, folds=True).items()}
    weights = {name: tensor.T.contiguous() if name.startswith("W") else tensor for name, tensor in known.items()}
    d_model = config["d_model"]
    d_sae = config.get("d_sae", round(d_model * config.get("expansion_factor", 0)))
    if weights["W_enc"].shape != (d_model, d_sae):
        raise DictionaryError(
            f"{path}: encoder.weight has shape {tuple(tensors['encoder.weight'].shape)}; ({d_sae}, {d_model}) was "
            "expected, as the configuration says"
        )
    if not biased:
        weights["b_dec"] = weights["W_dec"].new_zeros(weights["W_dec"].shape[1])
    return weights


def _scales(config: Mapping[str, Any], means: Mapping[str, Tensor], path: Path) -> tuple[float, float]:
    """√d_model / mean ‖x‖ of what is read, and of what is written; one where the weights have it in them already."""
    if config.get("norm_activation") == "inference":
        return 1.0, 1.0
    said = config.get(MEAN_NORM)
    norms = dict(said) if isinstance(said, Mapping) else {}
    found = []
    for end in ("in", "out"):
        name = f"{MEAN_NORM}.{config.get(f'hook_point_{end}', config.get('hook_point_in'))}"
        norm = means[name].item() if name in means else norms.get(end, norms.get("in"))
        if not isinstance(norm, int | float) or not (math.isfinite(norm) and norm > 0):
            raise DictionaryError(f"{path}: the mean norm of activations, {MEAN_NORM}, is {norm!r} for '{end}'")
        found.append(math.sqrt(config["d_model"]) / norm)
    return found[0], found[1]


def _threshold(config: Mapping[str, Any], tensors: dict[str, Tensor], scale_out: float, path: Path) -> Tensor:
    """What n h is compared with, float32: [feature], taken out of the tensors, or one number for all features."""
    if LOG_THRESHOLD in tensors:
        return tensors.pop(LOG_THRESHOLD).float().exp()
    said = config.get("jump_relu_threshold")
    if not isinstance(said, int | float) or isinstance(said, bool) or not math.isfinite(said) or said < 0:
        raise DictionaryError(f"{path}: jump_relu_threshold is {said!r}; a number of at least 0 was expected")
    return torch.tensor(said * scale_out, dtype=torch.float32)


def _divided(threshold: Tensor, norms: Tensor) -> Tensor:
    """θ / n, and the largest number where a decoder row has no length: n h exceeds nothing there."""
    largest = torch.finfo(torch.float32).max
    return torch.where(norms > 0, threshold / norms, torch.inf).clamp(max=largest).float()


def _points(config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The hook points read and written as far as the file names them; None for the second where both are one."""
    said, said_out = (config.get(key) for key in ("hook_point_in", "hook_point_out"))
    return None if said is None else str(said), None if said_out in (None, said) else str(said_out)


def _subtracted(config: Mapping[str, Any], b_dec: Tensor, is_sae: bool, path: Path) -> Tensor | None:
    """What is subtracted from the input: the decoder's bias, where the configuration asks for it."""
    if not config.get("apply_decoder_bias_to_pre_encoder", False):
        return None
    if not is_sae:
        raise DictionaryError(f"{path}: apply_decoder_bias_to_pre_encoder in a transcoder, whose bias is of its output")
    return b_dec


FORMAT = Format(recognizes=_recognizes, read=_read)
