"""The emulated GitLab behaves as GitLab does where this project relies on it; driven by python-gitlab."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import gitlab as python_gitlab
import pytest
import requests
from gitlab.exceptions import (
    GitlabAuthenticationError,
    GitlabCreateError,
    GitlabGetError,
    GitlabUpdateError,
)
from gitlab.v4.objects import Project

from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.quick_actions import extract
from tests.gitlab_emulator.rendering import effects


@pytest.fixture(scope="module")
def server() -> Iterator[GitLabEmulator]:
    with GitLabEmulator() as emulator:
        yield emulator


@pytest.fixture
def gitlab(server: GitLabEmulator) -> GitLabEmulator:
    server.reset()
    server.add_merge_request(3, title="Train longer", source_branch="experiment")
    return server


@pytest.fixture
def project(gitlab: GitLabEmulator) -> Project:
    """As a Developer's token with scope `api` sees it."""
    token = gitlab.state.add_token(gitlab.project, "api", 30).value
    return python_gitlab.Gitlab(gitlab.url, private_token=token).projects.get("g/proj")


def api(
    gitlab: GitLabEmulator, path: str, method: str = "GET", token: str | None = None, **options: Any
) -> requests.Response:
    headers = {"PRIVATE-TOKEN": gitlab.token if token is None else token}
    return requests.request(method, f"{gitlab.url}/api/v4{path}", headers=headers, timeout=10, **options)


NOTES = "/projects/g%2Fproj/merge_requests/3/notes"

# ---- Paths, tokens, errors -----------------------------------------------------------------------------------


def test_project_is_found_by_number_and_by_encoded_path_only(gitlab: GitLabEmulator) -> None:
    assert api(gitlab, "/projects/64").json()["path_with_namespace"] == "g/proj"
    assert api(gitlab, "/projects/g%2Fproj").json()["id"] == 64
    assert api(gitlab, "/projects/g/proj").status_code == 404


def test_errors_are_worded_as_gitlab_words_them(gitlab: GitLabEmulator) -> None:
    assert api(gitlab, "/projects/99").json() == {"message": "404 Project Not Found"}
    assert api(gitlab, "/projects/64/merge_requests/9").json() == {"message": "404 Not Found"}
    assert api(gitlab, "/nowhere").json() == {"error": "404 Not Found"}
    assert api(gitlab, NOTES, "PATCH").status_code == 405
    assert api(gitlab, NOTES, "POST").json() == {"error": "body is missing"}
    assert api(gitlab, NOTES, "POST", json={"body": " "}).json()["message"].endswith('["can\'t be blank"]}')


def test_each_kind_of_header_is_read(gitlab: GitLabEmulator) -> None:
    client = python_gitlab.Gitlab(gitlab.url, oauth_token=gitlab.token)
    client.auth()
    assert client.user is not None and client.user.username.startswith("project_64_bot_")
    assert client.version()[0] == "18.6.0-ee"

    job = python_gitlab.Gitlab(gitlab.url, job_token=gitlab.job_token).projects.get(64, lazy=True)
    assert job.releases.list(get_all=True) == []


def test_job_token_cannot_write_notes_uploads_or_commit_comments(gitlab: GitLabEmulator) -> None:
    project = python_gitlab.Gitlab(gitlab.url, job_token=gitlab.job_token).projects.get(64, lazy=True)

    for write in (
        lambda: project.mergerequests.get(3, lazy=True).notes.create({"body": "x"}),
        lambda: project.upload("a.png", filedata=b"x"),
        lambda: project.commits.get("a" * 40, lazy=True).comments.create({"note": "x"}),
    ):
        with pytest.raises(GitlabAuthenticationError, match="401 Unauthorized"):
            write()
    assert gitlab.notes() == []


def test_read_token_reads_and_cannot_write(gitlab: GitLabEmulator) -> None:
    assert api(gitlab, NOTES, token=gitlab.read_token).status_code == 200

    answer = api(gitlab, NOTES, "POST", token=gitlab.read_token, json={"body": "x"})

    assert (answer.status_code, answer.json()["error"]) == (403, "insufficient_scope")


