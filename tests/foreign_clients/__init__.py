"""Programs of others that drive GitLab, installed unchanged beside this Python: `python -m tests.foreign_clients`.

npm's two are pinned by their package-lock.json, the runner by requirements.txt.

| client | MB | installed by |
|---|---|---|
| semantic-release with @semantic-release/gitlab | 76 | its tests |
| gitlab-python-runner | 44 | its test |
| renovate, with the Node that it takes | 453 | the command only |

In a job of GitLab's nothing is installed on the way: a project made of this template needs none of them.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rehearse.runner import Missing, node

HERE = Path(__file__).parent
INSTALLED = Path(sys.prefix, "share", "foreign-clients")
NPM = ("semantic-release", "renovate")


def npm_packages(name: str, install: bool = True) -> Path:
    """The node_modules of one of NPM. Raises Missing where it is and is not to be installed, or cannot be."""
    npm = node().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
    command = [str(node()), str(npm), "ci", *options]
    files = [HERE / name / "package.json"]
    return _installed(name, "package-lock.json", files, [command], install) / "node_modules"


def runner() -> Path:
    """The Python of an environment that has gitlab-python-runner. Raises Missing."""
    pip = ["bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "venv", "."], [*pip, "--requirement", "requirements.txt"]]
    return _installed("runner", "requirements.txt", [], commands) / "bin" / "python"


def _installed(
    name: str, pins: str, files: list[Path], commands: list[list[str]], install: bool = True
) -> Path:
    """The folder in which the commands have run for these pins, once, however many ask."""
    if (os.environ.get("GITLAB_CI") or not install) and not (INSTALLED / name / "done").is_file():
        raise Missing(f"{name} is not installed here. Run: python -m tests.foreign_clients")
    folder = INSTALLED / name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = HERE / pins if (HERE / pins).is_file() else HERE / name / pins
    with open(INSTALLED / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if done.is_file() and done.read_bytes() == wanted.read_bytes():
            return folder
        for file in (wanted, *files):
            shutil.copy(file, folder)
        path = f"{node().parent}{os.pathsep}{os.environ['PATH']}"
        for command in commands:
            run = subprocess.run(
                command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
            )
            if run.returncode:
                raise Missing(
                    f"{name} could not be installed:\n{run.stderr.strip()[-500:]}\n"
                    "It needs its package registry once; then its tests run without a network."
                )
        shutil.copy(wanted, done)
    return folder
