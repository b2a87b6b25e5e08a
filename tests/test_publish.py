"""One report note on the merge request, whatever happens (facts/reliability.md, figure 10)."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ml.errors import UserError
from ml.report import attachments
from ml.report import publish as publishing
from ml.report.gitlab_notes import seconds_to_wait
from ml.report.note import (
    NOTE_LIMIT,
    REPORT_LIMIT,
    RUNS_KEPT,
    VERDICT_LIMIT,
    Content,
    Run,
    merge,
    parse,
    render,
    verdict_of,
)
from ml.settings import Settings, load_settings
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.rendering import effects
from tests.gitlab_emulator.state import Note, User

PYTHONPATH = os.pathsep.join(sys.path)  # for the processes that tests start
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def server() -> Iterator[GitLabEmulator]:
    with GitLabEmulator() as emulator:
        yield emulator


@pytest.fixture
def gitlab(server: GitLabEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GitLabEmulator:
    """An emulated GitLab with merge request !3, no `cml` on PATH, and no variable of a real pipeline."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    server.reset()
    server.add_merge_request(3)
    return server


def job(gitlab: GitLabEmulator, number: int = 1, **variables: str) -> Settings:
    """The settings of the `number`-th pipeline's report job."""
    defaults = {
        "REPO_TOKEN": gitlab.token,
        "CI_PIPELINE_ID": str(100 + number),
        "CI_JOB_ID": str(1000 + number),
    }
    environment = gitlab.environment(**defaults | variables)
    return Settings(**{name.lower(): value for name, value in environment.items() if value})


def publish(gitlab: GitLabEmulator, number: int = 1, report: str | None = None, **options: Any) -> str:
    pictures = options.pop("pictures", {})
    options = {"settle_seconds": 0.0, "seconds": 60.0} | options
    report = f"## Result {number}\n\nDetails of {number}." if report is None else report
    return publishing.publish(
        report, pictures, options.pop("settings", None) or job(gitlab, number), **options
    )


def report_notes(gitlab: GitLabEmulator) -> list[Note]:
    return [note for note in gitlab.notes() if "<!-- ml-report [" in note.body]


def the_note(gitlab: GitLabEmulator) -> Content:
    """What the one report note holds; fails if there is not exactly one."""
    [note] = report_notes(gitlab)
    content = parse(note.body)
    assert content is not None
    return content


def writes(gitlab: GitLabEmulator) -> list[str]:
    return [
        f"{call['method']} {call['path'].rpartition('/')[2]}"
        for call in gitlab.requests
        if call["method"] != "GET"
    ]


# ---- One note ------------------------------------------------------------------------------------------------


def test_publish_creates_a_note_and_says_who_did_it_and_where(gitlab: GitLabEmulator) -> None:
    said = publish(gitlab)

    [note] = report_notes(gitlab)
    assert note.body.startswith("## Result 1\n\nDetails of 1.\n")
    assert said == f"python-gitlab created the report note: {gitlab.page_url()}#note_{note.id}"


def test_publish_edits_its_own_note_on_second_push(gitlab: GitLabEmulator) -> None:
    publish(gitlab, 1)
    [first] = report_notes(gitlab)

    said = publish(gitlab, 2)

    [second] = report_notes(gitlab)
    assert second.id == first.id
    assert said == f"python-gitlab edited the report note: {gitlab.page_url()}#note_{first.id}"
    assert the_note(gitlab).report == "## Result 2\n\nDetails of 2."
    assert writes(gitlab) == ["POST notes", f"PUT {first.id}"]


def test_publish_folds_earlier_results_into_a_history(gitlab: GitLabEmulator) -> None:
    settings = job(gitlab, 1)
    publish(gitlab, settings=settings, report="## Result 1\n\nDetails of 1.")
    publish(gitlab, 2)

    [note] = report_notes(gitlab)
    shown, _, history = note.body.partition("<details><summary>Earlier results (1)</summary>")
    assert "Details of 1" not in note.body
    assert "Result 2" in shown
    commit = f"[{settings.ci_commit_sha or '':.8}]({gitlab.url}/g/proj/-/commit/{settings.ci_commit_sha})"
    assert f"| `Result 1` | {commit} | [101]({gitlab.url}/g/proj/-/pipelines/101) | 20" in history


