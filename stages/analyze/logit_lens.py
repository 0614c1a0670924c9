"""Logit lens: what the model would say if each layer's residual stream were its last.

nostalgebraist (2020), "interpreting GPT: the logit lens". Every residual stream goes through the model's own final norm
and unembedding, final soft-cap included; so the last layer's lens is the model's prediction.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.unembedding import Unembedding

AT_ONCE = 2**24
"""Logits held at a time: 64 MiB in float32."""

_NORMALIZED = ("hook_final_norm", "hook_normalized", "attn.hook_in", "mlp.hook_in", "rwkv.hook_in")
"""Kinds of points that stand behind a norm, by how they end."""

_MEANING: Mapping[str, Mapping[str, str]] = {
    "top_token_id": {"long_name": "strongest tokens", "units": "token id"},
    "top_probability": {"long_name": "probability of the strongest tokens", "units": "probability"},
    "next_rank": {"long_name": "tokens stronger than the next one", "units": "rank"},
    "next_log_probability": {"long_name": "log probability of the next token", "units": "nats"},
    "token_rank": {"long_name": "tokens stronger than the chosen one", "units": "rank"},
    "token_probability": {"long_name": "probability of the chosen token", "units": "probability"},
}


def logit_lens(
    activations: xr.Dataset | xr.DataTree,
    unembedding: Unembedding,
    *,
    top: int = 5,
    tokens: Sequence[int] | None = None,
    softcap: bool = True,
) -> xr.Dataset:
    """The lens over stored residual streams, lazily where they are lazy.

    `activations`: a node such as `open_run(path)["activations/hook_resid_post"]`, of `as_run(forward)` likewise, or a
    selection of either, made before: `value[layer, token, d_model]` with the coordinates `token_id`, `sequence` and
    `position`. Any vectors that live in the residual stream will do: what attention or an MLP adds to it, components of
    a decomposition, the embedding, which has no `layer`; other leading dimensions are kept. What a norm has made is
    refused where its name is known, that is, of a node of a tree. `unembedding` comes from `load_unembedding` or is
    `model.unembedding`.

    Gives, along `layer` and `token`: `top_token_id[…, rank]` (int32) and `top_probability[…, rank]` (float32) of the
    `top` strongest tokens, rank 0 first; `next_rank` (float32: how many tokens are stronger than the one that really
    follows; NaN where none follows in the sequence or in the selection) and `next_log_probability` (float32, nats, NaN
    likewise); and the coordinate `next_token_id` (-1 where there is none). For chosen `tokens` also `token_rank[…,
    vocab]` (float32: how many are stronger) and `token_probability[…, vocab]` (float32), the coordinate `vocab` holding
    their ids. Where `value` is NaN, as in units that are not recorded, so is the lens, and its token ids are -1.

    `softcap=False` leaves the final soft-cap out, where the model has one, as candle-mi does: ranks stay, probabilities
    are then not the model's. All variables come of one pass: computed together they read every chunk once. Memory: one
    chunk of activations and 64 MiB of logits a thread.

    SchemaError if the dimensions or labels are not there, the widths differ, or there is no such token.
    """
    node = _dataset(activations)
    value = _checked(node, unembedding)
    n_vocab = unembedding.weight.shape[0]
    if not 1 <= top <= n_vocab:
        raise SchemaError(f"top = {top} tokens are asked for; from 1 to {n_vocab:,} can be told")
    chosen = None if tokens is None else _chosen(tokens, n_vocab)
    following = next_tokens(node)
    outputs: list[list[str]] = [["rank"], ["rank"], [], [], *([] if chosen is None else [["vocab"], ["vocab"]])]
    lens: tuple[xr.DataArray, ...] = xr.apply_ufunc(
        _Lens(top, chosen, softcap),
        value,
        following,
        _held(unembedding, value.chunks is not None),
        input_core_dims=[["d_model"], [], ["held"]],
        output_core_dims=outputs,
        keep_attrs=False,
        dask="parallelized",
        output_dtypes=[np.int32] + [np.float32] * (len(outputs) - 1),
        dask_gufunc_kwargs={"output_sizes": {"rank": top} | ({} if chosen is None else {"vocab": len(chosen)})},
    )
    named = {name: found.assign_attrs(_MEANING[name]) for name, found in zip(_MEANING, lens, strict=False)}
    coords: dict[str, Any] = {"next_token_id": following.reset_coords(drop=True)}
    return xr.Dataset(named).assign_coords(coords | ({} if chosen is None else {"vocab": list(chosen)}))


def first_appearance(lens: xr.Dataset, token_id: int | Sequence[int], k: int = 1) -> xr.DataArray:
    """The first layer whose `k` strongest tokens contain a token, or one of several, such as all that begin a word.

    `lens` is what `logit_lens` gave, of several layers, with `top` at least `k`, or with the token among its `tokens`:
    then it appears where fewer than `k` are stronger. Gives [token] float32, the lowest of the layers that the lens was
    given, NaN where the token never appears; lazily where the lens is lazy. SchemaError where the lens does not tell.

    Definition: candle-mi's `first_appearance`, by token ids where that compares pieces of text.
    """
    if "layer" not in lens.dims:
        raise SchemaError(f"the first of several layers is asked for; the lens has {list(map(str, lens.dims))}")
    if k < 1:
        raise SchemaError(f"k = {k}: at least the strongest token is looked at")
    wanted = np.atleast_1d(np.asarray(token_id, dtype=np.int64)).tolist()
    told = lens["vocab"].values.tolist() if "token_rank" in lens else []
    if k <= lens.sizes["rank"]:
        here = lens["top_token_id"].isel(rank=slice(k)).isin(wanted).any("rank")
    elif set(wanted) <= set(told):
        here = (lens["token_rank"].sel(vocab=wanted) < k).any("vocab")
    else:
        raise SchemaError(
            f"the lens tells the {lens.sizes['rank']} strongest tokens, not {k}: make it with top={k}, or with "
            f"tokens={wanted}"
        )
    layer = lens["layer"].astype(np.float32)
    lowest = layer.where(here, np.float32(np.inf)).min("layer").drop_vars("layer", errors="ignore")
    found = lowest.where(np.isfinite(lowest)).rename("first_appearance")
    return found.assign_attrs(long_name=f"first layer with the token among its {k} strongest", units="layer")


def next_tokens(activations: xr.Dataset | xr.DataTree) -> xr.DataArray:
    """The token that really follows each token, in its own sequence and next to it in the selection; -1 where there is
    none. int64, read chunk by chunk when asked for where `value` is lazy.
    """
    node = activations.to_dataset() if isinstance(activations, xr.DataTree) else activations
    labels = node[["token_id", "sequence", "position"]]
    chunks = node["value"].variable.chunksizes.get("token") if "value" in node else None
    if chunks is None:
        return xr.DataArray(_following(labels, 0, node.sizes["token"]), dims="token")

    def read(block_info: Any = None) -> NDArray[np.int64]:
        ((start, stop),) = block_info[None]["array-location"]
        return _following(labels, start, stop)

    lazy = da.map_blocks(read, chunks=(chunks,), dtype=np.int64, meta=np.empty(0, dtype=np.int64))
    return xr.DataArray(lazy, dims="token")


def format_probability(probability: float) -> str:
    """A probability as a percentage: one decimal from 1 % on, three from 0.01 % on, below that in powers of ten, as in
    `3.2e-04%`. The thresholds are candle-mi's.
    """
    if probability >= 0.01:
        return f"{probability:.1%}"
    return f"{probability:.3%}" if probability >= 1e-4 else f"{100 * probability:.1e}%"


def format_token(text: str) -> str:
    """The text of a token on one line: what cannot be printed, such as a line break, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _following(labels: xr.Dataset, start: int, stop: int) -> NDArray[np.int64]:
    """The next tokens of tokens [start, stop), one more being read where there is one."""
    part = labels.isel(token=slice(start, stop + 1))
    ids, sequence, position = (part[name].values.astype(np.int64) for name in ("token_id", "sequence", "position"))
    follows = (np.diff(sequence) == 0) & (np.diff(position) == 1)
    found = np.where(follows, ids[1:], -1)
    return found if len(found) == stop - start else np.append(found, [-1] * (stop - start - len(found)))


