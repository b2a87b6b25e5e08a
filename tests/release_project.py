"""A project as a team has it, small: real git over the emulated GitLab, real DVC, a real ONNX model, no torch."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from ruamel.yaml import YAML

from ml import files
from ml.errors import UserError
from ml.release import pipeline, publish
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.protection import BranchRule, TagRule
from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER
from tests.gitlab_emulator_fixtures import IDENTITY, ask

ROOT = Path(__file__).parents[1]
COMMAND = "python src/stages.py"
PIPELINE: dict[str, Any] = {
    "stages": {
        "load": {
            "cmd": f"{COMMAND} load",
            "deps": ["data", "src/load.py"],
            "params": ["load"],
            "outs": ["artifacts/train.npz", "artifacts/test.npz", "reports/data.json"],
        },
        "train": {
            "cmd": f"{COMMAND} train",
            "deps": ["artifacts/train.npz", "src/train.py", "constraints.txt"],
            "params": ["train.epochs", "train.seeds"],
            "outs": [
                "artifacts/model.onnx",
                "artifacts/model.safetensors",
                "artifacts/golden.npz",
                "artifacts/training.json",
            ],
        },
        "evaluate": {
            "cmd": f"{COMMAND} evaluate",
            "deps": ["artifacts/test.npz", "artifacts/model.onnx"],
            "outs": ["reports/predictions.npz", "reports/metrics.json"],
        },
    }
}


# ---- The team


OF_THE_JOB = (
    "CI_", "GITLAB_", "GIT_", "RELEASE_", "DVC_", "MLFLOW_", "REPO_TOKEN", "SERVE_", "DEPLOY_", "MODEL_", "IMAGE"
)  # fmt: skip


def variables(more: dict[str, str]) -> dict[str, str]:
    """`more`, with nothing of the surrounding job's or user's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_JOB)}
    return {
        **kept,
        **IDENTITY,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        **more,
    }


def run(
    folder: Path, *command: str, fails: bool = False, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    own = variables(environment or {})
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=own)
    assert (done.returncode != 0) == fails, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def job(folder: Path, environment: dict[str, str]) -> Iterator[io.StringIO]:
    """This process as a job in `folder`; what it prints. Starting Python anew for each would take seconds."""
    before, place, said = dict(os.environ), os.getcwd(), io.StringIO()
    own = variables(environment)
    os.environ.clear()
    os.environ.update(own)
    os.chdir(folder)
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="dvc")  # of pygtrie, by DVC
            yield said
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(before)


