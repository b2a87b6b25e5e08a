"""What a release writes into git, wherever and by whomever: folders, submodules, branch names, bytes that are no UTF-8."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml import git
from ml.release import access, merge_request, tag
from ml.release.steps import lock_message
from ml.release.version import Version
from ml.settings import Settings
from tests.gitlab_emulator import GitLabEmulator

LATIN = b"Jos\xe9 M\xfcller"
SUMS = {"model.onnx": "1" * 64, "dvc.lock": "2" * 64}
MESSAGE = (
    "Model 1.0.0: Größer\n\nSHA256SUMS\n"
    + "".join(f"{digest}  {name}\n" for name, digest in SUMS.items())
    + "\nModel-Sha256: m\nLock-Sha256: l\n"
)


def run(folder: Path, *arguments: str | bytes) -> str:
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "PATH": os.environ["PATH"], "HOME": str(folder)}
    options = ["-c", "protocol.file.allow=always", "-c", "user.name=Dev", "-c", "user.email=dev@localhost"]
    done = subprocess.run(["git", *options, *arguments], cwd=folder, capture_output=True, env=own)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("utf-8", "replace").strip()


@pytest.fixture(params=["main", "trunk", "release/1.x", "zweig-ü", "main#1"])
def branch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def work(tmp_path: Path, branch: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A job's checkout of a repository that has all of it; the project lies in the folder `modèles/a b`."""
    bare, work, library = (tmp_path / name for name in ("origin.git", "work", "library"))
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    library.mkdir()
    run(library, "init", "--quiet")
    run(library, "commit", "--quiet", "--allow-empty", "--message", "A library")
    run(tmp_path, "init", "--quiet", "--bare", f"--initial-branch={branch}", str(bare))
    run(tmp_path, "clone", "--quiet", str(bare), str(work))
    run(work, "checkout", "--quiet", "-B", branch)
    run(work, "submodule", "--quiet", "add", str(library), "library")
    project = work / "modèles/a b"
    project.mkdir(parents=True)
    (project / "dvc.lock").write_text("schema: '2.0'\n")
    (work / "elsewhere.txt").write_text("one\n")
    run(work, "add", "--all")
    run(work, "commit", "--quiet", "--message", "Begin")
    (project / "params.yaml").write_text("epochs: 2\n")
    run(work, "add", "--all")
    run(work, "-c", b"user.name=" + LATIN, "commit", "--quiet", "--message", b"fix: l\xe4nger \xff")
    run(work, "push", "--quiet", "origin", branch)
    for key, value in (
        ("i18n.commitEncoding", "ISO-8859-1"),
        ("i18n.logOutputEncoding", "ISO-8859-1"),
        ("diff.relative", "true"),
        ("push.recurseSubmodules", "check"),
    ):
        run(work, "config", key, value)
    monkeypatch.chdir(project)
    yield work


def settings(branch: str) -> Settings:
    return Settings(ci_default_branch=branch, release_token=None, ci_project_url=None)


def test_release_is_written_in_a_folder_of_a_repository_with_a_submodule_and_names_that_are_no_utf8(
    work: Path, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_COMMITTER_NAME", os.fsdecode(LATIN))
    base, lock = git.head(), b"schema: '2.0'\nstages: {}\n"
    tip = tag.fetch(branch)
    assert tip == base and tag.release_tags(base) == []
    message = lock_message(Version(1, 0, 0))
    target = tag.lock_commit(base, lock, message)
    assert target == tag.lock_commit(base, lock, message), "the same whenever it is repeated"

    made = tag.tag_object("model-v1.0.0", target, base, MESSAGE)
    assert tag.push(settings(branch), made, "refs/tags/model-v1.0.0").done
    tag.fetch(branch)
    [beside] = tag.release_tags(base)
    assert (beside.commit, beside.base, beside.sums) == (target, base, SUMS)
    assert beside.trailers == {"Model-Sha256": "m", "Lock-Sha256": "l"}

    assert tag.commit_lock(settings(branch), base, lock, message) is None
    assert run(work, "rev-parse", f"origin/{branch}") == target
    assert git.show(target, "dvc.lock") == lock
    changed = run(work, "diff-tree", "-r", "--no-commit-id", "--name-only", "-z", target)
    assert changed == "modèles/a b/dvc.lock\0"
    assert run(work, "ls-tree", target, "library").startswith("160000 commit")
    raw = subprocess.run(["git", "cat-file", "tag", "model-v1.0.0"], capture_output=True, check=True).stdout
    assert b"tagger " + LATIN in raw and "Größer".encode() in raw
    assert (
        b"encoding" not in subprocess.run(["git", "cat-file", "commit", target], capture_output=True).stdout
    )


@pytest.mark.parametrize("branch", ["main"], indirect=True)
def test_messages_that_are_no_utf8_choose_the_version_and_those_of_other_folders_do_not(
    work: Path, branch: str
) -> None:
    base = git.head()
    run(work, "commit", "--quiet", "--allow-empty", "--message", "feat: nothing of this project")
    (work / "elsewhere.txt").write_text("two\n")
    run(work, "commit", "--quiet", "--all", "--message", "feat!: of another folder")
    [message] = tag.messages(f"{base}^", "HEAD")
    assert message.startswith("fix: l") and message.encode("utf-8", "replace").decode().isprintable()


@pytest.mark.parametrize("branch", ["main"], indirect=True)
def test_what_git_says_in_bytes_that_are_no_utf8_can_be_printed(work: Path, branch: str) -> None:
    hook = work.parent / "origin.git/hooks/update"
    hook.write_bytes(b"#!/bin/sh\nprintf 'GitLab: nicht f\\374r dich\\n' >&2\nexit 1\n")
    hook.chmod(0o755)
    pushed = tag.push(settings(branch), git.head(), "refs/tags/model-v1.0.0")
    assert not pushed.done and not pushed.race
    assert pushed.reason == "remote: GitLab: nicht f\ufffdr dich"
    pushed.reason.encode()


@pytest.mark.parametrize("branch", ["main"], indirect=True)
def test_sums_are_read_from_their_own_place_alone(work: Path, branch: str) -> None:
    told = f"{'3' * 64}  forged\n\nSHA256SUMS\n{'1' * 64}  a\nno sum\n{'4' * 64}  b\n"
    assert tag.sums_of(told) == {"a": "1" * 64}


@pytest.mark.parametrize("branch", ["main"], indirect=True)
def test_review_of_a_project_in_a_folder_has_the_files_of_that_folder(work: Path, branch: str) -> None:
    """GitLab names artifacts from the root of the repository on; another project's receipt may lie there."""
    kept = {
        "modèles/a b/reports/receipt.json": b"ours",
        "modèles/a b/dvc.lock": b"our lock",
        "reports/receipt.json": b"theirs",
    }
    with GitLabEmulator() as gitlab:
        merged = gitlab.add_merge_request(3, sha=git.head(), state="merged", title="Train longer")
        gitlab.add_pipeline(3, {"pipeline": kept, "report": {"modèles/a b/reports/comment.md": b"better"}})
        token = gitlab.state.add_token(gitlab.project, ("api",), 40).value
        given = Settings(
            ci_api_v4_url=f"{gitlab.url}/api/v4", ci_project_id=gitlab.project.id, release_token=token
        )
        project = access.connect(given)
        assert project is not None
        review = merge_request.find_review(project, given, merged.sha)
    assert review is not None
    assert (review.receipt, review.lock, review.comment) == (b"ours", b"our lock", b"better")
