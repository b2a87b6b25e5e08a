"""The lock gate over real repositories and remotes: what is wrong is caught and named, what is right passes."""

import io
import os
import random
import re
import shutil
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from benchmarks import reliability_dvc as reliability
from benchmarks.reliability_dvc import History, inside
from ml import remotes
from ml.errors import UserError
from ml.release import lock_gate, provenance, receipt
from tests.dvc_project import Project

pytest_plugins = ["tests.history_fixtures"]


# More of them, by `python -m benchmarks.reliability_dvc histories`: docs/remotes.md.
@pytest.mark.parametrize("spoil", reliability.WRONG, ids=lambda spoil: spoil.__name__)
def test_wrong_lock_is_caught_and_named(history: History, tmp_path: Path, spoil: object) -> None:
    assert callable(spoil)
    expected = spoil(history, random.Random(0))
    assert expected in [finding.problem for finding in history.findings(tmp_path / "clone")]


def test_right_locks_pass_after_each_kind_of_change(history: History, tmp_path: Path) -> None:
    dice = random.Random(1)
    for number in range(2):
        reliability.change(history, dice)
        history.run(f"change {number}")
        assert history.findings(tmp_path / f"clone{number}") == []


def test_right_lock_passes_without_its_data_being_read(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = remotes.Place.read

    def watched(place: remotes.Place, relative: str) -> bytes | None:
        read.append(relative)
        return original(place, relative)

    monkeypatch.setattr(remotes.Place, "read", watched)
    for path in (history.store / "files/md5").glob("*/*"):
        if path.suffix != ".dir":  # of the same size, and nobody looks into it
            path.chmod(0o644)
            path.write_bytes(b"?" * path.stat().st_size)
    assert history.findings(tmp_path / "clone") == []
    assert [path for path in read if path.startswith("files") and not path.endswith(".dir")] == []


def test_lock_pushed_by_dvc_alone_passes_and_fails_where_receipts_are_required(
    history: History, tmp_path: Path
) -> None:
    shutil.rmtree(history.store / "receipts")
    assert history.findings(tmp_path / "clone") == []
    clone = history.project.clone(tmp_path / "other")
    with inside(clone, history.store):
        problems = {finding.problem for finding in lock_gate.judge(require_receipts=True)}
    assert problems == {"unvouched"}


def test_results_of_two_pipelines_on_two_machines_are_no_poison(history: History, tmp_path: Path) -> None:
    lock = history.project.folder / "dvc.lock"
    first, entry = lock.read_text(), provenance.read_entries(lock)["evaluate"]
    other = entry | {"outs": [entry["outs"][0] | {"md5": "0" * 32}]}
    key, value = provenance.key_of(other), provenance.value_of(other)
    record = history.store / provenance.record_path(key, value)
    record.write_bytes(provenance.record_bytes(other))
    poison = history.findings(tmp_path / "one")
    assert [finding.problem for finding in poison] == ["poisoned"]
    assert provenance.record_path(key, value) in str(poison[0]) and "reports/metrics.json" in str(poison[0])
    mine = history.store / provenance.receipt_path(key, provenance.value_of(entry))
    theirs = receipt.StageReceipt.model_validate_json(mine.read_bytes()).model_copy(update={"value": value})
    (history.store / provenance.receipt_path(key, value)).write_text(theirs.model_dump_json())
    assert history.findings(tmp_path / "two") == []
    assert lock.read_text() == first


def test_entry_of_a_stage_that_dvc_yaml_lacks_is_forged_when_it_claims_a_real_output(
    history: History, tmp_path: Path
) -> None:
    lock = history.project.folder / "dvc.lock"
    model = provenance.read_entries(lock)["train"]["outs"][0]
    text = f"  zzz:\n    cmd: run\n    outs:\n    - path: {model['path']}\n      hash: md5\n      md5: {'a' * 32}\n"
    lock.write_text(lock.read_text() + text)
    history.project.commit("surplus")
    [finding] = history.findings(tmp_path / "clone")
    assert (finding.stage, finding.problem) == ("zzz", "forged") and model["path"] in finding.detail


def test_receipt_of_another_result_is_a_finding(history: History) -> None:
    with inside(history.project, history.store) as settings:
        entries = provenance.read_entries()
        stages = [
            receipt.StageRecord(
                name=name, key=provenance.key_of(each), value=provenance.value_of(each), how="ran"
            )
            for name, each in entries.items()
        ]
        assert lock_gate.judge(receipt.write(stages, settings)) == []
        other = [stages[0], stages[1].model_copy(update={"value": "0" * 64}), stages[2]]
        [finding] = lock_gate.judge(receipt.write(other, settings))
    assert (finding.stage, finding.problem) == ("train", "forged") and "receipt" in finding.detail


def test_stale_lock_names_what_changed(history: History, tmp_path: Path) -> None:
    history.project.set_param("train.epochs", 9)
    history.project.edit_code("load")
    history.project.commit("stale")
    found = {finding.stage: finding.detail for finding in history.findings(tmp_path / "clone")}
    assert found == {"load": "src/load.py changed", "train": "train.epochs was 2, and is 9"}


def gate(project: Project, store: Path, *arguments: str, fails: bool = False, **variables: str) -> str:
    """What the command says in a job with these variables; in this process, as Python's own start takes seconds."""
    said = io.StringIO()
    with inside(project, store), pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        for name in [name for name in os.environ if name.startswith(("CI", "GITLAB", "DVC", "AWS"))]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["lock_gate", *arguments])
        if fails:
            with pytest.raises(UserError) as raised:
                lock_gate.main()
            return str(raised.value)
        lock_gate.main()
    return said.getvalue()


