"""Make a result again from its commit, and say whether it is the same, bit for bit.

    python -m ml.release.reproduce model-v1.2.0     # or a branch, a commit, the id of an MLflow run

Clones the commit into a scratch folder, restores its data, runs every stage anew with no cache to fall back on, and
compares each output with what dvc.lock recorded. Exit code 0: identical; 1: it differs, or could not be made.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from ml import files, git
from ml.errors import UserError, exit_on_user_error
from ml.lock import LOCK, Lock, StageLock, parse_lock, read_lock
from ml.release import remote
from ml.release.pipeline import DVC
from ml.settings import Settings, load_settings

RUN_ID = re.compile(r"[0-9a-f]{32}")  # of MLflow; a commit has 40 or 64
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", re.MULTILINE)
LISTED = 10  # packages or paths in one line of output
CACHE_REMOTE = "this-machine"  # DVC's cache here, as a remote of the clone


@dataclass(frozen=True)
class Origin:
    """What is to be made again: a commit, and what it gave; `model_sha256` None when only dvc.lock knows."""

    name: str
    commit: str
    lock: Lock
    model_sha256: str | None
    merge_request: str | None  # iid: its data may lie in its own prefix of the remote


@dataclass(frozen=True)
class Comparison:
    """One stage: outputs that differ, and recorded inputs (code, data, params) that are not the commit's own."""

    stage: str
    outputs: int
    different: list[str]
    stale: list[str]
    because: str | None  # the earlier stage whose different outputs it was made from

    @property
    def identical(self) -> bool:
        return not self.different


# ---- What to make again


def find(settings: Settings, name: str, lock: Path | None) -> Origin:
    """Raises UserError when `name` is no revision and no run, or nobody knows what it gave."""
    model = expected_lock = iid = None
    if RUN_ID.fullmatch(name) and not git.exists(name):
        from ml.tracking import registry

        run = registry.origin_of_run(settings, name)
        commit, model, expected_lock = known_commit(run.git_commit, name), run.model_sha256, run.lock_sha256
    else:
        commit = known_commit(name, name)
        trailers = tag_trailers(name)
        model, expected_lock = trailers.get("Model-Sha256"), trailers.get("Lock-Sha256")
        iid = trailers.get("Merge-Request", "").rpartition("/")[2]
        iid = iid if iid.isdecimal() else None
    content = recorded_lock(name, commit, expected_lock, lock)
    return Origin(name, commit, parse_lock(content, f"{LOCK} of {name}"), model, iid or None)


def known_commit(revision: str, name: str) -> str:
    try:
        return git.resolve(revision)
    except git.UnknownRevision:
        told = f" (the commit of MLflow run {name})" if revision != name else ""
        raise UserError(
            f"{revision!r}{told} is no commit of this repository, and no id of an MLflow run. "
            "Fetch it (`git fetch --tags origin`), or correct it."
        ) from None


def tag_trailers(name: str) -> dict[str, str]:
    text = git.ask("for-each-ref", "--format=%(contents:trailers:only,unfold)", f"refs/tags/{name}")
    pairs = (line.partition(": ") for line in text.splitlines())
    return {key: value for key, _, value in pairs}


def recorded_lock(name: str, commit: str, expected: str | None, given: Path | None) -> bytes:
    """The dvc.lock that the result was recorded in: the one that is given, else the commit's."""
    if given is not None:
        return files.read_bytes(given, "evaluate")
    committed = git.show(commit, LOCK)
    if committed is not None and expected in (None, hashlib.sha256(committed).hexdigest()):
        return committed
    if expected is None:
        raise UserError(f"{name} has no {LOCK}, so nobody knows what it gave. Name one: --lock FILE.")
    raise UserError(
        f"The {LOCK} of {name} (sha256 {expected}) is not in its commit. Take it from the files of the GitLab release, or "
        "from the run's artifacts, and name it: --lock FILE."
    )


# ---- Making it


def clone(commit: str, folder: Path) -> Path:
    """The project at `commit`, in a clone in `folder` that borrows this repository's objects."""
    repository, target = git.root(), folder / "clone"
    git.run("clone", "--quiet", "--shared", "--no-checkout", str(repository), str(target))
    git.run("-C", str(target), "checkout", "--quiet", "--detach", commit)
    clone_submodules(repository, target)
    return target / git.prefix()


def clone_submodules(repository: Path, target: Path) -> None:
    """Check out the submodules of `target` that are fetched in `repository`, from there."""
    if not (target / ".gitmodules").is_file():
        return
    listed = git.ask(
        "config", "--file", str(target / ".gitmodules"), "--get-regexp", r"^submodule\..*\.path$"
    )
    for line in listed.splitlines():
        key, _, path = line.partition(" ")
        if (repository / path / ".git").exists():
            url = f"{key.removesuffix('.path')}.url={repository / path}"
            options = ("-C", str(target), "-c", "protocol.file.allow=always", "-c", url)
            git.run(*options, "submodule", "--quiet", "update", "--init", "--", path)
            clone_submodules(repository / path, target / path)


