"""A small project with a released state on its remotes, made once for a file, and a copy of it for each test."""

from pathlib import Path

import pytest

from benchmarks import reliability_dvc as reliability
from benchmarks.reliability_dvc import History


@pytest.fixture(scope="module")
def finished_history(tmp_path_factory: pytest.TempPathFactory) -> History:
    return reliability.make_history(tmp_path_factory.mktemp("history") / "history")


@pytest.fixture
def history(finished_history: History, tmp_path: Path) -> History:
    return finished_history.copy(tmp_path)
