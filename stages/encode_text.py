"""One text into features, the way that the steps of a run take: its tokens, their activations, what they encode to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..stores.dtypes import format_of
from ..stores.feature_rows import Rows
from ..stores.schema import Schema
from .capture import Capture
from .encode import Encode
from .models.checkpoint import Tokenizer
from .storing import Dtype, cast, on_host
from .tokenize import Rules, Tokenize

if TYPE_CHECKING:
    import torch

    from .dictionaries.encoding import SiteEncoding
    from .dictionaries.sites import Site
    from .models.model import Model
    from .models.points import HookPoint


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Encodes texts with one dictionary of a run. `store_dtype` is the one in which activations are kept on their way;
    None where they go behind the forward as they are.
    """

    tokenizer: Tokenizer
    rules: Rules
    model: Model
    encoding: SiteEncoding
    store_dtype: Dtype | None

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text as one sequence of the run: behind its beginning-of-sequence token, if it has such, and
        without a separator.
        """
        return [*self.rules.bos, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def __call__(self, token_ids: list[int]) -> Rows:
        """The features of each token of a sequence, in the order and dtype in which a run keeps them.

        SchemaError where activations are not finite, or do not fit the dtype in which the run keeps them; what the
        model's forward raises.
        """
        from .dictionaries.encoding import pieces_of
        from .models.taps import HookSpec

        site, n = self.encoding.site, len(token_ids)
        activations: dict[str, torch.Tensor] = {}

        def sink(point: HookPoint, tensor: torch.Tensor) -> None:
            activations[str(point)] = self._kept(tensor[0], str(point))

        self.model.forward([token_ids], HookSpec().capture(site.hook), logits=False, sink=sink)
        labels = {"sequences/start": (("sequence",), np.zeros(1, np.int64))}
        alone = Schema(kind="features", n_token=n, unit_tokens=n, arrays={}, labels=labels)
        [piece] = pieces_of((self.encoding,), activations, np.arange(n), alone)
        found = piece[site.group].to_dataset()
        values = format_of(self.encoding.store_dtype).decode(found["value"].values)
        feature: NDArray[np.int32] = found["feature"].values
        if site.rank is None:
            return Rows(found["count"].values.astype(np.int64), feature, values)
        fires = feature >= 0
        return Rows(fires.sum(axis=1, dtype=np.int64), feature[fires], values[fires])

    def _kept(self, tensor: torch.Tensor, hook: str) -> torch.Tensor:
        """Activations as they come back from a store."""
        import torch

        if self.store_dtype is None:
            return tensor
        kept = on_host(cast(tensor, self.store_dtype, hook, "capture's store_dtype"))
        return torch.from_numpy(format_of(self.store_dtype).decode(kept))


def load_text_encoder(
    tokenize: Tokenize, capture: Capture | None, encode: Encode, site: Site, device: str
) -> TextEncoder:
    """The encoder of `site`, one of `encode.sites`, with its model: in the dtype of `capture`, the step that keeps what
    the dictionary reads, or of `encode` where it runs the model itself. May take minutes, and network where model or
    dictionary are on a hub. Raises ModelError, DictionaryError, SchemaError.
    """
    from .dictionaries.encoding import load_encoding
    from .models.load import load_model

    source, checkpoint = encode.model, encode.model.open()
    dtype = encode.model_dtype if capture is None else capture.dtype
    return TextEncoder(
        tokenizer=tokenize.tokenizer(checkpoint),
        rules=tokenize.rules(checkpoint),
        model=load_model(source.source, revision=source.revision, device=device, dtype=dtype),
        encoding=replace(load_encoding(encode, site, device), fit_every=0),
        store_dtype=None if capture is None else capture.store_dtype,
    )
