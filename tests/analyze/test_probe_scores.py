"""Statistics of scores are scikit-learn's and scipy's; intervals are those of documents drawn again, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, r2_score, roc_auc_score

from forebay.stages.analyze.probe_scores import Draws, Measures, statistics_of, wilson

N, N_DOCUMENT = 911, 23


def measures(n_class: int, n_set: int = 2, **changes: Any) -> Measures:
    rng = np.random.default_rng(4)
    labels: NDArray[Any] = rng.integers(0, n_class, (n_set, N)) if n_class else rng.normal(size=(n_set, N)) + 100
    document = np.sort(rng.integers(0, N_DOCUMENT, N))
    given = {"n_bootstrap": 40, "confidence": 0.9, "seed": 6, "validation": document % 3 == 0}
    return Measures(labels=labels, document=document, n_class=n_class, **(given | changes))


def scores_of(given: Measures, n_column: int = 1, strength: float = 0.8) -> NDArray[np.float64]:
    """Scores [example, set, column × class] that know something of the labels, rounded, so that some are equal."""
    rng = np.random.default_rng(5)
    label = given.labels.T[:, :, None, None]
    n_score = given.n_class if given.n_class > 2 else 1
    signal = (label == np.arange(n_score)) if n_score > 1 else label
    noise = rng.normal(size=(N, len(given.labels), n_column, n_score)) * np.arange(1, n_column + 1)[:, None]
    return np.round(strength * signal + noise - (0.4 if given.n_class == 2 else 0), 1).reshape(N, len(given.labels), -1)


def table(given: Measures, scores: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Statistics by name, [set, column, split]."""
    return dict(zip(statistics_of(given.n_class), np.moveaxis(given.table(scores), -1, 0), strict=True))


def predicted(given: Measures, scores: NDArray[np.float64]) -> NDArray[Any]:
    return (scores[:, 0] > 0).astype(int) if given.n_class == 2 else scores.argmax(1)


def drawn_again(document: NDArray[Any], given: Measures) -> list[NDArray[np.float64]]:
    """How often every example is drawn, draw by draw."""
    documents, place = np.unique(document, return_inverse=True)
    draws = Draws(len(documents), given.n_bootstrap, given.confidence, given.seed)
    return [count[place] for some in draws.counts() for count in some]


@pytest.mark.parametrize("n_class", [2, 5])
def test_accuracies_and_their_intervals_are_those_of_weighted_examples(n_class: int) -> None:
    given = measures(n_class)
    scores = scores_of(given)
    found = table(given, scores)
    for split, some in enumerate((~given.validation, given.validation)):
        label, guess = given.labels[0, some], predicted(given, scores[some, 0])
        of_main = {name: values[0, 0, split] for name, values in found.items()}
        assert of_main["n_example"] == some.sum()
        weights = drawn_again(given.document[some], given)
        for name, statistic in (("accuracy", accuracy_score), ("balanced_accuracy", balanced_accuracy_score)):
            assert of_main[name] == pytest.approx(statistic(label, guess), abs=1e-12)
            again = [statistic(label, guess, sample_weight=weight) for weight in weights]
            expected = np.quantile(again, [0.05, 0.95])
            assert [of_main[f"{name}_low"], of_main[f"{name}_high"]] == pytest.approx(list(expected), abs=1e-12)
        exact = binomtest(int((label == guess).sum()), len(label)).proportion_ci(0.9, "wilson")
        assert (of_main["accuracy_wilson_low"], of_main["accuracy_wilson_high"]) == pytest.approx(
            tuple(exact), abs=1e-12
        )


def test_the_auc_is_exact_with_ties_and_its_interval_close_to_that_of_weighted_examples() -> None:
    given = measures(2)
    scores = scores_of(given)
    found = table(given, scores)
    for split, some in enumerate((~given.validation, given.validation)):
        label, score = given.labels[0, some], scores[some, 0, 0]
        assert found["auc"][0, 0, split] == pytest.approx(roc_auc_score(label, score), abs=1e-12)
        again = [roc_auc_score(label, score, sample_weight=w) for w in drawn_again(given.document[some], given)]
        ends = [found["auc_low"][0, 0, split], found["auc_high"][0, 0, split]]
        assert ends == pytest.approx(list(np.quantile(again, [0.05, 0.95])), abs=2e-3)
        assert ends[1] - ends[0] > 0.02


def test_aucs_of_perfect_reversed_and_constant_scores() -> None:
    given = measures(2, n_set=1)
    for score, expected in ((given.labels[0] - 0.5, 1.0), (0.5 - given.labels[0], 0.0), (np.zeros(N), 0.5)):
        found = table(given, score[:, None, None])
        for name in ("auc", "auc_low", "auc_high"):
            assert found[name] == pytest.approx(np.full((1, 1, 2), expected), abs=1e-12)


def test_r2_and_its_interval_are_those_of_weighted_examples_at_every_column() -> None:
    given = measures(0)
    scores = scores_of(given, n_column=3, strength=1.0)
    found = table(given, scores)
    assert found["r2"].shape == (2, 3, 2)
    for split, some in enumerate((~given.validation, given.validation)):
        weights = drawn_again(given.document[some], given)
        for column in range(3):
            label, guess = given.labels[0, some], scores[some, 0, column]
            assert found["r2"][0, column, split] == pytest.approx(r2_score(label, guess), abs=1e-12)
            again = [r2_score(label, guess, sample_weight=weight) for weight in weights]
            ends = [found["r2_low"][0, column, split], found["r2_high"][0, column, split]]
            assert ends == pytest.approx(list(np.quantile(again, [0.05, 0.95])), abs=1e-9)


