"""Writing dictionaries as SAELens does: a folder that `sae_lens.SAE.load_from_disk` opens and computes alike."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...models.errors import HookError
from ...models.points import HookPoint
from ..activation import Activation
from ..dictionary import Dictionary
from ..errors import DictionaryError
from .saelens_config import METADATA

if TYPE_CHECKING:
    from ..transcoders import TranscoderSet

LAYOUT_VERSION = "6.0.0"
"""The first version of SAELens whose `cfg.json` has this layout, by which every later one reads it."""

_PLACES = frozenset({"hook_name_out", "hook_head_index_out", "hf_hook_name", "hf_hook_name_out"})
"""What SAELens may say of the place beside what is written here, which a caller may have changed."""
_DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_AUTOENCODERS = {
    "relu": "standard",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
}
_TRANSCODERS = {
    ("relu", False): "transcoder",
    ("relu", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
    ("batchtopk", False): "jumprelu_transcoder",
    ("batchtopk", True): "jumprelu_skip_transcoder",
}


def write(dictionary: "Dictionary | TranscoderSet", folder: Path) -> None:
    """Put `cfg.json` and `sae_weights.safetensors` into a folder.

    Weights keep their dtype; thresholds and magnitudes are float32, and where the weights' dtype would round them
    `cfg.json` says float32, so that SAELens does not. A BatchTopK dictionary becomes the JumpReLU that it is, as in
    SAELens. DictionaryError for what SAELens has no architecture for.
    """
    if not isinstance(dictionary, Dictionary):
        raise DictionaryError(
            f"{dictionary.provenance.source} has many layers, and a SAELens folder one"
            f"{'' if dictionary.cross_layer else ': write each, save_dictionary(set.layer(i), …)'}"
        )
    source = dictionary.provenance.source
    if dictionary.dtype not in _DTYPES:
        raise DictionaryError(f"{source} is {dictionary.dtype}, which SAELens does not know")
    transcodes = _transcodes(dictionary)
    architecture = _architecture(dictionary, transcodes)
    tensors = _tensors(dictionary)
    cfg = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_feature,
        "dtype": _DTYPES[_said_dtype(dictionary)],
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.b_in is not None,
        "normalize_activations": dictionary.input_norm,
        "reshape_activations": "hook_z" if _flattens_z(dictionary) else "none",
        "metadata": _metadata(dictionary, transcodes),
    }
    if transcodes:
        cfg["d_out"] = dictionary.d_out
    if architecture in ("topk", "abstopk"):
        cfg |= {"k": dictionary.activation.k, "rescale_acts_by_decoder_norm": False}
    # safetensors refuses two that are one in memory, as a bias given twice; matrices are copied only if they must be.
    apart = {name: one.cpu().contiguous() if one.dim() > 1 else one.cpu().clone() for name, one in tensors.items()}
    save_file(apart, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")


def _transcodes(dictionary: Dictionary) -> bool:
    """Whether it is a transcoder in SAELens' words: it writes elsewhere, or leaves the input's norm on its output."""
    square = dictionary.hook == dictionary.hook_out and dictionary.d_in == dictionary.d_out
    undone = dictionary.undoes_norm or dictionary.input_norm == "none"
    return not (square and undone and dictionary.W_skip is None)


def _architecture(dictionary: Dictionary, transcodes: bool) -> str:
    source, kind, b_in = dictionary.provenance.source, dictionary.activation.kind, dictionary.b_in
    if not transcodes:
        if kind not in _AUTOENCODERS:
            raise DictionaryError(f"{source}: SAELens has no {kind} autoencoders")
        if b_in is not None and not torch.equal(b_in, dictionary.b_dec):
            raise DictionaryError(
                f"{source}: SAELens subtracts b_dec from the input or nothing, and b_in is another vector here"
            )
        return _AUTOENCODERS[kind]
    skips = dictionary.W_skip is not None
    if (kind, skips) not in _TRANSCODERS:
        raise DictionaryError(f"{source}: SAELens has no {kind} transcoders")
    if b_in is not None:
        raise DictionaryError(f"{source}: transcoders of SAELens subtract nothing from the input, and this one b_in")
    if dictionary.undoes_norm:
        raise DictionaryError(f"{source}: transcoders of SAELens do not undo the input's {dictionary.input_norm}")
    if skips and dictionary.input_norm != "none":
        raise DictionaryError(
            f"{source}: the skip connection of SAELens reads the activations before their {dictionary.input_norm}, "
            "this one after it"
        )
    return _TRANSCODERS[kind, skips]


def _tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    activation = dictionary.activation
    tensors = {"W_enc": dictionary.W_enc, "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec}
    tensors["b_gate" if activation.kind == "gated" else "b_enc"] = dictionary.b_enc
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    return tensors | _parameters(activation)


def _parameters(activation: Activation) -> dict[str, Tensor]:
    named = {"threshold": activation.threshold, "r_mag": activation.r_mag, "b_mag": activation.b_mag}
    return {name: value for name, value in named.items() if value is not None}


def _said_dtype(dictionary: Dictionary) -> torch.dtype:
    """The dtype in which SAELens is to compute: it casts everything in the file, thresholds too."""
    for value in _parameters(dictionary.activation).values():
        if not torch.equal(value.to(dictionary.dtype).float(), value):
            return torch.float32
    return dictionary.dtype


def _flattens_z(dictionary: Dictionary) -> bool:
    try:
        return dictionary.head is None and HookPoint.parse(dictionary.hook).kind == "attn.hook_z"
    except HookError:
        return False


def _metadata(dictionary: Dictionary, transcodes: bool) -> dict[str, Any]:
    """What SAELens keeps beside the weights; of a dictionary that came from SAELens also what it said there."""
    provenance = dictionary.provenance
    said: Mapping[str, Any] = provenance.details if provenance.format == "saelens" else {}
    kept = {key: value for key, value in said.items() if key in METADATA} | dict(said.get("metadata") or {})
    metadata = {
        **{key: value for key, value in kept.items() if key not in _PLACES},
        "model_name": provenance.model,
        "hook_name": dictionary.hook,
        "hook_head_index": dictionary.head,
        "sae_lens_version": LAYOUT_VERSION,
    }
    if transcodes:
        metadata["hook_name_out"] = dictionary.hook_out
    if dictionary.activation.kind == "batchtopk" and "training_architecture" not in metadata:
        details = {"k": dictionary.activation.k}
        metadata |= {"training_architecture": "batchtopk", "training_architecture_details": details}
    return metadata
