"""Tiny networks with known or random weights, and PyTorch's own modules with the same ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from forebay.stages.algzoo.load import load_algzoo
from forebay.stages.algzoo.rnn import AlgZooRNN
from forebay.stages.algzoo.transformer import AlgZooTransformer

SECOND_ARGMAX_OF_TWO = {
    "rnn.weight_ih_l0": torch.tensor([[1.0], [-1.0]]),
    "rnn.weight_hh_l0": torch.tensor([[-1.0, 1.0], [1.0, -1.0]]),
    "linear.weight": torch.tensor([[1.0, -1.0], [-1.0, 1.0]]),
}
"""The neurons hold r(x_0) and r(−x_0), then r(x_1 − x_0) and r(x_0 − x_1): the outputs are x_1 − x_0 and its opposite,
so that the smaller of two numbers, which is the second largest, is always found."""


class TorchRNN(nn.Module):
    """What AlgZoo trains: PyTorch's recurrent layer and a linear one."""

    def __init__(self, hidden: int, n_output: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, hidden, nonlinearity="relu", bias=False, batch_first=True)
        self.linear = nn.Linear(hidden, n_output, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [input, output] and hidden states [input, time, neuron]."""
        states, last = self.rnn(x[..., None])
        return self.linear(last[0]), states


class TorchTransformer(nn.Module):
    """What AlgZoo trains: PyTorch's attention, its output added to the stream, and nothing else."""

    def __init__(self, hidden: int, n: int, n_layers: int) -> None:
        super().__init__()
        self.embed, self.pos_embed = nn.Embedding(n, hidden), nn.Embedding(n, hidden)
        layers = [nn.MultiheadAttention(hidden, 1, bias=False, batch_first=True) for _ in range(n_layers)]
        self.attns = nn.ModuleList(layers)
        self.unembed = nn.Linear(hidden, n, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Outputs [input, output], the streams that enter each layer and leave the last, and the patterns."""
        streams = [self.embed(x) + self.pos_embed(torch.arange(x.shape[1]))]
        patterns = []
        for attn in self.attns:
            added, pattern = attn(streams[-1], streams[-1], streams[-1])
            streams.append(streams[-1] + added)
            patterns.append(pattern)
        return self.unembed(streams[-1][:, -1]), streams, patterns


def spread(module: nn.Module, seed: int, size: float = 0.8) -> nn.Module:
    """Give a module's weights random values of a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return module.eval()


def random_rnn(
    hidden: int = 5, n: int = 4, *, task: str = "2nd_argmax", seed: int = 0, dtype: str = "float64"
) -> tuple[AlgZooRNN, TorchRNN]:
    theirs = TorchRNN(hidden, 1 if task == "median" else n)
    spread(theirs, seed)
    ours = load_algzoo(theirs.state_dict(), task=task, n=n, dtype=dtype)
    assert isinstance(ours, AlgZooRNN)
    return ours, theirs.to(getattr(torch, dtype))


def random_transformer(
    hidden: int = 6, n: int = 4, *, n_layers: int = 2, seed: int = 0, dtype: str = "float64"
) -> tuple[AlgZooTransformer, TorchTransformer]:
    theirs = TorchTransformer(hidden, n, n_layers)
    spread(theirs, seed, 0.5)
    ours = load_algzoo(theirs.state_dict(), task="longest_cycle", dtype=dtype)
    assert isinstance(ours, AlgZooTransformer)
    return ours, theirs.to(getattr(torch, dtype))


def rnn_of(weights: Mapping[str, Tensor], task: str = "2nd_argmax", dtype: str = "float64") -> AlgZooRNN:
    network = load_algzoo(weights, task=task, dtype=dtype)
    assert isinstance(network, AlgZooRNN)
    return network
