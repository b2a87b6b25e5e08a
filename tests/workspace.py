"""A folder in which the stages run on the embedded digits, with parameters small enough for a test."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ml.task import fetch

ROOT = Path(__file__).parents[1]
TRAIN = {
    "seeds": [0, 1],
    "epochs": 2,
    "batch_size": 32,
    "learning_rate": 0.005,
    "log_every": 10,
    "label_smoothing": 0.0,
    "device": "cpu",
    "precision": "float32",
}


def make_workspace(folder: Path, **train: Any) -> Path:
    """params.yaml and raw data in `folder`; nothing has run yet."""
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    params["load"]["dataset"] = "digits"
    params["preprocess"]["validation_fraction"] = 0.2
    params["train"] |= TRAIN | train
    params["evaluate"] |= {"resamples": 200}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "params.yaml", "w") as file:
        YAML().dump(params, file)
    fetch.write_digits(folder / "data")
    return folder


def environment(**more: str) -> dict[str, str]:
    """This process's environment with one thread per library, so that tests on a busy machine do not spin."""
    quiet = {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "TRACKING": "off"}
    return {**os.environ, **quiet, **more}


def run_stage(stage: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"ml.stages.{stage}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**more))
