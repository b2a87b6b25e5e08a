"""What a release writes into git: the commit of dvc.lock and the annotated tag, and who may push them.

Both are made from nothing but their content and the time of the released commit, so the same release gives the same
objects whenever it is repeated; pushing one that is there already changes nothing.
"""

import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from ml import git
from ml.errors import UserError
from ml.lock import LOCK
from ml.release.version import PREFIX, Version, parse_version
from ml.settings import Settings

ATTEMPTS = 5  # at the default branch, when others push to it meanwhile
IDENTITY = {"NAME": "Release job", "EMAIL": "release@noreply.localhost"}  # GIT_COMMITTER_NAME and its kin win
# in git's words; a refusal is "[remote rejected]"
RACES = ("[rejected]", "cannot lock ref", "failed to update ref")
SUMS = "SHA256SUMS"  # the line above the sums in a tag's message, and the file of them among the release's
SUM = re.compile(r"([0-9a-f]{64})  (\S+)")
NO_PIPELINE = "ci.skip"  # push option


@dataclass(frozen=True)
class Tag:
    """A release. `base` is the commit that was released: `commit` itself, or its parent where it adds dvc.lock.

    `sums`: the SHA-256 of each of its files by name. The tag is protected, its package is not: Developers may put
    another file of the same name on top.
    """

    name: str
    version: Version
    commit: str
    base: str
    trailers: dict[str, str]
    sums: dict[str, str]

    def holds(self, model_sha256: str, lock_sha256: str) -> bool:
        return (self.trailers.get("Model-Sha256"), self.trailers.get("Lock-Sha256")) == (
            model_sha256,
            lock_sha256,
        )


@dataclass(frozen=True)
class Pushed:
    done: bool
    race: bool = False  # somebody else was faster: look again
    reason: str = ""  # what git or the server said, without an address


def run(*arguments: str, text: str | None = None, **environment: str) -> str:
    """Standard output of a git command. Raises GitError.

    Bytes that are not UTF-8, as in names and messages of commits, are handed through as they are (surrogateescape).
    """
    return git.run(*arguments, text=text, **environment).decode("utf-8", "surrogateescape").strip()


def parents(commit: str) -> list[str]:
    return run("rev-list", "--parents", "--max-count=1", commit).split()[1:]


def messages(before: str, commit: str) -> list[str]:
    """Of the commits after `before`; of those that touch the project, where it lies in a folder of the repository."""
    own = ("--", ".") if run("rev-parse", "--show-prefix") else ()
    told = run("log", "--format=%B%x01", f"{before}..{commit}", *own).split("\x01")
    return [message.strip() for message in told if message.strip()]


def is_ancestor(older: str, newer: str) -> bool:
    """Whether `newer` has `older` in its history; every commit has itself."""
    return git.says_yes("merge-base", "--is-ancestor", older, newer)


def fetch(branch: str) -> str:
    """Bring the default branch and all tags; the branch's newest commit.

    Raises UserError without the whole history: versions and merge requests are found by it.
    """
    if run("rev-parse", "--is-shallow-repository") == "true":
        raise UserError('The history is not whole here. Set GIT_DEPTH: "0" for the release job.')
    tracked = f"refs/remotes/origin/{branch}"
    done = git.attempt("fetch", "--quiet", "--force", "--tags", "origin", f"+refs/heads/{branch}:{tracked}")
    if done.returncode:
        raise UserError(
            f"origin's {branch} could not be fetched: {git.own_words(done.stderr)}. "
            "Check `git remote get-url origin` and CI_DEFAULT_BRANCH, then run the job again."
        )
    return git.resolve(tracked)


def release_tags(head: str) -> list[Tag]:
    """All that are named model-vX.Y.Z, the highest version first, as seen from the commit `head`."""
    fields = (
        "refname:strip=2",
        "objectname",
        "*objectname",
        "contents:trailers:only,unfold",
        "contents:body",
    )
    form = "%00".join(f"%({field})" for field in fields)
    listed = run("for-each-ref", f"--format={form}%01", f"refs/tags/{PREFIX}*")
    found = []
    for entry in listed.split("\x01"):
        name, *rest = entry.strip("\n").split("\0")
        version = parse_version(name)
        if version is not None:
            target, peeled, lines, body = rest
            commit = peeled or target
            pairs = (line.partition(": ") for line in lines.splitlines())
            trailers = {key: value for key, _, value in pairs}
            found.append(Tag(name, version, commit, base_of(commit, head), trailers, sums_of(body)))
    return sorted(found, key=lambda tag: tag.version, reverse=True)


def sums_of(body: str) -> dict[str, str]:
    """The sums in the body of a tag's message, by the files' names: the lines below SHA256SUMS, as sha256sum writes them."""
    lines = iter(body.splitlines())
    found = {}
    for line in lines:
        if line == SUMS:
            while match := SUM.fullmatch(next(lines, "")):
                found[match[2]] = match[1]
    return found


