"""The same network with input weights of ±1: each neuron's scale moved out of its input into what reads it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..models.errors import ModelError
from .load import AlgZooNetwork
from .tasks import recurrent


def standardize(network: AlgZooNetwork) -> AlgZooNetwork:
    """Give a network with |W_ih| = 1 that computes the same outputs from the same inputs.

    A ReLU commutes with a positive factor, so that the hidden state of neuron j may be divided by s_j = |W_ih[j]|:
    W_ih[j] / s_j, W_hh[j, k] · s_k / s_j and W_oh[o, j] · s_j. Outputs are equal but for rounding, patterns of active
    neurons are equal, hidden states are those of the network divided by s. Computed in float64, kept in the dtype of
    the network. Source: AlgZoo, and candle-mi's definition.

    Raises ModelError for a neuron whose input weight is so near to 0 that the result would not be finite; it reads no
    input. SchemaError for a transformer.
    """
    rnn = recurrent(network, "standardize")
    W_ih, W_hh, W_oh = (weight.double() for weight in (rnn.W_ih, rnn.W_hh, rnn.W_oh))
    scale = W_ih.abs()
    silent = (scale < torch.finfo(rnn.W_ih.dtype).tiny).nonzero().flatten().tolist()
    if silent:
        raise ModelError(f"the input weights of neurons {silent} are 0: they cannot be made ±1")
    made = (W_ih.sign(), W_hh * scale / scale[:, None], W_oh * scale)
    W_ih, W_hh, W_oh = (weight.to(rnn.W_ih.dtype) for weight in made)
    if not bool(torch.cat([W_hh.flatten(), W_oh.flatten()]).isfinite().all()):
        raise ModelError(f"input weights of {scale.min():.3g} to {scale.max():.3g} are too far apart to be made ±1")
    return replace(rnn, W_ih=W_ih, W_hh=W_hh, W_oh=W_oh)


def standardization_quality(network: AlgZooNetwork) -> float:
    """How far a network is from being standardised: the largest ||W_ih| − 1|, which is 0 for one that is.

    SchemaError for a transformer.
    """
    return float((recurrent(network, "standardization_quality").W_ih.abs() - 1).abs().max())
