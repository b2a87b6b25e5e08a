"""The evaluate stage: predictions that a later comparison can pair, metrics, tables and figures."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ml import files
from ml.stages.load import data_card
from tests.workspace import make_workspace, run_stage

FIGURES = {"confusion_matrix", "per_class", "reliability", "training_curves", "worst_mistakes"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which all four stages have run."""
    folder = make_workspace(tmp_path_factory.mktemp("evaluated"), epochs=1)
    for stage in ("load", "preprocess", "train", "evaluate"):
        done = run_stage(stage, folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_predictions_are_keyed_by_the_ids_of_the_test_examples(evaluated: Path) -> None:
    predictions = files.load_predictions(evaluated / "reports/predictions.npz")
    test = files.load_examples(evaluated / "artifacts/test.npz")
    assert predictions.ids.tolist() == test.ids.tolist()
    assert predictions.labels.tolist() == test.labels.tolist()
    assert predictions.probabilities.shape == (2, len(test), 10)
    assert np.allclose(predictions.probabilities.sum(2), 1, atol=1e-5)


def test_metrics_agree_with_the_predictions_and_their_intervals_hold_them(evaluated: Path) -> None:
    metrics = json.loads((evaluated / "reports/metrics.json").read_text())
    predictions = files.load_predictions(evaluated / "reports/predictions.npz")
    accuracy = (predictions.probabilities.argmax(2) == predictions.labels).mean(1)
    assert metrics["accuracy"]["mean"] == pytest.approx(accuracy.mean(), abs=1e-6)
    assert metrics["accuracy"]["seed_std"] == pytest.approx(accuracy.std(ddof=1), abs=1e-6)
    assert set(metrics) == {"accuracy", "macro_f1", "loss", "calibration_error"}
    for name in ("accuracy", "macro_f1", "loss"):
        assert metrics[name]["low"] <= metrics[name]["mean"] <= metrics[name]["high"]


def test_tables_have_a_row_for_each_seed_class_and_bin(evaluated: Path) -> None:
    read = {path.stem: pd.read_csv(path) for path in (evaluated / "reports").glob("*.csv")}
    assert read["per_seed"]["seed"].tolist() == [0, 1]
    assert read["per_class"]["class"].tolist() == list(range(10))
    assert len(read["reliability"]) == 15
    assert len(read["confusion"]) == read["per_class"]["examples"].sum()


def test_every_figure_is_a_png_and_has_something_on_it(evaluated: Path) -> None:
    from PIL import Image

    found = {path.stem: path for path in (evaluated / "reports/plots").glob("*.png")}
    assert set(found) == FIGURES
    for path in found.values():
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors(256) or []) > 10, f"{path.stem} is empty"


@pytest.mark.slow
def test_evaluate_gives_the_same_bytes_again(evaluated: Path) -> None:
    before = {
        path: files.sha256(path) for path in (evaluated / "reports").glob("**/*") if made_by_evaluate(path)
    }
    assert len(before) > 8
    done = run_stage("evaluate", evaluated)
    assert done.returncode == 0, done.stderr
    assert before == {path: files.sha256(path) for path in before}


def made_by_evaluate(path: Path) -> bool:
    return path.is_file() and path.parent.name != "cost"


def test_weights_of_another_network_are_refused_before_anything_is_written(
    evaluated: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    subprocess.run(["cp", "-r", evaluated, folder], check=True)
    (folder / "reports/metrics.json").unlink()
    (folder / "artifacts/weights/seed-1.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    done = run_stage("evaluate", folder)
    assert done.returncode == 1
    assert "artifacts/weights/seed-1.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "reports/metrics.json").exists()


def test_data_card_tells_counts_classes_and_leaks(evaluated: Path) -> None:
    summary = json.loads((evaluated / "reports/data.json").read_text())
    card = data_card(summary | {"images_in_both_parts": 3})
    assert "1,437 training and 360 test images of 28×28 pixels, 10 classes." in card
    assert "Images in both parts (a leak): 3." in card
