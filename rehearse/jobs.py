"""One job as GitLab's runner runs it: its own folder `/builds`, a helper as root around it, a fresh container for it.

    helper     root, umask 0000: checkout, cache, artifacts of earlier jobs       (rehearse/helper.py)
    build      the job's image and that image's own user: before_script and script, then after_script
    helper     artifacts and cache

`Containers` is the docker executor, by podman or docker. `Shell` has no containers: everything belongs to whoever
rehearses, and the job runs with this machine's programs, so it is kinder than GitLab. In both a job's environment is
what GitLab gives and nothing else. Names as in the runner: shells/abstract.go, shells/bash.go, executors/docker.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Protocol

HELPER = Path(__file__).with_name("helper.py")
PROJECT = "g/proj"
GREEN, RED, RESET = "\033[32;1m", "\033[31;1m", "\033[0;m"
DETECT = "if [ -x /usr/bin/bash ]; then exec /usr/bin/bash; elif [ -x /bin/bash ]; then exec /bin/bash; else exec sh; fi"
REFUSED = 125  # podman's and docker's exit code when a container cannot be started


@dataclass(frozen=True)
class Variable:
    """A variable as the job gets it. A `file` is written out, and the variable holds its path."""

    value: str
    file: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Checkout:
    url: str
    token: str
    sha: str
    refspecs: Sequence[str]
    depth: int = 20  # what GitLab gives a new project
    strategy: str = "fetch"


@dataclass(frozen=True)
class Work:
    """What GitLab hands to a runner for one job."""

    name: str
    image: str
    checkout: Checkout
    variables: Mapping[str, Variable]
    script: Sequence[str]
    after_script: Sequence[str] = ()
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    archives: Sequence[tuple[str, bytes]] = ()  # of the jobs it needs: name, zip
    caches: Sequence[tuple[str, Sequence[str]]] = ()  # key, paths
    timeout: float = 3600.0  # seconds


@dataclass(frozen=True)
class Outcome:
    """`failure` is GitLab's failure_reason; "" where the job passed."""

    failure: str
    archive: bytes = b""  # a zip; empty without artifacts
    dotenv: Mapping[str, str] = field(default_factory=dict)


class Trace:
    """A job's log, as runners from 18.7 on write it: each line with its time and its stream, secrets masked."""

    def __init__(self, masked: Iterable[str], hear: Callable[[str], None]) -> None:
        self.masked = sorted((value for value in masked if value), key=len, reverse=True)
        self.hear, self.lock = hear, threading.Lock()

    def write(self, text: str, stream: str = "00O") -> None:
        for value in self.masked:
            text = text.replace(value, "[MASKED]")
        with self.lock:
            at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            self.hear(f"{at} {stream} {text}")

    def follow(self, pipe: IO[bytes], stream: str) -> threading.Thread:
        def read() -> None:
            for line in pipe:
                self.write(line.decode("utf-8", "replace").rstrip("\n"), stream)

        thread = threading.Thread(target=read)
        thread.start()
        return thread

    @contextmanager
    def section(self, name: str, title: str) -> Iterator[None]:
        self.write(f"section_start:{datetime.now().timestamp():.0f}:{name}\r\033[0K{GREEN}{title}{RESET}")
        yield
        self.write(f"section_end:{datetime.now().timestamp():.0f}:{name}\r\033[0K")


class Place(Protocol):
    """One job's folder for checkouts, and the two ways to run something on it; `remove` ends it."""

    builds: str

    def helper(self, settings: str) -> Sequence[str]:
        """The command that runs rehearse/helper.py as root."""

    def build(self) -> Sequence[str]:
        """The command of a shell that reads the job's script from standard input."""

    def environment(self) -> Mapping[str, str]:
        """Of both commands."""

    def remove(self) -> None: ...


class NoImage(Exception):
    """There is no local image for the one that a job names."""


# ---- In containers


@dataclass(frozen=True)
class Containers:
    """`images`: local images by the beginning of the name that a job asks for. `options` are for every `run`."""

    engine: str  # podman or docker
    images: Mapping[str, str]
    mounts: Sequence[Path] = ()  # folders that stand in for servers: the DVC remote
    options: Sequence[str] = ()

    def prepare(self, work: Work) -> Place:
        for beginning, image in self.images.items():
            if work.image.startswith(beginning):
                return ContainerPlace(self, image)
        raise NoImage(work.image)

    def empty(self, folder: Path) -> None:
        """Remove what is in a folder, files of the containers' users too."""
        if folder.is_dir():
            image = next(iter(self.images.values()))
            clear = ["--rm", "--user", "0:0", "--volume", f"{folder}:/folder", image]
            inside = ["find", "/folder", "-mindepth", "1", "-delete"]
            command = [self.engine, "run", *self.options, *clear, *inside]
            subprocess.run(command, check=True, capture_output=True)