@dataclass
class ReleaseProject:
    """The team's GitLab, their DVC remote, and a developer's clone, all below `folder`."""

    folder: Path
    gitlab: GitLabEmulator
    release_token: str = ""
    clones: int = 0
    last: Path = Path()

    @property
    def developer(self) -> Path:
        return self.folder / "developer"

    @property
    def bare(self) -> Path:
        return self.folder / "origin.git"

    @property
    def remote(self) -> Path:
        return self.folder / "remote"

    def git(self, *arguments: str, fails: bool = False) -> str:
        return run(self.developer, "git", *arguments, fails=fails).stdout.strip()

    def origin(self, *arguments: str) -> str:
        """Standard output of a git command on the bare repository."""
        return run(self.bare, "git", *arguments).stdout.strip()

    def write(self, path: str, text: str) -> None:
        (self.developer / path).parent.mkdir(parents=True, exist_ok=True)
        (self.developer / path).write_text(text)

    def set_params(self, **train: Any) -> None:
        path = self.developer / "params.yaml"
        found = YAML(typ="safe").load(path.read_text())
        found["train"] |= train
        with open(path, "w") as file:
            YAML().dump(found, file)

    def commit(self, message: str) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        return self.git("rev-parse", "HEAD")

    def push(self, branch: str) -> None:
        """Past the server, as a person with all rights."""
        self.git("push", "--quiet", "--force", str(self.bare), f"HEAD:refs/heads/{branch}")

    def propose(
        self, iid: int, message: str, epochs: int | None = 2, files: dict[str, str] | None = None
    ) -> None:
        """A merge request on a branch of its own, from the newest main; `files`: their new text."""
        self.git("fetch", "--quiet", str(self.bare), "main")
        self.git("checkout", "--quiet", "--force", "-B", f"branch-{iid}", "FETCH_HEAD")
        if epochs is not None:
            self.set_params(epochs=epochs)
        for name, text in (files or {}).items():
            self.write(name, text)
        self.commit(message)
        self.push(f"branch-{iid}")
        self.gitlab.add_merge_request(iid, source_branch=f"branch-{iid}", title=message)

    def clone(self, ref: str, **token: str) -> Path:
        """A job's own checkout of a commit, with the whole history."""
        self.clones += 1
        target = self.folder / f"job-{self.clones}"
        run(self.folder, "git", "clone", "--quiet", "--no-checkout", str(self.bare), str(target))
        run(target, "git", "checkout", "--quiet", "--detach", ref)
        return target

    def review(
        self,
        iid: int,
        comment: str | None = "# better: accuracy",
        kind: Literal["head", "merge", "train"] = "head",
        onto: str = "main",
        **environment: str,
    ) -> str:
        """The merge request's pipeline; its artifacts are on the emulated GitLab afterwards. The commit that it ran for.

        `kind`: on its head, on the merge of `onto` and its head, or the same in a merge train.
        """
        head = self.origin("rev-parse", f"branch-{iid}")
        with self.gitlab.state.lock:
            self.gitlab.project.merge_requests[iid].sha = head
        ref = head if kind == "head" else self.merged(onto, head, f"refs/merge-requests/{iid}/{kind}")
        folder = self.clone(ref)
        variables = self.gitlab.environment(iid) | {"CI_COMMIT_SHA": ref, "DVC_REMOTE_URL": str(self.remote)}
        with job(folder, variables | environment), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["pipeline"])
            pipeline.main()
        jobs = {
            "pipeline": {
                "dvc.lock": (folder / "dvc.lock").read_bytes(),
                "reports/receipt.json": (folder / "reports/receipt.json").read_bytes(),
            },
        }
        if comment is not None:
            jobs["report"] = {
                "reports/comment.md": comment.encode(),
                "reports/comment.html": f"<h1>{comment}</h1>".encode(),
            }
        self.gitlab.add_pipeline(iid, jobs, kind=kind, sha=ref)
        return ref

    def merged(self, onto: str, head: str, ref: str) -> str:
        """A merge commit in the repository that only `ref` names, as GitLab makes for pipelines of merged results."""
        tree = self.origin("merge-tree", "--write-tree", onto, head).splitlines()[0]
        commit = self.origin("commit-tree", tree, "-p", onto, "-p", head, "-m", "Merged result")
        self.origin("update-ref", ref, commit)
        return commit

    def merge(self, iid: int, method: str = "merge", squash: bool = False, role: int = DEVELOPER) -> str:
        """By GitLab's own merge, by somebody of that role; main's new commit."""
        self.gitlab.project.merge_method = method  # type: ignore[assignment]
        path = f"/projects/64/merge_requests/{iid}/merge"
        answer = ask(self.gitlab, "PUT", path, level=role, json={"squash": squash})
        assert answer.status_code == 200, answer.text
        return self.main

    @property
    def main(self) -> str:
        return self.origin("rev-parse", "main")

    def release_environment(self, commit: str, **more: str) -> dict[str, str]:
        variables = self.gitlab.environment(None) | {
            "CI_COMMIT_SHA": commit,
            "CI_DEFAULT_BRANCH": "main",
            "DVC_REMOTE_URL": str(self.remote),
            "RELEASE_TOKEN": self.release_token,
        }
        return variables | more

    def release(self, commit: str = "", folder: Path | None = None, fails: str = "", **more: str) -> str:
        """The release job on a fresh checkout of `commit` (main), `last` afterwards; what it printed.

        `fails`: a part of the message with which it has to end.
        """
        commit = commit or self.main
        self.last = folder or self.clone(commit)
        with job(self.last, self.release_environment(commit, **more)) as said:
            if fails:
                with pytest.raises(UserError, match=fails) as caught:
                    publish.main([])
                return f"{said.getvalue()}{caught.value}"
            publish.main([])
        return said.getvalue()

    # ---- What came of it

    def tags(self) -> list[str]:
        return self.origin("tag", "--list", "--sort=version:refname").splitlines()

    def trailers(self, tag: str) -> dict[str, str]:
        text = self.origin("for-each-ref", "--format=%(contents:trailers:only,unfold)", f"refs/tags/{tag}")
        pairs = (line.partition(": ") for line in text.splitlines())
        return {key: value for key, _, value in pairs}

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.last / "reports/release.json").read_text())
        return found

    def handed_on(self) -> dict[str, str]:
        lines = (self.last / "release.env").read_text().splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}


