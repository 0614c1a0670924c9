"""Plans, states and outcomes as rich tables and plain words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..progress import duration
from .printable import printable
from .status import StepStatus, Worker

if TYPE_CHECKING:
    import xarray as xr

    from ...stages.models.spec import ModelSpec
    from ..run import Outcome
    from .features import FeatureReport

WIDE = 200
"""Columns of a table that goes into a file or a pipe, where there is no edge to wrap at."""
MOST_WORKERS = 8
"""Workers that are named in one line."""


def size(nbytes: float) -> str:
    """Bytes as a person reads them, in powers of 1000: '1.3 GB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.3g} PB"


def status_table(steps: Iterable[StepStatus]) -> RenderableType:
    """One row a step; below it who is at work, the units that failed with their errors, and records that cannot be
    read.
    """
    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("step", "left"),
        ("units", "right"),
        ("tokens", "right"),
        ("size", "right"),
        ("tokens/s", "right"),
        ("left", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    lines = []
    for step in steps:
        table.add_row(
            Text(printable(step.name)),
            f"{step.units_done}/{step.units}",
            f"{step.tokens_done:,}/{step.n_token:,}",
            size(step.nbytes),
            f"{step.tokens_per_second:,.0f}" if step.tokens_per_second else "–",
            "done" if step.left == 0 else "?" if step.left is None else duration(step.left),
        )
        lines += [f"{step.name}: {line}" for line in _below(step)]
    return Group(table, *(Text(printable(line), overflow="fold") for line in lines))


def _below(step: StepStatus) -> Iterator[str]:
    """What is to be said of a step beside its row."""
    if step.workers and step.left != 0:
        yield _at_work(step.workers)
    for failure in step.failures:
        times = "failed" if failure.attempts == 1 else f"failed {failure.attempts} times"
        yield f"unit {failure.unit} {times}: {failure.error} (traceback in {failure.record})"
    if len(step.failed) > len(step.failures):
        yield f"{len(step.failed) - len(step.failures):,} more units have failed"
    yield from step.unreadable


def _at_work(workers: Sequence[Worker]) -> str:
    now = time.time()
    live = [worker for worker in workers if worker.live]
    if not live:
        return f"nobody is at work: {workers[0].name} was seen last, {_ago(now - workers[0].last_seen)}"
    said = [f"{one.name} ({one.units} units, {_ago(now - one.last_seen)})" for one in live[:MOST_WORKERS]]
    more = f" and {len(live) - MOST_WORKERS} more" if len(live) > MOST_WORKERS else ""
    return f"{len(live)} at work: {', '.join(said)}{more}"


def _ago(seconds: float) -> str:
    return f"{duration(max(0.0, seconds))} ago"


def lens_table(lens: xr.Dataset, decode: Mapping[int, str]) -> RenderableType:
    """The logit lens: a row a token, two columns a layer (top token with its probability, rank of the next token)."""
    layers = lens["layer"].values if "layer" in lens.dims else [None]
    lens = lens if "layer" in lens.dims else lens.expand_dims("layer")
    table = Table(box=None, pad_edge=False)
    for name in ("seq", "pos", "token"):
        table.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
    for layer in layers:
        table.add_column("lens" if layer is None else f"layer {layer}", no_wrap=True)
        table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("next", no_wrap=True)
    for i in range(lens.sizes["token"]):
        row = lens.isel(token=i)
        cells = [str(int(row["sequence"])), str(int(row["position"])), show(decode, int(row["token_id"]))]
        for j in range(len(layers)):
            top = row["top_token_id"].values[j, 0], row["top_probability"].values[j, 0]
            rank = row["next_rank"].values[j]
            cells += ["–" if top[0] < 0 else f"{show(decode, int(top[0]))} {top[1]:.0%}"]
            cells += ["–" if rank != rank else f"{int(rank)}"]
        following = int(row["next_token_id"])
        cells += ["–" if following < 0 else show(decode, following)]
        table.add_row(*map(Text, cells))
    return table


def features_text(report: FeatureReport) -> RenderableType:
    """Fit and counts of a dictionary in one line, then a table of each feature's strongest contexts."""
    fit, statistics = report.fit, report.statistics
    skipped = fit.attrs["skip_positions"]
    lines = [
        f"{report.name}: L0 {float(fit['l0']):.1f}, FVU {float(fit['fvu']):.3f}, cosine {float(fit['cosine']):.3f} "
        f"over {int(fit['n_token']):,} tokens (FVU and cosine: {int(fit['n_fit']):,}), the first {skipped} of every "
        "sequence left out",
        f"{statistics.sizes['feature']:,} features, {int(statistics['dead'].sum()):,} dead, "
        f"{int(statistics['dense'].sum()):,} dense",
    ]
    tables = [_contexts_table(report, feature) for feature in report.contexts["feature"].values.tolist()]
    return Group(*(Text(printable(line)) for line in lines), *tables)


def _contexts_table(report: FeatureReport, feature: int) -> Table:
    own = report.statistics.sel(feature=feature)
    title = f"\nfeature {feature}: fires at {float(own['firing_rate']):.3%} of tokens, up to {float(own['max']):.1f}"
    table = Table(box=None, pad_edge=False, title=Text(title), title_justify="left", show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    contexts = report.contexts.sel(feature=feature)
    for i in range(contexts.sizes["context"]):
        row = contexts.isel(context=i)
        if int(row["token"]) >= 0:
            before, token, after = (printable(str(row[name].values)) for name in ("text_before", "text", "text_after"))
            table.add_row(f"{float(row['value']):.1f}", Text.assemble(before, (f"[{token}]", "bold"), after))
    return table


def show(decode: Mapping[int, str], token_id: int) -> str:
    """A token's text, safe for a terminal: control characters escaped, spaces visible."""
    return printable(decode[token_id].replace(" ", "·"))


def console(err: bool = False) -> Console:
    """The console of standard output (or error): colours and live bars only where there is a terminal."""
    found = Console(stderr=err)
    return found if found.is_terminal else Console(stderr=err, width=WIDE)


def hooks_table(spec: ModelSpec, patterns: Sequence[str]) -> RenderableType:
    """One row a kind of hook point: its name, the layers that have it, and the shape of a capture."""
    from ...stages.models.points import expand

    chosen = expand(patterns, spec.points()) if patterns else spec.points()
    layers: dict[str, list[int]] = {}
    for point in chosen:
        layers.setdefault(point.kind, []).extend([] if point.layer is None else [point.layer])
    table = Table(box=None, pad_edge=False)
    table.add_column("hook point", no_wrap=True)
    table.add_column("layers")
    table.add_column("one forward's capture")
    for point in {point.kind: point for point in chosen}.values():
        shape = ", ".join(f"{dim} {spec.sizes[dim]}" if dim in spec.sizes else dim for dim in point.dims)
        name = point.kind if point.layer is None else f"blocks.N.{point.kind}"
        table.add_row(name, _ranges(layers[point.kind]), f"[{shape}]".replace("[", "\\["))
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order as ranges: '0-3, 7'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts) or "–"


def outcome_text(outcome: Outcome) -> str:
    """What a run did, and the lines of Python that open it."""
    lines = []
    for step in outcome.steps:
        if step.tokens:
            rate = step.tokens / max(step.seconds, 1e-9)
            lines.append(
                f"{step.name}: {step.tokens:,} tokens, {size(step.nbytes)} in {duration(step.seconds)} ({rate:,.0f} "
                "tokens/s)"
            )
        elif not step.left:
            lines.append(f"{step.name}: {step.n_token:,} tokens, all of it was done before")
        elif not step.failed:
            lines.append(f"{step.name}: stopped before the first unit was recorded")
        lines += [f"{step.name}: unit {unit} failed, its traceback is in {path}" for unit, path in step.failed.items()]
    if any(step.failed for step in outcome.steps):
        return "\n".join(
            [*lines, "Some units failed. What is recorded is safe; running again tries the failed ones again."]
        )
    if outcome.interrupted:
        return "\n".join(
            [*lines, "Stopped before the end. What is recorded is safe; run the same command again to go on."]
        )
    path = str(outcome.folder)
    return "\n".join(
        [
            *lines,
            f"The store is in {path}. Open it with",
            "",
            "    import forebay",
            f"    run = forebay.open_run({path!r})",
            *(
                ['    run["activations"]']
                if any(step.name == "activations" for step in outcome.steps)
                else ['    run["tokens"]']
            ),
        ]
    )
