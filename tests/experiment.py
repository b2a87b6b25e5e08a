"""A repository with made-up results of an experiment: real git, real DVC, no training."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from dvc.repo import Repo
from ruamel.yaml import YAML

from ml import files
from ml.files import Examples, Predictions

ROOT = Path(__file__).parents[1]
CLASSES = ("cat", "dog", "owl")
PIPELINE = {
    "stages": {
        "load": {
            "cmd": "true",
            "deps": ["data", "src/load.py"],
            "params": ["load"],
            "outs": ["artifacts/train.npz", "artifacts/test.npz", "reports/data.json"],
        },
        "train": {
            "cmd": "true",
            "deps": ["artifacts/train.npz", "src/train.py", "constraints.txt"],
            "params": ["train.epochs", "train.seeds"],
            "outs": ["artifacts/model.onnx", "artifacts/model.safetensors", "artifacts/training.json"],
        },
        "evaluate": {
            "cmd": "true",
            "deps": ["artifacts/test.npz", "artifacts/model.onnx"],
            "outs": ["reports/predictions.npz", "reports/metrics.json"],
        },
    }
}


def predictions(
    count: int = 300,
    seeds: int = 3,
    wrong: float = 0.1,
    first_seed: int = 0,
    random_state: int = 0,
    id_from: int = 0,
) -> Predictions:
    """Of `count` examples, each wrong in each seed with probability `wrong`; labels and ids go round."""
    random = np.random.default_rng([random_state, first_seed])
    labels = np.arange(id_from, id_from + count) % len(CLASSES)
    misses = random.random((seeds, count)) < wrong
    taken_for = (labels + misses) % len(CLASSES)
    probabilities = np.full((seeds, count, len(CLASSES)), 0.1, np.float32)
    np.put_along_axis(probabilities, taken_for[:, :, None], 0.8, axis=2)
    ids = np.array([f"{number:016x}" for number in range(id_from, id_from + count)])
    return Predictions(ids, labels, np.arange(first_seed, first_seed + seeds), probabilities)


def examples(
    ids: "np.ndarray[Any, Any]", labels: "np.ndarray[Any, Any]", names: tuple[str, ...] = CLASSES
) -> Examples:
    images = np.random.default_rng(0).integers(0, 256, (len(ids), 6, 5)).astype(np.uint8)
    return Examples(images, labels.astype(np.int64), ids, np.array(names))


@dataclass
class Experiment:
    """A folder to run the report in; `params` and `results` may be changed between two commits."""

    folder: Path
    params: dict[str, Any] = field(default_factory=dict)

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(self.folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def write(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def write_params(self) -> None:
        with open(self.folder / "params.yaml", "w") as file:
            YAML().dump(self.params, file)

    def write_results(
        self, results: Predictions, train: Examples | None = None, names: tuple[str, ...] = CLASSES
    ) -> None:
        """All outputs of the three stages. The training part does not change unless it is given."""
        test = examples(results.ids, results.labels, names)
        if train is None:
            train = examples(
                np.array([f"train{number:011x}" for number in range(30)]), np.arange(30) % 3, names
            )
        files.save_examples(self.folder / files.TEST_EXAMPLES, test)
        files.save_examples(self.folder / files.TRAIN_EXAMPLES, train)
        both = len(set(train.ids.tolist()) & set(test.ids.tolist()))
        self.write(str(files.DATA_SUMMARY), json.dumps(summary(train, test, both)))
        self.write("data/raw.bin", f"{train.ids}{train.labels}{test.ids}{test.labels}")
        files.save_arrays(self.folder / files.PREDICTIONS, **vars(results))
        accuracy = float((results.probabilities.argmax(2) == results.labels).mean())
        metrics = {
            name: {"mean": accuracy, "low": 0.5, "high": 1.0, "seed_std": 0.0}
            for name in ("accuracy", "loss")
        }
        self.write(str(files.METRICS), json.dumps(metrics))
        self.write(
            str(files.TRAINING),
            json.dumps({"chosen_seed": int(results.seeds[0]), "made_with": {"torch": "2"}}),
        )
        self.write(str(files.MODEL_ONNX), f"model {results.probabilities.tobytes()!r}")
        self.write(str(files.MODEL_WEIGHTS), "weights")

    def commit(self, message: str = "change") -> str:
        """dvc.lock for what lies there, and a git commit with it; the commit's hash."""
        self.write_params()
        with Repo(str(self.folder)) as repo:
            repo.commit(force=True)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        return self.git("rev-parse", "HEAD")

    def add_remote(self) -> Path:
        remote = self.folder.parent / f"{self.folder.name}-remote"
        with Repo(str(self.folder)) as repo, repo.config.edit("repo") as config:
            config["remote"]["store"] = {"url": str(remote)}
            config["core"]["remote"] = "store"
        self.git("commit", "--quiet", "--all", "--message", "remote")
        return remote

    def push(self) -> None:
        with Repo(str(self.folder)) as repo:
            repo.push()


def summary(train: Examples, test: Examples, both: int) -> dict[str, Any]:
    names = test.class_names.tolist()
    parts = {"train": train, "test": test}
    return {
        "dataset": "custom",
        "class_names": names,
        "image_height": 6,
        "image_width": 5,
        **{
            part: {
                "examples": len(each),
                "per_class": dict(zip(names, np.bincount(each.labels, minlength=len(names)).tolist())),
            }
            for part, each in parts.items()
        },
        "images_in_both_parts": both,
    }


def make_experiment(folder: Path, repository: Path | None = None) -> Experiment:
    """Git and DVC set up, code and params in place, no results yet, nothing committed.

    Args:
        repository: of which `folder` is one; else it is a repository of its own.
    """
    folder.mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(repository or folder)], check=True)
    with Repo.init(str(folder), subdir=repository is not None) as repo, repo.config.edit("repo") as config:
        config["core"] |= {"analytics": False, "check_update": False}
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    params["load"]["dataset"] = "custom"
    experiment = Experiment(folder, params)
    experiment.write_params()
    with open(folder / "dvc.yaml", "w") as file:
        YAML().dump(PIPELINE, file)
    experiment.write(".gitignore", "/artifacts/\n/reports/\n/data/\n")
    experiment.write("src/load.py", "one\ntwo\n")
    experiment.write("src/train.py", "one\ntwo\n")
    experiment.write("constraints.txt", "numpy==2.0.0\ntorch==2.6.0\n")
    return experiment
