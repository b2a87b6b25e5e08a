"""Made-up comparisons, for tests of what is made from them."""

from typing import Any

from ml.report.result import (
    Changes,
    ClassBalance,
    ClassResult,
    Comparison,
    DataDifference,
    FileChange,
    Flip,
    FlipCount,
    Flips,
    Interval,
    Judge,
    Note,
    PackageChange,
    ParamChange,
    PartDifference,
    Picture,
    Reproduce,
    StageResult,
    Touched,
    Value,
)
from ml.report.statistics import Difference, PairedTests

METRICS = ("accuracy", "macro_f1", "loss", "calibration_error")


def difference(low: float, high: float, baseline: float = 0.99, **more: Any) -> Difference:
    """With its middle between `low` and `high`."""
    change = (low + high) / 2
    error = (high - low) / 4
    values: dict[str, Any] = {
        "baseline": baseline,
        "candidate": baseline + change,
        "difference": change,
        "standard_error": error,
        "degrees_of_freedom": 12.0,
        "low": low,
        "high": high,
        "p_value": 0.04,
        "smallest_detectable": 2.8 * error,
        "seed_noise": "measured",
    }
    return Difference(**(values | more))


def comparison(
    low: float = -0.0005, high: float = 0.0011, text: str = "text", count: int = 2, **more: Any
) -> Comparison:
    """With every part filled: `text` wherever others choose the text, `count` rows in every list."""
    verdict = "better" if low > 0 else "worse" if high < 0 else "no detectable difference"
    flip = Flip(
        id=text,
        actual=text,
        before=text,
        after=text,
        confidence_before=0.5,
        confidence_after=0.9,
        wrong_seeds_before=0,
        wrong_seeds_after=2,
    )
    pairs = [FlipCount(before=text, after=text, count=3)] * min(count, 12)
    stage = StageResult(
        name=text,
        inputs_changed=True,
        outputs_changed=True,
        ran=True,
        seconds=200.0,
        peak_memory_mib=1234.0,
        device=text,
        baseline_seconds=100.0,
        baseline_peak_memory_mib=1000.0,
    )
    changes = Changes(
        params=[ParamChange(key=text, before=None, after=text)] * count,
        code=[FileChange(path=text, kind="modified", lines_added=3, lines_removed=1)] * count,
        data=[FileChange(path=text, kind="added")] * count,
        dependencies=[FileChange(path=text, kind="removed")],
        packages=[PackageChange(name=text, before=text, after=None)] * count,
        commands=[ParamChange(key=text, before=text, after=text)] * count,
    )
    part = PartDifference(
        part="train",
        before=10,
        after=12,
        added=2,
        removed=0,
        relabelled=1,
        per_class=[ClassBalance(name=text, before=3, after=5)] * count,
    )
    # an ordinary merge request leaves its judge alone; one that chooses texts does not
    file = FileChange(path=text, kind="modified", lines_added=3, lines_removed=1)
    touched = [] if text == "text" else [Touched(part="What judges", files=[file] * count)]
    values: dict[str, Any] = {
        "verdict": verdict,
        "reason": "A sentence of ours.",
        "detail": text,
        "problem": None,
        "primary_metric": "accuracy",
        "margin": 0.001,
        "when_undecided": "pass",
        "test_examples": 10_000,
        "identical": False,
        "candidate_seeds": [0, 1, 2, 3, 4],
        "baseline_seeds": [0, 1, 2, 3, 4],
        "candidate": {name: Value(mean=0.99 + (low + high) / 2, per_seed=[0.99] * 5) for name in METRICS},
        "candidate_intervals": {name: Interval(low=0.98, high=1.0) for name in METRICS},
        "baseline": {name: Value(mean=0.99, per_seed=[0.99] * 5) for name in METRICS},
        "metrics": {name: difference(low, high) for name in METRICS},
        "classes": [ClassResult(name=text, examples=100, recall=difference(low, high), p_value=0.2)] * count,
        "tests": PairedTests(
            broken=1, fixed=2, mcnemar_p_value=1.0, permutation_p_value=0.3, permutations=2000
        ),
        "common": None,
        "flips": Flips(
            broken_count=count,
            fixed_count=count,
            broken=[flip] * count,
            fixed=[flip] * count,
            broken_pairs=pairs,
            fixed_pairs=pairs,
        ),
        "changes": changes,
        "stages": [stage] * count,
        "data": DataDifference(changed=True, parts=[part], in_both_parts_before=0, in_both_parts=1),
        "reproduce": Reproduce(
            commit="a" * 40,
            dirty=False,
            baseline_commit="b" * 40,
            lock_sha256="c" * 64,
            model_sha256="d" * 64,
            image=text,
            commands=["git checkout " + "a" * 40],
        ),
        "pictures": [Picture(path="comparison/difference.png", title="The difference")],
        "notes": [Note(text="Something could not be drawn", detail=text)],
        "judge": Judge(code="baseline", image=text, touched=touched),
    }
    return Comparison(**(values | more))


def without_baseline(problem: str = "first_run", **more: Any) -> Comparison:
    """Nothing to compare with."""
    nothing: dict[str, Any] = {
        "verdict": "no baseline",
        "reason": "The baseline has no results yet.",
        "problem": problem,
        "baseline_seeds": [],
        "baseline": {},
        "metrics": {},
        "classes": [],
        "tests": None,
        "flips": None,
        "changes": None,
        "data": None,
        "pictures": [],
    }
    return comparison(**(nothing | more))
