"""Red or green from reports/comparison.json: exit code 1 blocks the merge request.

    python -m ml.report.gate --comparison reports/comparison.json

| verdict | gate |
|---|---|
| better | passes |
| worse | blocks, unless even the far end of the interval is a loss of less than report.margin |
| no detectable difference | passes; with report.when_undecided: block, only if the interval excludes such a loss |
| not comparable | blocks: with another test set a person has to decide, and says so by the label |
| no baseline | passes where there are no results yet, or they are stored nowhere; blocks where they cannot be had or trusted |

The label `accept-regression` on the merge request lets it pass whatever the verdict.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ml.errors import exit_on_user_error
from ml.report import result
from ml.report.result import COMPARISON, Comparison, improvement
from ml.report.statistics import Difference
from ml.report.words import amount
from ml.settings import load_settings

LABEL = "accept-regression"


@dataclass(frozen=True)
class Decision:
    passes: bool
    reason: str


def decide(comparison: Comparison, labels: list[str]) -> Decision:
    decision = without_label(comparison)
    if decision.passes or LABEL not in labels:
        return decision
    return Decision(True, f"The label {LABEL} lets it pass. Without the label: {decision.reason}")


def without_label(comparison: Comparison) -> Decision:
    if comparison.primary is None:
        return without_numbers(comparison)
    if comparison.identical:
        return Decision(True, "Nothing was lost or gained.")
    return rule(comparison.primary, comparison.primary_metric, comparison.margin, comparison.when_undecided)


def rule(primary: Difference, metric: str, margin: float, when_undecided: str) -> Decision:
    """Non-inferiority: what the interval says of a loss as large as the margin."""
    ends = improvement(metric, primary.low), improvement(metric, primary.high)
    worst, best = min(ends), max(ends)
    within = worst >= -margin
    allowed, loss = f"the margin of {amount(metric, margin)}", f"a loss of {amount(metric, max(0.0, -worst))}"
    if worst > 0:
        return Decision(True, "The candidate is better.")
    if within:
        found = "The candidate is worse, but" if best < 0 else "No loss was found, and"
        return Decision(True, f"{found} {loss} at most is within {allowed}.")
    if best < 0:
        return Decision(
            False, f"The candidate is worse, and {loss} cannot be excluded, which is beyond {allowed}."
        )
    if when_undecided == "block":
        return Decision(
            False,
            f"{loss.capitalize()} cannot be excluded, which is beyond {allowed} (report.when_undecided is block). "
            "More seeds or test examples would tell.",
        )
    return Decision(
        True,
        f"No loss was found. One of less than {amount(metric, primary.smallest_detectable)} may go unnoticed.",
    )


def without_numbers(comparison: Comparison) -> Decision:
    if comparison.verdict == "not comparable":
        return Decision(False, "No loss can be excluded by numbers, so a person has to decide.")
    if comparison.problem == "first_run":
        return Decision(True, "There are no earlier results to fall behind.")
    if comparison.problem == "not_stored":
        return Decision(True, "The baseline's results are nowhere to be had, so nothing was compared.")
    return Decision(False, "There are earlier results, and a loss against them cannot be excluded.")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.report.gate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--comparison", type=Path, default=COMPARISON, metavar="FILE")
    arguments = parser.parse_args()
    settings = load_settings()
    comparison = result.load(arguments.comparison, settings.ci_commit_sha)
    decision = decide(comparison, settings.labels)
    print(f"{comparison.verdict}: {comparison.reason}")
    if comparison.detail:
        print(f"({comparison.detail})")
    print(f"gate {'passes' if decision.passes else 'blocks'}: {decision.reason}")
    if not decision.passes:
        # GitLab fixes the labels when it creates a pipeline, so running this job again would not see a new one.
        print(
            f"To merge nevertheless, put the label {LABEL} on the merge request and start a new pipeline for it."
        )
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
