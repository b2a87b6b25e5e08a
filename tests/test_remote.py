"""The job's DVC remote: configured from the environment, and pushed to and pulled from over real servers."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo

from ml import remotes
from ml.errors import UserError
from ml.lock import read_lock
from ml.release import remote
from ml.settings import CREDENTIAL_FILES, CREDENTIALS, Settings, load_settings
from tests.dvc_project import Project, make_project
from tests.conftest import ROOT
from tests.remote_servers import SERVERS


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose stages have run; nothing is pushed."""
    project = make_project(tmp_path_factory.mktemp("remote") / "project")
    project.run("dvc", "repro")
    project.commit("lock")
    return project


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("DVC_", "AWS_", "CI_", "GDRIVE_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")


# Where the server keeps its files, below its folder; moto keeps them in memory.
STORES = {
    "local": "store",
    "ssh": "store",
    "webdav": "dav/store",
    "http": "web/store",
    "gdrive": "drive/team/store",
}


def stored(place: Path) -> set[str]:
    """The MD5s of the objects there, each of which has the bytes that its name says."""
    objects = {path.parent.name + path.name: path for path in place.glob("files/md5/*/*")}
    for md5, path in objects.items():
        assert hashlib.md5(path.read_bytes()).hexdigest() == md5.removesuffix(".dir"), path
    return set(objects)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
def test_results_are_pushed_judged_and_restored_over(finished: Project, kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path) as environment:
        here = Project(ROOT, environment)
        said = here.run(sys.executable, "-m", "tests.remote_journey", str(finished.folder), str(tmp_path))
    assert [line for line in said.splitlines() if line.startswith("journey: ")] == [
        "journey: pushed: 13",  # files and folders, each once
        "journey: pushed again: 0",
        "journey: whole on the remote: 13",
        "journey: faults of main's lock: []",
        "journey: main: ['restored main', 'restored main', 'restored main']",
        "journey: main's changes: ",
        "journey: merge request: ['restored main', 'restored main', 'ran None']",
        "journey: faults of its lock: []",
        "journey: its next pipeline: ['restored main', 'restored main', 'restored merge-request']",
        "journey: release: ['restored main', 'restored main', 'restored merge-request']",
        "journey: release pushed: 1",
        "journey: whole on the remote: 13",
    ]
    main, request, again, release = (
        Project(tmp_path / name) for name in ("main", "request", "again", "release")
    )
    assert main.lock == finished.lock != request.lock == again.lock == release.lock
    for restored, origin in ((main, finished), (again, request), (release, request)):
        for path in (
            "artifacts/train.txt",
            "artifacts/parts/3.txt",
            "artifacts/model.onnx",
            "reports/metrics.json",
        ):
            assert (restored.folder / path).read_bytes() == (origin.folder / path).read_bytes()
    if kind in STORES:
        store = tmp_path / STORES[kind]
        outs = set(read_lock(finished.folder / "dvc.lock").outs.values())
        changed = set(read_lock(request.folder / "dvc.lock").outs.values()) - outs
        assert len(stored(store)) == 14 and outs | changed < stored(store)
        assert (store / "dvc.lock").read_text() == release.lock
        assert len(changed) == 1 and stored(store / "merge-requests/7") == changed
        assert (store / "merge-requests/7/dvc.lock").read_text() == request.lock


@pytest.mark.parametrize("kind", ["ssh", "webdav", "http"])
def test_wrong_credential_is_refused_by(finished: Project, kind: str, tmp_path: Path) -> None:
    with SERVERS[kind](tmp_path) as environment:
        wrong = {
            "ssh": {"DVC_REMOTE_KEY_FILE": str(tmp_path / "keys/host")},
            "webdav": {"DVC_REMOTE_PASSWORD": "wrong-secret"},
            "http": {"DVC_REMOTE_TOKEN": "wrong-secret"},
        }[kind]
        clone = finished.clone(tmp_path / "clone")
        output = clone.ml("preflight", fails=True, **(environment | wrong))
    assert "This job may not" in output and "remote main" in output and "wrong-secret" not in output
    assert "Traceback" not in output


