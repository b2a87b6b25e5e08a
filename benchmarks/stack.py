"""How many trainings at once a tracking server takes: the team stack with our logging beside the usual set-up.

    python -m benchmarks.stack [concurrent] [crash] [routes] [--seconds 10] [--rate 20]    # all by default

crash       values lost or doubled when both servers are killed by kill -9 and started again during 20 trainings
routes      which of the server's routes answer without credentials
concurrent  a training takes 10 s and makes 20 values a second and 30 params. Sustained is the largest number of
            trainings at once of which 95 % end within 1.25 times what one alone takes, with no error, and with every
            value in the database once. Both sides keep their runs in the same PostgreSQL, on this machine, beside
            the load:

    usual  one `mlflow server` as it comes (4 workers), plain HTTP, no login; a call for each value, in the loop
    ours   two servers of 2 workers behind nginx, with TLS, login and roles; journals that are sent every 2 s

A training is a thread in one of two load processes, so that a hundred of them fit on one machine.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import psycopg2

from ml import files
from ml.errors import UserError, exit_on_user_error
from tests.ports import free_port
from tests.stack import Stack, missing_programs, running_stack
from tests.stack_load import PARAMS

GOAL = 3.5
SLOWER = 1.25
LOAD_PROCESSES = 2
MOST = 256


class Side:
    """One way to log to one address."""

    def __init__(self, name: str, how: str, environment: dict[str, str], stack: Stack, database: str) -> None:
        self.name, self.how, self.environment = name, how, environment
        self.stack, self.database = stack, database
        self.alone = 0.0  # seconds that one training takes by itself
        self.trials = 0

    def trial(self, runs: int, seconds: float, rate: float) -> dict[str, Any]:
        """So many trainings at once; what they took, and what is in the database afterwards."""
        self.trials += 1
        before = processor_time(self.stack)
        experiment = f"{self.how}-{self.trials}"
        shares = [
            runs // LOAD_PROCESSES + (number < runs % LOAD_PROCESSES) for number in range(LOAD_PROCESSES)
        ]
        with tempfile.TemporaryDirectory() as folder:
            loads = [self.load(Path(folder), share, seconds, rate, experiment) for share in shares if share]
            for load in loads:
                assert load.stdout and load.stdin
                load.stdout.readline()
            answers: list[dict[str, Any]] = []
            for load in loads:
                assert load.stdin
                load.stdin.write("go\n")
                load.stdin.flush()
            for load in loads:
                output, errors = load.communicate()
                if load.returncode:
                    raise UserError(f"the load of {self.name} failed:\n{errors[-2000:]}")
                answers += json.loads(output.strip().splitlines()[-1])
        took = sorted(answer["seconds"] for answer in answers)
        wanted = runs * int(seconds * rate)
        result = {
            "runs": runs,
            "p95": took[max(0, -(-95 * len(took) // 100) - 1)],
            "errors": sum(len(answer["errors"]) for answer in answers),
            "processor_seconds": (processor_time(self.stack) - before) / runs,
            "missing": abs(wanted - self.count("metrics", experiment))
            + abs(runs * len(PARAMS) - self.count("params", experiment)),
        }
        if runs == 1:
            self.alone = max(self.alone, took[0])
        result["sustained"] = (
            result["p95"] <= SLOWER * self.alone and not result["errors"] and not result["missing"]
        )
        print(
            f"  {self.name}: {runs} at once, p95 {result['p95']:.1f} s, {result['errors']} errors, "
            f"{result['missing']} values missing or doubled: {'sustained' if result['sustained'] else 'not sustained'}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return result

    def load(
        self, folder: Path, runs: int, seconds: float, rate: float, experiment: str
    ) -> "subprocess.Popen[str]":
        command = [sys.executable, "-W", "ignore", "-m", "tests.stack_load", self.how, str(folder), "--wait"]
        command += [
            "--runs",
            str(runs),
            "--seconds",
            str(seconds),
            "--rate",
            str(rate),
            "--experiment",
            experiment,
        ]
        return subprocess.Popen(
            command,
            env=self.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def count(self, table: str, experiment: str, what: str = "*") -> int:
        connection = as_superuser(self.stack, self.database)
        joined = "" if table == "runs" else "JOIN runs USING (run_uuid)"
        with connection, connection.cursor() as cursor:
            cursor.execute(
                f"SELECT count({what}) FROM {table} {joined} JOIN experiments USING (experiment_id) "
                "WHERE experiments.name = %s",
                (experiment,),
            )
            found = int(cursor.fetchone()[0])  # type: ignore[index]
        connection.close()
        return found

    def most(self, seconds: float, rate: float) -> tuple[int, list[dict[str, Any]]]:
        """Double until it fails, then halve the gap until it is a tenth."""
        trials = [self.trial(1, seconds, rate) for _ in range(2)]
        good, bad = 1, None
        while bad is None or bad - good > max(1, good // 10):
            runs = min(2 * good, MOST) if bad is None else (good + bad) // 2
            trials.append(self.trial(runs, seconds, rate))
            if not trials[-1]["sustained"]:
                trials.append(
                    self.trial(runs, seconds, rate)
                )  # once more: something else may have run meanwhile
            if trials[-1]["sustained"]:
                good = runs
                if good == MOST:
                    break
            else:
                bad = runs
        return good, trials


def processor_time(stack: Stack) -> float:
    """Seconds that PostgreSQL, nginx and the servers have used, those of both sides: the one at rest uses none."""
    total = 0.0
    for process in stack.processes.values():
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = each.cpu_times()
                total += times.user + times.system
    return total


def as_superuser(stack: Stack, database: str) -> Any:
    return psycopg2.connect(
        host=str(stack.postgres_folder / "run"), port=stack.ports["postgres"], dbname=database,
        user="postgres", password=stack.secret("db-superuser-password"),
    )  # fmt: skip


def start_usual_server(stack: Stack) -> str:
    """One server with MLflow's defaults, on a database of its own in the same PostgreSQL."""
    connection = as_superuser(stack, "postgres")
    connection.autocommit = True
    connection.cursor().execute("CREATE DATABASE usual OWNER mlflow")
    connection.close()
    port = free_port()
    where = f"mlflow@localhost:{stack.ports['postgres']}/usual?sslmode=require"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"PGPASSWORD": stack.secret("db-password"), "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}"]
    command += [
        f"--backend-store-uri=postgresql+psycopg2://{where}",
        f"--artifacts-destination={stack.folder}/usual",
    ]
    stack.run("mlflow-usual", command, environment)
    stack.server_ports.append(port)
    stack.processes[f"mlflow-{len(stack.server_ports) - 1}"] = stack.processes.pop("mlflow-usual")
    stack.wait_for_server(len(stack.server_ports) - 1)
    return f"http://127.0.0.1:{port}"


