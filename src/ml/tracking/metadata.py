"""What a run was made from and where: code, data, files, CI, machine. Every question may stay without an answer."""

import getpass
import hashlib
import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ml import files, git
from ml.errors import UserError
from ml.lock import read_lock
from ml.settings import Settings

PIPELINE = Path("dvc.yaml")
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "safetensors", "mlflow", "dvc")


def short_names(values: dict[str, Any]) -> dict[str, Any]:
    """The same by the last part of the key alone, where only one key ends so: learning_rate for train.learning_rate."""
    last = [key.rsplit(".", 1)[-1] for key in values]
    return {name: value for name, value in zip(last, values.values()) if last.count(name) == 1}


def numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def code() -> dict[str, str]:
    """Tags of the commit that is checked out; "unknown" outside a git repository and without git."""
    commit = dirty = "unknown"
    with suppress(UserError):
        commit = git.head()
        dirty = str(git.is_dirty()).lower()
    return {"git_commit": commit, "git_dirty": dirty, "mlflow.source.git.commit": commit}


def machine() -> dict[str, str]:
    tags = {"version.python": platform.python_version(), "platform": platform.platform(terse=True)}
    tags["mlflow.user"] = "unknown"
    with suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            tags[f"version.{package}"] = version(package)
    return tags


def ci(settings: Settings) -> dict[str, str]:
    """Links to the job, the pipeline and the merge request; nothing outside GitLab."""
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": "python -m ml.stages.train"}
    project = settings.ci_project_url
    if project and settings.ci_job_id:
        tags["ci_job_url"] = tags["mlflow.source.name"] = f"{project}/-/jobs/{settings.ci_job_id}"
        tags |= {"mlflow.source.type": "JOB", "gitlab.CI_JOB_ID": str(settings.ci_job_id)}
    if project and settings.ci_pipeline_id:
        tags["ci_pipeline_url"] = f"{project}/-/pipelines/{settings.ci_pipeline_id}"
    target = settings.ci_merge_request_project_url or project
    if target and settings.ci_merge_request_iid:
        tags["merge_request_url"] = f"{target}/-/merge_requests/{settings.ci_merge_request_iid}"
    for variable in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        if os.environ.get(variable):
            tags[variable.lower()] = os.environ[variable]
    return tags


def dvc_md5(path: Path) -> str | None:
    """The MD5 by which DVC knows a file or folder (of a folder: of the list of its files); None where there is none."""
    if path.is_file():
        return files.md5(path)
    if not path.is_dir():
        return None
    listed = [
        {"md5": files.md5(file), "relpath": file.relative_to(path).as_posix()}
        for file in path.rglob("*")
        if file.is_file()
    ]
    listed.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def data_hash() -> str | None:
    """Of the raw data: as they lie here, else as dvc.lock names them."""
    found = dvc_md5(files.DATA)
    with suppress(UserError):
        found = found or read_lock().sources.get(str(files.DATA))
    return found


def stage_files(stage: str, kind: str) -> list[str]:
    """The paths that dvc.yaml lists for a stage: of kind "deps", or "outs" with metrics and plots."""
    try:
        entry = YAML(typ="safe").load(PIPELINE.read_text(encoding="utf-8"))["stages"][stage]
        keys = ("deps",) if kind == "deps" else ("outs", "metrics", "plots")
        listed = [each for key in keys for each in entry.get(key, [])]
    except (OSError, YAMLError, LookupError, TypeError, AttributeError):
        return []
    return [str(next(iter(each)) if isinstance(each, dict) else each) for each in listed]


def hashes(stage: str, kind: str) -> dict[str, str]:
    """MD5s of the stage's inputs ("deps") or outputs ("outs"), as far as they are there, by path."""
    found = {path: dvc_md5(Path(path)) for path in stage_files(stage, kind)}
    return {path: md5 for path, md5 in found.items() if md5}


def inputs(stage: str) -> dict[str, str]:
    return {f"dvc.in.{path}": md5 for path, md5 in hashes(stage, "deps").items()}


def outputs(stage: str) -> dict[str, str]:
    return {f"dvc.out.{path}": md5 for path, md5 in hashes(stage, "outs").items()}


def dataset(name: str, digest: str) -> dict[str, Any]:
    """The raw data as MLflow's entity Dataset takes it: texts, at most 36 characters of hash."""
    summary: dict[str, Any] = {}
    with suppress(UserError):
        summary = files.read_json(files.DATA_SUMMARY, "load")
    shape = [-1, summary.get("image_height", -1), summary.get("image_width", -1)]
    schema = [{"name": "images", "type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": shape}}]
    counts = {
        part: summary[part]["examples"] for part in ("train", "test") if isinstance(summary.get(part), dict)
    }
    return {
        "name": name,
        "digest": digest[:36],
        "source_type": "dvc",
        "source": json.dumps({"uri": str(files.DATA), "md5": digest}),
        "schema": json.dumps({"mlflow_tensorspec": {"features": json.dumps(schema)}}),
        "profile": json.dumps(counts),
    }
