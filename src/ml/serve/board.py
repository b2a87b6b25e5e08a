"""Numbers that all workers of one server share: an anonymous shared memory map, made before they are forked.

Each worker writes its own region alone, so an increment needs no lock and costs 0.1 µs; whoever is asked for /metrics
adds the regions up. The map outlives a killed worker, and its successor goes on counting in the same region, so that
no counter ever falls.

A region: one page of fixed numbers, then the values (float64), then the names of the series as JSON lines.
"""

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

PID, GENERATION, FAILED, USED, READY = range(5)  # fixed numbers of a region
FIXED = 512  # float64s of the first page
SERIES = 2**15  # float64s for values; pages that are not written to cost nothing
NAMES = 2**21  # bytes
REGION = FIXED * 8 + SERIES * 8 + NAMES


@dataclass(frozen=True)
class Series:
    """Values of one name with one set of labels: a number, or a histogram's buckets followed by its sum."""

    name: str
    labels: tuple[str, ...]
    values: list[float]


class Board:
    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.memory = mmap.mmap(-1, REGION * workers)

    def fixed(self, worker: int) -> "memoryview[float]":
        start = worker * REGION
        return memoryview(self.memory)[start : start + FIXED * 8].cast("d")

    def values(self, worker: int) -> "memoryview[float]":
        start = worker * REGION + FIXED * 8
        return memoryview(self.memory)[start : start + SERIES * 8].cast("d")

    def names(self, worker: int) -> memoryview:
        start = worker * REGION + FIXED * 8 + SERIES * 8
        return memoryview(self.memory)[start : start + NAMES]

    def series(self, worker: int) -> Iterator[Series]:
        """What the worker has counted so far; safe while it goes on counting."""
        used, values, position = int(self.fixed(worker)[USED]), self.values(worker), 0
        for line in bytes(self.names(worker)[:used]).splitlines():
            name, count, *labels = json.loads(line)
            yield Series(name, tuple(labels), list(values[position : position + count]))
            position += count


class Region:
    """One worker's counters. `values[slot(...)] += 1` counts."""

    def __init__(self, board: Board, worker: int) -> None:
        self.board, self.worker = board, worker
        self.fixed, self.values, self.names = board.fixed(worker), board.values(worker), board.names(worker)
        self.known: dict[tuple[str, ...], int] = {}
        self.next = 0
        for line in bytes(self.names[: int(self.fixed[USED])]).splitlines():  # of the worker before
            name, count, *labels = json.loads(line)
            self.known[(name, *labels)] = self.next
            self.next += count

    def slot(self, name: str, *labels: str, count: int = 1) -> int:
        """Where the values of this series lie; made at the first call. When memory is full, one that nobody reads."""
        key = (name, *labels)
        found = self.known.get(key)
        if found is not None:
            return found
        line = json.dumps([name, count, *labels]).encode() + b"\n"
        used = int(self.fixed[USED])
        if self.next + count > SERIES - 128 or used + len(line) > NAMES:
            return SERIES - 128
        self.names[used : used + len(line)] = line
        self.fixed[USED] = used + len(line)  # last: a reader takes only whole lines
        self.known[key] = self.next
        self.next += count
        return self.known[key]
