"""Metrics of a classifier, with intervals over the examples and the spread over the seeds. Pure numpy.

Every metric here is a function of sums over the examples, so a bootstrap resample is a vector of weights and all
resamples together are a few matrix products.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml.files import Predictions

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
CHUNK = 1 << 21  # weights held at once (16 MiB of float64)
SMALLEST = np.finfo(
    np.float32
).tiny  # a probability of 0 for the right class costs this much log-loss, not infinity


@dataclass(frozen=True)
class Estimate:
    """A metric of the mean over the seeds: its value and 95 % interval over the test examples, and the seeds' spread.

    `seed_std` is the standard deviation over the seeds (n - 1 in the denominator), 0.0 with one seed.
    """

    mean: float
    low: float
    high: float
    seed_std: float
    per_seed: tuple[float, ...]


def estimate(predictions: Predictions, resamples: int, bins: int) -> dict[str, Estimate]:
    """accuracy, macro_f1, loss and calibration_error, by the percentile bootstrap over examples.

    All seeds see the same resamples, so that the interval is that of their mean. Deterministic.
    """
    examples = len(predictions.labels)
    everything = np.ones((1, examples))
    sums = [sufficient(p, predictions.labels, bins) for p in predictions.probabilities.astype(np.float64)]
    points = [from_sums(everything, *each) for each in sums]

    drawn: dict[str, list[Floats]] = {name: [] for name in points[0]}
    for weights in bootstrap_weights(examples, resamples):
        redrawn = [from_sums(weights, *each) for each in sums]
        for name in drawn:
            drawn[name].append(np.mean([seed[name] for seed in redrawn], axis=0))

    tail = (1 - CONFIDENCE) / 2
    result = {}
    for name, pieces in drawn.items():
        per_seed = np.array([float(point[name][0]) for point in points])
        resampled = np.concatenate(pieces)
        if name == "calibration_error":
            # Resampling adds noise to the gaps, and all of it counts as error: centre the draws on the estimate again.
            resampled = np.maximum(resampled - resampled.mean() + per_seed.mean(), 0)
        low, high = np.quantile(resampled, [tail, 1 - tail])
        spread = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0
        result[name] = Estimate(
            float(per_seed.mean()), float(low), float(high), spread, tuple(per_seed.tolist())
        )
    return result


def bootstrap_weights(examples: int, resamples: int) -> Iterator[Floats]:
    """(k, N) arrays of how often each example was drawn, `resamples` rows in all; the same ones at every call."""
    random = np.random.RandomState(0)  # the legacy generator's stream is frozen by numpy
    rows = max(1, CHUNK // examples)
    for start in range(0, resamples, rows):
        chosen = min(rows, resamples - start)
        drawn = random.randint(0, examples, (chosen, examples))
        yield np.stack([np.bincount(row, minlength=examples) for row in drawn]).astype(np.float64)


def sufficient(probabilities: Floats, labels: NDArray[np.int64], bins: int) -> tuple[Floats, int, int]:
    """Per-example columns that every metric is a sum of: right, log-loss, then hit, predicted and actual class, then
    the gap between confidence and being right in its bin. (N, 2 + 3 · classes + bins), and classes, and bins.
    """
    count, classes = probabilities.shape
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    right = (predicted == labels).astype(np.float64)
    loss = -np.log(np.maximum(probabilities[np.arange(count), labels], SMALLEST))
    actual_class, predicted_class = np.eye(classes)[labels], np.eye(classes)[predicted]
    gap = np.eye(bins)[bin_of(confidence, bins)] * (confidence - right)[:, None]
    columns = [
        right[:, None],
        loss[:, None],
        predicted_class * right[:, None],
        predicted_class,
        actual_class,
        gap,
    ]
    return np.concatenate(columns, axis=1), classes, bins


def from_sums(weights: Floats, columns: Floats, classes: int, bins: int) -> dict[str, Floats]:
    """Each metric for every row of `weights` (R, N): arrays of (R,)."""
    total = weights.sum(1)
    sums = weights @ columns
    hit, predicted, actual = (sums[:, 2 + k * classes : 2 + (k + 1) * classes] for k in range(3))
    # F1 = 2 hit / (predicted + actual): 0 for a class that is only predicted or only there, left out if neither.
    seen = predicted + actual > 0
    f1 = np.divide(2 * hit, predicted + actual, out=np.zeros_like(hit), where=seen)
    return {
        "accuracy": sums[:, 0] / total,
        "macro_f1": f1.sum(1) / seen.sum(1),
        "loss": sums[:, 1] / total,
        "calibration_error": np.abs(sums[:, -bins:]).sum(1) / total,
    }


def bin_of(confidence: Floats, bins: int) -> NDArray[np.int64]:
    """Which of `bins` bins of equal width each confidence in 0..1 falls into; 1.0 into the last."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def confusion(predictions: Predictions) -> NDArray[np.int64]:
    """(classes, classes) counts over all seeds together: row = actual, column = predicted."""
    classes = predictions.probabilities.shape[2]
    predicted = predictions.probabilities.argmax(2)  # (S, N)
    cells = predictions.labels[None, :] * classes + predicted
    return np.bincount(cells.ravel(), minlength=classes**2).reshape(classes, classes).astype(np.int64)


@dataclass(frozen=True)
class ClassScores:
    """Means over the seeds; `examples` of the class in the test set. NaN where a class was never predicted or is absent."""

    examples: int
    precision: float
    recall: float
    f1: float


def per_class(predictions: Predictions) -> list[ClassScores]:
    """One row per class, from the confusion matrix over all seeds."""
    counts = confusion(predictions).astype(np.float64)
    hit, predicted, actual = np.diag(counts), counts.sum(0), counts.sum(1)
    with np.errstate(invalid="ignore"):
        precision, recall, f1 = hit / predicted, hit / actual, 2 * hit / (predicted + actual)
    examples = np.bincount(predictions.labels, minlength=len(counts))
    return [
        ClassScores(int(n), float(p), float(r), float(f))
        for n, p, r, f in zip(examples, precision, recall, f1)
    ]


@dataclass(frozen=True)
class ReliabilityBin:
    low: float
    high: float
    examples: int  # over all seeds
    confidence: float  # mean; NaN in an empty bin
    accuracy: float


def reliability(predictions: Predictions, bins: int) -> list[ReliabilityBin]:
    """How often the model is right where it says it is this sure, over all seeds."""
    probabilities = predictions.probabilities.astype(np.float64)
    confidence = probabilities.max(2).ravel()
    right = (probabilities.argmax(2) == predictions.labels[None, :]).ravel()
    which = bin_of(confidence, bins)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(which, confidence, bins) / counts
        accuracy = np.bincount(which, right, bins) / counts
    edges = np.linspace(0, 1, bins + 1)
    return [
        ReliabilityBin(
            float(edges[k]),
            float(edges[k + 1]),
            int(counts[k]),
            float(mean_confidence[k]),
            float(accuracy[k]),
        )
        for k in range(bins)
    ]


def worst_mistakes(predictions: Predictions, count: int) -> NDArray[np.int64]:
    """Rows of at most `count` examples that the seeds' mean probability gets wrong, the most confident error first."""
    mean = predictions.probabilities.astype(np.float64).mean(0)
    wrong = np.flatnonzero(mean.argmax(1) != predictions.labels)
    return wrong[np.argsort(-mean[wrong].max(1), kind="stable")][:count]