def test_host_with_another_key_than_the_known_one_is_refused(finished: Project, tmp_path: Path) -> None:
    with SERVERS["ssh"](tmp_path) as environment:
        known = tmp_path / "keys/known_hosts"
        host, kind, _ = known.read_text().split()
        known.write_text(f"{host} {kind} {(tmp_path / 'keys/user.pub').read_text().split()[1]}\n")
        output = finished.clone(tmp_path / "clone").ml("preflight", fails=True, **environment)
    assert "Host key is not trusted" in output and "Traceback" not in output


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> Path:
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, dict[str, str]]:
    """The sections that `configure` writes, read back by DVC."""
    from dvc.config import Config

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    remote.configure(load_settings())
    found: dict[str, dict[str, str]] = Config.load_file(str(remote.CONFIG))["remote"]
    return found


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "DVC_REMOTE_URL is not set"),
        ("s3:/bucket", "no host, bucket"),
        ("s3://", "no host, bucket"),
        ("relative/folder", "absolute path"),
        ("ftp://host/x", "ftp://, which is no remote that DVC knows"),
        ("ssh://host", "has no path"),
        ("https://host/x?token=hidden-word", "has a query"),
        ("https://user@host/x", "DVC_REMOTE_USER"),
        ("ssh://user:hidden-word@host/x", "holds a password"),
        ("https://host:hidden-word/x", "host or port makes no sense"),
        ("s3://bucket/../x", "`..` in its path"),
        ("s3://bucket/a b", "has a blank in it"),
        ("gs://bucket/x", r"package dvc-gs is missing. Run `pip install -c constraints.txt '\.\[gs\]'`"),
        ("azure://box/x", "package dvc-azure is missing"),
    ],
)
def test_bad_url_is_an_error_that_names_the_remedy_and_hides_secrets(
    empty: Path, monkeypatch: pytest.MonkeyPatch, url: str, problem: str
) -> None:
    monkeypatch.setenv("DVC_REMOTE_URL", url)
    for package in ("dvc_gs", "dvc_azure"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=problem) as error:
        remote.configure(load_settings())
    assert "hidden-word" not in str(error.value)
    assert not remote.CONFIG.exists()


@pytest.mark.parametrize(
    "name", ["DVC_REMOTE_URL", "DVC_MERGE_REQUEST_REMOTE_URL", "DVC_REMOTE_ENDPOINT_URL"]
)
@pytest.mark.parametrize("wrong", [" {}", "{} ", "{}\n", "{}\u200b", "\ufeff{}", "{}\r\n", "{}/a\tb"])
@pytest.mark.parametrize("address", ["/srv/hidden-word", "https://hidden-word/x"])
def test_address_with_a_blank_around_it_or_an_invisible_character_makes_no_other_folder(
    empty: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str, address: str
) -> None:
    monkeypatch.setenv("DVC_REMOTE_URL", "/srv/dvc")
    monkeypatch.setenv(name, wrong.format(address))
    with pytest.raises(UserError, match=f"{name}: ") as error:
        remote.configure(load_settings(), merge_request=7)
    assert "hidden-word" not in str(error.value) and not remote.CONFIG.exists()


def test_every_variable_of_a_kind_is_checked_for_what_cannot_be_seen() -> None:
    names = {name for kind in remote.KINDS.values() for names in kind.credentials for name in names}
    known = {name.upper() for name in Settings.model_fields} | {*CREDENTIALS, *CREDENTIAL_FILES}
    assert names <= known


