"""Who may do what: one row per route, read in GitLab's policies and API classes.

| column | read in |
|---|---|
| `role` | app/policies/project_policy.rb, issuable_policy.rb; doc/user/permissions.md |
| `job_token` | `job_token_allowed` of lib/api/**/*.rb; doc/ci/jobs/ci_job_token.md, fine_grained_permissions.md |
| `job_token_tier` | EE::API::Ci::JobArtifacts, which asks for the licensed feature `cross_project_pipelines` |
| `scopes` | `allow_access_with_scope` of lib/api/**/*.rb; Gitlab::Auth#abilities_for_scopes for git |

A route that is not in the table cannot be registered, so a new one has to say who may use it.
"""

from dataclasses import dataclass
from typing import Literal

Tier = Literal["free", "premium", "ultimate"]
TIERS: tuple[Tier, ...] = ("free", "premium", "ultimate")

NO_ACCESS, GUEST, REPORTER, DEVELOPER, MAINTAINER, OWNER = 0, 10, 20, 30, 40, 50
ROLES = {
    NO_ACCESS: "No one",
    GUEST: "Guest",
    REPORTER: "Reporter",
    DEVELOPER: "Developers + Maintainers",
    MAINTAINER: "Maintainers",
    OWNER: "Owner",
}
OLDEST = "17.2"
# GitLab 17.9's list of what a job token may do has neither merge requests nor pipelines; 19.2's has them. The version
# between is not documented, so the emulator is strict.
READS_OF_JOB_TOKEN = "19.0"
SCOPES = (
    "api",
    "read_api",
    "read_user",
    "read_repository",
    "write_repository",
    "read_registry",
    "write_registry",
    "create_runner",
    "manage_runner",
    "self_rotate",
)
ANY_SCOPE = frozenset(SCOPES)


@dataclass(frozen=True)
class Right:
    """What a request needs. `role`: the lowest; GUEST stands for "sees the project at all".

    `job_token`: the version from which CI_JOB_TOKEN is taken, None where it never is: 401, as on an unknown token.
    `scopes`: which do besides `api`, and `read_api` to read. `hidden`: 404 and not 403 for a role too low.
    `public`: no token is needed in a header.
    """

    role: int = GUEST
    job_token: str | None = None
    job_token_tier: Tier = "free"
    scopes: frozenset[str] = frozenset()
    hidden: bool = False
    public: bool = False


