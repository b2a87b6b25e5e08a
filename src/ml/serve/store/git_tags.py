"""Release tags of a git repository (model-v…), their files fetched by hash from its DVC remote.

Needs git and the package dvc, which the serving image has not: install '.[pipeline]' beside '.[serve]' where this store
is used. Of the repository only dvc.lock, params.yaml and .dvc/config are read; nothing of it is run.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ml import files
from ml.bundle import EXPERIMENT, GOLDEN, MODEL, Experiment, File, check_tag
from ml.errors import UserError
from ml.serve.model import GOLDEN_LIMIT, Refused
from ml.serve.store.base import Listing, NotFound, Unavailable

FRESH = 10.0  # seconds for which a clone counts as up to date
GIT_SECONDS = 120
TEXT_LIMIT = 2**20  # bytes of dvc.lock, params.yaml, metrics.json and data.json
MOST_NODES = 100_000  # of one YAML file, aliases counted as often as they are named
PATTERN = "refs/tags/model-v*"


@dataclass(frozen=True)
class Release:
    tag: str
    commit: str
    created: datetime
    trailers: dict[str, str]


@dataclass(frozen=True)
class Output:
    md5: str
    size: int  # bytes


class GitStore:
    def __init__(self, where: str, remote_url: str | None, cache: Path) -> None:
        self.where, self.remote_url, self.cache = where, remote_url, cache
        self.is_address = "://" in where or re.match(r"[\w.-]+@[\w.-]+:", where) is not None
        self.repository = cache / "repository" if self.is_address else Path(where)
        self.shown = re.sub(r"://[^/@]*@", "://", where)  # without a password
        self.fetched = 0.0
        self.seen: dict[str, Experiment] = {}  # by commit
        self.remote: Any = None
        self.lock = threading.Lock()  # several requests may ask at a time

    def listing(self) -> Listing:
        experiments, unreadable = [], {}
        for release in self.releases().values():
            try:
                experiments.append(self.experiment(release))
            except (Refused, NotFound) as error:
                unreadable[release.tag] = str(error)
        return Listing(experiments, unreadable)

    def fetch(self, tag: str, folder: Path, limit: int) -> str:
        release = self.releases().get(check_tag(tag))
        if release is None:
            raise NotFound(f"{self.shown} has no tag {tag} (of the kind model-v…).")
        experiment = self.experiment(release)
        outputs = self.outputs(release)
        for path, name, most in ((files.MODEL_ONNX, MODEL, limit), (files.GOLDEN, GOLDEN, GOLDEN_LIMIT)):
            content = self.object(wanted(outputs, path), most, name)
            shutil.copyfile(content, folder / name)
        files.write_text(folder / EXPERIMENT, experiment.model_dump_json(indent=2) + "\n")
        return tag

    def newest(self) -> str:
        releases = self.releases()
        if not releases:
            raise NotFound(f"{self.shown} has no tag model-v…: nothing has been released yet.")
        return max(releases.values(), key=lambda each: (each.created, version_of(each.tag))).tag

    def releases(self) -> dict[str, Release]:
        self.update()
        form = "%00".join(
            (
                "%(refname:strip=2)",
                "%(objectname)",
                "%(*objectname)",
                "%(creatordate:unix)",
                "%(contents:trailers:only,unfold)",
            )
        )
        output = self.git("for-each-ref", f"--format={form}%01", PATTERN)
        found = {}
        for record in output.decode("utf-8", "replace").split("\x01"):
            parts = record.lstrip("\n").split("\0")
            if len(parts) != 5:
                continue
            tag, made, peeled, when, trailers = parts
            with suppress(
                ValueError
            ):  # a tag that cannot be the name of a folder, or is of something undated
                pairs = (line.partition(":") for line in trailers.splitlines())
                found[check_tag(tag)] = Release(
                    tag,
                    peeled or made,
                    datetime.fromtimestamp(int(when), UTC),
                    {name.strip().lower(): value.strip() for name, _, value in pairs},
                )
        return found

    def update(self) -> None:
        """Clone the address, or fetch its tags, unless that was a moment ago."""
        if not self.is_address:
            if not self.repository.is_dir():
                raise Unavailable(f"{self.shown} is no folder.")
            return
        with self.lock:
            if time.monotonic() - self.fetched < FRESH and self.fetched:
                return
            if not self.repository.is_dir():
                self.cache.mkdir(parents=True, exist_ok=True)
                fresh = Path(tempfile.mkdtemp(prefix=".clone-", dir=self.cache))
                self.run("clone", "--quiet", "--bare", "--", self.where, str(fresh))
                with suppress(OSError):  # another worker was faster
                    fresh.rename(self.repository)
            else:
                self.git(
                    "fetch",
                    "--quiet",
                    "--force",
                    "--prune",
                    "--",
                    self.where,
                    "+refs/tags/*:refs/tags/*",
                    "+refs/heads/*:refs/heads/*",
                )
            self.fetched = time.monotonic()

    def git(self, *arguments: str) -> bytes:
        return self.run("-C", str(self.repository), *arguments)

    def run(self, *arguments: str) -> bytes:
        """Raises Unavailable when git says no, is missing, or hangs."""
        environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        try:
            done = subprocess.run(
                ["git", *arguments],
                capture_output=True,
                env=environment,
                timeout=GIT_SECONDS,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            raise Unavailable(
                "The command `git` is missing. Install git, or use another MODEL_STORE."
            ) from None
        except subprocess.TimeoutExpired:
            raise Unavailable(f"git did not answer within {GIT_SECONDS} s for {self.shown}.") from None
        if done.returncode:
            raise Unavailable(f"git cannot read {self.shown} (exit code {done.returncode}).")
        return done.stdout

    def show(self, release: Release, path: str) -> bytes:
        try:
            size = int(self.git("cat-file", "-s", f"{release.commit}:{path}"))
            if size <= TEXT_LIMIT:
                return self.git("cat-file", "blob", f"{release.commit}:{path}")
        except Unavailable:
            raise Refused("files", f"{release.tag} has no {path}") from None
        raise Refused("size", f"{path} of {release.tag} has {size:,} bytes; at most {TEXT_LIMIT:,} are taken")

    def outputs(self, release: Release) -> dict[str, Output]:
        """Path → hash and size of everything that dvc.lock says the pipeline made."""
        tree = parse_yaml(self.show(release, "dvc.lock"), f"dvc.lock of {release.tag}")
        try:
            entries = [entry for stage in tree["stages"].values() for entry in stage.get("outs", [])]
            return {
                str(entry["path"]): Output(str(entry["md5"]), int(entry.get("size", 0))) for entry in entries
            }
        except (KeyError, TypeError, AttributeError, ValueError):
            raise Refused("files", f"dvc.lock of {release.tag} has no outputs with their MD5") from None

    def experiment(self, release: Release) -> Experiment:
        key = f"{release.tag} {release.commit}"
        if key in self.seen:
            return self.seen[key]
        from ml.lock import parse_lock

        lock = self.show(release, "dvc.lock")
        lock_sha256 = hashlib.sha256(lock).hexdigest()
        if release.trailers.get("lock-sha256", lock_sha256) != lock_sha256:
            raise Refused("sha256", f"dvc.lock of {release.tag} is not the one that was released")
        outputs = self.outputs(release)
        golden = wanted(outputs, files.GOLDEN)
        model = wanted(outputs, files.MODEL_ONNX)
        model_sha256 = release.trailers.get("model-sha256") or files.sha256(
            self.object(model, GOLDEN_LIMIT, MODEL)
        )
        summary = self.report(outputs, files.DATA_SUMMARY)
        try:
            self.seen[key] = Experiment(
                tag=release.tag,
                git_commit=release.commit,
                created=datetime.fromtimestamp(
                    int(self.git("show", "-s", "--format=%ct", release.commit)), UTC
                ),
                dataset=str(summary.get("dataset")),
                data_hash=parse_lock(lock, "dvc.lock").sources.get(str(files.DATA), "unknown"),
                lock_sha256=lock_sha256,
                class_names=summary["class_names"],
                image_height=summary["image_height"],
                image_width=summary["image_width"],
                metrics=self.report(outputs, files.METRICS),
                params=parse_yaml(self.show(release, "params.yaml"), f"params.yaml of {release.tag}"),
                model=File(
                    sha256=model_sha256,
                    size=model.size or self.object(model, GOLDEN_LIMIT, MODEL).stat().st_size,
                ),
                golden=File(
                    sha256=files.sha256(self.object(golden, GOLDEN_LIMIT, GOLDEN)),
                    size=self.object(golden, GOLDEN_LIMIT, GOLDEN).stat().st_size,
                ),
            )
        except (ValueError, KeyError, TypeError) as error:  # ValidationError is a ValueError
            raise Refused(
                "files", f"{release.tag} does not describe an experiment ({type(error).__name__})"
            ) from None
        except UserError as error:
            if isinstance(error, Unavailable | NotFound | Refused):
                raise
            raise Refused("files", str(error)) from None
        return self.seen[key]

    def report(self, outputs: dict[str, Output], path: Path) -> dict[str, Any]:
        content = self.object(wanted(outputs, path), TEXT_LIMIT, path.name).read_bytes()
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            raise Refused("files", f"{path} is not JSON") from None
        if not isinstance(found, dict):
            raise Refused("files", f"{path} is not a JSON object")
        return found

    def object(self, output: Output, limit: int, name: str) -> Path:
        """The file with this hash, from the cache or the DVC remote; its bytes are checked against the hash.

        Raises Refused when it is too long or has other bytes; NotFound when the remote has it not; Unavailable.
        """
        if not re.fullmatch(r"[0-9a-f]{32}", output.md5):
            raise Refused("files", f"{name} is not one file in dvc.lock")
        if output.size > limit:
            raise Refused("size", f"{name} has {output.size:,} bytes; at most {limit:,} are taken.")
        path = self.cache / "objects" / output.md5
        if path.is_file() and path.stat().st_size <= limit and files.md5(path) == output.md5:
            return path
        with self.lock:
            odb = self.connect()
        try:
            with odb.fs.open(odb.oid_to_path(output.md5), "rb") as source, files.atomic(path) as copy:
                digest, size = hashlib.md5(usedforsecurity=False), 0
                while piece := source.read(2**16):
                    size += len(piece)
                    if size > limit:
                        raise Refused("size", f"{name} has more than {limit:,} bytes.")
                    digest.update(piece)
                    copy.write(piece)
                if digest.hexdigest() != output.md5:
                    raise Refused("sha256", f"{name} on the DVC remote has other bytes than dvc.lock says.")
        except FileNotFoundError:
            raise NotFound(f"The DVC remote does not have {name} ({output.md5}).") from None
        except UserError:
            raise
        except Exception as error:  # the remote's own: boto's, paramiko's, gdrive's, …
            raise Unavailable(f"The DVC remote cannot be read ({type(error).__name__}).") from None
        return path

    def connect(self) -> Any:
        """The remote's object store, by DVC."""
        if self.remote is not None:
            return self.remote
        try:
            from dvc.exceptions import DvcException
            from dvc.repo import Repo
        except ImportError:
            raise Unavailable("This MODEL_STORE needs the package dvc: pip install '.[pipeline]'.") from None
        core: dict[str, Any] = {}
        config: dict[str, Any] = {"core": core}
        if self.remote_url:
            core["remote"], config["remote"] = "serve", {"serve": {"url": self.remote_url}}
        try:
            root = self.repository
            if not (
                root / ".dvc"
            ).is_dir():  # a bare repository: its configuration alone, in a folder of our own
                root = self.cache / "dvc"
                root.mkdir(parents=True, exist_ok=True)
                if not (root / ".dvc").is_dir():
                    Repo.init(str(root), no_scm=True).close()
                with suppress(Unavailable):
                    (root / ".dvc" / "config").write_bytes(self.git("show", "HEAD:.dvc/config"))
                core["no_scm"] = True
            self.remote = Repo(str(root), config=config).cloud.get_remote_odb()
        except (DvcException, OSError, ValueError) as error:
            raise Unavailable(
                f"No DVC remote is configured for {self.shown} ({type(error).__name__}). Set DVC_REMOTE_URL."
            ) from None
        return self.remote


def wanted(outputs: dict[str, Output], path: Path) -> Output:
    if str(path) not in outputs:
        raise Refused("files", f"dvc.lock has no output {path}")
    return outputs[str(path)]


def parse_yaml(content: bytes, source: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        tree = YAML(typ="safe", pure=True).load(content.decode("utf-8"))
        if count_nodes(tree) >= MOST_NODES:
            raise ValueError("a few lines of aliases that stand for millions")
        return tree
    except (YAMLError, ValueError, RecursionError) as error:
        raise Refused("files", f"{source} is not YAML ({type(error).__name__})") from None


def count_nodes(tree: Any, most: int = MOST_NODES) -> int:
    """How many values a tree has, or `most` as soon as it has so many."""
    count = 1
    for each in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        if count >= most:
            return most
        count += count_nodes(each, most - count)
    return min(count, most)


def version_of(tag: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", tag))