def test_unknown_missing_and_misplaced_tokens_are_refused(gitlab: GitLabEmulator) -> None:
    assert api(gitlab, NOTES, token="glpat-unknown").json() == {"message": "401 Unauthorized"}
    assert api(gitlab, NOTES, token=gitlab.job_token).status_code == 401
    assert requests.get(f"{gitlab.url}/api/v4{NOTES}", timeout=10).status_code == 404
    assert requests.post(f"{gitlab.url}/api/v4{NOTES}", timeout=10).status_code == 401
    assert requests.get(f"{gitlab.url}/api/v4/version", timeout=10).status_code == 401


def test_token_does_not_see_another_project(gitlab: GitLabEmulator) -> None:
    gitlab.state.add_project("g/other", 65)

    assert api(gitlab, "/projects/65").json() == {"message": "404 Project Not Found"}


# ---- Merge requests and notes ---------------------------------------------------------------------------------


def test_merge_request_is_found_by_branch_state_and_commit(gitlab: GitLabEmulator, project: Project) -> None:
    gitlab.add_merge_request(4, source_branch="other", state="closed")
    merge_request = project.mergerequests.get(3)

    assert [found.iid for found in project.mergerequests.list(source_branch="experiment", get_all=True)] == [
        3
    ]
    assert [found.iid for found in project.mergerequests.list(state="closed", get_all=True)] == [4]
    assert [found["iid"] for found in project.commits.get(merge_request.sha, lazy=True).merge_requests()] == [
        3
    ]
    assert merge_request.web_url == f"{gitlab.url}/g/proj/-/merge_requests/3"


def test_labels_of_a_merge_request_are_added_removed_and_replaced(project: Project) -> None:
    merge_request = project.mergerequests.get(3)
    merge_request.labels = ["accept-regression", "ml"]
    merge_request.save()
    assert project.mergerequests.get(3).labels == ["accept-regression", "ml"]

    project.mergerequests.update(3, {"add_labels": "new,ml", "remove_labels": "accept-regression"})

    assert project.mergerequests.get(3).labels == ["ml", "new"]


def test_second_merge_request_from_a_branch_is_a_conflict(project: Project) -> None:
    branches = {"source_branch": "retrain", "target_branch": "main", "title": "Retrain"}
    assert project.mergerequests.create(branches).iid == 4

    with pytest.raises(GitlabCreateError, match="409.*already exists for this source branch: !4"):
        project.mergerequests.create(branches)


def test_notes_are_listed_in_pages_of_20_newest_first_with_system_notes(gitlab: GitLabEmulator) -> None:
    for number in range(45):
        gitlab.add_note(3, f"note {number}", system=number == 44)

    answer = api(gitlab, NOTES)

    assert [note["body"] for note in answer.json()] == [f"note {number}" for number in range(44, 24, -1)]
    assert answer.json()[0]["system"]
    names = ("X-Total", "X-Total-Pages", "X-Page", "X-Per-Page", "X-Next-Page", "X-Prev-Page")
    assert [answer.headers[name] for name in names] == ["45", "3", "1", "20", "2", ""]
    last = requests.get(answer.links["last"]["url"], headers={"PRIVATE-TOKEN": gitlab.token}, timeout=10)
    assert [note["body"] for note in last.json()] == [f"note {number}" for number in range(4, -1, -1)]
    assert "next" not in last.links


def test_pages_hold_at_most_100(gitlab: GitLabEmulator) -> None:
    for number in range(120):
        gitlab.add_note(3, f"note {number}")

    assert len(api(gitlab, f"{NOTES}?per_page=500").json()) == 100


