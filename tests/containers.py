"""Real images of this project: built by buildah from a Debian base that debootstrap makes, run by podman.

What is peculiar to the machine that runs the tests (its certificates, its package index) is given to the build from
outside, so that nothing of it is in the image.
"""

import fcntl
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).parents[1]
PROGRAMS = ("buildah", "podman", "runc", "debootstrap")
BASE = "localhost/ml-test-base:bookworm"
CACHE = Path(tempfile.gettempdir()) / f"ml-test-base-{os.getuid()}"
INCLUDE = "python3,python3-venv,ca-certificates"
CI = "localhost/ml-test-ci"
LIMITS = ("--ulimit", "nofile=1000:1000", "--ulimit", "nproc=500:500")
PIP = ("index-url", "extra-index-url", "find-links", "timeout", "default-timeout", "proxy", "trusted-host")
CERTIFICATES = "/etc/ssl/certs"


def need_containers() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install {' '.join(missing)}")
    if os.getuid():
        pytest.skip("debootstrap and buildah --isolation chroot need root here")


def run(*command: str, **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def base_image() -> str:
    """A minimal Debian with Python, made once and kept; from the mirror in ML_TEST_DEBIAN_MIRROR, or Debian's own."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if subprocess.run(["podman", "image", "exists", BASE]).returncode == 0:
            return BASE
        archive = CACHE / "base.tar"
        if not archive.exists():
            mirror = os.environ.get("ML_TEST_DEBIAN_MIRROR", "http://deb.debian.org/debian")
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                root = f"{folder}/root"
                run("debootstrap", "--variant=minbase", f"--include={INCLUDE}", "bookworm", root, mirror)
                without = [f"--exclude=./{path}/*" for path in ("var/cache/apt", "var/lib/apt/lists", "dev")]
                run("tar", "-C", root, *without, "-cf", f"{folder}/base.tar", ".")
                os.replace(f"{folder}/base.tar", archive)
        run("podman", "import", "--quiet", str(archive), BASE)
    return BASE


def pip_here() -> tuple[str, set[str]]:
    """pip's settings here, whether they come from a file or the environment, as one pip.conf; the folders they name."""
    settings, folders = {"cert": "/etc/ssl/certs/ca-certificates.crt"}, set()
    for line in run("pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        key, words = name.split(".", 1)[-1], value.strip("'\"").split()
        if key in PIP:
            settings[key] = " ".join(words)
            # An index's pages link to files beside its folder.
            paths = [os.path.dirname(word[7:]) if word.startswith("file://") else word for word in words]
            folders |= {path for path in paths if os.path.isdir(path)}
    return "\n".join(["[global]", *(f"{key} = {value}" for key, value in settings.items()), ""]), folders


def build(context: Path, target: str, name: str, *options: str, **arguments: str) -> str:
    """The image's id. It stays until the next build; raises AssertionError with the log when the build fails."""
    if "--layers" not in options:  # whose images share what they have in common
        run("podman", "rmi", "--force", "--ignore", name)
    configuration, folders = pip_here()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pip.conf").write_text(configuration)
        mounts = {f"{folder}/pip.conf": "/etc/pip.conf"} | {path: path for path in (CERTIFICATES, *folders)}
        command = ["buildah", "bud", "--format", "docker", "--isolation", "chroot", "--network", "host"]
        command += ["--quiet", "--target", target, "--tag", name, *options]
        command += [word for path, to in mounts.items() for word in ("--volume", f"{path}:{to}:ro")]
        given = {"BASE": BASE, **arguments}
        command += [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
        return run(*command, ".", cwd=context).strip().splitlines()[-1]


@functools.cache
def ci_image() -> str:
    """The image of the jobs, of this checkout: minutes, or seconds where only src/ has changed since the last build.

    Without CML, which the npm registry may lack: reports are then posted by python-gitlab.
    """
    base_image()
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(ROOT, "ci", CI, "--layers", CML="")
    return CI


def inspect(image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("podman", "image", "inspect", image))[0]
    return found


def in_image(image: str, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a program of the image in place of its own, as its own user."""
    start = ["podman", "run", "--rm", "--network", "none", "--read-only", *LIMITS, "--entrypoint", command[0]]
    return subprocess.run([*start, image, *command[1:]], capture_output=True, text=True, timeout=60)


@contextmanager
def container(image: str, *options: str, **environment: str) -> Iterator["Container"]:
    """The service, with a read-only file system and a /tmp of its own, on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"HOST": "127.0.0.1", "PORT": str(port), "SERVE_DRAIN": "0", **environment}
    command = ["podman", "run", "--detach", "--network", "host", "--read-only", "--tmpfs", "/tmp", *LIMITS]
    command += ["--cap-drop", "all", "--security-opt", "no-new-privileges", *options]
    command += [word for key, value in given.items() for word in ("--env", f"{key}={value}")]
    name = run(*command, image).strip()
    try:
        yield Container(name, f"http://127.0.0.1:{port}")
    finally:
        run("podman", "rm", "--force", "--time", "5", name)


class Container:
    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def exec(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["podman", "exec", self.name, *command], capture_output=True, text=True, timeout=60
        )

    def logs(self) -> str:
        done = subprocess.run(["podman", "logs", self.name], capture_output=True, text=True)
        return done.stdout + done.stderr

    def exit_code(self, seconds: float = 30) -> int:
        return int(run("podman", "wait", self.name, timeout=seconds))

    def wait_until_ready(self, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if requests.get(f"{self.address}/ready", timeout=2).status_code == 200:
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s:\n{self.logs()[-3000:]}")
