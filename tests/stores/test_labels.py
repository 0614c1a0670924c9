"""Labels of tokens are what a plain expansion of the offsets says, under every selection, without being expanded."""

from __future__ import annotations

import copy
import itertools
import pickle
import time
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from forebay.stores.errors import SchemaError
from forebay.stores.labels import TokenIndex, token_coords

LEVELS = ("document", "sequence", "position")


def expand(sequence_len: list[int], document_len: list[int]) -> pd.DataFrame:
    """The oracle: every label of every token, written out."""
    position = [p for n in sequence_len for p in range(n)]
    sequence = [s for s, n in enumerate(sequence_len) for _ in range(n)]
    document = [d for d, n in enumerate(document_len) for _ in range(n)]
    return pd.DataFrame({"document": document, "sequence": sequence, "position": position}, dtype="int64")


def dataset(sequence_len: list[int], document_len: list[int]) -> xr.Dataset:
    n_token = sum(sequence_len)
    start = [np.cumsum([0, *lengths])[:-1] for lengths in (sequence_len, document_len)]
    return xr.Dataset({"value": ("token", np.arange(n_token))}, coords=token_coords(n_token, start[0], start[1]))


def assert_labels(ds: xr.Dataset, table: pd.DataFrame) -> None:
    """`table` is what is left of the oracle; `value` numbers the tokens, as does its own index."""
    np.testing.assert_array_equal(ds.value.values, table.index.values)
    for level in LEVELS:
        assert ds[level].dtype == np.int64
        assert ds[level].dims == ("token",)
        np.testing.assert_array_equal(ds[level].values, table[level].values)


