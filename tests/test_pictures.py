"""The pictures that only a comparison has: they can be drawn from whatever a comparison may hold."""

import struct

import numpy as np
import pytest
from matplotlib.figure import Figure

from ml import plots
from ml.report import pictures
from ml.report.result import ClassResult
from ml.report.words import tick
from tests.comparisons import comparison, difference

NAMES = ["cat", "a very long class name indeed", "$x^2$ $", "back\\slash $", "_{", "new\nline", ""]


def size(figure: Figure) -> tuple[int, int]:
    """Width and height of the PNG; drawing it would fail on text that matplotlib takes for mathematics."""
    content = plots.png(figure)
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_difference_is_drawn_for_shares_and_for_other_metrics(metric: str) -> None:
    width, height = size(pictures.difference_figure(comparison(primary_metric=metric)))
    assert 1000 < width < 1600 and height < 600


def test_difference_is_drawn_where_every_seed_agrees() -> None:
    metrics = {"accuracy": difference(0.0, 0.0)}
    assert min(size(pictures.difference_figure(comparison(metrics=metrics, margin=0.0)))) > 100


def test_classes_of_every_name_are_drawn() -> None:
    classes = [
        ClassResult(name=name, examples=5, recall=difference(-0.1, 0.3), p_value=0.01) for name in NAMES
    ]
    classes.append(ClassResult(name="one example", examples=1, recall=None, p_value=None))
    assert min(size(pictures.classes_figure(classes))) > 100


def test_of_very_many_classes_the_clearest_are_drawn() -> None:
    classes = [
        ClassResult(
            name=f"c{n}", examples=5, recall=difference(-0.1, 0.3), p_value=0.01 if n % 50 == 0 else 1.0
        )
        for n in range(1300)
    ]
    figure = pictures.classes_figure(classes)
    assert size(figure)[1] < 5000
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 40 and {f"c{n} (n = 5)" for n in range(0, 1300, 50)} <= set(names)
    assert "the 40 clearest of 1,300" in figure.axes[0].get_title(loc="left")


def test_ticks_are_written_as_the_comments_numbers_are() -> None:
    assert [tick(97.5, "%"), tick(-4.5), tick(0.2, sign=True), tick(0, sign=True)] == [
        "97.5\u00a0%",
        "−4.5",
        "+0.2",
        "0",
    ]
    left, right = pictures.difference_figure(comparison()).axes
    assert left.xaxis.get_major_formatter()(97.5) == "97.5\u00a0%"
    assert right.xaxis.get_major_formatter()(-4.5) == "−4.5"


@pytest.mark.parametrize("count", [1, 7])
def test_sheet_of_every_class_name_is_drawn(count: int) -> None:
    flips = comparison().flips
    assert flips is not None
    shown = [flips.broken[0].model_copy(update={"actual": name, "after": name}) for name in NAMES[:count]]
    images = np.zeros((count, 28, 28), np.uint8)
    figure = pictures.flip_sheet(images, shown, 40, "Newly broken: label → now")
    size(figure)
    assert figure.get_suptitle() == f"Newly broken: label → now\n({count} of 40, clearest first)"


def test_colour_tells_better_from_worse_in_the_sense_of_the_metric() -> None:
    up, either = difference(0.01, 0.02), difference(-0.01, 0.02)
    assert pictures.verdict_colour(up, "accuracy") == pictures.GREEN
    assert pictures.verdict_colour(up, "loss") == plots.RED
    assert pictures.verdict_colour(either, "accuracy") == plots.GREY
