"""What is asked of git, in the working folder. Where git fails, the error has its own words and the remedy that fits.

`run` and `ask` give what a command prints, `says_yes` the answer of one whose exit code 1 means no, and `attempt` the
bare result, for those who can do something about a failure.
"""

import os
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from ml.errors import UserError

Done = subprocess.CompletedProcess[bytes]

OPTIONS = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}  # never asks for a password
# Whatever the machine or the repository prefer: messages come as UTF-8, and paths as they are, from the root on.
SAME_EVERYWHERE = (
    "i18n.commitEncoding=UTF-8",
    "i18n.logOutputEncoding=UTF-8",
    "core.quotePath=false",
    "diff.relative=false",
    "fetch.recurseSubmodules=false",
    "push.recurseSubmodules=no",
)
CONSEQUENCE = re.compile(r"hook declined|failed to push some refs")  # what follows from the reason
USERINFO = re.compile(r"(\w://)[^/@\s]+@")  # a job's origin has its token there
UNKNOWN = "Needed a single revision"
# what git says to what can be done about it; the first that fits
REMEDIES = (
    (
        "dubious ownership",
        "The checkout belongs to another user than this process. The image of this template trusts every folder; in "
        "another image run `git config --global --add safe.directory '*'`, or give the jobs the variables "
        "GIT_CONFIG_COUNT=1, GIT_CONFIG_KEY_0=safe.directory and GIT_CONFIG_VALUE_0=*.",
    ),
    ("not a git repository", "Run it in a clone, from the folder of the project."),
    (
        r"\.lock': File exists",
        "Another git process is at work in this clone: wait for it. If it was killed, remove the file.",
    ),
    (
        "promisor|[Cc]ould not (fetch|read from remote)|unable to access|could not read Username",
        "The clone is partial, and origin did not give what is missing: check the network and `git remote get-url "
        "origin`, or clone without --filter.",
    ),
    (
        r"corrupt|is empty|inflate|unable to (read|unpack)|bad (object|tree|signature)|missing (blob|tree)|index file",
        "The clone is damaged: `git fsck` says where. Clone anew (in CI: GIT_STRATEGY: clone).",
    ),
    ("Permission denied", "Let this user read and write the clone."),
)


class GitError(UserError):
    """A command of git's failed; `said` is why, in its own words."""

    def __init__(self, command: str, done: Done) -> None:
        self.said = own_words(done.stderr)
        super().__init__(
            f"`git {command}` failed: {self.said}{'' if self.said[-1:] in '.!?' else '.'} {remedy(self.said)}"
        )


class UnknownRevision(UserError):
    """What should name a commit names none."""


def attempt(*arguments: str, text: str | None = None, **environment: str) -> Done:
    """The command's exit code and output, `text` at its standard input; a failure is the caller's to judge.

    Raises UserError where there is no git.
    """
    settings = [word for setting in SAME_EVERYWHERE for word in ("-c", setting)]
    try:
        return subprocess.run(
            ["git", *settings, *arguments],
            input=None if text is None else text.encode("utf-8", "surrogateescape"),
            capture_output=True,
            env=os.environ | OPTIONS | environment,
        )
    except FileNotFoundError:
        raise UserError("The command `git` is missing. Install git.") from None


def run(*arguments: str, text: str | None = None, **environment: str) -> bytes:
    """What the command prints. Raises GitError."""
    done = attempt(*arguments, text=text, **environment)
    if done.returncode:
        raise GitError(name_of(arguments), done)
    return done.stdout


def ask(*arguments: str) -> str:
    """What the command prints, as text: names and messages need not be UTF-8. Raises GitError."""
    return run(*arguments).decode("utf-8", "replace").strip()


def says_yes(*arguments: str) -> bool:
    """The answer of a command whose exit code is 0 for yes and 1 for no. Raises GitError for any other."""
    done = attempt(*arguments)
    if done.returncode > 1:
        raise GitError(name_of(arguments), done)
    return done.returncode == 0


def name_of(arguments: tuple[str, ...]) -> str:
    """The command, after options of git's own."""
    before = ("", *arguments)
    return next(
        word for last, word in zip(before, arguments) if not word.startswith("-") and last not in ("-C", "-c")
    )


