"""`make rehearse`, on fewer epochs: the real .gitlab-ci.yml in containers, from a push to a release and to a red gate."""

import json
from pathlib import Path

import pytest

from ml.tracking.client import connect
from rehearse import runner
from rehearse.__main__ import rehearse, write_pages
from rehearse.jobs import Containers
from rehearse.project import CI_IMAGE, Project
from tests import containers
from tests.gitlab_emulator import GitLabEmulator
from tests.mlflow_server import mlflow_server

PARAMS = {
    "load": {"dataset": "digits"},
    "preprocess": {"validation_fraction": 0.2},
    "train": {"seeds": [0], "epochs": 2, "batch_size": 32, "device": "cpu", "precision": "float32"},
    "evaluate": {"resamples": 100},
}
CHANGES = {
    "first": {"train": {"epochs": 3}},
    "shorter": {"train": {"epochs": 1, "learning_rate": 0.00001}},
}


def artifacts(gitlab: GitLabEmulator, job: str) -> list[dict[str, bytes]]:
    """Of each pipeline that ran a job of this name, oldest first."""
    jobs = [known for pipeline in gitlab.project.pipelines for known in gitlab.project.jobs[pipeline["id"]]]
    return [known.artifacts for known in jobs if known.name == job and known.artifacts]


@pytest.mark.slow
def test_rehearsal_goes_from_the_first_push_to_a_release_and_stops_a_worse_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    containers.need_containers()
    try:
        runner.install()
    except runner.Missing as error:
        pytest.skip(str(error))
    inside = Containers("podman", {CI_IMAGE: containers.ci_image()}, options=containers.LIMITS)
    with mlflow_server(tmp_path / "mlflow") as mlflow_uri, GitLabEmulator() as gitlab:
        extra = {"MLFLOW_TRACKING_URI": mlflow_uri}
        project = Project(tmp_path, gitlab, containers=inside, extra=extra)
        timings = rehearse(project, PARAMS, CHANGES, lint=False)

        # One note a merge request, edited in place, the stopped verdict in its history.
        [first] = gitlab.notes(1)
        [worse] = gitlab.notes(2)
        assert "No baseline" in first.body.splitlines()[0]
        assert "worse" in worse.body.splitlines()[0].lower() and "Earlier results (2)" in worse.body
        assert "accept-regression" in worse.body and "0 of 4 stages ran" in worse.body

        # What the reviewers saw is what was released, with nothing trained on main.
        [tag] = project.tags()
        assert tag == "model-v1.0.0"
        receipt = json.loads(artifacts(gitlab, "pipeline")[0]["reports/receipt.json"])
        released = json.loads(artifacts(gitlab, "release")[0]["reports/release.json"])
        assert released["facts"]["stages_run"] == 0 and released["warnings"] == []
        assert released["facts"]["model_sha256"] == receipt["model_sha256"]
        assert gitlab.project.releases.keys() == {tag}
        assert (tmp_path / "remote" / "files" / "md5").is_dir()
        [lock] = [push for push in gitlab.project.pushes if push.ref == "refs/heads/main"][1:2]
        assert project.git("diff", "--name-only", lock.before, lock.after) == "dvc.lock"

        # MLflow has the merge request's run, whole, and the release as a version of its model.
        client = connect(mlflow_uri)
        [version] = client.search_model_versions()
        run = client.get_run(version.run_id)
        assert version.tags["model_tag"] == tag and version.tags["gate"] == "first"
        assert version.tags["model_sha256"] == receipt["model_sha256"]
        assert run.data.tags["lock_sha256"] == receipt["lock_sha256"]
        assert run.data.tags["ci_job_url"] == receipt["job"]["url"]

        # The pipeline of merged results compares with main as it is now, not as the branch knew it.
        comparison = json.loads(artifacts(gitlab, "report")[-1]["reports/comparison.json"])
        main = project.git("rev-parse", "origin/main")
        assert (
            comparison["reproduce"]["baseline_commit"] == main != project.git("merge-base", "shorter", main)
        )

        # The tag's pipeline offers to reproduce the model; pushing dvc.lock has started none.
        offered = project.run_tag(tag)
        assert offered.jobs == {"reproduce": "manual"}
        pages = [page.read_text() for page in write_pages(gitlab, tmp_path)]
    assert len(pages) == 2 and all(
        "data:image/png;base64," in page and 'src="/' not in page for page in pages
    )
    with capsys.disabled():
        print("\n  in containers:", ", ".join(f"{what} {seconds:.0f} s" for what, seconds in timings.items()))


def test_developer_of_a_rehearsal_has_no_credential_of_the_surroundings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "REPO_TOKEN",
        "CI_JOB_TOKEN",
        "DVC_REMOTE_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "GITLAB_TOKEN",
    ):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in runner.environment({}).values()
