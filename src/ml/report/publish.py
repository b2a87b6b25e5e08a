"""Publish reports/comment.md as the one report note of its merge request, edited in place at every push.

The note ends in a hidden line of JSON that marks it as ours and lists the results it has shown. Publishing is a
merge of such lists, the newest result on top: in whatever order publishers come, and however many come at once,
they arrive at the same note. GitLab has no compare-and-swap for notes, so each one reads its writing back, and
again a moment later, and merges once more when another has overwritten it. A `resource_group` for the report job
keeps them from meeting in the first place.
"""

import argparse
import errno
import hashlib
import math
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import gitlab
import requests
from gitlab.exceptions import GitlabError
from gitlab.v4.objects import ProjectMergeRequest, ProjectMergeRequestNote
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from requests.adapters import HTTPAdapter
from urllib3.filepost import encode_multipart_formdata

from ml.errors import UserError, exit_on_user_error
from ml.report.escape import escape
from ml.settings import Settings, load_settings

COMMENT = Path("reports/comment.md")

NOTE_LIMIT = 1_000_000  # characters, GitLab's own limit
REPORT_LIMIT = 900_000  # characters; the rest is for the history, which stays below 100,000
RUNS_KEPT = 20  # results in the note: the one shown and those in the history
VERDICT_LIMIT = 200  # characters of a verdict in the history

PICTURES_LIMIT = 50  # pictures in a report
PICTURE_BYTES = 10_000_000  # of one picture
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp")

PUBLISH_SECONDS = 180.0  # for everything, all retries and all waiting that GitLab asks for
ATTEMPT_SECONDS = 30.0  # for one request
SETTLE_SECONDS = 1.0  # after which a publisher looks again whether its result is still in the note
ROUNDS = 20  # of merging with other publishers

CML_SECONDS = 60.0  # for the command
CML_NEWEST = 20  # notes: how far back `cml comment update` looks
WATERMARK_TITLE = "ml-report"
WATERMARK = re.compile(
    rf'!\[\]\(https://cml\.dev/watermark\.png#[0-9a-fA-F]+ "CML watermark {WATERMARK_TITLE}"\)'
)


# ---- What the note holds -------------------------------------------------------------------------------------


class Run(BaseModel):
    """One published result. Later pipelines and jobs have higher ids, so runs are ordered however late they come."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipeline: Annotated[int, Field(ge=0)]  # 0 outside a pipeline
    job: Annotated[int, Field(ge=0)]
    time: AwareDatetime
    commit: Annotated[str, Field(pattern=r"^([0-9a-f]{40,64})?$")]
    verdict: Annotated[str, Field(max_length=VERDICT_LIMIT)]  # plain text

    @property
    def order(self) -> tuple[int, int, datetime, str, str]:
        return self.pipeline, self.job, self.time, self.commit, self.verdict


RUNS = TypeAdapter(Annotated[tuple[Run, ...], Field(min_length=1, max_length=RUNS_KEPT)])


@dataclass(frozen=True)
class Content:
    """The Markdown of the newest run, and the runs, newest first."""

    report: str
    runs: tuple[Run, ...]


def merge(contents: Iterable[Content]) -> Content:
    """The newest report and the newest RUNS_KEPT runs of all: the same for any order, grouping and repetition."""
    contents = list(contents)
    newest = max(contents, key=lambda content: (content.runs[0].order, content.report))
    runs = sorted(
        {run for content in contents for run in content.runs}, key=lambda run: run.order, reverse=True
    )
    return Content(newest.report, tuple(runs[:RUNS_KEPT]))


OWN = re.compile(r"^<!-- ml-report\b", re.MULTILINE)
MARKER = re.compile(r"^<!-- ml-report (\[.*\]) -->$", re.MULTILINE)
WATERMARK_COMMENT = re.compile(rf"^<!-- {WATERMARK.pattern} -->$", re.MULTILINE)


def render(content: Content, project_url: str) -> str:
    """The note's body: the report, the hidden line, and the earlier results as a folded table."""
    return "\n\n".join([content.report, _hidden(content.runs), *_history(content.runs[1:], project_url)])


def parse(body: str) -> Content | None:
    """What `render` was given; None for a body whose hidden line is missing or not valid, as after a hand's edit."""
    markers = list(MARKER.finditer(body))
    if not markers:
        return None
    try:
        runs = RUNS.validate_json(markers[-1][1])
    except ValidationError:
        return None
    report = WATERMARK_COMMENT.sub("", body[: markers[-1].start()])
    return Content(report.strip("\n"), runs)


