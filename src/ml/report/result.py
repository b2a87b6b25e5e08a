"""reports/comparison.json: all that `compare` found out and that `comment`, `gate` and `card` read."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ml import files
from ml.errors import UserError
from ml.report.statistics import Difference, PairedTests

COMPARISON = files.REPORTS / "comparison.json"

Verdict = Literal["better", "worse", "no detectable difference", "not comparable", "no baseline"]
# first_run: there is nothing to compare with yet. not_stored: dvc.lock names results that neither the cache nor the
# remote, which answered, has. unreachable, corrupt: there are results, but they cannot be had or trusted.
Problem = Literal["first_run", "not_stored", "unreachable", "corrupt"]
# Whose code judged. unknown: neither side has the package's source.
Code = Literal["baseline", "candidate", "both", "other", "unknown"]

# Of a change to what judges: the checkout's own counts in its pipeline already, as the package and its image do not.
IN_FORCE = " (in force here)"

LOWER_IS_BETTER = frozenset({"loss", "calibration_error"})
IN_PERCENT = frozenset({"accuracy", "macro_f1", "calibration_error"})


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Value(Record):
    """A metric of one side: the mean over the seeds, and each seed's value in the order of its seeds."""

    mean: float
    per_seed: list[float]


class Interval(Record):
    """95 %, over the test examples alone."""

    low: float
    high: float


class ClassResult(Record):
    """Recall of one class; difference and Holm's p-value None where it has too few examples or no seed noise is known."""

    name: str
    examples: int
    recall: Difference | None
    p_value: float | None


class Common(Record):
    """What two different test sets share, and the primary metric on the examples that they label alike."""

    shared: int
    only_candidate: int
    only_baseline: int
    relabelled: int
    difference: Difference | None


class Flip(Record):
    """A test example that one side gets right and the other wrong, by the mean probability over the seeds."""

    id: str
    actual: str
    before: str
    after: str
    confidence_before: float  # of the class `before`
    confidence_after: float
    wrong_seeds_before: int
    wrong_seeds_after: int


class FlipCount(Record):
    before: str
    after: str
    count: int


class Flips(Record):
    """`broken` and `fixed` hold the clearest first, at most SHOWN_FLIPS of them; the counts are of all."""

    broken_count: int
    fixed_count: int
    broken: list[Flip]
    fixed: list[Flip]
    broken_pairs: list[FlipCount]  # actual class → what it is taken for now, most frequent first
    fixed_pairs: list[FlipCount]  # what it was taken for → actual class


class ParamChange(Record):
    key: str
    before: str | None  # JSON; None: the key is new
    after: str | None  # JSON; None: the key is gone


class FileChange(Record):
    path: str
    kind: Literal["added", "removed", "modified"]
    lines_added: int | None = None  # None where git does not know the file
    lines_removed: int | None = None


class PackageChange(Record):
    name: str
    before: str | None
    after: str | None


class StageResult(Record):
    name: str
    inputs_changed: bool
    outputs_changed: bool
    ran: bool  # in this workspace; False: restored by DVC
    seconds: float | None
    peak_memory_mib: float | None
    device: str | None
    baseline_seconds: float | None
    baseline_peak_memory_mib: float | None


class Touched(Record):
    """Files of one kind that judge, or that what judges is made from, and that differ."""

    part: str  # this program's own words
    files: list[FileChange]


class Judge(Record):
    """Which code judged: that of the baseline, the candidate, both, another version; and what of it changes."""

    code: Code
    image: str | None  # that the job runs in which judged
    touched: list[Touched]


class Changes(Record):
    """What the difference can be due to: the inputs of the stages that are nobody's output."""

    params: list[ParamChange]
    code: list[FileChange]
    data: list[FileChange]
    dependencies: list[FileChange]
    packages: list[PackageChange]
    commands: list[ParamChange]

    @property
    def any(self) -> bool:
        return any([self.params, self.code, self.data, self.dependencies, self.commands])


class ClassBalance(Record):
    name: str
    before: int
    after: int


class PartDifference(Record):
    """One part of the data. added, removed and relabelled are None where only the counts are known."""

    part: Literal["train", "test"]
    before: int
    after: int
    added: int | None
    removed: int | None
    relabelled: int | None
    per_class: list[ClassBalance]


class DataDifference(Record):
    """`in_both_parts`: images of the training part that the test part has as well."""

    changed: bool
    parts: list[PartDifference]
    in_both_parts_before: int | None
    in_both_parts: int | None


class Reproduce(Record):
    commit: str
    dirty: bool
    baseline_commit: str | None
    lock_sha256: str
    model_sha256: str | None
    image: str | None = None  # that the training job ran in: untrusted
    commands: list[str]


class Picture(Record):
    path: str  # relative to reports/
    title: str


class Note(Record):
    """What could not be shown, in this program's words, and why, in another's: untrusted."""

    text: str
    detail: str


class Comparison(Record):
    verdict: Verdict
    reason: str  # this program's own words, with the remedy where one is needed
    detail: str | None  # what a file or another program said about it: untrusted
    problem: Problem | None
    primary_metric: str
    margin: float
    when_undecided: Literal["pass", "block"]
    test_examples: int
    identical: bool  # every probability of every seed
    candidate_seeds: list[int]
    baseline_seeds: list[int]
    candidate: dict[str, Value]
    candidate_intervals: dict[str, Interval]
    baseline: dict[str, Value]
    metrics: dict[str, Difference]  # empty where there is nothing to compare
    classes: list[ClassResult]
    tests: PairedTests | None
    common: Common | None
    flips: Flips | None
    changes: Changes | None
    stages: list[StageResult]
    data: DataDifference | None
    reproduce: Reproduce
    pictures: list[Picture]
    notes: list[Note]
    judge: Judge | None = None  # None: there is no commit to compare with

    @property
    def primary(self) -> Difference | None:
        return self.metrics.get(self.primary_metric)


def improvement(metric: str, value: float) -> float:
    """`value`, a difference, with the sign that makes positive mean better."""
    return -value if metric in LOWER_IS_BETTER else value


def clearness(each: ClassResult) -> tuple[float, float]:
    """Smallest for the class whose difference is least likely luck; Holm's p-values are often all 1."""
    p_value = 2.0 if each.p_value is None else each.p_value  # unknown ones last
    return p_value, 1.0 if each.recall is None else each.recall.p_value


def save(path: Path, comparison: Comparison) -> None:
    files.write_json(path, comparison.model_dump(mode="json"))


def load(path: Path = COMPARISON, commit: str | None = None) -> Comparison:
    """Raises UserError when the file is missing, is not a comparison, or was made for another commit than `commit`."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `python -m ml.report.compare` first.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}). Run `python -m ml.report.compare` again.") from None
    try:
        comparison = Comparison.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path} is not a comparison ({where}: {first['msg']}; {error.error_count()} problems). "
            "Run `python -m ml.report.compare` again."
        ) from None
    made_for = comparison.reproduce.commit
    if commit is not None and commit != made_for:
        raise UserError(
            f"{path} is about commit {made_for:.8}, and this job is about {commit:.8} (CI_COMMIT_SHA). "
            "Run `python -m ml.report.compare` in this job, or in one of the same pipeline."
        )
    return comparison
