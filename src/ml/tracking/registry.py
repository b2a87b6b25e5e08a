"""What is done with the model registry: connect, register a release, say what a run was made from, find the best."""

import getpass
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shutil import copyfile
from typing import Any

from ml import bundle, files, git
from ml.bundle import Experiment
from ml.errors import UserError
from ml.lock import LOCK
from ml.settings import Settings
from ml.tracking import gitlab
from ml.tracking.client import connect as connect_client
from ml.tracking.client import without_password
from ml.tracking.lifecycle import Move, State
from ml.tracking.store import METRICS_FILE, Change, Registry, Version, facts

GATES = ("passed", "accepted-regression", "first")
BUNDLE_FILES = (bundle.EXPERIMENT, bundle.MODEL, bundle.GOLDEN)


@dataclass(frozen=True)
class Origin:
    """What a run was made from; None where the run does not say."""

    run_id: str
    git_commit: str
    data_hash: str | None
    lock_sha256: str | None
    model_sha256: str | None


def connect(settings: Settings) -> Registry:
    """The registry behind MLFLOW_TRACKING_URI. Raises UserError without MLflow."""
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("MLflow is not installed here. Run `pip install -e .[track]`.")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for answers
    uri = settings.mlflow_tracking_uri
    kind = gitlab.GitLabRegistry if gitlab.is_gitlab(uri) else Registry
    return kind(connect_client(uri, timeout=30, retries=2), settings)


@contextmanager
def reaching(settings: Settings, doing: str) -> Iterator[Registry]:
    """Errors of the server, its storage or the network become a UserError that says what was being done."""
    try:
        yield connect(settings)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        told = f"MLflow at {settings.mlflow_tracking_uri} failed while {doing}: {reason[0][:400]}"
        raise UserError(
            f"{without_password(told)}\n"
            "See that it runs and that MLFLOW_TRACKING_URI and its credentials are right, then run the same command "
            "again: it goes on where this one broke off."
        ) from None


def register(
    settings: Settings,
    folder: Path,
    *,
    comment_url: str | None,
    gate: str,
    merge_request_url: str | None = None,
) -> Version:
    """Put the bundle in `folder` and the MLflow model of artifacts/ into the registry, as a candidate.

    Run in the project's root with the results of the bundle's commit in place. A second call for the same release tag
    finishes what is missing and gives the same version. Without `comment_url` the version can never be promoted.

    Raises UserError when the bundle or the results are not whole or not of one another, when the tag has other bytes in
    the registry, or when the server cannot be reached.
    """
    if gate not in GATES:
        raise UserError(f"gate is {gate!r}; it can be: {', '.join(GATES)}.")
    experiment = check_bundle(folder)
    check_results(experiment)
    links = {"comment_url": comment_url, "merge_request_url": merge_request_url}
    links |= {"ci_job_url": settings.ci_job_url, "ci_pipeline_url": settings.ci_pipeline_url}
    tags = facts(experiment) | {key: value for key, value in links.items() if value}
    tags |= {"gate": gate, "experiment_sha256": files.sha256(folder / bundle.EXPERIMENT)}
    with reaching(settings, f"registering {experiment.tag}") as registry:
        registry.create_model()
        state = registry.state()
        known = state.version_of(experiment.tag)
        version = registry.version(known) if known else registry.unfinished(experiment.tag)
        if version is None:
            run_id = registry.find_run(experiment) or registry.log_run(experiment)
            registry.complete_run(run_id, experiment)
            version = registry.add_version(
                experiment.tag, run_id, tags | {"run_id": run_id}, lambda to: write_files(folder, to)
            )
        if version.tags.get("model_sha256") != experiment.model.sha256:
            raise UserError(
                f"{experiment.tag} is in the registry with another model (version {version.version}). "
                "A release tag names one model for ever: release under a new tag."
            )
        return enter(registry, version, settings)


