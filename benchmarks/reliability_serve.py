"""What the server survives, at full size: `python -m benchmarks.reliability_serve [--small] [PART …]`.

Real servers, real ONNX Runtime; wants a quiet machine, as parts have time limits. tests/test_serve*.py and
tests/test_live_model.py run the same with smaller counts.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ml import files
from ml.errors import UserError, exit_on_user_error
from ml.serve import model, onnx_file
from ml.serve.model import Refused
from tests.serving import TOKEN, Served, hostile_models, make_bundle, make_images, make_variant, png, served
from tests.test_serve_images import HOSTILE
from tests.test_serve_schema import fuzz

RESULT = files.REPORTS / "bench" / "reliability_serve.json"
LIMIT = 2**28
Tags = ("model-v1.0.0", "model-v1.1.0")
IMAGE = png(make_images(4)[3])
Answers = dict[str, Any]


class Client:
    """One connection that is kept, with as little Python between as possible."""

    def __init__(self, server: Served) -> None:
        self.port = int(server.address.rpartition(":")[2])
        self.reader: asyncio.StreamReader | None = None

    async def ask(self, path: str, body: bytes = b"", headers: str = "") -> tuple[int, dict[str, str], bytes]:
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        method = "POST" if body else "GET"
        self.writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode()
            + body
        )
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            found = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
            content = await self.reader.readexactly(int(found["content-length"]))
        except BaseException:
            self.close()
            raise
        if found.get("connection") == "close":
            self.close()
        return int(head[0].split()[1]), found, content

    def close(self) -> None:
        if self.reader is not None:
            self.writer.close()
        self.reader = None


def resident(server: Served) -> float:
    """MB of all workers."""
    lines = [Path(f"/proc/{pid}/status").read_text() for pid in server.pids()]
    return sum(int(text.split("VmRSS:")[1].split()[0]) for text in lines) / 1000


def hostile(models: Path, folder: Path, share: float) -> Answers:
    """Hostile model files: all refused by 4xx, the old model answers, memory stays."""
    wanted = hostile_models(models, models / Tags[0])
    with served(models, folder / "state", MODEL_TAG=Tags[0]) as server:
        server.swap(Tags[1], dry_run=True)
        for _ in range(50):
            server.post("/predict", data=IMAGE)
        before = resident(server)
        statuses = {tag: server.swap(tag).status_code for tag in wanted}
        still = server.post("/predict", data=IMAGE).json()["model"]
        grown = resident(server) - before
    for tag in wanted:
        path = models / tag
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    refused = sum(400 <= status < 500 for status in statuses.values())
    return {
        "models": len(wanted),
        "refused": refused,
        "old model answers": still == Tags[0],
        "memory grew by MB": round(grown, 1),
        "ok": refused == len(wanted) and still == Tags[0] and grown <= 20,
    }


def flips(models: Path, folder: Path, share: float) -> Answers:
    """Single bits of the pinned model flipped: all refused before anything is parsed."""
    count, refused = round(1000 * share), 0
    target = Path(shutil.copytree(models / Tags[0], folder / Tags[0]))
    whole = (target / "model.onnx").read_bytes()
    parse = onnx_file.parse
    parsed: list[int] = []
    setattr(onnx_file, "parse", lambda data: parsed.append(1))
    for place in random.Random(0).sample(range(len(whole) * 8), count):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (target / "model.onnx").write_bytes(flipped)
        try:
            model.check_bundle(target, LIMIT)
        except Refused as error:
            refused += error.check == "sha256"
    setattr(onnx_file, "parse", parse)
    return {"flips": count, "refused": refused, "parsed": len(parsed), "ok": refused == count and not parsed}


def swaps(models: Path, folder: Path, share: float) -> Answers:
    """Swaps under load of 50 clients in 3 workers: none failed, mixed or stale; then workers killed in between."""
    count = round(1000 * share)
    found: Counter[str] = Counter()
    live = set(Tags[:1])
    back: list[float] = []

    async def client(server: Served, stop: asyncio.Event, forgiving: bool) -> None:
        connection = Client(server)
        while not stop.is_set():
            allowed = set(live)
            try:
                status, headers, body = await connection.ask("/predict", IMAGE)
            except (OSError, asyncio.IncompleteReadError):
                found["lost with a killed worker" if forgiving else "failed"] += 1
                continue
            if status != 200:
                found["failed"] += 1
                continue
            tag = json.loads(body)["model"]
            found["answers"] += 1
            found["mixed"] += tag != headers["x-model-tag"]
            found["stale"] += tag not in allowed | live
        connection.close()

    async def swap(server: Served, manager: Client, number: int) -> None:
        tag = Tags[number % 2]
        live.add(tag)
        body = json.dumps({"tag": tag}).encode()
        headers = f"Content-Type: application/json\r\nAuthorization: Bearer {TOKEN}\r\n"
        for _ in range(20):
            try:
                status, _, _ = await manager.ask("/replace_ml_model", body, headers)
                break
            except (OSError, asyncio.IncompleteReadError):  # it was asked of the killed worker
                continue
        found["swaps"] += status == 200
        live.intersection_update({tag})

    async def run(server: Served) -> None:
        stop, manager = asyncio.Event(), Client(server)
        clients = [asyncio.create_task(client(server, stop, False)) for _ in range(50)]
        for number in range(1, count + 1):
            await swap(server, manager, number)
        stop.set()
        await asyncio.gather(*clients)
        stop = asyncio.Event()
        clients = [asyncio.create_task(client(server, stop, True)) for _ in range(10)]
        for number in range(5):
            pids = server.pids()
            os.kill(pids[number % 3], signal.SIGKILL)
            started = time.monotonic()
            while len(server.events("model_live")) and (
                len(server.pids()) < 3 or set(pids) == set(server.pids())
            ):
                await asyncio.sleep(0.01)
            await swap(server, manager, number)
            back.append(time.monotonic() - started)
        stop.set()
        await asyncio.gather(*clients)

    with served(models, folder / "state", WORKERS="3", MODEL_TAG=Tags[0]) as server:
        asyncio.run(run(server))
        last = {server.get("/ready").json()["model"]}
        for _ in range(60):
            server.session.close()
            last.add(server.get("/ready").json()["model"])
    return {
        **found,
        "seconds until all workers are back and swapped": round(max(back), 2),
        "one model everywhere": len(last) == 1,
        "ok": not (found["failed"] or found["mixed"] or found["stale"])
        and found["swaps"] == count + 5
        and max(back) < 5
        and len(last) == 1,
    }


def shutdown(models: Path, folder: Path, share: float) -> Answers:
    """SIGTERM while 600 requests are sent by clients that turn away when /ready says so: none dropped."""
    found: Counter[str] = Counter()
    order: list[str] = []

    async def run(server: Served) -> float:
        async def client() -> None:
            connection = Client(server)
            for _ in range(20):
                if "not ready" in order:
                    break
                try:
                    status, _, _ = await connection.ask("/predict", IMAGE)
                    found["answered" if status == 200 else "failed"] += 1
                except (OSError, asyncio.IncompleteReadError):
                    found["dropped"] += 1
                await asyncio.sleep(random.random() * 0.1)
            connection.close()

        async def watch() -> None:
            connection = Client(server)
            while "not ready" not in order:
                status, _, _ = await connection.ask("/ready")
                if status == 503:
                    order.append("not ready")
                await asyncio.sleep(0.05)
            connection.close()

        tasks = [asyncio.create_task(client()) for _ in range(30)] + [asyncio.create_task(watch())]
        await asyncio.sleep(0.4)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
        await asyncio.to_thread(server.process.wait, 25)
        return time.monotonic() - started

    with served(models, folder / "state", WORKERS="2", SERVE_DRAIN="3") as server:
        seconds = asyncio.run(run(server))
    return {
        **found,
        "readiness turned first": order == ["not ready"],
        "seconds to the end": round(seconds, 1),
        "ok": not found["dropped"] and not found["failed"] and order == ["not ready"] and seconds < 20,
    }


PROBE = """
import http.client, sys, time
connection, end = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    began = time.perf_counter()
    connection.request("GET", "/health")
    connection.getresponse().read()
    print(time.perf_counter() - began, flush=True)
    time.sleep(0.02)
