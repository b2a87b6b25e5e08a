"""What the reviewers of a commit saw: its merge request, and what that one's pipeline left behind.

Only routes that a CI_JOB_TOKEN may use; REPO_TOKEN is taken first where there is one, since GitLab's Free tier has
refused job tokens for artifacts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import gitlab
import requests
from gitlab.exceptions import GitlabError


from ml.errors import UserError
from ml.report.gitlab_notes import PatientAdapter
from ml.release import tag
from ml.report.note import parse
from ml.settings import Settings

API_SECONDS = 600.0  # for all requests of one client, uploads, retries and waiting included
PAGES = 5  # of 100 merge requests, the latest changed first
RECEIPT = "reports/receipt.json"
COMMENT = "reports/comment.md"
COMPARISON = "reports/comparison.json"
LOCK = "dvc.lock"


@dataclass(frozen=True)
class Review:
    """A merged merge request with the files of its newest successful pipeline; None for a file that is not there."""

    iid: int
    title: str
    url: str
    labels: tuple[str, ...]
    receipt: bytes | None
    lock: bytes | None
    comment: bytes | None
    comparison: bytes | None


@dataclass(frozen=True)
class Project:
    """The project through one token: `client` for what python-gitlab has no method for."""

    client: gitlab.Gitlab
    id: int

    @property
    def path(self) -> str:
        return f"/projects/{self.id}"

    def get(self, path: str, **query: Any) -> Any:
        return self.client.http_get(f"{self.path}{path}", **query)

    def raw(self, path: str, **query: Any) -> bytes | None:
        """The bytes of a file; None when there is none. Raises GitlabError for any other answer."""
        try:
            answer = self.client.http_get(f"{self.path}{path}", raw=True, streamed=False, **query)
        except GitlabError as error:
            if error.response_code == 404:
                return None
            raise
        assert isinstance(answer, requests.Response)
        return answer.content


def connect(settings: Settings, write: bool) -> Project | None:
    """The project of this job; None where no API or no token is known.

    For writing the job's own token comes first: it may release, the comment's token need not.
    """
    if settings.api_url is None or settings.ci_project_id is None:
        return None
    job, access = settings.ci_job_token, settings.comment_token
    session, adapter = requests.Session(), PatientAdapter(API_SECONDS)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    options: dict[str, Any] = {"session": session, "retry_transient_errors": True, "keep_base_url": True}
    url = settings.api_url.removesuffix("/api/v4")
    if job is not None and (write or access is None):
        client = gitlab.Gitlab(url, job_token=job.get_secret_value(), **options)
    elif access is not None:
        client = gitlab.Gitlab(url, private_token=access.get_secret_value(), **options)
    else:
        return None
    return Project(client, settings.ci_project_id)


@contextmanager
def explained(settings: Settings, doing: str) -> Iterator[None]:
    """Turn what GitLab and the network answer into a UserError that says what was being done."""
    where = f"{settings.api_url}, project {settings.ci_project_id}"
    try:
        yield
    except GitlabError as error:
        said = str(error.error_message or "no message")[:200]
        remedies = {
            401: "Set REPO_TOKEN (scope api, role Reporter): this GitLab does not take CI_JOB_TOKEN here.",
            403: "The person who started this pipeline, or the token, may not do that in this project.",
            404: "Check CI_API_V4_URL and CI_PROJECT_ID, and that the token is this project's.",
        }
        remedy = remedies.get(error.response_code or 0, "Run the job again; it goes on where it stopped.")
        raise UserError(
            f"{doing}: GitLab answered {error.response_code} ({said}) at {where}. {remedy}"
        ) from None
    except requests.RequestException as error:
        raise UserError(
            f"{doing}: GitLab cannot be reached at {where} ({type(error).__name__}). "
            "Run the job again; it goes on where it stopped."
        ) from None


def find_review(settings: Settings, commit: str) -> Review | None:
    """The review of `commit`, whatever way it was merged; None without a merge request or an API."""
    project = connect(settings, write=False)
    if project is None:
        return None
    with explained(settings, "Looking for the merge request"):
        found = find_merge_request(project, settings.ci_default_branch, commit)
        if found is None:
            return None

        def artifact(job: str, path: str) -> bytes | None:
            """Of the merge request's newest successful pipeline, or its merged result's."""
            for kind in ("head", "merge"):
                ref = quote(f"refs/merge-requests/{found['iid']}/{kind}", safe="")
                content = project.raw(f"/jobs/artifacts/{ref}/raw/{path}", job=job)
                if content is not None:
                    return content
            return None

        return Review(
            iid=int(found["iid"]),
            title=" ".join(str(found["title"]).split()),
            url=str(found["web_url"]),
            labels=tuple(map(str, found["labels"])),
            receipt=artifact(settings.release_job, RECEIPT),
            lock=artifact(settings.release_job, LOCK),
            comment=artifact(settings.release_report_job, COMMENT),
            comparison=artifact(settings.release_report_job, COMPARISON),
        )


def find_merge_request(project: Project, branch: str, commit: str) -> dict[str, Any] | None:
    """The merged merge request into `branch` that brought `commit`, as GitLab describes it.

    Its merge commit, its squash commit, or after a fast-forward its head is `commit`; or `commit` merges its head,
    which somebody may have done by hand.
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
    return None


def published_comment(settings: Settings, review: Review, commit: str) -> tuple[str, str] | None:
    """The report in the merge request's note and the note's address; None unless it is of `commit`, by our token.

    Only the comment's own token tells which note is ours: anybody may write one that looks like it.
    """
    project = connect(settings, write=False)
    if project is None or settings.comment_token is None:
        return None
    with explained(settings, "Looking for the comment"):
        user = project.client.http_get("/user")
        assert isinstance(user, dict)
        notes = project.client.http_list(
            f"{project.path}/merge_requests/{review.iid}/notes", iterator=True, per_page=100
        )
        for note in notes:
            content = parse(note["body"])
            if content and note["author"]["id"] == user["id"] and content.runs[0].commit == commit:
                return content.report, f"{review.url}#note_{note['id']}"
    return None