def test_all_pages_are_read_through_python_gitlab_in_either_order(
    gitlab: GitLabEmulator, project: Project
) -> None:
    for number in range(45):
        gitlab.add_note(3, f"note {number}")

    found = project.mergerequests.get(3).notes.list(get_all=True, sort="asc", order_by="created_at")

    assert [note.body for note in found] == [f"note {number}" for number in range(45)]


def test_note_is_created_edited_and_deleted(gitlab: GitLabEmulator, project: Project) -> None:
    notes = project.mergerequests.get(3).notes
    note = notes.create({"body": "one"})
    note.body = "two"
    note.save()
    fields = {"noteable_iid": 3, "noteable_type": "MergeRequest", "system": False, "body": "two"}
    assert fields.items() <= notes.get(note.id).attributes.items()

    note.delete()

    assert gitlab.notes() == []
    with pytest.raises(GitlabGetError, match="404"):
        notes.get(note.id)


def test_note_of_another_user_cannot_be_changed_below_maintainer(gitlab: GitLabEmulator) -> None:
    note = gitlab.add_note(3, "mine")
    maintainer = gitlab.state.add_token(gitlab.project, "api", access_level=40).value

    assert api(gitlab, f"{NOTES}/{note.id}", "DELETE").json() == {"message": "403 Forbidden"}
    assert api(gitlab, f"{NOTES}/{note.id}", "DELETE", token=maintainer).status_code == 204


def test_note_is_taken_from_json_form_and_multipart(gitlab: GitLabEmulator) -> None:
    api(gitlab, NOTES, "POST", json={"body": "json é"})
    api(gitlab, NOTES, "POST", data={"body": "form é"})
    api(gitlab, NOTES, "POST", files={"body": (None, "multipart é")})

    assert [note.body for note in gitlab.notes()] == ["json é", "form é", "multipart é"]


def test_note_over_a_million_characters_is_refused(gitlab: GitLabEmulator) -> None:
    assert api(gitlab, NOTES, "POST", json={"body": "x" * 1_000_000}).status_code == 201
    assert "too long (maximum is 1000000" in api(gitlab, NOTES, "POST", json={"body": "x" * 1_000_001}).text


# ---- Quick actions --------------------------------------------------------------------------------------------


def test_quick_action_in_a_note_is_recorded_and_cut_out(gitlab: GitLabEmulator, project: Project) -> None:
    project.mergerequests.get(3).notes.create({"body": "Hello\n\n/label ~bug\n/MERGE\n\nbye"})

    assert [(action.command, action.argument) for action in gitlab.quick_actions] == [
        ("label", "~bug"),
        ("merge", ""),
    ]
    assert "/label" not in gitlab.notes()[0].body


def test_note_of_only_quick_actions_is_202_and_leaves_no_note(gitlab: GitLabEmulator) -> None:
    answer = api(gitlab, NOTES, "POST", data={"body": "/approve"})

    assert answer.status_code == 202
    assert set(answer.json()) == {"commands_changes", "summary"}
    assert gitlab.notes() == []


def test_quick_action_fires_when_a_note_is_edited(gitlab: GitLabEmulator, project: Project) -> None:
    note = project.mergerequests.get(3).notes.create({"body": "x"})
    note.body = "x\n\n/close"
    note.save()

    assert [action.command for action in gitlab.quick_actions] == ["close"]


@pytest.mark.parametrize(
    "body",
    [
        "| a |\n|---|\n| x |\n\n/approve",
        "text\n/merge",
        "```\nx\n```\n/merge",
        "<!-- c -->\n\n/assign @x",
        "x\r\n/merge",
    ],
)
def test_quick_action_fires_at_the_start_of_a_line_of_a_paragraph(body: str) -> None:
    assert len(extract(body)[1]) == 1


@pytest.mark.parametrize(
    "body",
    [
        *(
            "`/merge`",
            "```\n/merge\n```",
            "> /merge",
            "- /merge",
            "# /merge",
            "| /merge |\n|---|",
            "x /merge",
            "    /merge",
        ),
        *("/merged", "/unknown", "`\n/merge\n`", "<div>\n/merge\n</div>"),
    ],
)
def test_no_quick_action_fires_elsewhere(body: str) -> None:
    assert extract(body) == (body, [])


