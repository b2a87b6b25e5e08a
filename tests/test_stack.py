"""The team stack, run for real: who gets in, what each role may do, where artifacts go, what a crash costs, restore.

One stack for the whole file; the tests that kill and wipe are the last.
"""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.auth import HTTPBasicAuth

from tests.stack import BUCKET, DEPLOY, HOST, Stack, missing_programs, running_stack
from tests.stack_load import METRICS, PARAMS, value_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]
ROOT = Path(__file__).parents[1]
FOREVER_OPEN = {"/health"}  # through the proxy, without credentials
# What a server answers without credentials, behind the proxy: MLflow's own list.
OPEN_BEHIND_PROXY = {
    "/health",
    "/static-files/<path:filename>",
    "/static-files/<path:path>",
    "/api/3.0/mlflow/server-info",
    "/ajax-api/3.0/mlflow/server-info",
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as started:
        yield started


def access(
    stack: Stack, *arguments: str, user: str = "admin", password: str | None = None
) -> tuple[int, str]:
    command = [sys.executable, "-W", "ignore", str(DEPLOY / "tracking" / "access.py"), *arguments]
    environment = stack.client_environment(user, password)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip() + done.stderr.strip()


@pytest.fixture(scope="module")
def logins(stack: Stack) -> dict[str, HTTPBasicAuth]:
    """One user of each role, made with access.py."""
    made = {}
    for user, role in {"rita": "reader", "dan": "data-scientist", "rel": "releaser"}.items():
        code, password = access(stack, "add", user, "--role", role)
        assert code == 0, password
        made[role] = HTTPBasicAuth(user, password)
    return made | {"administrator": HTTPBasicAuth("admin", stack.secret("admin-password"))}


def call(
    stack: Stack, login: HTTPBasicAuth | None, method: str, path: str, **options: Any
) -> requests.Response:
    options.setdefault("json", None if method == "GET" else {})
    certificates = str(stack.secrets / "ca.crt")
    return requests.request(method, stack.url + path, auth=login, verify=certificates, timeout=60, **options)


def api(
    stack: Stack, login: HTTPBasicAuth | None, method: str, route: str, /, **values: Any
) -> requests.Response:
    options = {"params": values} if method == "GET" else {"json": values}
    return call(stack, login, method, f"/api/2.0/mlflow/{route}", **options)


def client_program(stack: Stack, login: HTTPBasicAuth, code: str, *arguments: str) -> str:
    environment = stack.client_environment(str(login.username), str(login.password), PYTHONWARNINGS="ignore")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


RECORD_A_RUN = """
import os, sys
from pathlib import Path
from ml.tracking.journal import Journal, now
from ml.tracking.sender import flush
root, file = Path(sys.argv[1]), Path(sys.argv[2])
journal = Journal.create(root, tracking_uri=os.environ["MLFLOW_TRACKING_URI"], experiment="direct", name="x", fingerprint="x")
journal.append(params={"a": "1"}, tags={"git_commit": "0" * 40}, metrics=[("loss", 0.5, now(), 1)])
journal.add_files({file.name: file})
journal.append(status="FINISHED", time=now())
assert flush(root) == (1, []), flush(root)
print(journal.sent.run_id)
"""


def test_data_scientists_artifacts_go_straight_into_the_bucket(
    stack: Stack, logins: dict[str, HTTPBasicAuth], tmp_path: Path
) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(3_000_000))
    run_id = client_program(
        stack, logins["data-scientist"], RECORD_A_RUN, str(tmp_path / "journals"), str(file)
    )

    keys = [entry["Key"] for entry in stack.s3().list_objects_v2(Bucket=BUCKET)["Contents"]]
    [key] = [key for key in keys if run_id in key and key.endswith("weights.bin")]
    assert stack.s3().get_object(Bucket=BUCKET, Key=key)["Body"].read() == file.read_bytes()
    # nginx's audit tells who got the bytes: the store, not a server.
    own = [line for line in stack.audit() if line["user"] == "dan"]
    assert sum(line["received"] for line in own) < 100_000
    uploads = [line for line in stack.audit() if line["method"] == "PUT" and key in line["path"]]
    assert sum(line["received"] for line in uploads) > 3_000_000
    assert {line["server"] for line in uploads} == {f"127.0.0.1:{stack.ports['moto']}"}
    for log in (stack.audit_log, stack.folder / "nginx.log", stack.folder / "nginx" / "queries.log"):
        assert "X-Amz" not in log.read_text(), "a presigned URL is a credential"

    download = "import sys, mlflow; print(mlflow.MlflowClient().download_artifacts(sys.argv[1], 'weights.bin', sys.argv[2]))"
    (tmp_path / "there").mkdir()
    path = client_program(stack, logins["reader"], download, run_id, str(tmp_path / "there"))
    assert Path(path).read_bytes() == file.read_bytes()
    assert sum(line["sent"] for line in stack.audit() if line["user"] == "rita") < 100_000


