"""Server, user, project, labels, uploads (doc/api/version.md, users.md, project_markdown_uploads.md, …)."""

import mimetypes
import re
import secrets
from typing import Any

from starlette.responses import Response

from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.state import Project, Upload
from tests.gitlab_emulator.views import project_json, user_json


@route("GET", "/version")
@route("GET", "/metadata")
def version(call: Call) -> Any:
    told = {"version": f"{call.state.version}.0-ee", "revision": "0123456789a", "enterprise": True}
    return told | {"kas": {"enabled": False}}


@route("GET", "/user")
def user(call: Call) -> Any:
    assert call.token is not None
    return user_json(call.token.user, call.base_url) | {"bot": "_bot_" in call.token.user.username}


@route("GET", "/users")
def list_users(call: Call) -> Any:
    """Those of that `username`, of whom a token is known."""
    users = {token.user.id: token.user for token in call.state.tokens.values()}
    wanted = call.query.get("username")
    found = [user for user in users.values() if wanted in (None, user.username)]
    return paged(call, found, "/users", lambda user: user_json(user, call.base_url))


@route("GET", "/projects/:id")
def get_project(call: Call) -> Any:
    assert call.token is not None
    return project_json(call.project, call.base_url, call.token)


@route("GET", "/projects")
def list_projects(call: Call) -> Any:
    """Those that the token's user is a member of."""
    token = call.token
    assert token is not None
    found = [known for known in call.state.projects.values() if known.id in token.project_ids]
    return paged(call, found, "/projects", lambda known: project_json(known, call.base_url, token))


@route("PUT", "/projects/:id")
def update_project(call: Call) -> Any:
    """Its merge method, and two of its settings for CI/CD."""
    project, token = call.project, call.token
    assert token is not None
    project.merge_method = call.get("merge_method", project.merge_method)
    name = "ci_pipeline_variables_minimum_override_role"
    project.pipeline_variables_role = call.get(name, project.pipeline_variables_role)
    may_push = call.get("ci_push_repository_for_job_token_allowed", project.job_token_may_push)
    project.job_token_may_push = str(may_push).lower() == "true"
    return project_json(project, call.base_url, token)


@route("GET", "/projects/:id/labels")
def list_labels(call: Call) -> Any:
    return paged(call, list(call.project.labels.values()), f"/projects/{call.project.id}/labels")


@route("POST", "/projects/:id/labels")
def create_label(call: Call) -> Any:
    name, color = call.require("name", "color")
    if name in call.project.labels:
        raise ApiError(409, "Label already exists")
    label = {"id": call.state.new_id(), "name": name, "color": color, "description": call.get("description")}
    call.project.labels[name] = label
    return label


@route("POST", "/projects/:id/uploads")
def upload(call: Call) -> Any:
    """A `file` part without a file name is not taken for a file: 400."""
    name, content = call.files.get("file", (None, b""))
    if not name:
        raise ApiError(400, {"error": "file is invalid" if "file" in call.data else "file is missing"})
    filename = re.sub(r"[^\w.\-]", "_", name.rpartition("/")[2])
    uploaded = Upload(call.state.new_id(), secrets.token_hex(16), filename, content)
    call.project.uploads[uploaded.secret] = uploaded
    alt = filename.rpartition(".")[0] or filename
    url = f"/uploads/{uploaded.secret}/{filename}"
    return {
        "id": uploaded.id,
        "alt": alt,
        "url": url,
        "full_path": f"/-/project/{call.project.id}{url}",
        "markdown": f"![{alt}]({url})",
    }


def served_upload(project: Project, secret: str, filename: str) -> Response:
    """An uploaded file, as the browser gets it."""
    uploaded = project.uploads.get(secret)
    if uploaded is None or uploaded.filename != filename:
        raise not_found()
    return Response(
        uploaded.content, media_type=mimetypes.guess_type(filename)[0] or "application/octet-stream"
    )
