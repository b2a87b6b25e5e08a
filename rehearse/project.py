"""A team's project on an emulated GitLab: real git and a real DVC remote in a folder; each pipeline is run for real."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import gitlab as python_gitlab
from ruamel.yaml import YAML

from rehearse import gitlab, runner
from rehearse.gitlab import Variable
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.state import Job

ROOT = Path(__file__).parents[1]
IDENTITY = {"GIT_AUTHOR_NAME": "Dev Eloper", "GIT_AUTHOR_EMAIL": "dev@localhost"}
IDENTITY |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in IDENTITY.items()}
MAINTAINER, DEVELOPER = 40, 30


@dataclass(frozen=True)
class Answer:
    """A merge request's pipeline, and the comment that it left; seconds from the push to the comment."""

    run: runner.Run
    comment: str
    seconds_to_comment: float


class Project:
    """In `folder`: `gitlab.git` (bare), `remote` (DVC's), `developer` (a clone), `pipelines/N` (what runners check out)."""

    def __init__(
        self,
        folder: Path,
        emulator: GitLabEmulator,
        *,
        show: bool = False,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.emulator, self.show = folder, emulator, show
        self.remote, self.developer = folder / "remote", folder / "developer"
        state, project = emulator.state, emulator.project
        self.maintainer = state.add_token(project, "api", MAINTAINER, "maintainer").value
        self.release_token = state.add_token(project, "write_repository", MAINTAINER, "release").value
        self.address = emulator.add_repository(folder / "gitlab.git")
        # As docs/gitlab.md tells a team to set them.
        self.variables = [
            Variable("DVC_REMOTE_URL", str(self.remote)),
            Variable("REPO_TOKEN", emulator.token, scope="experiment/report"),
            Variable("RELEASE_TOKEN", self.release_token, scope="release/*", protected=True),
            Variable("BUILD_CI_IMAGE", "false"),  # there is no BuildKit here
            Variable("BUILD_IMAGE", "false"),
            *(Variable(name, value) for name, value in (extra or {}).items()),
        ]
        self.pipelines = 0

    # ---- What the developer does

    def git(self, *arguments: str) -> str:
        return self.call(["git", *arguments])

    def call(self, command: Sequence[str], **more: str) -> str:
        """Run a command as the developer. Raises RuntimeError with what it said when it fails."""
        environment = runner.environment(IDENTITY | {"PYTHONPATH": str(self.developer / "src")} | more)
        done = subprocess.run(command, cwd=self.developer, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def python(self, *arguments: str, **more: str) -> str:
        return self.call([sys.executable, "-m", *arguments], **more)

    def use_template(self, params: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill the project with this repository, trained on nothing yet, and with scikit-learn's digits as its data."""
        self.remote.mkdir(parents=True)
        copy_files(ROOT, self.developer)
        (self.developer / "dvc.lock").unlink(missing_ok=True)
        self.git("init", "--quiet", "--initial-branch=main")
        host = self.address.replace("://", f"://dev:{self.maintainer}@")
        self.git("remote", "add", "origin", host)
        self.change(params)
        self.python("ml.task.dataset", "fetch", "digits", "--to", "data")
        self.call(["dvc", "add", "--quiet", "data"])
        self.python("ml.release.remote", DVC_REMOTE_URL=str(self.remote))
        self.call(["dvc", "push", "--quiet", "data.dvc"])
        self.commit("Use the template on digits")
        self.push("main")

    def change(self, params: Mapping[str, Mapping[str, Any]]) -> None:
        """Write values into params.yaml, as `make preset` does."""
        preset = self.folder / "preset.yaml"
        with open(preset, "w") as file:
            YAML().dump({section: dict(values) for section, values in params.items()}, file)
        self.python("ml.params", "--preset", str(preset))

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def push(self, branch: str) -> None:
        self.git("push", "--quiet", "origin", branch)

    def open_merge_request(self, branch: str, title: str, params: Mapping[str, Mapping[str, Any]]) -> int:
        """Change params on a branch of the newest main, push it, open the merge request; its iid."""
        self.git("fetch", "--quiet", "origin")
        self.git("switch", "--quiet", "--create", branch, "origin/main")
        self.change(params)
        self.commit(title)
        self.push(branch)
        fields = {"source_branch": branch, "target_branch": "main", "title": title}
        return int(self.api().mergerequests.create(fields).iid)

    def api(self) -> Any:
        """The project, as python-gitlab sees it with a maintainer's token."""
        client = python_gitlab.Gitlab(self.emulator.url, private_token=self.maintainer)
        return client.projects.get(self.emulator.project.path)

    def tags(self) -> list[str]:
        """Of the released models, oldest first."""
        self.git("fetch", "--quiet", "--tags", "origin")
        return self.git("tag", "--list", "model-v*", "--sort=creatordate").split()

    # ---- What GitLab does

    def run_merge_request(self, iid: int, jobs: Sequence[str] = ()) -> Answer:
        """Run the merge request's pipeline, all of it or `jobs` with their needs."""
        shown = self.api().mergerequests.get(iid)
        base = self.git("merge-base", "origin/main", shown.source_branch)
        started = time.time()
        variables = gitlab.merge_request(iid, base, shown.source_branch, shown.labels)
        run = self.run_pipeline(shown.source_branch, f"refs/merge-requests/{iid}/head", variables, jobs)
        notes = [note for note in self.emulator.notes(iid) if "<!-- ml-report" in note.body]
        if not notes:
            return Answer(run, "", float("nan"))
        written = datetime.fromisoformat(notes[-1].updated_at.replace("Z", "+00:00")).timestamp()
        return Answer(run, notes[-1].body, written - started)

    def merge(self, iid: int) -> None:
        """As the reviewer does by the button."""
        self.api().mergerequests.get(iid).merge()

    def run_main(self, jobs: Sequence[str] = (), source: str = "push") -> runner.Run:
        """Run the default branch's pipeline, all of it or `jobs` without their needs."""
        return self.run_pipeline("main", "main", gitlab.branch(source), jobs, with_needs=False)

    def run_pipeline(
        self,
        branch: str,
        ref: str,
        variables: dict[str, str],
        jobs: Sequence[str],
        with_needs: bool = True,
    ) -> runner.Run:
        state, project = self.emulator.state, self.emulator.project
        self.pipelines += 1
        checkout = self.folder / "pipelines" / str(self.pipelines)
        checkout.parent.mkdir(exist_ok=True)
        bare = str(self.folder / "gitlab.git")
        self.git("clone", "--quiet", "--branch", branch, bare, str(checkout))
        host = f"{self.emulator.url}/"
        for key, value in (
            ("remote.origin.url", self.address),
            # GitLab writes the job's token into origin's address; gitlab-ci-local would stumble over it there.
            (f"url.{host.replace('://', f'://gitlab-ci-token:{self.emulator.job_token}@')}.insteadOf", host),
            ("user.name", "ci"),
            ("user.email", "ci@localhost"),
        ):
            self.git("-C", str(checkout), "config", key, value)
        sha = self.git("-C", str(checkout), "rev-parse", "HEAD")
        pipeline = state.add_pipeline(project, ref, sha, "running", variables["CI_PIPELINE_SOURCE"], {})
        secrets = gitlab.write_variables(
            checkout.parent / f"{self.pipelines}.json", self.variables, protected_ref=ref == "main"
        )
        variables |= {
            "CI_PIPELINE_ID": str(pipeline["id"]),
            "CI_JOB_TOKEN": self.emulator.job_token,
            "CI_MERGE_REQUEST_PROJECT_URL": f"{self.emulator.url}/{project.path}" if ref != "main" else "",
        }
        logs = Logs(self.emulator, pipeline["id"])
        run = runner.run(
            checkout, variables, secrets, jobs, with_needs=with_needs, show=self.show, heard=logs.hear
        )
        with state.lock:
            pipeline["status"] = "success" if run.passed else "failed"
            for name, end in run.jobs.items():
                job = logs.job(name)
                job.status = "failed" if end == "FAIL" else "success"
                job.artifacts = read_files(run.artifacts / name)
        return run


class Logs:
    """The jobs of a pipeline on the emulated GitLab while it runs: their logs, and which of them have failed."""

    SAID = re.compile(r"^(\S+) +(?:>|\$) (.*)$")
    FAILED = re.compile(r"^(\S+) +finished in .* FAIL \d+")

    def __init__(self, emulator: GitLabEmulator, pipeline: int) -> None:
        self.state = emulator.state
        self.jobs: list[Job] = emulator.project.jobs.setdefault(pipeline, [])

    def job(self, name: str) -> Job:
        with self.state.lock:
            for known in self.jobs:
                if known.name == name:
                    return known
            self.jobs.append(Job(self.state.new_id(), name, "running"))
            return self.jobs[-1]

    def hear(self, line: str) -> None:
        """One line of gitlab-ci-local's."""
        with self.state.lock:
            if said := self.SAID.match(line):
                self.job(said[1]).trace += f"{said[2]}\n"
            elif failed := self.FAILED.match(line):
                self.job(failed[1]).status = "failed"


def copy_files(source: Path, target: Path) -> None:
    """What git would keep of `source`, as it is now, committed or not."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=source, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
