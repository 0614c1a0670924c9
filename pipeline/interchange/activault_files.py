"""activault's files of activations, in a folder of this machine, as a run: hook by hook, zipped by their uuid.

Facts from activault: `<hook>/metadata.json` and `<hook>/<uuid>--<n>_<job>.saved.pt`, a dict of `states` [B, T, d] and
`input_ids` [B, T]; the same uuid in every hook's folder holds the same sequences. `cfg.json` beside them names the
model. Special tokens were taken out before: a position counts what is left.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...stages.models.points import HookPoint, stored_dims
from ...stores.dtypes import format_of
from ...stores.errors import SchemaError
from ...stores.grid import Unit
from ...stores.places import Place, place
from ...stores.schema import SHARD_BYTES, Array, Schema, along_token, unit_tokens_for
from ...stores.tree import CAPTURED
from ..progress import Progress, Quiet
from ..run import Outcome
from .imported import (
    Imported,
    Origin,
    as_token_ids,
    check_renamed,
    chosen,
    digests,
    folders_of,
    import_stores,
    labels_of,
    model_name,
    parse_point,
    read_config,
    read_tokenizer_text,
    token_unit,
    tokens_store,
)

if TYPE_CHECKING:
    import torch
    import xarray as xr

CONFIG, METADATA = "cfg.json", "metadata.json"
DTYPES = {f"torch.{name}": name for name in ("bfloat16", "float16", "float32")}
"""What metadata.json says, and what it means."""
KINDS = {"mlp.pre": "mlp.hook_in", "mlp.post": "mlp.hook_out", "self_attn.post": "attn.hook_out"}
"""What enters and leaves modules, as it is in every family of models."""
UNCLEAR = {
    "self_attn.pre": "where a model calls its attention by keyword, as most do, activault has kept the residual stream "
    "that enters the block in its place",
    "hook_resid_post": "activault has cut the model off behind the highest layer that it was asked for, and the stream "
    "that leaves that one is kept after the final norm",
}
"""Names that do not say which hook point was kept, and why."""
_HOOK = re.compile(r"(?:models\.layers|blocks)\.(\d{1,6})\.(.+)")
_FILE = re.compile(r"(?P<uuid>.+)--(?P<n>\d{1,12})_(?P<job>[^/_]+)\.saved\.pt")


@dataclass(frozen=True)
class Hook:
    """The files of one hook, by uuid, with what its metadata.json says."""

    name: str
    point: HookPoint
    metadata: Mapping[str, Any]
    files: Mapping[str, Path]
    dtype: str
    context: int
    width: int

    def read(self, uuid: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`states` [B, T, d] and `input_ids` [B, T] of a file, mapped into memory. SchemaError where they are not what
        the metadata say.
        """
        import torch

        path = self.files[uuid]
        held = _load(path)
        states, ids = (held.get(key) if isinstance(held, dict) else None for key in ("states", "input_ids"))
        if not isinstance(states, torch.Tensor) or not isinstance(ids, torch.Tensor):
            raise SchemaError(f"{path} is no dict of the tensors states and input_ids")
        if str(states.dtype) != f"torch.{self.dtype}":
            raise SchemaError(f"{path}: states are {states.dtype}; {METADATA} says torch.{self.dtype}")
        due = (states.shape[0] if states.ndim else 0, self.context, self.width)
        if tuple(states.shape) != due or tuple(ids.shape) != due[:2] or ids.dtype not in (torch.int64, torch.int32):
            raise SchemaError(
                f"{path}: states are {list(states.shape)} and input_ids {list(ids.shape)}; by {METADATA} they are "
                f"[B, {self.context}, {self.width}] and [B, {self.context}] (sequence_length, d_in)"
            )
        return states, ids


