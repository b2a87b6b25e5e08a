"""Which jobs a pipeline has, by its source, and which of them see which variables: over the expanded YAML."""

import fnmatch
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rehearse import gitlab, runner
from rehearse.project import ROOT
from tests.pipeline_yaml import Expanded, evaluate, expand, listed, repository

NO_SHA = "0" * 40
MERGE_REQUEST = gitlab.merge_request(3, NO_SHA, "experiment")
# Run in the fork with the fork's variables, or by a member of the parent in the parent.
FORK = gitlab.merge_request(3, NO_SHA, "experiment", source_project=gitlab.FORK_ID) | {
    "CI_PROJECT_ID": gitlab.FORK_ID
}
FORK_IN_PARENT = gitlab.merge_request(3, NO_SHA, "experiment", source_project=gitlab.FORK_ID)
LINT = {"lint", "test"}
EXPERIMENT = {"preflight", "pipeline", "report", "report-failure", "preflight-failure", "gate"}
RELEASE = {"release", "serve-image", "deploy"}

SOURCES: dict[str, tuple[dict[str, str], set[str]]] = {
    "merge request": (MERGE_REQUEST, LINT | EXPERIMENT),
    "merge request of a fork": (FORK, LINT),
    "merge request of a fork, run in the parent": (FORK_IN_PARENT, LINT),
    "push to the default branch": (gitlab.branch(), LINT | RELEASE),
    "push to another branch": (gitlab.branch(name="experiment"), set()),
    "started by hand on the default branch": (gitlab.branch("web"), LINT | RELEASE),
    "started by hand to build the image of the jobs": (
        gitlab.branch("web") | {"BUILD_CI_IMAGE": "true"},
        LINT | RELEASE | {"ci-image"},
    ),
    "started by hand on another branch": (gitlab.branch("web", "experiment"), set()),
    "schedule": (gitlab.branch("schedule"), {"retrain"}),
    "trigger": (gitlab.branch("trigger"), {"retrain"}),
    "trigger by another project's job": (gitlab.branch("pipeline"), {"retrain"}),
    "trigger on another branch": (gitlab.branch("trigger", "experiment"), set()),
    "tag of the template": (gitlab.tag("v1.2.3"), LINT | {"component", "ci-image"}),
    "tag of a model": (gitlab.tag("model-v1.2.3"), {"reproduce"}),
    "another tag": (gitlab.tag("friday"), set()),
}
WITH_PROTECTED = {
    "push to the default branch",
    "started by hand on the default branch",
    "started by hand to build the image of the jobs",
    "schedule",
    "trigger",
} | {
    "trigger by another project's job",
    "tag of the template",  # if tags are protected
    "tag of a model",
}

