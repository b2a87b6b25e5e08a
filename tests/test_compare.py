"""The compare command: the baseline through git and DVC, and a sensible outcome whatever main has or lacks."""

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ml import files
from ml.errors import UserError
from ml import git
from ml.report import comment, compare, gate, result
from ml.report.baseline import Side, Unavailable
from ml.report.changes import outdated
from ml.lock import Lock, StageLock, read_lock
from ml.report.result import Comparison
from tests.experiment import CLASSES, Experiment, examples, make_experiment, predictions


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    made = make_experiment(tmp_path / "repo")
    monkeypatch.chdir(made.folder)
    monkeypatch.setattr(
        "ml.plots.png", lambda figure: b"\x89PNG"
    )  # drawing is slow, and tests/test_pictures.py has it
    return made


def two_commits(experiment: Experiment, **candidate: float) -> str:
    """A baseline with 10 % mistakes, and a candidate with other seeds and what `candidate` says. The baseline's hash."""
    experiment.write_results(predictions(wrong=0.1))
    baseline = experiment.commit("baseline")
    experiment.write_results(predictions(**({"first_seed": 10, "wrong": 0.1} | candidate)))  # type: ignore[arg-type]
    experiment.commit("candidate")
    return baseline


def run(revision: str) -> Comparison:
    """What the command writes, read back."""
    result.save(result.COMPARISON, compare.run(revision, None))
    return result.load()


def passes(comparison: Comparison) -> bool:
    return gate.decide(comparison, []).passes


def test_big_loss_is_worse_and_blocked(experiment: Experiment) -> None:
    comparison = run(two_commits(experiment, wrong=0.4))
    assert comparison.verdict == "worse"
    assert comparison.primary and -0.4 < comparison.primary.difference < -0.2
    assert not passes(comparison)
    assert [picture.path for picture in comparison.pictures] == [
        f"comparison/{name}.png" for name in ("difference", "classes", "broken", "fixed")
    ]
    for picture in comparison.pictures:
        assert (files.REPORTS / picture.path).read_bytes().startswith(b"\x89PNG")


def test_big_gain_is_better_and_passes(experiment: Experiment) -> None:
    comparison = run(two_commits(experiment, wrong=0.0))
    assert comparison.verdict == "better"
    assert passes(comparison)


def test_other_seeds_alone_make_no_detectable_difference(experiment: Experiment) -> None:
    comparison = run(two_commits(experiment))
    assert comparison.verdict == "no detectable difference"
    assert comparison.primary and comparison.primary.smallest_detectable > 0
    assert comparison.candidate_seeds == [10, 11, 12] and comparison.baseline_seeds == [0, 1, 2]
    assert passes(comparison)


