"""How much of a model's loss survives a dictionary in place of an activation, beside how well it reconstructs.

The measure is that of Bricken et al. (Towards Monosemanticity, 2023) and SAELens' evaluations: the loss with the
reconstruction spliced in, between that of the model as it is and that with the activation ablated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..dictionaries.dictionary import Dictionary
from ..dictionaries.errors import DictionaryError
from ..dictionaries.interventions import Splice
from ..models.batch import TokenIds, make_batch
from ..models.interventions import Replace, Zero
from ..models.points import HookPoint
from ..models.resolve import resolve
from ..models.taps import HookSpec

if TYPE_CHECKING:
    from ..models.forward import Forward
    from ..models.model import Model

AT_ONCE = 2**21
"""Logits compared at a time: 16 MiB in float64, of which about four are in memory together."""

RUNS = ("clean", "spliced", "zero", "mean")
"""The runs that are compared, in the order of the result's `run`."""


def loss_recovered(
    model: Model,
    dictionary: Dictionary,
    sequences: TokenIds,
    *,
    batch_size: int = 8,
    skip_positions: int = 1,
) -> xr.Dataset:
    """Compare a model with and without a dictionary in place of the activation at its `hook_out`.

    `sequences` are token ids as `Model.forward` takes them, run `batch_size` at a time, five forwards a batch. What
    counts are predictions made at the positions from `skip_positions` on of a token that follows; each counts the same,
    whatever its sequence. At earlier positions the activation keeps its value in every run (a dictionary is not trained
    on the first one, whose massive activation all later ones attend to); 0 replaces it there too.

    Gives, float64, along `run`, which is clean, spliced (the reconstruction; of a transcoder that of its `hook`), zero
    (0 in its place) or mean (its mean over the tokens that count): `loss`, the cross-entropy of the next token, and
    `kl_divergence` (clean ‖ run), in nats. Along `ablation`, zero or mean: `loss_recovered` = (ablated − spliced) /
    (ablated − clean): 1 where nothing is lost, NaN where ablation changes nothing. And of the tokens that count: `fvu`
    = Σ‖y − ŷ‖² / Σ‖y − ȳ‖² (fraction of variance unexplained), `cosine` of y and ŷ and `l0` (features that fire), means
    over tokens; `n_token` (int64), how many they are.

    Raises SchemaError where no token counts, DictionaryError for a set of transcoders, and as `Model.forward` does; all
    but what single sequences are refused for before anything is computed.
    """
    if not isinstance(dictionary, Dictionary):
        raise DictionaryError("the loss is that with one dictionary in place: give one layer of a set, set.layer(…)")
    if batch_size < 1 or skip_positions < 0:
        raise SchemaError(f"batch_size = {batch_size} and skip_positions = {skip_positions}: at least 1 and 0")
    every = make_batch(sequences, model.spec, torch.device("cpu"))
    rows = [row for row in every.rows() if len(row) >= skip_positions + 2]
    if not rows:
        raise SchemaError(
            f"no sequence has more than {skip_positions + 1} tokens: nothing is predicted beyond the positions skipped"
        )
    where = {"position": slice(skip_positions, None)}
    hooks = {"clean": HookSpec(), "spliced": Splice(dictionary).at(**where).hooks()}
    resolve(hooks["spliced"], model.spec, make_batch(rows, model.spec, model.device), _ignore, logits=True)
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    mean = _mean(model, dictionary, batches, skip_positions)
    head = _head_written(dictionary)
    for name, ablation in (("zero", Zero()), ("mean", Replace(mean))):
        part = ablation.at(**where) if head is None else ablation.at(**where, head=head)
        hooks[name] = HookSpec().intervene(dictionary.hook_out, part)
    sums = _Sums(mean.flatten())
    for batch in batches:
        clean = model.forward(batch, HookSpec().capture(dictionary.hook, dictionary.hook_out))
        counted = _counted(clean, skip_positions)
        x = _vectors(clean, dictionary.hook, dictionary.head, counted).flatten(1)
        y = _vectors(clean, dictionary.hook_out, head, counted).flatten(1)
        sums.add_fit(dictionary, x, y)
        for name in RUNS:
            changed = clean if name == "clean" else model.forward(batch, hooks[name])
            sums.add_losses(name, clean, changed, counted)
    return sums.to_dataset()


