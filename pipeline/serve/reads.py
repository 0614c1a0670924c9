"""What the live page reads of a run, when it is asked for: the report's own functions, over a few things each."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from threading import Lock
from typing import Any, TypeVar

import xarray as xr

from ...stages.accessors import FeaturesAccessor
from ...stores.errors import ForebayError, nearest
from ...stores.features import Features
from ...stores.places import Place
from ...stores.tree import open_run, run_stores
from ..page.features import about, details, rows
from ..page.logits import AtHand, LogitEffects, at_hand
from ..page.norms import norms
from ..page.overview import overview
from ..page.report import told
from ..page.sequences import attention, lens, sequences
from ..page.values import TokenSet, absent
from ..report.printable import printable
from .listing import Order, Words, ordered, searchable, words_of
from .refusal import Refused

MOST_ROWS = 200
"""Features, or sequences, of one answer."""
MOST_KEPT = 64
"""Orders, words and statistics that are remembered."""

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """A run as it was when it was opened: its tree, and what has been worked out of it since."""

    run: xr.DataTree
    folder: Place
    fetch: bool
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made when it is first asked for."""
        if key not in self.kept:
            if len(self.kept) >= MOST_KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    @cached_property
    def known(self) -> AtHand:
        return at_hand(self.folder, self.run, self.fetch)

    @cached_property
    def effects(self) -> LogitEffects:
        return LogitEffects(self.known)

    @cached_property
    def features(self) -> FeaturesAccessor:
        return FeaturesAccessor(self.run)

    def dictionary(self, name: str) -> Features:
        """The features of a dictionary. Refused for a name that is not there."""
        if name not in self.features.names:
            names = self.features.names
            raise Refused(404, f"the run has no dictionary {name!r}.{nearest(name, names)} It has: {', '.join(names)}")
        return self.features(name)

    def statistics(self, found: Features) -> xr.Dataset:
        """A number a feature, in memory: some forty bytes a feature. Histograms stay where they are."""
        columns = found.statistics().drop_vars(["histogram", "histogram_edge"])
        return self.once(("statistics", found.name, found.index.made), columns.compute)

    def words(self, found: Features) -> Words:
        return self.once(("words", found.name, found.index.made), lambda: words_of(found))