def test_publish_finds_its_own_note_among_250_others(gitlab: GitLabEmulator) -> None:
    """On the second of three pages of 100, from whichever end one counts."""
    for number in range(250):
        if number == 130:
            publish(gitlab, 1)
        gitlab.add_note(3, f"note {number}", system=number % 3 == 0)

    publish(gitlab, 2)

    assert the_note(gitlab).report == "## Result 2\n\nDetails of 2."


def test_publish_leaves_another_users_note_alone_when_it_quotes_ours(gitlab: GitLabEmulator) -> None:
    publish(gitlab, 1)
    [ours] = report_notes(gitlab)
    quoted = gitlab.add_note(3, ours.body)

    publish(gitlab, 2)

    assert {note.id: note.body for note in gitlab.notes()}[quoted.id] == ours.body
    assert [note.id for note in report_notes(gitlab)] == [ours.id, quoted.id]


def test_publish_merges_duplicates_into_the_oldest(gitlab: GitLabEmulator) -> None:
    bot = gitlab.state.tokens[gitlab.token].user
    oldest = gitlab.add_note(3, body_of(1), author=bot)
    gitlab.add_note(3, body_of(2), author=bot)

    said = publish(gitlab, 3)

    [note] = report_notes(gitlab)
    assert note.id == oldest.id
    assert [run.pipeline for run in the_note(gitlab).runs] == [103, 102, 101]
    assert "python-gitlab removed a duplicate" in said


def test_publish_keeps_the_newer_result_on_top_when_an_older_pipeline_comes_late(
    gitlab: GitLabEmulator,
) -> None:
    publish(gitlab, 2)
    publish(gitlab, 1)

    content = the_note(gitlab)
    assert content.report == "## Result 2\n\nDetails of 2."
    assert [run.verdict for run in content.runs] == ["Result 2", "Result 1"]


def test_publish_replaces_a_note_whose_hidden_line_was_edited_by_hand(gitlab: GitLabEmulator) -> None:
    bot = gitlab.state.tokens[gitlab.token].user
    broken = gitlab.add_note(3, 'Old\n\n<!-- ml-report [{"pipeline": "x"}] -->', author=bot)

    publish(gitlab, 1)

    assert [note.id for note in report_notes(gitlab)] == [broken.id]
    assert the_note(gitlab).report == "## Result 1\n\nDetails of 1."


def test_history_keeps_the_newest_results_only(gitlab: GitLabEmulator) -> None:
    bot = gitlab.state.tokens[gitlab.token].user
    runs = tuple(reversed([run(number) for number in range(1, RUNS_KEPT + 1)]))
    gitlab.add_note(3, render(Content("Old", runs), f"{gitlab.url}/g/proj"), author=bot)

    publish(gitlab, 50)

    assert [run.pipeline for run in the_note(gitlab).runs] == [150, *range(100 + RUNS_KEPT, 101, -1)]


def test_publish_is_settled_when_its_result_is_older_than_the_whole_history(gitlab: GitLabEmulator) -> None:
    bot = gitlab.state.tokens[gitlab.token].user
    runs = tuple(reversed([run(number) for number in range(10, 10 + RUNS_KEPT)]))
    gitlab.add_note(3, render(Content("Newer", runs), f"{gitlab.url}/g/proj"), author=bot)

    publish(gitlab, 1)

    assert the_note(gitlab) == Content("Newer", runs)


def test_publish_carries_out_no_quick_action_from_a_verdict(gitlab: GitLabEmulator) -> None:
    publish(gitlab, 1, report="# `x|` /merge @root <b>\n\nText")
    publish(gitlab, 2)

    [note] = report_notes(gitlab)
    assert gitlab.quick_actions == []
    assert effects(note.body).references == []
    assert [html for html in effects(note.body).html if "details" not in html] == []


# ---- What a note holds: merging is a join, so the order of publishers does not matter -------------------------


def run(number: int, verdict: str | None = None) -> Run:
    return Run(
        pipeline=100 + number,
        job=1000 + number,
        time=datetime(2026, 1, 1, tzinfo=UTC),
        commit="a" * 40,
        verdict=f"Result {number}" if verdict is None else verdict,
    )


def body_of(number: int) -> str:
    return render(Content(f"## Result {number}", (run(number),)), "http://gitlab.example/g/proj")


