"""What Google Drive holds, and what it answers: version 2 of its API, as strict as Drive is.

Written from Google's documentation: methods, parameters, enumerations, scopes and field names come from the discovery
document of the API (google-api-python-client carries it); errors from "Resolve errors"; who may do what from "Roles and
permissions" and the reference of each method; tokens from "Using OAuth 2.0 for Server to Server Applications".

A download needs no supportsAllDrives, as PyDrive2 sends none and works with Shared Drives.
"""

import base64
import hashlib
import itertools
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.drive_emulator.query import BadQuery, Query, Searched

FOLDER = "application/vnd.google-apps.folder"
TOKEN_URI = "https://oauth2.googleapis.com/token"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
ROLES = ("reader", "commenter", "writer", "fileOrganizer", "organizer")
PIECE = 256 * 1024  # bytes: each part of an upload but the last is a multiple of it
DISCOVERY = json.loads(
    (files("googleapiclient.discovery_cache") / "documents/drive.v2.json").read_text(encoding="utf-8")
)
METHODS = DISCOVERY["resources"]["files"]["methods"]
FIELDS = set(DISCOVERY["schemas"]["File"]["properties"])
WRITABLE = {"title", "mimeType", "parents", "description", "labels", "modifiedDate", "properties"}

# reason → status, domain, what Drive says; "429" is a rate limit of Drive's backend, by the reason of the other one
REASONS = {
    "userRateLimitExceeded": (403, "usageLimits", "User Rate Limit Exceeded"),
    "rateLimitExceeded": (403, "usageLimits", "Rate Limit Exceeded"),
    "429": (429, "usageLimits", "Rate Limit Exceeded"),
    "storageQuotaExceeded": (
        403,
        "usageLimits",
        "Service Accounts do not have storage quota. Leverage shared drives, or use OAuth delegation instead.",
    ),
    "accessNotConfigured": (
        403,
        "usageLimits",
        "Access Not Configured. Google Drive API has not been used in project 1 before or it is disabled.",
    ),
    "teamDriveFileLimitExceeded": (
        403,
        "global",
        "The file limit for this shared drive has been exceeded.",
    ),
    "teamDriveMembershipRequired": (
        403,
        "global",
        "The attempted action requires shared drive membership.",
    ),
    "backendError": (503, "global", "Backend Error"),
}


class DriveError(Exception):
    def __init__(self, status: int, reason: str, message: str, domain: str = "global", at: str = "") -> None:
        super().__init__(message)
        self.status = status
        detail = {"domain": domain, "reason": reason, "message": message}
        if at:
            kind = {"Authorization": "header", "file.permissions": "other"}.get(at, "parameter")
            detail |= {"locationType": kind, "location": at}
        self.body = {"error": {"errors": [detail], "code": status, "message": message}}

    @classmethod
    def known(cls, reason: str) -> "DriveError":
        status, domain, message = REASONS[reason]
        return cls(status, "rateLimitExceeded" if reason == "429" else reason, message, domain)


class TokenError(Exception):
    """Of the token endpoint: 400, OAuth's own shape."""

    def __init__(self, error: str, description: str) -> None:
        super().__init__(description)
        self.body = {"error": error, "error_description": description}


def not_found(file_id: str) -> DriveError:
    return DriveError(404, "notFound", f"File not found: {file_id}", at="file")


@dataclass
class File:
    id: str
    title: str
    mime: str
    parents: list[str]
    drive: str | None  # of its Shared Drive
    owner: str | None  # of My Drive
    content: bytes | None = None
    put_in_trash: bool = False
    shared: dict[str, str] = field(default_factory=dict)  # role of each account it is shared with


@dataclass
class Grant:
    email: str
    scopes: set[str]
    expires: float


@dataclass
class Upload:
    email: str
    metadata: dict[str, Any]
    size: int | None
    content: bytes = b""


@dataclass
class Fault:
    reason: str
    times: int  # still to come
    method: str | None  # of files; None: any


