"""The merge request's pipeline by its command, over a folder as remote: restore, run, push, receipt; killed, refused."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from benchmarks import reliability_dvc as reliability
from benchmarks.reliability_dvc import History
from ml.errors import UserError
from ml.release import clean, pipeline, provenance
from ml.settings import Settings
from tests.dvc_project import OUTPUTS, Project, executed

ROOT = Path(__file__).parents[1]
pytest_plugins = ["tests.history_fixtures"]
JOB = {
    "CI_MERGE_REQUEST_IID": "7",
    "CI_JOB_ID": "11",
    "CI_JOB_URL": "https://gitlab.example/g/p/-/jobs/11",
}


def job(history: History, folder: Path, **environment: str) -> Project:
    """A fresh clone in a job of merge request 7."""
    return history.project.clone(folder, DVC_REMOTE_URL=str(history.store), **(JOB | environment))


@pytest.mark.slow
def test_only_what_changed_runs_and_the_next_job_restores_it(history: History, tmp_path: Path) -> None:
    history.project.set_param("train.epochs", 5)
    history.project.commit("more epochs")
    before = sorted(path for path in history.store.rglob("*") if path.is_file())
    first = job(history, tmp_path / "first")
    output = first.ml("pipeline")
    assert executed(output) == ["train", "evaluate"]
    assert "load: restored from main" in output and "train: runs, because its inputs changed" in output
    receipt = json.loads((first.folder / "reports/receipt.json").read_text())
    assert [stage["how"] for stage in receipt["stages"]] == ["restored", "ran", "ran"]
    assert receipt["job"]["id"] == 11
    assert first.git("log", "--oneline") == history.project.git("log", "--oneline")  # it never commits
    assert first.git("diff", "--name-only") == "dvc.lock"
    outside = [
        path for path in history.store.rglob("*") if path.is_file() and "merge-requests" not in path.parts
    ]
    assert sorted(outside) == before  # the main remote is only read

    second = job(history, tmp_path / "second", CI_JOB_ID="12")
    output = second.ml("pipeline")
    assert executed(output) == [] and f"where {JOB['CI_JOB_URL']} put it" in output
    assert second.lock == first.lock
    for name in OUTPUTS:
        assert second.run("diff", "-r", str(first.folder / name), name) == ""


STAGE = """
from ml import own
import pathlib
pathlib.Path("artifacts").mkdir(exist_ok=True)
pathlib.Path("artifacts/own.txt").write_text(own.WORD)
"""


@pytest.mark.slow
def test_stages_run_the_checkouts_code_and_what_drives_them_does_not(
    history: History, tmp_path: Path
) -> None:
    """As in a job: the image has the package installed, and PYTHONSAFEPATH keeps the checkout's root off the path."""
    installed = tmp_path / "image"
    shutil.copytree(ROOT / "src/ml", installed / "ml", ignore=shutil.ignore_patterns("__pycache__"))
    project = history.project
    shadow = "raise SystemExit('shadowed')\n"
    code = {"ml/__init__.py": "", "ml/own.py": "from beside import WORD\n", "ml/stages/own.py": STAGE}
    # what DVC and this package import: neither may come from the checkout
    code |= {"dvc/__init__.py": shadow, "pydantic/__init__.py": shadow}
    for name, text in code.items():
        path = project.folder / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # at its root, which a stage has on its path, as on a laptop: it may import what lies there
    for name in ("sitecustomize.py", "dvc.py", "pydantic.py"):
        (project.folder / name).write_text(shadow)
    (project.folder / "beside.py").write_text("WORD = 'of the checkout'\n")
    stages = YAML(typ="safe").load((project.folder / "dvc.yaml").read_text())
    stages["stages"]["own"] = {
        "cmd": "python -m ml.stages.own",
        "deps": ["src/ml/stages/own.py"],
        "outs": ["artifacts/own.txt"],
    }
    with open(project.folder / "dvc.yaml", "w") as file:
        YAML().dump(stages, file)
    project.commit("a stage of the package")
    clone = job(history, tmp_path / "clone", PYTHONPATH=str(installed), PYTHONSAFEPATH="1")
    output = clone.ml("pipeline")
    assert "own: ran in" in output and "shadowed" not in output, output
    assert (clone.folder / "artifacts/own.txt").read_text() == "of the checkout"


def test_change_without_effect_on_its_output_trains_nothing_anew(history: History, tmp_path: Path) -> None:
    history.project.edit_code("load", "# a comment\n")
    history.project.commit("comment")
    assert executed(job(history, tmp_path / "job").ml("pipeline")) == ["load"]


def test_forged_lock_entry_is_run_instead_of_restored(history: History, tmp_path: Path) -> None:
    reliability.forged(history, random.Random(5))
    output = job(history, tmp_path / "job").ml("pipeline")
    assert executed(output) == ["evaluate"] and "no remote has the record of such a run" in output


def trained_longer(history: History, folder: Path) -> Project:
    """The job of a merge request that asks for more epochs; it has run."""
    history.project.set_param("train.epochs", 5)
    history.project.commit("more epochs")
    project = job(history, folder)
    project.ml("pipeline")
    return project


