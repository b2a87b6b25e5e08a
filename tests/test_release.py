"""The release job on the default branch: the reviewed bytes, once, whatever happens. Real git, DVC and ONNX."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from ml import files
from ml.lock import parse_lock, read_lock
from ml.release import publish, push, steps, tag
from ml.report.note import Content, Run, render
from ml.settings import Settings
from tests.gitlab_emulator import GitLabEmulator
from tests.release_project import ReleaseProject, published, run

pytest_plugins = ["tests.release_fixtures"]
BUNDLE = ("model.onnx", "golden.npz", "experiment.json")


def reviewed(project: ReleaseProject, iid: int) -> dict[str, object]:
    """The receipt of the merge request's pipeline."""
    jobs = project.gitlab.project.jobs
    [artifacts] = [
        each.artifacts
        for pipeline in project.gitlab.project.pipelines[-1:]
        for each in jobs[pipeline["id"]]
        if each.name == "pipeline" and pipeline["ref"] == f"refs/merge-requests/{iid}/head"
    ]
    return dict(json.loads(artifacts["reports/receipt.json"]))


@contextmanager
def nothing_released(project: ReleaseProject) -> Iterator[None]:
    """The block tags, releases, uploads and pushes nothing."""
    before = published(project)
    yield
    assert published(project) == before


# ---- What a merge gives


def test_merge_is_released_with_the_reviewed_bytes_and_no_stage_run(first: ReleaseProject) -> None:
    merged = first.merge(3)

    first.release()

    receipt, trailers = reviewed(first, 3), first.trailers("model-v1.0.0")
    assert first.facts()["facts"]["stages_run"] == 0
    assert first.facts()["warnings"] == []
    assert first.tags() == ["model-v1.0.0"]
    assert first.origin("cat-file", "-t", "model-v1.0.0") == "tag"
    assert trailers["Model-Sha256"] == receipt["model_sha256"]
    assert trailers["Lock-Sha256"] == receipt["lock_sha256"]
    assert trailers["Merge-Request"] == f"{first.gitlab.url}/g/proj/-/merge_requests/3"
    # one commit after the merge, of dvc.lock alone, which starts no pipeline
    assert first.origin("rev-parse", "main^") == merged
    assert first.origin("diff", "--name-only", "main^", "main") == "dvc.lock"
    assert first.origin("rev-parse", "model-v1.0.0^{commit}") == first.main
    pushed = [(push.ref, push.options) for push in first.gitlab.project.pushes]
    assert pushed == [("refs/tags/model-v1.0.0", ()), ("refs/heads/main", ("ci.skip",))]
    bundle = first.last / "models/model-v1.0.0"
    assert files.sha256(bundle / "model.onnx") == receipt["model_sha256"]
    assert json.loads((bundle / "experiment.json").read_text())["git_commit"] == first.main
    assert first.handed_on() | {"SOURCE_DATE_EPOCH": "", "DATA_HASH": "", "RELEASE_URL": ""} == {
        "MODEL_TAG": "model-v1.0.0",
        "MODEL_SHA256": receipt["model_sha256"],
        "LOCK_SHA256": receipt["lock_sha256"],
        "DATA_HASH": "",
        "MODEL_COMMIT": first.main,
        "SOURCE_DATE_EPOCH": "",
        "BUNDLE": "models/model-v1.0.0",
        "IMAGE_TAG": "model-v1.0.0",
        "RELEASE_STATE": "new",
        "RELEASE_URL": "",
        "PREVIOUS_MODEL_TAG": "",
    }


def test_released_outputs_come_from_the_main_remote_alone_and_are_whole(project: ReleaseProject) -> None:
    project.merge(4)
    project.release()
    shutil.rmtree(project.remote / "merge-requests")

    clone = project.clone("model-v1.0.1")
    run(clone, "dvc", "remote", "add", "--local", "--default", "main", str(project.remote))
    run(clone, "dvc", "pull")

    assert files.sha256(clone / files.MODEL_ONNX) == project.trailers("model-v1.0.1")["Model-Sha256"]
    assert list((project.remote / "runs").rglob("*/*/*")), "run records are there as well"


