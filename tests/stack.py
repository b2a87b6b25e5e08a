"""The team stack of deploy/ as processes: PostgreSQL, S3 (moto), two MLflow servers, nginx with TLS.

The same files run here as in containers: postgres/start.sh, pg_hba.conf and init.sql; tracking/server.py with its
template and roles; proxy/stack.conf.template; secrets of make_secrets.py. What differs is said where it differs.
"""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import requests

from tests.ports import free_port

DEPLOY = Path(__file__).parents[1] / "deploy"
HOST = "localhost"
BUCKET = "mlflow"
START_LIMIT = 240  # seconds, on a machine that does much else

LIST_ROUTES = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import server
server.read_settings()
os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
from mlflow.server import app
from mlflow.server.auth import create_app
api = create_app()
routes = {(rule.rule, method) for rule in app.url_map.iter_rules() for method in rule.methods}
waiting = list(api.routes)
while waiting:
    route = waiting.pop()
    inner = getattr(route, "original_router", None) or getattr(route, "router", None)
    waiting += getattr(inner, "routes", [])
    routes |= {(route.path, method) for method in getattr(route, "methods", None) or [] if hasattr(route, "path")}
print(json.dumps(sorted(routes)))
"""


def postgres_programs() -> Path | None:
    """Debian keeps PostgreSQL's programs off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def missing_programs() -> list[str]:
    there = {
        "postgresql": postgres_programs(),
        "nginx": shutil.which("nginx", path="/usr/sbin:" + os.environ["PATH"]),
    }
    return [name for name, path in there.items() if not path]


def until(ready: Callable[[], object], what: str, limit: float = START_LIMIT) -> None:
    give_up = time.monotonic() + limit
    while not ready():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{what} took more than {limit:g} s")
        time.sleep(0.1)