def test_reader_reads_and_changes_nothing(stack: Stack, logins: dict[str, HTTPBasicAuth]) -> None:
    dan, rita = logins["data-scientist"], logins["reader"]
    experiment = api(stack, dan, "POST", "experiments/create", name="roles").json()["experiment_id"]
    run = api(stack, dan, "POST", "runs/create", experiment_id=experiment).json()["run"]["info"]
    run_id, place = run["run_id"], run["artifact_uri"].removeprefix("mlflow-artifacts:")

    assert api(stack, rita, "GET", "runs/get", run_id=run_id).status_code == 200
    assert api(stack, rita, "POST", "runs/search", experiment_ids=[experiment]).json()["runs"]
    for name, values in {
        "experiments/create": {"name": "rita's"},
        "experiments/update": {"experiment_id": experiment, "new_name": "x"},
        "runs/create": {"experiment_id": experiment},
        "runs/log-metric": {"run_id": run_id, "key": "loss", "value": 1.0, "timestamp": 1},
        "runs/log-batch": {
            "run_id": run_id,
            "metrics": [{"key": "loss", "value": 1.0, "timestamp": 1, "step": 1}],
        },
        "runs/set-tag": {"run_id": run_id, "key": "a", "value": "b"},
        "runs/delete": {"run_id": run_id},
        "registered-models/create": {"name": "rita's"},
    }.items():
        assert api(stack, rita, "POST", name, **values).status_code == 403, name
    for path in (
        f"/api/2.0/mlflow-artifacts/mpu/create{place}",
        f"/ajax-api/2.0/mlflow-artifacts/mpu/create{place}",
    ):
        assert call(stack, rita, "POST", path, json={"path": "a", "num_parts": 1}).status_code == 403
    assert (
        call(stack, rita, "PUT", f"/api/2.0/mlflow-artifacts/artifacts{place}/a", data=b"x").status_code
        == 403
    )
    assert access(stack, "list", user="rita", password=str(rita.password))[0] == 1


def test_data_scientist_logs_and_releaser_registers(stack: Stack, logins: dict[str, HTTPBasicAuth]) -> None:
    dan, rel = logins["data-scientist"], logins["releaser"]
    experiment = api(stack, dan, "POST", "experiments/create", name="of-dan").json()["experiment_id"]
    run = api(stack, dan, "POST", "runs/create", experiment_id=experiment).json()["run"]["info"]
    version = {"name": "product", "source": run["artifact_uri"] + "/model", "run_id": run["run_id"]}
    alias = {"name": "product", "alias": "champion", "version": "1"}
    assert api(stack, rel, "POST", "registered-models/create", name="product").status_code == 200
    assert api(stack, rel, "POST", "model-versions/create", **version).status_code == 200
    assert api(stack, rel, "POST", "registered-models/alias", **alias).status_code == 200

    found = api(stack, dan, "GET", "registered-models/alias", name="product", alias="champion")
    assert found.json()["model_version"]["version"] == "1"
    assert api(stack, dan, "POST", "model-versions/create", **version).status_code == 403
    assert api(stack, dan, "POST", "registered-models/alias", **alias).status_code == 403
    assert (
        api(stack, dan, "DELETE", "registered-models/alias", name="product", alias="champion").status_code
        == 403
    )
    assert api(stack, dan, "DELETE", "model-versions/delete", name="product", version="1").status_code == 403
    assert (
        api(stack, rel, "DELETE", "registered-models/alias", name="product", alias="champion").status_code
        == 200
    )


def test_user_without_role_sees_nothing(stack: Stack, logins: dict[str, HTTPBasicAuth]) -> None:
    admin = logins["administrator"]
    login = {"username": "nobody", "password": "a password of nobody"}
    assert api(stack, admin, "POST", "users/create", **login).status_code == 200
    nobody = HTTPBasicAuth(*login.values())
    assert api(stack, nobody, "GET", "experiments/get", experiment_id="0").status_code == 403
    answer = api(stack, nobody, "POST", "experiments/search", max_results=10)
    assert answer.status_code == 403 or not answer.json().get("experiments")
    assert api(stack, nobody, "POST", "experiments/create", name="nobody's").status_code == 403


