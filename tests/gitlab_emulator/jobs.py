"""Jobs of pipelines and their artifacts (doc/api/jobs.md, doc/api/job_artifacts.md)."""

import io
import zipfile
from typing import Any

from starlette.responses import Response

from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.rights import number
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.state import Job, Json
from tests.gitlab_emulator.traces import as_sent
from tests.gitlab_emulator.views import job_json


def find_pipeline(call: Call) -> Json:
    for pipeline in call.project.pipelines:
        if str(pipeline["id"]) == call["pipeline_id"]:
            return pipeline
    raise not_found()


def pipeline_json(call: Call, pipeline: Json) -> Json:
    """Without its variables, which have a route of their own."""
    hidden = ("variables", "user")
    shown = {name: value for name, value in pipeline.items() if name not in hidden}
    return shown | {"web_url": f"{call.project_url}/-/pipelines/{pipeline['id']}"}


def _find_job(call: Call) -> tuple[Job, Json]:
    for pipeline in call.project.pipelines:
        for job in call.project.jobs.get(pipeline["id"], []):
            if str(job.id) == call["job_id"]:
                return job, pipeline
    raise not_found()


def _latest(call: Call) -> Job:
    """The job of that name in the newest successful pipeline of the ref; an older pipeline's is not looked for.

    Project#latest_successful_build_for_ref!: success is the whole pipeline's, `refs/merge-requests/N/head`, `merge` and
    `train` are refs of their own, and a merged merge request's pipelines stay on them. GitLab 18.10 and newer look
    on with `search_recent_successful_pipelines` (18.7 behind a flag that is off).
    """
    [name] = call.require("job")
    searching = str(call.query.get("search_recent_successful_pipelines", "")).lower() == "true"
    for pipeline in reversed(call.project.pipelines):
        if pipeline["ref"] == call["ref"] and pipeline["status"] == "success":
            for job in call.project.jobs.get(pipeline["id"], []):
                if job.name == name and job.kept:
                    return job
            if not searching or number(call.state.version) < (18, 10):
                break
    raise not_found()


@route("GET", "/projects/:id/pipelines/:pipeline_id/jobs")
def list_jobs(call: Call) -> Any:
    """Newest first; `scope` is one status or several."""
    pipeline = find_pipeline(call)
    scope = call.query.get("scope") or call.query.get("scope[]")
    jobs = [job for job in call.project.jobs.get(pipeline["id"], [])[::-1] if scope in (None, job.status)]
    path = f"/projects/{call.project.id}/pipelines/{pipeline['id']}/jobs"
    return paged(call, jobs, path, lambda job: job_json(job, pipeline, call.project, call.base_url))


@route("GET", "/projects/:id/jobs/:job_id")
def get_job(call: Call) -> Any:
    return job_json(*_find_job(call), call.project, call.base_url)


@route("GET", "/projects/:id/jobs/:job_id/trace")
def get_trace(call: Call) -> Any:
    job, _ = _find_job(call)
    # what a runner sent to the emulator is as it sent it
    log = job.trace if job.plan else as_sent(job.trace, call.state.runner, job.status)
    return Response(log, media_type="text/plain")


@route("GET", "/projects/:id/jobs/:job_id/artifacts")
def get_archive(call: Call) -> Any:
    return archived(_find_job(call)[0])


@route("GET", "/projects/:id/jobs/:job_id/artifacts/*path")
def get_artifact(call: Call) -> Any:
    return _file(_find_job(call)[0], call["path"])


@route("GET", "/projects/:id/jobs/artifacts/*ref/download")
def get_latest_archive(call: Call) -> Any:
    return archived(_latest(call))


@route("GET", "/projects/:id/jobs/artifacts/*ref/raw/*path")
def get_latest_artifact(call: Call) -> Any:
    return _file(_latest(call), call["path"])


def archived(job: Job) -> Response:
    """All of its artifacts. Raises ApiError 404 where none is left."""
    if not job.kept:
        raise not_found()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, content in job.kept.items():
            archive.writestr(path, content)
    return Response(packed.getvalue(), media_type="application/zip")


def _file(job: Job, path: str) -> Response:
    if ".." in path.split("/"):
        raise ApiError(400, {"error": "artifact_path should be a valid file path"})
    if path not in job.kept:
        raise not_found()
    return Response(job.kept[path], media_type="application/octet-stream")