def concurrent(stack: Stack, seconds: float, rate: float) -> list[str]:
    plain = {**os.environ, "MLFLOW_TRACKING_URI": start_usual_server(stack), "OMP_NUM_THREADS": "1"}
    sides = [
        Side("usual, one server, a call a value", "calls", plain, stack, "usual"),
        Side("ours, two servers", "journals", stack.client_environment(), stack, "mlflow"),
    ]
    found = {side.name: side.most(seconds, rate) for side in sides}
    (usual, _), (ours, _) = found.values()
    lines = []
    for side in sides:
        most, trials_of_it = found[side.name]
        used = statistics.median(trial["processor_seconds"] for trial in trials_of_it if trial["runs"] > 1)
        lines.append(
            f"{side.name}: {most} trainings at once (one alone: {side.alone:.1f} s); each costs the servers and the "
            f"database {used:.2f} s of processor time"
        )
    trials = sum(len(each) for _, each in found.values())
    met = "met" if ours / usual >= GOAL else "NOT met"
    return [
        *lines,
        f"concurrent runs sustained, ours over the usual: {ours / usual:.1f} ({trials} trials; goal: at least {GOAL}; {met})",
    ]


def crash(stack: Stack, seconds: float, rate: float) -> list[str]:
    """One server is killed, started again, then both at once, then both are started again."""
    side = Side("ours", "journals", stack.client_environment(), stack, "mlflow")
    runs = 20
    with tempfile.TemporaryDirectory() as folder:
        load = side.load(Path(folder), runs, seconds, rate, "crash")
        assert load.stdin and load.stdout
        load.stdout.readline()
        load.stdin.write("go\n")
        load.stdin.flush()
        time.sleep(3)
        stack.kill_server(0)
        stack.start_server(0)
        stack.wait_for_server(0)
        for number in (1, 0):
            stack.kill_server(number)
        time.sleep(1)
        for number in (1, 0):
            stack.start_server(number)
        output, errors = load.communicate()
        for number in (1, 0):
            stack.wait_for_server(number)
    if load.returncode:
        raise UserError(f"the load failed:\n{errors[-2000:]}")
    failed = sum(len(answer["errors"]) for answer in json.loads(output.strip().splitlines()[-1]))
    wanted = runs * int(seconds * rate)
    rows, different = (
        side.count("metrics", "crash", what) for what in ("*", "DISTINCT (run_uuid, key, step)")
    )
    return [
        f"both servers killed during {runs} trainings: {failed} deliveries failed and were repeated; of {wanted} values "
        f"{wanted - different} lost, {rows - different} doubled; {side.count('runs', 'crash', 'DISTINCT run_uuid')} runs"
    ]


def routes(stack: Stack, seconds: float, rate: float) -> list[str]:
    asked = stack.routes()
    at_proxy, behind = (
        sorted(stack.answering_strangers(url, asked)) for url in (stack.url, stack.server_url(0))
    )
    return [
        f"of {len(asked)} routes, without credentials, the proxy answers {', '.join(at_proxy)}; "
        f"MLflow behind it {', '.join(behind)}"
    ]


PARTS = {"concurrent": concurrent, "crash": crash, "routes": routes}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=20, help="values a second")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}")
    if missing_programs():
        raise UserError(
            f"{', '.join(missing_programs())} not found. On Debian: apt-get install postgresql nginx"
        )
    lines = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder) / "stack", servers=2, workers=2) as stack,
    ):
        for part in arguments.parts or PARTS:
            lines += PARTS[part](stack, arguments.seconds, arguments.rate)
    print("\n".join(lines))
    files.write_json(files.REPORTS / "bench" / "stack.json", {"lines": lines})


if __name__ == "__main__":
    exit_on_user_error(main)
