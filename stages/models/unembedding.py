"""From the residual stream to logits: all that a logit lens needs of a model."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import resolve_device, resolve_dtype
from .norms import normalize
from .reader import Norm, Reader
from .source import open_checkpoint
from .spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unembedding:
    """The final norm and the unembedding of a model: `weight` [vocab, d_model], `bias` [vocab] or None. The multiplier
    of the logits and their soft-cap, c·tanh(logits / c), are those of its `spec`."""

    spec: ModelSpec
    norm: Norm
    weight: Tensor
    bias: Tensor | None = None

    def normalize(self, resid: Tensor) -> Tensor:
        """Give the final norm of a residual stream [..., d_model], same shape and dtype."""
        cast = None if self.spec.norm_float32 else resid.dtype
        weight, bias = (part if part is None else part.to(cast) for part in (self.norm.weight, self.norm.bias))
        return normalize(resid, Norm(weight, bias), self.spec)

    def project(self, normalized: Tensor, *, softcap: bool = True) -> Tensor:
        """Give the logits [..., vocab] of a stream that is already normalised, in the dtype of the weights."""
        logits = F.linear(normalized.to(self.weight.dtype), self.weight, self.bias)
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap if softcap else None
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def project_to_vocab(self, resid: Tensor, *, softcap: bool = True) -> Tensor:
        """Give float32 logits [..., vocab] of a residual stream [..., d_model], final norm included.

        `softcap=False` leaves the final soft-cap out, where the model has one: ranks stay, probabilities do not (the
        model's own are those with it).
        """
        return self.project(self.normalize(resid), softcap=softcap).float()


def load_unembedding(
    source: str | Path, revision: str | None = None, device: str = "auto", dtype: str | torch.dtype = "float32"
) -> Unembedding:
    """Read only the final norm and the unembedding of a checkpoint (see `open_checkpoint` for `source`)."""
    checkpoint = open_checkpoint(source, revision)
    reader = Reader(checkpoint, resolve_device(device), resolve_dtype(dtype))
    return Unembedding(
        spec=checkpoint.spec,
        norm=reader.norm("ln_final"),
        weight=reader.read("embed.weight" if checkpoint.spec.tied else "unembed.weight"),
        bias=reader.read_if("unembed.bias"),
    )
