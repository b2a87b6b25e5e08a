"""A team with a repository of its own includes the component: its merge request is trained, compared and commented."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rehearse import gitlab, runner
from rehearse.gitlab import Variable
from rehearse.project import IDENTITY, ROOT, Logs
from tests.gitlab_emulator import GitLabEmulator

HOST = "127.0.0.1:1"  # nothing listens there: git is told to look into folders instead
PIPELINE = """
stages: [pipeline, report, release]
include:
  - component: HOST/ml/template/experiment@v0.1.0
    inputs:
      image: registry.example.com/ml/template/ci:v0.1.0
      remote: REMOTE
      runner-tag: fast
      margin: "MARGIN"
"""
# No torch, no code of the template beside `ml.files`: one stage that "trains" by a param.
STAGE = """
import json, sys
import numpy as np
from ml import files
from ruamel.yaml import YAML

wrong = YAML(typ="safe").load(open("params.yaml"))["model"]["channels"][0]  # of 100 test examples
labels = np.arange(200) % 2
names = np.array(["cat", "dog"])
images = np.zeros((200, 4, 4), np.uint8)
images[:, 0, 0] = np.arange(200)
for path, part in ((files.TRAIN_EXAMPLES, "train"), (files.TEST_EXAMPLES, "test")):
    ids = np.array([f"{part}{number:04}" for number in range(200)])
    files.save_examples(path, files.Examples(images, labels, ids, names))
seeds = np.array([0, 1, 2])
probabilities = np.zeros((3, 200, 2), np.float32)
for seed in seeds:
    answer = labels ^ (np.random.default_rng(seed).random(200) < wrong / 100)
    probabilities[seed, np.arange(200), answer] = 1