def test_access_refuses_unknown_role_and_keeps_no_half_made_user(stack: Stack) -> None:
    code, output = access(stack, "add", "eve", "--role", "boss")
    assert code == 1 and "data-scientist, reader, releaser" in output
    assert "eve" not in access(stack, "list")[1]
    code, password = access(stack, "add", "eve", "--role", "reader")
    assert code == 0 and access(stack, "role", "eve", "releaser")[0] == 0
    assert "eve\treleaser" in access(stack, "list")[1]
    code, changed = access(stack, "password", "eve")
    assert code == 0 and changed != password
    assert access(stack, "remove", "eve")[0] == 0 and "eve" not in access(stack, "list")[1]


def test_stranger_is_refused_on_every_route_but_the_named_ones(stack: Stack) -> None:
    routes = stack.routes()
    paths = {path for path, _ in routes}
    assert len(routes) > 300 and {"/health", "/api/2.0/mlflow/runs/create", "/graphql"} <= paths
    assert any(path.startswith("/api/2.0/mlflow-artifacts/artifacts") for path in paths)
    assert stack.answering_strangers(stack.url, routes) == FOREVER_OPEN
    behind = stack.answering_strangers(stack.server_url(0), routes)
    assert behind <= OPEN_BEHIND_PROXY, behind - OPEN_BEHIND_PROXY


def test_wrong_password_is_refused(stack: Stack) -> None:
    for login in (
        HTTPBasicAuth("admin", "password1234"),
        HTTPBasicAuth("admin", ""),
        HTTPBasicAuth("x", "y"),
    ):
        assert api(stack, login, "POST", "experiments/search", max_results=1).status_code == 401
    bearer = call(
        stack, None, "GET", "/api/2.0/mlflow/experiments/get", headers={"Authorization": "Bearer x"}
    )
    assert bearer.status_code == 401


def test_store_is_closed_to_what_carries_no_signature(stack: Stack) -> None:
    for method, path in (
        ("GET", "/"),
        ("GET", f"/{BUCKET}"),
        ("PUT", f"/{BUCKET}/x"),
        ("DELETE", f"/{BUCKET}/x"),
    ):
        answer = requests.request(
            method, stack.s3_url + path, verify=str(stack.secrets / "ca.crt"), timeout=30
        )
        assert answer.status_code == 403, (method, path)


def test_foreign_host_and_origin_are_refused(stack: Stack, logins: dict[str, HTTPBasicAuth]) -> None:
    admin = logins["administrator"]
    search = ("POST", "/api/2.0/mlflow/experiments/search")
    body = {"max_results": 1}
    assert call(stack, admin, *search, json=body).status_code == 200
    assert call(stack, admin, *search, json=body, headers={"Origin": stack.url}).status_code == 200
    for origin in ("https://evil.example", "null", "http://localhost:3000", stack.url + ".evil.example"):
        assert call(stack, admin, *search, json=body, headers={"Origin": origin}).status_code == 403, origin
    for host in ("evil.example", f"evil.{HOST}"):
        assert call(stack, admin, *search, json=body, headers={"Host": host}).status_code == 421, host
        behind = requests.post(
            stack.server_url(0) + search[1], json=body, headers={"Host": host}, auth=admin, timeout=30
        )
        assert behind.status_code == 403


