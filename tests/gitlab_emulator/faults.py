"""Faults that a test asks for: the next matching requests fail instead of, or after, being carried out."""

import re
import threading
from dataclasses import dataclass

DROP = 0  # in place of a status: the connection ends without an answer


@dataclass
class Fault:
    status: int  # 429, 502, …, or DROP
    times: int
    method: str | None
    path: re.Pattern[str]
    retry_after: str | None
    applied: bool  # whether the request is carried out although its answer gets lost


class Faults:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._waiting.append(fault)

    def take(self, method: str, path: str) -> Fault | None:
        """The first fault that matches, counted down."""
        with self._lock:
            for fault in self._waiting:
                if fault.method in (None, method) and fault.path.search(path):
                    fault.times -= 1
                    if fault.times == 0:
                        self._waiting.remove(fault)
                    return fault
        return None

    @property
    def waiting(self) -> int:
        """How many faults have not been met yet."""
        with self._lock:
            return sum(fault.times for fault in self._waiting)