files.save_predictions(files.Predictions(ids, labels, seeds, probabilities))
accuracy = float((probabilities.argmax(2) == labels).mean())
each = {"mean": accuracy, "low": 0.0, "high": 1.0, "seed_std": 0.0}
files.write_json(files.METRICS, {"accuracy": each, "macro_f1": each, "loss": each, "calibration_error": each})
files.write_json(files.TRAINING, {"chosen_seed": 0, "made_with": {}})
part = {"examples": 200, "per_class": {"cat": 100, "dog": 100}}
summary = {"dataset": "toy", "class_names": names.tolist(), "image_height": 4, "image_width": 4}
files.write_json(files.DATA_SUMMARY, summary | {"train": part, "test": part, "images_in_both_parts": 0})
files.save_golden(files.Golden(images[:1], probabilities[0, :1]))
files.write_bytes(files.MODEL_ONNX, b"model %d" % wrong)
"""
OUTS = ["train.npz", "test.npz", "golden.npz", "training.json", "model.onnx"]


class Toy:
    """A repository whose origin is on HOST, beside that of the template."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.code, self.remote = folder, folder / "toy", folder / "remote"
        self.code.mkdir(parents=True)
        self.remote.mkdir()
        self.template = folder / "template.git"
        self.environment = runner.environment(IDENTITY) | {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{self.template}.insteadOf",
            "GIT_CONFIG_VALUE_0": f"http://{HOST}/ml/template.git",
        }

    def call(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command, cwd=cwd or self.code, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def publish_template(self) -> None:
        """Only templates/, tagged: all that GitLab needs of the template's repository."""
        target = self.template / "templates" / "experiment" / "template.yml"
        target.parent.mkdir(parents=True)
        target.write_bytes((ROOT / "templates" / "experiment" / "template.yml").read_bytes())
        for command in (
            ("init", "--quiet", "--initial-branch=main"),
            ("config", "uploadpack.allowFilter", "true"),
            ("add", "--all"),
            ("commit", "--quiet", "--message", "template"),
            ("tag", "v0.1.0"),
        ):
            self.call("git", *command, cwd=self.template)

    def write(self, margin: str) -> None:
        text = PIPELINE.replace("HOST", HOST).replace("REMOTE", str(self.remote)).replace("MARGIN", margin)
        (self.code / ".gitlab-ci.yml").write_text(text)
        (self.code / "train.py").write_text(STAGE)
        (self.code / ".gitignore").write_text("/artifacts/\n/reports/\n/.gitlab-ci-local/\n")
        outs = [f"artifacts/{name}" for name in OUTS] + ["reports/data.json", "reports/predictions.npz"]
        stage = {
            "cmd": "python train.py",
            "deps": ["train.py"],
            "params": ["model"],
            "outs": outs,
            "metrics": ["reports/metrics.json"],
        }
        with open(self.code / "dvc.yaml", "w") as file:
            YAML().dump({"stages": {"train": stage}}, file)
        self.set_wrong(5)
        self.call("git", "init", "--quiet", "--initial-branch=main")
        self.call("git", "config", "user.name", "toy")
        self.call("git", "config", "user.email", "toy@example.com")
        self.call(sys.executable, "-m", "dvc", "init", "--quiet")
        self.call("git", "remote", "add", "origin", f"http://{HOST}/team/toy.git")
        self.commit("Begin")

    def set_wrong(self, wrong: int) -> None:
        params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
        params["model"]["channels"] = [wrong, 1]
        with open(self.code / "params.yaml", "w") as file:
            YAML().dump(params, file)

    def commit(self, message: str) -> str:
        self.call("git", "add", "--all")
        self.call("git", "commit", "--quiet", "--message", message)
        for branch in ("main",):
            self.call("git", "update-ref", f"refs/remotes/origin/{branch}", "HEAD")
        self.call("git", "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main")
        return self.call("git", "rev-parse", "HEAD")

    def train_here(self) -> str:
        """Results of main, as a release leaves them: in the remote and in dvc.lock."""
        dvc = (sys.executable, "-m", "dvc")
        self.call(*dvc, "remote", "add", "--local", "--default", "main", str(self.remote))
        self.call(*dvc, "repro", "--quiet")
        self.call(*dvc, "push", "--quiet", "--run-cache")
        return self.commit("Train")

    def merge_request(self, emulator: GitLabEmulator, base: str, jobs: tuple[str, ...] = ()) -> runner.Run:
        pipeline = emulator.state.add_pipeline(
            emulator.project, "refs/merge-requests/3/head", base, "running", gitlab.MERGE_REQUEST, {}
        )["id"]
        variables = gitlab.merge_request(3, base, "experiment") | {
            "CI_PIPELINE_ID": str(pipeline),
            "CI_API_V4_URL": f"{emulator.url}/api/v4",
            "CI_PROJECT_URL": f"{emulator.url}/g/proj",
        }
        secrets = gitlab.write_variables(
            self.folder / "secrets.json", [Variable("REPO_TOKEN", emulator.token, "experiment/report")], False
        )
        heard = Logs(emulator, pipeline).hear
        return runner.run(self.code, variables, secrets, jobs, more=self.environment, heard=heard)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    try:
        runner.install()
    except runner.Missing as error:
        pytest.skip(str(error))
    toy = Toy(tmp_path)
    toy.publish_template()
    yield toy


@pytest.mark.slow
def test_toy_project_with_the_component_gets_its_verdict_and_its_gate(toy: Toy) -> None:
    """A loss of ten percentage points: stopped by the gate; with a margin of 30 pp it would have passed."""
    toy.write(margin="0.3")
    base = toy.train_here()
    toy.set_wrong(15)
    sha = toy.commit("Make it worse")
    with GitLabEmulator() as emulator:
        emulator.add_merge_request(3, sha=sha)
        run = toy.merge_request(emulator, base)
        [note] = emulator.notes()
    assert run.jobs == {name: "PASS" for name in ("preflight", "pipeline", "report", "gate")}, run.output
    assert "worse" in note.body.splitlines()[0].lower()
    assert json.loads((run.artifacts / "report/reports/comparison.json").read_text())["margin"] == 0.3
    assert (toy.remote / "merge-requests" / "3").is_dir()
    receipt = json.loads((run.artifacts / "pipeline/reports/receipt.json").read_text())
    assert receipt["stages"][0]["how"] == "ran"


@pytest.mark.slow
def test_failed_training_is_said_in_the_comment_and_not_taken_for_a_verdict(toy: Toy) -> None:
    toy.write(margin="")
    base = toy.call("git", "rev-parse", "HEAD")
    (toy.code / "train.py").write_text("raise SystemExit('error: the loss is not finite')")
    sha = toy.commit("Break the training")
    with GitLabEmulator() as emulator:
        emulator.add_merge_request(3, sha=sha)
        run = toy.merge_request(emulator, base)
        [note] = emulator.notes()
    assert "error: the loss is not finite" in note.body
    assert run.jobs["pipeline"] == "FAIL" and run.jobs["report-failure"] == "PASS", run.output
    assert not {"report", "gate", "preflight-failure"} & set(run.jobs)
    assert "No result" in note.body.splitlines()[0] and sha[:8] in note.body


def test_component_refuses_an_input_of_the_wrong_type(toy: Toy) -> None:
    toy.write(margin="much")
    secrets = gitlab.write_variables(toy.folder / "none.json", [], False)
    command = runner.command(toy.code, gitlab.branch(), secrets, "--list-json")
    done = subprocess.run(
        command, cwd=toy.code, env=os.environ | toy.environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and "margin" in done.stdout + done.stderr