def test_gitlab_release_has_comment_card_checksums_and_files(project: ReleaseProject) -> None:
    project.merge(4)
    project.release()

    release = project.gitlab.project.releases["model-v1.0.1"]
    text, links = release["description"], {link["name"]: link for link in release["assets"]["links"]}
    package = project.gitlab.project.packages[("model", "1.0.1")]
    assert "# better: accuracy" in text and "# Model card" in text
    for name in (*BUNDLE, "model_card.md", "dvc.lock", "comment.md", "comment.html"):
        assert hashlib.sha256(package[name]).hexdigest() in text
        served = requests.get(links[name]["url"], headers={"JOB-TOKEN": project.gitlab.job_token}, timeout=10)
        assert served.content == package[name]
    assert package["model.onnx"] == (project.last / files.MODEL_ONNX).read_bytes()
    assert links["merge request !4"]["url"].endswith("/-/merge_requests/4")
    sums = project.last / "sums"
    sums.mkdir()
    for name in package:
        (sums / name).write_bytes(package[name])
    run(sums, "sha256sum", "--check", "--strict", "SHA256SUMS")
    message = project.origin("tag", "--list", "--format=%(contents)", "model-v1.0.1")
    assert f"SHA256SUMS\n{package['SHA256SUMS'].decode()}\nModel-Sha256: " in message


def test_what_the_reviewers_saw_is_the_report_jobs_file_and_no_note(project: ReleaseProject) -> None:
    head = project.origin("rev-parse", "branch-4")
    ours = project.gitlab.state.tokens[project.gitlab.token].user  # REPO_TOKEN's, which many have
    shown = Run(pipeline=1, job=1, time=datetime.now(UTC), commit=head, verdict="a forged one")
    project.gitlab.add_note(4, render(Content("# a forged one", (shown,)), project.gitlab.url), ours)
    project.merge(4)

    project.release(REPO_TOKEN=project.gitlab.token)

    text = project.gitlab.project.releases["model-v1.0.1"]["description"]
    assert "# better: accuracy" in text and "a forged one" not in text


@pytest.mark.parametrize(("method", "squash"), [("merge", True), ("ff", False)])
def test_squashed_and_fast_forward_merges_are_found(
    project: ReleaseProject, method: str, squash: bool
) -> None:
    project.merge(4, method, squash)

    said = project.release()

    assert "merge_requests/4" in said and project.facts()["facts"]["stages_run"] == 0
    assert project.trailers("model-v1.0.1")["Model-Sha256"] == reviewed(project, 4)["model_sha256"]


def test_second_release_is_a_patch_after_the_first(project: ReleaseProject) -> None:
    project.merge(4)

    said = project.release()

    assert project.tags() == ["model-v1.0.0", "model-v1.0.1"] and "only params changed" in said
    assert project.handed_on()["PREVIOUS_MODEL_TAG"] == "model-v1.0.0"


def test_label_on_the_merge_request_chooses_the_version(project: ReleaseProject) -> None:
    project.gitlab.project.merge_requests[4].labels = ["release::minor"]
    project.merge(4)
    project.release()
    assert project.tags()[-1] == "model-v1.1.0"


# ---- Again and again


def test_running_it_again_changes_nothing(project: ReleaseProject) -> None:
    merged = project.merge(4)
    project.release(merged)
    handed = project.handed_on()
    count = len(project.gitlab.requests)

    with nothing_released(project):
        project.release(merged)

    assert project.handed_on() == handed
    writes = [each for each in project.gitlab.requests[count:] if each["method"] in ("POST", "PUT", "DELETE")]
    assert writes == []