class GoogleDrive:
    """Accounts, Shared Drives and files. Methods named as in the API take the parameters as sent, and raise DriveError."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.accounts: dict[str, dict[str, rsa.RSAPublicKey]] = {}  # keys by id
        self.grants: dict[str, Grant] = {}
        self.members: dict[str, dict[str, str]] = {}  # role of each account on each Shared Drive
        self.files: dict[str, File] = {}
        self.uploads: dict[str, Upload] = {}
        self.pages: dict[str, tuple[str, int]] = {}
        self.faults: list[Fault] = []
        self.calls: list[str] = []  # method of each request that got as far as its token
        self.numbers = itertools.count()
        self.page_size = 1000  # at most; Drive may give less than asked for
        self.token_seconds = 3600.0
        self.keeps_half = False  # of the first part of each upload, as Drive may
        # called with each request's method, to hold it up
        self.before: Callable[[str], None] = lambda method: None

    # what somebody does in Google's consoles ------------------------------------------------------------------------

    def service_account(self, name: str = "runner") -> dict[str, str]:
        """A new account; its JSON key."""
        email = email_of(name)
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        key_id = secrets.token_hex(20)
        self.accounts.setdefault(email, {})[key_id] = private.public_key()
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {
            "type": "service_account",
            "project_id": "team",
            "private_key_id": key_id,
            "private_key": pem.decode(),
            "client_email": email,
            "client_id": "1",
            "token_uri": TOKEN_URI,
        }

    def shared_drive(self, **members: str) -> str:
        """Its id, which is that of its root too. Members by name of the account: organizer (Manager), fileOrganizer
        (Content manager), writer (Contributor), commenter, reader (Viewer)."""
        drive = f"0A{secrets.token_hex(8)}"
        self.members[drive] = {f"{name}@team.iam.gserviceaccount.com": role for name, role in members.items()}
        self.files[drive] = File(drive, "Drive", FOLDER, [], drive, None)
        return drive

    def add(
        self,
        title: str,
        parents: list[str],
        content: bytes | None = None,
        owner: str | None = None,
        mime: str = "",
    ) -> File:
        """A file, or without content a folder. Two of one name may lie side by side."""
        with self.lock:
            # ids in any order but that of their making, as Drive's are
            number = next(self.numbers)
            file_id = "1" + hashlib.sha256(f"{number}".encode()).hexdigest()[:32]
            drive = self.files[parents[0]].drive if parents else None
            mime = mime or (FOLDER if content is None else "application/octet-stream")
            file = File(file_id, title, mime, parents, drive, None if drive else owner, content)
            self.files[file_id] = file
            return file

    def my_drive_folder(self, title: str, owner: str, **shared: str) -> str:
        """Of a person, shared with accounts by name."""
        folder = self.add(title, [], owner=owner)
        self.share(folder, **shared)
        return folder.id

    def share(self, file: File, **roles: str) -> None:
        """With accounts by name; on a Shared Drive too, to members that have a lower role there."""
        file.shared |= {email_of(name): role for name, role in roles.items()}

    def fail(self, reason: str, times: int, method: str | None = None) -> None:
        """The next requests, all of them or those of one method, are refused."""
        self.faults.append(Fault(reason, times, method))

    def children(self, folder: str, title: str | None = None) -> list[File]:
        """What lies in a folder and not in the trash, by title."""
        found = [file for file in self.files.values() if folder in file.parents and not self.in_trash(file)]
        return sorted((file for file in found if title in (None, file.title)), key=lambda file: file.title)

    def tree(self, folder: str) -> dict[str, list[bytes | None]]:
        """What lies below a folder by path, trash left out; the contents of all that have one path, None of a folder."""
        found: dict[str, list[bytes | None]] = {}
        for file in self.children(folder):
            found.setdefault(file.title, []).append(file.content)
            if file.mime == FOLDER:
                for path, contents in self.tree(file.id).items():
                    found.setdefault(f"{file.title}/{path}", []).extend(contents)
        return found

    # tokens ---------------------------------------------------------------------------------------------------------

    def token(self, form: Mapping[str, str]) -> dict[str, Any]:
        """Raises TokenError."""
        if form.get("grant_type") != JWT_BEARER:
            raise TokenError("unsupported_grant_type", f"Invalid grant_type: {form.get('grant_type', '')}")
        try:
            head, claims, signature = form["assertion"].split(".")
            header, claim = json.loads(decoded(head)), json.loads(decoded(claims))
        except (KeyError, ValueError):
            raise TokenError("invalid_grant", "Invalid JWT: not three parts of base64url") from None
        keys = self.accounts.get(claim.get("iss", ""))
        if keys is None:
            raise TokenError("invalid_grant", "Invalid grant: account not found")
        key = keys.get(header.get("kid", ""))
        try:
            if header.get("alg") != "RS256" or key is None:
                raise InvalidSignature
            key.verify(decoded(signature), f"{head}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256())
        except (InvalidSignature, ValueError):
            raise TokenError("invalid_grant", "Invalid JWT Signature.") from None
        now = time.time()
        begin, end = claim.get("iat", 0), claim.get("exp", 0)
        if not now - 3600 <= begin <= now + 300 or not now < end <= begin + 3600:
            raise TokenError(
                "invalid_grant",
                "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. "
                "Check your iat and exp values in the JWT claim.",
            )
        if claim.get("aud") != TOKEN_URI:
            raise TokenError("invalid_grant", "Invalid JWT: Failed audience check.")
        scopes = set(claim.get("scope", "").split())
        if not scopes or not scopes <= set(DISCOVERY["auth"]["oauth2"]["scopes"]):
            raise TokenError("invalid_scope", "Invalid OAuth scope or ID token audience provided.")
        token = f"ya29.{secrets.token_urlsafe(24)}"
        self.grants[token] = Grant(claim["iss"], scopes, now + self.token_seconds)
        return {"access_token": token, "expires_in": int(self.token_seconds) - 1, "token_type": "Bearer"}

    def authorize(self, header: str | None, method: str, parameters: Mapping[str, str]) -> str:
        """The account behind the request, when method, parameters and scopes are right."""
        kind, _, token = (header or "").partition(" ")
        grant = self.grants.get(token)
        if kind != "Bearer" or grant is None or grant.expires <= time.time():
            raise DriveError(401, "authError", "Invalid Credentials", at="Authorization")
        self.calls.append(method)
        if not grant.scopes & set(METHODS[method]["scopes"]):
            raise DriveError(
                403, "insufficientPermissions", "Insufficient Permission: insufficient authentication scopes."
            )
        known = METHODS[method].get("parameters", {}) | DISCOVERY["parameters"]
        for name, value in parameters.items():
            if name not in known:
                raise DriveError(400, "badRequest", f"Unknown name {name!r}: Cannot bind query parameter.")
            kind = known[name]
            if kind["type"] == "boolean" and value not in ("true", "false"):
                raise DriveError(400, "invalidParameter", f"Invalid boolean value: {value!r}.", at=name)
            if kind["type"] == "integer" and not re.fullmatch(r"-?\d+", value):
                raise DriveError(400, "invalidParameter", f"Invalid integer value: {value!r}.", at=name)
            if kind.get("enum") and value not in kind["enum"]:
                raise DriveError(400, "invalidParameter", f"Invalid string value: {value!r}.", at=name)
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (None, method):
                    fault.times -= 1
                    raise DriveError.known(fault.reason)
        self.before(method)
        return grant.email

    # who may do what ------------------------------------------------------------------------------------------------

    def role(self, file: File, email: str) -> int:
        """Rank of the account's role, here or on a folder above (it never gets less); -1 where it sees nothing."""
        if file.owner == email:
            return len(ROLES)
        given = [file.shared.get(email), self.members.get(file.id, {}).get(email)]
        own = max((ROLES.index(role) for role in given if role), default=-1)
        return max([own, *(self.role(self.files[parent], email) for parent in file.parents)])

    def visible(self, file_id: str, email: str, all_drives: bool) -> File:
        """Raises DriveError, 404: there is none, or the account may not know."""
        file = self.files.get(file_id)
        if file is None or self.role(file, email) < 0 or (file.drive and not all_drives):
            raise not_found(file_id)
        return file

    def demand(self, file: File, email: str, role: str) -> None:
        if self.role(file, email) < ROLES.index(role):
            raise DriveError(
                403,
                "insufficientFilePermissions",
                f"The user does not have sufficient permissions for file {file.id}.",
                at="file.permissions",
            )

    def in_trash(self, file: File) -> bool:
        return file.put_in_trash or any(
            self.in_trash(self.files[parent]) for parent in file.parents if parent in self.files
        )

    # files ----------------------------------------------------------------------------------------------------------

    def resource(self, file: File) -> dict[str, Any]:
        """The file as JSON; what there is of it depends on its kind."""
        body: dict[str, Any] = {
            "kind": "drive#file",
            "id": file.id,
            "title": file.title,
            "mimeType": file.mime,
            "labels": {"trashed": self.in_trash(file)},
            "explicitlyTrashed": file.put_in_trash,
            "parents": [{"kind": "drive#parentReference", "id": parent} for parent in file.parents],
        }
        if file.drive:
            body |= {"driveId": file.drive, "teamDriveId": file.drive}
        if file.content is not None:
            body |= {
                "fileSize": str(len(file.content)),
                "md5Checksum": hashlib.md5(file.content, usedforsecurity=False).hexdigest(),
                "originalFilename": file.title,
            }
        return body

    def get(self, email: str, file_id: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        return self.resource(self.visible(file_id, email, parameters.get("supportsAllDrives") == "true"))

    def download(self, email: str, file_id: str, parameters: Mapping[str, str]) -> bytes:
        file = self.visible(file_id, email, all_drives=True)
        if file.content is None:
            raise DriveError(
                403,
                "fileNotDownloadable",
                "Only files with binary content can be downloaded. Use Export with Docs Editors files.",
                at="alt",
            )
        return file.content

    def list_files(self, email: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        corpora, drive = parameters.get("corpora", "default"), parameters.get("driveId")
        everywhere = parameters.get("supportsAllDrives") == "true"
        both = everywhere and parameters.get("includeItemsFromAllDrives") == "true"
        if corpora not in ("default", "domain", "drive", "allDrives"):
            raise DriveError(400, "invalid", f"Invalid value: {corpora}", at="corpora")
        if (corpora == "drive") != (drive is not None):
            raise DriveError(
                400,
                "invalid",
                "The driveId parameter must be specified if and only if corpora is set to drive.",
                at="driveId",
            )
        if drive and not both:
            raise DriveError(
                400,
                "invalid",
                "The 'includeItemsFromAllDrives' and 'supportsAllDrives' parameters must be set to true.",
                at="includeItemsFromAllDrives",
            )
        if drive and drive not in self.members:
            raise DriveError(404, "notFound", f"Shared drive not found: {drive}", at="driveId")
        if drive and email not in self.members[drive]:
            raise DriveError.known("teamDriveMembershipRequired")
        most = int(parameters.get("maxResults", "100"))
        if not 1 <= most <= 1000:
            raise DriveError(
                400, "invalidParameter", f"Invalid value '{most}'. Values must be within the range: [1, 1000]"
            )
        try:
            query = Query(parameters["q"]) if parameters.get("q") else None
        except BadQuery:
            raise DriveError(400, "invalid", "Invalid Value", at="q") from None
        for parent in query.parents if query else ():
            try:
                self.visible(parent, email, both)
            except DriveError:
                raise DriveError(404, "notFound", "File not found: .", at="fileId") from None
        asked = json.dumps(
            [parameters.get(name) for name in ("q", "corpora", "driveId", "orderBy")], sort_keys=True
        )
        with self.lock:
            start = 0
            if token := parameters.get("pageToken"):
                if self.pages.get(token, ("", 0))[0] != asked:
                    raise DriveError(400, "invalid", "Invalid Value", at="pageToken")
                start = self.pages[token][1]
            found = [
                file
                for file in list(self.files.values())
                if file.id not in self.members  # the root of a Shared Drive is in no list
                and (file.drive == drive if drive else file.drive is None)
                and self.role(file, email) >= 0
                and (
                    query is None
                    or query.test(Searched(file.title, file.mime, file.parents, self.in_trash(file)))
                )
            ]
            end = start + min(most, self.page_size)
            body: dict[str, Any] = {
                "kind": "drive#fileList",
                "incompleteSearch": False,
                "items": [self.resource(file) for file in found[start:end]],
            }
            if end < len(found):
                body["nextPageToken"] = secrets.token_urlsafe(12)
                self.pages[body["nextPageToken"]] = (asked, end)
            return body

    def check_new(self, email: str, metadata: dict[str, Any], everywhere: bool, content: bool) -> list[str]:
        """The ids of the parents of a file that may be made."""
        if unknown := metadata.keys() - FIELDS:
            raise DriveError(400, "badRequest", f"Unknown name {min(unknown)!r}: Cannot find field.")
        if fixed := metadata.keys() - WRITABLE:
            raise DriveError(
                403,
                "fieldNotWritable",
                f"The resource body includes fields which are not directly writable: {min(fixed)}",
            )
        parents = [parent["id"] for parent in metadata.get("parents", [])]
        if len(parents) > 1:
            raise DriveError(403, "multipleParentsInsertProhibited", "A file must have a single parent.")
        for parent in parents:
            folder = self.visible(parent, email, everywhere)
            if folder.mime != FOLDER:
                raise DriveError(403, "parentNotAFolder", "The specified parent is not a folder.")
            self.demand(folder, email, "writer")
        # what a service account makes outside a Shared Drive is its own, and it has no room
        if content and not (parents and self.files[parents[0]].drive):
            raise DriveError.known("storageQuotaExceeded")
        return parents

    def insert(
        self,
        email: str,
        metadata: dict[str, Any],
        parameters: Mapping[str, str],
        content: bytes | None = None,
    ) -> dict[str, Any]:
        """With no content and no folder's type an empty file, as Drive makes it."""
        everywhere = parameters.get("supportsAllDrives") == "true"
        parents = self.check_new(email, metadata, everywhere, content is not None)
        mime = metadata.get("mimeType", "application/octet-stream")
        if content is None and not mime.startswith("application/vnd.google-apps."):
            content = b""
        file = self.add(metadata.get("title", "Untitled"), parents, content, email, mime)
        return self.resource(file)

    def trash(self, email: str, file_id: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        """Its owner may, and on a Shared Drive a Content manager."""
        file = self.visible(file_id, email, parameters.get("supportsAllDrives") == "true")
        self.demand(file, email, "fileOrganizer")
        file.put_in_trash = True
        return self.resource(file)

    def delete(self, email: str, file_id: str, parameters: Mapping[str, str]) -> None:
        """Its owner may, and on a Shared Drive a Manager alone. What is in a folder goes with it."""
        file = self.visible(file_id, email, parameters.get("supportsAllDrives") == "true")
        self.demand(file, email, "organizer")
        with self.lock:
            gone = {file.id}
            while more := {each.id for each in self.files.values() if gone & set(each.parents)} - gone:
                gone |= more
            for each in gone:
                del self.files[each]

    # an upload in parts ---------------------------------------------------------------------------------------------

    def begin_upload(
        self, email: str, metadata: dict[str, Any], parameters: Mapping[str, str], size: int | None
    ) -> str:
        """Its id. What could not be made is refused now."""
        self.check_new(email, metadata, parameters.get("supportsAllDrives") == "true", content=True)
        upload_id = secrets.token_urlsafe(24)
        self.uploads[upload_id] = Upload(email, metadata, size)
        return upload_id

    def upload_part(self, upload_id: str, content_range: str | None, part: bytes) -> dict[str, Any] | int:
        """The file when it is whole, else how many bytes are there."""
        upload = self.uploads.get(upload_id)
        if upload is None:
            raise DriveError(404, "notFound", "Upload session not found.")
        if content_range is not None:
            asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", content_range)
            if asked is None:
                raise DriveError(400, "badRequest", f"Invalid Content-Range: {content_range}")
            first, last, total = asked.groups()
            if total != "*":
                upload.size = int(total)
            if first is None:
                if upload.size != len(upload.content):
                    return len(upload.content)
            elif int(first) != len(upload.content) or int(last) - int(first) + 1 != len(part):
                raise DriveError(
                    400, "badRequest", f"Content-Range does not fit what is there: {content_range}"
                )
        if self.keeps_half and not upload.content and len(part) > PIECE:
            part = part[:PIECE]
        whole = upload.size in (None, len(upload.content) + len(part))
        if not whole and len(part) % PIECE:
            raise DriveError(
                400, "badRequest", f"A part that is not the last has to be a multiple of {PIECE} bytes."
            )
        upload.content += part
        if not whole:
            return len(upload.content)
        del self.uploads[upload_id]
        return self.insert(upload.email, upload.metadata, {"supportsAllDrives": "true"}, upload.content)


def email_of(name: str) -> str:
    """Of a service account."""
    return f"{name}@team.iam.gserviceaccount.com"


def decoded(text: str) -> bytes:
    """Base64url without padding."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