@st.composite
def offsets(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    n_token = draw(st.integers(0, 40))

    def cut(empty: bool) -> list[int]:
        cuts = draw(st.lists(st.integers(0, n_token), max_size=12, unique=not empty))
        lengths = np.diff([0, *sorted(cuts), n_token])
        return [int(n) for n in lengths if empty or n]

    return cut(empty=False), cut(empty=True)


def label_of(level: str) -> st.SearchStrategy[Any]:
    label = st.integers(-2, 14)
    return st.one_of(
        label,
        st.lists(label, max_size=4),
        st.builds(slice, st.none() | label, st.none() | label),
    )


def positional(n: int) -> st.SearchStrategy[Any]:
    edge = st.none() | st.integers(-n - 2, n + 2)
    choices: list[st.SearchStrategy[Any]] = [st.builds(slice, edge, edge, st.sampled_from([None, 1, 2, 3, -1, -2]))]
    if n:
        choices.append(st.lists(st.integers(-n, n - 1), max_size=6).map(lambda v: np.array(v, dtype=np.int64)))
    choices.append(st.lists(st.booleans(), min_size=n, max_size=n).map(lambda v: np.array(v, dtype=bool)))
    return st.one_of(choices)


def select(table: pd.DataFrame, labels: dict[str, Any]) -> pd.DataFrame | None:
    """The oracle of `.sel`: boolean masks, lists nested in their own order; None where a KeyError is due."""
    mask = np.ones(len(table), dtype=bool)
    for level, label in labels.items():
        column = table[level].to_numpy()
        if isinstance(label, slice):
            mask &= column >= label.start if label.start is not None else True
            mask &= column <= label.stop if label.stop is not None else True
        else:
            wanted = np.atleast_1d(np.array(label, dtype=np.int64))
            if not set(wanted) <= set(column):
                return None
            mask &= np.isin(column, wanted)
    found = table[mask]
    if found.empty and all(isinstance(label, int) for label in labels.values()):
        return None
    lists = {k: v for k, v in labels.items() if isinstance(v, list)}
    if all(a < b for v in lists.values() for a, b in itertools.pairwise(v)):
        return found
    if "position" in lists:
        lists.setdefault("sequence", sorted(set(found["sequence"])))
    parts = [found]
    for level in LEVELS:
        if level in lists:
            parts = [part[part[level] == label] for part in parts for label in lists[level]]
    return pd.concat(parts) if parts else found.iloc[:0]


@given(offsets(), st.data())
def test_any_selection_of_any_selection_is_what_masks_select(lengths: Any, data: st.DataObject) -> None:
    ds, table = dataset(*lengths), expand(*lengths)
    assert_labels(ds, table)
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            key = data.draw(positional(len(table)))
            ds, table = ds.isel(token=key), table.iloc[key]
        else:
            labels = {
                level: data.draw(label_of(level))
                for level in data.draw(st.lists(st.sampled_from(LEVELS), min_size=1, unique=True))
            }
            expected = select(table, labels)
            if expected is None:
                with pytest.raises(KeyError):
                    ds.sel(labels)
                continue
            ds, table = ds.sel(labels), expected
        assert_labels(ds, table)
        assert isinstance(ds.xindexes["sequence"], TokenIndex)


EXAMPLE = ([4, 4, 2], [3, 0, 5, 2])


def test_every_label_of_every_slice_is_found_or_missing() -> None:
    index, table = dataset(*EXAMPLE).xindexes["document"], expand(*EXAMPLE)
    edges = [None, 0, 1, 3, 4, 6, 9]
    for start, stop, step in itertools.product(edges, edges, [1, 2, 3, -1, -2, -3]):
        part, left = index.isel({"token": slice(start, stop, step)}), table.iloc[start:stop:step]
        assert part is not None
        for level, label in itertools.product(LEVELS, range(-1, 6)):
            expected = np.flatnonzero(left[level] == label)
            if len(expected) == 0:
                for missing in (label, [label], [*sorted(set(left[level])), label]):
                    with pytest.raises(KeyError):
                        part.sel({level: missing})
                continue
            key = part.sel({level: label}).dim_indexers["token"]
            found = np.arange(len(left))[key]
            np.testing.assert_array_equal(found, expected)


def test_slices_include_their_stop() -> None:
    ds = dataset(*EXAMPLE)
    assert ds.sel(document=slice(1, 2)).value.values.tolist() == [3, 4, 5, 6, 7]
    assert ds.sel(sequence=slice(1, 1), position=slice(2, None)).value.values.tolist() == [6, 7]
    assert ds.sel(document=2, position=slice(0, 1)).value.values.tolist() == [4, 5]
    assert ds.sel(sequence=slice(-5, 0)).value.values.tolist() == [0, 1, 2, 3]


def test_positions_that_only_look_contiguous_stay_in_order() -> None:
    ds, table = dataset(*EXAMPLE), expand(*EXAMPLE)
    order = np.array([2, 4, 3, 5])
    assert_labels(ds.isel(token=order), table.iloc[order])


def test_a_contiguous_selection_is_a_basic_slice() -> None:
    index = dataset(*EXAMPLE).xindexes["document"]
    for labels, expected in [
        ({"document": 2}, slice(3, 8)),
        ({"sequence": [1, 2]}, slice(4, 10)),
        ({"sequence": 1, "position": 0}, slice(4, 5)),
        ({"document": 2, "position": slice(1, None)}, np.array([3, 5, 6, 7])),
        ({"document": 0, "position": slice(9, 20)}, slice(0, 0)),
    ]:
        found = index.sel(labels_parsed := dict(labels)).dim_indexers["token"]
        assert type(found) is type(expected), labels_parsed
        np.testing.assert_array_equal(found, expected)


def test_one_token_keeps_the_dimension() -> None:
    assert dataset(*EXAMPLE).sel(sequence=2, position=1).value.dims == ("token",)


def test_lists_give_their_own_order_and_repeat() -> None:
    ds = dataset(*EXAMPLE)
    assert ds.sel(sequence=[2, 0, 2]).value.values.tolist() == [8, 9, 0, 1, 2, 3, 8, 9]
    assert ds.sel(sequence=[2, 2]).value.values.tolist() == [8, 9, 8, 9]
    assert ds.sel(position=[1, 0]).sequence.values.tolist() == [0, 0, 1, 1, 2, 2]
    assert ds.sel(position=[1, 0]).position.values.tolist() == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"document": 4}, "no token has document=4; legal are 0 to 3"),
        ({"sequence": -1}, "no token has sequence=-1; legal are 0 to 2"),
        ({"position": [0, 4]}, "no token has position=4; legal are 0 to 3"),
        ({"document": 1}, "document=1 is an empty document: no token has it; legal are 0 to 3"),
        ({"sequence": 2, "position": 3}, "each of sequence=2, position=3 is there, but no token has all of them"),
    ],
)
def test_a_missing_label_is_named_with_the_legal_range(labels: dict[str, Any], message: str) -> None:
    with pytest.raises(KeyError) as error:
        dataset(*EXAMPLE).sel(labels)
    assert error.value.args[0] == message


def test_a_label_that_was_selected_away_is_missing() -> None:
    part = dataset(*EXAMPLE).sel(document=[0, 3])
    with pytest.raises(KeyError, match="document=2 is not among the 5 tokens selected of 10; legal are 0 to 3"):
        part.sel(document=[0, 2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"document": 1.0}, "document has dtype float64 .* expected an integer, a list of integers, or a slice"),
        ({"document": True}, "document has dtype bool"),
        ({"document": "a"}, "document has dtype"),
        ({"document": [[1], [2]]}, r"shape \(2, 1\)"),
        ({"position": slice(0, 8, 2)}, r"no step; give range\(start, stop, step\)"),
        ({"position": slice(0.5, 8)}, "a slice of integers"),
        ({"document": xr.DataArray([0, 2], dims="pick")}, "give its .values as a list"),
    ],
)
def test_labels_that_are_no_labels_are_refused(labels: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dataset(*EXAMPLE).sel(labels)


def test_nearest_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="method= and tolerance= do not apply"):
        dataset(*EXAMPLE).sel(document=1, method="nearest")


