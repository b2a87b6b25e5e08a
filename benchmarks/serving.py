"""`python -m benchmarks.serving`: requests per second, latency, start and memory of ml.serve beside its peers.

Every server answers the same test images with the same network, pinned to one core; wrk loads it from another. One
server runs at a time, all of them in turn, for several rounds: about two and a half minutes a round. Needs the results of
`make run` (or `make demo`'s digits) in the working folder, and wrk. The peers live in an environment of their own,
.venv-peers, which the first call makes (about 1 GB).
"""

import argparse
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from ml import bundle, files
from ml.errors import UserError, exit_on_user_error

PEERS = Path(__file__).with_name("peers")
RESULT = files.REPORTS / "bench" / "serving.json"
DETAILS = files.REPORTS / "bench" / "serving_details.json"
CLIENTS = (1, 16, 64)
IMAGES = 200
BOUNDARY = "benchmark-of-serving"
Numbers = dict[str, float]


@dataclass(frozen=True)
class Server:
    """command: with {port} and {python}, the latter that of the peers' environment."""

    name: str
    command: str
    path: str = "/predict"
    sends: str = "multipart"
    environment: dict[str, str] = field(default_factory=dict)


OURS, ECHO = "ml.serve", "bare ASGI echo"
UVICORN = "{python} -m uvicorn --port {port} --log-level warning --no-access-log"
SERVERS = (
    Server(OURS, f"{sys.executable} -m ml.serve"),
    Server(
        "mlflow models serve",
        "{python} -m mlflow models serve -m {scratch}/mlflow -p {port} --env-manager local",
        "/invocations",
        "json",
    ),
    Server("BentoML", "{python} -m bentoml serve bento:Digits -p {port} -q"),
    Server("LitServe", "{python} -m lit {port} 1"),
    Server("LitServe, batched", "{python} -m lit {port} 64"),
    Server("FastAPI + torch", f"{UVICORN} fastapi_torch:app"),
    Server(ECHO, f"{UVICORN} echo:app"),
)


@dataclass(frozen=True)
class Goal:
    peer: str
    times: float


GOALS = (
    Goal("mlflow models serve", 20),
    Goal("BentoML", 20),
    Goal("LitServe, batched", 10),
    Goal("FastAPI + torch", 6),
    Goal(ECHO, 0.2),
)
START_GOAL, MEMORY_GOAL = 0.6, 120.0  # seconds, MB a worker


def make_peers(folder: Path) -> Path:
    """The Python of the peers' environment, made anew when requirements.txt has changed."""
    python = (
        folder.absolute() / "bin" / "python"
    )  # not resolved: the link's place is what makes it the environment's
    wanted = hashlib.sha256((PEERS / "requirements.txt").read_bytes()).hexdigest()
    stamp = folder / "requirements.sha256"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making {folder} for the peers", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        PEERS / "requirements.txt",
    ]
    subprocess.run([*install, "torch"], check=True)  # first and alone, so that nothing chooses another build
    subprocess.run([*install, "-r", PEERS / "requirements.txt"], check=True)
    stamp.write_text(wanted)
    return python


