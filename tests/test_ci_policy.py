"""Which jobs a pipeline has, by its source, and which of them see which variables: over the expanded YAML."""

import fnmatch
import re
import subprocess
import sys
from itertools import chain, combinations, dropwhile, takewhile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rehearse import gitlab, runner
from rehearse.project import ROOT
from rehearse.rules import evaluate, needs
from tests.pipeline_yaml import Expanded, expand, listed, repository

NO_SHA = "0" * 40
# GitLab's, lower case whatever the path is
REGISTRY = {"CI_REGISTRY_IMAGE": "registry.example.com/my-group/proj"}
MERGE_REQUEST = gitlab.merge_request(3, NO_SHA, "experiment") | REGISTRY
BETWEEN_PROTECTED = MERGE_REQUEST | {"CI_COMMIT_REF_PROTECTED": "true"}
# Run in the fork with the fork's variables, or by a member of the parent in the parent.
FORK = gitlab.merge_request(3, NO_SHA, "experiment", source_project=gitlab.FORK_ID) | {
    "CI_PROJECT_ID": gitlab.FORK_ID,
    "CI_MERGE_REQUEST_PROJECT_PATH": "My-Group/Proj",
    "CI_REGISTRY_IMAGE": "registry.example.com/somebody/proj",
}
FORK_IN_PARENT = gitlab.merge_request(3, NO_SHA, "experiment", source_project=gitlab.FORK_ID) | REGISTRY
PUSH = gitlab.branch() | REGISTRY
VERSION, MODEL = gitlab.tag("v1.2.3") | REGISTRY, gitlab.tag("model-v1.2.3") | REGISTRY
# Of the jobs' image.
INPUTS = ("Dockerfile", "constraints.txt", "pyproject.toml", "deploy/image/requirements.py")
LINT = {"lint", "test"}
JUDGES = {"preflight", "report", "gate", "preflight-failure", "pipeline-failure", "report-failure"}
EXPERIMENT = JUDGES | {"pipeline"}
RELEASE = {"release", "serve-image", "deploy"}
TRAINS = {"pipeline", "retrain", "reproduce"}

SOURCES: dict[str, tuple[dict[str, str], set[str]]] = {
    "merge request": (MERGE_REQUEST, LINT | EXPERIMENT),
    "merge request between two protected branches": (BETWEEN_PROTECTED, LINT | EXPERIMENT),
    "merge request of a fork": (FORK, LINT),
    "merge request of a fork, run in the parent": (FORK_IN_PARENT, LINT),
    "push to the default branch": (PUSH, LINT | RELEASE | {"ci-image-main"}),
    "push to a default branch of another name": (
        gitlab.branch(name="trunk") | REGISTRY | {"CI_DEFAULT_BRANCH": "trunk"},
        LINT | RELEASE | {"ci-image-main"},
    ),
    "push to another branch": (gitlab.branch(name="experiment"), set()),
    "started by hand on the default branch": (gitlab.branch("web") | REGISTRY, LINT | {"ci-image"}),
    "started by the API on the default branch": (gitlab.branch("api") | REGISTRY, LINT | {"ci-image"}),
    "started by hand on another branch": (gitlab.branch("web", "experiment"), set()),
    "schedule": (gitlab.branch("schedule"), {"retrain"}),
    "trigger": (gitlab.branch("trigger"), {"retrain"}),
    "trigger by another project's job": (gitlab.branch("pipeline"), {"retrain"}),
    "trigger on another branch": (gitlab.branch("trigger", "experiment"), set()),
    "tag of the template": (VERSION, LINT | {"component", "ci-image"}),
    "tag of a model": (MODEL, {"reproduce"}),
    "another tag": (gitlab.tag("friday"), set()),
}
WITHOUT_PROTECTED = {"merge request", "merge request of a fork", "merge request of a fork, run in the parent"}
# What GitLab hands to jobs of such pipelines is decided by protected tags and by its setting for merge requests; here
# it is taken to hand out what it can.
WITH_PROTECTED = set(SOURCES) - WITHOUT_PROTECTED

