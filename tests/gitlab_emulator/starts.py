"""Which pipelines start by themselves, and which are skipped: after a push, a merge, a new tag or merge request.

Read in Git::BaseHooksService, Gitlab::Ci::Pipeline::Chain::{Skip,Config,Validate} and MergeRequests::RefreshService;
doc/ci/pipelines/_index.md "Skip a pipeline", doc/topics/git/commit.md "Push options for GitLab CI/CD".
"""

import re

from tests.gitlab_emulator.git import ZEROS, git
from tests.gitlab_emulator.protection import may_create_tag, may_merge, may_push
from tests.gitlab_emulator.rights import ROLES, number
from tests.gitlab_emulator.routing import ApiError
from tests.gitlab_emulator.runners import plan
from tests.gitlab_emulator.state import Json, MergeRequest, Project, Push, State, User

SKIP = re.compile(r"\[(ci[ _-]skip|skip[ _-]ci)\]", re.IGNORECASE)
# "Minimum role to use pipeline variables": who may pass any.
VARIABLE_ROLES = {"no_one_allowed": max(ROLES) + 1, "developer": 30, "maintainer": 40, "owner": 50}
ROLELESS = 0


class NotStarted(ApiError):
    """GitLab makes no pipeline; `base` is what it says of it."""

    def __init__(self, base: str) -> None:
        super().__init__(400, {"message": {"base": [base]}})


def start(
    state: State,
    project: Project,
    ref: str,
    source: str,
    user: User | None,
    variables: dict[str, str],
    level: int,
    *,
    sha: str = "",
    skip: bool | None = None,
) -> Json:
    """A pipeline that somebody of role `level` starts; `skip` is None where `[skip ci]` counts for nothing.

    Raises NotStarted where GitLab would not have it.
    """
    repository = project.repository
    found = (
        git(repository, "rev-parse", "--verify", "--quiet", f"{sha or ref}^{{commit}}", check=False)
        if repository
        else ""
    )
    if repository and not found:
        raise NotStarted("Reference not found")
    if repository and not _has_config(project, found):
        raise NotStarted("Missing CI config file")
    if not ref.startswith("refs/merge-requests/") and not _may_run(project, ref, level):
        raise NotStarted(
            f"You do not have sufficient permission to run a pipeline on '{ref}'. "
            "Please select a different branch or contact your administrator for assistance."
        )
    if variables and level < VARIABLE_ROLES[project.pipeline_variables_role]:
        raise NotStarted("Insufficient permissions to set pipeline variables")
    message = git(repository, "show", "--no-patch", "--format=%B", found) if repository else ""
    skipped = skip is not None and (skip or SKIP.search(message) is not None)
    status = "skipped" if skipped else "created"
    pipeline = state.add_pipeline(project, ref, found, status, source, {}, variables=variables, user=user)
    if project.runners and not skipped:
        plan(state, project, pipeline)
    if state.on_pipeline is not None:
        state.on_pipeline(project, pipeline)
    return pipeline


def _has_config(project: Project, sha: str) -> bool:
    assert project.repository is not None
    return bool(git(project.repository, "cat-file", "-t", f"{sha}:{project.ci_config_path}", check=False))


def _may_run(project: Project, ref: str, level: int) -> bool:
    """On a protected branch who may push or merge; on a tag who may create it."""
    repository = project.repository
    if repository and git(repository, "rev-parse", "--verify", "--quiet", f"refs/tags/{ref}", check=False):
        return may_create_tag(ref, level, project.protected_tags)
    rules = project.protected_branches
    return may_push(ref, level, rules) or may_merge(ref, level, rules)


def after_push(state: State, project: Project, push: Push) -> None:
    """Start what a push to a branch or tag starts: nothing, if it came with a job token (18.3 and newer), or deleted it.

    Of a branch with an open merge request that is its pipeline, else the branch's: `workflow: rules` are not read, and
    this is what those of GitLab's documentation "Switch between branch pipelines and merge request pipelines" make.
    """
    kind, _, name = push.ref.removeprefix("refs/").partition("/")
    quiet = push.by_job_token and number(state.version) >= (18, 3)
    if quiet or push.after == ZEROS or kind not in ("heads", "tags"):
        return
    user, level = _pusher(state, project, push.username)
    skip = "ci.skip" in push.options
    variables = dict(
        option.removeprefix("ci.variable=").split("=", 1)
        for option in push.options
        if option.startswith("ci.variable=") and option.count("=") > 1
    )
    opened = [
        known
        for known in project.merge_requests.values()
        if kind == "heads"
        and (known.state, known.source_branch, known.source_project_id) == ("opened", name, project.id)
    ]
    refs = [(f"refs/merge-requests/{known.iid}/head", "merge_request_event") for known in opened]
    for ref, source in refs or [(name, "push")]:
        try:
            start(state, project, ref, source, user, variables, level, sha=push.after, skip=skip)
        except NotStarted:
            continue


def after_opening(
    state: State, project: Project, merge_request: MergeRequest, user: User, level: int
) -> Json | None:
    """The pipeline of a new merge request; None where there is no repository or no configuration."""
    if project.repository is None:
        return None
    ref = f"refs/merge-requests/{merge_request.iid}/head"
    try:
        return start(
            state, project, ref, "merge_request_event", user, {}, level, sha=merge_request.sha, skip=False
        )
    except NotStarted:
        return None


def _pusher(state: State, project: Project, username: str) -> tuple[User | None, int]:
    for token in state.tokens.values():
        if token.user.username == username:
            return token.user, project.members.get(token.user.id, ROLELESS)
    return None, ROLELESS
