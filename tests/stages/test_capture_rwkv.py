"""A store of RWKV holds what its forward gives, states at the positions asked for included, however the work is cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import dask
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from numpy.typing import NDArray

import forebay
from forebay.stages.capture import Capture
from forebay.stages.models.model import Model
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec
from forebay.stages.tokenize import ModelSource
from forebay.stores.errors import SchemaError
from forebay.stores.schema import Schema
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

from ..models.rwkv_models import SIZES, write_pth

EVERYTHING = ("*", "blocks.[0,2].rwkv.hook_effective_attn")
STATES = "blocks.*.rwkv.hook_state"
POSITIONS = (0, 7, -1)
LENGTHS = {
    # Windows of one length, the last one shorter: seven units of two windows, and one of its own.
    "packed": [16] * 7 + [9],
    # Most straddle an edge of a unit of 32 tokens, one covers a unit whole, several have position 7 as their last.
    "documents": [8, 21, 9, 40, 8, 13, 11, 70, 8, 17],
}


@dataclass(frozen=True)
class Tokens:
    """Token ids laid end to end, as a finished step of tokens gives them to the next one."""

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]

    @classmethod
    def random(cls, lengths: list[int]) -> Tokens:
        chance = np.random.default_rng(4)
        ids = chance.integers(0, SIZES["d_vocab"], sum(lengths), dtype=np.uint32)
        return cls(ids, np.cumsum([0, *lengths[:-1]]))

    @property
    def rows(self) -> list[list[int]]:
        return [row.tolist() for row in np.split(self.ids, self.starts[1:])]

    @property
    def schema(self) -> Schema:
        """Three sequences a document."""
        n = len(self.starts)
        documents = np.arange(0, n, 3)
        labels: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
            "sequences/start": (("sequence",), self.starts),
            "sequences/document": (("sequence",), np.arange(n) // 3),
            "documents/start": (("document",), self.starts[documents]),
            "documents/id": (("document",), np.array([f"doc-{i}" for i in documents], dtype=object)),
        }
        return Schema(kind="tokens", n_token=len(self.ids), unit_tokens=len(self.ids), arrays={}, labels=labels)

    def read(self, span: slice) -> xr.Dataset:
        return xr.Dataset({"token_id": ("token", self.ids[span])}, coords={"token": np.arange(span.start, span.stop)})


@pytest.fixture(scope="module", params=[6, 7], ids=["rwkv6", "rwkv7"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pth(tmp_path_factory.mktemp("models") / f"x{request.param}.pth", request.param)


def stage(checkpoint: Path, **settings: Any) -> Capture:
    given = {"hooks": (STATES,), "threads": 1, **settings}
    return Capture(model=ModelSource(source=str(checkpoint)), **given)


def kept_by(capture: Capture, tokens: Tokens, folder: Path) -> Path:
    """Runs a capture over tokens, unit after unit."""
    capture.check()
    own = capture.schema(tokens.schema)
    store = Store.create(folder, own, "f" * 64, {"determines": {}})
    apply = capture.load("cpu", own)
    for unit in own.grid:
        writer = UnitWriter(store, unit)
        for piece in apply(tokens.read(capture.span(unit, tokens.schema, own)), unit):
            writer.put(piece)
        writer.finish({"compute": 1.0})
    assert store.verify() == {}
    return folder


def asked(model: Model, hooks: tuple[str, ...], positions: tuple[int, ...]) -> HookSpec:
    spec = HookSpec().capture(*hooks)
    points = [point for point in model.forward([[0] * 8], spec).captures if point.kind != "rwkv.hook_state"]
    return HookSpec().capture(*points).capture(STATES, positions=positions)


def by_hand(model: Model, tokens: Tokens, hooks: HookSpec, *, batch: int, unit: int) -> dict[HookPoint, torch.Tensor]:
    """The oracle: unit after unit, the sequences that touch it go through the model `batch` at a time, the longest
    first; every value is put where its token stands (or, for what has no token axis, its sequence), one by one.
    """
    rows, n_token = tokens.rows, len(tokens.ids)
    width = max(map(len, rows))
    found: dict[HookPoint, torch.Tensor] = {}
    for first in range(0, n_token, unit):
        beyond = min(first + unit, n_token)
        touching = [i for i, start in enumerate(tokens.starts) if start < beyond and start + len(rows[i]) > first]
        longest_first = sorted(touching, key=lambda i: -len(rows[i]))
        for at in range(0, len(touching), batch):
            some = sorted(longest_first[at : at + batch])
            for point, value in model.forward([rows[i] for i in some], hooks).captures.items():
                shape = {
                    "query": (len(rows), value.shape[1], width, width),
                    "state_position": (len(rows), *value.shape[1:]),
                }.get(point.dims[2 if "query" in point.dims else 1], (n_token, *value.shape[2:]))
                whole = found.setdefault(point, torch.full(shape, torch.nan, dtype=value.dtype))
                for row, i in enumerate(some):
                    _put(whole, value[row], point.dims, i, int(tokens.starts[i]), len(rows[i]), range(first, beyond))
    return found


def _put(
    whole: torch.Tensor, value: torch.Tensor, dims: tuple[str, ...], i: int, start: int, n: int, unit: range
) -> None:
    if "query" in dims or "state_position" in dims:
        if start in unit:
            place = whole[i, :, :n, :n] if "query" in dims else whole[i]
            place.copy_(value[:, :n, :n] if "query" in dims else value)
        return
    for position in range(n):
        if start + position in unit:
            whole[start + position] = value[position]


def assert_kept(folder: Path, expected: dict[HookPoint, torch.Tensor], store_dtype: str) -> None:
    """Bit for bit, read without forebay."""
    root = zarr.open_group(str(folder / "data.zarr"), mode="r", use_consolidated=False)
    assert {f"{point.kind}/value" for point in expected} == set(Store.open(folder).schema.arrays)
    for point, value in expected.items():
        array = root[f"{point.kind}/value"][...]
        if point.layer is not None:
            array = array[root[f"{point.kind}/layer"][...].tolist().index(point.layer)]
        rounded = value.to(getattr(torch, store_dtype))
        bits = rounded.view({4: torch.int32, 2: torch.int16}[rounded.element_size()]).numpy()
        assert array.shape == bits.shape, point
        np.testing.assert_array_equal(array.view(bits.dtype), bits, err_msg=str(point))


# ── bit for bit ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("layout", "batch", "store_dtype"),
    [("packed", 1, "bfloat16"), pytest.param("documents", 5, "float32", marks=pytest.mark.slow)],
)
def test_the_store_holds_what_the_forward_gives_bit_for_bit(
    checkpoint: Path, tmp_path: Path, layout: str, batch: int, store_dtype: str
) -> None:
    tokens = Tokens.random(LENGTHS[layout])
    settings = {"hooks": EVERYTHING, "state_positions": POSITIONS, "batch": batch, "unit_tokens": 32}
    folder = kept_by(stage(checkpoint, store_dtype=store_dtype, **settings), tokens, tmp_path / "activations")
    model = forebay.load_model(checkpoint, device="cpu")
    expected = by_hand(model, tokens, asked(model, EVERYTHING, POSITIONS), batch=batch, unit=32)
    assert {str(point) for point in expected} >= {"blocks.0.rwkv.hook_effective_attn", "hook_logits", "hook_embed"}
    assert {point.layer for point in expected if point.kind == "rwkv.hook_state"} == {0, 1, 2}
    assert_kept(folder, expected, store_dtype)


def test_a_model_that_computes_in_bfloat16_keeps_float32_states_whole(checkpoint: Path, tmp_path: Path) -> None:
    tokens = Tokens.random(LENGTHS["documents"])
    settings: dict[str, Any] = {"state_positions": (3,), "dtype": "bfloat16", "batch": 3, "unit_tokens": 50}
    folder = kept_by(stage(checkpoint, **settings), tokens, tmp_path / "activations")
    model = forebay.load_model(checkpoint, device="cpu", dtype="bfloat16")
    expected = by_hand(model, tokens, HookSpec().capture(STATES, positions=[3]), batch=3, unit=50)
    states = expected[HookPoint("rwkv.hook_state", 1)]
    assert not torch.equal(states, states.bfloat16().float())
    assert_kept(folder, expected, "float32")


def test_the_documents_of_these_tests_straddle_edges_and_end_where_states_are_kept() -> None:
    tokens = Tokens.random(LENGTHS["documents"])
    edges = range(32, len(tokens.ids), 32)
    spans = list(zip(tokens.starts.tolist(), map(len, tokens.rows), strict=True))
    assert sum(any(start < edge < start + n for start, n in spans) for edge in edges) >= 4
    assert any(sum(start < edge < start + n for edge in edges) > 1 for start, n in spans)
    assert sum(n == 8 for _, n in spans) == 3
    started = np.diff(np.searchsorted(tokens.starts, [0, *edges, len(tokens.ids)]))
    assert 0 in started  # a unit in which no sequence starts, and which owns no state


# ── which state it is ────────────────────────────────────────────────────────────────────────────────────────────────


def off_by(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest error of a head's matrix against the matrix: large ones hide no small ones."""
    error, size = (np.linalg.norm(x, axis=(-2, -1)) for x in (found - wanted, wanted))
    return float((error / size).max())


