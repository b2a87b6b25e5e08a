"""A team with a repository of its own includes the component: its merge request is trained, compared and commented."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rehearse import gitlab, pipelines, runner
from rehearse.gitlab import Event
from rehearse.pipelines import Run
from rehearse.project import ROOT, Answer, Project
from tests.gitlab_emulator import GitLabEmulator
from tests.pipeline_yaml import Expanded, repository

PIPELINE = """
stages: [pipeline, report, release]
include:
  - component: HOST/ml/template/experiment@v0.1.0
    inputs:
      image: registry.example.com/ml/template/ci:v0.1.0
      remote: REMOTE
      runner-tag: fast
      margin: "MARGIN"
      folder: FOLDER
"""
# No torch, no code of the template beside `ml.files`: one stage that "trains" by a param.
STAGE = """
import json, sys
import numpy as np
from beside import classes
from ml import files
from ruamel.yaml import YAML

wrong = YAML(typ="safe").load(open("params.yaml"))["model"]["channels"][0]  # of 100 test examples
labels = np.arange(200) % classes
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


class Toy(Project):
    """A project with a stage of its own and the component; in `where` of its repository, which ends in a slash or is ""."""

    def __init__(self, folder: Path, emulator: GitLabEmulator) -> None:
        super().__init__(folder, emulator)
        # the component's input says it
        self.runner.variables = [each for each in self.runner.variables if each.name != "DVC_REMOTE_URL"]
        self.template = folder / "template.git"
        self.remote.mkdir()

    def here(self, *command: str, cwd: Path | None = None) -> None:
        environment = runner.environment({"PYTHONPATH": str(ROOT / "src")})
        done = subprocess.run(command, cwd=cwd or self.code, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def begin(self, margin: str = "", where: str = "") -> None:
        """Everything but a result is on the default branch."""
        component = self.template / "templates" / "experiment" / "template.yml"
        component.parent.mkdir(parents=True)
        component.write_bytes((ROOT / "templates" / "experiment" / "template.yml").read_bytes())
        self.code = self.developer / where
        self.code.mkdir(parents=True)
        for command in (
            ("init", "--quiet", "--initial-branch=main"),
            ("config", "uploadpack.allowFilter", "true"),
            ("add", "--all"),
            ("commit", "--quiet", "--message", "template"),
            ("tag", "v0.1.0"),
        ):
            self.git("-C", str(self.template), *command)
        host = self.emulator.url.partition("://")[2]
        text = PIPELINE.replace("HOST", host).replace("REMOTE", str(self.remote)).replace("MARGIN", margin)
        (self.developer / ".gitlab-ci.yml").write_text(text.replace("FOLDER", f'"{where}"'))
        (self.code / "train.py").write_text(STAGE)
        (self.code / "beside.py").write_text("classes = 2\n")
        (self.code / ".gitignore").write_text("/artifacts/\n/reports/\n")
        outs = [f"artifacts/{name}" for name in OUTS] + ["reports/data.json", "reports/predictions.npz"]
        stage = {
            "cmd": "python train.py",
            "deps": ["train.py", "beside.py"],
            "params": ["model"],
            "outs": outs,
            "metrics": ["reports/metrics.json"],
        }
        with open(self.code / "dvc.yaml", "w") as file:
            YAML().dump({"stages": {"train": stage}}, file)
        self.set_wrong(5)
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("remote", "add", "origin", self.address.replace("://", f"://dev:{self.maintainer}@"))
        self.here(sys.executable, "-m", "dvc", "init", "--quiet", *(["--subdir"] if where else []))
        self.commit("Begin")
        self.push("main")

    def set_wrong(self, wrong: int) -> None:
        params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
        params["model"]["channels"] = [wrong, 1]
        with open(self.code / "params.yaml", "w") as file:
            YAML().dump(params, file)

    def train_here(self) -> None:
        """Results of main, as a release leaves them: in the remote and in dvc.lock."""
        dvc = (sys.executable, "-m", "dvc")
        self.here(*dvc, "remote", "add", "--local", "--default", "main", str(self.remote))
        self.here(*dvc, "repro", "--quiet")
        self.here(*dvc, "push", "--quiet", "--run-cache")
        self.commit("Train")
        self.push("main")

    def propose(self, title: str) -> Answer:
        """A merge request with what has been changed, and its pipeline."""
        self.git("switch", "--quiet", "--create", "experiment")
        self.commit(title)
        self.push("experiment")
        fields = {"source_branch": "experiment", "target_branch": "main", "title": title}
        return self.run_merge_request(int(self.api().mergerequests.create(fields).iid))

    def run_pipeline(self, event: Event, jobs: Sequence[str] = (), with_needs: bool = True) -> Run:
        return self.runner.run(self.expanded(event), event, jobs, with_needs)

    def expanded(self, event: Event) -> Expanded:
        # the template's repository is on the same GitLab; git is told to look into a folder
        more = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{self.template}.insteadOf",
            "GIT_CONFIG_VALUE_0": f"{self.emulator.url}/ml/template.git",
        }
        text = runner.preview(self.developer, dict(event.variables), more=more)
        return Expanded(pipelines.expand(text).tree)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    try:
        runner.install()
    except runner.Missing as error:
        pytest.skip(str(error))
    with GitLabEmulator() as emulator:
        yield Toy(tmp_path, emulator)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["", "models/toy/"])
