"""The results of one side: the candidate's in the working folder, the baseline's at another commit, through DVC."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from dvc.repo import Repo

from ml import files, git, remotes
from ml.errors import UserError
from ml.files import Examples, Predictions
from ml.lock import LOCK, Lock, parse_lock, read_lock
from ml.report.result import Problem

T = TypeVar("T")


class Unavailable(Exception):
    """A file of DVC's that cannot be had or trusted: the kind of problem, and what was found (untrusted text)."""

    def __init__(self, problem: Problem, detail: str) -> None:
        super().__init__(detail)
        self.problem: Problem = problem
        self.detail = detail


class NoBaseline(Exception):
    """There is nothing to compare with: the kind of problem, why, with the remedy, and what was found (untrusted)."""

    def __init__(self, problem: Problem, reason: str, detail: str | None = None) -> None:
        super().__init__(reason)
        self.problem: Problem = problem
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Side:
    """What DVC knows of one side; `commit` None is the working folder."""

    commit: str | None
    lock: Lock

    def content(self, path: Path) -> bytes:
        """The bytes of an output, with the MD5 that dvc.lock has: from the working folder, the cache or the remote.

        Raises Unavailable.
        """
        expected = self.lock.outs.get(path.as_posix())
        if expected is None:
            raise Unavailable("not_stored", f"{path} is not in {LOCK}")
        if self.commit is None and path.is_file() and files.md5(path) == expected:
            return path.read_bytes()
        content = self.read_through_dvc(path)
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != expected:
            raise Unavailable("corrupt", f"{path} has MD5 {found}, and {LOCK} says {expected}")
        return content

    def read_through_dvc(self, path: Path) -> bytes:
        """From DVC's cache, else from whichever of its remotes has it; a damaged copy only where none is right.

        Raises Unavailable.
        """
        md5 = self.lock.outs[path.as_posix()]
        refused: BaseException | None = None
        damaged: bytes | None = None
        with Repo() as repo:
            cached = Path(repo.cache.local.oid_to_path(md5))
            if cached.is_file():
                damaged = cached.read_bytes()
                if hashlib.md5(damaged, usedforsecurity=False).hexdigest() == md5:
                    return damaged
            try:
                for place in remotes.places(repo):
                    try:
                        content = place.read_object(md5)
                    except remotes.RemoteError as error:  # another one may have it
                        refused = refused or error.__cause__ or error
                        continue
                    if content is not None and hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
                        return content
                    damaged = damaged or content
            except UserError as error:  # a package is missing, or the configuration makes no sense
                refused = error
        if damaged is not None:
            return damaged
        if refused is not None:
            found = f"{path} could not be fetched: the remote says {type(refused).__name__}: {refused}"
            raise Unavailable("unreachable", found) from refused
        raise Unavailable("not_stored", f"{path} is in neither DVC's cache nor its remote")

    @property
    def name(self) -> str:
        return f" {self.commit[:8]}" if self.commit else ""

    def predictions(self) -> Predictions:
        return self.read(files.PREDICTIONS, lambda path: checked_predictions(files.load_predictions(path)))

    def examples(self, path: Path) -> Examples:
        return self.read(path, files.load_examples)

    def read(self, path: Path, load: Callable[[Path], T]) -> T:
        """`load` of a copy of the file. Raises Unavailable, also when `load` refuses what is in it."""
        content = self.content(path)
        with tempfile.TemporaryDirectory(prefix="ml-compare-") as folder:
            copy = Path(folder, path.name)
            copy.write_bytes(content)
            try:
                return load(copy)
            except (
                UserError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
            ) as error:  # other keys, other types
                found = (str(error).splitlines() or [type(error).__name__])[0]
                raise Unavailable(
                    "corrupt", f"{path} cannot be used: {found.replace(str(copy), str(path))}"
                ) from None


@dataclass(frozen=True)
class Results:
    side: Side
    predictions: Predictions
    chosen: int  # row of the seed whose model is shipped
    class_names: list[str]


REASONS: dict[Problem, str] = {
    "first_run": "has no results yet",
    "not_stored": "has results that were not pushed: they are in neither DVC's cache nor its remote",
    "unreachable": "has results that could not be fetched",
    "corrupt": "has results that are damaged",
}
REMEDIES: dict[Problem, str] = {
    "first_run": "The pipeline of the main branch will make them.",
    "not_stored": "Run `dvc push` where they are, or let the pipeline of the main branch make them.",
    "unreachable": "Check DVC_REMOTE_URL and its credentials, then run the job again.",
    "corrupt": "Let the pipeline of the main branch make them again.",
}


