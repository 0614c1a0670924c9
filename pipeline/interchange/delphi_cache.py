"""delphi's cache of latents as a run: sparse features, read by token and by feature."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...stores.errors import SchemaError
from ...stores.grid import Unit
from ...stores.places import Place, place
from ...stores.schema import Schema, along_token, along_unit, unit_tokens_for
from ..progress import Progress, Quiet
from ..run import Outcome
from .delphi_files import CONFIG, THRESHOLD, Cache, Split, Survey, open_cache, survey_of
from .imported import (
    Imported,
    Origin,
    Pieces,
    as_token_ids,
    check_renamed,
    chosen,
    digests,
    folders_of,
    import_stores,
    labels_of,
    model_name,
    parse_point,
    read_tokenizer_text,
    token_unit,
    tokens_store,
)

if TYPE_CHECKING:
    import xarray as xr


def from_delphi(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str] | Place,
    *,
    hookpoints: Sequence[str] | None = None,
    transcode: bool = False,
    rename: Mapping[str, str] | None = None,
    model: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    skip_positions: int = 1,
    unit_tokens: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Writes a cache of latents that delphi made, the folder `latents` or the one it lies in, as a run in the folder
    `run`, or goes on with that. `open_run(run).features("layers.5.mlp")` then has what any other features have.

    The run holds the tokens, and features of each of `hookpoints` (all of them by default) under its own name. A cache
    does not say whether it is of what leaves a module or, of a transcoder, of what enters it: `transcode` is delphi's
    own setting. `rename` gives hookpoints whose hook point cannot be told, or is another one, its name here. `model` is
    the model's name where the cache has none; `tokenizer`, the path of a tokenizer.json, lets tokens be read as text.
    Statistics and index leave the first `skip_positions` tokens of every sequence out. Units are of `unit_tokens`
    tokens, a multiple of the sequences' length.

    Every file is read twice, after its sha256 was taken, and nothing is written before all are found to be as they
    should. Holds the features of one unit in memory, and 4 million rows of a file. Killed at any time, the same call
    goes on, to the same bytes. SchemaError names what is missing, overlaps or is out of range; FingerprintMismatch
    where `run` holds something else; DiskFull.
    """
    root, folder = Path(source), place(run)
    root = root / "latents" if (root / "latents").is_dir() else root
    names = chosen(hookpoints, folders_of(root), root)
    check_renamed(rename or {}, names, root)
    if skip_positions < 0:
        raise SchemaError(f"skip_positions = {skip_positions} must be at least 0")
    caches = [open_cache(root / name) for name in names]
    points = {cache.name: _points(cache.name, transcode, rename or {}) for cache in caches}
    n_sequence, context = caches[0].shape
    text = read_tokenizer_text(None if tokenizer is None else Path(tokenizer))
    said = caches[0].config.get("model_name")
    named = model_name(model, said, root / names[0] / CONFIG, "model_name")
    _check_models(caches, root)
    first = caches[0].splits[0]
    surveys = [survey_of(cache, first, _unit(cache, unit_tokens)) for cache in caches]
    paths = [path for cache in caches for path in (root / cache.name / CONFIG, *(one.path for one in cache.splits))]
    origin = Origin(
        format="delphi",
        source=root,
        config={cache.name: dict(cache.config) for cache in caches},
        model=named,
        files=digests(root, paths, folder),
        tokenizer=text,
    )
    labels = labels_of(n_sequence, context, [str(row) for row in range(n_sequence)])
    tokens = tokens_store(folder, origin, labels, context, token_unit(context, unit_tokens), _tokens(first))
    features = [
        Imported(
            folder=folder / f"features-{cache.name}",
            schema=_schema(cache, survey, labels),
            origin=origin,
            parameters={"hooks": list(points[cache.name]), "skip_positions": skip_positions},
            pieces=_features(cache, survey, skip_positions),
            about={"dictionaries": {cache.name: _about(cache, named, *points[cache.name])}}
            | {"skip_positions": skip_positions},
        )
        for cache, survey in zip(caches, surveys, strict=True)
    ]
    return import_stores([tokens, *features], folder, progress or Quiet())


def _points(name: str, transcode: bool, rename: Mapping[str, str]) -> tuple[str, str]:
    """The hook points that a hookpoint's dictionary reads and writes. SchemaError where they cannot be told."""
    from ...stages.dictionaries.formats.modules import hook_of_module

    if name in rename:
        point = str(parse_point(name, rename[name]))
        return point, point
    hook, hook_out = (hook_of_module(name, side) for side in ("in" if transcode else "out", "out"))
    if hook is None or hook_out is None:
        raise SchemaError(
            f"{name!r} is no module whose hook points are the same in all models. Say which one the dictionary reads, "
            f"as in rename={{{name!r}: 'blocks.3.hook_mlp_out'}}, --rename {name}=blocks.3.hook_mlp_out"
        )
    return hook, hook_out


