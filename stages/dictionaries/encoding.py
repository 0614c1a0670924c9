"""Encoding rows of activations in blocks of bounded memory, into what a features store takes, with what is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ...stores.grid import Unit
from ...stores.schema import Schema
from ..models.memory import keep_freed_memory
from ..models.points import HookPoint
from ..storing import Dtype, cast, on_host
from .activation import Sparse
from .dictionary import Dictionary, Encoder
from .sites import Site

if TYPE_CHECKING:
    import xarray as xr

    from ..encode import Encode

PIECE_TOKENS = 4096
"""Of stored activations that are read at a time."""
COPIES = 3
"""A block has so many rows that as many arrays as large as its preactivations fit `memory`. This and `PIECE_TOKENS` cut
the rows of products, whose last bits may differ with their number: what is stored depends on them.
"""


@dataclass(frozen=True)
class SiteEncoding:
    """A site with its encoder on the device, most rows of a block, and what is measured on the way."""

    site: Site
    encoder: Encoder
    block_rows: int
    store_dtype: Dtype
    skip_positions: int
    fit_every: int

    def blocks(self, n_row: int) -> list[slice]:
        """Rows in as few blocks as may be, of one size but for a row: a short one would read all weights for little."""
        n = -(-n_row // self.block_rows)
        return [slice(n_row * i // n, n_row * (i + 1) // n) for i in range(n)]

    @property
    def fits(self) -> bool:
        """Whether reconstruction is measured: there must be a decoder, and the model's own value to compare with."""
        return self.fit_every > 0 and isinstance(self.encoder, Dictionary)

    @property
    def reads(self) -> tuple[str, ...]:
        """The hook points whose activations are taken."""
        return (self.site.hook, *([self.site.hook_out] if self.fits and self.site.hook_out != self.site.hook else []))

    def rows(self, activations: Tensor) -> Tensor:
        """Vectors [token, d] of activations [token, …]: one head's, or of all heads end to end."""
        return activations[:, self.site.head] if self.site.head is not None else activations.flatten(1)


def load_encodings(encode: Encode, device: str) -> tuple[SiteEncoding, ...]:
    """The encoders of a step on the device, and how many rows each takes at a time at most: memory / (3 · features ·
    bytes of a preactivation).
    """
    if torch.device(device).type == "cpu":
        keep_freed_memory()  # preactivations are as large in every block
    return tuple(load_encoding(encode, site, device) for site in encode.sites)


