"""What GitLab adds to a pipeline: predefined variables by its source, and of the project's own those that a job may see."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROJECT_ID = "64"
FORK_ID = "65"
MERGE_REQUEST = "merge_request_event"


@dataclass(frozen=True)
class Variable:
    """One line of Settings → CI/CD → Variables. A protected one is for pipelines of protected branches and tags only."""

    name: str
    value: str
    scope: str = "*"  # the environments of the jobs that see it
    protected: bool = False


def write_variables(path: Path, variables: Iterable[Variable], protected_ref: bool) -> Path:
    """The file of gitlab-ci-local, which knows scopes but not protection."""
    tree: dict[str, dict[str, dict[str, str]]] = {}
    for each in variables:
        if protected_ref or not each.protected:
            tree.setdefault(each.name, {"values": {}})["values"][each.scope] = each.value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


def merge_request(
    iid: int, base_sha: str, branch: str, labels: Iterable[str] = (), source_project: str = PROJECT_ID
) -> dict[str, str]:
    """A merge request's pipeline in the project; "" is a variable that is not set then."""
    return {
        "GITLAB_CI": "true",
        "CI_PROJECT_ID": PROJECT_ID,
        "CI_DEFAULT_BRANCH": "main",
        "CI_PIPELINE_SOURCE": MERGE_REQUEST,
        "CI_COMMIT_BRANCH": "",
        "CI_COMMIT_TAG": "",
        "CI_COMMIT_REF_NAME": branch,
        "CI_MERGE_REQUEST_IID": str(iid),
        "CI_MERGE_REQUEST_PROJECT_ID": PROJECT_ID,
        "CI_MERGE_REQUEST_PROJECT_PATH": "g/proj",
        "CI_MERGE_REQUEST_SOURCE_PROJECT_ID": source_project,
        "CI_MERGE_REQUEST_SOURCE_BRANCH_NAME": branch,
        "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main",
        "CI_MERGE_REQUEST_DIFF_BASE_SHA": base_sha,
        "CI_MERGE_REQUEST_LABELS": ",".join(labels),
    }


def branch(source: str = "push", name: str = "main") -> dict[str, str]:
    """A pipeline of a branch: pushed to, on a schedule, by a trigger or by hand."""
    return {
        "GITLAB_CI": "true",
        "CI_PROJECT_ID": PROJECT_ID,
        "CI_DEFAULT_BRANCH": "main",
        "CI_PIPELINE_SOURCE": source,
        "CI_COMMIT_BRANCH": name,
        "CI_COMMIT_REF_NAME": name,
        "CI_COMMIT_REF_PROTECTED": "true" if name == "main" else "false",
        "CI_COMMIT_TAG": "",
    }


def tag(name: str) -> dict[str, str]:
    return branch() | {"CI_COMMIT_BRANCH": "", "CI_COMMIT_REF_NAME": name, "CI_COMMIT_TAG": name}
