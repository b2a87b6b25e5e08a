"""The emulated Drive behind a proxy: `with emulated_drive(folder) as (drive, environment)`, then any client in that environment.

The proxy answers CONNECT and ends TLS itself, with certificates of an authority of its own, so a client that is not
changed in any way talks to www.googleapis.com and oauth2.googleapis.com, and checks their certificates.
"""

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import policy
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.certificates import make_certificates
from tests.drive_emulator.drive import FIELDS, DriveError, GoogleDrive, TokenError

HOSTS = ("www.googleapis.com", "oauth2.googleapis.com")


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, drive: GoogleDrive, certificates: Path) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.drive = drive
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        self.refused: list[str] = []  # hosts that are not Google's

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none of our business."""


class Tunnel(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy
    host = ""  # the one connected to

    def do_CONNECT(self) -> None:
        host, _, port = self.path.rpartition(":")
        if host not in HOSTS or port != "443":
            self.server.refused.append(self.path)
            self.answer(502, b"no such host")
            return
        self.send_response(200, "Connection established")
        self.end_headers()
        self.wfile.flush()
        self.connection = self.request = self.server.context.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb", -1)
        self.wfile = self.connection.makefile("wb", 0)
        self.host = host
        self.close_connection = False

    def finish(self) -> None:
        super().finish()
        if self.host:  # the server closes the socket below this one alone
            self.connection.close()

    def do_GET(self) -> None:
        self.serve()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_GET

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        if self.headers.get("Host", "").removesuffix(":443") != self.host or not self.host:
            self.answer(400, b"a proxy answers CONNECT")
            return
        try:
            if self.host == "oauth2.googleapis.com":
                self.serve_token(url.path, body)
            else:
                self.serve_drive(url.path, dict(parse_qsl(url.query, keep_blank_values=True)), body)
        except DriveError as error:
            self.answer_json(error.body, error.status)
        except TokenError as error:
            self.answer_json(error.body, 400)

    def serve_token(self, path: str, body: bytes) -> None:
        if (self.command, path) != ("POST", "/token"):
            self.answer(404)
            return
        self.answer_json(self.server.drive.token(dict(parse_qsl(body.decode()))))

    def serve_drive(self, path: str, parameters: dict[str, str], body: bytes) -> None:
        drive = self.server.drive
        command = self.headers.get("X-HTTP-Method-Override", self.command)
        if command != self.command:  # of a query too long for an address
            parameters |= dict(parse_qsl(body.decode(), keep_blank_values=True))
        if path == "/upload/drive/v2/files":
            self.serve_upload(command, parameters, body)
            return
        match = re.fullmatch(r"/drive/v2/files(?:/([^/]+))?(/trash)?", path)
        file_id = unquote(match[1]) if match and match[1] else None
        route = (command, file_id is not None, bool(match and match[2]))
        method = {
            ("GET", False, False): "list",
            ("POST", False, False): "insert",
            ("GET", True, False): "get",
            ("DELETE", True, False): "delete",
            ("POST", True, True): "trash",
        }.get(route)
        if match is None or method is None:
            raise DriveError(501, "notEmulated", f"{command} {path} is not emulated.")
        email = drive.authorize(self.headers.get("Authorization"), method, parameters)
        if method == "list":
            self.answer_fields(drive.list_files(email, parameters), parameters)
        elif method == "insert":
            self.answer_fields(drive.insert(email, parsed(body), parameters), parameters)
        elif method == "get" and parameters.get("alt") == "media":
            self.answer_media(drive.download(email, str(file_id), parameters))
        elif method == "get":
            self.answer_fields(drive.get(email, str(file_id), parameters), parameters)
        elif method == "trash":
            self.answer_fields(drive.trash(email, str(file_id), parameters), parameters)
        else:
            drive.delete(email, str(file_id), parameters)
            self.answer(204)

    def serve_upload(self, command: str, parameters: dict[str, str], body: bytes) -> None:
        """In parts: POST gives an address, PUT there gives 308 until all is there. Or in one: multipart/related."""
        drive, kind = self.server.drive, parameters.get("uploadType")
        if command == "PUT" and "upload_id" in parameters:
            done = drive.upload_part(parameters["upload_id"], self.headers.get("Content-Range"), body)
            if isinstance(done, dict):
                self.answer_json(done)
            else:
                self.answer(308, b"", **({"Range": f"bytes=0-{done - 1}"} if done else {}))
            return
        if command != "POST":
            raise DriveError(501, "notEmulated", f"{command} of an upload is not emulated.")
        email = drive.authorize(self.headers.get("Authorization"), "insert", parameters)
        if kind == "resumable":
            size = self.headers.get("X-Upload-Content-Length")
            upload_id = drive.begin_upload(email, parsed(body), parameters, int(size) if size else None)
            location = f"https://{self.host}/upload/drive/v2/files?uploadType=resumable&upload_id={upload_id}"
            self.answer(200, b"", Location=location)
        elif kind == "multipart":
            head = f"Content-Type: {self.headers.get('Content-Type', '')}\r\n\r\n".encode()
            parts = list(BytesParser(policy=policy.HTTP).parsebytes(head + body).iter_parts())
            if len(parts) != 2:
                raise DriveError(400, "badRequest", "Malformed multipart body.")
            metadata, content = (part.get_payload(decode=True) for part in parts)
            self.answer_fields(drive.insert(email, parsed(metadata), parameters, content), parameters)
        else:
            raise DriveError(400, "badRequest", f"Invalid upload request: uploadType {kind}")

    def answer_fields(self, resource: dict[str, Any], parameters: dict[str, str]) -> None:
        """The fields that were asked for."""
        fields = parameters.get("fields", "*")
        if fields != "*":
            names = fields.split(",")
            for name in names:
                if name not in FIELDS:
                    raise DriveError(400, "invalidParameter", f"Invalid field selection {name}", at="fields")
            resource = {name: resource[name] for name in names if name in resource}
        self.answer_json(resource)

    def answer_media(self, content: bytes) -> None:
        """Whole, or the range that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.answer(200, content, "application/octet-stream")
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            self.answer(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
            return
        said = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], "application/octet-stream", **{"Content-Range": said})

    def answer_json(self, body: dict[str, Any], status: int = 200) -> None:
        self.answer(status, json.dumps(body).encode(), "application/json; charset=UTF-8")

    def answer(self, status: int, content: bytes = b"", kind: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def parsed(body: bytes) -> dict[str, Any]:
    """Raises DriveError: it is no JSON object."""
    try:
        found = json.loads(body or b"{}")
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise DriveError(400, "parseError", "Parse Error")


@contextmanager
def emulated_drive(folder: Path) -> Iterator[tuple[GoogleDrive, dict[str, str]]]:
    """An empty Drive, and the environment of a client that a company's proxy stands before."""
    certificates = make_certificates(folder / "certificates", *HOSTS)
    drive = GoogleDrive()
    with Proxy(drive, certificates) as proxy:
        threading.Thread(target=proxy.serve_forever, args=[0.02], daemon=True).start()
        yield drive, {
            "https_proxy": f"http://127.0.0.1:{proxy.server_port}",
            "HTTPLIB2_CA_CERTS": str(certificates / "root.pem"),
        }
        proxy.shutdown()
