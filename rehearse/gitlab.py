"""What GitLab adds to a pipeline: predefined variables by its source, and of the project's own those that a job may see.

Names and conditions by doc/ci/variables/predefined_variables.md.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.gitlab_emulator.git import git

PROJECT_ID = "64"
FORK_ID = "65"
MERGE_REQUEST = "merge_request_event"
REGISTRY = "registry.gitlab.test"  # stands for the project's; nothing is pulled from there
ZEROS = "0" * 40


@dataclass(frozen=True)
class Variable:
    """One line of Settings → CI/CD → Variables. A protected one is for pipelines of protected branches and tags only."""

    name: str
    value: str
    scope: str = "*"  # the environments of the jobs that see it
    protected: bool = False
    masked: bool = False
    file: bool = False


@dataclass(frozen=True)
class Event:
    """What starts a pipeline: `variables` are those of merge_request, branch or tag."""

    variables: Mapping[str, str]
    ref: str  # main, v1.2.3, refs/merge-requests/3/head
    sha: str
    changed: set[str] = field(default_factory=set)  # paths, for `rules: changes`
    protected: bool = False

    @property
    def source(self) -> str:
        return self.variables["CI_PIPELINE_SOURCE"]

    @property
    def branch(self) -> str:
        return self.variables.get("CI_COMMIT_BRANCH", "")

    @property
    def tag(self) -> str:
        return self.variables.get("CI_COMMIT_TAG", "")


def visible(variables: Iterable[Variable], environment: str, event: Event) -> list[Variable]:
    """Those that a job sees, the one of the narrowest scope last: it wins."""
    found = [
        each
        for each in variables
        if (event.protected or not each.protected)
        and (each.scope == "*" or (environment != "*" and fnmatch.fnmatchcase(environment, each.scope)))
    ]
    return sorted(found, key=lambda each: len(each.scope.replace("*", "")))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "-", text.lower())[:63].strip("-")


def predefined(url: str, version: str, path: str, repository: Path, event: Event) -> dict[str, str]:
    """Of every job of the pipeline; "" is a variable that is not set. `event.variables` come last."""
    server = urlsplit(url)

    def of_commit(form: str) -> str:
        return git(repository, "show", "--no-patch", f"--format={form}", event.sha)

    project = f"{url}/{path}"
    namespace, _, name = path.rpartition("/")
    ref = event.variables.get("CI_COMMIT_REF_NAME", event.ref)
    return {
        "CI": "true",
        "GITLAB_CI": "true",
        "CI_SERVER": "yes",
        "CI_SERVER_NAME": "GitLab",
        "CI_SERVER_URL": url,
        "CI_SERVER_HOST": str(server.hostname),
        "CI_SERVER_PORT": str(server.port),
        "CI_SERVER_PROTOCOL": server.scheme,
        "CI_SERVER_FQDN": server.netloc,
        "CI_SERVER_VERSION": f"{version}.0",
        "CI_SERVER_VERSION_MAJOR": version.partition(".")[0],
        "CI_SERVER_VERSION_MINOR": version.partition(".")[2],
        "CI_API_V4_URL": f"{url}/api/v4",
        "CI_API_GRAPHQL_URL": f"{url}/api/graphql",
        "CI_PROJECT_ID": PROJECT_ID,
        "CI_PROJECT_NAME": name,
        "CI_PROJECT_TITLE": name,
        "CI_PROJECT_PATH": path,
        "CI_PROJECT_PATH_SLUG": slug(path),
        "CI_PROJECT_NAMESPACE": namespace,
        "CI_PROJECT_ROOT_NAMESPACE": namespace.partition("/")[0],
        "CI_PROJECT_URL": project,
        "CI_PROJECT_VISIBILITY": "private",
        "CI_DEFAULT_BRANCH": "main",
        "CI_REGISTRY": REGISTRY,
        "CI_REGISTRY_IMAGE": f"{REGISTRY}/{path.lower()}",
        "CI_REGISTRY_USER": "gitlab-ci-token",
        "CI_CONFIG_PATH": ".gitlab-ci.yml",
        "CI_COMMIT_SHA": event.sha,
        "CI_COMMIT_SHORT_SHA": event.sha[:8],
        "CI_COMMIT_BEFORE_SHA": ZEROS,
        "CI_COMMIT_REF_SLUG": slug(ref),
        "CI_COMMIT_REF_PROTECTED": "true" if event.protected else "false",
        "CI_COMMIT_TITLE": of_commit("%s"),
        "CI_COMMIT_MESSAGE": of_commit("%B"),
        "CI_COMMIT_DESCRIPTION": of_commit("%b"),
        "CI_COMMIT_AUTHOR": of_commit("%an <%ae>"),
        "CI_COMMIT_TIMESTAMP": of_commit("%cI"),
        "CI_RUNNER_ID": "1",
        "CI_RUNNER_DESCRIPTION": "rehearsal",
        "CI_RUNNER_EXECUTABLE_ARCH": "linux/amd64",
        "GITLAB_USER_NAME": "Dev Eloper",
        "GITLAB_USER_LOGIN": "dev",
        "GITLAB_USER_EMAIL": "dev@localhost",
        **(
            {"CI_MERGE_REQUEST_PROJECT_URL": project, "CI_MERGE_REQUEST_SOURCE_PROJECT_URL": project}
            if event.source == MERGE_REQUEST
            else {}
        ),
        **event.variables,
    }


def of_job(
    url: str, path: str, pipeline: int, job: int, name: str, keywords: Mapping[str, Any], token: str
) -> dict[str, str]:
    project = f"{url}/{path}"
    return {
        "CI_PIPELINE_ID": str(pipeline),
        "CI_PIPELINE_IID": str(pipeline),
        "CI_PIPELINE_URL": f"{project}/-/pipelines/{pipeline}",
        "CI_JOB_ID": str(job),
        "CI_JOB_NAME": name,
        "CI_JOB_NAME_SLUG": slug(name),
        "CI_JOB_STAGE": str(keywords.get("stage", "test")),
        "CI_JOB_STATUS": "running",
        "CI_JOB_URL": f"{project}/-/jobs/{job}",
        "CI_JOB_TOKEN": token,
        "CI_REPOSITORY_URL": f"{project.replace('://', f'://gitlab-ci-token:{token}@')}.git",
    }


def merge_request(
    iid: int,
    base_sha: str,
    branch: str,
    labels: Iterable[str] = (),
    source_project: str = PROJECT_ID,
    merged: tuple[str, str] | None = None,
    kind: str = "head",
) -> dict[str, str]:
    """A merge request's pipeline in the project; "" is a variable that is not set then.

    Of kind `merge` or `train` HEAD is a merge of two commits, `merged`: of the source and of the target.
    """
    source, target = merged or ("", "")
    event_type = {"head": "detached", "merge": "merged_result", "train": "merge_train"}[kind]
    return {
        "GITLAB_CI": "true",
        "CI_PROJECT_ID": PROJECT_ID,
        "CI_DEFAULT_BRANCH": "main",
        "CI_PIPELINE_SOURCE": MERGE_REQUEST,
        "CI_COMMIT_BRANCH": "",
        "CI_COMMIT_TAG": "",
        "CI_COMMIT_REF_NAME": branch,
        "CI_MERGE_REQUEST_IID": str(iid),
        "CI_MERGE_REQUEST_EVENT_TYPE": event_type,
        "CI_MERGE_REQUEST_REF_PATH": f"refs/merge-requests/{iid}/{kind}",
        "CI_MERGE_REQUEST_PROJECT_ID": PROJECT_ID,
        "CI_MERGE_REQUEST_PROJECT_PATH": "g/proj",
        "CI_MERGE_REQUEST_SOURCE_PROJECT_ID": source_project,
        "CI_MERGE_REQUEST_SOURCE_PROJECT_PATH": "g/proj" if source_project == PROJECT_ID else "fork/proj",
        "CI_MERGE_REQUEST_SOURCE_BRANCH_NAME": branch,
        "CI_MERGE_REQUEST_SOURCE_BRANCH_SHA": source,
        "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main",
        "CI_MERGE_REQUEST_TARGET_BRANCH_SHA": target,
        "CI_MERGE_REQUEST_TARGET_BRANCH_PROTECTED": "true",
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
