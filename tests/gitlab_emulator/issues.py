"""Issues and what is said of them (doc/api/issues.md): what release tools and update bots use."""

import re
from typing import Any

from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.rights import REPORTER
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.state import Issue, Json, MergeRequest, now
from tests.gitlab_emulator.views import user_json

ISSUES = "/projects/:id/issues"
# doc/user/project/issues/managing_issues.md "Default closing pattern"
CLOSES = re.compile(
    r"\b(?:clos(?:e[sd]?|ing)|fix(?:e[sd]|ing)?|resolv(?:e[sd]?|ing)|implement(?:s|ed|ing)?):? +#(\d+)\b",
    re.IGNORECASE,
)


def issue_json(call: Call, issue: Issue) -> Json:
    return {
        "id": issue.id,
        "iid": issue.iid,
        "project_id": call.project.id,
        "title": issue.title,
        "description": issue.description,
        "state": issue.state,
        "labels": issue.labels,
        "author": user_json(issue.author, call.base_url),
        "confidential": False,
        "created_at": issue.created_at,
        "updated_at": issue.updated_at,
        "web_url": f"{call.project_url}/-/issues/{issue.iid}",
    }


def closed_by(call: Call, merge_request: MergeRequest) -> list[Issue]:
    numbers = CLOSES.findall(f"{merge_request.title}\n{merge_request.description}")
    return [call.project.issues[int(number)] for number in numbers if int(number) in call.project.issues]


def _issue(call: Call) -> Issue:
    iid = call["issue_iid"]
    if not iid.isdecimal() or int(iid) not in call.project.issues:
        raise not_found()
    return call.project.issues[int(iid)]


@route("GET", ISSUES)
def list_issues(call: Call) -> Any:
    """Newest first; `state`, `search` in title and description, `author_username`, `scope=created_by_me`."""
    assert call.token is not None
    state, words = call.query.get("state"), call.query.get("search", "").lower()
    mine = call.query.get("scope") == "created_by_me"
    found = [
        issue
        for issue in sorted(call.project.issues.values(), key=lambda issue: -issue.iid)
        if state in (None, "all", issue.state)
        and words in f"{issue.title}\n{issue.description}".lower()
        and (not mine or issue.author == call.token.user)
        and call.query.get("author_username") in (None, issue.author.username)
    ]
    path = f"/projects/{call.project.id}/issues"
    return paged(call, found, path, lambda issue: issue_json(call, issue))


@route("POST", ISSUES)
def create_issue(call: Call) -> Any:
    [title] = call.require("title")
    assert call.token is not None
    iid = max(call.project.issues, default=0) + 1
    labels = call.get("labels") or []
    names = labels if isinstance(labels, list) else labels.split(",")
    made = Issue(
        call.state.new_id(), iid, title, call.token.user, call.get("description") or "", labels=names
    )
    call.project.issues[iid] = made
    return issue_json(call, made)


@route("GET", f"{ISSUES}/:issue_iid")
def get_issue(call: Call) -> Any:
    return issue_json(call, _issue(call))


@route("PUT", f"{ISSUES}/:issue_iid")
def update_issue(call: Call) -> Any:
    """title, description, state_event: by its author or from Reporter on."""
    issue = _issue(call)
    assert call.token is not None
    if call.token.access_level < REPORTER and issue.author != call.token.user:
        raise ApiError(403, "403 Forbidden")
    issue.title = call.get("title", issue.title)
    issue.description = call.get("description", issue.description)
    issue.state = {"close": "closed", "reopen": "opened"}.get(call.get("state_event", ""), issue.state)
    issue.updated_at = now()
    return issue_json(call, issue)


@route("POST", f"{ISSUES}/:issue_iid/notes")
def create_issue_note(call: Call) -> Any:
    [body] = call.require("body")
    assert call.token is not None
    issue = _issue(call)
    issue.notes.append(str(body))
    author = user_json(call.token.user, call.base_url)
    return {
        "id": call.state.new_id(),
        "body": body,
        "author": author,
        "noteable_type": "Issue",
        "system": False,
    }


@route("GET", "/projects/:id/merge_requests/:iid/closes_issues")
def list_closed_issues(call: Call) -> Any:
    path = f"/projects/{call.project.id}/merge_requests/{call['iid']}/closes_issues"
    found = closed_by(call, call.merge_request)
    return paged(call, found, path, lambda issue: issue_json(call, issue))