def _rows() -> dict[tuple[str, str], Right]:
    everybody = Right(scopes=ANY_SCOPE)
    reads_user = Right(scopes=frozenset({"read_user"}))
    reads_code = Right(REPORTER, scopes=frozenset({"read_repository"}))
    artifacts = Right(REPORTER, OLDEST, "premium")
    by_job, develops_by_job = Right(REPORTER, OLDEST), Right(DEVELOPER, OLDEST)
    guest_by_job = Right(GUEST, OLDEST)
    newer = Right(REPORTER, READS_OF_JOB_TOKEN)
    merge_request = Right(REPORTER, READS_OF_JOB_TOKEN, hidden=True)
    project, runner = "/projects/:id", Right(public=True)
    mine, notes = f"{project}/merge_requests/:iid", f"{project}/merge_requests/:iid/notes"
    commit, tags = f"{project}/repository/commits/:sha", f"{project}/repository/tags"
    releases, package = f"{project}/releases", f"{project}/packages/generic/:name/:version/:file"
    links = f"{releases}/:tag/assets/links"
    return {
        ("GET", "/version"): reads_user,
        ("GET", "/metadata"): reads_user,
        ("GET", "/user"): reads_user,
        ("GET", "/users"): reads_user,
        ("GET", "/job"): guest_by_job,
        ("GET", "/personal_access_tokens/self"): everybody,
        # ---- the project
        ("GET", "/projects"): Right(),
        ("GET", project): Right(),
        ("PUT", project): Right(MAINTAINER),
        ("GET", f"{project}/members/all"): Right(),
        ("GET", f"{project}/members/all/:user_id"): Right(),
        ("GET", f"{project}/labels"): Right(),
        ("POST", f"{project}/labels"): Right(REPORTER),
        ("GET", f"{project}/issues"): Right(),
        ("POST", f"{project}/issues"): Right(),
        ("GET", f"{project}/issues/:issue_iid"): Right(),
        ("PUT", f"{project}/issues/:issue_iid"): Right(),
        ("POST", f"{project}/issues/:issue_iid/notes"): Right(),
        ("POST", f"{project}/uploads"): Right(),
        ("GET", f"{project}/variables"): Right(MAINTAINER),
        ("POST", f"{project}/variables"): Right(MAINTAINER),
        ("GET", f"{project}/variables/:key"): Right(MAINTAINER),
        ("PUT", f"{project}/variables/:key"): Right(MAINTAINER),
        ("DELETE", f"{project}/variables/:key"): Right(MAINTAINER),
        ("GET", f"{project}/protected_branches"): Right(MAINTAINER),
        ("GET", f"{project}/protected_branches/:name"): Right(MAINTAINER),
        ("POST", f"{project}/protected_branches"): Right(MAINTAINER),
        ("DELETE", f"{project}/protected_branches/:name"): Right(MAINTAINER),
        ("GET", f"{project}/protected_tags"): Right(MAINTAINER),
        ("GET", f"{project}/protected_tags/:name"): Right(MAINTAINER),
        ("POST", f"{project}/protected_tags"): Right(MAINTAINER),
        ("DELETE", f"{project}/protected_tags/:name"): Right(MAINTAINER),
        ("GET", f"{project}/registry/protection/tag/rules"): Right(MAINTAINER),
        ("POST", f"{project}/registry/protection/tag/rules"): Right(MAINTAINER),
        # ---- merge requests
        ("GET", f"{project}/merge_requests"): newer,
        ("POST", f"{project}/merge_requests"): Right(DEVELOPER),
        ("GET", mine): merge_request,
        ("PUT", mine): Right(REPORTER, hidden=True),
        ("PUT", f"{mine}/merge"): Right(REPORTER, hidden=True),
        ("GET", f"{mine}/closes_issues"): Right(REPORTER, hidden=True),
        ("GET", f"{mine}/commits"): Right(REPORTER, hidden=True),
        ("GET", f"{mine}/pipelines"): Right(REPORTER, hidden=True),
        ("POST", f"{mine}/pipelines"): Right(DEVELOPER),
        ("GET", notes): Right(REPORTER, hidden=True),
        ("POST", notes): Right(REPORTER, hidden=True),
        ("GET", f"{notes}/:note_id"): Right(REPORTER, hidden=True),
        ("PUT", f"{notes}/:note_id"): Right(REPORTER, hidden=True),
        ("DELETE", f"{notes}/:note_id"): Right(REPORTER, hidden=True),
        # ---- the repository
        ("GET", commit): newer,
        ("GET", f"{commit}/merge_requests"): Right(REPORTER),
        ("GET", f"{commit}/comments"): Right(REPORTER),
        ("POST", f"{commit}/comments"): Right(REPORTER),
        ("GET", f"{commit}/statuses"): Right(REPORTER),
        ("POST", f"{project}/statuses/:sha"): Right(DEVELOPER),
        ("GET", f"{project}/repository/branches"): Right(REPORTER),
        ("POST", f"{project}/repository/branches"): Right(DEVELOPER),
        ("GET", f"{project}/repository/branches/*branch"): Right(REPORTER),
        ("DELETE", f"{project}/repository/branches/*branch"): Right(DEVELOPER),
        ("GET", f"{project}/repository/tree"): reads_code,
        ("GET", f"{project}/repository/files/:path/raw"): reads_code,
        ("GET", f"{project}/repository/files/:path"): reads_code,
        ("POST", f"{project}/repository/files/:path"): Right(DEVELOPER),
        ("PUT", f"{project}/repository/files/:path"): Right(DEVELOPER),
        ("GET", tags): Right(REPORTER),
        ("POST", tags): Right(DEVELOPER),
        ("GET", f"{tags}/:tag"): Right(REPORTER),
        ("DELETE", f"{tags}/:tag"): Right(DEVELOPER),
        # ---- releases: those of a protected tag ask for the right to create it, see releases.py
        ("GET", releases): guest_by_job,
        ("POST", releases): develops_by_job,
        ("GET", f"{releases}/:tag"): guest_by_job,
        ("PUT", f"{releases}/:tag"): develops_by_job,
        ("DELETE", f"{releases}/:tag"): develops_by_job,
        ("GET", links): guest_by_job,
        ("POST", links): develops_by_job,
        ("PUT", f"{links}/:link_id"): develops_by_job,
        ("DELETE", f"{links}/:link_id"): develops_by_job,
        # ---- pipelines and jobs
        ("GET", f"{project}/pipelines"): newer,
        ("POST", f"{project}/pipeline"): Right(DEVELOPER),
        ("POST", f"{project}/trigger/pipeline"): Right(public=True),
        ("GET", f"{project}/pipelines/:pipeline_id"): newer,
        ("GET", f"{project}/pipelines/:pipeline_id/jobs"): newer,
        ("GET", f"{project}/pipelines/:pipeline_id/variables"): Right(DEVELOPER),
        ("GET", f"{project}/jobs/:job_id"): Right(REPORTER),
        ("GET", f"{project}/jobs/:job_id/trace"): Right(REPORTER),
        ("GET", f"{project}/jobs/:job_id/artifacts"): artifacts,
        ("GET", f"{project}/jobs/:job_id/artifacts/*path"): artifacts,
        ("GET", f"{project}/jobs/artifacts/*ref/download"): artifacts,
        ("GET", f"{project}/jobs/artifacts/*ref/raw/*path"): artifacts,
        ("POST", f"{project}/ci/lint"): Right(DEVELOPER),
        # ---- packages and images
        ("GET", f"{project}/registry/repositories"): by_job,
        ("GET", f"{project}/registry/repositories/:repository_id/tags"): by_job,
        ("DELETE", f"{project}/registry/repositories/:repository_id/tags/:name"): develops_by_job,
        ("PUT", package): develops_by_job,
        ("GET", package): by_job,
        ("GET", f"{project}/packages"): by_job,
        ("GET", f"{project}/packages/:package_id/package_files"): by_job,
        # ---- the runner's own API: the tokens of runners and jobs are in the body or in a header of their own
        ("POST", "/runners"): runner,
        ("DELETE", "/runners"): runner,
        ("POST", "/runners/verify"): runner,
        ("POST", "/jobs/request"): runner,
        ("PUT", "/jobs/:job_id"): runner,
        ("PATCH", "/jobs/:job_id/trace"): runner,
        ("POST", "/jobs/:job_id/artifacts"): runner,
        ("GET", "/jobs/:job_id/artifacts"): runner,
        ("PUT", f"{project}/packages/ml_models/:version_id/files/*path"): develops_by_job,
        ("GET", f"{project}/packages/ml_models/:version_id/files/*path"): by_job,
    }


RIGHTS = _rows()
# Their writes ask for Developer and answer 401 (lib/api/ml/mlflow/api_helpers.rb): mlflow.py checks that.
MLFLOW = "/projects/:id/ml/mlflow/"


def right(method: str, path: str) -> Right:
    """Raises KeyError for a route without a row."""
    return Right(REPORTER) if path.startswith(MLFLOW) else RIGHTS[method, path]


def number(version: str) -> tuple[int, int]:
    """(18, 6) of "18.6"."""
    major, _, minor = version.partition(".")
    return int(major), int(minor)