def test_main_is_configured_with_verification_and_a_merge_request_has_a_prefix_of_its_own(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = configured(
        monkeypatch,
        DVC_REMOTE_URL="s3://bucket/x/",
        DVC_REMOTE_ENDPOINT_URL="http://127.0.0.1:9000",
        CI_MERGE_REQUEST_IID="7",
    )
    same = {"verify": "true", "endpointurl": "http://127.0.0.1:9000"}
    assert found == {
        "main": {"url": "s3://bucket/x"} | same,
        "merge-request": {"url": "s3://bucket/x/merge-requests/7"} | same,
    }
    monkeypatch.delenv("CI_MERGE_REQUEST_IID")
    assert list(configured(monkeypatch)) == ["main"]  # nothing of the merge request is left
    monkeypatch.setenv("DVC_MERGE_REQUEST_REMOTE_URL", "s3://other/y")
    monkeypatch.setenv("CI_MERGE_REQUEST_IID", "8")
    assert configured(monkeypatch)["merge-request"]["url"] == "s3://other/y/8"


def test_google_drive_is_configured_for_a_service_account(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = empty / "key.json"
    names = ("client_email", "client_id", "private_key", "private_key_id")
    key.write_text(json.dumps(dict.fromkeys(names, "x") | {"type": "service_account"}))
    found = configured(
        monkeypatch, DVC_REMOTE_URL="gdrive://0Afolder/dvc", GDRIVE_SERVICE_ACCOUNT_FILE=str(key)
    )
    assert found["main"] == {
        "url": "gdrive://0Afolder/dvc",
        "verify": "true",
        "gdrive_use_service_account": "true",
        "gdrive_trash_only": "true",
        "gdrive_service_account_json_file_path": str(key),
    }
    monkeypatch.setenv("GDRIVE_SERVICE_ACCOUNT_FILE", str(empty / "absent.json"))
    with pytest.raises(UserError, match="GDRIVE_SERVICE_ACCOUNT_FILE names no file.*type \\*File\\*"):
        remote.configure(load_settings())


@pytest.mark.parametrize("kind", ["http://host/x", "webdavs://host/x"])
def test_password_is_kept_in_a_file_that_nobody_else_reads(
    empty: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    password = "a,b#c\"d%e 'f="
    found = configured(monkeypatch, DVC_REMOTE_URL=kind, DVC_REMOTE_USER="me", DVC_REMOTE_PASSWORD=password)
    assert (found["main"]["user"], found["main"]["password"]) == ("me", password)
    assert stat.S_IMODE(remote.CONFIG.stat().st_mode) == 0o600


def test_other_settings_of_the_local_configuration_stay_and_a_torn_one_is_written_anew(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.CONFIG.write_text("[cache]\n    type = copy\n['remote \"mine\"']\n    url = /mine\n")
    assert set(configured(monkeypatch, DVC_REMOTE_URL="/srv/dvc")) == {"mine", "main"}
    assert "type = copy" in remote.CONFIG.read_text()
    remote.CONFIG.write_text("[core\nremote")
    assert configured(monkeypatch)["main"]["url"] == "/srv/dvc"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # aiohttp's open connection
def test_remote_that_refuses_is_told_from_one_that_lacks_the_file(finished: Project, tmp_path: Path) -> None:
    with Repo(str(finished.folder), config={"remote": {"x": {"url": "http://127.0.0.1:9"}}}) as repo:
        nobody = remotes.open_place(repo, "x")
        with pytest.raises(remotes.RemoteError, match="Remote x .*does not read"):
            nobody.read("a")
    with Repo(str(finished.folder), config={"remote": {"x": {"url": str(tmp_path / "new")}}}) as repo:
        assert remotes.open_place(repo, "x").read("a") is None


@pytest.mark.parametrize(
    "section",
    [
        "['remote \"main\"']\nconfigpath = ../aws.cfg\nprofile = any\n",
        "['remote \"Main\"']\nconfigpath = ../aws.cfg\nprofile = any\n",
        "['remote \"merge-request\"']\nendpointurl = http://127.0.0.1:9\n",
    ],
)
def test_committed_options_of_a_jobs_remote_are_refused_as_they_may_run_a_command(
    empty: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    (empty / "aws.cfg").write_text("[profile any]\ncredential_process = touch ran\n")
    committed = empty / ".dvc/config"
    committed.write_text(f"[core]\nautostage = true\n['remote \"team\"']\nurl = s3://other\n{section}")
    with pytest.raises(
        UserError, match=r"\.dvc/config defines a remote .*(main|merge-request) has .*another name"
    ):
        configured(monkeypatch, DVC_REMOTE_URL="s3://bucket/dvc")
    committed.write_text(committed.read_text().removesuffix(section))
    assert set(configured(monkeypatch, DVC_REMOTE_URL="s3://bucket/dvc")) == {"main"}


def test_committed_local_configuration_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty / ".dvc/config.local").write_text("[core]\n")
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "add", "--force", ".dvc/config.local"], check=True)
    with pytest.raises(UserError, match=r"\.dvc/config\.local is committed.*git rm --cached"):
        configured(monkeypatch, DVC_REMOTE_URL="/srv/dvc")