def base_of(commit: str, head: str) -> str:
    """The commit that a tag at `commit` releases: its parent where it only adds dvc.lock beside the history."""
    if is_ancestor(commit, head):
        return commit
    above = parents(commit)
    if len(above) != 1:
        return commit
    changed = run("diff-tree", "-r", "--no-relative", "--name-only", "-z", above[0], commit)
    return above[0] if changed.rstrip("\0") == lock_path() else commit


def lock_path() -> str:
    """dvc.lock as git names it: the project may lie in a folder of the repository."""
    return run("rev-parse", "--show-prefix") + LOCK


def dated_as(commit: str) -> dict[str, str]:
    """The environment in which git gives its objects the time of `commit` and the release job's name."""
    when = run("show", "--no-patch", "--format=%ct", commit) + " +0000"
    people = {
        f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in IDENTITY.items()
    }
    given = {name: os.environ[name] for name in people if os.environ.get(name)}
    return people | given | {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when}


def lock_commit(parent: str, lock: bytes, message: str) -> str:
    """A commit after `parent` that changes dvc.lock and nothing else; it is on no branch yet."""
    with tempfile.TemporaryDirectory() as folder:
        content = Path(folder) / "lock"
        content.write_bytes(lock)
        blob = run("hash-object", "-w", "--no-filters", str(content))
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        run("read-tree", parent, **index)
        run("update-index", "--add", "--cacheinfo", f"100644,{blob},{lock_path()}", **index)
        tree = run("write-tree", **index)
    return run("commit-tree", tree, "-p", parent, text=message, **dated_as(parent))


def tag_object(name: str, commit: str, base: str, message: str) -> str:
    """The annotated tag as an object of git; no name points to it yet."""
    tagger = run("var", "GIT_COMMITTER_IDENT", **dated_as(base))
    return run("mktag", text=f"object {commit}\ntype commit\ntag {name}\ntagger {tagger}\n\n{message}")


def stand_on(commit: str) -> None:
    """Make `commit` the HEAD without touching a file or a branch: what follows is described as made from it."""
    run("update-ref", "--no-deref", "HEAD", commit)
    run("read-tree", commit)


def push(settings: Settings, source: str, ref: str, *options: str) -> Pushed:
    """Push one object to `ref` of the project's repository with RELEASE_TOKEN, without one as `origin` is set up.

    `options`: push options; left out where the server knows none.
    """
    token = settings.release_token
    if token is None or settings.ci_project_url is None:
        address, environment = "origin", {}
    else:
        address = f"{settings.ci_project_url}.git"
        environment = authorization(settings, address, token)
    command = ["push", "--porcelain", address, f"{source}:{ref}"]
    done = git.attempt(*command, *(f"--push-option={option}" for option in options), **environment)
    if done.returncode and b"does not support push options" in done.stderr:
        done = git.attempt(*command, **environment)
    if done.returncode == 0:
        return Pushed(True)
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    race = any(word in said for word in RACES)
    return Pushed(False, race, git.own_words(done.stderr).replace(address, "the repository"))


def authorization(settings: Settings, address: str, token: SecretStr) -> dict[str, str]:
    """Environment for git to send the token to `address`; not on the command line, which others could read."""
    count = int(os.environ.get("GIT_CONFIG_COUNT", "0"))
    secret = base64.b64encode(f"oauth2:{token.get_secret_value()}".encode()).decode()
    values = {
        "credential.helper": "",
        f"http.{address}.extraHeader": f"Authorization: Basic {secret}",
    }
    if settings.ci_server_tls_ca_file is not None:
        values[f"http.{address}.sslCAInfo"] = str(settings.ci_server_tls_ca_file)
    environment = {"GIT_CONFIG_COUNT": str(count + len(values))}
    for number, (key, value) in enumerate(values.items(), count):
        environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return environment


def commit_lock(
    settings: Settings, base: str, lock: bytes, message: str, earlier: Collection[str] = ()
) -> str | None:
    """Bring `lock` to the default branch as a commit of its own, after what others pushed meanwhile; no pipeline runs.

    `earlier`: the SHA-256 of dvc.lock in the releases before this one, in whose place it comes: of two merges at once,
    the first one's release lays its dvc.lock on top of the second merge.

    Returns None when the branch has it now, else the reason why not.
    """
    branch = settings.ci_default_branch
    before = git.show(base, LOCK)
    for _ in range(ATTEMPTS):
        tip = fetch(branch)
        found = git.show(tip, LOCK)
        if found == lock:
            return None
        if not is_ancestor(base, tip):
            return f"{branch} no longer has {base[:8]} in its history"
        if found != before and hashlib.sha256(found or b"").hexdigest() not in earlier:
            return f"{branch} has moved on and brings a {LOCK} of its own, whose release will commit it"
        pushed = push(settings, lock_commit(tip, lock, message), f"refs/heads/{branch}", NO_PIPELINE)
        if pushed.done:
            run("update-ref", f"refs/remotes/origin/{branch}", fetch(branch))
            return None
        if not pushed.race:
            return pushed.reason
    return f"others pushed to {branch} during each of {ATTEMPTS} attempts"
