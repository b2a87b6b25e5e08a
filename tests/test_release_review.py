"""Which pipeline was reviewed, and what is said where it left nothing: heads, merged results, trains, expired files."""

import json
from collections.abc import Callable
from contextlib import chdir
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ml.release import access, merge_request
from ml.report.note import Content, Run, render
from ml.settings import Settings
from tests.gitlab_emulator.state import Job
from tests.release_project import ReleaseProject, published

pytest_plugins = ["tests.release_fixtures"]


def job_of(project: ReleaseProject, name: str) -> Job:
    """Of the newest pipeline."""
    jobs = project.gitlab.project.jobs[project.gitlab.project.pipelines[-1]["id"]]
    return next(job for job in jobs if job.name == name)


def receipt_of(project: ReleaseProject) -> dict[str, Any]:
    return dict(json.loads(job_of(project, "pipeline").artifacts["reports/receipt.json"]))


def stops(project: ReleaseProject, told: str) -> str:
    """The release stops with this, and nothing is written."""
    before = published(project)
    message = project.release(fails=told)
    assert published(project) == before
    return message


def change_epochs(project: ReleaseProject, iid: int, epochs: int) -> None:
    project.git("checkout", "--quiet", "--force", f"branch-{iid}")
    project.set_params(epochs=epochs)
    project.commit(f"Train for {epochs} epochs")
    project.push(f"branch-{iid}")


@pytest.mark.parametrize("kind", ["merge", "train"])
def test_newest_pipeline_counts_over_a_draft_on_the_head(project: ReleaseProject, kind: Any) -> None:
    """The draft was trained on the head, the last version on the merged result alone."""
    change_epochs(project, 4, 4)
    project.review(4, kind=kind, comment="# the last version")
    project.merge(4)

    project.release()

    assert project.trailers("model-v1.0.1")["Model-Sha256"] == receipt_of(project)["model_sha256"]
    assert "# the last version" in project.gitlab.project.releases[project.tags()[-1]]["description"]
    assert project.facts()["facts"]["stages_run"] == 0


def test_newest_pipeline_counts_over_an_older_merged_result(project: ReleaseProject) -> None:
    project.review(4, kind="merge")
    change_epochs(project, 4, 4)
    project.review(4)
    project.merge(4)

    project.release()

    assert project.trailers("model-v1.0.1")["Model-Sha256"] == receipt_of(project)["model_sha256"]


def test_train_of_two_is_released_as_it_was_reviewed(project: ReleaseProject) -> None:
    """The second one's train has the first one in it; each was a draft on its head before."""
    project.propose(5, "Change the code", epochs=None, files={"src/train.py": "two\n"})
    project.review(5)
    first = project.review(4, kind="train")
    project.review(5, kind="train", onto=first)
    reviewed = receipt_of(project)

    merged = project.merge(4)
    second = project.merge(5)
    project.release(merged)
    project.release(second)

    assert project.tags() == ["model-v1.0.0", "model-v1.0.1", "model-v1.1.0"]
    assert project.trailers("model-v1.1.0")["Model-Sha256"] == reviewed["model_sha256"]
    assert project.facts()["facts"]["stages_run"] == 0


