"""What DVC's files survive: generated histories through the lock gate, damaged objects, kill -9 in `dvc repro`.

python -m benchmarks.reliability_dvc histories --count 25    # of each: right and wrong
python -m benchmarks.reliability_dvc objects --count 200
python -m benchmarks.reliability_dvc kills --count 50

tests/test_lock_gate.py and tests/test_release_pipeline.py run the same code with smaller counts.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dvc.repo import Repo

from ml.errors import UserError, exit_on_user_error
from ml.release import lock_gate, provenance, push, remote
from ml.release.clean import clean
from ml.release.receipt import StageRecord
from ml.settings import Settings
from tests.dvc_project import Project, make_project

HEX = "0123456789abcdef"


@contextmanager
def inside(project: Project, store: Path) -> Iterator[Settings]:
    """The current directory is the project's, and its remote `main` the folder `store`."""
    before, path = Path.cwd(), os.environ["PATH"]
    os.chdir(project.folder)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"  # stages run `python`
    settings = Settings(dvc_remote_url=str(store))
    try:
        remote.configure(settings)
        yield settings
    finally:
        os.chdir(before)
        os.environ["PATH"] = path


@dataclass
class History:
    """A repository and its remote. Copies share nothing."""

    project: Project
    store: Path

    def copy(self, folder: Path) -> "History":
        shutil.copytree(self.project.folder, folder / "project", symlinks=True)
        shutil.copytree(self.store, folder / "store")
        return History(Project(folder / "project", self.project.environment), folder / "store")

    def run(self, message: str) -> None:
        """Reproduce, push with the receipts of what ran, commit."""
        with inside(self.project, self.store) as settings:
            with Repo() as repo:
                ran = {stage.name for stage in repo.reproduce()}
            records = [
                StageRecord(
                    name=name, key=provenance.key_of(entry), value=provenance.value_of(entry), how="ran"
                )
                for name, entry in provenance.read_entries().items()
                if name in ran
            ]
            push.push("main", settings, records)
        self.project.commit(message)

    def findings(self, folder: Path) -> list[lock_gate.Finding]:
        """What the gate says in a fresh clone, which has no data."""
        clone = self.project.clone(folder)
        with inside(clone, self.store):
            return lock_gate.judge()


def make_history(folder: Path) -> History:
    folder.mkdir(parents=True)
    history = History(make_project(folder / "project"), folder / "store")
    history.run("first run")
    return history


def change(history: History, dice: random.Random) -> None:
    """A change as people make them: a param, code, or data."""
    kind = dice.choice(["param", "code", "data"])
    if kind == "param":
        name = dice.choice(["load.copies", "train.epochs", "train.rate"])
        history.project.set_param(name, dice.randint(2, 50) if name != "train.rate" else dice.random())
    elif kind == "code":
        history.project.edit_code(dice.choice(["load", "train", "evaluate"]), f"# {dice.random()}\n")
    else:
        (history.project.folder / f"data/{dice.randint(0, 4)}.txt").write_text(f"row {dice.random()}\n" * 40)
        history.project.run("dvc", "add", "--quiet", "data")


def stale(history: History, dice: random.Random) -> str:
    change(history, dice)
    history.project.commit("changed without a run")
    return "stale"


def forged(history: History, dice: random.Random) -> str:
    """Two branches, each with a lock that is right; git merges them without a conflict, into one that nobody ran."""
    project, rate = history.project, round(dice.uniform(0.2, 0.9), 6)
    project.git("checkout", "--quiet", "-b", "code")
    # the same result on this branch, another one with the other branch's param
    code = (project.folder / "src/evaluate.py").read_text()
    changed = code.replace("parts = ", f"model += 'x' * (500 if '{rate}' in model else 0)\nparts = ", 1)
    assert changed != code
    (project.folder / "src/evaluate.py").write_text(changed)
    history.run("evaluate otherwise")
    project.git("checkout", "--quiet", "main")
    project.set_param("train.rate", rate)
    history.run("another rate")
    project.git("merge", "--quiet", "--no-edit", "code")
    return "forged"


def edited(history: History, dice: random.Random) -> str:
    """A hash, a param or a size in dvc.lock changed by hand; or the hash of an output that really exists."""
    path = history.project.folder / "dvc.lock"
    text = path.read_text()
    kind = dice.choice(["output", "input", "param", "size", "older"])
    if kind == "older":
        before = provenance.parse_entries(text.encode(), "dvc.lock")["train"]["outs"][0]
        history.project.set_param("train.epochs", dice.randint(60, 99))
        history.run("newer")
        text = path.read_text()
        after = provenance.parse_entries(text.encode(), "dvc.lock")["train"]["outs"][0]
        new = text.replace(after["md5"], before["md5"]).replace(
            f"size: {after['size']}", f"size: {before['size']}"
        )
    elif kind == "param":
        new = re.sub(r"epochs: \d+", f"epochs: {dice.randint(100, 999)}", text)
    elif kind == "size":
        new = re.sub(
            r"(path: artifacts/model.onnx\n\s+hash: md5\n\s+md5: \w+\n\s+size: )\d+", r"\g<1>1", text
        )
    else:
        name = "reports/metrics.json" if kind == "output" else "src/train.py"
        fake = "".join(dice.choices(HEX, k=32))
        new = re.sub(rf"(path: {name}\n\s+hash: md5\n\s+md5: )\w+", rf"\g<1>{fake}", text)
    assert new != text
    path.write_text(new)
    history.project.commit("edited by hand")
    return "damaged" if kind == "size" else "stale" if kind in ("input", "param") else "forged"


