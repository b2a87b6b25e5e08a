"""Google Drive as the DVC remote: the unmodified dvc-gdrive against an emulated Drive, over TLS and through a proxy."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ml.errors import UserError
from ml.release import remote
from ml.settings import load_settings
from tests.drive_emulator.drive import PIECE, GoogleDrive
from tests.drive_emulator.server import emulated_drive
from tests.dvc_project import Project, make_project

VARIABLES = ("DVC_", "CI_", "GDRIVE_", "HTTPLIB2_", "HTTPS_PROXY", "https_proxy")


@dataclass
class Team:
    """A project whose stages have run, and a Shared Drive."""

    google: GoogleDrive
    drive: str
    project: Project
    keys: Path
    environment: dict[str, str] = field(default_factory=dict)

    def preflight(self, *arguments: str, fails: bool = False, **more: str) -> str:
        said = self.project.ml("preflight", *arguments, fails=fails, **self.environment | more)
        assert "Traceback" not in said and "PRIVATE KEY" not in said
        return said

    def key(self, name: str) -> dict[str, str]:
        """The variable for a new key of the account of this name."""
        path = self.keys / f"{name}.json"
        path.write_text(json.dumps(self.google.service_account(name)))
        return {"GDRIVE_SERVICE_ACCOUNT_FILE": str(path)}

    def push(self) -> None:
        """By DVC itself."""
        self.preflight()
        self.project.run("dvc", "push", "--quiet", "--run-cache", **self.environment)

    def judge_and_pull(self, folder: Path) -> None:
        """In another clone, the latter by DVC itself: it has what was pushed."""
        clone = self.project.clone(folder)
        clone.ml("remote", **self.environment)
        clone.ml("lock_gate", **self.environment)
        clone.run("dvc", "pull", "--quiet", **self.environment)
        for path in ("data/1.txt", "artifacts/model.onnx", "artifacts/parts/3.txt", "reports/metrics.json"):
            assert (clone.folder / path).read_bytes() == (self.project.folder / path).read_bytes()

    @property
    def paths(self) -> list[str]:
        return sorted(path for path, contents in self.google.tree(self.drive).items() for _ in contents)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Nothing is pushed."""
    project = make_project(tmp_path_factory.mktemp("gdrive") / "project")
    project.run("dvc", "repro")
    project.commit("lock")
    return project


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)


@pytest.fixture
def team(finished: Project, tmp_path: Path, clean_environment: None) -> Iterator[Team]:
    with emulated_drive(tmp_path) as (google, environment):
        drive = google.shared_drive(runner="fileOrganizer", contributor="writer", viewer="reader")
        team = Team(google, drive, finished, tmp_path)
        team.environment = (
            environment | {"DVC_REMOTE_URL": f"gdrive://{drive}/team/store"} | team.key("runner")
        )
        yield team


MADE = [
    "team",
    "team/store",
    "team/store/merge-requests",
    "team/store/merge-requests/7",
    "team/store/merge-requests/7/preflight",
]


def test_folder_of_the_remote_is_made_with_all_above_it_and_nothing_is_left_in_it(team: Team) -> None:
    for _ in range(2):  # once
        assert "can be written to and read" in team.preflight(CI_MERGE_REQUEST_IID="7")
        assert team.paths == MADE


def test_folder_is_made_in_the_shared_drive_itself(team: Team) -> None:
    team.preflight(DVC_REMOTE_URL=f"gdrive://{team.drive}")
    assert team.paths == ["preflight"]


@pytest.mark.slow
def test_two_jobs_that_make_the_folder_at_once_do_not_hinder_each_other(team: Team, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)

    def meet(method: str) -> None:
        if method == "insert" and not team.paths:
            both.wait()

    team.google.before = meet
    clones = [replace(team, project=team.project.clone(tmp_path / f"job {number}")) for number in range(2)]
    jobs = [threading.Thread(target=clone.preflight) for clone in clones]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert team.paths.count("team") == 2  # the race was run
    team.push()
    team.judge_and_pull(tmp_path / "other")


@pytest.mark.slow
def test_objects_in_two_folders_of_one_name_are_found(team: Team, tmp_path: Path) -> None:
    team.push()
    google = team.google
    above = team.drive
    for title in ("team", "store", "files"):
        above = google.children(above, title)[0].id
    first, second = google.children(above, "md5")[0], google.add("md5", [above])
    prefixes = google.children(first.id)
    assert len(prefixes) > 5
    for prefix in prefixes[::2]:
        prefix.parents = [second.id]
    team.judge_and_pull(tmp_path / "other")


