"""Training sparse autoencoders and transcoders on stored activations; resumable at any step."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor

from ...stores.fingerprint import differences
from ...stores.ledger import read_json, write_atomic
from ...stores.object_paths import ObjectPath
from ...stores.places import Place, place
from ..models.devices import resolve_device
from ..models.points import HookPoint
from ..train import Training
from .activation import Activation
from .dictionary import Dictionary, Provenance
from .errors import DictionaryError
from .objective import Coded, Settings
from .save import save_dictionary
from .training_state import State, advance, begin, load_state, rows_of, save_state

if TYPE_CHECKING:
    from ...stores.batches import Batches

SAMPLE = 16_384
"""Tokens from which the scale of the activations, their geometric median and the first thresholds are taken."""
CHECKPOINT, METRICS, SETTINGS, EVALUATION = (
    "checkpoint.safetensors",
    "metrics.jsonl",
    "training.json",
    "evaluation.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """How a training stands after `step` of `n_step` batches, `tokens` tokens.

    Of the last batch: its `loss`; `fvu`, squared errors over squared distances to the batch's mean; `l0`, features that
    fired a token. `dead` is the share of features that have not fired for `dead_after` tokens; `tokens_per_second`
    those since the last record.
    """

    step: int
    n_step: int
    tokens: int
    loss: float
    fvu: float
    l0: float
    dead: float
    learning_rate: float
    tokens_per_second: float


class Stopped(Exception):
    """Training was asked to stop before its end; a checkpoint stands, and the same call goes on from it."""


def train(
    training: Training,
    source: "str | Place | Batches",
    folder: "str | Place",
    *,
    device: str = "auto",
    progress: Callable[[Metrics], None] = lambda metrics: None,
    stop: Callable[[], bool] = lambda: False,
) -> Dictionary:
    """Train a dictionary on the activations of a run's folder, or on `Batches`, and give it, on the CPU.

    Puts into `folder` the dictionary, as SAELens does (a TopK transcoder as sparsify does), which `load_dictionary`
    reads; metrics.jsonl, a line of `Metrics` a record, which `progress` hears too; evaluation.json, if documents are
    held out (`evaluate`); checkpoint.safetensors and training.json. Where these are from an earlier call with the same
    settings, training goes on from the checkpoint, bit for bit as if it had never ended; `stop` is asked before each
    step. `Batches` are read as they are, but for `epochs` and `drop_last`.

    Raises Stopped; DictionaryError for settings that make no training, or are not those of the folder, and for a loss
    that is not finite; HookError and what `Batches` raises for what the run does not hold.
    """
    training.check()
    batches, held_out = _split(_batches(training, source), training)
    how, n_step = _settings(training, batches), training.steps(batches.n_batch)
    folder, on = Path(place(folder)), resolve_device(device)
    _remember(folder, training, batches)
    state = _state(training, batches, how, folder / CHECKPOINT, on)
    rows = iter(replace(batches, start=batches.start + state.step))
    with _opened(folder / METRICS, state.step) as log:
        since, before = time.perf_counter(), state.step
        while state.step < n_step:
            if stop():
                _checkpoint(folder, state, log)
                raise Stopped(f"training stopped after {state.step:,} of {n_step:,} steps; {folder} has a checkpoint")
            x, y = rows_of(next(rows), on)
            x, y = x * state.scales[0], y * state.scales[1]
            rate = training.rate(state.step, n_step)
            coded = advance(state, x, y, rate, training.dead_after, how)
            if state.step % training.log_every == 0 or state.step == n_step:
                speed = (state.step - before) * len(x) / (time.perf_counter() - since)
                metrics = _measured(state, coded, y, training.dead_after, rate, n_step, speed)
                log.write(json.dumps(asdict(metrics)) + "\n")
                progress(metrics)
                since, before = time.perf_counter(), state.step
            if state.step % training.checkpoint_every == 0 or state.step == n_step:
                _checkpoint(folder, state, log)
    return _finish(folder, state, training, batches, held_out)


def _batches(training: Training, source: "str | Place | Batches") -> "Batches":
    names = tuple(str(HookPoint.parse(hook)) for hook in (training.hook, training.hook_out) if hook is not None)
    if isinstance(source, str | Path | ObjectPath):
        from ...stores.batches import Batches

        return Batches(
            run=source,
            hooks=names,
            batch=training.batch,
            seed=training.seed,
            skip_positions=training.skip_positions,
            buffer_tokens=training.buffer_tokens,
            epochs=None,
            drop_last=True,
            dtype="stored",
        )
    for name, ours in (("names", names), ("batch", training.batch), ("skip_positions", training.skip_positions)):
        if (its := getattr(source, name)) != ours:
            raise DictionaryError(f"the batches' {name} are {its}, the training's {ours}")
    return replace(source, epochs=None, drop_last=True)


def _split(batches: "Batches", training: Training) -> "tuple[Batches, Batches | None]":
    """The batches without the documents that are held out, and those of these, in order."""
    if not training.validation:
        return batches, None
    chosen = np.arange(batches.n_document)[slice(None) if batches.documents is None else batches.documents]
    order = np.argsort(np.random.PCG64(training.seed).random_raw(len(chosen)))
    n_held = max(1, round(training.validation * len(chosen)))
    if n_held == len(chosen):
        raise DictionaryError(f"validation = {training.validation} of {len(chosen)} documents leaves none to train on")
    held, kept = np.sort(chosen[order[:n_held]]), np.sort(chosen[order[n_held:]])
    last = replace(batches, documents=held.tolist(), epochs=1, drop_last=False, shuffle=False, start=0)
    return replace(batches, documents=kept.tolist()), last


def _remember(folder: Path, training: Training, batches: "Batches") -> None:
    """Writes what determines the result, or refuses a folder in which something else stands."""
    free = ("log_every", "checkpoint_every")
    said = {"training": {k: v for k, v in asdict(training).items() if k not in free}, "source": batches.about()}
    path = folder / SETTINGS
    if (folder / CHECKPOINT).exists() or (folder / "cfg.json").exists():
        lines = differences(said, read_json(path)) if path.exists() else ["it says none"]
        if lines:
            raise DictionaryError(
                f"{folder} has a dictionary of other settings: {'; '.join(lines)}. Give a new folder, or delete it"
            )
    elif folder.exists() and {file.name for file in folder.iterdir()} - {SETTINGS, METRICS}:
        raise DictionaryError(f"{folder} is there already, and holds no training; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(said, indent=1).encode())


def _settings(training: Training, batches: "Batches") -> Settings:
    transcodes, (d_in, d_out) = training.hook_out is not None, (batches.widths[0], batches.widths[-1])
    if transcodes and training.activation == "topk" and d_in != d_out:
        raise DictionaryError(
            f"a TopK transcoder from {d_in} to {d_out} values is in no format that forebay writes: train it with "
            'activation = "batchtopk"'
        )
    return Settings(
        activation=training.activation,
        k=training.k,
        k_aux=training.k_aux or max(1, d_out // 2),
        aux_coefficient=training.aux_coefficient,
        sparsity=training.sparsity,
        bandwidth=training.bandwidth,
        subtracts=not transcodes,
        dtype=getattr(torch, training.dtype),
    )


def _state(training: Training, batches: "Batches", how: Settings, checkpoint: Path, on: torch.device) -> State:
    if checkpoint.exists():
        return load_state(checkpoint, on)
    found = iter(batches)
    pairs = [rows_of(next(found), on) for _ in range(-(-SAMPLE // batches.batch))]
    x, y = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return begin(x, y, training.n_feature, training.normalize, how, training.seed)


def _checkpoint(folder: Path, state: State, log: TextIO) -> None:
    """After what was said of the steps that it holds."""
    log.flush()
    os.fsync(log.fileno())
    save_state(state, folder / CHECKPOINT)


def _measured(
    state: State, coded: Coded, y: Tensor, dead_after: int, rate: float, n_step: int, speed: float
) -> Metrics:
    return Metrics(
        step=state.step,
        n_step=n_step,
        tokens=state.step * len(y),
        loss=float(coded.loss.detach()),
        fvu=float(coded.error / (y - y.mean(0)).square().sum()),
        l0=float(coded.fired.sum() / len(y)),
        dead=float((state.idle >= dead_after).float().mean()),
        learning_rate=rate,
        tokens_per_second=speed,
    )


def _opened(path: Path, step: int) -> TextIO:
    """The file of metrics, to be written on, without what was recorded after the step of the checkpoint."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
    return open(path, "a", buffering=1)


