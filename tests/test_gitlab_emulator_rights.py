"""The emulated GitLab refuses what GitLab refuses: by kind of token, role, tier, version and protection."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gitlab as python_gitlab
import pytest
import requests

from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.app import ROUTE_MODULES
from tests.gitlab_emulator.protection import BranchRule, TagRule
from tests.gitlab_emulator.rights import (
    DEVELOPER,
    GUEST,
    MAINTAINER,
    OLDEST,
    REPORTER,
    RIGHTS,
    TIERS,
    right,
)
from tests.gitlab_emulator.routing import route
from tests.gitlab_emulator_fixtures import address, ask, emulator, git


@pytest.fixture
def gitlab(tmp_path: Path) -> Iterator[GitLabEmulator]:
    with emulator(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[GitLabEmulator]:
    with GitLabEmulator() as shared:
        yield shared


@pytest.fixture
def plain(server: GitLabEmulator) -> GitLabEmulator:
    """Without a repository, on a server that tests share: quicker."""
    server.reset()
    server.add_merge_request(3)
    return server


@pytest.fixture
def work(gitlab: GitLabEmulator, tmp_path: Path) -> Path:
    return tmp_path / "work"


# ---- The table ------------------------------------------------------------------------------------------------


def test_every_route_has_a_row_and_every_row_a_route() -> None:
    assert ROUTE_MODULES
    known = {(known.method, known.path) for known in route.routes if "/ml/mlflow" not in known.path}
    assert known <= set(RIGHTS)
    assert sorted(set(RIGHTS) - known) == []


def asked(pattern: str) -> str:
    """A path of the route, whose objects need not be there."""
    names = {":id": "64", ":iid": "3", "*path": "x", "*ref": "main", "*branch": "main", ":file": "f"}
    return "/".join(names.get(part, "1" if part[:1] in (":", "*") else part) for part in pattern.split("/"))


@pytest.mark.parametrize(("method", "path"), RIGHTS)
def test_route_takes_the_tokens_of_its_row_and_no_others(
    plain: GitLabEmulator, method: str, path: str
) -> None:
    """Allowed is whatever is none of GitLab's refusals: 401 Unauthorized, insufficient_scope, 403 of a role."""
    row, url = right(method, path), asked(path)
    if row.public:
        return

    def refused(scopes: Any, level: int) -> bool:
        return ask(plain, method, url, scopes, level).status_code in (401, 403)

    assert not refused("api", MAINTAINER)
    assert refused("read_api", MAINTAINER) == (method != "GET" and "read_api" not in row.scopes)
    assert refused("write_repository", MAINTAINER) == ("write_repository" not in row.scopes)
    assert refused("job", MAINTAINER) == (row.job_token != OLDEST)
    if row.role > GUEST:
        status = ask(plain, method, url, "api", row.role - 10).status_code
        assert status == (404 if row.hidden else 403)


@pytest.mark.parametrize(
    ("tier", "version", "scopes", "status"),
    [
        *(("free", version, "job", 404) for version in ("17.2", "18.6", "19.2")),
        *((tier, "17.2", "job", 200) for tier in TIERS[1:]),
        *((tier, "17.2", "read_api", 200) for tier in TIERS),
    ],
)
def test_job_token_reads_artifacts_of_other_jobs_from_premium_on(
    tmp_path: Path, tier: Any, version: str, scopes: str, status: int
) -> None:
    with emulator(tmp_path, tier=tier, version=version) as gitlab:
        gitlab.add_pipeline(3, {"train": {"a.txt": b"a"}})
        job = gitlab.project.jobs[gitlab.project.pipelines[-1]["id"]][0].id
        ref = "refs%2Fmerge-requests%2F3%2Fhead"
        for path in (
            f"/jobs/{job}/artifacts",
            f"/jobs/{job}/artifacts/a.txt",
            f"/jobs/artifacts/{ref}/download?job=train",
            f"/jobs/artifacts/{ref}/raw/a.txt?job=train",
        ):
            answer = ask(gitlab, "GET", f"/projects/64{path}", scopes, DEVELOPER)
            assert answer.status_code == status
            if status == 404:
                assert answer.json() == {"message": "404 Project Not Found"}


