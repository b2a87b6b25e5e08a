"""Write, read back and delete one small object where this job will write, before anything trains.

    python -m ml.release.preflight [--timeout 60]

Names the variable that is missing, or the right that is refused. Configures the remote first (ml.release.remote).
"""

import argparse
import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

from dvc.repo import Repo

from ml.errors import UserError, exit_on_user_error
from ml.release import remote
from ml.remotes import CREDENTIALS, MAIN, Place, RemoteError, named, places, prepare, remedy_of
from ml.settings import Settings, load_settings

T = TypeVar("T")
HTTP_OBJECT = "preflight/object"  # always the same one, since HTTP deletes none


def check(settings: Settings) -> list[str]:
    """What was tried, in words.

    Raises:
        UserError: a variable is missing, or the remote refuses a right; it names both.
    """
    remote.configure(settings)
    assert settings.dvc_remote_url
    kind = remote.kind_of(settings.dvc_remote_url)
    missing = remote.missing_credentials(kind)
    with Repo() as repo:
        where = places(repo)
    main, target = named(where, MAIN), named(where, remote.write_name(settings))
    done = []
    if target is not main:
        attempt("read", main, missing, lambda: (main.read_object("0" * 32), main.names("files")))
        done.append(f"{main.name} ({main.url}) can be read")
    attempt("make a folder in", target, missing, lambda: prepare(target, where))
    path = HTTP_OBJECT if not target.lists else f"preflight/{secrets.token_hex(8)}"
    content = secrets.token_bytes(64)
    attempt("write to", target, missing, lambda: target.write(path, content))
    found = attempt("read", target, missing, lambda: target.read(path))
    if found != content:
        said = "nothing is there" if found is None else "other bytes came back"
        raise UserError(
            f"Remote {target.name} ({target.url}) took an object, and {said} when it was read. "
            "Check that its URL is that of the storage itself, not of a web page or a proxy before it."
        )
    if target.lists:
        attempt("list", target, missing, lambda: target.names("preflight"))
        attempt("delete from", target, missing, lambda: target.remove(path))
    done.append(f"{target.name} ({target.url}) can be written to and read")
    if kind == "ssh" and not settings.dvc_remote_known_hosts_file:
        done.append("the host's key is not checked: set DVC_REMOTE_KNOWN_HOSTS_FILE to `ssh-keyscan HOST`")
    return done


def attempt(right: str, place: Place, missing: str | None, action: Callable[[], T]) -> T:
    """Raises UserError that says which right the remote refuses, and which variable may be behind it."""
    try:
        return action()
    except RemoteError as error:
        remedy = error.remedy or (
            f"Not set: {missing}. Set it under Settings → CI/CD → Variables"
            if missing
            else f"Give the credentials the right to {right.split()[0]} there, or correct them"
        )
        if place.name == MAIN and right != "read" and not error.remedy:
            remedy += "; outside merge requests they have to be the ones that may write to the main remote"
        raise UserError(
            f"This job may not {right} remote {place.name} ({place.url}): {error.said}.\n"
            f"{remedy} (docs/remotes.md has what each kind needs)."
        ) from error


class LastRetry(logging.Handler):
    """Why the client of a remote that tries again and again does so: it tells its log alone."""

    said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said = " ".join(record.getMessage().split())[:500]


def expire(seconds: float, last: LastRetry) -> NoReturn:
    """End the process, whatever its threads wait for."""
    late = f"error: the remote did not answer within {seconds:g} seconds"
    if last.said:
        late += f". {last.said}.\n{remedy_of('gdrive', last.said) or CREDENTIALS}, or raise --timeout."
    else:
        late += ". Check the host in DVC_REMOTE_URL and the network of this runner (proxy, firewall), or raise --timeout."
    print(late, file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.release.preflight", description="Try the remote before anything trains."
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds for all of it (60)")
    arguments = parser.parse_args()
    if arguments.timeout <= 0:
        parser.error("--timeout has to be positive")
    last = LastRetry()
    client = logging.getLogger("pydrive2")
    client.addHandler(last)
    client.setLevel(logging.DEBUG)
    watchdog = threading.Timer(arguments.timeout, expire, [arguments.timeout, last])
    watchdog.daemon = True
    watchdog.start()
    for line in check(load_settings()):
        print(line, file=sys.stderr)
    watchdog.cancel()


if __name__ == "__main__":
    exit_on_user_error(main)
