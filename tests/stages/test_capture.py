"""What capture keeps is what the model's forward gives, bit for bit, labelled, however the work is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

import forebay
from forebay.stages.models.model import Model
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec
from forebay.stores.store import Store

MakeRecipe = Callable[..., Path]

HOOKS = [
    "hook_embed",
    "blocks.1.ln1.hook_scale",
    "blocks.{0,2}.attn.hook_q",
    "blocks.*.attn.hook_k",
    "blocks.2.attn.hook_v",
    "blocks.[1-2].attn.hook_z",
    "blocks.0.mlp.hook_post",
    "blocks.[0,2].hook_resid_post",
    "ln_final.hook_scale",
    "hook_final_norm",
    "hook_logits",
]
LAYERS = {
    "ln1.hook_scale": [1],
    "attn.hook_q": [0, 2],
    "attn.hook_k": [0, 1, 2],
    "attn.hook_v": [2],
    "attn.hook_z": [1, 2],
    "mlp.hook_post": [0],
    "hook_resid_post": [0, 2],
}
PATTERNS = [*HOOKS, "blocks.{0,2}.attn.hook_pattern"]

PACKED = {"context": 16, "unit_tokens": 16 * 7}
# Longest first: the texts make up to 168 tokens; units of 50 cut most of them, and the last one ends within a batch.
DOCUMENTS = {"context": 64, "layout": "documents", "long_documents": "split", "unit_tokens": 128}
BEGUN = {**DOCUMENTS, "prepend_bos": True, "separator": "eos"}


@pytest.fixture
def capture(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Path]:
    """Runs a recipe into a folder of its own, which it gives."""

    def run(name: str, **tables: Any) -> Path:
        outcome = forebay.run(make_recipe(name, **tables), tmp_path / name)
        assert outcome.code == 0
        return outcome.folder

    return run


def kept(folder: Path) -> dict[str, NDArray[Any]]:
    """Every array of the store as it lies on disk, read without forebay: bfloat16 as its bits."""
    root = zarr.open_group(str(folder / "activations" / "data.zarr"), mode="r", use_consolidated=False)
    kinds = list(Store.open(folder / "activations").schema.arrays)
    return {path.removesuffix("/value"): root[path][...] for path in kinds}


def bits(tensor: torch.Tensor) -> NDArray[Any]:
    """Values as integers of their width, so that equal means the same bits, NaN and signed zero included."""
    width = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.contiguous().view(width).numpy()


def as_bits(stored: NDArray[Any]) -> NDArray[Any]:
    return stored.view({4: np.int32, 2: np.int16}[stored.itemsize])


def sequences(folder: Path) -> list[tuple[int, list[int]]]:
    """The first token of each sequence and its token ids, as the run's own tokens say."""
    root = zarr.open_group(str(folder / "tokens" / "data.zarr"), mode="r", use_consolidated=False)
    token_id, start = root["token_id"][...].tolist(), root["sequences/start"][...].tolist()
    return [(a, token_id[a:b]) for a, b in zip(start, [*start[1:], len(token_id)], strict=True)]


def by_hand(folder: Path, model: Model, hooks: list[str], *, batch: int, unit: int) -> dict[HookPoint, torch.Tensor]:
    """The oracle: unit after unit, the sequences that touch it go through the model `batch` at a time, the longest
    first; every value is put where its token stands (or, for what has no token axis, its sequence), one by one.
    """
    rows = sequences(folder)
    n_token, width = sum(len(ids) for _, ids in rows), max(len(ids) for _, ids in rows)
    found: dict[HookPoint, torch.Tensor] = {}
    for first in range(0, n_token, unit):
        beyond = min(first + unit, n_token)
        touching = [i for i, (start, ids) in enumerate(rows) if start < beyond and start + len(ids) > first]
        longest_first = sorted(touching, key=lambda i: -len(rows[i][1]))
        for at in range(0, len(touching), batch):
            some = sorted(longest_first[at : at + batch])
            out = model.forward([rows[i][1] for i in some], HookSpec().capture(*hooks))
            for point, value in out.captures.items():
                by_sequence = "query" in point.dims
                shape = (len(rows), value.shape[1], width, width) if by_sequence else (n_token, *value.shape[2:])
                whole = found.setdefault(point, torch.full(shape, torch.nan, dtype=value.dtype))
                for row, i in enumerate(some):
                    start, ids = rows[i]
                    n = len(ids)
                    if by_sequence and first <= start < beyond:
                        whole[i, :, :n, :n] = value[row, :, :n, :n]
                    for position in range(0 if not by_sequence else n, n):
                        if first <= start + position < beyond:
                            whole[start + position] = value[row, position]
    return found