def test_toy_project_with_the_component_gets_its_verdict_and_its_gate(toy: Toy, where: str) -> None:
    """A loss of ten percentage points: stopped by the gate; with a margin of 30 pp it would have passed."""
    toy.begin(margin="0.3", where=where)
    toy.train_here()
    toy.set_wrong(15)
    answer = toy.propose("Make it worse")
    run = answer.run
    assert {name for name, end in run.jobs.items() if end == "success"} == {
        "preflight",
        "pipeline",
        "report",
        "gate",
    }, run.output
    assert run.failed == [] and "worse" in answer.comment.splitlines()[0].lower()
    assert json.loads(run.artifacts["report"][f"{where}reports/comparison.json"])["margin"] == 0.3
    assert f"{where}reports/comment.html" in run.artifacts["gate"]
    assert (toy.remote / "merge-requests" / "1").is_dir()
    receipt = json.loads(run.artifacts["pipeline"][f"{where}reports/receipt.json"])
    assert receipt["stages"][0]["how"] == "ran"


@pytest.mark.slow
def test_failed_training_is_said_in_the_comment_and_not_taken_for_a_verdict(toy: Toy) -> None:
    toy.begin()
    (toy.code / "train.py").write_text("raise SystemExit('error: the loss is not finite')")
    answer = toy.propose("Break the training")
    run = answer.run
    assert "error: the loss is not finite" in answer.comment
    assert run.failed == ["pipeline"] and run.jobs["pipeline-failure"] == "success", run.output
    for name in ("report", "gate", "preflight-failure", "report-failure"):
        assert run.jobs[name] == "skipped"
    sha = toy.git("rev-parse", "experiment")
    assert "No result" in answer.comment.splitlines()[0] and sha[:8] in answer.comment


@pytest.mark.parametrize("given", [{"margin": "much"}, {"where": "models/toy"}, {"where": "/models/toy/"}])
def test_component_refuses_an_input_of_the_wrong_form(toy: Toy, given: dict[str, str]) -> None:
    toy.begin(**{name: value for name, value in given.items() if name == "margin"})
    ci = toy.developer / ".gitlab-ci.yml"
    ci.write_text(ci.read_text().replace('folder: ""', f'folder: "{given.get("where", "")}"'))
    with pytest.raises(ValueError, match="margin" if "margin" in given else "folder"):
        toy.expanded(Event(gitlab.branch(), "main", ""))


def test_every_path_of_a_project_in_a_folder_lies_in_that_folder(tmp_path: Path) -> None:
    folder = repository(tmp_path / "project")
    ci = folder / ".gitlab-ci.yml"
    ci.write_text(
        ci.read_text().replace("      runner-tag:", "      folder: models/digits/\n      runner-tag:")
    )
    expanded = Expanded(pipelines.expand(runner.preview(folder, gitlab.branch())).tree)
    ours = YAML(typ="safe").load_all((ROOT / "templates/experiment/template.yml").read_text())
    jobs = {name for name in list(ours)[1] if not name.startswith(".")}
    assert {"preflight", "pipeline", "report", "gate", "retrain", "release"} <= jobs
    for job in jobs:
        entry = expanded.jobs[job]
        assert entry["before_script"][0] == 'cd "./models/digits/"'
        artifacts = entry.get("artifacts", {})
        dotenv = artifacts.get("reports", {}).get("dotenv", "models/digits/")
        paths = [
            *artifacts.get("paths", []),
            dotenv,
            *(cache["key"]["files"][0] for cache in entry.get("cache", [])),
        ]
        assert all(path.startswith("models/digits/") for path in paths), job