class ContainerPlace:
    builds = "/builds"

    def __init__(self, executor: Containers, image: str) -> None:
        self.executor, self.image, self.container = executor, image, ""
        self.volume = self.call("volume", "create")

    def call(self, *arguments: str) -> str:
        command = [self.executor.engine, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()[-1000:]}")
        return done.stdout.strip()

    @property
    def options(self) -> list[str]:
        mounts = [f"{self.volume}:/builds", *(f"{path}:{path}" for path in self.executor.mounts)]
        # SELinux would keep a container from a folder of this machine; podman would hand it this machine's proxy.
        own = ["--interactive", "--network", "host", "--security-opt", "label=disable"]
        own += ["--http-proxy=false"] if self.executor.engine == "podman" else []
        given = [word for mount in mounts for word in ("--volume", mount)]
        return [*own, *self.executor.options, *given]

    def helper(self, settings: str) -> Sequence[str]:
        program = ["python3", "-c", HELPER.read_text(), settings]
        user = ["--rm", "--user", "0:0", "--env", "HOME=/root"]
        return [self.executor.engine, "run", *user, *self.options, self.image, *program]

    def build(self) -> Sequence[str]:
        """The same container for script and after_script, and never for a second job."""
        if not self.container:
            self.container = self.call("create", *self.options, self.image, "sh", "-c", DETECT)
        return [self.executor.engine, "start", "--attach", "--interactive", self.container]

    def environment(self) -> Mapping[str, str]:
        return os.environ  # of podman itself; it hands nothing of it to a container

    def remove(self) -> None:
        if self.container:
            self.call("rm", "--force", self.container)
        self.call("volume", "rm", "--force", self.volume)


# ---- Without containers


@dataclass(frozen=True)
class Shell:
    """`package` stands for the image's copy of the package `ml`.

    `kept` are variables of this machine without which its programs do not work.
    """

    folder: Path
    package: Path
    kept: Sequence[str] = ("LANG", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "TMPDIR")

    def prepare(self, work: Work) -> Place:
        self.folder.mkdir(parents=True, exist_ok=True)
        return ShellPlace(self, tempfile.mkdtemp(dir=self.folder))


