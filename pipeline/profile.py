"""What a run costs, measured: seconds, bytes and memory of its steps, as plain values in a JSON file.

A profile comes from a measured minute (`measuring.py`) or from the records of a run. It says of what model, settings
and device it is, and is refused for any other.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..stores.errors import FingerprintMismatch, SchemaError, StoreNotFound
from ..stores.fingerprint import differences, versions, whereabouts
from ..stores.ledger import Ledger, Record, read_json, write_atomic
from ..stores.object_paths import ObjectPath
from ..stores.places import Place, names
from ..stores.schema import DATA, Header, holds_store, read_header
from .report.costs import value_bytes

if TYPE_CHECKING:
    from .plan import Plan

FORMAT = 1
SAMPLE = 1000
"""Records of a run that are read, spread evenly over its units: of 10⁶ units not all."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that went to or came from a disk, as they lie there, and the seconds that it took."""

    nbytes: int
    seconds: float

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second; None where nothing was timed."""
        return self.nbytes / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """One step, measured on one worker.

    `settings` are what its cost a token depends on. `tokens` were computed in `compute_seconds`, loading
    (`load_seconds`) and the first batch left out. `values` are the bytes of what was then written, before compression;
    `written` is that by compression, with fsync and checksums, `read` its way back. `host_peak` is the most that the
    process held and `host_before` what it held before the step, `device_peak` the most that tensors held on a CUDA
    device, in bytes; `nonzeros` values a token of ragged arrays. What was not measured is None, or left out.
    """

    name: str
    settings: Mapping[str, Any]
    tokens: int
    compute_seconds: float
    values: float
    written: Mapping[str, Traffic]
    read: Traffic | None = None
    load_seconds: float | None = None
    host_before: int | None = None
    host_peak: int | None = None
    device_peak: int | None = None
    nonzeros: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.compute_seconds

    @property
    def ratios(self) -> dict[str, float]:
        """Bytes on disk over bytes of values, by compression."""
        return {name: one.nbytes / self.values for name, one in self.written.items() if self.values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A measurement of a recipe's steps: where and when (seconds since 1970), with what packages, on what device, of
    what model. `origin` is "measured" (some seconds of it) or "run" (the records of one that ran, on `hosts`).
    """

    origin: Literal["measured", "run"]
    model: Mapping[str, Any]
    device: str
    device_name: str
    hosts: tuple[str, ...]
    folder: str
    taken: float
    versions: Mapping[str, str]
    steps: tuple[StepProfile, ...]
    format: int = FORMAT

    def step(self, name: str) -> StepProfile | None:
        """The step of this name, None if it was not measured."""
        return next((step for step in self.steps if step.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """The profile as JSON values. `parse_profile` gives back an equal one."""
        value: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return value

    def check(self, plan: Plan, what: str) -> None:
        """FingerprintMismatch unless the profile, called `what`, is of the plan's model, device and settings."""
        for step in plan.steps:
            measured = self.step(step.stage.store)
            if measured is None:
                continue
            ours = settings_of(step.payload)
            if ours["files"] != measured.settings.get("files"):
                raise FingerprintMismatch(
                    f"{what} was taken of another model or dictionary in the step {step.stage.store}: of "
                    f"{self.model['source']}, and the recipe's model is {plan.recipe.model.source}. Measure this one "
                    "with --measure"
                )
            if lines := differences(ours, measured.settings):
                said = "".join(f"\n  {line.replace('in the store', 'in the profile')}" for line in lines[:12])
                raise FingerprintMismatch(
                    f"{what} was taken of the step {step.stage.store} with other settings, which cost something "
                    f"else:{said}\nMeasure this recipe with --measure, or change it to what was measured"
                )


def settings_of(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the cost of a token depends on, out of everything that determines a step's values: no corpus, no geometry
    but the context, and no package's version.
    """
    parameters = {key: value for key, value in payload["parameters"].items() if key != "unit_tokens"}
    numerics = {key: value for key, value in payload["numerics"].items() if key != "torch"}
    return {
        "step": payload["step"],
        "parameters": parameters,
        "files": payload["files"],
        "identity": payload["identity"],
        "numerics": numerics,
    }


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a profile as JSON, whole or not at all."""
    write_atomic(path, json.dumps(profile.to_json(), indent=1, sort_keys=True).encode())


def open_profile(source: Place) -> Profile:
    """The profile in a file, or of the run in a folder. SchemaError for a file that holds none, StoreNotFound."""
    if isinstance(source, ObjectPath) or source.is_dir():
        return profile_of_run(source)
    if not source.is_file():
        raise StoreNotFound(f"there is no profile at {source}: give a file of --save-profile, or the folder of a run")
    return parse_profile(source.read_bytes(), str(source))


def parse_profile(text: bytes, what: str) -> Profile:
    """The profile in JSON text, called `what` in messages. SchemaError names what is wrong with it."""
    from pydantic import TypeAdapter, ValidationError

    try:
        found = TypeAdapter(Profile).validate_json(text)
    except ValidationError as error:
        wrong = [f"  {'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors()[:6]]
        raise SchemaError(
            f"{what} is not a profile as --save-profile writes them:\n" + "\n".join(wrong) + "\nMeasure again"
        ) from None
    if found.format != FORMAT:
        raise SchemaError(f"{what} is a profile of format {found.format}; this forebay reads {FORMAT}. Measure again")
    for step in found.steps:
        if step.tokens < 1 or step.compute_seconds <= 0 or any(one.seconds < 0 for one in step.written.values()):
            raise SchemaError(f"{what}: the step {step.name} has no tokens, or no time was measured. Measure again")
    return found


def profile_of_run(folder: Place) -> Profile:
    """A profile from the records of a run that ran, complete or not: of each step up to `SAMPLE`, spread evenly.

    Reads no array and measures nothing: memory, loading and reading are unknown. StoreNotFound if there is nothing to
    take it from.
    """
    said = read_json(folder / "recipe.json") if (folder / "recipe.json").is_file() else {}
    steps = [(name, folder / name) for name in sorted(names(folder)) if holds_store(folder / name)]
    found = [(name, read_header(step / DATA), _sample(Ledger(step))) for name, step in steps]
    found = sorted(found, key=lambda one: one[1].schema.kind != "tokens")
    ran = [(name, header, records) for name, header, records in found if records]
    if "device" not in said or not ran:
        raise StoreNotFound(
            f"{folder} is no run with finished units, and there is nothing to take a profile from. Give the folder of "
            "one that ran, or measure with --measure"
        )
    records = [record for *_, each in ran for record in each]
    return Profile(
        origin="run",
        model=ran[0][1].provenance.get("model", {"source": "an unknown model", "revision": None}),
        device=said["device"],
        device_name=said["device"],
        hosts=tuple(sorted({str(record["host"]) for record in records})),
        folder=str(folder),
        taken=max(record["finished"] for record in records),
        versions=records[-1]["versions"],
        steps=tuple(_step_of(*one) for one in ran),
    )


def _sample(ledger: Ledger) -> list[Record]:
    done = sorted(ledger.done())
    return [ledger.record(index) for index in done[:: max(1, -(-len(done) // SAMPLE))]]


def _step_of(name: str, header: Header, records: Sequence[Record]) -> StepProfile:
    schema = header.schema
    tokens = sum(record["rows"]["token"][1] - record["rows"]["token"][0] for record in records)
    nonzeros = {path: _features_a_token(path, records) for path, array in schema.arrays.items() if array.ragged}
    whole = sum(value_bytes(array, schema.n_token, nonzeros.get(path, 0.0)) for path, array in schema.arrays.items())
    written = Traffic(
        sum(record["bytes"] for record in records), sum(record["seconds"].get("write", 0.0) for record in records)
    )
    return StepProfile(
        name=name,
        settings=settings_of(header.provenance["determines"]),
        tokens=tokens,
        compute_seconds=max(1e-9, sum(record["seconds"].get("compute", 0.0) for record in records)),
        values=whole * tokens / schema.n_token,
        written={schema.compression: written},
        nonzeros=nonzeros,
    )


def _features_a_token(path: str, records: Sequence[Record]) -> float:
    """Values a token of a group's ragged arrays, as its statistics have counted them."""
    said = [record["statistics"].get(path.rpartition("/")[0], {}) for record in records]
    tokens = sum(one["token_sum"][0] for one in said if "token_sum" in one)
    return float(sum(one["l0_sum"][0] for one in said if "l0_sum" in one) / tokens) if tokens else 0.0


def here(device: str) -> dict[str, Any]:
    """Where a measurement is made: device, its name, host, packages, the time."""
    return {
        "device": device,
        "device_name": device_name(device),
        "hosts": (whereabouts()["host"],),
        "versions": versions(),
        "taken": time.time(),
    }


def device_name(device: str) -> str:
    """A device as its maker calls it; of a CPU the machine's type and the threads that torch divides products among."""
    import platform

    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device}, {torch.get_num_threads()} threads"
