"""What a recipe's captures keep: no hook point twice, what training reads, and how one more is added to a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..stages.capture import Capture, stored_points
from ..stages.models.points import HookPoint
from ..stages.stage import Stage
from ..stages.train import Training
from ..stores.errors import SchemaError, nearest
from ..stores.fingerprint import differences
from ..stores.places import Place
from ..stores.schema import Schema, holds_store
from ..stores.store import Store

ADDED = ("parameters.hooks", "schema.arrays.", "schema.unit_tokens", "parameters.state_positions")
"""Beginnings of the names of what differs where a capture keeps other hook points, and nothing else is changed."""


def check_kept_once(stages: Sequence[Stage]) -> None:
    """SchemaError where two captures keep one hook point: nobody could say which of them to read."""
    kept: dict[HookPoint, str] = {}
    for capture in (stage for stage in stages if isinstance(stage, Capture)):
        for point in capture.captured:
            if point in kept:
                raise SchemaError(
                    f"[{kept[point]}] and [{capture.table}] both keep {point}: take it out of the hooks of one of them"
                )
            kept[point] = capture.table


def check_trainable(name: str, training: Training, stages: Sequence[Stage]) -> None:
    """SchemaError unless the recipe captures what a dictionary is trained on."""
    captures = [stage for stage in stages if isinstance(stage, Capture)]
    kept = [str(point) for capture in captures for point in capture.captured]
    for hook in (training.hook, training.hook_out):
        if hook is not None and str(HookPoint.parse(hook)) not in kept:
            raise SchemaError(
                f"train.{name} needs the activations of {hook}, which the recipe does not capture."
                f"{nearest(hook, kept)} Add it to capture.hooks, or, if activations stand already, to a table "
                "[capture.NAME] of its own"
            )


def addition(stage: Stage, schema: Schema, payload: Mapping[str, Any], standing: Store) -> str:
    """What to write instead of a capture that keeps more than the store that stands: a table of its own for what is
    added. Empty where something else differs, or nothing is added.
    """
    theirs = standing.header.provenance["determines"]
    changed = [line.partition(": ")[0] for line in differences(payload, theirs)]
    if not isinstance(stage, Capture) or not all(name.startswith(ADDED) for name in changed):
        return ""
    there = set(stored_points(standing.schema_with_labels))
    added = [point for point in stored_points(schema) if point not in there]
    if not added:
        return ""
    return (
        f"\nOr keep what stands, with [{stage.table}] hooks = {json.dumps(theirs['parameters']['hooks'])} as before, "
        f"and add a table\n  [capture.{_free(standing.path.parent.parent)}]\n  hooks = {json.dumps(added)}\n"
        "to the recipe: only those are computed"
    )


def _free(run: Place) -> str:
    """A name that no capture of a run has."""
    number = 2
    while holds_store(run / f"activations-added-{number}"):
        number += 1
    return f"added-{number}" if holds_store(run / "activations-added") else "added"