"""


def overload(models: Path, folder: Path, share: float) -> Answers:
    """Ten times what one worker can do, for 60 s: 200, 429 or 503 only, liveness within 100 ms, bounded memory."""
    picture = png(np.kron(make_images(4)[3], np.ones((36, 36), np.uint8)), "JPEG", quality=90)
    found: Counter[int] = Counter()

    async def measure(server: Served) -> float:
        async def client() -> None:
            connection = Client(server)
            while time.monotonic() < end:
                await connection.ask("/predict", picture)
                found[0] += 1
            connection.close()

        end = time.monotonic() + 3
        await asyncio.gather(*(client() for _ in range(4)))
        return found.pop(0) / 3

    async def flood(server: Served, rate: float, seconds: float) -> None:
        free: list[Client] = []
        waiting: set[asyncio.Task[None]] = set()

        async def one() -> None:
            connection = free.pop() if free else Client(server)
            try:
                status, _, _ = await connection.ask("/predict", picture)
                found[status] += 1
            except (OSError, asyncio.IncompleteReadError):
                found[-1] += 1
            free.append(connection)

        started, sent = time.monotonic(), 0
        while (now := time.monotonic() - started) < seconds:
            while sent < now * rate and len(waiting) < 900:
                task = asyncio.create_task(one())
                waiting.add(task)
                task.add_done_callback(waiting.discard)
                sent += 1
            await asyncio.sleep(0.002)
        await asyncio.gather(*waiting)

    with served(models, folder / "state") as server:
        capacity = asyncio.run(measure(server))
        before = resident(server)
        # in a process of its own: the flood would keep its own probe waiting
        command = [sys.executable, "-c", PROBE, server.address.rpartition(":")[2], str(60 * share)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as probe:
            asyncio.run(flood(server, 10 * capacity, 60 * share))
            assert probe.stdout is not None
            slowest = [float(line) for line in probe.stdout]
        grown = resident(server) - before
    late = sorted(slowest)
    return {
        "capacity, requests/s": round(capacity),
        "answers": {str(status): count for status, count in sorted(found.items())},
        "liveness, ms": {"p99": round(late[int(len(late) * 0.99)] * 1000), "worst": round(late[-1] * 1000)},
        "memory grew by MB": round(grown, 1),
        "ok": set(found) <= {200, 429, 503} and late[int(len(late) * 0.99)] <= 0.1 and grown <= 50,
    }


def uploads(models: Path, folder: Path, share: float) -> Answers:
    """Abusive uploads: each 413, 415 or 422 within 200 ms."""
    slowest, wrong = 0.0, []
    cases = [data for data, _ in HOSTILE] + [bytes(10 * 2**20 + 1)]
    with served(models, folder / "state") as server:
        server.post("/predict", data=png(make_images(1)[0], "BMP"))
        for number, data in enumerate(cases):
            started = time.perf_counter()
            status = server.post("/predict", data=data).status_code
            slowest = max(slowest, time.perf_counter() - started)
            if status not in (413, 415, 422):
                wrong.append((number, status))
    return {
        "uploads": len(cases),
        "wrong": wrong,
        "slowest, ms": round(slowest * 1000),
        "ok": not wrong and slowest <= 0.2,
    }


def schema(models: Path, folder: Path, share: float) -> Answers:
    """schemathesis, thousands of cases a route: no 5xx."""
    with served(models, folder / "state") as server:
        code = fuzz(server.address, max(10, round(2000 * share)), folder / "log")
        asked = server.metric("ml_serve_requests_total")
        faults = sum(
            server.metric("ml_serve_requests_total", status=str(status)) for status in range(500, 600)
        )
    return {"requests": asked, "5xx": faults, "exit code": code, "ok": code == 0 and faults == 0}


SPY = """
import os, sys
def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "subprocess.Popen"):
        if not isinstance(arguments[0], int):  # a descriptor: opened before, by name
            os.write(LOG, (repr((event, str(arguments[0]))) + "\\n").encode())
