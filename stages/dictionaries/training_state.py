"""What training knows between two steps: how it begins, what a step changes, and how it outlives the process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...stores.ledger import write_atomic
from .errors import DictionaryError
from .formats.format import read_safetensors
from .objective import Coded, Settings, first_weights, forward, unit_rows, without_parallel

BETAS, EPSILON = (0.9, 0.999), 6.25e-10
"""Of Adam (Gao et al. 2024, A.2)."""
SPEEDS = {"W_enc": 1.0, "W_dec": 1.0, "b_enc": 0.15, "b_dec": 0.15, "log_threshold": 10.0}
"""Factors of the learning rate. Biases are slow: a residual stream's few massive dimensions set its scale, and a step
that is small beside them is large beside the rest. JumpReLU's thresholds are logarithms, which have far to go.
"""
MEMORY = 0.9
"""How much of BatchTopK's running threshold is kept at each step: a batch's own is nearly exact, and it moves."""


@dataclass(slots=True, eq=False)
class State:
    """After `step` batches: the weights, as `objective.forward` takes them, and Adam's state; how many tokens ago each
    feature fired; the sum and the weight of BatchTopK's running threshold; the factors by which what is read and what
    is predicted are multiplied.
    """

    weights: dict[str, Tensor]
    adam: torch.optim.Adam
    idle: Tensor
    running: tuple[float, float]
    scales: tuple[float, float]
    step: int

    @property
    def threshold(self) -> float:
        """BatchTopK's: the running mean of the smallest value that fired in a batch."""
        return self.running[0] / self.running[1] if self.running[1] else 0.0

    @property
    def device(self) -> torch.device:
        return self.idle.device


def begin(x: Tensor, y: Tensor, n_feature: int, normalize: bool, how: Settings, seed: int) -> State:
    """The state before the first step, from a sample of rows as they are stored."""
    scale_in, scale_out = (_scale(x), _scale(y)) if normalize else (1.0, 1.0)
    weights = first_weights(n_feature, x * scale_in, y * scale_out, how, seed)
    idle = torch.zeros(n_feature, dtype=torch.int64, device=x.device)
    return State(weights, _adam(weights), idle, (0.0, 0.0), (scale_in, scale_out), 0)


def _scale(x: Tensor) -> float:
    """What brings the mean norm of rows to √d, SAELens' `expected_average_only_in`."""
    return float(x.shape[1] ** 0.5 / torch.linalg.vector_norm(x, dim=-1).mean())


def _adam(weights: dict[str, Tensor]) -> torch.optim.Adam:
    groups = [{"params": [weight.requires_grad_()], "speed": SPEEDS[name]} for name, weight in weights.items()]
    fused = weights["W_enc"].device.type in ("cpu", "cuda")
    return torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=fused)


def rows_of(found: Any, on: torch.device) -> tuple[Tensor, Tensor]:
    """What is read and what is predicted, of a batch of `Batches`: float32, on a device. One array is both; uint16 is
    the bits of bfloat16.
    """
    arrays = found if isinstance(found, tuple) else (found,)
    rows = [torch.from_numpy(array).to(on) for array in arrays]
    rows = [row.view(torch.bfloat16).float() if row.dtype == torch.uint16 else row.float() for row in rows]
    return rows[0], rows[-1]


def advance(state: State, x: Tensor, y: Tensor, rate: float, dead_after: int, how: Settings) -> Coded:
    """One step down the gradient of a batch, rows scaled, with the learning rate given. DictionaryError for a loss that
    is not finite, before anything has changed.
    """
    coded = forward(state.weights, x, y, state.idle >= dead_after, state.threshold, how)
    if not bool(torch.isfinite(coded.loss)):
        raise DictionaryError(
            f"the loss is {float(coded.loss.detach())} at step {state.step + 1:,}, at learning rate {rate:.3g}. Lower "
            "learning_rate, or lengthen warmup, and train anew; activations that are not finite do it, too"
        )
    coded.loss.backward()
    W_dec = state.weights["W_dec"]
    with torch.no_grad():
        assert W_dec.grad is not None
        without_parallel(W_dec.grad, W_dec)
        for group in state.adam.param_groups:
            group["lr"] = rate * group["speed"]
        state.adam.step()
        state.adam.zero_grad()
        unit_rows(W_dec)
        state.idle = torch.where(coded.fired > 0, 0, state.idle + len(x))
    total, weight = state.running
    state.running = MEMORY * total + (1 - MEMORY) * float(coded.smallest), MEMORY * weight + 1 - MEMORY
    state.step += 1
    return coded


def save_state(state: State, path: Path) -> None:
    """Puts a checkpoint, a safetensors file, whole or not at all."""
    tensors = {f"weights.{name}": weight for name, weight in state.weights.items()}
    for name, weight in state.weights.items():
        tensors |= {f"adam.{name}.{part}": value for part, value in state.adam.state[weight].items()}
    tensors["idle"], tensors["step"] = state.idle, torch.tensor(state.step)
    tensors["running"] = torch.tensor(state.running, dtype=torch.float64)
    tensors["scales"] = torch.tensor(state.scales, dtype=torch.float64)
    write_atomic(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def load_state(path: Path, on: torch.device) -> State:
    """The state that `save_state` wrote. DictionaryError if the file is damaged."""
    # Copies, for products of a matrix that lies elsewhere in memory may differ in the last bit.
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    of_adam = {name: value for name, value in tensors.items() if name.startswith("adam.")}
    weights = {
        name.removeprefix("weights."): value.to(on) for name, value in tensors.items() if name.startswith("weights.")
    }
    adam = _adam(weights)
    if of_adam:
        parts = ("exp_avg", "exp_avg_sq", "step")
        kept = {n: {part: of_adam[f"adam.{name}.{part}"] for part in parts} for n, name in enumerate(weights)}
        adam.load_state_dict(adam.state_dict() | {"state": kept})
    (total, weight), (scale_in, scale_out) = tensors["running"].tolist(), tensors["scales"].tolist()
    return State(weights, adam, tensors["idle"].to(on), (total, weight), (scale_in, scale_out), int(tensors["step"]))
