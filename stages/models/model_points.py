"""The hook points of one model, by name: to look at in a notebook, and to complete names from."""

from collections.abc import Iterator

from .errors import HookError
from .html import html_table
from .points import HookPoint, expand, meaning_of
from .spec import ModelSpec


class ModelPoints:
    """The hook points that a model has, in firing order: `model.hooks`.

    `model.hooks["blocks.3.hook_resid_post"]` is the `HookPoint`, which captures and interventions take in place of its
    name; the names are completed by the tab key in a notebook. Iterating gives the names. Raises HookError, with the
    nearest name, for one that the model does not have, and for a pattern of several.
    """

    __slots__ = ("_points", "_spec")

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._points = {str(point): point for point in spec.points()}

    def __getitem__(self, name: str) -> HookPoint:
        if any(mark in name for mark in "*{["):
            raise HookError(f"{name!r} is a pattern; model.hooks takes one name. HookSpec().capture takes patterns")
        return expand([name], tuple(self._points.values()))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        return name in self._points

    def __repr__(self) -> str:
        return f"ModelPoints({len(self)} hook points of {self._spec.n_layers} layers)"

    def _repr_html_(self) -> str:
        kinds: dict[str, list[HookPoint]] = {}
        for point in self._points.values():
            kinds.setdefault(point.kind, []).append(point)
        rows = [(_span(points), ", ".join(points[0].dims), meaning_of(kind)) for kind, points in kinds.items()]
        return html_table("Hook points", {}, ("name", "dimensions", "value"), rows)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._points)


def _span(points: list[HookPoint]) -> str:
    """One name for the points of a kind, as a pattern where there are several."""
    layers = [point.layer for point in points if point.layer is not None]
    if len(layers) < 2:
        return str(points[0])
    whole = layers == list(range(layers[0], layers[-1] + 1))
    numbers = f"{layers[0]}-{layers[-1]}" if whole else ",".join(map(str, layers))
    return f"blocks.[{numbers}].{points[0].kind}"
