"""Prompts as analyses take them, texts or token ids, and the labels that their positions get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.batch import Batch, TokenIds
from ..models.model import Model

Prompt: TypeAlias = str | Sequence[int] | Tensor
"""One text, or the token ids of one: [position] or [1, position]."""
Prompts: TypeAlias = str | Sequence[str] | TokenIds
"""Texts, or token ids as `Model.forward` takes them."""


def one_prompt(model: Model, prompt: Prompt) -> Tensor:
    """The token ids [position] of one prompt, int64 on the CPU. SchemaError for several, and as `Model.forward`
    raises.
    """
    many: Prompts = prompt  # type: ignore[assignment]
    if isinstance(prompt, Tensor):
        many = prompt[None] if prompt.dim() == 1 else prompt
    elif not isinstance(prompt, str) and all(isinstance(one, int | np.integer) for one in prompt):
        many = [[int(one) for one in prompt]]
    batch = model.to_batch(many)
    if len(batch.lengths) != 1:
        raise SchemaError(f"one prompt is expected here, not {len(batch.lengths)}: give them one after the other")
    return batch.token_ids[0].cpu()


def many_prompts(model: Model, prompts: Prompts) -> Batch:
    """Prompts as a batch on the CPU. Raises as `Model.forward` does."""
    batch = model.to_batch(prompts)
    return Batch(token_ids=batch.token_ids.cpu(), lengths=batch.lengths)


def position_coords(model: Model, token_ids: Tensor, dim: str = "position") -> dict[str, tuple[str, object]]:
    """The coordinates of the positions of one sequence [position], counted from 0: `dim` itself, `token_id` (int64)
    and, where the model has a tokenizer, `token_text`, the text of each token. With another `dim`, such as `key`, its
    name stands before theirs: `key_token_text`.
    """
    prefix = "" if dim == "position" else f"{dim}_"
    coords: dict[str, tuple[str, object]] = {
        dim: (dim, np.arange(len(token_ids))),
        f"{prefix}token_id": (dim, token_ids.cpu().numpy().astype(np.int64)),
    }
    if model.has_tokenizer:
        coords[f"{prefix}token_text"] = (dim, np.array(model.tokenizer.to_str_tokens(token_ids.cpu()), dtype=object))
    return coords


def text_of(model: Model, token_ids: Sequence[int]) -> list[str] | None:
    """The text of single tokens, in no order that matters; None where the model has no tokenizer."""
    return [model.tokenizer.to_string([one]) for one in token_ids] if model.has_tokenizer else None