def _dataset(activations: xr.Dataset | xr.DataTree) -> xr.Dataset:
    if not isinstance(activations, xr.DataTree):
        return activations
    if str(activations.name).endswith(_NORMALIZED):
        raise SchemaError(
            f"{activations.name} is normalised already, and the logit lens applies the final norm itself: give it a "
            f"residual stream, such as hook_resid_post"
        )
    return activations.to_dataset()


def _checked(activations: xr.Dataset, unembedding: Unembedding) -> xr.DataArray:
    needs = {"token_id", "sequence", "position"}
    if "value" not in activations or activations["value"].dims[-2:] != ("token", "d_model"):
        said = activations["value"].dims if "value" in activations else sorted(map(str, activations.data_vars))
        raise SchemaError(f"the logit lens reads value[layer, token, d_model] of a residual stream, not {said}")
    if missing := needs - set(activations.coords):
        raise SchemaError(
            f"the logit lens needs the coordinates {sorted(missing)} on `token`; open the store with open_run"
        )
    if activations.sizes["d_model"] != unembedding.weight.shape[1]:
        raise SchemaError(
            f"the activations are {activations.sizes['d_model']} wide and the unembedding reads "
            f"{unembedding.weight.shape[1]}: another model's?"
        )
    return activations["value"]


def _chosen(tokens: Sequence[int], n_vocab: int) -> tuple[int, ...]:
    chosen = tuple(int(token) for token in tokens)
    if absent := [token for token in chosen if not 0 <= token < n_vocab]:
        raise SchemaError(f"there is no token {absent[0]}: the vocabulary has {n_vocab:,}, numbered from 0")
    if not chosen or len(set(chosen)) < len(chosen):
        raise SchemaError(f"tokens = {list(chosen)}: at least one id is expected, and each once")
    return chosen