# As docs/gitlab.md says to set them: name → scope, protected.
PAGE = (ROOT / "docs" / "gitlab.md").read_text()
VARIABLES = {
    "credentials of the remote, for merge requests": ("experiment/*", False),
    "credentials of the remote, for releases": ("release/publish", True),
    "REPO_TOKEN": ("experiment/report", False),
    "RELEASE_TOKEN": ("release/*", True),
    "the same token, to deploy": ("production", True),
    "MLFLOW_TRACKING_URI": ("experiment/*", False),
    "the same, for releases": ("release/publish", True),
    "RELEASE_WITHOUT_REVIEW": ("release/publish", True),
    "DEPLOY_COMMAND": ("production", True),
    "SERVE_URL": ("production", True),
}
EXPERIMENTS = {"credentials of the remote, for merge requests", "MLFLOW_TRACKING_URI"}
SEEN: dict[str, set[str]] = {
    "lint": set(),
    "test": set(),
    "ci-image": set(),
    "ci-image-main": {"RELEASE_TOKEN"},
    "component": set(),
    "preflight": EXPERIMENTS,
    "pipeline": EXPERIMENTS,
    "report": EXPERIMENTS | {"REPO_TOKEN"},
    "ci-image-failure": EXPERIMENTS | {"REPO_TOKEN"},
    "preflight-failure": EXPERIMENTS | {"REPO_TOKEN"},
    "pipeline-failure": EXPERIMENTS | {"REPO_TOKEN"},
    "report-failure": EXPERIMENTS | {"REPO_TOKEN"},
    "gate": set(),
    "retrain": EXPERIMENTS,
    "reproduce": EXPERIMENTS,
    "release": {
        "credentials of the remote, for releases",
        "RELEASE_TOKEN",
        "the same, for releases",
        "RELEASE_WITHOUT_REVIEW",
    },
    "serve-image": {"RELEASE_TOKEN"},
    "deploy": {"DEPLOY_COMMAND", "SERVE_URL", "the same token, to deploy"},
}
PROTECTED = {name for name, (_, protected) in VARIABLES.items() if protected}


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
    added = Expanded(
        ci.tree | {"theirs": {"stage": "lint", "script": ["make"], "rules": [{"when": "always"}]}}
    )
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


# ---- Who can reach what


@pytest.mark.parametrize("source", SOURCES)
def test_protected_variable_meets_only_what_was_merged(ci: Expanded, source: str) -> None:
    """Whoever may not merge reaches it neither by an image, a cache or a variable of theirs, nor by their own code."""
    variables, _ = SOURCES[source]
    for job in ci.pipeline(variables, set(INPUTS)):
        if not PROTECTED & seen(ci, job, protected_ref=True):
            continue
        entry = ci.jobs[job]
        assert variables["CI_PIPELINE_SOURCE"] == "push", job  # of no web form, whose variables come first
        assert variables["CI_COMMIT_BRANCH"] == variables["CI_DEFAULT_BRANCH"], job
        image = ci.image(job, variables, set(INPUTS))
        ours = image.startswith(variables["CI_REGISTRY_IMAGE"])
        assert image.endswith("/ci:main") if ours else pinned(image), f"{job}: {image}"
        assert "cache" not in entry, job
        lines = [*entry.get("before_script", []), *entry["script"]]
        judged = all(line.startswith(("python -m ml.", "cd ")) for line in lines)
        assert judged if ours else lines[0].startswith("sh .ci/build_image.sh"), job
        assert not ours or entry["variables"]["PYTHONSAFEPATH"] == "1", job


def pinned(image: str) -> bool:
    """By a version or a digest of a registry in which nobody of the project writes."""
    return bool(re.search(r"(:v?\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})$", image)) and "$" not in image


