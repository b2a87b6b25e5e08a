"""A pytest plugin: `pytest_plugins = ["tests.serving_fixtures"]`."""

import fcntl
import os
from pathlib import Path

import pytest

from tests.serving import make_bundle, make_variant


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model-v1.0.0 and model-v1.1.0, made once for all test processes. Copy before changing it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "serving-bundles"
    with open(shared / "serving-bundles.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            fresh = base / "fresh-bundles"
            make_bundle(fresh, "model-v1.0.0", seed=0, created="2026-01-01T00:00:00Z", accuracy=0.97)
            make_variant(fresh / "model-v1.0.0", "model-v1.1.0", created="2026-02-01T00:00:00Z")
            fresh.rename(folder)
    return folder
