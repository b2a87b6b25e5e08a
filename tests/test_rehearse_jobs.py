"""The rehearsal's runner does with a job what GitLab and its runner do: in containers, and in a shell where it can."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rehearse import gitlab
from rehearse.gitlab import Event, Variable
from rehearse.jobs import Containers, Executor, Shell
from rehearse.pipelines import Run, Runner, expand
from rehearse.project import CI_IMAGE, ROOT
from rehearse.rules import starts
from tests import containers
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.git import git

VARIABLES = [
    Variable("EVERYWHERE", "project"),
    Variable("SCOPED", "of experiments", scope="experiment/*"),
    Variable("SCOPED", "of the report", scope="experiment/report"),
    Variable("PROTECTED", "protected-value", protected=True),
    Variable("SECRET", "masked-secret-value", masked=True),
    Variable("KEY_FILE", "line 1\nline 2\n", file=True),
]


@dataclass
class Repository:
    """A project of one commit; `runner` runs the YAML that a test writes."""

    emulator: GitLabEmulator
    runner: Runner
    sha: str

    def event(self, **changes: object) -> Event:
        variables = gitlab.merge_request(1, self.sha, "branch")
        return replace(Event(variables, "refs/merge-requests/1/head", self.sha), **changes)  # type: ignore[arg-type]

    def run(self, yaml: str, **changes: object) -> Run:
        return self.runner.run(expand(yaml), self.event(**changes))


def in_shell(folder: Path) -> Executor:
    return Shell(folder / "builds", ROOT / "src")


def in_containers(folder: Path) -> Executor:
    containers.need_containers()
    return Containers("podman", {CI_IMAGE: containers.ci_image()}, options=containers.LIMITS)


EXECUTORS = (in_shell, pytest.param(in_containers, marks=pytest.mark.slow))


@pytest.fixture(params=EXECUTORS)
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    yield from make(request.param, tmp_path)


def make(executor: Callable[[Path], Executor], folder: Path) -> Iterator[Repository]:
    runs_in = executor(folder)
    with GitLabEmulator() as emulator:
        bare = folder / "gitlab.git"
        emulator.add_repository(bare)
        work = folder / "work"
        git(folder, "init", "--quiet", "--initial-branch=main", str(work))
        (work / "file").write_text("hello")
        git(work, "add", "file")
        for title in ("First", "Second"):
            git(work, "commit", "--quiet", "--allow-empty", "--message", title)
        git(work, "push", "--quiet", str(bare), "main")
        sha = git(work, "rev-parse", "HEAD")
        yield Repository(emulator, Runner(emulator, runs_in, VARIABLES), sha)


IMAGE = f"image: {CI_IMAGE}:main\n"
LOOK = IMAGE + """
look:
  environment: {name: experiment/report}
  variables: {OF_JOB: "${EVERYWHERE} of $CI_JOB_NAME"}
  script:
    - python3 -c 'import json, os; json.dump(dict(os.environ), open("environment.json", "w"))'
    - cat "$KEY_FILE" > key.txt
    - echo "the secret is $SECRET, the token $CI_JOB_TOKEN"
    - git log --oneline > log.txt
  artifacts: {paths: ["*.json", "*.txt"]}
"""


def test_job_sees_what_gitlab_gives_and_nothing_of_this_machine(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "REPO_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_TOKEN",
        "http_proxy",
        "CI_COMMIT_TAG",
    ):
        monkeypatch.setenv(name, "of this machine")
    run = repository.run(LOOK)
    assert run.jobs == {"look": "success"}, run.output
    seen = json.loads(run.artifacts["look"]["environment.json"])
    assert "of this machine" not in seen.values()
    assert seen["EVERYWHERE"] == "project" and seen["SCOPED"] == "of the report"
    assert seen["OF_JOB"] == "project of look"
    assert seen["CI_MERGE_REQUEST_IID"] == "1" and seen["CI_COMMIT_SHA"] == repository.sha
    assert "PROTECTED" not in seen and "CI_COMMIT_BRANCH" not in seen
    assert run.artifacts["look"]["key.txt"] == b"line 1\nline 2\n"
    trace = run.traces["look"]
    assert "the secret is [MASKED], the token [MASKED]" in trace
    assert "masked-secret-value" not in trace and seen["CI_JOB_TOKEN"] not in trace
    assert seen["CI_JOB_TOKEN"] not in repository.emulator.state.tokens  # it dies with its job


def test_job_of_a_protected_ref_sees_protected_variables_and_has_caches_of_its_own(
    repository: Repository,
) -> None:
    yaml = IMAGE + """