class ShellPlace:
    def __init__(self, executor: Shell, builds: str) -> None:
        self.executor, self.builds = executor, builds

    def helper(self, settings: str) -> Sequence[str]:
        return [sys.executable, str(HELPER), settings]

    def build(self) -> Sequence[str]:
        return ["bash"]

    def environment(self) -> Mapping[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {name: os.environ[name] for name in self.executor.kept if name in os.environ}
        image = {"PYTHONPATH": str(self.executor.package), "NO_INSTALL": "1"}
        own = {"HOME": self.builds, "GIT_CONFIG_GLOBAL": f"{self.builds}/gitconfig", "SHLVL": "1"}
        return kept | image | own | {"PATH": path}

    def remove(self) -> None:
        shutil.rmtree(self.builds, ignore_errors=True)


# ---- The job


class Failed(Exception):
    """A step of a job failed. `reason` is GitLab's failure_reason."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}" if reason == "script_failure" else reason)
        self.reason, self.exit_code = reason, exit_code


Executor = Containers | Shell


def run_job(executor: Executor, work: Work, hear: Callable[[str], None], caches: dict[str, bytes]) -> Outcome:
    """Run it from checkout to artifacts. `hear` gets each line of its log; `caches` are zips by key, and stay.

    Raises NoImage before anything is done.
    """
    place = executor.prepare(work)
    secrets = [variable.value for variable in work.variables.values() if variable.masked]
    run = _Run(place, work, Trace([work.checkout.token, *secrets], hear), caches)
    try:
        return run.whole()
    finally:
        place.remove()


@dataclass
class _Run:
    place: Place
    work: Work
    trace: Trace
    caches: dict[str, bytes]

    @property
    def folder(self) -> str:
        return f"{self.place.builds}/{PROJECT}"

    def whole(self) -> Outcome:
        failure, archive, dotenv = "", b"", b""
        self.trace.write("Running with the rehearsal's runner")
        try:
            self.before()
            try:
                with self.trace.section("step_script", 'Executing "step_script" stage of the job script'):
                    self.script(self.work.script)
            except Failed as error:
                failure = error.reason
                self.trace.write(f"{RED}ERROR: Job failed: {error}{RESET}")
            if self.work.after_script:
                with self.trace.section("after_script", "Running after_script"):
                    self.after()
            archive, dotenv = self.after_build(bool(failure))
        except Failed as error:
            failure = error.reason
            self.trace.write(f"{RED}ERROR: Job failed (system failure): {error}{RESET}")
        if not failure:
            self.trace.write(f"{GREEN}Job succeeded{RESET}")
        return Outcome(failure, archive, read_dotenv(dotenv))

    def before(self) -> None:
        checkout = self.work.checkout
        with self.trace.section("get_sources", "Getting source from Git repository"):
            self.trace.write(f"Checking out {checkout.sha[:8]} as detached HEAD...")
            self.help(
                "sources",
                strategy=checkout.strategy,
                url=checkout.url,
                token=checkout.token,
                refspecs=list(checkout.refspecs),
                depth=checkout.depth,
                sha=checkout.sha,
            )
        for key, _ in self.work.caches:
            if key in self.caches:
                self.help("extract", self.caches[key])
        for name, packed in self.work.archives:
            with self.trace.section("download_artifacts", "Downloading artifacts"):
                self.trace.write(f"Downloading artifacts for {name}...")
                self.help("extract", packed)

    def after_build(self, failed: bool) -> tuple[bytes, bytes]:
        """The artifacts and the dotenv report, where they are wanted."""
        about = self.work.artifacts
        wanted = about.get("when", "on_success") in ("always", "on_failure" if failed else "on_success")
        archive = dotenv = b""
        reports = about.get("reports", {})
        if wanted and (about.get("paths") or reports):
            with self.trace.section("upload_artifacts", "Uploading artifacts"):
                names = [Template(self.work.variables).fill(name) for name in about.get("paths", [])]
                archive = self.help("archive", paths=names) if names else b""
                dotenv = self.help("archive", paths=[reports["dotenv"]]) if "dotenv" in reports else b""
        for key, paths in self.work.caches:
            packed = self.help("archive", paths=list(paths))
            if packed:
                self.caches[key] = packed
        return archive, dotenv

    def help(self, action: str, given: bytes = b"", **settings: Any) -> bytes:
        """What the helper writes to standard output. Raises Failed: the runner's own steps are its failures."""
        command = self.place.helper(json.dumps({"action": action, "folder": self.folder, **settings}))
        done = subprocess.run(command, input=given, capture_output=True, env=self.place.environment())
        for line in done.stderr.decode("utf-8", "replace").splitlines():
            self.trace.write(line, "00E")
        if done.returncode:
            raise Failed("runner_system_failure", done.returncode)
        return done.stdout

    def after(self) -> None:
        try:
            self.script(self.work.after_script)
        except Failed as error:  # an after_script changes no job's end
            self.trace.write(f"WARNING: after_script failed, but job will continue unaffected: {error}")

    def script(self, commands: Sequence[str]) -> None:
        """Raises Failed."""
        with subprocess.Popen(
            self.place.build(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.place.environment(),
        ) as process:
            assert process.stdin and process.stdout and process.stderr
            readers = [self.trace.follow(process.stdout, "01O"), self.trace.follow(process.stderr, "01E")]
            process.stdin.write(self.text(commands).encode())
            process.stdin.close()
            try:
                code = process.wait(self.work.timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise Failed("job_execution_timeout", 1) from None
            finally:
                for reader in readers:
                    reader.join()
        if code:
            raise Failed("runner_system_failure" if code == REFUSED else "script_failure", code)

    def text(self, commands: Sequence[str]) -> str:
        """The script: variables, then the commands, in a shell that stops at the first that fails."""
        lines = []
        for name, variable in self.work.variables.items():
            value = shlex.quote(variable.value)
            if variable.file:
                path = f"{self.folder}.tmp/{name}"
                lines += [f"mkdir -p {self.folder}.tmp", f"printf %s {value} > {path}"]
                value = path
            lines.append(f"export {name}={value}")
        lines += [
            f"export CI_BUILDS_DIR={self.place.builds} CI_PROJECT_DIR={self.folder}",
            f"cd {self.folder}",
        ]
        for command in commands:
            lines += [f"echo {shlex.quote(f'{GREEN}$ {command.splitlines()[0]}{RESET}')}", command]
        guard = 'case "$(set -o)" in *"pipefail"*) set -o pipefail;; esac; set -o errexit; set +o noclobber'
        return f"{guard}\n(eval {shlex.quote(chr(10).join(lines))}) < /dev/null\nexit 0\n"


def read_dotenv(packed: bytes) -> dict[str, str]:
    """The variables of a dotenv report, given in its zip."""
    if not packed:
        return {}
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        lines = "\n".join(archive.read(name).decode() for name in archive.namelist()).splitlines()
    pairs = (line.partition("=") for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): value.strip().strip('"') for name, _, value in pairs}


class Template:
    """Text with $NAME or ${NAME}, filled in as GitLab and the runner do: what is unknown becomes empty."""

    PATTERN = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)\})")

    def __init__(self, variables: Mapping[str, Variable] | Mapping[str, str]) -> None:
        self.variables = variables

    def fill(self, text: str, depth: int = 5) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1]:
                return "$$"
            known = self.variables.get(match[2] or match[3], "")
            return known.value if isinstance(known, Variable) else known

        filled = self.PATTERN.sub(value, text)
        return self.fill(filled, depth - 1) if depth and filled != text else filled.replace("$$", "$")
