"""The load stage as a command: real MNIST in, checked examples out; bad data named, and nothing written."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ml import files
from ml.examples import describe
from ml.stages import load
from ml.task import dataset

WriteRaw = Callable[..., Path]
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def outputs() -> list[str]:
    return sorted(
        str(path) for folder in ("artifacts", "reports") for path in Path(folder).rglob("*") if path.is_file()
    )


def truncate(folder: Path) -> None:
    file = folder / dataset.TRAIN_IMAGES
    file.write_bytes(file.read_bytes()[:100])


def drop_a_label(folder: Path) -> None:
    file = folder / dataset.TEST_LABELS
    content = bytearray(file.read_bytes()[:-1])
    content[7] -= 1
    file.write_bytes(content)


def swap_images_and_labels(folder: Path) -> None:
    images, labels = folder / dataset.TRAIN_IMAGES, folder / dataset.TRAIN_LABELS
    images.rename(folder / "aside")
    labels.rename(images)
    (folder / "aside").rename(labels)


def remove(folder: Path) -> None:
    (folder / dataset.TEST_IMAGES).unlink()


@pytest.mark.parametrize(
    "damage, found",
    [
        (truncate, "train-images-idx3-ubyte: its header says 30 × 5 × 4"),
        (drop_a_label, "has 12 images, but data/t10k-labels-idx1-ubyte has 11 labels"),
        (swap_images_and_labels, "Were two files swapped?"),
        (remove, "t10k-images-idx3-ubyte is missing. Run `make data`"),
    ],
)
def test_bad_data_end_the_command_with_1_and_write_nothing(
    workplace: Path, write_raw: WriteRaw, run_python: RunPython, damage: Callable[[Path], None], found: str
) -> None:
    damage(write_raw(Path("data")))
    answer = run_python("-m", "ml.stages.load")
    assert answer.returncode == 1 and found in answer.stderr and "Traceback" not in answer.stderr
    assert outputs() == []


def test_bad_params_end_the_command_with_1_and_write_nothing(
    workplace: Path, write_raw: WriteRaw, run_python: RunPython
) -> None:
    write_raw(Path("data"))
    Path("params.yaml").write_text("load:\n  dataset: cifar\n")
    answer = run_python("-m", "ml.stages.load")
    assert answer.returncode == 1 and "load.dataset: " in answer.stderr and outputs() == []


def test_earlier_outputs_stay_when_the_data_go_bad(
    workplace: Path, write_raw: WriteRaw, run_python: RunPython
) -> None:
    write_raw(Path("data"))
    assert run_python("-m", "ml.stages.load").returncode == 0
    before = {path: Path(path).read_bytes() for path in outputs()}
    truncate(Path("data"))
    assert run_python("-m", "ml.stages.load").returncode == 1
    assert {path: Path(path).read_bytes() for path in outputs()} == before


def test_good_data_give_examples_a_summary_and_a_card(workplace: Path, write_raw: WriteRaw) -> None:
    raw = dataset.read_dataset(write_raw(Path("data")), "custom")
    load.main()
    for path, part in ((files.TRAIN_EXAMPLES, raw.train), (files.TEST_EXAMPLES, raw.test)):
        saved = files.load_examples(path)
        for name, array in vars(part).items():
            assert np.array_equal(getattr(saved, name), array), name
    summary = json.loads(files.DATA_SUMMARY.read_text())
    assert summary == describe(raw, "custom")
    card = files.DATA_CARD.read_text(encoding="utf-8")
    assert card.startswith("# Data: custom\n") and "| 2 | 10 | 4 |" in card
    assert all(md5 in card for md5 in summary["md5"].values())
    assert outputs() == [
        "artifacts/test.npz",
        "artifacts/train.npz",
        "reports/cost/load.json",
        "reports/data.json",
        "reports/data_card.md",
    ]


def test_same_data_give_the_same_bytes(workplace: Path, write_raw: WriteRaw) -> None:
    write_raw(Path("data"))
    saved = []
    for _ in range(2):
        load.main()
        saved.append({path: Path(path).read_bytes() for path in outputs() if "cost" not in path})
    assert saved[0] == saved[1]


def test_cost_is_written_with_seconds_and_memory(workplace: Path, write_raw: WriteRaw) -> None:
    write_raw(Path("data"))
    load.main()
    cost = json.loads((files.COST / "load.json").read_text())
    assert 0 <= cost["seconds"] < 60 and 10 < cost["peak_memory_mib"] < 100_000


def test_real_mnist_goes_through(workplace: Path, mnist: Path) -> None:
    Path("params.yaml").write_text(
        Path("params.yaml").read_text().replace("dataset: custom", "dataset: mnist")
    )
    Path("data").symlink_to(mnist)
    load.main()
    summary = json.loads(files.DATA_SUMMARY.read_text())
    assert (summary["train"]["examples"], summary["test"]["examples"]) == (60000, 10000)
    assert summary["md5"] == dataset.RAW_MD5["mnist"]
    assert summary["train"]["pixel_mean"] == pytest.approx(0.1307, abs=1e-4)
    assert summary["train"]["pixel_std"] == pytest.approx(0.3081, abs=1e-4)
    assert (
        "60,000 training and 10,000 test images of 28×28 pixels, 10 classes." in files.DATA_CARD.read_text()
    )
    test = files.load_examples(files.TEST_EXAMPLES)
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
