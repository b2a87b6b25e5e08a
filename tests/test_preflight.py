"""The preflight: which variable is missing, which right is refused, and that it ends in time."""

import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ml.errors import UserError
from ml.release import preflight, remote
from ml.remotes import Place
from ml.settings import load_settings
from tests.certificates import make_certificates
from tests.remote_servers import SERVERS


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without a remote."""
    for name in os.environ:
        if name.startswith(("DVC_", "AWS_", "CI_", "GDRIVE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    folder = tmp_path / "checkout"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    monkeypatch.chdir(folder)
    return folder


def test_object_is_written_read_and_gone_afterwards(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_REMOTE_URL", str(tmp_path / "store"))
    monkeypatch.setenv("CI_MERGE_REQUEST_IID", "7")
    said = preflight.check(load_settings())
    assert [line.partition(" (")[0] for line in said] == ["main", "merge-request"]
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    assert (tmp_path / "store/merge-requests/7").is_dir()


def test_missing_variable_is_named_before_anything_is_tried(checkout: Path) -> None:
    with pytest.raises(UserError, match="DVC_REMOTE_URL is not set"):
        preflight.check(load_settings())


@pytest.mark.parametrize(
    ("kind", "given", "missing"),
    [
        ("s3", ["AWS_ACCESS_KEY_ID"], "AWS_SECRET_ACCESS_KEY"),
        ("s3", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], None),
        ("gdrive", [], "GDRIVE_SERVICE_ACCOUNT_FILE, or GDRIVE_CREDENTIALS_DATA"),
        ("gdrive", ["GDRIVE_CREDENTIALS_DATA"], None),
        ("azure", ["AZURE_STORAGE_ACCOUNT"], "AZURE_STORAGE_KEY"),
        ("gs", [], "GOOGLE_APPLICATION_CREDENTIALS"),
        ("local", [], None),
    ],
)
def test_credential_that_is_missing_for_a_kind_is_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, kind: str, given: list[str], missing: str | None
) -> None:
    for name in given:
        monkeypatch.setenv(name, "x")
    assert remote.missing_credentials(kind) == missing


def test_s3_names_the_variable_that_is_missing_and_the_bucket_that_is(checkout: Path, tmp_path: Path) -> None:
    with SERVERS["s3"](tmp_path) as environment:
        half = {name: value for name, value in environment.items() if name != "AWS_SECRET_ACCESS_KEY"}
        done = run_preflight(**half)
        assert done.returncode == 1 and "Not set: AWS_SECRET_ACCESS_KEY" in done.stderr
        done = run_preflight(**environment | {"DVC_REMOTE_URL": "s3://No_Such_Bucket/x"})
        assert done.returncode == 1 and "may not write to remote main" in done.stderr
    assert "Traceback" not in done.stderr


def run_preflight(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ml.release.preflight", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("right", ["write to", "read", "list", "delete from"])
def test_each_right_that_is_refused_is_named(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str
) -> None:
    """A folder refuses root nothing, so the refusal is put into the place; servers refuse in tests/test_remote.py."""
    method = {"write to": "write", "read": "read", "list": "names", "delete from": "remove"}[right]
    monkeypatch.setenv("DVC_REMOTE_URL", str(tmp_path / "store"))

    def refused(place: Place, *arguments: object) -> None:
        raise place.error("do that", PermissionError("Access denied"))

    monkeypatch.setattr(Place, method, refused)
    with pytest.raises(
        UserError, match=rf"may not {right} remote main .*PermissionError: Access denied\.\nGive the .* right"
    ):
        preflight.check(load_settings())


def test_bytes_that_come_back_otherwise_are_refused(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_REMOTE_URL", str(tmp_path / "store"))
    monkeypatch.setattr(Place, "read", lambda place, path: b"<html>Please log in</html>")
    with pytest.raises(UserError, match="other bytes came back"):
        preflight.check(load_settings())


@pytest.mark.parametrize(
    ("url", "endpoint", "variable"),
    [
        ("https://HOST/store", "", "SSL_CERT_FILE"),
        ("webdavs://HOST/store", "", "SSL_CERT_FILE"),
        ("s3://bucket/store", "https://HOST", "AWS_CA_BUNDLE"),
    ],
)
def test_certificate_of_an_unknown_authority_is_called_one_with_the_variable_that_helps(
    checkout: Path, tmp_path: Path, url: str, endpoint: str, variable: str
) -> None:
    certificates = make_certificates(tmp_path / "certificates", "127.0.0.1")

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_HEAD = do_PUT = do_DELETE = do_OPTIONS = do_PROPFIND = do_MKCOL = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *client: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        environment = {
            "DVC_REMOTE_URL": url.replace("HOST", host),
            "DVC_REMOTE_ENDPOINT_URL": endpoint.replace("HOST", host),
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        done = run_preflight(**environment)
        assert done.returncode == 1 and "certificate is signed by no authority" in done.stderr, done.stderr
        assert f"a variable of type *File* named {variable}" in done.stderr and "Traceback" not in done.stderr
        done = run_preflight(**environment, **{variable: str(certificates / "root.pem")})
        assert "certificate" not in done.stderr  # the server itself refuses
        server.shutdown()


def test_host_that_never_answers_ends_the_command_in_time(checkout: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/store"
        start = time.monotonic()
        done = run_preflight("--timeout", "3", DVC_REMOTE_URL=url)
    assert done.returncode == 1
    assert time.monotonic() - start < 60  # most of it is Python's own start on a busy machine
    assert "did not answer within 3 seconds" in done.stderr
