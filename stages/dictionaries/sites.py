"""Where the dictionaries of a step read and which group of its store each one fills."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.points import HookPoint
from .activation import Activation
from .dictionary import Dictionary, Encoder
from .errors import DictionaryError
from .load import load_dictionary
from .transcoders import TranscoderSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One encoder at work: it reads `hook` (of its heads only `head`, where that is given) and fills `group`.

    `rank` is the most features that a token may have, None where that is not bounded. `layer` is the one of a set of
    transcoders. `source` is what the user named.
    """

    group: str
    source: str
    hook: str
    hook_out: str
    head: int | None
    layer: int | None
    d_in: int
    n_feature: int
    rank: int | None
    kind: str
    loaded: Dictionary | TranscoderSet = field(repr=False, compare=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files whose bytes determine the dictionary."""
        return self.loaded.provenance.files

    @property
    def revision(self) -> str | None:
        """The commit of a dictionary on the hub; None for one on this machine."""
        return self.loaded.provenance.revision

    def load(self, device: str, dtype: torch.dtype) -> Encoder:
        """The encoder on a device, in a dtype; with its decoder where it is not one of a set.

        DictionaryError for a layer of a set whose activation function is another one than the first layer has.
        """
        if isinstance(self.loaded, Dictionary):
            return self.loaded.to(device, dtype)
        encoder = self.loaded.encoder(self.layer or 0)
        found = (encoder.activation.kind, encoder.activation.k if encoder.activation.counted else None)
        if found != (self.kind, self.rank):
            raise DictionaryError(
                f"{self.source}: layer {self.layer} is {found[0]} with k = {found[1]}, the first one {self.kind} with "
                f"k = {self.rank}; encode them in tables of their own, with `layers`"
            )
        return encoder.to(device, dtype)

    def about(self) -> dict[str, Any]:
        """What a reader of the features will want to know, as JSON values."""
        provenance = self.loaded.provenance
        return {
            "source": self.source,
            "format": provenance.format,
            "revision": self.revision,
            "model": provenance.model,
            "hook": self.hook,
            "hook_out": self.hook_out,
            "layer": self.layer,
            "d_in": self.d_in,
            "n_feature": self.n_feature,
            "activation": self.kind,
            "k": self.rank,
        }


def open_sites(
    name: str,
    sources: str | Mapping[str, str],
    *,
    layers: tuple[int, ...] | None,
    revision: str | None,
    format: str | None,
    hook: str | None,
    hook_out: str | None,
) -> tuple[Site, ...]:
    """The sites of one source, or of several by name: groups `name`, `name/<its name>` or, of a set of transcoders,
    `…/layer_<layer>` (of `layers`, or all).

    Reads single dictionaries whole, of a set one encoder. Raises DictionaryError.
    """
    many = {name: sources} if isinstance(sources, str) else {f"{name}/{key}": one for key, one in sources.items()}
    sites: list[Site] = []
    for group, source in many.items():
        loaded = load_dictionary(source, revision=revision, format=format, hook=hook, hook_out=hook_out)
        if isinstance(loaded, TranscoderSet):
            chosen = _chosen(loaded, layers)
            activation = loaded.encoder(chosen[0]).activation  # read once: it is a whole encoder
            sites += [_layer_site(group, source, loaded, layer, activation) for layer in chosen]
        elif layers is not None:
            raise DictionaryError(f"{source} is one dictionary, not a set of layers: leave out layers = {list(layers)}")
        else:
            sites.append(_site(group, source, loaded))
    return tuple(sites)


def _chosen(loaded: TranscoderSet, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    chosen = tuple(range(loaded.n_layers)) if layers is None else layers
    wrong = [layer for layer in chosen if not 0 <= layer < loaded.n_layers]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise DictionaryError(
            f"layers = {list(chosen)}: distinct layers of 0 to {loaded.n_layers - 1} were expected, at least one: "
            f"{loaded.provenance.source} has no others"
        )
    return chosen


def _site(group: str, source: str, loaded: Dictionary) -> Site:
    return Site(
        group=group,
        source=source,
        hook=_canonical(loaded.hook),
        hook_out=_canonical(loaded.hook_out),
        head=loaded.head,
        layer=None,
        d_in=loaded.d_in,
        n_feature=loaded.n_feature,
        rank=loaded.activation.k if loaded.activation.counted else None,
        kind=loaded.activation.kind,
        loaded=loaded,
    )


def _layer_site(group: str, source: str, loaded: TranscoderSet, layer: int, activation: Activation) -> Site:
    return Site(
        group=f"{group}/layer_{layer}",
        source=source,
        hook=_canonical(loaded.hooks_in[layer]),
        hook_out=_canonical(loaded.hooks_out[layer]),
        head=None,
        layer=layer,
        d_in=loaded.d_in,
        n_feature=loaded.n_features[layer],
        rank=activation.k if activation.counted else None,
        kind=activation.kind,
        loaded=loaded,
    )


def _canonical(hook: str) -> str:
    """The one name of a hook point, which may go by aliases. HookError for what is none."""
    return str(HookPoint.parse(hook))
