"""Real servers for the kinds of DVC remotes: MinIO's protocol by moto, OpenSSH, WebDAV by wsgidav, plain HTTP."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.drive_emulator.server import emulated_drive
from tests.ports import free_port

Environment = dict[str, str]
PASSWORD = 'p,a#s"s %w0rd'  # what a configuration file might stumble over
TOKEN = PASSWORD.replace(" ", "")


@contextmanager
def server(command: list[str], port: int, log: Path) -> Iterator[None]:
    """The command, from when its port answers until the end of the block."""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=log.parent)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def local(folder: Path) -> Iterator[Environment]:
    yield {"DVC_REMOTE_URL": str(folder / "store")}


@contextmanager
def s3(folder: Path) -> Iterator[Environment]:
    port = free_port()
    key = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server(command, port, folder / "moto.log"):
        endpoint = f"http://127.0.0.1:{port}"
        make = "import boto3, sys; boto3.client('s3', endpoint_url=sys.argv[1]).create_bucket(Bucket='experiments')"
        subprocess.run([sys.executable, "-c", make, endpoint], check=True, env=os.environ | key)
        yield key | {"DVC_REMOTE_URL": "s3://experiments/store", "DVC_REMOTE_ENDPOINT_URL": endpoint}


@contextmanager
def ssh(folder: Path) -> Iterator[Environment]:
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(sshd).exists() or shutil.which("ssh-keygen") is None:
        pytest.skip("OpenSSH's sshd is missing (Debian: openssh-server)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it, as root
    port, keys = free_port(), folder / "keys"
    keys.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    shutil.copyfile(keys / "user.pub", keys / "authorized")
    host_key = (keys / "host.pub").read_text().split()[:2]
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(host_key)}\n")
    options = {
        "HostKey": keys / "host",
        "AuthorizedKeysFile": keys / "authorized",
        "PidFile": keys / "pid",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
        "ListenAddress": "127.0.0.1",
    }
    command = [sshd, "-D", "-e", "-f", "/dev/null", "-p", str(port)]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    with server(command, port, folder / "sshd.log"):
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        yield {
            "DVC_REMOTE_URL": f"ssh://{user}@127.0.0.1:{port}{folder}/store",
            "DVC_REMOTE_KEY_FILE": str(keys / "user"),
            "DVC_REMOTE_KNOWN_HOSTS_FILE": str(keys / "known_hosts"),
        }


@contextmanager
def webdav(folder: Path) -> Iterator[Environment]:
    port, root = free_port(), folder / "dav"
    (root / "store").mkdir(parents=True)
    config = {
        "host": "127.0.0.1",
        "port": port,
        "server": "cheroot",
        "provider_mapping": {"/": str(root)},
        "simple_dc": {"user_mapping": {"*": {"team": {"password": PASSWORD}}}},
        "verbose": 1,
    }
    (folder / "dav.json").write_text(json.dumps(config))
    program = "from wsgidav.server.server_cli import run; run()"
    command = [sys.executable, "-c", program, "--config", str(folder / "dav.json")]
    with server(command, port, folder / "dav.log"):
        yield {
            "DVC_REMOTE_URL": f"webdav://127.0.0.1:{port}/store",
            "DVC_REMOTE_USER": "team",
            "DVC_REMOTE_PASSWORD": PASSWORD,
        }


@contextmanager
def http(folder: Path) -> Iterator[Environment]:
    """Files under a path, by GET, HEAD and PUT, for those who know the token: what nginx or an artifact store is."""
    root = folder / "web"

    class Files(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, content: bytes = b"", length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def allowed(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self.answer(401)
            return False

        def do_GET(self) -> None:
            path = root / self.path.lstrip("/")
            if self.allowed():
                self.answer(200, path.read_bytes()) if path.is_file() else self.answer(404)

        def do_HEAD(self) -> None:
            path = root / self.path.lstrip("/")
            if self.allowed():
                self.answer(200, length=path.stat().st_size) if path.is_file() else self.answer(404)

        def do_PUT(self) -> None:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.allowed():
                path = root / self.path.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                self.answer(201)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield {
            "DVC_REMOTE_URL": f"http://127.0.0.1:{web.server_port}/store",
            "DVC_REMOTE_TOKEN": TOKEN,
        }
        web.shutdown()


@contextmanager
def gdrive(folder: Path) -> Iterator[Environment]:
    """An emulated Shared Drive behind a company's proxy; neither the folder store nor the one above it is there.

    Afterwards its files lie below drive, for the test to judge: at most one of each name.
    """
    with emulated_drive(folder) as (google, environment):
        drive = google.shared_drive(runner="fileOrganizer")
        (folder / "key.json").write_text(json.dumps(google.service_account("runner")))
        yield environment | {
            "DVC_REMOTE_URL": f"gdrive://{drive}/team/store",
            "GDRIVE_SERVICE_ACCOUNT_FILE": str(folder / "key.json"),
        }
        for path, contents in google.tree(drive).items():
            (content,) = contents
            if content is not None:
                (folder / "drive" / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / "drive" / path).write_bytes(content)


SERVERS: dict[str, Callable[[Path], "contextmanager[Environment]"]] = {  # type: ignore[type-arg]
    "local": local,
    "s3": s3,
    "ssh": ssh,
    "webdav": webdav,
    "http": http,
    "gdrive": gdrive,
}
