"""What a stage cost: reports/cost/STAGE.json. It differs from run to run, so it is not an output that DVC tracks."""

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ml import files

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


@contextmanager
def measured(stage: str, write: bool = True) -> Iterator[dict[str, str | float]]:
    """Write the seconds and peak memory of the block, with what it adds to the yielded dictionary (such as a device)."""
    notes: dict[str, str | float] = {}
    start = time.perf_counter()
    yield notes
    if not write:
        return
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    files.write_json(
        files.COST / f"{stage}.json",
        {
            "seconds": round(time.perf_counter() - start, 2),
            "peak_memory_mib": round(peak * MAXRSS_UNIT / 2**20),  # of the largest process
            "machine": platform.machine(),
            **notes,
        },
    )
