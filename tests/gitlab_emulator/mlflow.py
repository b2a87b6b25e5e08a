"""GitLab's MLflow-compatible API, with its gaps: /projects/:id/ml/mlflow/… and the files of models.

Read in GitLab's source (18 and 19), whose fields, errors and limits these are:

| source | here |
|---|---|
| lib/api/ml/mlflow/{experiments,runs,registered_models,model_versions,metrics,api_helpers}.rb | the routes; a route that is not there answers `404 Not Found` |
| lib/api/entities/ml/mlflow/{run_info,run,model_version,registered_model,experiment}.rb | the fields of the answers |
| app/services/ml/create_model_version_service.rb, app/models/ml/*.rb | semantic versions; tags of a version only when it is made; limits |
| app/services/ml/experiment_tracking/candidate_repository.rb, spec/requests/api/ml/mlflow/runs_spec.rb | params and tags of a run are written once; log-batch passes over what is there |
| lib/api/ml/mlflow_artifacts/artifacts.rb, lib/api/ml_model_packages.rb | files: names are stored percent-encoded, no folders |

`version` of a model version is the id of its row; it is found by its semantic version. There are no aliases to set, no
model-versions/search, no logged models, no inputs, and runs/search takes no filter.
"""

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response

from tests.gitlab_emulator.rights import DEVELOPER
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.state import Json, Project

API = "/projects/:id/ml/mlflow/api/2.0/mlflow"
FILES = "/projects/:id/packages/ml_models/:version_id/files/*path"
SEMANTIC = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
NAME = re.compile(r"[\w.\-]+")
FILE_NAME = re.compile(r"[A-Za-z0-9._\-+ ]+")
STATES = ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")


@dataclass
class Experiment:
    iid: int
    name: str
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """A candidate. `files` by percent-encoded name."""

    iid: int
    eid: str
    experiment: Experiment
    name: str | None
    start_time: int
    version_id: int | None = None
    end_time: int | None = None
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[Json] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Version:
    id: int
    semver: str
    description: str
    tags: dict[str, str]
    run: Run
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Model:
    name: str
    description: str
    tags: dict[str, str]
    experiment: Experiment
    versions: list[Version] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Registry:
    """`builds`: ids of the CI jobs that exist."""

    experiments: list[Experiment] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)
    builds: set[str] = field(default_factory=set)

    def new_experiment(self, name: str) -> Experiment:
        if any(each.name == name for each in self.experiments):
            raise structured(400, "RESOURCE_ALREADY_EXISTS")
        self.experiments.append(Experiment(len(self.experiments) + 1, name))
        return self.experiments[-1]

    def new_run(self, experiment: Experiment, name: str | None, start_time: int) -> Run:
        eid = str(secrets.token_hex(16))
        self.runs.append(Run(len(self.runs) + 1, eid, experiment, name, start_time))
        return self.runs[-1]

    def files_of(self, version_id: str) -> dict[str, bytes]:
        if version_id.startswith("candidate:"):
            found = [run for run in self.runs if str(run.iid) == version_id.removeprefix("candidate:")]
        else:
            found = [run for run in self.runs if str(run.version_id) == version_id]
        if not found:
            raise not_found()
        return found[0].files


def registry_of(project: Project) -> Registry:
    """That of the project; tests look into it, too."""
    registry: Registry = project.__dict__.setdefault("mlflow", Registry())
    return registry


def structured(status: int, code: str, message: Any = None) -> ApiError:
    body = {"error_code": code}
    return ApiError(status, body | ({"message": message} if message is not None else {}))


def missing() -> ApiError:
    return structured(404, "RESOURCE_DOES_NOT_EXIST")


def invalid(message: Any) -> ApiError:
    return structured(400, "INVALID_PARAMETER_VALUE", message)


def mlflow(method: str, path: str) -> Any:
    """Decorator for a route of the API: what writes needs role Developer; every success is 200."""

    def register(handler: Any) -> Any:
        def checked(call: Call) -> Any:
            assert call.token is not None
            if method != "GET" and call.token.access_level < DEVELOPER:
                raise ApiError(401, "401 Unauthorized")
            result = handler(call, registry_of(call.project))
            return result if isinstance(result, Response) else JSONResponse(result)

        return route(method, path if path.startswith("/projects") else f"{API}/{path}")(checked)

    return register


def text(call: Call, name: str) -> str:
    """A required parameter of type String, as grape checks it."""
    (value,) = call.require(name)
    if isinstance(value, list | dict):
        raise ApiError(400, {"error": f"{name} is invalid"})
    return str(value)


