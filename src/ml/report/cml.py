"""The `cml` command, which writes the note where it is installed and would write the right one."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gitlab.v4.objects import ProjectMergeRequestNote

from ml.report.gitlab_notes import Target
from ml.report.note import WATERMARK, WATERMARK_TITLE
from ml.settings import Settings

CML_SECONDS = 60.0  # for the command
CML_NEWEST = 20  # notes: how far back `cml comment update` looks


@dataclass(frozen=True)
class Cml:
    """The `cml` command, called so that it can do no harm.

    `--publish=false`: the pictures are uploaded already, and CML would upload any other file that is linked, write
    the Markdown anew, and crash on Node 18 and later. The watermark that CML appends goes away as soon as the note
    is read back; a hidden one stays, for the next `update` to find.
    """

    command: str
    commit: str
    repo: str
    target: Target
    ca_file: Path | None  # of this GitLab, where a private CA has signed it

    @property
    def watermark(self) -> str:
        """What `cml comment update` looks for."""
        return f'![](https://cml.dev/watermark.png#{self.commit} "CML watermark {WATERMARK_TITLE}")'

    def reaches(self, own: list[ProjectMergeRequestNote], everything: list[ProjectMergeRequestNote]) -> bool:
        """Whether `update` would do right: of the newest notes it edits the oldest with a watermark, else creates."""
        marked = [note.id for note in everything[-CML_NEWEST:] if WATERMARK.search(note.body)]
        return marked == [note.id for note in own[:1]]

    def update(self, body: str, seconds: float) -> str | None:
        """Edit or create the note; None if that went well in time, else the last line of what CML said."""
        with tempfile.TemporaryDirectory(prefix="ml-report-") as folder:
            note = Path(folder, "note.md")
            note.write_text(body, encoding="utf-8")
            flags = ["--publish=false", f"--watermark-title={WATERMARK_TITLE}"]
            where = ["--driver=gitlab", f"--repo={self.repo}", f"--target=pr/{self.target.iid}"]
            command = [self.command, "comment", "update", *flags, *where, str(note)]
            environment = self._environment(folder)
            limit = min(CML_SECONDS, seconds)
            try:
                done = subprocess.run(
                    command,
                    cwd=folder,
                    env=environment,
                    timeout=limit,
                    capture_output=True,
                    encoding="utf-8",
                    errors="replace",
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                return type(error).__name__
        if done.returncode == 0:
            return None
        said = f"{done.stdout}\n{done.stderr}".replace(self.target.token, "[token]").split("\n")
        return next((line.strip() for line in reversed(said) if line.strip()), f"exit code {done.returncode}")

    def _environment(self, folder: str) -> dict[str, str]:
        """This process's environment without what turns CML to another host or sets its flags."""
        foreign = ("CML_", "GITHUB_", "BITBUCKET_", "GIT_", "repo_token")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        if self.ca_file:
            kept["NODE_EXTRA_CA_CERTS"] = str(self.ca_file)
        return kept | {
            "REPO_TOKEN": self.target.token,
            "CI_COMMIT_SHA": self.commit,
            "NODE_OPTIONS": "--no-experimental-fetch",
            "ITERATIVE_DO_NOT_TRACK": "1",
            "GIT_CONFIG_GLOBAL": str(Path(folder, "gitconfig")),  # CML adds to the global one
        }


def find_cml(settings: Settings, target: Target, project_url: str) -> Cml | None:
    """The command on PATH; None without one, or without a commit, which the watermark must name."""
    command = shutil.which("cml")
    if command is None or settings.ci_commit_sha is None:
        return None
    repo = settings.ci_merge_request_project_url or project_url
    return Cml(command, settings.ci_commit_sha, repo, target, settings.ci_server_tls_ca_file)
