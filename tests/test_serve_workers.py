"""Several workers as one server: swaps under load, a killed worker, shutdown, overload, metrics that add up."""

import os
import shutil
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.serving import Served, make_images, png, served, write_experiment, write_golden

pytest_plugins = ["tests.serving_fixtures"]
IMAGE = png(make_images(4)[3])


def run_clients(
    count: int, work: Callable[[requests.Session], None], until: Callable[[], None]
) -> list[BaseException]:
    """`work` again and again in `count` threads while `until` runs; what any of them raised."""
    raised: list[BaseException] = []
    stop = threading.Event()

    def loop() -> None:
        with requests.Session() as session:
            while not stop.is_set():
                try:
                    work(session)
                except BaseException as error:
                    raised.append(error)
                    return

    threads = [threading.Thread(target=loop) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        until()
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    return raised


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
def test_swaps_under_load_are_never_stale_nor_mixed_and_survive_a_killed_worker(
    bundles: Path, tmp_path: Path
) -> None:
    live = {"tags": {"model-v1.0.0"}}  # what an answer to a request that begins now may come from
    seen: list[tuple[set[str], str, str]] = []

    with served(bundles, tmp_path, WORKERS="3", MODEL_TAG="model-v1.0.0") as server:
        killed: list[int] = []

        def work(session: requests.Session) -> None:
            allowed = set(live["tags"])
            try:
                answer = session.post(server.address + "/predict", data=IMAGE, timeout=30)
            except requests.RequestException:
                if killed:  # what was in the killed worker is lost; nothing else is
                    return
                raise
            assert answer.status_code == 200, answer.text
            seen.append((allowed | set(live["tags"]), answer.json()["model"], answer.headers["x-model-tag"]))

        def swap(number: int) -> None:
            tag = ("model-v1.0.0", "model-v1.1.0")[number % 2]
            live["tags"] = live["tags"] | {tag}
            answer = server.swap(tag)
            assert answer.status_code == 200 and answer.json()["workers"] == 3, answer.text
            live["tags"] = {tag}

        def swaps() -> None:
            for number in range(1, 21):
                swap(number)

        assert run_clients(8, work, swaps) == []
        assert len(seen) > 100 and {tag for _, tag, _ in seen} == {"model-v1.0.0", "model-v1.1.0"}
        assert all(tag == header for _, tag, header in seen)
        assert all(tag in allowed for allowed, tag, _ in seen)

        seen.clear()
        killed.append(server.pids()[1])

        def kill() -> None:
            swap(1)
            os.kill(killed[0], signal.SIGKILL)
            server.session.close()  # its connection may have been the dead worker's
            for number in range(2, 6):
                swap(number)

        assert run_clients(4, work, kill) == []
        assert wait(lambda: len(server.pids()) == 3 and killed[0] not in server.pids(), 5)
        tags = set()
        for _ in range(60):  # new connections, so that every worker is asked
            tags.add(requests.get(server.address + "/ready", timeout=10).json()["model"])
        assert tags == {"model-v1.1.0"} and all(tag in allowed for allowed, tag, _ in seen)


def test_metrics_add_up_over_workers_and_survive_a_killed_one(bundles: Path, tmp_path: Path) -> None:
    with served(bundles, tmp_path, WORKERS="2") as server:

        def ask(_: int) -> int:
            return requests.post(server.address + "/predict", data=IMAGE, timeout=10).status_code

        with ThreadPoolExecutor(6) as at_once:  # one after the other, one worker could take them all
            assert set(at_once.map(ask, range(60))) == {200}
        workers = {event["worker"] for event in server.events("request") if event["route"] == "/predict"}
        assert workers == {0, 1}
        for _ in range(5):
            assert server.metric("ml_serve_requests_total", route="/predict") == 60
            assert server.metric("ml_serve_predictions_total") == server.metric("ml_serve_score_count") == 60
        before = server.pids()
        os.kill(before[0], signal.SIGKILL)
        assert wait(lambda: len(server.pids()) == 2 and server.pids() != before, 5)
        assert wait(lambda: len(server.events("model_live")) == 3, 5)
        server.session.close()
        for _ in range(20):
            assert requests.post(server.address + "/predict", data=IMAGE, timeout=10).status_code == 200
        assert server.metric("ml_serve_requests_total", route="/predict") == 80
        assert server.events("worker_died")[0]["exit_code"] == -9


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_turns_readiness_first_and_drops_no_request(
    bundles: Path, tmp_path: Path, workers: str
) -> None:
    answers: list[int] = []
    with served(bundles, tmp_path, WORKERS=workers, SERVE_DRAIN="1.5") as server:

        def is_ready() -> bool:
            return requests.get(server.address + "/ready", timeout=10).status_code == 200

        ended = threading.Event()

        def work(session: requests.Session) -> None:
            if ended.is_set():
                time.sleep(0.01)
                return
            answers.append(session.post(server.address + "/predict", data=IMAGE, timeout=10).status_code)

        def stop() -> None:
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            assert wait(lambda: not is_ready(), 1.4)
            before = len(answers)
            time.sleep(0.3)
            assert len(answers) > before  # still answered, for whoever has not turned away yet
            assert requests.get(server.address + "/health", timeout=10).status_code == 200
            ended.set()
            server.process.wait(20)

        assert run_clients(6, work, stop) == []
        assert len(answers) > 50 and set(answers) == {200}
        assert server.process.returncode == 0


def test_request_that_is_under_way_is_finished_after_sigterm(bundles: Path, tmp_path: Path) -> None:
    with served(bundles, tmp_path, SERVE_TIMEOUT="8") as server:
        with socket.create_connection(
            ("127.0.0.1", int(server.address.rpartition(":")[2])), 10
        ) as connection:
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(IMAGE)}\r\n\r\n".encode()
            connection.sendall(head + IMAGE[:20])
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.7)
            connection.sendall(IMAGE[20:])
            answer = connection.recv(2000)
            assert b" 200 OK" in answer and b"connection: close" in answer.lower()
        assert server.process.wait(10) == 0


