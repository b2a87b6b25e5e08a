"""The expanded .gitlab-ci.yml, and gitlab-ci-local's own reading of its rules, which skips `workflow`."""

import json
import subprocess
from pathlib import Path

from rehearse import gitlab, pipelines, runner
from rehearse.project import ROOT
from rehearse.rules import Expanded, evaluate

__all__ = ["Expanded", "evaluate", "expand", "listed", "repository"]


def repository(folder: Path, source: Path = ROOT, names: tuple[str, ...] = ()) -> Path:
    """A git repository with the files `names` of `source`, with an origin, so that gitlab-ci-local accepts it."""
    names = names or (".gitlab-ci.yml", "templates/experiment/template.yml", "constraints.txt", "Dockerfile")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
    commands = [
        ("init", "--quiet", "--initial-branch=main"),
        ("config", "user.name", "test"),
        ("config", "user.email", "test@example.com"),
        ("config", "commit.gpgsign", "false"),
        ("add", "--all"),
        ("commit", "--quiet", "--message", "files"),
        ("remote", "add", "origin", "http://127.0.0.1:1/g/proj.git"),
        ("update-ref", "refs/remotes/origin/main", "HEAD"),
        ("symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main"),
    ]
    for command in commands:
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


def expand(folder: Path, variables: dict[str, str] | None = None) -> Expanded:
    """Also checks the expanded YAML against GitLab's schema, as gitlab-ci-local does by itself."""
    return pipelines.expand(runner.preview(folder, variables or gitlab.branch()))


def listed(folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """The jobs that gitlab-ci-local would run, with their `when`."""
    jobs = json.loads(runner.ask(folder, variables, "--list-json", "--no-json-schema-validation"))
    return {job["name"]: job["when"] for job in jobs if job["when"] != "never"}