def assert_kept(folder: Path, expected: dict[HookPoint, torch.Tensor], store_dtype: str) -> None:
    stored = kept(folder)
    labels = Store.open(folder / "activations").labels
    assert {point.kind for point in expected} == set(stored)
    for point, value in expected.items():
        array = stored[point.kind]
        if point.layer is not None:
            array = array[labels[f"{point.kind}/layer"][1].tolist().index(point.layer)]
        assert array.shape == tuple(value.shape), point
        whole = bits(value.to(getattr(torch, store_dtype)))
        different = np.argwhere(as_bits(array) != whole)
        assert not len(different), f"{point}: {len(different)} of {whole.size} differ, the first at {different[0]}"


# ── bit for bit ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("hooks", "layout", "unit", "store_dtype"),
    [
        pytest.param(HOOKS, PACKED, 64, "float32", id="packed"),
        pytest.param(HOOKS, BEGUN, 90, "bfloat16", id="documents-bos-eos"),
        pytest.param(PATTERNS, DOCUMENTS, 90, "float32", id="documents-patterns"),
        pytest.param(PATTERNS, DOCUMENTS, 90, "float16", id="documents-patterns-float16"),
    ],
)
def test_the_store_holds_what_the_forward_gives_bit_for_bit(
    capture: Callable[..., Path],
    tiny_model: Path,
    hooks: list[str],
    layout: dict[str, Any],
    unit: int,
    store_dtype: str,
) -> None:
    folder = capture(
        "run", tokenize=layout, capture={"hooks": hooks, "store_dtype": store_dtype, "batch": 4, "unit_tokens": unit}
    )
    expected = by_hand(folder, forebay.load_model(tiny_model, device="cpu"), hooks, batch=4, unit=unit)
    assert_kept(folder, expected, store_dtype)


@pytest.mark.parametrize("store_dtype", ["bfloat16", "float32"])
def test_a_model_that_computes_in_bfloat16_is_kept_bit_for_bit(
    capture: Callable[..., Path], tiny_model: Path, store_dtype: str
) -> None:
    settings = {"hooks": PATTERNS, "dtype": "bfloat16", "store_dtype": store_dtype, "batch": 4, "unit_tokens": 128}
    folder = capture("run", tokenize=PACKED, capture=settings)
    model = forebay.load_model(tiny_model, device="cpu", dtype="bfloat16")
    assert_kept(folder, by_hand(folder, model, PATTERNS, batch=4, unit=128), store_dtype)


def test_the_layouts_of_these_tests_are_as_awkward_as_they_are_meant_to_be(capture: Callable[..., Path]) -> None:
    """Sequences of one token, of the whole context, and across unit edges; a batch and a unit that are not full."""
    rows = sequences(capture("run", tokenize=DOCUMENTS, capture=None))
    lengths = [len(ids) for _, ids in rows]
    edges = range(90, sum(lengths), 90)
    assert min(lengths) == 1
    assert max(lengths) == DOCUMENTS["context"]
    assert sum(any(start < edge < start + len(ids) for start, ids in rows) for edge in edges) >= 4
    assert sum(lengths) % 90
    assert len([start for start, ids in rows if start + len(ids) > edges[-1]]) % 4


def test_residual_streams_and_logits_are_those_of_transformers(capture: Callable[..., Path], tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = capture(
        "run", tokenize=DOCUMENTS, capture={"hooks": ["hook_embed", "blocks.[0-1].hook_resid_post", "hook_logits"]}
    )
    stored, reference = kept(folder), LlamaForCausalLM.from_pretrained(tiny_model).eval()
    for start, ids in sequences(folder):
        with torch.inference_mode():
            out = reference(torch.tensor([ids]), output_hidden_states=True)
        here = slice(start, start + len(ids))
        assert_close_by_token(stored["hook_embed"][here], out.hidden_states[0][0].numpy(), 1e-6)
        for layer in (0, 1):
            assert_close_by_token(stored["hook_resid_post"][layer, here], out.hidden_states[layer + 1][0].numpy(), 1e-5)
        assert_close_by_token(stored["hook_logits"][here], out.logits[0].numpy(), 1e-5)


def assert_close_by_token(a: NDArray[Any], b: NDArray[Any], tolerance: float) -> None:
    """The difference of each token's vector is small against the vector itself: large tokens hide no small ones."""
    assert a.shape == b.shape
    error = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-12)
    assert error.max() <= tolerance, f"token {np.unravel_index(error.argmax(), error.shape)} is {error.max():.2g} off"