def test_overload_is_answered_by_503_with_retry_after_while_health_answers(
    bundles: Path, tmp_path: Path
) -> None:
    with served(bundles, tmp_path, SERVE_CONCURRENCY="2", SERVE_TIMEOUT="20") as server:
        address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
        slow = [socket.create_connection(address, 10) for _ in range(3)]
        for connection in slow:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        time.sleep(0.3)
        answer = server.post("/predict", data=IMAGE)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["type"] == "urn:problem:busy"
        started = time.monotonic()
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        assert time.monotonic() - started < 1
        assert server.metric("ml_serve_in_flight") == 3  # two that wait for their bodies, and this one
        for connection in slow:
            connection.close()
        assert wait(lambda: server.post("/predict", data=IMAGE).status_code == 200, 5)


def test_large_bodies_at_a_time_are_bounded(bundles: Path, tmp_path: Path) -> None:
    with served(bundles, tmp_path, SERVE_MAX_BODY="1000000", SERVE_TIMEOUT="20") as server:
        address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
        connections: list[Any] = []
        answers = b""
        for _ in range(8):
            connection = socket.create_connection(address, 10)
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + bytes(900_000)
            )
            connections.append(connection)
        time.sleep(0.5)
        for connection in connections:
            connection.settimeout(0.2)
            try:
                answers += connection.recv(1000)
            except TimeoutError:
                pass
            connection.close()
        assert b" 503 " in answers and b"retry-after: 1" in answers.lower()


def test_client_that_does_not_read_its_answers_is_dropped(bundles: Path, tmp_path: Path) -> None:
    many = struct.pack(">BBBBIII", 0, 0, 8, 3, 1000, 28, 28) + bytes(1000 * 28 * 28)
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(many)}\r\n\r\n".encode()
    with served(bundles, tmp_path, SERVE_TIMEOUT="1") as server:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))
            connection.settimeout(10)
            for _ in range(12):  # megabytes of answers, more than the kernel keeps for it
                try:
                    connection.sendall(head + many)
                except OSError:
                    break
            assert wait(lambda: server.metric("ml_serve_in_flight") == 1, 15)


def test_worker_that_cannot_begin_ends_the_server(bundles: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(bundles, tmp_path / "models"))
    write_golden(models / "model-v1.0.0", shift=5e-4)
    write_experiment(models / "model-v1.0.0")
    for workers in ("1", "2"):
        with pytest.raises((AssertionError, requests.ConnectionError), match="golden answers"):
            with served(
                models, tmp_path / f"state{workers}", WORKERS=workers, MODEL_TAG="model-v1.0.0"
            ) as server:
                assert isinstance(server, Served)


def test_swap_outlives_a_restart_when_the_state_is_kept(bundles: Path, tmp_path: Path) -> None:
    with served(bundles, tmp_path, MODEL_TAG="model-v1.0.0") as server:
        assert server.swap("model-v1.1.0").status_code == 200
    with served(bundles, tmp_path, MODEL_TAG="model-v1.0.0") as server:
        assert server.get("/ready").json()["model"] == "model-v1.1.0"
