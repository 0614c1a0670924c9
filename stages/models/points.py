"""The places in a forward pass that can be read and changed: their names, their order, their dimensions.

Names are TransformerLens' strings with TransformerLens' meanings. Two families of foreign spellings are decided here:

* The names that TransformerLens' bridge gives to the same tensors (`blocks.3.hook_out`, `unembed.hook_out`) parse as
  aliases, for their meaning is equal.
* candle-mi's `attn.hook_scores` is taken before soft-cap and mask, so it is not `attn.hook_attn_scores`, which is taken
  after both; it is refused with that explanation. (Its `mlp.hook_pre` and `mlp.hook_post` are d_model wide and share
  their spelling with other tensors; here they mean what they mean in TransformerLens. Its `rwkv.hook_state` is the same
  tensor; its `rwkv.hook_decay` is, in RWKV-7, the logarithm of what has that name here, and its
  `rwkv.hook_effective_attn` is this one without the negative numbers, each row divided by its sum.)
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import total_ordering
from types import MappingProxyType

from .errors import HookError, nearest

_TOKENS = ("sequence", "position")
_STREAM = (*_TOKENS, "d_model")
_QUERIES = (*_TOKENS, "head", "d_head")
_KEYS = (*_TOKENS, "kv_head", "d_head")
_EDGES = ("sequence", "head", "query", "key")
_HIDDEN = (*_TOKENS, "d_mlp")
_STATES = ("sequence", "state_position", "head", "d_key", "d_value")

STATE = "rwkv.hook_state"
"""The one kind of point that is a whole matrix a head and token: it is captured and changed at chosen positions."""
EFFECTIVE_ATTN = "rwkv.hook_effective_attn"


@dataclass(frozen=True, slots=True)
class _Kind:
    """The dimensions of a capture of one forward, and what is captured."""

    dims: tuple[str, ...]
    meaning: str


# Rows stand in the order of firing.
_BEFORE: dict[str, _Kind] = {
    "embed.ln.hook_scale": _Kind(_TOKENS, "as `ln1.hook_scale`, of a norm on the token embeddings"),
    "embed.ln.hook_normalized": _Kind(_STREAM, "as `ln1.hook_normalized`, of a norm on the token embeddings"),
    "hook_embed": _Kind(
        _STREAM, "token embeddings, after the embedding multiplier, or the norm on them, of models that have one"
    ),
    "hook_pos_embed": _Kind(_STREAM, "learned position embeddings, which are added to them"),
}
_BLOCK: dict[str, _Kind] = {
    "hook_resid_pre": _Kind(_STREAM, "residual stream that enters the block"),
    "ln1.hook_scale": _Kind(
        _TOKENS,
        "root of the mean square (RMSNorm) or of the variance (LayerNorm) plus epsilon, in float32; TransformerLens "
        "keeps a last axis of length 1",
    ),
    "ln1.hook_normalized": _Kind(
        _STREAM, "the stream, centred by a LayerNorm, divided by the scale; before the weight"
    ),
    "attn.hook_in": _Kind(_STREAM, "what enters the projections"),
    "attn.hook_q": _Kind(_QUERIES, "queries as projected and clipped, before QK-norm and rotary"),
    "attn.hook_k": _Kind(_KEYS, "keys as projected and clipped, before QK-norm and rotary; one a key-value head"),
    "attn.hook_v": _Kind(_KEYS, "values; one a key-value head"),
    "attn.hook_rot_q": _Kind(_QUERIES, "queries after QK-norm and rotary"),
    "attn.hook_rot_k": _Kind(_KEYS, "keys after QK-norm and rotary"),
    "attn.hook_attn_scores": _Kind(_EDGES, "scores, scaled, after soft-cap and mask (−∞ where a key is not visible)"),
    "attn.hook_pattern": _Kind(_EDGES, "attention weights: the softmax of the scores"),
    "attn.hook_z": _Kind(_QUERIES, "weighted sum of the values"),
    "attn.hook_result": _Kind((*_TOKENS, "head", "d_model"), "each head's contribution; computed only when asked for"),
    "attn.hook_out": _Kind(_STREAM, "the attention module's raw output"),
    "rwkv.hook_in": _Kind(_STREAM, "what enters time mixing, before the token shift"),
    "rwkv.hook_r": _Kind(_QUERIES, "receptances"),
    "rwkv.hook_decay": _Kind(
        _QUERIES,
        "the factor, between 0 and 1, by which every key channel of the state is multiplied at this token, in float32",
    ),
    "rwkv.hook_a": _Kind(_QUERIES, "in-context learning rates, between 0 and 1"),
    "rwkv.hook_kk": _Kind(_QUERIES, "removal keys κ, of length 1 a head: what is taken out of the state"),
    "rwkv.hook_k": _Kind(_QUERIES, "keys as they are written to the state (RWKV-7: after the learning rate)"),
    "rwkv.hook_v": _Kind(_QUERIES, "values as they are written to the state (RWKV-7: after the value residual)"),
    "rwkv.hook_g": _Kind(_QUERIES, "gate, as it multiplies what was read"),
    EFFECTIVE_ATTN: _Kind(
        _EDGES, "how much of each value is read at each token, signed, rows adding up to anything; only when asked for"
    ),
    STATE: _Kind(
        _STATES,
        "the state that a token hands on to the next, in float32; by default that of each sequence's last token",
    ),
    "rwkv.hook_wkv": _Kind(_QUERIES, "what is read from the state, before the group norm (RWKV-6: with the bonus)"),
    "rwkv.hook_z": _Kind(_QUERIES, "what enters the output projection: normalised, gated (RWKV-7: with the bonus)"),
    "rwkv.hook_out": _Kind(_STREAM, "time mixing's raw output"),
    "hook_attn_out": _Kind(
        _STREAM, "what attention, or time mixing, adds to the residual stream: after a norm or a multiplier on it"
    ),
    "hook_resid_mid": _Kind(_STREAM, "residual stream between attention and MLP"),
    "ln2.hook_scale": _Kind(_TOKENS, "as `ln1.hook_scale`, of the norm before the MLP"),
    "ln2.hook_normalized": _Kind(_STREAM, "as `ln1.hook_normalized`, of the norm before the MLP"),
    "mlp.hook_in": _Kind(_STREAM, "what enters the MLP (RWKV: channel mixing, before the token shift)"),
    "mlp.hook_pre": _Kind(_HIDDEN, "what enters the activation function (of a gated MLP: the gate)"),
    "mlp.hook_pre_linear": _Kind(_HIDDEN, "the other factor of a gated MLP"),
    "mlp.hook_post": _Kind(_HIDDEN, "what enters the down projection"),
    "mlp.hook_receptance": _Kind(_STREAM, "receptance of RWKV-6's channel mixing, between 0 and 1"),
    "mlp.hook_out": _Kind(_STREAM, "the MLP's raw output"),
    "hook_mlp_out": _Kind(
        _STREAM, "what the MLP adds to the residual stream: after a norm, a multiplier or the receptance on it"
    ),
    "hook_resid_post": _Kind(_STREAM, "residual stream that leaves the block"),
}
_AFTER: dict[str, _Kind] = {
    "ln_final.hook_scale": _Kind(_TOKENS, "as `ln1.hook_scale`, of the final norm"),
    "ln_final.hook_normalized": _Kind(_STREAM, "as `ln1.hook_normalized`, of the final norm"),
    "hook_final_norm": _Kind(_STREAM, "what enters the unembedding"),
    "hook_logits": _Kind((*_TOKENS, "vocab"), "logits, after multiplier and soft-cap"),
}

# Nothing else needs them, and they are many times larger than the stream: a `*` does not stand for them.
_ONLY_BY_NAME = frozenset({"attn.hook_result", EFFECTIVE_ATTN})

BEFORE: tuple[str, ...] = tuple(_BEFORE)
"""Kinds that fire once, before the first block."""
BLOCK: tuple[str, ...] = tuple(_BLOCK)
"""Kinds that fire in every block."""
AFTER: tuple[str, ...] = tuple(_AFTER)
"""Kinds that fire once, after the last block."""

_KINDS: Mapping[str, _Kind] = MappingProxyType(_BEFORE | _BLOCK | _AFTER)
_ORDER: Mapping[str, int] = MappingProxyType({kind: i for i, kind in enumerate(_KINDS)})

_BLOCK_ALIASES = {"hook_in": "hook_resid_pre", "hook_out": "hook_resid_post"}
_GLOBAL_ALIASES = {
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
    "unembed.hook_out": "hook_logits",
}
_NOT_THE_SAME = {
    "attn.hook_scores": "scores before soft-cap and mask are not kept; 'attn.hook_attn_scores' are those after both",
}

_INSTEAD = {
    "attn.hook_in": "rwkv.hook_in",
    "attn.hook_q": "rwkv.hook_r",
    "attn.hook_k": "rwkv.hook_k",
    "attn.hook_v": "rwkv.hook_v",
    "attn.hook_attn_scores": EFFECTIVE_ATTN,
    "attn.hook_pattern": EFFECTIVE_ATTN,
    "attn.hook_z": "rwkv.hook_z",
    "attn.hook_out": "rwkv.hook_out",
}
"""What comes nearest to a point of attention in a recurrent model, and the other way round."""
_INSTEAD |= {there: here for here, there in _INSTEAD.items()}

_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
_MOST_ALTERNATIVES = 100_000


def dims_of(kind: str) -> tuple[str, ...]:
    """Give the dimension names of a capture at this kind of point in one forward, such as `("sequence", "position",
    "d_model")`. A norm's scale has one value a token: TransformerLens' trailing axis of length one is not kept.

    Raises HookError for a kind that is not in the vocabulary.
    """
    return _known(kind).dims


def stored_dims(kind: str) -> tuple[str, ...]:
    """Dimensions of a kind of hook point in a store: `token` where one forward has `sequence` and `position`, layers in
    front.
    """
    dims = dims_of(kind)
    dims = ("token", *dims[2:]) if dims[:2] == ("sequence", "position") else dims
    return ("layer", *dims) if kind in BLOCK else dims


def meaning_of(kind: str) -> str:
    """Say in a line what is captured at this kind of point. Raises HookError for one that is not in the vocabulary."""
    return _known(kind).meaning


def _known(kind: str) -> _Kind:
    if kind not in _KINDS:
        raise HookError(f"no kind of hook point is called {kind!r}.{nearest(kind, _KINDS)}")
    return _KINDS[kind]


@total_ordering
@dataclass(frozen=True, slots=True)
class HookPoint:
    """One place in a model's forward: a kind (`"attn.hook_q"`) and the block it lies in (None for global points).

    `str()` gives TransformerLens' name, `parse` reads it back; points sort in the order in which they fire. Raises
    HookError for an unknown kind, and for a layer that is missing, negative or superfluous.
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        dims_of(self.kind)
        if self.kind in _BLOCK and (self.layer is None or self.layer < 0):
            raise HookError(f"{self.kind!r} lies in a block: its layer must be a number from 0 on, not {self.layer}")
        if self.kind not in _BLOCK and self.layer is not None:
            raise HookError(f"{self.kind!r} lies outside the blocks and takes no layer, but {self.layer} was given")

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"blocks.{self.layer}.{self.kind}"

    def __lt__(self, other: "HookPoint") -> bool:
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[float, int]:
        if self.layer is not None:
            return (self.layer, _ORDER[self.kind])
        return (-1.0 if self.kind in _BEFORE else float("inf"), _ORDER[self.kind])

    @property
    def dims(self) -> tuple[str, ...]:
        """Dimension names of a capture here, in one forward."""
        return _KINDS[self.kind].dims

    @classmethod
    def parse(cls, text: str) -> "HookPoint":
        """Read a name such as `blocks.3.attn.hook_z`, `hook_embed` or one of the aliases that mean the same.

        Raises HookError with the nearest known name; whether a given model has the point is asked by `expand`.
        """
        return _parse(text, tuple(_KINDS))