def key_values(values: dict[str, str]) -> list[Json]:
    return [{"key": key, "value": value} for key, value in values.items()]


# ---- Experiments


def experiment_json(experiment: Experiment) -> Json:
    return {
        "experiment_id": str(experiment.iid),
        "name": experiment.name,
        "lifecycle_stage": "active",
        "artifact_location": "not_implemented",
        "tags": key_values(experiment.tags),
    }


def find_experiment(registry: Registry, iid: str | None = None, name: str | None = None) -> Experiment:
    for each in registry.experiments:
        if str(each.iid) == iid or each.name == name:
            return each
    raise missing()


@mlflow("GET", "experiments/get")
def get_experiment(call: Call, registry: Registry) -> Any:
    return {"experiment": experiment_json(find_experiment(registry, iid=call.get("experiment_id")))}


@mlflow("GET", "experiments/get-by-name")
def get_experiment_by_name(call: Call, registry: Registry) -> Any:
    return {"experiment": experiment_json(find_experiment(registry, name=call.get("experiment_name")))}


@mlflow("GET", "experiments/list")
@mlflow("POST", "experiments/search")
def search_experiments(call: Call, registry: Registry) -> Any:
    return {"experiments": [experiment_json(each) for each in registry.experiments], "next_page_token": None}


@mlflow("POST", "experiments/create")
def create_experiment(call: Call, registry: Registry) -> Any:
    experiment = registry.new_experiment(text(call, "name"))
    experiment.tags = {each["key"]: each["value"] for each in call.get("tags") or []}
    return {"experiment_id": str(experiment.iid)}


# ---- Runs


def run_json(run: Run, call: Call) -> Json:
    place = f"candidate:{run.iid}" if run.version_id is None else str(run.version_id)
    files = f"{call.base_url}/api/v4/projects/{call.project.id}/packages/ml_models/{place}/files/"
    times = {"start_time": run.start_time} | ({} if run.end_time is None else {"end_time": run.end_time})
    latest = {each["key"]: each for each in run.metrics}
    return {
        "info": {
            "run_id": run.eid,
            "run_uuid": run.eid,
            "experiment_id": str(run.experiment.iid),
            **times,
            **({} if run.name is None else {"run_name": run.name}),
            "status": run.status,
            "artifact_uri": files,
            "lifecycle_stage": "active",
            "user_id": "1",
        },
        "data": {
            "metrics": list(latest.values()),
            "params": key_values(run.params),
            "tags": key_values(run.tags),
        },
    }


def find_run(call: Call, registry: Registry) -> Run:
    eid = text(call, "run_id")
    for run in registry.runs:
        if run.eid == eid:
            return run
    raise missing()


def add_tag(registry: Registry, run: Run, key: str, value: str) -> None:
    if key == "gitlab.CI_JOB_ID" and value not in registry.builds:
        raise ApiError(500, "500 Internal Server Error")  # an ArgumentError that nobody rescues
    check_length("Value", value, 5000)
    run.tags[key] = value


def check_length(what: str, value: str, limit: int) -> None:
    if not value:
        raise invalid(f"Validation failed: {what} can't be blank")
    if len(value) > limit:
        raise invalid(f"Validation failed: {what} is too long (maximum is {limit} characters)")


def metric(each: Json) -> Json:
    for name in ("key", "value", "timestamp"):
        if name not in each:
            raise ApiError(400, {"error": f"metrics[0][{name}] is missing"})
    return {name: each[name] for name in ("key", "value", "timestamp", "step") if name in each}


@mlflow("POST", "runs/create")
def create_run(call: Call, registry: Registry) -> Any:
    experiment = find_experiment(registry, iid=text(call, "experiment_id"))
    tags = {each["key"]: str(each["value"]) for each in call.get("tags") or []}
    name = call.get("run_name") or tags.get("mlflow.runName")
    run = registry.new_run(experiment, name, int(call.get("start_time") or 0))
    for key, value in tags.items():
        add_tag(registry, run, key, value)
    return {"run": run_json(run, call)}


@mlflow("GET", "runs/get")
def get_run(call: Call, registry: Registry) -> Any:
    return {"run": run_json(find_run(call, registry), call)}


@mlflow("POST", "runs/search")
def search_runs(call: Call, registry: Registry) -> Any:
    (experiments,) = call.require("experiment_ids")
    if isinstance(call.get("order_by"), list) and call.get("order_by"):
        raise ApiError(400, {"error": "order_by is invalid"})
    experiment = find_experiment(registry, iid=str(experiments[0]))
    runs = [run for run in reversed(registry.runs) if run.experiment is experiment]
    start, count = int(call.get("page_token") or 0), min(int(call.get("max_results") or 200), 1000)
    token = str(start + count) if start + count < len(runs) else None
    return {"runs": [run_json(run, call) for run in runs[start : start + count]], "next_page_token": token}