@pytest.mark.slow
def test_poisoned_run_record_is_not_restored(history: History, tmp_path: Path) -> None:
    """The attacker's record is the only one for what the merge request asks, on the remote that it writes to."""
    first = trained_longer(history, tmp_path / "first")
    right = provenance.read_entries(first.folder / "dvc.lock")["train"]
    prefix = history.store / "merge-requests/7"
    poison = json.loads(json.dumps(right))
    poison["outs"][0] |= {"md5": reliability.put_object(prefix, b"attacker's model"), "size": 16}
    (prefix / provenance.record_path(provenance.key_of(right), provenance.value_of(right))).unlink()
    path = prefix / provenance.record_path(provenance.key_of(poison), provenance.value_of(poison))
    path.write_bytes(provenance.record_bytes(poison))
    second = job(history, tmp_path / "second")
    assert "train" in executed(second.ml("pipeline"))
    assert provenance.read_entries(second.folder / "dvc.lock")["train"] == right


@pytest.mark.slow
def test_damaged_output_on_the_remote_is_made_anew_and_replaced(history: History, tmp_path: Path) -> None:
    first = trained_longer(history, tmp_path / "first")
    md5 = provenance.read_entries(first.folder / "dvc.lock")["train"]["outs"][0]["md5"]
    stored = history.store / "merge-requests/7/files/md5" / md5[:2] / md5[2:]
    content = stored.read_bytes()
    stored.chmod(0o644)
    stored.write_bytes(content[:-1])
    output = job(history, tmp_path / "second").ml("pipeline")
    assert executed(output) == ["train"] and "missing or damaged on every remote" in output
    assert stored.read_bytes() == content


@pytest.mark.slow
def test_failing_stage_fails_the_job_and_keeps_what_had_ended(history: History, tmp_path: Path) -> None:
    history.project.set_param("load.copies", 4)
    history.project.edit_code("train", "sys.exit(3)\n")
    history.project.commit("broken")
    output = job(history, tmp_path / "job").ml("pipeline", fails=True)
    assert "Stage train failed" in output and "Traceback" not in output
    history.project.git("revert", "--no-edit", "HEAD")
    history.project.set_param("load.copies", 4)
    history.project.commit("mended")
    assert executed(job(history, tmp_path / "again").ml("pipeline")) == ["train", "evaluate"]


def test_push_that_is_refused_fails_the_job(history: History, tmp_path: Path) -> None:
    history.project.set_param("evaluate.digits", 2)
    history.project.commit("change")
    (history.store / "merge-requests").write_text("a file, where a folder is wanted")
    output = job(history, tmp_path / "job").ml("pipeline", fails=True)
    assert "Remote merge-request" in output and "Traceback" not in output


def test_without_remote_everything_runs_and_nothing_is_pushed(history: History, tmp_path: Path) -> None:
    fork = history.project.clone(tmp_path / "fork", **JOB)
    shutil.copytree(history.project.folder / "data", fork.folder / "data")
    before = sorted(history.store.rglob("*"))
    assert executed(fork.ml("pipeline", "--without-remote")) == ["load", "train", "evaluate"]
    assert sorted(history.store.rglob("*")) == before
    assert fork.lock == history.project.lock


def test_missing_remote_is_named_before_anything_runs(history: History, tmp_path: Path) -> None:
    output = history.project.clone(tmp_path / "clone", **JOB).ml("pipeline", fails=True)
    assert "DVC_REMOTE_URL is not set" in output and executed(output) == []


@pytest.mark.slow
def test_killed_repro_goes_on_after_cleaning_with_the_same_lock(tmp_path: Path) -> None:
    answer = reliability.kills(tmp_path, 2, seed=2)
    assert answer["failed"] == []


@pytest.mark.parametrize("how", ["torn rwlock", "live PID", "temporary files", "torn dvc.lock"])
def test_leftovers_of_a_killed_dvc_are_removed_and_named(
    history: History, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    lock = history.project.lock
    monkeypatch.chdir(history.project.folder)
    dice = random.Random()
    dice.choice = lambda options: how if how in options else options[0]  # type: ignore[method-assign]
    reliability.spoil_locks(history.project.folder, dice)
    assert clean.clean() != []
    assert clean.clean() == []
    assert history.project.lock == lock and not list(Path(".").rglob(".*.tmp"))
    history.project.run("dvc", "status")


def test_dvc_that_really_runs_here_is_left_alone(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(history.project.folder)

    class Running:
        pid = 4711

        def cmdline(self) -> list[str]:
            return ["dvc", "repro"]

    monkeypatch.setattr(clean, "running_dvc", Running)
    (clean.RWLOCK).write_text("{")
    with pytest.raises(UserError, match="PID 4711: dvc repro"):
        clean.clean()
    assert clean.RWLOCK.exists()


def test_only_a_dvc_at_work_in_this_folder_counts_as_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    program = tmp_path / "dvc"
    program.write_text("import time; print('up', flush=True); time.sleep(60)\n")
    (tmp_path / "elsewhere").mkdir()
    for folder, expected in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        process = subprocess.Popen([sys.executable, str(program)], cwd=folder, stdout=subprocess.PIPE)
        try:
            assert process.stdout and process.stdout.readline()
            monkeypatch.chdir(tmp_path)
            found = clean.running_dvc()
            assert (found is not None and found.pid == process.pid) == expected
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("given", "recorded"),
    [({}, True), ({"ci_job_id": 11}, False), ({"ci_job_id": 11, "mlflow_tracking_uri": "http://x"}, True)],
)
def test_job_records_a_run_only_where_its_server_outlives_it(
    given: dict[str, Any], recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI_JOB_ID", "MLFLOW_TRACKING_URI", "TRACKING"):
        monkeypatch.delenv(name, raising=False)
    assert pipeline.is_recorded(Settings(**given)) == recorded
    assert not pipeline.is_recorded(Settings(**given, tracking=False))