def poisoned(history: History, dice: random.Random) -> str:
    """A run record that says the same inputs gave the attacker's model, whose object is on the remote too."""
    entries = provenance.read_entries(history.project.folder / "dvc.lock")
    entry = entries["train"]
    key, value = provenance.key_of(entry), provenance.value_of(entry)
    content = f"attacker's model {dice.random()}".encode()
    object_md5 = put_object(history.store, content)
    forged_entry = json.loads(json.dumps(entry))
    forged_entry["outs"][0] |= {"md5": object_md5, "size": len(content)}
    right = history.store / provenance.record_path(key, value)
    wrong = history.store / provenance.record_path(key, provenance.value_of(forged_entry))
    kind = dice.choice(["instead", "beside", "inside", "taken"])
    if kind == "inside":
        right.write_bytes(provenance.record_bytes(forged_entry))
        return "poisoned"
    wrong.write_bytes(provenance.record_bytes(forged_entry))
    if kind != "beside":
        right.unlink()
    if kind == "taken":  # somebody's `dvc repro --pull` took it, and dvc.lock was committed
        lock = history.project.folder / "dvc.lock"
        before, after = entry["outs"][0], forged_entry["outs"][0]
        text = lock.read_text().replace(before["md5"], after["md5"])
        lock.write_text(text.replace(f"size: {before['size']}", f"size: {after['size']}"))
        history.project.commit("restored from a poisoned record")
    return "poisoned"


def put_object(store: Path, content: bytes) -> str:
    import hashlib

    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    path = store / "files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def missing(history: History, dice: random.Random) -> str:
    """An object of dvc.lock is gone from the remote, or was cut off."""
    with inside(history.project, history.store), Repo() as repo:
        wanted, _ = provenance.objects(repo, provenance.lock_outs(provenance.read_entries()), [])
    each = dice.choice(wanted)
    path = history.store / "files/md5" / each.md5[:2] / each.md5[2:]
    path.chmod(0o644)
    if each.size and dice.random() < 0.5:
        path.write_bytes(path.read_bytes()[:-1])
        return "damaged"
    path.unlink()
    return "missing"


WRONG: tuple[Callable[[History, random.Random], str], ...] = (stale, forged, edited, poisoned, missing)


def histories(folder: Path, count: int, seed: int = 0) -> dict[str, object]:
    """`count` right histories and as many wrong ones, of all kinds in turn, through the gate."""
    dice = random.Random(seed)
    history = make_history(folder / "history")
    false_alarms, missed = [], []
    for number in range(count):
        change(history, dice)
        history.run(f"change {number}")
        if found := history.findings(folder / f"right{number}"):
            false_alarms.append(f"{number}: {'; '.join(map(str, found))}")
        spoil = WRONG[number % len(WRONG)]
        copy = history.copy(folder / f"copy{number}")
        expected = spoil(copy, dice)
        problems = [finding.problem for finding in copy.findings(folder / f"wrong{number}")]
        if expected not in problems:
            missed.append(f"{number}: {spoil.__name__}, expected {expected}, found {problems or 'nothing'}")
        for name in ("right", "copy", "wrong"):
            shutil.rmtree(folder / f"{name}{number}")
    return {
        "right histories": count,
        "false alarms": false_alarms,
        "wrong histories": count,
        "caught and named": count - len(missed),
        "missed": missed,
    }


def objects(folder: Path, count: int, seed: int = 0) -> dict[str, object]:
    """Damage one object at a time, in the cache or on the remote, and see whether it is found; then none."""
    dice = random.Random(seed)
    history = make_history(folder / "objects")
    missed, false_alarms = [], []
    with inside(history.project, history.store):
        with Repo() as repo:
            wanted, _ = provenance.objects(repo, provenance.lock_outs(provenance.read_entries()), [])
            cache = {each.md5: Path(repo.cache.local.oid_to_path(each.md5)) for each in wanted}
        for number in range(count):
            md5, name = dice.choice(list(cache)), dice.choice([None, "main"])
            path = cache[md5] if name is None else history.store / "files/md5" / md5[:2] / md5[2:]
            how = damage(path, dice)
            try:
                provenance.verify_outputs(name)
                missed.append(f"{number}: {how} in {name or 'cache'}")
            except UserError as error:
                if md5 not in str(error):
                    missed.append(f"{number}: {how} in {name or 'cache'}, not named")
            repair(path)
            try:
                provenance.verify_outputs(name)
            except UserError as error:
                false_alarms.append(f"{number}: {error}")
    return {
        "damaged objects": count,
        "found and named": count - len(missed),
        "missed": missed,
        "checks of right ones": count,
        "false alarms": false_alarms,
    }


