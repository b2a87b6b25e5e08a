"""The notes of a merge request through python-gitlab: find, create, edit, delete, upload, all before one deadline."""

import math
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import gitlab
import requests
from gitlab.const import RETRYABLE_TRANSIENT_ERROR_CODES
from gitlab.exceptions import GitlabError
from gitlab.v4.objects import ProjectMergeRequest, ProjectMergeRequestNote
from requests.adapters import HTTPAdapter
from urllib3 import ProxyManager
from urllib3.filepost import encode_multipart_formdata
from urllib3.util.ssl_ import create_urllib3_context

from ml.errors import UserError
from ml.report.note import is_marked
from ml.settings import Settings

ATTEMPT_SECONDS = 30.0  # for one request
EDIT_ATTEMPTS = 10
FIRST_WAIT = 0.1  # s, before the second attempt; doubled for each one after it


@dataclass(frozen=True)
class Target:
    """A merge request and the right to comment on it."""

    base_url: str  # the API's address without /api/v4
    project_id: int
    iid: int
    token: str = field(repr=False)


def find_target(settings: Settings) -> Target | str:
    """Where to publish, or the reason why there is only the file."""
    if settings.ci_merge_request_iid is None:
        return "this is no merge-request pipeline: CI_MERGE_REQUEST_IID is not set"
    if settings.comment_token is None:
        fork = " and a fork does not get the parent project's" if settings.from_fork else ""
        job = "; CI_JOB_TOKEN may not write notes" if settings.ci_job_token else ""
        return f"there is no token: REPO_TOKEN and GITLAB_TOKEN are not set{fork}{job}"
    if settings.api_url is None or settings.merge_request_project_id is None:
        raise UserError(
            "CI_API_V4_URL and CI_PROJECT_ID must say where the merge request is. GitLab sets them in every job; "
            "set them by hand elsewhere, or unset CI_MERGE_REQUEST_IID to write only the file."
        )
    if not settings.api_url.endswith("/api/v4"):
        raise UserError(f"CI_API_V4_URL is {settings.api_url!r}, and should end in /api/v4. Correct it.")
    return Target(
        settings.api_url.removesuffix("/api/v4"),
        settings.merge_request_project_id,
        settings.ci_merge_request_iid,
        settings.comment_token.get_secret_value(),
    )


class PatientAdapter(HTTPAdapter):
    """Sends requests until a deadline that all of them share.

    python-gitlab retries connection errors, 429 and 5xx, waiting as long as Retry-After says, in seconds only and
    without a bound. This adapter turns a date into seconds and gives up where the wait would pass the deadline, and
    at once where a certificate is not trusted, which no waiting changes.
    """

    def __init__(self, seconds: float, ca_file: Path | None = None) -> None:
        """Raises UserError when `ca_file`, to be trusted beside the usual authorities, cannot be read."""
        self.ca_file = ca_file
        super().__init__()
        self.deadline = time.monotonic() + seconds
        self.asked_to_wait: int | None = None  # s, by the latest answer

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options | self.trust())

    def proxy_manager_for(self, proxy: str, **options: Any) -> ProxyManager:
        manager: ProxyManager = super().proxy_manager_for(proxy, **options | self.trust())
        return manager

    def trust(self) -> dict[str, Any]:
        return {"ssl_context": trusting(self.ca_file)} if self.ca_file else {}

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        """Raises UserError for a certificate, and when the deadline has passed or will before GitLab may be asked."""
        left = self.seconds_left()
        if left <= 0:
            raise UserError(
                f"GitLab gave no lasting answer in time (last tried: {request.url}). Run the job again."
            )
        try:
            response = super().send(request, *args, **options | {"timeout": min(ATTEMPT_SECONDS, left)})
        except requests.exceptions.SSLError as error:
            # one that was cut off may succeed next time
            if "EOF" in str(error):
                raise
            raise untrusted(request.url or "", str(error)) from None
        # python-gitlab would wait for this one without a bound as well.
        response.headers.pop("RateLimit-Reset", None)
        asked = response.headers.get("Retry-After")
        self.asked_to_wait = None
        if asked is not None:
            wait, left = seconds_to_wait(asked), self.seconds_left()
            if wait > left:
                raise UserError(
                    f"GitLab answered {response.status_code} and asks to wait {wait} s, with {left:.0f} s left "
                    f"({request.url}). Run the job again later."
                )
            self.asked_to_wait = wait
            response.headers["Retry-After"] = str(wait)
        return response

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


class PatientSession(requests.Session):
    """Sends all its requests through one `PatientAdapter`."""

    def __init__(self, adapter: PatientAdapter) -> None:
        super().__init__()
        self.adapter = adapter
        self.mount("http://", adapter)
        self.mount("https://", adapter)


def session(settings: Settings, seconds: float) -> PatientSession:
    """For all requests to GitLab's API. Raises UserError when CI_SERVER_TLS_CA_FILE cannot be read."""
    return PatientSession(PatientAdapter(seconds, settings.ci_server_tls_ca_file))


def trusting(ca_file: Path) -> ssl.SSLContext:
    """What requests trusts, and the authorities in `ca_file`, of which the last one need not be a root.

    The runner puts the chain of GitLab's certificate there, as far as it knows it.
    """
    context = create_urllib3_context()  # for each connection requests adds the authorities that it trusts
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(ca_file)
    except OSError as error:
        raise UserError(
            f"CI_SERVER_TLS_CA_FILE names {ca_file}, which cannot be used: {error.strerror or error}. The runner sets "
            "it; name a file of PEM certificates, or unset it."
        ) from None
    return context