class Stack:
    """Everything runs after `start`; `kill_server(0)` is `kill -9` of a server with all its processes."""

    def __init__(self, folder: Path, servers: int = 2, workers: int = 1) -> None:
        self.folder = folder
        self.secrets = folder / "secrets"
        self.ports = {name: free_port() for name in ("postgres", "moto", "mlflow", "s3", "status")}
        self.server_ports = [free_port() for _ in range(servers)]
        self.workers = workers
        self.url = f"https://{HOST}:{self.ports['mlflow']}"
        self.s3_url = f"https://{HOST}:{self.ports['s3']}"
        self.audit_log = folder / "audit.log"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    # ---- settings that compose.yaml and kustomize give, too

    def server_environment(self, **more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "AWS_", "PG"))
        }
        return kept | {
            "OMP_NUM_THREADS": "1",
            "PUBLIC_HOST": HOST,
            "PUBLIC_ORIGIN": self.url,
            "DB_HOST": "localhost",
            "DB_PORT": str(self.ports["postgres"]),
            "DB_CA_FILE": str(self.secrets / "ca.crt"),
            "DB_PASSWORD_FILE": str(self.secrets / "db-password"),
            "ADMIN_PASSWORD_FILE": str(self.secrets / "admin-password"),
            "SESSION_KEY_FILE": str(self.secrets / "session-key"),
            "KEK_PASSPHRASE_FILE": str(self.secrets / "kek-passphrase"),
            "S3_BUCKET": BUCKET,
            "MLFLOW_S3_ENDPOINT_URL": self.s3_url,
            "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path",
            "AWS_SHARED_CREDENTIALS_FILE": str(self.secrets / "s3-credentials"),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CA_BUNDLE": str(self.secrets / "ca.crt"),
            "WORKERS": str(self.workers),
            "LISTEN_HOST": "127.0.0.1",
            **more,
        }

    def client_environment(
        self, user: str = "admin", password: str | None = None, **more: str
    ) -> dict[str, str]:
        """What docs/stack.md tells a data scientist to set."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
        return kept | {
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password or self.secret("admin-password"),
            "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
            "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true",
            "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": "1",
            "MLFLOW_MULTIPART_DOWNLOAD_MINIMUM_FILE_SIZE": "1",
            "REQUESTS_CA_BUNDLE": str(self.secrets / "ca.crt"),
            **more,
        }

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text().strip()

    # ---- start and stop

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        make = [sys.executable, str(DEPLOY / "make_secrets.py"), "--mlflow-host", HOST, "--s3-host", HOST]
        subprocess.run([*make, "--to", str(self.secrets)], check=True, capture_output=True)
        self.start_s3()
        self.start_proxy()
        self.start_postgres()
        self.prepare()
        for number in range(len(self.server_ports)):
            self.start_server(number)
        for number in range(len(self.server_ports)):
            self.wait_for_server(number)

    def stop(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is None:
                self.signal(name, signal.SIGINT if name == "postgres" else signal.SIGKILL)
        for process in self.processes.values():
            process.wait(30)
        shutil.rmtree(self.postgres_folder, ignore_errors=True)

    def run(
        self, name: str, command: list[str], environment: dict[str, str], user: str | None = None
    ) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, user=user, cwd="/", start_new_session=True
            )

    def signal(self, name: str, number: int) -> None:
        target = self.processes[name]
        if name == "postgres":
            target.send_signal(number)
        else:
            os.killpg(target.pid, number)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def start_s3(self) -> None:
        """moto, where the stack has SeaweedFS or a provider's: it keeps objects, but believes any credentials."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.ports["moto"])]
        self.run("moto", command, dict(os.environ))

    def s3(self) -> "boto3.client":  # type: ignore[valid-type]
        key, secret = (line.split(" = ")[1] for line in self.secret("s3-credentials").splitlines()[1:])
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.ports['moto']}",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            region_name="us-east-1",
        )

    def start_postgres(self) -> None:
        """As the user postgres, for it refuses root; its folder lies where that user can reach it."""
        programs = postgres_programs()
        assert programs
        self.postgres_folder = Path(tempfile.mkdtemp(prefix="stack-postgres-"))
        user = "postgres" if os.getuid() == 0 else None
        data, files, run = (self.postgres_folder / name for name in ("data", "files", "run"))
        files.mkdir()
        run.mkdir()
        for source in (
            *(DEPLOY / "postgres").iterdir(),
            *(self.secrets / name for name in self.database_secrets),
        ):
            shutil.copy(source, files)
        if user:
            owner = pwd.getpwnam(user)
            for path in (self.postgres_folder, *self.postgres_folder.rglob("*")):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        kept = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "CONFIG": str(files), "KEY_FOLDER": str(run)}
        environment = kept | {
            "TLS_CERTIFICATE": str(files / "postgres.crt"),
            "TLS_KEY": str(files / "postgres.key"),
            "DB_PASSWORD_FILE": str(files / "db-password"),
            "PGPASSWORD": self.secret("db-superuser-password"),
        }
        initdb = [
            str(programs / "initdb"),
            "--no-sync",
            "--auth=scram-sha-256",
            "--username=postgres",
            f"-D{data}",
        ]
        subprocess.run(
            [*initdb, f"--pwfile={files / 'db-superuser-password'}"],
            check=True, capture_output=True, user=user, env=environment, cwd="/",
        )  # fmt: skip
        port = str(self.ports["postgres"])
        server = [str(programs / "postgres"), "-D", str(data), "-k", str(run), "-p", port, "-h", "127.0.0.1"]
        self.run("postgres", [str(files / "start.sh"), *server], environment, user)
        client = ["-h", str(run), "-p", port]
        until(
            lambda: subprocess.run([str(programs / "pg_isready"), *client], capture_output=True).returncode
            == 0,
            "PostgreSQL's start",
        )
        init = [str(programs / "psql"), *client, "-U", "postgres", "-q", "-f", str(files / "init.sql")]
        subprocess.run(init, check=True, capture_output=True, env=environment, cwd="/")

    database_secrets = ("postgres.crt", "postgres.key", "db-password", "db-superuser-password")

    def prepare(self) -> None:
        command = [sys.executable, str(DEPLOY / "tracking" / "server.py"), "prepare"]
        done = subprocess.run(command, env=self.server_environment(), capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr

    def start_server(self, number: int) -> None:
        command = [sys.executable, str(DEPLOY / "tracking" / "server.py"), "serve"]
        self.run(f"mlflow-{number}", command, self.server_environment(PORT=str(self.server_ports[number])))

    def wait_for_server(self, number: int) -> None:
        def ready() -> bool:
            assert self.processes[f"mlflow-{number}"].poll() is None, self.log(f"mlflow-{number}")
            try:
                return requests.get(f"{self.server_url(number)}/health", timeout=5).ok
            except requests.RequestException:
                return False

        until(ready, f"the start of server {number}")

    def server_url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.server_ports[number]}"

    def kill_server(self, number: int) -> None:
        self.signal(f"mlflow-{number}", signal.SIGKILL)
        self.processes[f"mlflow-{number}"].wait()

    def start_proxy(self) -> None:
        folder = self.folder / "nginx"
        folder.mkdir()
        servers = " ".join(
            f"server 127.0.0.1:{port} max_fails=1 fail_timeout=5s;" for port in self.server_ports
        )
        values = {
            "MLFLOW_HOST": HOST,
            "S3_HOST": HOST,  # compose: another name on the same port
            "MLFLOW_ORIGIN": self.url,
            "MLFLOW_PORT": f"127.0.0.1:{self.ports['mlflow']}",
            "S3_PORT": f"127.0.0.1:{self.ports['s3']}",
            "STATUS_PORT": f"127.0.0.1:{self.ports['status']}",
            "MLFLOW_SERVERS": servers,
            "S3_SERVERS": f"server 127.0.0.1:{self.ports['moto']};",
            "TLS_CERTIFICATE": str(self.secrets / "tls.crt"),
            "TLS_KEY": str(self.secrets / "tls.key"),
            "AUDIT_LOG": str(self.audit_log),
        }
        template = (DEPLOY / "proxy" / "stack.conf.template").read_text()
        for name, value in values.items():  # as envsubst does: nothing but these
            template = template.replace("${" + name + "}", value)
        (folder / "stack.conf").write_text(template)
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/pid; worker_processes 1; error_log stderr warn; events {{ worker_connections 1024; }}"
            # As nginx's image has it: a log of its own, with queries, that ours must replace.
            f"http {{ {temporary} access_log {folder}/queries.log combined; include {folder}/stack.conf; }}"
            + ("user root;" if os.getuid() == 0 else "")
        )
        program = shutil.which("nginx", path="/usr/sbin:" + os.environ["PATH"])
        assert program
        self.run("nginx", [program, "-p", str(folder), "-c", str(folder / "nginx.conf")], dict(os.environ))

        def ready() -> bool:
            assert self.processes["nginx"].poll() is None, self.log("nginx")
            try:
                return (
                    requests.get(f"http://127.0.0.1:{self.ports['status']}/ready", timeout=5).status_code
                    == 204
                )
            except requests.RequestException:
                return False

        until(ready, "nginx's start")

    def routes(self) -> list[tuple[str, str]]:
        """(path, method) of all that a server answers to, Flask's and FastAPI's, asked of MLflow itself."""
        command = [sys.executable, "-W", "ignore", "-c", LIST_ROUTES, str(DEPLOY / "tracking")]
        environment = self.server_environment(PORT="0")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        return [(path, method) for path, method in json.loads(done.stdout.strip().splitlines()[-1])]

    def answering_strangers(self, url: str, routes: list[tuple[str, str]]) -> set[str]:
        """Paths that answer a request without credentials with anything but 401 and 403."""
        answering = set()
        with requests.Session() as session:
            for path, method in routes:
                if method in ("HEAD", "OPTIONS"):
                    continue
                filled = "/".join("1" if part[:1] in ("<", "{") else part for part in path.split("/"))
                headers = {"Host": HOST} if url.startswith("http:") else {}
                answer = session.request(
                    method, url + filled, headers=headers, timeout=60, allow_redirects=False,
                    verify=str(self.secrets / "ca.crt"),
                )  # fmt: skip
                if answer.status_code not in (401, 403):
                    answering.add(path)
        return answering

    def audit(self) -> list[dict]:
        return [json.loads(line) for line in self.audit_log.read_text().splitlines()]


@contextmanager
def running_stack(folder: Path, **options: int) -> Iterator[Stack]:
    stack = Stack(folder, **options)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
