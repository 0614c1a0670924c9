"""From preactivations to features: the activation functions of dictionaries, and the sparse form of what they give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import DictionaryError
from .selection import entries_above, top_k

Kind = Literal["relu", "topk", "abstopk", "groupmax", "batchtopk", "jumprelu", "gated"]

COUNTED = frozenset({"topk", "abstopk", "groupmax"})
"""Kinds that let at most k features of a token through, whatever the token: stored as regular arrays."""
THRESHOLDED = frozenset({"batchtopk", "jumprelu"})
"""Kinds that compare each preactivation with the feature's threshold."""


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """Features that fire, row by row (compressed rows): `count[row]` int64, and end to end `feature[nonzero]` int64,
    ascending within a row, and `value[nonzero]`. Feature 0 is a feature like any other; what does not fire is absent.
    `n_feature` is the width of the dictionary.
    """

    count: Tensor
    feature: Tensor
    value: Tensor
    n_feature: int

    @property
    def row(self) -> Tensor:
        """The row of every nonzero [nonzero], int64."""
        rows = torch.arange(len(self.count), device=self.count.device)
        return torch.repeat_interleave(rows, self.count, output_size=len(self.feature))

    @classmethod
    def from_dense(cls, values: Tensor) -> "Sparse":
        """The nonzeros of dense features [row, feature]."""
        row, feature = values.nonzero(as_tuple=True)
        return cls(torch.bincount(row, minlength=len(values)), feature, values[row, feature], values.shape[-1])

    @classmethod
    def from_ranked(cls, values: Tensor, features: Tensor, n_feature: int) -> "Sparse":
        """What `Activation.ranked` gives, as compressed rows."""
        features, order = features.sort(dim=-1)
        fires = features >= 0
        return cls(fires.sum(-1), features[fires], values.gather(-1, order)[fires], n_feature)

    def take(self, rows: Tensor) -> "Sparse":
        """Some of the rows, by their numbers, which ascend."""
        chosen = torch.zeros(len(self.count), dtype=torch.bool, device=self.count.device)
        chosen[rows] = True
        of_them = chosen[self.row]
        return Sparse(self.count[rows], self.feature[of_them], self.value[of_them], self.n_feature)

    def to_dense(self) -> Tensor:
        """Dense features [row, feature]."""
        dense = self.value.new_zeros(len(self.count), self.n_feature)
        dense[self.row, self.feature] = self.value
        return dense


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activation:
    """An activation function with its parameters, of `feature` features; h are preactivations [row, feature].

    * relu: max(h, 0)
    * topk: the k largest h of a row, of these the positive ones (equal values: the lower feature first)
    * abstopk: the k largest |h|, signs kept
    * groupmax: of k contiguous groups of features, the largest h of each, of these the positive ones
    * jumprelu, batchtopk: h where h > threshold and h > 0. A BatchTopK dictionary chooses among a batch while it is
      trained and has a threshold afterwards, the same for all features; k is then what it was trained with
    * gated: where h > 0, max((h − b_gate) · exp(r_mag) + b_mag, 0), with b_gate the encoder's bias

    `threshold`, `r_mag` and `b_mag` are [feature], float32 always: a threshold rounded to bfloat16 moves whole features
    across it. Raises DictionaryError where parameters are missing or too many.
    """

    kind: Kind
    k: int | None = None
    threshold: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in NEEDS:
            raise DictionaryError(f"activation {self.kind!r} is not known; known are {', '.join(NEEDS)}")
        needed, allowed = NEEDS[self.kind]
        given = {name for name in ("k", "threshold", "r_mag", "b_mag") if getattr(self, name) is not None}
        if not needed <= given <= needed | allowed:
            said = f"it has {', '.join(sorted(given)) or 'nothing'}, and needs {', '.join(sorted(needed)) or 'nothing'}"
            raise DictionaryError(f"an activation {self.kind!r} with other parameters than its own: {said}")
        if self.k is not None and self.k < 1:
            raise DictionaryError(f"activation {self.kind!r} with k = {self.k}: k must be at least 1")
        for name in ("threshold", "r_mag", "b_mag"):
            if name in given:
                object.__setattr__(self, name, getattr(self, name).float())

    @property
    def counted(self) -> bool:
        """Whether a row has at most k features, so that they fit a regular array."""
        return self.kind in COUNTED

    def to(self, device: torch.device | str) -> "Activation":
        """Give the same on another device; parameters stay float32."""
        moved = {
            name: None if value is None else value.to(device)
            for name, value in (("threshold", self.threshold), ("r_mag", self.r_mag), ("b_mag", self.b_mag))
        }
        return Activation(kind=self.kind, k=self.k, **moved)

    def __call__(self, h: Tensor, b_enc: Tensor) -> Tensor:
        """Features [row, feature], dense, of preactivations of the same shape; `b_enc` is the encoder's bias."""
        return DENSE[self.kind](self, h, b_enc)

    def sparse(self, h: Tensor, b_enc: Tensor) -> Sparse:
        """The features of preactivations [row, feature] that fire."""
        if self.kind in THRESHOLDED or self.kind == "relu":
            bound = 0.0 if self.threshold is None else self.threshold.clamp(min=0)
            row, feature, value = entries_above(h, bound)
            return Sparse(torch.bincount(row, minlength=len(h)), feature, value, h.shape[-1])
        return Sparse.from_dense(self(h, b_enc))

    def ranked(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Of a counted kind the at most k features of each row: values [row, k], descending, and features [row, k];
        −1, with value 0, where fewer fire. Of equal values the lower feature comes first.
        """
        values, features = RANKED[self.kind](self, h)
        fires = values != 0
        features = torch.where(fires, features, -1)
        if self.kind not in DESCENDING:
            values, order = torch.sort(torch.where(fires, values, -torch.inf), dim=-1, descending=True, stable=True)
            features = features.gather(-1, order)
        return torch.where(features >= 0, values, 0), features


NEEDS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "relu": (frozenset(), frozenset()),
    "topk": (frozenset({"k"}), frozenset()),
    "abstopk": (frozenset({"k"}), frozenset()),
    "groupmax": (frozenset({"k"}), frozenset()),
    "jumprelu": (frozenset({"threshold"}), frozenset()),
    "batchtopk": (frozenset({"threshold"}), frozenset({"k"})),
    "gated": (frozenset({"r_mag", "b_mag"}), frozenset()),
}
"""Kind → parameters that it must have, and those that it may have besides."""


def _scattered(h: Tensor, features: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(h).scatter_(-1, features, values)


def _relu(activation: Activation, h: Tensor, b_enc: Tensor) -> Tensor:
    return h.relu()


def _topk(activation: Activation, h: Tensor) -> tuple[Tensor, Tensor]:
    assert activation.k is not None
    values, features = top_k(h, activation.k)
    return values.relu(), features


def _abstopk(activation: Activation, h: Tensor) -> tuple[Tensor, Tensor]:
    assert activation.k is not None
    features = top_k(h.abs(), activation.k)[1].sort(dim=-1).values
    return h.gather(-1, features), features


def _groupmax(activation: Activation, h: Tensor) -> tuple[Tensor, Tensor]:
    assert activation.k is not None
    groups = h.relu().unflatten(-1, (activation.k, -1))
    # torch leaves open at which of equal values the largest is; the first one is the lower feature.
    descending = torch.arange(groups.shape[-1], 0, -1, device=h.device)
    within = ((groups == groups.amax(dim=-1, keepdim=True)) * descending).argmax(dim=-1, keepdim=True)
    values = groups.gather(-1, within)[..., 0]  # that of amax would have gradients for all that are equal
    first = torch.arange(activation.k, device=h.device) * groups.shape[-1]
    return values, within[..., 0] + first


def _counted(activation: Activation, h: Tensor, b_enc: Tensor) -> Tensor:
    values, features = RANKED[activation.kind](activation, h)
    return _scattered(h, features, values)


def _jumprelu(activation: Activation, h: Tensor, b_enc: Tensor) -> Tensor:
    assert activation.threshold is not None
    return torch.where((h > activation.threshold) & (h > 0), h, 0)


def _gated(activation: Activation, h: Tensor, b_enc: Tensor) -> Tensor:
    assert activation.r_mag is not None
    assert activation.b_mag is not None
    magnitude = (h - b_enc) * activation.r_mag.exp() + activation.b_mag
    return torch.where(h > 0, magnitude.relu(), 0).to(h.dtype)


RANKED: Mapping[str, Callable[[Activation, Tensor], tuple[Tensor, Tensor]]] = {
    "topk": _topk,
    "abstopk": _abstopk,
    "groupmax": _groupmax,
}
"""Counted kind → values and features [row, k], ascending by feature where values are equal."""
DESCENDING = frozenset({"topk"})
"""Counted kinds whose values come the largest first, with what does not fire at the end."""
DENSE: Mapping[str, Callable[[Activation, Tensor, Tensor], Tensor]] = {
    "relu": _relu,
    "topk": _counted,
    "abstopk": _counted,
    "groupmax": _counted,
    "batchtopk": _jumprelu,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
