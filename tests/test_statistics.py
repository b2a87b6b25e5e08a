"""The statistics of the verdict, against closed forms, other libraries, and simulated truth."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ml import metrics
from ml.report import statistics
from ml.report.statistics import PSEUDO_FLIPS, Floats, compare_classes, compare_metrics, difference
from tests.experiment import predictions

BINS = 10


def uneven(seeds: int = 3, count: int = 400, random_state: int = 0) -> metrics.Predictions:
    """Probabilities of every size, for metrics that are more than a count."""
    random = np.random.default_rng(random_state)
    made = predictions(count, seeds)
    scores = random.gumbel(size=(seeds, count, 3)) + 2 * np.eye(3)[made.labels]
    return replace(
        made, probabilities=(np.exp(scores) / np.exp(scores).sum(2, keepdims=True)).astype(np.float32)
    )


def coin_flips(chance: float, seeds: int, random: np.random.Generator, count: int = 2000) -> Floats:
    """(seeds, count) of right and wrong, each example with its own chance to be wrong, `chance` on average."""
    each = np.random.default_rng(7).beta(0.5, 1.5, count) * chance / 0.25
    return (random.random((seeds, count)) >= each).astype(float)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "loss", "calibration_error"])
def test_contributions_average_to_the_metric_of_each_seed(name: str) -> None:
    made = uneven()
    table = statistics.metric_tables(made, BINS)[name]
    assert table.shape == (3, 400)
    assert table.mean(1) == pytest.approx(metrics.estimate(made, 100, BINS)[name].per_seed, abs=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "loss"])
def test_contributions_spread_as_the_bootstrap_does(name: str) -> None:
    made = uneven(seeds=1, count=1000)
    bootstrap = metrics.estimate(made, 2000, BINS)[name]
    table = statistics.metric_tables(made, BINS)[name]
    error = table.std(ddof=1) / np.sqrt(1000)
    assert error == pytest.approx((bootstrap.high - bootstrap.low) / 3.92, rel=0.1)


def test_class_without_any_example_or_prediction_does_not_count_in_macro_f1() -> None:
    made = predictions(40, 1, wrong=0.0)
    wider = replace(made, probabilities=np.pad(made.probabilities, ((0, 0), (0, 0), (0, 1))))
    assert statistics.metric_tables(wider, BINS)["macro_f1"].mean() == pytest.approx(1.0)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_swapping_the_sides_turns_the_sign_and_nothing_else(
    new_seeds: int, old_seeds: int, state: int
) -> None:
    random = np.random.default_rng(state)
    new, old = (coin_flips(0.1, seeds, random, 50) for seeds in (new_seeds, old_seeds))
    forth, back = difference(new, old, 1.0, 0.01), difference(old, new, 1.0, 0.01)
    assert forth.difference == pytest.approx(-back.difference, abs=1e-12)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
    assert forth.low <= forth.difference <= forth.high
    assert forth.smallest_detectable > forth.high - forth.difference
    assert forth.p_value == pytest.approx(back.p_value)


@given(st.integers(2, 4), st.integers(2, 4), st.integers(0, 1000))
def test_order_of_examples_and_seeds_does_not_matter(new_seeds: int, old_seeds: int, state: int) -> None:
    random = np.random.default_rng(state)
    new, old = (coin_flips(0.1, seeds, random, 50) for seeds in (new_seeds, old_seeds))
    order = random.permutation(50)
    assert difference(new, old).low == pytest.approx(
        difference(new[::-1][:, order], old[:, order]).low, abs=1e-12
    )


def test_known_variance_components_are_found() -> None:
    """Seeds' standard deviation 0.02, examples' 0.3 (of the difference), interaction 0.5: the variance by hand."""
    random = np.random.default_rng(3)
    count, seeds = 3000, 40
    truth = 0.3**2 / count + 2 * 0.02**2 / seeds + 2 * 0.5**2 / (seeds * count)
    shift = 0.3 * random.standard_normal(count)
    new = shift + 0.02 * random.standard_normal((seeds, 1)) + 0.5 * random.standard_normal((seeds, count))
    old = 0.02 * random.standard_normal((seeds, 1)) + 0.5 * random.standard_normal((seeds, count))
    assert difference(new, old).standard_error == pytest.approx(np.sqrt(truth), rel=0.12)


def test_seeds_noise_is_in_the_interval_where_examples_alone_would_see_a_change() -> None:
    """Two trainings each, whose seeds shift every example alike: a paired test over examples is certain, and wrong."""
    random = np.random.default_rng(0)
    base = (random.random(5000) < 0.9).astype(float)
    lucky, unlucky = base.copy(), base.copy()
    lucky[:60], unlucky[60:120] = 1.0, 0.0
    new, old = np.stack([lucky, base]), np.stack([base, unlucky])
    found = difference(new, old, PSEUDO_FLIPS)
    assert statistics.permutation_p_value(new.mean(0) - old.mean(0)) < 0.001
    assert found.low < 0 < found.high


@pytest.mark.parametrize(("new_seeds", "old_seeds"), [(5, 5), (3, 3), (2, 2), (4, 1), (1, 3)])
def test_equal_recipes_are_called_different_at_most_one_time_in_twenty(
    new_seeds: int, old_seeds: int
) -> None:
    random = np.random.default_rng(new_seeds)
    called = 0
    for _ in range(300):
        new, old = (coin_flips(0.02, seeds, random) for seeds in (new_seeds, old_seeds))
        found = difference(new, old, PSEUDO_FLIPS)
        called += found.low > 0 or found.high < 0
    assert called <= 15


def test_loss_of_a_third_of_a_point_is_found() -> None:
    random = np.random.default_rng(5)
    found = [
        difference(coin_flips(0.011, 5, random, 10_000), coin_flips(0.008, 5, random, 10_000), PSEUDO_FLIPS)
        for _ in range(30)
    ]
    assert sum(each.high < 0 for each in found) >= 27


def test_single_seed_borrows_the_variance_of_the_other_side() -> None:
    random = np.random.default_rng(0)
    old = coin_flips(0.1, 3, random)
    found = difference(coin_flips(0.1, 1, random), old)
    assert found.seed_noise == "borrowed"
    assert found.standard_error**2 >= old.mean(1).var(ddof=1) * (1 + 1 / 3) * (1 - 1e-9)


def test_single_seeds_on_both_sides_need_an_assumption() -> None:
    random = np.random.default_rng(0)
    new, old = coin_flips(0.1, 1, random), coin_flips(0.1, 1, random)
    assert difference(new, old).seed_noise == "unknown"
    assumed = difference(new, old, assumed_seed_std=0.01)
    assert assumed.seed_noise == "assumed"
    assert assumed.standard_error**2 == pytest.approx(difference(new, old).standard_error ** 2 + 2 * 0.01**2)


def test_no_flip_at_all_is_no_certainty() -> None:
    everything_right = np.ones((3, 50))
    found = difference(everything_right, everything_right, PSEUDO_FLIPS)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.low < -0.02 and found.high > 0.02 and found.smallest_detectable > 0.02


def test_metrics_other_than_the_primary_one_get_no_assumed_seed_noise() -> None:
    new, old = uneven(1), uneven(1, random_state=1)
    found = compare_metrics(new, old, BINS, "accuracy", 0.01)
    assert {name: each.seed_noise for name, each in found.items()} == {
        "accuracy": "assumed",
        "macro_f1": "unknown",
        "loss": "unknown",
        "calibration_error": "unknown",
    }


def test_class_that_collapsed_is_found_among_those_that_did_not() -> None:
    new, old = predictions(600, 3, wrong=0.05), predictions(600, 3, wrong=0.05, first_seed=5)
    rows = np.flatnonzero(new.labels == 1)
    new.probabilities[:, rows[::2]] = [0.8, 0.1, 0.1]
    found = compare_classes(new, old)
    assert [each.label for each in found if each.p_value is not None and each.p_value < 0.05] == [1]
    assert [each.examples for each in found] == [200, 200, 200]


def test_class_of_one_example_has_no_interval() -> None:
    made = predictions(9, 2)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
    found = compare_classes(replace(made, labels=labels), replace(made, labels=labels))
    assert found[2].recall is None and found[2].p_value is None
    assert found[0].recall is not None


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []


def test_holm_equals_that_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")

    @settings(max_examples=15)  # statsmodels takes 0.2 s for each
    @given(st.lists(st.floats(0, 1), max_size=8))
    def same(p_values: list[float]) -> None:
        expected = multitest.multipletests(p_values, method="holm")[1] if p_values else []
        assert statistics.holm(p_values) == pytest.approx(list(expected))

    same()


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_that_of_statsmodels(broken: int, fixed: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = tables.mcnemar([[0, broken], [fixed, 0]], exact=True).pvalue if broken + fixed else 1.0
    assert statistics.mcnemar_p_value(broken, fixed) == pytest.approx(expected)


def test_mcnemar_compares_the_two_shipped_models() -> None:
    new, old = predictions(300, 3, wrong=0.2), predictions(300, 3, wrong=0.1, first_seed=9)
    found = statistics.paired_tests(new, old, 2, 1)
    now, was = statistics.right(new)[2] == 1, statistics.right(old)[1] == 1
    assert (found.broken, found.fixed) == ((was & ~now).sum(), (now & ~was).sum())
    expected = binomtest(found.broken, found.broken + found.fixed).pvalue
    assert found.mcnemar_p_value == pytest.approx(expected)
    assert statistics.paired_tests(new, new, 0, 0).mcnemar_p_value == 1.0


def test_permutation_test_keeps_its_table_of_signs_small(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    class Found:
        pvalue = 0.5

    def record(data: tuple[Floats], *_: object, batch: int, **__: object) -> Found:
        batches.append(batch * len(data[0]))
        return Found()

    monkeypatch.setattr(statistics.stats, "permutation_test", record)
    statistics.permutation_p_value(np.ones(100_000))
    assert batches == [statistics.PERMUTATION_CELLS]


def test_permutation_test_is_exact_for_few_differences() -> None:
    assert statistics.permutation_p_value(np.array([0.0, 0, 1, 1, 1, 1, 0])) == pytest.approx(2 / 16)
    assert statistics.permutation_p_value(np.zeros(5)) == 1.0
