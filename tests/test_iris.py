"""The template with another task, in examples/iris: a CSV file and a support vector machine, from data to an answer."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.scratch import Scratch
from examples.iris import run as iris
from examples.iris.task.dataset import FEATURES, SPECIES, read_dataset, write_iris
from ml.errors import UserError

HEADER = ",".join((*FEATURES, SPECIES))
FLOWERS = [f"5.{n},3.{n},1.{n},0.{n},{name}" for name in ("setosa", "virginica") for n in range(3)]
NOTE = "https://gitlab.example.com/g/iris/-/merge_requests/1#note_1"
FLOWER = [51, 35, 14, 2]  # mm; the first of the file, a setosa


# ---- The CSV file


def write_csv(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "iris.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_irises_are_read_in_millimetres_with_a_third_of_each_species_for_the_test(tmp_path: Path) -> None:
    write_iris(tmp_path / "data")
    dataset = read_dataset(tmp_path / "data", "iris.csv")
    assert dataset.train.class_names.tolist() == ["setosa", "versicolor", "virginica"]
    assert FLOWER in np.concatenate([dataset.train.images, dataset.test.images])[:, 0].tolist()
    assert (len(dataset.train), len(dataset.test)) == (99, 51)
    assert not set(dataset.train.ids.tolist()) & set(dataset.test.ids.tolist())


def test_reordered_file_with_a_byte_order_mark_gives_the_same_parts(tmp_path: Path) -> None:
    one = read_dataset(write_csv(tmp_path / "one", HEADER, *FLOWERS), "iris.csv")
    other = write_csv(tmp_path / "other", "\ufeff" + HEADER, *reversed(FLOWERS), "")
    two = read_dataset(other, "iris.csv")
    assert sorted(one.test.ids) == sorted(two.test.ids)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "has not exactly one column sepal_length, sepal_width"),
        ([HEADER], "has no rows"),
        ([HEADER.replace(",", ";"), *FLOWERS], "separated by commas"),
        ([HEADER.replace("petal_width", "width"), *FLOWERS], "one column petal_width (found: sepal_length"),
        ([HEADER, *FLOWERS, "5.1,3.5,1.4,0.2"], "line 8: it has not as many values as there are columns (5)"),
        ([HEADER, *FLOWERS, "5,1,3,5,1,4,0,2,setosa"], "line 8: it has not as many values"),
        ([HEADER, *FLOWERS, "5.1,,1.4,0.2,setosa"], "line 8: sepal_width is ''"),
        ([HEADER, *FLOWERS, "5.1,nan,1.4,0.2,setosa"], "line 8: sepal_width is 'nan'"),
        (
            [HEADER, *FLOWERS, "5.1,3.55,1.4,0.2,setosa"],
            "sepal_width is '3.55'; expected cm from 0.0 to 25.5",
        ),
        ([HEADER, *FLOWERS, "51,35,14,2,setosa"], "sepal_length is '51'; expected cm"),
        ([HEADER, "", *FLOWERS, "5.1,3.5,1.4,0.2, "], "line 9: species is empty"),
        ([HEADER, *FLOWERS[:3]], "the species are all 'setosa'"),
        ([HEADER, *FLOWERS, *["5.1,3.5,1.4,0.2,rare"] * 3], "rare has fewer than 3 different flowers"),
        ([HEADER, *FLOWERS, '"5.1,3.5,1.4,0.2,setosa'], "could not be read as CSV"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        read_dataset(write_csv(tmp_path, *lines), "iris.csv")
    assert message in str(raised.value) and str(tmp_path / "iris.csv") in str(raised.value)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="iris.csv is missing"):
        read_dataset(tmp_path, "iris.csv")
    (tmp_path / "iris.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="could not be read as CSV"):
        read_dataset(tmp_path, "iris.csv")


# ---- From data to an answer


class Project:
    """The scratch project; its commands fail the test with what they said."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch, self.folder = scratch, scratch.project
        self.env = scratch.environment() | {
            "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }

    def run(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env | more, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, *arguments: str, **more: str) -> str:
        return self.run(sys.executable, *arguments, **more)

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A baseline on main, a change on a branch, which is checked out."""
    project = Project(iris.make_project(tmp_path_factory.mktemp("iris")))
    params = (project.folder / "params.yaml").read_text()
    (project.folder / "params.yaml").write_text(
        params.replace("resamples: 2000", "resamples: 200").replace("[0, 1, 2]", "[0, 1]")
    )
    project.python("-m", "ml.task.dataset", "fetch", "--to", "data")
    project.run("dvc", "add", "--quiet", "data")
    project.commit("Begin")
    project.run("dvc", "repro", "--quiet", TRACKING="off")
    project.commit("Train the baseline")
    project.run("git", "switch", "--quiet", "--create", "wider")
    # As a merge request's author has it done: by `mlflow run`, with the params of the task itself.
    given = ("-P", "dataset=iris.csv", "-P", "penalty=0.01")
    project.run("mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "ml", *given)
    kept = project.run("git", "for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps").split()
    (name,) = (each for each in kept if each.startswith("mlflow-"))
    project.run("dvc", "exp", "apply", "--quiet", name)
    project.commit("Widen the margins")
    yield project


@pytest.mark.slow
def test_iris_run_has_params_accuracy_data_and_commit(project: Project) -> None:
    code = """
import json
from ml.settings import load_settings
from ml.tracking import search
(run,) = search.search(load_settings(), "params.penalty < 0.1 AND metrics.accuracy > 0.5", "accuracy")
print(json.dumps([run.info.status, run.data.params, run.data.metrics, run.data.tags]))
"""
    (project.folder / "ask.py").write_text(code)
    status, params, metrics, tags = json.loads(project.python("ask.py").splitlines()[-1])
    (project.folder / "ask.py").unlink()
    assert status == "FINISHED" and params["model.penalty"] == "0.01" and params["dataset"] == "iris.csv"
    assert (
        metrics["accuracy"]
        == json.loads((project.folder / "reports/metrics.json").read_text())["accuracy"]["mean"]
    )
    assert "penalty: 0.01" in project.run("git", "show", f"{tags['git_commit']}:params.yaml")


@pytest.mark.slow
def test_iris_change_is_compared_with_its_baseline(project: Project) -> None:
    project.python("-m", "ml.report.compare", "--baseline", "main")
    project.python("-m", "ml.report.comment", "--out", "reports/comment.md")
    comment = (project.folder / "reports/comment.md").read_text()
    assert "model.penalty" in comment and "0.01" in comment


@pytest.mark.slow
def test_iris_is_registered_served_and_answered_by_curl(project: Project) -> None:
    tag = "model-v1.0.0"
    project.python("-m", "ml.bundle", "--tag", tag, "--to", "models")
    project.python("-m", "ml.promote", "register", f"models/{tag}", "--gate", "first", "--comment-url", NOTE)
    project.python("-m", "ml.promote", tag, "--to", "staging", "--why", "the first of its kind")

    code = "import json, mlflow, numpy; model = mlflow.pyfunc.load_model('models:/ml@staging');"
    code += f"print(json.dumps(model.predict(numpy.array([[{FLOWER}]], 'uint8')).tolist()))"
    scored = json.loads(project.python("-c", code).splitlines()[-1])
    with project.scratch.serving("t" * 32, MODEL_TAG=tag) as address:
        served = curl(address, [[FLOWER]])
    assert np.argmax(scored[0]) == 0  # setosa
    assert np.abs(np.array(scored) - np.array(served["predictions"])).max() < 1e-4


def curl(address: str, inputs: Any) -> Any:
    command = ["curl", "--silent", "--fail-with-body", "--header", "Content-Type: application/json"]
    body = json.dumps({"inputs": inputs})
    done = subprocess.run(
        [*command, "--data", body, f"{address}/invocations"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)