def enter(registry: Registry, version: Version, settings: Settings) -> Version:
    """Write the version into the trail, unless somebody has registered the same release meanwhile: then theirs counts."""

    def decide(state: State) -> Change | None:
        if state.version_of(version.tag) is not None:
            return None
        move = Move.model_validate(
            {"version": version.version, "tag": version.tag, "from": None, "to": "candidate"}
        )
        return Change("register", (move,), f"released as {version.tag}")

    registry.change(who(settings), decide)
    theirs = registry.state().version_of(version.tag)
    assert theirs is not None
    if theirs != version.version:
        registry.remove_version(version)
    return registry.version(theirs)


def check_bundle(folder: Path) -> Experiment:
    """Raises UserError unless the three files are there and the two that experiment.json describes are those."""
    experiment = bundle.parse_experiment(
        files.read_bytes(folder / bundle.EXPERIMENT, "evaluate"), str(folder / bundle.EXPERIMENT)
    )
    for name, expected in ((bundle.MODEL, experiment.model), (bundle.GOLDEN, experiment.golden)):
        path = folder / name
        if (
            not path.is_file()
            or files.sha256(path) != expected.sha256
            or path.stat().st_size != expected.size
        ):
            raise UserError(f"{path} is missing, or is not the file that {bundle.EXPERIMENT} describes.")
    return experiment


def check_results(experiment: Experiment) -> None:
    """Raises UserError when artifacts/, reports/ and dvc.lock here are not those that the bundle was made from."""
    for path, expected in ((files.MODEL_ONNX, experiment.model.sha256), (Path(LOCK), experiment.lock_sha256)):
        if not path.is_file() or files.sha256(path) != expected:
            raise UserError(
                f"{path} is missing or is not that of {experiment.tag}. Check out {experiment.git_commit[:8]}, run "
                "`dvc pull`, and write the bundle anew."
            )
    if files.read_json(files.METRICS, "evaluate") != experiment.metrics:
        raise UserError(
            f"{files.METRICS} is not that of {experiment.tag}. Run `dvc checkout` and write the bundle anew."
        )


def write_files(bundled: Path, folder: Path) -> None:
    """The files of a version: the MLflow model of artifacts/, the bundle, and the metrics as dvc.lock knows them."""
    from ml.tracking.model import save_model

    save_model(folder)
    for name in BUNDLE_FILES:
        (folder / "bundle").mkdir(exist_ok=True)
        copyfile(bundled / name, folder / "bundle" / name)
    (folder / METRICS_FILE).parent.mkdir()
    copyfile(files.METRICS, folder / METRICS_FILE)


def who(settings: Settings) -> str:
    """The person, as GitLab, else git, else the machine knows them, and the job."""
    found = (git.attempt("config", key).stdout for key in ("user.name", "user.email"))
    name, mail = (value.decode("utf-8", "replace").strip() for value in found)
    person = settings.gitlab_user_login or (f"{name} <{mail}>" if name and mail else name or mail)
    if not person:
        try:
            person = getpass.getuser()
        except (KeyError, OSError):  # a container's user without a name
            person = "unknown"
    return f"{person[:200]} in {settings.ci_job_url}" if settings.ci_job_url else person[:200]


def origin_of_run(settings: Settings, run_id: str) -> Origin:
    """Raises UserError when there is no such run, or it does not say its commit."""
    with reaching(settings, f"looking for run {run_id}") as registry:
        tags = registry.run(run_id).data.tags
    commit = tags.get("git_commit", "")
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise UserError(
            f"Run {run_id} does not say which commit it was made from (git_commit: {commit or 'missing'}), so nobody "
            "can make it again. Runs of this template's stages inside a git repository do."
        )
    known = {key: tags.get(key) for key in ("data_hash", "lock_sha256", "model_sha256")}
    return Origin(run_id, commit, **known)


def best_runs(settings: Settings, metric: str, highest: bool, count: int) -> list[Any]:
    """The finished training runs with the best value of `metric`, best first."""
    with reaching(settings, f"looking for the best {metric}") as registry:
        runs = registry.best_runs(metric, highest)
        return list(
            islice(
                (run for run in runs if run.info.status == "FINISHED" and metric in run.data.metrics), count
            )
        )
