"""What the tests of the emulated GitLab share: git as a person's machine runs it, requests by a token of any kind."""

import os
import subprocess
from pathlib import Path
from typing import Any

import requests

from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.rights import MAINTAINER

IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Dev"), ("EMAIL", "dev@localhost"))
}


def git(folder: Path, *arguments: str, fails: bool = False) -> str:
    """What git says, or its errors where it is to fail."""
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, env=os.environ | IDENTITY | alone
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return (done.stderr if fails else done.stdout).strip()


def emulator(tmp_path: Path, **server: Any) -> GitLabEmulator:
    """With a repository of one commit on main, and merge request 3 of branch `experiment`, one commit further."""
    gitlab = GitLabEmulator(**server)
    gitlab.add_repository(tmp_path / "origin.git")
    work = tmp_path / "work"
    work.mkdir()
    git(work, "init", "--quiet", "--initial-branch=main")
    (work / ".gitlab-ci.yml").write_text("test: {script: [true]}\n")
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "--message", "Begin")
    git(work, "push", "--quiet", str(tmp_path / "origin.git"), "main")
    git(work, "checkout", "--quiet", "-b", "experiment")
    git(work, "commit", "--quiet", "--allow-empty", "--message", "Try")
    git(work, "push", "--quiet", str(tmp_path / "origin.git"), "experiment")
    gitlab.add_merge_request(3, source_branch="experiment")
    return gitlab


def address(gitlab: GitLabEmulator, scopes: Any, level: int) -> str:
    """Of the repository, with a new token in it."""
    token = gitlab.state.add_token(gitlab.project, scopes, level)
    user = "gitlab-ci-token" if token.is_job else "oauth2"
    return f"{gitlab.url.replace('//', f'//{user}:{token.value}@')}/g/proj.git"


def ask(
    gitlab: GitLabEmulator,
    method: str,
    path: str,
    scopes: Any = "api",
    level: int = MAINTAINER,
    **options: Any,
) -> requests.Response:
    """A request by a new token; `path` is below /api/v4."""
    token = gitlab.state.add_token(gitlab.project, scopes, level)
    headers = {"JOB-TOKEN" if token.is_job else "PRIVATE-TOKEN": token.value}
    return requests.request(method, f"{gitlab.url}/api/v4{path}", headers=headers, timeout=30, **options)
