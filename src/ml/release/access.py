"""GitLab's API for the release: one client, and one way of saying what it answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gitlab
import requests
from gitlab.exceptions import GitlabError

from ml.errors import UserError
from ml.report.gitlab_notes import session
from ml.settings import Settings

API_SECONDS = 600.0  # for all requests of one client, uploads, retries and waiting included


@dataclass(frozen=True)
class Project:
    """The project through one token: `client` for what python-gitlab has no method for."""

    client: gitlab.Gitlab
    id: int
    token: str  # the variable's name

    @property
    def path(self) -> str:
        return f"/projects/{self.id}"

    def get(self, path: str, **query: Any) -> Any:
        return self.client.http_get(f"{self.path}{path}", **query)

    def all(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """Every entry of a list, whatever number of pages it has."""
        return list(self.client.http_list(f"{self.path}{path}", get_all=True, per_page=100, **query))

    def raw(self, path: str) -> bytes | None:
        """The bytes of a file; None when there is none. Raises GitlabError for any other answer."""
        try:
            answer = self.client.http_get(f"{self.path}{path}", raw=True, streamed=False)
        except GitlabError as error:
            if error.response_code == 404:
                return None
            raise
        assert isinstance(answer, requests.Response)
        return answer.content


def connect(settings: Settings) -> Project | None:
    """The project of this job by RELEASE_TOKEN, else by the job's own token; None where no API or no token is known.

    The job's token reads releases and packages. Artifacts of other jobs it reads from Premium on, and where tags are
    protected it writes releases for those only who may make such a tag.
    """
    if settings.api_url is None or settings.ci_project_id is None:
        return None
    release, job = settings.release_token, settings.ci_job_token
    if release is None and job is None:
        return None
    client = gitlab.Gitlab(
        settings.api_url.removesuffix("/api/v4"),
        private_token=release.get_secret_value() if release else None,
        job_token=job.get_secret_value() if job and not release else None,
        session=session(settings, API_SECONDS),
        retry_transient_errors=True,
        keep_base_url=True,
    )
    return Project(client, settings.ci_project_id, "RELEASE_TOKEN" if release else "CI_JOB_TOKEN")


@contextmanager
def explained(project: Project, doing: str) -> Iterator[None]:
    """Turn what GitLab and the network answer into a UserError that says what was being done, and by which token."""
    where = f"{project.client.api_url}, project {project.id}"
    remedies = {
        401: f"{project.token} is not valid (any more): set a new one.",
        403: f"{project.token} has no right to it: it needs the role Maintainer and the scope api.",
        404: f"Check CI_API_V4_URL and CI_PROJECT_ID, and that {project.token} is of this project.",
    }
    try:
        yield
    except GitlabError as error:
        remedy = remedies.get(error.response_code or 0, "Run the job again; it goes on where it stopped.")
        raise UserError(
            f"{doing}: GitLab answered {error.response_code} ({told(error)}) at {where}. {remedy}"
        ) from None
    except requests.RequestException as error:
        raise UserError(
            f"{doing}: GitLab cannot be reached at {where} ({type(error).__name__}). "
            "Run the job again; it goes on where it stopped."
        ) from None


def told(error: GitlabError) -> str:
    """GitLab's own words, at most 200 characters: of a token it says in `error_description` what is wrong with it."""
    try:
        answer = json.loads(error.response_body or b"")
    except ValueError:
        answer = None
    found = answer.get("error_description") if isinstance(answer, dict) else None
    return str(found or error.error_message or "no message")[:200]
