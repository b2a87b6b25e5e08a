"""Merge requests, their labels and their notes (doc/api/merge_requests.md, doc/api/notes.md)."""

from typing import Any

from starlette.responses import JSONResponse

from tests.gitlab_emulator.git import Conflict, git, merge, sync
from tests.gitlab_emulator.issues import closed_by
from tests.gitlab_emulator.jobs import pipeline_json
from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.protection import may_merge
from tests.gitlab_emulator.quick_actions import extract
from tests.gitlab_emulator.repository import commit_json
from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.starts import after_opening, after_push, start
from tests.gitlab_emulator.state import MergeRequest, Note, Push, QuickAction, now
from tests.gitlab_emulator.views import merge_request_json, note_json

NOTE_LIMIT = 1_000_000  # characters


def _json(call: Call, merge_request: MergeRequest) -> dict[str, Any]:
    return merge_request_json(merge_request, call.project, call.base_url)


@route("GET", "/projects/:id/merge_requests")
def list_merge_requests(call: Call) -> Any:
    """By created_at, or updated_at with order_by; newest first unless sort=asc."""
    key = "updated_at" if call.query.get("order_by") == "updated_at" else "created_at"
    assert call.token is not None
    mine = call.query.get("scope") in ("created_by_me", "created-by-me")
    found = sorted(
        (
            known
            for known in call.project.merge_requests.values()
            if not mine or known.author == call.token.user
        ),
        key=lambda merge_request: (getattr(merge_request, key), merge_request.id),
        reverse=call.query.get("sort", "desc") != "asc",
    )
    for name in ("source_branch", "target_branch", "state"):
        wanted = call.query.get(name)
        if wanted not in (None, "", "all"):
            found = [merge_request for merge_request in found if getattr(merge_request, name) == wanted]
    path = f"/projects/{call.project.id}/merge_requests"
    return paged(call, found, path, lambda merge_request: _json(call, merge_request))


@route("POST", "/projects/:id/merge_requests")
def create_merge_request(call: Call) -> Any:
    source, target, title = call.require("source_branch", "target_branch", "title")
    open_ones = [known for known in call.project.merge_requests.values() if known.state == "opened"]
    for known in open_ones:
        if (known.source_branch, known.target_branch) == (source, target):
            raise ApiError(
                409,
                {
                    "message": [
                        f"Another open merge request already exists for this source branch: !{known.iid}"
                    ]
                },
            )
    assert call.token is not None
    fields = {"source_branch": source, "target_branch": target, "title": title, "author": call.token.user}
    created = call.state.add_merge_request(call.project, **fields, description=call.get("description", ""))
    sync(call.project)
    after_opening(call.state, call.project, created, call.token.user, call.token.access_level)
    return _json(call, created)


@route("GET", "/projects/:id/merge_requests/:iid")
def get_merge_request(call: Call) -> Any:
    return _json(call, call.merge_request)


@route("PUT", "/projects/:id/merge_requests/:iid")
def update_merge_request(call: Call) -> Any:
    """title, description, state_event, labels (replaces), add_labels, remove_labels: by its author or a Developer."""
    merge_request = call.merge_request
    assert call.token is not None
    if call.token.access_level < DEVELOPER and merge_request.author != call.token.user:
        raise ApiError(403, "403 Forbidden")
    merge_request.title = call.get("title", merge_request.title)
    merge_request.description = call.get("description", merge_request.description)
    events = {"close": "closed", "reopen": "opened", None: merge_request.state}
    merge_request.state = events.get(call.get("state_event"), merge_request.state)
    labels = merge_request.labels if call.get("labels") is None else _names(call.get("labels"))
    labels = [*labels, *(name for name in _names(call.get("add_labels")) if name not in labels)]
    removed = _names(call.get("remove_labels"))
    merge_request.labels = [name for name in labels if name not in removed]
    merge_request.updated_at = now()
    return _json(call, merge_request)


@route("PUT", "/projects/:id/merge_requests/:iid/merge")
def merge_merge_request(call: Call) -> Any:
    """By the project's merge method; `squash` and `sha`, the head that is meant. Needs a repository.

    401 for somebody whom the target branch's protection does not let merge (MergeRequest#can_be_merged_by?).
    """
    merge_request, project = call.merge_request, call.project
    assert call.token is not None
    if not may_merge(merge_request.target_branch, call.token.access_level, project.protected_branches):
        raise ApiError(401, "401 Unauthorized")
    if merge_request.state != "opened" or project.repository is None:
        raise ApiError(405, "405 Method Not Allowed")
    if call.get("sha") not in (None, merge_request.sha):
        raise ApiError(409, "SHA does not match HEAD of source branch")
    squash = str(call.get("squash", "false")).lower() == "true"
    before = git(project.repository, "rev-parse", merge_request.target_branch)
    try:
        merged, squashed = merge(project, merge_request, squash)
    except Conflict:
        raise ApiError(406, "Branch cannot be merged") from None
    merge_request.state = "merged"
    merge_request.merged_at = merge_request.updated_at = now()
    merge_request.merge_commit_sha, merge_request.squash_commit_sha = merged or None, squashed or None
    if merge_request.target_branch == project.default_branch:
        for issue in closed_by(call, merge_request):
            issue.state = "closed"
    ref = f"refs/heads/{merge_request.target_branch}"
    after = git(project.repository, "rev-parse", ref)
    after_push(call.state, project, Push(ref, before, after, call.token.user.username, ()))
    return _json(call, merge_request)


