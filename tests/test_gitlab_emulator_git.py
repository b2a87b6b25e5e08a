"""The emulated GitLab keeps real git: pushes over HTTP, protected branches, merges, jobs and their artifacts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator_fixtures import address, ask, git


@pytest.fixture(scope="module")
def server() -> Iterator[GitLabEmulator]:
    with GitLabEmulator() as emulator:
        yield emulator


@pytest.fixture
def gitlab(server: GitLabEmulator, tmp_path: Path) -> GitLabEmulator:
    server.reset()
    server.add_repository(tmp_path / "origin.git")
    return server


@pytest.fixture
def work(gitlab: GitLabEmulator, tmp_path: Path) -> Path:
    """A clone with a commit on main and one on branch `experiment`, both pushed by a maintainer."""
    folder = tmp_path / "work"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "remote", "add", "origin", address(gitlab, "write_repository", 40))
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "Begin")
    git(folder, "push", "--quiet", "origin", "main")
    git(folder, "checkout", "--quiet", "-b", "experiment")
    (folder / "a").write_text("a")
    git(folder, "add", "a")
    git(folder, "commit", "--quiet", "--message", "Add a")
    git(folder, "push", "--quiet", "origin", "experiment")
    return folder


def api(gitlab: GitLabEmulator, method: str, path: str, level: int = 40, **options: Any) -> requests.Response:
    return ask(gitlab, method, f"/projects/64{path}", "api", level, **options)


def test_developer_pushes_branches_and_tags_but_not_a_protected_branch(
    gitlab: GitLabEmulator, work: Path
) -> None:
    developer = address(gitlab, "write_repository", 30)
    assert "not allowed to push code to protected branches" in git(
        work, "push", developer, "HEAD:main", fails=True
    )
    git(work, "push", developer, "HEAD:refs/heads/other", "HEAD:refs/tags/v1")
    git(work, "push", address(gitlab, "write_repository", 40), "HEAD:main")


def test_protected_branch_is_not_rewritten_even_by_a_maintainer(gitlab: GitLabEmulator, work: Path) -> None:
    git(work, "checkout", "--quiet", "--orphan", "fresh")
    git(work, "commit", "--quiet", "--message", "Rewrite")
    assert "not allowed to force push" in git(work, "push", "--force", "origin", "HEAD:main", fails=True)


@pytest.mark.parametrize(("scope", "level"), [("read_api", 40), ("write_repository", 20), ("job", 40)])
def test_tokens_that_may_not_push_are_refused(
    gitlab: GitLabEmulator, work: Path, scope: str, level: int
) -> None:
    refused = address(gitlab, scope, level)
    git(work, "push", refused, "HEAD:refs/heads/other", fails=True)
    assert "refs/heads/other" not in git(work, "ls-remote", "origin")
    assert gitlab.project.pushes[-1].ref == "refs/heads/experiment"


def test_job_token_clones_and_pushes_only_where_the_project_allows_it(
    gitlab: GitLabEmulator, work: Path, tmp_path: Path
) -> None:
    job = address(gitlab, "job", 40)
    git(tmp_path, "clone", "--quiet", job, "clone")
    main = git(work, "ls-remote", "origin", "refs/heads/main").split()[0]
    assert git(tmp_path / "clone", "rev-parse", "HEAD") == main
    git(work, "push", job, "HEAD:refs/heads/other", fails=True)
    assert git(work, "ls-remote", "origin", "refs/heads/other") == ""
    gitlab.project.job_token_may_push = True
    git(work, "push", job, "HEAD:refs/heads/other")
    assert git(work, "ls-remote", "origin", "refs/heads/other").split()[0] == git(work, "rev-parse", "HEAD")


def test_push_options_are_recorded(gitlab: GitLabEmulator, work: Path) -> None:
    git(work, "push", "--push-option=ci.skip", "origin", "HEAD:refs/heads/other")
    push = gitlab.project.pushes[-1]
    assert (push.ref, push.options) == ("refs/heads/other", ("ci.skip",))
    assert push.after == git(work, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("method", "squash", "parents", "found_by"),
    [
        ("merge", False, 2, "merge_commit_sha"),
        ("merge", True, 2, "merge_commit_sha"),
        ("ff", True, 1, "squash_commit_sha"),
        ("ff", False, 1, "sha"),
    ],
)
def test_merge_makes_the_commits_of_the_projects_method(
    gitlab: GitLabEmulator, work: Path, method: Any, squash: bool, parents: int, found_by: str
) -> None:
    gitlab.project.merge_method = method
    gitlab.add_merge_request(3, source_branch="experiment")
    merged = api(gitlab, "PUT", "/merge_requests/3/merge", json={"squash": squash}).json()
    git(work, "fetch", "--quiet", "origin", "main")
    main = git(work, "rev-parse", "FETCH_HEAD")
    assert (merged["state"], merged[found_by]) == ("merged", main)
    assert len(git(work, "rev-list", "--parents", "--max-count=1", main).split()) == parents + 1
    assert git(work, "show", f"{main}:a") == "a"
    assert [
        each["iid"] for each in api(gitlab, "GET", f"/repository/commits/{main}/merge_requests").json()
    ] == [3]


def test_merge_that_needs_a_rebase_or_conflicts_is_refused(gitlab: GitLabEmulator, work: Path) -> None:
    gitlab.add_merge_request(3, source_branch="experiment")
    git(work, "checkout", "--quiet", "main")
    (work / "a").write_text("b")
    git(work, "add", "a")
    git(work, "commit", "--quiet", "--message", "Another a")
    git(work, "push", "--quiet", "origin", "main")
    assert api(gitlab, "PUT", "/merge_requests/3/merge").status_code == 406
    gitlab.project.merge_method = "ff"
    assert api(gitlab, "PUT", "/merge_requests/3/merge").status_code == 406
    assert api(gitlab, "PUT", "/merge_requests/3/merge", level=30).status_code == 401


def test_release_makes_an_annotated_tag_in_the_repository(gitlab: GitLabEmulator, work: Path) -> None:
    head = git(work, "rev-parse", "HEAD")
    fields = {"tag_name": "v1", "ref": head, "tag_message": "One\n\nKey: value", "description": "d"}
    assert api(gitlab, "POST", "/releases", json=fields).status_code == 201
    git(work, "fetch", "--quiet", "--tags", "origin")
    assert git(work, "rev-parse", "v1^{commit}") == head
    assert git(work, "for-each-ref", "--format=%(trailers:only)", "refs/tags/v1") == "Key: value"
    assert (
        api(gitlab, "POST", "/releases", json=fields | {"tag_name": "v2", "ref": "nowhere"}).status_code
        == 400
    )


def test_links_of_a_release_are_unique_and_can_be_changed(gitlab: GitLabEmulator, work: Path) -> None:
    api(gitlab, "POST", "/releases", json={"tag_name": "v1", "ref": "main"})
    link = {"name": "image", "url": "https://registry.test/a@sha256:1", "link_type": "image"}
    made = api(gitlab, "POST", "/releases/v1/assets/links", json=link).json()
    assert api(gitlab, "POST", "/releases/v1/assets/links", json=link).status_code == 400
    other = link | {"url": "https://registry.test/a@sha256:2"}
    assert (
        api(gitlab, "PUT", f"/releases/v1/assets/links/{made['id']}", json=other).json()["url"]
        == other["url"]
    )
    bad = {"name": "x", "url": "javascript:1"}
    assert api(gitlab, "POST", "/releases/v1/assets/links", json=bad).status_code == 400


def test_artifacts_come_from_the_newest_successful_pipeline(gitlab: GitLabEmulator, work: Path) -> None:
    gitlab.add_merge_request(3, source_branch="experiment")
    gitlab.add_pipeline(3, {"train": {"reports/receipt.json": b"old"}})
    gitlab.add_pipeline(3, {"train": {"reports/receipt.json": b"new"}})
    gitlab.add_pipeline(3, {"train": {"reports/receipt.json": b"failed"}}, status="failed")
    route = "/jobs/artifacts/refs%2Fmerge-requests%2F3%2Fhead/raw/reports/receipt.json"
    assert api(gitlab, "GET", route, params={"job": "train"}).content == b"new"
    assert api(gitlab, "GET", route, params={"job": "lint"}).status_code == 404
    listed = api(gitlab, "GET", "/merge_requests/3/pipelines").json()
    assert [pipeline["status"] for pipeline in listed] == ["failed", "success", "success"]
    assert listed[0]["sha"] == git(work, "rev-parse", "experiment")
    (job,) = api(gitlab, "GET", f"/pipelines/{listed[1]['id']}/jobs").json()
    assert api(gitlab, "GET", f"/jobs/{job['id']}/artifacts/reports/receipt.json").content == b"new"
    assert api(gitlab, "GET", f"/jobs/{job['id']}/artifacts").content[:2] == b"PK"


def test_repository_token_may_not_use_the_api(gitlab: GitLabEmulator) -> None:
    token = gitlab.state.add_token(gitlab.project, "write_repository", 40).value
    answer = requests.get(
        f"{gitlab.url}/api/v4/projects/64/releases", headers={"PRIVATE-TOKEN": token}, timeout=10
    )
    assert (answer.status_code, answer.json()["error"]) == (403, "insufficient_scope")


def test_file_is_committed_to_its_branch_and_read_at_any_commit(gitlab: GitLabEmulator, work: Path) -> None:
    path, fields = "/repository/files/deploy%2Flive.json", {"branch": "main", "commit_message": "Deploy"}
    before = git(work, "rev-parse", "main")
    assert api(gitlab, "POST", path, 30, json=fields | {"content": "{}"}).status_code == 403
    assert api(gitlab, "POST", path, json=fields | {"content": "{}"}).status_code == 201
    assert api(gitlab, "POST", path, json=fields | {"content": "{}"}).status_code == 400
    assert api(gitlab, "PUT", path, json=fields | {"content": "[]"}).status_code == 200
    git(work, "fetch", "--quiet", "origin", "main")
    assert git(work, "log", "--format=%s", "FETCH_HEAD") == "Deploy\nDeploy\nBegin"
    assert git(work, "show", "FETCH_HEAD:deploy/live.json") == "[]"
    assert api(gitlab, "GET", f"{path}/raw", params={"ref": "HEAD"}).content == b"[]"
    assert api(gitlab, "GET", f"{path}/raw", params={"ref": before}).status_code == 404
    tree = api(gitlab, "GET", "/repository/tree", params={"recursive": "true"}).json()
    assert [(entry["type"], entry["path"]) for entry in tree] == [
        ("tree", "deploy"),
        ("blob", "deploy/live.json"),
    ]


def test_branch_is_made_shown_and_deleted_unless_it_is_protected(gitlab: GitLabEmulator, work: Path) -> None:
    assert api(gitlab, "POST", "/repository/branches", 30, json={"branch": "a/b", "ref": "main"}).ok
    shown = api(gitlab, "GET", "/repository/branches/a%2Fb", 30).json()
    assert (shown["protected"], shown["can_push"], shown["commit"]["title"]) == (False, True, "Begin")
    assert not api(gitlab, "GET", "/repository/branches/main", 30).json()["can_push"]
    assert api(gitlab, "DELETE", "/repository/branches/a%2Fb", 30).status_code == 204
    assert api(gitlab, "DELETE", "/repository/branches/main").status_code == 403
    assert git(work, "ls-remote", "origin", "refs/heads/a/b") == ""