@pytest.mark.slow
def test_answers_that_come_in_pieces_late_or_with_an_old_token_are_gone_through(
    team: Team, tmp_path: Path
) -> None:
    google = team.google
    google.page_size, google.keeps_half = 2, True
    google.fail("userRateLimitExceeded", 2, "list")
    google.fail("rateLimitExceeded", 1, "insert")
    google.fail("backendError", 1, "get")
    big = team.project.clone(tmp_path / "big")
    shutil.copytree(team.project.folder / "data", big.folder / "data")
    (big.folder / "data/big.txt").write_text(os.urandom(2 * PIECE).hex())
    (big.folder / "data/empty.txt").write_text("")
    big.run("dvc", "repro", "--quiet")
    big.commit("more data")
    pushed = replace(team, project=big)
    pushed.push()
    google.grants.clear()  # every token ends
    pushed.judge_and_pull(tmp_path / "other")
    assert not any(fault.times for fault in google.faults)


def test_file_that_is_written_again_takes_the_place_of_all_of_its_name(team: Team) -> None:
    program = """
from dvc.repo import Repo
from ml.remotes import places
with Repo() as repo:
    (main,) = places(repo)
    main.write("runs/a/b", b"1")
    main.write("runs/a/b", b"2")
    print("read:", main.read("runs/a/b"), main.read("runs/a/c"), main.names("runs/a"), main.names("no"))
    main.write("runs/a/new", b"x")
"""
    team.preflight()
    folder = team.google.children(team.google.children(team.drive, "team")[0].id, "store")[0].id
    runs = team.google.add("a", [team.google.add("runs", [folder]).id]).id
    for content in (b"of one job", b"of another at the same time"):
        team.google.add("b", [runs], content)
    said = team.project.run(sys.executable, "-c", program, **team.environment)
    assert "read: b'2' None ['b'] []" in said
    tree = team.google.tree(team.drive)
    assert tree["team/store/runs/a/b"] == [b"2"] and tree["team/store/runs/a/new"] == [b"x"]


def test_service_account_without_a_shared_drive_is_told_to_use_one(team: Team) -> None:
    mine = team.google.my_drive_folder("mine", "someone@example.com", runner="writer")
    said = team.preflight(fails=True, DVC_REMOTE_URL=f"gdrive://{mine}/store")
    assert "may not make a folder in remote main" in said and "storageQuotaExceeded" in said
    assert "has to be a folder of a Shared Drive that the account is a Content manager of" in said


# What the pipeline's job does at its end.
PUSH = """
from ml.errors import exit_on_user_error
from ml.release.push import push
from ml.settings import load_settings
exit_on_user_error(lambda: push("main", load_settings()))
"""


def test_push_that_google_refuses_in_the_middle_tells_the_remedy(team: Team) -> None:
    team.preflight()
    team.google.fail("teamDriveFileLimitExceeded", 10**6, "insert")
    said = team.project.run(sys.executable, "-c", PUSH, fails=True, **team.environment)
    assert "failed for" in said and "of 13 objects" in said and "Traceback" not in said
    assert "as many files as Google allows: delete folders of closed merge requests" in said


def test_rate_limit_that_the_client_does_not_wait_for_is_named_and_the_next_run_goes_through(
    team: Team,
) -> None:
    team.preflight()
    team.google.fail("429", 3, "insert")
    said = team.project.run(sys.executable, "-c", PUSH, fails=True, **team.environment)
    assert "Rate Limit Exceeded" in said and "run the job again in some minutes" in said
    assert "Traceback" not in said
    team.google.faults.clear()
    team.project.run(sys.executable, "-c", PUSH, **team.environment)
    assert len([path for path in team.paths if "/files/md5/" in path and path.count("/") == 5]) == 13


@pytest.mark.parametrize("role", ["contributor", "viewer"])
def test_member_of_too_low_a_role_is_told_which_it_needs(team: Team, role: str) -> None:
    said = team.preflight(fails=True, **team.key(role))
    assert "remote main" in said and "Make the service account a Content manager of the Shared Drive" in said