def _hidden(runs: tuple[Run, ...]) -> str:
    text = RUNS.dump_json(runs).decode()
    for character in "<>-":  # none of which may be in an HTML comment as `<!--` or `-->`
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"<!-- ml-report {text} -->"


def _history(runs: tuple[Run, ...], project_url: str) -> Iterator[str]:
    if not runs:
        return
    yield f"<details><summary>Earlier results ({len(runs)})</summary>"
    rows = "\n".join(_history_row(run, project_url) for run in runs)
    yield f"| result | commit | pipeline | time (UTC) |\n|---|---|---|---|\n{rows}"
    yield "</details>"


def _history_row(run: Run, project_url: str) -> str:
    commit = f"[{run.commit[:8]}]({project_url}/-/commit/{run.commit})" if run.commit else "–"
    pipeline = f"[{run.pipeline}]({project_url}/-/pipelines/{run.pipeline})" if run.pipeline else "–"
    verdict = escape(run.verdict, VERDICT_LIMIT)
    return f"| {verdict} | {commit} | {pipeline} | {run.time.astimezone(UTC):%Y-%m-%d %H:%M} |"


def verdict_of(report: str) -> str:
    """The plain text of the first line of the report's first heading or paragraph, cut to VERDICT_LIMIT."""
    for token in MarkdownIt("commonmark").parse(report):
        if token.type == "inline":
            return _plain(token)[:VERDICT_LIMIT]
    return ""


def _plain(inline: Token) -> str:
    words = []
    for child in inline.children or ():
        if child.type in ("softbreak", "hardbreak"):
            break
        if child.type != "html_inline":
            words.append(child.content)
    return " ".join("".join(words).split())


# ---- What is published ---------------------------------------------------------------------------------------


def read_report(path: Path) -> str:
    """The Markdown file's text, without blank lines around it.

    Raises UserError when it is missing, empty, not UTF-8 or too long for a note.
    """
    try:
        report = path.read_text(encoding="utf-8").strip("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `python -m ml.report.comment` first.") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a UTF-8 Markdown file: {error}") from None
    if not report.strip():
        raise UserError(f"{path} is empty. Run `python -m ml.report.comment` again.")
    if len(report) > REPORT_LIMIT:
        raise UserError(
            f"{path} has {len(report):,} characters, more than the {REPORT_LIMIT:,} that fit into a note "
            f"(GitLab's limit is {NOTE_LIMIT:,}, the rest is for the history). Shorten the report."
        )
    if OWN.search(report):
        raise UserError(
            f"{path} already has the hidden line of a published note. Publish what comment wrote."
        )
    for line in quick_actions(report):
        raise UserError(
            f"{path} has the line {line!r:.80}, which GitLab could carry out as a quick action. "
            "Nothing was published. Pass the value that it comes from through ml.report.escape."
        )
    return report


def quick_actions(report: str) -> Iterator[str]:
    """The lines that GitLab takes for commands such as `/merge`: those in a paragraph that start with a slash."""
    lines = report.split("\n")
    for token in MarkdownIt("commonmark").parse(report):
        if token.type == "paragraph_open" and token.map is not None:
            yield from (line for line in lines[slice(*token.map)] if re.match(r"/[A-Za-z]", line))


def manifest_path(report: Path) -> Path:
    """The list of pictures that the report made: reports/comment.pictures.json for reports/comment.md."""
    return report.with_suffix(".pictures.json")


def read_manifest(path: Path) -> list[str]:
    """A JSON list of at most PICTURES_LIMIT picture paths, relative to the report's folder."""
    try:
        return TypeAdapter(Annotated[list[str], Field(max_length=PICTURES_LIMIT)]).validate_json(
            path.read_bytes()
        )
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing. Run `python -m ml.report.comment`, or leave out --pictures."
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f'{path} is no list of pictures such as ["plots/a.png"]: {problem}.') from None


