"""Which test examples broke and which were fixed, by the mean probability over the seeds."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ml.files import Predictions
from ml.report.result import Flip, FlipCount, Flips

SHOWN_FLIPS = 200
SHOWN_PAIRS = 12


def flips(candidate: Predictions, baseline: Predictions, class_names: list[str]) -> Flips:
    """Of two sets of predictions with the same examples in the same order."""
    new, old = mean_probability(candidate), mean_probability(baseline)
    was, now = old.argmax(1), new.argmax(1)
    labels = candidate.labels
    everyone = np.arange(len(labels))
    gain = new[everyone, labels] - old[everyone, labels]  # of the right class's probability
    broken = clearest(np.flatnonzero((was == labels) & (now != labels)), -gain)
    fixed = clearest(np.flatnonzero((was != labels) & (now == labels)), gain)

    wrong_before = (baseline.probabilities.argmax(2) != labels).sum(0)
    wrong_after = (candidate.probabilities.argmax(2) != labels).sum(0)

    def flip(row: int) -> Flip:
        return Flip(
            id=str(candidate.ids[row]),
            actual=name_of(class_names, labels[row]),
            before=name_of(class_names, was[row]),
            after=name_of(class_names, now[row]),
            confidence_before=float(old[row].max()),
            confidence_after=float(new[row].max()),
            wrong_seeds_before=int(wrong_before[row]),
            wrong_seeds_after=int(wrong_after[row]),
        )

    def pairs(rows: NDArray[np.int64]) -> list[FlipCount]:
        return most_frequent((name_of(class_names, was[row]), name_of(class_names, now[row])) for row in rows)

    return Flips(
        broken_count=len(broken),
        fixed_count=len(fixed),
        broken=[flip(row) for row in broken[:SHOWN_FLIPS]],
        fixed=[flip(row) for row in fixed[:SHOWN_FLIPS]],
        broken_pairs=pairs(broken),
        fixed_pairs=pairs(fixed),
    )


def mean_probability(predictions: Predictions) -> NDArray[np.float64]:
    """(N, classes), over the seeds."""
    mean: NDArray[np.float64] = predictions.probabilities.mean(0, dtype=np.float64)
    return mean


def clearest(rows: NDArray[np.int64], by: NDArray[np.float64]) -> NDArray[np.int64]:
    return rows[np.argsort(-by[rows], kind="stable")]


def name_of(class_names: list[str], label: int) -> str:
    """A side with more classes than the candidate's data have names for gets their numbers."""
    return class_names[label] if label < len(class_names) else f"class {label}"


def most_frequent(pairs: Iterable[tuple[str, str]]) -> list[FlipCount]:
    return [
        FlipCount(before=before, after=after, count=count)
        for (before, after), count in Counter(pairs).most_common(SHOWN_PAIRS)
    ]
