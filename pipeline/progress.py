"""What a run says while it works: a live line on a terminal, plain lines in a batch job, nothing in a notebook."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

from ..stores.grid import Unit
from ..stores.ledger import Record
from ..stores.places import Place
from .report.printable import printable

RATE_WIDTH = 22
"""Columns of "tokens  1,234,567/s", and a few."""


class Progress(ABC):
    """Hears of a run's events. Used as a context for the length of the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def said(self, text: str) -> None:
        """Something that a person who waits will want to know."""
        return None

    @abstractmethod
    def counted(self, documents: int, characters: int) -> None:
        """A block of the corpus has been counted."""

    @abstractmethod
    def start(self, step: str, n_token: int, done: int) -> None:
        """A step begins: tokens in all, and tokens recorded by earlier runs."""

    @abstractmethod
    def advance(self, tokens: int) -> None:
        """Tokens were computed."""

    @abstractmethod
    def recorded(self, unit: Unit, record: Record) -> None:
        """A unit is on disk and recorded."""

    @abstractmethod
    def failed(self, unit: Unit, error: BaseException, path: Place) -> None:
        """A unit failed; its traceback stands in a record at `path`."""

    @abstractmethod
    def working(self, what: str, done: int, total: int, said: str) -> None:
        """Work that is not cut into units: `done` of `total` of `what`, and what there is to say of it."""


class Quiet(Progress):
    """Says nothing."""

    def counted(self, documents: int, characters: int) -> None: ...
    def start(self, step: str, n_token: int, done: int) -> None: ...
    def advance(self, tokens: int) -> None: ...
    def recorded(self, unit: Unit, record: Record) -> None: ...
    def failed(self, unit: Unit, error: BaseException, path: Place) -> None: ...
    def working(self, what: str, done: int, total: int, said: str) -> None: ...


class Rate:
    """Tokens a second since a step began, tokens of earlier runs left out."""

    def __init__(self, n_token: int, done: int) -> None:
        self.n_token, self.done, self.fresh, self.started = n_token, done, 0, time.monotonic()

    @property
    def per_second(self) -> float:
        return self.fresh / max(1e-9, time.monotonic() - self.started)

    @property
    def left(self) -> float | None:
        """Seconds to the end at this rate; None before the first token."""
        return (self.n_token - self.done - self.fresh) / self.per_second if self.fresh else None


class Lines(Progress):
    """One plain line a unit, and one every half minute between them: for logs of batch jobs."""

    every = 30.0
    between = 10.0

    def __init__(self, console: Console) -> None:
        self.console, self.step, self.rate, self.spoke = console, "", Rate(0, 0), time.monotonic()

    def said(self, text: str) -> None:
        self._say(text)

    def counted(self, documents: int, characters: int) -> None:
        self._say(f"corpus: counted {documents:,} documents, {characters:,} characters")

    def start(self, step: str, n_token: int, done: int) -> None:
        self.step, self.rate = step, Rate(n_token, done)
        self._say(f"{step}: {done:,} of {n_token:,} tokens are done" + (", nothing to do" if done == n_token else ""))

    def advance(self, tokens: int) -> None:
        self.rate.fresh += tokens
        if time.monotonic() - self.spoke > self.every:
            self._say(self._state())

    def recorded(self, unit: Unit, record: Record) -> None:
        self._say(
            f"{self._state()}; unit {unit.index} recorded, {record['bytes']:,} bytes in "
            f"{record['seconds']['write']:.1f} s"
        )

    def failed(self, unit: Unit, error: BaseException, path: Place) -> None:
        self._say(f"{self.step}: unit {unit.index} FAILED: {printable(error)} (traceback in {path})")

    def working(self, what: str, done: int, total: int, said: str) -> None:
        if done >= total or time.monotonic() - self.spoke > self.between:
            self._say(f"{what}: {done:,} of {total:,}" + (f", {said}" if said else ""))

    def _state(self) -> str:
        left = self.rate.left
        eta = "" if left is None else f", {duration(left)} left"
        done, speed = self.rate.done + self.rate.fresh, self.rate.per_second
        return f"{self.step}: {done:,} of {self.rate.n_token:,} tokens, {speed:,.0f} tokens/s{eta}"

    def _say(self, text: str) -> None:
        self.spoke = time.monotonic()
        self.console.print(printable(text, lines=True), highlight=False, markup=False, soft_wrap=True)


class Terminal(Progress):
    """A live bar a step with rate and time left."""

    def __init__(self, console: Console) -> None:
        self.bars = Bars(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            # As wide as most of what it says, so that the bar beside it keeps its length.
            TextColumn("{task.fields[rate]}", markup=False, table_column=Column(no_wrap=True, min_width=RATE_WIDTH)),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.task: TaskID | None = None
        self.works: dict[str, TaskID] = {}
        self.counting: TaskID | None = None
        self.rate = Rate(0, 0)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def said(self, text: str) -> None:
        self.bars.console.print(printable(text, lines=True), highlight=False, markup=False)

    def counted(self, documents: int, characters: int) -> None:
        if self.counting is None:
            self.counting = self.bars.add_task("corpus", total=None, rate="")
        self.bars.advance(self.counting, characters)
        self.bars.update(self.counting, rate="counted (characters)")

    def start(self, step: str, n_token: int, done: int) -> None:
        if self.counting is not None:
            self.bars.remove_task(self.counting)
            self.counting = None
        self.rate = Rate(n_token, done)
        self.task = self.bars.add_task(step, total=n_token, completed=done, rate="tokens")

    def advance(self, tokens: int) -> None:
        assert self.task is not None
        self.rate.fresh += tokens
        self.bars.update(self.task, advance=tokens, rate=f"tokens  {self.rate.per_second:,.0f}/s")

    def recorded(self, unit: Unit, record: Record) -> None: ...

    def failed(self, unit: Unit, error: BaseException, path: Place) -> None:
        self.bars.console.print(
            f"unit {unit.index} FAILED: {printable(error)} (traceback in {path})", highlight=False, markup=False
        )

    def working(self, what: str, done: int, total: int, said: str) -> None:
        if what not in self.works:
            self.works[what] = self.bars.add_task(what, total=total, rate="")
        self.bars.update(self.works[what], completed=done, total=total, rate=said)


def progress_for(console: Console) -> Progress:
    """A live bar where there is a terminal that can move its cursor, plain lines elsewhere: in files and pipes, also
    where colours are asked for (FORCE_COLOR), and on a dumb terminal.
    """
    return Terminal(console) if console.is_interactive and console.file.isatty() else Lines(console)


def duration(seconds: float) -> str:
    """Seconds as a person says them: '45 s', '3 min 20 s', '2 h 05 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