@pytest.mark.parametrize(("version", "status"), [("17.2", 401), ("18.6", 401), ("19.2", 200)])
@pytest.mark.parametrize("path", ["/merge_requests", "/merge_requests/3", "/pipelines"])
def test_job_token_reads_merge_requests_and_pipelines_of_newer_servers_only(
    tmp_path: Path, version: str, status: int, path: str
) -> None:
    with emulator(tmp_path, version=version) as gitlab:
        assert ask(gitlab, "GET", f"/projects/64{path}", "job", DEVELOPER).status_code == status
        assert ask(gitlab, "GET", f"/projects/64{path}", "read_api", REPORTER).status_code == 200
        for secret in ("/merge_requests/3/pipelines", "/merge_requests/3/notes"):
            assert ask(gitlab, "GET", f"/projects/64{secret}", "job", MAINTAINER).status_code == 401


def test_server_older_than_promised_or_of_an_unknown_tier_is_no_server() -> None:
    for wrong in ({"version": "17.1"}, {"tier": "gold"}):
        with pytest.raises(ValueError, match="17.2 or newer, free, premium, ultimate"):
            GitLabEmulator(**wrong)  # type: ignore[arg-type]


# ---- What a token says of itself -------------------------------------------------------------------------------


def test_token_tells_its_scopes_its_user_and_its_end(gitlab: GitLabEmulator) -> None:
    ends = datetime.now(UTC).date() + timedelta(days=3)
    token = gitlab.state.add_token(
        gitlab.project, ["api", "write_repository"], MAINTAINER, "release", expires_at=ends
    )
    client = python_gitlab.Gitlab(gitlab.url, private_token=token.value)
    told = client.personal_access_tokens.get("self")
    assert (told.scopes, told.active, told.expires_at) == (
        ["api", "write_repository"],
        True,
        ends.isoformat(),
    )
    client.auth()
    project = client.projects.get("g/proj")
    assert client.user is not None and told.user_id == client.user.id
    assert project.permissions["project_access"]["access_level"] == MAINTAINER
    assert project.members_all.get(told.user_id).access_level == MAINTAINER
    assert project.ci_pipeline_variables_minimum_override_role == "developer"


@pytest.mark.parametrize("scopes", ["read_repository", "write_repository", "read_registry", "read_api"])
def test_token_of_any_scope_tells_of_itself(gitlab: GitLabEmulator, scopes: str) -> None:
    assert ask(gitlab, "GET", "/personal_access_tokens/self", scopes, GUEST).json()["scopes"] == [scopes]


def test_job_token_tells_its_job_and_no_other_token_does(gitlab: GitLabEmulator) -> None:
    assert ask(gitlab, "GET", "/job", "job", DEVELOPER).json()["status"] == "running"
    assert ask(gitlab, "GET", "/job").json() == {"message": "404 Job Not Found"}
    assert ask(gitlab, "GET", "/user", "job", DEVELOPER).status_code == 401


def test_token_past_its_end_is_refused_by_api_and_git(gitlab: GitLabEmulator, work: Path) -> None:
    today = datetime.now(UTC).date()
    token = gitlab.state.add_token(gitlab.project, "api", MAINTAINER, expires_at=today).value
    headers = {"PRIVATE-TOKEN": token}
    answer = requests.get(f"{gitlab.url}/api/v4/projects/64", headers=headers, timeout=10)
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_token")
    url = f"{gitlab.url.replace('//', f'//oauth2:{token}@')}/g/proj.git"
    assert "Access denied" in git(work, "ls-remote", url, fails=True)


def test_settings_of_ci_are_shown_to_maintainers_only(gitlab: GitLabEmulator) -> None:
    name = "ci_pipeline_variables_minimum_override_role"
    assert name not in ask(gitlab, "GET", "/projects/64", level=DEVELOPER).json()
    changed = ask(gitlab, "PUT", "/projects/64", json={name: "no_one_allowed"}).json()
    assert changed[name] == "no_one_allowed"


# ---- Git over HTTP --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scopes", "level", "reads", "writes"),
    [
        ("api", DEVELOPER, True, True),
        ("write_repository", DEVELOPER, True, True),
        ("read_repository", DEVELOPER, True, False),
        ("api", REPORTER, True, False),
        ("api", GUEST, False, False),
        ("read_api", MAINTAINER, False, False),
        ("read_registry", MAINTAINER, False, False),
        ("job", DEVELOPER, True, False),
    ],
)
def test_git_reads_and_writes_by_scope_and_role(
    gitlab: GitLabEmulator, work: Path, scopes: str, level: int, reads: bool, writes: bool
) -> None:
    url = address(gitlab, scopes, level)
    git(work, "ls-remote", url, fails=not reads)
    git(work, "push", url, "HEAD:refs/heads/other", fails=not writes)
    assert [push.ref for push in gitlab.project.pushes] == ["refs/heads/other"] * writes