# ---- Uploads --------------------------------------------------------------------------------------------------


def test_upload_is_answered_with_its_addresses_and_served_back(
    gitlab: GitLabEmulator, project: Project
) -> None:
    uploaded = project.upload("a b.png", filedata=b"\x89PNG")
    answer = api(gitlab, "/projects/64/uploads", "POST", files={"file": ("a b.png", b"\x89PNG")}).json()

    assert uploaded["alt"] == "a_b"
    assert answer["full_path"] == f"/-/project/64{answer['url']}"
    assert answer["markdown"] == f"![a_b]({answer['url']})"
    for address in (f"{gitlab.url}{answer['full_path']}", f"{gitlab.url}/g/proj{answer['url']}"):
        served = requests.get(address, timeout=10)
        assert (served.content, served.headers["content-type"]) == (b"\x89PNG", "image/png")
    assert (
        requests.get(f"{gitlab.url}/-/project/64/uploads/{'0' * 32}/a_b.png", timeout=10).status_code == 404
    )


def test_upload_without_a_file_name_is_refused(gitlab: GitLabEmulator) -> None:
    assert api(gitlab, "/projects/64/uploads", "POST", files={"file": (None, b"x")}).status_code == 400
    assert api(gitlab, "/projects/64/uploads", "POST", data={"x": "y"}).json() == {"error": "file is missing"}


def test_upload_may_come_in_chunks_without_a_length(gitlab: GitLabEmulator) -> None:
    prepared = requests.Request("POST", "http://x", files={"file": ("a.png", b"x" * 100_000)}).prepare()
    assert isinstance(prepared.body, bytes)
    chunks = (prepared.body[start : start + 4096] for start in range(0, len(prepared.body), 4096))
    headers = {"PRIVATE-TOKEN": gitlab.token, "Content-Type": prepared.headers["Content-Type"]}

    answer = requests.post(
        f"{gitlab.url}/api/v4/projects/64/uploads", data=chunks, headers=headers, timeout=10
    )

    assert "Content-Length" not in answer.request.headers
    assert answer.status_code == 201
    assert [len(upload.content) for upload in gitlab.project.uploads.values()] == [100_000]


# ---- Commits, tags, releases, pipelines, packages ---------------------------------------------------------------


def test_commit_comments_have_no_id(project: Project) -> None:
    comments = project.commits.get("a" * 40, lazy=True).comments
    comments.create({"note": "hello"})

    [comment] = comments.list(get_all=True)
    assert comment.note == "hello"
    assert "id" not in comment.attributes


def test_statuses_are_kept_by_commit(project: Project) -> None:
    commit = project.commits.get("a" * 40, lazy=True)
    commit.statuses.create({"state": "success", "name": "gate"})

    assert [(status.name, status.status) for status in commit.statuses.list(get_all=True)] == [
        ("gate", "success")
    ]
    with pytest.raises(GitlabCreateError, match="does not have a valid value"):
        commit.statuses.create({"state": "great"})


def test_release_makes_its_tag_and_is_a_conflict_the_second_time(project: Project) -> None:
    link = {"name": "model", "url": "https://gitlab.example/model.onnx", "link_type": "package"}
    release = {
        "tag_name": "v1",
        "name": "One",
        "description": "x",
        "ref": "main",
        "assets": {"links": [link]},
    }

    created = project.releases.create(release)

    assert created.assets["links"][0]["name"] == "model"
    assert [tag.name for tag in project.tags.list(get_all=True)] == ["v1"]
    assert project.releases.get("v1").description == "x"
    with pytest.raises(GitlabCreateError, match="409: Release already exists"):
        project.releases.create(release)
    with pytest.raises(GitlabCreateError, match="422: Ref is not specified"):
        project.releases.create({"tag_name": "v2"})


