"""The runner's own API, and the jobs that it gets: lib/api/ci/runner.rb, lib/api/entities/ci/job_request/.

Jobs are made of a pipeline's configuration where the project has a runner, and only of what this needs: `stages`, and of
each job `stage`, `needs`, `script`, `before_script`, `tags`, `variables`, `image` and `artifacts`. Rules, includes and
inheritance are not read.
"""

import io
import json
import secrets
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ruamel.yaml import YAML
from starlette.responses import JSONResponse, Response

from tests.gitlab_emulator.git import git
from tests.gitlab_emulator.jobs import archived
from tests.gitlab_emulator.protection import rules_of
from tests.gitlab_emulator.routing import ApiError, Call, route
from tests.gitlab_emulator.state import Job, Json, Project, State

GLOBAL = frozenset(
    "default include image services stages variables workflow cache before_script after_script spec".split()
)
STAGES = [".pre", "build", "test", "deploy", ".post"]
ENDED = ("success", "failed", "skipped", "canceled")
REFUSED = ApiError(403, "403 Forbidden")
UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}


@dataclass(frozen=True)
class Runner:
    id: int
    token: str
    description: str
    tags: frozenset[str]
    run_untagged: bool


def plan(state: State, project: Project, pipeline: Json) -> None:
    """Make the pipeline's jobs from its commit's configuration."""
    assert project.repository is not None
    text = git(project.repository, "show", f"{pipeline['sha']}:{project.ci_config_path}")
    tree: Json = YAML(typ="safe").load(text)
    stages = tree.get("stages", STAGES)
    found = {name: job for name, job in tree.items() if name not in GLOBAL and not name.startswith(".")}
    jobs = [
        Job(state.new_id(), name, "created", plan={"stage": "test", "global": tree} | job)
        for name, job in sorted(found.items(), key=lambda item: stages.index(item[1].get("stage", "test")))
    ]
    project.jobs[pipeline["id"]] = jobs
    pipeline["status"] = "pending"


def _before(job: Job, jobs: list[Job]) -> list[Job]:
    """Those that must have ended well: its needs, else all of earlier stages."""
    if "needs" in job.plan:
        needed = [need if isinstance(need, str) else need["job"] for need in job.plan["needs"]]
        return [other for other in jobs if other.name in needed]
    stages = job.plan["global"].get("stages", STAGES)
    place = stages.index(job.plan["stage"])
    return [other for other in jobs if stages.index(other.plan["stage"]) < place]


def _settle(project: Project, pipeline: Json) -> None:
    """Skip what can no longer run, and end the pipeline with its last job."""
    jobs = project.jobs[pipeline["id"]]
    for job in jobs:
        if job.status == "created" and any(other.status in ENDED[1:] for other in _before(job, jobs)):
            job.status = "skipped"
    if all(job.status in ENDED for job in jobs):
        pipeline["status"] = "success" if all(job.status == "success" for job in jobs) else "failed"


# ---- Runners


def _runner(call: Call) -> tuple[Runner, Project]:
    """Raises ApiError 403 for a token that is none of a runner."""
    for project in call.state.projects.values():
        for known in project.runners:
            if known.token == call.get("token"):
                return known, project
    raise REFUSED


@route("POST", "/runners")
def register(call: Call) -> Any:
    """By the project's registration token; an untagged job only where `run_untagged`."""
    [token] = call.require("token")
    for project in call.state.projects.values():
        if token == project.registration_token:
            tags = call.get("tag_list") or ""
            names = tags.split(",") if isinstance(tags, str) else tags
            untagged = str(call.get("run_untagged", "true")).lower() == "true"
            made = Runner(
                call.state.new_id(),
                f"glrt-{secrets.token_urlsafe(15)}",
                call.get("description") or "",
                frozenset(name.strip() for name in names if name.strip()),
                untagged,
            )
            if not made.tags and not untagged:
                told = "can not be empty when runner is not allowed to pick untagged jobs"
                raise ApiError(400, {"message": {"tags_list": [told]}})
            project.runners.append(made)
            return {"id": made.id, "token": made.token, "token_expires_at": None}
    raise ApiError(403, "403 Forbidden - invalid token supplied")


@route("POST", "/runners/verify")
def verify(call: Call) -> Any:
    known, _ = _runner(call)
    return JSONResponse({"id": known.id, "token": known.token, "token_expires_at": None})


@route("DELETE", "/runners")
def unregister(call: Call) -> Any:
    known, project = _runner(call)
    project.runners.remove(known)


# ---- Jobs


