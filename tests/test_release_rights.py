"""What RELEASE_TOKEN may do is asked before anything is written; doors that stand open are told, each with the remedy."""

import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ml.errors import UserError
from ml.release import rights
from ml.settings import Settings
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.protection import BranchRule, ContainerTagRule, TagRule
from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER
from tests.release_project import ReleaseProject, opened, published

pytest_plugins = ["tests.release_fixtures"]

SCOPES = ("api", "write_repository")
NOBODY = 0


@pytest.fixture(scope="module")
def server() -> Iterator[GitLabEmulator]:
    with GitLabEmulator() as gitlab:
        yield gitlab


@pytest.fixture
def gitlab(server: GitLabEmulator) -> GitLabEmulator:
    """Set up as the documentation has it."""
    set_up(server)
    return server


def set_up(gitlab: GitLabEmulator) -> None:
    gitlab.reset()
    gitlab.project.protected_branches["main"] = BranchRule(push=MAINTAINER, merge=DEVELOPER)
    gitlab.project.protected_tags |= {"model-v*": TagRule(), "v*": TagRule()}
    gitlab.project.pipeline_variables_role = "maintainer"


def token(gitlab: GitLabEmulator, scopes: Any = SCOPES, role: int = MAINTAINER, **more: Any) -> str:
    return gitlab.state.add_token(gitlab.project, scopes, role, "release", **more).value


def check(gitlab: GitLabEmulator, value: str | None, **more: Any) -> list[str]:
    """The open doors, of a job whose image is another host's."""
    given = {
        "ci_api_v4_url": f"{gitlab.url}/api/v4",
        "ci_project_id": 64,
        "release_token": value or None,
        "ci_job_token": gitlab.job_token,
        "ci_default_branch": "main",
        "ci_job_image": "docker.io/library/python:3.11",
        "ci_server_tls_ca_file": None,
    }
    project, doors = rights.check(Settings(**(given | more)))
    assert project is not None and project.token == "RELEASE_TOKEN"
    return doors


# ---- The token


def test_right_token_in_a_project_that_is_set_up_opens_no_door(gitlab: GitLabEmulator) -> None:
    assert check(gitlab, token(gitlab)) == []


def of_another_project(gitlab: GitLabEmulator) -> str:
    return gitlab.state.add_token(gitlab.state.add_project("g/other"), SCOPES, MAINTAINER).value


def revoked(gitlab: GitLabEmulator) -> str:
    value = token(gitlab)
    gitlab.state.tokens[value] = dataclasses.replace(gitlab.state.tokens[value], revoked=True)
    return value


REFUSED: dict[str, tuple[Callable[[GitLabEmulator], str], str]] = {
    "missing": (lambda gitlab: "", "RELEASE_TOKEN is not set in this job: .*protected.*environment scope"),
    "unknown": (lambda gitlab: "glpat-of-nobody", "does not take RELEASE_TOKEN .*401"),
    "expired": (lambda gitlab: token(gitlab, expires_at=date(2024, 1, 1)), "401 .Token is expired"),
    "revoked": (revoked, "401 .Token was revoked"),
    "scope": (
        lambda gitlab: token(gitlab, "write_repository"),
        "has the scopes write_repository, and api is miss",
    ),
    "read only": (lambda gitlab: token(gitlab, "read_api"), "has the scopes read_api, and api is missing"),
    "role": (lambda gitlab: token(gitlab, role=DEVELOPER), "has the role Developer in project 64"),
    "another project": (
        of_another_project,
        "RELEASE_TOKEN is of another project: it does not see project 64",
    ),
    "a job's": (lambda gitlab: gitlab.job_token, "does not take RELEASE_TOKEN as an access token"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_token_that_may_not_release_is_refused_by_name_with_the_remedy(
    gitlab: GitLabEmulator, kind: str
) -> None:
    make, told = REFUSED[kind]
    value = make(gitlab)
    with pytest.raises(UserError, match=told) as raised:
        check(gitlab, value)
    assert "Nothing was written" in str(raised.value) and "role Maintainer" in str(raised.value)
    assert not value or value not in str(raised.value)


@pytest.mark.parametrize("kind", ["missing", "expired", "role"])
def test_release_without_the_right_token_writes_nothing_anywhere(project: ReleaseProject, kind: str) -> None:
    project.merge(4)
    before = published(project)
    make, told = REFUSED[kind]
    project.release_token = make(project.gitlab)
    project.release(fails=told)
    assert published(project) == before


@pytest.mark.parametrize(("feature", "name"), [("releases", "Releases"), ("packages", "Package registry")])
def test_release_of_a_project_that_cannot_hold_it_writes_nothing_anywhere(
    project: ReleaseProject, feature: str, name: str
) -> None:
    project.merge(4)
    before = published(project)
    project.gitlab.project.features_off.append(feature)
    project.release(fails=f"has {name} switched off.*Settings → General.*Nothing was written")
    project.gitlab.project.features_off.clear()
    assert published(project) == before
    project.release()


@pytest.mark.parametrize("role", [MAINTAINER, DEVELOPER])
def test_member_by_another_groups_invitation_is_taken_by_that_role(gitlab: GitLabEmulator, role: int) -> None:
    """`permissions` of a project name its own members and its group's alone."""
    value = token(gitlab, role=role)
    gitlab.project.invited.append(gitlab.state.tokens[value].user.id)
    if role == MAINTAINER:
        assert check(gitlab, value) == []
    else:
        with pytest.raises(UserError, match="has the role Developer in project 64"):
            check(gitlab, value)


@pytest.mark.parametrize("version", ["17.2", "18.9"])
def test_developers_merge_is_released_on_the_free_tier(released: Path, tmp_path: Path, version: str) -> None:
    """Protected tags and main: the job's own token, a Developer's, may make neither tag nor release."""
    with opened(released, tmp_path, version=version) as project:
        merged = project.merge(4, role=DEVELOPER)
        project.release()
        assert project.gitlab.state.tokens[project.gitlab.job_token].access_level == DEVELOPER
        assert project.tags() == ["model-v1.0.0", "model-v1.0.1"]
        assert project.origin("rev-parse", "main^") == merged
        assert list(project.gitlab.project.releases) == project.tags()
        assert project.facts()["warnings"] == []


# ---- What is protected


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (
            {"protected_branches": {"main": BranchRule(push=NOBODY)}},
            "may not push to the protected branch main",
        ),
        ({"protected_branches": {"*": BranchRule(push=NOBODY)}}, "may not push to the protected branch main"),
        ({"protected_tags": {"model-*": TagRule(NOBODY)}}, r"may not make the protected tags model-v\*"),
    ],
)
def test_protection_that_keeps_the_token_out_is_told_with_who_is_let_in(
    gitlab: GitLabEmulator, rules: dict[str, Any], told: str
) -> None:
    for name, found in rules.items():
        setattr(gitlab.project, name, found)
    with pytest.raises(UserError, match=f"{told}.*No one.*Nothing was written"):
        check(gitlab, token(gitlab))