look:
  cache: {key: pip, paths: [kept]}
  script: [cat kept/who || true, mkdir -p kept, 'echo "$CI_COMMIT_REF_PROTECTED $PROTECTED" > kept/who']
"""
    branch = {"protected": True, "ref": "main", "variables": gitlab.branch()}
    for run in (repository.run(yaml), repository.run(yaml, **branch)):
        assert run.jobs == {"look": "success"}, run.output
    caches = repository.runner.caches
    assert set(caches) == {"pip-non_protected", "pip-protected"}
    again = repository.run(yaml, **branch)
    assert "true protected-value" in again.traces["look"]


def test_log_has_a_time_and_a_stream_on_each_line_and_sections(repository: Repository) -> None:
    run = repository.run(IMAGE + "talk: {script: [echo out, echo err >&2]}")
    lines = run.traces["talk"].splitlines()
    assert all(
        line[26:28] in ("Z ",) and line[28:31] in ("00O", "00E", "01O", "01E")
        for line in lines
        if line[:2] == "20"
    )
    assert any(line.endswith("01O out") for line in lines) and any(line.endswith("01E err") for line in lines)
    assert "section_start:" in run.traces["talk"] and "\r" in run.traces["talk"]


def test_checkout_is_detached_and_as_deep_as_asked_for(repository: Repository) -> None:
    yaml = IMAGE + """
deep: {variables: {GIT_DEPTH: "0"}, script: [git log --oneline | wc -l, git branch -r]}
shallow: {variables: {GIT_DEPTH: "1"}, script: [git log --oneline | wc -l, git status]}
none: {variables: {GIT_STRATEGY: none}, script: ["[ ! -e file ]"]}
"""
    run = repository.run(yaml)
    assert set(run.jobs.values()) == {"success"}, run.output
    assert "01O 2" in run.traces["deep"] and "origin/main" in run.traces["deep"]
    assert "01O 1" in run.traces["shallow"] and "HEAD detached" in run.traces["shallow"]


def test_jobs_wait_skip_and_fail_as_gitlab_has_them(repository: Repository) -> None:
    yaml = IMAGE + """
stages: [one, two, three]
make:
  stage: one
  script: ["mkdir -p deep/er", "echo 1 > deep/er/file", 'echo "NUMBER=7" > it.env']
  artifacts: {paths: [deep/], reports: {dotenv: it.env}}