def test_a_state_is_that_of_the_sequence_cut_there(checkpoint: Path, tmp_path: Path) -> None:
    """Against forwards of every sequence alone, cut after the position asked for, and what those hand on."""
    tokens = Tokens.random(LENGTHS["documents"])
    folder = kept_by(stage(checkpoint, state_positions=POSITIONS, batch=4, unit_tokens=32), tokens, tmp_path / "a")
    value = forebay.open_store(folder)["rwkv.hook_state"]["value"]
    model = forebay.load_model(checkpoint, device="cpu")
    for sequence, row in enumerate(tokens.rows):
        for position in POSITIONS:
            states = model.forward([row[: len(row) if position == -1 else position + 1]]).states
            assert states is not None
            for layer in range(3):
                found = value.sel(layer=layer, sequence=sequence, state_position=position).values
                wanted = states.layers[layer].wkv[0].numpy()
                assert found.shape == wanted.shape == (3, 12, 12)
                assert off_by(found, wanted) < 1e-5, (sequence, position, layer)


def test_by_default_the_state_after_the_last_token_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    tokens = Tokens.random([3, 1, 8])
    folder = kept_by(stage(checkpoint, batch=2), tokens, tmp_path / "activations")
    value = forebay.open_store(folder)["rwkv.hook_state"]["value"]
    assert value["state_position"].values.tolist() == [-1]
    model = forebay.load_model(checkpoint, device="cpu")
    for sequence, row in enumerate(tokens.rows):
        states = model.forward([row]).states
        assert states is not None
        found = value.sel(layer=2, sequence=sequence, state_position=-1).values
        assert off_by(found, states.layers[2].wkv[0].numpy()) < 1e-5


