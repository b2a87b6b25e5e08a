"""Commits, their comments, statuses and merge requests; files (doc/api/commits.md, repository_files.md)."""

import base64
import hashlib
import secrets
from typing import Any

from starlette.responses import Response

from tests.gitlab_emulator.git import git
from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.state import now
from tests.gitlab_emulator.views import merge_request_json, user_json

COMMIT = "/projects/:id/repository/commits/:sha"


@route("GET", f"{COMMIT}/merge_requests")
def merge_requests_of_commit(call: Call) -> Any:
    """Those it came in by: its head, a commit of its diff, its squash commit or its merge commit."""
    found = [
        known
        for known in call.project.merge_requests.values()
        if call["sha"] in (known.sha, known.merge_commit_sha, known.squash_commit_sha, *known.commits)
    ]
    items = [merge_request_json(known, call.project, call.base_url) for known in found]
    return paged(call, items, f"/projects/{call.project.id}/repository/commits/{call['sha']}/merge_requests")


@route("GET", COMMIT)
def get_commit(call: Call) -> Any:
    return commit_json(call, call["sha"])


def commit_json(call: Call, sha: str) -> dict[str, Any]:
    """Needs a repository: without one, as for an unknown commit, it is a 404."""
    repository = call.project.repository
    shown = git(repository, "show", "-s", "--format=%H%x00%P%x00%B", sha, check=False) if repository else ""
    if not shown:
        raise not_found("Commit")
    full, parents, message = shown.split("\0")
    title = message.partition("\n")[0]
    return {"id": full, "parent_ids": parents.split(), "title": title, "message": message}


@route("GET", f"{COMMIT}/comments")
def list_commit_comments(call: Call) -> Any:
    comments = call.project.commit_comments.get(call["sha"], [])
    return paged(call, comments, f"/projects/{call.project.id}/repository/commits/{call['sha']}/comments")


@route("POST", f"{COMMIT}/comments")
def create_commit_comment(call: Call) -> Any:
    """These have no id and cannot be edited."""
    [text] = call.require("note")
    assert call.token is not None
    author = user_json(call.token.user, call.base_url)
    comment = {
        "note": text,
        "path": None,
        "line": None,
        "line_type": None,
        "author": author,
        "created_at": now(),
    }
    call.project.commit_comments.setdefault(call["sha"], []).append(comment)
    return comment


@route("GET", f"{COMMIT}/statuses")
def list_statuses(call: Call) -> Any:
    statuses = call.project.statuses.get(call["sha"], [])
    return paged(call, statuses, f"/projects/{call.project.id}/repository/commits/{call['sha']}/statuses")


@route("POST", "/projects/:id/statuses/:sha")
def set_status(call: Call) -> Any:
    [status] = call.require("state")
    if status not in ("pending", "running", "success", "failed", "canceled", "skipped"):
        raise ApiError(400, {"error": "state does not have a valid value"})
    entry = {
        "id": call.state.new_id(),
        "sha": call["sha"],
        "status": status,
        "name": call.get("name", call.get("context", "default")),
        "description": call.get("description"),
        "target_url": call.get("target_url"),
        "coverage": call.get("coverage"),
        "created_at": now(),
    }
    call.project.statuses.setdefault(call["sha"], []).append(entry)
    return entry


def _file(call: Call) -> tuple[str, bytes]:
    ref = call.get("ref") or call.project.default_branch
    content = call.project.files.get((ref, call["path"]))
    if content is None:
        raise not_found("File")
    return ref, content


@route("GET", "/projects/:id/repository/files/:path/raw")
def get_raw_file(call: Call) -> Any:
    return Response(_file(call)[1], media_type="text/plain")


@route("GET", "/projects/:id/repository/files/:path")
def get_file(call: Call) -> Any:
    ref, content = _file(call)
    return {
        "file_name": call["path"].rpartition("/")[2],
        "file_path": call["path"],
        "size": len(content),
        "encoding": "base64",
        "content": base64.b64encode(content).decode(),
        "content_sha256": hashlib.sha256(content).hexdigest(),
        "ref": ref,
    }


@route("POST", "/projects/:id/repository/files/:path")
@route("PUT", "/projects/:id/repository/files/:path")
def write_file(call: Call) -> Any:
    branch, content, message = call.require("branch", "content", "commit_message")
    key = (branch, call["path"])
    if (key in call.project.files) == (call.method == "POST"):
        problem = "already exists" if call.method == "POST" else "doesn't exist"
        raise ApiError(400, f"A file with this name {problem}")
    call.project.files[key] = (
        base64.b64decode(content) if call.get("encoding") == "base64" else content.encode()
    )
    call.project.commits.append({"id": secrets.token_hex(20), "message": message, "branch": branch})
    return {"file_path": call["path"], "branch": branch}
