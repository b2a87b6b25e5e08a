"""The tracking server, by MLflow's client: with short waits, and what some servers lack told apart from failures."""

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from ml.errors import UserError

SQLITE = "sqlite:///"
CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


def connect(uri: str, timeout: int = 10, retries: int = 0) -> Any:
    """An MlflowClient that gives up on a silent server after `timeout` seconds, not after MLflow's minutes.

    It repeats no request by itself unless `retries`: a repeated runs/create, its first answer lost, leaves two runs.

    Raises:
        UserError: a local database cannot be opened, which MLflow would try for two minutes.
    """
    check_database(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(retries)
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for answers
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    uri = with_password(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_database(uri: str) -> None:
    if not uri.startswith(SQLITE):
        return
    path = uri.removeprefix(SQLITE).partition("?")[0]
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise UserError(
            f"{path} could not be opened as a database of MLflow: {error}. See that its folder exists and may be "
            "written to, or set MLFLOW_TRACKING_URI to another one."
        ) from None


def without_password(text: str) -> str:
    """Addresses without the user name and password that may stand in them: for files, logs and messages."""
    return CREDENTIALS.sub("", text)


def with_password(uri: str) -> str:
    """The address with the credentials that MLFLOW_TRACKING_URI has for it: what is kept on disk has none."""
    own = os.environ.get("MLFLOW_TRACKING_URI", "")
    return own if own and uri == without_password(own) else uri


def absolute(uri: str) -> str:
    """The same database wherever it is opened from: sqlite:///mlflow.db is relative to the working folder."""
    if uri.startswith(SQLITE) and not uri.startswith("sqlite:////") and ":memory:" not in uri:
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"
    return uri


def experiment_id(client: Any, uri: str, name: str) -> str:
    """That of the experiment `name`, made where there is none; any number of processes may ask at once."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if not found:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(uri, name)))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if not found:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {name!r} is deleted. `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`, or set MLFLOW_EXPERIMENT_NAME to another name."
        )
    return str(found.experiment_id)


def artifact_location(uri: str, name: str) -> str | None:
    """Beside a local database, whichever folder it is used from; a server has a place of its own."""
    if not uri.startswith(SQLITE):
        return None
    return (Path(absolute(uri).removeprefix(SQLITE)).parent / "mlruns" / name.replace("/", "_")).as_uri()


def is_unsupported(error: Exception) -> bool:
    """Whether the server lacks this part of MLflow's API (GitLab's lacks several), rather than failing at it."""
    if getattr(error, "error_code", None) in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
        return True
    told = str(error)  # GitLab: {'error': '404 Not Found'}; MLflow's client: "… failed with error code 404 …"
    return any(sign in told for sign in ("'404 Not Found'", "error code 404", "error code 405"))
