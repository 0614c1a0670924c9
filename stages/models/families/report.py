"""Whether forebay can run a checkpoint and, if not, everything that stands in the way, at once."""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError, nearest
from .config import Config
from .family import Family
from .layout import Shape, TensorComparison, compare_tensors

_MOST_LINES = 24  # of one list in a printed report


@dataclass(frozen=True, slots=True, kw_only=True)
class CompatibilityReport:
    """What forebay makes of a checkpoint. `str(report)` is for a terminal.

    `model_type` is that of its config.json, `resembles` the family whose model it is, or is nearest to where nobody
    knows the type (`known` is False then, and `inferred` and `assumed` say what was read from settings and tensors, and
    what neither tells). Then what stands in the way: `problems` with settings that were to be read, `unhonoured`
    settings that nothing reads, `tensors` that do not fit, and `foreign`, what their names are known for elsewhere.
    """

    where: str
    model_type: str | None
    known: bool
    resembles: str
    inferred: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    unhonoured: Mapping[str, Any] = field(default_factory=dict)
    readable: tuple[str, ...] = ()
    tensors: TensorComparison = field(default_factory=TensorComparison)
    foreign: tuple[str, ...] = ()

    @property
    def compatible(self) -> bool:
        """Whether every setting is honoured and every tensor read."""
        tensors = self.tensors
        return not (self.problems or self.unhonoured or tensors.missing or tensors.misshapen or tensors.unread)

    def __str__(self) -> str:
        lists = _inferences(self) if self.compatible else _obstacles(self)
        return "\n".join((self._headline(), *_print(lists)))

    def _headline(self) -> str:
        if self.known:
            kind = f"{self.where} is of model_type {self.model_type!r}"
            return f"{kind}, and forebay can run it" if self.compatible else f"{kind}, but forebay cannot run it"
        named = "has no model_type" if self.model_type is None else f"is of unknown model_type {self.model_type!r}"
        outcome = "is read as a" if self.compatible else "cannot be read, not even as a"
        hint = "" if self.model_type is None else nearest(self.model_type, (self.resembles,))
        return f"{self.where} {named}; it {outcome} relative of {self.resembles!r}.{hint}"


def _inferences(report: CompatibilityReport) -> Iterator[tuple[str, Iterable[str]]]:
    yield "from its settings and tensors", report.inferred
    yield "taken for granted, because neither tells", report.assumed


def _obstacles(report: CompatibilityReport) -> Iterator[tuple[str, Iterable[str]]]:
    tensors = report.tensors
    yield "problems", report.problems
    yield (
        "settings that nothing here honours; a forward that ignored them could be silently wrong",
        (f"{key} = {value!r}{nearest(key, report.readable)}" for key, value in sorted(report.unhonoured.items())),
    )
    unread = _together(tensors.unread)
    similar = [pattern for pattern, _ in unread]
    yield (
        "tensors expected and not found",
        (
            f"{names} {list(shape)}{_alike(pattern, similar)}"
            for (pattern, shape), names in _together(tensors.missing).items()
        ),
    )
    yield (
        "tensors of another shape",
        (
            f"{names} {list(found)}, expected {list(expected)}"
            for (_, (found, expected)), names in _together(tensors.misshapen).items()
        ),
    )
    yield (
        "tensors found that nothing here reads; a forward that ignored them could be silently wrong",
        (f"{names} {list(shape)}" for (_, shape), names in unread.items()),
    )
    yield "such names are known from", report.foreign


def _print(lists: Iterable[tuple[str, Iterable[str]]]) -> Iterator[str]:
    for title, entries in lists:
        lines = list(entries)
        if lines:
            yield f"  {title}:"
            yield from (f"    {line}" for line in lines[:_MOST_LINES])
        if len(lines) > _MOST_LINES:
            yield f"    and {len(lines) - _MOST_LINES} more"


def _together(tensors: Mapping[str, Any]) -> dict[tuple[str, Any], str]:
    """Give tensors that differ by numbers in their names only in one line, by the pattern of their names and what is
    said of them."""
    alike: dict[tuple[str, Any], list[str]] = {}
    for name, said in tensors.items():
        alike.setdefault((re.sub(r"\d+(?=\.)", "*", name), said), []).append(name)
    return {key: ", ".join(names) if len(names) < 4 else f"{key[0]} (× {len(names)})" for key, names in alike.items()}