def environment(project: Path) -> dict[str, str]:
    """The stages run by this Python, on the clone's code, and write to no tracking server."""
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(project / "src"),
        "PYTHONSAFEPATH": "",  # a script may import what lies beside it
        "DVC_NO_ANALYTICS": "1",
        "TRACKING": "off",
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
    }
    unset = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "MLFLOW_RUN_ID")
    return {name: value for name, value in os.environ.items() if name not in unset} | own


def configure_remotes(settings: Settings, origin: Origin, project: Path) -> list[str]:
    """The clone's remotes: those of this job or this checkout, and this machine's cache; their names."""
    own = Path(".dvc/config.local")
    with Repo(".") as here:
        cache = str(here.cache.local_cache_dir)
    if settings.dvc_remote_url is not None:
        with chdir(project):
            remote.configure(settings, int(origin.merge_request) if origin.merge_request else None)
    elif own.is_file():
        shutil.copy(own, project / own)
    with Repo(str(project)) as there:
        with there.config.edit("local") as config:
            config["remote"][CACHE_REMOTE] = {"url": cache, "verify": True}
        return list(there.config["remote"])


def pull(project: Path, remotes: list[str], targets: list[str]) -> str | None:
    """Bring `targets` from the first of the remotes that has them all; its name, None when none has."""
    for name in remotes:
        with (
            Repo(str(project)) as repo,
            chdir(project),
            suppress(Exception),
        ):  # each kind of remote raises its own
            repo.pull(targets, remote=name)
            return name
    return None


def restore_data(project: Path, remotes: list[str]) -> str:
    """Bring what the .dvc files name; where it came from. Raises UserError when nothing has it."""
    listed = git.run("-C", str(project), "ls-files", "-z", "*.dvc").split(b"\0")
    sources = [os.fsdecode(name) for name in listed if name]
    if not sources:
        return "git: there are no .dvc files"
    found = pull(project, remotes, sources)
    if found is not None:
        return f"remote {found}"
    command = [sys.executable, "-m", "ml.task.dataset", "restore"]
    done = subprocess.run(command, cwd=project, capture_output=True, env=environment(project))
    if done.returncode == 0:
        return "`python -m ml.task.dataset restore`"
    raise UserError(
        f"The data of this commit ({', '.join(sources)}) are on none of the remotes {', '.join(remotes)}, and "
        f"`python -m ml.task.dataset restore` says: {git.own_words(done.stderr)}. Set DVC_REMOTE_URL to where they are."
    )


def recorded_environment(project: Path, remotes: list[str]) -> dict[str, Any] | None:
    """What the recorded result was made with, from its artifacts/training.json; None when it is not to be had."""
    return made_with(project) if pull(project, remotes, [str(files.TRAINING)]) else None