def own_words(stderr: bytes) -> str:
    """What went wrong by git's or the server's own account, in one line, without a password."""
    lines = [line.strip() for line in USERINFO.sub(r"\1", stderr.decode("utf-8", "replace")).splitlines()]
    told = [line for line in lines if line.startswith(("fatal:", "error:", "remote: ", "!"))]
    told = [line for line in told if not CONSEQUENCE.search(line)] or told
    last = [line for line in lines if line][-1:]
    return (
        "; ".join(dict.fromkeys(line.removeprefix("fatal: ") for line in told or last))
        or "it does not say why"
    )


def remedy(said: str) -> str:
    found = next((text for pattern, text in REMEDIES if re.search(pattern, said)), None)
    return found or (DEEPEN if is_shallow() else "Run the command by hand to see more.")


DEEPEN = 'The clone is shallow: fetch the whole history (`git fetch --unshallow`; in CI GIT_DEPTH: "0").'


def is_shallow() -> bool:
    return attempt("rev-parse", "--is-shallow-repository").stdout.strip() == b"true"


def resolve(revision: str) -> str:
    """The full hash of the commit that `revision` names. Raises UnknownRevision, or GitError."""
    # `--end-of-options`: a revision that begins with `-` is no option
    done = attempt("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    if done.returncode == 0:
        return done.stdout.decode().strip()
    if own_words(done.stderr) != UNKNOWN:
        raise GitError("rev-parse", done)
    known = DEEPEN if is_shallow() else "Check the name, or fetch it (`git fetch --tags origin`)."
    raise UnknownRevision(f"{revision!r} is no commit of this repository. {known}")


def exists(revision: str) -> bool:
    """Whether `revision` names a commit. Raises GitError when git cannot tell."""
    try:
        resolve(revision)
    except UnknownRevision:
        return False
    return True


def head() -> str:
    return resolve("HEAD")


def committed_at(revision: str) -> datetime:
    """When the commit was made, in UTC."""
    return datetime.fromtimestamp(int(ask("show", "--no-patch", "--format=%ct", resolve(revision))), UTC)


def is_dirty() -> bool:
    """Whether a tracked file of the working folder, or a submodule there, differs from HEAD; dvc.lock aside.

    A pipeline writes dvc.lock and does not commit it. Raises GitError.
    """
    return bool(run("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock"))


def show(commit: str, path: str) -> bytes | None:
    """The file's content in the commit, `path` relative to the working folder; None if it is not in there.

    Raises GitError when git cannot tell, or has not fetched it: that is no reason to take it for missing.
    """
    if not run("ls-tree", "--name-only", "-z", commit, "--", path):
        return None
    return run("show", f"{commit}:./{path}")


def prefix() -> str:
    """The working folder as the repository names it: "" for the root, else a path that ends in a slash."""
    return os.fsdecode(run("rev-parse", "--show-prefix").removesuffix(b"\n"))


def root() -> Path:
    """The folder of the repository."""
    return Path(os.fsdecode(run("rev-parse", "--show-toplevel").removesuffix(b"\n")))


def files_of(commit: str) -> dict[str, str]:
    """Every file of the commit, by its path from the repository's root, with the hash of its content."""
    listed = run("ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0")
    entries = (line.split(b"\t", 1) for line in listed if line)
    return {os.fsdecode(path): head.split()[2].decode() for head, path in entries if b" blob " in head}


def changed_lines(commit: str, paths: list[str]) -> dict[str, tuple[int, int]]:
    """Lines added and removed since the commit, for each of `paths` that is text and that git knows."""
    if not paths:
        return {}
    changed = changed_paths(commit, "--relative", "--", *paths)
    return {path: lines for path, lines in changed.items() if lines is not None}


def changed_paths(commit: str, *arguments: str) -> dict[str, tuple[int, int] | None]:
    """Every path that differs since the commit, with its lines added and removed; None where it is no text.

    A renamed file is one that is gone and one that is new. Paths are relative to the repository's root, unless the
    arguments have `--relative`.
    """
    # outside a repository `git diff` is another command: `resolve` says what is wrong there
    since = resolve(commit)
    output = run("--literal-pathspecs", "diff", "--numstat", "-z", "--no-renames", since, *arguments)
    found: dict[str, tuple[int, int] | None] = {}
    for line in filter(None, output.split(b"\0")):
        added, removed, path = line.split(b"\t", 2)
        found[os.fsdecode(path)] = (int(added), int(removed)) if added.isdigit() else None
    return found