@dataclass(frozen=True)
class Files:
    """The hooks of a run, in firing order, and in which order files are laid end to end: uuid → its sequences."""

    hooks: tuple[Hook, ...]
    rows: Mapping[str, int]

    @property
    def context(self) -> int:
        return self.hooks[0].context

    @property
    def kinds(self) -> dict[str, list[Hook]]:
        found: dict[str, list[Hook]] = {}
        for hook in self.hooks:
            found.setdefault(hook.point.kind, []).append(hook)
        return found

    @cached_property
    def ids(self) -> list[str]:
        """What each sequence is called: where it came from."""
        return [f"{uuid}:{row}" for uuid, n in self.rows.items() for row in range(n)]

    def parts(self, unit: Unit) -> Iterator[tuple[str, slice, int]]:
        """The sequences of a unit: file by file, which of its rows, and the first one's token."""
        begin = 0
        for uuid, n in self.rows.items():
            first, beyond = begin, begin + n * self.context
            start, stop = max(unit.start, first), min(unit.stop, beyond)
            if start < stop:
                yield uuid, slice((start - first) // self.context, (stop - first) // self.context), start
            begin = beyond


def from_activault(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str] | Place,
    *,
    hooks: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    model: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    unit_tokens: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Writes activations that activault has kept, one of its runs in a local folder, as a run in the folder `run`, or
    goes on with that. Values are the same bits, in the dtype in which they are.

    `hooks` are the names of folders, by default all. `models.layers.N.mlp.pre`, `.mlp.post` and `.self_attn.post`
    become `blocks.N.mlp.hook_in`, `.mlp.hook_out` and `.attn.hook_out`; any other name must be given a hook point with
    `rename`. `model` is the model's name where cfg.json has none; `tokenizer`, the path of a tokenizer.json, lets
    tokens be read as text. Units are of `unit_tokens` tokens, a multiple of the sequences' length.

    Files are laid end to end in the order of their job and number; they may differ in size. Every file is read twice,
    for its sha256 and its values. Files are mapped into memory, whatever their size; held are a unit (by default at
    most 256 MiB over all hooks, or one sequence) and 64 MiB. Killed at any time, the same call goes on, to the same
    bytes. SchemaError names what is missing or differs before anything is written, and tokens that differ and values
    that are not finite when their unit's turn comes; HookError; FingerprintMismatch where `run` holds something else;
    DiskFull.
    """
    root, folder = Path(source), place(run)
    names = chosen(hooks, folders_of(root), root)
    check_renamed(rename or {}, names, root)
    config = read_config(root / CONFIG, "activault's settings, and the model's name")
    found = sorted((_open(root / name, rename or {}) for name in names), key=lambda hook: hook.point)
    files = Files(tuple(found), _rows(found))
    schema = _schema(files, unit_tokens)
    told = config.get("transformer_config")
    said = told.get("model_name") if isinstance(told, dict) else None
    text = read_tokenizer_text(None if tokenizer is None else Path(tokenizer))
    named = model_name(model, said, root / CONFIG, "transformer_config.model_name")
    paths = [root / CONFIG, *(path for hook in found for path in (root / hook.name / METADATA, *hook.files.values()))]
    origin = Origin(
        format="activault",
        source=root,
        config={"cfg": config, "metadata": {hook.name: dict(hook.metadata) for hook in found}},
        model=named,
        files=digests(root, paths, folder),
        tokenizer=text,
    )

    def tokens(unit: Unit) -> Iterator[xr.DataTree]:
        return _tokens(files, unit)

    def captures(unit: Unit) -> Iterator[xr.DataTree]:
        return _captures(files, unit)

    unit = token_unit(files.context, unit_tokens)
    stores = [
        tokens_store(folder, origin, schema.labels, files.context, unit, tokens),
        Imported(
            folder=folder / CAPTURED,
            schema=schema,
            origin=origin,
            parameters={"hooks": {hook.name: str(hook.point) for hook in found}},
            pieces=captures,
        ),
    ]
    return import_stores(stores, folder, progress or Quiet())


# ── what a folder holds ──────────────────────────────────────────────────────────────────────────────────────────────


def _open(folder: Path, rename: Mapping[str, str]) -> Hook:
    """A hook by its name, its metadata and the names of its files. SchemaError."""
    point = _point(folder.name, rename)
    metadata = read_config(folder / METADATA, "the shape and the dtype of the activations")
    sizes = {key: metadata.get(key) for key in ("sequence_length", "d_in")}
    for key, size in sizes.items():
        if type(size) is not int or not 0 < size < 2**31:
            raise SchemaError(f"{folder / METADATA}: {key} is {size!r:.99}; a number from 1 on was expected")
    dtype = DTYPES.get(str(metadata.get("dtype")))
    if dtype is None:
        raise SchemaError(f"{folder / METADATA}: dtype is {metadata.get('dtype')!r:.99}; known are {', '.join(DTYPES)}")
    found: dict[str, tuple[tuple[int, str, int, str], Path]] = {}
    for path in sorted(folder.glob("*.saved.pt")):
        parts = _FILE.fullmatch(path.name)
        if parts is None:
            raise SchemaError(f"{path} is not named <uuid>--<n>_<job>.saved.pt, as activault's files are")
        uuid, job = parts["uuid"], parts["job"]
        if uuid in found:
            raise SchemaError(f"{path} and {found[uuid][1].name} have one uuid: they would be of the same sequences")
        found[uuid] = (len(job), job, int(parts["n"]), uuid), path
    ordered = {uuid: path for uuid, (_, path) in sorted(found.items(), key=lambda item: item[1])}
    return Hook(folder.name, point, metadata, ordered, dtype, metadata["sequence_length"], metadata["d_in"])


def _point(name: str, rename: Mapping[str, str]) -> HookPoint:
    """The hook point that a folder holds. SchemaError for a name that does not say."""
    if name in rename:
        return parse_point(name, rename[name])
    found = _HOOK.fullmatch(name)
    kind = found[2] if found else ""
    if found is not None and name.startswith("models.") and kind in KINDS:
        return HookPoint(KINDS[kind], int(found[1]))
    why = f": {UNCLEAR[kind]}" if kind in UNCLEAR else ""
    raise SchemaError(
        f"{name!r} does not say which hook point it holds{why}. Say it, as in rename={{{name!r}: "
        f"'blocks.3.hook_resid_pre'}}, --rename {name}=blocks.3.hook_resid_pre; or leave it out with hooks=, --hooks"
    )


def _rows(hooks: Sequence[Hook]) -> dict[str, int]:
    """How many sequences each file has, in order. SchemaError where the hooks do not go together."""
    first = hooks[0]
    for hook in hooks:
        if twice := [other for other in hooks if other is not hook and other.point == hook.point]:
            raise SchemaError(
                f"{hook.name} and {twice[0].name} would both be {hook.point}: rename one, or leave it out"
            )
        if hook.context != first.context:
            raise SchemaError(
                f"{hook.name} has sequences of {hook.context} tokens, {first.name} of {first.context}: they are of "
                "different runs"
            )
        if missing := sorted(first.files.keys() ^ hook.files.keys()):
            here, there = (hook, first) if missing[0] in first.files else (first, hook)
            raise SchemaError(
                f"{here.name} has no file {missing[0]}--….saved.pt, which {there.name} has: fetch it, or leave one of "
                "these hooks out"
            )
    found = {uuid: len(first.read(uuid)[1]) for uuid in first.files}
    for hook in hooks[1:]:
        for uuid, n in found.items():
            if len(hook.read(uuid)[1]) != n:
                raise SchemaError(f"{hook.files[uuid]} has not the {n} sequences of {first.files[uuid]}")
    if not sum(found.values()):
        raise SchemaError(f"{first.name} holds no sequence: there are no activations to import")
    return found


def _load(path: Path) -> Any:
    """What torch has saved, mapped where its format allows that. SchemaError for what is none, or names code."""
    from ...stages.models.pickles import load_pickled

    try:
        return load_pickled(path, mapped=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise SchemaError(f"{path} is damaged, or holds more than tensors; nothing in it was run") from error
    except Exception as error:  # torch's reader lets out whatever a damaged pickle makes happen in it
        raise SchemaError(f"{path} is no file of torch.save, or it is damaged or cut off: {error!r:.199}") from error


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _schema(files: Files, unit_tokens: int | None) -> Schema:
    """One group a kind of hook point, as a capture has it. SchemaError where hooks of one kind differ in dtype, or
    those of one dimension in width.
    """
    sizes, named = dict[str, int](), dict[str, str]()
    for hook in files.hooks:
        dim = hook.point.dims[2]
        if sizes.setdefault(dim, hook.width) != hook.width:
            raise SchemaError(
                f"{hook.name} is {hook.width} wide (d_in), {named[dim]} is {sizes[dim]}: both lie along {dim}. They "
                "are of different models, or one is not the hook point it is taken for"
            )
        named.setdefault(dim, hook.name)
    for kind, held in files.kinds.items():
        if len({hook.dtype for hook in held}) > 1:
            said = ", ".join(f"{hook.name} is {hook.dtype}" for hook in held)
            raise SchemaError(f"{said}: {kind} is kept as one dtype. Import them into runs of their own")
    widths = [hook.width * format_of(hook.dtype).itemsize for hook in files.hooks]
    n_sequence = sum(files.rows.values())
    sizes["token"] = n_sequence * files.context
    unit = token_unit(files.context, unit_tokens) if unit_tokens is not None else None
    unit = unit or unit_tokens_for(max(widths), files.context, token_bytes=sum(widths))
    arrays: dict[str, Array] = {}
    labels: dict[str, Any] = labels_of(n_sequence, files.context, files.ids)
    for kind, held in files.kinds.items():
        layers = [hook.point.layer for hook in held if hook.point.layer is not None]
        own = {**sizes, "layer": len(layers)}
        arrays[f"{kind}/value"] = along_token(stored_dims(kind), own, held[0].dtype, unit)
        if layers:
            labels[f"{kind}/layer"] = (("layer",), np.array(layers, dtype=np.int64))
    return Schema(kind=CAPTURED, n_token=sizes["token"], unit_tokens=unit, arrays=arrays, labels=labels)


def _tokens(files: Files, unit: Unit) -> Iterator[xr.DataTree]:
    import pandas as pd
    import xarray as xr

    hook = files.hooks[0]
    for uuid, rows, token in files.parts(unit):
        ids = as_token_ids(hook.read(uuid)[1][rows].numpy(), hook.files[uuid])
        coords = {"token": pd.RangeIndex(token, token + len(ids))}
        yield xr.DataTree(xr.Dataset({"token_id": (("token",), ids)}, coords=coords))


def _captures(files: Files, unit: Unit) -> Iterator[xr.DataTree]:
    """The values of a unit, a few sequences of a file and all layers of a kind at a time."""
    import pandas as pd
    import xarray as xr

    for uuid, rows, token in files.parts(unit):
        for kind, held in files.kinds.items():
            row_bytes = files.context * sum(hook.width * format_of(hook.dtype).itemsize for hook in held)
            at_once = max(1, SHARD_BYTES // row_bytes)
            for start in range(rows.start, rows.stop, at_once):
                some = slice(start, min(start + at_once, rows.stop))
                values, statistics = _values(files, held, uuid, some)
                first = token + (start - rows.start) * files.context
                coords = {"token": pd.RangeIndex(first, first + (some.stop - some.start) * files.context)}
                node = xr.Dataset({"value": (stored_dims(kind), values)}, coords, {"statistics": statistics})
                yield xr.DataTree.from_dict({f"/{kind}": node})


def _values(files: Files, held: Sequence[Hook], uuid: str, rows: slice) -> tuple[Any, dict[str, Any]]:
    """[layer, token, d] of some rows of the files of a uuid, in their kept form, and what is recorded of each layer.
    SchemaError for values that are not finite, and for tokens that are not those of the first hook.
    """
    import torch

    from ...stages.captured import STATISTICS, measured
    from ...stages.storing import as_numpy

    first = files.hooks[0]
    tokens = first.read(uuid)[1][rows]
    found, said = [], []
    for hook in held:
        states, ids = hook.read(uuid)
        if not torch.equal(ids[rows], tokens):
            raise SchemaError(
                f"{hook.files[uuid]} has other tokens than {first.files[uuid]}, in sequences {rows.start} to "
                f"{rows.stop - 1}: they are of different runs. Import each hook into a run of its own"
            )
        values = states[rows].reshape(-1, hook.width)
        finite = torch.isfinite(values).all(-1)
        if not bool(finite.all()):
            row, position = divmod(int((~finite).nonzero()[0]), files.context)
            raise SchemaError(
                f"{hook.files[uuid]}: states of sequence {rows.start + row} are NaN or infinite at position {position}"
                ". The model has overflowed: capture again in bfloat16, or leave this hook out"
            )
        found.append(values)
        said.append(measured(values, values).numpy())
    whole = as_numpy(torch.stack(found) if held[0].point.layer is not None else found[0].contiguous())
    return whole, {name: np.array([one[n] for one in said]) for n, name in enumerate(STATISTICS)}
