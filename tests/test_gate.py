"""The gate: what blocks a merge request, what does not, and the label that lets it through."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import UserError
from ml.report import gate, result
from ml.report.result import Comparison
from tests.comparisons import comparison, difference, without_baseline


def blocks(compared: Comparison, *labels: str) -> bool:
    return not gate.decide(compared, list(labels)).passes


def test_gain_passes() -> None:
    assert not blocks(comparison(0.001, 0.003))


def test_loss_beyond_the_margin_blocks() -> None:
    decision = gate.decide(comparison(-0.004, -0.002), [])
    assert not decision.passes
    assert "0.40\u00a0pp" in decision.reason and "margin of 0.10\u00a0pp" in decision.reason


def test_loss_that_is_surely_within_the_margin_passes() -> None:
    assert not blocks(comparison(-0.0009, -0.0001))
    assert blocks(comparison(-0.0011, -0.0001))


def test_no_detectable_difference_passes_unless_the_params_say_block() -> None:
    assert not blocks(comparison(-0.004, 0.004))
    assert blocks(comparison(-0.004, 0.004, when_undecided="block"))
    assert not blocks(comparison(-0.0009, 0.004, when_undecided="block"))


def test_identical_results_pass_even_if_the_interval_is_wide() -> None:
    assert not blocks(comparison(-0.004, 0.004, when_undecided="block", identical=True))


def test_for_loss_more_is_worse() -> None:
    metrics = {"loss": difference(0.02, 0.04)}
    assert blocks(comparison(primary_metric="loss", metrics=metrics, verdict="worse"))
    metrics = {"loss": difference(-0.04, -0.02)}
    assert not blocks(comparison(primary_metric="loss", metrics=metrics, verdict="better"))


@pytest.mark.parametrize(
    ("problem", "blocked"),
    [("first_run", False), ("not_stored", False), ("unreachable", True), ("corrupt", True)],
)
def test_missing_baseline_passes_only_where_there_are_no_results_to_be_had(
    problem: str, blocked: bool
) -> None:
    assert blocks(without_baseline(problem)) == blocked


def test_results_that_are_nowhere_are_not_called_missing_ones() -> None:
    assert "nothing was compared" in gate.decide(without_baseline("not_stored"), []).reason
    assert "no earlier results" in gate.decide(without_baseline("first_run"), []).reason


def test_other_test_set_blocks_until_a_person_sets_the_label() -> None:
    compared = without_baseline(verdict="not comparable", problem=None)
    assert blocks(compared)
    assert not blocks(compared, "accept-regression")


def test_label_lets_a_loss_through_and_the_reason_says_so() -> None:
    decision = gate.decide(comparison(-0.004, -0.002), ["bug", "accept-regression"])
    assert decision.passes
    assert decision.reason.startswith(
        "The label accept-regression lets it pass. Without the label: The candidate is worse"
    )


def test_similar_labels_do_not_let_a_loss_through() -> None:
    assert blocks(comparison(-0.004, -0.002), "accept-regressions", "Accept-Regression", "accept")


@given(st.floats(-0.02, 0.02), st.floats(0, 0.02), st.floats(0, 0.01), st.sampled_from(["pass", "block"]))
def test_more_improvement_never_turns_a_pass_into_a_block(
    low: float, width: float, margin: float, mode: str
) -> None:
    def passes(shift: float) -> bool:
        return gate.rule(difference(low + shift, low + width + shift), "accuracy", margin, mode).passes

    assert passes(0.005) or not passes(0.0)


@given(st.floats(-0.02, 0.02), st.floats(0, 0.02))
def test_larger_margin_never_turns_a_pass_into_a_block(low: float, width: float) -> None:
    found = difference(low, low + width)
    for mode in ("pass", "block"):
        narrow, wide = (gate.rule(found, "accuracy", margin, mode).passes for margin in (0.001, 0.005))
        assert wide or not narrow


@pytest.fixture(autouse=True)
def no_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI_COMMIT_SHA", raising=False)


def run_main(monkeypatch: pytest.MonkeyPatch, folder: Path, compared: Comparison, labels: str = "") -> int:
    path = folder / "comparison.json"
    result.save(path, compared)
    monkeypatch.setattr(sys, "argv", ["gate", "--comparison", str(path)])
    monkeypatch.setenv("CI_MERGE_REQUEST_LABELS", labels)
    try:
        gate.main()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_command_ends_in_1_with_the_way_through_when_it_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, tmp_path, comparison(-0.004, -0.002)) == 1
    said = capsys.readouterr().out
    assert said.startswith("worse: ") and "gate blocks: " in said and "accept-regression" in said


def test_command_ends_in_0_when_it_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_main(monkeypatch, tmp_path, comparison(0.001, 0.003)) == 0


def test_command_reads_the_labels_that_gitlab_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, tmp_path, comparison(-0.004, -0.002), "bug,accept-regression") == 0
    assert "The label accept-regression lets it pass" in capsys.readouterr().out


def test_gate_refuses_the_comparison_of_another_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    better = comparison(0.001, 0.003)
    monkeypatch.setenv("CI_COMMIT_SHA", "e" * 40)
    with pytest.raises(
        UserError, match="about commit aaaaaaaa, and this job is about eeeeeeee.*ml.report.compare"
    ):
        run_main(monkeypatch, tmp_path, better)
    monkeypatch.setenv("CI_COMMIT_SHA", better.reproduce.commit)
    assert run_main(monkeypatch, tmp_path, better) == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"verdict": "great"}'])
def test_damaged_comparison_is_an_error_and_never_a_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "comparison.json").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["gate", "--comparison", str(tmp_path / "comparison.json")])
    with pytest.raises(UserError, match="comparison.json"):
        gate.main()
    monkeypatch.setattr(sys, "argv", ["gate", "--comparison", str(tmp_path / "missing.json")])
    with pytest.raises(UserError, match="missing.json is missing"):
        gate.main()