@route("GET", "/projects/:id/merge_requests/:iid/commits")
def list_commits(call: Call) -> Any:
    path = f"/projects/{call.project.id}/merge_requests/{call.merge_request.iid}/commits"
    return paged(call, call.merge_request.commits, path, lambda sha: commit_json(call, sha))


@route("GET", "/projects/:id/merge_requests/:iid/pipelines")
def list_pipelines(call: Call) -> Any:
    """Newest first: those of its head, of its merged result and of its merge train; and those of its branch's pushes."""
    merge_request = call.merge_request
    refs = {f"refs/merge-requests/{merge_request.iid}/{kind}" for kind in ("head", "merge", "train")}
    found = [pipeline for pipeline in call.project.pipelines[::-1] if pipeline["ref"] in refs]
    path = f"/projects/{call.project.id}/merge_requests/{call['iid']}/pipelines"
    return paged(call, found, path, lambda pipeline: pipeline_json(call, pipeline))


@route("POST", "/projects/:id/merge_requests/:iid/pipelines")
def create_merge_request_pipeline(call: Call) -> Any:
    """Run by hand: `[skip ci]` counts for nothing. One of its head; merged results are for Premium."""
    merge_request, token = call.merge_request, call.token
    assert token is not None
    ref = f"refs/merge-requests/{merge_request.iid}/head"
    event, level, sha = "merge_request_event", token.access_level, merge_request.sha
    made = start(call.state, call.project, ref, event, token.user, {}, level, sha=sha)
    return pipeline_json(call, made)


def _names(value: Any) -> list[str]:
    """Labels come as a list or as text with commas."""
    names = value if isinstance(value, list) else (value or "").split(",")
    return [name.strip() for name in names if name.strip()]


NOTES = "/projects/:id/merge_requests/:iid/notes"


def _note_json(call: Call, note: Note) -> dict[str, Any]:
    return note_json(note, call.merge_request, call.project, call.base_url)


@route("GET", NOTES)
def list_notes(call: Call) -> Any:
    """Newest first unless sort=asc; by created_at unless order_by=updated_at. System notes are in the list."""
    key = "updated_at" if call.query.get("order_by") == "updated_at" else "created_at"
    notes = sorted(
        call.merge_request.notes.values(),
        key=lambda note: (getattr(note, key), note.id),
        reverse=call.query.get("sort", "desc") != "asc",
    )
    path = f"/projects/{call.project.id}/merge_requests/{call.merge_request.iid}/notes"
    return paged(call, notes, path, lambda note: _note_json(call, note))


@route("POST", NOTES)
def create_note(call: Call) -> Any:
    merge_request = call.merge_request
    assert call.token is not None
    body, commands = _carried_out(call, _checked_body(call))
    if commands and not body:
        return JSONResponse(_only_commands(commands), status_code=202)
    return _note_json(call, call.state.add_note(merge_request, body, call.token.user))


@route("GET", f"{NOTES}/:note_id")
def get_note(call: Call) -> Any:
    return _note_json(call, _find_note(call))


@route("PUT", f"{NOTES}/:note_id")
def update_note(call: Call) -> Any:
    """Quick actions fire here as well (Notes::UpdateService); of a note with nothing else nothing is left."""
    note = _own_note(call)
    body, commands = _carried_out(call, _checked_body(call))
    if commands and not body:
        del call.merge_request.notes[note.id]
        return JSONResponse(_only_commands(commands), status_code=202)
    note.body, note.updated_at = body, now()
    return _note_json(call, note)


@route("DELETE", f"{NOTES}/:note_id")
def delete_note(call: Call) -> Any:
    del call.merge_request.notes[_own_note(call).id]


def _checked_body(call: Call) -> str:
    [body] = call.require("body")
    if not body.strip():
        raise ApiError(400, '400 Bad request - Note {:note=>["can\'t be blank"]}')
    if len(body) > NOTE_LIMIT:
        raise ApiError(400, '400 Bad request - Note {:note=>["is too long (maximum is 1000000 characters)"]}')
    return str(body)


def _carried_out(call: Call, body: str) -> tuple[str, list[tuple[str, str]]]:
    """Record the quick actions of a body, and return it without them."""
    assert call.token is not None
    body, commands = extract(body)
    for command, argument in commands:
        call.state.quick_actions.append(
            QuickAction(call.project.id, call.merge_request.iid, call.token.user.username, command, argument)
        )
    return body, commands


def _only_commands(commands: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "commands_changes": {command: argument or True for command, argument in commands},
        "summary": [f"Carried out /{command}." for command, _ in commands],
    }


def _find_note(call: Call) -> Note:
    note_id = call["note_id"]
    note = call.merge_request.notes.get(int(note_id)) if note_id.isdecimal() else None
    if note is None:
        raise not_found()
    return note


def _own_note(call: Call) -> Note:
    """A note that the token may change: its own, or as maintainer any but a system note."""
    note = _find_note(call)
    assert call.token is not None
    if note.system or (note.author != call.token.user and call.token.access_level < MAINTAINER):
        raise ApiError(403, "403 Forbidden")
    return note
