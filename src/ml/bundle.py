"""A model with all that serving it needs, in one folder that is named by its tag.

    python -m ml.bundle --tag model-v1.2.0 --to models    # → models/model-v1.2.0/, from the last run

release publishes it, the registry carries it, the image bakes it in, serve loads it. The same run and commit give
the same bytes.
"""

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from ml import files
from ml.errors import UserError, exit_on_user_error
from ml.validation import problems

EXPERIMENT = "experiment.json"
MODEL = files.MODEL_ONNX.name
GOLDEN = files.GOLDEN.name
TAG = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
)  # safe as the name of a folder, a git tag and an image tag
EXPERIMENT_LIMIT = 2**20  # bytes


def check_tag(tag: str) -> str:
    """The tag itself. Raises ValueError when it could be anything but the plain name of a folder."""
    if not TAG.fullmatch(tag) or ".." in tag:
        raise ValueError(
            "a tag has 1 to 100 letters, digits, '.', '_' or '-', begins with a letter or digit, and has no '..'"
        )
    return tag


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Sha256
    size: Annotated[int, Field(ge=1)]  # bytes


class Experiment(BaseModel):
    """What is known of a model: experiment.json, the trace from the served bytes to code, data and params."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1  # of this format
    tag: Annotated[str, AfterValidator(check_tag)]
    git_commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")]
    created: AwareDatetime  # of the commit, so that the same commit gives the same file
    dataset: str
    data_hash: str  # of the raw data, as dvc.lock names it
    lock_sha256: Sha256  # of dvc.lock
    class_names: Annotated[list[str], Field(min_length=2)]
    image_height: Annotated[int, Field(ge=1)]  # pixels
    image_width: Annotated[int, Field(ge=1)]
    metrics: dict[str, Any]  # reports/metrics.json
    params: dict[str, Any]  # params.yaml
    model: File  # model.onnx: uint8 images (batch, H, W) → float32 probabilities (batch, classes)
    golden: File  # golden.npz: images with the probabilities that the model must give


def describe(tag: str) -> Experiment:
    """The experiment of the last run. Raises UserError when a result is missing, or the tag is none."""
    # here, because serving reads bundles, writes none, and shall start fast
    from ml import git
    from ml.lock import LOCK, read_lock
    from ml.params import PARAMS_FILE, plain, read_yaml

    try:
        check_tag(tag)
    except ValueError as error:
        raise UserError(f"--tag {tag!r} cannot be used: {error}.") from None
    summary = files.read_json(files.DATA_SUMMARY, "load")
    return Experiment(
        tag=tag,
        git_commit=git.head(),
        created=git.committed_at("HEAD"),
        dataset=str(summary["dataset"]),
        data_hash=read_lock().sources.get(str(files.DATA), "unknown"),
        lock_sha256=files.sha256(Path(LOCK)),
        class_names=summary["class_names"],
        image_height=summary["image_height"],
        image_width=summary["image_width"],
        metrics=files.read_json(files.METRICS, "evaluate"),
        params=plain(read_yaml(PARAMS_FILE)),
        model=described(files.MODEL_ONNX, "train"),
        golden=described(files.GOLDEN, "train"),
    )


def described(path: Path, made_by: str) -> File:
    files.read_bytes(path, made_by)
    return File(sha256=files.sha256(path), size=path.stat().st_size)


def write_bundle(folder: Path, tag: str) -> Path:
    """Put the last run's model into `folder`/`tag`, as a whole or not at all, in place of what was there.

    Raises UserError when a result is missing or cannot be written.
    """
    experiment = describe(tag)
    target, fresh, old = (
        folder / name for name in (tag, f".{tag}.{os.getpid()}.new", f".{tag}.{os.getpid()}.old")
    )
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed and had this number
        fresh.mkdir(parents=True)
        shutil.copyfile(files.MODEL_ONNX, fresh / MODEL)
        shutil.copyfile(files.GOLDEN, fresh / GOLDEN)
        files.write_text(fresh / EXPERIMENT, experiment.model_dump_json(indent=2) + "\n")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise UserError(f"{target} could not be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def parse_experiment(content: bytes, source: str) -> Experiment:
    """Raises UserError naming `source` when the content is not an experiment.json."""
    if len(content) > EXPERIMENT_LIMIT:
        raise UserError(
            f"{source} has {len(content):,} bytes, more than the {EXPERIMENT_LIMIT:,} that one may have."
        )
    try:
        return Experiment.model_validate_json(content)
    except ValidationError as error:
        raise UserError(
            f"{source} is not an experiment of this version ({problems(error)}). Write the bundle anew."
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.bundle", description="Put the last run's model into a folder."
    )
    parser.add_argument("--tag", help="name of the model (run-COMMIT)")
    parser.add_argument("--to", type=Path, default=Path("models"), help="folder of the models (models)")
    arguments = parser.parse_args()
    from ml import git

    print(write_bundle(arguments.to, arguments.tag or f"run-{git.head()[:8]}"))


if __name__ == "__main__":
    exit_on_user_error(main)
