"""One module a kind of model family: config.json read into a `ModelSpec`, and tensor names. No forward passes here."""

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError, nearest
from ..spec import ModelSpec
from . import gemma, gpt2, gpt_neox, llama, olmo, phi, qwen, starcoder2
from .config import Config
from .family import Family

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
    "starcoder2": starcoder2.STARCODER2,
}
"""The families by the `model_type` of their config.json. A new one is a parser, a table of names and a row here."""


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """Give the family that a parsed config.json belongs to. Raises ModelError for an unknown one, listing the known."""
    known = ", ".join(sorted(FAMILIES))
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{where} has no model_type, so its architecture is unknown; known ones: {known}")
    if kind not in FAMILIES:
        raise ModelError(f"{where} is of model_type {kind!r}; known ones: {known}.{nearest(kind, FAMILIES)}")
    return FAMILIES[kind]


def parse_config(values: Mapping[str, Any], where: str) -> ModelSpec:
    """Read a parsed config.json, in the spelling of transformers 4 or 5, into a `ModelSpec`; no torch is imported.

    `where` names the file in messages. Raises ModelError for an unknown family, for a missing or impossible value, and
    for every setting that nothing here honours.
    """
    config = Config(values, where)
    spec = family_of(values, where).parse(config)
    config.refuse_the_rest()
    return spec