def test_commit_that_does_not_touch_the_model_releases_nothing(project: ReleaseProject) -> None:
    project.propose(5, "Say more in the docs", epochs=None, files={"README.md": "more\n"})
    project.merge(5)

    with nothing_released(project):
        said = project.release()

    assert "the model is that of model-v1.0.0" in said
    assert project.handed_on()["RELEASE_STATE"] == "unchanged"
    assert project.handed_on()["IMAGE_TAG"] == f"model-v1.0.0-{project.main[:8]}"
    released = project.gitlab.project.packages[("model", "1.0.0")]
    for name in ("model.onnx", "golden.npz", "experiment.json"):
        assert (project.last / "models/model-v1.0.0" / name).read_bytes() == released[name]


# ---- What is not released


def alter(
    project: ReleaseProject, path: str, change: Callable[[bytes], bytes], job: str = "pipeline"
) -> None:
    """Change an artifact of the merge request's newest pipeline, or remove it where `change` gives nothing."""
    [artifacts] = [
        each.artifacts
        for each in project.gitlab.project.jobs[project.gitlab.project.pipelines[-1]["id"]]
        if each.name == job
    ]
    artifacts[path] = change(artifacts[path])
    if not artifacts[path]:
        del artifacts[path]


def test_push_past_the_review_stops_and_can_be_let_through(project: ReleaseProject) -> None:
    project.git("fetch", "--quiet", str(project.bare), "main")
    project.git("checkout", "--quiet", "--force", "--detach", "FETCH_HEAD")
    project.set_params(epochs=7)
    project.commit("Push to main")
    project.push("main")

    with nothing_released(project):
        message = project.release(fails="Nobody has reviewed")
    assert "no merged merge request was found" in message and "RELEASE_WITHOUT_REVIEW=1" in message
    assert not (project.last / "release.env").exists()

    project.release(RELEASE_WITHOUT_REVIEW="1")
    assert project.tags() == ["model-v1.0.0", "model-v1.0.1"]
    assert project.facts()["facts"]["stages_run"] == 2


def test_first_release_needs_no_review(first: ReleaseProject) -> None:
    said = first.release()
    assert "this is the first release" in said and first.tags() == ["model-v1.0.0"]
    assert first.facts()["facts"]["stages_run"] == 3


def test_missing_receipt_stops(project: ReleaseProject) -> None:
    alter(project, "reports/receipt.json", lambda _: b"")
    project.merge(4)
    with nothing_released(project):
        message = project.release(
            fails="the job pipeline of .*merge_requests/4 .*/-/jobs/.* left no reports/receipt.json"
        )
    assert "Traceback" not in message and project.tags() == ["model-v1.0.0"]


def test_receipt_of_another_model_stops(project: ReleaseProject) -> None:
    def forge(content: bytes) -> bytes:
        return json.dumps(json.loads(content) | {"model_sha256": "0" * 64}).encode()

    alter(project, "reports/receipt.json", forge)
    project.merge(4)
    with nothing_released(project):
        message = project.release(fails="is not what the receipt of !4 vouches for")
    assert "artifacts/model.onnx: sha256" in message


def test_lock_that_is_not_the_receipts_stops(project: ReleaseProject) -> None:
    alter(project, "dvc.lock", lambda content: content.replace(b"size: ", b"size: 1"))
    project.merge(4)
    with nothing_released(project):
        message = project.release(fails="neither the job's artifacts nor the\\s+commit holds")
    assert "dvc.lock" in message and project.tags() == ["model-v1.0.0"]


def test_damaged_receipt_stops(project: ReleaseProject) -> None:
    alter(project, "reports/receipt.json", lambda content: content[:100])
    project.merge(4)
    with nothing_released(project):
        message = project.release(fails="the receipt of !4 is not a receipt")
    assert "Run the merge request's pipeline again" in message and project.tags() == ["model-v1.0.0"]