def read_picture(folder: Path, name: str) -> bytes:
    """The bytes of the picture `name`, a relative path, from inside `folder`, following no symbolic link.

    Raises UserError for any other path, a missing or special file, another kind of file, or one that is too big.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise UserError(
            f"Picture {name!r} is not a relative path inside {folder}. Correct the list of pictures."
        )
    if not name.lower().endswith(PICTURE_SUFFIXES):
        raise UserError(
            f"Picture {name!r} is none of {', '.join(PICTURE_SUFFIXES)}. Correct the list of pictures."
        )
    try:
        with _open_inside(folder, parts) as file:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UserError(
                    f"Picture {folder / name} is not a regular file. Correct the list of pictures."
                )
            with os.fdopen(file, "rb", closefd=False) as stream:
                content = stream.read(PICTURE_BYTES + 1)
    except FileNotFoundError:
        raise UserError(
            f"Picture {folder / name} is missing. Run `python -m ml.report.comment` again."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise UserError(
            f"Picture {folder / name} is behind a symbolic link or a file. Put the file itself there."
        ) from None
    if len(content) > PICTURE_BYTES:
        raise UserError(f"Picture {folder / name} has more than {PICTURE_BYTES:,} bytes. Make it smaller.")
    return content


@contextmanager
def _open_inside(folder: Path, parts: tuple[str, ...]) -> Iterator[int]:
    """A descriptor of folder/parts for reading; each is opened in its parent, so none can be swapped for a link."""
    opened = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in parts[:-1]:
            opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
        opened.append(os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1]))
        yield opened[-1]
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)


# A code span or fence, which stays as it is, or the target of a Markdown link or image, or of an HTML attribute.
LINK_TARGET = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+)(?s:.*?)^(?P=fence)|(?<!`)(?P<ticks>`+)(?!`)[^\n]*?(?<!`)(?P=ticks)(?!`))"
    r'|(?P<before>\]\(|\b(?:src|href)=")(?P<target>[^)"\s]+)',
    re.MULTILINE,
)


def relink(report: str, url_of: Callable[[str], str | None]) -> str:
    """Replace each link target outside code by what `url_of` gives for it; None leaves it."""

    def replaced(match: re.Match[str]) -> str:
        url = url_of(match["target"]) if match["target"] else None
        return match[0] if url is None else match["before"] + url

    return LINK_TARGET.sub(replaced, report)


# ---- GitLab --------------------------------------------------------------------------------------------------


class PatientAdapter(HTTPAdapter):
    """Sends requests until a deadline that all of them share.

    python-gitlab retries connection errors, 429 and 5xx, waiting as long as Retry-After says, in seconds only and
    without a bound. This adapter turns a date into seconds and gives up where the wait would pass the deadline.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.deadline = time.monotonic() + seconds

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        """Raises UserError when the deadline has passed, or will have before GitLab may be asked again."""
        left = self.seconds_left()
        if left <= 0:
            raise UserError(
                f"GitLab gave no lasting answer in time (last tried: {request.url}). Run the job again."
            )
        response = super().send(request, *args, **options | {"timeout": min(ATTEMPT_SECONDS, left)})
        response.headers.pop(
            "RateLimit-Reset", None
        )  # python-gitlab would wait for it without a bound as well
        asked = response.headers.get("Retry-After")
        if asked is not None:
            wait, left = _seconds(asked), self.seconds_left()
            if wait > left:
                raise UserError(
                    f"GitLab answered {response.status_code} and asks to wait {wait} s, with {left:.0f} s left "
                    f"({request.url}). Run the job again later."
                )
            response.headers["Retry-After"] = str(wait)
        return response

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def _seconds(retry_after: str) -> int:
    """Seconds from now, at least 0, of a Retry-After header: a number or a date in GMT; 1 for what is neither."""
    if retry_after.isdecimal():
        return int(retry_after)
    try:
        date = parsedate_to_datetime(retry_after).replace(tzinfo=UTC)
    except ValueError:
        return 1
    return max(0, math.ceil((date - datetime.now(UTC)).total_seconds()))


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


class Notes:
    """The notes of one merge request, as the token's own user may see and write them."""

    def __init__(self, target: Target, session: requests.Session) -> None:
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
        return not note.system and note.author["id"] == self.user_id and OWN.search(note.body) is not None

    def create(self, body: str) -> None:
        self.merge_request.notes.create({"body": body})

    def edit(self, note_id: int, change: Callable[[str], str]) -> None:
        """Replace the note's body, as it is at this moment, by `change` of it; a note that is gone stays gone."""
        with _gone_is_fine():
            note = self.merge_request.notes.get(note_id)
            note.body = change(note.body)
            note.save()

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


