"""Metrics against scikit-learn and plain loops; intervals that hold the estimate, narrow, and cover as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from ml import metrics
from ml.files import Predictions
from ml.metrics import estimate

NAMES = ["accuracy", "macro_f1", "loss", "calibration_error"]


def random_predictions(examples: int, classes: int, seeds: int, random_seed: int) -> Predictions:
    """Probabilities that lean towards the right class; none under 0.001, where scikit-learn clips otherwise."""
    random = np.random.RandomState(random_seed)
    labels = random.randint(0, classes, examples)
    scores = random.dirichlet(np.ones(classes), (seeds, examples)) + 0.002
    scores[:, np.arange(examples), labels] += random.rand(seeds, examples)
    probabilities = (scores / scores.sum(2, keepdims=True)).astype(np.float32)
    return predictions_of(labels, probabilities)


def predictions_of(labels: np.ndarray, probabilities: np.ndarray) -> Predictions:
    ids = np.array([f"id{row}" for row in range(len(labels))])
    return Predictions(ids, np.asarray(labels, np.int64), np.arange(len(probabilities)), probabilities)


def of_correctness(right: np.ndarray, confidence: float = 0.9) -> Predictions:
    """Two classes, one seed: the label of row k gets `confidence` where right[k], else the other class does."""
    labels = np.arange(len(right)) % 2
    predicted = np.where(right, labels, 1 - labels)
    probabilities = np.full((1, len(right), 2), 1 - confidence, np.float32)
    probabilities[0, np.arange(len(right)), predicted] = confidence
    return predictions_of(labels, probabilities)


cases = st.builds(
    random_predictions, st.integers(2, 60), st.integers(2, 5), st.integers(1, 3), st.integers(0, 2**32 - 1)
)


def loop_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> float:
    total = 0.0
    for number in range(bins):
        confidences, rights = [], []
        for label, row in zip(labels, probabilities.astype(np.float64)):
            last = number == bins - 1
            if number / bins <= row.max() and (row.max() < (number + 1) / bins or last):
                confidences.append(row.max())
                rights.append(row.argmax() == label)
        if confidences:
            total += len(confidences) / len(labels) * abs(np.mean(confidences) - np.mean(rights))
    return total


# Point estimates


@settings(max_examples=30)
@given(cases)
def test_accuracy_macro_f1_and_loss_are_those_of_scikit_learn(predictions: Predictions) -> None:
    found = estimate(predictions, 100, 15)
    classes = range(predictions.probabilities.shape[2])
    for seed, probabilities in enumerate(predictions.probabilities):
        predicted = probabilities.argmax(1)
        accuracy = sklearn_metrics.accuracy_score(predictions.labels, predicted)
        macro_f1 = sklearn_metrics.f1_score(predictions.labels, predicted, average="macro")
        loss = sklearn_metrics.log_loss(predictions.labels, probabilities, labels=list(classes))
        assert found["accuracy"].per_seed[seed] == pytest.approx(accuracy, abs=1e-12)
        assert found["macro_f1"].per_seed[seed] == pytest.approx(macro_f1, abs=1e-12)
        assert found["loss"].per_seed[seed] == pytest.approx(loss, rel=1e-5)


@settings(max_examples=30)
@given(cases, st.integers(2, 30))
def test_calibration_error_is_that_of_a_loop_over_bins(predictions: Predictions, bins: int) -> None:
    found = estimate(predictions, 100, bins)["calibration_error"]
    for value, probabilities in zip(found.per_seed, predictions.probabilities):
        assert value == pytest.approx(
            loop_calibration_error(predictions.labels, probabilities, bins), abs=1e-9
        )


@settings(max_examples=30)
@given(cases)
def test_mean_and_spread_are_over_the_seeds(predictions: Predictions) -> None:
    for found in estimate(predictions, 100, 10).values():
        assert len(found.per_seed) == len(predictions.seeds)
        assert found.mean == pytest.approx(np.mean(found.per_seed), abs=1e-12)
        expected = np.std(found.per_seed, ddof=1) if len(found.per_seed) > 1 else 0.0
        assert found.seed_std == pytest.approx(expected, abs=1e-12)


def test_one_seed_has_no_spread_and_equal_seeds_none_either() -> None:
    one = random_predictions(50, 3, 1, 0)
    three = predictions_of(one.labels, np.repeat(one.probabilities, 3, axis=0))
    for name in NAMES:
        assert estimate(one, 100, 10)[name].seed_std == 0.0
        assert estimate(three, 100, 10)[name].seed_std == pytest.approx(0, abs=1e-12)
        assert estimate(three, 100, 10)[name].mean == pytest.approx(estimate(one, 100, 10)[name].mean)


def test_class_neither_there_nor_predicted_is_left_out_of_macro_f1() -> None:
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array(
        [[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]]], np.float32
    )
    found = estimate(predictions_of(labels, probabilities), 100, 10)["macro_f1"]
    assert found.mean == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_class_that_is_only_predicted_counts_as_0_in_macro_f1() -> None:
    labels = np.array([0, 0, 1])
    probabilities = np.eye(3, dtype=np.float32)[[0, 0, 2]][None]
    assert estimate(predictions_of(labels, probabilities), 100, 10)["macro_f1"].mean == pytest.approx(1 / 3)


def test_probability_0_for_the_right_class_has_a_large_but_finite_loss() -> None:
    probabilities = np.array([[[1.0, 0.0], [1.0, 0.0]]], np.float32)
    found = estimate(predictions_of(np.array([0, 1]), probabilities), 100, 10)["loss"]
    assert found.mean == pytest.approx(-np.log(np.finfo(np.float32).tiny) / 2)
    assert np.isfinite([found.low, found.high]).all()


def test_probability_1_falls_into_the_last_bin() -> None:
    assert metrics.bin_of(np.array([0.0, 0.0999, 0.1, 0.95, 1.0]), 10).tolist() == [0, 0, 1, 9, 9]


def test_perfect_predictions_leave_no_doubt() -> None:
    labels = np.arange(40) % 4
    found = estimate(predictions_of(labels, np.eye(4, dtype=np.float32)[labels][None]), 100, 10)
    for name, value in (("accuracy", 1.0), ("macro_f1", 1.0), ("loss", 0.0), ("calibration_error", 0.0)):
        assert (found[name].mean, found[name].low, found[name].high) == pytest.approx((value, value, value))


# Intervals


@settings(max_examples=40)
@given(
    st.builds(
        random_predictions,
        st.integers(30, 200),
        st.integers(2, 5),
        st.integers(1, 3),
        st.integers(0, 2**32 - 1),
    ),
    st.integers(2, 20),
)
def test_interval_holds_the_point_estimate(predictions: Predictions, bins: int) -> None:
    for name, found in estimate(predictions, 200, bins).items():
        assert found.low - 1e-12 <= found.mean <= found.high + 1e-12, name


@pytest.mark.parametrize("name", NAMES)
def test_interval_narrows_with_the_root_of_the_number_of_examples(name: str) -> None:
    few, many = (estimate(random_predictions(n, 3, 2, 0), 400, 10)[name] for n in (200, 3200))
    assert 0.15 < (many.high - many.low) / (few.high - few.low) < 0.4


def test_interval_of_the_accuracy_covers_the_truth_about_95_times_in_100() -> None:
    random, truth, trials = np.random.RandomState(0), 0.85, 300
    covered = 0
    for _ in range(trials):
        found = estimate(of_correctness(random.rand(250) < truth), 200, 2)["accuracy"]
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / trials <= 0.98  # 0.95 ± 3 standard errors, and what 250 examples make coarser


def test_interval_is_of_the_mean_over_the_seeds_on_the_same_resamples() -> None:
    one = of_correctness(np.arange(200) % 10 > 0)
    twice = predictions_of(one.labels, np.repeat(one.probabilities, 2, axis=0))
    for name in NAMES:
        single, double = estimate(one, 200, 10)[name], estimate(twice, 200, 10)[name]
        assert (single.low, single.high) == pytest.approx((double.low, double.high))


def test_estimate_is_the_same_at_every_call_whatever_the_global_generator_did() -> None:
    predictions = random_predictions(80, 4, 2, 3)
    first = estimate(predictions, 150, 10)
    np.random.rand(1000)
    assert estimate(predictions, 150, 10) == first


def test_estimate_does_not_depend_on_how_many_resamples_are_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictions = random_predictions(80, 4, 2, 3)
    whole = estimate(predictions, 150, 10)
    for chunk in (1, 80 * 7):
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        pieces = estimate(predictions, 150, 10)
        for name in NAMES:
            assert pieces[name].per_seed == whole[name].per_seed
            assert (pieces[name].low, pieces[name].high) == pytest.approx((whole[name].low, whole[name].high))


def test_resamples_draw_as_many_examples_as_there_are() -> None:
    weights = np.concatenate(list(metrics.bootstrap_weights(50, 120)))
    assert weights.shape == (120, 50) and (weights.sum(1) == 50).all() and (weights >= 0).all()
    assert len(np.unique(weights, axis=0)) == 120


# Tables


@settings(max_examples=30)
@given(cases)
def test_confusion_and_class_scores_are_those_of_scikit_learn_over_all_seeds(
    predictions: Predictions,
) -> None:
    seeds, _, classes = predictions.probabilities.shape
    actual, predicted = np.tile(predictions.labels, seeds), predictions.probabilities.argmax(2).ravel()
    counts = sklearn_metrics.confusion_matrix(actual, predicted, labels=range(classes))
    assert metrics.confusion(predictions).tolist() == counts.tolist()
    expected = sklearn_metrics.precision_recall_fscore_support(
        actual, predicted, labels=range(classes), zero_division=np.nan
    )
    for number, found in enumerate(metrics.per_class(predictions)):
        assert found.precision == pytest.approx(expected[0][number], nan_ok=True)
        assert found.recall == pytest.approx(expected[1][number], nan_ok=True)
        if counts[number].sum() and counts[:, number].sum():
            assert found.f1 == pytest.approx(expected[2][number])
        assert found.examples * seeds == expected[3][number]


def test_absent_class_has_no_scores_and_no_examples() -> None:
    probabilities = np.eye(4, dtype=np.float32)[[0, 1, 1, 2]][None]
    found = metrics.per_class(predictions_of(np.array([0, 1, 0, 0]), probabilities))
    assert [scores.examples for scores in found] == [3, 1, 0, 0]
    assert np.isnan(found[2].recall) and found[2].precision == 0 and found[2].f1 == 0
    assert np.isnan([found[3].precision, found[3].recall, found[3].f1]).all()


@settings(max_examples=30)
@given(cases, st.integers(2, 20))
def test_reliability_bins_hold_every_prediction_once(predictions: Predictions, bins: int) -> None:
    table = metrics.reliability(predictions, bins)
    seeds, examples, _ = predictions.probabilities.shape
    assert sum(row.examples for row in table) == seeds * examples
    assert [row.low for row in table][0] == 0 and table[-1].high == 1
    full = [row for row in table if row.examples]
    right = sum(row.accuracy * row.examples for row in full)
    assert right == pytest.approx((predictions.probabilities.argmax(2) == predictions.labels).sum())
    assert all(row.low - 1e-9 <= row.confidence <= row.high + 1e-9 for row in full)
    assert all(np.isnan(row.confidence) and np.isnan(row.accuracy) for row in table if not row.examples)
    if seeds == 1:
        error = sum(row.examples * abs(row.confidence - row.accuracy) for row in full) / examples
        assert error == pytest.approx(estimate(predictions, 100, bins)["calibration_error"].mean)


def test_worst_mistakes_are_the_wrong_ones_by_falling_confidence_of_the_mean() -> None:
    labels = np.array([0, 0, 1, 1, 0])
    second = np.array([[0.6, 0.1, 0.2, 0.9, 0.99], [0.8, 0.1, 0.1, 0.9, 0.97]])  # probability of class 1
    predictions = predictions_of(labels, np.stack([1 - second, second], axis=2).astype(np.float32))
    assert metrics.worst_mistakes(predictions, 10).tolist() == [4, 2, 0]
    assert metrics.worst_mistakes(predictions, 2).tolist() == [4, 2]


def test_no_mistakes_give_no_rows() -> None:
    assert metrics.worst_mistakes(of_correctness(np.ones(10, bool)), 5).tolist() == []
