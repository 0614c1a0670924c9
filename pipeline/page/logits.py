"""The run's own unembedding where it is at hand, and what features write towards in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...stages.encode import TRAINED
from ...stores.errors import ForebayError
from ...stores.features import Features
from ...stores.fingerprint import sha256_files
from ...stores.places import Place
from ...stores.store import Store
from ..recipe import Recipe
from ..report.lens import unembedding_of
from .values import TokenSet, absent, numbers

if TYPE_CHECKING:
    from torch import Tensor

    from ...stages.models.unembedding import Unembedding

TOP = 10
"""Tokens told at either end of a feature's effect on the logits."""
AT_ONCE = 2**24
"""Logits held at a time."""


@dataclass(frozen=True)
class AtHand:
    """The unembedding of the model that made a run, or the reason why there is none."""

    unembedding: Unembedding | None
    reason: str = ""


def at_hand(folder: Place, run: xr.DataTree, fetch: bool) -> AtHand:
    """The unembedding of a run's model, if the model lies on this machine and is still the one that made the run. One
    on a hub is looked for only to `fetch` it.
    """
    from ...stages.models.errors import ModelError

    try:
        source = Recipe.from_json(run.attrs.get("recipe")).model.source
        if not fetch and not is_here(source):
            return AtHand(None, f"the model {source} is not on this machine. With --fetch it is looked for on its hub")
        return AtHand(unembedding_of(folder, run))
    except (ForebayError, ModelError, OSError, KeyError) as error:
        return AtHand(None, str(error))


def is_here(source: str) -> bool:
    """Whether a model is on this machine by its name: in a package, or at a path."""
    from ...stages.models.source import PACKAGE_PREFIX

    return source.startswith(PACKAGE_PREFIX) or Path(source).expanduser().exists()


@dataclass(frozen=True)
class LogitEffects:
    """What features add to the logits directly, up to a positive factor a token: their decoder rows through the linear
    part of the final norm (its weight, and the mean taken away where it takes one) and the unembedding.
    """

    known: AtHand
    _rows: dict[str, Tensor | str] = field(default_factory=dict, repr=False)

    def of(self, found: Features, chosen: Sequence[int], tokens: TokenSet) -> dict[str, Any]:
        """The tokens that each of some features raises and lowers most: `logits`, beside each other [feature, 2·TOP],
        or why that cannot be said.
        """
        if self.known.unembedding is None:
            return {"logits": absent(self.known.reason)}
        if found.name not in self._rows:
            self._rows.clear()  # those of one dictionary are held
            self._rows[found.name] = _decoder_rows(found, self.known.unembedding)
        rows = self._rows[found.name]
        if isinstance(rows, str):
            return {"logits": absent(rows)}
        return (
            {"logits": _extremes(self.known.unembedding, rows[list(chosen)], tokens)}
            if chosen
            else {"logits": absent("no feature fires")}
        )


def _decoder_rows(found: Features, unembedding: Unembedding) -> Tensor | str:
    """The decoder [feature, d_model] of a dictionary that writes into the residual stream, or why there is none."""
    from ...stages.dictionaries.dictionary import Dictionary
    from ...stages.dictionaries.errors import DictionaryError
    from ...stages.dictionaries.load import load_dictionary
    from ...stages.models.errors import HookError

    source, hook_out = dictionary_source(found), str(found.attrs.get("hook_out"))
    if source is None:
        return f"the dictionary {found.attrs.get('source')} is not on this machine"
    try:
        loaded = load_dictionary(source)
    except (DictionaryError, HookError, OSError) as error:
        return str(error)
    if not isinstance(loaded, Dictionary) or loaded.n_feature != found.n_feature:
        return "that is told of a dictionary of one hook point only"
    if not unchanged(found.by_token.store, loaded.provenance.files):
        return f"the files of {source} have changed since it encoded"
    if not hook_out.endswith(_RESIDUAL) or loaded.d_out != unembedding.weight.shape[1]:
        return f"what is written at {hook_out} does not go to the logits as it is"
    return loaded.W_dec


_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "hook_embed")
"""Kinds of points in the residual stream, or what is added to it."""


def dictionary_source(found: Features) -> Path | None:
    """Where a dictionary lies on this machine: in the run, if it was trained there, wherever the run lies now."""
    source, step = Path(str(found.attrs.get("source", ""))), found.by_token.store.path.parent
    name = step.name.removeprefix("features-")
    trained = step.parent / TRAINED / name
    if source.parts[-2:] == (TRAINED, name) and isinstance(trained, Path) and trained.exists():
        return trained
    return source if source.is_absolute() and source.exists() else None


def unchanged(store: Store, files: Sequence[Path]) -> bool:
    """Whether files are among those that determined a store's values, by their hashes."""
    said = store.header.provenance.get("determines", {}).get("files", [])
    return all(
        [path.name, digest] in said
        for path, digest in sha256_files(files, store.path.parent.parent / "files.json").items()
    )


def _extremes(unembedding: Unembedding, rows: Tensor, tokens: TokenSet) -> dict[str, Any]:
    import torch

    from ...stages.models.norms import NORMS

    weight = unembedding.norm.weight
    centred = NORMS[unembedding.spec.norm].centre(rows.float())
    scaled = centred if weight is None else centred * weight.float()
    step = max(1, AT_ONCE // unembedding.weight.shape[0])
    most = min(TOP, unembedding.weight.shape[0])
    ids, values = [], []
    with torch.inference_mode():
        for first in range(0, len(rows), step):
            logits = scaled[first : first + step] @ unembedding.weight.float().T
            high, low = logits.topk(most), logits.topk(most, largest=False)
            ids.append(torch.cat([high.indices, low.indices], -1).numpy())
            values.append(torch.cat([high.values, low.values], -1).numpy())
    return {"tokens": tokens.add(np.concatenate(ids)), "values": numbers(np.concatenate(values)), "top": most}