def test_a_range_and_a_numpy_integer_are_labels() -> None:
    ds = dataset(*EXAMPLE)
    assert ds.sel(position=range(0, 4, 2)).value.values.tolist() == [0, 2, 4, 6, 8]
    assert ds.sel(document=np.int32(3)).value.values.tolist() == [8, 9]
    assert ds.sel(document=ds.document[9]).value.values.tolist() == [8, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, [1, 2], [0]), r"sequence_start begins at 1 with n_token = 4"),
        ((4, [0, 2, 2], [0]), r"sequence_start\[1\] = 2: the sequence has no tokens"),
        ((4, [0, 4], [0]), r"sequence_start\[1\] = 4: the sequence has no tokens"),
        ((4, [0], [0, 3, 2]), r"document_start\[1\] = 3 is above document_start\[2\] = 2"),
        ((4, [0], [0, 5]), r"document_start\[1\] = 5 is above n_token = 4"),
        ((4, [], [0]), r"sequence_start begins at 4"),
        ((4, [0.0], [0]), r"sequence_start has dtype float64"),
        ((4, [[0]], [0]), r"shape \(1, 1\)"),
    ],
)
def test_offsets_that_are_none_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        token_coords(*arguments)


def test_a_position_drops_the_dimension_and_the_index() -> None:
    one = dataset(*EXAMPLE).isel(token=5)
    assert (int(one.document), int(one.sequence), int(one.position)) == (2, 1, 1)
    assert not one.xindexes


def test_arrays_on_other_dimensions_keep_right_labels_without_an_index() -> None:
    ds, table = dataset(*EXAMPLE), expand(*EXAMPLE)
    picks = np.array([[9, 0, 3], [1, 1, 5]])
    points = ds.isel(token=(("row", "column"), picks))
    for level in LEVELS:
        np.testing.assert_array_equal(points[level].values, table[level].values[picks])
    assert not points.xindexes


def test_masks_as_arrays_of_labels() -> None:
    ds, table = dataset(*EXAMPLE), expand(*EXAMPLE)
    assert_labels(ds.isel(token=ds.position > 0), table[table.position > 0])
    assert_labels(ds.where(ds.position > 0, drop=True), table[table.position > 0])
    lazy = ds.chunk(token=3)
    assert_labels(lazy.isel(token=(lazy.position > 0).compute()), table[table.position > 0])


def test_labels_survive_chunk_load_copy_and_pickle() -> None:
    ds, table = dataset(*EXAMPLE), expand(*EXAMPLE)
    for same in (
        ds.chunk(token=3),
        ds.chunk(token=3).load(),
        ds.copy(deep=True),
        ds.copy(deep=False),
        copy.deepcopy(ds),
        pickle.loads(pickle.dumps(ds)),  # noqa: S301  our own bytes
        ds.compute(),
        ds.persist(),
        ds.drop_vars("value").assign(value=ds.value),
    ):
        assert_labels(same, table)
        assert_labels(same.sel(document=2), table[table.document == 2])
        assert_labels(same.isel(token=slice(1, 9, 2)), table.iloc[1:9:2])
        xr.testing.assert_identical(same.compute(), ds.compute())


def test_arithmetic_aligns_equal_labels() -> None:
    ds, same = dataset(*EXAMPLE), dataset(*EXAMPLE)
    assert_labels((ds + same) / 2, expand(*EXAMPLE))
    assert_labels((ds.sel(document=2) + same.isel(token=np.arange(3, 8))) / 2, expand(*EXAMPLE).iloc[3:8])


def test_the_same_labels_of_different_stores_align() -> None:
    ds, longer = dataset(*EXAMPLE), dataset([4, 4, 2, 7], [3, 0, 5, 2, 7])
    assert (ds + longer.isel(token=slice(10))).sizes == {"token": 10}
    permuted = ds.isel(token=[3, 1])
    with pytest.raises(xr.AlignmentError):
        permuted + ds.isel(token=[1, 3])


def test_arithmetic_of_different_tokens_is_refused() -> None:
    ds = dataset(*EXAMPLE)
    for other in (ds.sel(document=2), dataset([5, 5], EXAMPLE[1])):
        with pytest.raises(xr.AlignmentError, match="cover different tokens"):
            ds + other


