"""A pytest plugin: `pytest_plugins = ["tests.release_fixtures"]`."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gitlab_emulator import GitLabEmulator
from tests.release_project import ReleaseProject, keep, make_template, opened


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, made by the first test process that asks for it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / name
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            fresh = base / f"new-{name}"
            fresh.mkdir()
            make(fresh)
            fresh.rename(folder)
    return folder


@pytest.fixture(scope="session")
def not_released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing released yet; merge request 3 has been through its pipeline."""

    def make(folder: Path) -> None:
        with GitLabEmulator() as gitlab:
            project = make_template(folder, gitlab)
            project.propose(3, "Train for two epochs")
            project.review(3)
            keep(project)

    return once(tmp_path_factory, "release-first", make)


@pytest.fixture(scope="session")
def released(not_released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model-v1.0.0 is released; merge request 4, which trains for three epochs, has been through its pipeline."""

    def make(folder: Path) -> None:
        with opened(not_released, folder) as project:
            project.merge(3)
            project.release()
            project.propose(4, "Train for three epochs", epochs=3)
            project.review(4)
            keep(project)

    return once(tmp_path_factory, "release-second", make)


@pytest.fixture
def first(not_released: Path, tmp_path: Path) -> Iterator[ReleaseProject]:
    with opened(not_released, tmp_path) as copy:
        yield copy


@pytest.fixture
def project(released: Path, tmp_path: Path) -> Iterator[ReleaseProject]:
    with opened(released, tmp_path) as copy:
        yield copy