def test_batches_and_units_change_rounding_at_most(checkpoint: Path, tmp_path: Path) -> None:
    tokens = Tokens.random(LENGTHS["documents"])
    found = []
    for batch, unit in ((1, 1000), (3, 40), (8, 71)):
        capture = stage(checkpoint, state_positions=POSITIONS, batch=batch, unit_tokens=unit)
        folder = kept_by(capture, tokens, tmp_path / f"{batch}-{unit}")
        found.append(forebay.open_store(folder)["rwkv.hook_state"]["value"].values)
    for other in found[1:]:
        assert off_by(other, found[0]) < 1e-5


# ── labels and laziness ──────────────────────────────────────────────────────────────────────────────────────────────


def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("something was computed")


def test_states_open_lazily_and_are_selected_by_layer_sequence_and_position(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens.random(LENGTHS["documents"])
    hooks = ("blocks.[1,2].rwkv.hook_state", "blocks.0.hook_resid_pre")
    capture = stage(checkpoint, hooks=hooks, state_positions=(5, -1, 0), unit_tokens=32)
    folder = kept_by(capture, tokens, tmp_path / "run" / "activations")
    with dask.config.set(scheduler=forbidden), monkeypatch.context() as reading:
        reading.setattr("forebay.stores.tree.KeptArray._read", forbidden)
        run = forebay.open_run(folder.parent)
        value = run["activations/rwkv.hook_state/value"]
        one = value.sel(layer=1, sequence=3, state_position=-1)
    assert dict(value.sizes) == {"layer": 2, "sequence": 10, "state_position": 3, "head": 3, "d_key": 12, "d_value": 12}
    assert value.dims == ("layer", "sequence", "state_position", "head", "d_key", "d_value")
    assert value["layer"].values.tolist() == [1, 2]
    assert value["state_position"].values.tolist() == [5, -1, 0]
    assert value["document"].values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    np.testing.assert_array_equal(one.values, value.values[0, 3, 1])
    assert np.isfinite(value.values).all()


def test_a_key_reads_one_state_and_not_its_neighbours(checkpoint: Path) -> None:
    """A chunk, the least that is read, is one state; an object on disk is one layer of a unit's states."""
    own = stage(checkpoint, state_positions=POSITIONS, unit_tokens=32).schema(Tokens.random(LENGTHS["packed"]).schema)
    array = own.arrays["rwkv.hook_state/value"]
    assert array.shape == (3, 8, 3, 3, 12, 12)
    assert array.chunks == (1, 1, 1, 3, 12, 12)
    assert array.shards == (1, 2, 3, 3, 12, 12)


# ── size ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_states_count_in_the_bytes_of_a_store(checkpoint: Path) -> None:
    schema = Tokens.random([64] * 40).schema
    one = 3 * 12 * 12 * 4
    for positions in ((-1,), (0, 9, 63, -1)):
        own = stage(checkpoint, state_positions=positions, hooks=(STATES, "blocks.0.hook_resid_pre")).schema(schema)
        states, stream = own.arrays["rwkv.hook_state/value"].nbytes, own.arrays["hook_resid_pre/value"].nbytes
        assert states == 3 * 40 * len(positions) * one
        assert own.nbytes == states + stream


@pytest.mark.parametrize("lengths", [[64] * 40, [8, 500, 8, 8, 8, 8, 8, 8]], ids=["even", "uneven"])
@pytest.mark.parametrize("hooks", [STATES, "blocks.*.rwkv.hook_effective_attn"])
def test_a_unit_of_what_lies_by_sequence_is_as_large_as_one_of_tokens(
    checkpoint: Path, lengths: list[int], hooks: str
) -> None:
    """A layer's values of one unit take at most 64 MiB, and more than 16."""
    positions = (0, 1, 2, 3, 4, 5, 6, -1) if hooks == STATES else (-1,)
    own = stage(checkpoint, hooks=(hooks,), state_positions=positions).schema(Tokens.random(lengths).schema)
    a_sequence = 8 * 3 * 12 * 12 * 4 if hooks == STATES else 3 * max(lengths) ** 2 * 4
    a_layer = own.unit_tokens * len(lengths) / sum(lengths) * a_sequence
    assert 2**24 < a_layer <= 2**26
    assert own.unit_tokens % max(lengths) == 0


def test_a_unit_is_bounded_over_all_hook_points_and_holds_a_batch(checkpoint: Path) -> None:
    """All values of one unit take at most 256 MiB, and more than 64; a batch is never cut for that."""
    tokens = Tokens.random([64] * 40).schema
    hooks = ("blocks.*.{hook_resid_*,rwkv.*}",)
    own = stage(checkpoint, hooks=hooks).schema(tokens)
    assert len(own.arrays) > 8
    a_token = own.nbytes / own.n_token
    assert 2**26 < own.unit_tokens * a_token <= 2**28
    least = 4 * own.unit_tokens // 64
    assert stage(checkpoint, hooks=hooks, batch=least).schema(tokens).unit_tokens == 64 * least
    widest = max(array.nbytes / array.shape[0] for array in own.arrays.values()) / own.n_token
    unbounded = stage(checkpoint, hooks=hooks, batch=2**30).schema(tokens).unit_tokens
    assert unbounded * widest <= 2**26 < 2 * unbounded * widest


# ── the fingerprint ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_capture_without_states_is_determined_by_what_it_always_was(tiny_model: Path, checkpoint: Path) -> None:
    """So that stores made before there were states still match their recipes."""
    before = ["batch", "compile", "compression", "dtype", "hooks", "store_dtype", "unit_tokens"]
    residual = ("blocks.*.hook_resid_post",)
    for model in (tiny_model, checkpoint):
        assert sorted(stage(model, hooks=residual).determining()) == before
    with_states = stage(checkpoint, hooks=(*residual, STATES)).determining()
    assert sorted(with_states) == sorted([*before, "state_positions"])
    assert with_states["state_positions"] == (-1,)
    assert Capture.version == 3


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ((), r"state_positions = \[\] names no position"),
        ((3, -1, 3), r"state_positions = \[3, -1, 3\] names .* one of them twice"),
    ],
)
def test_no_position_and_one_that_is_named_twice_are_refused(
    checkpoint: Path, positions: tuple[int, ...], said: str
) -> None:
    with pytest.raises(SchemaError, match=said):
        stage(checkpoint, state_positions=positions).check()


