"""Pipelines, triggers, ci/lint, registry, generic packages (doc/api/pipelines.md, lint.md and the like)."""

import hashlib
import re
from typing import Any

from ruamel.yaml import YAML, YAMLError
from starlette.responses import JSONResponse, Response

from tests.gitlab_emulator.jobs import find_pipeline, pipeline_json
from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.protection import refused_image
from tests.gitlab_emulator.rights import MAINTAINER
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.starts import start
from tests.gitlab_emulator.state import Json, Package, PackageFile


@route("POST", "/projects/:id/pipeline")
def create_pipeline(call: Call) -> Any:
    """Variables only by who has the project's "Minimum role to use pipeline variables"."""
    [ref] = call.require("ref")
    assert call.token is not None
    variables = {item["key"]: item["value"] for item in call.get("variables") or []}
    made = start(call.state, call.project, ref, "api", call.token.user, variables, call.token.access_level)
    return pipeline_json(call, made)


@route("POST", "/projects/:id/trigger/pipeline")
def trigger_pipeline(call: Call) -> Any:
    """The trigger token, a Maintainer's, or a CI_JOB_TOKEN comes as the parameter `token`; no header is needed."""
    token, ref = call.require("token", "ref")
    job = call.state.tokens.get(token)
    if token != call.project.trigger_token and not (job is not None and job.is_job):
        raise not_found()
    source, user, level = (
        ("trigger", None, MAINTAINER) if job is None else ("pipeline", job.user, job.access_level)
    )
    made = start(call.state, call.project, ref, source, user, call.get("variables") or {}, level)
    return pipeline_json(call, made)


@route("GET", "/projects/:id/pipelines")
def list_pipelines(call: Call) -> Any:
    """Newest first, those whose ref, sha, status and source are as the query says."""
    wanted = {name: call.query[name] for name in ("ref", "sha", "status", "source") if name in call.query}
    found = [
        pipeline
        for pipeline in call.project.pipelines[::-1]
        if all(pipeline.get(name) == value for name, value in wanted.items())
    ]
    path = f"/projects/{call.project.id}/pipelines"
    return paged(call, found, path, lambda pipeline: pipeline_json(call, pipeline))


@route("GET", "/projects/:id/pipelines/:pipeline_id")
def get_pipeline(call: Call) -> Any:
    return pipeline_json(call, find_pipeline(call))


@route("GET", "/projects/:id/pipelines/:pipeline_id/variables")
def list_pipeline_variables(call: Call) -> Any:
    """What it was started with, for Maintainers and for the Developer who started it (Ci::PipelinePolicy)."""
    pipeline, token = find_pipeline(call), call.token
    assert token is not None
    if token.access_level < MAINTAINER and pipeline["user"] != token.user:
        raise ApiError(403, "403 Forbidden")
    shown = [
        {"variable_type": "env_var", "key": key, "value": value, "raw": False}
        for key, value in pipeline["variables"].items()
    ]
    return paged(call, shown, f"/projects/{call.project.id}/pipelines/{pipeline['id']}/variables")


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


@route("GET", "/projects/:id/registry/repositories")
def list_registry(call: Call) -> Any:
    items = [
        {key: value for key, value in known.items() if key != "tags"}
        for known in call.project.registry.values()
    ]
    return paged(call, items, f"/projects/{call.project.id}/registry/repositories")


@route("GET", "/projects/:id/registry/repositories/:repository_id/tags")
def list_registry_tags(call: Call) -> Any:
    known = _image_repository(call)
    path = f"/projects/{call.project.id}/registry/repositories/{known['id']}/tags"
    return paged(call, known["tags"], path)


def _image_repository(call: Call) -> Json:
    for known in call.project.registry.values():
        if str(known["id"]) == call["repository_id"]:
            return known
    raise not_found()


@route("DELETE", "/projects/:id/registry/repositories/:repository_id/tags/:name")
def delete_registry_tag(call: Call) -> Any:
    known, token = _image_repository(call), call.token
    assert token is not None
    if refused_image(call["name"], token.access_level, call.project.protected_container_tags, "delete"):
        raise ApiError(403, "403 Forbidden")
    if call["name"] not in [tag["name"] for tag in known["tags"]]:
        raise not_found("Tag")
    known["tags"] = [tag for tag in known["tags"] if tag["name"] != call["name"]]
    return {}


PACKAGE = "/projects/:id/packages/generic/:name/:version/:file"
# Gitlab::Regex: generic_package_name_regex, generic_package_version_regex, generic_package_file_name_regex
PACKAGE_NAMES = {"name": r"[A-Za-z0-9._+-]+", "version": r"(?!.*\.\.)[\w+.-]+", "file": r"[A-Za-z0-9._+-]+"}


@route("PUT", PACKAGE)
def put_package(call: Call) -> Any:
    """A second file of the same name stands beside the first, unless the group refuses duplicates."""
    key, project = (call["name"], call["version"]), call.project
    for part, pattern in PACKAGE_NAMES.items():
        if not re.fullmatch(pattern, call[part], re.ASCII):
            parameter = "file_name" if part == "file" else f"package_{part}"
            raise ApiError(400, {"error": f"{parameter} is invalid"})
    package = project.packages.get(key) or Package(call.state.new_id())
    if not project.duplicate_packages and any(known.name == call["file"] for known in package.files):
        raise ApiError(400, "400 Bad request - Duplicate package is not allowed")
    package.files.append(PackageFile(call.state.new_id(), call["file"], call.body))
    project.packages[key] = package
    if call.query.get("select") == "package_file":
        url = f"{call.project_url}/-/package_files/{package.files[-1].id}/download"
        return JSONResponse(_package_file_json(package.id, package.files[-1]) | {"file": {"url": url}}, 201)
    return JSONResponse({"message": "201 Created"}, 201)


@route("GET", PACKAGE)
def get_package(call: Call) -> Any:
    package = call.project.packages.get((call["name"], call["version"]))
    content = package.newest.get(call["file"]) if package else None
    if content is None:
        raise not_found()
    digest = hashlib.sha256(content).hexdigest()
    return Response(content, media_type="application/octet-stream", headers={"X-Checksum-Sha256": digest})


@route("GET", "/projects/:id/packages")
def list_packages(call: Call) -> Any:
    """Those whose package_name and package_version are as the query says."""
    wanted = call.query.get("package_name"), call.query.get("package_version")
    items = [
        {"id": known.id, "name": name, "version": version, "package_type": "generic", "status": "default"}
        for (name, version), known in call.project.packages.items()
        if wanted[0] in (None, name) and wanted[1] in (None, version)
    ]
    return paged(call, items, f"/projects/{call.project.id}/packages")


@route("GET", "/projects/:id/packages/:package_id/package_files")
def list_package_files(call: Call) -> Any:
    """Oldest first, duplicates among them."""
    for package in call.project.packages.values():
        if str(package.id) == call["package_id"]:
            path = f"/projects/{call.project.id}/packages/{package.id}/package_files"
            return paged(call, package.files, path, lambda known: _package_file_json(package.id, known))
    raise not_found()


def _package_file_json(package_id: int, file: PackageFile) -> Json:
    digest = hashlib.sha256(file.content).hexdigest()
    shown = {"id": file.id, "package_id": package_id, "file_name": file.name}
    return shown | {"size": len(file.content), "file_sha256": digest}
