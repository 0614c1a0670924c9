"""What the commands that look print with --json: plain values under stable keys, nothing that JSON does not have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...stores.places import Place

if TYPE_CHECKING:
    import xarray as xr

    from ...stages.models.spec import ModelSpec
    from ..run import Outcome
    from .features import FeatureReport


def hooks_values(model: str, spec: ModelSpec, patterns: Sequence[str]) -> dict[str, Any]:
    """The hook points of a model, in the order of firing: `name` as recipes take it, `kind`, `layer` (None of a global
    one), and the `dims` and `shape` of one forward's capture, where None is a size that the prompt decides. HookError
    for a pattern that names none.
    """
    from ...stages.models.points import expand

    chosen = expand(patterns, spec.points()) if patterns else spec.points()
    points = [
        {
            "name": str(point),
            "kind": point.kind,
            "layer": point.layer,
            "dims": list(point.dims),
            "shape": [spec.sizes.get(dim) for dim in point.dims],
        }
        for point in chosen
    ]
    return {"model": model, "family": spec.family, "hook_points": points}


def outcome_values(outcome: Outcome) -> dict[str, Any]:
    """What a call has done: whether the run is `complete`, and of each step the tokens in all (`n_token`), computed now
    (`tokens`) and `left`, how many units have `failed`, bytes written and `seconds`.
    """
    steps = [
        {
            "name": step.name,
            "n_token": step.n_token,
            "tokens": step.tokens,
            "left": step.left,
            "failed": len(step.failed),
            "nbytes": step.nbytes,
            "seconds": _number(step.seconds),
        }
        for step in outcome.steps
    ]
    return {"run": str(outcome.folder), "complete": outcome.code == 0, "steps": steps}


def lens_values(run: Place, hook: str, lens: xr.Dataset, decode: Mapping[int, str]) -> dict[str, Any]:
    """A computed logit lens, token by token: `token`, `next_token` and each of the `layers` with its `top_token`, that
    one's `top_probability`, and the `next_rank` of the true next token. None for what is not known: the next token at a
    sequence's end, and everything of tokens that no unit has recorded. `layer` is None for a hook point without layers.
    """
    by_layer = lens if "layer" in lens.dims else lens.expand_dims("layer")
    layers = lens["layer"].values.tolist() if "layer" in lens.dims else [None]
    columns = {name: by_layer[name].transpose("token", ...).values for name in by_layer.data_vars}
    top, probability, rank = (columns[name] for name in ("top_token_id", "top_probability", "next_rank"))
    labels = {name: lens[name].values.tolist() for name in ("sequence", "position", "token_id", "next_token_id")}

    def layer_values(i: int, j: int) -> dict[str, Any]:
        known = int(top[i, j, 0]) >= 0
        return {
            "layer": layers[j],
            "top_token_id": int(top[i, j, 0]) if known else None,
            "top_token": decode[int(top[i, j, 0])] if known else None,
            "top_probability": _number(probability[i, j, 0]) if known else None,
            "next_rank": None if math.isnan(rank[i, j]) else int(rank[i, j]),
        }

    tokens = []
    for i, (sequence, position, token, following) in enumerate(zip(*labels.values(), strict=True)):
        values = {"sequence": sequence, "position": position, "token_id": token, "token": decode[token]}
        values |= {"next_token_id": following, "next_token": decode[following]} if following >= 0 else _NO_NEXT
        tokens.append({**values, "layers": [layer_values(i, j) for j in range(len(layers))]})
    return {"run": str(run), "hook": hook, "tokens": tokens}


_NO_NEXT: Mapping[str, Any] = {"next_token_id": None, "next_token": None}


def features_values(run: Place, report: FeatureReport) -> dict[str, Any]:
    """A dictionary's fit, counts of its features, and the strongest contexts of some: each with its `value`, the
    `token`'s number in the run, the `document` and `position` it has there, and the text before, at and after it.
    """
    fit, statistics, contexts = report.fit, report.statistics, report.contexts
    names = ("l0", "fvu", "cosine", "n_token", "n_fit")
    return {
        "run": str(run),
        "dictionary": report.name,
        "fit": {**{name: _number(fit[name]) for name in names}, "skip_positions": int(fit.attrs["skip_positions"])},
        "n_feature": int(statistics.sizes["feature"]),
        "n_dead": int(statistics["dead"].sum()),
        "n_dense": int(statistics["dense"].sum()),
        "features": [
            {
                "feature": feature,
                "firing_rate": _number(statistics["firing_rate"].sel(feature=feature)),
                "max": _number(statistics["max"].sel(feature=feature)),
                "contexts": _contexts(contexts.sel(feature=feature)),
            }
            for feature in contexts["feature"].values.tolist()
        ],
    }


def _contexts(found: xr.Dataset) -> list[dict[str, Any]]:
    rows = (found.isel(context=i) for i in range(found.sizes["context"]))
    return [
        {
            "value": _number(row["value"]),
            **{name: int(row[name]) for name in ("token", "document", "sequence", "position")},
            **{name: str(row[name].values) for name in ("text_before", "text", "text_after")},
        }
        for row in rows
        if int(row["token"]) >= 0
    ]


def _number(value: Any) -> float | int | None:
    """A number that JSON has: None for what is none, or not finite."""
    found = float(value)
    if not math.isfinite(found):
        return None
    return int(found) if getattr(value, "dtype", None) is not None and value.dtype.kind in "iu" else found
