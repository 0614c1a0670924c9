"""One module a kind of model family: config.json read into a `ModelSpec`, and tensor names. No forward passes here."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnverifiedModelWarning
from ..spec import ModelSpec
from . import gemma, gpt2, gpt_neox, llama, olmo, phi, qwen, rwkv_folders, starcoder2
from .auto import infer
from .config import Config
from .family import Family
from .layout import Layout
from .report import CompatibilityReport, check_known

FAMILIES: Mapping[str, Family] = {
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "gpt2": gpt2.GPT2,
    "gpt_neox": gpt_neox.GPT_NEOX,
    "granite": llama.GRANITE,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "olmo": olmo.OLMO,
    "olmo2": olmo.OLMO2,
    "phi": phi.PHI,
    "phi3": phi.PHI3,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "rwkv6": rwkv_folders.RWKV6,
    "rwkv7": rwkv_folders.RWKV7,
    "starcoder2": starcoder2.STARCODER2,
}
"""The families by the `model_type` of their config.json. A new one is a parser, a table of names and a row here."""


def parse_config(
    values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> tuple[ModelSpec, Layout]:
    """Read a parsed config.json, in the spelling of transformers 4 or 5, into a `ModelSpec`, and tell how the tensors
    lie, of which `shapes` gives all by name; no torch is imported. `folder` is named in messages.

    An unknown model_type, or none, is read by analogy with the families, from settings and tensors (`auto`), and
    announced with an `UnverifiedModelWarning`. Raises ModelError for a missing or impossible value, for every setting
    that nothing here honours and, where the model_type is unknown, for every tensor too: the whole report at once.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        spec, layout, report = infer(values, shapes, FAMILIES, folder)
        if not report.compatible:
            raise ModelError(f"{report}\nKnown model_types: {', '.join(sorted(FAMILIES))}")
        advice = "Compare its logits with its own implementation before you trust a number."
        warnings.warn(f"{report}\n{advice}", UnverifiedModelWarning, stacklevel=2)
        return spec, layout
    family = family.as_stored(shapes)
    config = Config(values, str(folder / "config.json"), shapes)
    spec = family.parse(config)
    config.refuse_the_rest()
    return spec, family.layout


def check_config(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> CompatibilityReport:
    """Report on what `parse_config` would read, for a known or an unknown model_type. Raises and warns of nothing."""
    name = str(values.get("model_type"))
    if name in FAMILIES:
        return check_known(values, shapes, name, FAMILIES[name], folder)
    return infer(values, shapes, FAMILIES, folder)[2]
