"""How much better or worse, and could it be luck: two sets of predictions of the same test examples.

Luck has two sources. Another draw of test examples gives another accuracy, and so does another seed. Each metric is
written as a mean over a seeds × examples table of contributions, so one analysis of variance of two crossed random
factors (Searle, Casella, McCulloch: Variance Components, 1992, chapter 4) serves all of them.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ml.files import Predictions
from ml.metrics import CONFIDENCE, sufficient

Floats = NDArray[np.float64]
SeedNoise = Literal["measured", "borrowed", "assumed", "unknown"]

POWER = 0.8
PERMUTATIONS = 2000  # at most; all of them where there are fewer
PERMUTATION_CELLS = 5_000_000  # of the table of signs in memory at a time
# Half a flipped example more each way in every comparison of shares (Agresti and Min, Statistics in Medicine 24, 2005:
# half an example in each of the four cells). Without it, no flip in 50 examples would pass for certainty.
PSEUDO_FLIPS = 1.0
SHARES = ("accuracy", "macro_f1")  # metrics that one flipped example moves by about 1 / N


@dataclass(frozen=True)
class Difference:
    """Candidate minus baseline, of the means over the seeds, in the metric's own unit.

    `low` and `high` bound the 95 % interval over test examples and seeds together; it is the examples' alone where
    `seed_noise` is unknown. `p_value` is two-sided. `smallest_detectable` would be found 4 times out of 5.
    """

    baseline: float
    candidate: float
    difference: float
    standard_error: float
    degrees_of_freedom: float
    low: float
    high: float
    p_value: float
    smallest_detectable: float
    seed_noise: SeedNoise


@dataclass(frozen=True)
class SeedVariance:
    """What the seeds add to the variance of a mean over them; the part that the examples' variance has as well.

    A side with one seed borrows from the other. Both 0 and without source where neither has two.
    """

    of_mean: tuple[float, ...]  # one addend per estimate, each with the degrees of freedom beside it
    degrees_of_freedom: tuple[float, ...]
    interaction: float
    source: SeedNoise

    @property
    def total(self) -> float:
        return sum(self.of_mean)


def contributions(probabilities: Floats, labels: NDArray[np.int64], bins: int) -> dict[str, Floats]:
    """For each metric, (N,) numbers whose mean is the metric and whose spread is its noise over examples.

    probabilities (N, classes), labels (N,). Accuracy and loss are means already. For macro F1 and the calibration
    error these are the value plus each example's influence on it (the infinitesimal jackknife: Efron 1982, chapter 6).
    """
    columns, classes, bins = sufficient(probabilities, labels, bins)
    hit, predicted, actual = (columns[:, 2 + k * classes : 2 + (k + 1) * classes] for k in range(3))
    hits, size = hit.sum(0), predicted.sum(0) + actual.sum(0)  # F1 = 2 hits / size
    seen = size > 0
    f1 = np.divide(2 * hits, size, out=np.zeros(classes), where=seen)
    per_hit, per_size = (np.divide(part, size, out=np.zeros(classes), where=seen) for part in (2.0, f1))
    influence = (hit @ per_hit - (predicted + actual) @ per_size) * len(labels) / seen.sum()
    gap = columns[:, -bins:]
    return {
        "accuracy": columns[:, 0],
        "macro_f1": f1.sum() / seen.sum() + influence,
        "loss": columns[:, 1],
        "calibration_error": gap @ np.sign(gap.sum(0)),
    }


def metric_tables(predictions: Predictions, bins: int) -> dict[str, Floats]:
    """For each metric, its contributions as a table (S, N)."""
    seeds = [contributions(p.astype(np.float64), predictions.labels, bins) for p in predictions.probabilities]
    return {name: np.stack([seed[name] for seed in seeds]) for name in seeds[0]}


def difference(
    candidate: Floats, baseline: Floats, pseudo_flips: float = 0.0, assumed_seed_std: float | None = None
) -> Difference:
    """Of two tables (S, N) and (T, N) with the same examples in the same order; N at least 2.

    The variance is the examples' (paired) plus the seeds' of both sides, less what both count: the seed × example
    interaction, never less than either alone. The seeds' part has few degrees of freedom, combined by Welch and
    Satterthwaite. `assumed_seed_std` stands in where neither side has two seeds.
    """
    examples = candidate.shape[1]
    paired = candidate.mean(0) - baseline.mean(0)  # (N,)
    change = float(paired.mean())
    squares = float(((paired - change) ** 2).sum()) + pseudo_flips
    over_examples = squares / (examples - 1) / examples
    seeds = seed_variance(candidate, baseline, assumed_seed_std)

    variance = max(over_examples, seeds.total, over_examples + seeds.total - seeds.interaction)
    addends = [(over_examples, examples - 1.0), *zip(seeds.of_mean, seeds.degrees_of_freedom)]
    spread = sum(part**2 / freedom for part, freedom in addends)
    freedom = variance**2 / spread if spread else examples - 1.0
    error = float(np.sqrt(variance))
    critical, power = (float(stats.t.ppf(q, freedom)) for q in ((1 + CONFIDENCE) / 2, POWER))
    if error:
        p_value = float(2 * stats.t.sf(abs(change) / error, freedom))
    else:
        p_value = 1.0 if change == 0 else 0.0
    return Difference(
        baseline=float(baseline.mean()),
        candidate=float(candidate.mean()),
        difference=change,
        standard_error=error,
        degrees_of_freedom=freedom,
        low=change - critical * error,
        high=change + critical * error,
        p_value=p_value,
        smallest_detectable=(critical + power) * error,
        seed_noise=seeds.source,
    )


def seed_variance(candidate: Floats, baseline: Floats, assumed_std: float | None) -> SeedVariance:
    """From the sides with two seeds or more; else from `assumed_std`, of one seed's metric; else unknown."""
    sides = [table for table in (candidate, baseline) if len(table) > 1]
    if not sides:
        if assumed_std is None:
            return SeedVariance((), (), 0.0, "unknown")
        return SeedVariance((2 * assumed_std**2,), (np.inf,), 0.0, "assumed")
    examples = candidate.shape[1]
    between = [float(table.mean(1).var(ddof=1)) for table in sides]
    interaction = [interaction_variance(table) / examples for table in sides]
    freedom = tuple(len(table) - 1.0 for table in sides)
    if len(sides) == 2:
        counts = [len(table) for table in sides]
        shared = sum(part / count for part, count in zip(interaction, counts))
        return SeedVariance(tuple(b / n for b, n in zip(between, counts)), freedom, shared, "measured")
    both = 1 / len(candidate) + 1 / len(baseline)
    return SeedVariance((between[0] * both,), freedom, interaction[0] * both, "borrowed")


