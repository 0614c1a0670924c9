"""A model that can be run: its spec, its weights, and the one forward."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import TokenIds, make_batch
from .checkpoint import Checkpoint
from .devices import resolve_device, resolve_dtype
from .errors import ModelError
from .forward import Forward
from .parts import block, inverse_frequencies, rms_norm, rotation
from .points import HookPoint
from .source import open_checkpoint
from .spec import ModelSpec
from .taps import EMPTY, Finished, HookSpec, Sink, Taps, resolve
from .weights import Weights, read_tensor

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unembedding:
    """From the residual stream to logits: the final norm and the unembedding matrix. All a logit lens needs of a model.

    `norm_weight` [d_model]; `weight` [vocab, d_model]; `bias` [vocab] or None; a `softcap` c makes of logits
    c·tanh(logits / c).
    """

    norm_weight: Tensor
    weight: Tensor
    norm_eps: float
    bias: Tensor | None = None
    softcap: float | None = None

    def normalize(self, resid: Tensor) -> Tensor:
        """Give the final norm of a residual stream [..., d_model], same shape and dtype."""
        return rms_norm(resid, self.norm_weight.to(resid.dtype), self.norm_eps, {}, "ln_final")

    def project(self, normalized: Tensor) -> Tensor:
        """Give the logits [..., vocab] of a stream that is already normalised, in the dtype of the weights."""
        logits = F.linear(normalized.to(self.weight.dtype), self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, resid: Tensor) -> Tensor:
        """Give float32 logits [..., vocab] of a residual stream [..., d_model], final norm included."""
        return self.project(self.normalize(resid)).float()


def load_unembedding(
    source: str | Path, revision: str | None = None, device: str = "auto", dtype: str | torch.dtype = "float32"
) -> Unembedding:
    """Read only the final norm and the unembedding of a checkpoint (see `open_checkpoint` for `source`)."""
    checkpoint = open_checkpoint(source, revision)
    spec, on, as_ = checkpoint.spec, resolve_device(device), resolve_dtype(dtype)
    matrix = "embed.weight" if spec.tied else "unembed.weight"
    return Unembedding(
        norm_weight=read_tensor(checkpoint, ("ln_final.weight",), on, as_),
        weight=read_tensor(checkpoint, (matrix,), on, as_),
        norm_eps=spec.norm_eps,
        softcap=spec.logit_softcap,
    )


@dataclass(frozen=True, eq=False)
class Model:
    """A model on a device in a dtype. Usually made by `load_model`; `checkpoint` is where its tokenizer comes from."""

    spec: ModelSpec
    weights: Weights = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint | None = field(default=None, repr=False)

    @cached_property
    def unembedding(self) -> Unembedding:
        """The final norm and the unembedding; shares the model's weights."""
        return Unembedding(
            norm_weight=self.weights.ln_final,
            weight=self.weights.unembed,
            norm_eps=self.spec.norm_eps,
            softcap=self.spec.logit_softcap,
        )

    @cached_property
    def tokenizer(self) -> "tokenizers.Tokenizer":
        """The model's tokenizer, made when first asked for. Raises ModelError where the model has none."""
        if self.checkpoint is None:
            raise ModelError("this model was made from weights alone and has no tokenizer: load it with load_model")
        return self.checkpoint.tokenizer()

    @cached_property
    def _frequencies(self) -> Tensor:
        return inverse_frequencies(self.spec.rope, self.spec.d_head).to(self.device)

    def forward(
        self,
        token_ids: TokenIds,
        hooks: HookSpec | None = None,
        *,
        logits: bool = True,
        sink: Sink | None = None,
        gradients: bool = False,
    ) -> Forward:
        """Run the model on token ids, capturing and intervening as `hooks` says.

        `token_ids`: integers [sequence, position], or a list of sequences of different lengths, which are padded on
        the right here. With `logits=False` the computation ends at the last point that is captured or intervened on,
        wherever in a block it lies. `sink(point, tensor)` takes captures as they happen instead of their being
        collected. `gradients` keeps the graph, for interventions or inputs that are to be differentiated.

        Attention runs through scaled_dot_product_attention, except in blocks whose scores or pattern are captured or
        intervened on: there it is computed step by step and agrees with the other up to rounding. No other capture
        changes a bit of the result. Raises ModelError for tokens that cannot be run, HookError for hooks that this
        model cannot serve, both before anything is computed, and HookError for a result of an intervention that does
        not fit.
        """
        captures: dict[HookPoint, Tensor] = {}
        taps = resolve(hooks or EMPTY, self.spec, sink or captures.__setitem__, logits=logits)
        batch = make_batch(token_ids, self.spec, self.device)
        try:
            with torch.set_grad_enabled(gradients):
                result = self._run(batch.token_ids, taps)
        except Finished:
            result = None
        return Forward(
            logits=result if logits else None, lengths=batch.lengths, captures=captures, token_ids=batch.token_ids
        )

    def _run(self, token_ids_BT: Tensor, taps: Taps) -> Tensor:
        """Give the logits; raises Finished at the last tap where they are not needed."""
        spec, top = self.spec, taps.top
        x_BTD = F.embedding(token_ids_BT, self.weights.embed)
        if "hook_embed" in top:
            x_BTD = top["hook_embed"](x_BTD)
        turns = rotation(self._frequencies, token_ids_BT.shape[1], self.dtype)
        for weights, at in zip(self.weights.blocks, taps.blocks, strict=True):
            x_BTD = block(x_BTD, weights, spec, turns, at)
        x_BTD = rms_norm(x_BTD, self.weights.ln_final, spec.norm_eps, top, "ln_final")
        if "hook_final_norm" in top:
            x_BTD = top["hook_final_norm"](x_BTD)
        logits_BTV = self.unembedding.project(x_BTD)
        if "hook_logits" in top:
            logits_BTV = top["hook_logits"](logits_BTV)
        return logits_BTV
