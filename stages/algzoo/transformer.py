"""The transformers of AlgZoo: attention only, one head, nothing masked, no norms, no biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.points import HookPoint
from ..models.taps import EMPTY, HookSpec
from .rnn import sequences
from .spec import AlgZooForward, AlgZooSpec, Taps, resolve, touched


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlgZooTransformer:
    """A network of layers of `torch.nn.MultiheadAttention(hidden, 1, bias=False)`, each added to the residual stream.

    `W_E` [token, d_model] and `W_pos` [position, d_model], whose sum enters the first layer; `W_in` [layer, 3·d_model,
    d_model], the queries', keys' and values' rows below each other; `W_O` [layer, d_model, d_model]; `W_U` [output,
    d_model], which reads the stream at the last position.
    """

    spec: AlgZooSpec
    W_E: Tensor
    W_pos: Tensor
    W_in: Tensor
    W_O: Tensor
    W_U: Tensor

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The tensors by their names in AlgZoo's checkpoints."""
        held = {"embed.weight": self.W_E, "pos_embed.weight": self.W_pos}
        for layer in range(self.spec.n_layers):
            held[f"attns.{layer}.in_proj_weight"] = self.W_in[layer]
            held[f"attns.{layer}.out_proj.weight"] = self.W_O[layer]
        return held | {"unembed.weight": self.W_U}

    def forward(self, inputs: object, hooks: HookSpec = EMPTY) -> AlgZooForward:
        """Run the network on functions f from {0, …, n−1} to itself, f(0), …, f(n−1) each: [input, position], or one
        [position]; no gradients.

        Hook points: `hook_embed`, `hook_pos_embed` [input, position, d_model] and, in every block `blocks.{i}.…`:
        `hook_resid_pre`, `hook_attn_out` and `hook_resid_post`, all three like them; `attn.hook_q`, `attn.hook_k`,
        `attn.hook_v` and `attn.hook_z` [input, position, head, d_head]; `attn.hook_attn_scores`, scaled, and
        `attn.hook_pattern` [input, head, query, key]; and `hook_output` [input, output]. An edge whose score is made −∞
        has weight 0, and a query without any edge attends to nothing.

        Raises SchemaError for inputs that are no such numbers, HookError for hooks that do not fit (`resolve`).
        """
        tokens = self.read(inputs)
        captures: dict[HookPoint, Tensor] = {}
        taps = resolve(hooks, self.spec, len(tokens), captures.__setitem__)
        with torch.no_grad():
            embed = touched(taps, "hook_embed", self.W_E[tokens])
            stream = embed + touched(taps, "hook_pos_embed", self.W_pos.expand(len(tokens), -1, -1))
            for layer in range(self.spec.n_layers):
                stream = touched(taps, f"blocks.{layer}.hook_resid_pre", stream)
                added = touched(taps, f"blocks.{layer}.hook_attn_out", self._attention(stream, layer, taps))
                stream = touched(taps, f"blocks.{layer}.hook_resid_post", stream + added)
            output = touched(taps, "hook_output", stream[:, -1] @ self.W_U.T)
        return AlgZooForward(spec=self.spec, output=output, captures=captures)

    def read(self, inputs: object) -> Tensor:
        """Functions as a tensor [input, position] of int64 on the weights' device. Raises SchemaError."""
        values = sequences(inputs, self.spec.n).to(self.W_E.device)
        tokens = values.long()
        if not bool(((tokens == values) & (tokens >= 0) & (tokens < self.spec.n)).all()):
            raise SchemaError(f"the inputs of {self.spec.task} are whole numbers from 0 to {self.spec.n - 1}")
        return tokens

    def _attention(self, stream: Tensor, layer: int, taps: Taps) -> Tensor:
        at = f"blocks.{layer}.attn"
        # [input, position, d_model] → three of [input, position, head, d_head] with the one head
        parts = (stream @ self.W_in[layer].T)[:, :, None].chunk(3, dim=-1)
        q, k, v = (touched(taps, f"{at}.hook_{name}", part) for name, part in zip("qkv", parts, strict=True))
        scores = torch.einsum("iqhd,ikhd->ihqk", q, k) / math.sqrt(self.spec.hidden)
        scores = touched(taps, f"{at}.hook_attn_scores", scores)
        none = (scores == -torch.inf).all(-1, keepdim=True)
        pattern = touched(taps, f"{at}.hook_pattern", scores.softmax(-1).masked_fill(none, 0.0))
        z = touched(taps, f"{at}.hook_z", torch.einsum("ihqk,ikhd->iqhd", pattern, v))
        return z[:, :, 0] @ self.W_O[layer].T