def _check_models(caches: Sequence[Cache], root: Path) -> None:
    for cache in caches:
        mine, theirs = cache.config.get("model_name"), caches[0].config.get("model_name")
        if mine != theirs:
            raise SchemaError(
                f"{root}: {cache.name} is of the model {mine!r:.99}, {caches[0].name} of {theirs!r:.99}: import each "
                "into a run of its own"
            )


def _unit(cache: Cache, given: int | None) -> int:
    """Tokens in a unit: by default, as many as make a shard of about 64 MiB."""
    n_sequence, context = cache.shape
    a_token = max(64, -(-cache.n_row // (n_sequence * context)))
    return token_unit(context, given) if given is not None else unit_tokens_for(4 * a_token, context)


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tokens(split: Split) -> Pieces:
    def pieces(unit: Unit) -> Iterator[xr.DataTree]:
        import pandas as pd
        import xarray as xr

        found = split.rows("tokens", unit.start // split.context, unit.stop // split.context)
        columns = {"token_id": (("token",), as_token_ids(found, split.path))}
        yield xr.DataTree(xr.Dataset(columns, coords={"token": pd.RangeIndex(unit.start, unit.stop)}))

    return pieces


def _schema(cache: Cache, survey: Survey, labels: Mapping[str, Any]) -> Schema:
    """One group of ragged arrays, with room for what the fullest unit holds."""
    group, n_token, unit_tokens = cache.name, cache.shape[0] * cache.shape[1], survey.unit_tokens
    most = max(1, -(-int(np.diff(survey.edges.sum(axis=0)).max()) // min(unit_tokens, n_token)))
    return Schema(
        kind="features",
        n_token=n_token,
        unit_tokens=unit_tokens,
        arrays={
            f"{group}/count": along_token(("token",), {"token": n_token}, "int32", unit_tokens),
            f"{group}/feature": along_unit(n_token, "int32", unit_tokens, most),
            f"{group}/value": along_unit(n_token, cache.splits[0].dtype, unit_tokens, most),
        },
        labels=labels,
        compression="zstd",
    )


def _about(cache: Cache, model: str, hook: str, hook_out: str) -> dict[str, Any]:
    """What the header says of the dictionary. What the cache does not tell is left out."""
    return {
        "source": cache.name,
        "format": "delphi",
        "revision": None,
        "model": model,
        "hook": hook,
        "hook_out": hook_out,
        "n_feature": cache.n_feature,
        "threshold": THRESHOLD,
    }


def _features(cache: Cache, survey: Survey, skip_positions: int) -> Pieces:
    """The features of a unit's tokens: those of all files, ascending within a token."""

    def pieces(unit: Unit) -> Iterator[xr.DataTree]:
        import pandas as pd
        import xarray as xr

        edges = survey.edges[:, unit.index : unit.index + 2].tolist()
        parts = [(one, start, stop) for one, (start, stop) in zip(cache.splits, edges, strict=True)]
        where = [one.rows("locations", start, stop).astype(np.int64) for one, start, stop in parts]
        token = np.concatenate([found[:, 0] * cache.shape[1] + found[:, 1] for found in where])
        feature = np.concatenate([found[:, 2] + one.first for found, (one, *_) in zip(where, parts, strict=True)])
        value = np.concatenate([one.rows("activations", start, stop) for one, start, stop in parts])
        order = np.argsort(token, kind="stable")
        count = np.bincount(token - unit.start, minlength=len(unit)).astype(np.int32)
        counted = np.arange(unit.start, unit.stop) % cache.shape[1] >= skip_positions
        statistics = {"token_sum": np.array([counted.sum()]), "l0_sum": np.array([count[counted].sum()])}
        columns = {
            "count": (("token",), count),
            "feature": (("nonzero",), feature[order].astype(np.int32)),
            "value": (("nonzero",), value[order].astype(cache.splits[0].dtype)),
        }
        coords = {"token": pd.RangeIndex(unit.start, unit.stop)}
        node = xr.Dataset(columns, coords=coords, attrs={"statistics": statistics})
        yield xr.DataTree.from_dict({f"/{cache.name}": node})

    return pieces