@dataclass(slots=True)
class _Sums:
    """Sums over the tokens that count, in float64."""

    mean: Tensor
    losses: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RUNS, 0.0))
    divergences: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RUNS, 0.0))
    error: float = 0.0
    variance: float = 0.0
    cosine: float = 0.0
    fired: int = 0
    n_token: int = 0

    def add_fit(self, dictionary: Dictionary, x: Tensor, y: Tensor) -> None:
        """Take in how vectors [token, d_out] are reconstructed from those [token, d_in]."""
        features = dictionary.encode(x)
        found = _wide(dictionary.decode(features, x))
        true = _wide(y).to(found.device)
        self.error += float((found - true).square().sum())
        self.variance += float((true - self.mean.to(true.device)).square().sum())
        self.cosine += float(torch.cosine_similarity(found, true, dim=-1).sum())
        self.fired += int((features != 0).sum())
        self.n_token += len(x)

    def add_losses(self, name: str, clean: Forward, changed: Forward, counted: Tensor) -> None:
        """Take in the predictions of a run at the tokens that count."""
        base, logits = clean.logits, changed.logits
        assert base is not None
        assert logits is not None
        sequence, position = counted.nonzero(as_tuple=True)
        step = max(1, AT_ONCE // base.shape[-1])
        for rows, places in zip(sequence.split(step), position.split(step), strict=True):
            log_p, log_q = (_wide(value[rows, places]).log_softmax(-1) for value in (base, logits))
            following = clean.token_ids[rows, places + 1].to(log_q.device)
            self.losses[name] -= float(log_q.gather(-1, following[:, None]).sum())
            p = log_p.exp()
            self.divergences[name] += float((p * (log_p - log_q)).masked_fill(p == 0, 0).sum().clamp_min(0))

    def to_dataset(self) -> xr.Dataset:
        """Means over tokens, and what is made of them."""
        loss, divergence = (
            np.array([of_run[name] for name in RUNS]) / self.n_token for of_run in (self.losses, self.divergences)
        )
        clean, spliced, ablated = loss[0], loss[1], loss[2:]
        lost = np.where(ablated == clean, np.nan, ablated - clean)
        return xr.Dataset(
            {
                "loss": ("run", loss),
                "kl_divergence": ("run", divergence),
                "loss_recovered": ("ablation", (ablated - spliced) / lost),
                "fvu": self.error / self.variance if self.variance else np.nan,
                "cosine": self.cosine / self.n_token,
                "l0": self.fired / self.n_token,
                "n_token": self.n_token,
            },
            coords={"run": list(RUNS), "ablation": list(RUNS[2:])},
        )


def _mean(model: Model, dictionary: Dictionary, batches: Sequence[Sequence[Tensor]], skip_positions: int) -> Tensor:
    """The mean of the activation that the dictionary takes the place of, over the tokens that count, as it is shaped
    at its point.
    """
    total: Tensor | float = 0.0
    n_token = 0
    for batch in batches:
        out = model.forward(batch, HookSpec().capture(dictionary.hook_out), logits=False)
        counted = _counted(out, skip_positions)
        total = total + _wide(_vectors(out, dictionary.hook_out, _head_written(dictionary), counted)).sum(0)
        n_token += int(counted.sum())
    assert isinstance(total, Tensor)
    return total / n_token


def _counted(out: Forward, skip_positions: int) -> Tensor:
    """Which tokens [sequence, position] count: those beyond the positions skipped that another one follows."""
    positions = torch.arange(out.token_ids.shape[1], device=out.token_ids.device)
    lengths = torch.tensor(out.lengths, device=positions.device)
    return (positions >= skip_positions) & (positions < lengths[:, None] - 1)


def _vectors(out: Forward, hook: str, head: int | None, counted: Tensor) -> Tensor:
    """The activations [token, …] at a point, of all heads or of one."""
    value = out[hook][counted]
    return value if head is None else value[:, head]


def _head_written(dictionary: Dictionary) -> int | None:
    same = HookPoint.parse(dictionary.hook) == HookPoint.parse(dictionary.hook_out)
    return dictionary.head if same else None


def _wide(value: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def _ignore(point: HookPoint, value: Tensor) -> None:
    """Take a capture and do nothing with it."""
