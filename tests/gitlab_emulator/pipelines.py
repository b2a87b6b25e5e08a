"""Pipelines, triggers, ci/lint, registry, generic packages (doc/api/pipelines.md, lint.md and the like)."""

import hashlib
from typing import Any

from ruamel.yaml import YAML, YAMLError
from starlette.responses import Response

from tests.gitlab_emulator.git import git
from tests.gitlab_emulator.jobs import find_pipeline
from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.routing import Call, not_found, route


def _start(call: Call, ref: str, source: str, variables: dict[str, str]) -> dict[str, Any]:
    repository = call.project.repository
    sha = git(repository, "rev-parse", "--verify", ref, check=False) if repository else ""
    pipeline = call.state.add_pipeline(call.project, ref, sha, "created", source, {})
    pipeline["web_url"] = f"{call.project_url}/-/pipelines/{pipeline['id']}"
    shown = dict(pipeline)
    pipeline["variables"] = variables
    return shown


@route("POST", "/projects/:id/pipeline")
def create_pipeline(call: Call) -> Any:
    [ref] = call.require("ref")
    variables = {item["key"]: item["value"] for item in call.get("variables") or []}
    return _start(call, ref, "api", variables)


@route("POST", "/projects/:id/trigger/pipeline", public=True)
def trigger_pipeline(call: Call) -> Any:
    """The trigger token, or a CI_JOB_TOKEN, comes as the parameter `token`; no header is needed."""
    token, ref = call.require("token", "ref")
    job = call.state.tokens.get(token)
    if token != call.project.trigger_token and not (job is not None and job.scope == "job"):
        raise not_found()
    return _start(call, ref, "trigger" if job is None else "pipeline", call.get("variables") or {})


@route("GET", "/projects/:id/pipelines")
def list_pipelines(call: Call) -> Any:
    """Newest first, those whose ref, sha, status and source are as the query says."""
    wanted = {name: call.query[name] for name in ("ref", "sha", "status", "source") if name in call.query}
    found = [
        pipeline
        for pipeline in call.project.pipelines[::-1]
        if all(pipeline.get(name) == value for name, value in wanted.items())
    ]
    return paged(call, found, f"/projects/{call.project.id}/pipelines")


@route("GET", "/projects/:id/pipelines/:pipeline_id")
def get_pipeline(call: Call) -> Any:
    return find_pipeline(call)


@route("POST", "/projects/:id/ci/lint")
def lint(call: Call) -> Any:
    """Only whether the content is YAML with at least one job: the rest of GitLab's check is not emulated."""
    [content] = call.require("content")
    try:
        tree = YAML(typ="safe").load(content)
        errors = [] if isinstance(tree, dict) and tree else ["root config should be a hash"]
    except YAMLError as error:
        errors = [f"Invalid configuration format: {error}"]
    return {
        "valid": not errors,
        "errors": errors,
        "warnings": [],
        "merged_yaml": content if not errors else None,
    }


@route("GET", "/projects/:id/registry/repositories", job_token=True)
def list_registry(call: Call) -> Any:
    items = [
        {key: value for key, value in known.items() if key != "tags"}
        for known in call.project.registry.values()
    ]
    return paged(call, items, f"/projects/{call.project.id}/registry/repositories")


@route("GET", "/projects/:id/registry/repositories/:repository_id/tags", job_token=True)
def list_registry_tags(call: Call) -> Any:
    repository_id = call["repository_id"]
    known = call.project.registry.get(int(repository_id)) if repository_id.isdecimal() else None
    if known is None:
        raise not_found()
    return paged(
        call, known["tags"], f"/projects/{call.project.id}/registry/repositories/{repository_id}/tags"
    )


PACKAGE = "/projects/:id/packages/generic/:name/:version/:file"


@route("PUT", PACKAGE, job_token=True)
def put_package(call: Call) -> Any:
    call.project.packages.setdefault((call["name"], call["version"]), {})[call["file"]] = call.body
    return Response('{"message":"201 Created"}', 201, media_type="application/json")


@route("GET", PACKAGE, job_token=True)
def get_package(call: Call) -> Any:
    content = call.project.packages.get((call["name"], call["version"]), {}).get(call["file"])
    if content is None:
        raise not_found()
    digest = hashlib.sha256(content).hexdigest()
    return Response(content, media_type="application/octet-stream", headers={"X-Checksum-Sha256": digest})


@route("GET", "/projects/:id/packages", job_token=True)
def list_packages(call: Call) -> Any:
    """Those whose package_name and package_version are as the query says."""
    wanted = call.query.get("package_name"), call.query.get("package_version")
    items = [
        {"name": name, "version": version, "package_type": "generic", "status": "default"}
        for name, version in call.project.packages
        if wanted[0] in (None, name) and wanted[1] in (None, version)
    ]
    return paged(call, items, f"/projects/{call.project.id}/packages")
