"""What a merge request is compared with: the newest commit of its target that HEAD contains, in pipelines of each kind."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ml.errors import UserError
from ml.lock import LOCK, read_lock
from ml.report import compare, result
from ml.settings import Settings
from tests.experiment import Experiment, make_experiment, predictions
from tests.test_pipeline import make_project, run
from tests.workspace import make_workspace

ZEROS = "0" * 40
FORK, TARGET = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"diff_base": FORK}, FORK),  # detached: HEAD is the branch's
        ({"diff_base": FORK, "target_branch": TARGET}, TARGET),  # merged results, a train
        ({"diff_base": FORK, "target_branch": ""}, FORK),
        ({"diff_base": FORK, "target_branch": ZEROS}, FORK),
        ({"target_branch": TARGET}, TARGET),
        ({"diff_base": ZEROS}, ZEROS),  # nothing to be compared with
        ({"diff_base": ZEROS, "target_branch": ZEROS}, ZEROS),
        ({}, None),  # a branch, a tag, a schedule, a laptop
    ],
)
def test_baseline_is_what_head_contains_of_the_target(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"CI_MERGE_REQUEST_{name.upper()}_SHA", value)
    assert Settings().baseline == expected


@pytest.mark.parametrize("iid", [None, 3])
def test_missing_baseline_names_the_option(iid: int | None) -> None:
    with pytest.raises(
        UserError, match=r"CI_MERGE_REQUEST_DIFF_BASE_SHA. Name the commit.*: --baseline REV"
    ) as raised:
        Settings(ci_merge_request_iid=iid).require_baseline("--baseline")
    assert ("This is no merge-request pipeline" in str(raised.value)) == (iid is None)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    made = make_experiment(tmp_path / "repo")
    monkeypatch.chdir(made.folder)
    return made


def verdict(monkeypatch: pytest.MonkeyPatch, *arguments: str, **variables: str) -> result.Comparison:
    """By the command, in a job with these variables."""
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["compare", *arguments])
        compare.main()
    return result.load()


def test_loss_is_not_hidden_by_what_main_has_gained_meanwhile(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.write_results(predictions(wrong=0.4))
    fork = experiment.commit("B0")
    experiment.write_results(predictions(wrong=0.02))
    target = experiment.commit("B1: main has got much better")
    experiment.write_results(predictions(wrong=0.2))
    experiment.commit("the merge of B1 and a branch that loses")
    detached: dict[str, Any] = {"CI_MERGE_REQUEST_IID": "3", "CI_MERGE_REQUEST_DIFF_BASE_SHA": fork}
    merged = detached | {"CI_MERGE_REQUEST_TARGET_BRANCH_SHA": target}
    assert verdict(monkeypatch, **merged).verdict == "worse"
    assert verdict(monkeypatch, **merged).reproduce.baseline_commit == target
    assert verdict(monkeypatch, **detached).verdict == "better"
    assert verdict(monkeypatch, "--baseline", fork, **merged).verdict == "better", "the option wins"
    nothing = verdict(monkeypatch, CI_MERGE_REQUEST_DIFF_BASE_SHA=ZEROS)
    assert (nothing.verdict, nothing.problem) == ("no baseline", "first_run")
    with pytest.raises(UserError, match="no merge-request pipeline.*--baseline REV"):
        verdict(monkeypatch)


@pytest.mark.parametrize("variable", ["TARGET_BRANCH_SHA", "DIFF_BASE_SHA"])
@pytest.mark.parametrize("what", ["train.epochs", "src/train.py", "constraints.txt", "data"])
def test_gain_of_a_merge_that_is_not_released_yet_is_not_credited_without_a_word(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, what: str, variable: str
) -> None:
    """The car before in a merge train; or a branch made before the release job has committed dvc.lock."""
    experiment.write_results(predictions(wrong=0.4))
    experiment.commit("B0")
    lock = (experiment.folder / LOCK).read_text()
    md5 = read_lock().sources["data"]
    experiment.write("data.dvc", f"outs:\n- md5: {md5}\n  path: data\n")
    experiment.git("add", "--all")
    experiment.git("commit", "--quiet", "--message", "released")
    released = experiment.git("rev-parse", "HEAD")
    if what == "train.epochs":
        experiment.params["train"]["epochs"] = 99
        experiment.write_params()
    else:
        experiment.write(
            "data.dvc" if what == "data" else what, f"outs:\n- md5: {'0' * 32}.dir\n  path: data\n"
        )
    experiment.git("commit", "--quiet", "--all", "--message", "B1: main has got much better, by what it says")
    merged = experiment.git("rev-parse", "HEAD")
    assert (experiment.folder / LOCK).read_text() == lock
    experiment.write_results(predictions(wrong=0.2))
    experiment.commit("the merge of B1 and a branch that loses")
    job = {"CI_MERGE_REQUEST_IID": "3", f"CI_MERGE_REQUEST_{variable}": merged}
    [note] = verdict(monkeypatch, **job).notes
    assert "older than the baseline itself" in note.text and note.detail == what
    job[f"CI_MERGE_REQUEST_{variable}"] = released
    assert verdict(monkeypatch, **job).notes == []


# What `dvc repro` would run and commit, three times in one process: each stage by itself would load torch anew.
HISTORY = """
import subprocess
from dvc.repo import Repo
from ml.stages import evaluate, load, preprocess, train

def git(*arguments):
    subprocess.run(["git", *arguments], check=True, capture_output=True)

def commit(message, *stages):
    for stage in stages:
        stage.main()
    if stages:
        with Repo() as repo:
            repo.commit(force=True)
    git("add", "--all")
    git("commit", "--message", message)

def change(old, new):
    text = open("params.yaml").read()
    assert text.count(old) == 1, text
    open("params.yaml", "w").write(text.replace(old, new))

commit("B0", load, preprocess, train, evaluate)
git("checkout", "-b", "branch")
change("  - 16\\n  - 32\\n", "  - 2\\n  - 4\\n")
commit("A smaller network")
git("checkout", "main")
change("epochs: 1\\n", "epochs: 10\\n")
commit("B1", train, evaluate)
git("merge", "--no-edit", "branch")
commit("The results of the merge", train, evaluate)
"""


@pytest.mark.slow
def test_smaller_network_is_worse_than_main_that_trains_longer_by_now(tmp_path: Path) -> None:
    """B0 trains one epoch; a branch off B0 takes a smaller network; main moves to ten epochs; the merge is judged."""
    project = make_project(tmp_path / "project")
    make_workspace(project, epochs=1, learning_rate=0.001, seeds=[0, 1, 2, 3])
    run(project, "env", "TRAIN_PROCESSES=1", sys.executable, "-c", HISTORY)
    fork = run(project, "git", "merge-base", "HEAD~2", "branch").strip()
    target = run(project, "git", "rev-parse", "HEAD~2").strip()
    detached = [f"CI_MERGE_REQUEST_DIFF_BASE_SHA={fork}"]
    merged = [*detached, f"CI_MERGE_REQUEST_TARGET_BRANCH_SHA={target}"]
    compared = [sys.executable, "-m", "ml.report.compare"]
    assert run(project, "env", *merged, *compared).startswith("worse: ")
    assert run(project, "env", *detached, *compared).startswith("better: ")