def _parse(text: str, kinds: Iterable[str]) -> HookPoint:
    """Read the name of a point; of what is no name, the nearest of these kinds is told."""
    if found := _BLOCK_NAME.fullmatch(text):
        layer, kind = int(found[1]), _BLOCK_ALIASES.get(found[2], found[2])
        if kind in _BLOCK:
            return HookPoint(kind, layer)
        why = _NOT_THE_SAME.get(kind)
        near = nearest(text, (f"blocks.{layer}.{known}" for known in kinds if known in _BLOCK))
        hint = f" Note that {why}." if why else near
        raise HookError(f"no hook point is called {text!r}.{hint}")
    kind = _GLOBAL_ALIASES.get(text, text)
    if kind in _KINDS and kind not in _BLOCK:
        return HookPoint(kind)
    if kind in _BLOCK:
        raise HookError(f"{text!r} lies in a block and needs its layer: 'blocks.0.{kind}', or 'blocks.*.{kind}'")
    examples = (f"blocks.0.{known}" if known in _BLOCK else known for known in kinds)
    raise HookError(f"no hook point is called {text!r}.{nearest(text, examples)}")


def expand(patterns: Iterable[str | HookPoint], available: Sequence[HookPoint]) -> tuple[HookPoint, ...]:
    """Give the points of `available` that the patterns name, in firing order, each once.

    A pattern is a HookPoint, a name, or a name with `{a,b}` (either), `[3-5]` or `[0,4,8-11]` (whole numbers, ends
    included) and `*` (any run of characters, dots included; it stands for `attn.hook_result`, which in TransformerLens,
    too, is off unless it is asked for, and for `rwkv.hook_effective_attn` only in a pattern that spells `hook_result`
    or `hook_effective_attn`). Braces and brackets enumerate: every alternative they stand for must name a point, so
    that `blocks.[28-31]…` on a model of 30 layers is an error and not two layers.

    Raises HookError for any alternative that matches nothing, naming the legal layers, the points the model has, or
    the nearest name.
    """
    names = {str(point): point for point in available}
    chosen: set[HookPoint] = set()
    for pattern in patterns:
        for text in [str(pattern)] if isinstance(pattern, HookPoint) else _alternatives(pattern):
            chosen.update(_matches(text, names))
    return tuple(sorted(chosen))


