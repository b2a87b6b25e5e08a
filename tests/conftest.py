"""Fixtures that several test files share: small IDX folders, the real MNIST, a place to run commands in."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
MNIST = ROOT.parent / "shared" / "data" / "mnist"  # for tests alone; they skip where it is missing
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: a file stays in one process, and a long one begun last is waited for."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def idx(array: NDArray[np.uint8]) -> bytes:
    """The IDX file of `array`, written here from the format's definition, not by the code under test."""
    array = np.asarray(array, np.uint8)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="session")
def to_idx() -> Callable[[NDArray[np.uint8]], bytes]:
    return idx


@pytest.fixture(scope="session")
def write_raw() -> Callable[..., Path]:
    """Call with a folder: four IDX files of random images, classes 0, 1, 2 in turn; keywords replace arrays."""

    def write(
        folder: Path, train: int = 30, test: int = 12, shape: tuple[int, int] = (5, 4), **replaced
    ) -> Path:
        random = np.random.RandomState(train + test)
        arrays = {
            "train_images": random.randint(0, 256, (train, *shape)),
            "train_labels": np.arange(train) % 3,
            "test_images": random.randint(0, 256, (test, *shape)),
            "test_labels": np.arange(test) % 3,
        } | replaced
        folder.mkdir(parents=True, exist_ok=True)
        for file, array in zip(IDX_FILES, arrays.values()):
            (folder / file).write_bytes(idx(array))
        return folder

    return write


@pytest.fixture(scope="session")
def mnist() -> Path:
    if not MNIST.is_dir():
        pytest.skip(f"{MNIST} is missing")
    return MNIST


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the repository's params.yaml and presets, as current directory; load.dataset is custom."""
    text = (ROOT / "params.yaml").read_text()
    text, count = re.subn(r"(?m)^(  dataset: )[\w-]+", r"\1custom", text)
    assert count == 1
    (tmp_path / "params.yaml").write_text(text)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python with these arguments in the current directory."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="session")
def modules_after() -> Callable[[str], set[str]]:
    """Names of all modules, packages included, that a fresh Python has loaded after running `code`."""

    def modules(code: str) -> set[str]:
        program = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return set(json.loads(answer.stdout))

    return modules