def interaction_variance(table: Floats) -> float:
    """Variance per cell (mean square) of what is neither the seed's nor the example's; table (S, N), S and N over 1."""
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    return float((residual**2).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1)))


def compare_metrics(
    candidate: Predictions,
    baseline: Predictions,
    bins: int,
    primary: str,
    assumed_seed_std: float,
) -> dict[str, Difference]:
    """Every metric's difference. `assumed_seed_std` is in the primary metric's unit, so it serves that one alone."""
    new, old = metric_tables(candidate, bins), metric_tables(baseline, bins)
    return {
        name: difference(
            new[name],
            old[name],
            PSEUDO_FLIPS if name in SHARES else 0.0,
            assumed_seed_std if name == primary else None,
        )
        for name in new
    }


@dataclass(frozen=True)
class ClassDifference:
    """Recall of one class. `p_value` is Holm's, over all classes; None where the class has fewer than two examples."""

    label: int
    examples: int
    recall: Difference | None
    p_value: float | None


def compare_classes(candidate: Predictions, baseline: Predictions) -> list[ClassDifference]:
    """The recall of every class that has test examples, with the p-values corrected for looking at many of them."""
    new, old = right(candidate), right(baseline)
    labels, counts = np.unique(candidate.labels, return_counts=True)
    recalls = []
    for label, count in zip(labels, counts):
        rows = candidate.labels == label
        recalls.append(difference(new[:, rows], old[:, rows], PSEUDO_FLIPS) if count > 1 else None)
    corrected = iter(
        holm([recall.p_value for recall in recalls if recall and recall.seed_noise != "unknown"])
    )
    return [
        ClassDifference(
            int(label),
            int(count),
            recall,
            next(corrected) if recall and recall.seed_noise != "unknown" else None,
        )
        for label, count, recall in zip(labels, counts, recalls)
    ]


def holm(p_values: list[float]) -> list[float]:
    """Each p-value corrected for the number of them (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p_values)
    steps = np.array(p_values)[order] * (len(p_values) - np.arange(len(p_values)))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(p) for p in corrected]


def right(predictions: Predictions) -> Floats:
    """(S, N): 1.0 where the seed's most probable class is the label, else 0.0."""
    hits: Floats = (predictions.probabilities.argmax(2) == predictions.labels).astype(np.float64)
    return hits


@dataclass(frozen=True)
class PairedTests:
    """Tests that know the examples' noise alone, so that a lucky seed can pass them: they decide nothing.

    McNemar's exact test compares two single models, the chosen seed of each side: `broken` examples only the
    baseline's has right, `fixed` only the candidate's. The permutation test flips the sign of each example's
    difference of the means over the seeds.
    """

    broken: int
    fixed: int
    mcnemar_p_value: float
    permutation_p_value: float
    permutations: int


def paired_tests(
    candidate: Predictions, baseline: Predictions, chosen: int, baseline_chosen: int
) -> PairedTests:
    """`chosen` and `baseline_chosen` are rows of the seeds whose models are shipped. Deterministic."""
    new, old = right(candidate), right(baseline)
    new_one, old_one = new[chosen].astype(bool), old[baseline_chosen].astype(bool)
    broken, fixed = int((old_one & ~new_one).sum()), int((new_one & ~old_one).sum())
    return PairedTests(
        broken=broken,
        fixed=fixed,
        mcnemar_p_value=mcnemar_p_value(broken, fixed),
        permutation_p_value=permutation_p_value(new.mean(0) - old.mean(0)),
        permutations=PERMUTATIONS,
    )


def mcnemar_p_value(broken: int, fixed: int) -> float:
    """Exact and two-sided: were as many broken as fixed, each would be a fair coin's side."""
    return float(stats.binomtest(broken, broken + fixed).pvalue) if broken + fixed else 1.0


def permutation_p_value(paired: Floats) -> float:
    """Two-sided. Examples without a difference keep it under any change of sign, so only the others are drawn for."""
    moved = paired[paired != 0]
    if len(moved) < 2:
        return 1.0
    result = stats.permutation_test(
        (moved,),
        lambda values, axis: np.sum(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=max(1, PERMUTATION_CELLS // len(moved)),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def restrict(predictions: Predictions, rows: NDArray[np.int64]) -> Predictions:
    """The examples in `rows` alone, in that order."""
    return replace(
        predictions,
        ids=predictions.ids[rows],
        labels=predictions.labels[rows],
        probabilities=predictions.probabilities[:, rows],
    )
