"""What cutting edges of attention does to a prediction: of one cut in detail, and of the same cut layer by layer.

Geva et al. (2023), "Dissecting Recall of Factual Associations in Auto-Regressive Language Models": edges from the last
position to some others are knocked out in a window of layers, and the prediction is compared with that of the model as
it is. A cut edge has weight exactly 0 and the rest of its row shares what it had.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.addressing import Index, counted, listed
from ..models.edges import Edge, KnockoutSpec
from ..models.interventions import SCORES, Intervention
from ..models.points import HookPoint
from ..models.taps import HookSpec
from .intervention_effect import compare_logits
from .metrics import Divergence, Metric, divergence, logits_at, place_of
from .patching import window_of
from .prompts import Prompt, one_prompt, text_of

if TYPE_CHECKING:
    from ..models.model import Model

BY: tuple[tuple[str, ...], ...] = (("layer",), ("layer", "head"))
"""What a sweep can go over."""

_TOLD = {
    "kl_divergence": ("nats", "KL(base ‖ changed)"),
    "base_probability": ("probability", "probability without the knockout"),
    "changed_probability": ("probability", "probability with the knockout"),
    "probability_change": ("probability", "probability, changed − base"),
    "logit_difference": ("logit", "logit, base − changed"),
}
_SWEPT = {"metric": "with the knockout", "baseline": "without a knockout", "change": "effect of the knockout"}
_ASKED = ("base_probability", "changed_probability", "logit_difference")


def knockout_effect(
    model: Model,
    prompt: Prompt,
    knockout: KnockoutSpec | Iterable[Edge],
    *,
    tokens: int | Sequence[int] = (),
    position: int = -1,
    top: int = 10,
) -> xr.Dataset:
    """What a knockout does to the prediction at `position` of one prompt, −1 being its last token.

    `knockout`: a KnockoutSpec, or edges (query, key), which are then cut in every layer and head. Gives
    `kl_divergence` (0-d, nats), and along `rank` the `top` tokens whose probability changed most as `compare_logits`
    gives them: `top_token_id`, `base_probability`, `changed_probability`, `probability_change` and `logit_difference`
    (base − changed: positive where the knockout lowered the logit), with the coordinate `token_text` where the model
    has a tokenizer. For each of `tokens`, along `vocab`: `asked_base_probability`, `asked_changed_probability` and
    `asked_logit_difference`, with the coordinate `vocab_text`. All float32 but ids.

    The model is run twice, both times with the attention of the layers concerned computed step by step, so that
    nothing but the knockout differs. Memory: two forwards one after the other, and the logits of one position.
    Definitions: candle-mi's AblationResult, without its cut-off of small probabilities.

    HookError as `KnockoutSpec.hooks` and `Model.forward` raise; SchemaError for several prompts, for a position that
    the prompt does not have, for tokens that are not in the vocabulary and for a `top` that is not between 1 and its
    size; all before anything is computed.
    """
    spec = knockout if isinstance(knockout, KnockoutSpec) else KnockoutSpec(edges=list(knockout))
    ids = one_prompt(model, prompt)
    place = place_of(position, len(ids))
    asked = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1).tolist()
    _check_tokens(asked, top, model.spec.d_vocab)
    hooks = spec.hooks(model.spec)
    same = HookSpec().capture(*(change.pattern for change in hooks.changes))
    base, changed = (logits_at(model, ids[None], one, place)[None] for one in (same, hooks))
    effect = compare_logits(base, changed, [1], top=top).isel(sequence=0, position=0, drop=True)
    effect = effect.assign_attrs(metric_position=position)
    if asked:
        effect = effect.merge(_of_tokens(base[0, 0], changed[0, 0], asked))
    return _labelled(model, effect, asked)


def knockout_sweep(
    model: Model,
    prompt: Prompt,
    edges: Iterable[Edge],
    *,
    metric: Metric | None = None,
    by: Sequence[str] = ("layer",),
    window: int = 1,
    layers: Index | None = None,
    heads: Index | None = None,
    batch_size: int = 32,
) -> xr.Dataset:
    """Cut the same edges in one layer, or one head of one layer, after another, and measure the prediction each time.

    `by=("layer",)` cuts them in all `heads` at once, `("layer", "head")` in one at a time; `layers` and `heads` narrow
    the sweep (None: all). With a `window` of w layers, what stands at a layer is the knockout in w of them around it,
    from w // 2 layers before it on, clipped to the model, as Geva et al. have it. `metric` says what is measured, and
    where; None: the divergence KL(base ‖ changed) of the prediction at the last position, in nats.

    Gives, float32: `metric` [layer] or [layer, head], of the model so changed; `baseline` (0-d), of the model as it
    is; and `change`, metric − baseline. The attributes say which metric it is, and at which position.

    `batch_size` knockouts are run in one forward, beside the prompt as it is, so that rounding is the same in both.
    Memory: a forward of `batch_size` + 1 sequences with one layer's scores and pattern, and the logits of one position
    of each. Refuses as `knockout_effect` does, and SchemaError for a `by`, `window` or `batch_size` that is none, all
    before anything is computed.
    """
    if tuple(by) not in BY:
        raise SchemaError(f"by = {tuple(by)}: a sweep goes over {' or '.join(map(str, BY))}")
    if window < 1 or batch_size < 1:
        raise SchemaError(f"window = {window} and batch_size = {batch_size}: both are at least 1")
    edges = list(edges)
    ids = one_prompt(model, prompt)
    KnockoutSpec(edges=edges, layers=layers, heads=heads).hooks(model.spec)
    chosen = [_numbers(layers, "layer", model.spec.n_layers), _numbers(heads, "head", model.spec.n_heads)]
    place = place_of(-1 if metric is None else metric.position, len(ids))
    if metric is not None:
        metric.at_position(torch.zeros(1, model.spec.d_vocab, device=model.device), _first_prompt(1, model))
    sweep = _Sweep(model=model, ids=ids, cut=_mask(model, edges, len(ids)), metric=metric, place=place)
    together = [[head] for head in chosen[1]] if len(by) == 2 else [chosen[1]]
    centres = [window_of(layer, window, model.spec.n_layers) for layer in chosen[0]]
    variants = [_Variant(layers=around, heads=own) for around in centres for own in together]
    parts = [sweep.run(variants[i : i + batch_size]) for i in range(0, len(variants), batch_size)]
    measured = torch.cat([values for values, _ in parts])
    change = torch.cat([values - base for values, base in parts])
    shape, coords = [len(one) for one in chosen[: len(by)]], dict(zip(by, chosen, strict=False))
    units = Divergence.unit if metric is None else metric.unit
    told = {name: {"units": units, "long_name": text} for name, text in _SWEPT.items()}
    found = {
        "metric": (tuple(by), measured.reshape(shape).numpy(), told["metric"]),
        "baseline": ((), parts[0][1].numpy(), told["baseline"]),
        "change": (tuple(by), change.reshape(shape).numpy(), told["change"]),
    }
    name, at = ("Divergence", -1) if metric is None else (type(metric).__name__, metric.position)
    return xr.Dataset(
        found, coords=coords, attrs={"metric": name, "units": units, "metric_position": at, "window": window}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """One knockout of a sweep: in these heads of these layers."""

    layers: Sequence[int]
    heads: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sweep:
    """A prompt `ids` [position], the edges that are `cut`, boolean [query, key], and what is measured where."""

    model: Model
    ids: Tensor
    cut: Tensor
    metric: Metric | None
    place: int

    def run(self, variants: Sequence[_Variant]) -> tuple[Tensor, Tensor]:
        """The metric of some knockouts [variant], and of the prompt as it is (0-d), from one forward; on the CPU."""
        ids = self.ids.expand(1 + len(variants), -1)
        hooks = HookSpec()
        for layer in sorted({layer for variant in variants for layer in variant.layers}):
            hooks = hooks.intervene(HookPoint(SCORES, layer), self._cutting(variants, layer))
        logits = logits_at(self.model, ids, hooks, self.place)
        if self.metric is None:
            measured = divergence(logits[:1], logits).cpu()
        else:
            numbers = _first_prompt(len(logits), self.model)
            measured = self.metric.at_position(logits, numbers).detach().cpu().float()
        return measured[1:], measured[0]

    def _cutting(self, variants: Sequence[_Variant], layer: int) -> Intervention:
        """What a forward of `variants`, from row 1 on, does to the scores of a layer."""
        cut = [(1 + i, head) for i, v in enumerate(variants) if layer in v.layers for head in v.heads]
        rows, heads = torch.tensor(cut).T

        def apply(scores: Tensor, point: HookPoint) -> Tensor:
            own = scores[rows, heads]
            scores[rows, heads] = own.masked_fill(self.cut.to(scores.device), -torch.inf)
            return scores

        return apply


def _mask(model: Model, edges: Sequence[Edge], n_positions: int) -> Tensor:
    """Edges to be cut, boolean [query, key]: what KnockoutSpec says of a model of one head."""
    single = replace(model.spec, n_layers=1, n_heads=1, n_kv_heads=1)
    return KnockoutSpec(edges=edges).mask(single, n_positions)[0, 0]


def _numbers(index: Index | None, dim: str, size: int) -> list[int]:
    return list(listed(slice(None) if index is None else counted(index, dim, size), size))


def _first_prompt(n: int, model: Model) -> Tensor:
    """To which prompt each of `n` sequences belongs: there is one."""
    return torch.zeros(n, dtype=torch.int64, device=model.device)


def _check_tokens(asked: Sequence[int], top: int, n_vocab: int) -> None:
    for one in asked:
        if not 0 <= one < n_vocab:
            raise SchemaError(f"there is no token {one}: the vocabulary has {n_vocab:,}, numbered from 0")
    if not 1 <= top <= n_vocab:
        raise SchemaError(
            f"top = {top} tokens are asked for; from 1 to {n_vocab:,}, all of the vocabulary, can be told"
        )


def _of_tokens(base: Tensor, changed: Tensor, asked: list[int]) -> xr.Dataset:
    """What the logits [vocab] of both runs say of some tokens."""
    before, after = base.cpu().double(), changed.cpu().double()
    told = (before.softmax(-1)[asked], after.softmax(-1)[asked], (before - after)[asked])
    found = {f"asked_{name}": ("vocab", x.float().numpy()) for name, x in zip(_ASKED, told, strict=True)}
    return xr.Dataset(found, coords={"vocab": asked})


def _labelled(model: Model, effect: xr.Dataset, asked: list[int]) -> xr.Dataset:
    for name, (units, long_name) in _TOLD.items():
        for variable in (name, f"asked_{name}"):
            if variable in effect:
                effect[variable].attrs.update(units=units, long_name=long_name)
    effect["top_token_id"].attrs["long_name"] = "token"
    told = {"token_text": ("rank", effect["top_token_id"].values.tolist()), "vocab_text": ("vocab", asked)}
    for name, (dim, ids) in told.items():
        text = text_of(model, ids) if ids else None
        if text is not None:
            effect = effect.assign_coords({name: (dim, np.array(text, dtype=object))})
    return effect.assign_coords(rank=np.arange(effect.sizes["rank"]))