def make_template(folder: Path, gitlab: GitLabEmulator) -> ReleaseProject:
    """Data on the DVC remote, code on main, GitLab's settings as the documentation has them; nothing has run yet."""
    project = ReleaseProject(folder, gitlab)
    gitlab.project.protected_branches["main"] = BranchRule(push=MAINTAINER, merge=DEVELOPER)
    gitlab.project.protected_tags |= {"model-v*": TagRule(), "v*": TagRule()}
    gitlab.project.pipeline_variables_role = "maintainer"
    developer = project.developer
    developer.mkdir(parents=True)
    gitlab.add_repository(project.bare)
    run(developer, "git", "init", "--quiet", "--initial-branch=main")
    run(developer, "dvc", "init", "--quiet")
    run(developer, "dvc", "config", "core.analytics", "false")
    tree = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    tree["load"]["dataset"] = "custom"
    tree["train"] |= {"epochs": 1, "seeds": [0, 1]}
    with open(developer / "params.yaml", "w") as file:
        YAML().dump(tree, file)
    with open(developer / "dvc.yaml", "w") as file:
        YAML().dump(PIPELINE, file)
    (developer / "src").mkdir()
    shutil.copy(ROOT / "tests/release_stages.py", developer / "src/stages.py")
    project.write("src/load.py", "one\n")
    project.write("src/train.py", "one\n")
    project.write("constraints.txt", "numpy==2.0.0\n")
    project.write("data/raw.bin", "some raw data")
    project.write(
        ".gitignore", "/artifacts/\n/reports/\n/data\n/models/\n/release.env\n/mlflow.db\n/.tracking/\n"
    )
    run(developer, "dvc", "add", "--quiet", "data")
    project.commit("Begin")
    project.push("main")
    run(developer, "dvc", "remote", "add", "--local", "--default", "main", str(project.remote))
    run(developer, "dvc", "push", "--quiet")
    return project


def keep(project: ReleaseProject) -> None:
    """Write what its GitLab knows beside it, so that `opened` can make copies of it, in another process too."""
    with project.gitlab.state.lock:
        content = pickle.dumps((project.gitlab.project, project.gitlab.state._last_id))
    (project.folder / "gitlab.pickle").write_bytes(content)


@contextmanager
def opened(template: Path, folder: Path, version: str = "18.6") -> Iterator[ReleaseProject]:
    """A copy of what was kept in the folder `template`, with a GitLab server of its own, of that version."""
    for name in ("developer", "origin.git", "remote"):
        shutil.copytree(template / name, folder / name, symlinks=True)
    with GitLabEmulator(version=version) as gitlab:
        with gitlab.state.lock:
            found, last_id = pickle.loads((template / "gitlab.pickle").read_bytes())
            gitlab.project = gitlab.state.projects[64] = found
            gitlab.state._last_id = last_id + 1000
        scopes = ("api", "write_repository")
        token = gitlab.state.add_token(gitlab.project, scopes, MAINTAINER, "release").value
        project = ReleaseProject(folder, gitlab, token)
        gitlab.add_repository(project.bare)
        yield project


def published(project: ReleaseProject) -> tuple[str, object, object, dict[str, str]]:
    """What releases leave: refs, GitLab's releases and packages, and the objects of the main remote."""
    stored = (path for path in project.remote.rglob("*") if path.is_file())
    objects = {
        str(path.relative_to(project.remote)): files.sha256(path)
        for path in stored
        if "merge-requests" not in path.parts  # what reviews push
    }
    at_gitlab = project.gitlab.project
    return project.origin("show-ref"), deepcopy(at_gitlab.releases), deepcopy(at_gitlab.packages), objects
