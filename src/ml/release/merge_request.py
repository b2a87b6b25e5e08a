"""What the reviewers of a commit saw: its merge request, and what that one's newest successful pipeline left behind."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from ml import git
from ml.release import tag
from ml.release.access import Project, explained
from ml.report.note import parse
from ml.settings import Settings

PAGES = 5  # of 100 merge requests, the latest changed first
RECEIPT = "reports/receipt.json"
COMMENT = "reports/comment.md"
PAGE = "reports/comment.html"  # the comment with its pictures in it
COMPARISON = "reports/comparison.json"
LOCK = "dvc.lock"

Job = dict[str, Any]


@dataclass(frozen=True)
class Review:
    """A merged merge request with the files of its reviewed pipeline; None for a file that is not there.

    `pipeline` and `sha`: the pipeline's id and the commit that it ran for; None without one. `absent`: why there is no
    receipt, and the remedy.
    """

    iid: int
    title: str
    url: str
    labels: tuple[str, ...]
    pipeline: int | None
    sha: str | None
    receipt: bytes | None
    lock: bytes | None
    comment: bytes | None
    page: bytes | None
    comparison: bytes | None
    absent: str = ""


def find_review(project: Project, settings: Settings, commit: str) -> Review | None:
    """The review of `commit`, whatever way it was merged; None without a merge request."""
    with explained(project, "Looking for the merge request"):
        found = find_merge_request(project, settings.ci_default_branch, commit)
    if found is None:
        return None
    iid = int(found["iid"])
    with explained(project, f"Looking for the reviewed pipeline of !{iid}"):
        pipeline = reviewed_pipeline(project, iid)
        jobs = project.all(f"/pipelines/{pipeline['id']}/jobs") if pipeline else []
        trained = newest(jobs, settings.release_job)
        report = newest(jobs, settings.release_report_job)
        receipt = artifact(project, trained, RECEIPT)
        return Review(
            iid=iid,
            title=" ".join(str(found["title"]).split()).encode("utf-8", "replace").decode(),
            url=str(found["web_url"]),
            labels=tuple(map(str, found["labels"])),
            pipeline=int(pipeline["id"]) if pipeline else None,
            sha=str(pipeline["sha"]) if pipeline else None,
            receipt=receipt,
            lock=artifact(project, trained, LOCK),
            comment=artifact(project, report, COMMENT),
            page=artifact(project, report, PAGE),
            comparison=artifact(project, report, COMPARISON),
            absent="" if receipt else why_absent(found, pipeline, jobs, trained, settings.release_job),
        )


def find_merge_request(project: Project, branch: str, commit: str) -> dict[str, Any] | None:
    """The merged merge request into `branch` that brought `commit`, as GitLab describes it.

    Its merge commit, its squash commit, or after a fast-forward its head is `commit`; or `commit` merges its head,
    which somebody may have done by hand; or its merge train made it.
    """
    wanted = {commit, *tag.parents(commit)[1:]}
    query = {"state": "merged", "target_branch": branch, "order_by": "updated_at", "per_page": 100}
    for page in range(1, PAGES + 1):
        listed = project.get("/merge_requests", page=page, **query)
        for found in listed:
            hashes = {found.get("merge_commit_sha"), found.get("squash_commit_sha"), found["sha"]}
            if wanted & hashes:
                return dict(found)
        if len(listed) < 100:
            break
    return of_train(project, branch, commit)


def of_train(project: Project, branch: str, commit: str) -> dict[str, Any] | None:
    """The merged merge request whose merge train ran on this very commit.

    A train of fast-forwards brings rebased commits, whose hash the API does not tell of a merge request
    (`merged_commit_sha`).
    """
    for pipeline in project.all("/pipelines", sha=commit, source="merge_request_event"):
        ref = re.fullmatch(r"refs/merge-requests/(\d+)/train", str(pipeline["ref"]))
        if ref is not None:
            found = dict(project.get(f"/merge_requests/{ref[1]}"))
            if found["state"] == "merged" and found["target_branch"] == branch:
                return found
    return None


def reviewed_pipeline(project: Project, iid: int) -> dict[str, Any] | None:
    """The newest successful one that ran for the merge request: on its head, its merged result or in a merge train.

    GitLab lists pipelines of the source branch as well, and those of a fork; they ran outside of this project's review.
    """
    own = re.compile(rf"refs/merge-requests/{iid}/(head|merge|train)")
    listed = project.all(f"/merge_requests/{iid}/pipelines")
    found = [
        each
        for each in listed
        if each["status"] == "success"
        and own.fullmatch(str(each["ref"]))
        and each.get("project_id", project.id) == project.id
    ]
    return max(found, key=lambda each: int(each["id"]), default=None)


def newest(jobs: Iterable[Job], name: str) -> Job | None:
    """The successful job of that name; the one that ran last, where it ran again."""
    found = [job for job in jobs if job["name"] == name and job["status"] == "success"]
    return max(found, key=lambda job: int(job["id"]), default=None)


def artifact(project: Project, job: Job | None, path: str) -> bytes | None:
    """A file that the job kept, `path` as the project names it, which may lie in a folder of its repository."""
    return project.raw(f"/jobs/{job['id']}/artifacts/{quote(git.prefix() + path)}") if job else None


def why_absent(
    found: dict[str, Any], pipeline: dict[str, Any] | None, jobs: list[Job], job: Job | None, name: str
) -> str:
    """Why the merge request has no receipt, and what to do about it."""
    url = found["web_url"]
    if pipeline is None:
        return (
            f"no pipeline of {url} has succeeded, neither on its head nor on a merged result nor in a train"
        )
    if job is None:
        named = ", ".join(sorted({str(each["name"]) for each in jobs})) or "none"
        return (
            f"the reviewed pipeline of {url}, {pipeline.get('web_url') or pipeline['id']}, has no successful job {name} "
            f"(its jobs: {named}; RELEASE_JOB names the right one)"
        )
    place = f"the job {name} of {url} ({job.get('web_url') or job['id']})"
    remedy = (
        "Retry that job: it restores the same results and keeps them anew. Then run the release job again"
    )
    if job.get("erased_at"):
        return f"the artifacts of {place} were erased on {job['erased_at']}. {remedy}"
    expiry = job.get("artifacts_expire_at")
    if expiry and datetime.fromisoformat(str(expiry)) <= datetime.now(UTC):
        return f"the artifacts of {place} expired on {expiry}. {remedy}"
    return f"{place} left no {RECEIPT}"


def find_note(project: Project, review: Review, commit: str) -> str | None:
    """The address of the note that shows the report of `commit`.

    To link to only: whoever has the comment's token may have rewritten it, so what the reviewers saw is the file that
    the report job kept.
    """
    with explained(project, "Looking for the comment"):
        for note in project.all(f"/merge_requests/{review.iid}/notes", order_by="created_at", sort="asc"):
            content = parse(str(note["body"]))
            if content and content.runs[0].commit == commit:
                return f"{review.url}#note_{note['id']}"
    return None