def test_outputs_that_were_swapped_on_the_remote_stop(project: ReleaseProject) -> None:
    project.merge(4)
    lock = read_lock(project.clone("main") / "dvc.lock")
    reviewed_lock = project.gitlab.project.jobs[project.gitlab.project.pipelines[-1]["id"]][0].artifacts[
        "dvc.lock"
    ]
    md5 = parse_lock(reviewed_lock, "reviewed").outs["artifacts/model.onnx"]
    assert md5 != lock.outs["artifacts/model.onnx"]
    stored = project.remote / f"merge-requests/4/files/md5/{md5[:2]}/{md5[2:]}"
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    with nothing_released(project):
        project.release(fails="damaged|differs|would have to run")


@pytest.fixture
def combined(project: ReleaseProject) -> ReleaseProject:
    """Merge requests 4 and 5 both went through their pipelines, and are merged: their sum never ran."""
    project.propose(5, "Change the code", epochs=None, files={"src/train.py": "two\n"})
    project.review(5)
    project.merge(4)
    project.release()
    project.merge(5)
    return project


def test_sum_of_two_merges_that_nobody_ran_stops(combined: ReleaseProject) -> None:
    with nothing_released(combined):
        message = combined.release(fails="does not fit the default branch")
    assert "train: stale" in message and "train.epochs" in message and "RELEASE_REBUILD=1" in message


def test_rebuild_that_gives_other_bytes_stops_naming_them(combined: ReleaseProject) -> None:
    with nothing_released(combined):
        message = combined.release(
            RELEASE_REBUILD="1", fails="What was rebuilt is not what the receipt of !5"
        )
    assert "artifacts/model.onnx: sha256" in message


def test_rebuild_runs_every_stage_and_releases_the_same_bytes(project: ReleaseProject) -> None:
    project.merge(4)
    with nothing_released(project):
        project.release(RELEASE_REBUILD="1", RELEASE_NOISE="other", fails="What was rebuilt is not")
    project.release(RELEASE_REBUILD="1")
    assert project.facts()["facts"]["stages_run"] == 3
    assert project.trailers("model-v1.0.1")["Model-Sha256"] == reviewed(project, 4)["model_sha256"]


def test_commit_that_comes_after_a_later_release_stops(project: ReleaseProject) -> None:
    older = project.merge(4)
    project.propose(5, "Train for five epochs", epochs=5)
    project.review(5)
    project.merge(5)
    project.release()
    with nothing_released(project):
        message = project.release(older, fails="comes too late")
    assert "model-v1.0.1" in message and project.tags() == ["model-v1.0.0", "model-v1.0.1"]


def test_commit_outside_the_default_branch_stops(project: ReleaseProject) -> None:
    with nothing_released(project):
        message = project.release(project.origin("rev-parse", "branch-4"), fails="is not in main")
    assert project.origin("rev-parse", "branch-4")[:8] in message and project.tags() == ["model-v1.0.0"]


def test_changed_file_stops(project: ReleaseProject) -> None:
    project.merge(4)
    folder = project.clone(project.main)
    (folder / "src/train.py").write_text("changed")
    with nothing_released(project):
        project.release(folder=folder, fails="`git status` lists them")
    assert (folder / "src/train.py").read_text() == "changed" and project.tags() == ["model-v1.0.0"]


# ---- Who reads and pushes


def test_no_token_is_shown_anywhere(project: ReleaseProject) -> None:
    project.merge(4)
    said = project.release()
    journal = (project.last / "reports/release.json").read_text()
    for secret in (project.release_token, project.gitlab.token, project.gitlab.job_token):
        assert secret not in said + journal
        assert secret not in (project.last / ".git/config").read_text()


def test_outside_gitlab_origin_gets_the_tag_and_the_lock(project: ReleaseProject) -> None:
    merged = project.merge(4)
    nowhere = {
        name: ""
        for name in ("CI_API_V4_URL", "CI_SERVER_URL", "CI_PROJECT_URL", "CI_COMMIT_SHA", "RELEASE_TOKEN")
    }

    said = project.release(**nowhere, RELEASE_WITHOUT_REVIEW="1")

    assert "no GitLab is named" in said and "no GitLab release" in said
    assert project.tags() == ["model-v1.0.0", "model-v1.0.1"]
    assert project.origin("rev-parse", "main^") == merged