def untrusted(url: str, said: str) -> UserError:
    why = re.search(r"certificate verify failed: [^()\[\]\"']+", said)
    return UserError(
        f"{url} has no certificate that is trusted here ({why[0].strip() if why else said:.300}). Check the address; "
        "behind a private CA set CI_SERVER_TLS_CA_FILE to its certificate (a variable of type File), or `tls-ca-file` "
        "in the runner's config.toml, which sets it for every job."
    )


def seconds_to_wait(retry_after: str) -> int:
    """Seconds from now, at least 0, of a Retry-After header: a number or a date in GMT; 1 for what is neither."""
    if retry_after.isdecimal():
        return int(retry_after)
    try:
        date = parsedate_to_datetime(retry_after).replace(tzinfo=UTC)
    except ValueError:
        return 1
    return max(0, math.ceil((date - datetime.now(UTC)).total_seconds()))


class Notes:
    """The notes of one merge request, as the token's own user may see and write them."""

    def __init__(self, target: Target, session: PatientSession) -> None:
        self.adapter = session.adapter
        self.client = gitlab.Gitlab(
            target.base_url,
            private_token=target.token,
            session=session,
            retry_transient_errors=True,
            keep_base_url=True,
        )
        self.client.auth()
        assert self.client.user is not None  # auth() has set it or raised
        self.user_id: int = self.client.user.id
        self.project_id = target.project_id
        project = self.client.projects.get(target.project_id, lazy=True)
        self.merge_request: ProjectMergeRequest = project.mergerequests.get(target.iid)
        self.url: str = self.merge_request.web_url
        self.project_url = self.url.rpartition("/-/merge_requests/")[0]

    def all(self) -> list[ProjectMergeRequestNote]:
        """Every note, oldest first, so that a note posted meanwhile does not shift the pages."""
        found = self.merge_request.notes.list(get_all=True, per_page=100, order_by="created_at", sort="asc")
        return list({note.id: note for note in found}.values())

    def is_own(self, note: ProjectMergeRequestNote) -> bool:
        return not note.system and note.author["id"] == self.user_id and is_marked(note.body)

    def create(self, body: str) -> None:
        self.merge_request.notes.create({"body": body})

    def edit(self, note_id: int, change: Callable[[str], str]) -> None:
        """Replace the note's body, as it is at this moment, by `change` of it; a note that is gone stays gone.

        A failed edit starts again from reading: to send the same body again, as python-gitlab would, is to overwrite
        what another publisher has written during the wait.
        """
        with _gone_is_fine():
            for attempt in range(EDIT_ATTEMPTS):
                note = self.merge_request.notes.get(note_id)
                note.body = change(note.body)
                try:
                    note.save(retry_transient_errors=False, obey_rate_limit=False)
                    return
                except (GitlabError, requests.RequestException) as error:
                    if attempt == EDIT_ATTEMPTS - 1 or not is_transient(error):
                        raise
                    answered = isinstance(error, GitlabError)
                wait = self.adapter.asked_to_wait if answered else None
                time.sleep(FIRST_WAIT * 2**attempt if wait is None else wait)

    def delete(self, note_id: int) -> None:
        with _gone_is_fine():
            self.merge_request.notes.delete(note_id)

    def upload(self, name: str, content: bytes) -> str:
        """The address, relative to the project, of an uploaded file.

        The multipart body is made here and not by python-gitlab, whose own is a stream that a retry finds empty.
        """
        body, content_type = encode_multipart_formdata({"file": (name, content)})
        answer = self.client.http_request(
            "post",
            f"/projects/{self.project_id}/uploads",
            post_data=body,
            raw=True,
            extra_headers={"Content-type": content_type},
        )
        return str(answer.json()["url"])


def is_transient(error: GitlabError | requests.RequestException) -> bool:
    """Whether the same request may be answered otherwise a moment later: what python-gitlab itself retries."""
    if isinstance(error, GitlabError):
        return error.response_code == 429 or error.response_code in RETRYABLE_TRANSIENT_ERROR_CODES
    lost = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, lost)


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    """Another publisher may have removed the note since it was listed; the next listing shows what is left."""
    try:
        yield
    except GitlabError as error:
        if error.response_code != 404:
            raise


@contextmanager
def explained_errors(target: Target) -> Iterator[None]:
    """Turn what GitLab and the network answer into a UserError with the remedy."""
    where = f"{target.base_url}/api/v4, project {target.project_id}, merge request !{target.iid}"
    remedies = {
        401: "Set REPO_TOKEN to a valid project access token with scope api (CI_JOB_TOKEN may not write notes).",
        403: "The token in REPO_TOKEN needs scope api and the role Reporter or higher.",
        404: "Check CI_API_V4_URL, CI_PROJECT_ID and CI_MERGE_REQUEST_IID, and that the token's project is this one.",
        None: "Check that CI_API_V4_URL is the address of a GitLab API.",
    }
    try:
        yield
    except GitlabError as error:
        code = error.response_code
        said = error.error_message if isinstance(error.error_message, str) else f"{code} and no JSON"
        remedy = remedies.get(code, "Run the job again; if it stays so, look into the GitLab server's log.")
        raise UserError(f"GitLab answered {code or ''} ({said:.200}) at {where}. {remedy}") from None
    except requests.RequestException as error:
        raise UserError(
            f"GitLab cannot be reached at {where}: {type(error).__name__}. Check the address."
        ) from None
