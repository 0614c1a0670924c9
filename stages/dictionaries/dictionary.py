"""The canonical dictionary: an encoder into features and a decoder out of them, into which every format compiles."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..models.html import html_table
from .activation import Activation, Sparse
from .errors import DictionaryError

InputNorm = Literal["none", "constant_norm_rescale", "layer_norm"]
LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a dictionary comes from: `source` as it was named, the hub's commit, the format that was read, the name of
    the model as the format gives it, the files whose bytes determine the values, and what else its configuration says
    (`details`, JSON values as read).
    """

    source: str
    format: str
    revision: str | None = None
    model: str | None = None
    files: tuple[Path, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoder:
    """What turns activations at one hook point into features: f = activation(norm(x) − b_in) W_enc + b_enc).

    `W_enc` [d_in, feature], `b_enc` [feature], in one dtype; `b_in` [d_in] is what is subtracted from the input, None
    where nothing is (an autoencoder that subtracts its decoder bias has it here). `input_norm` is done first:

    * none
    * constant_norm_rescale: x · √d_in / ‖x‖
    * layer_norm: (x − mean) / (standard deviation, unbiased, + 1e-5); undone by the deviation alone, as in SAELens

    Constant factors and whitening are not among them: formats fold those into the weights. `hook` is the hook point
    that is read, in TransformerLens' spelling ("blocks.12.hook_resid_post"); where the point has heads they are
    flattened, or `head` alone is read. Raises DictionaryError for shapes that do not fit and for weights that are not
    finite.
    """

    W_enc: Tensor
    b_enc: Tensor
    activation: Activation
    hook: str
    b_in: Tensor | None = None
    input_norm: InputNorm = "none"
    head: int | None = None
    provenance: Provenance

    def __post_init__(self) -> None:
        _check_shapes(self, _ENCODER_DIMS)
        for name in ("threshold", "r_mag", "b_mag"):
            value = getattr(self.activation, name)
            if value is not None:
                _check_tensor(self, name, value, (self.n_feature,))
        k = self.activation.k
        if k is not None and k > self.n_feature:
            raise DictionaryError(f"{self.provenance.source}: k = {k} of {self.n_feature} features")
        if self.activation.kind == "groupmax" and self.n_feature % (k or 1):
            raise DictionaryError(f"{self.provenance.source}: {self.n_feature} features do not make {k} equal groups")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def n_feature(self) -> int:
        return self.W_enc.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, self._facts())

    def _facts(self) -> dict[str, object]:
        k = "" if self.activation.k is None else f", k = {self.activation.k}"
        return {
            "source": self.provenance.source,
            "revision": self.provenance.revision,
            "format": self.provenance.format,
            "model": self.provenance.model,
            "reads": self.hook if self.head is None else f"{self.hook}, head {self.head}",
            "d_in": self.d_in,
            "features": f"{self.n_feature:,}",
            "activation": f"{self.activation.kind}{k}",
            "input norm": None if self.input_norm == "none" else self.input_norm,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
        }

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Give the same on another device or in another dtype. Thresholds stay float32, whatever the dtype."""
        device = device or self.device
        moved: dict[str, Any] = {
            f.name: value.to(device, dtype) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, activation=self.activation.to(device))

    def normalize(self, x: Tensor) -> Tensor:
        """The input as the weights see it, before `b_in` is subtracted: [..., d_in], in the dictionary's dtype."""
        return self._normalized(x)[0]

    def preactivations(self, x: Tensor) -> Tensor:
        """What the activation function is given: [..., feature] for activations [..., d_in]."""
        self._check_width(x)
        x = self.normalize(x)
        x = x if self.b_in is None else x - self.b_in
        return torch.addmm(self.b_enc, x.reshape(-1, self.d_in), self.W_enc).view(*x.shape[:-1], self.n_feature)

    def encode(self, x: Tensor) -> Tensor:
        """Features, dense: [..., feature] for activations [..., d_in], which are cast to the dictionary's dtype."""
        h = self.preactivations(x)
        return self.activation(h.view(-1, self.n_feature), self.b_enc).view(h.shape)

    def encode_sparse(self, x: Tensor) -> Sparse:
        """Features of rows [row, d_in], the nonzero ones only. Holds [row, feature] preactivations meanwhile."""
        return self.activation.sparse(self.preactivations(x), self.b_enc)

    def encode_ranked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features of rows [row, d_in] of a dictionary that lets at most k through: values [row, k], descending,
        and features [row, k], −1 (with value 0) where fewer fire. Of equal values the lower feature comes first.

        DictionaryError for an activation without such a k.
        """
        if not self.activation.counted:
            raise DictionaryError(f"{self.provenance.source}: {self.activation.kind} has no most features a token")
        return self.activation.ranked(self.preactivations(x))

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise DictionaryError(
                f"{self.provenance.source} reads {self.hook} of width {self.d_in}; it was given {x.shape[-1]} wide "
                f"activations, of shape {tuple(x.shape)}"
            )

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The input as the weights see it, with the factor and the shift that lead back: decoded · factor + shift."""
        x = x.to(self.device, self.dtype)
        if self.input_norm == "none":
            return x, None, None
        if self.input_norm == "constant_norm_rescale":
            factor = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return x / factor, factor, None
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (self.d_in - 1) ** 0.5
        # SAELens' way back is by the deviation alone, and what it trained learnt to be decoded so.
        return centred / (deviation + LAYER_NORM_EPSILON), deviation, mean


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dictionary(Encoder):
    """A sparse autoencoder or transcoder of one layer: `Encoder`, and x̂ = f W_dec + b_dec (+ norm(x) W_skip).

    `W_dec` [feature, d_out], `b_dec` [d_out], `W_skip` [d_in, d_out] or None. An autoencoder's `hook_out` is its
    `hook`; a transcoder's is what it predicts. `denormalize` says whether the input's norm is undone on the way out,
    as autoencoders do and transcoders do not.
    """

    W_dec: Tensor
    b_dec: Tensor
    hook_out: str
    W_skip: Tensor | None = None
    denormalize: bool = True

    def __post_init__(self) -> None:
        # super() does not know the class that slots made anew
        Encoder.__post_init__(self)
        _check_shapes(self, _DECODER_DIMS)

    def _facts(self) -> dict[str, object]:
        skip = "none" if self.W_skip is None else "yes"
        return Encoder._facts(self) | {"writes": self.hook_out, "d_out": self.d_out, "skip connection": skip}

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def needs_input(self) -> bool:
        """Whether decoding takes the activations besides the features: for a skip connection, or to undo a norm."""
        return self.W_skip is not None or self.undoes_norm

    @property
    def undoes_norm(self) -> bool:
        """Whether what is decoded is multiplied, and moved, by what the input's norm took away."""
        return self.denormalize and self.input_norm != "none"

    @property
    def decoder_norms(self) -> Tensor:
        """Length of every decoder row [feature], float32."""
        norms: Tensor = torch.linalg.vector_norm(self.W_dec.float(), dim=-1)
        return norms

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction [..., d_out] of dense features [..., feature]. `x` [..., d_in] are the activations that were
        encoded; DictionaryError where they are needed (`needs_input`) and not given.
        """
        self._check_features(features.shape[-1])
        features = features.to(self.device, self.dtype)
        return self._finish(features @ self.W_dec + self.b_dec, x)

    def decode_sparse(self, features: Sparse, x: Tensor | None = None) -> Tensor:
        """As `decode`, of sparse features: [row, d_out]. Costs what the nonzeros cost."""
        self._check_features(features.n_feature)
        starts = features.count.cumsum(0) - features.count
        summed = torch.nn.functional.embedding_bag(
            features.feature, self.W_dec, starts, mode="sum", per_sample_weights=features.value.to(self.dtype)
        )
        return self._finish(summed + self.b_dec, x)

    def output_scale(self, x: Tensor) -> Tensor:
        """What decoder rows are multiplied by on the way out besides the features: [..., 1], 1 unless a norm of the
        input [..., d_in] is undone.
        """
        factor = self._normalized(x)[1] if self.undoes_norm else None
        return torch.ones_like(x[..., :1], device=self.device, dtype=self.dtype) if factor is None else factor

    def reconstruct(self, x: Tensor) -> Tensor:
        """Decoded features of activations: [..., d_out] for [..., d_in]."""
        return self.decode(self.encode(x), x)

    def _finish(self, decoded: Tensor, x: Tensor | None) -> Tensor:
        if not self.needs_input:
            return decoded
        if x is None:
            why = "has a skip connection" if self.W_skip is not None else f"undoes the input's {self.input_norm}"
            raise DictionaryError(f"{self.provenance.source} {why}: decode takes the activations too, decode(f, x)")
        self._check_width(x)
        normalized, factor, shift = self._normalized(x)
        decoded = decoded if self.W_skip is None else decoded + normalized @ self.W_skip
        if self.denormalize and factor is not None:
            decoded = decoded * factor if shift is None else decoded * factor + shift
        return decoded

    def _check_features(self, width: int) -> None:
        if width != self.n_feature:
            raise DictionaryError(
                f"{self.provenance.source} has {self.n_feature} features; it was given {width} to decode"
            )


_ENCODER_DIMS: Mapping[str, tuple[str, ...]] = {
    "W_enc": ("d_in", "n_feature"),
    "b_enc": ("n_feature",),
    "b_in": ("d_in",),
}
_DECODER_DIMS: Mapping[str, tuple[str, ...]] = {
    "W_dec": ("n_feature", "d_out"),
    "b_dec": ("d_out",),
    "W_skip": ("d_in", "d_out"),
}


def _check_shapes(encoder: Encoder, dims: Mapping[str, tuple[str, ...]]) -> None:
    for name in ("W_enc", "W_dec"):
        if name in dims and getattr(encoder, name).dim() != 2:
            shape = tuple(getattr(encoder, name).shape)
            raise DictionaryError(f"{encoder.provenance.source}: {name} has shape {shape}; a matrix was expected")
    for name, sizes in dims.items():
        value = getattr(encoder, name)
        if value is not None:
            _check_tensor(encoder, name, value, tuple(getattr(encoder, size) for size in sizes))
            if value.dtype != encoder.dtype:
                raise DictionaryError(f"{encoder.provenance.source}: {name} is {value.dtype}, W_enc {encoder.dtype}")


def _check_tensor(encoder: Encoder, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise DictionaryError(
            f"{encoder.provenance.source}: {name} has shape {tuple(value.shape)}; {shape} was expected, for W_enc has "
            f"{tuple(encoder.W_enc.shape)}"
        )
    # The sum of a matrix is finite, or overflows, or tells of what is not: cheaper than a mask as large as the matrix.
    if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
        n = int((~torch.isfinite(value)).sum())
        raise DictionaryError(f"{encoder.provenance.source}: {name} has {n:,} values that are NaN or infinite")
