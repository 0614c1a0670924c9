"""What a run's tree can do beside holding data: `run.batches(…)`, `run.features(…)`, `run.to_str_tokens(…)`, and with
all that is selected from it `.forebay.text()`. Importing this module registers them with xarray.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import xarray as xr
from numpy.typing import NDArray

from ..stores.batches import Batches
from ..stores.errors import SchemaError, nearest
from ..stores.feature_rows import KIND, groups_of
from ..stores.features import Features
from ..stores.html import html_table
from ..stores.places import Place, place
from ..stores.store import Store
from ..stores.tree import run_stores
from .models.points import HookPoint
from .token_text import Decoder, decoder_of


@xr.register_datatree_accessor("batches")  # type: ignore[no-untyped-call]
class BatchesAccessor:
    """`run.batches("blocks.15.hook_resid_post", batch=4096, seed=0)`: minibatches of a run's activations, shuffled.

    Called with the name of a hook point, or a list of several, and the settings of `Batches`, which it gives. Raises
    HookError for a name that is no hook point, and what `Batches` raises.
    """

    def __init__(self, tree: xr.DataTree) -> None:
        self._tree = tree

    def __call__(self, hooks: str | Sequence[str], **settings: Any) -> Batches:
        run = _run_of(self._tree, "batches")
        names = (hooks,) if isinstance(hooks, str) else hooks
        found = tuple(str(HookPoint.parse(name)) for name in names)
        return Batches(run=run, hooks=found[0] if isinstance(hooks, str) else found, **settings)


def _run_of(tree: xr.DataTree, what: str) -> Place:
    """The folder of a tree's run. SchemaError where it has none, or several."""
    if several := tree.encoding.get("sources"):
        raise SchemaError(
            f"{what} are asked of one run, and this tree is of several runs: ask {several[0]} and the others one by "
            "one, or write them into one with `forebay concat`"
        )
    if "source" not in tree.encoding:
        raise SchemaError(f"this tree does not say where its run lies: ask for {what} of what `open_run` gives")
    return place(tree.encoding["source"])


@xr.register_datatree_accessor("features")  # type: ignore[no-untyped-call]
class FeaturesAccessor:
    """`run.features("sae")`: the sparse features of one dictionary, with the run's tokens and their text.

    Called with the name of a dictionary, as `names` lists them: "sae", or "clt/layer_3" of a step with several. What a
    call has opened is given again. Raises SchemaError with the names there are for another one, and what
    `Features.open` raises.
    """

    def __init__(self, tree: xr.DataTree) -> None:
        self._tree = tree
        self._opened: dict[str, Features] = {}

    @cached_property
    def _run(self) -> Place:
        return _run_of(self._tree, "features")

    @cached_property
    def _stores(self) -> dict[str, Store]:
        """Names of dictionaries → the stores that hold their features."""
        stores = [store for store in run_stores(self._run) if store.schema.kind == KIND]
        return {group: store for store in stores for group in groups_of(store)}

    @property
    def names(self) -> list[str]:
        """The dictionaries whose features the run holds."""
        return list(self._stores)

    def __call__(self, name: str) -> Features:
        if name not in self._stores:
            held = (
                f"It holds {', '.join(self.names)}" if self.names else "It holds none: add [encode.NAME] to its recipe"
            )
            raise SchemaError(f"{self._run} holds no features {name!r}.{nearest(name, self.names)} {held}")
        if name not in self._opened:
            tokens = next((store for store in run_stores(self._run) if store.schema.kind == "tokens"), None)
            path = self._run / "tokenizer.json"
            decode = Decoder(path) if path.is_file() else None
            self._opened[name] = Features.open(self._stores[name], name, tokens, decode)
        return self._opened[name]

    def __repr__(self) -> str:
        return f"features of {self._run}: {', '.join(self.names) or 'none'}"

    def _repr_html_(self) -> str:
        rows = [(name, store.schema.kind, f"{store.schema.n_token:,}") for name, store in self._stores.items()]
        return html_table("Features", {"run": self._run}, ("dictionary", "kind", "tokens"), rows)


@xr.register_datatree_accessor("to_str_tokens")  # type: ignore[no-untyped-call]
class StrTokensAccessor:
    """`run.to_str_tokens([504, 3575])`: the text of each token, by the tokenizer that the run keeps; without the model.

    Raises SchemaError for a run that keeps none.
    """

    def __init__(self, tree: xr.DataTree) -> None:
        self._tree = tree

    def __call__(self, token_ids: Sequence[int] | NDArray[Any]) -> list[str]:
        source = self._tree.encoding.get("source")
        if source is None:
            raise SchemaError("token ids become text by a run's tokenizer.json, and this tree has none")
        return decoder_of(place(source))([[int(one)] for one in token_ids])