def prepare(scratch: Path, python: Path) -> NDArray[np.float32]:
    """Request bodies, the MLflow model and ours, in `scratch`. Returns what the network says of the first image."""
    images = files.load_examples(files.TEST_EXAMPLES).images[:IMAGES]
    for kind, content_type in (
        ("multipart", f"multipart/form-data; boundary={BOUNDARY}"),
        ("json", "application/json"),
    ):
        (scratch / kind).mkdir()
        (scratch / kind / "content-type").write_text(content_type)
        for index, image in enumerate(images):
            (scratch / kind / f"{index:03d}").write_bytes(BODIES[kind](image))
    bundle.write_bundle(scratch / "models", "bench")
    environment = peer_environment()
    subprocess.run(
        [python, PEERS / "mlflow_model.py", scratch / "mlflow"],
        check=True,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    import onnxruntime

    session = onnxruntime.InferenceSession(files.MODEL_ONNX)
    probabilities: NDArray[np.float32] = session.run(None, {"images": images[:1]})[0][0]
    return probabilities


def multipart(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    head = 'Content-Disposition: form-data; name="file"; filename="digit.png"\r\nContent-Type: image/png'
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + file.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode()


def tensor(image: NDArray[np.uint8]) -> bytes:
    return json.dumps({"inputs": [image.tolist()]}).encode()


BODIES = {"multipart": multipart, "json": tensor}


def peer_environment() -> dict[str, str]:
    source = Path(bundle.__file__).parents[1]
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "LIT_DISABLE_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": f"{source}:{PEERS.absolute()}"}


@contextmanager
def running(
    server: Server, core: int, python: Path, scratch: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", int, float]]:
    """Start it; yields the process, its port, and the seconds until it first answered a prediction."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(port=port, python=python, scratch=scratch) for word in server.command.split()]
    # a worker that MLflow starts finds its own Python by the path
    environment = peer_environment() | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment |= {"HOST": "127.0.0.1", "PORT": str(port), "MODEL_STORE": str(scratch / "models")}
    log = scratch / "server.log"
    start = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *words],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for_answer(server, port, scratch, process, log)
        yield process, port, time.perf_counter() - start
    finally:
        with_children = [process.pid, *(child.pid for child in children(process.pid))]
        stop(process, with_children)


def wait_for_answer(
    server: Server, port: int, scratch: Path, process: "subprocess.Popen[bytes]", log: Path
) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        try:
            if ask(server, port, scratch)[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.005)
    raise UserError(f"{server.name} gave no answer:\n{log.read_text()[-3000:]}")


def ask(server: Server, port: int, scratch: Path) -> tuple[int, bytes]:
    """Post the first image."""
    body, kind = (scratch / server.sends / "000").read_bytes(), (
        scratch / server.sends / "content-type"
    ).read_text()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", server.path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def stop(process: "subprocess.Popen[bytes]", pids: list[int]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in pids[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def probabilities_of(server: Server, content: bytes) -> list[float]:
    answer = json.loads(content)
    if server.sends == "json":
        first = answer["predictions"][0]
        return [float(value) for value in (first.values() if isinstance(first, dict) else first)]
    first = answer["predictions"][0] if "predictions" in answer else answer
    return [float(value) for value in first["probabilities"].values()]


def memory(process: "subprocess.Popen[bytes]") -> tuple[float, float]:
    """MB of all its processes, shared pages counted once, and of the largest one."""
    tree = [psutil.Process(process.pid), *children(process.pid)]
    sizes = [each.memory_full_info() for each in tree]
    return sum(size.pss for size in sizes) / 1e6, max(size.rss for size in sizes) / 1e6


def processor_seconds(process: "subprocess.Popen[bytes]") -> float:
    """That all its processes have used so far: what else runs on the machine matters less to this than to a rate."""
    tree = [psutil.Process(process.pid), *children(process.pid)]
    return sum(times.user + times.system for times in (each.cpu_times() for each in tree))


def load(server: Server, port: int, scratch: Path, core: int, clients: int, seconds: int) -> Numbers:
    command = [
        "taskset",
        "-c",
        str(core),
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
    ]
    command += ["-s", str(PEERS / "load.lua"), f"http://127.0.0.1:{port}{server.path}"]
    done = subprocess.run(
        [*command, "--", str(scratch / server.sends)], check=True, capture_output=True, text=True
    )
    numbers: Numbers = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers


def measure(
    server: Server,
    cores: tuple[int, int],
    python: Path,
    scratch: Path,
    seconds: int,
    expected: NDArray[np.float32],
) -> Numbers:
    with running(server, cores[0], python, scratch) as (process, port, start):
        if server.name != ECHO:
            found = probabilities_of(server, ask(server, port, scratch)[1])
            if not np.allclose(found, expected, atol=1e-3):
                raise UserError(
                    f"{server.name} does not run the same model: {found} instead of {expected.tolist()}"
                )
        load(server, port, scratch, cores[1], 16, 2)  # warm
        numbers = {"start": start}
        for clients in CLIENTS:
            before = processor_seconds(process)
            found_load = load(server, port, scratch, cores[1], clients, seconds)
            spent = processor_seconds(process) - before
            numbers |= {
                f"us_{clients}": spent / max(found_load["requests"], 1) * 1e6,
                f"rps_{clients}": found_load["requests"] / found_load["seconds"],
                f"p50_{clients}": found_load["p50"],
                f"p99_{clients}": found_load["p99"],
                f"errors_{clients}": found_load["errors"],
            }
        numbers["memory"], numbers["largest"] = memory(process)
    return numbers


def table(results: dict[str, Numbers]) -> list[str]:
    head = f"{'':22}" + "".join(f"{f'req/s at {clients}':>13}" for clients in CLIENTS)
    lines = [
        head
        + f"{'CPU µs each':>13}{'p50 ms at 64':>14}{'p99':>9}{'start s':>9}{'MB':>7}{'largest':>9}{'errors':>8}"
    ]
    for name, numbers in results.items():
        rates = "".join(f"{numbers[f'rps_{clients}']:13,.0f}" for clients in CLIENTS)
        errors = sum(numbers[f"errors_{clients}"] for clients in CLIENTS)
        lines.append(
            f"{name:22}{rates}{numbers['us_64']:13.0f}{numbers['p50_64']:14.1f}{numbers['p99_64']:9.1f}{numbers['start']:9.2f}"
            f"{numbers['memory']:7.0f}{numbers['largest']:9.0f}{errors:8.0f}"
        )
    return lines


def verdicts(results: dict[str, Numbers]) -> list[str]:
    def line(what: str, value: str, goal: str, met: bool) -> str:
        return f"{what:44}{value:>12}   goal {goal:10} {'met' if met else 'NOT MET'}"

    ours, lines = results[OURS], []
    for goal in GOALS:
        if goal.peer in results:
            ratio = ours["rps_64"] / results[goal.peer]["rps_64"]
            lines.append(
                line(
                    f"req/s at 64: ours / {goal.peer}",
                    f"{ratio:.2f} ×",
                    f"{goal.times} ×",
                    ratio >= goal.times,
                )
            )
    peers = [name for name in results if name not in (OURS, ECHO)]
    for name in peers:
        theirs = results[name]["p99_64"]
        lines.append(
            line(f"p99 at 64: {name}", f"{ours['p99_64']:.1f} ms", f"< {theirs:.1f}", ours["p99_64"] < theirs)
        )
    lines.append(
        line(
            "start to first answer",
            f"{ours['start']:.2f} s",
            f"≤ {START_GOAL} s",
            ours["start"] <= START_GOAL,
        )
    )
    lines.append(
        line(
            "memory of a worker",
            f"{ours['largest']:.0f} MB",
            f"≤ {MEMORY_GOAL:.0f} MB",
            ours["largest"] <= MEMORY_GOAL,
        )
    )
    return lines


def image_size() -> str:
    """Of the newest serving image that podman knows here."""
    if shutil.which("podman"):
        command = ["podman", "images", "--filter", "label=org.opencontainers.image.title=ml-serve"]
        found = subprocess.run(
            [*command, "--format", "{{.Repository}}:{{.Tag}} {{.Size}}"], capture_output=True, text=True
        )
        if found.stdout.strip():
            return f"image {found.stdout.strip().splitlines()[0]}, its base included"
    return "image: none built here; tests/test_image.py builds one and prints its size"


def serving(
    rounds: int, seconds: int = 4, peers: Path = Path(".venv-peers"), only: list[str] | None = None
) -> list[str]:
    """The lines of the report; every single measurement goes to reports/bench/serving_details.json."""
    if shutil.which("wrk") is None or shutil.which("taskset") is None:
        raise UserError("wrk or taskset is missing. Run `apt-get install wrk util-linux`.")
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise UserError("This machine has one core; the server and the load need one each. Use one with two.")
    chosen = [each for each in SERVERS if only is None or any(each.name.startswith(word) for word in only)]
    python = make_peers(peers)
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(
            f"The load average is {busy:.1f}: wait until this machine is quiet, or trust none of it.",
            flush=True,
        )
    found: dict[str, list[Numbers]] = {server.name: [] for server in chosen}
    os.sched_setaffinity(0, {available[1]})
    try:
        with tempfile.TemporaryDirectory() as folder:
            expected = prepare(Path(folder), python)
            for turn in range(rounds):
                for server in chosen:
                    cores = (available[0], available[1])
                    numbers = measure(server, cores, python, Path(folder), seconds, expected)
                    found[server.name].append(numbers)
                    rate = f"{numbers['rps_64']:,.0f} requests/s with 64 clients"
                    print(f"round {turn + 1}: {server.name}: {rate}", file=sys.stderr, flush=True)
    finally:
        os.sched_setaffinity(0, available)
    medians = {name: median(each) for name, each in found.items()}
    files.write_json(
        DETAILS, {"seconds": seconds, "load_average_before": busy, "medians": medians, "rounds": found}
    )
    return table(medians) + (verdicts(medians) if OURS in medians else []) + [image_size()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each load (4)")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="their environment")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="names, or beginnings of them; all by default"
    )
    arguments = parser.parse_args()
    lines = serving(arguments.rounds, arguments.seconds, arguments.peers, arguments.only)
    print("\n".join(lines))
    files.write_json(RESULT, {"rounds": arguments.rounds, "lines": lines})


def median(found: list[Numbers]) -> Numbers:
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


if __name__ == "__main__":
    exit_on_user_error(main)