def test_text_of_a_release_has_a_limit(project: Project) -> None:
    most = "x" * 1_000_000
    made = project.releases.create({"tag_name": "v1", "ref": "main", "description": most})
    with pytest.raises(GitlabCreateError, match="400: Description is too long"):
        project.releases.create({"tag_name": "v2", "ref": "main", "description": f"{most}x"})
    made.description = f"{most}x"
    with pytest.raises(GitlabUpdateError, match="400: Description is too long"):
        made.save()
    assert [tag.name for tag in project.tags.list(get_all=True)] == ["v1"]


def test_job_token_may_release(gitlab: GitLabEmulator) -> None:
    project = python_gitlab.Gitlab(gitlab.url, job_token=gitlab.job_token).projects.get(64, lazy=True)

    assert project.releases.create({"tag_name": "v1", "ref": "main"}).tag_name == "v1"


def test_tag_can_be_made_once(project: Project) -> None:
    project.tags.create({"tag_name": "v1", "ref": "main"})

    assert project.tags.get("v1").target == "main"
    with pytest.raises(GitlabCreateError, match="Tag v1 already exists"):
        project.tags.create({"tag_name": "v1", "ref": "main"})


def test_files_are_written_and_read(project: Project) -> None:
    file = {"file_path": "deploy/live.json", "branch": "live", "content": "{}", "commit_message": "Deploy"}
    project.files.create(file)

    assert project.files.get("deploy/live.json", "live").decode() == b"{}"
    assert project.files.raw("deploy/live.json", "live") == b"{}"
    with pytest.raises(GitlabCreateError, match="already exists"):
        project.files.create(file)


def test_pipelines_are_started_by_api_and_by_trigger(gitlab: GitLabEmulator) -> None:
    token = gitlab.state.add_token(gitlab.project, "api", 40).value
    project = python_gitlab.Gitlab(gitlab.url, private_token=token).projects.get("g/proj")
    project.pipelines.create({"ref": "main", "variables": [{"key": "A", "value": "1"}]})
    project.trigger_pipeline("main", gitlab.project.trigger_token, variables={"REASON": "drift"})
    url = f"{gitlab.url}/api/v4/projects/64/trigger/pipeline"
    job_token = gitlab.state.add_token(gitlab.project, "job", 40).value
    form = {"token": job_token, "ref": "main", "variables[REASON]": "form"}
    assert requests.post(url, data=form, timeout=10).status_code == 201
    assert requests.post(url, data=form | {"token": "wrong"}, timeout=10).status_code == 404

    found = project.pipelines.list(get_all=True)

    assert [pipeline.source for pipeline in found] == ["pipeline", "trigger", "api"]
    assert [pipeline["variables"] for pipeline in gitlab.project.pipelines] == [
        {"A": "1"},
        {"REASON": "drift"},
        {"REASON": "form"},
    ]
    assert project.pipelines.get(found[0].id).ref == "main"


