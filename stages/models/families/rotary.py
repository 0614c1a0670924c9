"""The rotary settings of a config.json, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5
(`rope_parameters`), read into a `RopeSpec`. Source of names, defaults and rules: transformers' modeling_rope_utils.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import ModelError
from ..spec import RopeSpec
from .config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """What the rotary settings of a family stand on: `d_head`, the context that its config.json names, the default of
    the base, and of the part of a head that turns (None: a family in which all of it always does).

    `base_key` and `fraction_key` are the names of the two in the old spelling; `original_context` is where it stands
    outside the table; `legacy` translates kinds that the family once called otherwise.
    """

    d_head: int
    n_ctx: int
    base: float = 10_000.0
    fraction: float | None = None
    base_key: str = "rope_theta"
    fraction_key: str = "partial_rotary_factor"
    original_context: int | None = None
    legacy: Mapping[str, str] | None = None


def read_rope(config: Config, rotary: Rotary) -> RopeSpec:
    """Read the one table of rotary settings of a model.

    Raises ModelError for a kind of scaling without a rule here, for settings of it that no rule reads, and for two
    spellings that disagree.
    """
    rotary = replace(rotary, base=config.number(rotary.base_key, rotary.base))
    if rotary.fraction is not None:
        rotary = replace(rotary, fraction=config.number(rotary.fraction_key, rotary.fraction))
    tables = [config.table("rope_scaling"), config.table("rope_parameters")]
    specs = [read_table(table, rotary) for table in tables if table is not None]
    if len(specs) == 2 and specs[0] != specs[1]:
        raise ModelError(f"the rotary settings disagree: rope_scaling gives {specs[0]}, rope_parameters {specs[1]}")
    return specs[0] if specs else _start(rotary)


def read_table(table: Config, rotary: Rotary) -> RopeSpec:
    """Read one table of rotary settings. Raises as `read_rope`."""
    rotary = replace(rotary, base=table.number("rope_theta", rotary.base))
    if rotary.fraction is None:
        table.only("partial_rotary_factor", 1)
    else:
        rotary = replace(rotary, fraction=table.number("partial_rotary_factor", rotary.fraction))
    names = {kind: kind for kind in _KINDS} | dict(rotary.legacy or {"su": "longrope"})
    kind = names[table.choice("rope_type", table.take("type", "default"), names)]
    spec = _KINDS[kind](table, rotary, _start(rotary))
    table.refuse_the_rest()
    return spec


def stretched(n_ctx: int, rope: RopeSpec) -> int:
    """The longest sequence that a model is made for once its positions are rescaled: kinds that are laid over a model
    afterwards leave its config.json's number as it was."""
    if rope.kind in ("dynamic", "yarn"):
        return max(n_ctx, int(rope.factor * rope.original_context))
    return n_ctx


def _start(rotary: Rotary) -> RopeSpec:
    dims = None if rotary.fraction in (None, 1.0) else int(rotary.d_head * rotary.fraction)
    if dims is not None and (dims < 2 or dims % 2 or dims > rotary.d_head):
        raise ModelError(
            f"a part of {rotary.fraction} of a head of {rotary.d_head} channels is {dims}; an even number of them turn"
        )
    return RopeSpec(base=rotary.base, dims=dims)


def _default(table: Config, rotary: Rotary, rope: RopeSpec) -> RopeSpec:
    table.take("factor", None)  # transformers' `default` does not read it either
    table.take("original_max_position_embeddings", None)
    return rope


def _linear(table: Config, rotary: Rotary, rope: RopeSpec) -> RopeSpec:
    table.take("original_max_position_embeddings", None)  # the rule does not depend on it
    return replace(rope, kind="linear", factor=table.number("factor"))


def _dynamic(table: Config, rotary: Rotary, rope: RopeSpec) -> RopeSpec:
    table.take("original_max_position_embeddings", None)  # transformers takes the config's own length
    return replace(rope, kind="dynamic", factor=table.number("factor"), original_context=rotary.n_ctx)


def _llama3(table: Config, rotary: Rotary, rope: RopeSpec) -> RopeSpec:
    return replace(
        rope,
        kind="llama3",
        factor=table.number("factor"),
        low_freq_factor=table.number("low_freq_factor"),
        high_freq_factor=table.number("high_freq_factor"),
        original_context=_original(table, rotary),
    )


def _yarn(table: Config, rotary: Rotary, rope: RopeSpec) -> RopeSpec:
    original = _original(table, rotary)
    factor = table.number("factor", rotary.n_ctx / original)
    mscale, mscale_all = table.bound("mscale"), table.bound("mscale_all_dim")

    def attention(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    usual = attention(mscale) / attention(mscale_all) if mscale and mscale_all else attention(1.0)
    return replace(
        rope,
        kind="yarn",
        factor=factor,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        truncate=table.flag("truncate", True),
        original_context=original,
        attention_factor=table.number("attention_factor", usual),
    )


def _longrope(table: Config, rotary: Rotary, rope: RopeSpec) -> RopeSpec:
    original = _original(table, rotary)
    factor = table.number("factor", rotary.n_ctx / original)
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    n_pairs = (rotary.d_head if rope.dims is None else rope.dims) // 2
    long, short = table.numbers("long_factor"), table.numbers("short_factor")
    if {len(long), len(short)} != {n_pairs}:
        raise table.refusal("long_factor and short_factor", (len(long), len(short)), f"{n_pairs} numbers each")
    return replace(
        rope,
        kind="longrope",
        divisors=long,
        short_divisors=short,
        original_context=original,
        attention_factor=table.number("attention_factor", usual),
    )


def _original(table: Config, rotary: Rotary) -> int:
    inside = table.count("original_max_position_embeddings", rotary.original_context or rotary.n_ctx)
    return rotary.original_context or inside  # transformers gives precedence to the one outside the table


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