def _matches(text: str, names: Mapping[str, HookPoint]) -> list[HookPoint]:
    if "*" not in text:
        if text in names:
            return [names[text]]
        meant = _parse(text, dict.fromkeys(point.kind for point in names.values()))
        if str(meant) not in names:
            raise _absent(meant, names)
        return [names[str(meant)]]
    shape = re.compile(".*".join(re.escape(piece) for piece in text.split("*")))
    spelt = {kind for kind in _ONLY_BY_NAME if kind.rpartition(".")[2] in text}
    skipped = _ONLY_BY_NAME - spelt
    if found := [point for name, point in names.items() if shape.fullmatch(name) and point.kind not in skipped]:
        return found
    if layer := re.match(r"blocks\.(\d+)\.", text):
        _check_layer(text, int(layer[1]), names)
    hint = _hint(text.replace("*", "0", 1), names).replace("blocks.0.", "blocks.*.")
    raise HookError(f"{text!r} matches no hook point of this model, which has {_listing(names)}.{hint}")


def _absent(point: HookPoint, names: Mapping[str, HookPoint]) -> HookError:
    if point.layer is not None:
        _check_layer(str(point), point.layer, names)
    hint = _hint(str(point), names)
    return HookError(f"this model has no hook point {str(point)!r}; it has {_listing(names)}.{hint}")


