"""Who sends a request, and whether that token may do it: the rows of rights.py, applied.

PRIVATE-TOKEN and Bearer carry access tokens, JOB-TOKEN a CI_JOB_TOKEN, which few routes accept: 401 elsewhere, as
GitLab does not recognise it there (doc/ci/jobs/ci_job_token.md). A read_api token that writes gets 403
`insufficient_scope`, a token past its time 401 `invalid_token` (lib/api/api_guard.rb). Without a token a private
project is not even there: 404.
"""

from starlette.requests import Request

from tests.gitlab_emulator.rights import TIERS, number
from tests.gitlab_emulator.routing import ApiError, Route, not_found
from tests.gitlab_emulator.state import Project, State, Token

UNAUTHORIZED = ApiError(401, "401 Unauthorized")
FORBIDDEN = ApiError(403, "403 Forbidden")


def authenticate(request: Request, state: State, route: Route) -> Token | None:
    """The token of the request; None without one. Raises ApiError for one that is unknown or not accepted here."""
    headers = request.headers
    access = headers.get("private-token") or request.query_params.get("private_token")
    if access is None and headers.get("authorization", "").startswith("Bearer "):
        access = headers["authorization"].removeprefix("Bearer ")
    job = headers.get("job-token") or request.query_params.get("job_token")
    if route.right.public or (access is None and job is None):
        return None
    token = state.tokens.get(access or job or "")
    if token is None or token.is_job != (access is None):
        raise UNAUTHORIZED
    if token.is_job:
        since = route.right.job_token
        if since is None or number(state.version) < number(since):
            raise UNAUTHORIZED
        return token
    for ended, told in (
        (token.revoked, "Token was revoked. You have to re-authorize from the user."),
        (token.expired, "Token is expired. You can either do re-authorization or token refresh."),
    ):
        if ended:
            raise ApiError(401, {"error": "invalid_token", "error_description": told})
    reads = route.method in ("GET", "HEAD")
    accepted = {"api"} | ({"read_api"} if reads else set()) | route.right.scopes
    if not token.scopes & accepted:
        raise insufficient(" ".join(sorted(accepted)))
    return token


def insufficient(scope: str) -> ApiError:
    told = "The request requires higher privileges than provided by the access token."
    return ApiError(403, {"error": "insufficient_scope", "error_description": told, "scope": scope})


def authorize(state: State, project: Project, token: Token, route: Route) -> None:
    """Raises ApiError unless the token's role, and the server's tier for a job token, allow the route."""
    right = route.right
    if token.is_job and TIERS.index(state.tier) < TIERS.index(right.job_token_tier):
        raise not_found("Project")
    if token.access_level < right.role:
        raise not_found() if right.hidden else FORBIDDEN
    # ProjectPolicy: `releases_disabled`, `packages_disabled` take the rights from every role
    if any(f"/projects/:id/{feature}" in route.path for feature in project.features_off):
        raise FORBIDDEN


def find_project(state: State, name: str, token: Token) -> Project:
    """The project by number or full path, if the token may see it; another's private project is a 404."""
    project = state.find_project(name)
    if project is None or project.id not in token.project_ids:
        raise not_found("Project")
    return project
