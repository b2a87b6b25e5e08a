"""/metrics: what all workers have counted, added up, in Prometheus' text format."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml.serve.board import Board
from ml.serve.telemetry import BATCHES, SECONDS, SHARES, alive

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTERS = {
    "requests_total": ("Answered requests", ("route", "method", "status")),
    "errors_total": ("Answers that were an error, by kind of problem", ("kind",)),
    "model_swaps_total": ("Attempts to change the model", ("result",)),
    "predictions_total": ("Images that were given this class", ("model", "predicted_class")),
    "images_changed_total": ("Images that were changed to fit the model", ("what",)),
}
HISTOGRAMS = {
    "request_seconds": ("Time to answer a request", ("route",), SECONDS),
    "batch_images": ("Images that went through the model in one run", (), BATCHES),
    "score": ("Probability of the predicted class", ("model",), SHARES),
    "input_brightness": ("Mean of an image's pixels", ("model",), SHARES),
    "input_contrast": ("Standard deviation of an image's pixels", ("model",), SHARES),
    "input_ink": ("Share of an image's pixels that are light", ("model",), SHARES),
}
GAUGES: dict[str, tuple[str, tuple[str, ...], Callable[[Iterable[float]], float]]] = {
    "in_flight": ("Requests being answered", (), sum),
    "model_info": ("Whether this model is live", ("tag", "sha256"), max),
    "model_live_seconds": ("Unix time at which the model went live in the last worker", (), max),
}
PROCESS = {
    "resident_bytes": ("gauge", "Resident memory"),
    "cpu_seconds_total": ("counter", "Processor time, user and system"),
    "open_fds": ("gauge", "Open file descriptors"),
    "start_time_seconds": ("gauge", "Unix time at which the process started"),
}


def render(board: Board) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class All(Collector):
        def collect(self) -> Iterator[Any]:
            return families(board)

    registry = CollectorRegistry()
    registry.register(All())
    return generate_latest(registry)


def families(board: Board) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    found: dict[tuple[str, tuple[str, ...]], list[list[float]]] = {}
    for worker in range(board.workers):
        for series in board.series(worker):
            found.setdefault((series.name, series.labels), []).append(series.values)
    singles: list[tuple[Any, ...]] = [
        *((CounterMetricFamily, name, text, labels, sum) for name, (text, labels) in COUNTERS.items()),
        *((GaugeMetricFamily, name, *described) for name, described in GAUGES.items()),
    ]
    for family, name, text, labels, combine in singles:
        single = family(f"ml_serve_{name}", text, labels=labels)
        for (which, values), rows in found.items():
            if which == name:
                single.add_metric(values, combine(row[0] for row in rows))
        yield single
    for name, (text, labels, bounds) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"ml_serve_{name}", text, labels=labels)
        for (which, values), rows in found.items():
            if which == name:
                added = [sum(column) for column in zip(*rows)]
                histogram.add_metric(values, cumulative(bounds, added[:-1]), added[-1])
        yield histogram
    workers = {worker: process(pid) for worker, pid in alive(board).items()}
    for name, (kind, text) in PROCESS.items():
        family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        numbers = family(f"ml_serve_process_{name}", text, labels=("worker",))
        for worker, values_of in workers.items():
            if values_of is not None:
                numbers.add_metric((str(worker),), values_of[name])
        yield numbers


def cumulative(bounds: tuple[float, ...], counts: list[float]) -> list[tuple[str, float]]:
    total, buckets = 0.0, []
    for bound, count in zip([*map(str, map(float, bounds)), "+Inf"], counts):
        total += count
        buckets.append((bound, total))
    return buckets


def process(pid: int) -> dict[str, float] | None:
    """Of a process on Linux; None elsewhere, or when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/stat") as file:
            boot = next(int(line.split()[1]) for line in file if line.startswith("btime"))
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, StopIteration, ValueError):
        return None
    tick = os.sysconf("SC_CLK_TCK")
    return {
        "resident_bytes": float(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        "cpu_seconds_total": (int(fields[11]) + int(fields[12])) / tick,
        "open_fds": float(descriptors),
        "start_time_seconds": boot + int(fields[19]) / tick,
    }
