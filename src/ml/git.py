"""The few questions that are asked of git."""

import os
import subprocess
from datetime import UTC, datetime

from ml.errors import UserError


def run_git(*arguments: str) -> bytes | None:
    """Standard output of a git command in the working folder; None where git says no (any exit code but 0)."""
    environment = os.environ | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, env=environment)
    except FileNotFoundError:
        raise UserError("The command `git` is missing. Install git.") from None
    return done.stdout if done.returncode == 0 else None


def resolve(revision: str) -> str:
    """The full hash of the commit that `revision` names. Raises UserError when there is none."""
    # `--end-of-options`: a revision that begins with `-` is no option
    found = run_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found is None:
        raise UserError(
            f"{revision!r} is no commit of this repository. In CI, fetch the whole history (GIT_DEPTH: 0); "
            "else check the name after --baseline."
        )
    return found.decode().strip()


def head() -> str:
    return resolve("HEAD")


def committed_at(revision: str) -> datetime:
    """When the commit was made, in UTC."""
    found = run_git("show", "--no-patch", "--format=%ct", "--end-of-options", resolve(revision))
    assert found is not None
    return datetime.fromtimestamp(int(found), UTC)


def is_dirty() -> bool:
    """Whether a tracked file differs from HEAD; dvc.lock aside, which a pipeline writes and does not commit.

    Raises UserError when git cannot tell.
    """
    found = run_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock")
    if found is None:
        raise UserError("`git status` fails here, so nobody can tell which code this is. Run it to see why.")
    return bool(found)


def show(commit: str, path: str) -> bytes | None:
    """The file's content in the commit, `path` relative to the working folder; None if it is not in there.

    Raises UserError when git cannot tell, or has not fetched it: that is no reason to take it for missing.
    """
    listed = run_git("ls-tree", "--name-only", "-z", commit, "--", path)
    if listed == b"":
        return None
    content = run_git("show", f"{commit}:./{path}") if listed else None
    if content is None:
        raise UserError(
            f"git cannot read {path} of {commit[:8]}. Fetch the whole history (GIT_DEPTH: 0), then run the job again."
        )
    return content


def changed_lines(commit: str, paths: list[str]) -> dict[str, tuple[int, int]]:
    """Lines added and removed since the commit, for each of `paths` that is text and that git knows."""
    if not paths:
        return {}
    options = ["--numstat", "-z", "--no-renames", "--relative"]
    output = run_git("--literal-pathspecs", "diff", *options, commit, "--", *paths) or b""
    counts = {}
    for line in output.decode("utf-8", "surrogateescape").split("\0"):
        added, _, rest = line.partition("\t")
        removed, _, path = rest.partition("\t")
        if added.isdecimal() and removed.isdecimal():
            counts[path] = (int(added), int(removed))
    return counts