# ---- CML -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cml:
    """The `cml` command, called so that it can do no harm.

    `--publish=false`: the pictures are uploaded already, and CML would upload any other file that is linked, write
    the Markdown anew, and crash on Node 18 and later. CML finds its note by a watermark, a picture from a third
    party that it appends. That visible one goes away as soon as the note is read back; one in a hidden comment
    stays, for the next `update` to find.
    """

    command: str
    commit: str
    repo: str
    iid: int
    token: str = field(repr=False)

    def hide_watermark(self, body: str) -> str:
        """`body` with what `cml comment update` looks for, before the marker, so that `parse` takes it out again."""
        image = f'![](https://cml.dev/watermark.png#{self.commit} "CML watermark {WATERMARK_TITLE}")'
        marker = list(MARKER.finditer(body))[-1].start()
        return f"{body[:marker]}<!-- {image} -->\n\n{body[marker:]}"

    def reaches(self, own: list[ProjectMergeRequestNote], everything: list[ProjectMergeRequestNote]) -> bool:
        """Whether `update` would do right: of the newest notes it edits the oldest with a watermark, else creates."""
        marked = [note.id for note in everything[-CML_NEWEST:] if WATERMARK.search(note.body)]
        return marked == [note.id for note in own[:1]]

    def update(self, body: str, seconds: float) -> str | None:
        """Edit or create the note; None if that went well, else the last line of what CML said."""
        with tempfile.TemporaryDirectory(prefix="ml-report-") as folder:
            note = Path(folder, "note.md")
            note.write_text(body, encoding="utf-8")
            flags = ["--publish=false", f"--watermark-title={WATERMARK_TITLE}"]
            where = ["--driver=gitlab", f"--repo={self.repo}", f"--target=pr/{self.iid}"]
            command = [self.command, "comment", "update", *flags, *where, str(note)]
            environment = self._environment(folder)
            try:
                done = subprocess.run(
                    command, cwd=folder, env=environment, timeout=seconds, capture_output=True, text=True
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                return type(error).__name__
        if done.returncode == 0:
            return None
        said = f"{done.stdout}\n{done.stderr}".replace(self.token, "[token]").split("\n")
        return next((line.strip() for line in reversed(said) if line.strip()), f"exit code {done.returncode}")

    def _environment(self, folder: str) -> dict[str, str]:
        """This process's environment without what turns CML to another host or sets its flags."""
        foreign = ("CML_", "GITHUB_", "BITBUCKET_", "GIT_", "repo_token")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | {
            "REPO_TOKEN": self.token,
            "CI_COMMIT_SHA": self.commit,
            "NODE_OPTIONS": "--no-experimental-fetch",
            "ITERATIVE_DO_NOT_TRACK": "1",
            "GIT_CONFIG_GLOBAL": str(Path(folder, "gitconfig")),  # CML adds to the global one
        }


def find_cml(settings: Settings, target: Target, project_url: str) -> Cml | None:
    """The command on PATH, where the commit is known: a watermark has no place for anything else to find it by."""
    command = shutil.which("cml")
    if command is None or settings.ci_commit_sha is None:
        return None
    repo = settings.ci_merge_request_project_url or project_url
    return Cml(command, settings.ci_commit_sha, repo, target.iid, target.token)


# ---- Publishing ----------------------------------------------------------------------------------------------


def publish(
    report: str,
    pictures: Mapping[str, bytes],
    settings: Settings,
    *,
    seconds: float = PUBLISH_SECONDS,
    settle_seconds: float = SETTLE_SECONDS,
) -> str:
    """Make `report` the merge request's one report note; `pictures` are the files that its links may name.

    Returns one sentence on what was done, by which publisher, and where. Raises UserError when GitLab refuses.
    """
    target = find_target(settings)
    if isinstance(target, str):
        return f"Wrote only the file, as {target}."
    adapter = PatientAdapter(seconds)
    with explained_errors(target), requests.Session() as session:
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        notes = Notes(target, session)
        report = upload_pictures(report.strip("\n"), pictures, notes)
        run = Run(
            pipeline=settings.ci_pipeline_id or 0,
            job=settings.ci_job_id or 0,
            time=datetime.now(UTC).replace(microsecond=0),
            commit=settings.ci_commit_sha or "",
            verdict=verdict_of(report),
        )
        cml = find_cml(settings, target, notes.project_url)
        return converge(Content(report, (run,)), notes, cml, adapter, settle_seconds)


def upload_pictures(report: str, pictures: Mapping[str, bytes], notes: Notes) -> str:
    """Upload each picture that the report links, once, and return the report with the new addresses."""
    uploaded: dict[str, str] = {}  # sha256 to address

    def url_of(link: str) -> str | None:
        content = pictures.get(link)
        if content is None:
            return None
        digest = hashlib.sha256(content).hexdigest()
        if digest not in uploaded:
            uploaded[digest] = notes.upload(PurePosixPath(link).name, content)
        return uploaded[digest]

    return relink(report, url_of)


def converge(
    mine: Content, notes: Notes, cml: Cml | None, adapter: PatientAdapter, settle_seconds: float
) -> str:
    """Write and read back until one note of ours is left, it holds `mine`, and it still does a moment later."""
    did: list[str] = []
    confirmed = False
    for _ in range(ROUNDS):
        everything = notes.all()
        own = sorted(filter(notes.is_own, everything), key=lambda note: note.id)
        if not is_settled(own, mine):
            did += write(mine, own, everything, notes, cml, adapter, first=not did)
            confirmed = False
        elif confirmed:
            return f"{'; '.join(dict.fromkeys(did))}: {notes.url}#note_{own[0].id}"
        else:
            confirmed = True
            time.sleep(max(0.0, min(settle_seconds, adapter.seconds_left())))
    raise UserError(
        f"Other publishers kept changing the report note of {notes.url} for {ROUNDS} rounds. "
        "Give the report job a resource_group, so that one runs at a time."
    )


def is_settled(own: list[ProjectMergeRequestNote], mine: Content) -> bool:
    """Whether there is one note, with `mine` in it or already dropped from it as too old, and no CML watermark."""
    if len(own) != 1 or WATERMARK.search(WATERMARK_COMMENT.sub("", own[0].body)):
        return False
    content = parse(own[0].body)
    if content is None:
        return False
    run = mine.runs[0]
    return run in content.runs or (len(content.runs) == RUNS_KEPT and run.order < content.runs[-1].order)


def write(
    mine: Content,
    own: list[ProjectMergeRequestNote],
    everything: list[ProjectMergeRequestNote],
    notes: Notes,
    cml: Cml | None,
    adapter: PatientAdapter,
    first: bool,
) -> list[str]:
    """Bring `mine` and all that our notes hold into the oldest of them, or a new one; remove the others.

    `own` are our notes and `everything` all notes, oldest first. CML may do it the first time only: what is left
    to mend after that it cannot. Returns what was done, as parts of a sentence.
    """
    found = [content for note in own if (content := parse(note.body))]

    def composed(*more: Content) -> str:
        body = render(merge([mine, *found, *more]), notes.project_url)
        return cml.hide_watermark(body) if cml else body

    did = []
    verb = "edited" if own else "created"
    if first and cml is not None and cml.reaches(own, everything):
        failure = cml.update(composed(), min(CML_SECONDS, adapter.seconds_left()))
        if failure is None:
            # The next round removes its watermark, and duplicates if there are any.
            return [f"CML {verb} the report note"]
        did.append(f"CML failed ({failure})")
    if own:
        notes.edit(own[0].id, lambda body: composed(*filter(None, [parse(body)])))
    else:
        notes.create(composed())
    did.append(f"python-gitlab {verb} the report note" if first else "python-gitlab tidied it")
    for extra in own[1:]:
        notes.delete(extra.id)
        did.append("python-gitlab removed a duplicate")
    return did


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.report.publish",
        description="Publish a Markdown file as the merge request's report note.",
    )
    parser.add_argument(
        "report", type=Path, nargs="?", default=COMMENT, help=f"the Markdown file ({COMMENT})"
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        help="JSON list of the pictures that the report made, relative to its folder (REPORT.pictures.json)",
    )
    arguments = parser.parse_args()
    report = read_report(arguments.report)
    manifest = arguments.pictures or manifest_path(arguments.report)
    names = read_manifest(manifest) if arguments.pictures or manifest.exists() else []
    pictures = {name: read_picture(arguments.report.parent, name) for name in names}
    print(publish(report, pictures, load_settings()))


if __name__ == "__main__":
    exit_on_user_error(main)
