"""Networks of AlgZoo are read by their tensors; what does not fit is refused by name, and no pickle is run."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from forebay.stages.algzoo.load import load_algzoo
from forebay.stages.algzoo.spec import TASKS, AlgZooSpec
from forebay.stages.models.errors import ModelError

from .networks import SECOND_ARGMAX_OF_TWO, TorchRNN, TorchTransformer, random_rnn, random_transformer


@pytest.mark.parametrize(
    ("task", "hidden", "n", "parameters"),
    [
        ("2nd_argmax", 2, 2, 10),
        ("2nd_argmax", 4, 3, 32),
        ("2nd_argmax", 16, 10, 432),
        ("median", 2, 5, 8),
        ("argmedian", 32, 11, 1408),
        ("longest_cycle", 4, 4, 176),
    ],
)
def test_networks_have_as_many_parameters_as_published(task: str, hidden: int, n: int, parameters: int) -> None:
    spec = AlgZooSpec.from_task(task, hidden, n)
    assert spec.n_params == parameters
    theirs = TorchTransformer(hidden, n, 2) if task == "longest_cycle" else TorchRNN(hidden, spec.n_output)
    assert spec.weight_shapes() == {name: tuple(weight.shape) for name, weight in theirs.state_dict().items()}


def test_a_spec_is_plain_frozen_data() -> None:
    spec = AlgZooSpec.from_task("median", 3, 7)
    assert (spec.architecture, spec.n_layers, spec.scalar, spec.n_output) == ("rnn", 1, True, 1)
    assert spec == AlgZooSpec.from_task("median", 3, 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2nd_argmin", 2, 2), "no task '2nd_argmin'.*Did you mean '2nd_argmax'"),
        (("median", 0, 2), "hidden = 0"),
        (("median", 2, 1), "n = 1 .* at least 2"),
        (("median", 2.0, 3), "hidden = 2.0"),
    ],
)
def test_sizes_that_no_network_has_are_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        AlgZooSpec.from_task(*arguments)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_a_file_is_read_as_the_tensors_it_was_written_from(task: str, suffix: str, tmp_path: Path) -> None:
    ours, theirs = random_transformer() if task == "longest_cycle" else random_rnn(task=task)
    weights = {name: weight.float() for name, weight in theirs.state_dict().items()}
    path = tmp_path / f"{task}_{ours.spec.hidden}_4_1073741824_3{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    found = load_algzoo(path)
    assert found.spec == ours.spec
    assert found.weights.keys() == weights.keys()
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)


def test_names_of_files_need_not_be_algzoos_where_the_task_is_given(tmp_path: Path) -> None:
    save_file(SECOND_ARGMAX_OF_TWO, tmp_path / "mine.safetensors")
    with pytest.raises(ModelError, match=r"task of .*mine.safetensors cannot be told.*2nd_argmax, argmedian"):
        load_algzoo(tmp_path / "mine.safetensors")
    assert load_algzoo(tmp_path / "mine.safetensors", task="argmedian").spec.task == "argmedian"


def test_weights_are_copies_in_the_dtype_asked_for() -> None:
    given = {name: weight.clone() for name, weight in SECOND_ARGMAX_OF_TWO.items()}
    network = load_algzoo(given, task="2nd_argmax", dtype="float64")
    given["linear.weight"].zero_()
    assert {weight.dtype for weight in network.weights.values()} == {torch.float64}
    assert network.weights["linear.weight"].tolist() == [[1, -1], [-1, 1]]
    with pytest.raises(ModelError, match=r"dtype = 'float63'.*float32, float64.*Did you mean 'float6?3?2?4?'"):
        load_algzoo(given, task="2nd_argmax", dtype="float63")


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    names = {"ih": "rnn.weight_ih_l0", "hh": "rnn.weight_hh_l0", "linear": "linear.weight", "bias": "linear.bias"}
    new = SECOND_ARGMAX_OF_TWO | {names[key]: value for key, value in changes.items()}
    return {name: value for name, value in new.items() if value is not None}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (changed(ih=None), "rnn.weight_ih_l0 is missing"),
        (changed(bias=torch.zeros(2)), "linear.bias is unknown"),
        (changed(hh=torch.zeros(3, 2)), r"rnn.weight_hh_l0 is \[3, 2\], expected \[2, 2\]"),
        (changed(linear=None), "no matrix 'linear.weight'"),
        (changed(ih=torch.full((2, 1), torch.nan)), "NaN or infinity in 'rnn.weight_ih_l0'"),
        (
            changed(ih=torch.ones(2, 1, dtype=torch.int64)),
            "'rnn.weight_ih_l0' .* no name of a tensor of floating-point",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(weights: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_algzoo(weights, task="2nd_argmax")


def test_tensors_without_names_are_refused() -> None:
    with pytest.raises(ModelError, match="3 in the tensors is no name of a tensor"):
        load_algzoo({3: torch.ones(2)}, task="2nd_argmax")  # type: ignore[dict-item]


def test_a_length_that_contradicts_the_tensors_is_refused() -> None:
    with pytest.raises(ModelError, match=r"sequences of 3: linear.weight is \[2, 2\], expected \[3, 2\]"):
        load_algzoo(SECOND_ARGMAX_OF_TWO, task="2nd_argmax", n=3)


def test_the_median_needs_to_be_told_its_length() -> None:
    _, theirs = random_rnn(task="median")
    with pytest.raises(ModelError, match="do not tell how long its sequences are: give n="):
        load_algzoo(theirs.state_dict(), task="median")
    assert load_algzoo(theirs.state_dict(), task="median", n=9).spec.n == 9


def test_the_number_of_layers_is_read_off_the_tensors() -> None:
    assert random_transformer(n_layers=3)[0].spec.n_layers == 3


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pth", "b.pkl"):
        torch.save({"linear.weight": Evil()}, tmp_path / name)
        with pytest.raises(ModelError, match=r"its pickle names (posix|nt).mkdir, of which nothing was run"):
            load_algzoo(tmp_path / name, task="median", n=3)
    Path("plain.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"plain.pkl cannot be read"):
        load_algzoo("plain.pkl", task="median", n=3)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*none.pth"):
        load_algzoo(tmp_path / "none.pth", task="median", n=3)
    for name in ("short.safetensors", "short.pth"):
        (tmp_path / name).write_bytes(b"\x10\0\0")
        with pytest.raises(ModelError, match="damaged"):
            load_algzoo(tmp_path / name, task="median", n=3)
    (tmp_path / "other.npz").write_bytes(b"")
    with pytest.raises(ModelError, match=r"\.safetensors, \.pth and \.pkl"):
        load_algzoo(tmp_path / "other.npz", task="median", n=3)
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="holds a list, not tensors by name"):
        load_algzoo(tmp_path / "list.pth", task="median", n=3)