def made_with(project: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((project / files.TRAINING).read_bytes())["made_with"]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def retrain(project: Path) -> None:
    """Every stage, none of it from a cache; their output is shown. Raises UserError when one fails."""
    command = [*DVC, "repro", "--force", "--no-run-cache"]
    done = subprocess.run(command, cwd=project, stdout=2, env=environment(project))
    if done.returncode:
        raise UserError("A stage failed in the clone, so there is nothing to compare. Its message is above.")


# ---- Comparing


def ordered(lock: Lock) -> Iterator[tuple[str, StageLock]]:
    """The stages, each after those whose outputs it reads."""
    left = dict(lock.stages)
    while left:
        made_later = {path for stage in left.values() for path in stage.outs}
        ready = [name for name, stage in left.items() if not reads(stage, made_later)]
        for name in ready or list(left):
            yield name, left.pop(name)


def reads(stage: StageLock, paths: set[str]) -> bool:
    """Whether a dep is one of `paths`, or lies in one, or holds one."""
    return any(
        dep == path or dep.startswith(f"{path}/") or path.startswith(f"{dep}/")
        for dep in stage.deps
        for path in paths
    )


def compare(recorded: Lock, made: Lock) -> list[Comparison]:
    """Stage by stage, in the order in which they run."""
    found: list[Comparison] = []
    culprit: dict[str, str] = {}  # path of a different output to the stage that made it first
    nothing = StageLock("", {}, {}, {})
    for name, now in ordered(made):
        before = recorded.stages.get(name, nothing)
        paths = sorted(before.outs.keys() | now.outs.keys())
        different = [path for path in paths if before.outs.get(path) != now.outs.get(path)]
        because = next((stage for path, stage in culprit.items() if reads(now, {path})), None)
        inputs = {path: md5 for path, md5 in now.deps.items() if path not in made.outs}
        recorded_inputs = {path: md5 for path, md5 in before.deps.items() if path not in recorded.outs}
        stale = changed_keys(recorded_inputs, inputs) + changed_keys(before.params, now.params)
        stale += ["its command"] if before.command != now.command else []
        found.append(Comparison(name, len(paths), different, stale, because if different else None))
        culprit |= {path: because or name for path in different}
    return found


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def other_packages(project: Path) -> list[str]:
    """What is installed here otherwise than the commit's constraints.txt pins it."""
    path = project / "constraints.txt"
    found = []
    for name, pinned in PINNED.findall(path.read_text(encoding="utf-8") if path.is_file() else ""):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if installed.partition("+")[0] != pinned.partition("+")[0]:
            found.append(f"{name} {installed} (pinned {pinned})")
    return found


def explain(
    first: Comparison, before: dict[str, Any] | None, now: dict[str, Any] | None, packages: list[str]
) -> list[str]:
    """Why the first stage that differs may do so."""
    if first.stale:
        return [
            f"{LOCK} did not record this commit's own inputs of {first.stage}: {shorten(first.stale)}. "
            "It was stale, or somebody edited it, so it is no proof of what the commit gives."
        ]
    lines = []
    if packages:
        lines.append(f"Installed here otherwise than the commit pins: {shorten(packages)}.")
    if before is None:
        lines.append(
            f"What the recorded result was made with is not known: its {files.TRAINING} is on no remote. "
            f"Here: {json.dumps(now)}."
        )
    elif before != now:
        keys = changed_keys(before, now or {})
        told = (f"{key} was {before.get(key)!r}, is {(now or {}).get(key)!r}" for key in keys)
        lines.append(f"Made with something else: {'; '.join(told)}.")
    if not lines:
        lines.append(
            f"torch, device, instruction set, precision and threads are the same (see made_with in {files.TRAINING}). "
            f"So stage {first.stage} itself may not be deterministic (an unseeded random number, the time, the order of "
            "files), or the recorded output was not made by this commit."
        )
    return lines


def shorten(items: list[str]) -> str:
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def reproduce(settings: Settings, origin: Origin, folder: Path) -> bool:
    """Whether every output is identical; prints what was found."""
    print(f"{origin.name} is commit {origin.commit}; cloned into {folder}", flush=True)
    project = clone(origin.commit, folder)
    packages = other_packages(project)
    remotes = configure_remotes(settings, origin, project)
    print(f"data restored from {restore_data(project, remotes)}", flush=True)
    before = recorded_environment(project, remotes)
    retrain(project)
    found = compare(origin.lock, read_lock(project / LOCK))
    for each in found:
        if each.identical:
            print(f"{each.stage}: identical ({each.outputs} outputs)")
        else:
            cause = f"; it reads what {each.because} made" if each.because else ""
            print(f"{each.stage}: DIFFERS in {shorten(each.different)}{cause}")
    first = next((each for each in found if not each.identical), None)
    digest = files.sha256(project / files.MODEL_ONNX) if (project / files.MODEL_ONNX).is_file() else None
    wrong_model = origin.model_sha256 not in (None, digest)
    if first is None and not wrong_model:
        print(f"identical: every output of {origin.name}, bit for bit; model.onnx has sha256 {digest}")
        return True
    if first is None:
        print(
            f"NOT identical: dvc.lock is, but {files.MODEL_ONNX} has sha256 {digest}, and {origin.name} says "
            f"{origin.model_sha256}. One of the two records is wrong."
        )
        return False
    print(f"NOT identical: the first stage that differs is {first.stage}.")
    for line in explain(first, before, made_with(project), packages):
        print(f"  {line}")
    return False


@contextmanager
def scratch(keep: Path | None) -> Iterator[Path]:
    """A folder of its own, removed afterwards unless it was asked for."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="reproduce-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    if keep.exists() and any(keep.iterdir()):
        raise UserError(f"{keep} is not empty. Name another folder for --keep.")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.resolve()


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.release.reproduce", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("revision", metavar="REV", help="tag, branch, commit, or id of an MLflow run")
    parser.add_argument(
        "--lock", type=Path, metavar="FILE", help="compare with this dvc.lock, not the commit's"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder, and leave it there")
    arguments = parser.parse_args(given)
    settings = load_settings()
    origin = find(settings, arguments.revision, arguments.lock)
    with scratch(arguments.keep) as folder:
        same = reproduce(settings, origin, folder)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    exit_on_user_error(main)