def test_positions_without_a_state_to_keep_are_refused(checkpoint: Path, tiny_model: Path) -> None:
    for model in (checkpoint, tiny_model):
        with pytest.raises(SchemaError, match=r'\[5\] .*add "blocks\.\*\.rwkv\.hook_state".*or leave state_positions'):
            stage(model, hooks=("blocks.*.hook_resid_post",), state_positions=(5,)).check()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sequence_that_is_too_short_for_a_position_has_nan_there(
    checkpoint: Path, tmp_path: Path, batch: int
) -> None:
    """Alone in its batch, and beside longer ones."""
    tokens, positions = Tokens.random([8, 21, 9, 8, 8, 8, 40]), (8, -1, -10)
    capture = stage(checkpoint, state_positions=positions, batch=batch, unit_tokens=64)
    value = forebay.open_store(kept_by(capture, tokens, tmp_path / "store"))["rwkv.hook_state"]["value"]
    model = forebay.load_model(checkpoint, device="cpu")
    for sequence, row in enumerate(tokens.rows):
        for position in positions:
            found = value.sel(sequence=sequence, state_position=position, layer=1).values
            if -len(row) <= position < len(row):
                hooks = HookSpec().capture("blocks.1.rwkv.hook_state", positions=[position])
                alone = model.forward([row], hooks)["blocks.1.rwkv.hook_state"][0, 0]
                assert off_by(found, alone.numpy()) < 1e-5
            else:
                assert np.isnan(found).all()


@pytest.mark.parametrize("position", [70, -71])
def test_a_position_that_no_sequence_has_is_refused(checkpoint: Path, position: int) -> None:
    capture = stage(checkpoint, state_positions=(-1, position))
    capture.check()
    said = (
        rf"no sequence has a state after its token {position}; the longest has 70 tokens, so 0 to 69 or, .* -70 to -1"
    )
    with pytest.raises(SchemaError, match=said):
        capture.schema(Tokens.random(LENGTHS["documents"]).schema)
    stage(checkpoint, state_positions=(-70, 69)).schema(Tokens.random(LENGTHS["documents"]).schema)
