"""How far a run is, and where it comes from: ledgers and headers, no data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ...stores.ledger import read_json
from ...stores.places import Place
from ...stores.schema import DATA, Header, read_header
from ..report.status import StepStatus, status
from .values import number, table

_TOLD = ("name", "kind", "units", "units_done", "n_token", "tokens_done", "nbytes")


def overview(folder: Place) -> dict[str, Any]:
    """The steps of a run with progress and provenance, and its recipe.

    Machines and paths of records are left out, so that a page can be handed on. Raises what `status` and `read_header`
    raise.
    """
    steps = status(folder)
    headers = {step.name: read_header(folder / step.name / DATA) for step in steps}
    recipe = folder / "recipe.json"
    return {
        "complete": all(step.left == 0 for step in steps),
        "steps": [_step(step, headers[step.name]) for step in steps],
        "recipe": read_json(recipe).get("recipe") if recipe.exists() else None,
    }


def _step(step: StepStatus, header: Header) -> dict[str, Any]:
    said = asdict(step)
    determines = header.provenance.get("determines")
    determines = determines if isinstance(determines, dict) else {}
    rate, left = step.tokens_per_second, step.left
    return {
        **{name: said[name] for name in _TOLD},
        "tokens_per_second": None if rate is None else number(rate),
        "left": None if left is None else number(left),
        "failed": list(step.failed),
        "at_work": sum(worker.live for worker in step.workers),
        "failures": [{"unit": one.unit, "attempts": one.attempts, "error": one.error} for one in step.failures],
        "unreadable": len(step.unreadable),
        "fingerprint": header.fingerprint,
        "model": table(header.provenance.get("model")),
        "versions": table(header.provenance.get("versions")),
        "parameters": table(determines.get("parameters")),
        "files": _files(determines.get("files")),
        "arrays": [
            {"path": path, "dims": list(array.dims), "shape": list(array.shape), "dtype": array.dtype}
            for path, array in header.schema.arrays.items()
        ],
        "compression": header.schema.compression,
    }


def _files(said: object) -> dict[str, str]:
    """Names of files that determine a step's values, with their hashes."""
    pairs = [one for one in (said if isinstance(said, list) else ()) if isinstance(one, list) and len(one) == 2]
    return table({str(name): digest for name, digest in pairs})
