"""Reading AlgZoo's checkpoints: safetensors, or .pth and .pkl files, of which nothing but tensors is ever built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..models.devices import resolve_device
from ..models.errors import ModelError, nearest
from ..models.pickles import load_pickled
from .rnn import AlgZooRNN
from .spec import RNN, TASKS, AlgZooSpec
from .transformer import AlgZooTransformer

AlgZooNetwork = AlgZooRNN | AlgZooTransformer

DTYPES = {"float32": torch.float32, "float64": torch.float64}

_NAMED = re.compile(rf"(?P<task>{'|'.join(TASKS)})_(?P<hidden>\d+)_(?P<n>\d+)(_|$)")


def load_algzoo(
    source: str | Path | Mapping[str, Tensor],
    *,
    task: str | None = None,
    n: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> AlgZooNetwork:
    """Load a network of AlgZoo: a `.safetensors`, `.pth` or `.pkl` file, or tensors by name in memory.

    `task` (2nd_argmax, argmedian, median or longest_cycle) may be left out where the file is named as AlgZoo names its
    files, `{task}_{hidden}_{n}_….pth`. So may `n`, the length of the sequences, and wherever the tensors tell it, which
    is for every task but the median. Other sizes are read off the tensors' shapes. `dtype`: float32 or float64.

    Raises ModelError for a file that is missing, damaged or of another kind, whose pickle names anything but tensors
    (which is not built), for tensors that are missing, unknown or of another shape than the others ask for, by name,
    and where task or length cannot be told.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype = {dtype!r}: one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    where = "the tensors" if isinstance(source, Mapping) else str(source)
    named = None if isinstance(source, Mapping) else _NAMED.match(Path(source).stem)
    tensors = _checked(source if isinstance(source, Mapping) else _read(Path(source)), where)
    if task is None and named is None:
        raise ModelError(f"the task of {where} cannot be told from its name: give task=, one of {', '.join(TASKS)}")
    spec = _spec(tensors, task or str(named and named["task"]), n or (int(named["n"]) if named else None), where)
    on = resolve_device(device)
    held = {name: tensor.detach().to(device=on, dtype=DTYPES[dtype]).clone() for name, tensor in tensors.items()}
    return _rnn(spec, held) if spec.architecture == RNN else _transformer(spec, held)


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise ModelError(f"{path} is damaged: {error}") from error
    if path.suffix not in (".pth", ".pkl"):
        raise ModelError(f"{path} is no checkpoint of AlgZoo: .safetensors, .pth and .pkl files are read")
    try:
        held = load_pickled(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's reader lets out whatever a damaged pickle makes happen in it
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"its pickle names {found[1]}, of which nothing was run" if found else "it is damaged or cut off"
        raise ModelError(f"{path} cannot be read as tensors by name: {reason}") from error
    if not isinstance(held, dict):
        raise ModelError(f"{path} holds a {type(held).__name__}, not tensors by name")
    return held


def _checked(tensors: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ModelError(f"{name!r} in {where} is no name of a tensor of floating-point numbers")
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"there is NaN or infinity in {name!r} of {where}")
    return tensors


def _spec(tensors: Mapping[str, Tensor], task: str, n: int | None, where: str) -> AlgZooSpec:
    """The spec that the shapes tell; every tensor is compared with what it asks for."""
    if task not in TASKS:
        raise ModelError(f"AlgZoo has no task {task!r}; it has {', '.join(TASKS)}.{nearest(task, TASKS)}")
    recurrent = TASKS[task].architecture == RNN
    telling = "linear.weight" if recurrent else "unembed.weight"
    if telling not in tensors or tensors[telling].dim() != 2:
        held = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ModelError(f"{where} has no matrix {telling!r}, which a network for {task} reads; it has {held}")
    n_output, hidden = tensors[telling].shape
    length = n if TASKS[task].scalar else n or n_output
    if length is None:
        raise ModelError(f"the tensors of a network for {task} do not tell how long its sequences are: give n=")
    layers = len({name.split(".")[1] for name in tensors if re.match(r"attns\.\d+\.", name)})
    spec = AlgZooSpec.from_task(task, hidden, length, n_layers=None if recurrent else max(layers, 1))
    _compare(tensors, spec, where)
    return spec


def _compare(tensors: Mapping[str, Tensor], spec: AlgZooSpec, where: str) -> None:
    shapes = spec.weight_shapes()
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is unknown{nearest(name, shapes).rstrip()}" for name in tensors if name not in shapes]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        about = f"{spec.task} with {spec.hidden} neurons and sequences of {spec.n}"
        raise ModelError(f"{where} is no network for {about}: {'; '.join(wrong)}")


def _rnn(spec: AlgZooSpec, held: Mapping[str, Tensor]) -> AlgZooRNN:
    W_ih = held["rnn.weight_ih_l0"][:, 0]
    return AlgZooRNN(spec=spec, W_ih=W_ih, W_hh=held["rnn.weight_hh_l0"], W_oh=held["linear.weight"])


def _transformer(spec: AlgZooSpec, held: Mapping[str, Tensor]) -> AlgZooTransformer:
    layers = range(spec.n_layers)
    return AlgZooTransformer(
        spec=spec,
        W_E=held["embed.weight"],
        W_pos=held["pos_embed.weight"],
        W_in=torch.stack([held[f"attns.{layer}.in_proj_weight"] for layer in layers]),
        W_O=torch.stack([held[f"attns.{layer}.out_proj.weight"] for layer in layers]),
        W_U=held["unembed.weight"],
    )