use: {stage: two, needs: [make], script: ["[ $NUMBER = 7 ]", cat deep/er/file, echo 2 > deep/er/file]}
without: {stage: two, needs: [{job: make, artifacts: false}], script: ["[ -z $NUMBER ]", "[ ! -e deep ]"]}
break: {stage: two, needs: [], script: [echo before, exit 3, echo never], after_script: [echo "after all"]}
may: {stage: two, needs: [], allow_failure: true, script: ["false"]}
after-may: {stage: three, needs: [may], script: ["true"]}
after-break: {stage: three, needs: [break], script: ["true"]}
says: {stage: three, needs: [break], when: on_failure, script: ["true"]}
says-too-much: {stage: three, needs: [break, after-break], when: on_failure, script: ["true"]}
by-hand: {stage: three, needs: [], when: manual, script: ["true"]}
stage: {stage: three, script: ["true"]}
cleans: {stage: three, when: always, script: ["true"]}
"""
    run = repository.run(yaml)
    ended = {"success": {"make", "use", "without", "after-may", "says", "cleans"}, "failed": {"break", "may"}}
    ended |= {"skipped": {"after-break", "says-too-much", "stage"}, "manual": {"by-hand"}}
    assert run.jobs == {name: status for status, names in ended.items() for name in names}, run.output
    assert "after all" in run.traces["break"] and "never" not in run.traces["break"].replace("echo never", "")
    assert "exit code 3" in run.traces["break"]
    [pipeline] = repository.emulator.project.pipelines
    assert pipeline["status"] == "failed"


@pytest.mark.parametrize(
    "other",
    ("", "b: {rules: [{if: $CI_COMMIT_TAG}], script: ['true']}"),
    ids=("absent", "left out by its rules"),
)
def test_pipeline_is_refused_when_a_needed_job_is_not_in_it(tmp_path: Path, other: str) -> None:
    for repository in make(in_shell, tmp_path):
        with pytest.raises(ValueError, match="'a' job needs 'b' job, but 'b' does not exist in the pipeline"):
            repository.run(f"a: {{needs: [b], script: ['true']}}\n{other}")
        run = repository.run(f"a: {{needs: [{{job: b, optional: true}}], script: ['true']}}\n{other}")
        assert run.jobs == {"a": "success"}


def test_pipeline_is_refused_when_workflow_makes_none(tmp_path: Path) -> None:
    for repository in make(in_shell, tmp_path):
        with pytest.raises(ValueError, match="`workflow` makes no pipeline"):
            repository.run("workflow: {rules: [{if: $CI_COMMIT_TAG}]}\na: {script: ['true']}")


@pytest.mark.parametrize(
    ("when", "statuses", "expected"),
    (
        ("on_success", [("success", False), ("failed", True)], True),
        ("on_success", [("success", False), ("skipped", False)], False),
        ("on_failure", [("failed", False), ("success", False)], True),
        ("on_failure", [("failed", False), ("skipped", False)], False),
        ("on_failure", [("failed", True)], False),
        ("always", [("failed", False), ("skipped", False)], True),
    ),
)
def test_needs_decide_whether_a_job_starts(
    when: str, statuses: list[tuple[str, bool]], expected: bool
) -> None:
    assert starts(when, statuses, by_needs=True) == expected


def test_image_of_the_jobs_has_all_that_make_installs() -> None:
    """Else `make lint` and `make pytest` are green here and red there."""
    [extras] = re.findall(r"^EXTRAS := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    [given] = re.findall(r"requirements\.py (.+) > requirements", (ROOT / "Dockerfile").read_text())
    assert given.split() == extras.split(",")


# ---- Only in containers


@pytest.fixture
def contained(tmp_path: Path) -> Iterator[Repository]:
    yield from make(in_containers, tmp_path)


OWNERS = IMAGE + """
make:
  script: [id -u, stat -c "checkout of %u mode %a" ., umask, touch "by the job", mkdir made, echo 1 > made/file, echo 1 > /tmp/left]
  artifacts: {paths: [made]}
next:
  needs: [make]
  script: ['stat -c "%n of %u mode %a" made made/file', "[ ! -e /tmp/left ]", "[ ! -e 'by the job' ]"]
"""


@pytest.mark.slow
def test_container_is_fresh_and_its_user_is_not_the_checkouts_owner(contained: Repository) -> None:
    run = contained.run(OWNERS)
    assert set(run.jobs.values()) == {"success"}, run.output
    assert "checkout of 0 mode 777" in run.traces["make"] and "01O 1000" in run.traces["make"]
    assert (
        "made of 1000 mode 755" in run.traces["next"] and "made/file of 1000 mode 644" in run.traces["next"]
    )


@pytest.mark.slow
def test_git_refuses_the_checkout_in_an_image_that_does_not_trust_it(contained: Repository) -> None:
    """As in the image of jobs before it had safe.directory: every pipeline was red."""
    yaml = IMAGE + "git: {script: [git rev-parse HEAD]}"
    assert contained.run(yaml).jobs == {"git": "success"}
    executor = contained.runner.executor
    assert isinstance(executor, Containers)
    bare = [*executor.options, "--volume", f"{os.devnull}:/etc/gitconfig"]
    contained.runner.executor = replace(executor, options=bare)
    run = contained.run(yaml)
    assert run.jobs == {"git": "failed"} and "dubious ownership" in run.traces["git"]


@pytest.mark.slow
def test_job_whose_image_is_not_here_is_said_not_to_have_run(contained: Repository) -> None:
    run = contained.run("build: {image: docker.io/moby/buildkit, script: ['false']}")
    assert run.not_run == ("build",) and "no image docker.io/moby/buildkit" in run.traces["build"]
