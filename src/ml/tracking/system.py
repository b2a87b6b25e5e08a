"""Use of processor, memory, disk, network and GPU, by MLflow's own monitors, so under MLflow's own names."""

import time
from contextlib import suppress
from typing import Any

from ml.tracking.journal import Journal, now


class SystemMetrics:
    """Samples go into the journal, like all else; the step is the seconds since the run began."""

    def __init__(self, journal: Journal) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.journal, self.started = journal, journal.header.started
        self.monitors: list[Any] = []
        self.last = -float("inf")
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            with suppress(Exception):  # no psutil, or no GPU and its library
                self.monitors.append(kind())
        for monitor in self.monitors:  # the first reading of the processor is since nothing
            with suppress(Exception):
                monitor.collect_metrics()
                monitor.clear_metrics()

    def sample(self, interval: float) -> None:
        """Write down what is used now, unless that was done in the last `interval` seconds."""
        if time.monotonic() - self.last < interval:
            return
        self.last, at = time.monotonic(), now()
        values: dict[str, float] = {}
        for monitor in self.monitors:
            with suppress(Exception):
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
        points = [
            (f"system/{name}", value, at, (at - self.started) // 1000) for name, value in values.items()
        ]
        if points:
            self.journal.append(metrics=points)
