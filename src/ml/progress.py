"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

BETWEEN_LINES = 10.0  # seconds


class Lines(tqdm):  # type: ignore[type-arg]
    """tqdm's own text, one line at a time: no carriage returns to garble a CI log."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        print(msg or str(self), file=sys.stderr, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self.display(self.__str__())


@contextmanager
def progress(description: str, total: int | None, unit: str, **options: Any) -> Iterator["tqdm[Any]"]:
    """A tqdm bar over `total` units on stderr; where stderr is no terminal, a line every ten seconds."""
    on_terminal = sys.stderr.isatty()
    kind: Any = tqdm if on_terminal else Lines
    interval = (
        {} if on_terminal else {"mininterval": BETWEEN_LINES, "maxinterval": BETWEEN_LINES, "ncols": 100}
    )
    bar = kind(
        total=total, desc=description, unit=unit, unit_scale=True, file=sys.stderr, **interval, **options
    )
    bar.last_print_t = bar.start_t = time.time()
    try:
        yield bar
    finally:
        bar.close()