# ── how the work is cut changes nothing ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", [PACKED, DOCUMENTS], ids=["packed", "documents"])
def test_batch_and_unit_sizes_change_rounding_at_most(capture: Callable[..., Path], layout: dict[str, Any]) -> None:
    cuts = [(1, 1024), (3, 80), (8, 304)]
    folders = [capture(f"batch-{b}-unit-{u}", tokenize=layout, capture={"batch": b, "unit_tokens": u}) for b, u in cuts]
    first, *others = (kept(folder)["hook_resid_post"] for folder in folders)
    for other in others:
        assert_close_by_token(other, first, 1e-5)


def test_packed_units_of_any_size_have_equal_bits_where_batches_hold_the_same_sequences(
    capture: Callable[..., Path],
) -> None:
    """One sequence a batch: no unit size can change who is computed with whom, so not a bit may differ."""
    one, other = (
        kept(capture(f"unit-{u}", tokenize=PACKED, capture={"batch": 1, "unit_tokens": u}))["hook_resid_post"]
        for u in (120, 512)
    )
    np.testing.assert_array_equal(as_bits(one), as_bits(other))


def test_the_same_recipe_gives_the_same_bytes_whatever_the_process_had_set(capture: Callable[..., Path]) -> None:
    """Matrix products may be split among threads along the axis that is summed: their number is the recipe's."""
    found = {}
    for name, threads in (("first", 1), ("again", 1), ("more", 2)):
        torch.set_num_threads(2)
        found[name] = kept(capture(name, capture={"hooks": HOOKS, "unit_tokens": 512, "threads": threads}))
        assert torch.get_num_threads() == threads
    for kind, values in found["first"].items():
        np.testing.assert_array_equal(as_bits(values), as_bits(found["again"][kind]))
        if values.ndim > 2:
            assert_close_by_token(values, found["more"][kind], 1e-5)


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_has_its_own_layers_and_says_which(capture: Callable[..., Path], tiny_model: Path) -> None:
    run = forebay.open_run(capture("run", capture={"hooks": PATTERNS}))
    model = forebay.load_model(tiny_model, device="cpu")
    ids = run["tokens/token_id"].isel(token=slice(0, 16)).values.astype(np.int64)
    out = model.forward(torch.from_numpy(ids)[None], HookSpec().capture("blocks.*.hook_resid_post", *PATTERNS))
    for kind, layers in {**LAYERS, "attn.hook_pattern": [0, 2]}.items():
        value = run[f"activations/{kind}"]["value"]
        assert value["layer"].values.tolist() == layers
        for layer in layers:
            part = value.sel(layer=layer, sequence=0)
            np.testing.assert_allclose(
                np.squeeze(part.values), out[f"blocks.{layer}.{kind}"][0].numpy(), rtol=1e-3, atol=1e-4
            )
    for kind in ("hook_embed", "ln_final.hook_scale", "hook_final_norm", "hook_logits"):
        assert "layer" not in run[f"activations/{kind}"].dims


def test_dimensions_are_named_and_have_the_models_sizes(capture: Callable[..., Path]) -> None:
    run = forebay.open_run(capture("run", capture={"hooks": PATTERNS}))
    sizes = {name.removeprefix("/activations/"): dict(node.sizes) for name, node in ((n.path, n) for n in run.subtree)}
    n_token, n_sequence = run["tokens"].sizes["token"], run["sequences"].sizes["sequence"]
    assert sizes["hook_resid_post"] == {"layer": 2, "token": n_token, "d_model": 28}
    assert sizes["attn.hook_q"] == {"layer": 2, "token": n_token, "head": 4, "d_head": 10}
    assert sizes["attn.hook_k"] == {"layer": 3, "token": n_token, "kv_head": 2, "d_head": 10}
    assert sizes["attn.hook_v"] == {"layer": 1, "token": n_token, "kv_head": 2, "d_head": 10}
    assert sizes["attn.hook_z"] == {"layer": 2, "token": n_token, "head": 4, "d_head": 10}
    assert sizes["mlp.hook_post"] == {"layer": 1, "token": n_token, "d_mlp": 44}
    assert sizes["ln1.hook_scale"] == {"layer": 1, "token": n_token}
    assert sizes["hook_logits"] == {"token": n_token, "vocab": 300}
    assert sizes["attn.hook_pattern"] == {"layer": 2, "sequence": n_sequence, "head": 4, "query": 16, "key": 16}


