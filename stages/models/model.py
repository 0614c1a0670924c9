"""A model that can be run: its spec, its weights, and the one forward."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch, TokenIds, make_batch
from .blocks import Blocks, Past, Run
from .checkpoint import Checkpoint
from .errors import ModelError
from .forward import Forward
from .generate import Continuation, Step, stream
from .html import html_table
from .memory import ForwardMemory, forward_memory
from .model_points import ModelPoints
from .norms import norm
from .points import HookPoint, expand
from .recurrence import Recurrence
from .resolve import resolve, state_positions
from .rwkv.layers import RwkvBlocks
from .rwkv.states import RecurrentStates
from .sampling import GREEDY, Sampling
from .spec import ModelSpec
from .taps import EMPTY, At, Finished, HookSpec, Sink, Taps
from .text import ModelTokenizer, tokenizer_of
from .transformer import TransformerBlocks
from .unembedding import Unembedding
from .views import WeightViews
from .weights import Weights


@dataclass(frozen=True, eq=False)
class Model:
    """A model on a device in a dtype. Usually made by `load_model`; `checkpoint` is where its tokenizer comes from.

    With `compiled`, blocks in which nothing but the residual stream at their edges is captured or intervened on run
    compiled (`compiling`), one form for every shape of batch: give batches of one shape.
    """

    spec: ModelSpec
    weights: Weights = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    compiled: bool = False

    def _repr_html_(self) -> str:
        spec = self.spec
        shared = "" if spec.n_kv_heads == spec.n_heads else f", {spec.n_kv_heads} of keys and values"
        facts = {
            "family": spec.family,
            "source": None if self.checkpoint is None else self.checkpoint.source,
            "revision": None if self.checkpoint is None else self.checkpoint.revision,
            "layers": spec.n_layers,
            "d_model": spec.d_model,
            "heads": f"{spec.n_heads}{shared}, d_head {spec.d_head}",
            "d_mlp": spec.d_mlp,
            "vocab": f"{spec.d_vocab:,}",
            "context": "unbounded" if spec.n_ctx is None else f"{spec.n_ctx:,}",
            "parameters": f"{spec.n_parameters:,}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "compiled": "yes" if self.compiled else None,
        }
        return html_table("Model", facts)

    @cached_property
    def unembedding(self) -> Unembedding:
        """The final norm and the unembedding; shares the model's weights."""
        weights = self.weights
        return Unembedding(spec=self.spec, norm=weights.ln_final, weight=weights.unembed, bias=weights.unembed_bias)

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The model's tokenizer, made when first asked for. Raises ModelError where the model has none."""
        if self.checkpoint is None:
            raise ModelError("this model was made from weights alone and has no tokenizer: load it with load_model")
        return tokenizer_of(self.checkpoint.vocabulary())

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether texts can be given in place of token ids."""
        try:
            return self.tokenizer is not None
        except ModelError:
            return False

    def forward(
        self,
        token_ids: TokenIds,
        hooks: HookSpec | None = None,
        *,
        logits: bool = True,
        sink: Sink | None = None,
        gradients: bool = False,
        recurrence: Recurrence | None = None,
        states: RecurrentStates | None = None,
    ) -> Forward:
        """Run the model on token ids, capturing and intervening as `hooks` says.

        `token_ids`: integers [sequence, position], or a list of sequences of different lengths, which are padded on
        the right here. With `logits=False` the computation ends at the last point that is captured or intervened on,
        wherever in a block it lies. `sink(point, tensor)` takes captures as they happen instead of their being
        collected. `gradients` keeps the graph from the embedding on: captures and logits can then be differentiated
        with respect to captures before them and to what interventions put in. `recurrence` runs some layers several
        times. `states` are those with which a recurrent model begins, one a sequence: the `states` of the forward of
        what came before, so that a text can be run in pieces; None: those before the first token.

        Attention runs through scaled_dot_product_attention, except in blocks whose scores or pattern are captured or
        intervened on, and in models that cap their scores: there it is computed step by step and agrees with the other
        up to rounding; so it does where recurrent states are captured before the last token. No other capture changes a
        bit of the result, unless gradients are kept. Raises ModelError for tokens that cannot be run, HookError for
        hooks that this model cannot serve, both before anything is computed, and HookError for a result of an
        intervention that does not fit.
        """
        captures: dict[HookPoint, Tensor] = {}
        hooks = hooks or EMPTY
        batch = make_batch(token_ids, self.spec, self.device)
        taps = resolve(hooks, self.spec, batch, sink or captures.__setitem__, logits=logits, gradients=gradients)
        if recurrence is not None:
            recurrence.check(self.spec, batch.lengths)
        run = self._blocks.start(batch.lengths, states)
        try:
            with torch.set_grad_enabled(gradients):
                result = self._run(batch, taps, recurrence, run)
        except Finished:
            result = None
        return Forward(
            logits=result if logits else None,
            lengths=batch.lengths,
            captures=captures,
            token_ids=batch.token_ids,
            states=run.states,
            state_positions=state_positions(hooks, self.spec),
        )

    def _run(self, batch: Batch, taps: Taps, recurrence: Recurrence | None, run: Run) -> Tensor:
        """Give the logits; raises Finished at the last tap where they are not needed."""
        positions_1T = torch.arange(batch.token_ids.shape[1], device=self.device)[None]
        x_BTD = self._embed(batch.token_ids, positions_1T, taps.top)
        n_layers = self.spec.n_layers
        if recurrence is None:
            x_BTD = run(x_BTD, 0, n_layers, taps)
        else:
            first, beyond = recurrence.first, recurrence.last + 1
            x_BTD = entered_BTD = run(x_BTD, 0, first, taps)
            for n in range(recurrence.depth):
                if n and recurrence.feedback:
                    x_BTD = recurrence.push(entered_BTD, batch.lengths)
                again = n < recurrence.depth - 1
                x_BTD = run(x_BTD, first, beyond, taps.unrecorded() if again else taps)
            x_BTD = run(x_BTD, beyond, n_layers, taps)
        x_BTD = norm(x_BTD, self.weights.ln_final, self.spec, taps.top, "ln_final")
        if "hook_final_norm" in taps.top:
            x_BTD = taps.top["hook_final_norm"](x_BTD)
        logits_BTV = self.unembedding.project(x_BTD)
        if "hook_logits" in taps.top:
            logits_BTV = taps.top["hook_logits"](logits_BTV)
        return logits_BTV

    @cached_property
    def hooks(self) -> ModelPoints:
        """The hook points of this model by name: `model.hooks["blocks.3.attn.hook_z"]`."""
        return ModelPoints(self.spec)

    @cached_property
    def views(self) -> WeightViews:
        """The weights under TransformerLens' names: `model.views.W_Q(3)`."""
        return WeightViews(self.spec, self.weights)

    def forward_memory(
        self, n_sequences: int, n_positions: int, hooks: HookSpec | None = None, *, logits: bool = True
    ) -> ForwardMemory:
        """Estimate the bytes that a forward would take, without running it. Raises HookError for patterns that name no
        point of this model."""
        hooks = hooks or EMPTY
        patterns = [pattern for capture in hooks.captures for pattern in capture.patterns]
        return forward_memory(
            self.spec,
            expand(patterns, self.spec.points()),
            n_sequences=n_sequences,
            n_positions=n_positions,
            dtype=self.dtype,
            logits=logits,
            n_states=len(state_positions(hooks, self.spec)),
        )

    def generate(
        self,
        prompts: str | Sequence[str] | TokenIds,
        *,
        max_new_tokens: int = 20,
        hooks: HookSpec | None = None,
        sampling: Sampling = GREEDY,
        stops: Sequence[int] | None = None,
        cache: bool | None = None,
        recurrence: Recurrence | None = None,
    ) -> list[Continuation]:
        """Continue prompts, each until one of `stops` comes (None: those of the model's tokenizer) or `max_new_tokens`
        have; greedily unless `sampling` says otherwise.

        `prompts`: texts, or token ids as `forward` takes them. Interventions of `hooks` are in force at every step, on
        the whole sequence so far, so that `at(position=-1)` is the position that is about to be continued; the sequence
        is then run anew for every token. Otherwise keys and values of the past, or recurrent states, are kept, which
        gives the same tokens; `cache` forces one of the two. `recurrence` as in `forward`.

        Raises as `forward` does, and ModelError where prompt and continuation would exceed the context, all before
        anything is computed.
        """
        batch = self.to_batch(prompts)
        stops = self._stops(stops)
        found: list[list[int]] = [[] for _ in batch.lengths]
        for step in self.stream(
            batch.rows(),
            max_new_tokens=max_new_tokens,
            hooks=hooks,
            sampling=sampling,
            stops=stops,
            cache=cache,
            recurrence=recurrence,
        ):
            for ids, token in zip(found, step, strict=True):
                ids += [] if token is None else [token]
        return [self._continuation(row, ids, stops) for row, ids in zip(batch.rows(), found, strict=True)]

    def stream(
        self,
        prompts: str | Sequence[str] | TokenIds,
        *,
        max_new_tokens: int = 20,
        hooks: HookSpec | None = None,
        sampling: Sampling = GREEDY,
        stops: Sequence[int] | None = None,
        cache: bool | None = None,
        recurrence: Recurrence | None = None,
    ) -> Iterator[Step]:
        """Continue prompts as `generate` does, giving at every step the token id that each sequence goes on with, a
        stop token included, and None for those that have ended."""
        return stream(
            self,
            self.to_batch(prompts),
            max_new_tokens=max_new_tokens,
            hooks=hooks or EMPTY,
            sampling=sampling,
            stops=self._stops(stops),
            cache=cache,
            recurrence=recurrence,
        )

    def to_batch(self, prompts: str | Sequence[str] | TokenIds) -> Batch:
        """Give texts or token ids as the batch that a forward runs on. Raises ModelError as `forward` does."""
        if isinstance(prompts, str):
            return make_batch(self.tokenizer.to_tokens(prompts), self.spec, self.device)
        if not isinstance(prompts, Tensor) and len(prompts) and all(isinstance(prompt, str) for prompt in prompts):
            return make_batch([self.tokenizer.to_tokens(str(prompt))[0] for prompt in prompts], self.spec, self.device)
        return make_batch(prompts, self.spec, self.device)  # type: ignore[arg-type]

    def _stops(self, stops: Sequence[int] | None) -> Sequence[int]:
        if stops is not None:
            return stops
        return self.tokenizer.vocabulary.stops if self.has_tokenizer else ()

    def _continuation(self, prompt: Tensor, ids: list[int], stops: Sequence[int]) -> Continuation:
        stopped_by = ids.pop() if ids and ids[-1] in stops else None
        text = self.tokenizer.to_string(ids, continues=True) if self.has_tokenizer else None
        token_ids = torch.tensor(ids, dtype=torch.int64)
        return Continuation(prompt=prompt.cpu(), token_ids=token_ids, stopped_by=stopped_by, text=text)

    def remember(self, n_sequences: int, n_positions: int) -> Past:
        """Give the past, for `extend`, of sequences of which nothing is seen yet, with room for `n_positions` each."""
        return self._blocks.past(n_sequences, n_positions)

    def extend(self, token_ids_BT: Tensor, counts: Sequence[int], past: Past) -> Tensor:
        """Run the model on tokens that follow those in `past`, which takes them in, and give the residual stream after
        the last block [sequence, position, d_model]: for `generate`. Nothing is hooked and nothing checked.

        The first `counts[i]` of row i are meant, what follows is padding, which the tokens of the next call overwrite.
        """
        x_BTD = self._embed(token_ids_BT, past.positions(token_ids_BT.shape[1], self.device), {})
        run = self._blocks.follow(past, counts, token_ids_BT.shape[1])
        return run(x_BTD, 0, self.spec.n_layers, None)

    @cached_property
    def _blocks(self) -> Blocks:
        weights = self.weights
        if self.spec.rwkv is None:
            return TransformerBlocks(self.spec, weights.blocks, self.device, self.dtype, self.compiled)
        return RwkvBlocks(self.spec, weights.rwkv_blocks, self.device, self.dtype)

    def _embed(self, token_ids_BT: Tensor, positions_bT: Tensor, top: At) -> Tensor:
        x_BTD = F.embedding(token_ids_BT, self.weights.embed)
        if self.spec.embed_scale != 1.0:
            x_BTD = x_BTD * torch.tensor(self.spec.embed_scale, dtype=self.dtype)  # rounded as transformers rounds it
        if torch.is_grad_enabled():
            x_BTD.requires_grad_()  # weights require none: this is where the graph begins
        if self.weights.embed_ln is not None:
            x_BTD = norm(x_BTD, self.weights.embed_ln, self.spec, top, "embed.ln")
        if "hook_embed" in top:
            x_BTD = top["hook_embed"](x_BTD)
        if self.weights.pos_embed is not None:
            where_BTD = F.embedding(positions_bT, self.weights.pos_embed)
            if "hook_pos_embed" in top:
                where_BTD = top["hook_pos_embed"](where_BTD.expand_as(x_BTD))
            x_BTD = x_BTD + where_BTD
        return x_BTD
