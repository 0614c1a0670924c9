"""What a `cfg.json` of SAELens says, of any version, as one plain spec."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import HookError, nearest
from ...models.points import HookPoint
from ..dictionary import InputNorm
from ..errors import DictionaryError
from .format import read_json
from .hub_names import hook_of

NORMALIZATIONS: Mapping[str, InputNorm] = {
    "none": "none",
    "constant_norm_rescale": "constant_norm_rescale",
    "layer_norm": "layer_norm",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
}
"""What `normalize_activations` may say → what of it is left to do once its constants are folded into the weights."""
_REFUSED = {
    "temporal": "its features depend on earlier tokens, by attention",
    "matching_pursuit": "it chooses features one after another, each against what the others left",
}
ARCHITECTURES = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "batchtopk",
    "matryoshka_batchtopk",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)

_COUNTING = ("topk", "abstopk")
"""Architectures that let k features of a token through."""
_AVERAGING = ("batchtopk", "matryoshka_batchtopk")
"""Those that let k of a token on average through, which need not be whole."""

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
METADATA = frozenset(
    "model_name hook_name hook_name_out hook_head_index hook_head_index_out "  # noqa: SIM905  one word a line is worse
    "hf_hook_name hf_hook_name_out prepend_bos context_size seqpos_slice dataset_path exclude_special_tokens "
    "neuronpedia_id model_class_name model_from_pretrained_kwargs sae_lens_version sae_lens_training_version".split()
)
"""What is said about the dictionary and its training; flat in old files, in `metadata` since 6.0."""
_VALUES = frozenset(
    "architecture d_in d_sae d_out dtype k apply_b_dec_to_input metadata "  # noqa: SIM905
    "normalize_activations reshape_activations rescale_acts_by_decoder_norm activation_fn activation_fn_kwargs "
    "finetuning_scaling_factor norm_scaling_factor".split()
)
"""What decides which numbers come out."""
_TRAINING = frozenset(
    "device decoder_init_norm noise mse_loss_normalization l1_coefficient lp_norm l1_warm_up_steps "  # noqa: SIM905
    "use_sparse_activations aux_loss_coefficient topk_threshold_lr matryoshka_widths use_matryoshka_aux_loss "
    "jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_ste_to_input "
    "jumprelu_tanh_scale l0_coefficient l0_warm_up_steps pre_act_loss_coefficient target_l0".split()
)
_ALIKE = 0.85
"""From this likeness on a key that is not known is taken for a misspelt one. Those of training runs are below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One `cfg.json`; the words are SAELens'. `subtracts_b_dec` is None where nothing is said, `scale` is the constant
    factor of `expected_average_only_in`, where the file gives it.
    """

    architecture: str
    d_in: int
    d_sae: int
    d_out: int | None
    k: float | None
    normalization: str
    scale: float | None
    rescales: bool
    subtracts_b_dec: bool | None
    finetuned: bool
    head: int | None
    model: str | None
    names: Mapping[str, Any]

    @property
    def input_norm(self) -> InputNorm:
        """What is done to the input at run time."""
        return NORMALIZATIONS[self.normalization]

    def point(self, path: Path, key: str) -> str | None:
        """The hook point under "hook_name" or "hook_name_out", None where it is not said.

        DictionaryError for one that forebay does not have, unless transformers' name of it stands beside.
        """
        name, place = self.names.get(key), self.names.get(f"hf_{key}")
        if name is None:
            return hook_of(place) if isinstance(place, str) else None
        try:
            return str(HookPoint.parse(str(name)))
        except HookError as error:
            found = hook_of(place) if isinstance(place, str) else None
            if found is None:
                given = {"hook_name": "hook", "hook_name_out": "hook_out"}[key]
                raise DictionaryError(f"{path}: {error} Give the point with {given}=") from error
            return found


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """What a file says, and the file as read. DictionaryError, naming the key, for what is not understood."""
    raw = read_json(path)
    metadata = _typed(raw, "metadata", dict, {}, path)
    cfg = _renamed(raw, path)
    if _is_old(cfg, metadata, path):
        _check_resemblance(cfg, path)
    else:
        details = metadata.get("training_architecture_details")
        _check_known(cfg, details if isinstance(details, dict) else {}, path)
    names = {key: value for key, value in cfg.items() if key in METADATA} | metadata
    if cfg.get("reshape_activations") not in (None, "none", "hook_z"):
        said = cfg["reshape_activations"]
        raise DictionaryError(f"{path}: reshape_activations is {said!r}; 'none' or 'hook_z' was expected")
    if names.get("hook_head_index_out") is not None:
        raise DictionaryError(
            f"{path}: it writes to one head, hook_head_index_out, which forebay's dictionaries do not"
        )
    architecture = _architecture(cfg, path)
    return (
        Config(
            architecture=architecture,
            d_in=_size(cfg, "d_in", path),
            d_sae=_size(cfg, "d_sae", path),
            d_out=_size(cfg, "d_out", path) if cfg.get("d_out") is not None else None,
            k=_k(cfg, architecture, path),
            normalization=_normalization(cfg, path),
            scale=_factor(cfg.get("norm_scaling_factor"), path, "norm_scaling_factor"),
            rescales=_typed(cfg, "rescale_acts_by_decoder_norm", bool, False, path),
            subtracts_b_dec=_typed(cfg, "apply_b_dec_to_input", bool, None, path),
            finetuned=_typed(cfg, "finetuning_scaling_factor", bool, False, path),
            head=_typed(names, "hook_head_index", int, None, path),
            model=_typed(names, "model_name", str, None, path),
            names=names,
        ),
        raw,
    )


def _renamed(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The same by the names of today. DictionaryError where an old and a new name say two things."""
    cfg: dict[str, Any] = {}
    for key, value in raw.items():
        name = _RENAMED.get(key, key)
        if cfg.get(name) is None:
            cfg[name] = value
        elif value is not None and value != cfg[name]:
            raise DictionaryError(f"{path}: {key} is {value!r}, and by another name {cfg[name]!r}")
    return cfg