@pytest.mark.parametrize("job", sorted(JUDGES | {"ci-image-failure", "release", "deploy"}))
def test_nothing_of_the_checkout_runs_where_it_is_judged(ci: Expanded, job: str) -> None:
    """No setup, no path into the checkout, and no file of its root that shadows a module (PYTHONSAFEPATH)."""
    entry = ci.jobs[job]
    assert entry["image"]["name"] == "$JUDGE_IMAGE"
    assert entry["variables"]["PYTHONSAFEPATH"] == "1" and "PYTHONPATH" not in entry["variables"]
    for line in [*entry["before_script"], *entry["script"]]:
        assert re.fullmatch(r'cd "\./"|python -m ml\.[\w.]+( \S+)*', line), line


@pytest.mark.parametrize("name", ["json", "numpy", "ml", "pydantic"])
def test_file_of_the_checkout_takes_no_module_s_place_where_it_is_judged(
    ci: Expanded, name: str, tmp_path: Path
) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the checkout ran')")
    safe = {"PYTHONSAFEPATH": ci.jobs["gate"]["variables"].get("PYTHONSAFEPATH", "")}
    done = subprocess.run(
        [sys.executable, "-m", "ml.report.gate", "--help"],
        cwd=tmp_path,
        env=runner.environment({"PYTHONPATH": str(ROOT / "src")}) | safe,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize("changed", [set(), set(INPUTS)])
def test_images_of_jobs_by_source(ci: Expanded, changed: set[str]) -> None:
    main, own = (
        "registry.example.com/my-group/proj/ci:main",
        "registry.example.com/my-group/proj/ci:merge-request-3",
    )
    for job in ci.pipeline(MERGE_REQUEST, changed):
        if job in JUDGES | {"ci-image-failure"}:
            assert ci.image(job, MERGE_REQUEST, changed) == main, job
        elif job != "ci-image":
            assert ci.image(job, MERGE_REQUEST, changed) == (own if changed else main), job
    for fork in (FORK, FORK_IN_PARENT):
        assert all(ci.image(job, fork, changed).startswith("docker.io/library/python:") for job in LINT)
    assert ci.image("lint", PUSH) == ci.image("release", PUSH) == main
    assert ci.image("lint", VERSION) == "registry.example.com/my-group/proj/ci:v1.2.3"


@pytest.mark.parametrize("source", SOURCES)
def test_image_names_are_lower_case_whatever_the_group_is_called(ci: Expanded, source: str) -> None:
    """CI_PROJECT_PATH and its like keep upper case, which no registry takes."""
    variables, _ = SOURCES[source]
    for job in ci.pipeline(variables, set(INPUTS)):
        image = ci.image(job, variables, set(INPUTS))
        assert image and image == image.lower() and "$" not in image, f"{job}: {image}"


def test_image_pinned_by_digest_is_used_and_never_pushed_to(ci: Expanded) -> None:
    digest = f"registry.example.com/my-group/proj/ci@sha256:{'0' * 64}"
    given = {"JOB_IMAGE": digest, "JUDGE_IMAGE": digest}
    pushed = {}
    for source, variables, job in (
        ("merge request", MERGE_REQUEST, "ci-image"),
        ("push", PUSH, "ci-image-main"),
        ("by hand", gitlab.branch("web") | REGISTRY, "ci-image"),
        ("tag", VERSION, "ci-image"),
    ):
        [line] = ci.jobs[job]["script"]
        pushed[source] = ci.resolve(job, line, variables | given, set(INPUTS)).split('"')[1]
    name = "registry.example.com/my-group/proj/ci"
    assert pushed == {
        "merge request": f"{name}:merge-request-3",
        "push": f"{name}:main",
        "by hand": f"{name}:main",
        "tag": f"{name}:v1.2.3",
    }
    assert ci.image("pipeline", MERGE_REQUEST | given, {"Dockerfile"}) == digest
    assert ci.image("release", PUSH | given) == digest


def test_new_pipeline_submits_no_variable_of_the_file() -> None:
    """What has a description is filled in under New pipeline, and sent as a variable that beats the project's."""
    variables = YAML(typ="safe").load((ROOT / ".gitlab-ci.yml").read_text())["variables"]
    assert [name for name, value in variables.items() if isinstance(value, dict)] == []


def test_caches_of_merge_requests_are_not_read_on_a_protected_branch(ci: Expanded) -> None:
    keys = {}
    for job, entry in ci.jobs.items():
        for cache in entry.get("cache", []):
            assert "$CI_COMMIT_REF_PROTECTED" in cache["key"]["prefix"], job
            keys[job] = cache["key"]["prefix"]
    assert set(keys) == LINT | TRAINS


# ---- What may be lost


@pytest.mark.parametrize("source", SOURCES)
def test_next_commit_stops_merge_requests_alone(ci: Expanded, source: str) -> None:
    """Two merges within the tests' time would cost the first one's release, and the image that the second builds on."""
    variables, jobs = SOURCES[source]
    merge_request = variables["CI_PIPELINE_SOURCE"] == gitlab.MERGE_REQUEST
    assert ci.lost(variables) == (jobs if merge_request else set())


@pytest.mark.parametrize("mode", ["interruptible", "conservative"])
def test_what_a_commit_stops_is_evaluated_as_gitlab_documents_it(mode: str) -> None:
    always = {"rules": [{"when": "always"}], "needs": []}
    tree = {
        "workflow": {"auto_cancel": {"on_new_commit": mode}, "rules": [{"if": "$A"}]},
        "a": always | {"interruptible": True},
        "b": always,
        "c": always | {"needs": [{"job": "a"}]},
    }
    assert Expanded(tree).lost({"A": "1"}) == ({"a", "c"} if mode == "interruptible" else {"a", "b", "c"})
    tree["workflow"]["rules"] = [{"if": "$A", "auto_cancel": {"on_new_commit": "none"}}]
    assert Expanded(tree).lost({"A": "1"}) == set()


def test_every_merge_builds_the_image_of_the_jobs_whatever_it_changed(ci: Expanded) -> None:
    """`changes` sees one push: what a failed or overtaken one should have built would never come."""
    for changed in (set(), {"src/ml/errors.py"}, set(INPUTS)):
        assert "ci-image-main" in ci.pipeline(PUSH, changed)
    for needed in LINT:
        assert "ci-image-main" in ci.needed(needed)


@pytest.mark.parametrize("name", INPUTS)
def test_merge_request_has_an_image_of_its_own_where_it_changes_what_that_is_made_from(
    ci: Expanded, name: str
) -> None:
    assert {"ci-image", "ci-image-failure"} <= set(ci.pipeline(MERGE_REQUEST, {name}))
    assert "ci-image" not in ci.pipeline(MERGE_REQUEST, {"src/ml/errors.py", f"docs/{name}"})


def test_image_inputs_are_what_the_dockerfile_copies(ci: Expanded) -> None:
    """But for the package: stages run the checkout's, and the judge's is main's."""
    stage = (ROOT / "Dockerfile").read_text().partition("AS ci\n")[2].partition("\nFROM ")[0]
    copied = {name for line in re.findall(r"COPY (?:--\S+ )*(.+) \S+\n", stage) for name in line.split()}
    assert copied - {"LICENSE", "README.md", "src"} | {"Dockerfile"} == set(INPUTS)
    for rule in [
        *ci.tree["workflow"]["rules"],
        *ci.jobs["ci-image"]["rules"],
        *ci.jobs["ci-image-failure"]["rules"],
    ]:
        assert set(rule.get("changes", INPUTS)) == set(INPUTS)


def test_what_a_deployment_that_is_run_again_takes_does_not_expire(ci: Expanded) -> None:
    for need in ci.needed("deploy"):
        assert ci.jobs[need]["artifacts"]["expire_in"] == "never"
    for job, entry in ci.jobs.items():
        assert "expire_in" in entry.get("artifacts", {"expire_in": ""}), job


# ---- The comment


def test_comment_is_posted_before_the_gate_can_turn_red(ci: Expanded) -> None:
    assert [need["job"] for need in ci.jobs["gate"]["needs"]] == ["report"]
    assert "publish" not in " ".join(ci.jobs["gate"]["script"])


FAILURE = {f"{job}-failure" for job in ("ci-image", "preflight", "pipeline", "report")}


@pytest.mark.parametrize("changed", [set(), set(INPUTS)])
def test_comment_says_it_whichever_jobs_fail_and_a_verdict_stands(ci: Expanded, changed: set[str]) -> None:
    """For every set of failing jobs: without a verdict one job of `on_failure` runs at least, with one none does."""
    jobs = ci.pipeline(MERGE_REQUEST, changed)
    may_fail = sorted(set(jobs) - FAILURE)
    for failing in chain.from_iterable(combinations(may_fail, size) for size in range(len(may_fail) + 1)):
        ends = ci.ends(jobs, failing)
        said = {name for name in FAILURE & set(jobs) if ends[name] == "success"}
        assert bool(said) == (ends["report"] != "success"), f"{failing}: {ends}"
        assert said == {
            f"{name}-failure" for name in failing if f"{name}-failure" in jobs and ends[name] == "failed"
        }


@pytest.mark.parametrize("failing", sorted(LINT | {"gate"}))
def test_red_lint_tests_or_gate_leave_the_verdict_alone(ci: Expanded, failing: str) -> None:
    ends = ci.ends(ci.pipeline(MERGE_REQUEST), [failing])
    assert {name for name, end in ends.items() if end == "failed"} == {failing}
    assert {name for name, end in ends.items() if end == "skipped"} == FAILURE - {"ci-image-failure"}


def test_failed_image_stops_the_training_and_not_the_judgement_of_the_lock(ci: Expanded) -> None:
    ends = ci.ends(ci.pipeline(MERGE_REQUEST, {"Dockerfile"}), ["ci-image"])
    assert ends["preflight"] == "success" and ends["pipeline"] == ends["lint"] == "skipped"


@pytest.mark.parametrize(
    ("needs", "failing", "end"),
    [
        (["a"], ["a"], "success"),
        (["a"], [], "skipped"),
        (["a", "b"], ["b"], "success"),
        (["b", "c"], ["b"], "skipped"),  # c needs b, and was skipped (#388866)
        ([], [], "skipped"),
    ],
)
def test_jobs_after_a_failure_are_evaluated_as_gitlab_documents_them(
    needs: list[str], failing: list[str], end: str
) -> None:
    tree = {"a": {"needs": []}, "b": {"needs": []}, "c": {"needs": [{"job": "b"}]}}
    jobs = Expanded(tree | {"said": {"needs": [{"job": name} for name in needs]}})
    assert jobs.ends({name: "on_success" for name in "abc"} | {"said": "on_failure"}, failing)["said"] == end


def test_no_job_of_a_merge_request_is_given_a_baseline(ci: Expanded) -> None:
    """The commands know it: in a pipeline of merged results it is another one than the merge request's base."""
    for job in ci.pipeline(MERGE_REQUEST, set(INPUTS)):
        assert not any("SHA" in line for line in ci.jobs[job]["script"]), job
    assert "--since-baseline" in " ".join(ci.jobs["preflight"]["script"])


def test_failure_comment_needs_neither_the_remote_nor_history(ci: Expanded) -> None:
    for job in FAILURE:
        assert not any(
            "ml.release" in line for line in ci.jobs[job]["before_script"] + ci.jobs[job]["script"]
        )
        assert ci.jobs[job]["resource_group"] == ci.jobs["report"]["resource_group"]


def test_merge_request_links_the_comment_itself_and_no_folder(ci: Expanded) -> None:
    """Ci::FindExposedArtifactsService: to the file where `paths` is one file, by its plain name; else to the browser."""
    exposed = {
        job: entry["artifacts"]["paths"]
        for job, entry in ci.jobs.items()
        if "expose_as" in entry.get("artifacts", {})
    }
    assert exposed == {"gate": ["reports/comment.html"]}
    assert ci.jobs["gate"]["artifacts"]["when"] == "always"
    assert "reports/comment.html" in ci.jobs["report"]["artifacts"]["paths"]


# ---- Jobs


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("changed", [set(), set(INPUTS)])
@pytest.mark.parametrize("switches", [{}, {"BUILD_IMAGE": "false"}, {"BUILD_CI_IMAGE": "false"}])
def test_job_that_may_be_absent_is_needed_as_optional(
    ci: Expanded, source: str, changed: set[str], switches: dict[str, str]
) -> None:
    """Else GitLab makes no pipeline: "job needs … but it does not exist in the pipeline"."""
    jobs = ci.pipeline(SOURCES[source][0] | switches, changed)
    for job in jobs:
        for need in needs(ci.jobs[job]) or []:
            assert need.job in jobs or need.optional, f"{job} needs {need.job}"


@pytest.mark.parametrize(
    ("version", "image"),
    [
        ("17", "release-cli:v0.24.0"),
        ("18", "cli:v1.58.0"),
        ("19", "cli:v1.58.0"),
        ("20", "cli:v1.58.0"),
        ("", "cli:v1.58.0"),
    ],
)
def test_component_is_released_by_the_program_that_its_gitlab_calls(
    ci: Expanded, version: str, image: str
) -> None:
    """Gitlab::Ci::Build::Releaser: release-cli before 18.0; glab 1.58 or newer from then on, alone after 20.0."""
    variables = VERSION | {"CI_SERVER_VERSION_MAJOR": version}
    assert ci.image("component", variables) == f"registry.gitlab.com/gitlab-org/{image}"


def test_images_are_built_here_unless_the_team_builds_them_elsewhere(ci: Expanded) -> None:
    for variables, _ in SOURCES.values():
        jobs = set(ci.pipeline(variables | {"BUILD_CI_IMAGE": "false"}, set(INPUTS)))
        assert not {"ci-image", "ci-image-main", "ci-image-failure"} & jobs
    given = MERGE_REQUEST | {"BUILD_CI_IMAGE": "false"}
    assert ci.image("lint", given, {"Dockerfile"}).endswith("/ci:main")


def test_no_job_waits_for_one_that_is_started_by_hand(ci: Expanded) -> None:
    for variables, _ in SOURCES.values():
        jobs = ci.pipeline(variables, {"Dockerfile"})
        for job in jobs:
            for need in ci.jobs[job].get("needs") or []:
                assert jobs.get(need["job"]) != "manual", job


def test_what_pushes_or_deploys_is_never_interrupted_and_never_runs_twice_at_once(ci: Expanded) -> None:
    for job, entry in ci.jobs.items():
        pushes = job in RELEASE | {"ci-image-main"}
        assert entry.get("interruptible", False) == (not pushes and job != "component"), job
        assert "resource_group" in entry or not pushes, job
    assert "$CI_MERGE_REQUEST_IID" in ci.jobs["report"]["resource_group"]


def test_only_jobs_that_train_run_on_the_training_runner(ci: Expanded) -> None:
    tagged = {job for job, entry in ci.jobs.items() if entry.get("tags") == ["$RUNNER_TAG"]}
    assert tagged == TRAINS | {"release"}
    assert {job for job, entry in ci.jobs.items() if entry.get("tags")} == tagged


def test_every_job_has_a_time_limit_and_is_repeated_only_for_the_runners_faults(ci: Expanded) -> None:
    for job, entry in ci.jobs.items():
        assert entry["timeout"], job
        faults = set(entry.get("retry", {}).get("when", []))
        assert faults <= {"runner_system_failure", "scheduler_failure", "api_failure"}, job


def test_images_of_others_are_pinned(ci: Expanded) -> None:
    for variables, _ in SOURCES.values():
        for job in ci.pipeline(variables, set(INPUTS)):
            image = ci.image(job, variables, set(INPUTS))
            assert image.startswith(variables.get("CI_REGISTRY_IMAGE", "/")) or pinned(
                image
            ), f"{job}: {image}"


def test_jobs_call_make_and_python_and_hold_no_shell_programs(ci: Expanded) -> None:
    allowed = re.compile(
        r"make [\w-]+|python -m ml\.[\w.]+( \S+)*|python \.ci/\w+\.py( \S+)*|sh \.ci/\w+\.sh( \S+)*|echo .+"
        r'|cd "\./"|export PATH="\$PWD/\.venv/bin:\$PATH"( PYTHONPATH="\$PWD/src")?'
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


# ---- The page for newcomers


def test_variables_of_the_header_are_explained_in_the_page_for_newcomers() -> None:
    header = (ROOT / ".gitlab-ci.yml").read_text().partition("\nstages:")[0]
    names = set(re.findall(r"\b[A-Z][A-Z]+_[A-Z_]+\b", header))
    assert {"DVC_REMOTE_URL", "REPO_TOKEN", "RELEASE_TOKEN", "RUNNER_TAG"} <= names
    assert {name for name in names if name not in PAGE} == set()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    lines = PAGE.partition(f"## {heading}\n")[2].splitlines()
    table = list(
        takewhile(lambda line: line.startswith("|"), dropwhile(lambda line: not line.startswith("|"), lines))
    )
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def test_page_gives_each_variable_the_scope_and_the_protection_that_the_jobs_need() -> None:
    stated = {cells[0]: (cells[1].strip("`"), "**yes**" in cells[2]) for cells in rows("Variables")}
    for name, expected in VARIABLES.items():
        [row] = [row for row in stated if row.strip("`").startswith(name)]
        assert stated[row] == expected, name
    scoped = {row for row, (scope, _) in stated.items() if scope != "all"}
    assert len(scoped) == len(VARIABLES)


def test_page_names_each_variable_of_the_file_as_one_for_all_jobs(ci: Expanded) -> None:
    unscoped = {cells[0].strip("`") for cells in rows("Variables") if cells[1] == "all"}
    assert set(ci.tree["variables"]) <= unscoped
    assert not any("**yes**" in cells[2] for cells in rows("Variables") if cells[1] == "all")


def test_every_scope_of_the_page_is_the_environment_of_a_job(ci: Expanded) -> None:
    environments = {environment_of(ci, job) for job in ci.jobs} - {None}
    for cells in rows("Variables"):
        scope = cells[1].strip("`")
        assert scope == "all" or any(fnmatch.fnmatch(str(name), scope) for name in environments), cells


def test_page_names_the_jobs_of_each_event(ci: Expanded) -> None:
    named = set(re.findall(r"`([a-z-]+)`", PAGE.partition("## What happens when")[2].partition("\n## ")[0]))
    assert {job for job in ci.jobs if not job.endswith("-failure")} <= named
    assert {job for job in ci.jobs if job.endswith("-failure")} == FAILURE


def test_protected_image_tags_of_the_page_are_those_that_protected_jobs_push_or_read(ci: Expanded) -> None:
    [pattern] = re.findall(r"`(\^\(main.*?\)\$)`", PAGE)
    assert len(pattern) <= 100  # GitLab's limit
    for tag in ("main", "cache-protected", "v1.2.3", "model-v1.0.0", "model-v1.0.0-0a1b2c3d"):
        assert re.search(pattern, tag), tag
    for tag in ("merge-request-3", "cache-merge-requests"):
        assert not re.search(pattern, tag), tag


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