# ── after ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _dictionary(state: State, training: Training, folder: Path, about: dict[str, Any]) -> Dictionary:
    """The dictionary of activations as they are: the scales go into the weights, decoder rows stay of length 1."""
    scale_in, scale_out = state.scales
    weights = {name: weight.detach().cpu() for name, weight in state.weights.items()}
    threshold = None
    if training.activation == "batchtopk":
        threshold = torch.full((training.n_feature,), state.threshold / scale_out)
    elif training.activation == "jumprelu":
        threshold = weights["log_threshold"].exp() / scale_out
    b_dec = weights["b_dec"] / scale_out
    hook = str(HookPoint.parse(training.hook))
    return Dictionary(
        W_enc=(weights["W_enc"].T * (scale_in / scale_out)).contiguous(),
        b_enc=weights["b_enc"] / scale_out,
        activation=Activation(
            kind=training.activation, k=None if training.activation == "jumprelu" else training.k, threshold=threshold
        ),
        hook=hook,
        b_in=b_dec if training.hook_out is None else None,
        W_dec=weights["W_dec"],
        b_dec=b_dec,
        hook_out=hook if training.hook_out is None else str(HookPoint.parse(training.hook_out)),
        provenance=Provenance(source=str(folder), format="forebay", model=about["model"], details=about),
    )