@route("POST", "/jobs/request")
def request_job(call: Call) -> Any:
    """The oldest job that the runner may take; 204 where there is none."""
    known, project = _runner(call)
    for pipeline in project.pipelines:
        jobs = project.jobs.get(pipeline["id"], [])
        for job in jobs:
            tags = frozenset(job.plan.get("tags", ()))
            fits = tags <= known.tags if tags else known.run_untagged
            ready = all(other.status == "success" for other in _before(job, jobs)) if job.plan else False
            if job.status == "created" and fits and ready:
                return JSONResponse(_handed_over(call, project, pipeline, job), 201)
    return Response(status_code=204, headers={"X-GitLab-Last-Update": secrets.token_hex(8)})


def _handed_over(call: Call, project: Project, pipeline: Json, job: Job) -> Json:
    """What the runner gets; the job runs from now on, with a token that ends with it."""
    level = project.members.get(pipeline["user"].id, 0) if pipeline["user"] else 0
    token = call.state.add_token(project, "job", level, job.name, user=pipeline["user"]).value
    job.status, job.token = "running", token
    pipeline["status"] = "running"
    host = call.base_url.replace("://", f"://gitlab-ci-token:{token}@")
    is_tag = bool(git(_repository(project), "tag", "--list", pipeline["ref"]))
    spec = job.plan.get("artifacts") or {}
    jobs = project.jobs[pipeline["id"]]
    script = [
        *job.plan.get("before_script", job.plan["global"].get("before_script", [])),
        *_lines(job.plan["script"]),
    ]
    return {
        "id": job.id,
        "token": token,
        "allow_git_fetch": True,
        "job_info": {
            "id": job.id,
            "name": job.name,
            "stage": job.plan["stage"],
            "project_id": project.id,
            "project_name": project.name,
        },
        "git_info": {
            "repo_url": f"{host}/{project.path}.git",
            "ref": pipeline["ref"],
            "sha": pipeline["sha"],
            "before_sha": "0" * 40,
            "ref_type": "tag" if is_tag else "branch",
            "refspecs": [f"+{pipeline['sha']}:refs/pipelines/{pipeline['id']}"],
            "depth": 20,
        },
        "runner_info": {"timeout": 3600, "runner_session_url": None},
        "variables": _variables(call, project, pipeline, job, is_tag),
        "steps": [
            {
                "name": "script",
                "script": script,
                "timeout": 3600,
                "when": "on_success",
                "allow_failure": False,
            }
        ],
        "image": {"name": job.plan["image"]} if "image" in job.plan else None,
        "services": [],
        "artifacts": [spec | {"artifact_type": "archive", "artifact_format": "zip"}] if spec else None,
        "cache": [],
        "credentials": [],
        "features": {"trace_sections": True, "failure_reasons": ["unknown_failure", "script_failure"]},
        "dependencies": [
            {"id": other.id, "name": other.name, "token": token}
            | ({"artifacts_file": {"filename": "artifacts.zip", "size": 1}} if other.kept else {})
            for other in _before(job, jobs)
        ],
    }


def is_guarded(project: Project, ref: str, is_tag: bool = False) -> bool:
    """Whether a pipeline of the ref sees protected variables: of a protected branch or tag, or of a merge request between
    two protected branches of the project (doc/ci/pipelines/merge_request_pipelines.md).
    """
    if is_tag:
        return bool(rules_of(ref, project.protected_tags))
    branches = [ref]
    if ref.startswith("refs/merge-requests/"):
        merge_request = project.merge_requests[int(ref.split("/")[2])]
        if merge_request.source_project_id != project.id:
            return False
        branches = [merge_request.source_branch, merge_request.target_branch]
    return all(rules_of(branch, project.protected_branches) for branch in branches)