def _held(unembedding: Unembedding, lazy: bool) -> xr.DataArray:
    """The unembedding as the one element of an array: lazily a key of its own, so that it reaches each worker of a
    cluster once, and not with every block.
    """
    box = np.empty(1, dtype=object)
    box[0] = unembedding
    # Dask would pickle all of it to find a name for it.
    return xr.DataArray(
        da.from_array(box, chunks=-1, name=f"unembedding-{uuid.uuid4().hex}") if lazy else box, dims="held"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Lens:
    """The lens on one block."""

    top: int
    tokens: tuple[int, ...] | None
    softcap: bool

    def __call__(
        self, resid: NDArray[Any], following: NDArray[np.int64], held: NDArray[Any]
    ) -> tuple[NDArray[Any], ...]:
        """Of resid [..., token, d_model] and following [token] or its broadcast, as torch sees it, some rows at a
        time, through the unembedding that is `held`.
        """
        import torch

        unembedding: Unembedding = held.flat[0]
        lead = resid.shape[:-1]
        rows = torch.from_numpy(np.array(resid, dtype=np.float32, order="C")).reshape(-1, resid.shape[-1])
        wanted = torch.from_numpy(np.array(np.broadcast_to(following, lead))).reshape(-1)
        step = max(1, AT_ONCE // unembedding.weight.shape[0])
        with torch.inference_mode():
            columns: list[Tensor] = []
            for first in range(0, max(len(rows), 1), step):
                found = self._rows(unembedding, rows[first : first + step], wanted[first : first + step])
                if not columns:
                    columns = [part.new_empty((len(rows), *part.shape[1:])) for part in found]
                # Small results that were kept would each pin the memory of the logits that they were found in.
                for column, part in zip(columns, found, strict=True):
                    column[first : first + step] = part
        return tuple(column.reshape(*lead, *column.shape[1:]).numpy() for column in columns)

    def _rows(self, unembedding: Unembedding, resid: Tensor, following: Tensor) -> list[Tensor]:
        import torch

        device = unembedding.weight.device
        logits = unembedding.project_to_vocab(resid.to(device), softcap=self.softcap)
        following = following.to(device)
        normalizer = logits.logsumexp(-1, keepdim=True)
        strongest = logits.topk(self.top)
        own = logits.gather(-1, following.clamp(min=0)[:, None])
        nothing = own.isnan()  # a token of a unit that is not recorded
        absent = (following < 0) | nothing[:, 0]
        rank = _stronger(logits, own).masked_fill(absent, torch.nan)
        log_probability = (own - normalizer)[:, 0].masked_fill(absent, torch.nan)
        ids = strongest.indices.int().masked_fill(nothing, -1)
        found = [ids, (strongest.values - normalizer).exp(), rank, log_probability]
        if self.tokens is not None:
            chosen = logits[:, list(self.tokens)]
            stronger = [_stronger(logits, one[:, None]) for one in chosen.unbind(-1)]
            found += [torch.stack(stronger, -1).masked_fill(nothing, torch.nan), (chosen - normalizer).exp()]
        return [part.cpu() for part in found]


def _stronger(logits: Tensor, than: Tensor) -> Tensor:
    """How many of the logits [token, vocab] are larger than one [token, 1] of each row, float32 [token]."""
    import torch

    larger = logits > than
    if larger.device.type != "cpu":
        return larger.sum(-1).float()
    return torch.from_numpy(np.count_nonzero(larger.numpy(), axis=-1)).float()  # a fifth of the time of torch's sum