def damage(path: Path, dice: random.Random) -> str:
    """One byte flipped (with the old time and size, which DVC trusts), cut off, emptied, longer or gone."""
    content, state = path.read_bytes(), path.stat()
    shutil.copy2(path, path.parent.parent / "backup")
    path.chmod(0o644)
    how = dice.choice(["flipped", "flipped", "cut off", "emptied", "longer", "gone"])
    if how == "flipped":
        place = dice.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << dice.randrange(8)
        with open(path, "r+b") as file:
            file.write(changed)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"cut off": content[: len(content) // 2], "emptied": b"", "longer": content + b"\0"}[how]
        )
    return how


def repair(path: Path) -> None:
    path.unlink(missing_ok=True)
    shutil.move(path.parent.parent / "backup", path)


def kills(folder: Path, count: int, seed: int = 0) -> dict[str, object]:
    """kill -9 at a random moment of `dvc repro`, locks spoilt; then ml.release.clean and `dvc repro` again."""
    dice = random.Random(seed)
    history = make_history(folder / "kills")
    project = history.project
    (project.folder / "src/load.py").write_text(
        (project.folder / "src/load.py").read_text() + "import time\ntime.sleep(0.2)\n"
    )
    project.set_param("train.epochs", 77)
    project.commit("changed")
    clone = project.clone(folder / "reference")
    shutil.copytree(project.folder / "data", clone.folder / "data")
    start = time.monotonic()
    clone.run("dvc", "repro")
    seconds, reference = time.monotonic() - start, clone.lock
    failed, interrupted = [], 0
    for number in range(count):
        start_over(project)
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=project.folder,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(dice.uniform(0.2, 0.95) * seconds)
        with_children = dice.random() < 0.8
        os.killpg(process.pid, signal.SIGKILL) if with_children else process.kill()
        interrupted += process.wait() == -signal.SIGKILL
        how = spoil_locks(project.folder, dice)
        done = project.call(sys.executable, "-m", "ml.release.clean")
        again = project.call("dvc", "repro")
        if done.returncode or again.returncode or project.lock != reference:
            said = done.stderr + again.stdout[-300:] + again.stderr[-300:]
            failed.append(
                f"{number} ({how}): lock {'same' if project.lock == reference else 'differs'}: {said}"
            )
    return {
        "kills": count,
        "while it ran": interrupted,
        "next run succeeded with the same dvc.lock": count - len(failed),
        "failed": failed,
    }


def start_over(project: Project) -> None:
    """The committed state, with data and nothing else, as before the run."""
    clean_here = Path.cwd()
    os.chdir(project.folder)
    try:
        clean()
    finally:
        os.chdir(clean_here)
    for path in (".dvc/cache", ".dvc/tmp", "artifacts", "reports"):
        shutil.rmtree(project.folder / path, ignore_errors=True)
    project.git("checkout", "--quiet", "--", ".")


def spoil_locks(folder: Path, dice: random.Random) -> str:
    """What a kill leaves at a bad moment: a torn rwlock, one that names a process which is alive, a .tmp file."""
    how = dice.choice(["as it is", "torn rwlock", "live PID", "temporary files", "torn dvc.lock"])
    locks = folder / ".dvc/tmp"
    locks.mkdir(parents=True, exist_ok=True)
    if how == "torn rwlock":
        (locks / "rwlock").write_text('{"write": {"' + str(folder))
        (locks / "lock").write_text("")
    elif how == "live PID":
        holder = {"pid": os.getpid(), "cmd": "/usr/bin/dvc repro"}
        content = {"write": {str(folder / "artifacts/train.txt"): holder}, "read": {}}
        (locks / "rwlock").write_text(json.dumps(content))
    elif how == "temporary files":
        for place in ("artifacts/parts", ".dvc/cache/files/md5/ab"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / ".abcdefghij.tmp").write_text("half")
    elif how == "torn dvc.lock":
        lock = folder / "dvc.lock"
        lock.write_text(lock.read_text()[:-200] + "\n    - path: [")
    return how


PARTS: dict[str, Callable[[Path, int], dict[str, object]]] = {
    "histories": histories,
    "objects": objects,
    "kills": kills,
}
COUNTS = {"histories": 25, "objects": 200, "kills": 50}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability_dvc", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="one of them (all)")
    parser.add_argument("--count", type=int, help="how many (25 histories of each, 200 objects, 50 kills)")
    arguments = parser.parse_args()
    bad = False
    for name in [arguments.part] if arguments.part else PARTS:
        with tempfile.TemporaryDirectory(prefix="ml-reliability-") as folder:
            answer = PARTS[name](Path(folder), arguments.count or COUNTS[name])
        print(json.dumps({name: answer}, indent=2))
        bad = bad or any(isinstance(value, list) and value for value in answer.values())
    if bad:
        raise UserError("Something was missed or failed; see above.")


if __name__ == "__main__":
    exit_on_user_error(main)