def test_account_of_merge_requests_writes_below_their_folder_alone(team: Team) -> None:
    team.preflight(CI_MERGE_REQUEST_IID="1")
    folder = team.google.children(team.drive, "team")[0]
    for title in ("store", "merge-requests"):
        folder = team.google.children(folder.id, title)[0]
    team.google.share(folder, viewer="fileOrganizer")
    team.preflight(CI_MERGE_REQUEST_IID="7", **team.key("viewer"))
    assert "may not write to remote main" in team.preflight(fails=True, **team.key("viewer"))


def test_reason_for_which_google_lets_nobody_in_is_told_with_its_remedy(team: Team) -> None:
    team.preflight()
    said = team.preflight(fails=True, **team.key("stranger"))
    assert "File not found" in said and "add it as Content manager" in said
    [folder] = team.google.children(team.drive, "team")
    team.google.share(folder, stranger="fileOrganizer")
    said = team.preflight(fails=True, DVC_REMOTE_URL=f"gdrive://{folder.id}/store", **team.key("stranger"))
    assert "requires shared drive membership" in said and "members of the Shared Drive: that a folder" in said
    said = team.preflight(fails=True, DVC_REMOTE_URL="gdrive://1nothing/store")
    assert "FOLDER_ID in DVC_REMOTE_URL is wrong" in said
    team.google.fail("accessNotConfigured", 10**6)
    assert "Enable the Google Drive API" in team.preflight(fails=True)
    team.google.accounts["runner@team.iam.gserviceaccount.com"].clear()
    said = team.preflight(fails=True)
    assert "Invalid JWT Signature" in said and "Make a new key" in said


def test_rate_limit_that_stays_ends_the_preflight_in_time_and_is_named(team: Team) -> None:
    team.google.fail("userRateLimitExceeded", 10**6)
    start = time.monotonic()
    said = team.preflight("--timeout", "5", fails=True)
    assert time.monotonic() - start < 60  # most of it is Python's own start on a busy machine
    assert "User Rate Limit Exceeded" in said and "run the job again in some minutes" in said


def test_certificate_that_nobody_vouches_for_is_called_one(team: Team) -> None:
    del team.environment["HTTPLIB2_CA_CERTS"]
    said = team.preflight(fails=True)
    assert "certificate is signed by no authority" in said and "HTTPLIB2_CA_CERTS" in said


def test_proxy_without_the_package_that_goes_through_it_is_refused(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    remote.check_installed("gdrive")
    monkeypatch.setitem(sys.modules, "socks", None)  # as if PySocks were not there
    with pytest.raises(UserError, match="https_proxy is set, and without the package PySocks"):
        remote.check_installed("gdrive")
    monkeypatch.delenv("https_proxy")
    remote.check_installed("gdrive")


KEY = {"type": "service_account", "client_email": "a@b", "client_id": "1", "private_key_id": "2"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "Not set: GDRIVE_SERVICE_ACCOUNT_FILE, or GDRIVE_CREDENTIALS_DATA"),
        ("hidden-word", "GDRIVE_CREDENTIALS_DATA is no JSON object"),
        ('["hidden-word"]', "GDRIVE_CREDENTIALS_DATA is no JSON object"),
        ("/builds/team/hidden-word", "GDRIVE_CREDENTIALS_DATA: holds the path of a file"),
        ('{\n"private_key": "hidden-word"}', "GDRIVE_CREDENTIALS_DATA: has a line break"),
        ('{"type": "authorized_user", "private_key": "hidden-word"}', "is not of type service_account"),
        (json.dumps(KEY | {"private_key_id": "hidden-word"}), "has no private_key"),
        (json.dumps(KEY | {"private_key": ""}), "has no private_key"),
    ],
)
def test_key_that_is_none_is_refused_by_name_and_not_shown(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    monkeypatch.setenv("DVC_REMOTE_URL", "gdrive://0A/x")
    monkeypatch.setenv("GDRIVE_CREDENTIALS_DATA", content)
    with pytest.raises(UserError, match=problem) as error:
        remote.configure(load_settings())
    assert "hidden-word" not in str(error.value)


def test_key_in_a_variable_works_as_one_in_a_file_does(team: Team) -> None:
    path = Path(team.environment.pop("GDRIVE_SERVICE_ACCOUNT_FILE"))
    told = team.preflight(GDRIVE_CREDENTIALS_DATA=json.dumps(json.loads(path.read_text())))
    assert "can be written to and read" in told