def test_concatenation_is_refused() -> None:
    ds = dataset(*EXAMPLE)
    with pytest.raises(NotImplementedError, match="assign token_coords"):
        xr.concat([ds, ds], dim="token")
    bare = ds.drop_vars(list(LEVELS))
    assert xr.concat([bare, bare], dim="token").sizes == {"token": 20}


def test_an_index_cannot_be_made_of_labels() -> None:
    bare = dataset(*EXAMPLE).drop_indexes(list(LEVELS))
    with pytest.raises(NotImplementedError, match="token_coords"):
        bare.set_xindex(list(LEVELS), TokenIndex)


def test_renamed_labels_select() -> None:
    ds = dataset(*EXAMPLE).rename(document="text", token="row")
    assert ds.sel(text=2).value.values.tolist() == [3, 4, 5, 6, 7]
    assert ds.sel(text=2).text.dims == ("row",)
    with pytest.raises(KeyError, match="no token has text=9"):
        ds.sel(text=9)


def test_attributes_of_labels_stay() -> None:
    ds = dataset(*EXAMPLE)
    ds.document.attrs["long_name"] = "which text"
    assert ds.sel(sequence=1).document.attrs == {"long_name": "which text"}


def test_groups_and_means_by_label() -> None:
    ds, table = dataset(*EXAMPLE), expand(*EXAMPLE).assign(value=np.arange(10))
    means = ds.value.groupby("document").mean()
    np.testing.assert_array_equal(means.values, table.groupby("document").value.mean().values)


def test_a_tree_inherits_the_labels() -> None:
    ds = dataset(*EXAMPLE)
    tree = xr.DataTree.from_dict({"/": ds[[]].assign_coords(ds.coords), "/layer": ds})
    assert_labels(tree["layer"].to_dataset().sel(document=2), expand(*EXAMPLE).iloc[3:8])
    assert_labels(tree.isel(token=slice(3, 8))["layer"].to_dataset(), expand(*EXAMPLE).iloc[3:8])
    selected = tree.map_over_datasets(lambda node: node.sel(document=2))
    assert_labels(selected["layer"].to_dataset(), expand(*EXAMPLE).iloc[3:8])


def test_no_tokens_at_all() -> None:
    ds = dataset([], [0, 0])
    assert_labels(ds, expand([], []))
    assert ds.sel(position=slice(0, 5)).sizes == {"token": 0}
    with pytest.raises(KeyError, match="legal are 0 to 1"):
        ds.sel(document=0)
    with pytest.raises(KeyError, match="there are none"):
        ds.sel(sequence=0)


N_TOKEN = 10**9
STRIDE = 1024


@pytest.fixture(scope="module")
def long() -> xr.Dataset:
    rng = np.random.default_rng(0)
    document_start = np.sort(rng.integers(0, N_TOKEN, 10**6))
    document_start[0] = 0
    return xr.Dataset(coords=token_coords(N_TOKEN, np.arange(0, N_TOKEN, STRIDE), document_start))


def seconds(action: Any) -> float:
    best = np.inf
    for _ in range(5):
        began = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - began)
    return float(best)


def test_a_billion_tokens_take_no_memory(long: xr.Dataset) -> None:
    tracemalloc.start()
    try:
        repr(long)
        long._repr_html_()
        part = long.sel(document=7, position=slice(0, 10))
        part.position.load()
        long.isel(token=slice(None, None, -3)).isel(token=[5, 6]).document.load()
        chunked = long.chunk(token=1 << 22)
        chunked.sequence[123456789].load()
        pickle.dumps(part)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6  # the offsets themselves, a few times; one label of all tokens would be 8e9


def test_a_billion_tokens_take_no_time(long: xr.Dataset) -> None:
    # ten times what is measured on a quiet machine, and a thousandth of what a pass over the tokens takes
    assert seconds(lambda: long.sel(document=7)) < 0.01
    assert seconds(lambda: long.sel(document=7, position=slice(0, 10))) < 0.01
    assert seconds(lambda: long.sel(sequence=123456, position=3)) < 0.01
    assert seconds(lambda: repr(long)) < 0.1


def test_a_billion_tokens_are_labelled_right(long: xr.Dataset) -> None:
    tokens = np.array([0, 1, STRIDE - 1, STRIDE, 5 * 10**8, N_TOKEN - 1])
    part = long.isel(token=tokens)
    np.testing.assert_array_equal(part.sequence.values, tokens // STRIDE)
    np.testing.assert_array_equal(part.position.values, tokens % STRIDE)
    document = int(part.document.values[4])
    whole = long.sel(document=document)
    assert whole.document.values.min() == whole.document.values.max() == document
    odd = long.isel(token=slice(1, None, 2))
    assert odd.sel(position=[5]).sizes["token"] == N_TOKEN // STRIDE + 1
    with pytest.raises(KeyError, match="position=4 is not among"):
        odd.sel(position=4)