@dataclass
class Reads:
    """Answers about a run, each a JSON value that says what was asked for and nothing else.

    Stores are read by one at a time. A run that goes on is opened again when units were recorded since.
    """

    folder: Place
    tokens: int = 10_000
    fetch: bool = False
    _lock: Lock = field(default_factory=Lock, repr=False)
    _opened: tuple[Hashable, Opened] | None = field(default=None, repr=False)

    def start(self) -> dict[str, Any]:
        """What the page itself holds."""
        return {
            "name": printable(self.folder.resolve().name, most=200),
            "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "forebay": version("forebay"),
            "live": True,
            "texts": {},
        }

    def warm(self) -> None:
        """Opens the run, and loads the libraries that reading takes, before anybody waits for them. Reads no data.
        What is wrong with the run is told when something of it is asked for.
        """
        with suppress(ForebayError, OSError), self._lock:
            import torch  # noqa: F401  which takes longer than everything else

            self._open()

    def overview(self) -> dict[str, Any]:
        """Read anew each time: ledgers and headers, no data."""
        return overview(self.folder)

    def norms(self) -> dict[str, Any]:
        """Of the first tokens; worked out once."""

        def read(opened: Opened, tokens: TokenSet) -> dict[str, Any]:
            found, named = opened.once("norms", lambda: self._norms(opened))
            tokens.ids |= named.ids
            return found

        return self._answer(read)

    def _norms(self, opened: Opened) -> tuple[dict[str, Any], TokenSet]:
        tokens = TokenSet()
        return told(lambda: norms(self.folder, opened.run, tokens, self.tokens)), tokens

    def sequences(self, offset: int, limit: int) -> dict[str, Any]:
        """Some sequences with their first tokens."""

        def read(opened: Opened, tokens: TokenSet) -> dict[str, Any]:
            total = int(opened.run["sequences"].sizes["sequence"])
            chosen = range(min(offset, total), min(offset + limit, total))
            return {"total": total, "offset": offset, "shown": sequences(opened.run, tokens, chosen)}

        return self._answer(read)

    def lens(self, sequence: int) -> dict[str, Any]:
        """The logit lens of one sequence."""

        def read(opened: Opened, tokens: TokenSet) -> dict[str, Any]:
            chosen = [_there(opened, sequence)]
            return told(lambda: lens(opened.run, tokens, chosen, opened.known))

        return self._answer(read)

    def attention(self, sequence: int, layer: int) -> dict[str, Any]:
        """The heads of one layer, by its place among those that are kept, over one sequence."""

        def read(opened: Opened, tokens: TokenSet) -> dict[str, Any]:
            at, chosen = slice(layer, layer + 1), [_there(opened, sequence)]
            return told(lambda: attention(self.folder, opened.run, tokens, chosen, at))

        return self._answer(read)

    def dictionaries(self) -> dict[str, Any]:
        """The names of the run's dictionaries, or why it has none."""
        names = self._answer(lambda opened, _: {"names": opened.features.names})["names"]
        return {"shown": [{"name": name} for name in names]} if names else absent("The run keeps no features.")

    def dictionary(self, name: str) -> dict[str, Any]:
        """What a dictionary is and how often its features fire."""

        def read(opened: Opened, tokens: TokenSet) -> dict[str, Any]:
            found = opened.dictionary(name)
            key = ("about", name, found.index.made)
            made = opened.once(key, lambda: about(found, opened.statistics(found)))
            return {"name": name, **made, "searched": "numbers and texts" if searchable(found) else "numbers"}

        return self._answer(read)

    def features(
        self, name: str, order: Order, descending: bool, search: str, offset: int, limit: int
    ) -> dict[str, Any]:
        """Some features of a dictionary, in an order, of those that a search finds."""

        def read(opened: Opened, tokens: TokenSet) -> dict[str, Any]:
            found = opened.dictionary(name)
            statistics = opened.statistics(found)
            key = ("order", name, found.index.made, order, descending)
            every = opened.once(key, lambda: ordered(statistics, order, descending))
            chosen = opened.words(found).among(every, search) if search else every
            page = chosen[offset : offset + limit].tolist()
            return {"total": len(chosen), "offset": offset, "shown": rows(statistics, page) if page else []}

        return self._answer(read)

    def feature(self, name: str, feature: int) -> dict[str, Any]:
        """All that is told of one feature."""

        def read(opened: Opened, tokens: TokenSet) -> dict[str, Any]:
            found = opened.dictionary(name)
            if not 0 <= feature < found.n_feature:
                raise Refused(
                    404, f"{name} has no feature {feature}: they are numbered from 0 to {found.n_feature - 1}"
                )
            [one] = details(found, found.statistics(), [feature], tokens)
            return {**one, **opened.effects.of(found, [feature], tokens)}

        return self._answer(read)

    def numbers(self, name: str) -> tuple[Features, xr.Dataset]:
        """A dictionary's features, and a number a feature."""
        with self._lock:
            opened = self._open()
            found = opened.dictionary(name)
            return found, opened.statistics(found)

    def _answer(self, read: Callable[[Opened, TokenSet], dict[str, Any]]) -> dict[str, Any]:
        tokens = TokenSet()
        with self._lock:
            found = read(self._open(), tokens)
        return {**found, "texts": tokens.texts(self.folder)}

    def _open(self) -> Opened:
        state = tuple((store.name, store.fingerprint, len(store.done())) for store in run_stores(self.folder))
        if self._opened is None or self._opened[0] != state:
            self._opened = state, Opened(open_run(self.folder, partial=True), self.folder, self.fetch)
        return self._opened[1]


def _there(opened: Opened, sequence: int) -> int:
    total = int(opened.run["sequences"].sizes["sequence"])
    if not 0 <= sequence < total:
        raise Refused(404, f"the run has no sequence {sequence}: they are numbered from 0 to {total - 1}")
    return sequence
