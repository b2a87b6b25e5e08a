"""A folder of bundles: models/TAG/{model.onnx,golden.npz,experiment.json}. What an image has baked in."""

import os
import shutil
from pathlib import Path

from ml.bundle import EXPERIMENT, EXPERIMENT_LIMIT, GOLDEN, MODEL, Experiment, check_tag, parse_experiment
from ml.errors import UserError
from ml.serve.model import GOLDEN_LIMIT, Refused, open_plain, read_plain
from ml.serve.store.base import Listing, NotFound, Unavailable


class DirectoryStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, tuple[tuple[int, int], Experiment]] = {}

    def listing(self) -> Listing:
        experiments, unreadable = [], {}
        for tag in self.tags():
            try:
                experiments.append(self.read(tag))
            except UserError as error:
                unreadable[tag] = str(error)
        return Listing(experiments, unreadable)

    def tags(self) -> list[str]:
        try:
            with os.scandir(self.folder) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise Unavailable(f"MODEL_STORE {self.folder} cannot be listed: {error.strerror}.") from None
        return sorted(name for name in names if is_tag(name))

    def read(self, tag: str) -> Experiment:
        path = self.folder / tag / EXPERIMENT
        try:
            status = os.lstat(path)
        except OSError:
            raise Refused("files", f"it has no {EXPERIMENT}") from None
        stamp = (status.st_mtime_ns, status.st_size)
        if tag not in self.seen or self.seen[tag][0] != stamp:
            experiment = parse_experiment(read_plain(path, EXPERIMENT_LIMIT), EXPERIMENT)
            if experiment.tag != tag:
                raise Refused("files", f"its {EXPERIMENT} is that of {experiment.tag}")
            self.seen[tag] = (stamp, experiment)
        return self.seen[tag][1]

    def fetch(self, tag: str, folder: Path, limit: int) -> str:
        source = self.folder / check_tag(tag)
        if not source.is_symlink() and not source.exists():
            raise NotFound(f"There is no model {tag} in {self.folder.name}/.")
        if source.is_symlink() or not source.is_dir():
            raise Refused("files", f"{tag} is not a folder.")
        for name, most in ((EXPERIMENT, EXPERIMENT_LIMIT), (MODEL, limit), (GOLDEN, GOLDEN_LIMIT)):
            with open(open_plain(source / name), "rb") as found:
                size = os.fstat(found.fileno()).st_size
                if size > most:
                    raise Refused("size", f"{name} has {size:,} bytes; at most {most:,} are taken.")
                with open(folder / name, "xb") as copy:
                    shutil.copyfileobj(found, copy)
        return tag

    def newest(self) -> str:
        experiments = self.listing().experiments
        if not experiments:
            raise NotFound(
                f"There is no model in {self.folder}. Run `make run`, then `python -m ml.bundle`, or set MODEL_STORE."
            )
        return max(experiments, key=lambda each: (each.created, self.written(each.tag))).tag

    def written(self, tag: str) -> int:
        return os.lstat(self.folder / tag).st_mtime_ns


def is_tag(name: str) -> bool:
    try:
        check_tag(name)
    except ValueError:
        return False
    return True
