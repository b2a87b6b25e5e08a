"""Whether RELEASE_TOKEN may do all that a release does: asked before anything is written, be it on the DVC remote.

A release whose dvc.lock or tag is refused halfway leaves others to clean up, and in whose name a job runs is decided by
who merged: with protected tags a Developer's job token can make no release. So the release has a token of its own, and
asks GitLab for its scopes, its role, and the protection of the default branch and of the tags.
"""

import re
from datetime import UTC, date, datetime
from typing import Any

from gitlab.exceptions import GitlabError

from ml.errors import UserError
from ml.release import access
from ml.release.access import Project, explained, told
from ml.release.version import PREFIX
from ml.settings import Settings

SCOPE = "api"  # git over HTTP takes it as well (Gitlab::Auth, full_authentication_abilities)
DEVELOPER, MAINTAINER = 30, 40
ROLES = {
    0: "no role",
    5: "Minimal Access",
    10: "Guest",
    15: "Planner",
    20: "Reporter",
    25: "Security Manager",
    DEVELOPER: "Developer",
    MAINTAINER: "Maintainer",
    50: "Owner",
}
SOON = 14  # days before its last one on which the token's end is spoken of
RELEASES, VERSIONS = f"{PREFIX}*", "v*"  # tags of models, and of the template itself
NEEDED = (
    "Nothing was written. The release needs a project access token (on gitlab.com's free tier a member's personal one) "
    "with the role Maintainer and the scopes api and write_repository, as variable RELEASE_TOKEN: masked, protected, "
    "environment scope release/*. Then run the job again."
)

Levels = list[dict[str, Any]]


def check(settings: Settings) -> tuple[Project | None, list[str]]:
    """The project by RELEASE_TOKEN, None outside GitLab, and the doors that stand open, each with how to shut it.

    Raises UserError when the token is missing, or may not do what a release does.
    """
    if settings.api_url is None or settings.ci_project_id is None:
        return None, []
    if settings.release_token is None:
        raise UserError(
            "RELEASE_TOKEN is not set in this job: it does not exist, or it is protected and this branch is not, or its "
            f"environment scope is another one than this job's environment. {NEEDED}"
        )
    project = access.connect(settings)
    assert project is not None  # its address and token are known
    token = token_of(project)
    found = project_of(project)
    user = token.get("user_id")
    role = role_of(found)
    if role < MAINTAINER:
        role = max(role, invited_role(project, user))
    if role < MAINTAINER:
        raise UserError(
            f"RELEASE_TOKEN has the role {ROLES.get(role, role)} in project {project.id}, and the release needs "
            f"Maintainer. {NEEDED}"
        )
    if off := features_off(found):
        raise UserError(
            f"Project {project.id} has {' and '.join(off)} switched off, and the release writes them: Settings → General → "
            "Visibility, project features, permissions. Nothing was written; switch them on, then run the job again."
        )
    with explained(project, "Reading what is protected"):
        branches, tags = project.all("/protected_branches"), project.all("/protected_tags")
        doors = [*ending(token), *image_door(project, found, settings)]
    doors += branch_doors(branches, settings.ci_default_branch, role, user)
    doors += tag_doors(tags, role, user)
    doors += variable_doors(found)
    return project, doors


def token_of(project: Project) -> dict[str, Any]:
    """What GitLab says of the token. Raises UserError when it takes it not, or when a scope is missing."""
    with explained(project, "Reading RELEASE_TOKEN's rights"):
        try:
            token = project.client.http_get("/personal_access_tokens/self")
        except GitlabError as error:
            if error.response_code not in (400, 401, 403, 404):
                raise
            raise UserError(
                f"GitLab at {project.client.api_url} does not take RELEASE_TOKEN as an access token: it answered "
                f"{error.response_code} ({told(error)}). {NEEDED}"
            ) from None
    assert isinstance(token, dict)
    scopes = list(map(str, token.get("scopes", [])))
    if SCOPE not in scopes:
        raise UserError(
            f"RELEASE_TOKEN has the scopes {', '.join(scopes) or 'none'}, and {SCOPE} is missing. {NEEDED}"
        )
    return token


def project_of(project: Project) -> dict[str, Any]:
    with explained(project, "Looking for the project"):
        try:
            return dict(project.get(""))
        except GitlabError as error:
            if error.response_code not in (403, 404):
                raise
            raise UserError(
                f"RELEASE_TOKEN is of another project: it does not see project {project.id} at "
                f"{project.client.api_url} (GitLab answered {error.response_code}). {NEEDED}"
            ) from None


def role_of(found: dict[str, Any]) -> int:
    """The higher one of the roles in the project and in its groups; 0 where the token's user is in neither."""
    granted = (found.get("permissions") or {}).values()
    return max((int(each["access_level"]) for each in granted if each), default=0)


def invited_role(project: Project, user: object) -> int:
    """Of a member by an invitation of another group, which the project's own `permissions` leave out; 0 for no member."""
    with explained(project, "Reading RELEASE_TOKEN's role"):
        try:
            member = project.get(f"/members/all/{user}")
        except GitlabError as error:
            if error.response_code in (403, 404):
                return 0
            raise
    return int(member.get("access_level") or 0)


def features_off(found: dict[str, Any]) -> list[str]:
    """What a release writes and this project has not, whatever the token's role; an older server may not say."""
    packages = found.get("packages_enabled") is False
    packages |= found.get("package_registry_access_level") == "disabled"
    return ["Package registry"] * packages + ["Releases"] * (found.get("releases_access_level") == "disabled")