DOORS: dict[str, tuple[dict[str, Any], str]] = {
    "tags of models": ({"protected_tags": {"v*": TagRule()}}, r"Tags model-v\* are not protected"),
    "tags of one version": (
        {"protected_tags": {"model-v1*": TagRule(), "v*": TagRule()}},
        r"Tags model-v\* are not protected",
    ),
    "tags of versions": ({"protected_tags": {"model-v*": TagRule()}}, r"Tags v\* are not protected"),
    "developers' tags": (
        {"protected_tags": {"model-v*": TagRule(DEVELOPER), "v*": TagRule()}},
        r"Tags model-v\* are not protected",
    ),
    "branch": ({"protected_branches": {}}, "Developers may push to main past the review"),
    "developers' branch": (
        {"protected_branches": {"main": BranchRule(push=DEVELOPER)}},
        "Developers may push to main past the review",
    ),
    "variables": ({"pipeline_variables_role": "developer"}, "Developers may set variables of a pipeline"),
}


@pytest.mark.parametrize("kind", DOORS)
def test_open_door_is_told_with_the_place_to_shut_it(gitlab: GitLabEmulator, kind: str) -> None:
    changed, told = DOORS[kind]
    for name, value in changed.items():
        setattr(gitlab.project, name, value)
    doors = check(gitlab, token(gitlab))
    assert len(doors) == 1
    assert doors[0].startswith(told.replace("\\", "")) and "Settings → " in doors[0]


def test_end_of_the_token_is_told_two_weeks_ahead(gitlab: GitLabEmulator) -> None:
    day = datetime.now(UTC).date()
    assert check(gitlab, token(gitlab, expires_at=day + timedelta(days=15))) == []
    [door] = check(gitlab, token(gitlab, expires_at=day + timedelta(days=14)))
    assert "RELEASE_TOKEN ends on" in door


@pytest.mark.parametrize(
    ("image", "rule", "open_door"),
    [
        ("ci:main", None, True),
        ("ci:main", "^main$", False),
        ("ci:main", "^other$", True),
        (f"ci@sha256:{'0' * 64}", None, False),
        ("ci", None, True),
        ("ci", "^latest$", False),  # a name without a tag
    ],
)
def test_image_that_developers_may_replace_is_told(
    gitlab: GitLabEmulator, image: str, rule: str | None, open_door: bool
) -> None:
    if rule:
        gitlab.project.protected_container_tags.append(ContainerTagRule(1, rule))
    host = gitlab.url.partition("://")[2]
    doors = check(gitlab, token(gitlab), ci_job_image=f"registry.{host}/g/proj/{image}")
    assert ["Developers may push the image" in door for door in doors] == [True] * open_door


def test_gitlab_that_is_too_old_to_tell_of_images_says_nothing_of_them(gitlab: GitLabEmulator) -> None:
    gitlab.fail_next(404, times=2, path="/registry/protection/")
    host = gitlab.url.partition("://")[2]
    assert check(gitlab, token(gitlab), ci_job_image=f"registry.{host}/g/proj/ci:main") == []


def test_what_an_older_server_does_not_say_is_no_error() -> None:
    assert rights.variable_doors({}) == []
    assert rights.role_of({"permissions": {"project_access": None, "group_access": None}}) == 0
    assert rights.role_of({}) == 0


@pytest.mark.parametrize(
    ("levels", "allowed"),
    [
        ([{"access_level": 40}], True),
        ([{"access_level": 0}], False),
        ([{"access_level": 60}], False),  # administrators
        ([{"access_level": 40, "user_id": 7}], True),
        ([{"access_level": 40, "user_id": 8}], False),
        ([{"access_level": None, "group_id": 3}], True),  # who is in it cannot be seen: git will say
        ([{"access_level": 40, "deploy_key_id": 3}], False),
        ([{"access_level": 0}, {"access_level": 30}], True),
        ([], False),
    ],
)
def test_levels_are_read_as_gitlab_means_them(levels: list[dict[str, Any]], allowed: bool) -> None:
    assert rights.may(levels, MAINTAINER, 7) == allowed
