"""The emulated Drive refuses what Google refuses, by Google's words; a plain HTTP client asks, through the proxy and TLS."""

import base64
import hashlib
import http.client
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from tests.drive_emulator.drive import FOLDER, JWT_BEARER, PIECE, TOKEN_URI, GoogleDrive
from tests.drive_emulator.server import emulated_drive

SCOPE = "https://www.googleapis.com/auth/drive"
API = "/drive/v2/files"
EVERYWHERE = {"supportsAllDrives": "true"}


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.content)
        return found

    @property
    def reason(self) -> str:
        return f"{self.status} {self.json['error']['errors'][0]['reason']}"


@dataclass
class Client:
    environment: dict[str, str]
    key: dict[str, str] = field(default_factory=dict)
    token: str = ""

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        host: str = "www.googleapis.com",
        headers: dict[str, str] | None = None,
        **parameters: str,
    ) -> Answer:
        proxy = urlsplit(self.environment["https_proxy"])
        context = ssl.create_default_context(cafile=self.environment["HTTPLIB2_CA_CERTS"])
        connection = http.client.HTTPSConnection(str(proxy.hostname), proxy.port, timeout=30, context=context)
        connection.set_tunnel(host, 443)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}"} | (headers or {})
        address = f"{path}?{urlencode(parameters)}" if parameters else path
        try:
            connection.request(method, address, sent, headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def assertion(self, **changed: object) -> str:
        now = int(time.time())
        claims = {
            "iss": self.key["client_email"],
            "scope": SCOPE,
            "aud": TOKEN_URI,
            "iat": now,
            "exp": now + 3600,
        } | changed
        head = {"alg": "RS256", "typ": "JWT", "kid": self.key["private_key_id"]}
        signed = f"{encoded(json.dumps(head).encode())}.{encoded(json.dumps(claims).encode())}"
        private = serialization.load_pem_private_key(self.key["private_key"].encode(), None)
        signature = private.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{encoded(signature)}"

    def sign_in(self, assertion: str) -> Answer:
        form = urlencode({"grant_type": JWT_BEARER, "assertion": assertion}).encode()
        answer = self.ask("POST", "/token", form, host="oauth2.googleapis.com")
        self.token = answer.json.get("access_token", "")
        return answer

    def list_files(self, q: str, **parameters: str) -> Answer:
        return self.ask("GET", API, q=q, **parameters)


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@pytest.fixture
def google(tmp_path: Path) -> Iterator[tuple[GoogleDrive, Client]]:
    """A Drive, and the client of an account that has signed in."""
    with emulated_drive(tmp_path) as (drive, environment):
        client = Client(environment, drive.service_account("runner"))
        assert client.sign_in(client.assertion()).status == 200
        yield drive, client


Google = tuple[GoogleDrive, Client]


def in_drive(drive: str) -> dict[str, str]:
    return EVERYWHERE | {"corpora": "drive", "driveId": drive, "includeItemsFromAllDrives": "true"}


def test_host_that_is_not_googles_and_a_certificate_that_is_not_trusted_are_refused(google: Google) -> None:
    drive, client = google
    with pytest.raises(OSError, match="502"):
        client.ask("GET", "/", host="example.com")
    client.environment["HTTPLIB2_CA_CERTS"] = str(ssl.get_default_verify_paths().cafile)
    with pytest.raises(ssl.SSLCertVerificationError):
        client.ask("GET", API)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"iss": "nobody@team.iam.gserviceaccount.com"}, "account not found"),
        ({"aud": "https://example.com/token"}, "audience"),
        ({"iat": 0, "exp": 3600}, "short-lived"),
        ({"exp": int(time.time()) + 10**6}, "short-lived"),
        ({"scope": "https://www.googleapis.com/auth/drives"}, "scope"),
        ({"scope": ""}, "scope"),
    ],
)
def test_token_is_refused_for_wrong_claims(google: Google, changed: dict[str, object], said: str) -> None:
    _, client = google
    answer = client.sign_in(client.assertion(**changed))
    assert answer.status == 400 and said in answer.json["error_description"]


def test_token_is_refused_for_a_signature_by_another_key_and_after_the_key_is_deleted(google: Google) -> None:
    drive, client = google
    head, claims, _ = client.assertion().split(".")
    foreign = Client(
        client.environment, drive.service_account("other") | {"client_email": client.key["client_email"]}
    )
    for wrong in (f"{head}.{claims}.{encoded(b'x' * 256)}", foreign.assertion()):
        assert client.sign_in(wrong).json["error_description"] == "Invalid JWT Signature."
    drive.accounts[client.key["client_email"]].clear()
    assert client.sign_in(client.assertion()).json["error"] == "invalid_grant"


