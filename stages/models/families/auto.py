"""A checkpoint of a kind that has no row in the table of families: its architecture, from settings and tensors.

The tensors say which parts there are (`naming`), config.json the rest, in every usual spelling (`settings`). Every
setting must be read by something and every tensor have a place; what can be meant in two ways is refused. What neither
can tell, such as which channels rotary embedding pairs, is listed as assumed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..spec import ModelSpec, RopeSpec
from .config import Config
from .family import Family
from .layout import Layout, Shape, compare_tensors
from .naming import Naming, fit_names
from .report import CompatibilityReport, Watched, foreign_names
from .settings import PARALLEL, Settings

_NEIGHBOURS = "its rotary embedding turns channel i with channel i + 1, which nothing in its files tells"
_HIDDEN: Mapping[str, str] = {
    "cohere": _NEIGHBOURS,
    "cohere2": _NEIGHBOURS,
    "ernie4_5": _NEIGHBOURS,
    "exaone4": "where some layers slide, positions do not enter into the others, which nothing in its files tells",
    "glm": _NEIGHBOURS,
    "glm4": _NEIGHBOURS,
    "helium": _NEIGHBOURS,
    "nemotron": "its norms have the weight 1 + w, which nothing in its files tells",
}
"""Kinds of models that read well by analogy, and wrongly. Source: transformers' models of these names."""


def infer(
    values: Mapping[str, Any], shapes: Mapping[str, Shape], families: Mapping[str, Family], folder: Path
) -> tuple[ModelSpec, Layout, CompatibilityReport]:
    """Read a parsed config.json of unknown model_type, and the names and shapes of its tensors, into an architecture.

    `families` are those whose layouts may be combined, `folder` is named in messages. Architecture and layout are to be
    used only where the report is compatible. Raises nothing: whatever cannot be read stands in the report.
    """
    attentive = {name: family for name, family in families.items() if "blocks.{layer}.attn.q" in family.layout.names}
    ordered = dict(sorted(attentive.items(), key=lambda item: (item[0] != "llama", item[0])))  # the plainest first
    layouts = list({id(family.layout): family.layout for family in ordered.values()}.values())
    naming = fit_names(shapes, layouts, parallel=any(values.get(key) is True for key in PARALLEL))
    watched = Watched(values)
    settings = Settings(watched, naming, str(folder / "config.json"))
    spec = ModelSpec(**settings.fields())
    tensors = compare_tensors(spec, naming.layout, shapes, sized=settings.sized)
    resembles, unlike = _nearest(spec, naming.base, ordered, values)
    differs = (f"unlike {resembles}: {', '.join(unlike)}",) if unlike else ()
    model_type = values.get("model_type")
    hidden = (_HIDDEN[model_type],) if isinstance(model_type, str) and model_type in _HIDDEN else ()
    report = CompatibilityReport(
        where=str(folder),
        model_type=model_type if isinstance(model_type, str) else None,
        known=False,
        resembles=resembles,
        inferred=(*_describe(spec, naming), *differs),
        assumed=tuple(settings.assumed),
        problems=tuple(dict.fromkeys((*hidden, *settings.problems))),
        unhonoured={key: value for key, value in watched.unhonoured().items() if value is not None},
        readable=watched.seen,
        tensors=tensors,
        foreign=foreign_names(tensors.unread),
    )
    return spec, naming.layout, report


def _nearest(
    spec: ModelSpec, base: Layout, families: Mapping[str, Family], values: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Give the family that reads the same settings into the most similar architecture, and the fields that differ;
    where none can read them, one whose names the tensors have."""
    fields = [field.name for field in dataclasses.fields(spec) if field.name != "family"]
    found = [(name, fields) for name, family in families.items() if family.layout is base]
    for name, family in families.items():
        if family.layout.prefix != base.prefix:
            continue
        try:
            other = family.parse(Config(values, name))
        except ModelError:
            continue
        found.append((name, [field for field in fields if getattr(spec, field) != getattr(other, field)]))
    return min(found, key=lambda family: (families[family[0]].layout != base, len(family[1])))


def _describe(spec: ModelSpec, naming: Naming) -> Iterator[str]:
    yield (
        f"{spec.n_layers} layers, {spec.d_model} channels, {spec.n_heads} heads of {spec.d_head}, "
        f"{spec.n_kv_heads} key-value heads, MLP of {spec.d_mlp}, vocabulary of {spec.d_vocab}, context of {spec.n_ctx}"
    )
    where = {(True, False): "before", (False, True): "behind", (True, True): "before and behind"}
    norm = {"rms": "RMSNorm", "layer": "LayerNorm"}[spec.norm]
    biased = " and biases" if spec.norm_bias else ""
    place = where[spec.pre_norms, spec.post_norms]
    yield f"{norm} of epsilon {spec.norm_eps:g} with weights{biased} {place} attention and MLP"
    if spec.parallel:
        yield f"attention and MLP side by side, behind {'one norm' if spec.shared_norm else 'a norm each'}"
    if spec.qk_norm is not None:
        yield f"queries and keys normalised {'in each head' if spec.qk_norm == 'head' else 'over all heads together'}"
    yield from _positions(spec)
    fused = [f"{name} in one tensor" for stem, name in _FUSED.items() if naming.mates(stem) > 1]
    kind = "gated" if spec.gated else "plain"
    yield "; ".join((f"a {kind} MLP with {spec.activation}", *fused))
    biases = [name for name, there in _biases(spec).items() if there]
    yield f"biases: {', '.join(biases) or 'none'}"
    yield "the unembedding is the embedding" if spec.tied else "an unembedding of its own"
    plain = {field.name: field.default for field in dataclasses.fields(spec)}
    for name in _NUMBERS:
        if getattr(spec, name) != plain[name]:
            yield f"{name} = {getattr(spec, name):g}"


_FUSED = {"blocks.{layer}.attn.q": "queries, keys and values", "blocks.{layer}.mlp.up": "gate and up"}
_NUMBERS = (
    "attn_scale",
    "attn_scale_by_layer",
    "attn_softcap",
    "clip_qkv",
    "embed_scale",
    "residual_scale",
    "logit_scale",
    "logit_softcap",
    "norm_offset",
)


def _biases(spec: ModelSpec) -> Mapping[str, bool]:
    return {
        "queries, keys, values": spec.qkv_bias,
        "attention's output": spec.out_bias,
        "MLP": spec.mlp_bias,
        "unembedding": spec.unembed_bias,
    }


def _positions(spec: ModelSpec) -> Iterator[str]:
    if spec.learned_positions:
        yield "learned position embeddings"
    if spec.rope is not None:
        yield f"rotary embedding: {_turns(spec.rope)}"
    if spec.sliding_rope is not None:
        yield f"rotary embedding of sliding layers: {_turns(spec.sliding_rope)}"
    if spec.window is not None:
        layers = [str(layer) for layer in range(spec.n_layers) if spec.slides(layer)]
        which = "all layers" if len(layers) == spec.n_layers else f"layers {', '.join(layers)}"
        yield f"a sliding window of {spec.window} in {which}"


def _turns(rope: RopeSpec) -> str:
    whole = "all channels" if rope.dims is None else f"{rope.dims} channels"
    return f"{whole} of a head, base {rope.base:g}, {rope.kind}"