PUSHES = {
    "protected branch": ("HEAD:main", MAINTAINER, "not allowed to push code to protected branches"),
    "new tag of a protected pattern": ("HEAD:refs/tags/v1.0", MAINTAINER, "not allowed to create this tag"),
    "new tag of another name": ("HEAD:refs/tags/x1.0", DEVELOPER, "-"),
    "branch below a protected pattern": ("HEAD:refs/heads/stable/1", MAINTAINER, "protected branches"),
}


@pytest.mark.parametrize(("refspec", "level", "told"), PUSHES.values(), ids=PUSHES)
def test_push_needs_the_role_that_protection_asks_for(
    gitlab: GitLabEmulator, work: Path, refspec: str, level: int, told: str
) -> None:
    gitlab.project.protected_tags["v*"] = TagRule()
    gitlab.project.protected_branches["stable/*"] = BranchRule()
    if level > DEVELOPER:
        assert told in git(work, "push", address(gitlab, "api", DEVELOPER), refspec, fails=True)
    git(work, "push", address(gitlab, "api", level), refspec)


def test_one_refused_ref_refuses_the_whole_push(gitlab: GitLabEmulator, work: Path) -> None:
    gitlab.project.protected_tags["v*"] = TagRule()
    told = git(work, "push", address(gitlab, "api", DEVELOPER), "HEAD:other", "HEAD:refs/tags/v1", fails=True)
    assert "GitLab: You are not allowed to create this tag as it is protected." in told
    assert "other" not in git(work, "ls-remote", address(gitlab, "api", DEVELOPER))


@pytest.mark.parametrize("level", [DEVELOPER, MAINTAINER])
def test_protected_tag_is_neither_moved_nor_deleted_by_git(
    gitlab: GitLabEmulator, work: Path, level: int
) -> None:
    git(work, "push", address(gitlab, "api", MAINTAINER), "main:refs/tags/v1")
    gitlab.project.protected_tags["v*"] = TagRule(DEVELOPER)
    url = address(gitlab, "api", level)
    moved = git(work, "push", "--force", url, "HEAD:refs/tags/v1", fails=True)
    assert "Protected tags cannot be updated." in moved
    deleted = git(work, "push", url, ":refs/tags/v1", fails=True)
    assert ("using the web interface" if level == MAINTAINER else "Only a project maintainer") in deleted


def test_protected_branch_is_not_deleted_by_git_and_the_default_branch_by_nobody(
    gitlab: GitLabEmulator, work: Path
) -> None:
    gitlab.project.protected_branches["experiment"] = BranchRule()
    url = address(gitlab, "api", MAINTAINER)
    assert "default branch of a project cannot be deleted" in git(work, "push", url, ":main", fails=True)
    assert "using the web interface" in git(work, "push", url, ":experiment", fails=True)


def test_force_push_to_a_protected_branch_needs_its_rule(gitlab: GitLabEmulator, work: Path) -> None:
    git(work, "checkout", "--quiet", "--orphan", "fresh")
    git(work, "commit", "--quiet", "--message", "Rewrite")
    url = address(gitlab, "api", MAINTAINER)
    assert "not allowed to force push" in git(work, "push", "--force", url, "HEAD:main", fails=True)
    gitlab.project.protected_branches["main"] = BranchRule(force_push=True)
    git(work, "push", "--force", url, "HEAD:main")


def test_refs_of_merge_requests_are_gitlabs_own(gitlab: GitLabEmulator, work: Path) -> None:
    told = git(work, "push", address(gitlab, "api", 40), "HEAD:refs/merge-requests/3/head", fails=True)
    assert "hidden ref" in told


def test_branch_that_nobody_may_push_to_takes_merges_by_level(gitlab: GitLabEmulator, work: Path) -> None:
    gitlab.project.protected_branches["main"] = BranchRule(push=0, merge=DEVELOPER)
    git(work, "push", address(gitlab, "api", MAINTAINER), "HEAD:main", fails=True)
    assert ask(gitlab, "PUT", "/projects/64/merge_requests/3/merge", level=REPORTER).status_code == 401
    assert ask(gitlab, "PUT", "/projects/64/merge_requests/3/merge", level=DEVELOPER).status_code == 200


