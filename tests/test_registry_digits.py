"""From a real training on digits to production: the run that trained it, the MLflow model, the bundle, the trace."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import mlflow
import numpy as np
import pytest
from ruamel.yaml import YAML

from ml import bundle, files
from ml.tracking import registry
from tests import released
from tests.experiment import Experiment
from tests.gitlab_emulator import GitLabEmulator
from tests.mlflow_server import mlflow_server
from tests.released import settings_for
from tests.workspace import environment, make_workspace

TAG = "model-v1.0.0"
# MLflow warns of a type hint in every model that it loads.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*Any type hint:UserWarning")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, server: str) -> Experiment:
    """Trained, evaluated and tracked by the stages; committed with its dvc.lock; bundled."""
    experiment = released.make_released(tmp_path_factory.mktemp("digits") / "repo")
    make_workspace(experiment.folder, seeds=[0], epochs=1)
    experiment.params = YAML(typ="safe").load((experiment.folder / "params.yaml").read_text())
    experiment.write(".gitignore", "/artifacts/\n/reports/\n/data/\n/models/\n/.tracking/\n/.checkpoints/\n")
    experiment.git("add", "--all")
    experiment.git("commit", "--quiet", "--message", "Before the training")
    tracked = environment(TRACKING="on", MLFLOW_TRACKING_URI=server, MLFLOW_EXPERIMENT_NAME="digits-runs")
    for command in ("stages.load", "stages.preprocess", "stages.train", "stages.evaluate", "tracking flush"):
        arguments = [sys.executable, "-m", *f"ml.{command}".split()]
        done = subprocess.run(arguments, cwd=experiment.folder, env=tracked, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with chdir(experiment.folder):  # DVC looks stages up from the working folder
        experiment.commit("Results")
        bundle.write_bundle(Path("models"), TAG)
    return experiment


def run(experiment: Experiment, uri: str, *arguments: str) -> str:
    names = {"MLFLOW_MODEL_NAME": "digits", "MLFLOW_EXPERIMENT_NAME": "digits-runs"}
    ci = {name: "" for name in os.environ if name.startswith(("CI_", "GITLAB_"))}
    command = [sys.executable, "-m", "ml.promote", *arguments]
    env = environment(**ci | names | {"MLFLOW_TRACKING_URI": uri})
    done = subprocess.run(command, cwd=experiment.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(uri: str) -> np.ndarray:
    golden = files.load_golden()
    return np.asarray(mlflow.pyfunc.load_model(uri).predict(golden.images)) - golden.probabilities


def test_tracked_training_reaches_production_and_answers(
    trained: Experiment, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    settings = settings_for(server, "digits")
    version = registry.register(settings, Path("models", TAG), comment_url=released.COMMENT, gate="first")
    tags = registry.connect(settings).run(version.run_id).data.tags
    assert "restored_from" not in tags  # it is the training's own run
    assert (
        run(trained, server, TAG, "--to", "staging", "--why", "first") == f"1 ({TAG}): candidate → staging\n"
    )
    run(trained, server, "staging", "--to", "champion", "--why", "first")
    told = run(trained, server, "trace", "champion")
    assert "The trace is complete" in told and version.tags["data_hash"] in told
    assert np.abs(answers("models:/digits@champion")).max() < 1e-4


def test_same_model_is_loaded_from_gitlab(trained: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.folder)
    with GitLabEmulator() as gitlab:
        token = gitlab.state.add_token(gitlab.project, "api", access_level=30).value
        uri = f"{gitlab.url}/api/v4/projects/{gitlab.project.id}/ml/mlflow"
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        settings = settings_for(uri, "digits")
        version = registry.register(settings, Path("models", TAG), comment_url=released.COMMENT, gate="first")
        run(trained, uri, TAG, "--to", "staging", "--why", "first")
        assert np.abs(answers(version.uri)).max() < 1e-4
