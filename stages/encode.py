"""Activations into features: any number of dictionaries in one pass, over what was captured or behind the forward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ..stores.errors import SchemaError, nearest
from ..stores.grid import Unit
from ..stores.places import Place, place
from ..stores.schema import LABELS, Array, Schema, along_token, along_unit, unit_tokens_for
from .models.points import HookPoint
from .sequences import batches_of, sequences_span
from .stage import Apply, Stage, product_numerics
from .storing import Dtype
from .tokenize import ModelSource

if TYPE_CHECKING:
    import xarray as xr

    from .dictionaries.encoding import SiteEncoding
    from .dictionaries.sites import Site

TRAINED = "dictionaries"
"""Folder of a run with the dictionaries that were trained in it."""


@dataclass(frozen=True, kw_only=True)
class Encode(Stage):
    """Activations → sparse features, by the dictionary or dictionaries of `dictionary`: one source, as
    `load_dictionary` takes it, or names and sources. Without it, by the dictionary that [train.NAME] of the same name
    has trained in this run. `format`, `hook` and `hook_out` are handed to `load_dictionary`; of a set of transcoders
    `layers` chooses some.

    Reads the activations that [capture] has stored, or, `fused`, runs the model itself (in `model_dtype`, `batch`
    sequences at a time), so that dense activations never reach the disk. Encodes in `dtype`, keeps values in
    `store_dtype`. A 16-bit `dtype` rounds activations, weights and preactivations to it; their product is summed up,
    and compared with thresholds, in float32. Preactivations exist for memory / (3 · features · bytes of `dtype`) rows
    at a time; from block to block the number of rows may change the last bit of a value, so `memory` is part of the
    fingerprint.

    TopK features are kept as regular arrays, others as ragged rows with room for `most_active` features a token on
    average. How well the dictionary reconstructs is measured on every `fit_every`-th token (0: not at all); that, the
    statistics and the index leave the first `skip_positions` of every sequence out, whose activations are massive.
    """

    verb: ClassVar[str] = "encode"
    version: ClassVar[int] = 2
    told_elsewhere: ClassVar[frozenset[str]] = frozenset({"name", "model", "dictionary", "run", "threads"})

    name: str
    model: ModelSource
    run: str | None = None
    dictionary: str | dict[str, str] | None = None
    revision: str | None = None
    format: str | None = None
    hook: str | None = None
    hook_out: str | None = None
    layers: tuple[int, ...] | None = None
    fused: bool = False
    dtype: Dtype = "float32"
    store_dtype: Dtype = "float32"
    model_dtype: Dtype = "float32"
    batch: int = 8
    memory: int = 2**28
    most_active: int = 1024
    skip_positions: int = 1
    fit_every: int = 16
    unit_tokens: int | None = None
    threads: int | None = None
    compression: Literal["none", "zstd"] = "zstd"

    @property
    def store(self) -> str:
        return f"features-{self.name}"

    @property
    def source(self) -> str | None:
        return "tokenize" if self.fused else "capture"

    @property
    def trained(self) -> Place | None:
        """The folder of the dictionary that is trained in this run, where that is the one to encode with."""
        return place(self.run or ".") / TRAINED / self.name if self.dictionary is None else None

    @property
    def ready(self) -> bool:
        """Whether the dictionary is there: False before [train.NAME] has made it."""
        return self.trained is None or (self.trained / "cfg.json").exists()

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The dictionaries with the groups they fill, read once."""
        from .dictionaries.sites import open_sites

        return open_sites(
            self.name,
            str(self.trained) if self.dictionary is None else self.dictionary,
            layers=self.layers,
            revision=self.revision,
            format=self.format,
            hook=self.hook,
            hook_out=self.hook_out,
        )

    def check(self) -> None:
        least = {"batch": 1, "memory": 2**20, "most_active": 1, "skip_positions": 0, "fit_every": 0, "unit_tokens": 1}
        for name, lowest in {**least, "threads": 1}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise SchemaError(f"encode.{self.name}.{name} = {value} must be at least {lowest}")
        if isinstance(self.dictionary, dict) and (self.hook or self.hook_out):
            raise SchemaError(f"encode.{self.name}: hook and hook_out are for one dictionary; write a table for each")
        points = {str(point): point for point in self.model.open().spec.points()}
        sizes = self.model.open().spec.sizes
        for site in self.sites:
            point = points.get(site.hook)
            if point is None:
                raise SchemaError(
                    f"encode.{self.name}: {site.source} reads {site.hook!r}, which {self.model.source} does not have."
                    f"{nearest(site.hook, points)} Say where it reads with `hook`, or choose another dictionary"
                )
            _check_width(self.name, site, point, sizes)

    def read_from(self, held: Mapping[str, Schema]) -> tuple[str, ...]:
        """The captures that keep a hook point that a dictionary reads; all of them where one is not kept at all.

        What a dictionary predicts is compared where one of these has it: a capture that comes later changes nothing.
        """
        if self.fused:
            return tuple(held)
        hooks = {site.hook for site in self.sites}
        keep = {name: hooks.intersection(captured_points(schema)) for name, schema in held.items()}
        missing = hooks.difference(*keep.values())
        return tuple(name for name, kept in keep.items() if kept or missing)

    def schema(self, source: Schema) -> Schema:
        """One group a dictionary: `feature` and `value` [token, rank], or `count` [token] and, ragged, `feature` and
        `value` [unit, nonzero]. Refuses dictionaries whose hook points were not captured.
        """
        if not self.fused:
            for site in self.sites:
                self._check_captured(site, source)
        unit_tokens = self.unit_tokens or self._unit_tokens(source)
        arrays: dict[str, Array] = {}
        for site in self.sites:
            arrays |= self._arrays(site, source.n_token, unit_tokens)
        return Schema(
            kind="features",
            n_token=source.n_token,
            unit_tokens=unit_tokens,
            arrays=arrays,
            labels={name: source.labels[name] for name in LABELS},
            compression=self.compression,
        )

    def _unit_tokens(self, source: Schema) -> int:
        """As the activations are cut; behind the forward, tokens of which 64 features a token make a shard."""
        if not self.fused:
            return source.unit_tokens
        lengths = np.diff(source.labels["sequences/start"][1], append=source.n_token)
        return unit_tokens_for(64 * 4, int(lengths.max()))

    def _arrays(self, site: Site, n_token: int, unit_tokens: int) -> dict[str, Array]:
        if site.rank is not None:
            sizes, dims = {"token": n_token, "rank": site.rank}, ("token", "rank")
            return {
                f"{site.group}/feature": along_token(dims, sizes, "int32", unit_tokens),
                f"{site.group}/value": along_token(dims, sizes, self.store_dtype, unit_tokens),
            }
        most = min(self.most_active, site.n_feature)
        return {
            f"{site.group}/count": along_token(("token",), {"token": n_token}, "int32", unit_tokens),
            f"{site.group}/feature": along_unit(n_token, "int32", unit_tokens, most),
            f"{site.group}/value": along_unit(n_token, self.store_dtype, unit_tokens, most),
        }

    def _check_captured(self, site: Site, source: Schema) -> None:
        held = captured_points(source)
        if site.hook not in held:
            raise SchemaError(
                f"encode.{self.name}: {site.source} reads {site.hook}, which was not captured."
                f"{nearest(site.hook, held)} Add it to capture.hooks, or set encode.{self.name}.fused = true to encode "
                "behind the forward"
            )

    def files(self) -> tuple[Path, ...]:
        dictionaries = {path: None for site in self.sites for path in site.files}
        return (*dictionaries, *(self.model.open().files if self.fused else ()))

    def identity(self) -> dict[str, Any]:
        """Which dictionary fills which group from where; of one on the hub, of which not every file is here, by its
        commit. Behind the forward also how sequences are batched, which was otherwise once.
        """
        batched = {"batches": "by length"} if self.fused else {}
        return {"sites": [[site.group, site.hook, site.hook_out, site.revision] for site in self.sites], **batched}

    def numerics(self, device: str) -> dict[str, Any]:
        return product_numerics(device, self.threads)

    def about(self) -> dict[str, Any]:
        return {
            "model": self.model.about(),
            "dictionaries": {site.group: site.about() for site in self.sites},
            "skip_positions": self.skip_positions,
        }

    def span(self, unit: Unit, source: Schema, own: Schema) -> slice:
        """The unit's own tokens of stored activations; behind the forward, those of all sequences that touch it."""
        return sequences_span(unit, source) if self.fused else slice(unit.start, unit.stop)

    def load(self, device: str, own: Schema) -> Apply:
        """Loads the encoders, and the model where it is run. Pieces are those of one batch, or of one block."""
        import torch

        from .dictionaries.encoding import load_encodings

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        encodings = load_encodings(self, device)
        return self._behind_forward(encodings, device, own) if self.fused else self._over_stored(encodings, own)

    def _over_stored(self, encodings: tuple[SiteEncoding, ...], own: Schema) -> Apply:
        from .dictionaries.encoding import pieces_of, stored_pieces

        def apply(block: xr.Dataset, unit: Unit) -> Iterator[xr.DataTree]:
            for tokens, activations in stored_pieces(block, unit, encodings):
                yield from pieces_of(encodings, activations, tokens, own)

        return apply

    def _behind_forward(self, encodings: tuple[SiteEncoding, ...], device: str, own: Schema) -> Apply:
        import torch

        from .dictionaries.encoding import pieces_of
        from .models.load import load_model
        from .models.taps import HookSpec

        model = load_model(self.model.source, revision=self.model.revision, device=device, dtype=self.model_dtype)
        hooks = HookSpec().capture(*dict.fromkeys(name for encoding in encodings for name in encoding.reads))

        def apply(block: xr.Dataset, unit: Unit) -> Iterator[xr.DataTree]:
            for batch in batches_of(unit, own, self.batch):
                activations: dict[str, torch.Tensor] = {}

                def sink(point: HookPoint, tensor: torch.Tensor) -> None:
                    activations[str(point)] = batch.own_tokens(tensor)  # noqa: B023  called in this round

                model.forward(batch.token_ids(block), hooks, logits=False, sink=sink)
                yield from pieces_of(encodings, activations, batch.tokens, own)

        return apply


