"""What a network of AlgZoo is: its task and sizes, its tensors, the points where it can be read and changed.

AlgZoo (Jacob Hilton, "AlgZoo: uninterpreted models with fewer than 1,500 parameters", Alignment Research Center, 2026)
is a collection of networks of 8 to 1,408 parameters, each trained on one of four tasks: recurrent ones of one layer on
the first three, transformers without MLPs and norms on the last.

Hook names are TransformerLens' where it has the tensor (`blocks.1.attn.hook_pattern`), and spelt in its manner where it
has not: `rnn.hook_pre.3`, the pre-activations at the fourth time step. candle-mi's names of the same tensors are
understood: `rnn.hook_pre_activation.3` for `rnn.hook_pre.3`, `rnn.hook_final_state` for the last `rnn.hook_hidden.…`,
`rnn.hook_output` for `hook_output`, and `attn.hook_scores`, for nothing is masked here, for `attn.hook_attn_scores`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..models.addressing import Site
from ..models.errors import HookError, ModelError, nearest
from ..models.interventions import Add, Apply, NamedIntervention, Replace, Scale, Zero
from ..models.points import HookPoint
from ..models.taps import HookSpec, Request, Tap

RNN, TRANSFORMER = "rnn", "transformer"


@dataclass(frozen=True, slots=True)
class Task:
    """The kind of network that AlgZoo trains on a task, and whether its output is one number (else: one a class)."""

    architecture: str
    scalar: bool = False


TASKS: Mapping[str, Task] = {
    "2nd_argmax": Task(RNN),
    "argmedian": Task(RNN),
    "median": Task(RNN, scalar=True),
    "longest_cycle": Task(TRANSFORMER),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgZooSpec:
    """Task and sizes: `hidden` neurons, or the width of the residual stream; sequences of `n` inputs.

    Made by `from_task`.
    """

    task: str
    hidden: int
    n: int
    n_layers: int

    @classmethod
    def from_task(cls, task: str, hidden: int, n: int, *, n_layers: int | None = None) -> AlgZooSpec:
        """The network that AlgZoo trains on `task`: 2nd_argmax, argmedian, median or longest_cycle.

        A recurrent network has one layer, a transformer two unless `n_layers` says otherwise. Raises ModelError for an
        unknown task, and for sizes that no such network has.
        """
        if task not in TASKS:
            raise ModelError(f"AlgZoo has no task {task!r}; it has {', '.join(TASKS)}.{nearest(task, TASKS)}")
        layers = (1 if TASKS[task].architecture == RNN else 2) if n_layers is None else n_layers
        for name, size, least in (("hidden", hidden, 1), ("n", n, 2), ("n_layers", layers, 1)):
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                raise ModelError(f"{name} = {size!r} of a network for {task}: a whole number of at least {least}")
        if TASKS[task].architecture == RNN and layers != 1:
            raise ModelError(f"n_layers = {layers}, but a network for {task} is recurrent and has one layer")
        return cls(task=task, hidden=hidden, n=n, n_layers=layers)

    @property
    def architecture(self) -> str:
        """`rnn` or `transformer`."""
        return TASKS[self.task].architecture

    @property
    def scalar(self) -> bool:
        """Whether the output is one number; else it is one a class, of which the largest is the prediction."""
        return TASKS[self.task].scalar

    @property
    def n_output(self) -> int:
        """How many numbers the output has: a class for each position (2nd_argmax, argmedian) or length (longest_cycle),
        or one number (median)."""
        return 1 if self.scalar else self.n

    @property
    def n_params(self) -> int:
        """How many numbers the tensors hold."""
        return sum(int(np.prod(shape)) for shape in self.weight_shapes().values())

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its name in AlgZoo's checkpoints."""
        h, n = self.hidden, self.n
        if self.architecture == RNN:
            return {"rnn.weight_ih_l0": (h, 1), "rnn.weight_hh_l0": (h, h), "linear.weight": (self.n_output, h)}
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (n, h), "pos_embed.weight": (n, h)}
        for layer in range(self.n_layers):
            shapes[f"attns.{layer}.in_proj_weight"] = (3 * h, h)
            shapes[f"attns.{layer}.out_proj.weight"] = (h, h)
        return shapes | {"unembed.weight": (self.n_output, h)}

    def points(self) -> tuple[AlgZooPoint, ...]:
        """Where the network can be read and changed, in the order of firing."""
        if self.architecture == RNN:
            steps = [AlgZooPoint(kind, time) for time in range(self.n) for kind in _STEP]
            return (*steps, AlgZooPoint("hook_output"))
        blocks = [AlgZooPoint(kind, layer) for layer in range(self.n_layers) for kind in _BLOCK]
        return (AlgZooPoint("hook_embed"), AlgZooPoint("hook_pos_embed"), *blocks, AlgZooPoint("hook_output"))

    def sizes(self, n_input: int) -> dict[str, int]:
        """Sizes by dimension of what `n_input` inputs make."""
        widths = dict.fromkeys(("neuron", "d_model", "d_head"), self.hidden)
        along = dict.fromkeys(("time", "position", "query", "key"), self.n)
        return {"input": n_input, "head": 1, "output": self.n_output, **widths, **along}


