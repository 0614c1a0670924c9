"""How a dictionary is trained, as plain data: a table of a recipe. `dictionaries.training` does it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .dictionaries.errors import DictionaryError
from .models.errors import nearest
from .models.points import HookPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a dictionary is trained, as plain values: the keys of a recipe's table [train.NAME].

    `hook` is read; `hook_out` is what a transcoder predicts from it, None for an autoencoder. `n_feature` features,
    of which fire: with `activation` "topk" the `k` strongest of each token (Gao et al. 2024); "batchtopk" the k · batch
    strongest of a batch, later those above one threshold, the running mean of the weakest that fired (Bussmann et al.
    2024); "jumprelu" those above learned thresholds, whose mean number a token is drawn to k by the penalty
    `sparsity` · (L0 / k − 1)², with gradients through windows of `bandwidth` (Rajamanoharan et al. 2024).

    One of `epochs`, `tokens` and `n_batch` says how long (default: one epoch); `batch` is in tokens. Adam, with
    `learning_rate` (default: 2e-4 · √(2¹⁴ / n_feature), which falls as Gao et al. 2024 found best) reached after the
    share `warmup` of the steps and led to 0 over the last share `decay`. `dtype` is what large products are computed
    in; weights, errors and Adam's state are float32. `seed` decides the first weights and the order of the tokens, of
    which `buffer_tokens` are mixed at a time; the first `skip_positions` of every sequence are left out.

    `normalize` scales activations to a mean norm of √d while training, which makes settings fit all models; the
    dictionary that comes out is for activations as they are. Decoder rows have length 1. Features that have not fired
    for `dead_after` tokens are trained on what the others leave over, the `k_aux` strongest of a token (default: half
    the width), with weight `aux_coefficient` (AuxK, Gao et al. 2024). The share `validation` of the documents is held
    out, to evaluate on at the end. Every `log_every` steps metrics are recorded, every `checkpoint_every` a checkpoint
    from which a killed training goes on.
    """

    hook: str
    n_feature: int
    hook_out: str | None = None
    activation: Literal["topk", "batchtopk", "jumprelu"] = "topk"
    k: int = 32
    sparsity: float = 1.0
    bandwidth: float = 0.5
    epochs: int | None = None
    tokens: int | None = None
    n_batch: int | None = None
    batch: int = 4096
    learning_rate: float | None = None
    warmup: float = 0.05
    decay: float = 0.2
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    skip_positions: int = 1
    buffer_tokens: int = 65_536
    normalize: bool = True
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after: int = 10_000_000
    validation: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 1000

    def check(self) -> None:
        """Refuses what makes no training, by the name of the key: DictionaryError, HookError for a hook point."""
        for hook in (self.hook, self.hook_out):
            if hook is not None:
                HookPoint.parse(hook)
        if self.hook == self.hook_out:
            raise DictionaryError(f"hook_out = {self.hook!r} is hook too: leave it out to train an autoencoder")
        for name, known in (("activation", ("topk", "batchtopk", "jumprelu")), ("dtype", ("float32", "bfloat16"))):
            value = getattr(self, name)
            if value not in known:
                raise DictionaryError(
                    f"{name} = {value!r} is not known.{nearest(value, known)} Known: {', '.join(known)}"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise DictionaryError(f"{name} = {value} must be at least {least}")
        for name in ("warmup", "decay", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise DictionaryError(f"{name} = {getattr(self, name)} is a share: from 0 up to, but not including, 1")
        if self.k > self.n_feature:
            raise DictionaryError(f"k = {self.k} features of n_feature = {self.n_feature} cannot fire")
        said = [name for name in ("epochs", "tokens", "n_batch") if getattr(self, name) is not None]
        if len(said) > 1:
            raise DictionaryError(f"{' and '.join(said)} both say how long to train: give one of them")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise DictionaryError(f"learning_rate = {self.learning_rate} must be more than 0")

    def steps(self, per_epoch: int) -> int:
        """Batches to train on, of which an epoch has `per_epoch`."""
        if self.n_batch is not None:
            return self.n_batch
        return max(1, self.tokens // self.batch) if self.tokens is not None else (self.epochs or 1) * per_epoch

    def rate(self, step: int, n_step: int) -> float:
        """The learning rate of a step, counted from 0."""
        highest = self.learning_rate or 2e-4 * math.sqrt(2**14 / self.n_feature)
        rising = (step + 1) / max(1, self.warmup * n_step)
        falling = (n_step - step) / max(1, self.decay * n_step)
        return highest * min(1.0, rising, falling)


_LEAST = {
    "n_feature": 1, "k": 1, "sparsity": 0, "bandwidth": 1e-6, "epochs": 1, "tokens": 1, "n_batch": 1, "batch": 1,
    "learning_rate": 0, "seed": 0, "skip_positions": 0, "buffer_tokens": 1, "aux_coefficient": 0, "k_aux": 1,
    "dead_after": 1, "log_every": 1, "checkpoint_every": 1,
}  # fmt: skip