def test_command_says_what_is_wrong_and_what_to_do(history: History, tmp_path: Path) -> None:
    clone = history.project.clone(tmp_path / "clone")
    assert "dvc.lock is right" in gate(clone, history.store)
    base = clone.git("rev-parse", "HEAD")
    clone.set_param("train.epochs", 9)
    clone.commit("the release will write dvc.lock")
    output = gate(clone, history.store, fails=True)
    assert "train: stale: train.epochs was 2, and is 9" in output and "dvc repro" in output
    assert "nothing is claimed" in gate(clone, history.store, "--since", base)


def test_claim_is_judged_whatever_it_is_compared_with(history: History, tmp_path: Path) -> None:
    """That --since is given lets nothing pass by itself: only the same dvc.lock does."""
    clone = history.project.clone(tmp_path / "clone")
    base = clone.git("rev-parse", "HEAD")
    other = re.sub(r"(reports/metrics.json\n +hash: md5\n +md5: )\w+", rf"\g<1>{'a' * 32}", clone.lock)
    assert other != clone.lock
    (clone.folder / "dvc.lock").write_text(other)
    head = clone.commit("a lock that nobody has made")
    for arguments, variables in (
        (["--since", base], {}),
        (["--since", "0" * 40], {}),
        (["--since-baseline"], {"CI_MERGE_REQUEST_DIFF_BASE_SHA": base}),
        (["--since-baseline"], {"CI_MERGE_REQUEST_DIFF_BASE_SHA": "0" * 40}),
        (
            ["--since-baseline"],
            {"CI_MERGE_REQUEST_TARGET_BRANCH_SHA": base, "CI_MERGE_REQUEST_DIFF_BASE_SHA": head},
        ),
    ):
        output = gate(clone, history.store, *arguments, fails=True, **variables)
        assert "dvc.lock is not right" in output and "forged" in output, (arguments, variables)
    assert "nothing is claimed" in gate(clone, history.store, "--since", head)


def test_lock_that_the_target_branch_brings_into_a_merge_is_no_claim_of_the_merge_request(
    history: History, tmp_path: Path
) -> None:
    """The lock of main is stale for the merge with a branch that changes params; the release will write it."""
    project = history.project
    fork = project.git("rev-parse", "HEAD")
    project.git("checkout", "--quiet", "-b", "branch")
    project.set_param("evaluate.digits", 2)
    project.commit("branch")
    project.git("checkout", "--quiet", "main")
    project.set_param("train.epochs", 5)
    history.run("main moves on, and its lock with it")
    target = project.git("rev-parse", "HEAD")
    project.git("merge", "--quiet", "--no-edit", "branch")
    clone = project.clone(tmp_path / "clone")
    old = {"CI_MERGE_REQUEST_IID": "3", "CI_MERGE_REQUEST_DIFF_BASE_SHA": fork}
    assert "stale" in gate(clone, history.store, "--since-baseline", fails=True, **old)
    merged = old | {"CI_MERGE_REQUEST_TARGET_BRANCH_SHA": target}
    assert f"that of {target[:12]}: nothing is claimed" in gate(
        clone, history.store, "--since-baseline", **merged
    )


def test_baseline_without_a_merge_request_names_the_option(history: History) -> None:
    output = gate(history.project, history.store, "--since-baseline", fails=True)
    assert output.startswith("This is no merge-request pipeline") and "--since REV" in output


def test_lock_claims_something_new_only_where_it_differs_from_the_revision(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(history.project.folder)
    before = history.project.git("rev-list", "--max-parents=0", "HEAD")  # has no dvc.lock
    assert lock_gate.unchanged_since("HEAD") and not lock_gate.unchanged_since(before)
    assert not lock_gate.unchanged_since("0" * 40)
    Path("dvc.lock").unlink()
    assert lock_gate.unchanged_since(before) and not lock_gate.unchanged_since("HEAD")
    with pytest.raises(UserError, match="is no commit"):
        lock_gate.unchanged_since("nonsense")


def test_damaged_lock_and_a_remote_that_is_gone_are_errors_and_no_findings(
    history: History, tmp_path: Path
) -> None:
    with inside(history.project, tmp_path / "nowhere/at/all"), pytest.raises(UserError, match="Remote main"):
        lock_gate.judge()
    lock = history.project.folder / "dvc.lock"
    lock.write_text(lock.read_text() + "  zzz:\n    cmd: run\n    outs:\n    - {path: x, md5: 0}\n")
    with (
        inside(history.project, history.store),
        pytest.raises(UserError, match="DVC cannot read the pipeline"),
    ):
        lock_gate.judge()
    lock.write_text("stages: [")
    with inside(history.project, history.store), pytest.raises(UserError, match="is not a dvc.lock"):
        lock_gate.judge()


def test_keys_and_values_are_those_under_which_dvc_files_its_run_records(history: History) -> None:
    ours = {
        provenance.record_path(provenance.key_of(entry), provenance.value_of(entry)): entry
        for entry in provenance.read_entries(history.project.folder / "dvc.lock").values()
    }
    cache = history.project.folder / ".dvc/cache"
    theirs = {path.relative_to(cache).as_posix(): path for path in cache.glob("runs/*/*/*")}
    assert set(ours) == set(theirs)
    for name, path in theirs.items():
        assert path.read_bytes() == provenance.record_bytes(ours[name])


def test_damaged_objects_of_cache_and_remote_are_found_and_right_ones_raise_no_alarm(tmp_path: Path) -> None:
    answer = reliability.objects(tmp_path, 12, seed=3)
    assert (answer["missed"], answer["false alarms"]) == ([], [])