# ---- Tags and releases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scopes", ["api", "job"])
def test_release_of_a_protected_tag_needs_the_right_to_create_it(gitlab: GitLabEmulator, scopes: str) -> None:
    gitlab.project.protected_tags["v*"] = TagRule()
    told = "You are not allowed to create this tag as it is protected."
    fields = {"tag_name": "v1", "ref": "main"}
    link = {"name": "a", "url": "https://a.test/a"}

    made = ask(gitlab, "POST", "/projects/64/releases", scopes, DEVELOPER, json=fields)
    assert (made.status_code, made.json()) == (403, {"message": told})
    assert ask(gitlab, "POST", "/projects/64/releases", scopes, MAINTAINER, json=fields).status_code == 201
    for method, path in (("PUT", ""), ("DELETE", ""), ("POST", "/assets/links")):
        answer = ask(gitlab, method, f"/projects/64/releases/v1{path}", scopes, DEVELOPER, json=link)
        assert (answer.status_code, answer.json()) == (403, {"message": "403 Forbidden"})
    links = "/projects/64/releases/v1/assets/links"
    assert ask(gitlab, "POST", links, scopes, MAINTAINER, json=link).status_code == 201


def test_tag_of_a_protected_pattern_is_made_and_deleted_by_maintainers(gitlab: GitLabEmulator) -> None:
    gitlab.project.protected_tags["v*"] = TagRule()
    path, fields = "/projects/64/repository/tags", {"tag_name": "v1", "ref": "main"}
    refused = ask(gitlab, "POST", path, level=DEVELOPER, json=fields)
    assert refused.json() == {"message": "You are not allowed to create this tag as it is protected."}
    assert ask(gitlab, "POST", path, json=fields).status_code == 201
    assert ask(gitlab, "GET", f"{path}/v1").json()["protected"]
    assert ask(gitlab, "DELETE", f"{path}/v1", level=DEVELOPER).status_code == 403
    assert ask(gitlab, "DELETE", f"{path}/v1").status_code == 204


def test_protection_is_set_and_read_through_python_gitlab(gitlab: GitLabEmulator) -> None:
    token = gitlab.state.add_token(gitlab.project, "api", MAINTAINER).value
    project = python_gitlab.Gitlab(gitlab.url, private_token=token).projects.get(64)
    project.protectedtags.create({"name": "model-v*", "create_access_level": 30})
    project.protectedbranches.delete("main")
    project.protectedbranches.create({"name": "main", "push_access_level": 0, "merge_access_level": 30})
    [tag] = project.protectedtags.list(get_all=True)
    assert (tag.name, tag.create_access_levels[0]["access_level"]) == ("model-v*", 30)
    branch = project.protectedbranches.get("main")
    assert branch.push_access_levels[0]["access_level"] == 0
    assert branch.merge_access_levels[0]["access_level_description"] == "Developers + Maintainers"


# ---- Variables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["short", "two words here", "glpat-ends-in-a-break\n", "", "umlaut-änderung"]
)
def test_masked_variable_of_a_value_that_cannot_be_masked_is_refused(
    gitlab: GitLabEmulator, value: str
) -> None:
    fields = {"key": "REPO_TOKEN", "value": value, "masked": True}
    assert ask(gitlab, "POST", "/projects/64/variables", json=fields).status_code == 400
    fields["masked"] = False
    assert ask(gitlab, "POST", "/projects/64/variables", json=fields).status_code == 201


def test_variables_of_one_name_differ_by_scope(gitlab: GitLabEmulator) -> None:
    token = gitlab.state.add_token(gitlab.project, "api", MAINTAINER).value
    variables = python_gitlab.Gitlab(gitlab.url, private_token=token).projects.get(64).variables
    variables.create({"key": "TOKEN", "value": "glpat-12345678", "masked": True, "environment_scope": "a/*"})
    variables.create({"key": "TOKEN", "value": "glpat-87654321", "protected": True, "environment_scope": "b"})
    found = variables.get("TOKEN", filter={"environment_scope": "b"})
    assert (found.value, found.protected, found.masked) == ("glpat-87654321", True, False)
    assert ask(gitlab, "GET", "/projects/64/variables", level=DEVELOPER).status_code == 403