def _variables(call: Call, project: Project, pipeline: Json, job: Job, is_tag: bool) -> list[Json]:
    """Predefined ones, the project's (protected ones for protected refs only), the job's and the pipeline's."""
    ref = pipeline["ref"]
    guarded = is_guarded(project, ref, is_tag)
    url = f"{call.base_url}/{project.path}"
    predefined = {
        "CI": "true",
        "GITLAB_CI": "true",
        "CI_SERVER_URL": call.base_url,
        "CI_API_V4_URL": f"{call.base_url}/api/v4",
        "CI_PROJECT_ID": str(project.id),
        "CI_PROJECT_NAME": project.name,
        "CI_PROJECT_PATH": project.path,
        "CI_PROJECT_URL": url,
        "CI_DEFAULT_BRANCH": project.default_branch,
        "CI_CONFIG_PATH": project.ci_config_path,
        "CI_PIPELINE_ID": str(pipeline["id"]),
        "CI_PIPELINE_SOURCE": pipeline["source"],
        "CI_COMMIT_SHA": pipeline["sha"],
        "CI_COMMIT_REF": pipeline["sha"],
        "CI_COMMIT_REF_NAME": ref,
        "CI_COMMIT_REF_PROTECTED": str(guarded).lower(),
        "CI_JOB_ID": str(job.id),
        "CI_JOB_NAME": job.name,
        "CI_JOB_STAGE": job.plan["stage"],
        "CI_JOB_TOKEN": job.token,
        **({"CI_COMMIT_TAG": ref} if is_tag else {"CI_COMMIT_BRANCH": ref}),
    }
    written = job.plan["global"].get("variables", {}) | job.plan.get("variables", {})
    plain = [(predefined, True), ({key: str(value) for key, value in written.items()}, True)]
    shown = [
        {"key": key, "value": value, "public": public, "masked": key == "CI_JOB_TOKEN", "file": False}
        for values, public in [*plain, (pipeline["variables"], False)]
        for key, value in values.items()
    ]
    return shown + [
        {
            "key": known.key,
            "value": known.value,
            "public": False,
            "masked": known.masked,
            "file": known.kind == "file",
        }
        for known in project.variables
        if known.scope == "*" and (guarded or not known.protected)
    ]


def _repository(project: Project) -> Any:
    assert project.repository is not None
    return project.repository


def _lines(script: Any) -> list[str]:
    return [script] if isinstance(script, str) else list(script)


def _running(call: Call) -> tuple[Job, Json, Project]:
    """The job of the request, by its token; 403 once it has ended, as its token has then."""
    token = call.headers.get("job-token") or call.get("token")
    for project in call.state.projects.values():
        for pipeline in project.pipelines:
            for job in project.jobs.get(pipeline["id"], []):
                if str(job.id) == call["job_id"] and token and job.token == token:
                    if job.status != "running":
                        raise ApiError(403, "403 Forbidden - Job is not running")
                    return job, pipeline, project
    raise REFUSED


@route("PUT", "/jobs/:job_id")
def update_job(call: Call) -> Any:
    """`state` success or failed ends it."""
    job, pipeline, project = _running(call)
    if call.get("state") in ("success", "failed"):
        job.status = call.get("state")
        call.state.tokens.pop(job.token, None)
        _settle(project, pipeline)
    return Response(json.dumps(None), headers={"Job-Status": job.status}, media_type="application/json")


@route("PATCH", "/jobs/:job_id/trace")
def append_trace(call: Call) -> Any:
    """Content-Range says where the part goes; 416 with the length so far where that is not the log's end."""
    job, _, _ = _running(call)
    if "content-range" not in call.headers:
        raise ApiError(400, "400 Missing header Content-Range")
    start, had = int(call.headers["content-range"].partition("-")[0]), job.trace.encode()
    if start != len(had):
        return Response(status_code=416, headers={"Range": f"0-{len(had)}", "Job-Status": job.status})
    job.trace += call.body.decode("utf-8", "replace")
    headers = {"Range": f"0-{start + len(call.body)}", "Job-Status": job.status}
    return Response(status_code=202, headers=headers | {"X-GitLab-Trace-Update-Interval": "3"})


@route("POST", "/jobs/:job_id/artifacts")
def upload_artifacts(call: Call) -> Any:
    job, _, _ = _running(call)
    name, content = call.files.get("file", (None, b""))
    if not name:
        raise ApiError(400, {"error": "file is invalid"})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        job.artifacts = {path: archive.read(path) for path in archive.namelist() if not path.endswith("/")}
    expire_in = str(call.get("expire_in") or (job.plan.get("artifacts") or {}).get("expire_in") or "30 days")
    if expire_in != "never":
        count, unit = expire_in.split()[:2]
        job.artifacts_expire_at = datetime.now(UTC) + timedelta(seconds=int(count) * UNITS[unit.rstrip("s")])
    return JSONResponse({"message": "201 Created"}, 201)


@route("GET", "/jobs/:job_id/artifacts")
def download_artifacts(call: Call) -> Any:
    """By the token of a running job of the same pipeline that depends on it."""
    token = call.headers.get("job-token")
    for project in call.state.projects.values():
        for jobs in project.jobs.values():
            running = [job for job in jobs if job.token and job.token == token and job.status == "running"]
            for job in jobs:
                if (
                    running
                    and str(job.id) == call["job_id"]
                    and (job in running or job in _before(running[0], jobs))
                ):
                    return archived(job)
    raise REFUSED
