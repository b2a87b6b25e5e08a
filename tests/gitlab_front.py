"""A web server in front of the emulated GitLab: over TLS with a certificate of a private CA, and below a path."""

import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests

DROPPED = {"content-length", "transfer-encoding", "connection", "content-encoding", "host", "accept-encoding"}


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def make_certificates(folder: Path) -> Path:
    """A root, an authority below it, and a certificate of 127.0.0.1: root.pem, ca.pem, server.pem with its key."""
    folder.mkdir(parents=True, exist_ok=True)
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    openssl(
        folder,
        "req",
        "-x509",
        *new_key,
        "-subj",
        "/CN=root",
        "-keyout",
        "root.key",
        "-out",
        "root.pem",
        *authority,
    )
    signed = ("-CA", "root.pem", "-CAkey", "root.key")
    openssl(
        folder,
        "req",
        "-x509",
        *new_key,
        "-subj",
        "/CN=ca",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        *signed,
        *authority,
    )
    alternative = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key")
    openssl(
        folder,
        "req",
        "-x509",
        *new_key,
        "-subj",
        "/CN=gitlab",
        "-keyout",
        "server.key",
        "-out",
        "leaf.pem",
        *signed,
        *alternative,
    )
    (folder / "server.pem").write_text(
        "".join((folder / name).read_text() for name in ("leaf.pem", "ca.pem"))
    )
    return folder


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that does not trust the certificate ends the connection."""


class Front:
    """Serves what lies at `behind` at `url`, which ends in `path`; addresses in the answers become its own."""

    def __init__(self, behind: str, path: str = "", certificates: Path | None = None) -> None:
        self.behind, self.path = behind, path
        self.asked: list[str] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            def forward(self) -> None:
                front.asked.append(self.path)
                status, headers, content = front.answer(
                    self.command,
                    self.path,
                    dict(self.headers),
                    self.rfile.read(int(self.headers.get("Content-Length") or 0)),
                )
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = forward

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        if certificates is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
            # the handshake takes place in the connection's own thread, so that a refusal stops nobody else
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.root = f"{'https' if certificates else 'http'}://127.0.0.1:{self.server.server_port}"
        self.url = self.root + path

    def answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if not path.startswith(f"{self.path}/"):
            return 404, {"Content-Type": "text/html"}, b"this is another application of this host"
        kept = {name: value for name, value in headers.items() if name.lower() not in DROPPED}
        found = requests.request(
            method, self.behind + path.removeprefix(self.path), headers=kept, data=body, timeout=30
        )
        back = {name: value for name, value in found.headers.items() if name.lower() not in DROPPED}
        moved = {name: value.replace(self.behind, self.url) for name, value in back.items()}
        return found.status_code, moved, found.content.replace(self.behind.encode(), self.url.encode())

    def __enter__(self) -> "Front":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