def _hint(text: str, names: Mapping[str, HookPoint]) -> str:
    if found := _BLOCK_NAME.fullmatch(text):
        counterpart = f"blocks.{found[1]}.{_INSTEAD.get(found[2], '')}"
        if counterpart in names:
            return f" Did you mean {counterpart!r}?"
    return nearest(text, names)


def _check_layer(text: str, layer: int, names: Mapping[str, HookPoint]) -> None:
    layers = {point.layer for point in names.values() if point.layer is not None}
    if layer not in layers:
        legal = f"0 to {max(layers)}" if layers else "none"
        raise HookError(f"{text!r} names layer {layer}, but the layers of this model are {legal}")


def _listing(names: Mapping[str, HookPoint]) -> str:
    kinds = dict.fromkeys(p.kind if p.layer is None else f"blocks.*.{p.kind}" for p in sorted(names.values()))
    return ", ".join(kinds)


def _alternatives(pattern: str) -> list[str]:
    pieces = re.split(r"(\{[^{}]*\}|\[[^\[\]]*\])", pattern)
    if any(mark in piece for piece in pieces[::2] for mark in "{}[]"):
        raise HookError(f"{pattern!r} has a brace or bracket without its partner, or one inside another")
    choices = [[piece] if i % 2 == 0 else _choices(piece, pattern) for i, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MOST_ALTERNATIVES:
        raise HookError(f"{pattern!r} stands for {count:,} names, more than the {_MOST_ALTERNATIVES:,} that are tried")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(piece: str, pattern: str) -> list[str]:
    parts = [part.strip() for part in piece[1:-1].split(",")]
    if piece[0] == "{":
        return parts
    numbers: list[str] = []
    for part in parts:
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if ends is None:
            raise HookError(f"{piece!r} in {pattern!r} is no list of whole numbers such as [3-5] or [0,4,8-11]")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise HookError(f"{piece!r} in {pattern!r} counts down: write the smaller number first")
        numbers += map(str, range(first, last + 1))
    return numbers