@mlflow("POST", "runs/update")
def update_run(call: Call, registry: Registry) -> Any:
    run, status = find_run(call, registry), call.get("status")
    if status is not None and status not in STATES:
        raise ApiError(400, {"error": "status does not have a valid value"})
    run.status, run.end_time = status or run.status, call.get("end_time") or run.end_time
    return {"run_info": run_json(run, call)["info"]}


@mlflow("POST", "runs/log-metric")
def log_metric(call: Call, registry: Registry) -> Any:
    find_run(call, registry).metrics.append(metric(call.data))
    return {}


@mlflow("POST", "runs/log-parameter")
def log_parameter(call: Call, registry: Registry) -> Any:
    run, key, value = find_run(call, registry), text(call, "key"), text(call, "value")
    if key in run.params:
        raise invalid(f"Validation failed: Name '{key}' already taken")
    check_length("Value", value, 250)
    run.params[key] = value
    return {}


@mlflow("POST", "runs/set-tag")
def set_tag(call: Call, registry: Registry) -> Any:
    run, key = find_run(call, registry), text(call, "key")
    if key in run.tags:
        raise invalid(f"Validation failed: Name '{key}' already taken")
    add_tag(registry, run, key, text(call, "value"))
    return {}


@mlflow("POST", "runs/log-batch")
def log_batch(call: Call, registry: Registry) -> Any:
    run = find_run(call, registry)
    run.metrics += [metric(each) for each in call.get("metrics") or []]
    for each in call.get("params") or []:
        check_length("Value", str(each["value"]), 250)
        run.params.setdefault(each["key"], str(each["value"]))
    for each in call.get("tags") or []:
        if each["key"] not in run.tags:
            add_tag(registry, run, each["key"], str(each["value"]))
    return {}


@mlflow("GET", "metrics/get-history")
def metric_history(call: Call, registry: Registry) -> Any:
    key = text(call, "metric_key")
    return {"metrics": [each for each in find_run(call, registry).metrics if each["key"] == key]}


# ---- Models and versions


def version_json(model: Model, version: Version, call: Call) -> Json:
    return {
        "name": model.name,
        "version": str(version.id),
        "creation_timestamp": version.created,
        "last_updated_timestamp": version.created,
        "user_id": None,
        "current_stage": "development",
        "description": version.description,
        "source": f"{call.project_url}/-/ml/models/1/versions/{version.id}",
        "run_id": version.run.eid,
        "status": "READY",
        "status_message": "",
        "tags": key_values(version.tags),
        "run_link": "",
        "aliases": [version.semver],
    }


def model_json(model: Model, call: Call) -> Json:
    return {
        "name": model.name,
        "creation_timestamp": model.created,
        "last_updated_timestamp": model.created,
        "description": model.description,
        "user_id": "1",
        "tags": key_values(model.tags),
        "latest_versions": [version_json(model, each, call) for each in model.versions],
    }


def find_model(call: Call, registry: Registry) -> Model:
    model = registry.models.get(str(call.get("name", "")))
    if model is None:
        raise missing()
    return model


def find_version(call: Call, registry: Registry, name: str) -> tuple[Model, Version]:
    model = find_model(call, registry)
    for version in model.versions:
        if version.semver == call.get(name):
            return model, version
    raise missing()


def latest(model: Model) -> Version | None:
    return max(model.versions, key=lambda each: numbers(each.semver), default=None)


def numbers(semver: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.split(r"[-+]", semver)[0].split("."))


@mlflow("POST", "registered-models/create")
def create_model(call: Call, registry: Registry) -> Any:
    name = text(call, "name")
    if name in registry.models or not NAME.fullmatch(name):
        raise structured(400, "RESOURCE_ALREADY_EXISTS")
    tags = {each["key"]: each["value"] for each in call.get("tags") or []}
    experiment = registry.new_experiment(f"[model]{name}")
    registry.models[name] = Model(name, call.get("description") or "", tags, experiment)
    return {"registered_model": model_json(registry.models[name], call)}


@mlflow("GET", "registered-models/get")
def get_model(call: Call, registry: Registry) -> Any:
    return {"registered_model": model_json(find_model(call, registry), call)}


