"""The pictures that only a comparison has."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ml.plots import BLUE, GREY, LABEL, RED, contact_sheet, literal, new_figure, tidy
from ml.report.result import IN_PERCENT, LOWER_IS_BETTER, ClassResult, Comparison, Flip, clearness
from ml.report.statistics import Difference
from ml.report.words import COUNTED, tick, title

GREEN = "#1a7f37"
SHEET_COLUMNS = 4  # so that captions can be read on a phone
CLASSES_SHOWN = 40


def difference_figure(comparison: Comparison) -> Figure:
    """Left, each seed's value on both sides; right, the difference with its interval, zero and the margin."""
    metric, primary = comparison.primary_metric, comparison.primary
    assert primary is not None
    factor, unit = (100, "%") if metric in IN_PERCENT else (1, "")
    figure = new_figure(8, 2.5)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1], gridspec_kw={"wspace": 0.08})
    sides = (
        (1, "baseline", comparison.baseline[metric].per_seed, GREY),
        (0, "candidate", comparison.candidate[metric].per_seed, BLUE),
    )
    for row, _, values, colour in sides:
        points = np.array(values) * factor
        heights = row + np.linspace(-0.12, 0.12, len(points))  # so that equal values can be told apart
        left.plot(points, heights, "o", color=colour, alpha=0.55, markersize=7, markeredgewidth=0)
        left.plot([points.mean()] * 2, [row - 0.28, row + 0.28], color=colour, linewidth=3)
    left.set_yticks([0, 1], ["candidate", "baseline"])
    left.set_ylim(-0.6, 1.6)
    left.margins(x=0.12)
    left.xaxis.set_major_locator(MaxNLocator(4))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, unit)))
    tidy(left, f"{title(metric)} of each seed, and mean", "", "")
    draw_interval(right, primary, comparison.margin, metric, factor)
    return figure


def draw_interval(axes: Axes, primary: Difference, margin: float, metric: str, factor: float) -> None:
    worse = 1 if metric in LOWER_IS_BETTER else -1
    colour = verdict_colour(primary, metric)
    centre = primary.difference * factor
    axes.axvline(0, color="#333333", linewidth=1)
    if margin:
        axes.axvline(worse * margin * factor, color=RED, linewidth=1, linestyle="--")
        axes.annotate("margin", (worse * margin * factor, 0.98), xycoords=("data", "axes fraction"), color=RED,
                      fontsize=8, ha="right" if worse < 0 else "left", va="top", xytext=(3 * worse, 0),
                      textcoords="offset points")  # fmt: skip
    axes.plot(
        [primary.low * factor, primary.high * factor],
        [0, 0],
        color=colour,
        linewidth=4,
        solid_capstyle="round",
    )
    axes.plot([centre], [0], "o", color=colour, markersize=10, markeredgecolor="white")
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, sign=True)))
    tidy(axes, "Difference, 95 % interval", "percentage points" if factor == 100 else "", "")
    axes.spines["left"].set_visible(False)


def verdict_colour(difference: Difference, metric: str) -> str:
    if difference.seed_noise == "unknown" or difference.low <= 0 <= difference.high:
        return GREY
    return GREEN if (difference.difference > 0) != (metric in LOWER_IS_BETTER) else RED


def classes_figure(classes: list[ClassResult]) -> Figure:
    """Difference in recall per class with its interval; coloured where it holds after Holm's correction.

    Of more than CLASSES_SHOWN classes, those with the smallest p-values, in the order of the classes.
    """
    known = [each for each in classes if each.recall is not None]
    clearest = {id(each) for each in sorted(known, key=clearness)[:CLASSES_SHOWN]}
    shown = [each for each in known if id(each) in clearest]
    of = f", the {len(shown)} clearest of {len(known):,}" if len(shown) < len(known) else ""
    figure = new_figure(8, 0.34 * len(shown) + 1.3)
    axes = figure.subplots()
    axes.axvline(0, color="#333333", linewidth=1)
    for row, each in enumerate(shown):
        recall = each.recall
        assert recall is not None
        certain = each.p_value is not None and each.p_value < COUNTED
        colour = (GREEN if recall.difference > 0 else RED) if certain else GREY
        axes.plot([100 * recall.low, 100 * recall.high], [row, row], color=colour, linewidth=2)
        axes.plot([100 * recall.difference], [row], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(shown)), [f"{literal(c.name, LABEL)} (n = {c.examples:,})" for c in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, sign=True)))
    tidy(axes, f"Recall per class{of}: candidate minus baseline, 95 % intervals", "percentage points", "")
    return figure


def flip_sheet(images: NDArray[np.uint8], flips: list[Flip], total: int, what: str) -> Figure:
    """(K, H, W) images of K flips: what each was taken for before and now, and how sure the model is now.

    One of the two is the label, as `what` should say: before where it broke, now where it was fixed.
    """
    captions = [
        f"{literal(flip.before)} → {literal(flip.after)}\n{flip.confidence_after:.0%} sure" for flip in flips
    ]
    shown = f"{len(flips)} of {total:,}, clearest first" if len(flips) < total else f"all {total:,}"
    return contact_sheet(images, captions, f"{what}\n({shown})", SHEET_COLUMNS)
