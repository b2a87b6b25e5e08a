"""A result made again from its commit: identical or not, from which stage on, and why it may be so."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from ml.errors import UserError
from ml.lock import Lock, StageLock
from ml.release import reproduce
from ml.release.reproduce import compare
from tests.release_project import ReleaseProject, job
from tests.release_project import run as run_command
from tests.test_pipeline import commit, make_project, run

pytest_plugins = ["tests.release_fixtures"]


def again(project: ReleaseProject, *arguments: str, fails: str = "", **environment: str) -> tuple[int, str]:
    """Exit code and output of reproducing in a fresh clone of origin."""
    folder = project.clone("main")
    own = {"DVC_REMOTE_URL": str(project.remote), **environment}
    with job(folder, own) as said:
        if fails:
            with pytest.raises(UserError, match=fails) as caught:
                reproduce.main(list(arguments))
            return 1, said.getvalue() + str(caught.value)
        with pytest.raises(SystemExit) as ended:
            reproduce.main(list(arguments))
    return int(ended.value.code or 0), said.getvalue()


# ---- On a small project


def test_release_is_identical_and_the_checkout_stays_as_it_is(project: ReleaseProject) -> None:
    code, said = again(project, "model-v1.0.0")

    assert code == 0 and "identical: every output of model-v1.0.0, bit for bit" in said
    assert project.trailers("model-v1.0.0")["Model-Sha256"] in said
    assert [line for line in said.splitlines() if line.endswith("outputs)")] == [
        "load: identical (3 outputs)",
        "train: identical (4 outputs)",
        "evaluate: identical (2 outputs)",
    ]
    folder = project.folder / f"job-{project.clones}"
    assert run_command(folder, "git", "status", "--porcelain").stdout == ""
    assert not (folder / "artifacts").exists()


def test_first_stage_that_differs_is_named_with_what_it_was_made_with(project: ReleaseProject) -> None:
    code, said = again(project, "model-v1.0.0", RELEASE_NOISE="x", RELEASE_DEVICE="cuda")

    assert code == 1 and "NOT identical: the first stage that differs is train." in said
    assert "load: identical" in said
    assert "train: DIFFERS in artifacts/golden.npz, artifacts/model.onnx" in said
    assert "evaluate: DIFFERS" in said and "it reads what train made" in said
    assert "device was 'cpu', is 'cuda'" in said


def test_other_packages_are_a_reason_and_none_at_all_is_said_too(project: ReleaseProject) -> None:
    _, said = again(project, "model-v1.0.0", RELEASE_NOISE="x")
    assert "numpy" in said and "(pinned 2.0.0)" in said


def test_lock_that_is_not_of_the_commits_inputs_is_called_stale(project: ReleaseProject) -> None:
    code, said = again(project, project.origin("rev-parse", "branch-4"))  # no author committed dvc.lock there
    assert code == 1 and "was stale" in said and "train.epochs" in said


def test_lock_is_that_of_the_tag_be_it_on_main_or_not_or_the_one_that_is_given(
    project: ReleaseProject,
) -> None:
    merged = project.merge(4)
    project.release()
    project.origin("update-ref", "refs/heads/main", merged)  # others forbade the commit of dvc.lock
    code, said = again(project, "model-v1.0.1")
    assert code == 0, said

    trailers = "\n".join(f"{key}: {value}" for key, value in project.trailers("model-v1.0.1").items())
    project.origin("tag", "--annotate", "--message", f"By hand\n\n{trailers}", "model-v1.0.2", merged)
    again(project, "model-v1.0.2", fails="name it: --lock FILE")
    lock = project.folder / "released.lock"
    lock.write_bytes(project.gitlab.project.packages[("model", "1.0.1")]["dvc.lock"])
    assert again(project, "model-v1.0.2", "--lock", str(lock))[0] == 0


def test_what_cannot_be_made_again_says_why(project: ReleaseProject, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    checkout = project.clone("main")
    own = {"DVC_REMOTE_URL": str(project.remote), "TMPDIR": str(temporary)}

    def refused(revision: str) -> str:
        """What the command says, as a person calls it."""
        command = (sys.executable, "-m", "ml.release.reproduce", revision)
        done = run_command(checkout, *command, fails=True, environment=own)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert list(temporary.iterdir()) == []
        assert run_command(checkout, "git", "status", "--porcelain").stdout == ""
        assert not (checkout / "artifacts").exists()
        return done.stdout + done.stderr

    assert "error: 'nowhere' is no commit of this repository" in refused("nowhere")
    shutil.rmtree(project.remote / "files")
    said = refused("model-v1.0.0")
    assert f"cloned into {temporary}" in said and "identical" not in said
    assert re.search("are on none of the remotes main, .*this-machine", said)


def test_folder_to_keep_is_left_and_must_be_empty(project: ReleaseProject, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert again(project, "main", "--keep", str(kept))[0] == 0
    assert (kept / "clone/artifacts/model.onnx").exists()
    again(project, "main", "--keep", str(kept), fails="is not empty")


def test_stages_are_compared_in_the_order_in_which_they_run() -> None:
    def lock(split: str, model: str) -> Lock:
        return Lock(
            {
                "train": StageLock("t", {"a/split": split}, {}, {"a/model": model}),
                "prepare": StageLock("p", {"data": "d"}, {}, {"a/split": split}),
            }
        )

    found = compare(lock("1", "1"), lock("2", "2"))

    assert [(each.stage, each.different, each.because, each.stale) for each in found] == [
        ("prepare", ["a/split"], None, []),
        ("train", ["a/model"], "prepare", []),
    ]


# ---- On real training


@pytest.mark.slow
def test_training_on_digits_is_identical_here_and_not_with_another_instruction_set(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project")
    run(folder, "dvc", "repro")
    commit(folder, "Run the pipeline")

    def retrain(fails: bool, *options: str) -> str:
        command = ["env", *options, sys.executable, "-m", "ml.release.reproduce", "HEAD"]
        return run(folder, *command, fails=fails)

    assert "identical: every output of HEAD, bit for bit" in retrain(False)
    said = retrain(True, "ATEN_CPU_CAPABILITY=default")
    assert "the first stage that differs is train." in said
    assert "cpu_capability was" in said and "is 'DEFAULT'" in said
    assert run(folder, "git", "status", "--porcelain") == ""