LOG = os.open(os.environ["SPY_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(hook)
"""


def tags(models: Path, folder: Path, share: float) -> Answers:
    """Hostile tags: no file outside the folders of models is opened. No or a wrong token: refused, nothing logged."""
    count = round(10_000 * share)
    (folder / "spy").mkdir()
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    chosen = random.Random(0)
    pieces = ["../", "..\\", "/etc/passwd", "%2e%2e%2f", "\0", "model-v1.0.0", "\n", "~", "$(id)", "`id`", "a" * 90, "é", ";", "|", "-", "--upload-pack=x", "refs/", "@{0}", "*", "\u202e"]  # fmt: skip
    hostile_tags = [
        "".join(chosen.choice([*pieces, *string.printable]) for _ in range(chosen.randint(1, 8)))
        for _ in range(count)
    ]
    hostile_tags = [tag for tag in hostile_tags if tag not in Tags]
    count = len(hostile_tags)
    statuses: Counter[int] = Counter()
    secret = "hunter2-" + "x" * 20

    async def run(server: Served) -> None:
        manager = Client(server)
        kind = "Content-Type: application/json\r\n"
        for tag in hostile_tags:
            body = json.dumps({"tag": tag}).encode()
            status, _, _ = await manager.ask(
                "/replace_ml_model", body, f"{kind}Authorization: Bearer {TOKEN}\r\n"
            )
            statuses[status] += 1
        for number in range(500):
            header = (
                "",
                f"Authorization: Bearer {secret}{number}\r\n",
                f"Authorization: Basic {secret}\r\n",
            )[number % 3]
            status, _, _ = await manager.ask(
                "/replace_ml_model", json.dumps({"tag": Tags[1]}).encode(), kind + header
            )
            statuses[-status] += 1

    log = folder / "opened"
    environment = {"PYTHONPATH": str(folder / "spy"), "SPY_LOG": str(log)}
    with served(models, folder / "state", MODEL_TAG=Tags[0], **environment) as server:
        server.swap("model-v9")  # loads the framework
        asyncio.run(asyncio.sleep(0.2))
        start = log.stat().st_size
        asyncio.run(run(server))
        with open(log) as opened:
            opened.seek(start)
            lines = [line for line in opened if not any(f"{place}" in line for place in (models, folder / "state", sys.prefix, sys.base_prefix))]  # fmt: skip
        live = server.get("/ready").json()["model"]
    text = "".join(server.log)
    refused = sum(number for status, number in statuses.items() if 400 <= status < 500)
    return {
        "tags": count,
        "refused": refused,
        "opened elsewhere": lines[:5],
        "without token": 500,
        "refused by 401": statuses[-401],
        "secrets in the log": text.count("hunter2") + text.count(TOKEN),
        "ok": refused == count
        and not lines
        and statuses[-401] == 500
        and "hunter2" not in text
        and TOKEN not in text
        and live == Tags[0],
    }


PARTS: dict[str, Callable[[Path, Path, float], Answers]] = {
    "hostile": hostile,
    "flips": flips,
    "swaps": swaps,
    "shutdown": shutdown,
    "overload": overload,
    "uploads": uploads,
    "schema": schema,
    "tags": tags,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability_serve", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--small", action="store_true", help="a twentieth of every count and time")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}")
    answers: dict[str, Answers] = {}
    with tempfile.TemporaryDirectory(prefix="ml-reliability-") as folder:
        models = Path(folder) / "models"
        make_bundle(models, Tags[0], created="2026-01-01T00:00:00Z")
        make_variant(models / Tags[0], Tags[1], created="2026-02-01T00:00:00Z")
        for name in arguments.parts or PARTS:
            place = Path(folder) / name
            place.mkdir()
            answers[name] = PARTS[name](models, place, 0.05 if arguments.small else 1.0)
            print(json.dumps({name: answers[name]}), flush=True)
    files.write_json(RESULT, answers)
    if not all(answer["ok"] for answer in answers.values()):
        raise UserError("Something was not as it must be; see above.")


if __name__ == "__main__":
    exit_on_user_error(main)