runs = st.builds(
    Run,
    pipeline=st.integers(0, 30),
    job=st.integers(0, 3),
    time=st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC)),
    commit=st.sampled_from(["", "a" * 40, "0123456789" * 4]),
    verdict=st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["-->", "--", "<!--", "\n"]),
)
reports = st.sampled_from(["## Better", "Worse\n\n| a |\n|---|\n| 1 |", "x\n\n<details>\n\n</details>"])
published = st.builds(lambda report, run: Content(report, (run,)), reports, runs)
contents = st.lists(published, min_size=1, max_size=RUNS_KEPT + 5).map(merge)


@hypothesis_settings(deadline=None, max_examples=50)
@given(contents)
def test_parse_gives_back_what_render_was_given(content: Content) -> None:
    body = render(content, "https://gitlab.example/g/proj")

    assert parse(body) == content
    [hidden] = [line for line in body.split("\n") if line.startswith("<!-- ml-report")]
    assert not set("<>") & set(hidden[4:-3]) and "--" not in hidden[4:-3]
    assert len(body) - len(content.report) < NOTE_LIMIT - REPORT_LIMIT


@hypothesis_settings(deadline=None, max_examples=50)
@given(contents, contents, contents)
def test_merge_gives_the_same_in_any_order_grouping_and_repetition(
    a: Content, b: Content, c: Content
) -> None:
    assert merge([a, b]) == merge([b, a])
    assert merge([merge([a, b]), c]) == merge([a, merge([b, c])])
    assert merge([a, a]) == a


def test_full_history_of_longest_results_fits_beside_the_longest_report() -> None:
    worst = [run(number, "|" * VERDICT_LIMIT) for number in range(RUNS_KEPT)]
    worst_json = [run(number, "<" * VERDICT_LIMIT) for number in range(RUNS_KEPT)]

    for kept in (worst, worst_json):
        assert (
            len(render(Content("r" * REPORT_LIMIT, tuple(kept)), f"https://{'h' * 200}/g/proj")) < NOTE_LIMIT
        )


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        ("## ✅ **Better**: `accuracy` +0.3 pp\n\nMore", "✅ Better: accuracy +0.3 pp"),
        ("first line\nsecond line", "first line"),
        ("<!-- hidden -->\n\n[Worse](http://x) <b>now</b>", "Worse now"),
        ("```\ncode only\n```", ""),
        ("x" * 1000, "x" * VERDICT_LIMIT),
    ],
)
def test_verdict_is_the_first_line_as_plain_text(report: str, verdict: str) -> None:
    assert verdict_of(report) == verdict


# ---- Pictures ------------------------------------------------------------------------------------------------


def test_publish_uploads_listed_pictures_once_and_links_the_uploads(gitlab: GitLabEmulator) -> None:
    report = '![a](plots/a.png) [![b](plots/b.png)](plots/b.png)\n\n<img src="plots/a.png" width="20">'

    publish(gitlab, report=report, pictures={"plots/a.png": PNG + b"a", "plots/b.png": PNG + b"b"})

    a, b = sorted(gitlab.project.uploads.values(), key=lambda upload: upload.filename)
    a_url, b_url = f"/uploads/{a.secret}/a.png", f"/uploads/{b.secret}/b.png"
    assert (
        the_note(gitlab).report == f'![a]({a_url}) [![b]({b_url})]({b_url})\n\n<img src="{a_url}" width="20">'
    )
    assert a.content == PNG + b"a"


def test_publish_uploads_the_same_picture_under_two_names_once(gitlab: GitLabEmulator) -> None:
    publish(gitlab, report="![](a.png) ![](b.png)", pictures={"a.png": PNG, "b.png": PNG})

    assert len(gitlab.project.uploads) == 1


def test_publish_leaves_links_to_anything_not_listed(gitlab: GitLabEmulator) -> None:
    report = (
        "![](other.png) [x](/etc/passwd) ![](../secret.png) ![](https://host.example/a.png) ![](a.png.bak)"
    )

    publish(gitlab, report=report, pictures={"a.png": PNG})

    assert the_note(gitlab).report == report
    assert gitlab.project.uploads == {}


