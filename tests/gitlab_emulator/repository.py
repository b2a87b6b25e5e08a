"""Commits, their comments, statuses and merge requests; files (doc/api/commits.md, repository_files.md)."""

import base64
import hashlib
import secrets
from typing import Any

from starlette.responses import Response

from tests.gitlab_emulator.git import commit_file, file_at, git
from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.protection import may_push, rules_of
from tests.gitlab_emulator.rights import MAINTAINER
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.starts import after_push
from tests.gitlab_emulator.state import Push, now
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
    last = next((known for known in call.project.pipelines[::-1] if known["sha"] == full), None)
    return {
        "id": full,
        "short_id": full[:8],
        "parent_ids": parents.split(),
        "title": title,
        "message": message,
        "last_pipeline": {name: last[name] for name in ("id", "ref", "sha", "status")} if last else None,
    }


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
    """The ref and the content: git's where there is a repository. `HEAD` is the default branch."""
    ref = call.get("ref") or call.project.default_branch
    ref = call.project.default_branch if ref == "HEAD" else ref
    if call.project.repository is not None:
        content = file_at(call.project.repository, ref, call["path"])
    else:
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
    """A commit on the branch, by whom its protection lets push: 403 for others."""
    branch, content, message = call.require("branch", "content", "commit_message")
    project, token = call.project, call.token
    assert token is not None
    if not may_push(branch, token.access_level, project.protected_branches):
        raise ApiError(403, "You are not allowed to push into this branch")
    known = (
        file_at(project.repository, branch, call["path"]) is not None
        if project.repository is not None
        else (branch, call["path"]) in project.files
    )
    if known == (call.method == "POST"):
        problem = "already exists" if call.method == "POST" else "doesn't exist"
        raise ApiError(400, f"A file with this name {problem}")
    data = base64.b64decode(content) if call.get("encoding") == "base64" else content.encode()
    if project.repository is None:
        project.files[branch, call["path"]] = data
        project.commits.append({"id": secrets.token_hex(20), "message": message, "branch": branch})
    else:
        before, after = commit_file(project.repository, branch, call["path"], data, message)
        after_push(call.state, project, Push(f"refs/heads/{branch}", before, after, token.user.username, ()))
    return {"file_path": call["path"], "branch": branch}


@route("GET", "/projects/:id/repository/tree")
def list_tree(call: Call) -> Any:
    """Files and folders of `path` at `ref`; all below with `recursive`."""
    repository = call.project.repository
    ref, path = call.query.get("ref") or call.project.default_branch, call.query.get("path", "")
    if repository is None or not git(repository, "rev-parse", "--verify", "--quiet", ref, check=False):
        raise not_found("Tree")
    deep = ["-r", "-t"] if call.query.get("recursive", "").lower() in ("true", "1") else []
    listed = git(repository, "ls-tree", "-z", *deep, ref, *([f"{path.rstrip('/')}/"] if path else []))
    items = []
    for entry in filter(None, listed.split("\0")):
        (mode, kind, sha), name = entry.partition("\t")[0].split(), entry.partition("\t")[2]
        items.append({"id": sha, "name": name.rpartition("/")[2], "type": kind, "path": name, "mode": mode})
    return paged(call, items, f"/projects/{call.project.id}/repository/tree")


BRANCHES = "/projects/:id/repository/branches"


@route("GET", BRANCHES)
def list_branches(call: Call) -> Any:
    words = call.query.get("search", "").removeprefix("^")
    found = [_branch_json(call, name) for name in _branches(call) if words in name]
    return paged(call, found, f"/projects/{call.project.id}/repository/branches")


@route("POST", BRANCHES)
def create_branch(call: Call) -> Any:
    name, ref = call.require("branch", "ref")
    repository = call.project.repository
    if name in _branches(call):
        raise ApiError(400, "Branch already exists")
    if repository is None or not git(repository, "rev-parse", "--verify", "--quiet", ref, check=False):
        raise ApiError(400, f"Failed to create branch '{name}': invalid reference name '{ref}'")
    git(repository, "branch", name, ref)
    return _branch_json(call, name)


@route("GET", f"{BRANCHES}/*branch")
def get_branch(call: Call) -> Any:
    if call["branch"] not in _branches(call):
        raise not_found("Branch")
    return _branch_json(call, call["branch"])


@route("DELETE", f"{BRANCHES}/*branch")
def delete_branch(call: Call) -> Any:
    """Not the default one, and a protected one by Maintainers only."""
    name, project, token = call["branch"], call.project, call.token
    if name not in _branches(call):
        raise not_found("Branch")
    assert token is not None and project.repository is not None
    if name == project.default_branch or (
        rules_of(name, project.protected_branches) and token.access_level < MAINTAINER
    ):
        raise ApiError(403, "403 Forbidden")
    git(project.repository, "branch", "--delete", "--force", name)


def _branches(call: Call) -> list[str]:
    if call.project.repository is None:
        return []
    return git(
        call.project.repository, "for-each-ref", "--format=%(refname:strip=2)", "refs/heads"
    ).splitlines()


def _branch_json(call: Call, name: str) -> dict[str, Any]:
    project, token = call.project, call.token
    assert token is not None
    return {
        "name": name,
        "commit": commit_json(call, name),
        "merged": False,
        "protected": bool(rules_of(name, project.protected_branches)),
        "default": name == project.default_branch,
        "can_push": may_push(name, token.access_level, project.protected_branches),
        "web_url": f"{call.project_url}/-/tree/{name}",
    }