def test_request_is_refused_without_a_token_with_an_old_one_and_without_the_scope(google: Google) -> None:
    drive, client = google
    drive.token_seconds = 0
    client.sign_in(client.assertion())
    assert client.ask("GET", API).reason == "401 authError"
    assert client.ask("GET", API, headers={"Authorization": "Bearer x"}).reason == "401 authError"
    drive.token_seconds = 3600
    client.sign_in(client.assertion(scope="https://www.googleapis.com/auth/drive.readonly"))
    assert client.ask("GET", API).status == 200
    assert client.ask("POST", API, {"title": "x", "mimeType": FOLDER}).reason == "403 insufficientPermissions"


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"page": "2"}, "400 badRequest"),
        ({"supportsAllDrives": "yes"}, "400 invalidParameter"),
        ({"maxResults": "1001"}, "400 invalidParameter"),
        ({"maxResults": "many"}, "400 invalidParameter"),
        ({"projection": "ALL"}, "400 invalidParameter"),
        ({"corpora": "drive"}, "400 invalid"),
        ({"corpora": "user"}, "400 invalid"),  # version 3's
        ({"driveId": "DRIVE"}, "400 invalid"),
        ({"corpora": "drive", "driveId": "DRIVE"}, "400 invalid"),
        ({"pageToken": "x"}, "400 invalid"),
        ({"q": "name = 'x'"}, "400 invalid"),  # version 3's
        ({"q": "title = 'x"}, "400 invalid"),
        ({"q": "title = 'x' trashed = false"}, "400 invalid"),
        ({"q": "('DRIVE' in parents"}, "400 invalid"),
        ({"q": "'nowhere' in parents"}, "404 notFound"),
        ({"q": "'DRIVE' in parents"}, "404 notFound"),  # of a Shared Drive, without supportsAllDrives
    ],
)
def test_list_is_refused_for(google: Google, parameters: dict[str, str], reason: str) -> None:
    drive, client = google
    shared = drive.shared_drive(runner="writer")
    given = {name: value.replace("DRIVE", shared) for name, value in parameters.items()}
    assert client.ask("GET", API, **given).reason == reason


def test_list_finds_by_title_parent_and_trash_in_pages(google: Google) -> None:
    drive, client = google
    shared = drive.shared_drive(runner="fileOrganizer")
    folder = drive.add("it's", [shared]).id
    files = [drive.add(f"{number}", [folder], b"x").id for number in range(5)]
    trashed = drive.add("old", [folder], b"x")
    trashed.put_in_trash = True
    q = f"'{folder}' in parents and trashed=false"
    everything = in_drive(shared)
    first = client.list_files(q, maxResults="3", **everything).json
    rest = client.list_files(q, maxResults="3", pageToken=first["nextPageToken"], **everything).json
    assert {item["id"] for item in first["items"] + rest["items"]} == set(files)
    assert len(first["items"]) == 3 and "nextPageToken" not in rest
    other = client.list_files("trashed=true", pageToken=first["nextPageToken"], **everything)
    assert other.reason == "400 invalid"  # a page belongs to its query
    found = client.list_files(f"title='IT\\'S' and ('{shared}' in parents)", **everything).json
    assert [item["id"] for item in found["items"]] == [folder]
    assert client.list_files(q).reason == "404 notFound"
    assert client.list_files("trashed=false").json["items"] == []  # of My Drive
    stranger = Client(client.environment, drive.service_account("stranger"))
    stranger.sign_in(stranger.assertion())
    assert stranger.list_files(q, **everything).reason == "403 teamDriveMembershipRequired"


def test_file_of_a_shared_drive_is_found_with_supports_all_drives_alone(google: Google) -> None:
    drive, client = google
    shared = drive.shared_drive(runner="reader")
    file = drive.add("x", [shared], b"content").id
    assert client.ask("GET", f"{API}/{file}").reason == "404 notFound"
    assert client.ask("GET", f"{API}/{file}", fields="driveId,fileSize", **EVERYWHERE).json == {
        "driveId": shared,
        "fileSize": "7",
    }
    assert client.ask("GET", f"{API}/{file}", fields="size", **EVERYWHERE).reason == "400 invalidParameter"
    part = client.ask("GET", f"{API}/{file}", alt="media", headers={"Range": "bytes=2-100"})
    assert (part.status, part.content, part.headers["Content-Range"]) == (206, b"ntent", "bytes 2-6/7")
    assert client.ask("GET", f"{API}/{shared}", alt="media").reason == "403 fileNotDownloadable"
    assert client.ask("PATCH", f"{API}/{file}", {}).reason == "501 notEmulated"


