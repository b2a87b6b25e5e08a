"""A repository whose result can be released: real git, DVC and bundle; the results are made up, nothing is trained."""

import json
import shutil
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from ml import bundle, files
from ml.settings import Settings
from ml.tracking import registry
from ml.tracking.store import Version
from tests.experiment import PIPELINE, Experiment, make_experiment, predictions

COMMENT = "https://gitlab.example.com/g/proj/-/merge_requests/3#note_17"
MERGE_REQUEST = "https://gitlab.example.com/g/proj/-/merge_requests/3"


def make_released(folder: Path) -> Experiment:
    experiment = make_experiment(folder)
    pipeline = json.loads(json.dumps(PIPELINE))
    pipeline["stages"]["train"]["outs"].append(str(files.GOLDEN))
    with open(folder / "dvc.yaml", "w") as file:
        YAML().dump(pipeline, file)
    experiment.write(".gitignore", "/artifacts/\n/reports/\n/data/\n/models/\n")
    experiment.git("config", "user.name", "Ada")
    experiment.git("config", "user.email", "ada@example.com")
    return experiment


def release(
    experiment: Experiment, tag: str, wrong: float = 0.1, settings: Settings | None = None, **registered: Any
) -> Version | None:
    """Results with this share of mistakes, committed, tagged, bundled; with `settings` registered, too."""
    experiment.write_results(predictions(wrong=wrong, random_state=len(tag) + int(wrong * 1000)))
    images = np.full((2, 6, 5), int(wrong * 100), np.uint8)
    golden = files.Golden(images, np.full((2, 3), 1 / 3, np.float32))
    with chdir(experiment.folder):
        files.save_golden(golden)
        experiment.params["train"]["epochs"] += 1
        experiment.commit(tag)
        folder = bundle.write_bundle(Path("models"), tag)
        sha256 = files.sha256(files.MODEL_ONNX)
        experiment.git("tag", "--annotate", tag, "--message", f"{tag}\n\nModel-Sha256: {sha256}\n")
        if settings is None:
            return None
        given = {"comment_url": COMMENT, "gate": "passed", "merge_request_url": MERGE_REQUEST} | registered
        return registry.register(settings, folder, **given)


def settings_for(uri: str, name: str = "ml", **more: Any) -> Settings:
    """Whatever CI job the tests run in, its variables say nothing here."""
    unset = ("ci_project_url", "ci_job_url", "ci_job_id", "ci_pipeline_url", "ci_api_v4_url", "ci_server_url")
    none = {key: None for key in (*unset, "repo_token", "gitlab_token", "gitlab_user_login")}
    names = {"mlflow_model_name": name, "mlflow_experiment_name": f"{name}-runs"}
    return Settings(mlflow_tracking_uri=uri, **(names | none | more))


def fake_flavours(folder: Path) -> None:
    """In place of ml.tracking.model.save_model, which needs a network: its own tests are in test_model.py."""
    files.write_text(folder / "MLmodel", "flavors: {python_function: {}, pytorch: {}}\n")
    files.write_text(folder / "data" / "model.pt2", "weights")


@dataclass(frozen=True)
class Releases:
    """Three releases of one repository: model-v1.0.0 (10 % wrong), model-v1.1.0 (5 %), model-v1.2.0 (20 %).

    `at` has the folder as it was at each; the last has all commits and tags.
    """

    at: dict[str, Path]

    @property
    def latest(self) -> Path:
        return self.at["model-v1.2.0"]

    def register(self, settings: Settings, tag: str, **more: Any) -> Version:
        given = {"comment_url": COMMENT, "gate": "passed", "merge_request_url": MERGE_REQUEST} | more
        with chdir(self.at[tag]):
            return registry.register(settings, Path("models", tag), **given)


def make_releases(folder: Path) -> Releases:
    experiment, at = make_released(folder / "work"), {}
    for tag, wrong in (("model-v1.0.0", 0.1), ("model-v1.1.0", 0.05), ("model-v1.2.0", 0.2)):
        release(experiment, tag, wrong)
        at[tag] = folder / tag
        shutil.copytree(experiment.folder, at[tag])
    return Releases(at)
