"""Candidate against baseline: what differs, by how much, and whether that could be luck → reports/comparison.json.

    python -m ml.report.compare [--baseline REV] [--out reports/comparison.json]

The candidate is what lies in the working folder; the baseline is fetched by DVC at the commit REV, in a merge-request
pipeline the newest commit of the target branch that HEAD contains. That main has no results yet is no error: the
comparison then says so, and holds the candidate's own results.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ml import files, plots
from ml.errors import UserError, exit_on_user_error
from ml.files import Predictions
from ml.params import ReportParams, load_judge_params
from ml import git
from ml.report import pictures, result, statistics, trust
from ml.report.baseline import (
    NoBaseline,
    Results,
    Side,
    Unavailable,
    find_baseline,
    load_baseline,
    load_candidate,
    own_results,
)
from ml.report.changes import compare_data, compare_locks, outdated
from ml.report.costs import stage_results
from ml.report.examples import flips, name_of
from ml.lock import LOCK
from ml.report.result import (
    COMPARISON,
    ClassResult,
    Common,
    Comparison,
    Flips,
    Interval,
    Note,
    Picture,
    Problem,
    Reproduce,
    Value,
    Verdict,
    improvement,
)
from ml.report.statistics import Difference, PairedTests
from ml.settings import load_settings

PICTURES = files.REPORTS / "comparison"


@dataclass(frozen=True)
class Pairing:
    """Rows of the examples that both sides have, in one order, and how many only one side has or labels otherwise."""

    candidate: NDArray[np.int64]
    baseline: NDArray[np.int64]
    only_candidate: int
    only_baseline: int
    relabelled: int

    @property
    def complete(self) -> bool:
        return not (self.only_candidate or self.only_baseline or self.relabelled)


def pair(candidate: Predictions, baseline: Predictions) -> Pairing:
    """By example id; the rows are those of examples with one and the same label."""
    _, new, old = np.intersect1d(candidate.ids, baseline.ids, assume_unique=True, return_indices=True)
    same = candidate.labels[new] == baseline.labels[old]
    order = np.argsort(new[same])
    return Pairing(
        candidate=new[same][order],
        baseline=old[same][order],
        only_candidate=len(candidate.ids) - len(new),
        only_baseline=len(baseline.ids) - len(old),
        relabelled=int((~same).sum()),
    )


@dataclass
class Findings:
    """What a comparison adds to the candidate's own results; the defaults are those of no comparison."""

    verdict: Verdict
    reason: str
    detail: str | None = None
    problem: Problem | None = None
    identical: bool = False
    metrics: dict[str, Difference] = field(default_factory=dict)
    classes: list[ClassResult] = field(default_factory=list)
    tests: PairedTests | None = None
    common: Common | None = None
    flips: Flips | None = None


def judge(primary: Difference, metric: str, identical: bool) -> tuple[Verdict, str]:
    """The verdict, and why, for a reader who knows no statistics."""
    if identical:
        return (
            "no detectable difference",
            "Both sides give every test example exactly the same probabilities.",
        )
    if primary.low > 0 or primary.high < 0:
        better = improvement(metric, primary.difference) > 0
        return (
            "better" if better else "worse",
            "More than other test examples or other seeds would explain: the 95 % interval does not include zero.",
        )
    return (
        "no detectable difference",
        "Other test examples or other seeds could make a difference of this size by themselves.",
    )


def compare(candidate: Results, baseline: Results, params: ReportParams, bins: int) -> Findings:
    """The statistics of two results; `not comparable` unless they have the same test examples with the same labels."""
    pairing = pair(candidate.predictions, baseline.predictions)
    if not pairing.complete:
        return other_test_set(candidate.predictions, baseline.predictions, pairing, params, bins)
    new = candidate.predictions
    old = statistics.restrict(baseline.predictions, pairing.baseline)
    metrics = statistics.compare_metrics(new, old, bins, params.primary_metric, params.assumed_seed_std)
    identical = new.probabilities.shape == old.probabilities.shape and bool(
        (new.probabilities == old.probabilities).all()
    )
    verdict, reason = judge(metrics[params.primary_metric], params.primary_metric, identical)
    classes = [
        ClassResult(
            name=name_of(candidate.class_names, each.label),
            examples=each.examples,
            recall=each.recall,
            p_value=each.p_value,
        )
        for each in statistics.compare_classes(new, old)
    ]
    return Findings(
        verdict,
        reason,
        identical=identical,
        metrics=metrics,
        classes=classes,
        tests=statistics.paired_tests(new, old, candidate.chosen, baseline.chosen),
        flips=flips(new, old, candidate.class_names),
    )


