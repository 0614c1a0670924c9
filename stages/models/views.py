"""A model's weights under TransformerLens' names and in its shapes: views, without a copy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ModelError
from .rwkv.weights import RwkvBlockWeights
from .spec import ModelSpec
from .weights import BlockWeights, Weights


@dataclass(frozen=True, slots=True, eq=False)
class WeightViews:
    """Weights as vectors multiply them from the left: x @ W. Dimensions as in the hook points; D is d_model, E d_head,
    F d_mlp. What belongs to a layer is a function of its number.

    They are the weights as the model uses them: nothing is folded or centred (a norm's weight stays in the norm, where
    TransformerLens by default folds it into the matrix behind it), and keys and values have their own heads, not
    repeated ones. Writing to a view changes the model. Raises ModelError for a weight that the model does not have.

    RWKV has the embedding and the unembedding; `W_R`, `W_K` and `W_V`, which are given the stream mixed with that of
    the token before, and give `rwkv.hook_r`, `hook_k` and `hook_v` (in RWKV-7 before the learning rate acts on the keys
    and the value residual on the values); `W_O`; and `W_in` and `W_out` of channel mixing.
    """

    spec: ModelSpec
    weights: Weights

    @property
    def W_E(self) -> Tensor:
        """The embedding [vocab, D], before `spec.embed_scale`."""
        return self.weights.embed

    @property
    def W_pos(self) -> Tensor:
        """The learned positions [position, D]."""
        return self._present(self.weights.pos_embed, "learned positions")

    @property
    def W_U(self) -> Tensor:
        """The unembedding [D, vocab]."""
        return self.weights.unembed.T

    @property
    def b_U(self) -> Tensor:
        """The bias of the unembedding [vocab]."""
        return self._present(self.weights.unembed_bias, "bias of the unembedding")

    def W_Q(self, layer: int) -> Tensor:
        """Residual stream to queries, [head, D, E]."""
        return self._heads(layer)[0].transpose(1, 2)

    def W_K(self, layer: int) -> Tensor:
        """Residual stream to keys, [kv_head, D, E]."""
        if self.spec.rwkv is not None:
            return self._by_head(self._rwkv(layer).time.k)
        return self._heads(layer)[1].transpose(1, 2)

    def W_V(self, layer: int) -> Tensor:
        """Residual stream to values, [kv_head, D, E]."""
        if self.spec.rwkv is not None:
            return self._by_head(self._rwkv(layer).time.v)
        return self._heads(layer)[2].transpose(1, 2)

    def W_R(self, layer: int) -> Tensor:
        """Residual stream to receptances of a recurrent model, [head, D, E]."""
        return self._by_head(self._rwkv(layer).time.r)

    def b_Q(self, layer: int) -> Tensor:
        """Bias of the queries, [head, E]."""
        return self._head_biases(layer)[0]

    def b_K(self, layer: int) -> Tensor:
        """Bias of the keys, [kv_head, E]."""
        return self._head_biases(layer)[1]

    def b_V(self, layer: int) -> Tensor:
        """Bias of the values, [kv_head, E]."""
        return self._head_biases(layer)[2]

    def W_O(self, layer: int) -> Tensor:
        """Heads to residual stream, [head, E, D]."""
        out = self._block(layer).out if self.spec.rwkv is None else self._rwkv(layer).time.out
        return out.T.view(self.spec.n_heads, self.spec.d_head, -1)

    def b_O(self, layer: int) -> Tensor:
        """Bias of attention's output, [D]."""
        return self._present(self._block(layer).out_bias, "bias of attention's output")

    def W_gate(self, layer: int) -> Tensor:
        """Residual stream to the activation function of a gated MLP, [D, F]: `mlp.hook_pre` comes of it."""
        if not self.spec.gated:
            raise ModelError(f"this model ({self.spec.family}) has no gate in its MLP")
        return self._block(layer).gate_up[: self.spec.d_mlp].T

    def W_in(self, layer: int) -> Tensor:
        """Residual stream to hidden channels, [D, F]: `mlp.hook_pre_linear` comes of it in a gated MLP, `mlp.hook_pre`
        in a plain one. Of RWKV's channel mixing its keys."""
        if self.spec.rwkv is not None:
            return self._rwkv(layer).channel.up.T
        return self._block(layer).gate_up[-self.spec.d_mlp :].T

    def b_in(self, layer: int) -> Tensor:
        """Bias of `W_in`, [F]."""
        return self._present(self._block(layer).gate_up_bias, "bias in its MLP")[-self.spec.d_mlp :]

    def W_out(self, layer: int) -> Tensor:
        """Hidden channels to residual stream, [F, D]. Of RWKV's channel mixing its values."""
        if self.spec.rwkv is not None:
            return self._rwkv(layer).channel.down.T
        return self._block(layer).down.T

    def b_out(self, layer: int) -> Tensor:
        """Bias of the MLP's output, [D]."""
        return self._present(self._block(layer).down_bias, "bias in its MLP")

    def _block(self, layer: int) -> BlockWeights:
        if self.spec.rwkv is not None:
            raise ModelError(
                f"this model ({self.spec.family}) has time mixing in the place of attention, no biases and no gate in "
                f"its MLP: there are W_R, W_K, W_V, W_O, W_in and W_out"
            )
        self._check(layer)
        return self.weights.blocks[layer]

    def _rwkv(self, layer: int) -> RwkvBlockWeights:
        if self.spec.rwkv is None:
            raise ModelError(f"this model ({self.spec.family}) is not recurrent: it has queries, W_Q, no receptances")
        self._check(layer)
        return self.weights.rwkv_blocks[layer]

    def _check(self, layer: int) -> None:
        if not 0 <= layer < self.spec.n_layers:
            raise ModelError(f"there is no layer {layer}; the layers of this model are 0 to {self.spec.n_layers - 1}")

    def _by_head(self, rows: Tensor) -> Tensor:
        """Give a matrix [head · E, D] as [head, D, E]."""
        return rows.view(-1, self.spec.d_head, self.spec.d_model).transpose(1, 2)

    def _heads(self, layer: int) -> tuple[Tensor, ...]:
        """The rows of queries, keys and values by head, [head, E, D] each."""
        spec = self.spec
        by_head = self._block(layer).qkv.view(-1, spec.d_head, spec.d_model)
        return torch.split(by_head, [spec.n_heads, spec.n_kv_heads, spec.n_kv_heads])

    def _head_biases(self, layer: int) -> tuple[Tensor, ...]:
        spec = self.spec
        bias = self._present(self._block(layer).qkv_bias, "bias of queries, keys and values")
        return torch.split(bias.view(-1, spec.d_head), [spec.n_heads, spec.n_kv_heads, spec.n_kv_heads])

    def _present(self, weight: Tensor | None, what: str) -> Tensor:
        if weight is None:
            raise ModelError(f"this model ({self.spec.family}) has no {what}")
        return weight