def load_encoding(encode: Encode, site: Site, device: str) -> SiteEncoding:
    """One of them."""
    dtype = getattr(torch, encode.dtype)
    row_bytes = site.n_feature * dtype.itemsize * COPIES
    return SiteEncoding(
        site=site,
        encoder=site.load(device, dtype),
        block_rows=max(1, encode.memory // row_bytes),
        store_dtype=encode.store_dtype,
        skip_positions=encode.skip_positions,
        fit_every=encode.fit_every,
    )


def stored_pieces(
    block: xr.Dataset, unit: Unit, encodings: Sequence[SiteEncoding]
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """The unit's tokens and their activations by hook point, a few thousand at a time, read one piece ahead.

    `block` holds lazy `<kind>/value` along `token` and, within blocks of the model, `<kind>/layer`.
    """
    names = dict.fromkeys(name for encoding in encodings for name in encoding.reads)
    held = {name: variable for name in names if (variable := _variable(block, HookPoint.parse(name))) is not None}

    def read(first: int) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
        beyond = min(first + PIECE_TOKENS, unit.stop)
        span = slice(first - unit.start, beyond - unit.start)
        values = {name: torch.from_numpy(one.isel(token=span).values) for name, one in held.items()}
        return np.arange(first, beyond), values

    with ThreadPoolExecutor(1, "read") as reader:
        ahead = None
        for first in range(unit.start, unit.stop, PIECE_TOKENS):
            following = reader.submit(read, first)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def _variable(block: xr.Dataset, point: HookPoint) -> xr.Variable | None:
    """The lazy activations [token, …] of a point; None where they were not captured."""
    path = f"{point.kind}/value"
    if path not in block.variables:
        return None
    variable = block.variables[path]
    if point.layer is None:
        return variable
    where = np.flatnonzero(block[f"{point.kind}/layer"].values == point.layer)
    return variable.isel({f"{point.kind}/layer": int(where[0])}) if len(where) else None


def pieces_of(
    encodings: Sequence[SiteEncoding], activations: Mapping[str, Tensor], tokens: NDArray[np.int64], own: Schema
) -> Iterator[xr.DataTree]:
    """The features of tokens, as one piece of a features store."""
    import xarray as xr

    starts = own.labels["sequences/start"][1]
    position = tokens - starts[np.searchsorted(starts, tokens, "right") - 1]
    nodes = {}
    for encoding in encodings:
        counted = position >= encoding.skip_positions
        variables, statistics = _encode(encoding, activations, tokens, counted)
        nodes[encoding.site.group] = xr.Dataset(variables, coords={"token": tokens}, attrs={"statistics": statistics})
    yield xr.DataTree.from_dict(nodes)


def _encode(
    encoding: SiteEncoding, activations: Mapping[str, Tensor], tokens: NDArray[np.int64], counted: NDArray[np.bool_]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Variables of a group's piece, and its statistics, block by block; what is kept leaves the device once a piece."""
    site = encoding.site
    x = encoding.rows(activations[site.hook]).to(encoding.encoder.device)
    _require_finite(x, site, tokens)
    target = activations.get(site.hook_out) if encoding.fits else None
    chosen = np.flatnonzero(counted & (tokens % encoding.fit_every == 0)) if target is not None else np.zeros(0, int)
    cuts = encoding.blocks(len(x))
    samples = np.split(chosen, np.searchsorted(chosen, [cut.start for cut in cuts[1:]]))
    blocks = [
        _block(encoding, x[cut], torch.from_numpy(sample - cut.start).to(x.device))
        for cut, sample in zip(cuts, samples, strict=True)
    ]
    value, feature, count, decoded = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    counts = on_host(count.to(torch.int32))
    kept = on_host(cast(value, encoding.store_dtype, f"features of {site.source}", "encode's store_dtype"))
    statistics = {"token_sum": np.array([counted.sum()]), "l0_sum": np.array([counts[counted].sum()])}
    if target is not None:
        statistics |= _fit(decoded, encoding.rows(target)[torch.from_numpy(chosen).to(target.device)])
    dims = ("nonzero",) if site.rank is None else ("token", "rank")
    variables: dict[str, Any] = {"feature": (dims, on_host(feature.to(torch.int32))), "value": (dims, kept)}
    if site.rank is None:
        variables["count"] = (("token",), counts)
    return variables, statistics


def _require_finite(x: Tensor, site: Site, tokens: NDArray[np.int64]) -> None:
    """SchemaError naming the first token with activations that are NaN or infinite."""
    # A sum is finite, or overflows, or tells of what is not: cheaper than a mask as large as the activations.
    if bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all()):
        return
    first = int(tokens[int((~torch.isfinite(x)).any(-1).nonzero()[0])])
    raise SchemaError(
        f"{site.hook}: the activations of token {first} are NaN or infinite, and have no features. "
        'Capture in a wider dtype ("float32" or "bfloat16")'
    )


def _block(encoding: SiteEncoding, x: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, features and their number a token, of one block of rows; and the reconstructions of a sample of them,
    where there is a decoder.
    """
    encoder, site = encoding.encoder, encoding.site
    if site.rank is not None:
        value, feature = encoder.encode_ranked(x)
        count = (feature >= 0).sum(-1)
        sparse = Sparse.from_ranked(value[sample], feature[sample], site.n_feature)
    else:
        coded = encoder.encode_sparse(x)
        value, feature, count = coded.value, coded.feature, coded.count
        sparse = coded.take(sample) if len(sample) else coded
    if not isinstance(encoder, Dictionary):
        return value, feature, count, x.new_zeros(0, 0)
    decoded = encoder.decode_sparse(sparse, x[sample]) if len(sample) else x.new_zeros(0, encoder.d_out)
    return value, feature, count, decoded.to(x.dtype)


def _fit(decoded: Tensor, target: Tensor) -> dict[str, NDArray[Any]]:
    """Sums over a sample of the tokens, from which `dictionary_fit` makes FVU and cosine."""
    decoded, target = decoded.cpu().double(), target.cpu().double()
    cosine = torch.nn.functional.cosine_similarity(decoded, target, dim=-1)
    return {
        "fit_token_sum": np.array([len(target)]),
        "error_square_sum": _numpy((decoded - target).square().sum()),
        "target_square_sum": _numpy(target.square().sum()),
        "target_sum": _numpy(target.sum(0)),
        "cosine_sum": _numpy(cosine.sum()),
    }


def _numpy(value: Tensor) -> NDArray[np.float64]:
    return np.atleast_1d(value.cpu().numpy())
