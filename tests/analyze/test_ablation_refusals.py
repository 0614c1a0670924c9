"""What cannot be ablated, or has no store to take values from, is refused before the model runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from torch import Tensor

import forebay
from forebay.stages.analyze.ablation import ablation_effect
from forebay.stages.analyze.metrics import Logit
from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stores.errors import SchemaError

from .laziness import forbidden
from .test_ablation import METRIC, PROMPTS, folder, store

__all__ = ["folder", "store"]  # fixtures


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Model, "forward", forbidden)
    with dask.config.set(scheduler=forbidden):
        yield


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "zeros"}, SchemaError, "'zeros': zero, mean, resample are the kinds of ablation. Did you mean 'zero'?"),
    ({"kind": "mean", "from_": None}, SchemaError, "mean ablation takes values from a store"),
    ({"kind": "resample"}, SchemaError, "draws random tokens: give a seed"),
    ({"kind": "resample", "seed": 1, "draws": 0}, SchemaError, "draws = 0 and batch_size = 32: at least 1"),
    ({"skip_positions": -1}, SchemaError, "skip_positions = -1: at least 0"),
    ({"skip_positions": 4}, SchemaError, "prompt 1 has 4 tokens, of which the first 4 are left alone"),
    ({"by": ["heads"]}, SchemaError, "can be swept, not 'heads'. Did you mean 'head'?"),
    ({"by": ["head"]}, HookError, r"hook_mlp_out has no heads, only \[sequence, position, d_model\]"),
    ({"hooks": ["attn.hook_pattern"]}, HookError, "not by token: cut its edges with Knockout"),
    ({"hooks": ["hook_mlp_outs"]}, HookError, "no kind of hook point 'hook_mlp_outs'. Did you mean 'hook_mlp_out'"),
    ({"layers": [3]}, HookError, "layers of this model are 0 to 2"),
    ({"metric": Logit(token=300)}, SchemaError, "no token 300"),
    ({"metric": Logit(token=3, position=5)}, SchemaError, "position 5"),
    ({"hooks": ["hook_attn_out"], "kind": "mean"}, SchemaError, "no hook_attn_out in the store, which holds"),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    model: Model, store: xr.DataTree, nothing_runs: None, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings = {"hooks": ["hook_mlp_out"], "metric": METRIC, "from_": store} | changed
    with pytest.raises(error, match=message):
        ablation_effect(model, PROMPTS, **settings)


def mean_of(model: Model, node: Any, hooks: Sequence[str] = ("hook_mlp_out",), **settings: Any) -> xr.Dataset:
    return ablation_effect(model, PROMPTS, hooks, metric=METRIC, kind="mean", from_=node, **settings)


def test_a_store_that_does_not_hold_what_is_ablated_is_refused(
    model: Model, store: xr.DataTree, nothing_runs: None
) -> None:
    with pytest.raises(SchemaError, match=r"holds attn.hook_z, and hook_mlp_out is to be ablated"):
        mean_of(model, store["attn.hook_z"])
    with pytest.raises(SchemaError, match=r"layers \[1\], and layers \[0, 2\] are to be ablated"):
        mean_of(model, store["hook_mlp_out"].to_dataset().isel(layer=[1]))
    with pytest.raises(SchemaError, match=r"'d_model': 28} a token; the store holds {'d_model': 27}"):
        mean_of(model, store["hook_mlp_out"].to_dataset().isel(d_model=slice(27)))
    with pytest.raises(SchemaError, match=r"give from_=open_run\(path\)\[\"activations\"\]"):
        mean_of(model, store["hook_mlp_out"], ["hook_mlp_out", "attn.hook_z"])
    node = store["hook_mlp_out"].to_dataset()
    with pytest.raises(SchemaError, match="where"):
        mean_of(model, node, where=xr.DataArray(np.ones(3, bool), dims="token"))


def test_a_kind_of_the_same_width_is_told_by_what_the_store_records(model: Model, store: xr.DataTree) -> None:
    attrs = dict(store["hook_mlp_out"].attrs)
    node = store["hook_mlp_out"].to_dataset()
    assert "hook_mlp_out/value" in attrs["determines"]["schema"]["arrays"]
    with pytest.raises(SchemaError, match="and hook_resid_post is to be ablated"):
        mean_of(model, node, ["hook_resid_post"])


def test_a_store_of_another_model_is_refused_and_of_the_same_one_elsewhere_is_not(
    tiny_model: Path, tmp_path: Path, store: xr.DataTree, altered_model: Callable[..., Path]
) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001

    other = forebay.load_model(altered_model(change), device="cpu")
    with pytest.raises(SchemaError, match="whose weights are others"):
        mean_of(other, store)
    shutil.copytree(tiny_model, tmp_path / "moved")
    moved = forebay.load_model(tmp_path / "moved", device="cpu")
    assert np.isfinite(mean_of(moved, store)["hook_mlp_out"]).all()


def test_a_store_in_which_no_token_counts_is_refused(model: Model, store: xr.DataTree) -> None:
    node = store["hook_mlp_out"].to_dataset()
    none = xr.DataArray(np.zeros(node.sizes["token"], bool), dims="token")
    with pytest.raises(SchemaError, match="no token of the store counts: there is no mean of hook_mlp_out"):
        mean_of(model, node, where=none)
    with pytest.raises(SchemaError, match="no token of the store counts at position 4"):
        mean_of(model, node.isel(token=slice(0, 6)), per_position=True, skip_positions=0)
    with pytest.raises(SchemaError, match="nothing to draw from"):
        ablation_effect(
            model, PROMPTS, ["hook_mlp_out"], metric=METRIC, kind="resample", from_=node, where=none, seed=1
        )