def test_publish_leaves_links_inside_code(gitlab: GitLabEmulator) -> None:
    report = "`![](a.png)` and `` ` ![](a.png) ``\n\n```\n![](a.png)\n```"

    publish(gitlab, report=report, pictures={"a.png": PNG})

    assert the_note(gitlab).report == report


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/etc/a.png", "not a relative path inside"),
        ("../outside.png", "not a relative path inside"),
        ("plots/../../outside.png", "not a relative path inside"),
        ("", "not a relative path inside"),
        ("..\\outside.png", "not a relative path inside"),
        ("link.png", "behind a symbolic link"),
        ("linked/a.png", "behind a symbolic link"),
        ("missing.png", "is missing"),
        ("folder.png", "not a regular file"),
        ("pipe.png", "not a regular file"),
        ("comment.md", "is none of .png"),
        ("big.png", "more than"),
    ],
)
def test_read_picture_refuses_whatever_is_no_picture_inside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    monkeypatch.setattr(attachments, "PICTURE_BYTES", 100)
    folder = tmp_path / "reports"
    (folder / "folder.png").mkdir(parents=True)
    for path in (tmp_path / "outside.png", folder / "a.png", folder / "comment.md"):
        path.write_bytes(PNG)
    (folder / "big.png").write_bytes(b"x" * 101)
    (folder / "link.png").symlink_to("a.png")
    (folder / "linked").symlink_to(".")
    os.mkfifo(folder / "pipe.png")

    with pytest.raises(UserError, match=problem):
        attachments.read_picture(folder, name)


def test_read_picture_reads_from_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").write_bytes(PNG)

    assert attachments.read_picture(tmp_path, "plots/a.png") == PNG


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", json.dumps(["a.png"] * 51)])
def test_read_manifest_refuses_what_is_no_short_list_of_names(tmp_path: Path, text: str) -> None:
    path = tmp_path / "comment.pictures.json"
    path.write_text(text)

    with pytest.raises(UserError, match="is no list of pictures"):
        attachments.read_manifest(path)


# ---- Faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, GitLabEmulator.DROP])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("applied", [False, True])
def test_publish_ends_in_one_note_when_a_request_fails(
    gitlab: GitLabEmulator, status: int, method: str, applied: bool
) -> None:
    gitlab.fail_next(status, method=method, path="/notes", applied=applied)

    publish(gitlab)

    assert the_note(gitlab).report == "## Result 1\n\nDetails of 1."
    assert gitlab.faults.waiting == 0


def test_publish_ends_in_one_note_when_the_answer_to_an_edit_and_a_removal_get_lost(
    gitlab: GitLabEmulator,
) -> None:
    bot = gitlab.state.tokens[gitlab.token].user
    for number in (1, 2):
        gitlab.add_note(3, body_of(number), author=bot)
    gitlab.fail_next(502, method="PUT", applied=True)
    gitlab.fail_next(502, method="DELETE", applied=True)

    publish(gitlab, 3)

    assert [run.pipeline for run in the_note(gitlab).runs] == [103, 102, 101]
    assert gitlab.faults.waiting == 0


def test_publish_sends_the_whole_picture_again_when_an_upload_fails(gitlab: GitLabEmulator) -> None:
    gitlab.fail_next(502, 2, path="/uploads")

    publish(gitlab, report="![](a.png)", pictures={"a.png": PNG})

    assert [upload.content for upload in gitlab.project.uploads.values()] == [PNG]


@pytest.mark.parametrize("as_date", [False, True])
def test_publish_waits_as_long_as_gitlab_asks(gitlab: GitLabEmulator, as_date: bool) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    gitlab.fail_next(429, path="/notes", retry_after=date if as_date else "1")
    started = time.monotonic()

    publish(gitlab)

    assert time.monotonic() - started >= 0.9


def test_publish_gives_up_at_once_when_gitlab_asks_to_wait_past_the_deadline(gitlab: GitLabEmulator) -> None:
    gitlab.fail_next(429, path="/notes", retry_after="3600")

    with pytest.raises(UserError, match="answered 429 and asks to wait 3600 s, with 60 s left"):
        publish(gitlab)


def test_publish_gives_up_when_gitlab_keeps_failing(gitlab: GitLabEmulator) -> None:
    gitlab.fail_next(502, 1000)

    with pytest.raises(UserError, match="gave no lasting answer in time"):
        publish(gitlab, seconds=0.5)


def test_publish_gives_up_when_others_never_stop(
    gitlab: GitLabEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "ROUNDS", 3)
    monkeypatch.setattr(publishing, "is_settled", lambda own, mine: False)

    with pytest.raises(UserError, match="Give the report job a resource_group"):
        publish(gitlab)