def test_train_of_fast_forwards_is_found_by_the_commit_that_it_ran_on(
    project: ReleaseProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GitLab writes the train's rebased commit to main; the merge request's `sha` stays its head."""

    def rebased(onto: str, head: str, ref: str) -> str:
        tree = project.origin("merge-tree", "--write-tree", onto, head).splitlines()[0]
        commit = project.origin("commit-tree", tree, "-p", onto, "-m", "Rebased")
        project.origin("update-ref", ref, commit)
        return commit

    monkeypatch.setattr(project, "merged", rebased)
    project.propose(5, "Other", epochs=5)
    project.review(5)
    commit = project.review(4, kind="train")
    with project.gitlab.state.lock:
        project.gitlab.project.merge_requests[4].state = "merged"
    project.origin("update-ref", "refs/heads/main", commit)

    project.release(commit)

    assert project.tags() == ["model-v1.0.0", "model-v1.0.1"]
    assert "/merge_requests/4" in project.trailers("model-v1.0.1")["Merge-Request"]


def test_pipeline_that_failed_or_ran_on_a_branch_is_not_the_reviewed_one(project: ReleaseProject) -> None:
    reviewed, gitlab = receipt_of(project), project.gitlab
    forged = {"pipeline": {"reports/receipt.json": b"{}", "dvc.lock": b""}}
    head = project.origin("rev-parse", "branch-4")
    gitlab.add_pipeline(4, forged, status="failed")
    gitlab.state.add_pipeline(gitlab.project, "branch-4", head, "success", "push", forged)
    project.merge(4)

    project.release()

    assert project.trailers("model-v1.0.1")["Model-Sha256"] == reviewed["model_sha256"]


def expire(job: Job) -> None:
    job.artifacts_expire_at = datetime.now(UTC) - timedelta(days=1)


def test_expired_artifacts_are_said_and_the_remedy_works(project: ReleaseProject) -> None:
    job = job_of(project, "pipeline")
    expire(job)
    project.merge(4)

    message = stops(project, "the artifacts of the job pipeline of .*merge_requests/4 .* expired on ")
    assert f"/-/jobs/{job.id})" in message and "Retry that job" in message

    with project.gitlab.state.lock:
        jobs = project.gitlab.project.jobs[project.gitlab.project.pipelines[-1]["id"]]
        jobs.append(Job(project.gitlab.state.new_id(), "pipeline", "success", dict(job.artifacts)))
    project.release()
    assert project.tags()[-1] == "model-v1.0.1"


def test_job_by_another_name_is_said_with_those_that_there_are(project: ReleaseProject) -> None:
    job_of(project, "pipeline").name = "train"
    project.merge(4)
    message = stops(project, "has no successful job pipeline .its jobs: report, train")
    assert "RELEASE_JOB" in message


def test_merge_without_a_successful_pipeline_is_said(project: ReleaseProject) -> None:
    project.propose(5, "Train for five epochs", epochs=5)
    project.merge(5)
    message = stops(project, "no pipeline of .*merge_requests/5 has succeeded")
    assert "Nobody has reviewed" in message


def test_token_that_may_not_read_artifacts_is_no_absent_receipt(project: ReleaseProject) -> None:
    project.merge(4)
    project.gitlab.fail_next(403, path="/artifacts/")
    message = stops(project, "Looking for the reviewed pipeline of !4: GitLab answered 403")
    assert "RELEASE_TOKEN has no right" in message and "Nobody has reviewed" not in message


@pytest.mark.parametrize(
    "change", [{"commit": "0" * 40}, {"job": {"id": 1, "name": None, "url": None, "pipeline_id": 1, "pipeline_url": None}}]
)  # fmt: skip
def test_receipt_of_another_pipeline_stops(project: ReleaseProject, change: dict[str, Any]) -> None:
    forged = json.dumps(receipt_of(project) | change).encode()
    job_of(project, "pipeline").artifacts["reports/receipt.json"] = forged
    project.merge(4)
    stops(project, "the receipt of !4 is about commit .* and was found in pipeline")
    assert not project.gitlab.project.pushes[-1].ref.startswith("refs/tags/model-v1.0.1")


@pytest.mark.parametrize(
    "again", [lambda project: None, lambda project: [expire(job_of(project, name)) for name in ("pipeline", "report")]]
)  # fmt: skip
def test_release_without_its_reviews_comment_says_so_and_one_that_has_it_keeps_it(
    project: ReleaseProject, again: Callable[[ReleaseProject], Any]
) -> None:
    merged = project.merge(4)
    project.release(merged)
    before = published(project)
    again(project)
    project.release(merged)
    assert published(project) == before
    assert project.facts()["warnings"] == []


def test_note_of_the_reviewed_commit_is_what_the_registry_links_to(project: ReleaseProject) -> None:
    gitlab, reviewed, later = project.gitlab, receipt_of(project)["commit"], "f" * 40
    project.merge(4)
    settings = Settings(
        ci_api_v4_url=f"{gitlab.url}/api/v4",
        ci_project_id=64,
        ci_default_branch="main",
        release_token=project.release_token,
    )
    connected = access.connect(settings)
    assert connected is not None
    with chdir(project.clone("main")):
        review = merge_request.find_review(connected, settings, project.main)
    assert review is not None and review.sha == reviewed
    assert merge_request.find_note(connected, review, reviewed) is None
    notes = {}
    for commit in (later, reviewed):
        shown = Run(pipeline=1, job=1, time=datetime.now(UTC), commit=commit, verdict="better")
        notes[commit] = gitlab.add_note(4, render(Content("# better", (shown,)), gitlab.url)).id
    url = f"{gitlab.url}/g/proj/-/merge_requests/4#note_{notes[reviewed]}"
    assert merge_request.find_note(connected, review, reviewed) == url


def test_missing_comment_is_warned_of(project: ReleaseProject) -> None:
    expire(job_of(project, "report"))
    project.merge(4)
    project.release()
    [warning] = project.facts()["warnings"]
    assert "has no reports/comment.md (any more)" in warning
    assert "What the reviewers saw" not in project.gitlab.project.releases["model-v1.0.1"]["description"]
