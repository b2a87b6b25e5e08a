"""What the emulated GitLab knows: projects, merge requests, notes, uploads and the rest, as plain dataclasses.

Field names are those of GitLab's REST API documentation (doc/api/*.md). Every access happens while holding `lock`,
which the HTTP side and the tests share.
"""

import secrets
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

Scope = Literal["api", "read_api", "write_repository", "job"]
MergeMethod = Literal["merge", "ff"]
Json = dict[str, Any]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class User:
    id: int
    username: str
    name: str


@dataclass(frozen=True)
class Token:
    """Scope `api`, `read_api` or `write_repository` of a project access token, or a CI_JOB_TOKEN ("job")."""

    value: str
    user: User
    scope: Scope
    project_ids: frozenset[int]
    access_level: int = 20  # 10 guest, 20 reporter, 30 developer, 40 maintainer


@dataclass
class Note:
    id: int
    body: str
    author: User
    system: bool
    created_at: str
    updated_at: str


@dataclass
class MergeRequest:
    id: int
    iid: int
    title: str
    source_branch: str
    target_branch: str
    sha: str
    source_project_id: int
    author: User
    description: str = ""
    state: str = "opened"
    draft: bool = False
    labels: list[str] = field(default_factory=list)
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)
    merged_at: str | None = None
    merge_commit_sha: str | None = None
    squash_commit_sha: str | None = None
    commits: list[str] = field(
        default_factory=list
    )  # hashes, those of its diff's versions; kept after the merge
    notes: dict[int, Note] = field(default_factory=dict)


@dataclass
class Job:
    id: int
    name: str
    status: str  # success, failed, …
    artifacts: dict[str, bytes] = field(default_factory=dict)  # by path
    trace: str = ""  # its log


@dataclass(frozen=True)
class Push:
    """What a push by HTTP did to one branch or tag; `before` or `after` is all zeros for a new or deleted one."""

    ref: str
    before: str
    after: str
    username: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Upload:
    id: int
    secret: str
    filename: str
    content: bytes


@dataclass
class Project:
    id: int
    path: str  # with namespace: g/proj
    default_branch: str = "main"
    repository: Path | None = None  # bare; tags, commits and merges are git's own where there is one
    merge_method: MergeMethod = "merge"
    protected: dict[str, int] = field(default_factory=lambda: {"main": 40})  # branches: level that may push
    job_token_may_push: bool = False  # the project setting "Allow Git push requests to the repository"
    pushes: list[Push] = field(default_factory=list)
    trigger_token: str = field(default_factory=lambda: f"glptt-{secrets.token_hex(20)}")
    merge_requests: dict[int, MergeRequest] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)  # by secret
    labels: dict[str, Json] = field(default_factory=dict)
    commit_comments: dict[str, list[Json]] = field(default_factory=dict)  # by sha
    statuses: dict[str, list[Json]] = field(default_factory=dict)  # by sha
    tags: dict[str, Json] = field(default_factory=dict)
    releases: dict[str, Json] = field(default_factory=dict)  # by tag name
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)  # by branch and path
    commits: list[Json] = field(default_factory=list)
    pipelines: list[Json] = field(default_factory=list)  # oldest first
    jobs: dict[int, list[Job]] = field(default_factory=dict)  # by the pipeline's id
    registry: dict[int, Json] = field(default_factory=dict)  # repositories, each with its tags
    packages: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)  # by name and version

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class QuickAction:
    """A command in a note that GitLab would have carried out, and who wrote it where."""

    project_id: int
    merge_request_iid: int
    author: str
    command: str
    argument: str


class State:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.projects: dict[int, Project] = {}
        self.tokens: dict[str, Token] = {}
        self.quick_actions: list[QuickAction] = []
        self.requests: list[Json] = []  # method, path, status: what a test may look at afterwards
        self._last_id = 0

    def new_id(self) -> int:
        """Ids are unique over all kinds of objects; GitLab's are so within a kind."""
        self._last_id += 1
        return self._last_id

    def add_project(self, path: str, project_id: int | None = None) -> Project:
        with self.lock:
            project = Project(project_id or self.new_id(), path)
            self.projects[project.id] = project
            return project

    def add_token(
        self, project: Project, scope: Scope, access_level: int = 20, name: str = "report", value: str = ""
    ) -> Token:
        """A project access token comes with a bot user of its own; a job token acts as the person who pushed."""
        with self.lock:
            user_id = self.new_id()
            bot = User(user_id, f"project_{project.id}_bot_{secrets.token_hex(16)}", name)
            user = User(user_id, f"dev{user_id}", "Dev Eloper") if scope == "job" else bot
            prefix = "glcbt-64_" if scope == "job" else "glpat-"
            value = value or prefix + secrets.token_urlsafe(15)
            self.tokens[value] = Token(value, user, scope, frozenset({project.id}), access_level)
            return self.tokens[value]

    def add_merge_request(self, project: Project, **fields: Any) -> MergeRequest:
        with self.lock:
            iid = fields.pop("iid", max(project.merge_requests, default=0) + 1)
            author = fields.pop("author", None) or User(self.new_id(), "alice", "Alice")
            defaults = {
                "title": "Train longer",
                "source_branch": f"experiment-{iid}",
                "target_branch": project.default_branch,
                "sha": secrets.token_hex(20),
                "source_project_id": project.id,
            }
            merge_request = MergeRequest(self.new_id(), iid, author=author, **(defaults | fields))
            project.merge_requests[iid] = merge_request
            return merge_request

    def add_pipeline(
        self,
        project: Project,
        ref: str,
        sha: str,
        status: str,
        source: str,
        jobs: dict[str, dict[str, bytes]],
    ) -> Json:
        """`jobs`: the artifacts of each by path; all of them ended with the pipeline's status."""
        with self.lock:
            pipeline_id = self.new_id()
            pipeline = {
                "id": pipeline_id,
                "iid": len(project.pipelines) + 1,
                "project_id": project.id,
                "ref": ref,
                "sha": sha,
                "status": status,
                "source": source,
                "created_at": now(),
                "updated_at": now(),
            }
            project.pipelines.append(pipeline)
            ended = [Job(self.new_id(), name, status, dict(files)) for name, files in jobs.items()]
            project.jobs[pipeline_id] = ended
            return pipeline

    def add_note(self, merge_request: MergeRequest, body: str, author: User, system: bool = False) -> Note:
        with self.lock:
            note = Note(self.new_id(), body, author, system, now(), now())
            merge_request.notes[note.id] = note
            return note
