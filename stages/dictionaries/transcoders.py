"""Transcoders of many layers, opened lazily: one per layer, or cross-layer ones that write to every later layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..models.html import html_table
from .activation import Sparse
from .dictionary import Dictionary, Encoder, Provenance
from .errors import DictionaryError


@dataclass(frozen=True, slots=True, order=True)
class FeatureId:
    """A feature of a set of transcoders. Written `L12:345`; ordered by layer, then index."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}:{self.index}"


class LayerReader(Protocol):
    """Reads parts of a set from its files, on the CPU, without holding on to anything."""

    def encoder(self, layer: int) -> Encoder:
        """Give the encoder of a layer, whole, in the dtype of the file."""
        ...

    def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
        """Read rows [feature, d_out] of what the features of `layer` write at `target`, and no others."""
        ...

    def decoder_bias(self, target: int) -> Tensor:
        """Give what is added at `target` whatever fires: [d_out]."""
        ...

    def skip(self, layer: int) -> Tensor | None:
        """Give W_skip [d_in, d_out] of a layer, or None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TranscoderSet:
    """Transcoders of layers 0 … n_layers − 1. Opening reads headers only; every method reads what it gives.

    `n_features[layer]`; `hooks_in[layer]` and `hooks_out[layer]` are hook points in TransformerLens' spelling. In a
    `cross_layer` set the features of a layer write to its own and every later layer, m̂_t = b_dec_t + Σ_{l ≤ t} f_l
    W_dec_l→t (Anthropic, Circuit Tracing, 2025); otherwise to their own only. Weights come in `dtype` on `device`;
    thresholds are float32, whatever the dtype. The reader holds no open file, so that a set can be pickled.
    """

    reader: LayerReader
    n_features: tuple[int, ...]
    d_in: int
    d_out: int
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    cross_layer: bool
    provenance: Provenance
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def _repr_html_(self) -> str:
        facts = {
            "source": self.provenance.source,
            "revision": self.provenance.revision,
            "format": self.provenance.format,
            "model": self.provenance.model,
            "kind": "cross-layer" if self.cross_layer else "one per layer",
            "d_in": self.d_in,
            "d_out": self.d_out,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
        }
        widths = (f"{n:,}" for n in self.n_features)
        rows = zip(range(self.n_layers), widths, self.hooks_in, self.hooks_out, strict=True)
        return html_table("TranscoderSet", facts, ("layer", "features", "reads", "writes"), list(rows))

    @property
    def n_layers(self) -> int:
        return len(self.n_features)

    def targets(self, layer: int) -> range:
        """The layers at which the features of a layer write."""
        self._check_layer(layer)
        return range(layer, self.n_layers if self.cross_layer else layer + 1)

    def encoder(self, layer: int) -> Encoder:
        """The encoder of a layer."""
        self._check_layer(layer)
        encoder = self.reader.encoder(layer)
        if encoder.n_feature != self.n_features[layer] or encoder.d_in != self.d_in:
            raise DictionaryError(
                f"{self.provenance.source}: the encoder of layer {layer} is [{encoder.d_in}, {encoder.n_feature}]; "
                f"[{self.d_in}, {self.n_features[layer]}] was expected"
            )
        return encoder.to(self.device, self.dtype)

    def layer(self, layer: int) -> Dictionary:
        """The transcoder of a layer, whole. DictionaryError for a cross-layer set, where a layer alone decodes
        nothing.
        """
        if self.cross_layer:
            raise DictionaryError(
                f"{self.provenance.source} is a cross-layer set: what is written at layer {layer} comes from all "
                "layers up to it. Use `encoder`, `decoder_rows` and `decode`"
            )
        encoder = self.encoder(layer)
        return Dictionary(
            **{name: getattr(encoder, name) for name in Encoder.__dataclass_fields__},
            W_dec=self.decoder_rows(layer, layer, slice(None)),
            b_dec=self.decoder_bias(layer),
            W_skip=self.skip(layer),
            hook_out=self.hooks_out[layer],
            denormalize=False,
        )

    def decoder_rows(self, layer: int, target: int, features: slice | Sequence[int] | Tensor = slice(None)) -> Tensor:
        """What features of a layer write at a target layer: [feature, d_out]; only these rows are read."""
        if target not in self.targets(layer):
            legal = self.targets(layer)
            raise DictionaryError(
                f"{self.provenance.source}: features of layer {layer} write at layers {legal[0]} to {legal[-1]}, not "
                f"at {target}"
            )
        if not isinstance(features, slice):
            features = torch.as_tensor(features, dtype=torch.int64)
            width = self.n_features[layer]
            if len(features) and (int(features.min()) < 0 or int(features.max()) >= width):
                raise DictionaryError(
                    f"{self.provenance.source}: layer {layer} has features 0 to {width - 1}; asked for "
                    f"{int(features.min())} to {int(features.max())}"
                )
        return self.reader.decoder_rows(layer, target, features).to(self.device, self.dtype)

    def decoder_bias(self, target: int) -> Tensor:
        """What is added at a layer whatever fires: [d_out]."""
        self._check_layer(target)
        return self.reader.decoder_bias(target).to(self.device, self.dtype)

    def skip(self, layer: int) -> Tensor | None:
        """W_skip [d_in, d_out] of a layer, or None."""
        self._check_layer(layer)
        found = self.reader.skip(layer)
        return None if found is None else found.to(self.device, self.dtype)

    def encode(self, layer: int, x: Tensor) -> Tensor:
        """Features of a layer, dense: [..., feature] for activations [..., d_in]."""
        return self.encoder(layer).encode(x)

    def decode(self, target: int, features: Mapping[int, Sparse], x: Tensor | None = None) -> Tensor:
        """Reconstruction [row, d_out] at a layer, from the sparse features of every layer that writes there.

        Reads the decoder rows of features that fire, and no others. `x` [row, d_in] are the activations at the
        target's input, which a skip connection takes. DictionaryError where a layer's features or `x` are missing.
        """
        needed = range(target + 1) if self.cross_layer else (target,)
        missing = [layer for layer in needed if layer not in features]
        if missing:
            raise DictionaryError(f"to decode at layer {target} the features of layers {missing} are needed too")
        rows = len(features[target].count)
        total = self.decoder_bias(target).repeat(rows, 1)
        for layer in needed:
            fired = features[layer]
            names, place = fired.feature.unique(return_inverse=True)
            if len(names):
                written = self.decoder_rows(layer, target, names)[place.to(self.device)]
                total.index_add_(0, fired.row.to(self.device), written * fired.value.to(written)[:, None])
        skip = self.skip(target)
        if skip is None:
            return total
        if x is None:
            raise DictionaryError(f"{self.provenance.source} has a skip connection: decode takes the activations too")
        return total + x.to(total) @ skip

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.n_layers:
            raise DictionaryError(
                f"{self.provenance.source} has layers 0 to {self.n_layers - 1}; layer {layer} was asked for"
            )
