"""RWKV's own .pth files: a pickle that is never run, in both of torch's formats, and what in it is refused."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forebay.stages.models.errors import ModelError
from forebay.stages.models.load import load_model
from forebay.stages.models.source import open_checkpoint

from .rwkv_layouts import Tensors
from .rwkv_models import random_tensors

IDS = [[3, 1, 4, 1, 5]]


def saved(held: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(held, file, **how)
    return file.getvalue()


def as_zip(held: Any) -> bytes:
    return saved(held)


def as_before_1_6(held: Any) -> bytes:
    return saved(held, _use_new_zipfile_serialization=False)


FORMATS = [as_zip, as_before_1_6]


def opened(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    open_checkpoint(path)


@pytest.mark.parametrize("version", [6, 7])
def test_both_formats_of_torch_hold_the_same_model(version: int, tmp_path: Path) -> None:
    logits = []
    for write in FORMATS:
        path = tmp_path / f"{write.__name__}.pth"
        path.write_bytes(write(OrderedDict(random_tensors(version))))
        logits.append(load_model(path, device="cpu").forward(IDS).logits)
    assert logits[0].equal(logits[1])


# ── code ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Touches:
    """What a file that runs a command when it is unpickled holds."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class OfAnOwnClass:
    """Plain data, of a class that only an import would give."""

    n_layers = 3


@pytest.mark.parametrize("write", FORMATS)
def test_a_file_that_runs_a_command_is_refused_and_the_command_is_not_run(
    write: Callable[[Any], bytes], tmp_path: Path
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    held = random_tensors(7) | {"blocks.0.att.more": Touches(marker)}
    with pytest.raises(ModelError, match=r"names (posix|nt)\.system, which only running code .* nothing of it was run"):
        opened(path, write(held))
    assert not marker.exists()
    command, arguments = Touches(marker).__reduce__()
    command(*arguments)
    assert marker.exists()  # where it is run, it does what was looked for


def test_a_bare_pickle_is_not_run_either(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ModelError, match=r"names (posix|nt)\.system"):
        opened(tmp_path / "model.pth", pickle.dumps(Touches(marker), protocol=2))
    assert not marker.exists()


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize(
    ("held", "named"), [(OfAnOwnClass(), "OfAnOwnClass"), (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear")]
)
def test_objects_of_classes_are_refused_by_name(
    held: object, named: str, write: Callable[[Any], bytes], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        opened(tmp_path / "model.pth", write(random_tensors(7) | {"model": held}))
    assert "weights_only" not in str(caught.value)  # torch advises to run the code; this does not


# ── damage, and other contents ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("kept", [0, 1, 40, 3000, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(kept: float, write: Callable[[Any], bytes], tmp_path: Path) -> None:
    whole = write(random_tensors(6))
    end = kept if isinstance(kept, int) else int(kept * len(whole))
    with pytest.raises(ModelError, match=r"model\.pth (is no \.pth file, or it is damaged|names )"):
        opened(tmp_path / "model.pth", whole[:end])


@pytest.mark.parametrize("data", [b"RWKV", bytes(200), b"PK\x03\x04" + bytes(100), b'{"emb.weight": 1}'])
def test_a_file_of_another_kind_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no \.pth file"):
        opened(tmp_path / "model.pth", data)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(3)], "holds a list, not tensors by name"),
        ({"model": random_tensors(7)}, "holds 'model', of dict, besides tensors by name"),
        ({**random_tensors(7), "epoch": 3}, "holds 'epoch', of int"),
        ({7: torch.ones(3)}, "holds 7, of Tensor"),
    ],
    ids=["list", "nested", "epoch", "number"],
)
def test_anything_but_tensors_by_name_is_refused(held: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        opened(tmp_path / "model.pth", saved(held))


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def with_more(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


CONTENTS: list[tuple[int, Callable[[Tensors], Tensors], str]] = [
    (6, renamed("time_maa_", "time_mix_"), "is of version 4 or 5: RWKV-6 and RWKV-7 can be read"),
    (7, renamed("blocks.", "layers."), "has none of their tensors"),
    (
        7,
        with_more("blocks.1.ffn.s_emb.weight", 70, 36),
        r"holds blocks\.1\.ffn\.s_emb\.weight, which nothing here reads",
    ),
    (6, with_more("blocks.2.att.time_state", 3, 12, 12), r"holds blocks\.2\.att\.time_state, which nothing here reads"),
    (7, without("blocks.0.att.w1"), r"lacks tensors that give its sizes.*blocks\.0\.att\.w1"),
    (7, without("blocks.1.att.v1"), r"lacks blocks\.1\.att\.v1"),
    (7, without("blocks.2.att.g2"), r"lacks blocks\.2\.att\.g2"),
    (6, without("blocks.0.att.time_decay_w1"), r"lacks tensors that give its sizes.*time_decay_w1"),
    (6, without("blocks.1.att.time_maa_w1"), r"lacks blocks\.1\.att\.time_maa_w1"),
    (6, without("blocks.0.ln0.bias"), r"lacks blocks\.0\.ln0\.bias"),
    (6, without("emb.weight"), r"lacks tensors that give its sizes.*emb\.weight"),
    (7, renamed("blocks.2.", "blocks.9000000000."), r"lacks blocks\.2\."),
    (7, lambda tensors: tensors | {"blocks.2.att.a1": torch.ones(36, 7)}, r"blocks\.2\.att\.a1 of shape \(36, 7\)"),
    (7, lambda tensors: tensors | {"blocks.0.att.r_k": torch.ones(36)}, "lacks tensors that give its sizes, or they"),
    (7, lambda tensors: tensors | {"blocks.0.att.r_k": torch.ones(4, 12)}, r"of shape .* configuration makes it"),
    (6, lambda tensors: tensors | {"blocks.0.att.time_maa_w2": torch.ones(())}, "lacks tensors that give its sizes"),
]


@pytest.mark.parametrize(("version", "edit", "message"), CONTENTS, ids=[row[2] for row in CONTENTS])
def test_tensors_that_fit_no_model_are_refused(
    version: int, edit: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        opened(tmp_path / "model.pth", saved(edit(random_tensors(version))))
