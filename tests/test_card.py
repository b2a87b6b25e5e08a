"""The model card: what the model is, what it was made from, and nothing that is not dvc.lock's."""

from pathlib import Path

import pytest

from ml import files
from ml.errors import UserError
from ml.report import card
from tests.experiment import Experiment, make_experiment, predictions


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    made = make_experiment(tmp_path / "repo")
    monkeypatch.chdir(made.folder)
    made.write_results(predictions(first_seed=4), names=("cat", "</td>@all", "owl"))
    made.commit()
    return made


def test_card_names_commit_data_params_metrics_and_hashes(experiment: Experiment) -> None:
    text = card.card(card.gather())
    assert experiment.git("rev-parse", "HEAD") in text and "uncommitted" not in text
    for path in (files.MODEL_ONNX, files.MODEL_WEIGHTS, Path("dvc.lock")):
        assert files.sha256(path) in text
    assert "shipped is seed 4" in text and "3 seeds" in text
    assert "| `train.epochs` |" in text and "| `test examples` | `300` |" in text
    assert "| `torch` | `2` |" in text
    row = next(line for line in text.splitlines() if line.startswith("| accuracy |"))
    assert row.count("%") == 7 and row.count("pp") == 1  # shipped, mean, two ends, one per seed; and the std
    assert "`</td>@all`" in text and "</td>@all" not in text.replace("`</td>@all`", "")


def test_card_says_when_the_code_is_not_the_commits(experiment: Experiment) -> None:
    experiment.write("src/train.py", "other\n")
    assert "with uncommitted changes" in card.card(card.gather())


def test_card_is_refused_when_the_model_is_not_the_one_in_the_lock(experiment: Experiment) -> None:
    files.MODEL_ONNX.unlink()
    files.MODEL_ONNX.write_bytes(b"another")
    for stored in Path(".dvc/cache/files/md5").rglob("*"):
        if stored.is_file():
            stored.unlink()
    with pytest.raises(UserError, match="No results to report on: artifacts/model.onnx"):
        card.gather()