# ---- Others push meanwhile


def others_push_first(
    project: ReleaseProject, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """Somebody's push reaches main between the release job's look at it and its own push."""
    pushed, there = tag.push, []

    def push(settings: Settings, source: str, ref: str, *options: str) -> tag.Pushed:
        if ref == "refs/heads/main" and not there:
            there.append(True)
            other = project.clone("main")
            change(other)
            run(other, "git", "add", "--all")
            run(other, "git", "commit", "--quiet", "--message", "Others")
            run(other, "git", "push", "--quiet", str(project.bare), "HEAD:refs/heads/main")
        return pushed(settings, source, ref, *options)

    monkeypatch.setattr(tag, "push", push)


def test_lock_is_committed_on_top_of_what_others_pushed(
    project: ReleaseProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = project.merge(4)
    others_push_first(project, monkeypatch, lambda folder: (folder / "notes.txt").write_text("x") and None)

    project.release(merged)

    assert project.origin("log", "--format=%s", "main").splitlines()[:2] == [
        "Record the results of model-v1.0.1 in dvc.lock",
        "Others",
    ]
    assert project.origin("rev-parse", "model-v1.0.1^") == merged
    with nothing_released(project):
        project.release(merged)
        said = project.release()  # of the commit that the lock was put on
    assert "the model is that of model-v1.0.1" in said


def test_lock_that_others_pushed_is_left_alone(
    project: ReleaseProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = project.merge(4)
    others_push_first(
        project, monkeypatch, lambda folder: (folder / "dvc.lock").write_text("schema: '2.0'\n") and None
    )

    said = project.release(merged)

    assert "brings a dvc.lock of its own" in said
    assert project.origin("show", "main:dvc.lock") == "schema: '2.0'"
    assert project.tags()[-1] == "model-v1.0.1"


def test_second_of_two_merges_has_the_last_word_on_the_lock_whenever_the_first_is_released_again(
    project: ReleaseProject,
) -> None:
    """Both are merged before the first is released, whose dvc.lock then comes on top of the second one's merge."""
    first = project.merge(4)
    project.propose(5, "Train for five epochs", epochs=5)
    project.review(5)
    second = project.merge(5)

    project.release(first)
    assert lock_of(project, "main") == lock_of(project, "model-v1.0.1")
    project.release(second)
    assert lock_of(project, "main") == lock_of(project, "model-v1.0.2")
    assert project.facts()["warnings"] == []
    assert "brings a dvc.lock of its own" in project.release(first)
    assert lock_of(project, "main") == lock_of(project, "model-v1.0.2")


def lock_of(project: ReleaseProject, revision: str) -> str:
    return project.origin("rev-parse", f"{revision}^{{commit}}:dvc.lock")


# ---- GitLab and MLflow fail


@pytest.mark.parametrize(("status", "applied"), [(429, False), (502, True), (GitLabEmulator.DROP, True)])
def test_lost_answers_of_gitlab_leave_one_release(
    project: ReleaseProject, status: int, applied: bool
) -> None:
    merged = project.merge(4)
    project.gitlab.fail_next(status, method="POST", path="/releases$", applied=applied, retry_after="0")
    project.gitlab.fail_next(status, method="PUT", path="/packages/", applied=applied, retry_after="0")
    project.gitlab.fail_next(status, method="GET", path="/merge_requests", applied=applied, retry_after="0")

    project.release(merged)

    assert project.gitlab.faults.waiting == 0
    assert list(project.gitlab.project.releases) == ["model-v1.0.0", "model-v1.0.1"]
    names = [link["name"] for link in project.gitlab.project.releases["model-v1.0.1"]["assets"]["links"]]
    assert len(names) == len(set(names)) == 9


def test_mlflow_that_is_down_does_not_stop_the_release(project: ReleaseProject) -> None:
    project.merge(4)
    said = project.release(
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        MLFLOW_HTTP_REQUEST_TIMEOUT="2",
    )
    assert "the model was not registered in MLflow" in said and project.tags()[-1] == "model-v1.0.1"
    assert "model-v1.0.1" in project.gitlab.project.releases


# ---- Killed


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


PLACES = (
    "outputs to the remote",
    "bundle",
    "push refs/tags/model-v1.0.1",
    "push refs/heads/main",
    "PUT model.onnx",
    "PUT SHA256SUMS",
    "POST releases",
    "POST links",
    "release.env",
)


def kill(monkeypatch: pytest.MonkeyPatch, place: str, moment: str, end: Callable[[], None]) -> None:
    """Call `end` before or after the first time that a release comes to `place`."""

    def around(owner: Any, name: str, label: Callable[..., str]) -> None:
        call = getattr(owner, name)

        def called(*arguments: Any, **options: Any) -> Any:
            here = label(*arguments, **options) == place
            if here and moment == "before":
                end()
            result = call(*arguments, **options)
            if here:
                end()
            return result

        monkeypatch.setattr(owner, name, called)

    def request(session: requests.Session, prepared: requests.PreparedRequest, **_: Any) -> str:
        return f"{prepared.method} {str(prepared.url).rpartition('/')[2]}"

    around(push, "push", lambda *_: "outputs to the remote")
    around(tag, "push", lambda _, __, ref, *___: f"push {ref}")
    around(steps, "write_bundle", lambda *_: "bundle")
    around(requests.Session, "send", request)
    around(publish, "hand_on", lambda *_: "release.env")


def check_whole(project: ReleaseProject, merged: str) -> None:
    """One tag, one commit of dvc.lock, one release with each file once: as if nothing had happened."""
    trailers, package = project.trailers("model-v1.0.1"), project.gitlab.project.packages[("model", "1.0.1")]
    release = project.gitlab.project.releases["model-v1.0.1"]
    assert project.tags() == ["model-v1.0.0", "model-v1.0.1"]
    assert project.origin("rev-list", "--count", f"{merged}..main") == "1"
    assert project.origin("rev-parse", "model-v1.0.1^{commit}") == project.main
    assert trailers["Model-Sha256"] == reviewed(project, 4)["model_sha256"]
    assert hashlib.sha256(package["model.onnx"]).hexdigest() == trailers["Model-Sha256"]
    assert list(project.gitlab.project.releases) == ["model-v1.0.0", "model-v1.0.1"]
    assert len(release["assets"]["links"]) == len(list(package)) + 1 == 9
    assert len(package.files) == len(list(package)), "no file was uploaded twice"
    assert project.handed_on()["MODEL_TAG"] == "model-v1.0.1"
    assert "# better" in release["description"]


@pytest.mark.slow
def test_killed_at_every_write_and_run_again_it_ends_as_if_nothing_had_happened(
    project: ReleaseProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> None:
        raise Killed

    merged = project.merge(4)
    # Before one write is, but for reading, after the one before it.
    for place, moment in [(PLACES[0], "before"), *((place, "after") for place in PLACES)]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill(patch, place, moment, end)
            project.release(merged)
    project.release(merged)
    check_whole(project, merged)


def test_process_that_really_dies_is_followed_up(project: ReleaseProject) -> None:
    merged = project.merge(4)
    folder = project.clone(merged)
    program = (
        "import os, pytest\n"
        "from tests.test_release import kill\n"
        "from ml.release import publish\n"
        "kill(pytest.MonkeyPatch(), 'push refs/tags/model-v1.0.1', 'after', lambda: os._exit(137))\n"
        "publish.main([])"
    )
    done = run(
        folder, sys.executable, "-c", program, fails=True, environment=project.release_environment(merged)
    )
    assert done.returncode == 137
    project.release(merged, folder=folder)
    check_whole(project, merged)
