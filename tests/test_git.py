"""Git as it fails in earnest: its own words in the error, and the remedy that mends this failure and no other."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ml import git
from ml.errors import UserError
from ml.release import reproduce

OTHER_USER = 12345
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")


def call(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, message: str = "change") -> str:
    call(folder, "add", "--all")
    call(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return call(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits that change dvc.lock, as working folder; no configuration of this machine counts."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    folder = tmp_path / "repository"
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    for number in range(2):
        (folder / "dvc.lock").write_text(f"{number}\n")
        commit(folder)
    monkeypatch.chdir(folder)
    return folder


def object_file(folder: Path, name: str) -> Path:
    found = folder / ".git/objects" / name[:2] / name[2:]
    found.chmod(0o644)
    return found


QUESTIONS = {
    "head": git.head,
    "resolve": lambda: git.resolve("HEAD~1"),
    "exists": lambda: git.exists("HEAD~1"),
    "committed_at": lambda: git.committed_at("HEAD"),
    "is_dirty": git.is_dirty,
    "show": lambda: git.show("HEAD", "dvc.lock"),
    "changed_lines": lambda: git.changed_lines("HEAD", ["dvc.lock"]),
    "changed_paths": lambda: git.changed_paths("HEAD"),
    "prefix": git.prefix,
    "says_yes": lambda: git.says_yes("merge-base", "--is-ancestor", "HEAD~1", "HEAD"),
}


@needs_root
@pytest.mark.parametrize("question", QUESTIONS)
def test_checkout_of_another_user_is_named_as_such_by_every_question(repository: Path, question: str) -> None:
    shutil.chown(repository, OTHER_USER)
    with pytest.raises(
        git.GitError, match="detected dubious ownership.*safe.directory.*GIT_CONFIG_COUNT=1"
    ) as raised:
        QUESTIONS[question]()
    assert "GIT_DEPTH" not in str(raised.value) and "no commit" not in str(raised.value)


@needs_root
def test_each_remedy_for_a_checkout_of_another_user_works(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.chown(repository, OTHER_USER)
    with pytest.raises(UserError) as raised:
        git.head()
    variables = re.findall(r"(GIT_CONFIG_\w+)=(safe.directory|[^\s,.]+)", str(raised.value))
    with monkeypatch.context() as patch:
        for name, value in variables:
            patch.setenv(name, value)
        assert len(git.head()) == 40
    command = re.search(r"`(git config .*?)`", str(raised.value))
    assert command
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    subprocess.run(["sh", "-c", command[1]], check=True)
    assert len(git.head()) == 40


@needs_root
def test_user_of_an_image_reads_a_checkout_of_root_where_the_image_trusts_it(repository: Path) -> None:
    """As the docker executor runs a job: the clone is root's, the process is not."""
    if asked_as_another_user(Path("/"), "").returncode:
        pytest.skip("this Python is closed to other users")
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o755)
        checkout = Path(outer, "checkout")
        shutil.copytree(repository, checkout)
        for path in (checkout, *checkout.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        refused, trusted = (asked_as_another_user(checkout, **more) for more in ({}, TRUST))
    assert refused.returncode == 1 and "detected dubious ownership" in refused.stderr, refused.stderr
    assert trusted.stdout.strip() == call(repository, "rev-parse", "HEAD"), trusted.stderr


HEAD_OR_ERROR = "from ml import errors, git; errors.exit_on_user_error(lambda: print(git.head()))"
TRUST = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}


