"""Models and dictionaries that the tests of features are about: small, random, no two sizes equal."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forebay.stages.dictionaries.activation import Activation
from forebay.stages.dictionaries.dictionary import Dictionary, Encoder, Provenance
from forebay.stages.dictionaries.transcoders import TranscoderSet
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model

from ..models.families import SIZES, make

FROM = Provenance(source="a random dictionary", format="none")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normally distributed, float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale


@functools.cache
def model_of(family: str = "llama", dtype: str = "float64") -> Model:
    """A random model of four layers and a vocabulary of 101, whose heads together are wider than the residual stream
    or as wide.
    """
    with tempfile.TemporaryDirectory() as folder:
        make(family, SIZES[family]).save_pretrained(folder)
        model = load_model(folder, device="cpu", dtype="float32" if dtype == "float64" else dtype)
    return in_float64(model) if dtype == "float64" else model


def in_float64(model: Model) -> Model:
    """The same model computing in float64, so that two ways to the same numbers differ by rounding that is nothing."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double()
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            held = {field.name: wide(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **held)
        return value

    return Model(model.spec, wide(model.weights), model.device, torch.float64)


def sequences_of(*lengths: int, seed: int = 8) -> list[Tensor]:
    """Token ids of sequences of these lengths."""
    return [torch.randint(0, 101, (length,), generator=generator(seed + n)) for n, length in enumerate(lengths)]


def activation_of(kind: str, n_feature: int, seed: int, k: int = 3) -> Activation:
    """An activation function of a kind with random parameters."""
    threshold = numbers(n_feature, seed=seed).abs() * 0.3
    parameters: dict[str, dict[str, Any]] = {
        "relu": {},
        "topk": {"k": k},
        "abstopk": {"k": k},
        "groupmax": {"k": k},
        "jumprelu": {"threshold": threshold},
        "batchtopk": {"threshold": threshold[:1].expand(n_feature), "k": k},
        "gated": {"r_mag": numbers(n_feature, seed=seed + 1, scale=0.3), "b_mag": numbers(n_feature, seed=seed + 2)},
    }
    return Activation(kind=kind, **parameters[kind])  # type: ignore[arg-type]


def dictionary_of(
    hook: str,
    d_in: int,
    *,
    n_feature: int = 33,
    hook_out: str | None = None,
    d_out: int | None = None,
    kind: str = "relu",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    skip: bool = False,
    **settings: Any,
) -> Dictionary:
    """A random dictionary; a transcoder where `hook_out` is given. `b_in` is there unless settings say otherwise."""
    d_out = d_in if d_out is None else d_out
    defaults = {"b_in": numbers(d_in, seed=seed + 5), "denormalize": hook_out is None}
    given = {
        "W_enc": numbers(d_in, n_feature, seed=seed + 1, scale=d_in**-0.5),
        "b_enc": numbers(n_feature, seed=seed + 2, scale=0.3),
        "W_dec": numbers(n_feature, d_out, seed=seed + 3, scale=d_out**-0.5),
        "b_dec": numbers(d_out, seed=seed + 4, scale=0.3),
        "W_skip": numbers(d_in, d_out, seed=seed + 6, scale=d_in**-0.5) if skip else None,
        "activation": activation_of(kind, n_feature, seed + 7),
        "hook": hook,
        "hook_out": hook_out or hook,
        "provenance": FROM,
        **defaults,
        **settings,
    }
    return Dictionary(**given).to(dtype=dtype)


@dataclass(frozen=True)
class InMemory:
    """A reader of a set whose parts are tensors; it notes what it was asked for."""

    encoders: Sequence[Encoder]
    decoders: dict[tuple[int, int], Tensor]
    biases: Sequence[Tensor]
    skips: Sequence[Tensor | None]
    asked: list[tuple[Any, ...]]

    def encoder(self, layer: int) -> Encoder:
        self.asked.append(("encoder", layer))
        return self.encoders[layer]

    def decoder_rows(self, layer: int, target: int, features: slice | Tensor) -> Tensor:
        rows = self.decoders[layer, target][features]
        self.asked.append(("rows", layer, target, len(rows)))
        return rows

    def decoder_bias(self, target: int) -> Tensor:
        return self.biases[target]

    def skip(self, layer: int) -> Tensor | None:
        return self.skips[layer]


def set_of(
    d_in: int,
    n_features: Sequence[int],
    *,
    cross_layer: bool,
    d_out: int | None = None,
    hook_in: str = "hook_resid_mid",
    hook_out: str = "mlp.hook_out",
    kind: str = "relu",
    dtype: torch.dtype = torch.float64,
    skip: bool = False,
) -> TranscoderSet:
    """A random set of transcoders in memory, one for each number of features."""
    layers, d_out = range(len(n_features)), d_in if d_out is None else d_out
    encoders = []
    for layer, n_feature in enumerate(n_features):
        one = dictionary_of(f"blocks.{layer}.{hook_in}", d_in, n_feature=n_feature, kind=kind, seed=100 * layer)
        encoders.append(Encoder(**{name: getattr(one, name) for name in Encoder.__dataclass_fields__}))
    reader = InMemory(
        encoders=encoders,
        decoders={
            (layer, target): numbers(n_features[layer], d_out, seed=1000 + 10 * layer + target, scale=d_out**-0.5)
            for layer in layers
            for target in (layers[layer:] if cross_layer else [layer])
        },
        biases=[numbers(d_out, seed=2000 + layer) for layer in layers],
        skips=[numbers(d_in, d_out, seed=3000 + layer) if skip else None for layer in layers],
        asked=[],
    )
    return TranscoderSet(
        reader=reader,
        n_features=tuple(n_features),
        d_in=d_in,
        d_out=d_out,
        hooks_in=tuple(f"blocks.{layer}.{hook_in}" for layer in layers),
        hooks_out=tuple(f"blocks.{layer}.{hook_out}" for layer in layers),
        cross_layer=cross_layer,
        provenance=FROM,
        dtype=dtype,
    )
