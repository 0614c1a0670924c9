"""The dataset card of a run that is pushed: what it is and how to open it. What comes from the run is text in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

import yaml

from ...stores.store import Store
from ..report.printable import printable
from .contents import Contents

MARK = "<!-- This card was written by `forebay push`, which writes it anew. Without this line it is left alone. -->"
MOST_CELL, MOST_ARRAYS = 200, 6

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$:@-])")
_PLAIN = re.compile(r"[^\w .-]")
"""What a name loses that is shown by pages which are not ours."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def card(found: Contents, repository: str) -> str:
    """The card's text: front matter in YAML, then Markdown."""
    recipe = found.recipe.get("recipe")
    recipe = recipe if isinstance(recipe, Mapping) else {}
    model, name = _model(recipe), repository.rpartition("/")[2]
    about: dict[str, Any] = {
        "library_name": "forebay",
        "pretty_name": _PLAIN.sub(" ", str(recipe.get("name") or name)[:MOST_CELL]),
        "tags": ["forebay", "activations", "interpretability", "zarr"],
        "viewer": False,
    }
    if _HUB_ID.fullmatch(model):
        about["base_model"] = model
    rows = [[*_row(store), _bytes(found, store.name)] for store in found.stores]
    lines = [
        "---",
        yaml.safe_dump(about, sort_keys=True, allow_unicode=False).rstrip(),
        "---",
        MARK,
        "",
        f"# {_text(about['pretty_name'])}",
        "",
        f"A run of forebay: what {_text(model) or 'a language model'} computes inside, over a corpus, with labels. "
        f"{found.nbytes:,} bytes in {len(found.files):,} files.",
        "",
        "| step | kind | tokens | arrays | bytes |",
        "|---|---|---:|---|---:|",
        *("| " + " | ".join(map(_text, row)) + " |" for row in rows),
        "",
        "```python",
        "import forebay",
        "",
        f'pulled = forebay.from_hub("{repository}", "runs/{name}")',
        "run = forebay.open_run(pulled.folder)",
        "```",
        "",
        f"On the command line: `forebay pull {repository} runs/{name}`. Every object is checked against the run's own",
        "records as it comes. The stores are Zarr v3, which `xarray.open_zarr` opens without forebay too.",
        "",
    ]
    return "\n".join(lines)


def is_ours(text: str) -> bool:
    """Whether a card was written here, and nobody has taken it over."""
    return MARK in text


def _model(recipe: Mapping[str, Any]) -> str:
    """The model by its hub id; of a folder or a file of somebody's machine, its last part."""
    model = recipe.get("model")
    source = str(model.get("source", "")) if isinstance(model, Mapping) else ""
    return source if _HUB_ID.fullmatch(source) else re.split(r"[\\/]", source.rstrip("\\/"))[-1]


def _row(store: Store) -> list[str]:
    """Name, kind, tokens and arrays of a step."""
    arrays = store.schema.arrays
    shown = [f"{path} {list(array.shape)} {array.dtype}" for path, array in list(arrays.items())[:MOST_ARRAYS]]
    more = f" and {len(arrays) - MOST_ARRAYS} more" if len(arrays) > MOST_ARRAYS else ""
    return [store.name, store.schema.kind, f"{store.schema.n_token:,}", ", ".join(shown) + more]


def _bytes(found: Contents, step: str) -> str:
    return f"{sum(size for path, size in found.files.items() if path.startswith(f'{step}/')):,}"


def _text(value: str) -> str:
    """A text as Markdown that shows it and does nothing: no markup, no link, no line of its own."""
    return escape(_MARKDOWN.sub(r"\\\1", printable(value, most=MOST_CELL)), quote=False)