def asked_as_another_user(
    folder: Path, code: str = HEAD_OR_ERROR, **more: str
) -> "subprocess.CompletedProcess[str]":
    asked = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", sys.executable, "-c", code]
    environment = os.environ | {"HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)} | more
    return subprocess.run(asked, cwd=folder, capture_output=True, text=True, env=environment)


def test_shallow_clone_is_told_to_be_deepened(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = git.resolve("HEAD~1")
    call(tmp_path, "clone", "--quiet", "--depth=1", repository.as_uri(), "shallow")
    monkeypatch.chdir(tmp_path / "shallow")
    with pytest.raises(git.UnknownRevision, match=f"'{older}' is no commit.*shallow.*GIT_DEPTH"):
        git.resolve(older)
    with pytest.raises(git.GitError, match="Not a valid commit name.*shallow.*GIT_DEPTH"):
        git.says_yes("merge-base", "--is-ancestor", older, "HEAD")
    call(tmp_path / "shallow", "fetch", "--quiet", "--unshallow")
    assert git.resolve(older) == older


def test_unknown_revision_in_a_whole_clone_is_told_to_be_checked_or_fetched(repository: Path) -> None:
    for revision in ("nonsense", "f" * 40, "--all", "HEAD:dvc.lock", ""):
        with pytest.raises(
            git.UnknownRevision, match="is no commit of this repository. Check the name"
        ) as raised:
            git.resolve(revision)
        assert "GIT_DEPTH" not in str(raised.value)
        assert not git.exists(revision)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_damaged_commit_is_no_unknown_one(repository: Path, content: bytes) -> None:
    older = git.resolve("HEAD~1")
    object_file(repository, older).write_bytes(content)
    with pytest.raises(git.GitError, match=f"{older}.*is corrupt.*git fsck.*GIT_STRATEGY: clone"):
        git.resolve("HEAD~1")
    with pytest.raises(git.GitError, match="corrupt"):
        git.exists("HEAD~1")


def test_object_that_is_gone_is_no_missing_file(repository: Path) -> None:
    assert git.show("HEAD", "elsewhere") is None
    object_file(repository, call(repository, "rev-parse", "HEAD~1:dvc.lock")).unlink()
    with pytest.raises(git.GitError, match="bad object.*clone is damaged"):
        git.show(git.resolve("HEAD~1"), "dvc.lock")
    with pytest.raises(git.GitError, match="unable to read.*clone is damaged"):
        git.changed_lines("HEAD~1", ["dvc.lock"])


def test_partial_clone_whose_origin_is_gone_says_so(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(repository, "config", "uploadpack.allowFilter", "true")
    older = git.resolve("HEAD~1")
    call(tmp_path, "clone", "--quiet", "--filter=blob:none", repository.as_uri(), "partial")
    call(tmp_path / "partial", "config", "remote.origin.url", "file:///nowhere")
    monkeypatch.chdir(tmp_path / "partial")
    with pytest.raises(git.GitError, match="'/nowhere' does not appear.*promisor remote.*without --filter"):
        git.show(older, "dvc.lock")


def test_lock_of_another_process_is_named(repository: Path) -> None:
    (repository / ".git/index.lock").write_text("")
    with pytest.raises(git.GitError, match=r"index.lock': File exists.*Another git process is at work"):
        git.run("read-tree", "HEAD")


def test_folder_that_is_no_repository_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(git.GitError, match="not a git repository.*Run it in a clone"):
        git.head()


def test_missing_git_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="`git` is missing. Install git"):
        git.head()


def test_password_in_an_address_is_not_shown(repository: Path) -> None:
    with pytest.raises(git.GitError) as raised:
        git.run("fetch", "http://gitlab-ci-token:glcbt-secret@127.0.0.1:9/g/p.git")
    assert "glcbt-secret" not in str(raised.value) and "http://127.0.0.1:9/g/p.git" in str(raised.value)


def test_yes_and_no_are_told_from_a_failure(repository: Path) -> None:
    assert git.says_yes("merge-base", "--is-ancestor", "HEAD~1", "HEAD")
    assert not git.says_yes("merge-base", "--is-ancestor", "HEAD", "HEAD~1")
    with pytest.raises(git.GitError, match="`git merge-base` failed: Not a valid object name nonsense"):
        git.says_yes("merge-base", "--is-ancestor", "nonsense", "HEAD")


# ---- Folders, submodules, names


def test_project_in_a_folder_of_the_repository_is_asked_about_that_folder(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = repository / "models/größe"
    folder.mkdir(parents=True)
    (folder / "dvc.lock").write_text("inner\n")
    (folder / "a.py").write_text("one\n")
    base = commit(repository)
    monkeypatch.chdir(folder)
    assert git.prefix() == "models/größe/"
    assert git.show(base, "dvc.lock") == b"inner\n"
    assert git.show("HEAD~1", "dvc.lock") is None, "the folder is new: the root's file is not its own"
    (repository / "dvc.lock").write_text("another project's\n")
    (folder / "dvc.lock").write_text("written by the pipeline\n")
    assert not git.is_dirty()
    (folder / "a.py").write_text("one\ntwo\n")
    assert git.is_dirty()
    assert git.changed_lines(base, ["a.py", "dvc.lock"]) == {"a.py": (1, 0), "dvc.lock": (1, 1)}
    assert set(git.changed_paths(base)) == {"dvc.lock", "models/größe/dvc.lock", "models/größe/a.py"}


@pytest.fixture
def submodule(repository: Path, tmp_path: Path) -> Path:
    """A submodule of the repository, fetched and committed."""
    other = tmp_path / "other"
    subprocess.run(["git", "init", "--quiet", str(other)], check=True)
    (other / "code.py").write_text("one\n")
    commit(other)
    call(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other), "sub")
    commit(repository)
    return repository / "sub"


def test_submodule_with_other_content_makes_the_folder_dirty(submodule: Path) -> None:
    assert not git.is_dirty()
    (submodule / "untracked").write_text("")
    assert not git.is_dirty()
    (submodule / "code.py").write_text("two\n")
    assert git.is_dirty()
    commit(submodule)
    assert git.is_dirty(), "the submodule stands at another commit than the repository says"
    assert git.changed_paths("HEAD") == {"sub": (1, 1)}


def test_submodule_that_is_not_fetched_is_nobodys_change(
    submodule: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(tmp_path, "clone", "--quiet", str(repository), "clone")
    monkeypatch.chdir(tmp_path / "clone")
    assert not git.is_dirty()
    assert git.changed_paths("HEAD") == {}
    assert git.show("HEAD", "sub/code.py") is None


def test_paths_of_every_kind_come_back_as_they_are(repository: Path) -> None:
    names = [
        "a b",
        "tab\there",
        "line\nbreak",
        'quote"d',
        "-option",
        ":(top)x",
        "größe",
        os.fsdecode(b"latin-\xf6"),
    ]
    for name in names:
        Path(name).write_text("one\n")
    Path("binary").write_bytes(b"\0\1\2")
    base = git.head()
    commit(repository)
    Path("a b").rename("moved")
    assert git.changed_paths(base) == dict.fromkeys([*names[1:]], (1, 0)) | {"binary": None}
    commit(repository)
    changed = git.changed_paths(base)
    assert changed == dict.fromkeys([*names[1:], "moved"], (1, 0)) | {"binary": None}
    assert git.changed_lines(base, names[1:]) == dict.fromkeys(names[1:], (1, 0))


def test_messages_names_and_refs_that_are_not_utf8_are_read(repository: Path) -> None:
    person = b"J\xf6rg <j@example.com> 1700000000 +0000"
    tree = git.ask("rev-parse", "HEAD^{tree}").encode()
    content = b"tree %s\nauthor %s\ncommitter %s\n\nGr\xf6\xdfe\n" % (tree, person, person)
    made = (
        git.run(
            "hash-object",
            "-t",
            "commit",
            "-w",
            "--stdin",
            "--literally",
            text=content.decode("utf-8", "surrogateescape"),
        )
        .decode()
        .strip()
    )
    git.run("update-ref", os.fsdecode(b"refs/heads/gr\xf6\xdfe"), made)
    assert git.ask("show", "--no-patch", "--format=%an: %s", made) == "J\ufffdrg: Gr\ufffd\ufffde"
    assert git.resolve(os.fsdecode(b"gr\xf6\xdfe")) == made
    assert git.committed_at(made).tzinfo is not None
    with pytest.raises(git.UnknownRevision, match="is no commit"):
        git.resolve(os.fsdecode(b"kl\xe4\xdfe"))


def test_clone_to_reproduce_in_has_the_submodules_that_are_fetched_here(
    submodule: Path, repository: Path, tmp_path: Path
) -> None:
    """Their origins need not be reachable, and one within another comes too."""
    inner = tmp_path / "inner"
    subprocess.run(["git", "init", "--quiet", str(inner)], check=True)
    (inner / "deep.py").write_text("deep\n")
    commit(inner)
    call(submodule, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "deeper")
    commit(submodule)
    made = commit(repository)
    for origin in (inner, tmp_path / "other"):
        shutil.rmtree(origin)
    project = reproduce.clone(made, tmp_path)
    assert (project / "sub/code.py").read_text() == "one\n"
    assert (project / "sub/deeper/deep.py").read_text() == "deep\n"


def test_clone_without_a_submodule_that_is_not_fetched_here(
    submodule: Path, repository: Path, tmp_path: Path
) -> None:
    call(repository, "submodule", "--quiet", "deinit", "--all")
    assert list((reproduce.clone(git.head(), tmp_path) / "sub").iterdir()) == []


# ---- Line ends

ROOT = Path(__file__).parents[1]
WINDOWS = ("-c", "core.autocrlf=true", "-c", "core.eol=crlf")


def test_author_on_windows_checks_out_the_bytes_that_dvc_lock_knows(repository: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitattributes", repository)
    contents = {
        "src/train.py": b"one\ntwo\n",
        "a.npz": b"\0\r\n\n\r",
        "b.png": b"\r\n\n text",
        "raw-ubyte": b"a\r\nb\n",
    }
    for name, content in contents.items():
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(content)
    commit(repository)
    call(tmp_path, *WINDOWS, "clone", "--quiet", str(repository), "windows")
    found = {name: (tmp_path / "windows" / name).read_bytes() for name in contents}
    assert found == contents
    (tmp_path / "windows/src/more.py").write_bytes(b"written\r\nby an editor\r\n")
    call(tmp_path / "windows", *WINDOWS, "add", "--all")
    assert call(tmp_path / "windows", "ls-files", "--eol", "src/more.py").startswith("i/lf ")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="these files are no clone")
def test_no_file_of_this_repository_changes_by_its_line_ends() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.split("\t") for line in listed.stdout.splitlines()]
    assert len(rows) > 100
    for state, name in rows:
        index, worktree, attribute = state.split(None, 2)
        if attribute.startswith("attr/-text"):
            assert (index, worktree) == ("i/-text", "w/-text"), name
        else:
            assert attribute.strip() == "attr/text=auto eol=lf", name
            assert (index, worktree) in [("i/lf", "w/lf"), ("i/none", "w/none")], name
