"""A bundle from the last run: the same bytes each time, as a whole or not at all, and it says what it lacks."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml import bundle, files
from ml.errors import UserError
from ml.serve.model import MEMBERS, check_bundle
from tests.experiment import Experiment, make_experiment, predictions
from tests.serving import DIGITS, SIZE

pytest_plugins = ["tests.serving_fixtures"]
LIMIT = 2**24
TAG = "model-v1.0.0"


@pytest.fixture(scope="module")
def made(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    experiment = make_experiment(tmp_path_factory.mktemp("bundle") / "project")
    experiment.write(".gitignore", "/artifacts/\n/reports/\n/data/\n/models/\n")
    experiment.write_results(predictions(count=30))
    for name, path in (("model.onnx", files.MODEL_ONNX), ("golden.npz", files.GOLDEN)):
        shutil.copy(bundles / TAG / name, experiment.folder / path)
    summary = {"dataset": "bars", "class_names": DIGITS, "image_height": SIZE, "image_width": SIZE}
    experiment.write(str(files.DATA_SUMMARY), json.dumps(summary))
    with contextlib.chdir(experiment.folder):
        experiment.commit("run")
    return experiment


@pytest.fixture
def run(made: Experiment, tmp_path: Path) -> Iterator[Experiment]:
    """A copy of the run that a test may spoil, and the working folder."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "project"))
    with contextlib.chdir(folder):
        yield Experiment(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bundle_of_a_run_passes_the_servers_checks_and_names_its_origin(run: Experiment) -> None:
    folder = bundle.write_bundle(Path("models"), TAG)
    found = check_bundle(folder, LIMIT, TAG).experiment
    assert sorted(contents(folder)) == sorted(MEMBERS)
    assert found.git_commit == run.git("rev-parse", "HEAD") and found.dataset == "bars"
    assert found.lock_sha256 == files.sha256(Path("dvc.lock")) and found.class_names == DIGITS
    assert found.metrics == json.loads(files.METRICS.read_text()) and "train" in found.params


def test_bundle_written_again_has_the_same_bytes_and_leaves_nothing_else(run: Experiment) -> None:
    before = contents(bundle.write_bundle(Path("models"), TAG))
    (Path("models") / TAG / "stale").write_text("of before")
    Path("models", f".{TAG}.{os.getpid()}.new").mkdir()  # a killed process had our number
    assert contents(bundle.write_bundle(Path("models"), TAG)) == before
    assert os.listdir("models") == [TAG]


@pytest.mark.parametrize("tag", ["../up", "", "a/b", "-x", "a..b", "é", "x" * 101, "a\nb"])
def test_bundle_refuses_a_tag_that_is_no_plain_name(run: Experiment, tag: str) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        bundle.write_bundle(Path("models"), tag)
    assert not Path("models").exists()


@pytest.mark.parametrize("path", [files.MODEL_ONNX, files.GOLDEN, files.METRICS, files.DATA_SUMMARY])
def test_bundle_says_which_result_is_missing(run: Experiment, path: Path) -> None:
    path.unlink()
    with pytest.raises(UserError, match=path.name.replace(".", "[.]")):
        bundle.write_bundle(Path("models"), TAG)
    assert not Path("models", TAG).exists()


def test_bundle_keeps_the_one_before_when_it_cannot_be_replaced(
    run: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle.write_bundle(Path("models"), TAG))
    rename = Path.rename

    def full_disk(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(UserError, match="No space left"):
        bundle.write_bundle(Path("models"), TAG)
    assert contents(Path("models", TAG)) == before and os.listdir("models") == [TAG]


@pytest.mark.parametrize(
    "change",
    [
        {"tag": "../x"},
        {"git_commit": "HEAD"},
        {"created": "2026-01-01T00:00:00"},
        {"class_names": ["one"]},
        {"version": 2},
        {"extra": 1},
        {"image_width": 0},
        {"model": {"sha256": "0" * 63, "size": 1}},
    ],
)
def test_experiment_that_is_not_of_this_form_is_refused(bundles: Path, change: dict[str, object]) -> None:
    document = json.loads((bundles / TAG / "experiment.json").read_text())
    bundle.parse_experiment(json.dumps(document).encode(), "here.json")
    with pytest.raises(UserError, match="here.json is not an experiment"):
        bundle.parse_experiment(json.dumps(document | change).encode(), "here.json")


def test_experiment_that_is_no_json_or_too_long_is_refused() -> None:
    for content in (b"", b"{", b"[" * 10_000, b" " * (bundle.EXPERIMENT_LIMIT + 1)):
        with pytest.raises(UserError, match="here.json"):
            bundle.parse_experiment(content, "here.json")