_STREAM = ("input", "position", "d_model")
_BY_HEAD = ("input", "position", "head", "d_head")
_EDGES = ("input", "head", "query", "key")

_STEP: Mapping[str, tuple[str, ...]] = {"rnn.hook_pre": ("input", "neuron"), "rnn.hook_hidden": ("input", "neuron")}
_BLOCK: Mapping[str, tuple[str, ...]] = {
    "hook_resid_pre": _STREAM,
    "attn.hook_q": _BY_HEAD,
    "attn.hook_k": _BY_HEAD,
    "attn.hook_v": _BY_HEAD,
    "attn.hook_attn_scores": _EDGES,
    "attn.hook_pattern": _EDGES,
    "attn.hook_z": _BY_HEAD,
    "hook_attn_out": _STREAM,
    "hook_resid_post": _STREAM,
}
_GLOBAL: Mapping[str, tuple[str, ...]] = {
    "hook_embed": _STREAM,
    "hook_pos_embed": _STREAM,
    "hook_output": ("input", "output"),
}
_DIMS: Mapping[str, tuple[str, ...]] = {**_STEP, **_BLOCK, **_GLOBAL}


@dataclass(frozen=True, slots=True)
class AlgZooPoint(HookPoint):
    """A place in a network of AlgZoo. `layer` is the block's number or, of a recurrent network, the time step."""

    def __post_init__(self) -> None:
        if self.kind not in _DIMS:
            raise HookError(f"no kind of hook point of AlgZoo is called {self.kind!r}.{nearest(self.kind, _DIMS)}")

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        return f"{self.kind}.{self.layer}" if self.kind in _STEP else f"blocks.{self.layer}.{self.kind}"

    @property
    def dims(self) -> tuple[str, ...]:
        """Dimension names of a capture here."""
        return _DIMS[self.kind]

    @property
    def _rank(self) -> tuple[float, int]:
        outside = float("inf") if self.kind == "hook_output" else -1.0
        return (outside if self.layer is None else self.layer, list(_DIMS).index(self.kind))


class _OpenSite(Site):
    """A site in a network whose attention hides nothing."""

    __slots__ = ()

    def hidden(self, device: torch.device) -> Tensor:
        return torch.zeros((), dtype=torch.bool, device=device)


Taps = Mapping[str, Tap]
"""The taps of one forward by the names of their points."""


def resolve(hooks: HookSpec, spec: AlgZooSpec, n_input: int, record: Callable[[HookPoint, Tensor], None]) -> Taps:
    """Check a `HookSpec` against a network and `n_input` inputs, and make the taps of one forward.

    Patterns are names, with `*` for any run of characters, `{a,b}` for either and `[0-2,5]` for numbers. Interventions
    are Replace, Add, Scale, Zero and Apply, whose `.at(input=…, neuron=…)` addresses the dimensions of the point, or
    functions of the value and the point. Raises HookError for whatever does not fit.
    """
    points = {str(point): point for point in spec.points()}
    wanted: dict[str, Request] = {}
    for capture in hooks.captures:
        if capture.positions is not None:
            raise HookError("positions=… is for the states of RWKV: here every time step is a hook point of its own")
        for name in _expand(capture.patterns, spec, points):
            request = wanted.setdefault(name, Request())
            request.before |= capture.before
            request.after |= not capture.before
            if request.before and request.after:
                raise HookError(f"{name} is captured with before=True and without it; one forward keeps one of the two")
    for change in hooks.changes:
        for name in _expand((change.pattern,), spec, points):
            request, point = wanted.setdefault(name, Request()), points[name]
            sizes = {dim: spec.sizes(n_input)[dim] for dim in point.dims}
            site = _OpenSite(point=point, sizes=sizes, lengths=(spec.n,), window=None, shared=1)
            request.functions += (_bound(change.function, site),)
    return {name: Tap(points[name], wanted[name], record, last=False) for name in wanted}


def touched(taps: Taps, name: str, value: Tensor) -> Tensor:
    """What flows on at a point: the value, recorded and changed as it was asked for."""
    return taps[name](value) if name in taps else value


