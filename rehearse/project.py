"""A team's project on an emulated GitLab: real git and a real DVC remote in a folder; each pipeline is run for real."""

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gitlab as python_gitlab
from ruamel.yaml import YAML

from rehearse import gitlab, pipelines, runner
from rehearse.gitlab import REGISTRY, Event, Variable
from rehearse.jobs import Containers, Executor, Shell
from rehearse.pipelines import Run
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.git import git
from tests.gitlab_emulator.protection import BranchRule, TagRule
from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER
from tests.gitlab_emulator.state import User

ROOT = Path(__file__).parents[1]
IDENTITY = {"GIT_AUTHOR_NAME": "Dev Eloper", "GIT_AUTHOR_EMAIL": "dev@localhost"}
IDENTITY |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in IDENTITY.items()}
CI_IMAGE = f"{REGISTRY}/g/proj/ci"  # JOB_IMAGE and JUDGE_IMAGE


@dataclass(frozen=True)
class Answer:
    """A merge request's pipeline, and the comment that it left; seconds from the push to the comment."""

    run: Run
    comment: str
    seconds_to_comment: float


class Project:
    """In `folder`: `gitlab.git` (bare), `remote` (DVC's), `developer` (a clone), `builds` (jobs without containers)."""

    def __init__(
        self,
        folder: Path,
        emulator: GitLabEmulator,
        *,
        containers: Containers | None = None,
        show: bool = False,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.emulator = folder, emulator
        self.remote, self.developer = folder / "remote", folder / "developer"
        state, project = emulator.state, emulator.project
        # Developers merge, as docs/gitlab.md allows; main, images and tags are a Maintainer's.
        project.protected_branches["main"] = BranchRule(push=MAINTAINER, merge=DEVELOPER)
        project.protected_tags |= {name: TagRule(create=MAINTAINER) for name in ("v*", "model-v*")}
        project.pipeline_variables_role = "maintainer"
        self.maintainer = state.add_token(project, "api", MAINTAINER, "maintainer").value
        member = User(state.new_id(), "dev", "Dev Eloper")
        self.member = state.add_token(project, "api", DEVELOPER, "developer", user=member).value
        scopes = ("api", "write_repository")
        self.release_token = state.add_token(project, scopes, MAINTAINER, "release").value
        self.repository = folder / "gitlab.git"
        self.address = emulator.add_repository(self.repository)
        # As docs/gitlab.md tells a team to set them.
        variables = [
            Variable("DVC_REMOTE_URL", str(self.remote)),
            Variable("REPO_TOKEN", emulator.token, scope="experiment/report", masked=True),
            Variable("RELEASE_TOKEN", self.release_token, scope="release/*", protected=True, masked=True),
            Variable("BUILD_CI_IMAGE", "false"),  # there is no BuildKit here
            Variable("BUILD_IMAGE", "false"),
            *(Variable(name, value) for name, value in (extra or {}).items()),
        ]
        executor: Executor = Shell(folder / "builds", ROOT / "src")
        if containers:
            executor = replace(containers, mounts=[*containers.mounts, self.remote])
        self.runner = pipelines.Runner(emulator, executor, variables, show)

    # ---- What the developer does

    def git(self, *arguments: str) -> str:
        return self.call(["git", *arguments])

    def call(self, command: Sequence[str], **more: str) -> str:
        """Run a command as the developer. Raises RuntimeError with what it said when it fails."""
        environment = runner.environment(IDENTITY | {"PYTHONPATH": str(self.developer / "src")} | more)
        # The remote stands for a server: what is put there is anybody's, as jobs run as another user.
        done = subprocess.run(
            command, cwd=self.developer, env=environment, capture_output=True, text=True, umask=0
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def python(self, *arguments: str, **more: str) -> str:
        return self.call([sys.executable, "-m", *arguments], **more)

    def use_template(self, params: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill the project with this repository, trained on nothing yet, and with scikit-learn's digits as its data."""
        self.remote.mkdir(parents=True)
        self.remote.chmod(0o777)
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

    def move_main(self, title: str) -> None:
        """Somebody else changes the default branch, in what no result depends on."""
        self.git("fetch", "--quiet", "origin")
        self.git("switch", "--quiet", "--detach", "origin/main")
        with open(self.developer / "NOTES.md", "a") as file:
            file.write(f"{title}\n")
        self.commit(title)
        self.push("HEAD:main")

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
        """The project, as python-gitlab sees it with a Developer's token."""
        client = python_gitlab.Gitlab(self.emulator.url, private_token=self.member)
        return client.projects.get(self.emulator.project.path)

    def tags(self) -> list[str]:
        """Of the released models, oldest first."""
        self.git("fetch", "--quiet", "--tags", "origin")
        return self.git("tag", "--list", "model-v*", "--sort=creatordate").split()

    # ---- What GitLab does

    def run_merge_request(self, iid: int, jobs: Sequence[str] = (), kind: str = "head") -> Answer:
        """Run the merge request's pipeline, all of it or `jobs` with their needs.

        Args:
            kind: `head`, or `merge` and `train` for the merge of source and target ("merged results", Premium).
        """
        shown = self.api().mergerequests.get(iid)
        source = git(self.repository, "rev-parse", shown.source_branch)
        target = git(self.repository, "rev-parse", "main")
        base = git(self.repository, "merge-base", target, source)
        ref, sha = f"refs/merge-requests/{iid}/{kind}", source
        if kind != "head":
            tree = git(self.repository, "merge-tree", "--write-tree", target, source)
            text = f"Merge branch '{shown.source_branch}' into 'main'"
            sha = git(self.repository, "commit-tree", tree, "-p", target, "-p", source, "-m", text)
        git(self.repository, "update-ref", ref, sha)
        merged = (source, target) if kind != "head" else None
        variables = gitlab.merge_request(
            iid, base, shown.source_branch, shown.labels, merged=merged, kind=kind
        )
        changed = git(self.repository, "diff", "--name-only", base, source).splitlines()
        started = time.time()
        run = self.run_pipeline(Event(variables, ref, sha, set(changed)), jobs)
        notes = [note for note in self.emulator.notes(iid) if "<!-- ml-report" in note.body]
        if not notes:
            return Answer(run, "", float("nan"))
        written = datetime.fromisoformat(notes[-1].updated_at.replace("Z", "+00:00")).timestamp()
        return Answer(run, notes[-1].body, written - started)

    def merge(self, iid: int) -> None:
        """As a Developer does by the button, where Developers may merge."""
        self.api().mergerequests.get(iid).merge()

    def run_main(self, jobs: Sequence[str] = (), source: str = "push") -> Run:
        """Run the default branch's pipeline, all of it or `jobs` without their needs."""
        sha = git(self.repository, "rev-parse", "main")
        changed = git(self.repository, "diff", "--name-only", f"{sha}^", sha).splitlines()
        event = Event(gitlab.branch(source), "main", sha, set(changed), protected=True)
        return self.run_pipeline(event, jobs, with_needs=False)

    def run_tag(self, name: str, jobs: Sequence[str] = ()) -> Run:
        """Run the pipeline of a tag, which is protected."""
        sha = git(self.repository, "rev-parse", f"{name}^{{commit}}")
        return self.run_pipeline(Event(gitlab.tag(name), name, sha, protected=True), jobs)

    def run_pipeline(self, event: Event, jobs: Sequence[str] = (), with_needs: bool = True) -> Run:
        """Raises ValueError where GitLab would make no pipeline."""
        checkout = self.folder / "yaml"
        shutil.rmtree(checkout, ignore_errors=True)
        self.git("clone", "--quiet", "--no-checkout", str(self.repository), str(checkout))
        self.git("-C", str(checkout), "checkout", "--quiet", "--detach", event.sha)
        self.git("-C", str(checkout), "remote", "set-url", "origin", self.address)
        ci = pipelines.expand(runner.preview(checkout, dict(event.variables)))
        return self.runner.run(ci, event, jobs, with_needs)


def copy_files(source: Path, target: Path) -> None:
    """What git would keep of `source`, as it is now, committed or not."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=source, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
