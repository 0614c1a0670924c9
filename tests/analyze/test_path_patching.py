"""A path is patched as the paper's algorithm says, written out with hooks on transformers' own model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from forebay.stages.analyze.activation_patching import activation_patching
from forebay.stages.analyze.metrics import Logit, LogitDifference
from forebay.stages.analyze.patching import recovery
from forebay.stages.analyze.path_patching import Receiver, path_patching
from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..dictionaries.feature_models import model_of
from .hooked_llama import Place, put, run
from .laziness import forbidden

CLEAN = [[7, 31, 250, 8, 99, 12], [1, 77, 5, 200]]
CORRUPTED = [[7, 30, 251, 8, 98, 12], [2, 77, 6, 200]]
METRIC = LogitDifference(correct=[17, 40], wrong=[230, 41])
E = 10
KEPT = ("attn.hook_z", "hook_attn_out", "hook_mlp_out")
SENDERS = ("attn.hook_z", "hook_attn_out", "hook_mlp_out")


@functools.cache
def seen(folder: Path, prompt: tuple[int, ...]) -> dict[Place, Tensor]:
    return run(folder, prompt, keep=[(kind, layer) for kind in KEPT for layer in range(3)])[1]


def columns(head: int | None) -> slice:
    return slice(None) if head is None else slice(E * head, E * head + E)


def first_run(
    folder: Path,
    base: Sequence[int],
    source: Sequence[int],
    sender: tuple[str, int, int | None],
    keep: Sequence[Place] = (),
    positions: Sequence[int] | None = None,
) -> tuple[Tensor, dict[Place, Tensor]]:
    """The sender has its value of the other run; all that attention and MLPs add from there on is what it was."""
    kind, layer, head = sender
    places = range(len(base)) if positions is None else positions
    own, other = seen(folder, tuple(base)), seen(folder, tuple(source))
    edits = {(kind, layer): put(other[kind, layer][list(places), columns(head)], places, columns(head))}
    for above in range(3):
        if above > layer:
            edits["hook_attn_out", above] = put(own["hook_attn_out", above], range(len(base)))
        if above > layer or (above == layer and kind != "hook_mlp_out"):
            edits["hook_mlp_out", above] = put(own["hook_mlp_out", above], range(len(base)))
    return run(folder, base, edits, keep)


def by_hand(
    folder: Path,
    number: int,
    sender: tuple[str, int, int | None],
    ends: Sequence[tuple[str, int, int | None]],
    bases: Any = CLEAN,
    sources: Any = CORRUPTED,
    positions: Sequence[int] | None = None,
    at: Sequence[int] | None = None,
) -> float:
    """The metric with the paths from a sender to all of some ends patched; to the final stream where there are none."""
    base, source = bases[number], sources[number]
    logits, kept = first_run(folder, base, source, sender, [end[:2] for end in ends], positions)
    if ends:
        edits = {}
        for kind, layer, head in ends:
            places = range(len(base)) if at is None else at
            edits[kind, layer] = put(kept[kind, layer][list(places), columns(head)], places, columns(head))
        logits, _ = run(folder, base, edits)
    return float(logits[-1, METRIC.correct[number]] - logits[-1, METRIC.wrong[number]])  # type: ignore[index]


def check(found: xr.Dataset, folder: Path, ends: Sequence[tuple[str, int, int | None]], **how: Any) -> None:
    """Every cell of every sender is the run by hand; and the patches matter."""
    moved = 0.0
    for number in range(2):
        for kind in SENDERS:
            for layer in found["layer"].values.tolist():
                for head in range(4) if kind == "attn.hook_z" else [None]:
                    cell = found[kind].sel(pair=number, layer=layer)
                    cell = cell if head is None else cell.sel(head=head)
                    if np.isnan(cell):
                        assert kind == "hook_mlp_out"
                        continue
                    expected = by_hand(folder, number, (kind, layer, head), ends, **how)
                    np.testing.assert_allclose(cell, expected, rtol=2e-4, atol=2e-4, err_msg=f"{kind} {layer} {head}")
                    moved = max(moved, abs(expected - float(found["clean"][number])))
    assert moved > 1e-2


# ── the algorithm ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("receivers", "ends"),
    [
        (Receiver(point="blocks.2.attn.hook_q", head=3), [("attn.hook_q", 2, 3)]),
        (Receiver(point="blocks.2.attn.hook_k", head=1), [("attn.hook_k", 2, 1)]),
        (Receiver(point="blocks.1.attn.hook_v", head=0), [("attn.hook_v", 1, 0)]),
        ("blocks.2.attn.hook_v", [("attn.hook_v", 2, None)]),
        ("blocks.2.attn.hook_in", [(f"attn.hook_{x}", 2, None) for x in "qkv"]),
        ("blocks.2.mlp.hook_in", [("mlp_in", 2, None)]),
        ("blocks.1.mlp.hook_in", [("mlp_in", 1, None)]),
        (
            [Receiver(point="blocks.1.attn.hook_q", head=2), Receiver(point="blocks.2.attn.hook_q", head=0)],
            [("attn.hook_q", 1, 2), ("attn.hook_q", 2, 0)],
        ),
        ("hook_final_norm", []),
    ],
    ids=[
        "q",
        "k",
        "v",
        "values of all heads",
        "all that attention reads",
        "mlp",
        "a lower mlp",
        "two queries",
        "logits",
    ],
)
def test_a_path_is_patched_in_two_runs(model: Model, tiny_model: Path, receivers: Any, ends: Any) -> None:
    found = path_patching(model, CLEAN, CORRUPTED, METRIC, senders=SENDERS, receivers=receivers)
    assert found["attn.hook_z"].dims == ("pair", "layer", "head")
    assert found["hook_mlp_out"].dims == ("pair", "layer")
    assert found["attn.hook_z"].dtype == np.float32
    check(found, tiny_model, ends)


def test_a_clean_sender_can_be_put_into_the_corrupted_run(model: Model, tiny_model: Path) -> None:
    found = path_patching(
        model, CLEAN, CORRUPTED, METRIC, senders=SENDERS, receivers="blocks.2.mlp.hook_in", direction="denoising"
    )
    check(found, tiny_model, [("mlp_in", 2, None)], bases=CORRUPTED, sources=CLEAN)


def test_senders_can_be_patched_at_some_positions_and_receivers_at_one(model: Model, tiny_model: Path) -> None:
    end = Receiver(point="blocks.2.attn.hook_k", head=1, position=1)
    settings: dict[str, Any] = {"senders": SENDERS, "receivers": end}
    found = path_patching(model, CLEAN, CORRUPTED, METRIC, positions=[1, 2], **settings)
    check(found, tiny_model, [("attn.hook_k", 2, 1)], positions=[1, 2], at=[1])
    single = path_patching(model, CLEAN, CORRUPTED, METRIC, by_position=True, **settings)
    assert single["attn.hook_z"].dims == ("pair", "layer", "head", "position")
    for position in (0, 1, 3):
        expected = by_hand(tiny_model, 1, ("attn.hook_z", 1, 2), [("attn.hook_k", 2, 1)], positions=[position], at=[1])
        here = single["attn.hook_z"].sel(pair=1, layer=1, head=2, position=position)
        np.testing.assert_allclose(here, expected, rtol=2e-4, atol=2e-4)
    assert np.isnan(single["attn.hook_z"].sel(pair=1, position=[4, 5])).all()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_few_runs_at_a_time_are_the_same_as_many(model: Model, batch_size: int) -> None:
    settings: dict[str, Any] = {"senders": SENDERS, "receivers": ["blocks.2.attn.hook_q", "blocks.1.mlp.hook_in"]}
    many = path_patching(model, CLEAN, CORRUPTED, METRIC, **settings)
    few = path_patching(model, CLEAN, CORRUPTED, METRIC, **settings, batch_size=batch_size)
    xr.testing.assert_allclose(few, many, rtol=1e-5, atol=1e-5)


# ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_direct_path_of_a_head_to_the_logits_is_its_share_of_the_stream(model: Model) -> None:
    """The final norm and unembedding of the clean stream with (z′ − z) W_O of the head added to it."""
    metric = Logit(token=17)
    found = path_patching(model, CLEAN[:1], CORRUPTED[:1], metric)
    points = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    hooks = HookSpec().capture(*points, "blocks.2.hook_resid_post")
    clean, corrupted = (model.forward(rows[:1], hooks, logits=False) for rows in (CLEAN, CORRUPTED))
    for layer, point in enumerate(points):
        change_HE = (corrupted[point] - clean[point])[0, -1]
        share_HD = torch.einsum("he,hed->hd", change_HE, model.views.W_O(layer))
        stream_HD = clean["blocks.2.hook_resid_post"][0, -1] + share_HD
        expected = model.unembedding.project_to_vocab(stream_HD)[:, 17]
        np.testing.assert_allclose(found["attn.hook_z"][0, layer], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi", "olmo2"])
def test_in_every_kind_of_block_what_is_added_reaches_the_logits_as_it_is(family: str) -> None:
    """Norms behind attention and MLP, biases, parallel blocks."""
    model, metric = model_of(family), Logit(token=17)
    clean, corrupted = ([[token % 101 for token in row] for row in rows] for rows in (CLEAN, CORRUPTED))
    kinds = ("hook_attn_out", "hook_mlp_out", "hook_embed")
    found = path_patching(model, clean, corrupted, metric, senders=kinds)
    patched = activation_patching(
        model, clean, corrupted, metric, hooks=["hook_mlp_out"], direction="noising", by_position=False
    )
    np.testing.assert_allclose(found["hook_mlp_out"][:, -1], patched["hook_mlp_out"][:, -1], rtol=1e-5)
    points = [f"blocks.{layer}.{kind}" for layer in range(4) for kind in kinds[:2]] + ["hook_embed"]
    hooks = HookSpec().capture(*points, "blocks.3.hook_resid_post")
    for number in range(2):
        runs = [model.forward(rows[number : number + 1], hooks) for rows in (clean, corrupted)]
        for point in points:
            stream = runs[0]["blocks.3.hook_resid_post"] + runs[1][point] - runs[0][point]
            expected = model.unembedding.project_to_vocab(stream)[0, -1, 17]
            kind = point.split(".")[-1]
            cell = found[kind][number] if kind == "hook_embed" else found[kind][number, int(point.split(".")[1])]
            np.testing.assert_allclose(cell, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["clean"][number], runs[0].logits[0, -1, 17], rtol=1e-5)


def test_equal_prompts_have_no_paths_to_patch(model: Model) -> None:
    found = path_patching(model, CLEAN, CLEAN, METRIC, senders=SENDERS, receivers="blocks.2.attn.hook_q")
    for kind in SENDERS:
        np.testing.assert_allclose(*xr.broadcast(found[kind].dropna("layer"), found["clean"]), rtol=1e-5, atol=1e-5)


def test_all_senders_that_lie_below_a_receiver_are_patched_and_others_are_nothing(model: Model) -> None:
    found = path_patching(model, CLEAN, CORRUPTED, METRIC, senders=SENDERS, receivers="blocks.1.mlp.hook_in")
    assert found["layer"].values.tolist() == [0, 1]
    assert np.isfinite(found["attn.hook_z"]).all()
    assert np.isnan(found["hook_mlp_out"]).values.tolist() == [[False, True]] * 2
    heads = path_patching(model, CLEAN, CORRUPTED, METRIC, receivers="blocks.2.attn.hook_q")
    assert heads["layer"].values.tolist() == [0, 1]
    assert heads["head"].values.tolist() == [0, 1, 2, 3]


def test_the_result_is_one_of_patching(model: Model) -> None:
    end = Receiver(point="blocks.2.attn.hook_q", head=1)
    found = path_patching(model, CLEAN, CORRUPTED, METRIC, receivers=end)
    assert found.attrs["direction"] == "noising"
    assert found.attrs["receivers"] == ["blocks.2.attn.hook_q head 1"]
    assert found["attn.hook_z"].attrs["units"] == "logit difference"
    back = recovery(found)["attn.hook_z"]
    expected = (found["attn.hook_z"] - found["corrupted"]) / (found["clean"] - found["corrupted"])
    xr.testing.assert_allclose(back, expected)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


Q0 = "blocks.0.attn.hook_q"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layers": [2]}, SchemaError, "blocks.2.attn.hook_z does not lie below blocks.2.attn.hook_q"),
        ({"layers": [1, 2], "senders": ["hook_mlp_out"]}, SchemaError, "blocks.2.hook_mlp_out does not lie below"),
        ({"receivers": Q0}, SchemaError, f"no sender lies below {Q0}"),
        ({"receivers": []}, SchemaError, "receivers names none"),
        ({"receivers": [Q0, Q0]}, SchemaError, "a receiver is named twice"),
        ({"receivers": ["hook_final_norm", Q0]}, SchemaError, "would hide them: patch it alone"),
        ({"receivers": Receiver(point="hook_final_norm", position=1)}, SchemaError, "position of the metric"),
        ({"receivers": "blocks.1.hook_resid_mid"}, HookError, "blocks.1.hook_resid_mid is no receiver"),
        ({"receivers": "blocks.7.attn.hook_q"}, HookError, "0 to 2"),
        ({"receivers": Receiver(point="blocks.1.attn.hook_k", head=2)}, HookError, "has kv_heads 0 to 1, and no 2"),
        ({"receivers": Receiver(point="blocks.1.mlp.hook_in", head=0)}, HookError, "has no heads"),
        ({"receivers": Receiver(point=Q0, position=4)}, SchemaError, "no position 4 in pair 1"),
        ({"senders": ["attn.hook_q"]}, HookError, "'attn.hook_q' is no sender"),
        ({"senders": ["rwkv.hook_z"]}, HookError, "no kind of hook point 'rwkv.hook_z'"),
        ({"layers": [3]}, HookError, "0 to 2"),
        ({"direction": "up"}, SchemaError, "direction = 'up' is unknown"),
        ({"batch_size": 0}, SchemaError, "batch_size = 0"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    model: Model, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(Model, "forward", forbidden)
    settings = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, "receivers": "blocks.2.attn.hook_q"} | changed
    with pytest.raises(error, match=message):
        path_patching(model, **settings)


def test_attention_beside_an_mlp_does_not_lie_below_it() -> None:
    parallel = model_of("phi")
    assert parallel.spec.parallel
    clean, corrupted = ([[token % 101 for token in row] for row in rows] for rows in (CLEAN, CORRUPTED))
    settings: dict[str, Any] = {"metric": Logit(token=3), "receivers": "blocks.2.mlp.hook_in"}
    with pytest.raises(SchemaError, match=r"blocks\.2\.attn\.hook_z does not lie below blocks\.2\.mlp\.hook_in"):
        path_patching(parallel, clean, corrupted, layers=[1, 2], **settings)
    assert path_patching(parallel, clean, corrupted, **settings)["layer"].values.tolist() == [0, 1]


def test_a_sender_outside_the_blocks_adds_no_layers_of_nothing(model: Model) -> None:
    settings: dict[str, Any] = {"senders": ["hook_embed", "attn.hook_z"], "receivers": "blocks.1.attn.hook_v"}
    found = path_patching(model, [[3, 4, 5]], [[3, 7, 5]], Logit(token=1), **settings)
    assert found["layer"].values.tolist() == [0]