def read_scale(path: Path) -> float | None:
    """The factor in an `activation_scaler.json` of a training checkpoint; None where it has none."""
    return _factor(read_json(path).get("scaling_factor"), path, "scaling_factor")


def _is_old(cfg: Mapping[str, Any], metadata: Mapping[str, Any], path: Path) -> bool:
    """Whether a version before 6.0 wrote it, or none is given, which was so before 4."""
    version = cfg.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version is None:
        return True
    found = re.match(r"(\d+)\.", str(version))
    if found is None:
        raise DictionaryError(f"{path}: sae_lens_version is {version!r}; one such as '6.2.0' was expected")
    return int(found[1]) < 6


def _check_known(cfg: Mapping[str, Any], training: Mapping[str, Any], path: Path) -> None:
    known = _VALUES | METADATA | _TRAINING | set(training)
    for key in cfg:
        if key not in known:
            raise DictionaryError(f"{path}: {key!r} is not known, and may change what comes out.{nearest(key, known)}")


def _check_resemblance(cfg: Mapping[str, Any], path: Path) -> None:
    """Old files hold the whole configuration of a training run: what is not known there is of no account, unless it
    looks like a misspelt key that is.
    """
    meant = _VALUES | METADATA
    for key in cfg:
        found = difflib.get_close_matches(key, meant, n=1, cutoff=_ALIKE)
        if key not in meant and key not in _TRAINING and found:
            raise DictionaryError(f"{path}: {key!r} is not known. Did you mean {found[0]!r}?")


def _architecture(cfg: Mapping[str, Any], path: Path) -> str:
    said = _typed(cfg, "architecture", str, "standard", path)
    if said in _REFUSED:
        raise DictionaryError(f"{path}: architecture {said!r} is no encoder, activation and decoder: {_REFUSED[said]}")
    if said not in ARCHITECTURES:
        near = nearest(said, ARCHITECTURES)
        raise DictionaryError(f"{path}: architecture {said!r} is not known.{near} Known are {', '.join(ARCHITECTURES)}")
    function = _typed(cfg, "activation_fn", str, "relu", path)
    if function == "topk" and said in ("standard", "topk"):
        return "topk"
    if function not in ("relu", said):
        raise DictionaryError(f"{path}: activation_fn {function!r} of architecture {said!r} is not known")
    return str(said)


def _k(cfg: Mapping[str, Any], architecture: str, path: Path) -> float | None:
    kwargs = _typed(cfg, "activation_fn_kwargs", dict, {}, path)
    for key, value in kwargs.items():
        if key != "k" and value:
            raise DictionaryError(f"{path}: {key!r} in activation_fn_kwargs is not known; 'k' is")
    k: Any = kwargs.get("k", cfg.get("k"))
    if architecture not in (*_COUNTING, *_AVERAGING):
        return None
    whole = type(k) is int
    if not (whole or (type(k) is float and architecture in _AVERAGING)) or not k > 0:
        raise DictionaryError(f"{path}: k is {k!r}; {architecture} takes the number of features of a token")
    return float(k)


def _normalization(cfg: Mapping[str, Any], path: Path) -> str:
    said = cfg.get("normalize_activations")
    if said is None or isinstance(said, bool):
        return "expected_average_only_in" if said else "none"
    if said not in NORMALIZATIONS:
        raise DictionaryError(
            f"{path}: normalize_activations is {said!r}; {', '.join(NORMALIZATIONS)} are known."
            f"{nearest(str(said), NORMALIZATIONS)}"
        )
    return str(said)


def _size(cfg: Mapping[str, Any], key: str, path: Path) -> int:
    size = _typed(cfg, key, int, None, path)
    if size is None:
        raise DictionaryError(f"{path} has no {key}.{nearest(key, cfg)}")
    return int(size)


def _factor(value: Any, path: Path, key: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise DictionaryError(f"{path}: {key} is {value!r}; a positive number was expected")
    return float(value)


def _typed(cfg: Mapping[str, Any], key: str, kind: type, default: Any, path: Path) -> Any:
    """The value of a key, the default where it is absent or null. DictionaryError for one of another type."""
    value = cfg.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DictionaryError(f"{path}: {key} is {value!r}; {kind.__name__} was expected")
    return value
