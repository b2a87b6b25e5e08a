"""What a worker counts and logs. Everything here runs for each request, so it is counted in tenths of a microsecond.

Requests are counted at once. Predictions and summaries of their inputs are noted at once and added up a twentieth of a
second later, many in one numpy call.
"""

import asyncio
import json
import os
import sys
import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.serve.board import FAILED, GENERATION, PID, READY, Board, Region
from ml.serve.model import Model

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHARES = tuple(round(step * 0.05, 2) for step in range(1, 21))  # of scores and of input summaries, on 0..1
BATCHES = (1, 2, 4, 8, 16, 32, 64)
INK = 128  # as in the stage preprocess
DELAY = 0.05  # seconds that a line of the log, or a prediction, may wait to be written or added up


class Telemetry:
    def __init__(self, board: Board, worker: int) -> None:
        self.board, self.worker = board, worker
        self.region = Region(board, worker)
        self.values = self.region.values
        self.fixed = self.region.fixed
        self.fixed[PID], self.fixed[READY] = os.getpid(), 0
        self.fixed[GENERATION] = self.fixed[FAILED] = 0
        self.in_flight_slot = self.region.slot("in_flight")
        self.values[self.in_flight_slot] = 0  # the worker before may have died with some
        self.lines: list[str] = []
        self.noted: list[tuple[Model, NDArray[np.uint8], NDArray[np.float32]]] = []
        self.scheduled = False
        self.second, self.stamp = 0, ""
        self.names: dict[tuple[str, str, int], tuple[int, int]] = {}

    # Requests

    def count_request(self, route: str, method: str, status: int, seconds: float) -> None:
        key = (route, method, status)
        slots = self.names.get(key)
        if slots is None:
            slots = self.names[key] = (
                self.region.slot("requests_total", route, method, str(status)),
                self.region.slot("request_seconds", route, count=len(SECONDS) + 2),
            )
        values = self.values
        values[slots[0]] += 1
        first = slots[1]
        values[first + bisect_left(SECONDS, seconds)] += 1
        values[first + len(SECONDS) + 1] += seconds

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        self.values[self.region.slot(name, *labels)] += by

    # Predictions

    def note(self, model: Model, images: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> None:
        """images (N, H, W) that were answered with probabilities (N, classes)."""
        self.noted.append((model, images, probabilities))
        if not self.scheduled:
            self.schedule()

    def add_up(self) -> None:
        noted, self.noted = self.noted, []
        for model in {id(each[0]): each[0] for each in noted}.values():
            mine = [each for each in noted if each[0] is model]
            for _, images, _ in mine:
                self.count_batch(len(images))
            self.summarise(
                model,
                np.concatenate([each[1] for each in mine]),
                np.concatenate([each[2] for each in mine]),
            )

    def count_batch(self, size: int) -> None:
        first = self.region.slot("batch_images", count=len(BATCHES) + 2)
        self.values[first + bisect_left(BATCHES, size)] += 1
        self.values[first + len(BATCHES) + 1] += size

    def summarise(self, model: Model, images: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> None:
        tag = model.tag
        counts = np.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        for name, count in zip(model.experiment.class_names, counts.tolist()):
            if count:
                self.count("predictions_total", tag, name, by=count)
        pixels = images.reshape(len(images), -1)
        self.add_histogram("score", tag, probabilities.max(1))
        self.add_histogram("input_brightness", tag, pixels.mean(1) / 255)
        self.add_histogram("input_contrast", tag, pixels.std(1, dtype=np.float32) / 255)
        self.add_histogram("input_ink", tag, (pixels >= INK).mean(1))

    def add_histogram(self, name: str, tag: str, found: NDArray[Any]) -> None:
        first = self.region.slot(name, tag, count=len(SHARES) + 2)
        buckets = np.bincount(np.searchsorted(SHARES, found - 1e-9), minlength=len(SHARES) + 1)
        for offset, count in enumerate(buckets.tolist()):
            if count:
                self.values[first + offset] += count
        self.values[first + len(SHARES) + 1] += float(found.sum())

    def set_model(self, model: Model) -> None:
        self.region.slot("model_info", model.tag, model.experiment.model.sha256)
        for key, slot in self.region.known.items():
            if key[0] == "model_info":
                self.values[slot] = key[1:] == (model.tag, model.experiment.model.sha256)
        self.values[self.region.slot("model_live_seconds")] = time.time()

    # Log

    def log_request(
        self, request_id: str, method: str, route: str, status: int, seconds: float, tag: str, images: int
    ) -> None:
        """`method`, `route` and `request_id` have been checked: none needs escaping."""
        now = time.time()
        if int(now) != self.second:
            self.second = int(now)
            self.stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        level = "info" if status < 500 else "error"
        self.lines.append(
            f'{{"time":"{self.stamp}.{int(now % 1 * 1000):03d}Z","level":"{level}","event":"request","id":"{request_id}",'
            f'"method":"{method}","route":"{route}","status":{status},"ms":{seconds * 1000:.2f},"model":"{tag}",'
            f'"images":{images},"worker":{self.worker}}}\n'
        )
        if not self.scheduled:
            self.schedule()

    def log(self, level: str, event: str, **members: Any) -> None:
        self.lines.append(log_line(level, event, worker=self.worker, **members))
        self.write_lines()

    def schedule(self) -> None:
        self.scheduled = True
        asyncio.get_running_loop().call_later(DELAY, self.flush)

    def flush(self) -> None:
        self.scheduled = False
        self.write_lines()
        self.add_up()

    def write_lines(self) -> None:
        lines, self.lines = self.lines, []
        write("".join(lines))


def log_line(level: str, event: str, **members: Any) -> str:
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    return json.dumps({"time": stamp, "level": level, "event": event, **members}) + "\n"


def write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # nobody reads the log any more: no reason to stop answering


def alive(board: Board) -> Mapping[int, int]:
    """Worker → process id, of those that are there."""
    found = {}
    for worker in range(board.workers):
        pid = int(board.fixed(worker)[PID])
        if pid:
            found[worker] = pid
    return found