@pytest.mark.parametrize(
    ("role", "may"),
    [
        ("reader", []),
        ("commenter", []),
        ("writer", ["insert"]),
        ("fileOrganizer", ["insert", "trash"]),
        ("organizer", ["insert", "trash", "delete"]),
    ],
)
def test_member_of_a_shared_drive_may_do_what_its_role_says(
    google: Google, role: str, may: list[str]
) -> None:
    drive, client = google
    shared = drive.shared_drive(runner=role)
    file = drive.add("x", [shared], b"x").id
    answers = {
        "insert": client.ask("POST", API, {"title": "y", "parents": [{"id": shared}]}, **EVERYWHERE),
        "trash": client.ask("POST", f"{API}/{file}/trash", **EVERYWHERE),
        "delete": client.ask("DELETE", f"{API}/{file}", **EVERYWHERE),
    }
    assert [name for name, answer in answers.items() if answer.status < 300] == may
    refused = {answer.reason for answer in answers.values() if answer.status >= 300}
    assert refused <= {"403 insufficientFilePermissions"}


def test_upload_in_parts_continues_where_drive_says_and_unknown_parents_are_refused_first(
    google: Google,
) -> None:
    drive, client = google
    shared = drive.shared_drive(runner="writer")
    content = bytes(range(256)) * 3000  # 750 KiB
    metadata = {"title": "big", "parents": [{"id": shared}]}
    begin = {"uploadType": "resumable"} | EVERYWHERE
    path = "/upload/drive/v2/files"
    assert client.ask("POST", path, {"parents": [{"id": "nowhere"}]}, **begin).reason == "404 notFound"
    assert client.ask("POST", path, metadata | {"name": "big"}, **begin).reason == "400 badRequest"
    assert client.ask("POST", path, metadata | {"md5Checksum": "0"}, **begin).reason == "403 fieldNotWritable"
    where = urlsplit(client.ask("POST", path, metadata, **begin).headers["Location"])
    session = f"{where.path}?{where.query}"

    def put(first: int, last: int, part: bytes) -> Answer:
        return client.ask(
            "PUT", session, part, headers={"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        )

    assert put(0, 999, content[:1000]).reason == "400 badRequest"  # not the last, and no multiple
    half = put(0, PIECE - 1, content[:PIECE])
    assert (half.status, half.headers["Range"]) == (308, f"bytes=0-{PIECE - 1}")
    assert put(0, PIECE - 1, content[:PIECE]).reason == "400 badRequest"  # it is there already
    status = client.ask("PUT", session, headers={"Content-Range": f"bytes */{len(content)}"})
    assert (status.status, status.headers["Range"]) == (308, f"bytes=0-{PIECE - 1}")
    done = put(PIECE, len(content) - 1, content[PIECE:])
    assert done.json["md5Checksum"] == hashlib.md5(content).hexdigest()
    assert put(0, len(content) - 1, content).reason == "404 notFound"  # the session is over


def test_upload_in_one_request_and_room_of_a_service_account(google: Google) -> None:
    drive, client = google
    shared = drive.shared_drive(runner="writer")
    mine = drive.my_drive_folder("mine", "someone@example.com", runner="writer")
    headers = {"Content-Type": "multipart/related; boundary=x"}

    def upload(parent: str) -> Answer:
        metadata = json.dumps({"title": "a", "parents": [{"id": parent}]})
        body = (
            f"--x\r\nContent-Type: application/json\r\n\r\n{metadata}\r\n"
            "--x\r\nContent-Type: application/octet-stream\r\n\r\nhello\r\n--x--\r\n"
        )
        parameters = {"uploadType": "multipart"} | EVERYWHERE
        return client.ask("POST", "/upload/drive/v2/files", body.encode(), headers=headers, **parameters)

    assert upload(shared).json["fileSize"] == "5"
    assert drive.tree(shared) == {"a": [b"hello"]}
    assert upload(mine).reason == "403 storageQuotaExceeded"
    assert (
        client.ask("POST", API, {"title": "f", "mimeType": FOLDER, "parents": [{"id": mine}]}).status == 200
    )
    parents = [{"id": shared}, {"id": mine}]
    two = client.ask("POST", API, {"title": "a", "mimeType": FOLDER, "parents": parents}, **EVERYWHERE)
    assert two.reason == "403 multipleParentsInsertProhibited"


def test_folder_takes_what_is_in_it_into_the_trash_and_with_it(google: Google) -> None:
    drive, client = google
    shared = drive.shared_drive(runner="organizer")
    folder = drive.add("a", [shared]).id
    file = drive.add("b", [folder], b"x").id
    client.ask("POST", f"{API}/{folder}/trash", **EVERYWHERE)
    body = client.ask("GET", f"{API}/{quote(file)}", **EVERYWHERE).json
    assert body["labels"]["trashed"] and not body["explicitlyTrashed"]
    assert client.ask("DELETE", f"{API}/{folder}", **EVERYWHERE).status == 204
    assert client.ask("GET", f"{API}/{file}", **EVERYWHERE).reason == "404 notFound"


def test_refusals_come_as_often_as_they_are_asked_for(google: Google) -> None:
    drive, client = google
    drive.fail("userRateLimitExceeded", 2, "list")
    assert [client.ask("GET", API).status for _ in range(3)] == [403, 403, 200]
    drive.fail("backendError", 1)
    assert client.ask("GET", API).reason == "503 backendError"