def _finish(
    folder: Path, state: State, training: Training, batches: "Batches", held_out: "Batches | None"
) -> Dictionary:
    about = {"training": asdict(training), **batches.about()}
    dictionary = _dictionary(state, training, folder, about)
    if held_out is not None and not (folder / EVALUATION).exists():
        found = evaluate(dictionary.to(state.device), held_out)
        write_atomic(folder / EVALUATION, json.dumps(asdict(found), indent=1).encode())
    if not (folder / "cfg.json").exists():
        aside = folder / ".dictionary"
        shutil.rmtree(aside, ignore_errors=True)
        transcodes = training.hook_out is not None and training.activation == "topk"
        save_dictionary(dictionary, aside, format="sparsify" if transcodes else "saelens")
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "cfg.json"):  # it says that all is there
            write_atomic(folder / path.name, path.read_bytes())
        shutil.rmtree(aside)
    return dictionary


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a dictionary makes of `n_token` tokens: `fvu`, the squared errors over the squared distances to the mean of
    all of them (1 − FVU is the explained variance); `l0`, features that fire a token; `dead`, the share that never do.
    """

    n_token: int
    fvu: float
    l0: float
    dead: float


def evaluate(dictionary: Dictionary, batches: "Batches") -> Evaluation:
    """Measure a dictionary, as it is saved and on its device, on `Batches` of its hook point, or of what it reads and
    what it writes. Sums are float64. DictionaryError for batches of more or fewer hook points.
    """
    if len(batches.names) != (1 if dictionary.hook == dictionary.hook_out else 2):
        raise DictionaryError(
            f"{dictionary.provenance.source} reads {dictionary.hook} and writes {dictionary.hook_out}; the batches are "
            f"of {', '.join(batches.names)}"
        )
    n, error, square = 0, 0.0, 0.0
    fired = torch.zeros(dictionary.n_feature, dtype=torch.int64)
    total = torch.zeros(dictionary.d_out, dtype=torch.float64)
    for found in batches:
        x, y = rows_of(found, dictionary.device)
        with torch.no_grad():
            features = dictionary.encode(x)
            left = dictionary.decode(features, x) - y
        # not every device has float64
        n, error, wide = n + len(y), error + float(left.cpu().double().square().sum()), y.cpu().double()
        square, total = square + float(wide.square().sum()), total + wide.sum(0)
        fired += (features != 0).sum(0).cpu()
    variance = square - float(total.square().sum()) / n
    dead = float((fired == 0).double().mean())
    return Evaluation(n_token=n, fvu=error / variance, l0=float(fired.sum()) / n, dead=dead)
