"""sparsify (EleutherAI): autoencoders and transcoders with TopK or GroupMax, one folder a hookpoint.

`cfg.json` and `sae.safetensors` in a folder that is named after a module of the model, `layers.10.mlp`: what leaves it
is encoded by an autoencoder, and predicted from what enters it by a transcoder. Facts from sparsify 1.3.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..activation import Activation
from ..dictionary import Dictionary, Provenance
from ..errors import DictionaryError
from ..place import Place
from ..transcoders import TranscoderSet
from .format import Format, Hooks, exactly, read_json, read_safetensors
from .modules import hook_of_module

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

# What is known to change nothing in what a trained coder computes, and what is honoured.
_TRAINING = {"expansion_factor", "normalize_decoder", "multi_topk"}
_HONOURED = {"activation", "d_in", "k", "num_latents", "signed", "skip_connection", "transcode", "hook", "hook_out"}
_ACTIVATIONS = {("topk", False): "topk", ("topk", True): "abstopk", ("groupmax", False): "groupmax"}


def _read(place: Place, hooks: Hooks) -> Dictionary:
    path = place.require(WEIGHTS)
    config_path = place.require(CONFIG)
    config = read_json(config_path)
    _check_config(config, config_path)
    tensors = read_safetensors(path)
    skip = "W_skip" if config.get("skip_connection") else None
    exactly(tensors, ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *([skip] if skip else [])], path)
    weight, b_dec = tensors["encoder.weight"], tensors["b_dec"]
    latents = config.get("num_latents") or config["d_in"] * config.get("expansion_factor", 0)
    if tuple(weight.shape) != (latents, config["d_in"]):
        raise DictionaryError(
            f"{path}: encoder.weight has shape {tuple(weight.shape)}; by {CONFIG} it is {(latents, config['d_in'])}"
        )
    hook, hook_out = _hooks_of(config, place, hooks)
    return Dictionary(
        W_enc=weight.T,
        b_enc=tensors["encoder.bias"],
        b_in=None if config.get("transcode") else b_dec,
        activation=Activation(kind=_activation(config, config_path), k=config["k"]),
        hook=hook,
        W_dec=tensors["W_dec"],
        b_dec=b_dec,
        W_skip=tensors[skip].T if skip else None,
        hook_out=hook_out,
        provenance=Provenance(
            source=place.source,
            format="sparsify",
            revision=place.revision,
            files=(config_path, path),
            details=config,
        ),
    )


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    for name in ("d_in", "k"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise DictionaryError(f"{path}: {name} is {config.get(name)!r}; a number from 1 on was expected")
    unknown = {name: value for name, value in config.items() if name not in _TRAINING | _HONOURED and value}
    if unknown:
        said = ", ".join(f"{name} = {value!r}" for name, value in unknown.items())
        raise DictionaryError(f"{path} has {said}, which sparsify 1.3 does not know: it may change what is computed")


def _activation(config: Mapping[str, Any], path: Path) -> Any:
    asked = config.get("activation", "topk"), bool(config.get("signed"))
    if asked not in _ACTIVATIONS:
        raise DictionaryError(f"{path}: activation {asked[0]!r}{' with signs' * asked[1]} is not known")
    return _ACTIVATIONS[asked]


def _hooks_of(config: Mapping[str, Any], place: Place, hooks: Hooks) -> tuple[str, str]:
    """Where the coder reads and writes: as the caller says, as forebay has put it into the file, or by the name of the
    folder.

    Configurations from before February 2025 do not say `transcode`, and transcoders subtracted the decoder's bias from
    their input then. A skip connection tells them.
    """
    names = place.inside.parts
    seeds = len(names) > 1 and re.fullmatch(r"seed\d+", names[-1])
    module = names[-2] if seeds else names[-1] if names else ""
    found_out = hook_of_module(module, "out")
    if "hook" in config:
        return hooks.choose(place, str(config["hook"]), str(config["hook_out"]) if "hook_out" in config else None)
    if not config.get("transcode", config.get("skip_connection")):
        return hooks.choose(place, found_out)
    if found_out is None and hooks.hook_out is None:
        raise DictionaryError(
            f"{place.source} is a transcoder of {module!r}, which is no module whose hook points are known: give both, "
            'as in hook="blocks.10.mlp.hook_in", hook_out="blocks.10.mlp.hook_out"'
        )
    return hooks.choose(place, hook_of_module(module, "in"), found_out)


def _write(dictionary: Dictionary | TranscoderSet, folder: Path) -> None:
    """Write one dictionary; its hook points stand in cfg.json, which sparsify overlooks there.

    sparsify's load_many and forebay tell them by the name of the folder, too. DictionaryError for what sparsify does
    not compute: other activations, input norms, widths that differ, an autoencoder without b_in, or with another b_in
    than b_dec.
    """
    if isinstance(dictionary, TranscoderSet):
        raise DictionaryError(f"{dictionary.provenance.source} is a set: write its layers one by one, layer(l)")
    config = _config_of(dictionary)
    tensors = {
        "encoder.weight": dictionary.W_enc.T,
        "encoder.bias": dictionary.b_enc,
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))


def _config_of(dictionary: Dictionary) -> dict[str, Any]:
    activation, source = dictionary.activation, dictionary.provenance.source
    refusals = {
        f"activation {activation.kind!r}": activation.kind not in ("topk", "groupmax"),
        f"input norm {dictionary.input_norm!r}": dictionary.input_norm != "none",
        f"head {dictionary.head} of {dictionary.hook} alone": dictionary.head is not None,
        f"input {dictionary.d_in} and output {dictionary.d_out} wide": dictionary.d_in != dictionary.d_out,
    }
    b_in = dictionary.b_in
    is_autoencoder = dictionary.hook == dictionary.hook_out
    refusals["autoencoder that subtracts nothing from its input"] = is_autoencoder and b_in is None
    refusals["b_in that is not b_dec"] = b_in is not None and not torch.equal(b_in, dictionary.b_dec)
    for what, is_so in refusals.items():
        if is_so:
            raise DictionaryError(f"{source} cannot be written as sparsify, which knows no {what}")
    return {
        "activation": activation.kind,
        "expansion_factor": max(1, dictionary.n_feature // dictionary.d_in),
        "normalize_decoder": False,
        "num_latents": dictionary.n_feature,
        "k": activation.k,
        "multi_topk": False,
        "skip_connection": dictionary.W_skip is not None,
        "transcode": b_in is None,
        "d_in": dictionary.d_in,
        "hook": dictionary.hook,
        "hook_out": dictionary.hook_out,
    }


def _recognizes(place: Place) -> bool:
    return CONFIG in place.names and WEIGHTS in place.names


FORMAT = Format(recognizes=_recognizes, read=_read, write=_write)
