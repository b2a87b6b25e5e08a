"""Commits, their comments, statuses and merge requests; tags, files, releases (doc/api/commits.md, tags.md, …)."""

import base64
import hashlib
import secrets
from typing import Any

from starlette.responses import Response

from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.state import now
from tests.gitlab_emulator.views import merge_request_json, user_json

COMMIT = "/projects/:id/repository/commits/:sha"


@route("GET", f"{COMMIT}/merge_requests")
def merge_requests_of_commit(call: Call) -> Any:
    found = [known for known in call.project.merge_requests.values() if known.sha == call["sha"]]
    items = [merge_request_json(known, call.project, call.base_url) for known in found]
    return paged(call, items, f"/projects/{call.project.id}/repository/commits/{call['sha']}/merge_requests")


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


@route("GET", "/projects/:id/repository/tags")
def list_tags(call: Call) -> Any:
    return paged(call, list(call.project.tags.values())[::-1], f"/projects/{call.project.id}/repository/tags")


@route("POST", "/projects/:id/repository/tags")
def create_tag(call: Call) -> Any:
    name, ref = call.require("tag_name", "ref")
    if name in call.project.tags:
        raise ApiError(400, f"Tag {name} already exists")
    return _add_tag(call, name, ref, call.get("message", ""))


def _add_tag(call: Call, name: str, ref: str, message: str = "") -> dict[str, Any]:
    tag = {"name": name, "message": message, "target": ref, "commit": {"id": ref}, "protected": False}
    call.project.tags[name] = tag
    return tag


@route("GET", "/projects/:id/repository/tags/:tag")
def get_tag(call: Call) -> Any:
    if call["tag"] not in call.project.tags:
        raise not_found("Tag")
    return call.project.tags[call["tag"]]


def _file(call: Call) -> tuple[str, bytes]:
    ref = call.get("ref") or call.project.default_branch
    content = call.project.files.get((ref, call["path"]))
    if content is None:
        raise not_found("File")
    return ref, content


@route("GET", "/projects/:id/repository/files/:path/raw", job_token=True)
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


RELEASES = "/projects/:id/releases"


@route("GET", RELEASES, job_token=True)
def list_releases(call: Call) -> Any:
    return paged(call, list(call.project.releases.values())[::-1], f"/projects/{call.project.id}/releases")


@route("POST", RELEASES, job_token=True)
def create_release(call: Call) -> Any:
    """409 if there is one. Makes the tag from `ref` where it is missing; 422 if that is missing too."""
    [tag] = call.require("tag_name")
    if tag in call.project.releases:
        raise ApiError(409, "Release already exists")
    if tag not in call.project.tags:
        if call.get("ref") is None:
            raise ApiError(422, "Ref is not specified")
        _add_tag(call, tag, call.get("ref"))
    links = [{"id": call.state.new_id(), "link_type": "other", **link} for link in _links(call)]
    release = {
        "tag_name": tag,
        "name": call.get("name") or tag,
        "description": call.get("description", ""),
        "created_at": now(),
        "released_at": now(),
        "commit": call.project.tags[tag]["commit"],
        "assets": {"count": len(links), "links": links},
        "_links": {"self": f"{call.project_url}/-/releases/{tag}"},
    }
    call.project.releases[tag] = release
    return release


def _links(call: Call) -> list[dict[str, Any]]:
    links = (call.get("assets") or {}).get("links", [])
    for link in links:
        if not link.get("name") or not link.get("url"):
            raise ApiError(400, {"error": "assets[links][name] or assets[links][url] is missing"})
    return list(links)


@route("GET", f"{RELEASES}/:tag", job_token=True)
def get_release(call: Call) -> Any:
    if call["tag"] not in call.project.releases:
        raise not_found()
    return call.project.releases[call["tag"]]
