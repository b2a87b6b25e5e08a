"""Record a training in MLflow. The only module that imports mlflow; where it is not installed, nothing is recorded."""

import importlib.util
import os
import subprocess
import sys
import time
from typing import Any

from ml.fit import Fitted
from ml.params import Params
from ml.settings import Settings

BATCH = 1000  # metrics per request, the most that the tracking server takes


def log_training(params: Params, fitted: list[Fitted], settings: Settings) -> str | None:
    """One run with every parameter and, for each seed, its training curve by global step.

    Called after the training with the whole history, so that nothing waits for the server during it.

    Returns:
        The run's id; None without MLflow, or when the server cannot be reached (which a line on stderr says).
    """
    if importlib.util.find_spec("mlflow") is None:
        return None
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    os.environ.setdefault(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", "10"
    )  # seconds; by default a silent server is retried
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # for minutes
    try:
        client = MlflowClient(settings.mlflow_tracking_uri)
        experiment = client.get_experiment_by_name(settings.mlflow_experiment_name)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(settings.mlflow_experiment_name)
        )
        run_id: str = client.create_run(experiment_id, tags={"git_commit": git_commit()}).info.run_id
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in points(params.train.seeds, fitted)]
        client.log_batch(
            run_id, params=[Param(key, value) for key, value in flat(params.model_dump()).items()]
        )
        for start in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        client.set_terminated(run_id)
    except (
        Exception
    ) as error:  # its store's, its driver's or the network's: none may cost a finished training
        print(f"MLflow at {settings.mlflow_tracking_uri} did not record this run: {error}", file=sys.stderr)
        return None
    return run_id


def points(seeds: list[int], fitted: list[Fitted]) -> list[tuple[str, float, int]]:
    """(metric, value, global step) of all curves; the metric ends in the seed."""
    found = []
    for seed, each in zip(seeds, fitted):
        for point in each.history.train:
            found.append((f"train_loss_seed_{seed}", point.loss, point.step))
        for check in each.history.validation:
            found.append((f"validation_loss_seed_{seed}", check.loss, check.step))
            found.append((f"validation_accuracy_seed_{seed}", check.accuracy, check.step))
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"train": {"epochs": 5}} to {"train.epochs": "5"}."""
    result: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = str(value)
    return result


def git_commit() -> str:
    """The commit that is checked out; "unknown" outside a git repository and without git."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"
