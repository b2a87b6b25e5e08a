"""Who sends a request, and whether that token may do it.

PRIVATE-TOKEN and Bearer carry access tokens, JOB-TOKEN a CI_JOB_TOKEN, which few routes accept: 401 elsewhere, as
GitLab does not recognise it there (doc/ci/jobs/ci_job_token.md). A read_api token that writes gets 403
`insufficient_scope` (doc/api/rest/authentication.md). Without a token a private project is not even there: 404.
"""

from starlette.requests import Request

from tests.gitlab_emulator.routing import ApiError, Route, not_found
from tests.gitlab_emulator.state import Project, State, Token

UNAUTHORIZED = ApiError(401, "401 Unauthorized")


def authenticate(request: Request, state: State, route: Route) -> Token | None:
    """The token of the request; None without one. Raises ApiError for one that is unknown or not accepted here."""
    headers = request.headers
    access = headers.get("private-token") or request.query_params.get("private_token")
    if access is None and headers.get("authorization", "").startswith("Bearer "):
        access = headers["authorization"].removeprefix("Bearer ")
    job = headers.get("job-token") or request.query_params.get("job_token")
    if access is None and job is None:
        return None
    token = state.tokens.get(access or job or "")
    if (
        token is None
        or (token.scope == "job") != (access is None)
        or (token.scope == "job" and not route.job_token)
    ):
        raise UNAUTHORIZED
    if token.scope == "write_repository":
        raise insufficient("api read_api")
    if token.scope == "read_api" and route.method not in ("GET", "HEAD"):
        raise insufficient("api")
    return token


def insufficient(scope: str) -> ApiError:
    told = "The request requires higher privileges than provided by the access token."
    return ApiError(403, {"error": "insufficient_scope", "error_description": told, "scope": scope})


def require_user(token: Token | None, method: str) -> None:
    if token is None:
        raise UNAUTHORIZED if method not in ("GET", "HEAD") else not_found("Project")


def find_project(state: State, name: str, token: Token | None) -> Project:
    """The project by number or full path, if the token may see it; another's private project is a 404."""
    if name.isdecimal():
        project = state.projects.get(int(name))
    else:
        project = next((found for found in state.projects.values() if found.path == name), None)
    if project is None or token is None or project.id not in token.project_ids:
        raise not_found("Project")
    return project
