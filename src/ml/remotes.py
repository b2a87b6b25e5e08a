"""What lies on the DVC remotes of this checkout: `main`, and in a merge request its own `merge-request` beside it.

DVC itself reads and writes one remote at a time; a merge request restores from two. Each kind of remote is reached
through DVC's own file system for it.
"""

import hashlib
import io
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from ml import files
from ml.errors import UserError
from ml.settings import load_settings

MAIN = "main"
MERGE_REQUEST = "merge-request"
OBJECTS = "files/md5"  # DVC's own folders on a remote
RUNS = "runs"
GONE = (404, 410)
PIECE = 2**20  # bytes


CREDENTIALS = "Check DVC_REMOTE_URL and its credentials"
# Where each kind's client takes a private authority's certificate from; SSL_CERT_FILE for the others.
AUTHORITY = {"s3": "AWS_CA_BUNDLE", "gdrive": "HTTPLIB2_CA_CERTS", "azure": "REQUESTS_CA_BUNDLE"}
# Google's words and what helps; docs/remotes.md says how a Drive is set up.
DRIVE_REMEDIES = {
    "storageQuotaExceeded": "A service account has no room of its own: FOLDER_ID in DVC_REMOTE_URL has to be a folder of "
    "a Shared Drive that the account is a Content manager of",
    "teamDriveFileLimitExceeded": "The Shared Drive holds as many files as Google allows: delete folders of closed merge "
    "requests below merge-requests/, or take another Drive",
    "accessNotConfigured": "Enable the Google Drive API in the Google Cloud project of the service account",
    "rateLimitExceeded": "Google takes no more requests of this project for the moment: run the job again in some minutes "
    "(what has arrived stays), or ask for a higher quota in Google Cloud",
    "teamDriveMembershipRequired": "Add the service account's address to the members of the Shared Drive: that a folder on "
    "it is shared with the account is not enough",
    "permissions": "Make the service account a Content manager of the Shared Drive",
    "invalid_grant": "Google does not know this key of the service account: it was deleted, or this machine's clock is "
    "wrong. Make a new key",
    "notFound": "FOLDER_ID in DVC_REMOTE_URL is wrong, or the Shared Drive does not have the service account's address "
    "among its members: add it as Content manager",
}


class RemoteError(UserError):
    """A remote that refuses, is down, or is not there: nobody can say what it holds.

    `said` is what came from the remote; `remedy` is there where the cause is known, without a full stop.
    """

    def __init__(self, message: str, said: str = "", remedy: str | None = None) -> None:
        super().__init__(message)
        self.said = said or message
        self.remedy = remedy


@dataclass(frozen=True)
class Place:
    """One remote. Paths are relative to its URL, with `/`; an object is named by its MD5, a folder's ends in .dir."""

    name: str
    url: str
    remote: Any  # dvc.data_cloud.Remote

    @property
    def kind(self) -> str:
        """local, s3, ssh, gdrive, gs, azure, webdav, webdavs, http or https."""
        return str(self.remote.fs.protocol)

    @property
    def lists(self) -> bool:
        """Whether it can tell what a folder holds. HTTP cannot."""
        return self.kind not in ("http", "https")

    def path(self, relative: str) -> str:
        return str(self.remote.fs.join(self.remote.path, *relative.split("/")))

    def object_path(self, md5: str) -> str:
        return self.path(f"{OBJECTS}/{md5[:2]}/{md5[2:]}")

    def read(self, relative: str) -> bytes | None:
        """None when it is not there. Raises RemoteError when that cannot be told."""
        try:
            content: bytes = self.remote.fs.cat_file(self.path(relative))
            return content
        except Exception as error:  # each kind of remote raises its own
            self.raise_unless_absent(error, relative)
            return None

    def read_object(self, md5: str) -> bytes | None:
        """The bytes as they are there, not checked."""
        return self.read(f"{OBJECTS}/{md5[:2]}/{md5[2:]}")

    def write(self, relative: str, content: bytes) -> None:
        """Raises RemoteError when it is refused."""
        path = self.path(relative)
        if self.kind == "gdrive":
            self.remove(relative)  # it would lay a second file of that name beside the first
        try:
            if self.kind == "local":
                files.write_bytes(Path(path), content)
                return
            self.remote.fs.makedirs(self.remote.fs.parent(path), exist_ok=True)
            with tempfile.NamedTemporaryFile() as file:
                file.write(content)
                file.flush()
                self.remote.fs.put_file(file.name, path)
        except Exception as error:  # each kind of remote raises its own
            raise self.error(f"write {relative}", error) from error

    def remove(self, relative: str) -> None:
        """It has to be there, but for Google Drive, where several files may have one name: all of them go."""
        try:
            if self.kind != "gdrive":
                self.remote.fs.rm_file(self.path(relative))
                return
            while self.remote.fs.exists(self.path(relative)):
                self.remote.fs.rm_file(self.path(relative))
        except Exception as error:
            raise self.error(f"delete {relative}", error) from error

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none when it is not there, or where nothing can be listed."""
        if not self.lists:
            return []
        try:
            self.remote.fs.fs.invalidate_cache()
            found = self.remote.fs.ls(self.path(folder), detail=False)
        except Exception as error:
            self.raise_unless_absent(error, folder)
            return []
        names = {str(path).rstrip("/").split("/")[-1] for path in found}  # Google Drive may have one twice
        return sorted(name for name in names if not name.endswith(".tmp"))

    def sizes(self, md5s: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each object that is there; None where the remote does not say. Nothing is downloaded."""
        wanted = sorted(set(md5s))
        self.remote.fs.fs.invalidate_cache()
        with ThreadPoolExecutor(max_workers=16) as pool:
            found = dict(zip(wanted, pool.map(self.size, wanted)))
        return {md5: size for md5, (there, size) in found.items() if there}

    def size(self, md5: str) -> tuple[bool, int | None]:
        try:
            info = self.remote.fs.info(self.object_path(md5))
        except Exception as error:
            self.raise_unless_absent(error, md5)
            return False, None
        return True, info.get("size")

    def hash_object(self, md5: str) -> str:
        """The MD5 of the object as it is there, read piece by piece. Raises whatever this kind of remote raises."""
        hashed = hashlib.md5(usedforsecurity=False)
        with self.remote.fs.open(self.object_path(md5), "rb") as file:
            while piece := file.read(PIECE):
                hashed.update(piece)
        return hashed.hexdigest()

    def raise_unless_absent(self, error: Exception, what: str) -> None:
        """Raises RemoteError unless the error says that the file is not there."""
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            cause = error.__cause__ or error.__context__
            status = getattr(cause, "status", None)
            if self.kind in ("http", "https") and cause is not None and status not in GONE:
                raise self.error(
                    f"read {what}", cause
                ) from error  # fsspec says "not found" of every failure of HTTP
            if self.kind == "local" and not self.mounted():
                raise self.error(f"read {what}", error) from error
            return
        raise self.error(f"read {what}", error) from error

    def mounted(self) -> bool:
        """A folder that nobody has written to is an empty remote; a share that is not mounted lacks its parent too."""
        path = Path(self.remote.path)
        base = path.parents[1] if self.name == MERGE_REQUEST and len(path.parents) > 1 else path
        return base.parent.exists()

    def error(self, doing: str, error: BaseException) -> RemoteError:
        said = in_words(error)
        remedy = remedy_of(self.kind, said)
        return RemoteError(
            f"Remote {self.name} ({self.url}) does not {doing}: {said}.\n"
            f"{remedy or CREDENTIALS} (`python -m ml.release.preflight` tries it), then run the job again.",
            said,
            remedy,
        )


