"""The folder that says which model is live, and holds it.

live.json        the pointer: replaced as a whole, and its modification time is its generation, so that a worker
                 sees a change by one `stat` a request
models/DIGEST/   checked copies of bundles, never changed afterwards; DIGEST is that of experiment.json, which in
                 turn names the sha256 of the model
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ml import files
from ml.bundle import EXPERIMENT
from ml.errors import UserError
from ml.serve.model import MEMBERS, Bundle, check_bundle
from ml.serve.store.base import Store

KEEP = 4  # models besides the live one and the one before it


@dataclass(frozen=True)
class Pointer:
    generation: int
    tag: str
    digest: str
    previous_tag: str | None = None
    previous_digest: str | None = None


class Busy(UserError):
    """Somebody else is changing the model."""


@dataclass(frozen=True)
class State:
    folder: Path
    max_model: int  # bytes

    @property
    def pointer_file(self) -> Path:
        return self.folder / "live.json"

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def stamp(self) -> int:
        """Changes whenever the pointer does; 0 without one."""
        try:
            return os.stat(self.pointer_file).st_mtime_ns
        except OSError:
            return 0

    def read(self) -> Pointer | None:
        """None where nothing has been published, or the file is torn or of another version."""
        try:
            return Pointer(**json.loads(self.pointer_file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def publish(self, tag: str, digest: str) -> Pointer:
        """Point to a model that `install` gave; what was live becomes the previous one. Under `lock` only."""
        before = self.read()
        if before is None:
            pointer = Pointer(1, tag, digest)
        elif before.digest == digest:
            pointer = replace(before, generation=before.generation + 1)
        else:
            pointer = Pointer(before.generation + 1, tag, digest, before.tag, before.digest)
        self.write(pointer)
        return pointer

    def write(self, pointer: Pointer) -> None:
        temporary = self.folder / f".live.{os.getpid()}.tmp"
        with open(temporary, "w") as file:
            json.dump(asdict(pointer), file)
            file.flush()
            os.fsync(file.fileno())
        os.utime(
            temporary, (pointer.generation, pointer.generation)
        )  # whole seconds: any file system keeps them
        os.replace(temporary, self.pointer_file)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextmanager
    def lock(self, seconds: float) -> Iterator[None]:
        """One change at a time, whichever worker or server makes it. Raises Busy after `seconds`."""
        deadline = time.monotonic() + seconds
        with open(self.folder / ".lock", "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Busy(
                            "Another change of the model is under way. Try again in a moment."
                        ) from None
                    time.sleep(0.02)
            yield

    def bundle(self, digest: str, tag: str) -> Bundle:
        """An installed model, checked again. Raises Refused."""
        return check_bundle(self.models / digest, self.max_model, tag)

    def install(self, store: Store, tag: str, model_sha256: str | None = None) -> tuple[Bundle, str]:
        """Fetch, check, and keep: the bundle, and its digest.

        Raises:
            Refused: it failed a check; nothing is kept.
            UserError: the store does not have it, or does not answer.
        """
        self.models.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=self.models))
        try:
            tag = store.fetch(tag, staging, self.max_model)
            experiment = check_bundle(staging, self.max_model, tag, model_sha256).experiment
            digest = hashlib.sha256((staging / EXPERIMENT).read_bytes()).hexdigest()[:40]
            target = self.models / digest
            if target.exists():
                try:
                    return self.bundle(digest, tag), digest
                except UserError:
                    shutil.rmtree(target)  # damaged since
            for name in set(os.listdir(staging)) - set(MEMBERS):
                os.unlink(staging / name)
            staging.rename(target)
            return Bundle(target, experiment), digest
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def is_tried(self, digest: str) -> bool:
        return (self.models / f"{digest}.tried").exists()

    def set_tried(self, digest: str) -> None:
        files.write_text(
            self.models / f"{digest}.tried", "answered its golden images in a process of its own\n"
        )

    def forget_old(self) -> None:
        """Remove models that nobody can return to by name, the oldest first."""
        pointer = self.read()
        needed = {pointer.digest, pointer.previous_digest} if pointer else set()
        try:
            found = [
                each for each in self.models.iterdir() if each.is_dir() and not each.name.startswith(".")
            ]
            found.sort(key=lambda each: each.stat().st_mtime)
        except OSError:
            return
        for folder in [each for each in found if each.name not in needed][:-KEEP]:
            shutil.rmtree(folder, ignore_errors=True)
            (self.models / f"{folder.name}.tried").unlink(missing_ok=True)
