"""What the emulated GitLab knows: projects, merge requests, notes, uploads and the rest, as plain dataclasses.

Field names are those of GitLab's REST API documentation (doc/api/*.md). Every access happens while holding `lock`,
which the HTTP side and the tests share.
"""

import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from tests.gitlab_emulator.protection import BranchRule, ContainerTagRule, TagRule
from tests.gitlab_emulator.rights import OLDEST, REPORTER, TIERS, Tier, number

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
    """A project or personal access token with its scopes, or a CI_JOB_TOKEN: scope `job`, the role of its user.

    `access_level` is the role of the token's user in its projects: 10 guest, 20 reporter, 30 developer, 40 maintainer,
    50 owner. A token ends at the start of its day `expires_at` (UTC).
    """

    id: int
    value: str
    user: User
    scopes: frozenset[str]
    project_ids: frozenset[int]
    access_level: int = REPORTER
    name: str = "report"
    expires_at: date | None = None
    revoked: bool = False

    @property
    def is_job(self) -> bool:
        return "job" in self.scopes

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC).date()


@dataclass
class Note:
    id: int
    body: str
    author: User
    system: bool
    created_at: str
    updated_at: str


@dataclass
class Issue:
    id: int
    iid: int
    title: str
    author: User
    description: str = ""
    state: str = "opened"
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)


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
    # hashes, those of its diff's versions; kept after the merge
    commits: list[str] = field(default_factory=list)
    notes: dict[int, Note] = field(default_factory=dict)


@dataclass
class Job:
    id: int
    name: str
    status: str  # success, failed, …
    artifacts: dict[str, bytes] = field(default_factory=dict)  # by path
    trace: str = ""  # what its commands wrote; traces.as_sent makes the log of it
    failure_reason: str = "script_failure"  # of a failed one
    artifacts_expire_at: datetime | None = None  # with time zone; None: kept
    # of one that a runner is to run: its part of the configuration, and its CI_JOB_TOKEN while it runs
    plan: Json = field(default_factory=dict)
    token: str = ""

    @property
    def kept(self) -> dict[str, bytes]:
        """Its artifacts, none of which is left once they have expired."""
        gone = self.artifacts_expire_at is not None and self.artifacts_expire_at <= datetime.now(UTC)
        return {} if gone else self.artifacts


@dataclass(frozen=True)
class Push:
    """What a push by HTTP did to one branch or tag; `before` or `after` is all zeros for a new or deleted one."""

    ref: str
    before: str
    after: str
    username: str
    options: tuple[str, ...]
    by_job_token: bool = False


@dataclass(frozen=True)
class Upload:
    id: int
    secret: str
    filename: str
    content: bytes


@dataclass(frozen=True)
class PackageFile:
    id: int
    name: str
    content: bytes


@dataclass
class Package:
    """A generic package. Two files may have one name: the newest is served."""

    id: int
    files: list[PackageFile] = field(default_factory=list)  # oldest first

    @property
    def newest(self) -> dict[str, bytes]:
        """What is served, by name."""
        return {file.name: file.content for file in self.files}

    def __getitem__(self, name: str) -> bytes:
        return self.newest[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.newest)


@dataclass(frozen=True)
class Variable:
    """A line of Settings → CI/CD → Variables."""

    key: str
    value: str
    scope: str = "*"  # of the environments whose jobs see it
    protected: bool = False
    masked: bool = False
    hidden: bool = False
    raw: bool = False
    kind: str = "env_var"