def ending(token: dict[str, Any]) -> list[str]:
    last = token.get("expires_at")
    if not last:
        return []
    days = (date.fromisoformat(str(last)[:10]) - datetime.now(UTC).date()).days
    return [f"RELEASE_TOKEN ends on {last}. Rotate it before."] if days <= SOON else []


# ---- What is protected


def covers(pattern: str, name: str) -> bool:
    """Whether GitLab's protection of `pattern`, in which * stands for anything, covers all that `name` stands for."""
    parts = (".*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern))
    return re.fullmatch("".join(parts), name) is not None


def levels_of(rules: list[dict[str, Any]], name: str, kind: str) -> Levels | None:
    """Who may do it, by all rules that cover `name`; None where none does."""
    covering = [rule for rule in rules if covers(str(rule["name"]), name)]
    return [level for rule in covering for level in rule.get(kind) or []] if covering else None


def may(levels: Levels, role: int, user: object) -> bool:
    """Whether one of the levels lets them. What is given to a group cannot be seen from here: git will say."""
    for level in levels:
        if level.get("user_id") is not None:
            allowed = level["user_id"] == user
        elif level.get("group_id") is not None:
            allowed = True
        else:
            allowed = level.get("deploy_key_id") is None and 0 < int(level.get("access_level") or 0) <= role
        if allowed:
            return True
    return False


def open_to_developers(levels: Levels) -> bool:
    roles = [level for level in levels if level.get("user_id") is None and level.get("group_id") is None]
    return may(roles, DEVELOPER, None)


def branch_doors(rules: list[dict[str, Any]], branch: str, role: int, user: object) -> list[str]:
    """Raises UserError when the token may not push to the default branch."""
    levels = levels_of(rules, branch, "push_access_levels")
    if levels is not None and not may(levels, role, user):
        raise UserError(
            f"RELEASE_TOKEN may not push to the protected branch {branch}, where dvc.lock is recorded: allowed to push "
            f"and merge are {described(levels)}. Allow Maintainers (Settings → Repository → Protected branches), or the "
            "token's bot user. Nothing was written."
        )
    if levels is None or open_to_developers(levels):
        return [
            f"Developers may push to {branch} past the review. Settings → Repository → Protected branches: {branch}, "
            "allowed to merge: Developers + Maintainers, allowed to push and merge: Maintainers."
        ]
    return []


def tag_doors(rules: list[dict[str, Any]], role: int, user: object) -> list[str]:
    """Raises UserError when the token may not make a release's tag."""
    doors = []
    for name, then in (
        (RELEASES, "make a release's tag, and put another one in its place"),
        (VERSIONS, "make a tag whose pipeline pushes an image"),
    ):
        levels = levels_of(rules, name, "create_access_levels")
        if name == RELEASES and levels is not None and not may(levels, role, user):
            raise UserError(
                f"RELEASE_TOKEN may not make the protected tags {name}: allowed to create are {described(levels)}. Allow "
                "Maintainers (Settings → Repository → Protected tags). Nothing was written."
            )
        if levels is None or open_to_developers(levels):
            doors.append(
                f"Tags {name} are not protected, so Developers may {then}. Settings → Repository → Protected tags: "
                f"{name}, allowed to create: Maintainers."
            )
    return doors


def described(levels: Levels) -> str:
    named = [str(each.get("access_level_description") or each.get("access_level")) for each in levels]
    return ", ".join(named) or "nobody"


def variable_doors(found: dict[str, Any]) -> list[str]:
    role = found.get("ci_pipeline_variables_minimum_override_role")
    if role != "developer" and found.get("restrict_user_defined_variables") is not False:
        return []
    return [
        "Developers may set variables of a pipeline of the default branch, such as the image of its jobs. Settings → "
        "CI/CD → Variables → Minimum role to use pipeline variables: Maintainer."
    ]


def image_door(project: Project, found: dict[str, Any], settings: Settings) -> list[str]:
    """Whether Developers may replace the image that this job runs, which sees the release's secrets. Raises GitlabError."""
    prefix, image = found.get("container_registry_image_prefix"), settings.ci_job_image or ""
    if not prefix or not f"{image}/".startswith((f"{prefix}/", f"{prefix}:")) or "@sha256:" in image:
        return []
    repository, _, name = image.removeprefix(f"{str(prefix).partition('/')[0]}/").partition(":")
    name = name or "latest"
    tags = rules_of(project, "tag")
    repositories = rules_of(project, "repository")
    if tags is None and repositories is None:
        return []  # GitLab is too old to tell
    closed = any(matches(str(rule["tag_name_pattern"]), name) and keeps_out(rule) for rule in tags or [])
    closed |= any(
        covers(str(rule["repository_path_pattern"]), repository) and keeps_out(rule)
        for rule in repositories or []
    )
    if closed:
        return []
    return [
        f"Developers may push the image {image} that this job runs, and so reach its secrets. Settings → Packages and "
        f"registries → Protected container tags: ^{re.escape(name)}$, push and delete: Maintainer; or name the image by "
        "its digest."
    ]


def rules_of(project: Project, kind: str) -> list[dict[str, Any]] | None:
    """None where GitLab has no such route: repositories from 17.8 on, tags from 18.7 on."""
    try:
        return [dict(rule) for rule in project.get(f"/registry/protection/{kind}/rules")]
    except GitlabError as error:
        if error.response_code in (403, 404):
            return None
        raise


def matches(pattern: str, name: str) -> bool:
    """The rule's pattern is a regular expression of RE2's; one that Python does not read protects nothing for sure."""
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def keeps_out(rule: dict[str, Any]) -> bool:
    return rule.get("minimum_access_level_for_push") in ("maintainer", "owner", "admin")
