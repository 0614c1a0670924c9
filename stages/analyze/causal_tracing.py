"""Causal tracing: which clean states bring back what noise on the subject's embeddings has destroyed.

Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.batch import Batch
from ..models.errors import HookError
from ..models.interventions import Add, NamedIntervention
from ..models.model import Model
from ..models.points import BLOCK, HookPoint, dims_of
from ..models.taps import HookSpec
from .metrics import Metric
from .patching import Pairs, Sites, Variant, check_metric, patch, run_variants, sites_of, window_of
from .prompts import Prompt, one_prompt, position_coords

TOKEN_TYPES = (
    "before the subject",
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""The paper's kinds of positions, over which its figures average; it leaves the first of these out."""

_EMBED = HookPoint("hook_embed")
_STREAMS = frozenset({"hook_resid_pre", "hook_resid_mid", "hook_resid_post"})
_AT_ONCE = 4096


def causal_tracing(
    model: Model,
    prompt: Prompt,
    subject: str | Sequence[int],
    metric: Metric,
    *,
    hooks: Sequence[str] = ("hook_resid_post", "hook_attn_out", "hook_mlp_out"),
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    window: int = 10,
    n_samples: int = 10,
    noise: float = 3.0,
    sigma: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> xr.Dataset:
    """Corrupt the embeddings of a subject with noise, restore clean states at one site a run, and measure.

    `subject`: a text that occurs once in a prompt given as text, or positions of the prompt. To `hook_embed` at them is
    added `noise` · `sigma` times standard normal numbers, `n_samples` times anew: those of a `torch.Generator` with
    this `seed`, [sample, subject position, d_model] float32. `sigma` None: `embedding_std(model)`; the paper takes that
    of the subjects of its facts, `embedding_std(model, subjects)`.

    A site is a layer and a position of a kind of hook point in `hooks`. Of the residual stream (`hook_resid_…`) the
    clean state of that layer is put back; of every other kind, such as what attention or the MLP adds, those of a
    `window` of layers around it, from layer − ⌊window / 2⌋ on, as far as the model reaches. `layers` and `positions`
    None mean all.

    Gives one variable a kind, float32 [layer, position, sample]: the metric of the corrupted run with that site
    restored. `corrupted` [sample]: with none restored; `clean`: the metric of the prompt itself. `indirect_effect`
    makes of them what the paper shows. Coordinates: `token_id`, `token_text` and `token_type` (`TOKEN_TYPES`) on
    `position`. Attributes record `sigma`, `noise`, `seed`, `window` and `subject`.

    Takes n_samples runs for every site, `batch_size` to a forward. Memory: the prompt's captures, and a forward of
    `batch_size` sequences whose logits exist at one position only.

    SchemaError for a subject that is not in the prompt and for numbers that mean nothing here, HookError for kinds and
    layers that the model does not have or that are not one vector a position; all before anything is computed.
    """
    ids = one_prompt(model, prompt)
    places = _subject(model, prompt, subject, len(ids))
    batch = Batch(token_ids=ids[None], lengths=(len(ids),))
    pairs = Pairs(clean=batch, corrupted=batch)
    sites = sites_of(model, pairs, hooks, layers=layers, positions=positions)
    _check(sites, model, window=window, n_samples=n_samples, noise=noise, batch_size=batch_size)
    check_metric(model, metric, pairs.lengths)
    sigma = embedding_std(model) if sigma is None else sigma
    standard = torch.randn(
        n_samples, len(places), model.spec.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    corrupted: list[Variant] = [[(_EMBED, Add(sample, noise * sigma).at(position=places))] for sample in standard]
    clean = float(run_variants(model, ids, [()], metric))
    captured = model.forward(ids[None], HookSpec().capture(*_captured(sites, model, window)), logits=False).captures
    restored = ([*noised, *site] for site in _sites(sites, captured, model, window, len(ids)) for noised in corrupted)
    found = run_variants(model, ids, itertools.chain(corrupted, restored), metric, batch_size=batch_size).numpy()
    values = found[n_samples:].reshape(len(sites.kinds), len(sites.layers), len(sites.at(len(ids))), n_samples)
    result = _labelled(model, sites, ids, places, metric, values)
    result = result.assign(clean=((), np.float32(clean)), corrupted=("sample", found[:n_samples]))
    for name in ("clean", "corrupted"):
        result[name].attrs = {"units": metric.unit, "long_name": f"{metric.unit} of the {name} run"}
    said = {"sigma": sigma, "noise": noise, "seed": seed, "n_samples": n_samples, "window": window, "subject": places}
    return result.assign_attrs(said)


def indirect_effect(result: xr.Dataset) -> xr.Dataset:
    """What the paper shows of a result of `causal_tracing`: of each kind the indirect effect, restored − corrupted,
    [layer, position], and `total_effect`, clean − corrupted, means over the samples of noise, in the metric's units.

    The paper's averages over facts and kinds of position are `effect.groupby("token_type").mean()` of several, averaged
    in turn.
    """
    kinds = [name for name in result.data_vars if name not in ("clean", "corrupted")]
    effect = (result[kinds] - result["corrupted"]).mean("sample")
    effect["total_effect"] = (result["clean"] - result["corrupted"]).mean("sample")
    for name in effect.data_vars:
        what = "total effect" if name == "total_effect" else f"indirect effect of {name}"
        effect[name].attrs = {"units": result.attrs["units"], "long_name": what}
    effect.attrs = dict(result.attrs)
    return effect


def embedding_std(model: Model, texts: str | Iterable[str] | None = None) -> float:
    """The standard deviation of the embeddings, all their numbers together: of every token of the vocabulary once, or
    of the tokens of texts, such as the subjects of many facts. As they are at `hook_embed`. Sums are float64; memory is
    that of 4096 embeddings.
    """
    if texts is None:
        ids = torch.arange(model.spec.d_vocab)
    else:
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.cat([model.tokenizer.to_tokens(text, prepend_bos=False)[0] for text in texts])
    sums = np.zeros(2)
    for some in ids.split(_AT_ONCE):
        held = model.forward(some[:, None], HookSpec().capture(_EMBED), logits=False)[_EMBED].cpu().double()
        sums += [float(held.sum()), float(held.square().sum())]
    mean, square = sums / (len(ids) * model.spec.d_model)
    return float(np.sqrt(square - mean**2))


def _subject(model: Model, prompt: Prompt, subject: str | Sequence[int], n_positions: int) -> list[int]:
    """The positions of the subject in the prompt, counted from 0."""
    if isinstance(subject, str):
        if not isinstance(prompt, str):
            raise SchemaError("the subject is a text and the prompt token ids: give its positions, such as [1, 2]")
        return list(model.tokenizer.encode(prompt).label_spans({"subject": subject})["subject"])
    for position in subject:
        if not -n_positions <= position < n_positions:
            raise SchemaError(f"there is no position {position} in the prompt, of {n_positions} tokens")
    places = sorted({int(position) % n_positions for position in subject})
    if not places:
        raise SchemaError("the subject has no position: nothing would be corrupted")
    return places


def _check(sites: Sites, model: Model, *, window: int, n_samples: int, noise: float, batch_size: int) -> None:
    for kind in sites.kinds:
        if kind not in BLOCK or dims_of(kind)[:2] != ("sequence", "position") or len(dims_of(kind)) != 3:
            raise HookError(
                f"{kind} is not one vector a position in every layer, as hook_resid_post, hook_attn_out and "
                f"hook_mlp_out are: restore other kinds with activation_patching"
            )
    for name, number, least in (("window", window, 1), ("n_samples", n_samples, 1), ("batch_size", batch_size, 1)):
        if number < least:
            raise SchemaError(f"{name} = {number}: at least {least}")
    if noise < 0:
        raise SchemaError(f"noise = {noise}: how many standard deviations of the embeddings, from 0 on")


def _around(kind: str, layer: int, window: int, n_layers: int) -> range:
    """The layers that are restored together."""
    if kind in _STREAMS:
        return range(layer, layer + 1)
    return window_of(layer, window, n_layers)


def _captured(sites: Sites, model: Model, window: int) -> Iterator[HookPoint]:
    for kind, layer in itertools.product(sites.kinds, sites.layers):
        yield from (HookPoint(kind, near) for near in _around(kind, layer, window, model.spec.n_layers))


def _sites(
    sites: Sites, captured: Mapping[HookPoint, Tensor], model: Model, window: int, n_positions: int
) -> Iterator[list[tuple[HookPoint, NamedIntervention]]]:
    """What restores each site, kind by kind, layer by layer, position by position."""
    for kind, layer, position in itertools.product(sites.kinds, sites.layers, sites.at(n_positions)):
        points = [HookPoint(kind, near) for near in _around(kind, layer, window, model.spec.n_layers)]
        yield [patch(point, captured[point], position=position) for point in points]


def _labelled(model: Model, sites: Sites, ids: Tensor, subject: list[int], metric: Metric, values: Any) -> xr.Dataset:
    places = list(sites.at(len(ids)))
    said = f"{metric.unit} with {{}} restored"
    variables = {
        kind: (("layer", "position", "sample"), value, {"units": metric.unit, "long_name": said.format(kind)})
        for kind, value in zip(sites.kinds, values, strict=True)
    }
    types = np.array([_token_type(at, subject, len(ids)) for at in range(len(ids))], dtype=object)
    coords = {**position_coords(model, ids), "token_type": ("position", types)}
    along = {"layer": list(sites.layers), "sample": range(values.shape[-1])}
    held = xr.Dataset(coords=coords).isel(position=places)
    attrs = {"metric": type(metric).__name__, "units": metric.unit, "metric_position": metric.position}
    return xr.Dataset(variables, coords={**along, **held.coords}, attrs=attrs)


def _token_type(position: int, subject: list[int], n_positions: int) -> str:
    before, first, middle, last, subsequent, further, end = TOKEN_TYPES
    if position < subject[0]:
        return before
    if position < subject[-1] and position not in subject:  # in a gap of it, where no noise is
        return further
    if position <= subject[-1]:  # of a subject of one token that is the last one
        return last if position == subject[-1] else first if position == subject[0] else middle
    if position == n_positions - 1:
        return end
    return subsequent if position == subject[-1] + 1 else further