@dataclass
class Project:
    id: int
    path: str  # with namespace: g/proj
    default_branch: str = "main"
    ci_config_path: str = ".gitlab-ci.yml"
    repository: Path | None = None  # bare; tags, commits and merges are git's own where there is one
    merge_method: MergeMethod = "merge"
    protected_branches: dict[str, BranchRule] = field(default_factory=dict)  # by name or pattern
    protected_tags: dict[str, TagRule] = field(default_factory=dict)  # by name or pattern
    protected_container_tags: list[ContainerTagRule] = field(default_factory=list)
    pipeline_variables_role: str = "developer"  # or no_one_allowed, maintainer, owner: who may pass variables
    variables: list[Variable] = field(default_factory=list)
    members: dict[int, int] = field(default_factory=dict)  # by user: the role
    invited: list[int] = field(default_factory=list)  # of them, who is a member by another group
    features_off: list[str] = field(default_factory=list)  # of packages, releases
    job_token_may_push: bool = False  # the project setting "Allow Git push requests to the repository"
    pushes: list[Push] = field(default_factory=list)
    runners: list[Any] = field(default_factory=list)  # runners.Runner
    registration_token: str = field(default_factory=lambda: f"GR1348941{secrets.token_urlsafe(15)}")
    trigger_token: str = field(default_factory=lambda: f"glptt-{secrets.token_hex(20)}")
    issues: dict[int, Issue] = field(default_factory=dict)
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
    # generic ones, by name and version
    packages: dict[tuple[str, str], Package] = field(default_factory=dict)
    duplicate_packages: bool = True  # the group's setting "Allow duplicates" of generic packages

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
    """`runner`: the version of gitlab-runner that jobs ran with; newer ones write the time into each line of a log."""

    def __init__(self, tier: Tier = "free", version: str = "18.6", runner: str = "18.7") -> None:
        if tier not in TIERS or number(version) < number(OLDEST):
            raise ValueError(f"no GitLab {version} of tier {tier}: {OLDEST} or newer, {', '.join(TIERS)}")
        self.tier, self.version, self.runner = tier, version, runner
        self.lock = threading.RLock()
        self.projects: dict[int, Project] = {}
        self.tokens: dict[str, Token] = {}
        self.quick_actions: list[QuickAction] = []
        self.requests: list[Json] = []  # method, path, status: what a test may look at afterwards
        # called while the lock is held, with each pipeline that starts by itself or by the API: must not wait
        self.on_pipeline: Callable[[Project, Json], None] | None = None
        self._last_id = 0

    def new_id(self) -> int:
        """Ids are unique over all kinds of objects; GitLab's are so within a kind."""
        self._last_id += 1
        return self._last_id

    def add_project(self, path: str, project_id: int | None = None) -> Project:
        """Its default branch is protected as GitLab does it: only Maintainers push and merge."""
        with self.lock:
            project = Project(project_id or self.new_id(), path)
            project.protected_branches[project.default_branch] = BranchRule()
            self.projects[project.id] = project
            return project

    def find_project(self, name: str) -> Project | None:
        """By number or by full path."""
        for project in self.projects.values():
            if name in (str(project.id), project.path):
                return project
        return None

    def add_token(
        self,
        project: Project,
        scopes: str | Iterable[str],
        access_level: int = REPORTER,
        name: str = "report",
        value: str = "",
        *,
        expires_at: date | None = None,
        user: User | None = None,
    ) -> Token:
        """An access token of `scopes`, or with scope `job` a CI_JOB_TOKEN.

        A project access token comes with a bot user of its own, and ends within a year; a job token acts as the
        person who started the pipeline. With `user` it is that member's personal token.
        """
        with self.lock:
            scopes = frozenset({scopes} if isinstance(scopes, str) else scopes)
            is_job, token_id = scopes == {"job"}, self.new_id()
            bot = User(token_id, f"project_{project.id}_bot_{secrets.token_hex(16)}", name)
            user = user or (User(token_id, f"dev{token_id}", "Dev Eloper") if is_job else bot)
            value = value or ("glcbt-64_" if is_job else "glpat-") + secrets.token_urlsafe(15)
            expires_at = expires_at or (None if is_job else datetime.now(UTC).date() + timedelta(days=364))
            project.members[user.id] = access_level
            token = Token(
                token_id, value, user, scopes, frozenset({project.id}), access_level, name, expires_at
            )
            self.tokens[value] = token
            return token

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
        *,
        variables: dict[str, str] | None = None,
        user: User | None = None,
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
                "variables": variables or {},
                "user": user,
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
