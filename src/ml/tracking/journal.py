"""What a run has to tell the tracking server, on disk before anything is sent: one folder for each run.

    .tracking/20261121-090500-1f2e3d4c/
        run.json        who it is; written once
        journal.jsonl   one record a line, only ever appended: metrics, params, tags, dataset, files, model, status
        outgoing/       files that records name, until they are sent
        sent.json       how far the server has it

Nothing here needs MLflow or the network, so nothing here can fail with them. A record is written by one system call:
after a SIGKILL the journal ends in a whole line, or in a torn one that readers leave out.
"""

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from ml import files
from ml.errors import UserError

Point = tuple[str, float, int, int]  # metric, value, milliseconds since 1970, step
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Header(BaseModel):
    """run.json. `fingerprint`: of what decides the training; an interrupted one of the same goes on in the same run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str  # names the folder, and the run on the server, where it is found again by it
    tracking_uri: str
    experiment: str
    started: int  # milliseconds since 1970
    name: str
    fingerprint: str
    run_id: str | None = None  # of a run that is there already


class Sent(BaseModel):
    """sent.json: what the server is known to have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str | None = None
    experiment_id: str | None = None
    model_id: str | None = None
    offset: int = 0  # bytes of the journal
    settled: bool = True  # False: something was on its way when this was written, and may have arrived
    error: str | None = None  # why the last attempt failed


def now() -> int:
    return time.time_ns() // 1_000_000


class Journal:
    """The folder of one run. Any number of processes may append to it; one at a time sends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"

    @classmethod
    def create(cls, root: Path, **header: Any) -> "Journal":
        started = now()
        key = time.strftime("%Y%m%d-%H%M%S", time.gmtime(started / 1000)) + f"-{secrets.token_hex(4)}"
        journal = cls(root / key)
        described = Header(key=key, started=started, **header)
        files.write_text(journal.folder / "run.json", described.model_dump_json(indent=2) + "\n")
        return journal

    @property
    def header(self) -> Header:
        """Raises UserError when the file is missing or not what `create` wrote."""
        path = self.folder / "run.json"
        try:
            return Header.model_validate_json(files.read_bytes(path, "train"))
        except ValidationError as error:
            raise UserError(
                f"{path} is not of this version ({error.error_count()} problems). Remove {self.folder}, or look into it first."
            ) from None

    @property
    def sent(self) -> Sent:
        try:
            return Sent.model_validate_json((self.folder / "sent.json").read_bytes())
        except (OSError, ValidationError):  # never sent, or torn by a crash of the machine: ask the server
            return Sent(settled=not (self.folder / "sent.json").exists())

    def set_sent(self, sent: Sent) -> None:
        files.write_text(self.folder / "sent.json", sent.model_dump_json(indent=2) + "\n")

    def append(self, **record: Any) -> None:
        """Write one record, such as metrics=[Point], tags={} or status="FINISHED"."""
        line = json.dumps(record) + "\n"
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, (("\n" if torn else "") + line).encode())
        finally:
            os.close(handle)

    def read(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The whole records after `offset`, and where they end. A torn one is left out."""
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                content = file.read()
        except FileNotFoundError:
            return [], offset
        end = content.rfind(b"\n") + 1
        records = []
        for line in content[:end].splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
        return records, offset + end

    @property
    def status(self) -> Status:
        """What was written last; RUNNING before that."""
        found = [record["status"] for record in self.read()[0] if "status" in record]
        status: Status = found[-1] if found else "RUNNING"
        return status

    @property
    def is_sent(self) -> bool:
        return self.sent.offset > 0 and not self.read(self.sent.offset)[0]

    def points(self) -> set[tuple[str, int]]:
        """(metric, step) of all points so far."""
        return {(point[0], point[3]) for record in self.read()[0] for point in record.get("metrics", [])}

    def add_files(self, sources: dict[str, Path]) -> None:
        """Keep a copy of files and folders as they are now, to be sent; keys are their places among the run's artifacts.

        A hard link where the file system has them: every file of ours is replaced as a whole, never written into.
        """
        target = self.outgoing(secrets.token_hex(4))
        for place, source in sources.items():
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target / place, copy_function=link_or_copy, dirs_exist_ok=True)
            else:
                link_or_copy(str(source), str(target / place))
        self.append(files=target.name)

    def outgoing(self, name: str) -> Path:
        return self.folder / "outgoing" / name


def link_or_copy(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
    return target


@contextmanager
def only_one(path: Path) -> Iterator[TextIO | None]:
    """Hold the lock `path`; None where another process has it. The kernel frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file


def journals(root: Path) -> list[Journal]:
    """All runs in `root`, oldest first."""
    return [Journal(path.parent) for path in sorted(root.glob("*/run.json"))]


def tidy(root: Path, now_ms: int) -> None:
    """Remove what the server has whole: of finished runs after an hour, of interrupted ones, which may go on, after a week."""
    for journal in journals(root):
        with only_one(journal.folder / "sending") as held, suppress(UserError, OSError):
            hours = (now_ms - journal.header.started) / 3_600_000
            if held and journal.is_sent and hours > (1 if journal.status == "FINISHED" else 168):
                shutil.rmtree(journal.folder)