def find_baseline(revision: str) -> Side:
    """
    Raises:
        NoBaseline: `revision` is all zeros, which is how GitLab writes "none", or it has no results yet.
        UserError: it is empty or names no commit, or git cannot read it.
    """
    if not revision.strip():
        raise UserError("--baseline is empty: a variable is not set. For no baseline pass forty zeros.")
    if not revision.strip("0"):
        raise NoBaseline("first_run", "There is no earlier revision to compare with: this is the first run.")
    commit = git.resolve(revision)
    content = git.show(commit, LOCK)
    if content is None:
        raise NoBaseline("first_run", f"The baseline {commit[:8]} has no {LOCK}, so it has no results yet.")
    try:
        lock = parse_lock(content, f"{LOCK} of {commit[:8]}")
    except UserError as error:
        raise NoBaseline(
            "corrupt", f"The baseline's {LOCK} is damaged. {REMEDIES['corrupt']}", str(error)
        ) from None
    if str(files.PREDICTIONS) not in lock.outs:
        raise NoBaseline(
            "first_run",
            f"{LOCK} of the baseline {commit[:8]} has no {files.PREDICTIONS}, so it has no results yet.",
        )
    return Side(commit, lock)


def load_baseline(side: Side) -> Results:
    """Raises NoBaseline when the results cannot be fetched, or are damaged."""
    try:
        return load_results(side)
    except Unavailable as error:
        raise no_baseline(side, error) from None


def no_baseline(side: Side, error: Unavailable) -> NoBaseline:
    reason = f"The baseline{side.name} {REASONS[error.problem]}. {REMEDIES[error.problem]}"
    return NoBaseline(error.problem, reason, error.detail)


def load_candidate() -> Results:
    """Raises UserError when the working folder has no results, or not those of its dvc.lock."""
    side = Side(None, read_lock())
    with own_results():
        return load_results(side)


@contextmanager
def own_results() -> Iterator[None]:
    """Turn Unavailable, of a file of the working folder, into a UserError with the remedy."""
    try:
        yield
    except Unavailable as error:
        raise UserError(
            f"No results to report on: {error.detail}. Run `dvc repro`, or `dvc checkout --force`."
        ) from None


def load_results(side: Side) -> Results:
    """Raises Unavailable."""
    predictions = side.predictions()
    return Results(
        side,
        predictions,
        chosen=side.read(files.TRAINING, lambda path: chosen_row(read_json(path), predictions)),
        class_names=side.read(
            files.DATA_SUMMARY, lambda path: [str(name) for name in read_json(path)["class_names"]]
        ),
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def chosen_row(training: dict[str, Any], predictions: Predictions) -> int:
    seeds = predictions.seeds.tolist()
    chosen = training.get("chosen_seed")
    if chosen not in seeds:
        raise UserError(
            f"{files.TRAINING} chose seed {chosen}, and {files.PREDICTIONS} has the seeds {seeds}."
        )
    return int(seeds.index(chosen))


def checked_predictions(predictions: Predictions) -> Predictions:
    """Raises UserError when shapes do not fit, an id repeats, a label has no class, or a number is no probability."""
    ids, labels, seeds, p = predictions.ids, predictions.labels, predictions.seeds, predictions.probabilities
    problem = None
    if p.ndim != 3 or p.shape[:2] != (len(seeds), len(ids)) or labels.shape != ids.shape or not p.size:
        problem = f"shapes do not fit: ids {ids.shape}, labels {labels.shape}, seeds {seeds.shape}, probabilities {p.shape}"
    elif len(ids) < 2:
        problem = "there is one test example, and a comparison needs two"
    elif len(np.unique(ids)) != len(ids):
        problem = "an example id occurs twice"
    elif len(np.unique(seeds)) != len(seeds):
        problem = "a seed occurs twice"
    elif labels.min() < 0 or labels.max() >= p.shape[2]:
        problem = f"labels are {labels.min()} to {labels.max()}, and there are {p.shape[2]} classes"
    elif not (np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1.001):
        problem = "a probability is not between 0 and 1"
    if problem:
        raise UserError(f"{files.PREDICTIONS}: {problem}.")
    return predictions
