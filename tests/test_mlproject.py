"""`mlflow run .` in a real project: parameters checked, the checkout left as it was, one run with everything in it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ml.errors import UserError
from ml.params import load_params
from ml.tracking import project
from tests import test_pipeline
from tests.workspace import ROOT, environment

TREE = load_params(ROOT / "params.yaml").model_dump(mode="json")


def test_names_are_whole_or_short_and_values_are_yaml() -> None:
    given = [
        "--epochs",
        "1",
        "--train.learning_rate",
        "1e-3",
        "--seeds",
        "[3, 4]",
        "--batch_size",
        "params.yaml",
    ]
    assert project.resolve(project.parse_overrides(given), TREE) == {
        "train.epochs": 1,
        "train.learning_rate": 0.001,
        "train.seeds": [3, 4],
    }


@pytest.mark.parametrize(
    "given, message",
    [
        ({"epochs": "0"}, "train.epochs: Input should be greater than or equal to 1 (found: 0)"),
        ({"epochs": "many"}, "train.epochs: Input should be a valid integer"),
        ({"learning_rate": "-1", "epochs": "1.5"}, "2 problems"),
        ({"epoch": "1"}, "params.yaml has no key epoch; nothing was run"),
        ({"dataset": "cats"}, "load.dataset"),
        ({"seeds": "[1,"}, "is not a YAML value"),
        ({"resamples.x": "1"}, "has no key resamples.x"),
    ],
)
def test_bad_parameters_are_named_before_anything_runs(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=r"(?s).*") as raised:
        project.resolve(given, TREE)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "value, text",
    [
        (1, "1"),
        (0.001, "0.001"),
        ([1, 2], "[1, 2]"),
        ("cosine", "'cosine'"),
        ("it's", r"'it\'s'"),
        (True, "true"),
    ],
)
def test_values_are_quoted_for_dvc(value: Any, text: str) -> None:
    assert project.quoted(value) == text


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed project with its data in DVC's cache, in which nothing has run."""
    folder = test_pipeline.make_project(tmp_path_factory.mktemp("mlproject") / "project")
    for name in ("MLproject", "python_env.yaml"):
        (folder / name).write_text((ROOT / name).read_text())
    test_pipeline.commit(folder, "Begin")
    return folder


def mlflow_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = environment(
        PATH=path,
        PYTHONPATH=str(folder / "src"),
        TRACKING="on",
        MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db",
        PYTHONWARNINGS="ignore",
        **test_pipeline.IDENTITY,
    )
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_mlflow_run_trains_elsewhere_and_leaves_the_checkout_as_it_was(checkout: Path) -> None:
    from ml.tracking.client import connect

    before = (checkout / "params.yaml").read_bytes()
    done = mlflow_run(checkout, "-P", "epochs=2", "-P", "seeds=[5]", "-P", "learning_rate=4e-3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "params.yaml").read_bytes() == before
    assert test_pipeline.run(checkout, "git", "status", "--porcelain") == ""

    client = connect(f"sqlite:///{checkout}/mlflow.db")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    (run,) = found  # the one that `mlflow run` made, and no second one
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "2" and run.data.params["train.seeds"] == "[5]"
    assert run.data.params["learning_rate"] == "4e-3" and run.data.params["train.learning_rate"] == "0.004"
    assert "accuracy" in run.data.metrics and "train_loss_seed_5" in run.data.metrics
    params_there = test_pipeline.run(checkout, "git", "show", f"{run.data.tags['git_commit']}:params.yaml")
    assert "epochs: 2" in params_there
    assert run.data.tags["lock_sha256"]


@pytest.mark.slow
def test_mlflow_run_with_a_bad_value_says_what_and_runs_nothing(checkout: Path) -> None:
    done = mlflow_run(checkout, "-P", "epochs=none", "-P", "shift_pixels=99")
    assert done.returncode != 0
    assert "params.yaml with -P has 2 problems; nothing was run" in done.stderr
    assert "train.epochs" in done.stderr and "train.shift_pixels" in done.stderr
    assert "Running stage" not in done.stdout + done.stderr
