"""`make rehearse`, on fewer epochs: the real .gitlab-ci.yml run job by job, from a push to a release and to a red gate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ml.tracking.client import connect
from rehearse import runner
from rehearse.__main__ import rehearse, write_pages
from rehearse.project import ROOT, Project
from tests.gitlab_emulator import GitLabEmulator

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


@pytest.mark.slow
def test_rehearsal_goes_from_the_first_push_to_a_release_and_stops_a_worse_model(tmp_path: Path) -> None:
    try:
        runner.install()
    except runner.Missing as error:
        pytest.skip(str(error))
    mlflow_uri = f"sqlite:///{tmp_path}/mlflow.db"
    with GitLabEmulator() as gitlab:
        project = Project(tmp_path, gitlab, extra={"MLFLOW_TRACKING_URI": mlflow_uri})
        timings = rehearse(project, PARAMS, CHANGES, lint=False)

        # One note a merge request, edited in place, the stopped verdict in its history.
        [first] = gitlab.notes(1)
        [worse] = gitlab.notes(2)
        assert "No baseline" in first.body.splitlines()[0]
        assert "worse" in worse.body.splitlines()[0].lower() and "Earlier results (1)" in worse.body
        assert "accept-regression" in worse.body and "0 of 4 stages ran" in worse.body

        # What the reviewers saw is what was released, with nothing trained on main.
        [tag] = project.tags()
        assert tag == "model-v1.0.0"
        artifacts = [tmp_path / "pipelines" / number / ".gitlab-ci-local/artifacts" for number in "12"]
        receipt = json.loads((artifacts[0] / "pipeline/reports/receipt.json").read_text())
        facts = json.loads((artifacts[1] / "release/reports/release.json").read_text())["facts"]
        assert facts["stages_run"] == 0 and facts["model_sha256"] == receipt["model_sha256"]
        assert gitlab.project.releases.keys() == {tag}
        assert (tmp_path / "remote" / "files" / "md5").is_dir()
        [pushed] = [push for push in gitlab.project.pushes if push.ref == "refs/heads/main"][1:]
        changed = project.git("diff", "--name-only", pushed.before, pushed.after)
        assert changed == "dvc.lock"

        # MLflow has the merge request's run, whole, and the release as a version of its model.
        client = connect(mlflow_uri)
        [version] = client.search_model_versions()
        run = client.get_run(version.run_id)
        assert version.tags["model_tag"] == tag and version.tags["gate"] == "first"
        assert version.tags["model_sha256"] == receipt["model_sha256"]
        assert run.data.tags["lock_sha256"] == receipt["lock_sha256"]
        assert run.data.tags["ci_job_url"] == receipt["job"]["url"]
        assert json.loads((artifacts[1] / "release/reports/release.json").read_text())["warnings"] == []

        assert timings.keys() == {
            "!1 push to comment",
            "!1 merge to release",
            "!2 push to comment",
            "!2 start to comment, everything restored",
        }
        pages = [page.read_text() for page in write_pages(gitlab, tmp_path)]
    assert len(pages) == 2 and all(
        "data:image/png;base64," in page and 'src="/' not in page for page in pages
    )


def test_rehearsal_says_what_to_install_when_rsync_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rehearse", "--install"]
    environment = {name: value for name, value in os.environ.items() if name != "PATH"} | {
        "PATH": str(tmp_path)
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 1 and "rsync is missing" in done.stderr and "apt-get install rsync" in done.stderr
    )


def test_jobs_of_a_rehearsal_see_no_credential_of_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "REPO_TOKEN",
        "CI_JOB_TOKEN",
        "DVC_REMOTE_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "GITLAB_TOKEN",
    ):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in runner.environment({}).values()
