"""What training minimises: the forward of a dictionary in training, its loss, and gradients that are not autograd's.

Only features that fire, and for JumpReLU those that nearly do, take part in the decoder and in every gradient: the one
dense product is that of the preactivations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .selection import above, top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the loss depends on beside the weights. `subtracts` says that b_dec is subtracted from the input, as in an
    autoencoder; `dtype` is what the large products are computed in. Of `Training`, where the rest is explained.
    """

    activation: str
    k: int
    k_aux: int
    aux_coefficient: float
    sparsity: float
    bandwidth: float
    subtracts: bool
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """What a forward of rows gives: the loss, a scalar with gradients; the sum of squared errors; which features fired
    how often [feature]; and the smallest value that did.
    """

    loss: Tensor
    error: Tensor
    fired: Tensor
    smallest: Tensor


class Picked(torch.autograd.Function):
    """Entries of x Wᵀ that are known already: `values[pair]` at `row[pair]` and `feature[pair]`, whose gradient goes to
    W [feature, d] alone, at the cost of the pairs.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, values: Tensor, row: Tensor, feature: Tensor) -> Tensor:
        ctx.save_for_backward(x, row, feature)
        ctx.n_feature = len(weight)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, row, feature = ctx.saved_tensors
        order = torch.argsort(feature, stable=True)
        count = torch.bincount(feature, minlength=ctx.n_feature)
        weight = embedding_bag(
            row[order], x, count.cumsum(0) - count, mode="sum", per_sample_weights=gradients[0][order].to(x.dtype)
        )
        return weight, None, None, None, None


class JumpReLU(torch.autograd.Function):
    """h where h > θ, else 0; towards θ the gradient is −θ/ε where |h − θ| < ε/2 (Rajamanoharan et al. 2024, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(h > threshold, h, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold = ctx.saved_tensors
        near = (h - threshold).abs() < ctx.bandwidth / 2
        slope = torch.where(near, -threshold / ctx.bandwidth, 0)
        return torch.where(h > threshold, gradients[0], 0), slope * gradients[0], None


class Step(torch.autograd.Function):
    """1 where h > θ, else 0; towards θ the gradient is −1/ε where |h − θ| < ε/2 (Rajamanoharan et al. 2024, eq. 12)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold = ctx.saved_tensors
        near = (h - threshold).abs() < ctx.bandwidth / 2
        return None, torch.where(near, -1 / ctx.bandwidth, 0) * gradients[0], None


THRESHOLD_ROWS = 1024
"""Rows of a sample that the first thresholds are taken from."""
Pairs = tuple[Tensor, Tensor]
"""Rows and features, row by row."""


def _of_each_row(h: Tensor, how: Settings, bound: Tensor | float) -> Pairs:
    """TopK (Gao et al. 2024): the k largest of each row."""
    features = top_k(h, how.k)[1]
    rows = torch.arange(len(h), device=h.device).repeat_interleave(features.shape[1])
    return rows, features.flatten()


def _of_the_batch(h: Tensor, how: Settings, bound: Tensor | float) -> Pairs:
    """BatchTopK (Bussmann et al. 2024): the k · rows largest of all. Looks below half of `bound` where it has to."""
    wanted = how.k * len(h)
    row, feature = above(h, float(bound) / 2)
    if len(row) < wanted:
        row, feature = above(h, 0.0)
    if len(row) <= wanted:
        return row, feature
    kept = torch.topk(h[row, feature], wanted, sorted=False).indices.sort().values
    return row[kept], feature[kept]


def _above_thresholds(h: Tensor, how: Settings, bound: Tensor | float) -> Pairs:
    """JumpReLU: those above their thresholds, or near enough to have a gradient."""
    return above(h, bound - how.bandwidth / 2)


SELECTIONS: Mapping[str, Callable[[Tensor, Settings, Tensor | float], Pairs]] = {
    "topk": _of_each_row,
    "batchtopk": _of_the_batch,
    "jumprelu": _above_thresholds,
}


def forward(weights: Mapping[str, Tensor], x: Tensor, y: Tensor, dead: Tensor, floor: float, how: Settings) -> Coded:
    """The loss of rows x [row, d_in] that are to become y [row, d_out], both float32.

    `weights` are W_enc [feature, d_in], b_enc, W_dec [feature, d_out], b_dec and, of JumpReLU, log_threshold [feature];
    `dead` [feature] says which features count as dead, `floor` is about the smallest value that fires (BatchTopK).

    The loss is the mean of (ŷ − y)² over all entries + aux_coefficient · that of the dead features' part (`auxiliary`)
    + for JumpReLU sparsity · (L0 / k − 1)², L0 being the mean over rows (Rajamanoharan et al. 2024, section 7).
    """
    W_enc, W_dec, shift = weights["W_enc"], weights["W_dec"], weights["b_enc"]
    if how.subtracts:
        # The difference is 0, and brings b_dec the gradient that x, of which it is taken as a constant, does not.
        b_dec = weights["b_dec"].detach()
        x, shift = x - b_dec, shift - W_enc.detach() @ (weights["b_dec"] - b_dec)
    threshold = weights["log_threshold"].exp() if how.activation == "jumprelu" else None
    with torch.no_grad():
        product = (x.to(how.dtype) @ W_enc.to(how.dtype).T).float()
        row, feature = SELECTIONS[how.activation](product + shift, how, floor if threshold is None else threshold)
        product = product[row, feature]
    picked = Picked.apply(W_enc, x, product, row, feature) + shift[feature]  # type: ignore[no-untyped-call]
    if threshold is None:
        penalty, value = 0.0, picked.relu()
    else:
        value = JumpReLU.apply(picked, threshold[feature], how.bandwidth)  # type: ignore[no-untyped-call]
        step = Step.apply(picked, threshold[feature], how.bandwidth)  # type: ignore[no-untyped-call]
        active = step.sum() / len(x)
        penalty = how.sparsity * (active / how.k - 1).square()
    count = torch.bincount(row, minlength=len(x))
    decoded = embedding_bag(
        feature, W_dec.to(how.dtype), count.cumsum(0) - count, mode="sum", per_sample_weights=value.to(how.dtype)
    )
    error = decoded.float() + weights["b_dec"] - y
    loss = error.square().mean() + penalty
    if how.aux_coefficient and bool(dead.any()):
        loss = loss + how.aux_coefficient * auxiliary(weights, x, -error.detach(), shift, dead, how)
    with torch.no_grad():
        fires = value > 0
        fired = torch.bincount(feature[fires], minlength=len(W_enc))
        return Coded(
            loss, error.square().sum(), fired, value[fires].amin() if bool(fires.any()) else value.new_zeros(())
        )


def auxiliary(
    weights: Mapping[str, Tensor], x: Tensor, left: Tensor, shift: Tensor, dead: Tensor, how: Settings
) -> Tensor:
    """AuxK (Gao et al. 2024, A.2): the mean squared error of what the k_aux strongest dead features of each row make of
    `left` [row, d_out], which the others have left over.
    """
    features = dead.nonzero()[:, 0]
    h = (x.to(how.dtype) @ weights["W_enc"][features].to(how.dtype).T).float() + shift[features]
    values, chosen = torch.topk(h, min(how.k_aux, len(features)), dim=-1)
    values = torch.zeros_like(h).scatter(-1, chosen, values.relu())
    made = (values.to(how.dtype) @ weights["W_dec"][features].to(how.dtype)).float()
    return (made - left).square().mean()


def unit_rows(W_dec: Tensor) -> None:
    """Makes every row of the decoder one long, in place."""
    W_dec /= torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True)


def without_parallel(gradient: Tensor, W_dec: Tensor) -> None:
    """Takes out of each row's gradient, in place, what would only make the row, of length 1, longer or shorter."""
    gradient -= (gradient * W_dec).sum(-1, keepdim=True) * W_dec


def geometric_median(x: Tensor, *, tolerance: float = 1e-6, most: int = 200) -> Tensor:
    """The point with the least sum of distances to rows x [row, d]: Weiszfeld's iteration from their mean, until it
    moves by less than `tolerance` of the mean distance.
    """
    at = x.mean(0)
    for _ in range(most):
        distance = torch.linalg.vector_norm(x - at, dim=-1)
        nearness = 1 / distance.clamp_min(1e-6 * distance.mean())
        former, at = at, (nearness[:, None] * x).sum(0) / nearness.sum()
        if torch.linalg.vector_norm(at - former) <= tolerance * distance.mean():
            break
    return at


def first_weights(n_feature: int, x: Tensor, y: Tensor, how: Settings, seed: int) -> dict[str, Tensor]:
    """Weights to start from, given a sample of rows as `forward` takes them.

    W_dec has random rows of length 1, and an autoencoder's W_enc the same ones (Gao et al. 2024, A.1), so that every
    preactivation is the part of x along its row. A transcoder's is the best linear guess, from x, of that part of y.
    b_dec is the geometric median of y; a transcoder's b_enc takes that of x away. JumpReLU's thresholds are all where
    the mean L0 of the sample is k.
    """
    W_dec = torch.randn(n_feature, y.shape[1], generator=torch.Generator().manual_seed(seed)).to(x.device)
    unit_rows(W_dec)
    weights = {"W_enc": W_dec.clone(), "W_dec": W_dec, "b_dec": geometric_median(y), "b_enc": x.new_zeros(n_feature)}
    shift = -weights["W_enc"] @ weights["b_dec"] if how.subtracts else weights["b_enc"]
    if not how.subtracts:
        middle = geometric_median(x)
        weights["W_enc"] = W_dec @ _regression(x - middle, y - weights["b_dec"])
        weights["b_enc"] = shift = -weights["W_enc"] @ middle
    if how.activation == "jumprelu":
        h = x[:THRESHOLD_ROWS] @ weights["W_enc"].T + shift
        least = torch.topk(h.flatten(), how.k * len(h), sorted=False).values.amin().clamp_min(1e-3)
        weights["log_threshold"] = least.log().expand(n_feature).clone()
    return weights


def _regression(x: Tensor, y: Tensor) -> Tensor:
    """The matrix [d_out, d_in] of the least squares of y on x, with a thousandth of each variance of x as a ridge."""
    squares, products = (x.T @ x).cpu().double(), (x.T @ y).cpu().double()
    ridge = torch.diag(1e-3 * squares.diagonal().clamp_min(1e-9 * squares.diagonal().mean()))
    solved: Tensor = torch.linalg.solve(squares + ridge, products)
    return solved.T.to(x)