def _alike(pattern: str, others: Iterable[str]) -> str:
    found = difflib.get_close_matches(pattern, dict.fromkeys(others), n=3, cutoff=0.7)
    return f"; similar: {', '.join(found)}" if found else ""


def check_known(
    values: Mapping[str, Any], shapes: Mapping[str, Shape], name: str, family: Family, folder: Path
) -> CompatibilityReport:
    """Report on a checkpoint whose family is known. Tensors and the remaining settings are compared once the family's
    own settings can be read. Raises nothing."""
    watched = Watched(values)
    say = functools.partial(CompatibilityReport, where=str(folder), model_type=name, known=True, resembles=name)
    try:
        family = family.as_stored(shapes)
        spec = family.parse(Config(watched, str(folder / "config.json"), shapes))
    except ModelError as error:
        return say(problems=(str(error),))
    tensors = compare_tensors(spec, family.layout, shapes)
    return say(
        unhonoured=watched.unhonoured(),
        readable=watched.seen,
        tensors=tensors,
        foreign=foreign_names(tensors.unread),
    )


class Watched(Mapping[str, Any]):
    """A parsed config.json that remembers which of its keys were looked up, so that the rest can be listed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._seen.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def seen(self) -> tuple[str, ...]:
        """The keys that were asked for, whether they are there or not."""
        return tuple(sorted(self._seen))

    def unhonoured(self) -> dict[str, Any]:
        """Give the settings that nobody asked for and that are not known to be without effect."""
        return {key: value for key, value in self._values.items() if key not in self._seen and _matters(key, value)}


def _matters(key: str, value: object) -> bool:
    try:
        Config({key: value}, "").refuse_the_rest()
    except ModelError:
        return True
    return False


_FOREIGN: Mapping[str, str] = {
    r"transformer\.blocks\.": "MPT and Falcon's first code (transformer.blocks.)",
    r"transformer\.layer\.": "BLOOM's first code and DistilBERT (transformer.layer.)",
    r"word_embeddings_layernorm": "BLOOM, whose attention is biased by distance (word_embeddings_layernorm)",
    r"h\.\d+\.self_attention\.": "Falcon and BLOOM (h.N.self_attention.)",
    r"h\.\d+\.attn\.(attention\.)?(q|k|v|qkv)_proj": "GPT-J, GPT-Neo and CodeGen (attn.q_proj under transformer.h.)",
    r"decoder\.layers\.": "OPT and encoder-decoder models (decoder.layers.)",
    r"(bert|encoder)\.(layer|block)s?\.": "BERT and other encoders (encoder.layer.)",
    r"backbone\.layers\.|\.mixer\.": "Mamba and other state-space models (backbone.layers., mixer)",
    r"\.time_(mix_|first)": "RWKV-4 and RWKV-5 (time_mix_key, time_first); versions 6 and 7 can be read",
    r"\.time_state$": "states that were trained for a model of RWKV (time_state)",
    r"\.s_emb": "variants of RWKV with an embedding in every layer (s_emb)",
    r"(^|\.)blocks\.\d+\.(att|ffn)\.": "RWKV as its authors publish it (blocks.N.att.): load the .pth file itself",
    r"\.time_maa_|\.x_[rwkvagx]$|\.r_k$": "RWKV-6 and RWKV-7 (time_maa_x, x_r): their model_type is rwkv6 or rwkv7",
    r"\.(linear_attn|conv1d|short_conv)\.": "mixtures of attention with a recurrence (linear_attn, conv1d)",
    r"experts?\.|\.router\.|block_sparse_moe|\.shared_expert": "mixtures of experts (experts, router)",
    r"\.(q_a|kv_a|kv_b)_(proj|layernorm)": "multi-head latent attention, DeepSeek's (kv_a_proj, kv_b_proj)",
    r"lora_[AB]\.": "adapters: merge them into the model's own weights first (lora_A, lora_B)",
    r"vision|multi_modal|(^|\.)language_model\.": "models of images and text (vision_tower, language_model.)",
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|SCB|absmax)$": "quantised weights (qweight, weight_scale)",
}
"""Regular expressions of tensor names that no family here reads → what they are known from."""


def foreign_names(names: Iterable[str]) -> tuple[str, ...]:
    """Give what some tensor names are known from elsewhere, a line for each kind that occurs."""
    held = list(names)
    return tuple(origin for pattern, origin in _FOREIGN.items() if any(re.search(pattern, name) for name in held))