def _bound(change: object, site: Site) -> Callable[[Tensor, HookPoint], Tensor]:
    if isinstance(change, Replace | Add | Scale | Zero | Apply):
        try:
            return change.bind(site)
        except HookError as error:
            raise HookError(f"{type(change).__name__} at {site.point}: {error}") from error
    if isinstance(change, type | NamedIntervention) or not callable(change):
        raise HookError(
            f"the intervention at {site.point} is {change!r}; a network of AlgZoo takes Replace(…), Add(…), Scale(…), "
            f"Zero(), Apply(…), or a function of the value and the point"
        )
    return change


def _expand(
    patterns: Iterable[str | HookPoint], spec: AlgZooSpec, points: Mapping[str, AlgZooPoint]
) -> dict[str, None]:
    chosen: dict[str, None] = {}
    for pattern in patterns:
        for text in _alternatives(str(pattern)):
            name = _own_name(text, spec)
            shape = re.compile(".*".join(re.escape(piece) for piece in name.split("*")))
            found = [known for known in points if shape.fullmatch(known)]
            if not found:
                kinds = dict.fromkeys(re.sub(r"\.\d+", ".*", known) for known in points)
                raise HookError(
                    f"this network has no hook point {text!r}; it has {', '.join(kinds)}, {spec.n} time steps and "
                    f"{spec.n_layers} layer{'s' if spec.n_layers > 1 else ''}, counted from 0.{nearest(name, points)}"
                )
            chosen |= dict.fromkeys(found)
    return chosen


def _own_name(name: str, spec: AlgZooSpec) -> str:
    """The name used here for one of candle-mi's."""
    last = f"rnn.hook_hidden.{spec.n - 1}"
    whole = {"rnn.hook_final_state": last, "rnn.hook_output": "hook_output"}
    name = whole.get(name, name).replace("rnn.hook_pre_activation.", "rnn.hook_pre.")
    return re.sub(r"attn\.hook_scores$", "attn.hook_attn_scores", name)


def _alternatives(pattern: str) -> list[str]:
    """The names that the braces and brackets of a pattern stand for."""
    found = re.search(r"\{([^{}]*)\}|\[([^\[\]]*)\]", pattern)
    if found is None:
        return [pattern]
    options = found[1].split(",") if found[1] is not None else _numbers(found[2], pattern)
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for option in options for name in _alternatives(before + option.strip() + after)]


def _numbers(text: str, pattern: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise HookError(f"[{text}] in {pattern!r} is no list of whole numbers such as [3-5] or [0,4,8-11]")
        numbers += map(str, range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return numbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlgZooForward:
    """What one forward gives: `output` [input, output] and the captures by hook point, in the order of firing."""

    spec: AlgZooSpec
    output: Tensor
    captures: Mapping[HookPoint, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """One capture; its dimensions are those of its point. Raises HookError for one that was not captured."""
        held = {str(point): value for point, value in self.captures.items()}
        if (own := _own_name(name, self.spec)) not in held:
            raise HookError(f"{name!r} was not captured; captured: {', '.join(held) or 'nothing'}.{nearest(own, held)}")
        return held[own]

    def to_dataset(self) -> xr.Dataset:
        """Captures and output as an `xarray.Dataset` in memory, one variable a kind of point, named after it.

        `rnn.hook_pre` and `rnn.hook_hidden` are [input, time, neuron], what lies in blocks has a leading dimension
        `layer`, and `hook_output` is [input, output]. The coordinates `time` and `layer` hold the steps and layers
        captured (NaN where another kind has one more).
        """
        kinds: dict[str, dict[int | None, Tensor]] = {"hook_output": {None: self.output}}
        for point, value in self.captures.items():
            kinds.setdefault(point.kind, {})[point.layer] = value
        arrays = [self._labelled(kind, by_index) for kind, by_index in kinds.items()]
        return xr.merge(arrays, join="outer", compat="no_conflicts")

    def _labelled(self, kind: str, by_index: Mapping[int | None, Tensor]) -> xr.DataArray:
        dims, values = _DIMS[kind], [value.detach().cpu() for value in by_index.values()]
        sizes = dict(zip(dims, values[0].shape, strict=True))
        coords: dict[str, object] = {dim: np.arange(size) for dim, size in sizes.items()}
        if kind in _GLOBAL:
            return xr.DataArray(values[0].numpy(), dims=dims, coords=coords, name=kind)
        along, axis = ("time", 1) if kind in _STEP else ("layer", 0)
        coords[along] = list(by_index)
        dims = (*dims[:axis], along, *dims[axis:])
        return xr.DataArray(torch.stack(values, axis).numpy(), dims=dims, coords=coords, name=kind)