def test_unchanged_results_are_called_identical(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    commit = experiment.commit()
    comparison = run(commit)
    assert comparison.identical and comparison.verdict == "no detectable difference"
    assert comparison.changes and not comparison.changes.any
    assert comparison.pictures == []


def test_examples_are_paired_by_id_whatever_their_order(experiment: Experiment) -> None:
    first = predictions()
    experiment.write_results(first)
    baseline = experiment.commit()
    order = np.random.default_rng(1).permutation(len(first.ids))
    experiment.write_results(
        replace(
            first,
            ids=first.ids[order],
            labels=first.labels[order],
            probabilities=first.probabilities[:, order],
        )
    )
    experiment.commit()
    assert run(baseline).identical


def test_first_run_ever_passes_when_there_is_no_revision(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    experiment.commit()
    comparison = run("0" * 40)
    assert (comparison.verdict, comparison.problem) == ("no baseline", "first_run")
    assert comparison.candidate["accuracy"].mean > 0.8
    assert passes(comparison)


def test_first_run_passes_when_the_baseline_has_no_lock_file(experiment: Experiment) -> None:
    experiment.git("add", "--all")
    experiment.git("commit", "--quiet", "--message", "code alone")
    experiment.write_results(predictions())
    experiment.commit()
    comparison = run("HEAD~1")
    assert comparison.problem == "first_run"
    assert passes(comparison)


@pytest.mark.parametrize("revision", ["", " "])
def test_empty_revision_is_a_variable_that_is_not_set_and_no_first_run(
    experiment: Experiment, revision: str
) -> None:
    experiment.write_results(predictions())
    experiment.commit()
    with pytest.raises(UserError, match="--baseline is empty: a variable is not set"):
        run(revision)


def test_baseline_that_git_cannot_read_is_no_first_run(experiment: Experiment) -> None:
    baseline = two_commits(experiment)
    blob = experiment.git("rev-parse", f"{baseline}:dvc.lock")
    (experiment.folder / ".git/objects" / blob[:2] / blob[2:]).unlink()  # as in a partial clone
    with pytest.raises(UserError, match=f"`git show` failed: bad object {baseline}:./dvc.lock.*Clone anew"):
        run(baseline)


def test_git_that_cannot_tell_is_not_taken_for_a_clean_folder(experiment: Experiment) -> None:
    (experiment.folder / ".git/index").write_bytes(b"damaged")
    with pytest.raises(UserError, match="`git status` failed: .*index file.*Clone anew"):
        git.is_dirty()


def test_first_run_passes_when_the_baseline_never_evaluated(experiment: Experiment) -> None:
    experiment.write("dvc.lock", "schema: '2.0'\nstages: {}\n")
    experiment.git("add", "--all")
    experiment.git("commit", "--quiet", "--message", "lock without stages")
    experiment.write_results(predictions())
    experiment.commit()
    comparison = run("HEAD~1")
    assert comparison.problem == "first_run"
    assert passes(comparison)


def without_cache(experiment: Experiment) -> None:
    """As a report job sees it: a fresh cache, and the candidate's results as artifacts."""
    shutil.rmtree(experiment.folder / ".dvc" / "cache")


def test_baseline_results_come_from_the_remote_when_the_cache_is_empty(experiment: Experiment) -> None:
    experiment.add_remote()
    baseline = two_commits(experiment, wrong=0.4)
    experiment.git("checkout", "--quiet", baseline)
    with_baseline_outputs(experiment)
    experiment.git("checkout", "--quiet", "-")
    without_cache(experiment)
    assert run(baseline).verdict == "worse"


def with_baseline_outputs(experiment: Experiment) -> None:
    """Push what the checked-out dvc.lock names, and every other object in the cache."""
    from dvc.repo import Repo

    with Repo(str(experiment.folder)) as repo:
        repo.push(all_commits=True)


def test_candidate_files_that_the_job_lacks_come_from_the_remote_too(experiment: Experiment) -> None:
    experiment.add_remote()
    baseline = two_commits(experiment, wrong=0.4)
    with_baseline_outputs(experiment)
    without_cache(experiment)
    shutil.rmtree(experiment.folder / "artifacts")
    comparison = run(baseline)
    assert comparison.verdict == "worse" and comparison.reproduce.model_sha256
    assert "comparison/broken.png" in [picture.path for picture in comparison.pictures]


def test_test_images_of_another_run_are_a_note_and_no_traceback(experiment: Experiment) -> None:
    baseline = two_commits(experiment, wrong=0.4)
    other = predictions(id_from=1000)
    files.save_examples(files.TEST_EXAMPLES, examples(other.ids, other.labels))
    experiment.commit("load ran, evaluate did not")
    comparison = run(baseline)
    assert comparison.verdict == "worse"
    [note] = [note for note in comparison.notes if "could not be drawn" in note.text]
    assert "artifacts/test.npz lacks the example" in note.detail


def test_results_older_than_what_they_depend_on_say_so(experiment: Experiment) -> None:
    baseline = two_commits(experiment)
    assert run(baseline).notes == []
    experiment.write("src/train.py", "edited\n")
    experiment.params["train"]["epochs"] = 99
    experiment.write_params()
    [note] = run(baseline).notes
    assert "older than files or params that they depend on" in note.text
    assert note.detail == "src/train.py, train.epochs"


def test_stage_that_read_another_output_than_the_lock_has_is_outdated() -> None:
    first = StageLock("run", {}, {}, {"x": "2"})
    assert outdated(Lock({"a": first, "b": StageLock("run", {"x": "1"}, {}, {})})) == ["x"]
    assert outdated(Lock({"a": first, "b": StageLock("run", {"x": "2"}, {}, {})})) == []


def test_change_of_the_gates_own_rules_is_among_the_changed_params(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    baseline = experiment.commit()
    experiment.params["report"]["margin"] = 0.5
    experiment.commit()
    changes = run(baseline).changes
    assert changes and [(each.key, each.after) for each in changes.params] == [("report.margin", "0.5")]


def test_comparison_without_test_images_says_what_it_could_not_draw(experiment: Experiment) -> None:
    baseline = two_commits(experiment, wrong=0.4)
    md5 = files.md5(files.TEST_EXAMPLES)
    (experiment.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()
    files.TEST_EXAMPLES.unlink()
    comparison = run(baseline)
    assert comparison.verdict == "worse"
    assert any("could not be drawn" in note.text for note in comparison.notes)


def test_results_that_were_never_pushed_do_not_block(experiment: Experiment) -> None:
    experiment.add_remote().mkdir()
    baseline = two_commits(experiment, wrong=0.4)
    without_cache(experiment)
    comparison = run(baseline)
    assert (comparison.verdict, comparison.problem) == ("no baseline", "not_stored")
    assert "dvc push" in comparison.reason
    assert comparison.changes is not None
    assert passes(comparison)


def test_missing_remote_does_not_block(experiment: Experiment) -> None:
    baseline = two_commits(experiment)
    without_cache(experiment)
    comparison = run(baseline)
    assert comparison.problem == "not_stored"
    assert passes(comparison)


def test_remote_whose_folder_was_never_made_is_an_empty_one_and_does_not_block(
    experiment: Experiment,
) -> None:
    experiment.add_remote()
    baseline = two_commits(experiment)
    without_cache(experiment)
    comparison = run(baseline)
    assert comparison.problem == "not_stored"
    assert passes(comparison)


def test_share_of_the_remote_that_is_not_mounted_blocks(experiment: Experiment, tmp_path: Path) -> None:
    experiment.add_remote()
    baseline = two_commits(experiment)
    without_cache(experiment)
    use_remotes(experiment, store=tmp_path / "share/folder/store")
    comparison = run(baseline)
    assert comparison.problem == "unreachable"
    assert comparison.detail and "the remote says FileNotFoundError" in comparison.detail
    assert not passes(comparison)


def use_remotes(experiment: Experiment, **folders: Path) -> None:
    """As `ml.release.remote` writes them into the job's configuration; `merge_request` is merge-request."""
    named = {name.replace("_", "-"): folder for name, folder in folders.items()}
    text = "".join(f"['remote \"{name}\"']\n    url = {folder}\n" for name, folder in named.items())
    (experiment.folder / ".dvc/config.local").write_text(text)


def stored_and_worse(experiment: Experiment) -> tuple[Path, str]:
    """The remote, which has the results of both commits (the cache has none), and the baseline."""
    remote = experiment.add_remote()
    baseline = two_commits(experiment, wrong=0.4)
    with_baseline_outputs(experiment)
    experiment.git("checkout", "--quiet", baseline)
    experiment.push()
    experiment.git("checkout", "--quiet", "-")
    without_cache(experiment)
    return remote, baseline


def test_results_are_taken_from_whichever_remote_has_them(experiment: Experiment, tmp_path: Path) -> None:
    remote, baseline = stored_and_worse(experiment)
    shutil.rmtree(experiment.folder / "artifacts")
    prefix = tmp_path / "prefix"
    objects = sorted((remote / "files/md5").glob("*/*"))
    for path in objects[::2]:  # half of them are in the merge request's prefix alone
        moved = prefix / path.relative_to(remote)
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
    use_remotes(experiment, store=remote, merge_request=prefix)
    assert run(baseline).verdict == "worse"


def test_damaged_copy_on_one_remote_does_not_hide_a_right_one_on_the_other(
    experiment: Experiment, tmp_path: Path
) -> None:
    remote, baseline = stored_and_worse(experiment)
    shutil.copytree(remote, tmp_path / "prefix")
    for path in (remote / "files/md5").glob("*/*"):
        path.chmod(0o644)
        path.write_bytes(b"damaged")
    use_remotes(experiment, store=remote, merge_request=tmp_path / "prefix")
    assert run(baseline).verdict == "worse"


@contextmanager
def http_remote(experiment: Experiment, status: int) -> Iterator[None]:
    """A DVC remote that answers every request with `status`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/store"
        text = f"[core]\n    remote = web\n['remote \"web\"']\n    url = {url}\n"
        (experiment.folder / ".dvc/config.local").write_text(text)
        yield
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "problem"),
    [(401, "unreachable"), (403, "unreachable"), (503, "unreachable"), (404, "not_stored")],
)
def test_remote_that_refuses_or_is_down_blocks_and_one_that_lacks_the_object_does_not(
    experiment: Experiment, status: int, problem: str
) -> None:
    baseline = two_commits(experiment)
    without_cache(experiment)
    with http_remote(experiment, status):
        comparison = run(baseline)
    assert comparison.problem == problem
    assert comparison.detail and (str(status) in comparison.detail) == (problem == "unreachable")
    assert passes(comparison) == (problem == "not_stored")


def test_remote_to_which_there_is_no_connection_blocks(experiment: Experiment) -> None:
    baseline = two_commits(experiment)
    without_cache(experiment)
    with http_remote(experiment, 200):
        pass
    assert run(baseline).problem == "unreachable"


def test_remote_that_cannot_be_asked_blocks(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = two_commits(experiment)

    def refused(*_: object, **__: object) -> bytes:
        raise PermissionError("403 Forbidden\n/approve")

    experiment.add_remote()
    without_cache(experiment)
    monkeypatch.setattr("dvc.fs.LocalFileSystem.cat_file", refused)
    comparison = run(baseline)
    assert (comparison.problem, comparison.detail) == (
        "unreachable",
        "reports/predictions.npz could not be fetched: the remote says PermissionError: 403 Forbidden\n/approve",
    )
    assert not passes(comparison)


def test_baseline_with_damaged_bytes_blocks(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    baseline = experiment.commit()
    md5 = files.md5(files.PREDICTIONS)
    experiment.write_results(predictions(first_seed=10))
    experiment.commit()
    stored = experiment.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    stored.chmod(0o644)
    content = bytearray(stored.read_bytes())
    content[-2000] ^= 1
    stored.write_bytes(content)
    comparison = run(baseline)
    assert comparison.problem == "corrupt"
    assert comparison.detail and "MD5" in comparison.detail
    assert not passes(comparison)


@pytest.mark.parametrize(
    ("problem", "broken"),
    [
        ("an example id occurs twice", lambda p: replace(p, ids=np.repeat(p.ids[:1], len(p.ids)))),
        ("a seed occurs twice", lambda p: replace(p, seeds=np.zeros(3, np.int64))),
        ("labels are", lambda p: replace(p, labels=p.labels + 1)),
        ("shapes do not fit", lambda p: replace(p, labels=p.labels[1:])),
        ("not between 0 and 1", lambda p: replace(p, probabilities=p.probabilities * np.float32(np.nan))),
    ],
)
def test_predictions_that_make_no_sense_are_called_damaged(problem: str, broken: object) -> None:
    from ml.report.baseline import checked_predictions

    assert callable(broken)
    with pytest.raises(UserError, match=problem):
        checked_predictions(broken(predictions()))


def test_error_without_a_message_is_called_damage_by_its_name(experiment: Experiment) -> None:
    def refuse(path: Path) -> None:
        raise ValueError

    experiment.write_results(predictions())
    experiment.commit()
    with pytest.raises(Unavailable, match="reports/metrics.json cannot be used: ValueError"):
        Side(None, read_lock()).read(files.METRICS, refuse)


def test_baseline_whose_predictions_make_no_sense_blocks(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    files.write_bytes(files.PREDICTIONS, b"no arrays")
    baseline = experiment.commit()
    experiment.write_results(predictions())
    experiment.commit()
    comparison = run(baseline)
    assert comparison.problem == "corrupt"
    assert comparison.detail and "does not hold the arrays" in comparison.detail
    assert not passes(comparison)


def test_other_test_set_is_not_comparable_and_asks_a_person(experiment: Experiment) -> None:
    experiment.write_results(predictions(count=300))
    baseline = experiment.commit()
    changed = predictions(count=300, id_from=60, first_seed=5)
    changed.labels[:10] = (changed.labels[:10] + 1) % 3
    experiment.write_results(changed)
    experiment.commit()
    comparison = run(baseline)
    assert comparison.verdict == "not comparable"
    assert comparison.common is not None
    counts = comparison.common.model_dump(exclude={"difference"})
    assert counts == {"shared": 230, "only_candidate": 60, "only_baseline": 60, "relabelled": 10}
    assert comparison.common.difference and abs(comparison.common.difference.difference) < 0.1
    assert comparison.metrics == {}
    assert not passes(comparison)
    assert gate.decide(comparison, ["accept-regression"]).passes


def test_renamed_classes_are_not_comparable(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    baseline = experiment.commit()
    experiment.write_results(predictions(), names=("cat", "fox", "owl"))
    experiment.commit()
    comparison = run(baseline)
    assert comparison.verdict == "not comparable"
    assert comparison.detail == "dog is now fox"
    assert "the classes have other names" in comment.headline(comparison)


def test_one_seed_borrows_the_other_sides_seed_noise(experiment: Experiment) -> None:
    comparison = run(two_commits(experiment, seeds=1))
    assert comparison.primary and comparison.primary.seed_noise == "borrowed"


def test_one_seed_on_each_side_uses_the_documented_assumption(experiment: Experiment) -> None:
    experiment.write_results(predictions(seeds=1))
    baseline = experiment.commit()
    experiment.write_results(predictions(seeds=1, first_seed=1, wrong=0.6))
    experiment.commit()
    comparison = run(baseline)
    assert comparison.primary and comparison.primary.seed_noise == "assumed"
    assert comparison.metrics["loss"].seed_noise == "unknown"
    assert comparison.verdict == "worse"


def test_unknown_revision_is_the_users_error(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    experiment.commit()
    with pytest.raises(UserError, match="'nonsense' is no commit.*Check the name"):
        run("nonsense")
    with pytest.raises(UserError, match="is no commit"):
        run("--output=/tmp/x")


def test_candidate_without_results_is_an_error(experiment: Experiment) -> None:
    experiment.git("add", "--all")
    experiment.git("commit", "--quiet", "--message", "code alone")
    with pytest.raises(UserError, match="dvc.lock is missing"):
        run("HEAD")


def test_candidate_whose_files_are_not_those_of_the_lock_is_an_error(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    commit = experiment.commit()
    shutil.rmtree(experiment.folder / ".dvc" / "cache")
    files.write_bytes(files.PREDICTIONS, b"other")
    with pytest.raises(UserError, match="No results to report on: reports/predictions.npz"):
        run(commit)


def test_unknown_primary_metric_is_named(experiment: Experiment) -> None:
    experiment.params["report"]["primary_metric"] = "auc"
    experiment.write_results(predictions())
    commit = experiment.commit()
    with pytest.raises(UserError, match=r"'auc'.*accuracy, macro_f1, loss, calibration_error"):
        run(commit)


def test_job_local_remote_configuration_is_used_for_the_older_commit(
    experiment: Experiment, tmp_path: Path
) -> None:
    remote = experiment.add_remote()
    baseline = two_commits(experiment)
    with_baseline_outputs(experiment)
    without_cache(experiment)
    moved = tmp_path / "moved"
    remote.rename(moved)
    assert run(baseline).problem == "not_stored"
    use_remotes(experiment, store=moved)
    assert run(baseline).verdict == "no detectable difference"


def test_cost_is_shown_beside_the_baselines_where_both_are_there(
    experiment: Experiment, tmp_path: Path
) -> None:
    baseline = two_commits(experiment)
    cost = {"seconds": 12.5, "peak_memory_mib": 300, "machine": "x86_64", "device": "cuda"}
    experiment.write("reports/cost/train.json", json.dumps(cost))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/train.json").write_text(json.dumps(cost | {"seconds": 10.0}))
    comparison = compare.run(baseline, tmp_path / "old")
    train = next(stage for stage in comparison.stages if stage.name == "train")
    assert (train.ran, train.seconds, train.baseline_seconds, train.device) == (True, 12.5, 10.0, "cuda")
    load = next(stage for stage in comparison.stages if stage.name == "load")
    assert (load.ran, load.seconds, load.inputs_changed, load.outputs_changed) == (False, None, False, False)


def test_damaged_cost_file_is_named(experiment: Experiment) -> None:
    baseline = two_commits(experiment)
    experiment.write("reports/cost/train.json", "{")
    with pytest.raises(UserError, match="reports/cost/train.json is damaged"):
        run(baseline)


def test_reproduce_names_commit_lock_and_model(experiment: Experiment) -> None:
    baseline = two_commits(experiment)
    made = run(baseline).reproduce
    assert made.commit == experiment.git("rev-parse", "HEAD") and made.baseline_commit == baseline
    assert made.lock_sha256 == files.sha256(Path("dvc.lock"))
    assert made.model_sha256 == files.sha256(files.MODEL_ONNX)
    assert "make setup && . .venv/bin/activate" in made.commands
    assert not made.dirty
    experiment.write("src/train.py", "three\n")
    assert run(baseline).reproduce.dirty


def test_command_writes_the_comparison_and_says_the_verdict(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = two_commits(experiment, wrong=0.4)
    monkeypatch.setattr(sys, "argv", ["compare", "--baseline", baseline, "--out", "reports/other.json"])
    compare.main()
    assert result.load(Path("reports/other.json")).verdict == "worse"
    assert capsys.readouterr().err.startswith("worse: ")


def test_flips_name_the_examples_that_broke_and_were_fixed(experiment: Experiment) -> None:
    old = predictions(wrong=0.0, seeds=2)
    new = predictions(wrong=0.0, seeds=2)
    old.probabilities[:, 7] = [0.05, 0.05, 0.9]  # label 1, so wrong before
    new.probabilities[:, 3] = [0.1, 0.7, 0.2]  # label 0, so wrong now
    new.probabilities[:, 4] = [0.4, 0.5, 0.1]  # label 1, still right
    experiment.write_results(old)
    baseline = experiment.commit()
    experiment.write_results(new)
    experiment.commit()
    found = run(baseline).flips
    assert found and (found.broken_count, found.fixed_count) == (1, 1)
    broken = found.broken[0]
    assert (broken.id, broken.actual, broken.before, broken.after) == (old.ids[3], "cat", "cat", "dog")
    assert broken.confidence_after == pytest.approx(0.7) and broken.wrong_seeds_after == 2
    assert [(pair.before, pair.after, pair.count) for pair in found.fixed_pairs] == [("owl", "dog", 1)]


def test_training_data_that_changed_is_compared_example_by_example(experiment: Experiment) -> None:
    old_train = examples(np.array([f"{n:016x}" for n in range(1000, 1030)]), np.arange(30) % 3)
    ids = np.array([f"{n:016x}" for n in range(1005, 1040)])
    labels = np.arange(5, 40) % 3
    labels[:4] = (labels[:4] + 1) % 3
    ids[-1] = predictions().ids[0]  # a leak: this one is a test example too
    experiment.write_results(predictions(), old_train)
    baseline = experiment.commit()
    experiment.write_results(predictions(first_seed=9), examples(ids, labels))
    experiment.commit()
    data = run(baseline).data
    assert data and data.changed and (data.in_both_parts_before, data.in_both_parts) == (0, 1)
    train, test = data.parts
    assert (train.before, train.after, train.added, train.removed, train.relabelled) == (30, 35, 10, 5, 4)
    assert [balance.name for balance in train.per_class] == list(CLASSES)
    assert sum(balance.after for balance in train.per_class) == 35
    assert (test.added, test.removed, test.relabelled) == (0, 0, 0)


def test_image_of_the_job_is_named_only_by_the_receipt_of_this_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.job_image() is None
    Path("dvc.lock").write_text("lock")
    Path("reports").mkdir()
    receipt = {"image": "registry.example/ci:main", "lock_sha256": files.sha256(Path("dvc.lock"))}
    Path("reports/receipt.json").write_text(json.dumps(receipt))
    assert compare.job_image() == "registry.example/ci:main"
    for other in (receipt | {"lock_sha256": "0" * 64}, receipt | {"image": None}, []):
        Path("reports/receipt.json").write_text(json.dumps(other))
        assert compare.job_image() is None


def test_project_in_a_folder_of_the_repository_is_compared_by_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's dvc.lock, code, params and pins; and the repository's jobs, which judge it."""
    project = make_experiment(tmp_path / "repo/models/größe", tmp_path / "repo")
    monkeypatch.chdir(project.folder)
    (tmp_path / "repo/dvc.lock").write_text("another project's\n")
    baseline = two_commits(project, wrong=0.4)
    project.params["report"]["margin"] = 0.2
    project.params["train"]["epochs"] = 99
    project.write("src/train.py", "one\ntwo\nthree\n")
    project.write("constraints.txt", "numpy==2.1.0\ntorch==2.6.0\n")
    project.write("../../.gitlab-ci.yml", "jobs\n")
    project.commit("change")
    comparison = run(baseline)
    assert comparison.verdict == "worse" and not comparison.reproduce.dirty
    changed = comparison.changes
    assert changed and {each.key for each in changed.params} == {"train.epochs", "report.margin"}
    assert [(each.path, each.lines_added) for each in changed.code] == [("src/train.py", 1)]
    assert [each.name for each in changed.packages] == ["numpy"]
    assert comparison.reproduce.commands[1] == "cd 'models/größe/'"
    assert comparison.judge
    assert [[each.path for each in part.files] for part in comparison.judge.touched] == [
        [".gitlab-ci.yml"],
        ["models/größe/constraints.txt"],
    ]
    (tmp_path / "repo/dvc.lock").write_text("its pipeline has run\n")
    assert not run(baseline).reproduce.dirty
    project.write("src/train.py", "uncommitted\n")
    assert run(baseline).reproduce.dirty
