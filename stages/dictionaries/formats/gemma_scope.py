"""Gemma Scope (Gemma 2): `params.npz` with the weights and nothing else; the names of its folders say the rest.

JumpReLU everywhere, nothing subtracted from the input, no norm. What a dictionary reads is told by its repository:

* `-res`: the residual stream that leaves a block; `embedding/…`: the token embeddings
* `-mlp`: what the MLP adds to the stream, behind its second norm
* `-att`: what enters the output projection, the heads laid flat
* `-transcoders`: from the MLP's normalised input *before* the norm's weight, which Gemma Scope folded into the MLP
  (Lieberum et al. 2024, Language model technical details), to what the MLP adds to the stream

The embeddings were read before the factor √d_model that Gemma multiplies them by, and `hook_embed` comes after it:
W_enc / √d, W_dec · √d and b_dec · √d are the same autoencoder there. (SAELens leaves b_dec as it is, so that its
reconstructions differ by (√d − 1) b_dec; features are the same.)

Trained without a first token of a sequence, so that features of it mean nothing.
"""

import re
from pathlib import PurePosixPath

from ..activation import Activation
from ..dictionary import Dictionary, Provenance
from ..errors import DictionaryError
from ..place import Place
from .folding import scaled, unified
from .format import Format, Hooks, exactly, read_npz

_REPOSITORY = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<tuned>pt|it)-(?P<site>res|mlp|att|transcoders)(?![a-z])")
_LAYER = re.compile(r"layer_(\d+)")
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
EMBEDDING = "hook_embed"

SITES = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
"""Suffix of a repository → kinds of hook point that are read and written; None: what is read."""


def _recognizes(place: Place) -> bool:
    return _file(place) is not None


def _file(place: Place) -> str | None:
    if place.file is not None:
        return place.file if place.file.endswith(".npz") else None
    return "params.npz" if "params.npz" in place.names else None


def _read(place: Place, hooks: Hooks) -> Dictionary:
    path = place.require(_file(place) or "params.npz")
    found = read_npz(path)
    tensors = {_spelt(name): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise DictionaryError(f"{path} has the same tensor in two spellings: {', '.join(found)}")
    exactly(tensors, _TENSORS, path)
    hook, hook_out = hooks.choose(place, *_site(place))
    threshold = tensors.pop("threshold")
    tensors = unified(tensors, path, folds=hook == EMBEDDING)
    if hook == EMBEDDING:
        root = float(tensors["b_dec"].numel() ** 0.5)
        tensors = scaled(tensors, 1 / root, 1 / root)
    said = _REPOSITORY.search(place.text)
    return Dictionary(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation=Activation(kind="jumprelu", threshold=threshold),
        hook=hook,
        hook_out=hook_out,
        denormalize=hook == hook_out,
        provenance=Provenance(
            source=place.source,
            format="gemma-scope",
            revision=place.revision,
            model=f"google/gemma-2-{said['size']}{'-it' if said['tuned'] == 'it' else ''}" if said else None,
            files=(path,),
        ),
    )


def _spelt(name: str) -> str:
    """A name as it is now, of one in the small letters of some files."""
    return next((known for known in _TENSORS if known.lower() == name.lower()), name)


def _site(place: Place) -> tuple[str | None, str | None]:
    """The hook points that the names of repository and folders tell; None where they do not."""
    said = _REPOSITORY.search(place.text)
    parts = PurePosixPath(place.text[said.end() :]).parts if said else ()
    if said is None:
        return None, None
    if "embedding" in parts:
        return EMBEDDING, None
    layers = [found[1] for part in parts if (found := _LAYER.fullmatch(part))]
    if len(layers) != 1:
        return None, None
    kind, kind_out = SITES[said["site"]]
    return f"blocks.{layers[0]}.{kind}", f"blocks.{layers[0]}.{kind_out}" if kind_out else None


FORMAT = Format(recognizes=_recognizes, read=_read)
