"""One MLflow tracking server of the team stack; compose, kustomize and the tests start it by this file.

    python server.py prepare    # once, before the servers: the schema, the administrator, the roles
    python server.py serve      # a replica: keeps nothing of its own, so there may be as many as wanted

Its settings are environment variables. A secret NAME is read from the file that NAME_FILE names.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote, urlencode

HERE = Path(__file__).resolve().parent
REQUIRED = {
    "PUBLIC_HOST": "name in the address of the tracking server, without port",
    "PUBLIC_ORIGIN": "https://NAME[:PORT] as the browser shows it",
    "DB_HOST": "PostgreSQL's address",
    "S3_BUCKET": "bucket of the artifacts",
}
SECRETS = {  # file in *_FILE → variable that MLflow or libpq reads
    "DB_PASSWORD": "PGPASSWORD",
    "ADMIN_PASSWORD": "MLFLOW_AUTH_ADMIN_PASSWORD",
    "SESSION_KEY": "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "KEK_PASSPHRASE": "MLFLOW_CRYPTO_KEK_PASSPHRASE",
}
PREPARE_LOCK = 7_283_113  # any number: PostgreSQL's advisory lock, so that two `prepare` at once take turns
DATABASE_WAIT = 60  # seconds
STORE_WAIT = 45.0  # seconds
SHORTEST_SECRET = 12  # characters


def main() -> None:
    command = sys.argv[1:]
    if command not in (["prepare"], ["serve"]):
        sys.exit(f"usage: {Path(sys.argv[0]).name} prepare | serve")
    read_settings()
    prepare() if command == ["prepare"] else serve()


def read_settings() -> None:
    """Complete this process's environment. Ends the process, naming every variable that is missing or bad."""
    problems = [
        f"{name}: not set ({meaning})" for name, meaning in REQUIRED.items() if not os.environ.get(name)
    ]
    for name, variable in SECRETS.items():
        value, problem = read_secret(name)
        problems += [problem] if problem else []
        os.environ[variable] = value
    if problems:
        sys.exit("The tracking server does not start:\n" + "\n".join(f"  {each}" for each in problems))
    os.environ |= {
        "MLFLOW_BACKEND_STORE_URI": database_uri(),
        "MLFLOW_AUTH_CONFIG_PATH": str(write_auth_config()),
        "MLFLOW_ENABLE_WORKSPACES": "true",  # without, every user, a reader too, may create experiments and models
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs would keep their queue on this replica's disk
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    for name, value in {
        "POOL_SIZE": "5",
        "MAX_OVERFLOW": "10",
    }.items():  # connections of one store of one worker
        os.environ.setdefault(f"MLFLOW_SQLALCHEMYSTORE_{name}", value)


def read_secret(name: str) -> tuple[str, str | None]:
    """The content of the file, and what is wrong with it; never the content in the message."""
    path = os.environ.get(f"{name}_FILE")
    if not path:
        return "", f"{name}_FILE: not set (a file with the secret)"
    try:
        value = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        return "", f"{name}_FILE: {path} cannot be read ({type(error).__name__})"
    if len(value) < SHORTEST_SECRET:
        return (
            "",
            f"{name}_FILE: {path} holds fewer than {SHORTEST_SECRET} characters; deploy/make_secrets.py makes one",
        )
    return value, None


def database_uri() -> str:
    environment = os.environ
    options = {"sslmode": environment.get("DB_SSLMODE", "verify-full")}
    if authority := environment.get("DB_CA_FILE"):
        options["sslrootcert"] = authority
    user, port, name = (
        environment.get(f"DB_{key}", default)
        for key, default in (("USER", "mlflow"), ("PORT", "5432"), ("NAME", "mlflow"))
    )
    return f"postgresql+psycopg2://{quote(user)}@{environment['DB_HOST']}:{port}/{quote(name)}?{urlencode(options)}"


def write_auth_config() -> Path:
    text = Template((HERE / "basic_auth.ini.template").read_text()).substitute(
        DATABASE_URI=database_uri().replace("%", "%%"),
        ADMIN_USERNAME=os.environ.get("ADMIN_USERNAME", "admin"),
    )
    folder = Path(tempfile.mkdtemp(prefix="mlflow-auth-"))
    (folder / "basic_auth.ini").write_text(text)
    return folder / "basic_auth.ini"


def serve() -> None:
    """Become the server."""
    environment = os.environ
    options = {
        "host": environment.get("LISTEN_HOST", "0.0.0.0"),
        "port": environment.get("PORT", "5000"),
        "workers": environment.get("WORKERS", "2"),
        # Clients that ask for presigned URLs put their files straight into the bucket; see docs/stack.md.
        "artifacts-destination": f"s3://{environment['S3_BUCKET']}",
        "allowed-hosts": environment["PUBLIC_HOST"],
        "cors-allowed-origins": environment["PUBLIC_ORIGIN"],
        "x-frame-options": "DENY",
        "app-name": "basic-auth",
        "uvicorn-opts": "--no-access-log --no-server-header --timeout-graceful-shutdown 20 --timeout-keep-alive 75",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--serve-artifacts", "--enable-workspaces"]
    os.execv(sys.executable, command + [f"--{name}={value}" for name, value in options.items()])


def prepare() -> None:
    """Bring database, administrator, roles and bucket up to what this version and roles.json ask for. May be repeated."""
    with database_lock():
        from mlflow import db
        from mlflow.server import auth  # reads the configuration when imported

        db.commands.main(["upgrade", database_uri()], standalone_mode=False)  # `mlflow db upgrade`
        auth.bootstrap_admin_user()  # migrates its tables, too
        set_roles(auth.store, json.loads((HERE / "roles.json").read_text()))
    make_bucket(os.environ["S3_BUCKET"])
    print("Database and bucket are ready.")


@contextlib.contextmanager
def database_lock() -> Iterator[None]:
    """Wait until the database answers, then hold its lock. Ends the process when it does not answer."""
    import psycopg2

    give_up = time.monotonic() + DATABASE_WAIT
    while True:
        try:
            connection = psycopg2.connect(database_uri().replace("+psycopg2", "", 1))
            break
        except psycopg2.OperationalError as error:
            if time.monotonic() > give_up:
                sys.exit(f"PostgreSQL did not answer within {DATABASE_WAIT} s: {error}")
            time.sleep(1)
    try:
        connection.cursor().execute("SELECT pg_advisory_lock(%s)", (PREPARE_LOCK,))
        yield
    finally:
        connection.close()


def set_roles(store: Any, roles: dict[str, Any]) -> None:
    """Give the roles exactly the grants of roles.json, on every resource of a type. Users keep their roles."""
    there = {role.name: role.id for role in store.list_roles(["default"])}
    for name, role in roles.items():
        role_id = there.get(name) or store.create_role(name, "default", role["description"]).id
        granted = {
            (grant.resource_type, grant.permission): grant.id
            for grant in store.list_role_permissions(role_id)
        }
        wanted = set(role["grants"].items())
        for grant in granted.keys() - wanted:
            store.remove_role_permission(granted[grant])
        for kind, permission in wanted - granted.keys():
            store.add_role_permission(role_id, kind, "*", permission)


def s3_client() -> Any:
    """Credentials, region and certificate authority are where boto3 looks for them."""
    import boto3
    from botocore.config import Config

    style = os.environ.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "auto")
    config = Config(s3={"addressing_style": style}, retries={"total_max_attempts": 2}, connect_timeout=5)
    return boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"), config=config)


def make_bucket(name: str, patience: float = STORE_WAIT) -> None:
    """Make it where it is missing. A store that does not answer keeps no server from starting: a line says so."""
    from botocore.exceptions import BotoCoreError, ClientError

    give_up = time.monotonic() + patience
    while True:
        try:
            s3_client().head_bucket(Bucket=name)
            return
        except ClientError as error:
            problem: Exception = error
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                try:
                    s3_client().create_bucket(Bucket=name)
                    return
                except (BotoCoreError, ClientError) as refused:
                    problem = refused
        except BotoCoreError as error:
            problem = error
        if time.monotonic() > give_up:
            print(
                f"warning: the bucket {name} cannot be used, so artifacts will fail: {problem}.",
                file=sys.stderr,
            )
            print("Look at the store's address, its certificate and the credentials.", file=sys.stderr)
            return
        time.sleep(2)


if __name__ == "__main__":
    main()
