"""Remove what a killed DVC left behind and would stumble over: its locks, temporary files, a torn dvc.lock.

python -m ml.release.clean
"""

import json
import os
import sys
from pathlib import Path

import psutil

from ml import files, git
from ml.errors import UserError, exit_on_user_error
from ml.lock import LOCK, parse_lock

DVC = Path(".dvc")
RWLOCK = DVC / "tmp" / "rwlock"
LOCKS = ("rwlock", "rwlock.lock", "lock", "*.lock")  # in .dvc/tmp
SKIPPED = {".git", ".venv", "node_modules"}


def clean() -> list[str]:
    """What was removed or put back, in words.

    Raises:
        UserError: a DVC command is really running here, so its locks are no leftovers.
    """
    if not DVC.is_dir():
        raise UserError("There is no .dvc folder here. Run from the root of the repository.")
    if running := running_dvc():
        raise UserError(
            f"A DVC command is running in this folder (PID {running.pid}: {' '.join(running.cmdline())[:200]}). "
            "Wait for it, or end it; two at a time would spoil each other's results."
        )
    done = []
    for pattern in LOCKS:
        for path in sorted((DVC / "tmp").glob(pattern)):
            if path.is_file():
                if path == RWLOCK and not is_idle(path):
                    done.append(f"{path}: a lock that nobody holds")
                path.unlink(missing_ok=True)
    done += [f"{path}: a file that was never finished" for path in remove_unfinished()]
    if torn := restore_torn_lock():
        done.append(torn)
    return done


def is_idle(rwlock: Path) -> bool:
    """Whether it is as DVC leaves it when it ends: nothing is held."""
    try:
        return not any(json.loads(rwlock.read_bytes()).values())
    except (ValueError, AttributeError):
        return False


def running_dvc() -> psutil.Process | None:
    """Another process of DVC's in this very folder.

    That a lock names a PID which is alive says little: PIDs repeat, in containers from the first on.
    """
    here, own = os.path.realpath("."), {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            if process.pid in own or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if is_dvc(process.cmdline()) and os.path.realpath(process.cwd()) == here:
                return process
        except (psutil.Error, OSError):  # ended, or another user's
            continue
    return None


def is_dvc(command: list[str]) -> bool:
    """`dvc …`, `python …/bin/dvc …` or `python -m dvc …`, at work on the pipeline or its data; not `dvc --version`."""
    words = command[:4]
    return any(Path(word).name == "dvc" for word in words[:2]) or any(
        pair in (("-m", "dvc"), ("-m", "ml.release.pipeline")) for pair in zip(words, words[1:])
    )


def remove_unfinished() -> list[Path]:
    """The hidden `.….tmp` files of DVC and of ml.files, in the cache and among the outputs. Made anew when needed."""
    found = []
    for root, folders, names in os.walk("."):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for name in names:
            if name.startswith(".") and name.endswith(".tmp"):
                path = Path(root, name)
                path.chmod(0o600)
                path.unlink()
                found.append(path)
    return found


def restore_torn_lock() -> str | None:
    """DVC writes dvc.lock in place. Where that was cut off, the committed one comes back, and DVC goes on from there."""
    path = Path(LOCK)
    try:
        content = path.read_bytes()
        parse_lock(content, LOCK)
        return None
    except FileNotFoundError:
        return None
    except UserError:
        committed = git.show("HEAD", LOCK) if git.exists("HEAD") else None
        if committed == content:
            return None  # it is the author's: the lock gate names what is wrong with it
        if committed is None:
            path.unlink()
            return f"{LOCK}: torn, and none was committed; removed"
        files.write_bytes(path, committed)
        return f"{LOCK}: torn; that of HEAD is back"


def main() -> None:
    for line in clean():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    exit_on_user_error(main)