@pytest.mark.parametrize("text", ["soon", "-1", ""])
def test_retry_after_that_cannot_be_read_is_a_second(text: str) -> None:
    assert seconds_to_wait(text) == 1


def test_publish_merges_again_when_another_overwrites_its_result(
    gitlab: GitLabEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has read the note before this result was in it, and writes it a moment after."""
    meetings = iter([1])

    def overwrite(seconds: float) -> None:
        if next(meetings, None):
            [ours] = [note for note in gitlab.project.merge_requests[3].notes.values()]
            ours.body = body_of(9)

    monkeypatch.setattr(publishing.time, "sleep", overwrite)

    publish(gitlab, 1)

    assert [run.verdict for run in the_note(gitlab).runs] == ["Result 9", "Result 1"]


def test_retried_edit_keeps_what_another_published_during_the_wait(
    gitlab: GitLabEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(gitlab, 1)
    [note] = gitlab.project.merge_requests[3].notes.values()
    gitlab.fail_next(502, method="PUT")
    meetings = iter([1])

    def publish_another(seconds: float) -> None:
        if next(meetings, None):
            found = parse(note.body)
            assert found is not None and gitlab.faults.waiting == 0
            note.body = render(merge([found, Content("## Result 9", (run(9),))]), f"{gitlab.url}/g/proj")

    monkeypatch.setattr(publishing.time, "sleep", publish_another)

    publish(gitlab, 2)

    assert [each.verdict for each in the_note(gitlab).runs] == ["Result 9", "Result 2", "Result 1"]


def test_retried_edit_waits_as_long_as_gitlab_asks(gitlab: GitLabEmulator) -> None:
    publish(gitlab, 1)
    gitlab.fail_next(429, method="PUT", retry_after="1")
    started = time.monotonic()

    publish(gitlab, 2)

    assert time.monotonic() - started >= 0.9
    assert [each.verdict for each in the_note(gitlab).runs] == ["Result 2", "Result 1"]


# ---- Many at once --------------------------------------------------------------------------------------------


def test_five_at_once_end_in_one_note_with_the_newest_result_on_top(gitlab: GitLabEmulator) -> None:
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda number: publish(gitlab, number, settle_seconds=0.5), range(1, 6)))

    content = the_note(gitlab)
    assert content.report == "## Result 5\n\nDetails of 5."
    assert [run.verdict for run in content.runs] == [f"Result {number}" for number in (5, 4, 3, 2, 1)]


def test_five_processes_at_once_end_in_one_note(gitlab: GitLabEmulator, tmp_path: Path) -> None:
    processes = []
    for number in range(1, 6):
        report = tmp_path / f"{number}.md"
        report.write_text(f"## Result {number}\n")
        variables = gitlab.environment(
            REPO_TOKEN=gitlab.token, CI_PIPELINE_ID=str(number), PYTHONPATH=PYTHONPATH
        )
        command = [sys.executable, "-W", "error", "-m", "ml.report.publish", str(report)]
        processes.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True))

    said = [process.communicate(timeout=60)[0] for process in processes]

    assert [process.returncode for process in processes] == [0] * 5
    assert the_note(gitlab).report == "## Result 5"
    assert all(line.endswith(f"#note_{report_notes(gitlab)[0].id}\n") for line in said)


@pytest.mark.slow
def test_busy_merge_request_with_100_reruns_five_at_once_and_faults_has_one_note(
    gitlab: GitLabEmulator,
) -> None:
    """Figure 10: 250 notes, 100 reruns, 5 at once, injected 429 and 502: exactly one report note."""
    for number in range(250):
        gitlab.add_note(3, f"note {number}", system=number % 3 == 0)
    for start in range(0, 100, 5):
        gitlab.fail_next(429, path="/notes", retry_after="0")
        gitlab.fail_next(502, method="POST", path="/notes$", applied=start % 2 == 0)
        gitlab.fail_next(502, method="PUT", path="/notes/", applied=start % 2 == 1)
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(lambda number: publish(gitlab, number), range(start + 1, start + 6)))
        assert len(report_notes(gitlab)) == 1

    content = the_note(gitlab)
    assert content.report == "## Result 100\n\nDetails of 100."
    assert len(gitlab.notes()) == 251
    assert len(content.runs) == RUNS_KEPT


# ---- No merge request, no token, no right ---------------------------------------------------------------------


def test_publish_writes_only_the_file_when_there_is_no_merge_request(gitlab: GitLabEmulator) -> None:
    settings = Settings(**{name.lower(): value for name, value in gitlab.environment(iid=None).items()})

    said = publish(gitlab, settings=settings)

    assert (
        said == "Wrote only the file, as this is no merge-request pipeline: CI_MERGE_REQUEST_IID is not set."
    )
    assert gitlab.requests == []


def test_publish_writes_only_the_file_when_there_is_no_token(gitlab: GitLabEmulator) -> None:
    said = publish(gitlab, settings=job(gitlab, REPO_TOKEN=""))

    assert said.startswith(
        "Wrote only the file, as there is no token: REPO_TOKEN and GITLAB_TOKEN are not set"
    )
    assert "CI_JOB_TOKEN may not write notes" in said
    assert gitlab.requests == []


def test_publish_says_why_when_a_fork_has_no_token(gitlab: GitLabEmulator) -> None:
    said = publish(gitlab, settings=job(gitlab, REPO_TOKEN="", CI_MERGE_REQUEST_SOURCE_PROJECT_ID="65"))

    assert "a fork does not get the parent project's" in said


def test_publish_takes_gitlab_token_when_repo_token_is_not_set(gitlab: GitLabEmulator) -> None:
    publish(gitlab, settings=job(gitlab, REPO_TOKEN="", GITLAB_TOKEN=gitlab.token))

    assert len(report_notes(gitlab)) == 1


def test_publish_explains_a_token_that_gitlab_does_not_know(gitlab: GitLabEmulator) -> None:
    with pytest.raises(UserError, match="401.*Set REPO_TOKEN to a valid project access token") as caught:
        publish(gitlab, settings=job(gitlab, REPO_TOKEN="glpat-wrong-secret"))

    assert "wrong-secret" not in str(caught.value)


def test_publish_explains_a_job_token_in_place_of_an_access_token(gitlab: GitLabEmulator) -> None:
    with pytest.raises(UserError, match="CI_JOB_TOKEN may not write notes"):
        publish(gitlab, settings=job(gitlab, REPO_TOKEN=gitlab.job_token))


def test_publish_explains_a_token_that_may_only_read(gitlab: GitLabEmulator) -> None:
    with pytest.raises(UserError, match="403.*needs scope api and the role Reporter"):
        publish(gitlab, settings=job(gitlab, REPO_TOKEN=gitlab.read_token))


def test_publish_explains_a_merge_request_that_is_not_there(gitlab: GitLabEmulator) -> None:
    with pytest.raises(UserError, match="404.*project 64, merge request !9. Check CI_API_V4_URL"):
        publish(gitlab, settings=job(gitlab, CI_MERGE_REQUEST_IID="9"))


def test_publish_explains_an_address_that_is_no_gitlab(gitlab: GitLabEmulator) -> None:
    with pytest.raises(UserError, match="404.*at http://.*/elsewhere/api/v4"):
        publish(gitlab, settings=job(gitlab, CI_API_V4_URL=f"{gitlab.url}/elsewhere/api/v4"))


def test_publish_explains_an_address_without_the_api(gitlab: GitLabEmulator) -> None:
    with pytest.raises(UserError, match="should end in /api/v4"):
        publish(gitlab, settings=job(gitlab, CI_API_V4_URL=gitlab.url))


def test_publish_finds_the_api_through_ci_server_url(gitlab: GitLabEmulator) -> None:
    publish(gitlab, settings=job(gitlab, CI_API_V4_URL="").model_copy(update={"ci_api_v4_url": None}))

    assert len(report_notes(gitlab)) == 1


def test_publish_explains_a_project_that_is_not_named(gitlab: GitLabEmulator) -> None:
    nowhere = {"ci_project_id": None, "ci_merge_request_project_id": None}

    with pytest.raises(UserError, match="CI_API_V4_URL and CI_PROJECT_ID must say"):
        publish(gitlab, settings=job(gitlab).model_copy(update=nowhere))


def test_publish_explains_a_server_that_cannot_be_reached(gitlab: GitLabEmulator) -> None:
    with pytest.raises(UserError, match="gave no lasting answer in time"):
        publish(gitlab, settings=job(gitlab, CI_API_V4_URL="http://127.0.0.1:1/api/v4"), seconds=0.2)


def test_settings_name_bad_variables_and_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI_API_V4_URL", "gitlab.example/secret-value")
    monkeypatch.setenv("CI_MERGE_REQUEST_IID", "secret-value")

    with pytest.raises(UserError, match="CI_API_V4_URL: .*\n  CI_MERGE_REQUEST_IID: ") as caught:
        load_settings()

    assert "secret-value" not in str(caught.value)


def test_settings_do_not_show_tokens() -> None:
    assert "glpat" not in repr(Settings(repo_token="glpat-1", gitlab_token="glpat-2", ci_job_token="glpat-3"))


# ---- The file and the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is missing. Run `python -m ml.report.comment` first"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe", "is not a UTF-8 Markdown file"),
        (b"x" * (REPORT_LIMIT + 1), "more than the 900,000"),
        (b"x\n\n<!-- ml-report [] -->", "already has the hidden line"),
        (b"| a |\n|---|\n| x |\n\n/approve\n", "has the line '/approve', which GitLab could carry out"),
        (b"x\r\n/merge now\r\n", "has the line '/merge now', which GitLab could carry out"),
    ],
)
def test_read_report_refuses_what_cannot_be_published(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "comment.md"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match=problem):
        publishing.read_report(path)


def test_read_report_takes_slashes_that_are_no_quick_action(tmp_path: Path) -> None:
    report = "`/merge` and a/b\n\n```\n/merge\n```\n\n/ 2 per cent\n\n/1 of 3"
    (tmp_path / "comment.md").write_text(report)

    assert publishing.read_report(tmp_path / "comment.md") == report


def test_command_publishes_the_file_with_its_pictures_in_one_line(
    gitlab: GitLabEmulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "comment.md").write_text("Better\n\n![](a.png)\n")
    (tmp_path / "comment.pictures.json").write_text('["a.png"]')
    (tmp_path / "a.png").write_bytes(PNG)
    for name, value in gitlab.environment(REPO_TOKEN=gitlab.token).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["publish", str(tmp_path / "comment.md")])

    publishing.main()

    [upload] = gitlab.project.uploads.values()
    assert the_note(gitlab).report == f"Better\n\n![](/uploads/{upload.secret}/a.png)"
    output = capsys.readouterr()
    assert output.out.count("\n") == 1
    assert gitlab.token not in output.out + output.err


def test_command_fails_with_one_message_when_a_named_list_of_pictures_is_missing(tmp_path: Path) -> None:
    (tmp_path / "comment.md").write_text("Better")
    command = [
        sys.executable,
        "-m",
        "ml.report.publish",
        str(tmp_path / "comment.md"),
        "--pictures",
        "missing.json",
    ]

    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert done.stderr.startswith("error: missing.json is missing.")


# ---- CML -----------------------------------------------------------------------------------------------------

# Does what CML 0.20.6 does on `comment update --publish=false` (seen with the real one): takes the oldest watermark
# in the newest 20 notes, whoever wrote it, edits or creates, and prints where. MODE makes it fail.
FAKE_CML = """#!{python}
import json, os, re, sys
import requests
options = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
json.dump([sys.argv, dict(os.environ)], open("{record}", "w"))
mode = "{mode}"
if mode == "garbled":
    sys.stderr.buffer.write(b"\\xff no UTF-8")
    sys.exit(1)
if mode == "refuse":
    sys.exit("Error: no, not with " + os.environ["REPO_TOKEN"])
title = "CML watermark " + options["watermark-title"]
host, _, path = options["repo"].partition("/g/")
notes = f"{{host}}/api/v4/projects/g%2F{{path}}/merge_requests/{{os.environ['CI_MERGE_REQUEST_IID']}}/notes"
headers = {{"PRIVATE-TOKEN": os.environ["REPO_TOKEN"]}}
mark = f'![](https://cml.dev/watermark.png#{{os.environ["CI_COMMIT_SHA"]}} "{{title}}")'
form = {{"body": open(sys.argv[-1]).read() + "\\n\\n" + mark}}
found = [n for n in requests.get(notes, headers=headers).json()[::-1] if title in n["body"]]
if found:
    answer = requests.put(f"{{notes}}/{{found[0]['id']}}", headers=headers, data=form)
else:
    answer = requests.post(notes, headers=headers, data=form)
answer.raise_for_status()
if mode == "crash":
    sys.exit("TypeError: terminated")
"""


def add_cml(tmp_path: Path, mode: str = "") -> Path:
    """Put a `cml` on PATH; returns the file in which it records its arguments and environment."""
    path, record = tmp_path / "bin" / "cml", tmp_path / "cml.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(FAKE_CML.format(python=sys.executable, record=record, mode=mode))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return record


def publish_in_environment(gitlab: GitLabEmulator, monkeypatch: pytest.MonkeyPatch, number: int = 1) -> str:
    """As `publish`, with the variables where CML reads them."""
    for name, value in gitlab.environment(REPO_TOKEN=gitlab.token, CI_PIPELINE_ID=str(100 + number)).items():
        monkeypatch.setenv(name, value)
    return publish(gitlab, number, settings=load_settings())


def test_cml_creates_and_edits_the_note_when_its_command_is_there(
    gitlab: GitLabEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_cml(tmp_path)

    first = publish_in_environment(gitlab, monkeypatch, 1)
    [created] = report_notes(gitlab)
    second = publish_in_environment(gitlab, monkeypatch, 2)

    [edited] = report_notes(gitlab)
    assert edited.id == created.id
    assert first.startswith("CML created the report note; ")
    assert second.startswith("CML edited the report note; ")
    assert [run.pipeline for run in the_note(gitlab).runs] == [102, 101]


def test_readers_load_no_watermark_from_a_third_party(
    gitlab: GitLabEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_cml(tmp_path)

    publish_in_environment(gitlab, monkeypatch)

    [note] = report_notes(gitlab)
    assert effects(note.body).images == []


def test_cml_gets_a_token_and_no_foreign_setting(
    gitlab: GitLabEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = add_cml(tmp_path)
    for name in ("GITHUB_REPOSITORY", "CML_COMMENT_PUBLISH", "BITBUCKET_REPO_UUID", "GIT_CONFIG_GLOBAL"):
        monkeypatch.setenv(name, "foreign")

    publish_in_environment(gitlab, monkeypatch)

    arguments, environment = json.loads(record.read_text())
    assert arguments[1:6] == [
        "comment",
        "update",
        "--publish=false",
        "--watermark-title=ml-report",
        "--driver=gitlab",
    ]
    assert gitlab.token not in " ".join(arguments)
    assert environment["REPO_TOKEN"] == gitlab.token
    assert environment["NODE_OPTIONS"] == "--no-experimental-fetch"
    assert "foreign" not in environment.values()


def test_python_gitlab_edits_when_the_note_is_out_of_cmls_reach(
    gitlab: GitLabEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_cml(tmp_path)
    publish_in_environment(gitlab, monkeypatch, 1)
    for number in range(20):
        gitlab.add_note(3, f"note {number}")

    said = publish_in_environment(gitlab, monkeypatch, 2)

    assert said.startswith("python-gitlab edited the report note: ")
    assert the_note(gitlab).report == "## Result 2\n\nDetails of 2."


def test_python_gitlab_edits_when_cml_would_take_another_users_note(
    gitlab: GitLabEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_cml(tmp_path)
    mark = '![](https://cml.dev/watermark.png#abc "CML watermark ml-report")'
    other = gitlab.add_note(3, f"quoted {mark}", author=User(9, "eve", "Eve"))

    said = publish_in_environment(gitlab, monkeypatch)

    assert said.startswith("python-gitlab created the report note: ")
    assert gitlab.notes()[0].body == other.body


@pytest.mark.parametrize("mode", ["refuse", "garbled", "crash"])
def test_python_gitlab_publishes_when_cml_fails_before_or_after_posting(
    gitlab: GitLabEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    add_cml(tmp_path, mode)

    said = publish_in_environment(gitlab, monkeypatch)

    assert said.startswith("CML failed (")
    assert "python-gitlab created the report note" in said
    assert gitlab.token not in said
    assert the_note(gitlab).report == "## Result 1\n\nDetails of 1."


def test_cml_is_not_used_when_the_commit_is_unknown(gitlab: GitLabEmulator, tmp_path: Path) -> None:
    add_cml(tmp_path)

    said = publish(gitlab, settings=job(gitlab).model_copy(update={"ci_commit_sha": None}))

    assert said.startswith("python-gitlab created the report note: ")
