"""The figures of the report. Each takes what it shows and returns a matplotlib Figure; `png` turns it into bytes."""

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from ml.metrics import ClassScores, Estimate, ReliabilityBin

if TYPE_CHECKING:
    import pandas as pd  # the report job draws figures too, and does without it

BLUE, ORANGE, GREY, RED = "#1f5fa8", "#d9731a", "#8a8f98", "#b3261e"
DPI = 150
CAPTION = 11  # characters of a class name on a contact sheet
LABEL = 24  # and beside an axis
FEW = 20  # predictions in a confidence bin, below which its accuracy says little


def png(figure: Figure) -> bytes:
    """The figure as PNG: the same figure gives the same bytes (no time of day, no version in them)."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def literal(text: str, limit: int = CAPTION) -> str:
    """Text from the data, for matplotlib: short, on one line, and no mathematics between two dollars."""
    line = " ".join(text.split())
    short = line if len(line) <= limit else line[: limit - 1] + "…"
    return short.replace("\\", "\\\\").replace("$", r"\$") if "$" in short else short


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def training_curves(train: "pd.DataFrame", validation: "pd.DataFrame") -> Figure:
    """Loss and validation accuracy over the epochs: a thin line per seed, a thick one for their mean."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    draw_seeds(left, train, "train_loss", BLUE, "training")
    draw_seeds(left, validation, "validation_loss", ORANGE, "validation", marker="o")
    left.set_yscale("log")
    tidy(left, "Loss", "epoch", "cross-entropy")
    left.legend(frameon=False)
    draw_seeds(right, validation, "validation_accuracy", ORANGE, "validation", marker="o")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    seeds = sum(column.startswith("validation_accuracy_seed") for column in validation.columns)
    tidy(right, f"Validation accuracy, {seeds} seed{'s' if seeds > 1 else ''} and mean", "epoch", "")
    return figure


def draw_seeds(
    axes: Axes, table: "pd.DataFrame", name: str, colour: str, label: str, marker: str = ""
) -> None:
    for column in table.columns:
        if column.startswith(f"{name}_seed_"):
            axes.plot(table["epoch"], table[column], color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(
        table["epoch"], table[name], color=colour, linewidth=2, label=label, marker=marker, markersize=4
    )


def confusion_matrix(counts: NDArray[np.int64], class_names: list[str], seeds: int) -> Figure:
    """Mistakes in colour; counts are means over the seeds."""
    classes = len(class_names)
    names = [literal(name, LABEL) for name in class_names]
    side = max(4.5, 0.55 * classes + 1.5)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    mean = counts / seeds
    mistakes = np.where(np.eye(classes, dtype=bool), np.nan, mean)
    image = axes.imshow(mistakes, cmap="Oranges", vmin=0)
    axes.set_facecolor("#eef3f9")
    for row in range(classes):
        for column in range(classes):
            if mean[row, column]:
                dark = row != column and mean[row, column] > 0.6 * np.nanmax(mistakes)
                colour = BLUE if row == column else "white" if dark else "#333333"
                axes.text(column, row, f"{mean[row, column]:.3g}" if row != column else f"{mean[row, column]:.0f}",
                          ha="center", va="center", fontsize=8, color=colour)  # fmt: skip
    axes.set_xticks(range(classes), names, rotation=45 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(classes), names)
    axes.set_title("Confusion matrix" + (f", mean of {seeds} seeds" if seeds > 1 else ""), loc="left", fontsize=11, fontweight="bold")  # fmt: skip
    axes.set_xlabel("predicted")
    axes.set_ylabel("actual")
    figure.colorbar(image, ax=axes, label="mistakes", shrink=0.8)
    return figure


def per_class(scores: list[ClassScores], class_names: list[str]) -> Figure:
    """Recall and precision of each class, as dots on a line."""
    figure = new_figure(7, max(3.0, 0.32 * len(class_names) + 1.2))
    axes = figure.subplots()
    rows = np.arange(len(class_names))
    axes.plot([s.recall for s in scores], rows, "o", color=BLUE, label="recall", markersize=7)
    axes.plot(
        [s.precision for s in scores],
        rows,
        "D",
        color=ORANGE,
        label="precision",
        markersize=6,
        fillstyle="none",
    )
    axes.hlines(
        rows,
        [min(s.recall, s.precision) for s in scores],
        [max(s.recall, s.precision) for s in scores],
        color=GREY,
    )
    axes.set_yticks(
        rows, [f"{literal(name, LABEL)} (n = {s.examples:,})" for name, s in zip(class_names, scores)]
    )
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    tidy(axes, "Per class", "", "")
    axes.legend(frameon=False)
    return figure


def reliability(bins: list[ReliabilityBin], calibration_error: Estimate) -> Figure:
    """How often the model is right where it says it is this sure; below, how often it is this sure."""
    figure = new_figure(5, 5.5)
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    few = [each for each in bins if 0 < each.examples < FEW]
    enough = [each for each in bins if each.examples >= FEW]
    upper.plot(
        [b.confidence for b in enough], [b.accuracy for b in enough], "o-", color=BLUE, label="this model"
    )
    upper.plot(
        [b.confidence for b in few],
        [b.accuracy for b in few],
        "o",
        color=GREY,
        label=f"under {FEW} predictions",
    )
    upper.set_ylim(0, 1.02)
    tidy(
        upper,
        f"Calibration error {calibration_error.mean:.2%} (95 %: {calibration_error.low:.2%} to {calibration_error.high:.2%})",
        "",
        "right",
    )
    upper.legend(frameon=False, loc="upper left")
    lower.bar(
        [b.low for b in bins], [b.examples for b in bins], width=1 / len(bins), align="edge", color=BLUE
    )
    lower.set_yscale("log")
    tidy(lower, "", "confidence", "predictions")
    for axes in (upper, lower):
        axes.set_xlim(0, 1)
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    lower.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def contact_sheet(images: NDArray[np.uint8], captions: list[str], title: str, columns: int = 9) -> Figure:
    """(N, H, W) images in rows of `columns`, each above its caption of at most two short lines. N may be 0."""
    rows = max(1, math.ceil(len(images) / columns))
    figure = new_figure(1.25 * columns, 1.55 * rows + 0.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, caption in zip(grid.flat, images, captions):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axes.text(0.5, -0.04, caption, fontsize=8, ha="center", va="top", transform=axes.transAxes)
    return figure