def test_generic_package_is_kept_byte_for_byte(project: Project, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\0model")

    project.generic_packages.upload("model", "1.0.0", "model.onnx", path=tmp_path / "model.onnx")

    assert project.generic_packages.download("model", "1.0.0", "model.onnx") == b"\0model"
    assert [package.name for package in project.packages.list(get_all=True)] == ["model"]
    with pytest.raises(GitlabGetError, match="404"):
        project.generic_packages.download("model", "1.0.0", "other")


def test_registry_is_listed(gitlab: GitLabEmulator, project: Project) -> None:
    tags = [{"name": "1.0", "path": "g/proj:1.0", "location": "registry.example/g/proj:1.0"}]
    gitlab.project.registry[1] = {"id": 1, "name": "", "path": "g/proj", "tags": tags}

    [repository] = project.repositories.list(get_all=True)

    assert [tag.name for tag in repository.tags.list(get_all=True)] == ["1.0"]


def test_lint_tells_yaml_from_what_is_none(project: Project) -> None:
    assert project.ci_lint.create({"content": "test:\n  script: [true]\n"}).valid
    assert not project.ci_lint.create({"content": "a: b: c"}).valid


# ---- Faults and looking ----------------------------------------------------------------------------------------


def test_fault_meets_the_next_matching_requests_only(gitlab: GitLabEmulator) -> None:
    gitlab.fail_next(429, 2, method="GET", path="/notes", retry_after="7")

    assert api(gitlab, "/version").status_code == 200
    answers = [api(gitlab, NOTES) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].headers["Retry-After"] == "7"


@pytest.mark.parametrize("applied", [False, True])
def test_dropped_connection_may_come_before_or_after_the_work(gitlab: GitLabEmulator, applied: bool) -> None:
    gitlab.fail_next(gitlab.DROP, applied=applied)

    with pytest.raises(requests.ConnectionError):
        api(gitlab, NOTES, "POST", json={"body": "x"})

    assert len(gitlab.notes()) == applied


def test_page_shows_the_notes_as_gitlab_would(gitlab: GitLabEmulator, project: Project) -> None:
    url = project.upload("a.png", filedata=b"\x89PNG")["url"]
    gitlab.add_note(
        3,
        f"| a | b |\n|---|---|\n| `x` | ![]({url}) |\n\n<details><summary>More</summary>\n\n*m*\n\n</details>",
    )
    gitlab.add_note(3, "added 1 commit", system=True)

    page = requests.get(gitlab.page_url(), timeout=10)

    assert "<td><code>x</code></td>" in page.text
    assert f'<img src="/-/project/64{url}"' in page.text
    assert "<details><summary>More</summary>\n<p><em>m</em></p>" in page.text
    assert '<p class="system"' in page.text
    assert "default-src 'none'; img-src 'self'" in page.headers["Content-Security-Policy"]


def test_command_serves_until_it_is_ended_and_then_writes_the_dump(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.gitlab_emulator", "--port", "0"]
    command += ["--merge-request", "7", "--dump", str(tmp_path / "state.json")]
    environment = os.environ | {"REPO_TOKEN": "glpat-chosen", "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = _lines_until(process.stdout, "# look at it")
        variables = dict(
            line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export ")
        )
        url = variables["CI_API_V4_URL"].strip("'")
        notes = f"{url}/projects/64/merge_requests/7/notes"
        assert requests.post(
            notes, headers={"PRIVATE-TOKEN": "glpat-chosen"}, data={"body": "hi"}, timeout=10
        ).ok
        process.terminate()

    assert process.returncode == 0
    assert '"body": "hi"' in (tmp_path / "state.json").read_text()


def _lines_until(stream: IO[str], start: str) -> list[str]:
    lines: list[str] = []
    while not (lines and lines[-1].startswith(start)):
        line = stream.readline()
        assert line, f"ended before {start!r}: {lines}"
        lines.append(line.rstrip("\n"))
    return lines


def test_effects_are_found_outside_code_only() -> None:
    assert effects("@root and `@root` and [x](http://e.x) `[x](http://e.x)` #1 :tada:").found() == {
        "links": ["http://e.x"],
        "references": ["mention: @root", "issue: #1", "emoji: :tada:"],
    }


def test_dump_holds_what_was_received_and_no_token(
    gitlab: GitLabEmulator, project: Project, tmp_path: Path
) -> None:
    project.upload("a.png", filedata=b"\x89PNG")
    project.mergerequests.get(3).notes.create({"body": "hello\n\n/merge"})

    gitlab.dump(tmp_path / "state.json")

    text = (tmp_path / "state.json").read_text()
    tree = json.loads(text)
    [merge_request] = tree["projects"][0]["merge_requests"].values()
    assert [note["body"] for note in merge_request["notes"].values()] == ["hello"]
    assert tree["quick_actions"][0]["command"] == "merge"
    assert not [token for token in gitlab.state.tokens if token in text]
    assert gitlab.project.trigger_token not in text