@mlflow("PATCH", "registered-models/update")
def update_model(call: Call, registry: Registry) -> Any:
    model = find_model(call, registry)
    model.description = described(call)
    return {"registered_model": model_json(model, call)}


def described(call: Call) -> str:
    description = str(call.get("description") or "")
    if len(description) > 10_000:
        raise structured(400, "UPDATE_FAILED")
    return description


@mlflow("POST", "registered-models/get-latest-versions")
def latest_versions(call: Call, registry: Registry) -> Any:
    model = find_model(call, registry)
    found = latest(model)
    return {"model_versions": [version_json(model, found, call)] if found else []}


@mlflow("GET", "registered-models/search")
def search_models(call: Call, registry: Registry) -> Any:
    return {"registered_models": [model_json(each, call) for each in registry.models.values()]}


@mlflow("GET", "registered-models/alias")
def version_by_alias(call: Call, registry: Registry) -> Any:
    return {"model_version": version_json(*find_version(call, registry, "alias"), call)}


@mlflow("POST", "model-versions/create")
def create_version(call: Call, registry: Registry) -> Any:
    model, tags = find_model(call, registry), {}
    for each in call.get("tags") or []:
        if each["key"] in tags:
            raise invalid([f"Validation failed: Name '{each['key']}' already taken"])
        check_length("Value", str(each["value"]), 5000)
        tags[each["key"]] = str(each["value"])
    newest = latest(model)
    semver = tags.get("gitlab.version") or (f"{numbers(newest.semver)[0] + 1}.0.0" if newest else "1.0.0")
    if not SEMANTIC.fullmatch(semver):
        raise invalid(["Version must be semantic version"])
    if any(each.semver == semver for each in model.versions):
        raise invalid(["Version has already been taken"])
    identity = 100 + sum(len(each.versions) for each in registry.models.values())
    run = registry.new_run(model.experiment, None, 0)
    run.version_id = identity
    model.versions.append(Version(identity, semver, call.get("description") or "", tags, run))
    return {"model_version": version_json(model, model.versions[-1], call)}


@mlflow("GET", "model-versions/get-download-uri")
def download_uri(call: Call, registry: Registry) -> Any:
    text(call, "name")
    version = text(call, "version")
    if not version.isdecimal():
        raise ApiError(400, {"error": "version is invalid"})
    return {"artifact_uri": f"mlflow-artifacts:/{version}"}


@mlflow("GET", "model-versions/get")
def get_version(call: Call, registry: Registry) -> Any:
    return {"model_version": version_json(*find_version(call, registry, "version"), call)}


@mlflow("PATCH", "model-versions/update")
def update_version(call: Call, registry: Registry) -> Any:
    try:
        model, version = find_version(call, registry, "version")
    except ApiError:
        raise structured(400, "UPDATE_FAILED") from None
    version.description = described(call)
    return {"model_version": version_json(model, version, call)}


# ---- Files


@mlflow("GET", "/projects/:id/ml/mlflow/api/2.0/mlflow-artifacts/artifacts")
def list_artifacts(call: Call, registry: Registry) -> Any:
    """A folder is asked for by MLflow's client for every file; GitLab knows none, and answers an empty list."""
    version, _, path = text(call, "path").partition("/")
    names = {} if path else registry.files_of(version)
    return {"files": [{"path": name, "file_size": len(names[name]), "is_dir": False} for name in names]}


@mlflow("GET", "/projects/:id/ml/mlflow/api/2.0/mlflow-artifacts/artifacts/:version_id/*path")
def get_artifact(call: Call, registry: Registry) -> Any:
    return served(registry.files_of(call["version_id"]), call["path"])


@route("PUT", FILES)
def put_file(call: Call) -> Any:
    assert call.token is not None
    if call.token.access_level < DEVELOPER:
        raise ApiError(403, "403 Forbidden")
    if not FILE_NAME.fullmatch(call["path"].rpartition("/")[2]):
        raise ApiError(400, {"error": "file_name should be a valid file path"})
    registry_of(call.project).files_of(call["version_id"])[encoded(call["path"])] = call.body
    return JSONResponse({"message": "201 Created"}, 201)


@route("GET", FILES)
def get_file(call: Call) -> Any:
    return served(registry_of(call.project).files_of(call["version_id"]), call["path"])


def encoded(path: str) -> str:
    return quote(path, safe="")


def served(files: dict[str, bytes], path: str) -> Response:
    if encoded(path) not in files:
        raise structured(404, "RESOURCE_DOES_NOT_EXIST")
    return Response(files[encoded(path)], media_type="application/octet-stream")