@pytest.mark.parametrize("n_class", [0, 2, 3])
def test_selectivity_is_drawn_from_the_same_documents_for_labels_and_controls(n_class: int) -> None:
    given = measures(n_class, n_set=3)
    scores = scores_of(given)
    found = table(given, scores)
    main, statistic = ("accuracy", accuracy_score) if n_class else ("r2", r2_score)
    guess = [predicted(given, scores[:, i]) if n_class else scores[:, i, 0] for i in range(3)]
    for split, some in enumerate((~given.validation, given.validation)):
        weights = drawn_again(given.document[some], given)

        def both(i: int, weight: Any = None, some: NDArray[np.bool_] = some) -> float:
            first, other = (statistic(given.labels[j, some], guess[j][some], sample_weight=weight) for j in (0, i))
            return float(first - other)

        assert np.isnan(found["selectivity"][0]).all()
        for i in (1, 2):
            assert found["selectivity"][i, 0, split] == pytest.approx(both(i), abs=1e-12)
            assert found["selectivity"][i, 0, split] == pytest.approx(
                found[main][0, 0, split] - found[main][i, 0, split], abs=1e-12
            )
            ends = [found["selectivity_low"][i, 0, split], found["selectivity_high"][i, 0, split]]
            expected = np.quantile([both(i, weight) for weight in weights], [0.05, 0.95])
            assert ends == pytest.approx(list(expected), abs=1e-9)


def test_documents_of_copies_have_wider_intervals_than_wilson_says() -> None:
    """Every token of a document is right or wrong together, so that there are 23 examples and not 911."""
    given = measures(2, n_set=1, n_bootstrap=400)
    right = np.random.default_rng(8).random(N_DOCUMENT) < 0.7
    score = np.where(right[given.document], given.labels[0] - 0.5, 0.5 - given.labels[0])
    found = {name: values[0, 0, 0] for name, values in table(given, score[:, None, None]).items()}
    wide = found["accuracy_high"] - found["accuracy_low"]
    assert wide > 3 * (found["accuracy_wilson_high"] - found["accuracy_wilson_low"])


def test_intervals_hold_what_they_say_over_many_samples_of_documents() -> None:
    rng = np.random.default_rng(9)
    inside = 0
    for seed in range(120):
        share = np.clip(rng.normal(0.7, 0.12, size=60), 0, 1)
        right = rng.random((60, 25)) < share[:, None]
        label = np.ones(1500, int)
        label[::2] = 0
        score = np.where(right.ravel(), label - 0.5, 0.5 - label)
        given = Measures(
            labels=label[None],
            document=np.repeat(np.arange(60), 25),
            validation=np.zeros(1500, bool),
            n_class=2,
            n_bootstrap=100,
            confidence=0.8,
            seed=seed,
        )
        found = table(given, score[:, None, None])
        inside += bool(found["accuracy_low"][0, 0, 0] <= 0.7 <= found["accuracy_high"][0, 0, 0])
    assert 0.68 < inside / 120 < 0.92


def test_one_document_and_no_draws_have_no_interval() -> None:
    for given in (measures(2, validation=measures(2).document == 7), measures(2, n_bootstrap=0)):
        found = table(given, scores_of(given))
        assert np.isfinite(found["accuracy"]).all()
        assert np.isnan(found["accuracy_low"][0, 0, 1])
        assert np.isnan(found["auc_high"][0, 0, 1])
        assert np.isfinite(found["accuracy_wilson_low"][0]).all()


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_examples_whose_scores_are_not_finite_do_not_count_and_none_at_all_gives_nan(hole: float) -> None:
    given = measures(3)
    scores = scores_of(given)
    lost = np.arange(N) % 5 == 0
    holes = np.where(lost[:, None, None], hole, scores)
    kept = ~lost
    fewer = measures(3, validation=given.validation[kept])
    fewer = Measures(
        labels=given.labels[:, kept],
        document=given.document[kept],
        validation=given.validation[kept],
        n_class=3,
        n_bootstrap=fewer.n_bootstrap,
        confidence=fewer.confidence,
        seed=fewer.seed,
    )
    np.testing.assert_array_equal(given.table(holes), fewer.table(scores[kept]))
    for n_class in (0, 2, 3):
        given = measures(n_class)
        nothing = table(given, np.full_like(scores_of(given), np.nan))
        assert (nothing.pop("n_example") == 0).all()
        assert all(np.isnan(values).all() for values in nothing.values())


def test_entries_are_measured_each_by_itself() -> None:
    given = measures(3)
    parts = [scores_of(given, strength=strength) for strength in (0.2, 0.5, 1.0, 1.5, 2.0, 3.0)]
    found = given.table(np.stack(parts).reshape(2, 3, *parts[0].shape))
    for place, part in zip(np.ndindex(2, 3), parts, strict=True):
        np.testing.assert_array_equal(found[place], given.table(part))


def test_draws_are_the_same_however_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from forebay.stages.analyze import probe_scores

    at_once = np.concatenate(list(Draws(11, 30, 0.9, 2).counts()))
    monkeypatch.setattr(probe_scores, "DRAWN_AT_ONCE", 40)
    in_parts = list(Draws(11, 30, 0.9, 2).counts())
    assert len(in_parts) == 10
    np.testing.assert_array_equal(np.concatenate(in_parts), at_once)
    assert (at_once.sum(1) == 11).all()


def test_wilsons_interval_of_nothing_is_nan() -> None:
    assert np.isnan(wilson(0, 0, 0.95)).all()
    assert wilson(0, 10, 0.95)[0] == pytest.approx(0, abs=1e-15)
