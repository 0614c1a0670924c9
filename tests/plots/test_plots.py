"""Figures say what the results say: texts, numbers and labels are read back from what was drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import matplotlib
import numpy as np
import pytest
import xarray as xr

import forebay
from forebay import plot
from forebay.stages.plots.style import drawable, token_label
from forebay.stores.errors import SchemaError

matplotlib.use("Agg")
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def ticks(ax: Any, axis: str) -> list[str]:
    return [label.get_text() for label in (ax.get_xticklabels() if axis == "x" else ax.get_yticklabels())]


def grid(**sizes: int) -> xr.DataArray:
    values = np.random.default_rng(3).normal(size=tuple(sizes.values()))
    return xr.DataArray(values, dims=tuple(sizes), attrs={"long_name": "recovered", "units": "share"}, name="v")


def lens(layers: int = 3, tokens: int = 5) -> xr.Dataset:
    rng = np.random.default_rng(5)
    shape = (layers, tokens, 2)
    return xr.Dataset(
        {
            "top_token_id": (("layer", "token", "rank"), np.arange(np.prod(shape)).reshape(shape).astype(np.int32)),
            "top_probability": (("layer", "token", "rank"), rng.uniform(size=shape).astype(np.float32)),
        },
        coords={"layer": [2, 5, 9][:layers], "token_id": ("token", np.arange(100, 100 + tokens))},
    )


def decode(ids: Any) -> list[str]:
    return [f"t{one}" for one in ids]


def test_a_lens_table_holds_the_strongest_token_of_every_cell() -> None:
    drawn = lens()
    ax = plot.lens_table(drawn, decode=decode)
    cells = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in ax.texts}
    for row in range(3):
        for column in range(5):
            assert cells[column, row] == f"t{int(drawn['top_token_id'][row, column, 0])}"
    np.testing.assert_allclose(ax.images[0].get_array(), drawn["top_probability"][:, :, 0])
    assert ticks(ax, "x") == [f"t{i}" for i in range(100, 105)]
    assert ticks(ax, "y") == ["2", "5", "9"]


def test_a_lens_table_outlines_what_really_follows() -> None:
    drawn = lens()
    follows = np.array([0, -1, 14, -1, 8])  # the strongest of layer 2 at token 0, of layer 5 at 2, of layer 2 at 4
    ax = plot.lens_table(drawn.assign_coords(next_token_id=("token", follows)), decode=decode)
    outlined = {(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in ax.patches}
    assert outlined == {(0, 0), (2, 1), (4, 0)}


def test_a_lens_table_without_texts_shows_ids_and_nothing_where_there_is_none() -> None:
    drawn = lens()
    drawn["top_token_id"][1, 2, 0] = -1
    texts = [t.get_text() for t in plot.lens_table(drawn).texts]
    assert "" in texts
    assert "8" in texts


def test_a_lens_of_too_many_tokens_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"3 layers × 600 tokens are more than the 1,500 cells.*sequence"):
        plot.lens_table(lens(tokens=600))
    with pytest.raises(SchemaError, match="not of \\['v'\\]"):
        plot.lens_table(xr.Dataset({"v": grid(layer=2)}))


def test_a_heat_map_has_the_first_layer_at_the_bottom_whichever_way_it_is_given() -> None:
    values = grid(layer=4, position=3).assign_coords(layer=[1, 3, 5, 7])
    for given in (values, values.transpose()):
        ax = plot.heat_map(given)
        np.testing.assert_array_equal(ax.images[0].get_array(), values.values)
        assert ax.images[0].origin == "lower"
        assert (ax.get_ylabel(), ax.get_xlabel()) == ("layer", "position")
        assert ticks(ax, "y") == ["1", "3", "5", "7"]
        assert ax.figure.axes[1].get_ylabel() == "recovered (share)"


def test_a_centred_heat_map_is_white_at_its_centre() -> None:
    values = grid(head=3, position=4)
    image = plot.heat_map(values, center=0.5, annotate=True).images[0]
    low, high = image.get_clim()
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - 0.5 == pytest.approx(float(abs(values - 0.5).max()))


def test_positions_are_labelled_by_the_text_of_their_tokens() -> None:
    texts = np.array(["The", " cap", "$x$", "\n", "🐟"], dtype=object)
    ax = plot.heat_map(grid(layer=2, position=5).assign_coords(token_text=("position", texts)))
    assert ticks(ax, "x") == ["The", "·cap", r"\$x\$", "\\n", "\\u1f41f"]
    ax.figure.savefig("/dev/null", format="png")  # a warning of a missing glyph, or of bad mathematics, is an error


def test_every_so_manyth_place_is_labelled_where_there_is_no_room() -> None:
    ax = plot.heat_map(grid(layer=2, position=100))
    assert ticks(ax, "x")[:3] == ["0", "3", "6"]
    assert [round(place) for place in ax.get_xticks()[:3]] == [0, 3, 6]


def test_an_attention_pattern_has_a_panel_a_head_on_one_scale() -> None:
    weights = grid(head=5, query=3, key=3)
    axes = plot.attention_pattern(abs(weights), columns=2)
    shown = [ax for ax in axes.flat if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == [f"head {i}" for i in range(5)]
    assert len({ax.images[0].get_clim() for ax in shown}) == 1
    np.testing.assert_array_equal(shown[3].images[0].get_array(), abs(weights)[3])
    with pytest.raises(SchemaError, match=r"\[query, key\] or \[head, query, key\], not \['layer', 'key'\]"):
        plot.attention_pattern(grid(layer=2, key=3))
    with pytest.raises(SchemaError, match="65 panels"):
        plot.attention_pattern(grid(head=65, query=1, key=2))


def test_a_difference_of_patterns_is_white_at_0_in_every_panel() -> None:
    weights = grid(head=3, query=4, key=4) / 10
    weights[1] = abs(weights[1])
    weights[2, 3, 0] = -1.5
    for ax in plot.attention_pattern(weights).flat[:3]:
        assert ax.images[0].get_clim() == (-1.5, 1.5)
        assert ax.images[0].get_cmap().name == "RdBu_r"
    assert plot.attention_pattern(weights[1]).images[0].get_clim() == (0, 1)


def test_a_band_is_put_in_the_order_of_its_curve_and_never_half() -> None:
    values = grid(layer=4, split=2)
    ax = plot.line(values, low=(values - 1).T.expand_dims("label"), high=(values + 1).T)
    np.testing.assert_allclose(ax.collections[1].get_paths()[0].vertices[:, 1].max(), values[:, 1].max() + 1)
    with pytest.raises(SchemaError, match="low= and high=, or neither"):
        plot.line(values, low=values)
    with pytest.raises(SchemaError, match="these dimensions"):
        plot.line(values, low=values[:3], high=values[:3])


def test_a_curve_stands_at_the_numbers_of_its_coordinate_with_its_band() -> None:
    values = grid(layer=4, split=2).assign_coords(layer=[0, 7, 8, 20], split=["train", "validation"])
    ax = plot.line(values, low=values - 0.25, high=values + 0.5, chance=0.5)
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), [0, 7, 8, 20])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), values[:, 1])
    band = ax.collections[1].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(float(values[:, 1].min()) - 0.25)
    assert band[:, 1].max() == pytest.approx(float(values[:, 1].max()) + 0.5)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "validation"]
    assert ax.lines[2].get_ydata()[0] == 0.5


def test_doses_have_a_panel_a_variable_and_a_curve_a_token() -> None:
    curve = xr.Dataset(
        {"attention": grid(dose=3), "logit_difference": grid(dose=3, vocab=2), "baseline": 1.0},
        coords={"dose": [0.5, 1, 6], "vocab_text": ("vocab", np.array([" a", "$b"], dtype=object))},
    )
    first, second = plot.dose_response(curve, title="doses")
    assert len(first.lines) == 1
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["·a", r"\$b"]
    np.testing.assert_array_equal(second.lines[0].get_xdata(), [0.5, 1, 6])
    with pytest.raises(SchemaError, match="nothing here lies along a dose"):
        plot.dose_response(xr.Dataset({"v": grid(layer=2)}))


def test_explained_variance_is_cumulated() -> None:
    ax = plot.explained_variance(xr.Dataset({"explained_variance_ratio": ("component", [0.5, 0.25, 0.125])}))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.5, 0.75, 0.875])
    assert [bar.get_height() for bar in ax.patches] == [0.5, 0.25, 0.125]


def test_components_are_numbered_as_they_are_and_nothing_is_explained_by_nan() -> None:
    given = {"explained_variance_ratio": ("component", [0.25, 0.125, np.nan])}
    ax = plot.explained_variance(xr.Dataset(given, coords={"component": [2, 3, 4]}))
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [3, 4, 5])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0.25, 0.375, np.nan])
    several = xr.Dataset({"explained_variance_ratio": (("layer", "component"), [[0.25, 0.125]] * 2)})
    assert plot.explained_variance(several.assign_coords(component=[2, 3])).get_ylabel() == (
        "explained variance, cumulated from component 3 (fraction)"
    )


def test_bars_begin_at_the_top_and_have_the_colour_of_their_sign() -> None:
    values = xr.DataArray([2.0, -1.0], dims="component", coords={"component": ["embed", "L3H1"]})
    ax = plot.bars(values)
    assert [bar.get_width() for bar in ax.patches] == [2.0, -1.0]
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    assert ax.yaxis_inverted()
    assert ticks(ax, "y") == ["embed", "L3H1"]
    with pytest.raises(SchemaError, match=r"61 bars.*isel\(d="):
        plot.bars(grid(d=61))


def test_what_has_too_many_dimensions_is_refused_and_ones_are_passed_over() -> None:
    with pytest.raises(SchemaError, match=r"2 dimensions, and \[layer=2, head=3, position=4\] was given"):
        plot.heat_map(grid(layer=2, head=3, position=4))
    assert plot.heat_map(grid(pair=1, layer=2, head=3)).get_xlabel() == "head"
    assert plot.heat_map(grid(layer=1, head=3, pair=1)).get_ylabel() == "layer"


def test_what_is_lazy_is_computed_once_and_only_when_drawn() -> None:
    counted: list[int] = []

    def read(block: np.ndarray) -> np.ndarray:
        counted.append(1)
        return block

    lazy = xr.DataArray(
        da.map_blocks(read, da.ones((4, 3), chunks=-1), dtype=float, meta=np.empty((0, 0))), dims=("a", "b")
    )
    with dask.config.set(scheduler="synchronous"):
        lazy = xr.DataArray(lazy.data, dims=("layer", "head"))
        assert not counted
        plot.heat_map(lazy, center=0)
    assert len(counted) == 1


def test_figures_are_drawn_on_the_axes_given() -> None:
    ax = pyplot.subplots()[1]
    for draw in (plot.heat_map, plot.line):
        assert draw(grid(layer=2, head=3), ax=ax) is ax


def test_labels_are_texts_and_never_mathematics_or_missing_glyphs() -> None:
    assert token_label("a very long token indeed") == "a·very·long·t…"
    assert drawable("$漢") == r"\$\u6f22"


def test_the_front_door_has_the_figures() -> None:
    assert forebay.plot is plot
    assert set(plot.__all__) <= set(dir(plot))