def test_proxy_speaks_modern_tls_for_its_own_names_alone(stack: Stack) -> None:
    assert requests.get(stack.url.replace("https", "http") + "/health", timeout=10).status_code == 400
    for protocol, accepted in (("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)):
        arguments = ["-connect", f"{HOST}:{stack.ports['mlflow']}", "-servername", HOST, protocol]
        arguments += ["-CAfile", str(stack.secrets / "ca.crt"), "-verify_return_error"]
        done = subprocess.run(
            ["openssl", "s_client", *arguments], stdin=subprocess.DEVNULL, capture_output=True
        )
        assert (done.returncode == 0) is accepted, protocol
    context = ssl.create_default_context(cafile=str(stack.secrets / "ca.crt"))
    with socket.create_connection((HOST, stack.ports["mlflow"])) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="evil.example")


def test_database_refuses_connections_without_tls(stack: Stack) -> None:
    import psycopg2

    where = {"host": "localhost", "port": stack.ports["postgres"], "dbname": "mlflow", "user": "mlflow"}
    with pytest.raises(psycopg2.OperationalError, match="no encryption"):
        psycopg2.connect(**where, password=stack.secret("db-password"), sslmode="disable")
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(**where, password="mlflow", sslmode="require")


def test_audit_names_user_and_outcome(stack: Stack, logins: dict[str, HTTPBasicAuth]) -> None:
    api(stack, logins["reader"], "POST", "experiments/create", name="audited")
    [line] = [
        each
        for each in stack.audit()
        if each["user"] == "rita" and each["path"].endswith("experiments/create")
    ][-1:]
    assert (
        line["status"] == 403 and line["client"] == "127.0.0.1" and line["time"] and line["method"] == "POST"
    )
    logs = "".join(path.read_text(errors="replace") for path in stack.folder.glob("*.log"))
    for name in ("admin-password", "db-password", "session-key", "kek-passphrase"):
        assert stack.secret(name) not in logs, name


def test_prepare_may_be_repeated_and_takes_surplus_grants_away(
    stack: Stack, logins: dict[str, HTTPBasicAuth]
) -> None:
    admin = logins["administrator"]
    listed = call(stack, admin, "GET", "/api/3.0/mlflow/roles/list", params={"workspace": "default"}).json()[
        "roles"
    ]
    [reader] = [role["id"] for role in listed if role["name"] == "reader"]
    surplus = {"role_id": reader, "resource_type": "prompt", "resource_pattern": "*", "permission": "MANAGE"}
    assert (
        call(stack, admin, "POST", "/api/3.0/mlflow/roles/permissions/add", json=surplus).status_code == 200
    )
    stack.prepare()
    answer = call(
        stack, admin, "GET", "/api/3.0/mlflow/roles/permissions/list", params={"role_id": str(reader)}
    )
    grants = {(each["resource_type"], each["permission"]) for each in answer.json()["role_permissions"]}
    assert grants == {("experiment", "READ"), ("registered_model", "READ")}


def test_metrics_go_on_while_the_store_is_down(stack: Stack, logins: dict[str, HTTPBasicAuth]) -> None:
    dan = logins["data-scientist"]
    experiment = api(stack, dan, "POST", "experiments/create", name="store-down").json()["experiment_id"]
    os.killpg(stack.processes["moto"].pid, signal.SIGSTOP)
    try:
        run = api(stack, dan, "POST", "runs/create", experiment_id=experiment)
        point = {"key": "loss", "value": 1.0, "timestamp": 1, "step": 1}
        batch = api(
            stack, dan, "POST", "runs/log-batch", run_id=run.json()["run"]["info"]["run_id"], metrics=[point]
        )
        assert (run.status_code, batch.status_code) == (200, 200)
    finally:
        os.killpg(stack.processes["moto"].pid, signal.SIGCONT)


def start_load(
    stack: Stack, login: HTTPBasicAuth, folder: Path, runs: int, seconds: float
) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.stack_load",
        "journals",
        str(folder),
        "--runs",
        str(runs),
    ]
    environment = stack.client_environment(
        str(login.username), str(login.password), MLFLOW_HTTP_REQUEST_TIMEOUT="5"
    )
    return subprocess.Popen(
        [*command, "--seconds", str(seconds), "--experiment", folder.name],
        env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def check_every_value_once(
    stack: Stack, login: HTTPBasicAuth, experiment: str, runs: int, expected: Counter
) -> None:
    """Every run once, with all params, and each metric's history as it was made: from the server's own answers."""
    found = api(stack, login, "GET", "experiments/get-by-name", experiment_name=experiment).json()
    search = {"experiment_ids": [found["experiment"]["experiment_id"]], "max_results": 1000}
    there = api(stack, login, "POST", "runs/search", **search).json()["runs"]
    assert len(there) == runs
    for run in there:
        assert run["info"]["status"] == "FINISHED"
        assert {each["key"]: each["value"] for each in run["data"]["params"]} == PARAMS
        for metric in METRICS:
            history = api(
                stack,
                login,
                "GET",
                "metrics/get-history",
                run_id=run["info"]["run_id"],
                metric_key=metric,
                max_results=9999,
            ).json()["metrics"]
            steps = Counter((metric, int(point["step"])) for point in history)
            assert steps == Counter({key: count for key, count in expected.items() if key[0] == metric})
            assert all(point["value"] == value_of(int(point["step"])) for point in history)


def test_nothing_is_lost_or_doubled_when_servers_are_killed_during_20_runs(
    stack: Stack, logins: dict[str, HTTPBasicAuth], tmp_path: Path
) -> None:
    """kill -9 of one server, then of the other, too; both come back. Trainings never wait, all arrives, once."""
    dan = logins["data-scientist"]
    load = start_load(stack, dan, tmp_path / "killed", runs=20, seconds=12)
    assert load.stdout and load.stdout.readline().strip() == "ready"
    time.sleep(4)
    stack.kill_server(0)
    assert (
        api(stack, dan, "POST", "experiments/search", max_results=1).status_code == 200
    ), "the other one goes on"
    time.sleep(2)
    stack.kill_server(1)
    time.sleep(1)
    stack.start_server(0)
    stack.start_server(1)
    output, errors = load.communicate(timeout=400)
    answers = json.loads(output.strip().splitlines()[-1])
    assert len(answers) == 20, errors
    assert any(answer["errors"] for answer in answers), "the servers were killed too late to be noticed"
    stack.wait_for_server(0)
    stack.wait_for_server(1)
    check_every_value_once(stack, dan, "killed", 20, expected_points(12))


def expected_points(seconds: float, rate: float = 25) -> Counter:
    return Counter(
        (METRICS[number % len(METRICS)], number // len(METRICS)) for number in range(int(seconds * rate))
    )


def test_backup_brings_back_runs_users_and_artifacts_after_a_wipe(
    stack: Stack, logins: dict[str, HTTPBasicAuth], tmp_path: Path
) -> None:
    dan = logins["data-scientist"]
    (tmp_path / "plot.png").write_bytes(os.urandom(5000))
    client_program(stack, dan, RECORD_A_RUN, str(tmp_path / "journals"), str(tmp_path / "plot.png"))
    before = everything(stack, dan)
    assert before["runs"] and before["objects"]
    backups = tmp_path / "backups"
    backups.mkdir()
    assert (code_and_output := tool(stack, "backup", str(backups)))[0] == 0, code_and_output
    names = sorted(path.parent.name for path in backups.glob("*/manifest.json"))
    refused, message = tool(stack, "restore", str(backups))
    assert refused == 1 and "an empty one" in message

    wipe(stack)
    assert not stack.s3().list_objects_v2(Bucket=BUCKET).get("Contents")
    damaged = next(backups.glob("objects/*/*"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused, message = tool(stack, "restore", str(backups))
    assert refused == 1 and "damaged" in message
    damaged.write_bytes(whole)

    assert (code_and_output := tool(stack, "restore", str(backups), names[-1]))[0] == 0, code_and_output
    stack.start_server(0)  # the proxy passes over the other one
    stack.wait_for_server(0)
    assert everything(stack, dan) == before


def everything(stack: Stack, login: HTTPBasicAuth) -> dict[str, Any]:
    found = api(stack, login, "POST", "experiments/search", max_results=100).json()["experiments"]
    ids = [each["experiment_id"] for each in found]
    runs = api(stack, login, "POST", "runs/search", experiment_ids=ids, max_results=1000).json()["runs"]
    listed = stack.s3().list_objects_v2(Bucket=BUCKET).get("Contents", [])
    models = api(stack, login, "GET", "model-versions/search").json().get("model_versions", [])
    return {
        "experiments": sorted(each["name"] for each in found),
        "runs": len(runs),
        "data": sorted(json.dumps(run, sort_keys=True) for run in runs),
        "models": models,
        "objects": {entry["Key"]: entry["Size"] for entry in listed},
    }


def tool(stack: Stack, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(DEPLOY / "tracking" / "backup.py"), *arguments]
    done = subprocess.run(command, env=stack.server_environment(), capture_output=True, text=True, cwd="/")
    return done.returncode, done.stdout + done.stderr


def wipe(stack: Stack) -> None:
    """A disk that was lost: servers down, database empty, bucket empty."""
    for number in (0, 1):
        stack.kill_server(number)
    for entry in stack.s3().list_objects_v2(Bucket=BUCKET)["Contents"]:
        stack.s3().delete_object(Bucket=BUCKET, Key=entry["Key"])
    import psycopg2

    socket = str(stack.postgres_folder / "run")
    connection = psycopg2.connect(
        host=socket,
        port=stack.ports["postgres"],
        user="postgres",
        password=stack.secret("db-superuser-password"),
    )
    connection.autocommit = True
    for statement in ("DROP DATABASE mlflow WITH (FORCE)", "CREATE DATABASE mlflow OWNER mlflow"):
        connection.cursor().execute(statement)
    connection.close()
