"""Which entries of a matrix are large: the k largest of each row, and those above a bound.

On a CPU numpy compares and partitions in a fraction of the time that torch takes (`scripts/bench --only encode` shows
what is left beside the matrix product); elsewhere torch does.
"""

import numpy as np
import torch
from torch import Tensor


def top_k(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of a matrix [row, k]: values descending and columns; of equal values the lower column
    wins, on every device. k larger than the row gives the whole row. Without NaN.
    """
    k = min(k, h.shape[-1])
    if h.device.type == "cpu" and h.dtype == torch.float32 and 8 * k <= h.shape[-1]:
        values, columns = _top_k_of_candidates(h.detach(), k)
        return (h.gather(-1, columns) if h.requires_grad else values), columns
    values, columns = torch.topk(h, min(k + 1, h.shape[-1]), dim=-1)
    if values.shape[-1] > k:
        # torch leaves open which of equal values it takes: where the last one taken has an equal that was not, look
        # again.
        tied = values[:, k - 1] == values[:, k]
        values, columns = values[:, :k].clone(), columns[:, :k].clone()
        if bool(tied.any()):
            again, order = torch.sort(h[tied], dim=-1, descending=True, stable=True)
            values[tied], columns[tied] = again[:, :k], order[:, :k]
    columns, order = torch.sort(columns, dim=-1)
    values, order = torch.sort(values.gather(-1, order), dim=-1, descending=True, stable=True)
    return values, columns.gather(-1, order)


def _top_k_of_candidates(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cut each row into 8 k groups or more: the k-th largest of their maxima is a lower bound of the row's k-th
    largest, and little more than k entries reach it.
    """
    n_row, width = h.shape
    members = width // (8 * k)
    groups = width // members
    largest = h[:, : groups * members].unflatten(1, (members, groups)).amax(1).numpy()
    largest.partition(groups - k, axis=-1)
    row, column = np.divmod(np.flatnonzero(h.numpy() >= largest[:, groups - k, None]), width)
    count = np.bincount(row, minlength=n_row)
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    columns = np.zeros((n_row, count.max(initial=k)), dtype=np.int64)
    values = np.full(columns.shape, -np.inf, dtype=np.float32)
    columns[row, place], values[row, place] = column, h.numpy()[row, column]
    found, order = torch.sort(torch.from_numpy(values), dim=-1, descending=True, stable=True)
    return found[:, :k], torch.from_numpy(columns).gather(-1, order[:, :k])


def above(h: Tensor, bound: Tensor | float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of a matrix that are larger than `bound`, a number or one a column; row by row,
    columns ascending. int64.
    """
    if h.device.type == "cpu" and h.dtype == torch.float32:
        limit = bound.detach().numpy() if isinstance(bound, Tensor) else bound
        row, column = np.divmod(np.flatnonzero(h.detach().numpy() > limit), h.shape[-1])
        return torch.from_numpy(row), torch.from_numpy(column)
    row_, column_ = (h > bound).nonzero(as_tuple=True)
    return row_, column_