def in_words(error: BaseException) -> str:
    """The error and what is at the bottom of it, where it does not say that itself."""
    cause = error
    while (below := cause_of(cause)) is not None:
        cause = below
    lines = [" ".join(f"{type(each).__name__}: {each}".split())[:500] for each in (error, cause)]
    return lines[0] if cause is error or str(cause) in lines[0] else ": ".join(lines)


def cause_of(error: BaseException) -> BaseException | None:
    """What a traceback would show above it."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def remedy_of(kind: str, said: str) -> str | None:
    """What helps against an error that a remote is known for; None for others."""
    if "CERTIFICATE_VERIFY_FAILED" in said or "certificate verify failed" in said:
        return (
            "The host's certificate is signed by no authority that this machine trusts. Where a private one signs it (or a "
            f"company's proxy), make its certificate a variable of type *File* named {AUTHORITY.get(kind, 'SSL_CERT_FILE')}"
        )
    if kind != "gdrive":
        return None
    return next((remedy for word, remedy in DRIVE_REMEDIES.items() if word.lower() in said.lower()), None)


def places(repo: Repo) -> list[Place]:
    """The remotes that are configured: DVC's default one first, then the merge request's."""
    names = [repo.config["core"].get("remote"), MERGE_REQUEST]
    return [open_place(repo, name) for name in dict.fromkeys(names) if name and name in repo.config["remote"]]


def named(where: list[Place], name: str) -> Place:
    """Raises UserError when it is not configured."""
    for place in where:
        if place.name == name:
            return place
    raise UserError(f"DVC has no remote {name!r}. Set DVC_REMOTE_URL and run `python -m ml.release.remote`.")


def prepare(place: Place, where: list[Place]) -> None:
    """Make the folder of its URL where the client makes none on its own account. Raises RemoteError.

    WebDAV: a merge request's. Google Drive: any, below the one whose id the URL begins with.
    """
    main = where[0]
    try:
        if place.kind in ("webdav", "webdavs") and place.url.startswith(f"{main.url}/"):
            main.remote.fs.makedirs(place.url.removeprefix(f"{main.url}/"), exist_ok=True)
        elif place.kind == "gdrive" and not place.remote.fs.exists(place.remote.path):
            # a client for a folder that is not there can do nothing; one for the folder above makes all on the way to a file
            above = place.remote.path.partition("/")[0]
            fs = type(place.remote.fs)(**place.remote.fs.config | {"url": f"gdrive://{above}"})
            fs.upload_fobj(io.BytesIO(), place.path("made"))
            fs.rm_file(place.path("made"))
    except Exception as error:
        raise place.error("make its folder", error) from error


def open_place(repo: Repo, name: str) -> Place:
    """Raises UserError when the package for its kind is missing, or its options make no sense."""
    url = str(repo.config["remote"][name]["url"])
    try:
        remote = repo.cloud.get_remote(name)
    except Exception as error:
        raise UserError(f"Remote {name} ({url}) cannot be used: {error}") from error
    known_hosts = load_settings().dvc_remote_known_hosts_file
    if remote.fs.protocol == "ssh" and known_hosts:
        remote.fs.fs_args["known_hosts"] = str(
            known_hosts
        )  # DVC has no option for it and takes any host's key
    return Place(name, url, remote)
