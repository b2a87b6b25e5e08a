"""A web server in front of the emulated GitLab: over TLS with a certificate of a private CA, and below a path."""

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests

DROPPED = {"content-length", "transfer-encoding", "connection", "content-encoding", "host", "accept-encoding"}


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