# As docs/gitlab.md says to set them: name → scope, protected.
VARIABLES = {
    "AWS_SECRET_ACCESS_KEY of merge requests": ("experiment/*", False),
    "REPO_TOKEN": ("experiment/report", False),
    "AWS_SECRET_ACCESS_KEY of the release": ("release", True),
    "RELEASE_TOKEN": ("release", True),
    "DEPLOY_WEBHOOK_TOKEN": ("production", True),
}
STORE = "AWS_SECRET_ACCESS_KEY of merge requests"
SEEN: dict[str, set[str]] = {
    "lint": set(),
    "test": set(),
    "ci-image": set(),
    "component": set(),
    "preflight": {STORE},
    "pipeline": {STORE},
    "report": {STORE, "REPO_TOKEN"},
    "report-failure": {STORE, "REPO_TOKEN"},
    "preflight-failure": {STORE, "REPO_TOKEN"},
    "gate": set(),
    "retrain": {STORE},
    "reproduce": {STORE},
    "release": {"AWS_SECRET_ACCESS_KEY of the release", "RELEASE_TOKEN"},
    "serve-image": set(),
    "deploy": {"DEPLOY_WEBHOOK_TOKEN"},
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        runner.install()
    except runner.Missing as error:
        pytest.skip(str(error))
    return repository(tmp_path_factory.mktemp("policy") / "project")


@pytest.fixture(scope="module")
def ci(checkout: Path) -> Expanded:
    return expand(checkout)


def environment_of(ci: Expanded, job: str) -> str | None:
    environment = ci.jobs[job].get("environment")
    return environment["name"] if environment else None


def seen(ci: Expanded, job: str, protected_ref: bool) -> set[str]:
    """GitLab's rule: a job without an environment sees only variables whose scope is *."""
    environment = environment_of(ci, job)
    return {
        name
        for name, (scope, protected) in VARIABLES.items()
        if environment and fnmatch.fnmatch(environment, scope) and (protected_ref or not protected)
    }


@pytest.mark.parametrize("source", SOURCES)
def test_pipeline_has_exactly_the_jobs_of_its_source(ci: Expanded, source: str) -> None:
    variables, expected = SOURCES[source]
    assert set(ci.pipeline(variables)) == expected


def test_branch_beside_a_merge_request_makes_no_pipeline_whatever_jobs_a_team_adds(ci: Expanded) -> None:
    added = Expanded(ci.tree | {"theirs": {"script": ["make"], "rules": [{"when": "always"}]}})
    made = {source for source, (variables, _) in SOURCES.items() if added.pipeline(variables)}
    assert made == {source for source, (_, jobs) in SOURCES.items() if jobs}


@pytest.mark.parametrize(
    "source",
    ["merge request", "merge request of a fork", "push to the default branch", "schedule", "tag of a model"],
)
def test_gitlab_ci_local_agrees_on_the_jobs(checkout: Path, ci: Expanded, source: str) -> None:
    """Two evaluations of the same rules: ours above knows `workflow`, gitlab-ci-local is not ours."""
    variables, _ = SOURCES[source]
    assert listed(checkout, variables) == ci.pipeline(variables)


def test_every_job_runs_from_some_source(ci: Expanded) -> None:
    reached = {job for variables, _ in SOURCES.values() for job in ci.pipeline(variables, {"Dockerfile"})}
    assert reached == set(ci.jobs) == set(SEEN)


@pytest.mark.parametrize("source", SOURCES)
def test_each_job_sees_the_variables_it_needs_and_no_others(ci: Expanded, source: str) -> None:
    protected = source in WITH_PROTECTED
    for job in ci.pipeline(SOURCES[source][0]):
        expected = {name for name in SEEN[job] if protected or not VARIABLES[name][1]}
        assert seen(ci, job, protected) == expected, job


@pytest.mark.parametrize("source", ["merge request of a fork", "merge request of a fork, run in the parent"])
def test_fork_meets_no_credential_and_pushes_no_image(ci: Expanded, source: str) -> None:
    jobs = ci.pipeline(SOURCES[source][0], changed={"Dockerfile", "constraints.txt"})
    assert set(jobs) == LINT
    assert [environment_of(ci, job) for job in jobs] == [None, None]


def test_merge_request_never_meets_what_can_change_main(ci: Expanded) -> None:
    for job in ci.pipeline(MERGE_REQUEST):
        assert not {"RELEASE_TOKEN", "AWS_SECRET_ACCESS_KEY of the release"} & seen(
            ci, job, protected_ref=True
        )


def test_image_of_the_jobs_is_rebuilt_and_used_only_where_its_inputs_change(ci: Expanded) -> None:
    for changed, expected in (("Dockerfile", True), ("constraints.txt", True), ("src/ml/errors.py", False)):
        assert ("ci-image" in ci.pipeline(MERGE_REQUEST, {changed})) == expected
        assert ("ci-image" in ci.pipeline(gitlab.branch(), {changed})) == expected
    rules = ci.tree["workflow"]["rules"]
    images = [rule.get("variables", {}).get("JOB_IMAGE") for rule in rules[:3]]
    assert images[1] == "$CI_REGISTRY_IMAGE/ci:merge-request-$CI_MERGE_REQUEST_IID" and images[2] is None


def test_comment_is_posted_before_the_gate_can_turn_red(ci: Expanded) -> None:
    assert [need["job"] for need in ci.jobs["gate"]["needs"]] == ["report"]
    assert "publish" not in " ".join(ci.jobs["gate"]["script"])


def test_comment_says_it_whichever_job_before_the_report_has_failed(ci: Expanded) -> None:
    """GitLab skips a job of `on_failure` when one of several needs was skipped, so each has one."""
    jobs = ci.pipeline(MERGE_REQUEST)
    needs = {
        name: [need["job"] for need in ci.jobs[name]["needs"]] for name in jobs if jobs[name] == "on_failure"
    }
    assert needs == {"report-failure": ["pipeline"], "preflight-failure": ["preflight"]}
    assert not any("ml.release.remote" in line for name in needs for line in ci.jobs[name]["before_script"])


def test_no_job_waits_for_one_that_is_started_by_hand(ci: Expanded) -> None:
    for variables, _ in SOURCES.values():
        jobs = ci.pipeline(variables, {"Dockerfile"})
        for job in jobs:
            for need in ci.jobs[job].get("needs") or []:
                assert jobs.get(need["job"]) != "manual", job


def test_what_pushes_or_deploys_is_never_interrupted_and_never_runs_twice_at_once(ci: Expanded) -> None:
    for job, entry in ci.jobs.items():
        pushes = job in RELEASE
        assert entry.get("interruptible", False) == (not pushes and job != "component"), job
        assert "resource_group" in entry or not pushes, job
    assert ci.jobs["report"]["resource_group"] == ci.jobs["report-failure"]["resource_group"]
    assert "$CI_MERGE_REQUEST_IID" in ci.jobs["report"]["resource_group"]


def test_only_jobs_that_train_run_on_the_training_runner(ci: Expanded) -> None:
    tagged = {job for job, entry in ci.jobs.items() if entry.get("tags") == ["$RUNNER_TAG"]}
    assert tagged == {"pipeline", "retrain", "reproduce", "release"}
    assert {job for job, entry in ci.jobs.items() if entry.get("tags")} == tagged


def test_every_job_has_a_time_limit_and_is_repeated_only_for_the_runners_faults(ci: Expanded) -> None:
    for job, entry in ci.jobs.items():
        assert entry["timeout"], job
        faults = set(entry.get("retry", {}).get("when", []))
        assert faults <= {"runner_system_failure", "scheduler_failure", "api_failure"}, job


def test_images_are_pinned(ci: Expanded) -> None:
    for job, entry in ci.jobs.items():
        image = entry["image"]["name"]
        assert image == "$JOB_IMAGE" or re.search(r":v\d+\.\d+\.\d+", image), f"{job}: {image}"


def test_jobs_call_make_and_python_and_hold_no_shell_programs(ci: Expanded) -> None:
    allowed = re.compile(
        r"make [\w-]+|python -m ml\.[\w.]+( \S+)*|python \.ci/\w+\.py( \S+)*|sh \.ci/\w+\.sh( \S+)*|echo .+"
        r'|export PATH="\$PWD/\.venv/bin:\$PATH" PYTHONPATH="\$PWD/src"'
    )
    for job, entry in ci.jobs.items():
        for line in [*entry.get("before_script", []), *entry["script"]]:
            assert allowed.fullmatch(line) and not re.search(r"[;|`]|&&|\$\(", line), f"{job}: {line}"
        assert "after_script" not in entry and not {"only", "except"} & set(entry), job


def test_reports_for_the_merge_request_page_are_there(ci: Expanded) -> None:
    assert "codequality" in ci.jobs["lint"]["artifacts"]["reports"]
    assert set(ci.jobs["test"]["artifacts"]["reports"]) == {"junit", "coverage_report"}
    assert (
        re.search(ci.jobs["test"]["coverage"].strip("/"), "TOTAL   4711   12   99   3    98.7%")[1] == "98.7"
    )


def test_variables_of_the_header_are_explained_in_the_page_for_newcomers() -> None:
    header = (ROOT / ".gitlab-ci.yml").read_text().partition("\nstages:")[0]
    page = (ROOT / "docs" / "gitlab.md").read_text()
    names = set(re.findall(r"\b[A-Z][A-Z]+_[A-Z_]+\b", header))
    assert {"DVC_REMOTE_URL", "REPO_TOKEN", "RELEASE_TOKEN", "RUNNER_TAG"} <= names
    assert {name for name in names if name not in page} == set()


def test_page_for_newcomers_gives_each_variable_the_scope_that_the_jobs_have(ci: Expanded) -> None:
    page = (ROOT / "docs" / "gitlab.md").read_text()
    scopes = set(re.findall(r"`(experiment/\*|experiment/report|release|production)`", page))
    assert scopes == {"experiment/*", "experiment/report", "release", "production"}
    environments = {environment_of(ci, job) for job in ci.jobs} - {None}
    for scope in scopes:
        assert any(fnmatch.fnmatch(str(name), scope) for name in environments), scope


def test_sweep_of_the_page_is_one_job_for_each_value_by_hand(tmp_path: Path, checkout: Path) -> None:
    page = (ROOT / "docs" / "gitlab.md").read_text()
    [sweep] = re.findall(r"```yaml\n(sweep:\n.*?)```", page, re.DOTALL)
    folder = repository(tmp_path / "project")
    with open(folder / ".gitlab-ci.yml", "a") as file:
        file.write(f"\n{sweep}")
    jobs = listed(folder, MERGE_REQUEST)
    assert {name: when for name, when in jobs.items() if name.startswith("sweep")} == {
        f"sweep: [{rate}]": "manual" for rate in ("0.002", "0.005", "0.01")
    }
    assert not {name for name in listed(folder, FORK) if name.startswith("sweep")}
    expand(folder, MERGE_REQUEST)


def test_component_has_a_typed_header_and_no_global_keywords() -> None:
    header, body = YAML(typ="safe").load_all((ROOT / "templates/experiment/template.yml").read_text())
    inputs = header["spec"]["inputs"]
    assert {"image", "remote", "runner-tag", "margin"} <= set(inputs)
    assert all("description" in each or "default" in each for each in inputs.values())
    assert not {"default", "stages", "variables", "workflow", "include"} & set(body)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('$A == "1"', True),
        ("$A != $B", True),
        ("$C != $D", False),  # both unset
        ("$C == null", True),
        ("$A", True),
        ("$C", False),
        ('$A == "2" || $B =~ /^t.o$/ && $A == "1"', True),
        ('($A == "1" || $B == "x") && $C', False),
        ("$C =~ /x/", False),
    ],
)
def test_rules_are_evaluated_as_gitlab_documents_them(expression: str, expected: bool) -> None:
    assert evaluate(expression, {"A": "1", "B": "two"}) is expected
