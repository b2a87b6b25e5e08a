"""The emulated GitLab starts and skips pipelines, keeps artifacts, packages and logs as GitLab does."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.protection import BranchRule, ContainerTagRule, TagRule
from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER, REPORTER
from tests.gitlab_emulator_fixtures import address, ask, emulator, git


@pytest.fixture
def gitlab(tmp_path: Path) -> Iterator[GitLabEmulator]:
    with emulator(tmp_path) as server:
        yield server


@pytest.fixture
def work(gitlab: GitLabEmulator, tmp_path: Path) -> Path:
    return tmp_path / "work"


def started(gitlab: GitLabEmulator) -> list[tuple[str, str, str]]:
    return [(known["ref"], known["source"], known["status"]) for known in gitlab.project.pipelines]


# ---- Starting and skipping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "options", "status"),
    [
        ("Train", [], "created"),
        ("Train [skip ci]", [], "skipped"),
        ("Train\n\nNo need: [CI-SKIP]", [], "skipped"),
        ("Train [skip]", [], "created"),
        ("Train", ["--push-option=ci.skip"], "skipped"),
    ],
)
@pytest.mark.parametrize(("refspec", "ref"), [("HEAD:other", "other"), ("HEAD:refs/tags/v1", "v1")])
def test_push_starts_a_pipeline_that_its_commit_or_option_may_skip(
    gitlab: GitLabEmulator,
    work: Path,
    message: str,
    options: list[str],
    status: str,
    refspec: str,
    ref: str,
) -> None:
    git(work, "commit", "--quiet", "--allow-empty", "--message", message)
    git(work, "push", *options, address(gitlab, "api", DEVELOPER), refspec)
    assert started(gitlab) == [(ref, "push", status)]


def test_tag_on_a_commit_that_skips_is_skipped_too(gitlab: GitLabEmulator, work: Path) -> None:
    git(work, "commit", "--quiet", "--allow-empty", "--message", "Record [skip ci]")
    git(work, "tag", "--annotate", "--message", "One", "v1")
    git(work, "push", address(gitlab, "api", DEVELOPER), "v1")
    assert started(gitlab) == [("v1", "push", "skipped")]


@pytest.mark.parametrize(("version", "count"), [("17.2", 1), ("18.2", 1), ("18.3", 0), ("19.2", 0)])
def test_push_with_a_job_token_starts_nothing_from_18_3_on(tmp_path: Path, version: str, count: int) -> None:
    with emulator(tmp_path, version=version) as gitlab:
        gitlab.project.job_token_may_push = True
        git(tmp_path / "work", "push", address(gitlab, "job", DEVELOPER), "HEAD:other")
        assert len(started(gitlab)) == count


def test_push_without_a_configuration_or_of_a_deletion_starts_nothing(
    gitlab: GitLabEmulator, work: Path
) -> None:
    url = address(gitlab, "api", DEVELOPER)
    git(work, "push", url, "HEAD:other")
    git(work, "push", url, ":other")
    git(work, "rm", "--quiet", ".gitlab-ci.yml")
    git(work, "commit", "--quiet", "--message", "Remove")
    git(work, "push", url, "HEAD:another")
    assert started(gitlab) == [("other", "push", "created")]


def test_push_to_the_branch_of_an_open_merge_request_starts_its_pipeline(
    gitlab: GitLabEmulator, work: Path
) -> None:
    heard: list[str] = []
    gitlab.state.on_pipeline = lambda project, pipeline: heard.append(pipeline["sha"])
    git(work, "commit", "--quiet", "--allow-empty", "--message", "More")
    git(work, "push", address(gitlab, "api", DEVELOPER), "HEAD:experiment")
    assert started(gitlab) == [("refs/merge-requests/3/head", "merge_request_event", "created")]
    assert heard == [git(work, "rev-parse", "HEAD")] == [gitlab.project.merge_requests[3].sha]


def test_merge_starts_the_pipeline_of_the_target_branch(gitlab: GitLabEmulator) -> None:
    merged = ask(gitlab, "PUT", "/projects/64/merge_requests/3/merge").json()
    assert started(gitlab) == [("main", "push", "created")]
    assert gitlab.project.pipelines[0]["sha"] == merged["merge_commit_sha"]


def test_new_merge_request_starts_its_pipeline_and_another_by_hand(
    gitlab: GitLabEmulator, work: Path
) -> None:
    git(work, "push", address(gitlab, "api", DEVELOPER), "HEAD:other")
    fields = {"source_branch": "other", "target_branch": "main", "title": "Other"}
    iid = ask(gitlab, "POST", "/projects/64/merge_requests", level=DEVELOPER, json=fields).json()["iid"]
    made = ask(gitlab, "POST", f"/projects/64/merge_requests/{iid}/pipelines", level=DEVELOPER)
    assert (made.status_code, made.json()["source"]) == (201, "merge_request_event")
    assert [ref for ref, _, _ in started(gitlab)] == ["other", *2 * [f"refs/merge-requests/{iid}/head"]]


@pytest.mark.parametrize(
    ("role", "level", "status"),
    [
        ("developer", DEVELOPER, 201),
        ("maintainer", DEVELOPER, 400),
        ("maintainer", MAINTAINER, 201),
        ("no_one_allowed", MAINTAINER, 400),
    ],
)
def test_variables_of_a_pipeline_need_the_projects_minimum_role(
    gitlab: GitLabEmulator, work: Path, role: str, level: int, status: int
) -> None:
    gitlab.project.pipeline_variables_role = role
    fields: dict[str, Any] = {"ref": "experiment", "variables": [{"key": "JOB_IMAGE", "value": "evil"}]}
    answer = ask(gitlab, "POST", "/projects/64/pipeline", level=level, json=fields)
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["message"] == {"base": ["Insufficient permissions to set pipeline variables"]}
        assert ask(gitlab, "POST", "/projects/64/pipeline", level=level, json={"ref": "experiment"}).ok
    url = address(gitlab, "api", level)
    git(work, "push", "--push-option=ci.variable=A=b=c", url, "HEAD:other")
    assert [known["variables"] for known in gitlab.project.pipelines if known["ref"] == "other"] == (
        [{"A": "b=c"}] if status == 201 else []
    )


def test_variables_of_a_pipeline_are_shown_to_maintainers_and_to_who_started_it(
    gitlab: GitLabEmulator,
) -> None:
    fields = {"ref": "experiment", "variables": [{"key": "A", "value": "1"}]}
    token = gitlab.state.add_token(gitlab.project, "api", DEVELOPER)
    headers, url = {"PRIVATE-TOKEN": token.value}, f"{gitlab.url}/api/v4/projects/64"
    made = requests.post(f"{url}/pipeline", headers=headers, json=fields, timeout=10).json()
    path = f"/projects/64/pipelines/{made['id']}/variables"
    own = requests.get(f"{gitlab.url}/api/v4{path}", headers=headers, timeout=10).json()
    assert [(known["key"], known["value"]) for known in own] == [("A", "1")]
    assert ask(gitlab, "GET", path, level=DEVELOPER).status_code == 403
    assert ask(gitlab, "GET", path).json() == own
    assert "variables" not in made


def test_pipeline_of_a_protected_ref_needs_the_right_to_push_or_merge(gitlab: GitLabEmulator) -> None:
    gitlab.project.protected_tags["v*"] = TagRule()
    ask(gitlab, "POST", "/projects/64/repository/tags", json={"tag_name": "v1", "ref": "main"})
    for ref in ("main", "v1"):
        refused = ask(gitlab, "POST", "/projects/64/pipeline", level=DEVELOPER, json={"ref": ref})
        assert "sufficient permission to run a pipeline" in refused.json()["message"]["base"][0]
        assert ask(gitlab, "POST", "/projects/64/pipeline", json={"ref": ref}).status_code == 201
    missing = ask(gitlab, "POST", "/projects/64/pipeline", json={"ref": "nowhere"})
    assert missing.json()["message"] == {"base": ["Reference not found"]}


# ---- Artifacts ------------------------------------------------------------------------------------------------


def artifact(gitlab: GitLabEmulator, ref: str, **query: str) -> bytes | int:
    path = f"/projects/64/jobs/artifacts/{ref.replace('/', '%2F')}/raw/a.txt"
    answer = ask(gitlab, "GET", path, "read_api", REPORTER, params={"job": "train"} | query)
    return answer.content if answer.ok else answer.status_code


def test_artifacts_are_those_of_one_ref_and_the_list_has_all_refs_newest_first(
    gitlab: GitLabEmulator,
) -> None:
    for kind in ("head", "merge", "train"):
        gitlab.add_pipeline(3, {"train": {"a.txt": kind.encode()}}, kind=kind)
    gitlab.add_pipeline(3, {"train": {"a.txt": b"failed"}}, status="failed", kind="merge")
    listed = ask(gitlab, "GET", "/projects/64/merge_requests/3/pipelines", "read_api", REPORTER).json()
    refs = [known["ref"].rpartition("/")[2] for known in listed]
    assert refs == ["merge", "train", "merge", "head"]
    for kind in ("head", "merge", "train"):
        assert artifact(gitlab, f"refs/merge-requests/3/{kind}") == kind.encode()
    assert artifact(gitlab, "experiment") == artifact(gitlab, "main") == 404


def test_expired_artifacts_are_gone(gitlab: GitLabEmulator) -> None:
    made = gitlab.add_pipeline(3, {"train": {"a.txt": b"a"}})
    [job] = gitlab.project.jobs[made["id"]]
    job.artifacts_expire_at = datetime.now(UTC) + timedelta(hours=1)
    assert artifact(gitlab, "refs/merge-requests/3/head") == b"a"
    job.artifacts_expire_at = datetime.now(UTC) - timedelta(hours=1)
    assert artifact(gitlab, "refs/merge-requests/3/head") == 404
    for path in (f"/jobs/{job.id}/artifacts", f"/jobs/{job.id}/artifacts/a.txt"):
        assert ask(gitlab, "GET", f"/projects/64{path}").status_code == 404


@pytest.mark.parametrize(("version", "found"), [("18.6", 404), ("18.9", 404), ("18.10", b"old")])
def test_older_pipelines_artifacts_are_found_only_where_asked_and_known(
    tmp_path: Path, version: str, found: bytes | int
) -> None:
    with emulator(tmp_path, version=version) as gitlab:
        gitlab.add_pipeline(3, {"train": {"a.txt": b"old"}})
        gitlab.add_pipeline(3, {"lint": {}})
        ref = "refs/merge-requests/3/head"
        assert artifact(gitlab, ref) == 404
        assert artifact(gitlab, ref, search_recent_successful_pipelines="true") == found


def test_runner_gets_protected_variables_on_protected_refs_only(gitlab: GitLabEmulator, work: Path) -> None:
    gitlab.project.protected_tags["v*"] = TagRule()
    fields = {"key": "SECRET", "value": "x", "protected": True}
    assert ask(gitlab, "POST", "/projects/64/variables", json=fields).status_code == 201
    registering = {"token": gitlab.project.registration_token}
    token = requests.post(f"{gitlab.url}/api/v4/runners", data=registering, timeout=10).json()["token"]

    def sees_secret() -> bool:
        answer = requests.post(f"{gitlab.url}/api/v4/jobs/request", json={"token": token}, timeout=10)
        assert answer.status_code == 201
        return "SECRET" in [variable["key"] for variable in answer.json()["variables"]]

    url = address(gitlab, "api", MAINTAINER)
    seen = []
    for refspec in ("HEAD:main", "HEAD:other", "HEAD:refs/tags/v1", "HEAD:refs/tags/x1", "HEAD~1:experiment"):
        git(work, "push", "--force", url, refspec)
        seen.append(sees_secret())
    assert seen == [True, False, True, False, False]
    gitlab.project.protected_branches["experiment"] = BranchRule(force_push=True)
    git(work, "push", "--force", url, "HEAD:experiment")
    assert started(gitlab)[-1][0] == "refs/merge-requests/3/head"
    assert sees_secret()
    assert (
        requests.post(f"{gitlab.url}/api/v4/jobs/request", json={"token": token}, timeout=10).status_code
        == 204
    )


def test_dump_has_pipelines_runners_and_variables_and_no_secret(
    gitlab: GitLabEmulator, tmp_path: Path
) -> None:
    made = gitlab.add_pipeline(3, {"train": {"a.txt": b"a"}})
    gitlab.project.jobs[made["id"]][0].artifacts_expire_at = datetime(2026, 1, 1, tzinfo=UTC)
    fields = {"token": gitlab.project.registration_token, "tag_list": "ml"}
    answer = requests.post(f"{gitlab.url}/api/v4/runners", data=fields, timeout=10).json()
    ask(gitlab, "POST", "/projects/64/variables", json={"key": "TOKEN", "value": "glpat-1234567890"})
    ask(gitlab, "POST", "/projects/64/pipeline", json={"ref": "main"})

    gitlab.dump(tmp_path / "state.json")

    text = (tmp_path / "state.json").read_text()
    assert '"TOKEN"' in text and "2026-01-01T00:00:00" in text
    secrets = [answer["token"], gitlab.project.registration_token, "glpat-1234567890", *gitlab.state.tokens]
    assert [secret for secret in secrets if secret in text] == []


# ---- Packages and images --------------------------------------------------------------------------------------

PACKAGE = "/projects/64/packages/generic/model/1.0.0/model.onnx"


def test_second_upload_stands_beside_the_first_and_is_served(gitlab: GitLabEmulator) -> None:
    for content in (b"one", b"two"):
        assert ask(gitlab, "PUT", PACKAGE, "job", DEVELOPER, data=content).status_code == 201
    assert ask(gitlab, "GET", PACKAGE, "job", REPORTER).content == b"two"
    [package] = ask(gitlab, "GET", "/projects/64/packages").json()
    files = ask(gitlab, "GET", f"/projects/64/packages/{package['id']}/package_files").json()
    assert [file["file_name"] for file in files] == ["model.onnx", "model.onnx"]
    assert files[0]["file_sha256"] != files[1]["file_sha256"]


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("my model/1.0.0/a", "package_name"),
        ("model/1..0/a", "package_version"),
        ("model/1 0/a", "package_version"),
        ("model/1.0.0/größe.txt", "file_name"),
        ("model/1.0.0/a%2Fb", "file_name"),
    ],
)
def test_package_of_a_name_that_gitlab_does_not_take_is_refused(
    gitlab: GitLabEmulator, path: str, parameter: str
) -> None:
    answer = ask(gitlab, "PUT", f"/projects/64/packages/generic/{path}", level=DEVELOPER, data=b"x")
    assert (answer.status_code, answer.json()) == (400, {"error": f"{parameter} is invalid"})
    assert ask(gitlab, "GET", "/projects/64/packages").json() == []


def test_second_upload_is_refused_where_the_group_wants_no_duplicates(gitlab: GitLabEmulator) -> None:
    gitlab.project.duplicate_packages = False
    assert ask(gitlab, "PUT", PACKAGE, data=b"one").status_code == 201
    refused = ask(gitlab, "PUT", PACKAGE, data=b"two")
    told = {"message": "400 Bad request - Duplicate package is not allowed"}
    assert (refused.status_code, refused.json()) == (400, told)
    assert ask(gitlab, "PUT", PACKAGE.replace(".onnx", ".npz"), data=b"two").status_code == 201


@pytest.mark.parametrize(
    ("image", "level", "told"),
    [
        ("ci:main", DEVELOPER, "denied: requested access to the resource is denied"),
        ("ci:merge-request-3", DEVELOPER, ""),
        ("ci:main", MAINTAINER, ""),
        ("ci:x", REPORTER, "denied: requested access to the resource is denied"),
        ("CI:x", MAINTAINER, "invalid reference format: repository name must be lowercase"),
    ],
)
def test_image_is_pushed_by_role_protection_and_lower_case_name(
    gitlab: GitLabEmulator, image: str, level: int, told: str
) -> None:
    gitlab.project.protected_container_tags.append(ContainerTagRule(1, "main|v.*"))
    token = gitlab.state.add_token(gitlab.project, "write_registry", level)
    if told:
        with pytest.raises(PermissionError, match=told):
            gitlab.push_image(f"g/proj/{image}", token.value)
        return
    gitlab.push_image(f"g/proj/{image}", token.value)
    [repository] = ask(gitlab, "GET", "/projects/64/registry/repositories").json()
    tags = f"/projects/64/registry/repositories/{repository['id']}/tags"
    assert [f"ci:{tag['name']}" for tag in ask(gitlab, "GET", tags).json()] == [image]


@pytest.mark.parametrize("scopes", ["read_registry", "read_api", "write_repository"])
def test_image_is_not_pushed_without_a_scope_for_it(gitlab: GitLabEmulator, scopes: str) -> None:
    token = gitlab.state.add_token(gitlab.project, scopes, MAINTAINER)
    with pytest.raises(PermissionError, match="denied"):
        gitlab.push_image("g/proj/ci:x", token.value)


def test_protected_image_is_not_deleted_by_a_developer(gitlab: GitLabEmulator) -> None:
    token = gitlab.state.add_token(gitlab.project, "write_registry", MAINTAINER).value
    gitlab.push_image("g/proj/ci:main", token)
    gitlab.push_image("g/proj/ci:other", token)
    gitlab.project.protected_container_tags.append(ContainerTagRule(1, "main"))
    [known] = gitlab.project.registry.values()
    path = f"/projects/64/registry/repositories/{known['id']}/tags"
    assert ask(gitlab, "DELETE", f"{path}/main", level=DEVELOPER).status_code == 403
    assert ask(gitlab, "DELETE", f"{path}/other", level=DEVELOPER).status_code == 200
    assert ask(gitlab, "DELETE", f"{path}/main").status_code == 200


# ---- Logs -----------------------------------------------------------------------------------------------------


def log(gitlab: GitLabEmulator, words: str, status: str = "success") -> str:
    made = gitlab.add_pipeline(3, {"train": {}}, status=status)
    [job] = gitlab.project.jobs[made["id"]]
    job.trace = words
    return ask(gitlab, "GET", f"/projects/64/jobs/{job.id}/trace", "read_api", REPORTER).text


def test_log_of_a_newer_runner_has_a_time_in_each_line(gitlab: GitLabEmulator) -> None:
    text = log(gitlab, "epoch 1\nTraceback\n", "failed")
    assert re.search(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z 01O Traceback$", text, re.MULTILINE)
    assert re.search(r"Z 00O section_start:\d+:step_script\r\x1b\[0K\n\S+Z 00O\+\x1b\[0K", text)
    assert "ERROR: Job failed: exit code 1" in text.splitlines()[-1]


def test_log_of_an_older_runner_has_none(tmp_path: Path) -> None:
    with emulator(tmp_path, runner="18.6") as gitlab:
        text = log(gitlab, "epoch 1\n")
        assert "\nepoch 1\n" in text
        assert not re.search(r"\d{4}-\d\d-\d\dT", text)
        assert re.search(r"section_end:\d+:step_script\r\x1b\[0K\x1b\[0K", text)
