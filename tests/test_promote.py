"""The life cycle of a registered model, without a server: moves, displacement, the way back."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml import promote
from ml.errors import UserError
from ml.report import result
from ml.tracking import lifecycle
from ml.tracking.lifecycle import DOWN, SEATS, STAGES, UP, Entry, Move, Stage, State, replay


def entry(number: int, action: str, *moves: tuple[str, str | None, str]) -> Entry:
    steps = [
        Move.model_validate({"version": version, "tag": f"model-v1.0.{version}", "from": origin, "to": to})
        for version, origin, to in moves
    ]
    return Entry(number=number, when="2026-01-01T00:00:00", who="ada", why="w", action=action, moves=steps)


def registered(*versions: str) -> list[Entry]:
    return [
        entry(place, "register", (each, None, "candidate")) for place, each in enumerate(versions, start=1)
    ]


def moved(entries: list[Entry], action: str, version: str, to: Stage) -> list[Entry]:
    state = replay(entries)
    moves = lifecycle.moves_to(state, version, to)
    fields = {"who": "ada", "why": "w", "when": "2026-01-01T00:00:00", "action": action, "moves": moves}
    return [*entries, Entry(number=len(entries) + 1, **fields)]


def in_production(*versions: str) -> list[Entry]:
    """Each was champion, one after the other."""
    entries = registered(*versions)
    for version in versions:
        entries = moved(entries, "promote", version, "staging")
        entries = moved(entries, "promote", version, "champion")
    return entries


def test_new_champion_archives_the_old_one() -> None:
    state = replay(in_production("1", "2"))
    assert state.stages == {"1": "archived", "2": "champion"}
    assert state.aliases == {"archived": "1", "champion": "2"}


def test_version_displaced_from_staging_is_a_candidate_again() -> None:
    entries = moved(registered("1", "2"), "promote", "1", "staging")
    assert replay(moved(entries, "promote", "2", "staging")).stages == {"1": "candidate", "2": "staging"}


def test_rollback_goes_back_one_champion_at_a_time() -> None:
    entries = in_production("1", "2", "3")
    for expected in ("2", "1"):
        target = lifecycle.rollback_target(replay(entries), None)
        assert target == expected
        entries = moved(entries, "rollback", target, "champion")
    with pytest.raises(UserError, match="no way back"):
        lifecycle.rollback_target(replay(entries), None)


def test_rollback_to_an_earlier_champion_forgets_those_after_it() -> None:
    entries = moved(in_production("1", "2", "3"), "rollback", "1", "champion")
    assert replay(entries).champions == ["1"]


def test_rollback_to_what_was_never_champion_is_refused() -> None:
    state = replay([*in_production("1", "2"), entry(7, "register", ("9", None, "candidate"))])
    with pytest.raises(UserError, match="no way back to 9"):
        lifecycle.rollback_target(state, "9")


def test_rollback_fills_production_that_a_demotion_has_emptied() -> None:
    entries = moved(in_production("1", "2"), "demote", "2", "archived")
    assert replay(entries).holder("champion") is None
    assert lifecycle.rollback_target(replay(entries), None) == "1"


@pytest.mark.parametrize("to", ["champion", "challenger"])
def test_candidate_cannot_skip_staging(to: Stage) -> None:
    with pytest.raises(UserError, match="can be promoted to: staging"):
        lifecycle.check_promotion(replay(registered("1")), "1", to)


def test_promotion_downwards_names_the_command_that_does_it() -> None:
    state = replay(in_production("1"))
    with pytest.raises(UserError, match="promote demote 1 --to staging"):
        lifecycle.check_promotion(state, "1", "staging")


def test_demotion_goes_one_step_unless_told() -> None:
    state = replay(moved(registered("1"), "promote", "1", "staging"))
    assert lifecycle.demotion(state, "1", None) == "candidate"
    assert lifecycle.demotion(state, "1", "archived") == "archived"
    with pytest.raises(UserError, match="can be demoted to: candidate, archived"):
        lifecycle.demotion(state, "1", "champion")


def test_version_is_found_by_number_tag_and_stage() -> None:
    state = replay(in_production("1", "2"))
    assert [state.resolve(name) for name in ("2", "model-v1.0.2", "champion")] == ["2", "2", "2"]
    with pytest.raises(UserError, match="'staging' is no version.*1 \\(model-v1.0.1\\)"):
        state.resolve("staging")


def test_missing_entry_is_found() -> None:
    entries = in_production("1", "2")
    del entries[2]
    with pytest.raises(UserError, match="entry 3 is missing"):
        replay(entries)


@given(st.lists(st.tuples(st.sampled_from("1234"), st.sampled_from(STAGES), st.booleans()), max_size=40))
def test_no_seat_is_ever_held_twice(attempts: list[tuple[str, Stage, bool]]) -> None:
    entries = registered("1", "2", "3", "4")
    for version, to, back in attempts:
        state = replay(entries)
        if back and version in state.champions and version != state.holder("champion"):
            entries = moved(entries, "rollback", version, "champion")
        elif to in UP[state.stages[version]]:
            entries = moved(entries, "promote", version, to)
        elif to in DOWN[state.stages[version]]:
            entries = moved(entries, "demote", version, to)
        state = replay(entries)
        for seat in SEATS:
            assert list(state.stages.values()).count(seat) <= 1
        assert len(state.stages) == 4
        assert len(set(state.champions)) == len(state.champions)
        champion = state.holder("champion")
        assert champion is None or state.champions[-1] == champion


def test_entry_is_read_back_as_it_was_written() -> None:
    one = entry(3, "promote", ("1", "staging", "champion"), ("2", "champion", "archived"))
    assert Entry.model_validate_json(one.to_json()) == one
    assert json.loads(one.to_json())["moves"][0]["from"] == "staging"


def test_entry_of_the_longest_reasons_fits_what_servers_take() -> None:
    long = "ß" * lifecycle.WHY_LIMIT
    moves = lifecycle.moves_to(replay(in_production("1", "2")), "1", "champion")
    one = Entry(number=999_999, when="2026-01-01T00:00:00.000000+00:00", who="w" * 300, why=long, accepted=long,
                action="promote", moves=moves)  # fmt: skip
    assert len(one.to_json()) < 5000  # characters of a GitLab tag; a parameter of MLflow has 6000


def test_lower_is_better_for_the_same_metrics_as_in_the_report() -> None:
    assert promote.LOWER_IS_BETTER == result.LOWER_IS_BETTER


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["3", "--to", "staging"],  # no reason
        ["3", "--to", "staging", "--why", "  "],
        ["3", "--to", "production", "--why", "w"],
        ["3", "--to", "archived", "--why", "w"],  # that is a demotion
        ["3", "--to", "staging", "--why", "w" * 1001],
        ["3", "--to", "champion", "--why", "w", "--accept-regression", ""],
        ["demote", "--why", "w"],
        ["best", "--count", "0"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        promote.parse(arguments)
    assert caught.value.code == 2


def test_word_promote_may_be_left_out() -> None:
    short, long = ["3", "--to", "staging", "--why", "w"], ["promote", "3", "--to", "staging", "--why", "w"]
    assert promote.parse(short) == promote.parse(long)


def test_reason_is_one_line() -> None:
    assert promote.parse(["3", "--to", "staging", "--why", "one\n two"]).why == "one two"


def test_help_works_without_a_server() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ml.promote", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "rollback" in done.stdout


def test_state_of_nothing_is_empty() -> None:
    assert replay([]) == State()