def other_test_set(
    candidate: Predictions, baseline: Predictions, pairing: Pairing, params: ReportParams, bins: int
) -> Findings:
    shared = len(pairing.candidate)
    difference = None
    if shared > 1:
        difference = statistics.compare_metrics(
            statistics.restrict(candidate, pairing.candidate),
            statistics.restrict(baseline, pairing.baseline),
            bins,
            params.primary_metric,
            params.assumed_seed_std,
        )[params.primary_metric]
    counts = [
        (pairing.only_candidate, "new"),
        (pairing.only_baseline, "gone"),
        (pairing.relabelled, "with another label"),
    ]
    found = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    return Findings(
        "not comparable",
        f"The test set is another one ({found}, {shared:,} the same), so the two results measure different things.",
        common=Common(
            shared=shared,
            only_candidate=pairing.only_candidate,
            only_baseline=pairing.only_baseline,
            relabelled=pairing.relabelled,
            difference=difference,
        ),
    )


def other_class_names(new: list[str], old: list[str]) -> Findings | None:
    """None where every label that both sides have means the same."""
    renamed = [f"{before} is now {after}" for before, after in zip(old, new) if before != after]
    if not renamed:
        return None
    return Findings(
        "not comparable",
        f"Of {len(new)} classes, {len(renamed)} have another name, so the labels of the two results differ in meaning.",
        detail=", ".join(renamed),
    )


def values(predictions: Predictions, bins: int) -> dict[str, Value]:
    return {
        name: Value(mean=float(table.mean()), per_seed=table.mean(1).tolist())
        for name, table in statistics.metric_tables(predictions, bins).items()
    }


def candidate_intervals(side: Side) -> dict[str, Interval]:
    """As evaluate found them."""

    def load(path: Path) -> dict[str, Interval]:
        metrics: dict[str, Any] = files.read_json(path, "evaluate")
        return {name: Interval(low=each["low"], high=each["high"]) for name, each in metrics.items()}

    return side.read(files.METRICS, load)


def check_metric(params: ReportParams, available: dict[str, Value]) -> None:
    if params.primary_metric not in available:
        raise UserError(
            f"params.yaml: report.primary_metric is {params.primary_metric!r}, which is none of the metrics "
            f"({', '.join(available)}). Change it."
        )


def model_sha256(side: Side) -> str | None:
    """None where this job does not have the model; dvc.lock, whose hash is there, names its MD5."""
    try:
        return hashlib.sha256(side.content(files.MODEL_ONNX)).hexdigest()
    except Unavailable:
        return None