def test_patterns_lie_by_sequence_and_are_missing_beyond_its_end(capture: Callable[..., Path]) -> None:
    folder = capture(
        "run",
        tokenize=DOCUMENTS,
        capture={"hooks": ["blocks.1.attn.hook_pattern"], "batch": 4, "unit_tokens": 50, "store_dtype": "bfloat16"},
    )
    pattern = forebay.open_run(folder)["activations/attn.hook_pattern"]["value"].sel(layer=1).values
    lengths = [len(ids) for _, ids in sequences(folder)]
    assert len(pattern) == len(lengths)
    for one, n in zip(pattern, lengths, strict=True):
        assert not np.isnan(one[:, :n, :n]).any()
        assert np.isnan(one[:, n:, :]).all()
        assert np.isnan(one[:, :, n:]).all()
        np.testing.assert_allclose(one[:, :n, :n].sum(-1), 1, atol=0.01)
        assert not np.triu(np.nan_to_num(one), 1).any()


# ── what is recorded of the values ───────────────────────────────────────────────────────────────────────────────────


def test_records_say_how_large_the_values_were_and_how_much_the_dtype_took_from_them(
    capture: Callable[..., Path],
) -> None:
    """Of finite values: what lies beyond a sequence is missing, and a masked score is minus infinity."""
    hooks = ["hook_embed", "blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern", "blocks.2.attn.hook_attn_scores"]
    settings = {"hooks": hooks, "unit_tokens": 200, "batch": 3}
    exact = capture("float32", tokenize=DOCUMENTS, capture=settings)
    original = {kind: values.astype(np.float64) for kind, values in kept(exact).items()}
    for dtype in ("float32", "bfloat16", "float16"):
        same = dtype == "float32"
        folder = exact if same else capture(dtype, tokenize=DOCUMENTS, capture={**settings, "store_dtype": dtype})
        run = forebay.open_run(folder)["activations"]
        stored = {kind: run[kind]["value"].values.astype(np.float64) for kind in original}
        store = Store.open(folder / "activations")
        for unit in store.schema.grid:
            rows, said = store.schema_with_labels.rows(unit), strictly(store.ledger.path(unit.index))["statistics"]
            assert set(said) == set(original)
            for kind, values in original.items():
                dims = run[kind]["value"].dims
                here = tuple(rows.get(dim, slice(None)) for dim in dims)
                over = tuple(i for i, dim in enumerate(dims) if dim != "layer")
                finite = np.isfinite(values[here])
                whole, kept_now = (np.where(finite, array[here], 0) for array in (values, stored[kind]))
                expected = {
                    "abs_max": abs(whole).max(over),
                    "square_sum": (whole**2).sum(over),
                    "error_square_sum": ((kept_now - whole) ** 2).sum(over),
                }
                assert set(said[kind]) == set(expected)
                for name, value in expected.items():
                    np.testing.assert_allclose(said[kind][name], np.atleast_1d(value), rtol=1e-5, err_msg=kind + name)
                assert same == (not np.any(said[kind]["error_square_sum"]))


def strictly(path: Path) -> Any:
    """A file as JSON that any program reads: Python writes and takes Infinity and NaN, which are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} stands in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


# ── overflow ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_value_that_overflows_the_stored_dtype_is_an_error_that_names_point_and_value(
    make_recipe: MakeRecipe, altered_model: Callable[..., Path], tmp_path: Path
) -> None:
    def louder(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"] *= 1e6

    model = altered_model(louder)
    tables: dict[str, Any] = {"model": model, "capture": {"store_dtype": "float16", "unit_tokens": 2048}}
    outcome = forebay.run(make_recipe("half", **tables), tmp_path / "half")
    assert outcome.code == 1
    failure = Store.open(tmp_path / "half" / "activations").ledger.failure(0, 1)
    tables["capture"]["store_dtype"] = "float32"
    assert forebay.run(make_recipe("single", **tables), tmp_path / "single").code == 0
    # The first batch of eight sequences is what failed.
    largest = abs(kept(tmp_path / "single")["hook_resid_post"][1, : 8 * 16]).max()
    assert largest > 65504
    assert f"blocks.1.hook_resid_post: the value {largest:.6g} does not fit float16" in failure["error"]
    assert "65504" in failure["error"]
    assert 'capture.store_dtype to "bfloat16"' in failure["error"]


def test_bfloat16_keeps_what_float16_cannot(capture: Callable[..., Path], altered_model: Callable[..., Path]) -> None:
    def louder(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"] *= 1e6

    folder = capture("run", model=altered_model(louder), capture={"store_dtype": "bfloat16"})
    values = forebay.open_run(folder)["activations/hook_resid_post"]["value"].values
    assert np.isfinite(values).all()
    assert abs(values).max() > 65504
