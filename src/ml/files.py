"""Every file that the stages exchange: where it lies, how it is saved (atomically) and loaded.

Numpy and the standard library only, so the report job and the serving image can read results without torch.
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ml.errors import UserError

DATA = Path("data")

ARTIFACTS = Path("artifacts")
TRAIN_EXAMPLES = ARTIFACTS / "train.npz"
TEST_EXAMPLES = ARTIFACTS / "test.npz"
SPLIT = ARTIFACTS / "split.npz"
DRIFT_REFERENCE = ARTIFACTS / "drift_reference.npz"
SEED_WEIGHTS = ARTIFACTS / "weights"  # one safetensors file per seed
MODEL_WEIGHTS = ARTIFACTS / "model.safetensors"  # of the seed that validation chose
MODEL_ONNX = ARTIFACTS / "model.onnx"
GOLDEN = ARTIFACTS / "golden.npz"  # images with the answers that the model must give wherever it is loaded
TRAINING = ARTIFACTS / "training.json"  # seeds, the chosen one, and what they were made with

REPORTS = Path("reports")
DATA_SUMMARY = REPORTS / "data.json"
DATA_CARD = REPORTS / "data_card.md"
VALIDATION = REPORTS / "validation.json"
TRAIN_CURVE = REPORTS / "train_curve.csv"
VALIDATION_CURVE = REPORTS / "validation_curve.csv"
METRICS = REPORTS / "metrics.json"
PER_SEED = REPORTS / "per_seed.csv"
PER_CLASS = REPORTS / "per_class.csv"
CONFUSION = REPORTS / "confusion.csv"
RELIABILITY = REPORTS / "reliability.csv"
PREDICTIONS = REPORTS / "predictions.npz"
PLOTS = REPORTS / "plots"

COST = REPORTS / "cost"  # seconds and memory of each stage: differs from run to run, so no DVC output
CHECKPOINTS = Path(".checkpoints")  # outside DVC, which deletes a stage's outputs before it runs


# What numpy and zipfile raise on files that are torn, or no .npz at all; RuntimeError: a flipped bit says encrypted.
UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Examples:
    """images (N, H, W) uint8 in 0..255; labels (N,) int64, rows of class_names (classes,) str; ids (N,) str, unique."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: NDArray[np.str_]
    class_names: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Rows of the training file for each part, ascending int64; mean and std of the training part's pixels on 0..1."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    mean: float
    std: float


@dataclass(frozen=True)
class Predictions:
    """What every seed's model says of every test example.

    ids (N,) str; labels (N,) int64; seeds (S,) int64; probabilities (S, N, classes) float32.
    """

    ids: NDArray[np.str_]
    labels: NDArray[np.int64]
    seeds: NDArray[np.int64]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Golden:
    """What the model says of a few images: images (N, H, W) uint8; probabilities (N, classes) float32."""

    images: NDArray[np.uint8]
    probabilities: NDArray[np.float32]


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it changes as a whole or not at all, whatever fails in between.

    Raises:
        UserError: the file cannot be written (full disk, no permission); the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror or error}. What was there before is unchanged.\n"
            "Make room or mend the permissions, then run the same command again."
        ) from error
    finally:
        with suppress(OSError):  # where it could not be made, there is nothing to remove
            temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    with atomic(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Indented, key order kept, non-ASCII as it is. NaN and infinity are errors: other readers refuse them."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: Path, made_by: str) -> bytes:
    """Raises UserError naming the stage that makes the file when it is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `dvc repro {made_by}`, or `dvc pull {path}`.") from None
    except OSError as error:
        raise UserError(
            f"{path} could not be read: {error.strerror}. Remove it, then run `dvc checkout --force {path}`, "
            f"or `dvc repro --force {made_by}`."
        ) from None


def read_json(path: Path, made_by: str) -> Any:
    try:
        return json.loads(read_bytes(path, made_by))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}). Run `dvc checkout --force {path}`, or `dvc repro --force {made_by}`."
        ) from None


def save_examples(path: Path, examples: Examples) -> None:
    save_arrays(path, **vars(examples))


def load_examples(path: Path) -> Examples:
    return Examples(**load_arrays(path, "load", ("images", "labels", "ids", "class_names")))


def save_split(split: Split) -> None:
    save_arrays(
        SPLIT, train=split.train, validation=split.validation, pixels=np.array([split.mean, split.std])
    )


def load_split() -> Split:
    arrays = load_arrays(SPLIT, "preprocess", ("train", "validation", "pixels"))
    mean, std = arrays["pixels"].tolist()
    return Split(arrays["train"], arrays["validation"], mean, std)


def save_predictions(predictions: Predictions) -> None:
    save_arrays(PREDICTIONS, **vars(predictions))


def load_predictions(path: Path = PREDICTIONS) -> Predictions:
    return Predictions(**load_arrays(path, "evaluate", ("ids", "labels", "seeds", "probabilities")))


def save_golden(golden: Golden) -> None:
    save_arrays(GOLDEN, **vars(golden))


def load_golden(path: Path = GOLDEN) -> Golden:
    return Golden(**load_arrays(path, "train", ("images", "probabilities")))


def seed_weights(seed: int) -> Path:
    return SEED_WEIGHTS / f"seed-{seed}.safetensors"


def save_weights(path: Path, weights: dict[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save

    write_bytes(path, save({name: np.asarray(value, order="C") for name, value in weights.items()}))


def load_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Raises UserError when the file is missing, malformed, or holds a value that is not finite."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        weights: dict[str, NDArray[Any]] = load(read_bytes(path, "train"))
    except (SafetensorError, KeyError) as error:  # KeyError: a type that numpy has not
        raise UserError(
            f"{path} is not a safetensors file ({error}). Run `dvc checkout --force {path}`."
        ) from None
    for name, value in weights.items():
        if not np.isfinite(value).all():
            raise UserError(
                f"{path}: {name} holds values that are not finite. Run `dvc checkout --force {path}`."
            )
    return weights


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """An uncompressed .npz: the same arrays give the same bytes (numpy writes no time of day into it)."""
    with atomic(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_arrays(path: Path, made_by: str, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays `names` of an .npz file.

    Raises:
        UserError: the file is missing or torn, or lacks one of them.
    """
    content = read_bytes(path, made_by)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except UNREADABLE as error:
        raise UserError(
            f"{path} does not hold the arrays {', '.join(names)} ({error}).\n"
            f"Run `dvc checkout --force {path}`, or `dvc repro --force {made_by}`."
        ) from None


def md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
