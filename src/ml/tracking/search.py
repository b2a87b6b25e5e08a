"""Runs by a filter that may ask for more or less of a param, which MLflow's own search cannot: params are texts there."""

import re
import sys
from typing import Any

from ml.errors import UserError
from ml.settings import Settings
from ml.tracking import client as server

NUMBER = re.compile(
    r"(?i)^\s*params?\.(`[^`]+`|\"[^\"]+\"|[\w.]+)\s*(<=|>=|!=|=|<|>)\s*(-?[\d.]+(?:e[-+]?\d+)?)\s*$"
)
COMPARE = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def split_filter(text: str) -> tuple[str, list[tuple[str, str, float]]]:
    """The part that MLflow understands, and (param, comparison, number) of the rest."""
    rest, numbers = [], []
    for clause in re.split(r"(?i)\s+and\s+", text.strip()) if text.strip() else []:
        found = NUMBER.match(clause)
        if found:
            numbers.append((found[1].strip('`"'), found[2], float(found[3])))
        else:
            rest.append(clause)
    return " AND ".join(rest), numbers


def fits(params: dict[str, str], numbers: list[tuple[str, str, float]]) -> bool:
    for name, comparison, number in numbers:
        try:
            if not COMPARE[comparison](float(params[name]), number):
                return False
        except (KeyError, ValueError):  # no such param, or no number
            return False
    return True


def search(settings: Settings, text: str, by: str, limit: int = 1000) -> list[Any]:
    """The runs that fit, highest `by` first. Raises UserError when the server refuses the filter."""
    ours, numbers = split_filter(text)
    client = server.connect(settings.mlflow_tracking_uri)
    try:
        experiment = client.get_experiment_by_name(settings.mlflow_experiment_name)
        if not experiment:
            return []
        order = [f"metrics.`{by}` DESC"]
        found = client.search_runs([experiment.experiment_id], ours, max_results=limit, order_by=order)
    except Exception as error:
        told = f"MLflow at {settings.mlflow_tracking_uri} did not answer {text!r}: {error}"
        raise UserError(server.without_password(told)) from None
    return [run for run in found if fits(run.data.params, numbers)]


def main(settings: Settings, text: str, by: str) -> None:
    found = search(settings, text, by)
    if not found:
        print(
            f"No run of experiment {settings.mlflow_experiment_name!r} fits. MLFLOW_EXPERIMENT_NAME chooses another; "
            "`mlflow run` without --experiment-name writes to 'Default'.",
            file=sys.stderr,
        )
    for run in found:
        metrics = run.data.metrics
        shown = {
            name: metrics[name] for name in dict.fromkeys((by, "accuracy", "final_loss")) if name in metrics
        }
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        commit = run.data.tags.get("git_commit", "unknown")[:8]
        print(f"{run.info.run_id}  {run.info.status}  {commit}  {values}")