def captured_points(source: Schema) -> list[str]:
    """The hook points whose activations a schema of activations holds a token."""
    found = []
    for path, array in source.arrays.items():
        kind = path.rpartition("/")[0]
        if "token" not in array.dims:
            continue
        if "layer" in array.dims:
            found += [f"blocks.{layer}.{kind}" for layer in source.labels[f"{kind}/layer"][1]]
        else:
            found.append(kind)
    return found


def _check_width(name: str, site: Site, point: HookPoint, sizes: Mapping[str, int]) -> None:
    """SchemaError unless the point has a vector a token, as wide as the dictionary reads."""
    if point.dims[:2] != ("sequence", "position"):
        raise SchemaError(f"encode.{name}: {site.hook} [{', '.join(point.dims)}] has no vector a token to encode")
    widths = [sizes[dim] for dim in point.dims[2:]]
    if site.head is not None:
        if len(widths) != 2 or not 0 <= site.head < widths[0]:
            raise SchemaError(
                f"encode.{name}: {site.source} reads head {site.head} of {site.hook}, which has none such"
            )
        widths = widths[1:]
    width = math.prod(widths)
    if width != site.d_in:
        raise SchemaError(
            f"encode.{name}: {site.source} reads vectors of width {site.d_in}; {site.hook} of this model is {width} "
            "wide. It was made for another model, or for another hook point"
        )