def job_image() -> str | None:
    """What the job ran in that made this dvc.lock, by its receipt; None outside CI."""
    try:
        receipt = json.loads((files.REPORTS / "receipt.json").read_bytes())
        made_it = receipt["lock_sha256"] == files.sha256(Path(LOCK))
        return str(receipt["image"]) if made_it and receipt["image"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reproduce(side: Side, baseline: Side | None) -> Reproduce:
    commit, folder = git.head(), git.prefix()
    named = folder.isprintable() and "`" not in folder  # else it would do more than be read
    return Reproduce(
        commit=commit,
        dirty=git.is_dirty(),
        baseline_commit=baseline.commit if baseline else None,
        lock_sha256=files.sha256(Path(LOCK)),
        model_sha256=model_sha256(side),
        image=job_image(),
        commands=[
            f"git checkout {commit}",
            *([f"cd {shlex.quote(folder)}"] if folder and named else []),
            "make setup && . .venv/bin/activate",
            "dvc repro --pull --allow-missing  # restores what is stored; --force runs every stage anew",
            *([f"python -m ml.report.compare --baseline {baseline.commit}"] if baseline else []),
        ],
    )


def draw(comparison: Comparison, candidate: Results, sheet_examples: int) -> tuple[list[Picture], list[Note]]:
    """Write the pictures into reports/comparison/; what could not be drawn, and why, as the second value."""
    shutil.rmtree(PICTURES, ignore_errors=True)
    drawn, notes = draw_difference(comparison), []
    try:
        drawn += draw_sheets(comparison.flips, candidate.side, sheet_examples)
    except Unavailable as error:
        notes.append(Note(text="The newly broken and fixed examples could not be drawn", detail=error.detail))
    return drawn, notes


def draw_difference(comparison: Comparison) -> list[Picture]:
    if comparison.primary is None or comparison.identical:
        return []
    figure = pictures.difference_figure(comparison)
    drawn = [write_picture("difference", "Each seed on both sides, and the difference", figure)]
    if any(each.recall for each in comparison.classes):
        figure = pictures.classes_figure(comparison.classes)
        drawn.append(write_picture("classes", "Difference per class", figure))
    return drawn


def draw_sheets(flips: Flips | None, side: Side, sheet_examples: int) -> list[Picture]:
    """Raises Unavailable where the test images cannot be had."""
    if flips is None or not (flips.broken or flips.fixed):
        return []
    test = side.examples(files.TEST_EXAMPLES)
    row_of = {str(id): row for row, id in enumerate(test.ids)}
    drawn = []
    for name, title, sides, clearest, total in (
        ("broken", "Newly broken", "label → now", flips.broken, flips.broken_count),
        ("fixed", "Newly fixed", "before → label", flips.fixed, flips.fixed_count),
    ):
        shown = clearest[:sheet_examples]
        unknown = [flip.id for flip in shown if flip.id not in row_of]
        if unknown:
            raise Unavailable(
                "corrupt",
                f"{files.TEST_EXAMPLES} lacks the example {unknown[0]} of {files.PREDICTIONS}: it is of another run",
            )
        if shown:
            images = test.images[[row_of[flip.id] for flip in shown]]
            figure = pictures.flip_sheet(images, shown, total, f"{title}: {sides}")
            drawn.append(write_picture(name, title, figure))
    return drawn


def write_picture(name: str, title: str, figure: Figure) -> Picture:
    path = PICTURES / f"{name}.png"
    files.write_bytes(path, plots.png(figure))
    return Picture(path=path.relative_to(files.REPORTS).as_posix(), title=title)


def run(
    revision: str, baseline_costs: Path | None, margin: float | None = None, image: str | None = None
) -> Comparison:
    """Compare the working folder with the commit `revision`, and draw the pictures.

    Args:
        margin: in place of report.margin.
        image: that this job runs in.

    Raises UserError when the working folder has no valid results, or `revision` is no commit.
    """
    loaded = load_judge_params()
    params, bins = loaded.report, loaded.evaluate.calibration_bins
    candidate = load_candidate()
    with own_results():
        intervals = candidate_intervals(candidate.side)
    new_values = values(candidate.predictions, bins)
    check_metric(params, new_values)

    baseline, old, changes, data = None, None, None, None
    notes: list[Note] = []
    older = outdated(candidate.side.lock)
    if older:
        text = "These results are older than files or params that they depend on (run `dvc repro`)"
        notes.append(Note(text=text, detail=", ".join(older)))
    try:
        baseline = find_baseline(revision)
        changes = compare_locks(candidate.side.lock, baseline.lock, str(baseline.commit))
        if late := outdated(baseline.lock, baseline.commit):
            text = (
                f"{LOCK} of the baseline is older than the baseline itself, which has been merged and not released yet. So "
                "the difference is not this merge request's alone; a pipeline on top of the release tells what is"
            )
            notes.append(Note(text=text, detail=", ".join(late)))
        old = load_baseline(baseline)
        findings = other_class_names(candidate.class_names, old.class_names) or compare(
            candidate, old, params, bins
        )
        data = compare_data(candidate.side, baseline)
    except NoBaseline as error:
        findings = Findings("no baseline", error.reason, error.detail, error.problem)
    except Unavailable as error:
        notes.append(Note(text="The two sets of data could not be compared", detail=error.detail))

    comparison = Comparison(
        verdict=findings.verdict,
        reason=findings.reason,
        detail=findings.detail,
        problem=findings.problem,
        primary_metric=params.primary_metric,
        margin=params.margin if margin is None else margin,
        when_undecided=params.when_undecided,
        test_examples=len(candidate.predictions.ids),
        identical=findings.identical,
        candidate_seeds=candidate.predictions.seeds.tolist(),
        baseline_seeds=old.predictions.seeds.tolist() if old else [],
        candidate=new_values,
        candidate_intervals=intervals,
        baseline=values(old.predictions, bins) if old else {},
        metrics=findings.metrics,
        classes=findings.classes,
        tests=findings.tests,
        common=findings.common,
        flips=findings.flips,
        changes=changes,
        stages=stage_results(candidate.side.lock, baseline.lock if baseline else None, baseline_costs),
        data=data,
        reproduce=reproduce(candidate.side, baseline),
        pictures=[],
        notes=notes,
        judge=trust.look(git.resolve(revision), image) if revision.strip("0") else None,
    )
    drawn, undrawn = draw(comparison, candidate, params.sheet_examples)
    return comparison.model_copy(update={"pictures": drawn, "notes": notes + undrawn})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.report.compare", description=(__doc__ or "").splitlines()[0]
    )
    # a matplotlibrc in the checkout, which is read from the working folder, would draw a merge request's own pictures
    matplotlib.rcdefaults()
    parser.add_argument(
        "--baseline",
        metavar="REV",
        help="commit to compare with, in a merge request its own; forty zeros: none",
    )
    parser.add_argument("--out", type=Path, default=COMPARISON, metavar="FILE")
    parser.add_argument(
        "--baseline-cost",
        type=Path,
        metavar="DIR",
        help="reports/cost/ of the baseline's run, which DVC does not keep",
    )
    arguments, settings = parser.parse_args(), load_settings()
    given: str | None = arguments.baseline
    baseline = settings.require_baseline("--baseline") if given is None else given
    comparison = run(baseline, arguments.baseline_cost, settings.report_margin, settings.ci_job_image)
    result.save(arguments.out, comparison)
    print(f"{comparison.verdict}: {comparison.reason} → {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    exit_on_user_error(main)
