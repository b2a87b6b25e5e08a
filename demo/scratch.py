"""A scratch copy of this repository to run commands in: real git, real DVC with a remote in a folder."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import requests

ROOT = Path(__file__).parents[1]

START_SECONDS = 120.0  # for a server on a busy machine

IDENTITY = {"GIT_AUTHOR_NAME": "demo", "GIT_AUTHOR_EMAIL": "demo@localhost"}
IDENTITY |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in IDENTITY.items()}


def say(step: str) -> None:
    print(f"\n\033[1m── {step}\033[0m" if sys.stdout.isatty() else f"\n── {step}", flush=True)


class Scratch:
    """A repository in `workspace`/project with the files that git knows of here, as they are now."""

    def __init__(self, workspace: Path) -> None:
        self.workspace, self.project = workspace, workspace / "project"
        shutil.rmtree(workspace, ignore_errors=True)
        self.project.mkdir(parents=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (self.project / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.project / name)
        self.run("git", "init", "--quiet", "--initial-branch=main", quiet=True)

    def environment(self) -> dict[str, str]:
        return {
            # In a GitLab job, CI_* and its kin describe another repository than the scratch one.
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("CI_", "GITLAB_", "REPO_TOKEN", "MLFLOW_"))
            },
            **IDENTITY,
            "PYTHONPATH": str(self.project / "src"),
            "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
            "GIT_CONFIG_GLOBAL": os.devnull,  # no signing, no hooks of the user's
        }

    def run(self, *command: str, quiet: bool = False, may_fail: bool = False) -> None:
        """Run a command, showing it unless `quiet`. A failure ends the program unless it `may_fail`."""
        if not quiet:
            print(f"$ {shlex.join(shown(command))}", flush=True)
        done = subprocess.run(command, cwd=self.project, env=self.environment())
        if done.returncode and not may_fail:
            sys.exit(f"stopped: {shlex.join(command)} failed.")

    def python(self, *arguments: str, **options: bool) -> None:
        self.run(sys.executable, *arguments, **options)

    def serving(self, token: str, **more: str) -> AbstractContextManager[str]:
        """`python -m ml.serve` on a free port while the block runs; yields its address."""
        environment = {"SERVE_TOKEN": token, "SERVE_DRAIN": "0", **more}
        port = free_port()
        print(f"$ PORT={port} SERVE_TOKEN=… python -m ml.serve", flush=True)
        return self.server(
            [sys.executable, "-m", "ml.serve"], port, "/ready", {"PORT": str(port), **environment}
        )

    def scoring(self, model: str) -> AbstractContextManager[str]:
        """MLflow's own server of a registered model."""
        port = free_port()
        command = [
            "mlflow",
            "models",
            "serve",
            "--model-uri",
            model,
            "--env-manager",
            "local",
            "--port",
            str(port),
        ]
        print(f"$ {shlex.join(command)}", flush=True)
        return self.server(command, port, "/ping", {})

    @contextmanager
    def server(self, command: list[str], port: int, ready: str, more: dict[str, str]) -> Iterator[str]:
        log, address = self.workspace / "server.log", f"http://127.0.0.1:{port}"
        with open(log, "w") as file:
            process = subprocess.Popen(
                command,
                cwd=self.project,
                env={**self.environment(), **more},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(address + ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"stopped: {shlex.join(command)} does not serve.\n{log.read_text()}")
                time.sleep(0.1)
            yield address
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself: what it said is the error to show
                os.killpg(process.pid, signal.SIGTERM)  # MLflow's has a child that would stay
            process.wait(timeout=30)

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all", quiet=True)
        self.run("git", "commit", "--quiet", "--message", message, quiet=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def answers(address: str) -> bool:
    with suppress(requests.RequestException):
        return requests.get(address, timeout=5).ok
    return False


def shown(command: tuple[str, ...]) -> tuple[str, ...]:
    return ("python", *command[1:]) if command[0] == sys.executable else command
