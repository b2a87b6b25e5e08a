"""The whole pipeline by real DVC in a real git repository, on digits: reproduce, change, push, restore elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ml import files
from ml.task.dataset import RAW_FILES
from tests.workspace import ROOT, environment, make_workspace

IDENTITY = {
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@localhost",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@localhost",
}
PROJECT = (
    "dvc.yaml",
    "constraints.txt",
    ".dvcignore",
    ".gitignore",
    ".gitattributes",
    ".dvc",
    "src",
    "reports/.gitignore",
)


def run(folder: Path, *command: str, fails: bool = False) -> str:
    # The stages run this interpreter's `python`, on the code in `folder`.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = IDENTITY | {"PATH": path, "PYTHONPATH": str(folder / "src"), "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**more))
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_project(folder: Path) -> Path:
    """The pipeline's own files with digits as its data, in a new git repository with a DVC remote beside it."""
    for name in PROJECT:
        source = ROOT / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local", "*.egg-info")
            shutil.copytree(source, folder / name, ignore=unwanted)
        else:
            shutil.copyfile(source, folder / name)
    make_workspace(folder, epochs=1)
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    run(folder, "dvc", "add", "--quiet", "data")
    run(folder, "dvc", "remote", "add", "--default", "--quiet", "storage", str(folder.parent / "remote"))
    return folder


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", message)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose pipeline has run, been committed and been pushed."""
    folder = make_project(tmp_path_factory.mktemp("pipeline") / "project")
    run(folder, "dvc", "repro")
    commit(folder, "Run the pipeline")
    run(folder, "dvc", "push")
    return folder


@pytest.mark.slow
def test_second_repro_runs_nothing_and_leaves_git_clean(project: Path) -> None:
    output = run(project, "dvc", "repro")
    assert "Running stage" not in output
    assert run(project, "git", "status", "--porcelain") == ""


@pytest.mark.slow
def test_another_machine_restores_every_output_without_running_a_stage(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(project), str(clone))
    assert "Running stage" not in run(clone, "dvc", "repro", "--pull", "--allow-missing")
    run(clone, "dvc", "pull")
    assert files.sha256(clone / "dvc.lock") == files.sha256(project / "dvc.lock")
    assert files.sha256(clone / "artifacts/model.onnx") == files.sha256(project / "artifacts/model.onnx")


@pytest.mark.slow
def test_training_again_on_another_machine_gives_the_same_lock(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(project), str(clone))
    run(clone, "dvc", "pull", "data.dvc")
    assert run(clone, "dvc", "repro", "--force", "--no-run-cache").count("Running stage") == 4
    assert run(clone, "git", "status", "--porcelain") == ""


@pytest.mark.slow
def test_experiment_by_one_option_reruns_what_it_touches_and_can_be_compared(
    project: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(project), str(clone))
    run(clone, "dvc", "pull")
    output = run(clone, "dvc", "exp", "run", "-S", "train.learning_rate=0.001")
    assert [
        stage for stage in ("load", "preprocess", "train", "evaluate") if f"Running stage '{stage}'" in output
    ] == [
        "train",
        "evaluate",
    ]
    (change,) = json.loads(run(clone, "dvc", "params", "diff", "main", "--json"))["params.yaml"].values()
    assert (change["old"], change["new"]) == (0.005, 0.001)
    metrics = json.loads(run(clone, "dvc", "metrics", "diff", "main", "--json"))
    assert "accuracy.mean" in metrics["reports/metrics.json"]
    assert "reports/metrics.json" in run(clone, "dvc", "metrics", "show", "--md")
    run(clone, "dvc", "plots", "diff", "main")
    page = (clone / "dvc_plots/index.html").read_text()
    for title in ("Training loss", "Validation accuracy", "Confusion matrix", "worst_mistakes.png"):
        assert title in page


def restore(folder: Path, *options: str, fails: bool = False) -> str:
    return run(folder, sys.executable, "-m", "ml.task.dataset", "restore", *options, fails=fails)


@pytest.fixture
def unpulled(project: Path, tmp_path: Path) -> Path:
    """A clone whose data have not been restored."""
    run(tmp_path, "git", "clone", "--quiet", str(project), str(tmp_path / "clone"))
    return tmp_path / "clone"


@pytest.mark.slow
def test_restore_takes_the_data_from_the_remote(unpulled: Path) -> None:
    assert "restored by DVC" in restore(unpulled)
    assert "is what data.dvc says" in restore(unpulled)


@pytest.mark.slow
def test_restore_fetches_when_no_remote_has_the_data_and_they_can_be_pushed_from_then_on(
    unpulled: Path,
) -> None:
    run(unpulled, "dvc", "remote", "modify", "--local", "storage", "url", str(unpulled.parent / "empty"))
    assert "four files" in restore(unpulled)
    assert run(unpulled, "git", "status", "--porcelain") == ""
    run(unpulled, "dvc", "push", "data.dvc")


@pytest.mark.slow
def test_restore_refuses_to_replace_changed_data(unpulled: Path) -> None:
    restore(unpulled)
    changed = unpulled / "data" / RAW_FILES[0]
    content = changed.read_bytes()
    changed.unlink()  # DVC may have linked it to its cache
    changed.write_bytes(content + b"more")
    assert "data/ differs from what data.dvc says" in restore(unpulled, fails=True)
    assert changed.read_bytes() == content + b"more"


@pytest.mark.slow
def test_restore_of_own_data_without_a_remote_names_the_remedies(unpulled: Path) -> None:
    run(unpulled, "dvc", "remote", "modify", "--local", "storage", "url", str(unpulled.parent / "empty"))
    params = unpulled / "params.yaml"
    params.write_text(params.read_text().replace("dataset: digits", "dataset: custom"))
    message = restore(unpulled, fails=True)
    assert "load.dataset in params.yaml is custom" in message and "dvc remote list" in message
    assert not (unpulled / "data").exists()
